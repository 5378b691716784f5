"""Combine low-rank changes of weights into a LoRA: factor by factor, concatenated, or the nearest of a rank."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
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
from .parameters import common_dtype, settled, with_settings
from .sources import Combined, SiteKey, Source, site_name

__all__ = ["How", "changes_weights", "check_adds", "is_lora", "low_rank"]

How = Literal["linear", "concatenate", "svd"]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Term:
    """What one source adds at one site: weight * B A, and weight * bias. All in float64 on the CPU."""

    weight: float
    a: Tensor
    b: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Sum:
    """The LoRA at one site, with a scaling of 1.

    Attributes:
        rank: Its rank; with groups, of all groups together.
        a: A.
        b: B.
        error: How far B A is from the weighted sum, in parts of it; None where it is the sum.
    """

    rank: int
    a: Tensor
    b: Tensor
    error: float | None = None


def is_lora(source: Source) -> bool:
    """Tell whether all modules are LoRAs, so that their factors may be added."""
    return all(isinstance(module, LoRA) for module in source.modules.values())


def changes_weights(source: Source, how: How) -> bool:
    """Tell whether the change of each module can be taken as a pair of thin tensors."""
    # A change that is given as a whole may have any rank: a pair of it comes of singular values alone.
    kinds = (LowRankDelta, WeightDelta) if how == "svd" else (LowRankDelta,)
    return all(isinstance(module, kinds) for module in source.modules.values())


def check_adds(source: Source) -> None:
    """Raise ConfigError if a module of the adapter says that its change cannot be part of a sum."""
    for reason in filter(None, map(why_not_summed, source.modules.values())):
        raise ConfigError(
            f"{source.name!r} {reason}. It can be copied, alone and at weight 1, and combined in no other way"
        )


def low_rank(model: nn.Module, sources: Sequence[Source], how: How, rank: int | None) -> Combined:
    """Return the weighted sum of changes of weights, as a LoRA.

    Args:
        model: The model that has the sources.
        sources: What is summed.
        how: As in `AdapterKit.combine`.
        rank: The rank of the result at each site, for how="svd"; the largest of the sources' if None.

    Raises:
        ConfigError: ranks differ where factors are to be added; some LoRAs have biases and others sit at Parameters; no
            rank is given, and a source has none.
        TargetError: see `all_sites` and `addressing`; a source sits where no LoRA can.
    """
    sites = all_sites(sources)
    # Sums of factors are not scaled anew, so that the sum of equal adapters has their own config. All other results have
    # alpha = rank: where ranks differ from site to site, no common alpha would do.
    keeps_scaling = how == "linear" and _are_scaled_alike(sources)
    sums: list[_Sum] = []
    states: dict[SiteKey, dict[str, Tensor]] = {}
    for key, site in sites.items():
        there = [source for source in sources if key in source.modules]
        geometry = LowRank(projection_at(site, model.get_submodule(site.path)), 1, site.slices)  # its rank is not used
        terms = [_term(source, key, geometry) for source in there]
        sums.append(_sum_of_pairs(geometry, there, terms, key, how, rank))
        scaling: Any = there[0].modules[key].scaling if keeps_scaling else 1.0
        bias = _sum_of_biases(geometry, terms) if _has_bias(sources) else None
        dtype = common_dtype([p for source in there for p in source.modules[key].parameters()])
        states[key] = _lora_state(sums[-1], bias, scaling, dtype)
    config = _lora_config(sources, list(sites.values()), None if keeps_scaling else [one.rank for one in sums])
    names = [site_name(site) for site in sites.values()]
    errors = {name: one.error for name, one in zip(names, sums, strict=True) if one.error is not None}
    return Combined(config, list(sites.values()), states, errors)


def _lora_state(total: _Sum, bias: Tensor | None, scaling: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of the LoRA that adds this sum, by their names in it."""
    # The module multiplies B A and the bias by its scaling.
    state = {"lora_A": total.a, "lora_B": total.b / scaling}
    if bias is not None:
        state["lora_bias"] = bias / scaling
    return {name: tensor.to(dtype) for name, tensor in state.items()}  # the only rounding


def _term(source: Source, key: SiteKey, geometry: LowRank) -> _Term:
    """Return what a source adds at a site, as a pair for the slices that the result covers there."""
    held = source.modules[key]
    shared = borrowed(held)  # of all sites: not to be copied for each
    # A copy, since `cpu` and `double` change a module in place: the source is in use.
    module: Any = copy.deepcopy(held, {id(shared): shared} if shared is not None else None).cpu().double()
    own = LowRank(geometry.projection, 1, source.sites[key].slices)
    # A VeRA of rank 4 becomes a LoRA of rank 4: its scales are multiplied into its frozen factors.
    pair = module.pair() if isinstance(module, LowRankDelta) else _full_pair(own, module.weight_delta())
    bias = module.bias_delta() if isinstance(module, BiasDelta) else None
    return _Term(source.weight, *refitted(own, geometry, *pair), None if bias is None else geometry.layout.pick(bias))


