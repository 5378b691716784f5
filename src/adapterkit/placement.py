"""From a config to sites: which modules of this model, and what each looks like there."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from . import values
from .config.base import AdapterConfig
from .errors import TargetError
from .hosts import HostShape, channel_axis, host_type, is_more_than_a_norm, known_shape, resolve_host
from .patterns import ancestors, match, modules_by_path, nearest_to
from .sites import Reads, SiteSpec
from .structure.trace import ExampleInputs, observe

__all__ = ["Placement", "resolve"]


@dataclass(frozen=True)
class Placement:
    """Where a method's modules sit at their hosts, and what they read: see `SiteSpec`; "input" is the target's own."""

    at: Literal["output", "input"] = "output"
    reads: Reads | Literal["input"] = "site"
    residual: str | None = None

    def allows(self, site: SiteSpec) -> bool:
        """Whether a site may come of this placement."""
        reads = "residual" if self.reads == "input" else self.reads
        return (site.at, site.reads) == (self.at, reads) and (site.residual is None) == (reads in ("site", "norm"))


def resolve(
    model: nn.Module, config: AdapterConfig, placement: Placement, example_inputs: ExampleInputs | None = None
) -> list[SiteSpec]:
    """The sites that a config names in a model, in the model's order. Changes nothing.

    Raises:
        TargetError: a target matches nothing or cannot be adapted, a host never runs on the example inputs, or its
            shape cannot be known without them.
    """
    modules = modules_by_path(model)
    matched = match(model, config.targets, config.exclude)
    targets = {resolve_host(path, modules, at_input=placement.at == "input"): path for path in reversed(matched)}
    hosts = list(reversed(targets))
    layers = {path: _layer(path, modules) for path in hosts}
    hosts = _in_layers(hosts, layers, config.layers)
    arguments = {path: _argument(modules[path], config.input) for path in hosts}
    firsts = [resolve_host(path, modules, at_input=True) for path in targets.values()] if placement.reads == "input" else []
    seen = _trace(model, list(dict.fromkeys(hosts + firsts)), config, arguments, example_inputs)
    sites = []
    for path in hosts:
        shape = _shape(path, modules[path], config, placement, seen.get(path))
        residual: str | None
        if placement.reads == "input":  # of the target: a Sequential's is its first layer's
            reads_from = resolve_host(targets[path], modules, at_input=True)
            residual, input_width = reads_from, _input_width(reads_from, modules[reads_from], shape, seen)
        else:
            residual, input_width = _residual(path, placement.residual, model, modules), shape.width
        _check_rows(path, modules, config)
        sites.append(
            SiteSpec(
                path=path,
                host=host_type(modules[path]),
                at=placement.at,
                reads="residual" if placement.reads == "input" else placement.reads,
                width=shape.width,
                input_width=input_width,
                axis=shape.axis,
                layer=layers[path],
                output=_as_path(config.output),
                input=arguments[path],
                residual=residual,
            )
        )
    return sites


def _layer(path: str, modules: dict[str, nn.Module]) -> tuple[int, int] | None:
    """(index, count) of the outermost repeated block that holds the module: in an nn.ModuleList, else a Sequential."""
    parts = path.split(".")
    for kind in (nn.ModuleList, nn.Sequential):
        for n in range(len(parts)):
            parent = modules[".".join(parts[:n])]
            if isinstance(parent, kind):
                return list(parent._modules).index(parts[n]), len(parent._modules)
    return None


def _in_layers(hosts: list[str], layers: dict[str, tuple[int, int] | None], wanted: Sequence[int] | None) -> list[str]:
    """The hosts that lie in the wanted layers."""
    if wanted is None:
        return hosts
    spellings = {path: {layer[0], layer[0] - layer[1]} if layer else set() for path, layer in layers.items()}
    missing = [index for index in wanted if not any(index in both for both in spellings.values())]
    if missing:
        there = sorted({layer[0] for layer in layers.values() if layer})
        raise TargetError(
            f"layers={list(wanted)}: none of the {len(hosts)} modules that match lies in {missing}; "
            + (f"they lie in layers {there}" if there else "none of them lies in a repeated block")
        )
    return [path for path in hosts if spellings[path] & set(wanted)]


class _Seen(NamedTuple):
    """Shapes of the tensor that a host returned and of the one that it took; None where there was none."""

    output: tuple[int, ...] | None
    input: tuple[int, ...] | None


def _trace(
    model: nn.Module,
    hosts: list[str],
    config: AdapterConfig,
    arguments: dict[str, tuple[int | None, str | None] | None],
    example_inputs: ExampleInputs | None,
) -> dict[str, _Seen]:
    """What each host took and returned on the example inputs; empty without them."""
    if example_inputs is None:
        return {}

    def look(path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> _Seen:
        call, argument = (args, kwargs), arguments.get(path)
        try:
            taken = values.argument_path(call, argument) if argument else values.find(call)
            returned = _as_path(config.output) or values.find(output)
            return _Seen(_shape_at(output, returned), _shape_at(call, taken))
        except LookupError as error:
            raise TargetError(f"{path!r} has no tensor {error} where `output=` or `input=` say") from error

    calls = observe(model, example_inputs, hosts, look)
    never = [path for path, seen in calls.items() if not seen]
    if never:
        raise TargetError(
            f"{never} never ran on the example inputs (skipped, or their weights are read around them), so an adapter "
            "there would do nothing. Exclude them, or target the module around them."
        )
    return {path: seen[0] for path, seen in calls.items()}


def _shape_at(value: Any, path: values.Path | None) -> tuple[int, ...] | None:
    tensor = None if path is None else values.get(value, path)
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else None


def _shape(path: str, host: nn.Module, config: AdapterConfig, placement: Placement, seen: _Seen | None) -> HostShape:
    """Width and axis of a site, from the trace if there is one, else from the host's type."""
    known = known_shape(host)
    if placement.reads == "norm":
        _check_norm(path, host)
    if seen is not None:
        return _seen_shape(path, host, known, config, placement, seen)
    if known is None:
        raise TargetError(
            f"the width of {path!r} ({type(host).__name__}) cannot be told from its type; "
            "wrap the model with example inputs: ak.wrap(model, example_inputs=batch)"
        )
    width = known.width if placement.at == "output" else known.input_width
    if not width:
        raise TargetError(
            f"{path!r} ({type(host).__name__}) takes no features that an adapter could change (or, if it is lazy, not yet: "
            "run the model once); adapt its output, or the module after it"
        )
    return HostShape(width, None, known.axis if config.channel_axis is None else config.channel_axis)


