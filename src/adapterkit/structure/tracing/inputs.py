"""Make tiny inputs for a model that nobody gave inputs for: from its config, its signature, its first layers.

They need not mean anything. They only have to run, so that the forward can be recorded: two rows of six random tokens do.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice, product
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...errors import CompatibilityError
from ..attributes import attribute
from ..hosts import described_projection, known_shape
from .forward import ExampleInputs, forward

__all__ = ["first_that_runs", "moved_to", "tiny_inputs"]

T = TypeVar("T")

# The sizes of inputs: rows, tokens of a text, samples of a waveform (one frame of wav2vec2), frames of a spectrum.
BATCH, TOKENS, SAMPLES, FRAMES = 2, 6, 400, 128
# How many inputs are tried for one list of arguments, and how many of those an error message tells of.
_COMBINATIONS, _TRIED = 24, 4
_MODALITIES = ("input_ids", "pixel_values", "input_features", "input_values")


def tiny_inputs(model: nn.Module) -> ExampleInputs:
    """Return inputs on which the model runs, on its device. Raises: see `first_that_runs`."""
    return first_that_runs(model, partial(forward, model))[0]


def first_that_runs(model: nn.Module, run: Callable[[ExampleInputs], T]) -> tuple[ExampleInputs, T]:
    """Return inputs on which the model runs, on its device, and what `run` returned for them.

    Tried in turn: the model's `dummy_inputs`; tensors for its `main_input_name` and for what its `forward` requires; those
    and the arguments that the model names in its errors; all that it takes of text, images and sound.

    Args:
        run: Runs the model once on the inputs that it is given, as `forward` does.

    Raises:
        CompatibilityError: none of them runs.
    """
    tried: dict[str, str] = {}
    for inputs in _candidates(model):
        try:
            return _completed(model, moved_to(inputs, model), run, tried)
        except CompatibilityError:  # the reason is in `tried`
            continue
    said = "; ".join(f"{shapes}: {error}" for shapes, error in list(tried.items())[:_TRIED])
    raise CompatibilityError(
        f"{type(model).__name__} does not run on any inputs made for it; give it some: "
        f"ak.wrap(model, example_inputs=batch). Tried: {said or 'nothing, for none could be made'}"
    )


def moved_to(inputs: ExampleInputs, model: nn.Module) -> ExampleInputs:
    """Return the inputs on the device of the model's first parameter; on the CPU if it has none."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, Mapping):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(value.to(device) if isinstance(value, Tensor) else value for value in inputs)
    return inputs.to(device)


def _completed(
    model: nn.Module, inputs: ExampleInputs, run: Callable[[ExampleInputs], T], tried: dict[str, str]
) -> tuple[ExampleInputs, T]:
    """Return the inputs, completed by arguments that the model names in its errors, and what `run` returned for them.

    Example: "You have to specify either decoder_input_ids or …" adds `decoder_input_ids`.

    Args:
        tried: Maps the shapes of inputs that failed to the error: added to here, for the message.

    Raises:
        CompatibilityError: the model does not run, and its error names no argument that could be made.
    """
    while True:
        try:
            return inputs, run(inputs)
        except CompatibilityError as error:
            said = str(error.__cause__)
            tried[_shapes(inputs)] = said[:120]
            missing = [n for n in _arguments(model) if n not in inputs and re.search(rf"\b{n}\b", said)]
            if not missing or not isinstance(inputs, Mapping):
                raise
            made = next(_alternatives(model, missing[0]), None)
            if made is None:
                raise
            inputs = moved_to({**inputs, missing[0]: made}, model)


def _candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield inputs to try, the likeliest first."""
    arguments = _arguments(model)
    asked = _asked_for(model)
    dummy = _dummy_inputs(model)
    if dummy is not None and set(asked) <= set(dummy):
        yield dummy
    known = [name for name in (*_MODALITIES, "decoder_input_ids") if name in arguments]
    for names in dict.fromkeys((tuple(asked), tuple(dict.fromkeys([*asked, *known])))):
        others_first = [list(_alternatives(model, name)) for name in reversed(names)]  # so the main input varies fastest
        for made in islice(product(*others_first), _COMBINATIONS if names else 0):
            yield {name: tensor.clone() for name, tensor in zip(reversed(names), made, strict=True)}


def _dummy_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Return what a Hugging Face model offers to be tried with; None if it offers nothing."""
    dummy = attribute(model, "dummy_inputs")  # other candidates follow, and if none runs the message tells of those
    return dict(dummy) if isinstance(dummy, Mapping) else None


def _arguments(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Map the name of each argument that `forward` takes by name to its description."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # one in C, or of TorchScript, shows no signature: then no inputs can be made
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in parameters.items() if p.kind in kinds}


def _asked_for(model: nn.Module) -> list[str]:
    """List the arguments to make: the model's main input and those that `forward` requires; else its first."""
    arguments = _arguments(model)
    required = [name for name, p in arguments.items() if p.default is inspect.Parameter.empty]
    main = attribute(model, "main_input_name")
    names = [main] if isinstance(main, str) and main in arguments and main not in required else []
    names += required
    if getattr(attribute(model, "config"), "is_encoder_decoder", False):
        names += [name for name in ("decoder_input_ids",) if name in arguments and name not in names]
    return names or list(arguments)[:1]


