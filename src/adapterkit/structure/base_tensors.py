"""The base model θ: its tensors, apart from what adapterkit added, and digests of their bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .paths import SITE

__all__ = ["base_parameters", "base_tensors", "digest", "owner_at", "parameter_at"]


# The integers that stand for the bits of an entry, by its size in bytes.
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


_CHUNK = 2**17  # words: small enough to stay in a processor's cache


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that the model had before `wrap`, with their names; tied ones once."""
    return ((name, p) for name, p in model.named_parameters() if SITE not in name.split("."))


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers that the model had before `wrap`, non-persistent buffers too."""
    yield from base_parameters(model)
    yield from ((name, b) for name, b in model.named_buffers() if SITE not in name.split("."))


def digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's bits: the same on every device, at about memory speed.

    The words of each chunk are summed, each with the weight of its position, and the sums are hashed. The weights 1, 3, 5,
    … are odd, so no change of one word is lost (sums are modulo 2**64), and distinct, so no exchange of two is.
    """
    tensor = tensor.detach()
    head = f"{tensor.dtype} {tuple(tensor.shape)}" if not is_lazy(tensor) else "not initialised"
    # Of tensors that have no bits to read here, dtype and shape must do.
    is_odd = tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided or tensor.is_nested
    if is_lazy(tensor) or is_odd or not tensor.numel():
        return head
    words = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    words = words.contiguous().flatten().view(_WORD[words.element_size()])
    weights = torch.arange(1, 2 * min(_CHUNK, words.numel()), 2, device=words.device)
    sums = [(chunk * weights[: chunk.numel()]).sum() for chunk in torch.split(words, _CHUNK)]
    try:
        numbers = torch.stack(sums).tolist()
    except RuntimeError:  # somebody's subclass is no list of numbers, though each of its numbers is one
        numbers = [total.item() for total in sums]
    return hashlib.sha256(f"{head} {numbers}".encode()).hexdigest()


def owner_at(host: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """Return the module that holds a Parameter, and the Parameter's name there; None for a module that is gone.

    Args:
        name: The Parameter's name from the host on, such as "out_proj.weight".
    """
    way, _, leaf = name.rpartition(".")
    owner: nn.Module | None = host
    for name_of_child in way.split(".") if way else ():
        owner = None if owner is None or name_of_child not in owner._modules else owner._modules[name_of_child]
    return owner, leaf


def parameter_at(host: nn.Module, name: str) -> nn.Parameter | None:
    """Return a Parameter by its name from the host on; None if there is none (any more)."""
    owner, leaf = owner_at(host, name)
    if owner is None or leaf not in owner._parameters:  # TorchScript's has no get
        return None
    return owner._parameters[leaf]
