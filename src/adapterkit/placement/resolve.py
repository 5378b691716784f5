"""From a config to sites: which modules of this model, and what each looks like there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..config.settings import AdapterConfig, TensorConfig
from ..errors import TargetError
from ..structure import pytree
from ..structure.anatomy.description import Anatomy, Norm
from ..structure.anatomy.discover import Discovery
from ..structure.hosts import (
    HostShape,
    channel_axis,
    host_type,
    is_more_than_a_norm,
    known_shape,
    note_of_unread_packages,
    resolve_host,
)
from ..structure.paths import modules_by_path
from ..structure.tracing.forward import ExampleInputs, observe, runs_around
from ..structure.tracing.row_layout import NO_ROWS, RowAxes, SeenRows
from ..structure.tracing.tensors import shape_of
from .counting import Counting
from .layers import check_layers, in_layers, layers_matter
from .match import match_nothing
from .rule import Placement
from .spec import Location, SiteSpec, layout_of
from .targets import Found, find_locations
from .weights import weight_sites

__all__ = ["acts_by_row", "check_row_axes", "resolve"]


def resolve(
    model: nn.Module,
    members: Sequence[tuple[AdapterConfig, Sequence[Placement]]],
    example_inputs: ExampleInputs | None = None,
) -> list[SiteSpec]:
    """Find the sites that a config names in a model, or those of each member of a union. Changes nothing.

    Args:
        members: Each config with the placements that its method gives for it.
        example_inputs: Inputs that the model runs on; where roles need them and there are none, tiny ones are made.

    Raises:
        TargetError: a target matches nothing or cannot be adapted, a host never runs on the example inputs, or its
            shape cannot be known without them.
        CompatibilityError: a role is named, and the model does not run on inputs made for it.
    """
    modules = modules_by_path(model)
    # Traces when something first asks for the anatomy: targets that are names need no forward.
    discovery = Discovery(model, example_inputs)
    sites: list[SiteSpec] = []
    for member, (config, placements) in enumerate(members):
        for placement in placements:
            found = _sites_at(model, modules, config, placement, discovery, example_inputs)
            sites += [replace(site, tag=placement.tag, member=member) for site in found]
    # Where tracing was not needed, no site depends on the norms around it.
    norms = _norms(discovery.anatomy, modules) if discovery.was_needed else {}
    return [replace(site, norm=norms.get(site.path)) for site in sites]


def _sites_at(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: AdapterConfig,
    placement: Placement,
    discovery: Discovery,
    example_inputs: ExampleInputs | None,
) -> list[SiteSpec]:
    """Find the sites of one placement."""
    if placement.targets is not None:
        config = config.override({"targets": placement.targets})
    if placement.is_optional and match_nothing(modules, config.targets, discovery):
        return []
    if placement.level != "tensor":
        return weight_sites(model, modules, config, placement, discovery, example_inputs)
    if not isinstance(config, TensorConfig):
        raise TypeError(f"the method {config.method!r} adapts tensors; its config must derive from TensorConfig")
    at_hosts = find_locations(model, modules, config, placement, discovery)
    counting = Counting(model, modules, example_inputs, is_asked=layers_matter(config))
    layers = {path: counting.layer_of(path) for path in at_hosts}
    # Before sites are left out, so that the message can say in which layers they lie.
    check_layers(layers, config.layers)
    at_hosts = {path: found for path, found in at_hosts.items() if in_layers(layers[path], config.layers)}
    seen = _trace(model, at_hosts, discovery.inputs if discovery.was_needed else example_inputs)
    return [_site(found, layers[path], modules, config, seen) for path, found in at_hosts.items()]


def _norms(anatomy: Anatomy, modules: dict[str, nn.Module]) -> dict[str, Norm]:
    """Map each host that yields a branch → where its block normalises around that branch."""
    norms: dict[str, Norm] = {}
    for sublayer in (*anatomy.sublayers, *anatomy.others):
        if sublayer.out is not None:
            with suppress(TargetError):  # no host: then there is no site that would ask
                norms[resolve_host(sublayer.out.path, modules, at_input=False)] = sublayer.norm
    return norms


def _site(
    found: Found,
    layer: tuple[int, int] | None,
    modules: dict[str, nn.Module],
    config: TensorConfig,
    seen: dict[str, _Seen],
) -> SiteSpec:
    """Make the site at a location, with its width and axis."""
    location = found.location
    host = modules[location.path]
    shape = _shape(found, host, config, seen.get(location.path))
    input_width, residual = shape.width, location.residual
    # What is read beside a module may be of another width than what it returns; a residual stream is not.
    if residual is not None and found.reads_own_input:
        input_width = _input_width(residual, modules[residual], shape, seen)
    return SiteSpec(
        path=location.path,
        host=host_type(host),
        at=location.at,
        reads=location.reads,
        width=shape.width,
        input_width=input_width,
        axis=shape.axis,
        layer=layer,
        output=location.output,
        input=location.input,
        residual=residual,
    )


class _Seen(NamedTuple):
    """Shapes of the tensor that a host returned and of the one that it took; None where there was none."""

    output: tuple[int, ...] | None
    input: tuple[int, ...] | None


def _trace(model: nn.Module, at_hosts: dict[str, Found], example_inputs: ExampleInputs | None) -> dict[str, _Seen]:
    """Run the model, and map each host, and each module whose input is read beside one → what it took and returned.

    Args:
        at_hosts: Map each host's path → the location there.
        example_inputs: Inputs that the model runs on; without any, nothing is seen.

    Raises:
        TargetError: one of these modules never runs, or has no tensor where the config says.
    """
    if example_inputs is None:
        return {}

    def look(path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> _Seen:
        # None for a module that is no host: one whose input is read beside a host.
        found = at_hosts.get(path)
        try:
            return _tensors_seen(path, None if found is None else found.location, (args, kwargs), output)
        except LookupError as error:
            raise TargetError(f"{path!r} has no tensor {error} where `output=` or `input=` say") from error

    beside = [found.location.residual for found in at_hosts.values() if found.reads_own_input]
    calls = observe(model, example_inputs, dict.fromkeys([*at_hosts, *filter(None, beside)]), look)
    never = [path for path, seen in calls.items() if not seen]
    if never:
        instead = list(dict.fromkeys(runs_around(model, example_inputs, never).values()))
        raise TargetError(
            f"{never} never ran on the example inputs (skipped, or their weights are read around them), so an adapter "
            f"there would do nothing. Exclude them, or target what runs around them: {instead}."
        )
    # The first call: a module that runs several times (ALBERT's blocks) takes and returns the same widths each time.
    return {path: seen[0] for path, seen in calls.items()}


def _tensors_seen(path: str, location: Location | None, call: tuple[Any, Any], output: Any) -> _Seen:
    """Return the shapes of the tensors that an adapter at this module would read and change.

    Args:
        location: Where the adapter sits, if it is at this module; the first floating-point tensors count if it is not.
        call: The module's arguments and keyword arguments.
        output: What it returned.

    Raises:
        LookupError: the location names a tensor that is not there.
    """
    argument = returned = None
    if location is not None:
        returned = location.output
        # `input` may name an argument of another module, whose input is the residual stream.
        argument = location.input if location.residual in (None, path) else None
    if location is not None and location.at == "output" and returned is None:
        _check_first(path, output)
    taken = pytree.argument_path(call, argument) if argument else pytree.find(call)
    return _Seen(_shape_at(output, returned or pytree.find(output)), _shape_at(call, taken))


def _check_first(path: str, output: Any) -> None:
    """Raise TargetError if the first tensor of an output may be something beside its features: losses of rows, say."""
    floating = {way: shape_of(tensor) for way, tensor in pytree.tensors(output) if tensor.is_floating_point()}
    first = pytree.find(output)
    if first is not None and len(floating[first]) == 1 and any(len(shape) > 1 for shape in floating.values()):
        shapes = ", ".join(f"{way}: {shape}" for way, shape in floating.items())
        raise TargetError(
            f"{path!r} returns tensors of shapes {shapes}: the first has one axis, so that it may be no features; say "
            "which is to be adapted, by output="
        )


def _shape_at(value: Any, path: pytree.Path | None) -> tuple[int, ...] | None:
    """Return the shape of the tensor at a path in a value; None without a path, or if it is no tensor."""
    tensor = None if path is None else pytree.get(value, path)
    return shape_of(tensor) if isinstance(tensor, Tensor) else None


def _shape(found: Found, host: nn.Module, config: TensorConfig, seen: _Seen | None) -> HostShape:
    """Tell the width and axis of a site, from the trace if there is one, else from the host's type."""
    location, known = found.location, known_shape(host)
    path = location.path
    if location.reads == "norm":
        _check_norm(path, host)
    if seen is not None:
        return _seen_shape(found, host, known, config, seen)
    if known is None:
        raise TargetError(
            f"the width of {path!r} ({type(host).__name__}) cannot be told from its type; "
            f"wrap the model with example inputs: ak.wrap(model, example_inputs=batch){note_of_unread_packages()}"
        )
    width = known.width if location.at == "output" else known.input_width
    if not width:
        raise TargetError(
            f"{path!r} ({type(host).__name__}) takes no features that an adapter could change (or, if it is lazy, not yet: "
            "run the model once); adapt its output, or the module after it"
        )
    return HostShape(width, None, known.axis if config.channel_axis is None else config.channel_axis)


