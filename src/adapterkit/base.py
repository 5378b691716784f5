"""The base model θ: its tensors, apart from what adapterkit added, and their digests."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .patterns import SITE

__all__ = ["base_parameters", "base_tensors", "digest", "fingerprint"]

_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES = 64


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the model had before `wrap`, with their names; tied ones once."""
    return ((name, p) for name, p in model.named_parameters() if SITE not in name.split("."))


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that the model had before `wrap`, non-persistent buffers too."""
    yield from base_parameters(model)
    yield from ((name, b) for name, b in model.named_buffers() if SITE not in name.split("."))


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's bits: one pass at memory speed, on whatever device it is.

    The sum of all its words, which any change of values moves, and a sample of them, which a change of order does.
    """
    tensor = tensor.detach()
    head = f"{tensor.dtype} {tuple(tensor.shape)}"
    if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided or not tensor.numel():
        return head
    words = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    words = words.contiguous().view(_WORD[words.element_size()]).flatten()
    step = max(1, words.numel() // _SAMPLES)
    total, sample = int(words.sum(dtype=torch.int64)), words[::step][:_SAMPLES].tolist()
    return hashlib.sha256(f"{head} {total} {sample}".encode()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A digest of all base parameters: which weights these are, whatever the model is called."""
    lines = (f"{name} {digest(p)}" for name, p in base_parameters(model))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
