"""Sites: where an adapter sits in a host model, and the module that holds what sits there."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

from torch import Tensor, nn

from ..composition.names import module_key
from ..composition.nodes import Composition, Fuse, from_json
from ..config.fusion import FusionConfig
from ..config.union import Config
from ..errors import AdapterKitError
from ..heads.call import CallSlot
from ..heads.config import HeadConfig
from ..nn.functional.slices import Parts
from ..placement.patterns import SITE
from ..structure.anatomy.description import Norm
from ..structure.pytree import Path
from ..structure.tracing.row_layout import Layouts, RowLayout
from .state import RECORD, Handover, Record

__all__ = [
    "AdapterSite",
    "Entry",
    "HeadSpec",
    "Original",
    "SiteSpec",
    "Step",
    "adapter_names",
    "fusions_of",
    "heads_of",
    "layout_of",
    "located",
    "named_parameters",
    "open_parameters",
    "originals_of",
    "owner_at",
    "parameter_at",
    "record_of",
    "site_key",
    "sites_among",
    "sites_of",
    "specs_of",
]

Reads = Literal["site", "norm", "residual", "sum", "input", "weight"]


@dataclass(frozen=True)
class SiteSpec:
    """One resolved place of an adapter.

    Attributes:
        path: The host module's path in the model.
        host: Name of the host's type, as in torch.nn where it derives from there.
        at: Whether the host's output, its input or one of its Parameters is adapted.
        reads: What the adapter reads: the tensor at the site ("site"), that tensor through the host ("norm"), what enters
            the module `residual` ("residual"), the tensor at the site plus that ("sum"), what the host takes ("input"), or
            the Parameter ("weight").
        width: Features of the tensor at the site; of a Parameter, its size on the first axis.
        input_width: Features of what the adapter reads; of a Parameter, its size on the last axis.
        axis: The axis they lie on.
        layer: (index, count) of the repeated block that the host lies in, if any.
        output: Which tensor of the host's output; the first floating one if None.
        input: Which argument, of the host or of `residual`, as (position, keyword); the first floating one if None.
        residual: Path of the module whose input the adapter reads: the residual stream or, beside the host, its own.
        norm: Where a block normalises around the branch that the host yields, as `Sublayer.norm`; None where the host
            yields none, or the config did not need the model's structure.
        parameters: Names, from the host on, of the Parameter that is adapted; several where the host reads it under
            several. Of a tied Parameter each host that reads it is a site; one module serves them all.
        parts: Which features of the output (rows of the Parameter) are adapted; () for all of them.
        tag: Which of a method's placements it came of.
        member: Which config of a union it came of.
    """

    path: str
    host: str
    at: Literal["output", "input", "weight"]
    reads: Reads
    width: int
    input_width: int
    axis: int = -1
    layer: tuple[int, int] | None = None
    output: Path | None = None
    input: tuple[int | None, str | None] | None = None
    residual: str | None = None
    norm: Norm | None = None
    parameters: tuple[str, ...] = ()
    parts: Parts = ()
    tag: str = ""
    member: int = 0


@dataclass(frozen=True)
class HeadSpec:
    """What a head is, and where.

    Attributes:
        config: Its settings, its name among them.
        above: Of a head on a model's output, how many modules around the host, which is the last of nested nn.Sequentials,
            lie in that model: 0 where the host is the model itself. None for a head in the host's place.
        width: Of a head on the output, features that it reads.
        takes_mask: Whether it is called with the mask, too.
        embedding: Path, from the model on, of an embedding whose weight it reads.
    """

    config: HeadConfig
    above: int | None = None
    width: int = 0
    takes_mask: bool = True
    embedding: str | None = None


@dataclass(frozen=True)
class Entry:
    """What an AdapterSite knows of one module of an adapter.

    Attributes:
        key: Its name among the site's children.
        config: The adapter's config, or the fusion's.
        spec: Its place; None for a head.
        handover: Where the residual stream is left, if it reads that.
        head: What head it is, if it is one.
    """

    key: str
    config: Config | FusionConfig
    spec: SiteSpec | None
    handover: Handover | None = field(default=None, compare=False)
    head: HeadSpec | None = None


@dataclass(frozen=True)
class Original:
    """What a Parameter was before adapters were merged into it.

    Attributes:
        value: A copy of it.
        merged: The digest of what merging made of it.
    """

    value: Tensor
    merged: str


class Step:
    """One thing that a hook does to the tensors of a call. Immutable; finds its module through the site.

    Attributes:
        adapter: The adapter or composition that was active when the step was made.
    """

    adapter: Composition | None

    def __call__(self, site: AdapterSite, host: nn.Module, args: Any, kwargs: Any, value: Any) -> Any:
        """Return `value` (the host's output, or its `(args, kwargs)`) with tensors of shape (..., width) replaced."""
        raise NotImplementedError

    def places(self, host: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """The Parameters that it changes, each by the module that holds it and its name there."""
        yield from ()


def layout_of(layouts: Layouts, spec: SiteSpec) -> RowLayout | None:
    """Of how rows lie in the tensors of a host, what was seen of the one at a place; None if nothing was."""
    if spec.at == "output":
        ways: list[Path] = [("output", *(spec.output or ()))]
    else:
        position, keyword = spec.input or (None, None)
        ways = [("input", side, key) for side, key in ((1, keyword), (0, position)) if key is not None] or [("input",)]
    return next((layouts[way] for way in ways if way in layouts), None)


class AdapterSite(nn.Module):
    """Holds the adapters of one host module; registered as its child, so that it moves, saves and copies with it.

    Never run as a module: the host's hooks call the steps that activation put here.
    """

    def __init__(self, record: Record, host_path: str) -> None:
        super().__init__()
        self.record = record
        self.entries: dict[str, tuple[Entry, ...]] = {}
        self.output_steps: tuple[Step, ...] = ()
        self.input_steps: tuple[Step, ...] = ()
        self.weight_steps: tuple[Step, ...] = ()
        self.call = CallSlot()  # what the model's call had for heads on its output
        # Of the Parameters into which adapters are merged, by their names from the host on.
        self.originals: dict[str, Original] = {}
        self.host_path = host_path
        self.register_load_state_dict_post_hook(_forgive_absent_adapters)  # type: ignore[no-untyped-call]  # torch's

    def forward(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse. Shape: any."""
        raise AdapterKitError(
            f"the host {self.host_path!r} runs all of its children as layers, the adapter site among them; "
            "target the children of that module instead"
        )

    def insert(
        self,
        name: str,
        module: nn.Module,
        config: Config | FusionConfig,
        spec: SiteSpec | None,
        handover: Handover | None = None,
        head: HeadSpec | None = None,
    ) -> None:
        """Hold a module of an adapter for this host, after those that it has here already."""
        there = self.entries.get(name, ())
        taken = {entry.key for entry in there}
        key = next(key for index in range(len(there) + 1) if (key := site_key(name, index)) not in taken)
        entry = Entry(key, config, spec, handover, head)
        self.entries[name] = (*there, entry)
        self._modules[entry.key] = module

    def discard(self, name: str, keys: Container[str] | None = None) -> None:
        """Let go of an adapter's modules, or of those with these keys."""
        held = self.entries.pop(name)
        kept = () if keys is None else tuple(entry for entry in held if entry.key not in keys)
        for entry in held:
            if entry not in kept:
                del self._modules[entry.key]
        if kept:
            self.entries[name] = kept

    def modules_of(self, name: str) -> Iterator[tuple[Entry, nn.Module]]:
        """The modules of one adapter at this host, in order; none if it has none here."""
        for entry in self.entries.get(name, ()):
            yield entry, self.get_submodule(entry.key)

    def held(self, name: str) -> nn.Module:
        """The first module of one adapter at this host."""
        return self.get_submodule(self.entries[name][0].key)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, but nothing inside `kit.base_checkpoint()`."""
        if self.record.omit_adapters:
            return kwargs.get("destination", {})
        if self.originals:
            warnings.warn(
                f"state_dict holds weights with {list(self.record.merged)} merged into them, and the adapters as well: in "
                "another model they would act twice. Take it inside `with kit.base_checkpoint():`, or unmerge first.",
                stacklevel=2,
            )
        _warn_if_saved_as_base()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        log = _LoadLog.of(missing_keys)
        for name, entry in ((name, entry) for name, entries in self.entries.items() for entry in entries):
            start = f"{prefix}{entry.key}."
            if any(key.startswith(start) for key in state_dict):
                log.present.add(name)
            else:
                log.absent.setdefault(name, []).append(start)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


_RESERVED = frozenset(dir(AdapterSite)) | {
    "record", "entries", "output_steps", "input_steps", "weight_steps", "originals", "host_path", "training", "call",
}  # fmt: skip


def site_key(name: str, index: int = 0) -> str:
    """The name under which a site holds an adapter's module: its first there, or a later one."""
    return module_key(name, _RESERVED) + (f"%+{index}" if index else "")  # no name is spelled with "%+"


class _LoadLog:
    """Which adapters one `load_state_dict` call has met.

    A file with none of an adapter's tensors (a base checkpoint) loads strictly; one with some of them is an error.
    """

    _current = threading.local()

    def __init__(self, missing: list[str]) -> None:
        self.missing = missing  # the list is torch's own, one for each load_state_dict call
        self.present: set[str] = set()
        self.absent: dict[str, list[str]] = {}
        self.forgiven: dict[str, list[str]] = {}

    @classmethod
    def of(cls, missing: list[str]) -> _LoadLog:
        log = getattr(cls._current, "log", None)
        if log is None or log.missing is not missing:
            log = cls._current.log = cls(missing)
        return log

    def settle(self) -> None:
        """Take the absent adapters' keys out of the missing ones; put them back if the adapter turned up after all."""
        for name, starts in self.absent.items():
            if name in self.present:
                self.missing.extend(self.forgiven.pop(name, []))
                continue
            gone = [key for key in self.missing if key.startswith(tuple(starts))]
            self.forgiven.setdefault(name, []).extend(gone)
            self.missing[:] = [key for key in self.missing if key not in gone]


def _warn_if_saved_as_base() -> None:
    """Warn inside a `save_pretrained` that a person called: `from_pretrained` would drop the adapters without a word.

    Not inside that of a Trainer's checkpoint, which is loaded into the adapted model again.
    """
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_name != "save_pretrained":
        frame = frame.f_back
    if frame.f_back is not None and frame.f_back.f_code.co_name != "_save":
        warnings.warn(
            "save_pretrained is writing adapters into the base model's file, where from_pretrained will not find them. "
            "Call it inside `with kit.base_checkpoint():`, and save the adapters with kit.save.",
            stacklevel=3,
        )


def _forgive_absent_adapters(_site: nn.Module, incompatible: Any) -> None:
    _LoadLog.of(incompatible.missing_keys).settle()


def sites_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterSite]]:
    """Each host that holds adapters: its path, itself, its site; in the model's order."""
    return sites_among(dict(model.named_modules()))


def sites_among(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, AdapterSite]]:
    """`sites_of` the model that has these modules."""
    for path, module in modules.items():
        site = module._modules[SITE] if SITE in module._modules else None  # noqa: SIM401  # TorchScript's has no get
        if isinstance(site, AdapterSite):
            yield path, module, site


