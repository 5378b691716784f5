"""What a projection is: a module that multiplies its input by a weight, and the geometry of that product."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError

__all__ = [
    "Projection",
    "check_has_input",
    "convolve",
    "parameter_projection",
    "pointwise",
    "project",
    "projection_of",
    "random_input",
]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Projection:
    """A host's weight, and how the host multiplies its input by it.

    Args:
        kind: "linear", "conv" (1, 2 or 3 spatial axes), "embedding" (the input is ids, that is, one-hot rows), or
            "parameter": a weight (..., out, in) that is adapted in place; what is multiplied by it is not known.
        shape: The weight's shape.
        out_axis: The axis of the weight with the output features.
        in_axis: The axis with the input features (with groups: of one group).
        stride: Of a conv, one for each spatial axis.
        padding: Of a conv, one for each spatial axis, "same" or "valid".
        dilation: Of a conv, one for each spatial axis.
        groups: Of a conv.
        padding_mode: Of a conv: "zeros", "circular", "reflect" or "replicate".
        padding_idx: Of an embedding: the row that gets no gradient.
        max_norm: Of an embedding: rows longer than this are shortened in place as they are looked up.
        norm_type: Of an embedding: the p of that norm.
        scale_grad_by_freq: Of an embedding.
        sparse: Of an embedding: its gradients are sparse.
        has_own_forward: A subclass replaced torch's `forward`: it may do more than multiply (scaled embeddings do), so
            nothing may be merged into the weight without a trial.
    """

    kind: Literal["linear", "conv", "embedding", "parameter"]
    shape: tuple[int, ...]
    out_axis: int
    in_axis: int
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | Literal["same", "valid"] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: Literal["zeros", "circular", "reflect", "replicate"] = "zeros"
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False
    has_own_forward: bool = False

    @property
    def out_features(self) -> int:
        """Return the features, channels or embedding width of the output."""
        return self.shape[self.out_axis]

    @property
    def in_features(self) -> int:
        """Return the features or channels of the input, or the size of the vocabulary."""
        # A grouped conv's weight is (out, in / groups, *kernel).
        return self.shape[self.in_axis] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """Return the kernel of a conv, () for others."""
        return self.shape[2:] if self.kind == "conv" else ()

    @property
    def channel_axis(self) -> int:
        """Return the axis of the features in the output (and in an input that is no ids), from the end."""
        return -1 - len(self.kernel)

    @property
    def pads(self) -> list[int]:
        """Return a conv's padding as `F.pad` takes it: (before, after) for each spatial axis, the last axis first."""
        if self.padding == "valid":
            return [0, 0] * len(self.kernel)
        if self.padding == "same":
            # Of an odd total torch pads one more after than before.
            totals = [step * (size - 1) for step, size in zip(self.dilation, self.kernel, strict=True)]
            return [pad for total in reversed(totals) for pad in (total // 2, total - total // 2)]
        return [int(pad) for pad in reversed(self.padding) for _ in range(2)]


def projection_of(module: nn.Module) -> Projection | None:
    """Tell what kind of projection a module is; None if it is none that is known, or has no weight yet (lazy modules).

    Known are `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, `nn.Embedding`, their subclasses, and the `Conv1D` of
    transformers, which is a linear layer with its weight transposed (known by its name: transformers is not imported).
    """
    if isinstance(module._parameters.get("weight"), nn.UninitializedParameter):
        return None
    if isinstance(module, nn.Linear):
        return _linear(module)
    if isinstance(module, nn.Embedding):
        return _embedding(module)
    conv = next((kind for kind in _CONVS if isinstance(module, kind)), None)
    if conv is not None:
        return _conv(module, conv)
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf"):
        weight: Any = module.weight
        return Projection("linear", tuple(weight.shape), 1, 0)  # (in, out)
    return None


def _linear(module: nn.Linear) -> Projection:
    # From `_parameters`, not by attribute: a weight that is computed (parametrised, say) may move as it is read.
    weight = module._parameters.get("weight")
    # The weight of a quantised layer is packed: its shape says nothing.
    is_plain = weight is not None and weight.is_floating_point() and weight.dim() == 2  # axes
    shape = tuple(weight.shape) if weight is not None and is_plain else (module.out_features, module.in_features)
    return Projection("linear", shape, 0, 1, has_own_forward=_has_own_forward(module, nn.Linear))


def _embedding(module: nn.Embedding) -> Projection:
    weight = module._parameters.get("weight")
    shape = (module.num_embeddings, module.embedding_dim) if weight is None else tuple(weight.shape)
    return Projection(
        "embedding",
        shape,
        out_axis=1,
        in_axis=0,
        padding_idx=module.padding_idx,
        max_norm=module.max_norm,
        norm_type=module.norm_type,
        scale_grad_by_freq=module.scale_grad_by_freq,
        sparse=module.sparse,
        has_own_forward=_has_own_forward(module, nn.Embedding),
    )


def _conv(module: Any, kind: type[nn.Module]) -> Projection:
    weight = module._parameters.get("weight")
    sizes = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return Projection(
        "conv",
        sizes if weight is None else tuple(weight.shape),
        out_axis=0,
        in_axis=1,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
        has_own_forward=_has_own_forward(module, kind),
    )


def parameter_projection(shape: tuple[int, ...]) -> Projection:
    """Describe a bare Parameter (..., out, in) as a projection: one weight, or one for each index of the leading axes."""
    return Projection("parameter", tuple(shape), -2, -1)


def check_has_input(projection: Projection, **settings: Any) -> None:
    """Raise ConfigError if settings that act on a layer's input are given for a Parameter, whose input is not seen."""
    given = {name: value for name, value in settings.items() if value}
    if projection.kind == "parameter" and given:
        raise ConfigError(
            f"a Parameter is adapted in place, where there is no input: {given} cannot act on one of shape "
            f"{projection.shape}; leave it out there, or adapt a layer"
        )


def project(projection: Projection, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what torch's layer with this weight and bias returns.

    Shape: z (..., in) or (batch, in, *spatial) or ids (...); result (..., out) or (batch, out, *spatial).
    """
    if projection.kind == "conv":
        return convolve(projection, z, weight, bias)
    if projection.kind == "embedding":
        return F.embedding(z, weight)
    # -2 is the out axis of a Parameter. 1 is that of transformers' Conv1D, whose weight is (in, out).
    return F.linear(z, weight if projection.out_axis in (0, -2) else weight.t(), bias)


def random_input(projection: Projection, like: Tensor) -> Tensor:
    """Make some input of the host, the same each time, without drawing from torch's generator.

    Shape: (2, 3, in), (2, in, *spatial) or ids (6,).
    """
    draw = torch.Generator().manual_seed(0)
    if projection.kind == "embedding":
        return torch.randint(0, projection.in_features, (6,), generator=draw).to(like.device)
    shape: tuple[int, ...] = (2, 3, projection.in_features)
    if projection.kind == "conv":
        # As few positions as give an output of two: the kernel, spread by the dilation, and one stride more.
        steps = zip(projection.kernel, projection.dilation, projection.stride, strict=True)
        shape = (2, projection.in_features, *(step * (size - 1) + 1 + stride for size, step, stride in steps))
    return torch.randn(shape, generator=draw).to(like)


def convolve(projection: Projection, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve as the host does, by another weight. Shape: z (batch, in, *spatial), weight (any, in / groups, *kernel)."""
    padding: Any = projection.padding
    if projection.padding_mode != "zeros":  # torch's functions pad with zeros alone
        z, padding = F.pad(z, projection.pads, mode=projection.padding_mode), 0
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[len(projection.kernel) - 1]
    result: Tensor = function(z, weight, bias, projection.stride, padding, projection.dilation, projection.groups)
    return result


def pointwise(h: Tensor, weight: Tensor, *, spatial: int, groups: int) -> Tensor:
    """Run a convolution with a kernel of 1. Shape: h (batch, rank, *spatial), weight (out, rank / groups)."""
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    result: Tensor = function(h, weight[(...,) + (None,) * spatial], groups=groups)  # (out, rank / groups, 1, ...)
    return result


def _has_own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether the module's class replaced what torch's class computes."""
    # A conv's subclass may leave `forward` and replace `_conv_forward`, which that calls.
    names = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    return any(getattr(type(module), name) is not getattr(kind, name) for name in names)
