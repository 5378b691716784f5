"""Add an adapter, or heads: find its sites, build its modules, attach them; all or nothing."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..composition.nodes import names_in
from ..config.settings import AdapterConfig
from ..config.union import Config, Union, members
from ..errors import ActivationError, AdapterKitError, AdapterNameError, CompatibilityError, TargetError
from ..heads.find import Heads, check_apart, check_names, find_heads
from ..methods import method_of
from ..placement.layers import check_maps
from ..placement.match import match
from ..placement.resolve import acts_by_row, check_row_axes, resolve
from ..placement.spec import SiteSpec
from ..placement.targets import asks_for_structure
from ..runtime.lookup import HeldModule, adapters_in, find_state, fusions_of, named_parameters, sites_of
from ..runtime.site import HeadEntry, SiteEntry
from ..runtime.state import ACTIVATION_LOCK, ModelState, without_adapters
from ..structure.paths import ancestors
from ..structure.tracing.forward import ExampleInputs
from ..structure.tracing.row_layout import SeenRows
from ..structure.tracing.rows import discover_rows
from .activate import check_plans, layouts_of
from .admit import AdapterDraft, admit
from .attach import check_free, detach, drop_modules, insert_modules, refresh, state_of
from .build import build_head_modules, tied_groups
from .merging.merge import unmerge

__all__ = ["add", "add_heads", "find_sites", "needs_structure", "remove", "remove_head", "seen_layouts"]


def add(
    model: nn.Module,
    name: str,
    config: Config,
    heads: Heads = (),
    example_inputs: ExampleInputs | None = None,
) -> None:
    """Add a new adapter, or raise and leave the model as it was. Raises: see `AdapterKit.add`."""
    check_free(model, name)
    # From here on the model may be run. Nothing is put into it before `admit`.
    sites = find_sites(model, config, example_inputs)
    found = find_heads(model, heads, example_inputs)
    replaced = [head.path for head in found if head.is_in_place]
    if replaced:
        sites = _outside_heads(model, sites, config, replaced)
    layouts = seen_layouts(model, config, sites, example_inputs)
    admit(model, AdapterDraft(name, _with_paths(model, config), sites, found, layouts))


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter (or a fusion) out of the model, out of the base's weights first if it is merged.

    Raises:
        ActivationError: another thread is running the model with it.
        CompatibilityError: it is merged, and the weights have changed since; or a fusion weighs it.
    """
    state = state_of(model)
    weighed = [fusion for fusion, fuse in fusions_of(model).items() if name != fusion and name in names_in(fuse)]
    if weighed:
        raise CompatibilityError(
            f"adapter {name!r} is weighed by the fusion {weighed[0]!r}, which cannot run without it; call "
            f"kit.remove({weighed[0]!r}), or kit.prune_fusion, first"
        )
    with ACTIVATION_LOCK:
        if name in state.merged:
            # `detach` asks this as well, but only after the weights have changed.
            state.activation.check_forgettable(name)
            unmerge(model, state, name)
        detach(model, name)


def add_heads(model: nn.Module, name: str, heads: Heads, example_inputs: ExampleInputs | None = None) -> None:
    """Give an adapter more heads, or raise and leave the model as it was. Raises: see `AdapterKit.add_head`."""
    state = state_of(model)
    if name in state.merged:
        raise ActivationError(f"adapter {name!r} is merged into the weights; call kit.unmerge({name!r}) first")
    found = find_heads(model, heads, example_inputs)
    held = adapters_in(model).modules(name)
    there = [(one.path, one.entry.spec) for one in held if isinstance(one.entry, HeadEntry)]
    replaced = [path for path, head in there if head.above is None] + [head.path for head in found if head.is_in_place]
    check_names([*(head for _, head in there), *(head.spec for head in found)], replaced)
    check_apart([one.path for one in held if isinstance(one.entry, SiteEntry)], replaced)
    # Each entry has the whole config of the adapter. New heads train if any of its parameters does.
    config, trains = held[0].entry.config, any(p.requires_grad for _, p in named_parameters(model, name, heads=True))
    modules = build_head_modules(model, found)
    with ACTIVATION_LOCK:
        try:
            insert_modules(model, state, name, config, modules, trains=trains)
            for composition in state.activation.scheduled:
                check_plans(model, state, composition)
        except AdapterKitError:  # what is active, now or after a `with` block, cannot choose between heads
            _keep_only(model, state, name, held)
            raise


def _keep_only(model: nn.Module, state: ModelState, name: str, held: Sequence[HeldModule]) -> None:
    """Let go of all modules of an adapter but these."""
    keys = {(one.path, one.entry.key) for one in held}
    for path, _, site in list(sites_of(model)):
        others = {entry.key for entry in site.entries.get(name, ()) if (path, entry.key) not in keys}
        if others:
            drop_modules(model, name, path, others)
    state.hosts[name] = tuple(one.path for one in held)
    refresh(model, state)


