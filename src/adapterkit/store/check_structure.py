"""Check that a model has the modules that a saved adapter was trained around, of the same types and shapes."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import CompatibilityError, TargetError
from ..placement.spec import SiteSpec
from ..structure.base_tensors import parameter_at
from ..structure.hosts import known_shape, resolve_host
from ..structure.paths import ancestors, modules_by_path
from .fitting_part import advice
from .identity import has_structure, shapes_around
from .saved_adapter import SavedAdapter, SavedHead

__all__ = ["check_structure"]

_SHOWN = 5
_SHOWN_SHAPES = 3


def check_structure(model: nn.Module, saved: SavedAdapter) -> None:
    """Raise CompatibilityError, naming the sites and heads that differ, unless the model has all that the adapter needs.

    What the format does not know is not compared.
    """
    sites = saved.sites or ()
    differing = [text for site in sites for text in _site_differences(model, site.spec, site.structure)]
    differing += [text for head in saved.heads for text in _head_differences(model, head)]
    if differing:
        has_output_heads = any(head.above is not None for head in saved.heads)
        where = advice(model, sites, has_output_heads=has_output_heads)
        shown = "; ".join(differing[:_SHOWN]) + (f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else "")
        raise CompatibilityError(
            f"the adapter in {str(saved.source)!r} was trained on {saved.base_name!r} and does not fit this "
            f"{type(model).__name__}: {len(differing)} of its sites and heads differ: {shown}{where}"
        )


def _site_differences(model: nn.Module, spec: SiteSpec, structure: str | None) -> Iterator[str]:
    """Yield what is wrong with the host of a site, if anything is."""
    modules = modules_by_path(model)
    # Without a residual the host stands in for it, so that the set holds it alone.
    if not {spec.path, spec.residual or spec.path} <= modules.keys():
        yield f"{spec.path!r} ({spec.host}) does not exist"
    elif structure is not None and not has_structure(model, spec.path, structure):
        yield _other_shape(model, spec.path, _site_text(spec), _host_text(spec, modules[spec.path]))


def _head_differences(model: nn.Module, head: SavedHead) -> Iterator[str]:
    """Yield what is wrong with the host of a head, if anything is."""
    modules = modules_by_path(model)
    if head.path not in modules:
        yield f"{head.path!r} ({head.host}) does not exist"
    elif head.above is not None:
        yield from (f"the head on the output of {head.path!r} {why}" for why in _output_differences(model, head))
    elif head.structure is not None and not has_structure(model, head.path, head.structure):
        yield _other_shape(model, head.path, head.host, type(modules[head.path]).__name__)


def _other_shape(model: nn.Module, path: str, saved: str, here: str) -> str:
    """Say that a host has another type or shape; where the two texts are the same, with its parameters here."""
    if saved == here:
        # The file holds a hash over the shapes, not the shapes: those of this model are all that can be shown.
        shapes = shapes_around(model, path)
        more = ", …" if len(shapes) > _SHOWN_SHAPES else ""
        here += f", with the parameters {', '.join(shapes[:_SHOWN_SHAPES])}{more}"
    return f"{path!r} has another type or shape (saved: {saved}, here: {here})"


def _site_text(spec: SiteSpec) -> str:
    """Say what a saved site's host was: "LayerNorm of 32 features"."""
    if spec.at == "weight":
        return f"{spec.host} with {' / '.join(spec.parameters[:1])!r} of {spec.width} x {spec.input_width}"
    return f"{spec.host}{_features(spec, spec.width, spec.input_width)}"


def _host_text(spec: SiteSpec, host: nn.Module) -> str:
    """Say the same of a module of this model, as far as its type tells."""
    name = type(host).__name__
    if spec.at == "weight":
        held = parameter_at(host, spec.parameters[0]) if spec.parameters else None
        return name if held is None else f"{name} with {spec.parameters[0]!r} of {held.shape[0]} x {held.shape[-1]}"
    known = known_shape(host)
    if known is None:
        return name
    return f"{name}{_features(spec, known.input_width if spec.at == 'input' else known.width, known.input_width)}"


def _features(spec: SiteSpec, width: int | None, input_width: int | None) -> str:
    """Say how many features a host has at a site: " of 32 features", or " of 16 -> 8 features" of a projection."""
    if width is None:
        return ""
    is_projection = spec.reads == "own_input" and input_width is not None
    return f" of {input_width} -> {width} features" if is_projection else f" of {width} features"


def _output_differences(model: nn.Module, head: SavedHead) -> Iterator[str]:
    """Yield what is wrong with the place of a head on the output, if anything is."""
    if not _is_last(model, head):
        yield "is not behind the last layer of this one"
        return
    known = known_shape(model.get_submodule(head.path))
    reads_all = (head.config or {}).get("output") is None  # else one of several outputs, which the type does not tell
    if known is not None and known.axis == -1 and reads_all and known.width != head.width:
        yield f"reads {head.width} features, and this one returns {known.width}"
    if head.embedding is not None:
        path = ".".join(filter(None, [ancestors(head.path)[head.above or 0], head.embedding]))
        # `above` counts the modules around the host up to the model of this head, from which the embedding's path is given.
        weight: Any = getattr(modules_by_path(model).get(path), "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        if shape != (head.vocabulary, head.width):
            yield f"reads the weight of {path!r}, {(head.vocabulary, head.width)}, which is {shape or 'not there'} here"


def _is_last(model: nn.Module, head: SavedHead) -> bool:
    """Tell whether a head's host yields what the model, or the part of it that the head is on, returns."""
    around: Sequence[str] = ancestors(head.path)
    above = head.above or 0
    try:
        # `ancestors` begins with the host itself: above=1 is the module around it.
        return above < len(around) and resolve_host(around[above], modules_by_path(model), at_input=False) == head.path
    except TargetError:  # that part is never called: nothing yields its output
        return False
