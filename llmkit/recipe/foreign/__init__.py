"""Configurations of other tools, turned into recipes: what has no counterpart is listed, never guessed."""
