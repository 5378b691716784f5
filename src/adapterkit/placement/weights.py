"""From targets to sites of methods that change weights: modules that apply one, and Parameters of any module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ..config.settings import AdapterConfig, Predicate
from ..errors import TargetError
from ..nn.functional.projections import Projection, parameter_projection
from ..nn.functional.slices import Slices
from ..structure.anatomy.description import Anatomy, FusedProjection
from ..structure.anatomy.discover import Discovery
from ..structure.anatomy.fused import fused_slices
from ..structure.anatomy.roles import role_paths
from ..structure.hosts import host_type, is_called, note_of_unread_packages
from ..structure.paths import ancestors
from ..structure.tracing.forward import ExampleInputs
from .computed_weights import no_parameter, why_no_effect
from .layers import check_layers, in_layers, layer_of
from .patterns import is_role, matching, nothing_matches
from .projections import projection_of
from .readers import at_running_hosts
from .rule import Placement
from .spec import SiteSpec
from .targets import argument_of

__all__ = ["projection_at", "weight_sites"]


@dataclass
class _Wanted:
    """What targets name: modules and Parameters, each with the parts of it ("q", "k", "v"; "" is all of it)."""

    modules: dict[str, set[str]] = field(default_factory=dict)
    parameters: dict[str, set[str]] = field(default_factory=dict)

    def add(self, path: str, module: nn.Module, part: str) -> None:
        """Name a module, or the weights that an nn.MultiheadAttention reads itself."""
        if isinstance(module, nn.MultiheadAttention):
            inner = ["in_proj_weight"] if module.in_proj_weight is not None else [f"{p}_proj_weight" for p in "qkv"]
            for name in (*inner, "out_proj.weight"):
                self.parameters.setdefault(f"{path}.{name}".lstrip("."), set()).add("")
        elif isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            self.parameters.setdefault(f"{path}.weight", set()).add("")
        else:
            self.modules.setdefault(path, set()).add(part)


def weight_sites(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: AdapterConfig,
    placement: Placement,
    discovery: Discovery,
    example_inputs: ExampleInputs | None,
) -> list[SiteSpec]:
    """The sites of a placement at projections or Parameters, in the model's order.

    Raises:
        TargetError: a target names nothing, or nothing with a weight; a host never runs on the example inputs.
    """
    owned = {f"{path}.{leaf}".lstrip("."): path for path, m in modules.items() for leaf, p in _own_parameters(m)}
    try:
        excluded = _named(config.exclude, model, modules, owned, replace(placement, targets=()), discovery)
    except TargetError as error:
        raise TargetError(f"exclude: {error}") from None
    wanted = _named(config.targets, model, modules, owned, placement, discovery)
    sites = [*_projection_sites(wanted, excluded, modules, placement, discovery)]
    sites += _parameter_sites(wanted, excluded, modules, owned, discovery)
    if not sites:
        raise TargetError(
            f"everything that targets={list(config.targets)} name is excluded by exclude={list(config.exclude)}"
        )
    check_layers((site.layer for site in sites), config.layers)
    kept = [site for site in sites if in_layers(site.layer, config.layers)]
    inputs = discovery.inputs if discovery.was_needed else example_inputs
    return kept if inputs is None else at_running_hosts(model, kept, config, inputs)


def projection_at(site: SiteSpec, host: nn.Module) -> Projection:
    """The weight that a site adapts, and its geometry.

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


