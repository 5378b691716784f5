"""`adapter.json`: what an adapter is, where it belongs, and what its tensors must look like."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..config.settings import describe
from ..errors import StoreError
from ..placement.spec import Reads
from ..runtime.acting import ACTING
from ..structure.anatomy.description import Norm

__all__ = [
    "FORMAT_VERSION", "BaseIdentity", "ChildRecord", "Manifest", "Metadata", "Metric", "SiteRecord", "TensorRecord",
    "parse_manifest",
]  # fmt: skip

FORMAT_VERSION: Literal[1] = 1
MAX_SITES = 100_000

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=10_000)]
Count = Annotated[int, Field(ge=0, lt=2**48)]


class _Strict(BaseModel):
    # Built on first use: building scans installed packages for plugins, which an import should not cost.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class HostRecord(_Strict):
    """A module that a base must have: its path, its type, and a hash over the shapes of and around it."""

    path: Text
    host: Text
    structure: Sha256


def _known_at(at: Any) -> Any:
    """Return the name of a way of acting if there is one of this name."""
    known = [acting.at for acting in ACTING]
    if at not in known:
        raise ValueError(f"must be one of {known}")
    return at


def _reads_as_now(reads: Any) -> Any:
    """Return what the first files called "input" by its name now."""
    return "own_input" if reads == "input" else reads


class SiteRecord(HostRecord):
    """One site: the fields of `SiteSpec`."""

    at: Annotated[Text, BeforeValidator(_known_at)]
    reads: Annotated[Reads, BeforeValidator(_reads_as_now)]
    width: Annotated[int, Field(ge=1, lt=2**31)]
    input_width: Annotated[int, Field(ge=1, lt=2**31)]
    axis: Annotated[int, Field(ge=-8, le=8)]
    layer: tuple[int, int] | None
    output: tuple[int | str, ...] | None
    input: tuple[int | None, str | None] | None
    residual: Text | None
    # Fields with a default came later than the first files, which lack them.
    norm: Norm | None = None
    parameters: Annotated[tuple[Text, ...], Field(max_length=64)] = ()
    slices: Annotated[
        tuple[tuple[Text, tuple[tuple[Count, Count], ...]], ...],
        Field(max_length=64, validation_alias=AliasChoices("slices", "parts")),  # "parts" in the first files
    ] = ()
    tag: Text = ""
    member: Annotated[int, Field(ge=0, lt=64)] = 0


class HeadRecord(HostRecord):
    """A head that the adapter owns, in its place or on the model's output: the fields of `HeadSpec`.

    Attributes:
        config: Its settings, labels among them; None in older files, whose heads are copies of the model's own.
        vocabulary: Tokens that its logits are of, for a head with a vocabulary.
    """

    config: dict[str, Any] | None = None
    above: Annotated[int, Field(ge=0, le=64)] | None = None
    width: Annotated[int, Field(ge=0, lt=2**31)] = 0
    takes_mask: bool = True
    embedding: Text | None = None
    vocabulary: Annotated[int, Field(ge=0, lt=2**31)] = 0


class TensorRecord(_Strict):
    """What a tensor in the safetensors file must be."""

    shape: Annotated[tuple[Count, ...], Field(max_length=16)]
    dtype: Text


class ChildRecord(_Strict):
    """An adapter that a fusion weighs: what it was called, and the digest of its tensors."""

    name: Text
    digest: Sha256


class BaseIdentity(_Strict):
    """The model that the adapter was trained on.

    Attributes:
        class_path: Module and name of the model's class.
        structure: Hash over the structures of all sites.
        fingerprint: Digest of all base parameters.
        hub_id: Where the base comes from (a Hugging Face id, say), if the model tells.
        revision: Its revision there.
    """

    class_path: Text
    structure: Sha256
    fingerprint: Sha256
    hub_id: Text | None = None
    revision: Text | None = None


class Metric(_Strict):
    """One measured number, and where it comes from."""

    name: Text
    value: float
    dataset: Text | None = None
    split: Text | None = None
    provenance: Text | None = None


class Metadata(_Strict):
    """What people want to know of an adapter. All of it is optional."""

    description: Text | None = None
    task: Text | None = None
    language: Text | None = None
    dataset: Text | None = None
    domain: Text | None = None
    metrics: tuple[Metric, ...] = ()
    license: Text | None = None
    base_id: Text | None = None
    base_revision: Text | None = None


class Manifest(_Strict):
    """The whole of `adapter.json`.

    Attributes:
        digest: Of the adapter's own tensors, without heads: what a fusion refers to it by.
        children: The adapters that a fusion weighs.
    """

    format_version: Literal[1]
    name: Annotated[str, Field(min_length=1, max_length=128)]
    config: dict[str, Any]
    sites: Annotated[tuple[SiteRecord, ...], Field(min_length=1, max_length=MAX_SITES)]
    heads: Annotated[tuple[HeadRecord, ...], Field(max_length=MAX_SITES)]
    tensors: Annotated[dict[str, TensorRecord], Field(max_length=10 * MAX_SITES)]
    tensors_sha256: Sha256
    tensors_size_bytes: Count
    digest: Sha256 | None = None
    children: Annotated[tuple[ChildRecord, ...], Field(max_length=10_000)] = ()
    base: BaseIdentity
    metadata: Metadata
    versions: dict[str, Text]


def parse_manifest(text: bytes, source: str) -> Manifest:
    """Read a manifest from the bytes of its JSON.

    Args:
        text: The bytes.
        source: Where they come from, for messages.

    Raises:
        StoreError: not JSON, unknown or missing fields, wrong types, or a newer format version.
    """
    try:
        # The version by itself first: of a newer file, "upgrade" says more than a list of fields that are unknown here.
        version = _VersionOnly.model_validate_json(text).format_version
    except ValidationError as error:
        raise StoreError(f"{source} is not an adapter manifest: {describe(error)}") from error
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{source} has format version {version}; this adapterkit reads version {FORMAT_VERSION}: "
            + ("upgrade adapterkit" if version > FORMAT_VERSION else "it was never in use")
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise StoreError(f"{source} is not a valid manifest: {describe(error)}") from error


# Not `_Strict`: every other field is ignored.
class _VersionOnly(BaseModel):
    format_version: int
