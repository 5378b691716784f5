"""Our own format: `adapter.json` and `adapter.safetensors`, read as a SavedAdapter."""

import math
from pathlib import Path

from torch import Tensor

from ..config.fusion import FusionConfig
from ..config.union import Config
from ..errors import ConfigError, StoreError
from ..methods import check_methods_of
from ..methods.spellings import config_from
from ..placement.spec import SiteSpec
from .compare_tensors import check_same
from .files import MANIFEST, read_manifest_bytes, read_tensors_bytes
from .manifest import HeadRecord, Manifest, SiteRecord, parse_manifest
from .refusal import refusing
from .saved_adapter import SavedAdapter, SavedHead, SavedSite
from .tensors import dtype_name, parse_tensors

__all__ = ["OwnFormat", "read_manifest"]

# A safetensors file is its tensors and a header: this much for each tensor is plenty.
_HEADER_BYTES_PER_TENSOR = 2**14
_ITEM_BYTES = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2,
    "bool": 1, "uint8": 1, "int8": 1,
}  # fmt: skip


class OwnFormat:
    """Reads what `save_adapter` writes."""

    format = "adapterkit"
    sign = MANIFEST

    def reads(self, directory: Path) -> bool:
        """Tell whether a folder has a manifest."""
        return (directory / MANIFEST).exists()

    def read(self, directory: Path) -> SavedAdapter:
        """Read a folder. Raises StoreError; see `Reader.read`."""
        manifest, content = _read_pair(directory)
        config = _config_of(manifest, directory)
        tensors = _tensors_of(manifest, content, directory)
        return SavedAdapter(
            name=manifest.name,
            config=config,
            source=directory,
            # Apart, so that `without_heads` can leave them out. Names: see `tensors.tensor_key`.
            tensors={key: tensor for key, tensor in tensors.items() if not key.startswith("heads/")},
            sites=tuple(map(_site, manifest.sites)),
            heads=tuple(map(_head, manifest.heads)),
            head_tensors={key: tensor for key, tensor in tensors.items() if key.startswith("heads/")},
            children=manifest.children,
            base=manifest.base,
        )


def read_manifest(directory: str | Path) -> Manifest:
    """Read the manifest of a saved adapter. Raises StoreError."""
    return parse_manifest(read_manifest_bytes(Path(directory)), str(directory))


def _read_pair(directory: Path) -> tuple[Manifest, bytes]:
    """Read the manifest and the bytes of its tensors file, anew if someone saved in between."""
    while True:
        # A round is repeated only where the manifest has changed meanwhile.
        text = read_manifest_bytes(directory)
        manifest = parse_manifest(text, str(directory))
        _check_size(directory, manifest)
        try:
            return manifest, read_tensors_bytes(directory, manifest.tensors_sha256, manifest.tensors_size_bytes)
        except StoreError:
            # Another process may have replaced both files after the manifest was read: then the manifest is another now.
            if read_manifest_bytes(directory) == text:
                raise


def _check_size(directory: Path, manifest: Manifest) -> None:
    """Raise StoreError if the tensors file is to be larger than its tensors, or they are of a kind that none has.

    This comes before the file is read, so that a manifest cannot make us take more memory than its tensors need.
    """
    # The header has an entry for each tensor, beside metadata: 1 MiB is ample for those.
    limit = 2**20 + _HEADER_BYTES_PER_TENSOR * len(manifest.tensors)
    for key, record in manifest.tensors.items():
        if record.dtype not in _ITEM_BYTES:
            raise StoreError(f"tensor {key!r} has dtype {record.dtype!r}; an adapter has {sorted(_ITEM_BYTES)}")
        limit += math.prod(record.shape) * _ITEM_BYTES[record.dtype]
    if manifest.tensors_size_bytes > limit:
        raise StoreError(
            f"{str(directory)!r} declares a tensors file of {manifest.tensors_size_bytes:,} bytes, more than the "
            f"{limit:,} that its tensors need"
        )


def _config_of(manifest: Manifest, source: Path) -> Config | FusionConfig:
    """Return the config in a manifest. Raises StoreError, naming its method if that is not here."""
    # A fusion is of no method. One that lists nothing to weigh is no config at all, which `config_from` says.
    if not manifest.children and manifest.config.get("method") != "fusion":
        try:
            check_methods_of(manifest.config)
        except ConfigError as error:
            raise StoreError(f"the adapter in {str(source)!r} cannot be loaded: {error}") from error
    with refusing(source):
        return FusionConfig(**manifest.config) if manifest.children else config_from(manifest.config)


def _tensors_of(manifest: Manifest, content: bytes, source: Path) -> dict[str, Tensor]:
    """Return the tensors in the file's bytes, each as the manifest says."""
    tensors = parse_tensors(content, source)
    found = {key: (tuple(t.shape), dtype_name(t)) for key, t in tensors.items()}
    wanted = {key: (record.shape, record.dtype) for key, record in manifest.tensors.items()}
    check_same(found, wanted, f"the tensors file in {str(source)!r}", "its manifest")
    return tensors


def _site(record: SiteRecord) -> SavedSite:
    # The fields are those of `SiteSpec`, and `structure` beside them: a new field needs no line here.
    return SavedSite(SiteSpec(**record.model_dump(exclude={"structure"})), record.structure)


def _head(record: HeadRecord) -> SavedHead:
    return SavedHead(**dict(record))
