"""One file per stage: its node and its run."""