def _alternatives(model: nn.Module, name: str) -> Iterator[Tensor]:
    """Yield tensors that an argument may be, by its name, else by the model's first layers; the likeliest first."""
    if "mask" in name:
        yield torch.ones(BATCH, TOKENS, dtype=torch.long)
    elif name.endswith(("input_ids", "token_type_ids")) or name in ("idx", "tokens"):
        yield from _tokens(model)
    elif name in ("pixel_values", "images", "image", "img", "pixel_values_videos"):
        yield from _images(model)
    elif name in ("input_features", "mel", "spectrogram"):
        yield from _sound(model)
    elif name in ("input_values", "waveform", "audio"):
        yield _random(model, BATCH, SAMPLES)
        yield _random(model, BATCH, 1, SAMPLES)
        yield from _sound(model)
    elif name == "bbox":
        yield torch.zeros(BATCH, TOKENS, 4, dtype=torch.long)
    else:
        yield from _readings(model)


def _tokens(model: nn.Module) -> Iterator[Tensor]:
    """Yield token ids, (batch, seq), that end as the model's texts do; then (batch, choices, seq).

    Some models pool at the end-of-sequence token, and fail if there is none.
    """
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    said = _setting(model, "vocab_size")
    # Without any table two ids do: what fails on them would fail on more. It is told with the other candidates.
    rows = said if isinstance(said, int) and said in tables else (tables or [2])[0]
    ids = torch.randint(0, rows, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    end = getattr(attribute(model, "config"), "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < rows:
        ids[:, -1] = end
    yield ids
    yield ids[:, None].repeat(1, 2, 1)


def _images(model: nn.Module) -> Iterator[Tensor]:
    """Yield square images of sizes that the model may take, and videos of them."""
    # A model without a convolution cuts images into patches itself; most take three channels.
    channels = next((m.in_channels for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), 3)
    frames = _setting(model, "num_frames")
    for size in _image_sizes(model):
        if frames:
            yield _random(model, BATCH, frames, channels, size, size)
        yield _random(model, BATCH, channels, size, size)


def _sound(model: nn.Module) -> Iterator[Tensor]:
    """Yield spectra over time, (batch, bins, frames) and (batch, frames, bins)."""
    bins = _setting(model, "num_mel_bins") or 80
    positions = _setting(model, "max_source_positions")
    for frames in dict.fromkeys([*([2 * positions] if positions else []), _setting(model, "max_length") or FRAMES, FRAMES]):
        yield _random(model, BATCH, bins, frames)
        yield _random(model, BATCH, frames, bins)


def _readings(model: nn.Module) -> Iterator[Tensor]:
    """Yield what an argument with no telling name may be: tokens, an image, features; as the first layers suggest."""
    # In the order of definition, which is mostly that of running. A convolution or norm may sit behind another input, so
    # the search goes on after those, and ends at the first layer that leaves no doubt.
    for module in model.modules():
        match module:
            case nn.Embedding():
                yield from _tokens(model)
            case nn.Conv2d() | nn.Conv3d():
                yield from _images(model)
            case nn.Conv1d():
                yield _random(model, BATCH, module.in_channels, SAMPLES)
            case nn.Linear():
                yield _random(model, BATCH, TOKENS, module.in_features)
            case nn.MultiheadAttention():
                yield _random(model, BATCH, TOKENS, module.embed_dim)
            case nn.LayerNorm() | nn.RMSNorm():
                yield _random(model, BATCH, TOKENS, module.normalized_shape[-1])
            case _ if described_projection(module) is not None:  # a package's layer
                known = known_shape(module)
                if known is not None and known.input_width and known.axis == -1:
                    yield _random(model, BATCH, TOKENS, known.input_width)
            case _:
                continue
        if isinstance(module, (nn.Embedding, nn.Linear, nn.MultiheadAttention)):
            return


def _image_sizes(model: nn.Module) -> list[int]:
    """List the sides of square images to try: what the model says (in its config or attributes), then usual ones."""
    said = []
    for name in ("image_size", "img_size", "input_size"):
        said += [_setting(model, name), *(attribute(module, name) for module in model.modules())]
    sides = [size[0] if isinstance(size, (tuple, list)) and size else size for size in said]
    return list(dict.fromkeys([*(side for side in sides if isinstance(side, int) and 0 < side <= 1024), 224, 32, 64, 256]))


def _setting(model: nn.Module, name: str) -> Any:
    """Return a setting of the model's config or, failing that, of a config in it; None if there is none."""
    config = attribute(model, "config")
    inner = vars(config).values() if hasattr(config, "__dict__") else ()
    found = (attribute(holder, name) for holder in (config, *inner))
    return next((value for value in found if isinstance(value, (int, tuple, list))), None)


def _random(model: nn.Module, *shape: int) -> Tensor:
    """Return random numbers of this shape in the model's dtype, the same each time."""
    # Without parameters (a quantised model, whose weights are buffers) it computes in float32, as torch does.
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _shapes(inputs: ExampleInputs) -> str:
    """Describe inputs in a message: names and shapes."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {tuple(v.shape) if isinstance(v, Tensor) else v}" for name, v in inputs.items())
    return ", ".join(str(tuple(v.shape)) for v in ((inputs,) if isinstance(inputs, Tensor) else inputs))
