"""The adapters that a saved fusion weighs: it refers to them by what they hold, whatever they are called."""

from pathlib import Path

from torch import nn

from ..composition.nodes import Fuse, expanded, from_json, names_in
from ..errors import AdapterKitError, CompatibilityError, StoreError
from ..runtime.lookup import adapter_names, fusions_of
from .manifest import ChildRecord, Manifest
from .tensors import digest_of

__all__ = ["children_of", "fuse_from"]


def children_of(model: nn.Module, name: str) -> tuple[ChildRecord, ...]:
    """The adapters that a fusion of this name weighs; none for an adapter."""
    fuse = fusions_of(model).get(name)
    names = [child for child in dict.fromkeys(names_in(fuse)) if child != name]
    return tuple(ChildRecord(name=child, digest=digest_of(model, child)) for child in names)


def fuse_from(model: nn.Module, manifest: Manifest, name: str, *, any_base: bool, source: Path) -> Fuse:
    """What a saved fusion weighs, by the names that its adapters have in this model.

    Raises:
        CompatibilityError: the model has no adapter with the tensors of one of them; with `any_base`, of its name.
        StoreError: the manifest names no such adapters.
    """
    there = [other for other in adapter_names(model) if other not in fusions_of(model)]
    digests = {other: digest_of(model, other) for other in there}
    names: dict[str, str] = {}
    missing = []
    for child in manifest.children:
        same = sorted((other for other in there if digests[other] == child.digest), key=lambda other: other != child.name)
        if same or (any_base and child.name in there):
            names[child.name] = same[0] if same else child.name
        else:
            held = ", whose adapter of this name holds other tensors" if child.name in there else ""
            missing.append(f"{child.name!r} (digest {child.digest[:12]}…){held}")
    if missing:
        raise CompatibilityError(
            f"the fusion in {str(source)!r} weighs {', '.join(missing)}, which this {type(model).__name__} does not have; "
            "load these adapters first, under any name (any_base=True takes those of the same names as they are)"
        )
    try:
        children = [expanded(from_json(child), names) for child in manifest.config.get("children", ())]
        fuse = Fuse(*children, name=name)  # type: ignore[arg-type]  # no None: from_json of a child, checked there
        fuse = Fuse(*fuse.children) if Fuse(*fuse.children).fusion == name else fuse
    except AdapterKitError as error:
        raise StoreError(f"the manifest in {str(source)!r} describes no fusion: {error}") from error
    unknown = {*names_in(fuse)} - {*names.values(), name}
    if unknown:
        raise StoreError(f"the manifest in {str(source)!r} weighs {sorted(unknown)}, and does not say what they hold")
    return fuse