def _named(
    targets: Sequence[str | Predicate],
    model: nn.Module,
    modules: dict[str, nn.Module],
    owned: Mapping[str, str],
    placement: Placement,
    discovery: Discovery,
) -> _Wanted:
    """What a list of targets names. Modules come before Parameters, unless only those are meant."""
    wanted = _Wanted()
    first: dict[int, str] = {}
    for path, module in modules.items():
        first.setdefault(id(module), path)
    for target in targets:
        by_name = [] if is_role(target) or not isinstance(target, str) else matching(target, dict.fromkeys(owned, model))
        of_modules = role_paths(str(target), discovery.anatomy) if is_role(target) else matching(target, modules)
        if placement.level == "parameter":
            own = [name for name, path in owned.items() if path in of_modules and not by_name]
            by_name = [name for name in by_name or own if _is_accepted(name, modules[owned[name]], placement)]
            of_modules = []
        if not of_modules and not by_name:
            raise TargetError(_nothing(target, model, modules, owned, placement))
        part = str(target)[-1] if is_role(target) and str(target)[-2:] in (".q", ".k", ".v") else ""
        for path in of_modules:
            inside = _read_inside(path, part, discovery.anatomy) if part and not projection_of(modules[path]) else ()
            for name in inside:
                wanted.parameters.setdefault(name, set()).add(part)
            if not inside:
                wanted.add(first[id(modules[path])], modules[path], part)
        for name in by_name if not of_modules else ():
            wanted.parameters.setdefault(name, set()).add("")
    return wanted


def _nothing(
    target: str | Predicate, model: nn.Module, modules: dict[str, nn.Module], owned: Mapping[str, str], placement: Placement
) -> str:
    """The message for a target without a match."""
    computed = no_parameter(modules)
    names = [] if is_role(target) or not isinstance(target, str) else matching(target, computed)
    if names:
        return computed[names[0]]
    if placement.level == "parameter" and not is_role(target):
        accepted = [name for name in owned if _is_accepted(name, modules[owned[name]], placement)]
        kind = placement.accepts.__name__.removeprefix("is_").replace("_", " ")
        return (
            f"{target!r} names no {kind} of {type(model).__name__}, which has {len(owned)} Parameters and {len(accepted)}"
            f" of that kind{f', such as {accepted[:4]}' if accepted else ''}; name others, or choose another method"
        )
    fits = [path for path, module in modules.items() if projection_of(module)][:3]
    setting = "targets=" if placement.targets is None else ""
    return nothing_matches(target, model, list(modules), list(owned), f"{setting}{fits}" if fits else "")


def _is_accepted(name: str, owner: nn.Module, placement: Placement) -> bool:
    """Whether the method can train a Parameter."""
    leaf = name.rpartition(".")[2]
    return placement.accepts(owner, leaf, owner.get_parameter(leaf))


def _projection_sites(
    wanted: _Wanted, excluded: _Wanted, modules: dict[str, nn.Module], placement: Placement, discovery: Discovery
) -> Iterator[SiteSpec]:
    """Sites at modules that apply a weight."""
    for path in [path for path in modules if path in wanted.modules and path not in excluded.modules]:
        module, parts = modules[path], wanted.modules[path]
        projection = projection_of(module)
        if projection is None:
            raise TargetError(_no_projection(path, module))
        at_input = placement.at == "input"
        width = projection.in_features if at_input else projection.out_features
        yield SiteSpec(
            path=path,
            host=host_type(module),
            at="input" if at_input else "output",
            reads=placement.reads,
            width=width,
            input_width=projection.in_features if placement.reads == "own_input" else width,
            axis=projection.channel_axis,
            layer=layer_of(path, modules),
            input=argument_of(module, 0),
            slices=() if "" in parts else _chosen(fused_slices(discovery.anatomy, path), parts, projection.out_features),
        )


def _chosen(slices: Slices, parts: set[str], width: int) -> Slices:
    """Those of a fused projection's slices that these parts are; () where it is no fused one, or they are all of it."""
    chosen = tuple((part, ranges) for part, ranges in slices if part in parts)
    is_whole = len(chosen) == 1 and sum(stop - start for start, stop in chosen[0][1]) == width
    return () if is_whole else chosen


