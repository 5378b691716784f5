"""Which base an adapter belongs to: the structure around its sites, and the base's weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..runtime.originals import fingerprint
from ..structure.attributes import attribute
from ..structure.base_tensors import base_parameters
from ..structure.hosts import host_type, known_shape
from ..structure.paths import ancestors
from .manifest import BaseIdentity, Metadata

__all__ = ["base_identity", "has_structure", "output_structure", "shapes_around", "structure_of"]


def structure_of(model: nn.Module, path: str, *, named: str | None = None) -> str:
    """Return a hash over what a base must share at a site: the host's path and type, and parameter shapes.

    Args:
        model: The base.
        path: The host's path in it.
        named: The path that goes into the hash, where this model is a part of the base, or has it as a part.
    """
    return _sha256([path if named is None else named, host_type(model.get_submodule(path)), *shapes_around(model, path)])


def has_structure(model: nn.Module, path: str, structure: str, *, named: str | None = None) -> bool:
    """Tell whether a host is as `structure_of` said of the one that an adapter was trained on."""
    # The first files hold the shapes as they were stored: of weights of four bits, packed.
    stored = [
        path if named is None else named,
        host_type(model.get_submodule(path)),
        *shapes_around(model, path, as_stored=True),
    ]
    return structure in (structure_of(model, path, named=named), _sha256(stored))


def shapes_around(model: nn.Module, path: str, *, as_stored: bool = False) -> list[str]:
    """Return the names and shapes of the parameters of a host: "weight (8, 16)".

    Of one without parameters they are those of the innermost module around it that has some.

    Args:
        as_stored: Give a quantised layer's weight the shape in which it is packed, and not that of what it stands for.
    """
    for around in ancestors(path):
        module = model.get_submodule(around)
        # Of the base alone: other adapters at the host are no part of its structure. Nor are buffers, whose shapes change.
        shapes = [
            f"{name} {tuple(p.shape) if as_stored else _shape_of(module, name, p)}" for name, p in base_parameters(module)
        ]
        if shapes:
            return shapes
    return []


def _shape_of(module: nn.Module, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter; of the weight of a Linear, however it is packed, the widths of that."""
    holder, _, leaf = name.rpartition(".")
    owner = module.get_submodule(holder)
    known = known_shape(owner) if leaf == "weight" and host_type(owner) == "Linear" else None
    if known is None or known.input_width is None:
        return tuple(parameter.shape)
    return known.width, known.input_width


def output_structure(path: str, width: int) -> str:
    """Return a hash over what a base must share where a head is on its output: which module yields it, and its width."""
    return _sha256([path, "output", str(width)])


def base_identity(model: nn.Module, structures: Iterable[str], metadata: Metadata) -> BaseIdentity:
    """Return who the base is. Hugging Face models tell their id; others may, in metadata.

    Args:
        model: The base.
        structures: What `structure_of` says of each site and head.
        metadata: Of the adapter; an id and a revision in it go before those of the model.
    """
    config = attribute(model, "config")
    # e.g. "bert-base-uncased"; "" for a model that was built from a config.
    hub_id = getattr(config, "_name_or_path", None) or None
    # `from_pretrained` of a folder leaves the folder's path: it tells nobody else anything, and may tell too much.
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
