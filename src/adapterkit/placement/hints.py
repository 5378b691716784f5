"""What to say of a target that matches nothing: what this model calls it, or which names come nearest."""

import difflib
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..config.settings import Predicate
from ..errors import CompatibilityError
from ..structure.anatomy.description import Sublayer
from ..structure.anatomy.discover import Discovery
from .patterns import is_role, matching

__all__ = ["nothing_matches"]

# What families of models call the projections of their attentions and feed-forwards. Who has learnt the names of one
# family asks another one for them, which is told what it calls the same thing.
_ATTENTION = """
    q_proj k_proj v_proj o_proj qkv_proj query key value query_proj key_proj value_proj q_lin k_lin v_lin out_lin
    query_key_value c_attn c_proj Wqkv qkv wq wk wv wo Wq Wk Wv Wo to_q to_k to_v to_out in_proj out_proj q k v o dense
"""
_FEEDFORWARD = """
    fc1 fc2 up_proj down_proj gate_proj gate_up_proj c_fc c_proj lin1 lin2 linear1 linear2 wi wi_0 wi_1 wo w1 w2 w3
    dense_h_to_4h dense_4h_to_h intermediate output dense mlp ffn fc_in fc_out
"""
_FAMILY_NAMES = {"attention": frozenset(_ATTENTION.split()), "feedforward": frozenset(_FEEDFORWARD.split())}
_IN_WORDS = {"attention": "attention", "feedforward": "feed-forward"}
# The projections of each kind of sub-layer, by what follows the dot in their role.
_PROJECTIONS: dict[str, dict[str, Callable[[Sublayer], Sequence[str]]]] = {
    "attention": {"q": lambda s: s.query, "k": lambda s: s.key, "v": lambda s: s.value, "last": lambda s: s.last},
    "feedforward": {"first": lambda s: s.first, "last": lambda s: s.last},
}
_MOST_NAMES = 3  # of one role; beyond that the role itself is the better name
_LOOK = "kit.tree() shows what there is."


def nothing_matches(
    target: str | Predicate,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    *,
    parameters: Sequence[str] = (),
    such_as: str = "",
    discovery: Discovery | None = None,
) -> str:
    """Write the message for a target without a match, with what to write instead.

    Args:
        modules: The modules that there are, by path.
        parameters: The names of Parameters, where those can be targets as well.
        such_as: What could stand for a role in a model that does not have it.
        discovery: Traces the model, to tell what it calls a projection that other families have another name for.
    """
    name = type(model).__name__
    if is_role(target):
        example = f", e.g. {such_as}" if such_as else ""
        return (
            f"{target!r}: tracing {name} finds no such place; `kit.tree()` shows what there is. In what is no transformer, "
            f"name modules{example}"
        )
    if not isinstance(target, str):
        return f"the predicate {getattr(target, '__name__', target)!r} is true for no module of {name}. {_LOOK}"
    there = " and ".join([_count(modules, "module"), *([_count(parameters, "Parameter")] if parameters else [])])
    instead = _every_linear(target) or _called_here(target, modules, discovery)
    return f"{target!r} matches no module of {name}, which has {there}. {instead or _nearest(target, modules, parameters)}"


def _nearest(target: str, modules: Mapping[str, nn.Module], parameters: Sequence[str]) -> str:
    """Name the suffixes of paths, of one to three components, that are spelt most like the target."""
    # A whole path is too long to come near a short target: its last components are compared. (A dict keeps their order.)
    tails = {".".join(path.split(".")[-n:]): None for path in (*modules, *parameters) if path for n in (1, 2, 3)}
    near = difflib.get_close_matches(target, list(tails), n=3, cutoff=0.4)
    return (f"Nearest: {', '.join(map(repr, near))}. " if near else "") + _LOOK


def _every_linear(target: str) -> str:
    """Tell who writes "all_linear" what names every linear layer of the blocks."""
    is_meant = target.lower().replace("_", "-") == "all-linear"
    return "Every linear layer of the blocks is named by the role '@linear', which may be written 'all-linear'" * is_meant


def _called_here(target: str, modules: Mapping[str, nn.Module], discovery: Discovery | None) -> str:
    """Tell what this model calls the projections that another family has this name for; "" if there is nothing to tell."""
    asked = target.rpartition(".")[2].strip("*")  # "layers.*.self_attn.q_proj" asks for "q_proj"
    kinds = [kind for kind, names in _FAMILY_NAMES.items() if asked in names]
    if not kinds or discovery is None:
        return ""
    try:
        anatomy = discovery.anatomy
    except CompatibilityError:  # it does not run on made-up inputs: the nearest names have to do
        return ""
    told = []
    for kind in kinds:
        names = _names_with_roles([s for s in anatomy.sublayers if s.kind == kind], kind, modules)
        if names:
            told.append(f"Its {_IN_WORDS[kind]} projections are {', '.join(names)}.")
    return " ".join([*told, _LOOK]) if told else ""


def _names_with_roles(sublayers: Sequence[Sublayer], kind: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """List the names of projections, each with the roles that it has: "'query' (role '@attention.q')"."""
    roles_of: dict[str, list[str]] = {}
    for letter, paths_of in _PROJECTIONS[kind].items():
        names = _short_names([path for sublayer in sublayers for path in paths_of(sublayer)], modules)
        # One example where there are many names: the role beside it stands for all of them.
        for name in names if len(names) <= _MOST_NAMES else names[:1]:
            roles_of.setdefault(name, []).append(f"'@{kind}.{letter}'")
    return [f"{name!r} (role{'s' * (len(roles) > 1)} {', '.join(roles)})" for name, roles in roles_of.items()]


def _short_names(paths: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Write paths as the shortest patterns that match none but these: "query", "layer.*.output.dense"."""
    names: list[str] = []
    covered: set[str] = set()
    for path in paths:
        if path in covered:
            continue
        # "layer.0.output.dense" -> "layer.*.output.dense": one pattern for all blocks.
        components = ["*" if component.isdecimal() else component for component in path.split(".")]
        shortest = (".".join(components[-n:]) for n in range(1, len(components) + 1))
        name = next((suffix for suffix in shortest if {*matching(suffix, modules)} <= {*paths}), path)
        names.append(name)
        covered |= {path, *matching(name, modules)}
    return names


def _count(names: Mapping[str, object] | Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"
