"""The words that all packages share; at import nothing but the standard library."""
