"""Load an adapter from a directory: check everything first, then attach."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from ..composition.nodes import Fuse, to_json
from ..config.fusion import FusionConfig
from ..config.union import Config, members
from ..errors import AdapterKitError, CompatibilityError, ConfigError, StoreError, TargetError
from ..heads.config import CustomHead, OwnHead, head_from
from ..heads.find import FoundHead
from ..heads.spec import HeadSpec
from ..lifecycle.add import seen_layouts
from ..lifecycle.admit import AdapterDraft, admit, modules_for
from ..lifecycle.attach import check_free
from ..lifecycle.build import BuiltModule, device_near
from ..lifecycle.fusion import fusion_sites
from ..methods import check_methods_of, method_of
from ..methods.spellings import config_from
from ..placement.spec import SiteSpec
from ..runtime.originals import fingerprint
from ..structure.hosts import known_shape, resolve_host
from ..structure.paths import ancestors, modules_by_path
from ..structure.tracing.forward import ExampleInputs, outside_inference_mode
from .check_sites import check_places
from .files import read_manifest_bytes, read_tensors_bytes
from .fused_adapters import fuse_from
from .identity import structure_of
from .manifest import HeadRecord, HostRecord, Manifest, SiteRecord, parse_manifest
from .tensors import dtype_name, tensor_key

__all__ = ["BaseMismatchWarning", "load_adapter", "read_manifest"]

# A safetensors file is its tensors and a header: this much for each tensor is plenty.
_HEADER_BYTES_PER_TENSOR = 2**14


class BaseMismatchWarning(UserWarning):
    """The adapter was trained on other weights than the model has."""


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a saved adapter. Raises StoreError."""
    return parse_manifest(read_manifest_bytes(Path(directory)), str(directory))


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str | None = None,
    heads: bool | Mapping[str, nn.Module] = True,
    any_base: bool = False,
    example_inputs: ExampleInputs | None = None,
) -> str:
    """Attach a saved adapter, without activating it, and return its name. The model is touched last, or not at all.

    Args:
        name: Another name than it was saved under.
        heads: Bring its heads as well; as a mapping, with these modules, by the heads' names, for those that a file cannot
            hold: `CustomHead`s, which are filled with the file's tensors.
        any_base: Say nothing if the model's weights are not those it was trained on (its structure must be, always); let
            a fusion weigh adapters of the names that it knows, whatever they hold.
        example_inputs: Inputs to trace the model with, where its structure decides on the sites; else tiny ones are made.

    Raises:
        StoreError: the files are missing, damaged, hostile or too new, or have a head whose module was not given.
        CompatibilityError: the model's structure differs at the adapter's sites, or its config leads to others; or an
            adapter that a fusion weighs is not there. Says which.
        TargetError: its gate, or its stochastic depth, would take another axis for that of the rows.
        AdapterNameError: the name is taken.
    """
    directory = Path(directory)
    manifest, content = _read(directory)
    name = manifest.name if name is None else name
    check_free(model, name)
    _check_methods(manifest, source=directory)
    head_records = manifest.heads if heads is not False else ()
    _check_structure(model, manifest, head_records, source=directory)
    found = _found_heads(model, head_records, heads if isinstance(heads, Mapping) else {}, source=directory)
    fuse = fuse_from(model, manifest, name, any_base=any_base, source=directory) if manifest.children else None
    try:
        draft = _draft(model, manifest, name, fuse, found)
        modules = modules_for(model, draft, meta=True)
    except (AdapterKitError, RuntimeError, OverflowError, MemoryError, TypeError, ValueError) as error:
        raise StoreError(f"the manifest in {str(directory)!r} describes no adapter for this model: {error}") from error
    if not isinstance(draft.config, FusionConfig):
        check_places(model, draft.config, draft.sites, example_inputs, directory)
        draft = replace(draft, layouts=seen_layouts(model, draft.config, draft.sites, example_inputs))
    tensors = _parse_tensors(directory, manifest, content)
    _fill(model, modules, tensors, heads=heads is not False, source=directory)
    if not any_base and fingerprint(model) != manifest.base.fingerprint:
        warnings.warn(
            f"adapter {manifest.name!r} was trained on {manifest.base.hub_id or manifest.base.class_path!r} with other "
            f"weights (or another dtype) than this {type(model).__name__} has: expect other outputs. "
            "Pass any_base=True if that is meant.",
            BaseMismatchWarning,
            stacklevel=3,
        )
    admit(model, draft, modules)
    return name


