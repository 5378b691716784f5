"""What an adapter may be merged into: a plain Parameter of its host's own, that nothing else reads or computes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...structure.base_tensors import owner_at, parameter_at
from ...structure.paths import SITE

__all__ = ["Ties", "refusal"]


class Ties:
    """Which base tensors of a model are, or share memory with, which others."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: dict[int, list[tuple[int, str, str]]] = {}
        self._spans: dict[int, list[tuple[int, int, int, str]]] = {}
        for path, module in model.named_modules():
            if SITE in path.split("."):
                continue
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    name = f"{path}.{leaf}".lstrip(".")
                    self._holders.setdefault(id(tensor), []).append((id(module), leaf, name))
                    if _has_memory(tensor):
                        where = tensor.untyped_storage().data_ptr()
                        self._spans.setdefault(where, []).append((*_span(tensor), id(tensor), name))

    def others(self, parameter: nn.Parameter, own: Collection[tuple[int, str]]) -> list[str]:
        """The names of tensors that would change with this one, but for those that are meant.

        Args:
            own: The holders that are meant: the `id` of the module, and the name there.
        """
        same = [name for holder, leaf, name in self._holders.get(id(parameter), ()) if (holder, leaf) not in own]
        if not _has_memory(parameter):
            return same
        start, stop = _span(parameter)
        beside = self._spans.get(parameter.untyped_storage().data_ptr(), ())
        return same + [name for a, b, other, name in beside if other != id(parameter) and a < stop and start < b]


def refusal(
    host: nn.Module, names: Collection[str], ties: Ties, elsewhere: Mapping[int, Collection[tuple[int, str]]]
) -> str | None:
    """Why nothing can be merged into a Parameter, by its names from the host on; None if something can.

    Args:
        elsewhere: By the `id` of a Parameter: where it is changed in the same way, as in `Ties.others`.
    """
    owners = [owner_at(host, name) for name in names]
    owner, leaf = owners[0]
    parameter = owner._parameters[leaf] if owner is not None and leaf in owner._parameters else None
    if owner is None or (parameter is None and not isinstance(getattr(owner, leaf, None), Tensor)):
        held = [name for name, _ in (owner or host).named_buffers(recurse=False)]
        other = f"it holds {', '.join(map(repr, held[:3]))}; quantised, perhaps" if held else "nor a buffer"
        return f"it has no {leaf!r} ({other}); activate the adapter beside the layer instead"
    if parameter is None and leaf in owner._buffers:
        return (
            f"its {leaf} is a buffer of {getattr(owner, leaf).dtype}, no Parameter (quantised, perhaps), in which a small "
            "change would be lost; activate the adapter beside the layer instead, or load the model unquantised first"
        )
    if parameter is None:
        return f"its {leaf} is no Parameter: {_computed_from(owner, leaf)}"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.max_norm is not None:
        return f"with max_norm={owner.max_norm} it changes its {leaf} as it looks rows up; set max_norm to None first"
    if any(parameter_at(host, name) is not parameter for name in names):
        return f"its {', '.join(names)} were one Parameter when the adapter was added, and are not any more; add it anew"
    own = {(id(owner), name) for owner, name in owners} | set(elsewhere.get(id(parameter), ()))
    return _not_plain(parameter, leaf) or _shared(parameter, leaf, ties, own)


def _not_plain(parameter: nn.Parameter, leaf: str) -> str | None:
    """Why a Parameter's values cannot be replaced by others, if so."""
    if parameter.is_meta:
        return f"its {leaf} is on the meta device: it has no values, or they are offloaded; load it first"
    if not parameter.numel():
        return f"its {leaf} is empty here (sharded, perhaps); gather it first"
    if type(parameter) is not nn.Parameter:
        return (
            f"its {leaf} is a {type(parameter).__name__} (packed, quantised or sharded), whose values are not plain numbers"
        )
    if not parameter.is_floating_point() or parameter.element_size() == 1:
        return f"its {leaf} is {parameter.dtype} (quantised, perhaps); load the model in float32, bfloat16 or float16 first"
    if parameter.layout != torch.strided or parameter.is_quantized:
        return f"its {leaf} is not a dense tensor (layout {parameter.layout})"
    if any(size > 1 and step == 0 for size, step in zip(parameter.shape, parameter.stride(), strict=True)):
        return f"its {leaf} is an expanded tensor, several of whose values are one in memory"
    return None


def _shared(parameter: nn.Parameter, leaf: str, ties: Ties, own: Collection[tuple[int, str]]) -> str | None:
    """Which other tensors would change with a Parameter, if any."""
    others = ties.others(parameter, own)
    if not others:
        return None
    return (
        f"its {leaf} is shared with {', '.join(map(repr, others[:3]))}, which the adapter does not change, but merging "
        "would; untie them, or adapt the Parameter itself, by its name"
    )


def _computed_from(owner: nn.Module, leaf: str) -> str:
    """What a parametrised weight is computed from, and the way out."""
    if parametrize.is_parametrized(owner, leaf):
        kinds = [type(module).__name__ for module in _parametrizations(owner, leaf)]
        return (
            f"it is computed by torch.nn.utils.parametrize ({', '.join(kinds)}), and would be again; make it plain with "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {leaf!r}) first"
        )
    sources = [name for name in owner._parameters if name.startswith(f"{leaf}_")]
    return (
        f"it is computed from {sources or 'something else'} before each forward, and would be again; make it plain (with "
        "torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove) first"
    )


def _parametrizations(owner: Any, leaf: str) -> Iterator[nn.Module]:
    return iter(owner.parametrizations[leaf])


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory as its shape and strides say."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and not tensor.is_quantized and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor's values lie within, as (start, stop)."""
    start = int(tensor.storage_offset())
    last = start + sum((size - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.element_size(), (last + 1) * tensor.element_size()
