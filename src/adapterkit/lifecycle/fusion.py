"""AdapterFusion: trained attention over adapters. A fusion is held, trained and moved as an adapter is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..composition.nodes import Composition, Fuse, expanded, names_in, to_json
from ..config.fusion import FusionConfig
from ..errors import AdapterNameError, CompatibilityError, ConfigError
from ..heads.find import Heads, find_heads
from ..methods.spellings import no_config, read_json
from ..nn.fusion import Fusion
from ..placement.spec import SiteSpec, located
from ..runtime.acting import acting_at
from ..runtime.lookup import adapters_in, fusions_of, sites_of
from ..runtime.site import AdapterSite
from ..runtime.state import ModelState
from ..structure.tracing.forward import ExampleInputs
from .activate import check_known
from .admit import AdapterDraft, admit
from .attach import check_free

__all__ = [
    "add_fusion",
    "anneal",
    "as_fusion_config",
    "fusion_modules",
    "fusion_of",
    "fusion_sites",
    "loss",
    "prune",
]


def as_fusion_config(config: FusionConfig | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any]) -> FusionConfig:
    """Return the config that "dynamic", "static", a config, a mapping or a path to JSON stands for.

    Raises:
        ConfigError: not one of these, or bad settings.
    """
    if isinstance(config, FusionConfig):
        return config.override(overrides)
    if isinstance(config, str) and config in FusionConfig.presets:
        return FusionConfig(**FusionConfig.presets[config]).override(overrides)
    settings = config if isinstance(config, Mapping) else read_json(config)
    if settings is None:
        raise ConfigError(no_config(config, [*FusionConfig.presets]))
    return FusionConfig(**settings).override(overrides)


def add_fusion(
    model: nn.Module,
    fuse: Composition,
    config: FusionConfig,
    heads: Heads = (),
    example_inputs: ExampleInputs | None = None,
) -> None:
    """Add a fusion that weighs the children of a Fuse, or raise and leave the model as it was.

    Raises: see `AdapterKit.add_fusion`.
    """
    if not isinstance(fuse, Fuse):
        raise ConfigError(f"add_fusion takes an ak.Fuse('a', 'b'); found {fuse!r}")
    check_free(model, fuse.fusion)
    # `names_in` names the fusion as well, which there is not yet.
    for name in [name for name in names_in(fuse) if name != fuse.fusion]:
        check_known(model, name)
    expanded(fuse, fusions_of(model))  # refuses a fusion among the children
    # In the config, so that a file of the fusion says what it weighs.
    config = config.override({"children": tuple(map(to_json, fuse.children))})
    sites = fusion_sites(model, fuse, config)
    admit(model, AdapterDraft(fuse.fusion, config, sites, find_heads(model, heads, example_inputs)))


def fusion_sites(model: nn.Module, fuse: Fuse, config: FusionConfig) -> list[SiteSpec]:
    """Find the sites of a fusion: one for each tensor that its children change.

    Raises:
        CompatibilityError: a child changes a Parameter, or none changes anything.
    """
    sites = list(_sites(model, fuse, config))
    if not sites:
        raise CompatibilityError(
            f"{fuse!r} has nothing to weigh: its adapters have no modules in this {type(model).__name__}"
        )
    return sites


def _sites(model: nn.Module, fuse: Fuse, config: FusionConfig) -> Iterator[SiteSpec]:
    """Yield each tensor that children change, as a site of the fusion."""
    for path, _, site in sites_of(model):
        specs = [located(entry.spec, path) for name in names_in(fuse) for entry, _ in site.adapting(name)]
        # One site for each way of acting. Reversed, so that of several the first child's spec is the one that stays.
        for spec in {spec.at: spec for spec in reversed(specs)}.values():
            if acting_at(spec.at).is_shared:
                changed = f"the Parameter {spec.parameters[0]!r}" if spec.parameters else f"the host's {spec.at}"
                raise CompatibilityError(
                    f"{fuse!r} cannot weigh what is done at {path!r}: an adapter there changes {changed}, which all tokens "
                    "share. Fuse adapters of layers, or stack these"
                )
            yield _fusion_site(spec, config)


def _fusion_site(spec: SiteSpec, config: FusionConfig) -> SiteSpec:
    """Return the site of a fusion where the first of its children is at this one."""
    spec = replace(spec, tag=spec.at, member=0, slices=())  # the tag tells two at one host apart
    if config.query_reads == "adapter" and spec.reads != "own_input":
        return spec
    argument = spec.input if spec.residual is None else None  # that of the host, not of the stream's module
    return replace(
        spec, reads="site", input_width=spec.width, residual=None, input=argument if spec.at == "input" else None
    )


def fusion_of(model: nn.Module, fuse: Composition) -> tuple[str, Fuse]:
    """Return the name of a fusion in the model, and what it weighs. Raises AdapterNameError if there is none."""
    name = fuse.fusion if isinstance(fuse, Fuse) else fuse
    fusions = fusions_of(model)
    if name not in fusions:
        raise AdapterNameError(
            f"the model has no fusion {name!r}; it has: {list(fusions) or 'none'}. kit.add_fusion makes one"
        )
    return str(name), fusions[str(name)]


def fusion_modules(model: nn.Module, name: str) -> Iterator[tuple[str, SiteSpec, Fusion]]:
    """Yield a fusion's modules, each with its host's path and its site."""
    for held, entry in adapters_in(model).sites(name):
        if isinstance(held.module, Fusion):
            yield held.path, entry.spec, held.module


def loss(model: nn.Module, names: Sequence[str]) -> Tensor:
    """Return the regularisation of fusions: the weighted squared distance of each Wv to the identity. Shape: ()."""
    terms = [
        _config(site, name).regularization * module.distance_to_identity()
        for name in names
        for _, _, site in sites_of(model)
        for _, module in site.modules_of(name)
        if isinstance(module, Fusion)
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def anneal(model: nn.Module, name: str) -> None:
    """Lower the temperature of a fusion by a step, down to 1."""
    for _, _, site in sites_of(model):
        for _, module in site.modules_of(name):
            if isinstance(module, Fusion) and module.temperature > 1:
                # In place: a compiled graph goes on reading this buffer, and need not be made anew.
                module.temperature.sub_(_config(site, name).temperature_step).clamp_(min=1)


def prune(model: nn.Module, state: ModelState, name: str, keep: Sequence[Composition]) -> Fuse:
    """Let a fusion weigh fewer children from now on, and return what it weighs. Raises: see `AdapterKit.prune_fusion`."""
    fuse = fusion_of(model, name)[1]
    unknown = [child for child in keep if child not in fuse.children]
    if unknown:
        raise ConfigError(f"the fusion {name!r} weighs {list(fuse.children)}; it cannot keep {unknown}")
    kept = [child for child in fuse.children if child in keep]
    # The modules stay as they are: no parameter of a fusion depends on how many children it weighs.
    pruned = Fuse(*kept, name=name)
    if any(name in names_in(held) for held in state.activation.scheduled):
        raise CompatibilityError(
            f"the fusion {name!r} is active with all of its children, or will be when a `with` block ends: call "
            "kit.deactivate(), prune it, and activate it anew"
        )
    for _, _, site in sites_of(model):
        held = site.entries.get(name, ())
        config = {"children": tuple(map(to_json, kept))}
        if held:
            site.entries[name] = tuple(replace(entry, config=_config(site, name).override(config)) for entry in held)
    return pruned


def _config(site: AdapterSite, name: str) -> FusionConfig:
    return site.entries[name][0].config  # type: ignore[return-value]  # a fusion's is one