def _check_methods(manifest: Manifest, *, source: Path) -> None:
    """Raise StoreError, naming the method, if the adapter is of one that is not here. A fusion is of none."""
    if not manifest.children:
        try:
            check_methods_of(manifest.config)
        except ConfigError as error:
            raise StoreError(f"the adapter in {str(source)!r} cannot be loaded: {error}") from error


def _check_structure(model: nn.Module, manifest: Manifest, heads: Sequence[HeadRecord], *, source: Path) -> None:
    """Raise CompatibilityError, naming the sites, unless the model has what the adapter was trained around."""
    modules = modules_by_path(model)
    differing = []
    places: list[HostRecord] = [*manifest.sites, *heads]
    for record in places:
        needs = {record.path, record.residual or record.path} if isinstance(record, SiteRecord) else {record.path}
        if not needs <= modules.keys():
            differing.append(f"{record.path!r} ({record.host}) does not exist")
        elif isinstance(record, HeadRecord) and record.above is not None:
            differing += [f"the head on the output of {record.path!r} {why}" for why in _why_no_output(model, record)]
        elif structure_of(model, record.path) != record.structure:
            found = type(modules[record.path]).__name__
            differing.append(f"{record.path!r} has another type or shape (saved: {record.host}, here: {found})")
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise CompatibilityError(
            f"the adapter in {str(source)!r} was trained on {manifest.base.hub_id or manifest.base.class_path!r} and does "
            f"not fit this {type(model).__name__}: {len(differing)} of its sites and heads differ: {shown}"
        )


