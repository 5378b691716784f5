"""Find the part of a model, or the larger model, that a saved adapter would fit, to say so where it does not fit."""

from collections.abc import Sequence

from torch import nn

from ..structure.paths import modules_by_path
from .identity import has_structure
from .saved_adapter import SavedSite

__all__ = ["advice"]


def advice(model: nn.Module, sites: Sequence[SavedSite], *, has_output_heads: bool) -> str:
    """Say where the sites of an adapter that does not fit this model would fit; "" if nowhere that can be told.

    Args:
        model: The model.
        sites: The adapter's sites.
        has_output_heads: It owns heads on its model's output, which the rest of a larger model could not go on with.
    """
    # Without structures, any submodule with the right names would seem to fit.
    if not sites or any(site.structure is None for site in sites):
        return ""
    part = _fitting_part(model, sites)
    if part is not None:
        return f". It fits the submodule {part!r} of this model: load it with ak.wrap({_as_code('model', part)})" + (
            ".load(…, heads=False): with its head, the submodule would return what the rest of the model cannot take"
            if has_output_heads
            else ""
        )
    place = _place_in_whole(model, sites)
    if place is not None:
        return (
            f". It fits a model that holds this one as {place!r}: load it there. Saved from there with "
            f"ak.wrap({_as_code('whole', place)}).save(…), it fits this one"
        )
    return ""


def _fitting_part(model: nn.Module, sites: Sequence[SavedSite]) -> str | None:
    """Return the path of the first submodule that has all of the sites, or None."""
    first = sites[0].spec.path
    modules = modules_by_path(model)
    # The first site sorts most submodules out, before `_has_all` computes hashes for each site.
    parts = [path for path in modules if path and (f"{path}.{first}" if first else path) in modules]
    return next((part for part in parts if _has_all(modules[part], sites)), None)


def _place_in_whole(model: nn.Module, sites: Sequence[SavedSite]) -> str | None:
    """Return the path that this model would have in one that has all of the sites, or None."""
    # e.g. a site at "bert.encoder.layer.0" may be this model's "encoder.layer.0" (then it is "bert" in the whole).
    names = sites[0].spec.path.split(".")
    prefixes = (".".join(names[:count]) for count in range(1, len(names)))
    return next((prefix for prefix in prefixes if _has_all(model, sites, prefix=f"{prefix}.")), None)


def _has_all(module: nn.Module, sites: Sequence[SavedSite], *, prefix: str = "") -> bool:
    """Tell whether a module has all of the sites, of the same structure, where `prefix` begins each of their paths."""
    paths = modules_by_path(module)
    for site in sites:
        saved = site.spec.path
        path = saved.removeprefix(prefix)
        # The hash holds the path under which it was saved, so that path goes into the one computed here.
        if not saved.startswith(prefix) or path not in paths or site.structure is None:
            return False
        if not has_structure(module, path, site.structure, named=saved):
            return False
    return True


def _as_code(model: str, path: str) -> str:
    """Write the way to a submodule: "model.bert", or "model.get_submodule('layers.0')"."""
    is_plain = all(name.isidentifier() for name in path.split("."))
    return f"{model}.{path}" if is_plain else f"{model}.get_submodule({path!r})"
