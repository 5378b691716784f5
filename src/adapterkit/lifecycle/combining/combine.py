"""Make a new adapter of others: all or nothing."""

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
from .sources import Combined, Source, adapter_of, check_finite, check_members, place_of

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
        combined = [_copied(source) for source in adapters[0].sources]
    else:
        check_members(adapters)
        if rank is not None and all(
            isinstance(method_of(source.config), LinearInParameters) for source in adapters[0].sources
        ):
            raise ConfigError(f"rank={rank} is that of a LoRA; of {adapters[0].config.method!r} none comes out")
        combined = [_member(model, sources, how, rank) for sources in zip(*(a.sources for a in adapters), strict=True)]
    found = combined_heads(model, adapters) if heads else []
    draft = AdapterDraft(name, _config(combined), [site for one in combined for site in one.sites], found)
    admit(model, draft, _filled(model, draft, combined))
    return {site: error for one in combined for site, error in one.errors.items()}


def _check_request(weights: object, how: str, rank: object) -> None:
    """Raise ConfigError for what is no request."""
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(
            f"weights map the names of adapters to numbers, such as {{'a': 0.5, 'b': 0.5}}; found {weights!r}"
        )
    wrong = {k: w for k, w in weights.items() if isinstance(w, bool) or not isinstance(w, Real) or not math.isfinite(w)}
    if wrong:
        raise ConfigError(f"a weight is a finite number; found {wrong}")
    if how not in get_args(How):
        raise ConfigError(f"how is one of {list(get_args(How))}; found {how!r}")
    if rank is not None and (how != "svd" or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank is a positive number, for how='svd' alone; found rank={rank!r} with how={how!r}")


def _copied(source: Source) -> Combined:
    """One adapter as it is."""
    states = {place: module.state_dict() for place, module in source.modules.items()}
    copies = {place: {key: tensor.detach().clone() for key, tensor in state.items()} for place, state in states.items()}
    return Combined(source.config, list(source.sites.values()), copies)


def _member(model: nn.Module, sources: Sequence[Source], how: How, rank: int | None) -> Combined:
    """The sum of one method's adapters."""
    for source in sources:
        check_adds(source)
        check_finite(source.name, {place: module.state_dict() for place, module in source.modules.items()})
    method = method_of(sources[0].config)
    if isinstance(method, LinearInParameters):
        return summed(sources, method.neutral)
    if how == "linear" and not all(map(is_lora, sources)):
        return averaged(sources)
    if not all(changes_weights(source, how) for source in sources):
        raise ConfigError(
            f"how={how!r} combines changes of weights that are low-rank; {method.name!r} makes none. how='linear' takes "
            "the weighted mean of parameters"
        )
    return low_rank(model, sources, how, rank)


def _config(combined: Sequence[Combined]) -> Any:
    configs = [one.config for one in combined]
    return Union(*configs) if len(configs) > 1 else configs[0]


def _filled(model: nn.Module, draft: AdapterDraft, combined: Sequence[Combined]) -> list[BuiltModule]:
    """Build the new adapter's modules as those of a file are: empty, then filled with the sums. Its heads come filled."""
    states = [(place_of(site), one.states[place_of(site)]) for one in combined for site in one.sites]
    modules = modules_for(model, draft, meta=True)
    for built, (place, state) in zip(modules, states, strict=False):  # the heads come last, and have their values
        check_finite("the sum", {place: state})
        built.module.load_state_dict(state, assign=True)
        built.module.to(device_near(model, built.path))
    return modules
