"""Transformers written by hand, as people write them: what no library's conventions helped discovery with."""
