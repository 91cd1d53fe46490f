"""`llmkit prove speculation`: drafts change nothing of what is made, shown on the build that is installed."""
