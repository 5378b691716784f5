"""Settings of heads: what an adapter makes of a model's output, or puts in the place of one of its modules."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator
from torch import nn

from ..config.settings import Int, Probability, Settings, Size
from ..errors import ConfigError
from ..nn.functional.non_linearities import NonLinearity
from .pooling import Pooling

__all__ = [
    "HEADS", "CausalLMHead", "ClassificationHead", "CustomHead", "HeadConfig", "MaskedLMHead", "MultiLabelHead",
    "MultipleChoiceHead", "OutputHead", "OwnHead", "QuestionAnsweringHead", "RegressionHead", "TaggingHead", "head_from",
]  # fmt: skip


def _as_tuple(value: object) -> object:
    """Return lists and ranges as tuples, so that settings are hashable; else the value, for pydantic to refuse."""
    return tuple(value) if isinstance(value, (list, range)) else value


def _as_path(value: object) -> object:
    """Return one key as a tuple of it; lists as tuples. `True` is no index, though Python takes it for one."""
    return (value,) if isinstance(value, (str, int)) and not isinstance(value, bool) else _as_tuple(value)


# Bounds: names come from files, too.
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Labels = Annotated[
    Annotated[tuple[Text, ...], Field(min_length=1, max_length=1_000_000)] | None,
    BeforeValidator(_as_tuple),
    Field(description="a list of names, such as ('neg', 'pos')"),
]
OutputPath = Annotated[
    Annotated[tuple[Int | str, ...], Field(min_length=1, max_length=8)] | None,
    BeforeValidator(_as_path),
    Field(description="an index (a whole number), a key (a string), or a list of them"),
]
# Bounds beyond any real head: a file from elsewhere must not make a model of any size.
Depth = Annotated[Int, Field(ge=1, le=64)]


def _without_none(**settings: Any) -> dict[str, Any]:
    """Return the settings that were given: a default must not count as one (`model_fields_set`)."""
    return {name: value for name, value in settings.items() if value is not None}


class HeadConfig(Settings):
    """What all heads have.

    Args:
        name: Which one it is among the adapter's heads; by its kind, or the path of its module, if not given.
    """

    # Whether its last layer maps to the tokens of a vocabulary.
    has_vocabulary: ClassVar[bool] = False

    kind: str
    name: Annotated[str, Field(max_length=1000)] | None = None

    # For type checkers: a subclass hands settings of its own to this, which the one that pydantic makes would not take.
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    @field_validator("labels", check_fields=False)
    @classmethod
    def _are_distinct(cls, labels: Sequence[str] | None) -> Sequence[str] | None:
        # `labels or ()`: None where a head has a number of labels and no names.
        twice = {label for label in labels or () if (labels or ()).count(label) > 1}
        if twice:
            raise ValueError(f"each label once; found {sorted(twice)} several times")
        return labels

    @property
    def label_map(self) -> dict[int, str] | None:
        """The label of each index; None if there are no names."""
        labels: Sequence[str] | None = getattr(self, "labels", None)
        return None if labels is None else dict(enumerate(labels))


class OwnHead(HeadConfig):
    """A copy of one of the model's own modules, run in its place.

    Args:
        target: The module (a pattern). An `nn.Sequential` stands for its layers.
        labels: What its outputs are called. Of a model of transformers, those of its config if not given.

    Every other setting: see `HeadConfig`.
    """

    kind: Literal["own"] = "own"
    target: str
    labels: Labels = None

    def __init__(self, target: str, **settings: Any) -> None:
        super().__init__(target=target, **settings)


class CustomHead(HeadConfig):
    """A module of yours, run in the place of one of the model's, or on what the model returns.

    In the place of a module it is called as that one is. On the output it takes the hidden states, (batch, seq, hidden),
    and the call's mask if its `forward` has an argument `mask`; what it returns has the rows on its first axis. If it has
    a method `loss(logits, labels)`, labels that the model is given make a loss.

    Args:
        module: The module; the adapter owns it from now on. It is not in the file: `kit.load(…, heads={name: module})`.
        target: The module (its path) that it replaces; the model's output if not given.
        output: On the output: which tensor it reads; the first floating one of (batch, seq, hidden) or (batch, hidden).
        labels: What its outputs are called.

    Every other setting: see `HeadConfig`.
    """

    kind: Literal["custom"] = "custom"
    target: str | None = None
    output: OutputPath = None
    labels: Labels = None
    # Private: a module is no setting. Two heads are equal, and are saved, without it.
    _module: nn.Module | None = PrivateAttr(default=None)

    def __init__(self, module: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if module is not None and not isinstance(module, nn.Module):
            raise ConfigError(f"CustomHead takes an nn.Module; found {type(module).__name__}")
        if self.target is not None and self.output is not None:
            raise ConfigError(f"a head in the place of {self.target!r} reads what that takes; it has no output=")
        self._module = module

    @property
    def module(self) -> nn.Module | None:
        """The module; None in what describes one of a file."""
        return self._module


class OutputHead(HeadConfig):
    """A head on what the model returns: linear layers with a non-linearity between them.

    Args:
        layers: Linear layers; all but the last are as wide as the hidden states.
        non_linearity: The function between them.
        dropout: Probability of dropping a feature before each.
        output: Which tensor of the model's output it reads: an index, a key or a list of them, such as "pooler_output" or
            ("hidden_states", -2); the first floating one of (batch, seq, hidden) or (batch, hidden) if not given.
        seed: Seed of the initialisation; torch's global generator if not given.

    Every other setting: see `HeadConfig`.
    """

    layers: Depth = 1
    non_linearity: NonLinearity = "tanh"
    dropout: Probability = 0.0
    output: OutputPath = None
    seed: Annotated[Int, Field(ge=0, lt=2**63)] | None = None


class _WithLabels(OutputHead):
    """A head that has names for its outputs, or the number of them."""

    labels: Labels = None
    num_labels: Size | None = None

    def __init__(self, labels: Sequence[str] | None = None, **settings: Any) -> None:
        super().__init__(**_without_none(labels=labels), **settings)

    @model_validator(mode="after")
    def _know_how_many(self) -> "_WithLabels":
        # After both are validated: a bad type of one is reported as such, not as a wrong number.
        given, named = self.num_labels, self.labels
        if given is None and named is None:
            raise ValueError("how many labels? Give labels=('neg', 'pos'), or num_labels=2")
        if given is not None and named is not None and given != len(named):
            raise ValueError(f"num_labels={given}, and labels names {len(named)}")
        return self

    @property
    def size(self) -> int:
        """How many outputs there are."""
        return self.num_labels or len(self.labels or ())  # one of them is there: `_know_how_many`


class ClassificationHead(_WithLabels):
    """One class for each row. Labels (batch), whole numbers; cross-entropy.

    Args:
        labels: The classes' names.
        num_labels: How many there are, if they have none.
        pooling: Which positions it reads: the first, the last real one, or the mean of the real ones.

    Every other setting: see `OutputHead`.
    """

    kind: Literal["classification"] = "classification"
    pooling: Pooling = "first"


class MultiLabelHead(_WithLabels):
    """Any number of labels for each row. Labels (batch, labels), 0 or 1; binary cross-entropy.

    Args:
        labels: Their names.
        num_labels: How many there are, if they have none.
        pooling: Which positions it reads: the first, the last real one, or the mean of the real ones.

    Every other setting: see `OutputHead`.
    """

    kind: Literal["multi_label"] = "multi_label"
    pooling: Pooling = "first"


class TaggingHead(_WithLabels):
    """One class for each position. Labels (batch, seq), -100 where there is none; cross-entropy.

    Args:
        labels: The classes' names.
        num_labels: How many there are, if they have none.

    Every other setting: see `OutputHead`.
    """

    kind: Literal["tagging"] = "tagging"


class RegressionHead(OutputHead):
    """Numbers for each row. Labels (batch, targets), or (batch) for one; mean squared error.

    Args:
        num_targets: How many numbers.
        labels: Their names.
        pooling: Which positions it reads: the first, the last real one, or the mean of the real ones.

    Every other setting: see `OutputHead`.
    """

    kind: Literal["regression"] = "regression"
    num_targets: Size = 1
    labels: Labels = None
    pooling: Pooling = "first"

    def __init__(self, num_targets: int | None = None, **settings: Any) -> None:
        super().__init__(**_without_none(num_targets=num_targets), **settings)

    @model_validator(mode="after")
    def _name_each(self) -> "RegressionHead":
        if self.labels is not None and len(self.labels) != self.num_targets:
            raise ValueError(f"num_targets={self.num_targets}, and labels names {len(self.labels)}")
        return self


class MultipleChoiceHead(OutputHead):
    """One of several choices, each a row of its own. Labels (batch); cross-entropy.

    The model takes batch * choices rows, those of one example together; or its inputs with an axis for choices, token ids
    (batch, choices, seq) or images (batch, choices, channels, height, width), which are made rows on the way in.

    Args:
        num_choices: How many.
        pooling: Which positions it reads: the first, the last real one, or the mean of the real ones.

    Every other setting: see `OutputHead`.
    """

    kind: Literal["multiple_choice"] = "multiple_choice"
    num_choices: Size
    pooling: Pooling = "first"

    def __init__(self, num_choices: int | None = None, **settings: Any) -> None:
        super().__init__(**_without_none(num_choices=num_choices), **settings)


class QuestionAnsweringHead(OutputHead):
    """Where an answer starts and ends. Logits (batch, seq, 2); cross-entropy over positions.

    Labels (batch, 2), or `start_positions` and `end_positions` (batch) in the model's call. Positions beyond the sequence
    do not count. Settings: see `OutputHead`.
    """

    kind: Literal["question_answering"] = "question_answering"


class _LanguageHead(OutputHead):
    """A head with scores for each token of a vocabulary.

    The last layer's weight is that of the model's input embedding, read as the model runs and not owned: such a head is
    small, and does not train it. Before that layer it undoes invertible adapters of the embedding that are active.
    """

    has_vocabulary = True

    tied: Annotated[bool | str, Field(description="True, False, or the path of the embedding whose weight it reads")] = True
    vocab_size: Size | None = None
    bias: bool = False


class MaskedLMHead(_LanguageHead):
    """A masked language model: tokens of the vocabulary at each position. Labels (batch, seq), -100 where there is none.

    Args:
        tied: The last layer's weight is the input embedding's, read as the model runs; or the path of another embedding.
            False for a weight of its own.
        vocab_size: Tokens; as many as the input embedding has if not given.
        layers: Linear layers, the last one included, with a LayerNorm behind each but that.
        bias: The last layer has a bias of its own.

    Every other setting: see `OutputHead`.
    """

    kind: Literal["masked_lm"] = "masked_lm"
    layers: Depth = 2
    non_linearity: NonLinearity = "gelu"
    bias: bool = True


class CausalLMHead(_LanguageHead):
    """A causal language model: the next token at each position. Labels (batch, seq): the tokens themselves, shifted here.

    Args:
        tied: The last layer's weight is the input embedding's, read as the model runs; or the path of another embedding.
            False for a weight of its own.
        vocab_size: Tokens; as many as the input embedding has if not given.
        layers: Linear layers, the last one included, with a LayerNorm behind each but that.
        bias: The last layer has a bias of its own.

    Every other setting: see `OutputHead`.
    """

    kind: Literal["causal_lm"] = "causal_lm"
    non_linearity: NonLinearity = "gelu"


# By `kind`. A test holds that this names every one.
HEADS: tuple[type[HeadConfig], ...] = (
    OwnHead, CustomHead, ClassificationHead, MultiLabelHead, TaggingHead, RegressionHead, MultipleChoiceHead,
    QuestionAnsweringHead, MaskedLMHead, CausalLMHead,
)  # fmt: skip


def head_from(settings: Mapping[str, Any]) -> HeadConfig:
    """Return the head that a mapping with its kind describes, as in JSON.

    Raises:
        ConfigError: no such kind, or bad settings.
    """
    # e.g. {"own": OwnHead, "classification": ClassificationHead, …}
    kinds = {head.model_fields["kind"].default: head for head in HEADS}
    kind = settings.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"a head has a kind of {sorted(kinds)}; found {kind!r}")
    try:
        return kinds[kind](**settings)
    except TypeError as error:  # what no setting may be called, or a missing target
        raise ConfigError(f"a head of kind {kind!r} cannot be built: {error}") from error
