"""Which base an adapter belongs to: the structure around its sites, and the base's weights."""

import hashlib
from collections.abc import Iterable

from torch import nn

from ..base import base_tensors, fingerprint
from ..placement import host_type
from .manifest import BaseIdentity, Metadata

__all__ = ["base_identity", "structure_of"]


def structure_of(model: nn.Module, path: str) -> str:
    """A hash over what a base must share at a site: the host's path and type, and parameter shapes.

    The shapes are those of the host or, where it has no parameters, of the innermost module around it that does.
    """
    parts = path.split(".") if path else []
    shapes: list[str] = []
    for n in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:n]))
        shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in base_tensors(around)]
        if shapes:
            break
    return _sha256([path, host_type(model.get_submodule(path)), *shapes])


def base_identity(model: nn.Module, structures: Iterable[str], metadata: Metadata) -> BaseIdentity:
    """Who the base is. Hugging Face models tell their id; anyone else may through the metadata."""
    config = getattr(model, "config", None)
    return BaseIdentity(
        class_path=f"{type(model).__module__}.{type(model).__qualname__}",
        structure=_sha256(structures),
        fingerprint=fingerprint(model),
        hub_id=metadata.base_id or getattr(config, "_name_or_path", None) or None,
        revision=metadata.base_revision or getattr(config, "_commit_hash", None),
    )


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
