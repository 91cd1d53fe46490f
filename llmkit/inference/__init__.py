"""Making text."""
