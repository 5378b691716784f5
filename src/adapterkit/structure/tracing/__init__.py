"""Run a model once on small inputs, and record what its modules and tensors do."""
