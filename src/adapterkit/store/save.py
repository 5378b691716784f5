"""Save an adapter to a directory."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import nn

from ..config.settings import describe
from ..errors import StoreError
from ..heads.spec import HeadSpec
from ..placement.spec import located
from ..runtime.lookup import HeldModule, adapters_in
from ..runtime.site import HeadEntry
from ..structure.hosts import host_type
from .files import CARD_MARK, replace_adapter
from .fused_adapters import children_of
from .identity import base_identity, output_structure, structure_of
from .manifest import FORMAT_VERSION, HeadRecord, Manifest, Metadata, SiteRecord, TensorRecord
from .tensors import digest_of, dtype_name, tensors_of

__all__ = ["save_adapter"]

_SHOWN_LABELS = 20


def save_adapter(
    model: nn.Module,
    name: str,
    directory: str | Path,
    *,
    heads: bool = True,
    metadata: Metadata | Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter or a fusion to a directory, and return the directory.

    A kill at any moment leaves the old adapter or the new one. Other files in the directory are left alone.

    Args:
        model: The model that holds it.
        name: The adapter or fusion.
        directory: The directory; made if it is not there.
        heads: Write its heads, too.
        metadata: What people want to know of it.

    Raises:
        StoreError: the directory cannot be written, or the metadata have wrong or unknown fields.
    """
    metadata = _as_metadata(metadata)
    adapters = adapters_in(model)
    held = adapters.modules(name) if heads else [held for held, _ in adapters.sites(name)]
    tensors = tensors_of(held)
    # "pt" is how the files of PyTorch name their framework.
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    site_records, head_records = _records(model, held)
    structures = [r.structure for r in site_records] + [r.structure for r in head_records]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        # Every setting, not only those that were given: another version may have other defaults.
        config=held[0].entry.config.model_dump(mode="json"),
        sites=tuple(site_records),
        heads=tuple(head_records),
        tensors={key: TensorRecord(shape=tuple(t.shape), dtype=dtype_name(t)) for key, t in tensors.items()},
        tensors_sha256=hashlib.sha256(content).hexdigest(),
        tensors_size_bytes=len(content),
        digest=digest_of(model, name),
        children=children_of(model, name),
        base=base_identity(model, structures, metadata),
        metadata=metadata,
        versions={"adapterkit": version("adapterkit"), "torch": torch.__version__, "python": platform.python_version()},
    )
    directory = Path(directory)
    text = manifest.model_dump_json(indent=2)
    replace_adapter(directory, text.encode(), content, _card(manifest).encode())
    return directory


def _as_metadata(metadata: Metadata | Mapping[str, Any] | None) -> Metadata:
    """Return metadata as a value. Raises StoreError: wrong or unknown fields."""
    if isinstance(metadata, Metadata):
        return metadata
    try:
        return Metadata(**(metadata or {}))
    except ValidationError as error:
        raise StoreError(f"the metadata cannot be saved: {describe(error)}") from error


def _records(model: nn.Module, held: list[HeldModule]) -> tuple[list[SiteRecord], list[HeadRecord]]:
    """Return the manifest's entries for an adapter's sites and for its heads."""
    sites, heads = [], []
    for path, host, _, entry, module in held:
        if isinstance(entry, HeadEntry):
            heads.append(_head_record(model, path, host, entry.spec, module))
        else:
            sites.append(SiteRecord(**asdict(located(entry.spec, path)), structure=structure_of(model, path)))
    return sites, heads


def _head_record(model: nn.Module, path: str, host: nn.Module, head: HeadSpec, module: nn.Module) -> HeadRecord:
    """Return the manifest's entry for a head."""
    # A head in a module's place names that module; in a piece of the model its path is shorter than when it was made.
    config = head.config.model_dump(mode="json") | ({"target": path} if head.above is None else {})
    return HeadRecord(
        path=path,
        host=host_type(host),
        structure=structure_of(model, path) if head.above is None else output_structure(path, head.width),
        config=config,
        above=head.above,
        width=head.width,
        takes_mask=head.takes_mask,
        embedding=head.embedding,
        vocabulary=getattr(module, "vocabulary", 0) if head.config.has_vocabulary else 0,
    )


def _head_line(head: HeadRecord) -> str:
    """Return a head's text for the card: its name, and its labels if they are few."""
    config = head.config or {}
    labels = [str(label) for label in config.get("labels") or ()]
    shown = f" ({', '.join(labels)})" if 0 < len(labels) <= _SHOWN_LABELS else ""
    return f"{config.get('name') or head.path}{shown}"


def _card(manifest: Manifest) -> str:
    """Return a README for people: what the adapter is, what it fits, how to load it."""
    meta, base = manifest.metadata, manifest.base
    rows = {
        "method": manifest.config.get("method"),
        "sites": len(manifest.sites),
        "weighs": ", ".join(f"{child.name} ({child.digest[:12]})" for child in manifest.children),
        "heads": ", ".join(map(_head_line, manifest.heads)) or "none",
        "size": f"{manifest.tensors_size_bytes:,} bytes",
        "base": base.hub_id or base.class_path,
        "task": meta.task,
        "language": meta.language,
        "dataset": meta.dataset,
        "domain": meta.domain,
        "license": meta.license,
        **{metric.name: f"{metric.value} ({metric.dataset or 'no dataset named'})" for metric in meta.metrics},
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value not in (None, "")]
    return "\n".join(
        [
            CARD_MARK,
            f"# {manifest.name}",
            "",
            meta.description or "An adapter for a frozen PyTorch model, saved by adapterkit.",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
            "```python",
            "import adapterkit as ak",
            "",
            "kit = ak.wrap(model)",
            'name = kit.load("path/to/this/directory")',
            "kit.activate(name)",
            "```",
            "",
        ]
    )
