"""Several adapters at one tensor: stacked, averaged, fused, or each on rows of its own."""
