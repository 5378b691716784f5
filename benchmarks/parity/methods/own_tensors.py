"""The tensors of an adapter of ours, by the names and in the shapes of the comparison."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterkit.nn.functional.slices import Slices
from adapterkit.placement.spec import SiteSpec
from adapterkit.runtime.lookup import sites_of
from adapterkit.runtime.site import SiteEntry

from .case import SHARED, Key, Place

__all__ = ["COUPLING", "Own", "own_tensors"]

COUPLING = Place("coupling")
# Our names where the comparison has others. A coupling is two networks of two layers there.
_NAMES = {
    "ia3_l": "scale",
    "rule": "phm_rule",
    **{f"{side}_{part}": f"{side}.W_{part}" for side in ("down", "up") for part in ("left", "right")},
    **{
        f"{net}_{layer}_{kind}": f"{net.upper()}.{n}.{kind}"
        for net in "fg"
        for layer, n in (("down", 0), ("up", 2))
        for kind in ("weight", "bias")
    },
}  # fmt: skip


class Own(NamedTuple):
    """One tensor of ours, or the part of it that belongs to one part of a fused projection."""

    parameter: Tensor
    index: Any = ...

    def of(self, tensor: Tensor) -> Tensor:
        """That part of the parameter, or of its gradient."""
        return tensor[self.index]


def own_tensors(model: nn.Module, name: str) -> dict[Key, Own]:
    """Every tensor of an adapter; what its sites share comes last."""
    held = [
        (path, entry.spec, module)
        for path, _, site in sites_of(model)
        for entry, module in site.modules_of(name)
        if isinstance(entry, SiteEntry)
    ]
    blocks = Counter(_block(path) for path, _, module in held if _is_bottleneck(module))
    found: dict[Key, Own] = {}
    for path, spec, module in held:
        if _is_bottleneck(module):
            block = _block(path)
            found |= dict(_of_bottleneck(Place(block, "attention" if blocks[block] > 1 else "feedforward"), module))
            blocks[block] -= 1
        else:
            found |= dict(_of_weight(path, spec, module))
    return found | {key: own for _, _, module in held for key, own in _shared(module)}


def _is_bottleneck(module: nn.Module) -> bool:
    """Whether a module is a bottleneck, dense or of Kronecker products."""
    return "up_bias" in module._parameters


def _block(path: str) -> str:
    """The path of the repeated block that a module is in, or is."""
    found = re.match(r"(.*?\.\d+)(\.|$)", path)
    return found[1] if found else path


def _of_bottleneck(place: Place, module: nn.Module) -> Iterator[tuple[Key, Own]]:
    is_phm = "down_left" in module._parameters
    for name, parameter in module.named_parameters(recurse=False):
        called = _NAMES.get(name, name.replace("_bias", ".b") if is_phm else name)
        yield Key(place, called), Own(parameter)


def _of_weight(path: str, spec: SiteSpec, module: nn.Module) -> Iterator[tuple[Key, Own]]:
    """The tensors of a method that changes weights, of each part those that belong to it."""
    at = "input" if spec.at == "input" else "output"
    whole = f"{path}.{spec.parameters[0]}" if spec.parameters else path
    for name, parameter in module.named_parameters(recurse=False):
        if name == "delta":
            owner, _, leaf = whole.rpartition(".")
            yield Key(Place(owner), leaf), Own(parameter)
            continue
        called = _NAMES.get(name, name)
        if not spec.slices:
            yield Key(Place(whole, at=at), called), Own(parameter, 0 if name == "lambda_d" else ...)
            continue
        for n, (part, _) in enumerate(spec.slices):
            yield Key(Place(whole, part, at), called), Own(parameter, _index(name, parameter, spec.slices, n))


def _index(name: str, parameter: Tensor, parts: Slices, n: int) -> Any:
    """Where in a tensor of several parts the n-th one's lies: stacked, or by the output features of all in order."""
    if name == "lambda_d":
        return n
    if name == "lora_A":
        rank = len(parameter) // len(parts)
        return slice(n * rank, (n + 1) * rank)
    features = [_features(ranges) for _, ranges in parts]
    covered = sorted(feature for own in features for feature in own)
    return torch.tensor([covered.index(feature) for feature in features[n]])


def _features(ranges: Sequence[tuple[int, int]]) -> list[int]:
    return [feature for start, stop in ranges for feature in range(start, stop)]


def _shared(module: nn.Module) -> Iterator[tuple[Key, Own]]:
    """What the sites share: VeRA's matrices, a Compacter's rule, a coupling."""
    shared = getattr(module, "shared", None)
    for name, tensor in (*shared.named_parameters(), *shared.named_buffers()) if shared is not None else ():
        called = _NAMES.get(name, name)
        yield Key(COUPLING if called[:2] in ("F.", "G.") else SHARED, called), Own(tensor)
