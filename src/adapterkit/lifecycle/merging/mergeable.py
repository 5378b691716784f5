"""What an adapter may be merged into: a plain Parameter of its host's own, that nothing else reads or computes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...structure.base_tensors import owner_at, parameter_at
from ...structure.paths import SITE

__all__ = ["HolderKey", "Ties", "refusal"]


# A module, by its `id`, and the name that a tensor has in it.
HolderKey = tuple[int, str]


class Ties:
    """Which base tensors of a model are one tensor, or share memory."""

    def __init__(self, model: nn.Module) -> None:
        # Both by the `id` of a tensor, and of its storage: who holds it, and the bytes that the tensors in it lie within.
        self._holders: dict[int, list[tuple[HolderKey, str]]] = {}
        self._spans: dict[int, list[tuple[int, int, int, str]]] = {}
        for path, module in model.named_modules():
            if SITE in path.split("."):  # an adapter's own
                continue
            for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._note(module, leaf, tensor, f"{path}.{leaf}".lstrip("."))

    def _note(self, module: nn.Module, leaf: str, tensor: Tensor, name: str) -> None:
        self._holders.setdefault(id(tensor), []).append(((id(module), leaf), name))
        if _has_memory(tensor):
            storage = tensor.untyped_storage().data_ptr()
            self._spans.setdefault(storage, []).append((*_span(tensor), id(tensor), name))

    def others(self, parameter: nn.Parameter, own: Collection[HolderKey]) -> list[str]:
        """Return the names of tensors that would change with this Parameter, other than those in `own`.

        Args:
            parameter: The Parameter that is to change.
            own: Its holders that are meant to change.
        """
        same = [name for key, name in self._holders.get(id(parameter), ()) if key not in own]
        if not _has_memory(parameter):
            return same
        start, stop = _span(parameter)
        beside = self._spans.get(parameter.untyped_storage().data_ptr(), ())
        # Tensors may lie side by side in one storage (flattened parameters): only those that overlap change together.
        return same + [name for a, b, other, name in beside if other != id(parameter) and a < stop and start < b]


def refusal(
    host: nn.Module, names: Sequence[str], ties: Ties, elsewhere: Mapping[int, Collection[HolderKey]]
) -> str | None:
    """Explain why this Parameter cannot take a merge; return None if it can.

    Args:
        host: The module that is adapted.
        names: The Parameter's names from the host on: ("weight",), or several where the host reads it under several.
        ties: What the model's tensors share.
        elsewhere: Map the `id` of a Parameter to the holders at which the same merge changes it.
    """
    owners = [owner_at(host, name) for name in names]
    owner, leaf = owners[0]
    parameter = parameter_at(host, names[0])
    if owner is None or parameter is None:
        return _why_no_parameter(host, owner, leaf)
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.max_norm is not None:
        return f"with max_norm={owner.max_norm} it changes its {leaf} as it looks rows up; set max_norm to None first"
    if any(parameter_at(host, name) is not parameter for name in names):
        return f"its {', '.join(names)} were one Parameter when the adapter was added, and are not any more; add it anew"
    own = {(id(owner), name) for owner, name in owners} | set(elsewhere.get(id(parameter), ()))
    return _why_not_plain(parameter, leaf) or _why_shared(parameter, leaf, ties, own)


def _why_no_parameter(host: nn.Module, owner: nn.Module | None, leaf: str) -> str:
    """Explain what is under this name instead of a Parameter: nothing, a buffer, or a tensor that is computed.

    Args:
        host: The module that is adapted.
        owner: The module of the host that should hold the Parameter; None if it is not there.
        leaf: The Parameter's name in `owner`.
    """
    if owner is None or not isinstance(getattr(owner, leaf, None), Tensor):
        # A quantised layer often keeps its values in buffers of other names, such as "codes".
        held = [name for name, _ in (owner or host).named_buffers(recurse=False)]
        other = f"it holds {', '.join(map(repr, held[:3]))}; quantised, perhaps" if held else "nor a buffer"
        return f"it has no {leaf!r} ({other}); activate the adapter beside the layer instead"
    if leaf in owner._buffers:
        return (
            f"its {leaf} is a buffer of {getattr(owner, leaf).dtype}, no Parameter (quantised, perhaps), in which a small "
            "change would be lost; activate the adapter beside the layer instead, or load the model unquantised first"
        )
    return f"its {leaf} is no Parameter: {_computed_from(owner, leaf)}"


def _why_not_plain(parameter: nn.Parameter, leaf: str) -> str | None:
    """Explain why a Parameter's values cannot be replaced by others; return None if they can.

    Each reason has a message of its own, because each is mended in another way.
    """
    if parameter.is_meta:
        return f"its {leaf} is on the meta device: it has no values, or they are offloaded; load it first"
    if not parameter.numel():
        return f"its {leaf} is empty here (sharded, perhaps); gather it first"
    # Not `isinstance`: what a subclass shows as its values may be made of others (DTensor, packed 4-bit weights).
    if type(parameter) is not nn.Parameter:
        return (
            f"its {leaf} is a {type(parameter).__name__} (packed, quantised or sharded), whose values are not plain numbers"
        )
    # Numbers of one byte (float8) cannot hold a small change.
    if not parameter.is_floating_point() or parameter.element_size() == 1:
        return f"its {leaf} is {parameter.dtype} (quantised, perhaps); load the model in float32, bfloat16 or float16 first"
    if parameter.layout != torch.strided or parameter.is_quantized:
        return f"its {leaf} is not a dense tensor (layout {parameter.layout})"
    if any(size > 1 and step == 0 for size, step in zip(parameter.shape, parameter.stride(), strict=True)):
        return f"its {leaf} is an expanded tensor, several of whose values are one in memory"
    return None


def _why_shared(parameter: nn.Parameter, leaf: str, ties: Ties, own: Collection[HolderKey]) -> str | None:
    """Explain which other tensors would change with a Parameter; return None if none would."""
    others = ties.others(parameter, own)
    if not others:
        return None
    return (
        f"its {leaf} is shared with {', '.join(map(repr, others[:3]))}, which the adapter does not change, but merging "
        "would; untie them, or adapt the Parameter itself, by its name"
    )


def _computed_from(owner: nn.Module, leaf: str) -> str:
    """Say what a weight is computed from before each forward, and how to make it plain."""
    if parametrize.is_parametrized(owner, leaf):
        kinds = [type(module).__name__ for module in _parametrizations(owner, leaf)]
        return (
            f"it is computed by torch.nn.utils.parametrize ({', '.join(kinds)}), and would be again; make it plain with "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {leaf!r}) first"
        )
    # The hooks of older torch keep what they compute from beside it: weight_g and weight_v, or weight_orig.
    sources = [name for name in owner._parameters if name.startswith(f"{leaf}_")]
    return (
        f"it is computed from {sources or 'something else'} before each forward, and would be again; make it plain (with "
        "torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove) first"
    )


def _parametrizations(owner: Any, leaf: str) -> Iterator[nn.Module]:
    return iter(owner.parametrizations[leaf])


def _has_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor lies in memory as its shape and strides say."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and not tensor.is_quantized and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the bytes of its storage that a tensor's values lie within, as (start, stop)."""
    start = int(tensor.storage_offset())
    # The last value: at the last index of each axis. An expanded axis has stride 0 and adds nothing.
    last = start + sum((size - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.element_size(), (last + 1) * tensor.element_size()
