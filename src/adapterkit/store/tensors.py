"""The tensors of an adapter as a file holds them: their names, and what identifies them."""

import hashlib
from collections.abc import Sequence

import safetensors.torch
from torch import Tensor, nn

from ..heads.spec import HeadSpec
from ..nn.twin import trained
from ..placement.spec import SiteSpec
from ..runtime.lookup import HeldModule, adapters_in

__all__ = ["digest_of", "dtype_name", "tensor_key", "tensors_of"]


def tensors_of(held: Sequence[HeldModule]) -> dict[str, Tensor]:
    """Copies of the tensors of these modules by their names in the file; what several share, once."""
    tensors = {}
    saved: set[int] = set()
    for path, _, _, entry, module in held:
        source = trained(module)
        if id(source) in saved:
            continue
        saved.add(id(source))  # with its first site: in a part of the model that may be a twin
        for tensor, value in source.state_dict().items():
            # A clone: the format has no tensors that share memory, and a head may tie two of its own.
            tensors[tensor_key(entry.spec, path, tensor)] = value.detach().cpu().contiguous().clone()
    return tensors


def digest_of(model: nn.Module, name: str) -> str:
    """SHA-256 over an adapter's own tensors, names, shapes and dtypes, without its heads: the same in every file of it."""
    content = safetensors.torch.save(tensors_of([held for held, _ in adapters_in(model).sites(name)]))
    return hashlib.sha256(content).hexdigest()


def tensor_key(spec: SiteSpec | HeadSpec, path: str, tensor: str) -> str:
    """Return the name of a tensor in the file: under "sites", or of a head under "heads".

    Where an adapter may have several modules at a host, the name says which: of a union, of a Parameter, of a placement;
    a head on the output by the head's name, behind an "@".
    """
    if isinstance(spec, HeadSpec):
        place = path if spec.above is None else f"@{spec.config.name}"
        return f"heads/{place}/{tensor}"
    which = [str(spec.member) if spec.member else "", *spec.parameters[:1], spec.tag]
    return "/".join(["sites", path, *(part for part in which if part), tensor])


def dtype_name(tensor: Tensor) -> str:
    """A dtype's name as the manifest spells it: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
