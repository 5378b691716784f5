"""Make a new adapter of others: a copy of one, or a weighted sum; all or nothing."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, get_args

import torch
from torch import nn

from ...config.union import Union
from ...errors import ConfigError
from ...methods import method_of
from ...methods.method import LinearInParameters
from ...structure.tracing.forward import outside_inference_mode
from ..activate import check_known
from ..admit import AdapterDraft, admit, modules_for
from ..attach import check_free
from ..build import BuiltModule, device_near
from .heads import combined_heads
from .low_rank import How, changes_weights, check_adds, is_lora, low_rank
from .parameters import averaged, summed
from .sources import Adapter, Combined, SiteKey, Source, adapter_of, check_finite, check_members

__all__ = ["How", "combine"]


@outside_inference_mode()
@torch.no_grad()
def combine(
    model: nn.Module,
    name: str,
    weights: Mapping[str, float],
    *,
    how: How = "concatenate",
    rank: int | None = None,
    heads: bool = True,
) -> dict[str, float]:
    """Attach a new adapter, the weighted sum of others. See `AdapterKit.combine`.

    Returns:
        Where `how` may be inexact, the relative error of each site's change of its weight (Frobenius norms).
    """
    check_free(model, name)
    _check_request(weights, how, rank)
    for source in weights:
        check_known(model, source)
    adapters = [adapter_of(model, source, float(weight)) for source, weight in weights.items()]
    if len(adapters) == 1 and adapters[0].weight == 1.0 and rank is None:
        combined = [_copy(source) for source in adapters[0].sources]  # whatever its method: nothing is summed
    else:
        combined = _sums(model, adapters, how, rank)
    found = combined_heads(model, adapters) if heads else []
    draft = AdapterDraft(name, _config(combined), [site for one in combined for site in one.sites], found)
    admit(model, draft, _filled_modules(model, draft, combined))
    return {site: error for one in combined for site, error in one.errors.items()}


def _check_request(weights: object, how: str, rank: object) -> None:
    """Raise ConfigError unless these can be the arguments of `combine`."""
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(
            f"weights map the names of adapters to numbers, such as {{'a': 0.5, 'b': 0.5}}; found {weights!r}"
        )
    wrong = {name: weight for name, weight in weights.items() if not _is_number(weight)}
    if wrong:
        raise ConfigError(f"a weight is a finite number; found {wrong}")
    if how not in get_args(How):
        raise ConfigError(f"how is one of {list(get_args(How))}; found {how!r}")
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if rank is not None and not (is_rank and how == "svd"):
        raise ConfigError(f"rank is a positive number, for how='svd' alone; found rank={rank!r} with how={how!r}")


def _is_number(weight: object) -> bool:
    """Tell whether this is a finite number; True and False, which Python counts among them, are none here."""
    return isinstance(weight, Real) and not isinstance(weight, bool) and math.isfinite(weight)


def _copy(source: Source) -> Combined:
    """Return one adapter, or a member of it, as it is."""
    states = {key: module.state_dict() for key, module in source.modules.items()}
    # Cloned: `_filled_modules` assigns these tensors, and training the copy must leave the original as it is.
    copies = {key: {name: tensor.detach().clone() for name, tensor in state.items()} for key, state in states.items()}
    return Combined(source.config, list(source.sites.values()), copies)


def _sums(model: nn.Module, adapters: Sequence[Adapter], how: How, rank: int | None) -> list[Combined]:
    """Return the weighted sum of these adapters, member by member of a union.

    Raises:
        ConfigError: they are of several methods; a rank is given and no member becomes a LoRA; see also `_sum`.
        TargetError: see `_sum`.
        CompatibilityError: see `_sum`.
    """
    check_members(adapters)
    if rank is not None and all(isinstance(method_of(own.config), LinearInParameters) for own in adapters[0].sources):
        raise ConfigError(f"rank={rank} is that of a LoRA; of {adapters[0].config.method!r} none comes out")
    return [_sum(model, sources, how, rank) for sources in zip(*(adapter.sources for adapter in adapters), strict=True)]


def _sum(model: nn.Module, sources: Sequence[Source], how: How, rank: int | None) -> Combined:
    """Return the weighted sum of adapters of one method, made in the way that the method allows.

    Raises:
        ConfigError: the method has no sum, or not in this way; see also `summed`, `averaged` and `low_rank`.
        TargetError: see there.
        CompatibilityError: a source has values that are not finite.
    """
    for source in sources:
        check_adds(source)
        check_finite(source.name, {key: module.state_dict() for key, module in source.modules.items()})
    method = method_of(sources[0].config)
    if isinstance(method, LinearInParameters):
        return summed(sources, method.neutral)  # exact, whatever `how` says
    # "linear" is a sum of factors for LoRAs, and a mean of parameters for all else, low-rank or not (VeRA).
    if how == "linear" and not all(map(is_lora, sources)):
        return averaged(sources)
    if not all(changes_weights(source, how) for source in sources):
        raise ConfigError(
            f"how={how!r} combines changes of weights that are low-rank; {method.name!r} makes none. how='linear' takes "
            "the weighted mean of parameters"
        )
    return low_rank(model, sources, how, rank)


def _config(combined: Sequence[Combined]) -> Any:
    """Return the config of the new adapter: of several members a union."""
    configs = [one.config for one in combined]
    return Union(*configs) if len(configs) > 1 else configs[0]


def _filled_modules(model: nn.Module, draft: AdapterDraft, combined: Sequence[Combined]) -> list[BuiltModule]:
    """Build the modules of the new adapter and fill them with the sums.

    They are built empty, as those of a file are: no memory is taken twice, and no random number drawn. The heads have their
    values already.

    Raises:
        CompatibilityError: a sum is not finite, in the dtype that it was rounded to.
    """
    keys = [(SiteKey.of(site), one) for one in combined for site in one.sites]
    modules = modules_for(model, draft, meta=True)
    for built, (key, one) in zip(modules, keys, strict=False):  # in the draft's order; the heads come last
        check_finite("the sum", {key: one.states[key]})
        built.module.load_state_dict(one.states[key], assign=True)  # there is no memory to copy into
        built.module.to(device_near(model, built.path))
    return modules
