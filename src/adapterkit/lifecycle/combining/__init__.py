"""Combining adapters: a new one whose change is a weighted sum of the changes of others."""

from .combine import How, combine

__all__ = ["How", "combine"]
