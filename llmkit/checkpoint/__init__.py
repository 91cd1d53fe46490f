"""Verified checkpoints of named tensors."""
