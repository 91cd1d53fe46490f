"""What is trained beside a frozen base: peft's methods as recipe nodes, and merging."""
