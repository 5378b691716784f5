"""A saved adapter as a value: what every reader of a format returns, and all that the checks look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..config.fusion import FusionConfig
from ..config.union import Config
from ..placement.spec import SiteSpec
from .manifest import BaseIdentity, ChildRecord

__all__ = ["Reader", "SavedAdapter", "SavedHead", "SavedSite"]


@dataclass(frozen=True)
class SavedSite:
    """A site of a saved adapter.

    Attributes:
        spec: The site.
        structure: What `structure_of` said of the host when it was saved; None skips the comparison.
    """

    spec: SiteSpec
    structure: str | None = None


@dataclass(frozen=True)
class SavedHead:
    """A head of a saved adapter; the fields that are not explained here are those of `HeadSpec`.

    Attributes:
        path: Its host.
        config: Its settings; None for a copy of the model's own module at `path`, of which a file knew no more.
        host: Name of the host's type.
        structure: What `structure_of` said of a host whose place the head takes; None skips the comparison.
        vocabulary: Tokens that its logits are of, for a head with a vocabulary.
    """

    path: str
    config: Mapping[str, Any] | None
    host: str
    structure: str | None = None
    above: int | None = None
    width: int = 0
    takes_mask: bool = True
    embedding: str | None = None
    vocabulary: int = 0


def _same(key: str) -> str:
    return key


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter, or a fusion, as a reader found it in a folder. None stands for what the format does not know.

    Attributes:
        name: The name that it was saved under.
        config: Its config.
        source: The folder, for messages.
        tensors: The tensors of its modules, by the names that they have in the file.
        sites: Its sites. None: they are found from the config, in the model that it is loaded into.
        heads: The heads that it owns.
        head_tensors: The tensors of its heads, by their names in the file.
        children: The adapters that a fusion weighs.
        base: Which base it was trained on. None: it loads on any base that it fits.
        key_in_file: Translates the name that we give a tensor (see `tensors.tensor_key`) to its name in the file.
    """

    name: str
    config: Config | FusionConfig
    source: Path
    tensors: Mapping[str, Tensor]
    sites: tuple[SavedSite, ...] | None = None
    heads: tuple[SavedHead, ...] = ()
    head_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    children: tuple[ChildRecord, ...] = ()
    base: BaseIdentity | None = None
    key_in_file: Callable[[str], str] = _same

    @property
    def base_name(self) -> str:
        """What messages call the base: its id or the path of its class."""
        return "another model" if self.base is None else (self.base.hub_id or self.base.class_path)

    def without_heads(self) -> SavedAdapter:
        """Return the adapter without its heads."""
        return replace(self, heads=(), head_tensors={})


class Reader(Protocol):
    """Reads one format of saved adapters; it stands in `readers.READERS`.

    Attributes:
        format: What messages call the format.
        sign: The file by which a folder of this format is known.
    """

    format: str
    sign: str

    def reads(self, directory: Path) -> bool:
        """Tell whether a folder is of this format, from names and small files; its content need not be sound."""

    def read(self, directory: Path) -> SavedAdapter:
        """Read a folder of this format.

        Nothing in it is to be trusted: nothing is unpickled, no link out of the folder is followed, and sizes are
        checked before memory is taken (`files.read_inside`, `tensors.parse_tensors`).

        Raises:
            StoreError: it is damaged, hostile or too new; says what was found.
        """
