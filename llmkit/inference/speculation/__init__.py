"""Drafts of what follows, and how long they are: what they are never changes what is chosen."""
