"""How many drafts there can be."""

MOST = 63
"""Of one step and sequence: with the token before them as many as a tree's mask has bits."""
