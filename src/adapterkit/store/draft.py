"""Make the draft of a saved adapter or fusion: its config and sites, after checking that they go together."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..composition.nodes import Fuse, to_json
from ..config.fusion import FusionConfig
from ..config.union import Config, members
from ..errors import CompatibilityError, StoreError, TargetError
from ..lifecycle.add import find_sites, seen_layouts
from ..lifecycle.admit import AdapterDraft
from ..lifecycle.fusion import fusion_sites
from ..methods import method_of
from ..placement.spec import SiteSpec
from ..structure.hosts import resolve_host
from ..structure.paths import modules_by_path
from ..structure.tracing.forward import ExampleInputs
from .fused_adapters import fuse_from
from .refusal import refusing
from .saved_adapter import SavedAdapter
from .tensors import tensor_key

__all__ = ["draft_of", "with_layouts"]


def draft_of(
    model: nn.Module, saved: SavedAdapter, name: str, *, any_base: bool, example_inputs: ExampleInputs | None
) -> AdapterDraft:
    """Return a saved adapter or fusion as a draft without heads.

    Args:
        name: What it is to be called.
        any_base: Let a fusion weigh adapters of the names that it knows, whatever they hold.
        example_inputs: Inputs to find the sites with, of an adapter whose format does not know them.

    Raises:
        StoreError: its sites contradict its config, or the fusion's adapters.
        CompatibilityError: an adapter that the fusion weighs is not there; or the config leads to no sites here.
    """
    config = saved.config
    if isinstance(config, FusionConfig):
        fuse = fuse_from(model, saved, config, name, any_base=any_base)
        with refusing(saved.source):
            return _fusion_draft(model, saved, config, name, fuse)
    if saved.sites is None:
        return AdapterDraft(name, config, _sites_here(model, saved, config, example_inputs))
    sites = [site.spec for site in saved.sites]
    with refusing(saved.source):
        _check_sites(model, config, sites)
    return AdapterDraft(name, config, sites)


def with_layouts(model: nn.Module, draft: AdapterDraft, example_inputs: ExampleInputs | None) -> AdapterDraft:
    """Return an adapter's draft with what is seen of where rows lie. Raises TargetError; see `seen_layouts`."""
    if isinstance(draft.config, FusionConfig):  # it is where its adapters are, and they were looked at
        return draft
    return replace(draft, layouts=seen_layouts(model, draft.config, draft.sites, example_inputs))


def _fusion_draft(model: nn.Module, saved: SavedAdapter, saved_config: FusionConfig, name: str, fuse: Fuse) -> AdapterDraft:
    """Return a fusion's draft; its sites follow from those of its adapters, and must be those of the file."""
    # The children by the names that they have in this model, which may be others than in the file.
    config = saved_config.override({"children": tuple(map(to_json, fuse.children))})
    sites = fusion_sites(model, fuse, config)
    here = {(site.path, site.at, site.width, site.input_width) for site in sites}
    there = {(spec.path, spec.at, spec.width, spec.input_width) for spec in (site.spec for site in saved.sites or ())}
    if saved.sites is not None and here != there:
        raise StoreError(f"its adapters are at {sorted(here ^ there)[:3]} in one of file and model, and not in the other")
    return AdapterDraft(name, config, sites)


def _sites_here(
    model: nn.Module, saved: SavedAdapter, config: Config, example_inputs: ExampleInputs | None
) -> list[SiteSpec]:
    """Find the sites that a config leads to in this model."""
    try:
        return find_sites(model, config, example_inputs)
    except (CompatibilityError, TargetError) as error:
        raise CompatibilityError(
            f"the adapter in {str(saved.source)!r} does not fit this {type(model).__name__}: {error}"
        ) from error


def _check_sites(model: nn.Module, config: Config, sites: Sequence[SiteSpec]) -> None:
    """Raise StoreError unless the sites of a file are ones that its config may have, in modules that can hold them."""
    modules = modules_by_path(model)
    placements = [method_of(member).placements(member) for member in members(config)]
    for site in sites:
        # A file is not to be trusted: its sites must be ones that its own config could have led to.
        if site.member >= len(placements) or not any(placement.allows(site) for placement in placements[site.member]):
            raise StoreError(f"site {site.path!r} says at={site.at!r}, reads={site.reads!r}; its config says otherwise")
        # Our own files name no container: for a Sequential, a site is at its last child before anything is saved.
        if site.at != "weight" and resolve_host(site.path, modules, at_input=site.at == "input") != site.path:
            raise StoreError(f"site {site.path!r} is a container, which cannot hold an adapter")
    # Two sites whose tensors have the same names in the file could not both be filled.
    if len({tensor_key(site, site.path, "") for site in sites}) < len(sites):
        raise StoreError(f"it names a site twice: {sorted(site.path for site in sites)}")
