"""The tensors of an adapter as a file holds them: their names, and what identifies them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from ..errors import StoreError
from ..heads.spec import HeadSpec
from ..nn.twin import trained
from ..placement.spec import SiteSpec
from ..runtime.lookup import HeldModule, adapters_in
from ..structure.tracing.forward import outside_inference_mode

__all__ = ["digest_of", "dtype_name", "parse_tensors", "tensor_key", "tensors_of"]


def tensors_of(held: Sequence[HeldModule]) -> dict[str, Tensor]:
    """Copy the tensors of these modules, what several share once; map the name of each in the file to its copy."""
    tensors = {}
    saved: set[int] = set()
    for path, _, _, entry, module in held:
        # Further sites of a tied Parameter hold a stand-in without Parameters: what it stands for is saved.
        source = trained(module)
        if id(source) in saved:
            continue
        saved.add(id(source))  # with its first site: in a part of the model that may be a twin
        for tensor, value in source.state_dict().items():
            # A clone: the format has no tensors that share memory, and a head may tie two of its own.
            tensors[tensor_key(entry.spec, path, tensor)] = value.detach().cpu().contiguous().clone()
    return tensors


@outside_inference_mode()
def parse_tensors(content: bytes, source: Path) -> dict[str, Tensor]:
    """Read the bytes of a safetensors file: map the name of each tensor to it.

    Args:
        content: The bytes.
        source: Where they come from, for the message.

    Raises:
        StoreError: they are not safetensors.
    """
    try:
        # Copies: views into the file would keep all of it in memory, and lie at unaligned addresses.
        return {key: tensor.clone() for key, tensor in safetensors.torch.load(content).items()}
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise StoreError(f"the tensors in {str(source)!r} are not safetensors: {error}") from error


def digest_of(model: nn.Module, name: str) -> str:
    """Return the SHA-256 over an adapter's tensors, names, shapes and dtypes, without its heads.

    It is the same in every file of the adapter, whatever the adapter is called.
    """
    # No name of the adapter is among the keys, so the digest is the same whatever it is called.
    content = safetensors.torch.save(tensors_of([held for held, _ in adapters_in(model).sites(name)]))
    return hashlib.sha256(content).hexdigest()


def tensor_key(spec: SiteSpec | HeadSpec, path: str, tensor: str) -> str:
    """Return the name of a tensor in the file: under "sites", or of a head under "heads".

    Where an adapter may have several modules at a host, the name says which: of a union, of a Parameter, of a placement;
    a head on the output by the head's name, behind an "@".
    """
    if isinstance(spec, HeadSpec):
        # Module paths hold no "@": the name of a head on the output is never taken for a path.
        return f"heads/{path if spec.above is None else f'@{spec.config.name}'}/{tensor}"
    # e.g. "sites/h.0/down_weight", "sites/h.0.attn.c_proj/weight/lora_A" (of a Parameter), "sites/h.0.mlp/1/up_bias".
    which = [str(spec.member) if spec.member else "", *spec.parameters[:1], spec.tag]
    return "/".join(["sites", path, *(part for part in which if part), tensor])


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype as the manifest spells it: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
