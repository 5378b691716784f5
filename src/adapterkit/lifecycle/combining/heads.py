"""Combine the heads of adapters: task vectors for copies of the model's own, a copy or a mean for all others."""

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
    """Return the heads of the adapter that is made of these.

    Of copies of the model's own head comes the model's own plus the weighted sum of their differences to it (task vectors:
    Ilharco et al. 2022, arXiv:2212.04089). Other heads have nothing to differ from: one that a single adapter owns is
    copied as it is; of several with equal settings comes the weighted mean.

    Args:
        model: The model that has the adapters.
        adapters: What is combined. One without a head that others have adds nothing to it.

    Raises:
        ConfigError: several that are not of the same settings and shapes, or whose weights do not sum to 1.
    """
    # The first owner gives what is not summed: the head's settings, and counters in it.
    first = {key: held for adapter in reversed(adapters) for key, held in adapter.heads.items()}
    copies = copy_heads([module for _, module in first.values()])  # at once: heads may share tensors
    heads = {key: FoundHead(key.path, spec, module) for (key, (spec, _)), module in zip(first.items(), copies, strict=True)}
    if len(adapters) == 1 and adapters[0].weight == 1.0:
        return list(heads.values())
    for key, module in zip(heads, copies, strict=True):
        owners = [adapter for adapter in adapters if key in adapter.heads]
        if all(isinstance(adapter.heads[key][0].config, OwnHead) for adapter in owners):
            _add_task_vectors(model, key, module, owners)
        elif len(owners) > 1:
            _average(key, module, owners)
    return list(heads.values())


def _add_task_vectors(model: nn.Module, key: HeadKey, head: nn.Module, owners: Sequence[Adapter]) -> None:
    """Fill a head with the model's own plus the weighted sum of the owners' differences to it.

    Args:
        model: The model.
        key: Which head is meant.
        head: The new adapter's, to be filled.
        owners: The adapters that have it, all as copies of the model's own.

    Raises:
        ConfigError: the owners name the labels otherwise.
    """
    _check_labels(key, owners)
    originals = originals_of(model)  # the model's own is what it is without adapters merged into it
    models_own = model.get_submodule(key.path)
    # With duplicates: a tied tensor has several names, and the head's state dict has it under each.
    held = chain(models_own.named_parameters(remove_duplicate=False), models_own.named_buffers(remove_duplicate=False))
    own = {name: originals.get(id(tensor), tensor) for name, tensor in held}
    terms = [(adapter.weight, adapter.heads[key][1].state_dict(keep_vars=True)) for adapter in owners]
    # Tied tensors are filled twice, with the same sum: it is of the model's own tensor, not of what was there.
    for name, tensor in head.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():  # a counter is no sum
            tensor.copy_(_plus_differences(own[name], [(weight, state[name]) for weight, state in terms]))


def _average(key: HeadKey, head: nn.Module, owners: Sequence[Adapter]) -> None:
    """Fill a head with the weighted mean of the owners'. Raises ConfigError if they have none.

    Args:
        key: Which head is meant.
        head: The new adapter's, to be filled.
        owners: The adapters that have it.
    """
    why = _why_no_mean(key, owners)
    if why is not None:
        raise ConfigError(
            f"the heads {key.name!r} of {[adapter.name for adapter in owners]} are no copies of one of the model's own, so "
            f"that only a mean of them can be taken, of equal settings and with weights that sum to 1; but {why}. Combine "
            "with heads=False"
        )
    states = [adapter.heads[key][1].state_dict() for adapter in owners]
    for name, tensor in head.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            terms = [adapter.weight * wide(state[name]) for adapter, state in zip(owners, states, strict=True)]
            tensor.copy_(sum(terms[1:], terms[0]))


def _why_no_mean(key: HeadKey, owners: Sequence[Adapter]) -> str | None:
    """Explain why the heads of these adapters have no weighted mean; return None if they have one."""
    first, *others = (adapter.heads[key] for adapter in owners)
    if any(_meaning(spec) != _meaning(first[0]) or _shapes(head) != _shapes(first[1]) for spec, head in others):
        return "they have other settings or shapes"
    total = sum(adapter.weight for adapter in owners)
    return None if math.isclose(total, 1.0, rel_tol=1e-6) else f"the weights sum to {total:g}"


def _shapes(head: nn.Module) -> dict[str, tuple[int, ...]]:
    """Map the names of a head's tensors to their shapes."""
    return {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}


def _check_labels(key: HeadKey, owners: Sequence[Adapter]) -> None:
    """Raise ConfigError where the heads call their outputs by other names."""
    # One without labels contradicts none: it only does not say what its outputs are called.
    labels = {getattr(adapter.heads[key][0].config, "labels", None) for adapter in owners} - {None}
    if len(labels) > 1:
        raise ConfigError(
            f"the heads {key.name!r} of {[adapter.name for adapter in owners]} have other labels: "
            f"{sorted(map(str, labels))}; a sum of them would mean nothing. Combine with heads=False"
        )


def _meaning(spec: HeadSpec) -> object:
    """Return what must be equal in two heads, so that their parameters mean the same: all settings but the seed."""
    return spec.config.override({"seed": None}) if "seed" in type(spec.config).model_fields else spec.config


def _plus_differences(own: Tensor, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return own + sum of weight * (tensor - own), in float64. Shape: as own.

    Args:
        own: The model's tensor.
        terms: A weight, and a tensor in its place, for each adapter.
    """
    total = wide(own)
    for weight, tensor in terms:
        total = total + weight * (wide(tensor) - wide(own))
    return total
