"""The loop and its nodes."""
