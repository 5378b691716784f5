"""The adapters that a saved fusion weighs: it refers to them by what they hold, whatever they are called."""

from collections.abc import Sequence

from torch import nn

from ..composition.nodes import Fuse, expanded, from_json, names_in
from ..config.fusion import FusionConfig
from ..errors import AdapterKitError, CompatibilityError, StoreError
from ..runtime.lookup import adapter_names, fusions_of
from .manifest import ChildRecord
from .saved_adapter import SavedAdapter
from .tensors import digest_of

__all__ = ["children_of", "fuse_from"]


def children_of(model: nn.Module, name: str) -> tuple[ChildRecord, ...]:
    """Return the adapters that a fusion of this name weighs, each with the digest of its tensors; none for an adapter."""
    fuse = fusions_of(model).get(name)
    # `names_in` counts the fusion itself, and an adapter as often as it stands there.
    names = [child for child in dict.fromkeys(names_in(fuse)) if child != name]
    return tuple(ChildRecord(name=child, digest=digest_of(model, child)) for child in names)


def fuse_from(model: nn.Module, saved: SavedAdapter, config: FusionConfig, name: str, *, any_base: bool) -> Fuse:
    """Return what a saved fusion weighs, by the names that its adapters have in this model.

    Args:
        model: The model, which holds the adapters already.
        saved: The fusion.
        config: Its config.
        name: What the fusion is to be called.
        any_base: Take an adapter of the right name that holds other tensors, where none holds the right ones.

    Raises:
        CompatibilityError: the model has no adapter with the tensors of one of them; with `any_base`, of its name.
        StoreError: the file does not say what its adapters hold, or describes no Fuse.
    """
    names = _names_here(model, saved, any_base=any_base)
    source = str(saved.source)
    try:
        children = [expanded(from_json(child), names) for child in config.children]
        fuse = Fuse(*children, name=name)  # type: ignore[arg-type]  # no None: from_json of a child, checked there
        # A fusion that is called as its children say has no name of its own.
        fuse = Fuse(*fuse.children) if Fuse(*fuse.children).fusion == name else fuse
    except AdapterKitError as error:
        raise StoreError(f"the manifest in {source!r} describes no fusion: {error}") from error
    unknown = {*names_in(fuse)} - {*names.values(), name}
    if unknown:
        raise StoreError(f"the manifest in {source!r} weighs {sorted(unknown)}, and does not say what they hold")
    return fuse


def _names_here(model: nn.Module, saved: SavedAdapter, *, any_base: bool) -> dict[str, str]:
    """Map what each adapter of a saved fusion was called to what it is called in this model."""
    fusions = fusions_of(model)
    # A fusion weighs no fusions, so these need no digest.
    digests = {other: digest_of(model, other) for other in adapter_names(model) if other not in fusions}
    names: dict[str, str] = {}
    missing = []
    for child in saved.children:
        same = [other for other, digest in digests.items() if digest == child.digest]
        if same:
            # Several may hold the same tensors (one adapter loaded twice): then the one of the saved name.
            names[child.name] = child.name if child.name in same else same[0]
        elif any_base and child.name in digests:
            names[child.name] = child.name
        else:
            held = ", whose adapter of this name holds other tensors" if child.name in digests else ""
            missing.append(f"{child.name!r} (digest {child.digest[:12]}…){held}")
    if missing:
        raise _missing(model, saved, missing)
    return names


def _missing(model: nn.Module, saved: SavedAdapter, adapters: Sequence[str]) -> CompatibilityError:
    """Return the error for adapters that a fusion weighs and the model does not have."""
    return CompatibilityError(
        f"the fusion in {str(saved.source)!r} weighs {', '.join(adapters)}, which this {type(model).__name__} does not "
        "have; load these adapters first, under any name (any_base=True takes those of the same names as they are)"
    )