def _why_no_output(model: nn.Module, record: HeadRecord) -> Iterator[str]:
    """What is wrong with the place of a head on the output."""
    modules = modules_by_path(model)
    around = ancestors(record.path)
    above = record.above or 0
    try:
        is_last = above < len(around) and resolve_host(around[above], modules, at_input=False) == record.path
    except TargetError:
        is_last = False
    if not is_last:
        yield "is not behind the last layer of this one"
        return
    known = known_shape(modules[record.path])
    if (
        known is not None
        and known.axis == -1
        and (record.config or {}).get("output") is None
        and known.width != record.width
    ):
        yield f"reads {record.width} features, and this one returns {known.width}"
    if record.embedding is not None:
        path = ".".join(filter(None, [around[above], record.embedding]))
        weight: Any = getattr(modules.get(path), "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        if shape != (record.vocabulary, record.width):
            yield f"reads the weight of {path!r}, {(record.vocabulary, record.width)}, which is {shape or 'not there'} here"


def _found_heads(
    model: nn.Module, records: Sequence[HeadRecord], given: Mapping[str, nn.Module], *, source: Path
) -> list[FoundHead]:
    """The heads of a file, with the modules that were given for them.

    Raises:
        StoreError: a head is none, or needs a module that was not given; a module is given for none that needs one.
    """
    found = []
    for record in records:
        try:
            config = OwnHead(record.path, name=record.path) if record.config is None else head_from(record.config)
        except ConfigError as error:
            raise StoreError(f"the adapter in {str(source)!r} has a head that is none: {error}") from error
        in_place = isinstance(config, OwnHead) or (isinstance(config, CustomHead) and config.target is not None)
        if in_place != (record.above is None) or (in_place and getattr(config, "target", None) != record.path):
            raise StoreError(f"the head {config.name!r} in {str(source)!r} contradicts its place, {record.path!r}")
        spec = HeadSpec(config, record.above, record.width, record.takes_mask, record.embedding)
        module = given.get(str(config.name)) if isinstance(config, CustomHead) else None
        found.append(FoundHead(record.path, spec, module, record.vocabulary))
    custom = {str(head.spec.config.name): head for head in found if isinstance(head.spec.config, CustomHead)}
    missing, unknown = sorted(custom.keys() - given.keys()), sorted(given.keys() - custom.keys())
    if missing:
        raise StoreError(
            f"the heads {missing} of the adapter in {str(source)!r} are modules of someone's own, which files do not hold: "
            f"give them, kit.load(…, heads={{{missing[0]!r}: MyModule()}}), or leave all heads out with heads=False"
        )
    if unknown:
        raise StoreError(f"heads={unknown}: the adapter in {str(source)!r} takes modules for {sorted(custom) or 'none'}")
    theirs = {id(p) for p in model.parameters()}
    for name, module in given.items():
        if not isinstance(module, nn.Module) or any(id(p) in theirs for p in module.parameters()):
            raise StoreError(f"heads={{{name!r}: …}} takes a module that the model has not; found {type(module).__name__}")
    return found


def _draft(model: nn.Module, manifest: Manifest, name: str, fuse: Fuse | None, heads: Sequence[FoundHead]) -> AdapterDraft:
    """Return the adapter or fusion of a file as a draft, after checking that its sites, heads and config agree."""
    replaced = [head.path for head in heads if head.is_in_place]
    if len(set(replaced)) < len(replaced):
        raise StoreError(f"it names a head twice: {sorted(replaced)}")
    if fuse is not None:
        config, sites = _fusion_in(model, manifest, fuse)
        return AdapterDraft(name, config, sites, heads)
    return AdapterDraft(name, *_adapter_in(model, manifest), heads)


def _fusion_in(model: nn.Module, manifest: Manifest, fuse: Fuse) -> tuple[FusionConfig, list[SiteSpec]]:
    """Return a fusion's config and sites; its sites follow from those of its adapters, and must be those of the file."""
    config = FusionConfig(**{**manifest.config, "children": tuple(map(to_json, fuse.children))})
    sites = fusion_sites(model, fuse, config)
    here, there = ({(s.path, s.at, s.width, s.input_width) for s in of} for of in (sites, manifest.sites))
    if here != there:
        raise StoreError(f"its adapters are at {sorted(here ^ there)[:3]} in one of file and model, and not in the other")
    return config, sites


def _adapter_in(model: nn.Module, manifest: Manifest) -> tuple[Config, list[SiteSpec]]:
    """Return an adapter's config and sites, after checking that they agree."""
    config, modules = config_from(manifest.config), modules_by_path(model)
    placements = [method_of(member).placements(member) for member in members(config)]
    sites = [SiteSpec(**record.model_dump(exclude={"structure"})) for record in manifest.sites]
    for site in sites:
        if site.member >= len(placements) or not any(placement.allows(site) for placement in placements[site.member]):
            raise StoreError(f"site {site.path!r} says at={site.at!r}, reads={site.reads!r}; its config says otherwise")
        if site.at != "weight" and resolve_host(site.path, modules, at_input=site.at == "input") != site.path:
            raise StoreError(f"site {site.path!r} is a container, which cannot hold an adapter")
    if len({(site.path, site.member, site.tag, site.parameters[:1]) for site in sites}) < len(sites):
        raise StoreError(f"it names a site twice: {sorted(site.path for site in sites)}")
    return config, sites


def _read(directory: Path) -> tuple[Manifest, bytes]:
    """The manifest and the bytes of its tensors file, read anew if someone saved in between."""
    while True:
        text = read_manifest_bytes(directory)
        manifest = parse_manifest(text, str(directory))
        _check_size(directory, manifest)
        try:
            return manifest, read_tensors_bytes(directory, manifest.tensors_sha256, manifest.tensors_size_bytes)
        except StoreError:
            if read_manifest_bytes(directory) == text:
                raise


def _check_size(directory: Path, manifest: Manifest) -> None:
    """Raise StoreError if the tensors file is to be larger than its tensors, or they are of a kind that none has."""
    itemsize = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
    itemsize |= dict.fromkeys(("bool", "uint8", "int8"), 1)
    limit = 2**20 + _HEADER_BYTES_PER_TENSOR * len(manifest.tensors)
    for key, record in manifest.tensors.items():
        if record.dtype not in itemsize:
            raise StoreError(f"tensor {key!r} has dtype {record.dtype!r}; an adapter has {sorted(itemsize)}")
        limit += math.prod(record.shape) * itemsize[record.dtype]
    if manifest.tensors_size_bytes > limit:
        raise StoreError(
            f"{str(directory)!r} declares a tensors file of {manifest.tensors_size_bytes:,} bytes, more than the "
            f"{limit:,} that its tensors need"
        )


@outside_inference_mode()
def _parse_tensors(directory: Path, manifest: Manifest, content: bytes) -> dict[str, Tensor]:
    """The tensors of the file, each as the manifest says."""
    try:
        # Copies: views into the file would keep all of it in memory, and lie at unaligned addresses.
        tensors = {key: tensor.clone() for key, tensor in safetensors.torch.load(content).items()}
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise StoreError(f"the tensors in {str(directory)!r} are not safetensors: {error}") from error
    found = {key: (tuple(t.shape), dtype_name(t)) for key, t in tensors.items()}
    wanted = {key: (record.shape, record.dtype) for key, record in manifest.tensors.items()}
    _check_same(found, wanted, f"the tensors file in {str(directory)!r}", "its manifest")
    return tensors


@outside_inference_mode()
def _fill(model: nn.Module, parts: list[BuiltModule], tensors: dict[str, Tensor], *, heads: bool, source: Path) -> None:
    """Give the empty modules the tensors of the file, on their hosts' devices, after checking that they match."""
    states: list[dict[str, Tensor]] = []
    wanted: dict[str, Any] = {}
    for part in parts:
        keys = {tensor: tensor_key(part.spec, part.path, tensor) for tensor in part.module.state_dict()}
        wanted |= {keys[tensor]: tuple(value.shape) for tensor, value in part.module.state_dict().items()}
        states.append({tensor: tensors[key] for tensor, key in keys.items() if key in tensors})
    taken = {key: t for key, t in tensors.items() if heads or not key.startswith("heads/")}
    _check_same({key: tuple(t.shape) for key, t in taken.items()}, wanted, f"the adapter in {str(source)!r}", "its config")
    for part, state in zip(parts, states, strict=True):
        dtypes = {dtype_name(t) for t in state.values()}
        is_new = isinstance(part.spec, SiteSpec) or not isinstance(part.spec.config, (OwnHead, CustomHead))
        if is_new and state and (len(dtypes) > 1 or not all(t.is_floating_point() for t in state.values())):
            raise StoreError(f"the adapter in {str(source)!r} has, at {part.path!r}, {sorted(dtypes)}: not one float dtype")
    for part, state in zip(parts, states, strict=True):
        if isinstance(part.spec, HeadSpec) and not any(p.is_meta for p in part.module.parameters()):
            part.module.load_state_dict(state)
            if isinstance(part.spec.config, CustomHead):
                part.module.to(device_near(model, part.path))
        else:
            part.module.load_state_dict(state, assign=True)
            part.module.to(device_near(model, part.path))


def _check_same(found: dict[str, Any], wanted: dict[str, Any], what: str, against: str) -> None:
    """Raise StoreError, with the first differences, unless both hold the same tensors with the same shapes."""
    problems = [f"{key!r} is unknown to {against}" for key in found.keys() - wanted.keys()]
    problems += [f"{key!r} is missing" for key in wanted.keys() - found.keys()]
    problems += [
        f"{key!r} is {found[key]}, {against} says {wanted[key]}"
        for key in found.keys() & wanted.keys()
        if found[key] != wanted[key]
    ]
    if problems:
        raise StoreError(f"{what} does not match {against}: {'; '.join(sorted(problems)[:5])}")
