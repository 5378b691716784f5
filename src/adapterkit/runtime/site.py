"""Sites: where an adapter sits in a host model, and the module that holds what sits there."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias
from urllib.parse import unquote

from torch import Tensor, nn

from ..config.fusion import FusionConfig
from ..config.union import Config
from ..errors import AdapterKitError
from ..placement.spec import SiteSpec
from ..structure.paths import ancestors
from .checkpoints import LoadLog, forgive_absent_adapters, warn_if_saved_as_base
from .handover import Handover
from .state import ModelState

if TYPE_CHECKING:  # in annotations alone: what a step or a head is, sites need not know
    from ..heads.spec import HeadSpec
    from .steps import Step

__all__ = [
    "AdapterSite",
    "Entry",
    "HeadEntry",
    "Original",
    "SiteEntry",
    "adapter_name",
    "module_key",
    "root_of",
    "site_key",
]


@dataclass(frozen=True)
class SiteEntry:
    """What an AdapterSite knows of a module that adapts a tensor or a Parameter of the host.

    Attributes:
        key: Its name among the site's children.
        config: The adapter's config, or the fusion's.
        spec: Its site.
        handover: Carries what it reads from another module's call, such as the residual stream; None if it reads nothing
            of the kind.
    """

    key: str
    config: Config | FusionConfig
    spec: SiteSpec
    handover: Handover[Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class HeadEntry:
    """What an AdapterSite knows of a head, which runs in the host's place or on what the model returns.

    Attributes:
        key: Its name among the site's children.
        config: The config of the adapter that owns it, or of the fusion.
        spec: What head it is, and where.
    """

    key: str
    config: Config | FusionConfig
    spec: HeadSpec


Entry: TypeAlias = SiteEntry | HeadEntry


@dataclass(frozen=True)
class Original:
    """What a Parameter was before adapters were merged into it.

    Attributes:
        value: A copy of it.
        merged: The digest of what merging made of it.
    """

    value: Tensor
    merged: str


class AdapterSite(nn.Module):
    """Hold the adapters of one host module. It is the host's child, so that it moves, saves and copies with the host.

    It is never run as a module: the host's hooks call the steps that activation put here.
    """

    def __init__(self, state: ModelState, host_path: str) -> None:
        super().__init__()
        self.state = state
        self.entries: dict[str, tuple[Entry, ...]] = {}
        self.steps: dict[str, tuple[Step, ...]] = {}  # by `Acting.at`: what the hooks run
        self.call = Handover[Any]()  # what the model's call had for heads on its output
        # Of the Parameters into which adapters are merged, by their names from the host on.
        self.originals: dict[str, Original] = {}
        self.host_path = host_path
        self.register_load_state_dict_post_hook(forgive_absent_adapters)  # type: ignore[no-untyped-call]  # torch's

    def forward(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse: only a host that runs all of its children as layers would call this. Shape: any."""
        raise AdapterKitError(
            f"the host {self.host_path!r} runs all of its children as layers, the adapter site among them; "
            "target the children of that module instead"
        )

    def insert(
        self,
        name: str,
        module: nn.Module,
        config: Config | FusionConfig,
        spec: SiteSpec | HeadSpec,
        handover: Handover[Any] | None = None,
    ) -> None:
        """Hold a module of an adapter for this host, after those that it has here already."""
        there = self.entries.get(name, ())
        taken = {entry.key for entry in there}
        # e.g. "sst2", then "sst2%+1". The first that is free, since an earlier module (a head) may have been removed.
        key = next(key for index in range(len(there) + 1) if (key := site_key(name, index)) not in taken)
        if isinstance(spec, SiteSpec):
            entry: Entry = SiteEntry(key, config, spec, handover)
        else:
            entry = HeadEntry(key, config, spec)
        self.entries[name] = (*there, entry)
        self._modules[key] = module

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
        """Yield the modules of one adapter at this host, heads too, in order; nothing if it has none here."""
        for entry in self.entries.get(name, ()):
            yield entry, self.get_submodule(entry.key)

    def adapting(self, name: str) -> Iterator[tuple[SiteEntry, nn.Module]]:
        """Yield the modules of one adapter that adapt this host, in order; no heads."""
        for entry, module in self.modules_of(name):
            if isinstance(entry, SiteEntry):
                yield entry, module

    def first_module(self, name: str) -> nn.Module:
        """Return the first module of one adapter at this host."""
        return self.get_submodule(self.entries[name][0].key)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what any module does; inside `kit.base_checkpoint()` nothing."""
        if self.state.omit_adapters:
            return kwargs.get("destination", {})
        if self.originals:
            warnings.warn(
                f"state_dict holds weights with {list(self.state.merged)} merged into them, and the adapters as well: in "
                "another model they would act twice. Take it inside `with kit.base_checkpoint():`, or unmerge first.",
                stacklevel=2,
            )
        warn_if_saved_as_base(kwargs.get("destination") or {})
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
        log = LoadLog.of(missing_keys)
        for name, entry in ((name, entry) for name, entries in self.entries.items() for entry in entries):
            start = f"{prefix}{entry.key}."  # e.g. "encoder._adapterkit.sst2."
            if any(key.startswith(start) for key in state_dict):
                log.present.add(name)
            else:
                log.absent.setdefault(name, []).append(start)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


# Attributes that `__init__` sets are not in the `dir` of the class.
_RESERVED = frozenset(dir(AdapterSite)) | {
    "state", "entries", "steps", "originals", "host_path", "training", "call",
}  # fmt: skip


def site_key(name: str, index: int = 0) -> str:
    """Return the name under which a site holds an adapter's module: its first there, or a later one."""
    return module_key(name, _RESERVED) + (f"%+{index}" if index else "")  # no name is spelled with "%+"


def module_key(name: str, reserved: Container[str] = ()) -> str:
    """Spell an adapter's name as a module name: percent-encoded where it holds a dot or hides an attribute.

    Args:
        name: The adapter's name.
        reserved: Attribute names that a child module must not take.
    """
    key = name.replace("%", "%25").replace(".", "%2E")  # "%" first: else that of "%2E" is spelled, too
    if key in reserved or key.startswith("_"):
        key = "".join(f"%{byte:02X}" for byte in key[0].encode()) + key[1:]  # "state": "%73tate"
    return key


def adapter_name(key: str) -> str:
    """Read the adapter's name back from its module name."""
    return unquote(key)


def root_of(path: str, entry: HeadEntry) -> str:
    """Return the path of the model on whose output a head is, given its host's path."""
    return ancestors(path)[entry.spec.above or 0]