def _full_pair(geometry: LowRank, delta: Tensor) -> Pair:
    """Return a pair of thin tensors with this delta, which may have any rank."""
    p = geometry.projection
    # No matrix has a greater rank than it has rows or columns: with so many singular values nothing is lost.
    most = min(p.out_features // p.groups, p.in_features // p.groups * math.prod(p.kernel))
    return factored(LowRank(p, most * p.groups, geometry.layout.slices), delta)


def _sum_of_pairs(
    geometry: LowRank, there: Sequence[Source], terms: Sequence[_Term], key: SiteKey, how: How, rank: int | None
) -> _Sum:
    """Return the pair that stands for the sum at one site.

    Args:
        geometry: What the result is like there.
        there: The sources that have a module there.
        terms: What each of them adds.
        key: Which module of each is meant.
        how: As in `AdapterKit.combine`.
        rank: The rank of the result, for how="svd"; the largest of the sources' if None.
    """
    projection = geometry.projection
    # [B1 B2] [A1; A2] = B1 A1 + B2 A2: the sum itself, and for all else what it is measured against.
    exact = concatenated(geometry, [(term.a, term.weight * term.b) for term in terms])
    if how == "concatenate":
        return _Sum(_rank_of(projection, exact[1]), *exact)
    if how == "svd":
        used = rank or max(_own_rank(source, key) for source in there)
        found = reduced(LowRank(projection, used, geometry.layout.slices), *exact)
    else:
        found = _sum_of_factors(projection, there, terms, key)
        used = _rank_of(projection, found[1])
    return _Sum(used, *found, relative_error(geometry, found, exact))


def _sum_of_factors(projection: Projection, there: Sequence[Source], terms: Sequence[_Term], key: SiteKey) -> Pair:
    """Return the sum of the As and the sum of the Bs, each with the root of the weights; the sign goes to B.

    Their product has cross terms Bi Aj: it is not the sum of the products, but of their rank.

    Raises:
        ConfigError: the ranks differ.
    """
    ranks = {source.name: _rank_of(projection, term.b) for source, term in zip(there, terms, strict=True)}
    if len({*ranks.values()}) > 1:
        raise ConfigError(
            f"how='linear' adds factors, which takes one rank (and the same parts) for all; at "
            f"{site_name(there[0].sites[key])!r} they are {ranks}. how='concatenate' takes any, and is exact"
        )
    roots = [math.sqrt(abs(term.weight)) for term in terms]
    a = [root * term.a for root, term in zip(roots, terms, strict=True)]
    b = [math.copysign(root, term.weight) * term.b for root, term in zip(roots, terms, strict=True)]
    return sum(a[1:], a[0]), sum(b[1:], b[0])


def _sum_of_biases(geometry: LowRank, terms: Sequence[_Term]) -> Tensor:
    """Return the weighted sum of the biases; zeros where none of these sources has one. Shape: (covered,)."""
    # One without biases among others that have some adds nothing, but the result has a bias there.
    total = terms[0].a.new_zeros(geometry.layout.covered)
    for term in terms:
        total = total if term.bias is None else total + term.weight * term.bias
    return total


def _lora_config(sources: Sequence[Source], sites: Sequence[SiteSpec], ranks: Sequence[int] | None) -> LoRAConfig:
    """Return the config of the result.

    Args:
        sources: What is combined.
        sites: Where the result sits.
        ranks: The rank at each site; alpha is then the same, so that the scaling is 1. If None, rank and alpha are those of
            the sources.

    Raises:
        TargetError: see `addressing`, and `_check_sites_of_loras`.
        ConfigError: see `_check_sites_of_loras`.
    """
    settings = addressing(sources, sites, fields=["targets"]) | settled(sources)
    if ranks is not None:
        rank, alpha = by_site(ranks, sites), by_site([float(rank) for rank in ranks], sites)
        settings |= {"rank": rank, "alpha": alpha, "use_rslora": False}
    first = sources[0].config
    if isinstance(first, LoRAConfig):
        config: LoRAConfig = with_settings(sources[0], settings | {"bias": _has_bias(sources)})
    else:
        # Of another method (VeRA): what it has in training that a LoRA has not is left out, for it changes no sum.
        known = {name: value for name, value in settings.items() if name in LoRAConfig.model_fields}
        config = LoRAConfig(**{"dtype": first.dtype, **known})
    _check_sites_of_loras(sources, sites, config)
    return config


def _check_sites_of_loras(sources: Sequence[Source], sites: Sequence[SiteSpec], config: LoRAConfig) -> None:
    """Raise unless a LoRA of this config can sit at each of these sites.

    Raises:
        TargetError: no LoRA can sit at one of them.
        ConfigError: the result has biases, which a LoRA at a Parameter cannot have.
    """
    placements = method_of(config).placements(config)
    for site in sites:
        if not any(placement.allows(site) for placement in placements):
            raise TargetError(
                f"{sources[0].config.method!r} sits at {site_name(site)!r} where no LoRA can, which the sum would be"
            )
        if config.bias and site.parameters:
            with_bias = [source.name for source in sources if getattr(source.config, "bias", False)]
            raise ConfigError(f"{with_bias} have biases, which the sum could not have at the Parameter {site_name(site)!r}")


def _are_scaled_alike(sources: Sequence[Source]) -> bool:
    """Tell whether one setting of rank and alpha serves all sources, and so the result."""
    return len({repr([getattr(s.config, name) for name in ("rank", "alpha", "use_rslora")]) for s in sources}) == 1


def _has_bias(sources: Sequence[Source]) -> bool:
    """Tell whether any source trains biases: the result then does at all of its sites."""
    return any(getattr(source.config, "bias", False) for source in sources if isinstance(source.config, LoRAConfig))


def _rank_of(projection: Projection, b: Tensor) -> int:
    """Return the rank of a pair, of all groups together. Shape: b as `LowRank.b_shape`."""
    return int(b.shape[-1 - len(projection.kernel)]) * projection.groups


def _own_rank(source: Source, key: SiteKey) -> int:
    """Return the rank that a source is configured with at a site. Raises ConfigError if its method has none."""
    rank = setting_at(getattr(source.config, "rank", None), source.sites[key])
    if not isinstance(rank, int):
        raise ConfigError(f"{source.name!r} has no rank; give that of the result: how='svd', rank=8")
    return rank