def _seen_shape(found: Found, host: nn.Module, known: HostShape | None, config: TensorConfig, seen: _Seen) -> HostShape:
    """Tell the width and axis of a site from what the host took and returned."""
    location = found.location
    path, here = location.path, seen.output if location.at == "output" else seen.input
    if here is None:
        raise TargetError(f"{path!r} ({type(host).__name__}) has no floating-point tensor at its {location.at}")
    axis = _feature_axis(found, host, known, config, here)
    if axis is None:
        raise TargetError(
            f"cannot tell which axis of {path!r} ({type(host).__name__}, shape {here}) holds the features; "
            "set channel_axis=1 (images, signals) or channel_axis=-1 (tokens)"
        )
    if not -len(here) <= axis < len(here):
        raise TargetError(f"{path!r} has a tensor of shape {here}, which has no axis {axis}; set channel_axis")
    return HostShape(here[axis], None, axis)


def _feature_axis(
    found: Found, host: nn.Module, known: HostShape | None, config: TensorConfig, shape: tuple[int, ...]
) -> int | None:
    """Tell the axis of the features in a tensor of this shape; None if nothing tells.

    In this order: what the user says, what tracing found, the axis of the host's type if the width there is the type's,
    and what else the host's type lets one guess.
    """
    if config.channel_axis is not None:
        return config.channel_axis
    if found.axis is not None:
        return found.axis
    if known is not None and -len(shape) <= known.axis < len(shape):
        width = known.width if found.location.at == "output" else known.input_width
        if shape[known.axis] == width:
            return known.axis
    return channel_axis(host, shape)


