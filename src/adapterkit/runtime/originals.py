"""The base model θ: its tensors, apart from what adapterkit added, and their digests."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..placement.patterns import SITE
from .site import originals_of

__all__ = ["base_digests", "base_parameters", "base_tensors", "digest", "fingerprint"]

_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**17  # words: small enough to stay in a processor's cache


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the model had before `wrap`, with their names; tied ones once."""
    return ((name, p) for name, p in model.named_parameters() if SITE not in name.split("."))


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that the model had before `wrap`, non-persistent buffers too."""
    yield from base_parameters(model)
    yield from ((name, b) for name, b in model.named_buffers() if SITE not in name.split("."))


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's bits, the same on every device, at about memory speed.

    The words of each chunk are summed with a weight for each place (odd, so that no change of one word is lost; distinct,
    so that no exchange of two is), and the sums are hashed.
    """
    tensor = tensor.detach()
    head = f"{tensor.dtype} {tuple(tensor.shape)}" if not is_lazy(tensor) else "not initialised"
    if is_lazy(tensor) or tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided or not tensor.numel():
        return head
    words = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    words = words.contiguous().flatten().view(_WORD[words.element_size()])
    weights = torch.arange(1, 2 * min(_CHUNK, words.numel()), 2, device=words.device)
    sums = [(chunk * weights[: chunk.numel()]).sum() for chunk in torch.split(words, _CHUNK)]
    return hashlib.sha256(f"{head} {torch.stack(sums).tolist()}".encode()).hexdigest()


def base_digests(model: nn.Module) -> dict[str, str]:
    """The digest of each base tensor by name; of weights into which adapters are merged, that of the original."""
    originals = originals_of(model)
    return {name: digest(originals.get(id(tensor), tensor)) for name, tensor in base_tensors(model)}


def fingerprint(model: nn.Module) -> str:
    """A digest of all base parameters: which weights these are, whatever the model is called, merged or not."""
    originals = originals_of(model)
    lines = (f"{name} {digest(originals.get(id(p), p))}" for name, p in base_parameters(model))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
