"""From targets to sites of methods that change weights: at modules that apply a weight, and at Parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from ..config.settings import AdapterConfig
from ..errors import TargetError
from ..nn.functional.projections import Projection, parameter_projection
from ..nn.functional.slices import Slices
from ..structure.anatomy.discover import Discovery
from ..structure.anatomy.fused import fused_slices
from ..structure.anatomy.roles import check_whole
from ..structure.anatomy.unknown import check_known
from ..structure.hosts import host_type, is_called, note_of_unread_packages
from ..structure.paths import ancestors
from ..structure.tracing.forward import ExampleInputs
from .computed_weights import no_parameter, why_no_effect
from .counting import Counting
from .layers import check_layers, in_layers, layers_matter
from .patterns import is_role
from .projections import projection_of
from .readers import at_running_hosts
from .rule import Placement
from .spec import SiteSpec
from .targets import argument_of
from .wanted import Scope, Wanted, fused_at, own_parameters, wanted_by

__all__ = ["projection_at", "weight_sites"]


def weight_sites(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: AdapterConfig,
    placement: Placement,
    discovery: Discovery,
    example_inputs: ExampleInputs | None,
) -> list[SiteSpec]:
    """Find the sites of a placement at projections or Parameters, in the model's order.

    Raises:
        TargetError: a target names nothing, or nothing with a weight; a host never runs on the example inputs.
    """
    counting = Counting(model, modules, example_inputs, is_asked=layers_matter(config))
    scope = Scope(model, modules, placement, discovery, counting)
    try:
        # `targets=()` is for the message of an exclude that finds nothing: it then proposes no `targets=…`.
        excluded = wanted_by(config.exclude, replace(scope, placement=replace(placement, targets=())))
    except TargetError as error:
        raise TargetError(f"exclude: {error}") from None
    for role in filter(is_role, config.targets):
        check_known(role, discovery.anatomy, excluded.modules)
    wanted = wanted_by(config.targets, scope)
    if config.layers is None:  # who names layers leaves out others on purpose
        for role in filter(is_role, config.targets):
            check_whole(role, discovery.anatomy, {*excluded.modules})
    sites = [*_projection_sites(wanted, excluded, scope), *_parameter_sites(wanted, excluded, scope)]
    if not sites:
        raise TargetError(
            f"everything that targets={list(config.targets)} name is excluded by exclude={list(config.exclude)}"
        )
    check_layers({site.path: site.layer for site in sites}, config.layers)
    kept = [site for site in sites if in_layers(site.layer, config.layers)]
    # Tracing has made inputs that the model runs on: what runs can be seen with them, too.
    inputs = discovery.inputs if discovery.was_needed else example_inputs
    resting = discovery.anatomy.resting if discovery.was_needed else frozenset()
    return kept if inputs is None else at_running_hosts(model, kept, config, inputs, resting)


def projection_at(site: SiteSpec, host: nn.Module) -> Projection:
    """Return the weight that a site adapts, as a projection: its kind, shape and axes.

    Args:
        site: As `Method.build` is given it.
        host: The module at `site.path`.

    Raises:
        TargetError: a Parameter of fewer than two axes, which is no projection; the host is none any more.
    """
    if not site.parameters:
        projection = projection_of(host)
        if projection is None:
            raise TargetError(_no_projection(site.path, host))
        return projection
    shape = tuple(host.get_parameter(site.parameters[0]).shape)
    if len(shape) < 2:
        raise TargetError(
            f"the Parameter {site.parameters[0]!r} of {site.path!r} has shape {shape}; this method changes weights of two "
            "or more axes. Bias-like Parameters are trained by 'bitfit', those of norms by 'norm_tuning'"
        )
    return parameter_projection(shape)


def _projection_sites(wanted: Wanted, excluded: Wanted, scope: Scope) -> Iterator[SiteSpec]:
    """Make the sites at modules that apply a weight."""
    placement = scope.placement
    # Over the modules, not the targets: sites are in the model's order, whatever the order of the targets.
    for path, module in scope.modules.items():
        if path not in wanted.modules or path in excluded.modules:
            continue
        projection = projection_of(module)
        if projection is None:
            raise TargetError(_no_projection(path, module))
        at_input = placement.at == "input"
        width = projection.in_features if at_input else projection.out_features
        letters = wanted.modules[path]
        # All of it ("") holds every slice. The anatomy is asked for only where a role named a slice: it costs a trace.
        slices = () if "" in letters else fused_slices(scope.discovery.anatomy, path)
        yield SiteSpec(
            path=path,
            host=host_type(module),
            at="input" if at_input else "output",
            reads=placement.reads,
            width=width,
            input_width=projection.in_features if placement.reads == "own_input" else width,
            axis=projection.channel_axis,
            layer=scope.counting.layer_of(path),
            # A layer multiplies its first argument. With its keyword, a call by keyword is found, too.
            input=argument_of(module, 0),
            slices=_slices_of(letters, slices, projection.out_features),
        )


def _slices_of(letters: set[str], slices: Slices, width: int) -> Slices:
    """Choose the slices of a fused projection that are wanted; () where it is not fused, or one of them is all of it.

    Args:
        letters: Of "q", "k" and "v", those that are wanted.
        slices: The projection's, under these names.
        width: Features of the projection's output.
    """
    chosen = tuple((letter, ranges) for letter, ranges in slices if letter in letters)
    # Chosen, e.g. of GPT-2's c_attn: (("q", ((0, 768),)), ("v", ((1536, 2304),))).
    is_whole = len(chosen) == 1 and sum(stop - start for start, stop in chosen[0][1]) == width
    return () if is_whole else chosen


def _no_projection(path: str, module: nn.Module) -> str:
    """Write the message for a module that applies no weight of its own."""
    own = [f"{path}.{leaf}".lstrip(".") for leaf, _ in own_parameters(module)]
    below = [f"{path}.{name}".lstrip(".") for name, inner in module.named_modules() if name and projection_of(inner)]
    way_out = f"; it holds the Parameters {own[:4]}, which can be targets" if own else ""
    way_out += f"; below it lie {below[:4]}" if below else ""
    return (
        f"{path!r} ({type(module).__name__}) applies no weight that this method can change{way_out}. Target linear, "
        f"convolutional or embedding layers (roles: '@attention.q', '@feedforward.last', …){note_of_unread_packages()}"
    )


def _parameter_sites(wanted: Wanted, excluded: Wanted, scope: Scope) -> Iterator[SiteSpec]:
    """Make the sites at Parameters. A tied Parameter has one at each host that reads it."""
    names_of = _names_by_parameter(scope)
    done: set[int] = set()
    for name, letters in wanted.parameters.items():
        if name not in scope.owners:  # a weight of an nn.MultiheadAttention that is computed from other Parameters
            raise TargetError(no_parameter(scope.modules)[name])
        parameter, owner = scope.parameter(name), scope.owners[name]
        # One tied Parameter is one change, under whichever of its names a target came first.
        if id(parameter) in done or name in excluded.parameters or owner in excluded.modules:
            continue
        done.add(id(parameter))
        rows = () if "" in letters else _rows(name, letters, parameter.shape[0], scope)
        reason = why_no_effect(owner, scope.modules[owner], name.rpartition(".")[2])
        if reason is not None:
            raise TargetError(reason)
        yield from _sites_of_parameter(name, names_of[id(parameter)], rows, scope)


def _sites_of_parameter(name: str, names: Iterable[str], rows: Slices, scope: Scope) -> Iterator[SiteSpec]:
    """Make the sites of one Parameter: one at each module that is called when the Parameter is read.

    Args:
        name: The name that a target has for it.
        names: Its name at each module that holds it.
        rows: The slices of it that are adapted.
    """
    parameter = scope.parameter(name)
    layer = scope.counting.layer_of(scope.owners[name])  # one for all of its hosts: they are adapted, or left out, together
    for host, held_as in _by_host(names, scope).items():
        yield SiteSpec(
            path=host,
            host=host_type(scope.modules[host]),
            at="weight",
            reads="weight",
            width=parameter.shape[0] if parameter.dim() else 1,  # a Parameter may be a single number
            input_width=parameter.shape[-1] if parameter.dim() else 1,
            axis=0,
            layer=layer,
            parameters=tuple(held.removeprefix(f"{host}.") if host else held for held in held_as),
            slices=rows,
        )


def _names_by_parameter(scope: Scope) -> dict[int, list[str]]:
    """Map the `id` of each Parameter → its names, one for each module that holds it and each attribute it has there.

    A module that has several paths counts once, under the first one.
    """
    names: dict[int, dict[tuple[int, str], str]] = {}
    for name, path in scope.owners.items():
        leaf, module = name.rpartition(".")[2], scope.modules[path]
        names.setdefault(id(module._parameters[leaf]), {}).setdefault((id(module), leaf), name)
    return {key: list(held.values()) for key, held in names.items()}


def _by_host(names: Iterable[str], scope: Scope) -> dict[str, list[str]]:
    """Map each host → the names under which it reads a Parameter: the innermost module around that is called itself."""
    by_host: dict[str, list[str]] = {}
    for name in names:
        called = (path for path in ancestors(scope.owners[name]) if is_called(scope.modules[path]))
        by_host.setdefault(next(called, ""), []).append(name)
    return by_host


def _rows(name: str, letters: set[str], size: int, scope: Scope) -> Slices:
    """Find the rows of a Parameter that are its query, key or value; () if it is not fused.

    Args:
        name: Of the Parameter, with which a module around it projects inside.
        letters: Of "q", "k" and "v", those that are wanted.
        size: Rows of the Parameter.
    """
    anatomy = scope.discovery.anatomy
    # The module that projects need not hold the Parameter itself: attention reads the weight of its `out_proj`.
    for path in ancestors(scope.owners[name]):
        weight = name.removeprefix(f"{path}.") if path else name
        for fused in fused_at(path, anatomy):
            if fused.weight != weight:
                continue
            slices = fused_slices(anatomy, path, weight)
            if slices and fused.axis != 0:
                raise TargetError(
                    f"the queries, keys and values of {name!r} are columns, not rows; target all of it: {name!r}"
                )
            return _slices_of(letters, slices, size)
    return ()