def _input_width(path: str, module: nn.Module, site: HostShape, seen: dict[str, _Seen]) -> int:
    """Tell the width of what a module takes, on the site's axis, from the trace or its type."""
    known = known_shape(module)
    taken = seen[path].input if path in seen else None
    if taken is not None and -len(taken) <= site.axis < len(taken):
        return taken[site.axis]
    # Only of a module that the trace did not see: what was seen has no such axis, whatever its type says.
    if path not in seen and known is not None and known.input_width:
        return known.input_width
    raise TargetError(
        f"the input width of {path!r} ({type(module).__name__}) cannot be told; an adapter beside it needs a "
        "floating-point input, and, where the type does not tell its width, ak.wrap(model, example_inputs=batch)"
    )


def check_row_axes(
    model: nn.Module, sites: Sequence[SiteSpec], configs: Sequence[AdapterConfig], layouts: SeenRows
) -> None:
    """Raise TargetError where a setting acts row by row, and rows are on another axis than it takes, or on an unknown one.

    Args:
        configs: The config of each member; a site says which one it came of.
        layouts: The row layouts that were observed: map each host's path to them.
    """
    axes = RowAxes(dict(model.named_modules()))
    for site in sites:
        config, seen = configs[site.member], layout_of(layouts.get(site.path, {}), site)
        given = getattr(config, "batch_axis", None)
        # Where nothing was seen, what is given counts, else what modules say. A tensor for all rows has no axis of theirs.
        axis = (axes.at(site.path) if given is None else given) if seen is None else seen.axis
        if not acts_by_row(config) or seen == NO_ROWS or axis == (given or 0) or (axis is None and given is not None):
            continue
        names = " and ".join(name for name in config.by_row if getattr(config, name))
        if axis is None:
            raise TargetError(
                f"on which axis {site.path!r} has its batch is not known{layouts.note(site.path)}; {names} must know which "
                "axis the rows are on: set batch_axis=0 or 1, or wrap the model with inputs that show it"
            )
        raise TargetError(
            f"{site.path!r} has its batch on axis {axis}; {names} must know which axis the rows are on: set "
            f"batch_axis={axis}, in a config of their own for such places (ak.Union) where others have it elsewhere"
        )


def acts_by_row(config: AdapterConfig) -> bool:
    """Tell whether a setting of a config acts on each row of a batch."""
    return any(getattr(config, name) for name in config.by_row)


def _check_norm(path: str, host: nn.Module) -> None:
    """Raise TargetError unless the host is a norm that can run again on a changed tensor and do the same."""
    has_statistics = isinstance(host, nn.modules.batchnorm._NormBase)
    if has_statistics or is_more_than_a_norm(host):
        raise TargetError(
            f"at='renormalised' needs a norm without running statistics (such as nn.LayerNorm); {path!r} is "
            f"{type(host).__name__}"
        )
