"""New heads: their modules, made as their settings say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, TargetError
from ..placement.match import match
from ..structure.paths import modules_by_path
from .config import (
    CausalLMHead,
    ClassificationHead,
    HeadConfig,
    MaskedLMHead,
    MultiLabelHead,
    MultipleChoiceHead,
    QuestionAnsweringHead,
    RegressionHead,
    TaggingHead,
)
from .losses import class_loss, label_loss, span_loss, target_loss
from .modules import ChoiceScorer, HeadLayers, RowScorer, TokenPredictor, TokenScorer
from .spec import HeadSpec

__all__ = ["VocabularySize", "build_head"]

# Makes a head's module of its settings and of a function that makes its layers for so many outputs.
Build = Callable[[Any, Callable[[int], HeadLayers]], nn.Module]

_BUILDS: dict[type[HeadConfig], Build] = {
    ClassificationHead: lambda head, layers: RowScorer(layers(head.size), class_loss, pooling=head.pooling),
    MultiLabelHead: lambda head, layers: RowScorer(layers(head.size), label_loss, pooling=head.pooling),
    TaggingHead: lambda head, layers: TokenScorer(layers(head.size), class_loss),
    RegressionHead: lambda head, layers: RowScorer(layers(head.num_targets), target_loss, pooling=head.pooling),
    MultipleChoiceHead: lambda head, layers: ChoiceScorer(layers(1), choices=head.num_choices, pooling=head.pooling),
    QuestionAnsweringHead: lambda _head, layers: TokenScorer(layers(2), span_loss),
}


def build_head(config: Any, spec: HeadSpec, vocabulary: int, dtype: torch.dtype) -> nn.Module:
    """Return the new module of a head that reads hidden states of the spec's width.

    Args:
        config: The head's settings.
        spec: What the head reads.
        vocabulary: Tokens that its logits are of, for a head with a vocabulary.
        dtype: Of its parameters.
    """
    # What `HeadLayers` and `TokenPredictor` take alike.
    settings = {name: getattr(config, name) for name in ("layers", "non_linearity", "dropout")}
    if config.has_vocabulary:
        return TokenPredictor(
            spec.width,
            vocabulary,
            **settings,
            is_tied=config.tied is not False,  # True, or the path of an embedding
            has_bias=config.bias,
            is_causal=isinstance(config, CausalLMHead),
            dtype=dtype,
        )

    def layers(outputs: int) -> HeadLayers:
        return HeadLayers(spec.width, outputs, **settings, dtype=dtype)

    return _BUILDS[type(config)](config, layers)


class VocabularySize:
    """The embedding that a head with a vocabulary reads, and how many tokens that knows."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def of(self, config: HeadConfig, width: int) -> tuple[str | None, int]:
        """Return the embedding's path, None where its weight is not read, and how many tokens it has; else (None, 0).

        Raises:
            TargetError: there is no such embedding, or it has another width.
            ConfigError: it knows another number of tokens.
        """
        if not isinstance(config, (MaskedLMHead, CausalLMHead)):
            return None, 0
        # Nothing is read of an embedding, so that the model need not have one.
        if config.tied is False and config.vocab_size is not None:
            return None, config.vocab_size
        path = self.embedding(config.tied if isinstance(config.tied, str) else None)
        # (vocabulary, width)
        weight: Any = getattr(self.model.get_submodule(path), "weight", None)
        if config.tied is False:
            return None, int(weight.shape[0])
        if weight.shape[1] != width:
            raise TargetError(
                f"the head {config.name!r} reads {width} features, and the embedding {path!r} has {weight.shape[1]}: they "
                "cannot share a weight. Give it tied=False"
            )
        if config.vocab_size not in (None, weight.shape[0]):
            raise ConfigError(
                f"vocab_size={config.vocab_size}, and the embedding {path!r}, whose weight the head reads, has "
                f"{weight.shape[0]}"
            )
        return path, int(weight.shape[0])

    def embedding(self, named: str | None) -> str:
        """Return the path of the model's input embedding, or of the one that is named. Raises TargetError."""
        modules = modules_by_path(self.model)
        there = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
        if named is not None:
            there = match(self.model, [named])
        elif hasattr(self.model, "get_input_embeddings"):  # of transformers
            model: Any = self.model
            try:
                module = model.get_input_embeddings()
            except (AttributeError, NotImplementedError):  # a model of images, say: its embeddings are looked at below
                module = None
            # None, where the model names no embedding, is none of its modules: then all embeddings are looked at.
            there = [path for path, other in modules.items() if other is module] or there
        # Several embeddings with one tied weight are one; of several weights (positions, token types) which is not plain.
        weights = {id(getattr(modules[path], "weight", None)): path for path in reversed(there)}
        if len(weights) != 1 or getattr(getattr(modules[there[0]], "weight", None), "ndim", 0) != 2:
            raise TargetError(
                f"a head with a vocabulary reads the weight of an embedding, and {type(self.model).__name__} has "
                f"{there or 'none'} that may be meant: name it with tied='…', or give vocab_size= and tied=False"
            )
        return there[0]  # the first of its names: of tied ones they lead to one weight
