"""Tiny inputs for a model nobody gave inputs for: from what it says of itself, else from its signature and first layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CompatibilityError
from .trace import ExampleInputs, forward

__all__ = ["moved_to", "tiny_inputs"]

BATCH, TOKENS, FRAMES = 2, 6, 400
_IMAGE = ("pixel_values", "images", "image", "img")


def tiny_inputs(model: nn.Module) -> ExampleInputs:
    """Inputs on which the model runs, on its device.

    Tried in turn: the model's `dummy_inputs`; tensors for its `main_input_name` and for what its `forward` requires.

    Raises:
        CompatibilityError: none of them runs.
    """
    tried = []
    for inputs in _candidates(model):
        try:
            forward(model, inputs)
        except CompatibilityError as error:
            tried.append(f"{_shapes(inputs)}: {str(error.__cause__)[:120]}")
        else:
            return inputs
    raise CompatibilityError(
        f"{type(model).__name__} does not run on any inputs made for it ({'; '.join(tried) or 'none could be made'}); "
        "give it some: ak.wrap(model, example_inputs=batch)"
    )


def moved_to(inputs: ExampleInputs, model: nn.Module) -> ExampleInputs:
    """The inputs on the device of the model's first parameter."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, Mapping):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(value.to(device) if isinstance(value, Tensor) else value for value in inputs)
    return inputs.to(device)


def _candidates(model: nn.Module) -> Iterator[ExampleInputs]:
    """Inputs to try, the likeliest first."""
    names = _asked_for(model)
    dummy = _dummy_inputs(model)
    if dummy is not None and set(names) <= set(dummy):
        yield moved_to(dummy, model)
    for made in _made(model, names):
        yield moved_to(made, model)


def _dummy_inputs(model: nn.Module) -> dict[str, Any] | None:
    """What a Hugging Face model offers to be tried with, as far as it is tensors."""
    try:
        dummy = getattr(model, "dummy_inputs", None)
    except Exception:  # a property of someone else's class
        return None
    return dict(dummy) if isinstance(dummy, Mapping) else None


def _asked_for(model: nn.Module) -> list[str]:
    """The arguments to make: those that `forward` requires, and the model's main input."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = [name for name, p in parameters.items() if p.kind in kinds]
    required = [name for name in takes if parameters[name].default is inspect.Parameter.empty]
    main = getattr(model, "main_input_name", None)
    names = [main] if isinstance(main, str) and main in takes and main not in required else []
    names += required
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "input_ids" in names:
        names += [name for name in ("decoder_input_ids",) if name in takes and name not in names]
    return names or takes[:1]


def _made(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor] | tuple[Tensor, ...]]:
    """Tensors for these arguments, with every reading of an ambiguous one."""
    if not names:
        return
    for reading in _readings(model):
        made = {name: _for_name(model, name, reading) for name in names}
        if all(tensor is not None for tensor in made.values()):
            yield {name: tensor for name, tensor in made.items() if tensor is not None}


def _readings(model: nn.Module) -> Iterator[Tensor]:
    """What an argument with no telling name may be: tokens, an image, features; as the first layers suggest."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    draw = torch.Generator().manual_seed(0)
    for module in model.modules():
        match module:
            case nn.Embedding():
                yield torch.randint(0, module.num_embeddings, (BATCH, TOKENS), generator=draw)
            case nn.Conv2d():
                for size in _image_sizes(model):
                    yield torch.randn(BATCH, module.in_channels, size, size, generator=draw).to(dtype)
            case nn.Conv1d():
                yield torch.randn(BATCH, module.in_channels, FRAMES, generator=draw).to(dtype)
            case nn.Linear():
                yield torch.randn(BATCH, TOKENS, module.in_features, generator=draw).to(dtype)
            case nn.MultiheadAttention():
                yield torch.randn(BATCH, TOKENS, module.embed_dim, generator=draw).to(dtype)
            case nn.LayerNorm():
                yield torch.randn(BATCH, TOKENS, module.normalized_shape[-1], generator=draw).to(dtype)
            case _:
                continue
        if isinstance(module, (nn.Embedding, nn.Linear, nn.MultiheadAttention)):
            return


def _image_sizes(model: nn.Module) -> list[int]:
    """Sides of a square image to try: what the model says (its config or attributes), else usual ones."""
    said = []
    for holder in (getattr(model, "config", None), *model.modules()):
        for name in ("image_size", "img_size", "input_size"):
            size = getattr(holder, name, None)
            side = size[0] if isinstance(size, (tuple, list)) and size else size
            if isinstance(side, int) and 0 < side <= 1024:
                said.append(side)
    return list(dict.fromkeys([*said, 224, 32, 64, 256]))


def _for_name(model: nn.Module, name: str, reading: Tensor) -> Tensor | None:
    """A tensor for an argument with this name; the reading where the name tells nothing."""
    if "mask" in name:
        return torch.ones(BATCH, TOKENS, dtype=torch.long)
    if name.endswith(("input_ids", "token_type_ids")) or name in ("idx", "tokens"):
        rows = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)
        return torch.randint(0, rows, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    if name in _IMAGE and reading.dim() != 4:
        return None
    return reading.clone()


def _shapes(inputs: ExampleInputs) -> str:
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {tuple(v.shape) if isinstance(v, Tensor) else v}" for name, v in inputs.items())
    return ", ".join(str(tuple(v.shape)) for v in ((inputs,) if isinstance(inputs, Tensor) else inputs))
