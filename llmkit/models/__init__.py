"""Naming, fetching, checking and loading causal language models, and the attention they run on."""
