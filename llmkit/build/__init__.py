"""Puts model, adapter, head and stepper together."""
