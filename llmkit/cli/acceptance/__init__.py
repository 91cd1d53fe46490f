"""`llmkit prove cluster`: what only a cluster can show, against thresholds that were written down before."""