def _seen_shape(
    path: str, host: nn.Module, known: HostShape | None, config: AdapterConfig, placement: Placement, seen: _Seen
) -> HostShape:
    """`_shape`, from what the host took and returned."""
    here = seen.output if placement.at == "output" else seen.input
    if here is None:
        raise TargetError(f"{path!r} ({type(host).__name__}) has no floating-point tensor at its {placement.at}")
    axis = config.channel_axis
    if axis is None and known is not None and -len(here) <= known.axis < len(here):
        width = known.width if placement.at == "output" else known.input_width
        axis = known.axis if here[known.axis] == width else None
    if axis is None:
        axis = channel_axis(host, here)
    if axis is None:
        raise TargetError(
            f"cannot tell which axis of {path!r} ({type(host).__name__}, shape {here}) holds the features; "
            "set channel_axis=1 (images, signals) or channel_axis=-1 (tokens)"
        )
    if not -len(here) <= axis < len(here):
        raise TargetError(f"{path!r} has a tensor of shape {here}, which has no axis {axis}; set channel_axis")
    return HostShape(here[axis], None, axis)


def _input_width(path: str, module: nn.Module, site: HostShape, seen: dict[str, _Seen]) -> int:
    """Width of what a module takes, on the site's axis, from the trace or its type."""
    known = known_shape(module)
    taken = seen[path].input if path in seen else None
    if taken is not None and -len(taken) <= site.axis < len(taken):
        return taken[site.axis]
    if path not in seen and known is not None and known.input_width:
        return known.input_width
    raise TargetError(
        f"the input width of {path!r} ({type(module).__name__}) cannot be told; an adapter beside it needs a "
        "floating-point input, and, where the type does not tell its width, ak.wrap(model, example_inputs=batch)"
    )


def _check_rows(path: str, modules: dict[str, nn.Module], config: AdapterConfig) -> None:
    """Raise TargetError where a row-wise setting would take the first axis for rows, and the host says that it is not."""
    by_row = getattr(config, "gating", False) or getattr(config, "stochastic_depth", 0)
    around = [modules[outer] for outer in ancestors(path)]
    first = [getattr(getattr(module, "self_attn", module), "batch_first", True) for module in around]
    if by_row and getattr(config, "batch_axis", None) is None and False in first:
        raise TargetError(
            f"{path!r} lies in a module whose batch is on axis 1 (batch_first=False); gating and stochastic_depth need to "
            "know: set batch_axis=1"
        )


def _check_norm(path: str, host: nn.Module) -> None:
    has_statistics = isinstance(host, nn.modules.batchnorm._NormBase)
    if has_statistics or is_more_than_a_norm(host):
        raise TargetError(
            f"at='renormalised' needs a norm without running statistics (such as nn.LayerNorm); {path!r} is "
            f"{type(host).__name__}"
        )


def _residual(path: str, pattern: str | None, model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    """The module that the pattern names nearest to the host."""
    if pattern is None:
        return None
    near = nearest_to(path, match(model, [pattern]))
    if len(near) != 1:
        raise TargetError(f"residual={pattern!r} names {near} for the site {path!r}; make it name one near that site")
    return resolve_host(near[0], modules, at_input=True)


def _argument(host: nn.Module, which: int | str | None) -> tuple[int | None, str | None] | None:
    """An argument of the host by position and keyword both, as far as its signature tells."""
    if which is None:
        return None
    try:
        names = list(inspect.signature(host.forward).parameters)
    except ValueError:
        names = []
    if isinstance(which, int):
        return which, names[which] if which < len(names) else None
    return names.index(which) if which in names else None, which


def _as_path(output: int | str | Sequence[int | str] | None) -> values.Path | None:
    if output is None:
        return None
    return (output,) if isinstance(output, (int, str)) else tuple(output)
