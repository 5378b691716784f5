"""Which base an adapter belongs to: the structure around its sites, and the base's weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..runtime.originals import fingerprint
from ..structure.base_tensors import base_parameters
from ..structure.hosts import host_type
from ..structure.paths import ancestors
from .manifest import BaseIdentity, Metadata

__all__ = ["base_identity", "output_structure", "structure_of"]


def structure_of(model: nn.Module, path: str) -> str:
    """A hash over what a base must share at a site: the host's path and type, and parameter shapes.

    The shapes are those of the host or, where it has no parameters, of the innermost module around it that does.
    """
    shapes: list[str] = []
    for around in ancestors(path):
        shapes = [f"{name} {tuple(p.shape)}" for name, p in base_parameters(model.get_submodule(around))]
        if shapes:
            break
    return _sha256([path, host_type(model.get_submodule(path)), *shapes])


def output_structure(path: str, width: int) -> str:
    """A hash over what a base must share where a head is on its output: which module yields it, and how wide it is."""
    return _sha256([path, "output", str(width)])


def base_identity(model: nn.Module, structures: Iterable[str], metadata: Metadata) -> BaseIdentity:
    """Who the base is. Hugging Face models tell their id (a path on this machine is none); others may, in metadata."""
    config = getattr(model, "config", None)
    hub_id = getattr(config, "_name_or_path", None) or None
    if hub_id and (Path(hub_id).exists() or Path(hub_id).is_absolute()):
        hub_id = None
    return BaseIdentity(
        class_path=f"{type(model).__module__}.{type(model).__qualname__}",
        structure=_sha256(structures),
        fingerprint=fingerprint(model),
        hub_id=metadata.base_id or hub_id,
        revision=metadata.base_revision or getattr(config, "_commit_hash", None),
    )


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
