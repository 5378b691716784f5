"""A linear layer with 8-bit weights that is no `nn.Linear`, described to adapterkit from a package of its own.

    model = nn.Sequential(Int8Linear.of(nn.Linear(8, 8)), nn.ReLU())
    ak.wrap(model).add("a", "lora", targets=["0"])      # as for an nn.Linear, without example inputs

What adapterkit needs is INT8_LINEAR, at the end. Finding by pattern and by role, attaching, freezing, saving and loading
are adapterkit's; merging is refused there, for an 8-bit weight cannot take a small change.
"""

import torch
from torch import Tensor, nn

from adapterkit.placement.hosts import HostShape, HostType, Projection

__all__ = ["INT8_LINEAR", "Int8Linear"]


class Int8Linear(nn.Module):
    """Multiply by a weight of 8-bit integers, each row with a scale of its own, and add a bias.

    There is no Parameter: the weight and its scale are buffers, as nothing trains them.

    Shape:
        input: (..., in); output: (..., out)
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """Return the nearest Int8Linear: each row's largest weight becomes 127 or -127."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1).clamp(min=1e-8) / 127
        layer.weight.copy_((linear.weight.detach() / scale[:, None]).round())
        layer.scale.copy_(scale)
        if linear.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the product. Shape: (..., out)."""
        y: Tensor = torch.ops.adapterkit_int8.linear(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@torch.library.custom_op("adapterkit_int8::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply x by the dequantised weight. A real package would call a kernel of its own."""
    return x @ (weight.to(x.dtype) * scale[:, None].to(x.dtype)).T


@_linear.register_fake
def _(x: Tensor, weight: Tensor, _scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
    weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]  # what `_keep` saved
    return gradient @ (weight.to(gradient.dtype) * scale[:, None].to(gradient.dtype)), None, None


# Adapters below this layer train through it, though it does not train itself.
_linear.register_autograd(_backward, setup_context=_keep)


INT8_LINEAR = HostType(
    classes=(Int8Linear,),
    # How wide its output and its input are: presets need no example inputs for that.
    shape=lambda layer: HostShape(layer.out_features, layer.in_features),
    # What its weight would look like if it were one tensor: (out, in), output features on axis 0.
    projection=lambda layer: Projection("linear", (layer.out_features, layer.in_features), 0, 1),
    # Which operator multiplies by it: roles such as @attention.q are found by products.
    products=("adapterkit_int8::linear",),
)
