"""Tasks, scores and tables of predictions."""
