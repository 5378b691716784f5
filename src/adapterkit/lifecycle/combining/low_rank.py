"""Combinations of low-rank changes of weights, as LoRAs: factor by factor, concatenated, or the nearest of a rank."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ...errors import ConfigError, TargetError
from ...methods import method_of
from ...methods.lora import LoRAConfig
from ...nn.functional.low_rank import LowRank
from ...nn.functional.low_rank_sums import concatenated, factored, reduced, refitted, relative_error
from ...nn.functional.projections import Projection
from ...nn.lora import LoRA
from ...nn.shared import borrowed
from ...nn.traits import BiasDelta, LowRankDelta, WeightDelta, why_not_summed
from ...placement.layers import setting_at
from ...placement.spec import SiteSpec
from ...placement.weights import projection_at
from .addressing import addressing, all_sites, by_site
from .parameters import changed, common_dtype, settled
from .sources import Combined, SiteKey, Source, site_name

__all__ = ["How", "changes_weights", "check_adds", "is_lora", "low_rank"]

How = Literal["linear", "concatenate", "svd"]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Term:
    """What one source adds at one place: weight * B A, and weight * bias. All in float64 on the CPU."""

    weight: float
    a: Tensor
    b: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Sum:
    """The LoRA at one place, before it is scaled."""

    rank: int
    a: Tensor
    b: Tensor
    error: float | None = None


def is_lora(source: Source) -> bool:
    """Whether all modules are LoRAs: factors may be added."""
    return all(isinstance(module, LoRA) for module in source.modules.values())


def changes_weights(source: Source, how: How) -> bool:
    """Whether the change of each module can be taken as a pair."""
    kinds = (LowRankDelta, WeightDelta) if how == "svd" else (LowRankDelta,)
    return all(isinstance(module, kinds) for module in source.modules.values())


def check_adds(source: Source) -> None:
    """Raise ConfigError if a module of the adapter says that its change cannot be part of a sum."""
    for reason in filter(None, map(why_not_summed, source.modules.values())):
        raise ConfigError(
            f"{source.name!r} {reason}. It can be copied, alone and at weight 1, and combined in no other way"
        )


def low_rank(model: nn.Module, sources: Sequence[Source], how: How, rank: int | None) -> Combined:
    """The weighted sum of changes of weights, as a LoRA.

    Raises:
        ConfigError: ranks differ where factors are to be added; some LoRAs have biases and others sit at Parameters; no
            rank is given, and a source has none.
        TargetError: see `all_sites` and `addressing`; a source sits where no LoRA can.
    """
    sites = all_sites(sources)
    keeps_scaling = how == "linear" and _are_scaled_alike(sources)
    sums, states = [], {}
    for place, site in sites.items():
        there = [source for source in sources if place in source.modules]
        geometry = LowRank(projection_at(site, model.get_submodule(site.path)), 1, site.slices)
        terms = [_term(source, place, geometry) for source in there]
        sums.append(_summed(geometry, there, terms, place, how, rank))
        scaling: Any = there[0].modules[place].scaling if keeps_scaling else 1.0
        found = {"lora_A": sums[-1].a, "lora_B": sums[-1].b / scaling}
        if _has_bias(sources):
            found["lora_bias"] = _bias(geometry, terms) / scaling
        dtype = common_dtype([p for source in there for p in source.modules[place].parameters()])
        states[place] = {key: tensor.to(dtype) for key, tensor in found.items()}
    config = _config(sources, list(sites.values()), None if keeps_scaling else [one.rank for one in sums])
    names = [site_name(site) for site in sites.values()]
    errors = {name: one.error for name, one in zip(names, sums, strict=True) if one.error is not None}
    return Combined(config, list(sites.values()), states, errors)


def _term(source: Source, place: SiteKey, geometry: LowRank) -> _Term:
    """What a source adds at a place, in the geometry of the result."""
    held = source.modules[place]
    shared = borrowed(held)  # of all sites: not to be copied for each
    module: Any = copy.deepcopy(held, {id(shared): shared} if shared is not None else None).cpu().double()
    own = LowRank(geometry.projection, 1, source.sites[place].slices)
    pair = module.pair() if isinstance(module, LowRankDelta) else _full_pair(own, module.weight_delta())
    bias = module.bias_delta() if isinstance(module, BiasDelta) else None
    return _Term(source.weight, *refitted(own, geometry, *pair), None if bias is None else geometry.layout.pick(bias))


def _full_pair(geometry: LowRank, delta: Tensor) -> Pair:
    """A pair with a delta of any rank."""
    p = geometry.projection
    most = min(p.out_features // p.groups, p.in_features // p.groups * math.prod(p.kernel))
    return factored(LowRank(p, most * p.groups, geometry.layout.slices), delta)


def _summed(
    geometry: LowRank, there: Sequence[Source], terms: Sequence[_Term], place: SiteKey, how: How, rank: int | None
) -> _Sum:
    """The pair that stands for the sum at one place."""
    projection = geometry.projection
    exact = concatenated(geometry, [(term.a, term.weight * term.b) for term in terms])
    if how == "concatenate":
        return _Sum(_rank_of(projection, exact[1]), *exact)
    if how == "svd":
        used = rank or max(_own_rank(source, place) for source in there)
        found = reduced(LowRank(projection, used, geometry.layout.slices), *exact)
    else:
        found = _by_factor(projection, there, terms, place)
        used = _rank_of(projection, found[1])
    return _Sum(used, *found, relative_error(geometry, found, exact))


def _by_factor(projection: Projection, there: Sequence[Source], terms: Sequence[_Term], place: SiteKey) -> Pair:
    """Sums of As and of Bs, each with the root of the weights; the sign goes to B."""
    ranks = {source.name: _rank_of(projection, term.b) for source, term in zip(there, terms, strict=True)}
    if len({*ranks.values()}) > 1:
        raise ConfigError(
            f"how='linear' adds factors, which takes one rank (and the same parts) for all; at "
            f"{site_name(there[0].sites[place])!r} they are {ranks}. how='concatenate' takes any, and is exact"
        )
    roots = [math.sqrt(abs(term.weight)) for term in terms]
    a = [root * term.a for root, term in zip(roots, terms, strict=True)]
    b = [math.copysign(root, term.weight) * term.b for root, term in zip(roots, terms, strict=True)]
    return sum(a[1:], a[0]), sum(b[1:], b[0])


def _bias(geometry: LowRank, terms: Sequence[_Term]) -> Tensor:
    """The sum of the biases. Shape: (covered,)."""
    total = terms[0].a.new_zeros(geometry.layout.covered)
    for term in terms:
        total = total if term.bias is None else total + term.weight * term.bias
    return total


def _config(sources: Sequence[Source], sites: Sequence[SiteSpec], ranks: Sequence[int] | None) -> LoRAConfig:
    """The settings of the result: of ranks, the scaling is one; without, it is that of the sources."""
    settings = addressing(sources, sites, fields=["targets"]) | settled(sources)
    if ranks is not None:
        scaled = by_site(ranks, sites), by_site([float(rank) for rank in ranks], sites)
        settings |= {"rank": scaled[0], "alpha": scaled[1], "use_rslora": False}
    first = sources[0].config
    if isinstance(first, LoRAConfig):
        config: LoRAConfig = changed(sources[0], settings | {"bias": _has_bias(sources)})
    else:
        known = {name: value for name, value in settings.items() if name in LoRAConfig.model_fields}
        config = LoRAConfig(**{"dtype": first.dtype, **known})
    for site in sites:
        if not any(placement.allows(site) for placement in method_of(config).placements(config)):
            raise TargetError(f"{first.method!r} sits at {site_name(site)!r} where no LoRA can, which the sum would be")
        if config.bias and site.parameters:
            with_bias = [source.name for source in sources if getattr(source.config, "bias", False)]
            raise ConfigError(f"{with_bias} have biases, which the sum could not have at the Parameter {site_name(site)!r}")
    return config


def _are_scaled_alike(sources: Sequence[Source]) -> bool:
    """Whether one setting of rank and alpha serves all sources, and so the result."""
    return len({repr([getattr(s.config, name) for name in ("rank", "alpha", "use_rslora")]) for s in sources}) == 1


def _has_bias(sources: Sequence[Source]) -> bool:
    return any(getattr(source.config, "bias", False) for source in sources if isinstance(source.config, LoRAConfig))


def _rank_of(projection: Projection, b: Tensor) -> int:
    """The rank of a pair, of all groups together. Shape: b as `LowRank.b_shape`."""
    return int(b.shape[-1 - len(projection.kernel)]) * projection.groups


def _own_rank(source: Source, place: SiteKey) -> int:
    """The rank that a source is configured with at a place."""
    rank = setting_at(getattr(source.config, "rank", None), source.sites[place])
    if not isinstance(rank, int):
        raise ConfigError(f"{source.name!r} has no rank; give that of the result: how='svd', rank=8")
    return rank