def _no_projection(path: str, module: nn.Module) -> str:
    own = [f"{path}.{leaf}".lstrip(".") for leaf, _ in _own_parameters(module)]
    below = [f"{path}.{name}".lstrip(".") for name, inner in module.named_modules() if name and projection_of(inner)]
    way_out = f"; it holds the Parameters {own[:4]}, which can be targets" if own else ""
    way_out += f"; below it lie {below[:4]}" if below else ""
    return (
        f"{path!r} ({type(module).__name__}) applies no weight that this method can change{way_out}. Target linear, "
        f"convolutional or embedding layers (roles: '@attention.q', '@feedforward.last', …){note_of_unread_packages()}"
    )


def _parameter_sites(
    wanted: _Wanted, excluded: _Wanted, modules: dict[str, nn.Module], owned: Mapping[str, str], discovery: Discovery
) -> Iterator[SiteSpec]:
    """Sites at Parameters: one at each host, the innermost module around one that holds it that is called."""
    holders: dict[int, dict[tuple[int, str], str]] = {}
    for name, path in owned.items():
        leaf = name.rpartition(".")[2]
        held = holders.setdefault(id(modules[path]._parameters[leaf]), {})
        held.setdefault((id(modules[path]), leaf), name)
    done: set[int] = set()
    for name, parts in wanted.parameters.items():
        if name not in owned:  # of an nn.MultiheadAttention
            raise TargetError(no_parameter(modules)[name])
        parameter = modules[owned[name]].get_parameter(name.rpartition(".")[2])
        if id(parameter) in done or name in excluded.parameters or owned[name] in excluded.modules:
            continue
        done.add(id(parameter))
        rows = () if "" in parts else _rows(name, owned[name], parts, parameter.shape[0], discovery.anatomy)
        layer = layer_of(owned[name], modules)  # one for all of its hosts, which are adapted or left out together
        nothing = why_no_effect(owned[name], modules[owned[name]], name.rpartition(".")[2])
        if nothing is not None:
            raise TargetError(nothing)
        for host, names in _by_host(holders[id(parameter)].values(), modules, owned).items():
            yield SiteSpec(
                path=host,
                host=host_type(modules[host]),
                at="weight",
                reads="weight",
                width=parameter.shape[0] if parameter.dim() else 1,
                input_width=parameter.shape[-1] if parameter.dim() else 1,
                axis=0,
                layer=layer,
                parameters=tuple(n.removeprefix(f"{host}.") if host else n for n in names),
                slices=rows,
            )


def _rows(name: str, owner: str, parts: set[str], size: int, anatomy: Anatomy) -> Slices:
    """The rows of a Parameter that a module projects with inside that are its query, key or value."""
    for path in ancestors(owner):
        weight = name.removeprefix(f"{path}.") if path else name
        for fused in _fused_at(path, anatomy):
            if fused.weight != weight:
                continue
            slices = fused_slices(anatomy, path, weight)
            if slices and fused.axis != 0:
                raise TargetError(
                    f"the queries, keys and values of {name!r} are columns, not rows; target all of it: {name!r}"
                )
            return _chosen(slices, parts, size)
    return ()


def _read_inside(path: str, part: str, anatomy: Anatomy) -> list[str]:
    """The Parameters that a module makes queries ("q"), keys or values with, without a layer of their own."""
    fused = [f for f in _fused_at(path, anatomy) if f.weight and (f.problem or part in dict(f.slices))]
    return list(dict.fromkeys(f"{path}.{f.weight}".lstrip(".") for f in fused))


def _fused_at(path: str, anatomy: Anatomy) -> list[FusedProjection]:
    return [fused for s in (*anatomy.sublayers, *anatomy.others) for fused in s.fused if fused.path == path]


def _by_host(names: Iterable[str], modules: Mapping[str, nn.Module], owned: Mapping[str, str]) -> dict[str, list[str]]:
    """A Parameter's names by the innermost module that is called when the one that holds it so computes."""
    by_host: dict[str, list[str]] = {}
    for name in names:
        called = (path for path in ancestors(owned[name]) if is_called(modules[path]))
        by_host.setdefault(next(called, ""), []).append(name)
    return by_host


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own Parameters by their names in it."""
    return ((leaf, p) for leaf, p in module._parameters.items() if p is not None)
