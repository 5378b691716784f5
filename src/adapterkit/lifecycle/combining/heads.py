"""The heads of an adapter that is made of others."""

import math
from collections.abc import Sequence
from itertools import chain

from torch import Tensor, nn

from ...errors import ConfigError
from ...heads.config import OwnHead
from ...heads.find import FoundHead, copy_heads
from ...heads.spec import HeadSpec
from ...runtime.originals import originals_of
from .sources import Adapter, HeadKey, wide

__all__ = ["combined_heads"]


def combined_heads(model: nn.Module, adapters: Sequence[Adapter]) -> list[FoundHead]:
    """Copies of the heads. A copy of the model's own is the model's own plus the weighted sum of the differences to it.

    Others have nothing to differ from: one that a single adapter owns is copied as it is; of several of the same settings
    comes the weighted mean.

    Raises:
        ConfigError: several that are not of the same settings and shapes, or whose weights do not sum to 1.
    """
    first = {place: held for adapter in reversed(adapters) for place, held in adapter.heads.items()}
    copies = copy_heads([module for _, module in first.values()])
    heads = {
        place: FoundHead(place.path, spec, module) for (place, (spec, _)), module in zip(first.items(), copies, strict=True)
    }
    if len(adapters) == 1 and adapters[0].weight == 1.0:
        return list(heads.values())
    for place, module in zip(heads, copies, strict=True):
        owners = [adapter for adapter in adapters if place in adapter.heads]
        if all(isinstance(adapter.heads[place][0].config, OwnHead) for adapter in owners):
            _move(model, place, module, owners)
        elif len(owners) > 1:
            _average(place, module, owners)
    return list(heads.values())


def _move(model: nn.Module, place: HeadKey, copied: nn.Module, owners: Sequence[Adapter]) -> None:
    """Make each tensor the model's own plus the weighted sum of the differences to it."""
    _check_labels(place, owners)
    originals = originals_of(model)  # the model's own is what it is without adapters merged into it
    head = model.get_submodule(place.path)
    held = chain(head.named_parameters(remove_duplicate=False), head.named_buffers(remove_duplicate=False))
    own = {key: originals.get(id(tensor), tensor) for key, tensor in held}
    terms = [(adapter.weight, adapter.heads[place][1].state_dict(keep_vars=True)) for adapter in owners]
    for key, tensor in copied.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.copy_(_moved(own[key], [(weight, state[key]) for weight, state in terms]))


def _average(place: HeadKey, copied: nn.Module, owners: Sequence[Adapter]) -> None:
    """Make each tensor the weighted mean."""
    names = [adapter.name for adapter in owners]
    held = [adapter.heads[place] for adapter in owners]
    total = sum(adapter.weight for adapter in owners)
    states = [module.state_dict() for _, module in held]
    shapes = [{key: tuple(tensor.shape) for key, tensor in state.items()} for state in states]
    differ = any(_meaning(spec) != _meaning(held[0][0]) for spec, _ in held) or any(s != shapes[0] for s in shapes)
    if differ or not math.isclose(total, 1.0, rel_tol=1e-6):
        why = "they have other settings or shapes" if differ else f"the weights sum to {total:g}"
        raise ConfigError(
            f"the heads {place.name!r} of {names} are no copies of one of the model's own, so that only a mean of them can "
            f"be taken, of equal settings and with weights that sum to 1; but {why}. Combine with heads=False"
        )
    for key, tensor in copied.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            terms = [adapter.weight * wide(state[key]) for adapter, state in zip(owners, states, strict=True)]
            tensor.copy_(sum(terms[1:], terms[0]))


def _check_labels(place: HeadKey, owners: Sequence[Adapter]) -> None:
    """Raise ConfigError where the heads call their outputs by other names."""
    labels = {getattr(adapter.heads[place][0].config, "labels", None) for adapter in owners} - {None}
    if len(labels) > 1:
        raise ConfigError(
            f"the heads {place.name!r} of {[adapter.name for adapter in owners]} have other labels: "
            f"{sorted(map(str, labels))}; a sum of them would mean nothing. Combine with heads=False"
        )


def _meaning(spec: HeadSpec) -> object:
    """What must be equal for parameters to mean the same."""
    return spec.config.override({"seed": None}) if "seed" in type(spec.config).model_fields else spec.config


def _moved(own: Tensor, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """A tensor of the model plus the weighted sum of what others are beyond it, in float64. Shape: as it."""
    total = wide(own)
    for weight, tensor in terms:
        total = total + weight * (wide(tensor) - wide(own))
    return total
