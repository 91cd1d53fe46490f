"""What answers are worth (rewards, environments), and what is learned from that."""
