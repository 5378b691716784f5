"""Adapters on disk: a directory with `adapter.safetensors`, `adapter.json` (the manifest) and `README.md` (a card)."""

from .load import load_adapter
from .manifest import FORMAT_VERSION, Manifest, Metadata
from .save import save_adapter

__all__ = ["FORMAT_VERSION", "Manifest", "Metadata", "load_adapter", "save_adapter"]
