"""What the targets of a method that changes weights name: modules that apply a weight, and Parameters of any module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from ..config.settings import Predicate
from ..errors import TargetError
from ..structure.anatomy.description import Anatomy, FusedProjection
from ..structure.anatomy.discover import Discovery
from ..structure.anatomy.roles import LINEAR, role_products
from .computed_weights import no_parameter
from .counting import Counting
from .hints import nothing_matches
from .match import first_names, named_by
from .patterns import is_role, matching
from .projections import projection_of
from .rule import Placement

__all__ = ["Scope", "Wanted", "fused_at", "own_parameters", "wanted_by"]


@dataclass
class Wanted:
    """What targets name, whole or in part.

    Attributes:
        modules: Map the path of each module → which of its projections are meant: "q", "k", "v", or "" for all of it.
        parameters: Map the name of each Parameter → the same.
    """

    modules: dict[str, set[str]] = field(default_factory=dict)
    parameters: dict[str, set[str]] = field(default_factory=dict)

    def add_parameter(self, name: str, letter: str) -> None:
        """Name a Parameter, or its rows for the query ("q"), the key or the value."""
        self.parameters.setdefault(name, set()).add(letter)

    def add_module(self, path: str, module: nn.Module, letter: str) -> None:
        """Name a module. Where no hook sees its product, its Parameters are named in its place."""
        if isinstance(module, nn.MultiheadAttention):
            # It multiplies by these itself, that of its layer `out_proj` among them, which is never called.
            # With keys or values of other widths (`kdim`, `vdim`) there is no `in_proj_weight`, but one weight for each.
            inner = ["in_proj_weight"] if module.in_proj_weight is not None else [f"{p}_proj_weight" for p in "qkv"]
            for name in (*inner, "out_proj.weight"):
                self.add_parameter(f"{path}.{name}".lstrip("."), "")
        # That `out_proj`, where it is targeted by itself.
        elif isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            self.add_parameter(f"{path}.weight", "")
        else:
            self.modules.setdefault(path, set()).add(letter)


@dataclass(frozen=True)
class Scope:
    """What there is for the targets of one placement to name.

    Attributes:
        modules: Map path → module, under each of a module's names.
        discovery: Finds what has a role.
        counting: Tells which layer a module lies in.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    placement: Placement
    discovery: Discovery
    counting: Counting

    @cached_property
    def owners(self) -> dict[str, str]:
        """Map the name of each Parameter → the path of the module that holds it."""
        return {
            f"{path}.{leaf}".lstrip("."): path
            for path, module in self.modules.items()
            for leaf, _ in own_parameters(module)
        }

    @cached_property
    def first_names(self) -> dict[int, str]:
        """Map the `id` of each module → the first of its paths."""
        return first_names(self.modules)

    def parameter(self, name: str) -> nn.Parameter:
        """Return the Parameter of this name."""
        return self.modules[self.owners[name]].get_parameter(name.rpartition(".")[2])

    def accepts(self, name: str) -> bool:
        """Tell whether the method can train a Parameter."""
        return self.placement.accepts(self.modules[self.owners[name]], name.rpartition(".")[2], self.parameter(name))

    def parameters_named(self, target: str | Predicate) -> list[str]:
        """Return the names of the Parameters that a pattern matches. Roles and predicates speak of modules alone."""
        if is_role(target) or not isinstance(target, str):
            return []
        return matching(target, dict.fromkeys(self.owners))


def wanted_by(targets: Sequence[str | Predicate], scope: Scope) -> Wanted:
    """Find what a list of targets names.

    Raises:
        TargetError: a target names nothing that the method can change.
    """
    wanted = Wanted()
    for target in targets:
        paths, names = named_by(target, scope.modules, scope.discovery), scope.parameters_named(target)
        if scope.placement.level == "parameter":
            # A module stands for the Parameters that it holds itself; a Parameter's own name comes before that.
            held = (name for name, path in scope.owners.items() if path in paths)
            paths, names = [], [name for name in names or held if scope.accepts(name)]
        if not paths and not names:
            raise TargetError(_nothing(target, scope))
        for path in paths:
            _add_module(wanted, path, target, scope)
        if not paths:  # modules come before Parameters of the same name
            for name in names:
                wanted.add_parameter(name, "")
    return wanted


def _add_module(wanted: Wanted, path: str, target: str | Predicate, scope: Scope) -> None:
    """Name a module that a target matches or, where a role's product is made inside it, the Parameters of that product."""
    module, letter = scope.modules[path], _letter(target)
    projection = projection_of(module)
    if target == LINEAR and projection is not None and projection.kind != "linear":
        return
    # A layer that projects is adapted beside itself; a role's other modules may project inside by a Parameter.
    inside = [] if projection or not is_role(target) else _weights_inside(path, target, letter, scope.discovery.anatomy)
    for name in inside:
        wanted.add_parameter(name, letter)
    if not inside and target != LINEAR:
        wanted.add_module(scope.first_names[id(module)], module, letter)
    if target == LINEAR and projection:
        wanted.add_module(scope.first_names[id(module)], module, "")


def _letter(target: str | Predicate) -> str:
    """Return "q", "k" or "v" for a role such as "@attention.q", else ""."""
    return target[-1] if is_role(target) and target.endswith((".q", ".k", ".v")) else ""


def _weights_inside(path: str, role: str, letter: str, anatomy: Anatomy) -> list[str]:
    """List the Parameters that a module makes what a role speaks of with, without a layer of their own.

    One whose slices cannot be told apart is listed, too: the error that says why comes where its slices are needed.

    Args:
        letter: Of a role such as "@attention.q", what it makes.
    """
    if not letter:
        return [product.weight for product in role_products(role, anatomy) if product.path == path and product.weight]
    fused = [f for f in fused_at(path, anatomy) if f.weight and (f.problem or letter in dict(f.slices))]
    return list(dict.fromkeys(f"{path}.{f.weight}".lstrip(".") for f in fused))


def fused_at(path: str, anatomy: Anatomy) -> list[FusedProjection]:
    """List the fused projections of a module."""
    return [fused for s in (*anatomy.sublayers, *anatomy.others) for fused in s.fused if fused.path == path]


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's own Parameters with their names in it."""
    return ((leaf, p) for leaf, p in module._parameters.items() if p is not None)


def _nothing(target: str | Predicate, scope: Scope) -> str:
    """Write the message for a target without a match."""
    if isinstance(target, str) and not is_role(target):
        computed = no_parameter(scope.modules)
        names = matching(target, computed)
        if names:
            return computed[names[0]]
    if scope.placement.level == "parameter" and not is_role(target):
        return _none_of_kind(target, scope)
    fits = [path for path, module in scope.modules.items() if projection_of(module)][:3]
    setting = "targets=" if scope.placement.targets is None else ""
    return nothing_matches(
        target,
        scope.model,
        scope.modules,
        parameters=list(scope.owners),
        such_as=f"{setting}{fits}" if fits else "",
        discovery=scope.discovery,
    )


def _none_of_kind(target: str | Predicate, scope: Scope) -> str:
    """Write the message for a target that names no Parameter of the kind that the method trains (biases, say)."""
    accepted = [name for name in scope.owners if scope.accepts(name)]
    kind = scope.placement.accepts.__name__.removeprefix("is_").replace("_", " ")  # `is_bias` accepts a "bias"
    return (
        f"{target!r} names no {kind} of {type(scope.model).__name__}, which has {len(scope.owners)} Parameters and "
        f"{len(accepted)} of that kind{f', such as {accepted[:4]}' if accepted else ''}; name others, or choose another "
        "method"
    )
