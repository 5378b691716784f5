"""Placement: from a config and a model to sites, the modules and tensors that adapters act on."""
