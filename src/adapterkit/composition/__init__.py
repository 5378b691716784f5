"""Compositions: which adapters run, in which order, on which rows."""
