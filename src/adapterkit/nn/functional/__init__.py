"""Tensor functions: no state, no modules."""
