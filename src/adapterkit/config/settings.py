"""What the configs of all methods share: which places, which layers, which seed, which dtype."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    field_validator,
)
from pydantic_core import CoreSchema, core_schema

from ..errors import ConfigError
from .problems import describe

__all__ = [
    "AdapterConfig",
    "DType",
    "Int",
    "Predicate",
    "Probability",
    "Settings",
    "Size",
    "Target",
    "Targets",
    "TensorConfig",
    "check_map",
    "describe",
    "number_by_place",
]  # fmt: skip

Predicate = Callable[[torch.nn.Module, str], bool]
S = TypeVar("S", bound="Settings")
V = TypeVar("V")

# Names, not torch.dtypes: a config is written to JSON.
DType = Literal["float64", "float32", "bfloat16", "float16"]


class _PredicateSchema:
    """Accept a callable as a target in Python; JSON has none (a predicate is resolved to paths when it is added)."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.callable_schema()


Target = str | Annotated[Predicate, _PredicateSchema]


def _as_tuple(value: object) -> object:
    """Make a tuple of a list, or of one target without a list around it: a config holds what cannot change."""
    # First: a string is a sequence as well, of letters.
    if isinstance(value, str) or callable(value):
        return (value,)
    return tuple(value) if isinstance(value, (list, range)) else value


def _in_our_spelling(targets: Sequence[str | Predicate]) -> tuple[str | Predicate, ...]:
    """Return the targets, with the role that stands for what peft calls "all-linear"."""
    return tuple("@linear" if target == "all-linear" else target for target in targets)


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _dtype_name(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _index(value: object) -> object:
    """Turn the integers of other libraries (numpy's) into Python's. True is no number here."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


# Strict: rank="8" and rank=True are mistakes.
Int = Annotated[int, BeforeValidator(_index), Field(strict=True)]
Size = Annotated[Int, Field(ge=1, lt=2**31)]
Probability = Annotated[float, Field(ge=0, lt=1)]
# The description of a field that may be one of several things is what an error says of it.
Targets = Annotated[
    Sequence[Target],
    AfterValidator(_in_our_spelling),
    BeforeValidator(_as_tuple),
    Field(description="a list of names (patterns), roles such as '@attention.q', and predicates (module, path) -> bool"),
]
Layers = Annotated[Sequence[Int] | None, BeforeValidator(_as_tuple), Field(description="a list of whole numbers")]


class Settings(BaseModel):
    """Base of all configs: frozen, strict, with one error for all bad fields.

    Raises:
        ConfigError: one for all bad fields.
    """

    # Built on first use: building scans installed packages for plugins, which an import should not cost.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)
    # Pairs of settings for one quantity, such as reduction_factor and bottleneck_size: an override of one drops the other.
    exclusive: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__} cannot be built: {describe(error, type(self))}") from error

    def override(self: S, settings: Mapping[str, Any]) -> S:
        """Return the same config with these settings changed, validated anew."""
        if not settings:
            return self
        # Only what was given: a default that is passed on would count as given from then on (`model_fields_set`).
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        for one, other in self.exclusive:
            for given, dropped in ((one, other), (other, one)):
                if given in settings:
                    kept.pop(dropped, None)
        return type(self)(**{**kept, **settings})

    def __hash__(self) -> int:
        # By `repr`: a setting may be a map, such as rank by layer, and a dict has no hash.
        return hash((type(self), repr(self)))


class AdapterConfig(Settings):
    """Settings that every method has.

    Args:
        targets: Modules to adapt. A dotted suffix (`"output.dense"`), with globs (`*` within one component, `**` across
            several: `"layers.*"` is the blocks), `"re:…"` (a regular expression for the whole path), `""` (the model
            itself) or a predicate `(module, path) -> bool`; or a role (`"@attention.q"`). Each must match something.
            Methods that change weights take the names of Parameters, too (`"self_attn.in_proj_weight"`).
        exclude: Modules to leave out, written the same way.
        layers: Only these layers (AdapterDrop): indices into the repeated blocks, negative ones from the end.
        seed: Seed of the initialisation; torch's global generator if not given.
        dtype: Of the adapter's parameters; float32 if not given (float64 on a float64 host).
    """

    # Which settings are of a kind that code for all methods has to know. A config of a method lists its own.
    by_row: ClassVar[tuple[str, ...]] = ()  # act on each row of a batch, and need to know `batch_axis`
    at_start: ClassVar[tuple[str, ...]] = ()  # say what a new adapter starts as
    in_training: ClassVar[tuple[str, ...]] = ()  # probabilities of dropping something in training

    # Each config's own is a Literal with a default, and equals the `name` of its method.
    method: str
    targets: Targets = Field(min_length=1)
    exclude: Targets = ()
    layers: Layers = None
    seed: Annotated[Int, Field(ge=0, lt=2**63)] | None = None
    dtype: Annotated[DType | None, BeforeValidator(_dtype_name)] = None

    @field_validator("layers")
    @classmethod
    def _some_layer(cls, layers: Sequence[int] | None) -> Sequence[int] | None:
        if layers is not None and not layers:
            raise ValueError("an empty list adapts nothing; leave `layers` out to adapt every layer")
        return layers


class TensorConfig(AdapterConfig):
    """Settings of methods that change a tensor which a module takes or returns.

    Args:
        output: Which tensor of a host that returns several: an index, a key, or a list of them. The first floating
            one if not given.
        input: Which argument of the host, by position or keyword, where the adapter reads its host's input.
        channel_axis: Axis of the features, where the host's type does not tell: -1 for tokens, 1 for images.

    Every other setting: see `AdapterConfig`.
    """

    output: Annotated[
        Int | str | Sequence[Int | str] | None,
        BeforeValidator(_list_to_tuple),
        Field(description="an index (a whole number), a key (a string), or a list of them"),
    ] = None
    input: Annotated[Int | str | None, Field(description="a position (a whole number) or a keyword (a string)")] = None
    channel_axis: Int | None = None


def check_map(values: dict[str, V]) -> dict[str, V]:
    """Check that a map by layer or pattern has a "default", and sort it: equal configs have equal hashes."""
    if "default" not in values:
        raise ValueError(f"a map by layer or pattern needs a 'default'; found {list(values)}")
    return dict(sorted(values.items()))


def number_by_place(number: str, example: str) -> str:
    """Describe a setting that is a number, or a map of numbers by layer or pattern."""
    return f"{number}, or a map of them by layer or pattern, which needs a 'default': {{'default': {example}}}"
