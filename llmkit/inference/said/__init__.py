"""What a model said: its text taken apart into text, reasoning and tool calls, streamed and whole by one machine."""