def remove_head(model: nn.Module, name: str, head: str) -> None:
    """Take a head from an adapter. Raises: see `AdapterKit.remove_head`."""
    state = state_of(model)
    heads = {str(entry.spec.config.name): held for held, entry in adapters_in(model).heads(name)}
    if head not in heads:
        raise AdapterNameError(f"adapter {name!r} has no head {head!r}; it has {list(heads) or 'none'}")
    path = heads[head].path
    if name in state.merged:
        raise ActivationError(f"adapter {name!r} is merged into the weights; call kit.unmerge({name!r}) first")
    with ACTIVATION_LOCK:
        drop_modules(model, name, path, {heads[head].entry.key})
        # A host is listed once for each of its modules: one of these goes, the others stay.
        hosts = list(state.hosts[name])
        hosts.remove(path)
        state.hosts[name] = tuple(hosts)
        refresh(model, state)


def _outside_heads(model: nn.Module, sites: Sequence[SiteSpec], config: Config, heads: Sequence[str]) -> list[SiteSpec]:
    """Return the sites without those that lie in replaced heads by the method's own choice, such as every bias.

    Copies of heads train whole. A site that the user's `targets` name stays, and is refused later. A site in a head at a
    Parameter that is tied to one outside of the heads goes, too: it is adapted there.
    """
    named = [index for index, member in enumerate(members(config)) if "targets" in member.model_fields_set]
    outside = [site for site in sites if not {*heads} & {*ancestors(site.path)}]
    tied = {site for group in tied_groups(model, sites) if any(site in outside for site in group) for site in group}
    kept = [site for site in sites if site in outside or (site.member in named and site not in tied)]
    if not kept:
        raise TargetError(f"all {len(sites)} sites of the adapter lie in its heads {list(heads)}, which train whole anyway")
    return kept


def find_sites(model: nn.Module, config: Config, example_inputs: ExampleInputs | None) -> list[SiteSpec]:
    """Find the sites that a config would adapt. Raises: see `placement.resolve`."""
    with ACTIVATION_LOCK, without_adapters():
        # As the base alone: what is found must not depend on the adapters that are there already.
        sites = resolve(model, [(m, method_of(m).placements(m)) for m in members(config)], example_inputs)
    for index, member in enumerate(members(config)):
        check_maps(member, [site for site in sites if site.member == index])
    return sites


def needs_structure(config: Config) -> bool:
    """Tell whether a config's sites depend on what the model computes, not on names alone."""
    return any(asks_for_structure(m, placement) for m in members(config) for placement in method_of(m).placements(m))


def seen_layouts(
    model: nn.Module, config: Config, sites: Sequence[SiteSpec], example_inputs: ExampleInputs | None
) -> SeenRows:
    """Return where the rows of a batch lie in each module's tensors, as running the model shows or has shown.

    The model runs on the inputs, if there are any; else on tiny ones, if it runs anyway to find the config's sites, or if a
    setting of the config acts row by row.

    Raises:
        TargetError: the config has a row-wise setting, and rows are on another axis than it takes, or on an unknown one.
    """
    state = find_state(model)
    layouts = SeenRows() if state is None else layouts_of(model, state)
    is_new = any(site.path not in layouts for site in sites)
    if is_new and (example_inputs is not None or needs_structure(config) or any(map(acts_by_row, members(config)))):
        with ACTIVATION_LOCK, without_adapters():
            found = discover_rows(model, example_inputs)
        # What was seen before stays; but why nothing is known of the new sites is told by the run that failed.
        layouts = found or SeenRows(layouts, why_unknown=found.why_unknown)
    # Settings by row, such as gating, take one axis for that of the rows: a wrong one would be no error, but wrong numbers.
    check_row_axes(model, sites, members(config), layouts)
    return layouts


def _with_paths(model: nn.Module, config: Config) -> Config:
    """Return the config with predicates replaced by the paths that they matched, so that it can be saved."""
    if isinstance(config, Union):
        return Union(*(_member_with_paths(model, member) for member in config.configs))
    return _member_with_paths(model, config)


def _member_with_paths(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """Return one config of a union as `_with_paths` does."""

    # As patterns that match one path alone: "layer.1" as a plain name would match "encoder.layer.1", too.
    def paths(targets: Sequence[Any]) -> list[str]:
        return [
            path
            for target in targets
            for path in ([target] if isinstance(target, str) else [f"re:{re.escape(p)}" for p in match(model, [target])])
        ]

    # A method may have lists of targets of its own.
    named = {name: getattr(config, name) for name in type(config).model_fields}
    lists = {name: value for name, value in named.items() if isinstance(value, tuple) and any(map(callable, value))}
    return config.override({name: paths(value) for name, value in lists.items()})
