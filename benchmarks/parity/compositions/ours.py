"""Ours: the same three adapters, and the same fusion, in a copy of the same model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor

import adapterkit as ak
from adapterkit.runtime.lookup import sites_of

from ..measure import float_tensors
from ..methods.case import Key, Leaf, Place
from ..methods.hosts import Host
from ..methods.ours import PlacesDifferError, config_of
from ..methods.own_tensors import Own, own_tensors
from .case import NAMES, ComposedCase, Tensors
from .peer import KEY_BIAS, REDUCTION

__all__ = ["ComposedOurs"]

_ORDER = ("attention", "crossattention", "feedforward")


class ComposedOurs:
    """A copy of a host with adapters that hold these tensors.

    Raises:
        AdapterKitError: they are refused.
        PlacesDifferError: they sit elsewhere, or have other tensors.
    """

    def __init__(self, case: ComposedCase, host: Host, tensors: Tensors) -> None:
        self.kit = ak.wrap(copy.deepcopy(host.model), example_inputs=dict(host.inputs))
        self.leaves: dict[str, dict[Key, Leaf]] = {}
        for name in NAMES:
            if case.is_bottleneck:
                self.kit.add(name, case.method, reduction_factor=REDUCTION, dtype="float64")
            else:
                self.kit.add(name, config_of(case, tensors[name]), dtype="float64")
            own = self._of_blocks(name, tensors[name]) if case.is_bottleneck else own_tensors(self.kit.model, name)
            self._fill(name, tensors[name], own)
        self.kit.model.eval()

    def add_fusion(self, case: ComposedCase, fuse: ak.Fuse, tensors: Mapping[Key, Tensor]) -> None:
        """Add the fusion of a composition, with these tensors but for a bias of the keys."""
        has_value = case.fusion.get("value", True)
        self.kit.add_fusion(fuse, "dynamic" if has_value else "static", **case.fusion)
        kept = {key: tensor for key, tensor in tensors.items() if key.name != KEY_BIAS}
        self._fill(fuse.fusion, kept, self._of_blocks(fuse.fusion, tensors) if kept else {})
        self.kit.model.eval()

    def remove_fusion(self, fuse: ak.Fuse) -> None:
        """Take it away again."""
        self.kit.deactivate()
        if fuse.fusion in self.kit.fusions:
            self.kit.remove(fuse.fusion)
        self.leaves.pop(fuse.fusion, None)

    def run(self, case: ComposedCase, host: Host) -> list[Tensor]:
        """The outputs with a composition."""
        self.kit.activate(case.composition)
        for _ in range(case.forwards):
            outputs = float_tensors(self.kit.model(**host.inputs))
        return outputs

    def _fill(self, name: str, tensors: Mapping[Key, Tensor], own: Mapping[Key, Own]) -> None:
        """Put tensors into those of an adapter or a fusion."""
        shapes = {key: it.of(it.parameter).shape for key, it in own.items()}
        if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
            raise PlacesDifferError(f"{name!r} has other tensors: {sorted(set(shapes) ^ set(tensors))[:2]}")
        for key, it in own.items():
            it.parameter.data[it.index] = tensors[key].detach()
            it.parameter.requires_grad_(True)
        self.leaves[name] = {key: Leaf(own[key].parameter, own[key].of) for key in tensors}

    def _of_blocks(self, name: str, tensors: Mapping[Key, Tensor]) -> dict[Key, Own]:
        """The tensors of bottlenecks, or of a fusion, by the blocks that the peer has its own in: the n-th of each."""
        blocks: dict[str, list[str]] = {}
        for place in dict.fromkeys(key.place for key in tensors):
            blocks.setdefault(place.path, []).append(place.part)
        left = {block: sorted(kinds, key=_ORDER.index) for block, kinds in blocks.items()}
        found: dict[Key, Own] = {}
        for path, _, site in sites_of(self.kit.model):
            for _, module in site.modules_of(name):
                block = next((block for block in left if f"{path}.".startswith(f"{block}.") and left[block]), None)
                if block is None:
                    raise PlacesDifferError(f"{name!r} is at {path!r}, where the peer has nothing")
                place = Place(block, left[block].pop(0))
                found |= {Key(place, leaf): Own(parameter) for leaf, parameter in module.named_parameters()}
        return found