def open_parameters(module: nn.Module, trains: bool) -> None:
    """Let a module's parameters train, or not; those that cannot (integers) stay as they are."""
    for parameter in module.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(trains)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters in the model, and of all fusions."""
    return list(dict.fromkeys(name for _, _, site in sites_of(model) for name in site.entries))


def fusions_of(model: nn.Module) -> dict[str, Fuse]:
    """The model's fusions by name, each as the composition that it weighs."""
    configs = {name: entries[0].config for _, _, site in sites_of(model) for name, entries in site.entries.items()}
    found = {}
    for name, config in configs.items():
        if isinstance(config, FusionConfig):
            unnamed = Fuse(*(from_json(child) for child in config.children))  # type: ignore[arg-type]  # no None
            found[name] = unnamed if unnamed.fusion == name else Fuse(*unnamed.children, name=name)
    return found


def named_parameters(model: nn.Module, name: str, *, heads: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """An adapter's parameters with their names in the model: sites first, in the model's order, then heads."""
    for is_head in (False, True) if heads else (False,):
        for path, _, site in sites_of(model):
            for entry, module in site.modules_of(name):
                if (entry.spec is None) == is_head:
                    yield from module.named_parameters(prefix=f"{path}.{SITE}.{entry.key}".lstrip("."))


def owner_at(host: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The module that holds a Parameter, by the Parameter's name from the host on, and the name there; None if gone."""
    way, _, leaf = name.rpartition(".")
    owner: nn.Module | None = host
    for part in way.split(".") if way else ():
        owner = None if owner is None or part not in owner._modules else owner._modules[part]
    return owner, leaf


def parameter_at(host: nn.Module, name: str) -> nn.Parameter | None:
    """A Parameter by its name from the host on; None if there is none (any more)."""
    owner, leaf = owner_at(host, name)
    if owner is None or leaf not in owner._parameters:  # TorchScript's has no get
        return None
    return owner._parameters[leaf]


def originals_of(model: nn.Module) -> dict[int, Tensor]:
    """What the Parameters were into which adapters are merged, by the `id` of the Parameter."""
    return {
        id(parameter_at(host, name)): original.value
        for _, host, site in sites_of(model)
        for name, original in site.originals.items()
    }


def specs_of(model: nn.Module, name: str) -> Iterator[tuple[str, SiteSpec]]:
    """An adapter's places, each with its host's path in this model; no heads."""
    for path, _, site in sites_of(model):
        for entry in site.entries.get(name, ()):
            if entry.spec is not None:
                yield path, entry.spec


def heads_of(model: nn.Module, name: str) -> dict[str, HeadConfig]:
    """An adapter's heads by their names, in the model's order."""
    entries = (entry for _, _, site in sites_of(model) for entry in site.entries.get(name, ()))
    return {str(entry.head.config.name): entry.head.config for entry in entries if entry.head is not None}


def record_of(model: nn.Module) -> Record | None:
    """The model's record: on its root, or, in a part taken out of a larger model, on its sites; None if untouched."""
    record: Record | None = model.__dict__.get(RECORD)
    return record or next((site.record for _, _, site in sites_of(model)), None)


def located(spec: SiteSpec, path: str) -> SiteSpec:
    """The spec with paths as they are in this model, which may be a part of the one that it was made in, or around it."""
    if path == spec.path:
        return spec
    residual = spec.residual
    if residual is not None and spec.path.endswith(f".{path}" if path else ""):
        residual = residual.removeprefix(spec.path[: len(spec.path) - len(path)])
    elif residual is not None and path.endswith(f".{spec.path}" if spec.path else ""):
        residual = f"{path[: len(path) - len(spec.path)]}{residual}".rstrip(".")
    return replace(spec, path=path, residual=residual)
