"""The tensors of an adapter as a file holds them: their names, and what identifies them."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import safetensors.torch
from torch import Tensor, nn

from ..heads.spec import HeadSpec
from ..nn.twin import trained
from ..placement.spec import SiteSpec
from ..runtime.lookup import sites_of
from ..runtime.site import Entry

__all__ = ["Held", "digest_of", "dtype_name", "held_by", "tensor_key", "tensors_of"]


class Held(NamedTuple):
    """A module of the adapter, and where it is."""

    path: str
    host: nn.Module
    entry: Entry
    module: nn.Module


def held_by(model: nn.Module, name: str, *, heads: bool) -> list[Held]:
    """All modules of an adapter, in the model's order."""
    return [
        Held(path, host, entry, module)
        for path, host, site in sites_of(model)
        for entry, module in site.modules_of(name)
        if heads or entry.spec is not None
    ]


def tensors_of(held: Sequence[Held]) -> dict[str, Tensor]:
    """Copies of the tensors of these modules by their names in the file; what several share, once."""
    tensors = {}
    saved: set[int] = set()
    for path, _, entry, module in held:
        source = trained(module)
        if id(source) in saved:
            continue
        saved.add(id(source))  # with its first site: in a part of the model that may be a twin
        for tensor, value in source.state_dict().items():
            # A clone: the format has no tensors that share memory, and a head may tie two of its own.
            tensors[tensor_key(entry.spec, path, tensor, entry.head)] = value.detach().cpu().contiguous().clone()
    return tensors


def digest_of(model: nn.Module, name: str) -> str:
    """SHA-256 over an adapter's own tensors, names, shapes and dtypes, without its heads: the same in every file of it."""
    content = safetensors.torch.save(tensors_of(held_by(model, name, heads=False)))
    return hashlib.sha256(content).hexdigest()


def tensor_key(spec: SiteSpec | None, path: str, tensor: str, head: HeadSpec | None = None) -> str:
    """The name of a tensor in the file: under "sites", or under "heads" without a spec.

    Where an adapter may have several modules at a host, the name says which: of a union, of a Parameter, of a placement;
    a head on the output by the head's name, behind an "@".
    """
    if spec is None:
        place = path if head is None or head.above is None else f"@{head.config.name}"
        return f"heads/{place}/{tensor}"
    which = [str(spec.member) if spec.member else "", *spec.parameters[:1], spec.tag]
    return "/".join(["sites", path, *(part for part in which if part), tensor])


def dtype_name(tensor: Tensor) -> str:
    """A dtype's name as the manifest spells it: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
