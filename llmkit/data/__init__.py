"""From files to batches: sources, rendering with exact weights, packing, order."""
