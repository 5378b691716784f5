"""Keyword inputs for a model nobody made inputs for, by the names of its arguments and by what it says is missing."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .shrink import IMAGE, VOCAB, configs_in

__all__ = ["BATCH", "TOKENS", "completed", "inputs_that_run", "setting", "tensor_for"]

BATCH, TOKENS, SAMPLES, FRAMES = 2, 7, 800, 128
Inputs = dict[str, Any]


def inputs_that_run(model: nn.Module) -> Inputs:
    """Inputs on which the model runs.

    Raises:
        Exception: of the first try, where none runs.
    """
    first: Exception | None = None
    for inputs in _candidates(model):
        try:
            return completed(model, inputs)
        except Exception as error:  # whatever a model raises: the next inputs may do
            first = first or error
    raise first or ValueError("no inputs to try")


def completed(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs, with arguments that the model names in its errors added one by one until it runs."""
    while True:
        try:
            with torch.no_grad():
                model(**copy.deepcopy(inputs))
        except Exception as error:  # whatever a model raises
            named = [n for n in _arguments(model) if n not in inputs and re.search(rf"\b{n}\b", str(error), re.I)]
            if not named:
                raise
            inputs = {**inputs, named[0]: tensor_for(model, named[0])}
        else:
            return inputs


def _candidates(model: nn.Module) -> Iterator[Inputs]:
    """Inputs to try, the fewest first."""
    arguments = _arguments(model)
    main = getattr(model, "main_input_name", "input_ids")
    required = [n for n, p in arguments.items() if p.default is inspect.Parameter.empty]
    mains = [*([main] if main in arguments else []), *required]
    decoders = [n for n in ("decoder_input_ids",) if n in arguments]
    masks = [n for n in ("attention_mask",) if n in arguments and main == "input_ids"]
    known = [n for n in ("input_ids", "pixel_values", "input_features", "input_values", *decoders) if n in arguments]
    if any("grid" in name for name in arguments):
        yield from _patches(model, mains)
    for names in ([*mains, *decoders, *masks], [*mains, *decoders], mains, known, known[:2], [*known, *required]):
        inputs = {name: tensor_for(model, name) for name in dict.fromkeys(names)}
        yield inputs
        for name, tensor in inputs.items():  # audio features come either way round
            if name in ("input_features", "input_values") and tensor.dim() == 3:
                yield {**inputs, name: tensor.transpose(1, 2).contiguous()}
            elif name == "input_values":
                yield {**inputs, name: tensor[:, None]}
            elif name == "pixel_values" and tensor.dim() == 4 and (frames := setting(model.config, "num_frames", None)):
                yield {**inputs, name: torch.stack([tensor.roll(i, -1) for i in range(frames)], 1)}  # a video


def _patches(model: nn.Module, mains: list[str]) -> Iterator[Inputs]:
    """An image as its patches, side by side, and the grid that they lie on."""
    config = model.config
    side, channels = (
        setting(config, "patch_size", 8),
        setting(config, "in_channels", None) or setting(config, "num_channels", 3),
    )
    side = side[-1] if isinstance(side, (list, tuple)) else side
    depth = setting(config, "temporal_patch_size", None) or setting(config, "patch_temporal", 1)
    for frames in dict.fromkeys((depth, 1)):
        for columns in (3, 2):
            inputs = {name: tensor_for(model, name) for name in mains}
            for name in mains:
                if name in ("hidden_states", "pixel_values"):
                    inputs[name] = torch.randn(16, channels * frames * side**2, generator=torch.Generator().manual_seed(0))
                elif "grid" in name:
                    inputs[name] = torch.tensor([[1, 4, 4][-columns:]])
            yield inputs


def _arguments(model: nn.Module) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds}


def tensor_for(model: nn.Module, name: str) -> Tensor:
    """A tensor for an argument, by its name and the model's config."""
    draw = torch.Generator().manual_seed(0)
    config = model.config
    if "pixel" in name and "mask" not in name:
        return _image(model, name, draw)
    if name in ("input_values", "speech_inputs", "waveform", "audio_values", "audio"):
        return torch.randn(BATCH, SAMPLES, generator=draw)
    if name in ("input_features", "audio_features", "spectrogram"):
        length = 2 * (setting(config, "max_source_positions", None) or FRAMES // 2)
        bins = setting(config, "num_mel_bins", None) or setting(config, "feature_projection_input_dim", 80)
        return torch.randn(BATCH, bins, length, generator=draw)
    if "mask" in name:
        return torch.ones(BATCH, TOKENS, dtype=torch.long)
    if "bbox" in name:
        return torch.zeros(BATCH, TOKENS, 4, dtype=torch.long)
    if "grid_thw" in name:
        return torch.tensor([[1, 4, 4]])
    if name in ("hidden_states", "inputs_embeds", "query_embeds", "encoder_hidden_states"):
        return torch.randn(BATCH, TOKENS, setting(config, "hidden_size", 32), generator=draw)
    vocab = setting(config, "vocab_size", VOCAB)
    return torch.randint(5, max(vocab - 20, 6), (BATCH, TOKENS), generator=draw)


def _image(model: nn.Module, name: str, draw: torch.Generator) -> Tensor:
    """Shape: (batch, channels, height, width), for a video (batch, frames, channels, height, width)."""
    config = model.config
    size, channels = setting(config, "image_size", IMAGE), setting(config, "num_channels", 3)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frames = setting(config, "num_frames", None) if "video" in name or "video" in type(model).__name__.lower() else None
    return torch.randn(BATCH, *([frames] if frames else []), channels, height, width, generator=draw)


def setting(config: Any, name: str, default: Any) -> Any:
    """A setting of the config or, failing that, of one in it."""
    found = (getattr(each, name, None) for each in configs_in(config))
    return next((value for value in found if value is not None), default)
