"""The bottleneck as plain functions: the definition, beside which a faster kernel can stand.

With `z` what an adapter reads, `x` the tensor at its site, `norm_b` and `norm_a` its own layer norms (where there are any):

    branch = gate(z) * dropout(scaling * drop_path(up(act(down(norm_b(z))))))
    delta  = norm_a(branch)                  and the site becomes x + delta, or
    delta  = norm_a(x + branch) - x          with `residual_before_norm`

Reference: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; Pfeiffer et al. 2020, arXiv:2005.00247; gating: Mao et al.
2022, arXiv:2110.07577; scaling: He et al. 2022, arXiv:2110.04366; stochastic depth (drop_path) and channel scaling: Steitz
and Roth 2024, arXiv:2406.06820.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["bottleneck", "drop_rows", "full_bottleneck", "row_gate"]

Affine = tuple[Tensor, Tensor]
"""Weight and bias of a layer norm, or of a linear layer."""


def bottleneck(z: Tensor, down: Affine, up: Affine, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Return up(act(down(z))): a bottleneck without options.

    Args:
        down: Weight (bottleneck, input) and bias (bottleneck,).
        up: Weight (output, bottleneck) and bias (output,).
        act: The elementwise function in the middle.

    Shape: z (..., input), result (..., output).
    """
    return F.linear(act(F.linear(z, *down)), *up)


def full_bottleneck(
    z: Tensor,
    x: Tensor,
    project: Callable[[Tensor], Tensor],
    *,
    norm_before: Affine | None = None,
    norm_after: Affine | None = None,
    residual_before_norm: bool = False,
    scaling: float | Tensor = 1.0,
    gate: Affine | None = None,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    batch_axis: int = 0,
    training: bool = False,
) -> Tensor:
    """Return the delta of a bottleneck with every option; the formula stands at the top of this file.

    Args:
        project: The two projections and what is between them: (..., input) to (..., output).
        norm_before: Of a layer norm over what is read, weight and bias (input,).
        norm_after: Of a layer norm over what is added, weight and bias (output,).
        residual_before_norm: That norm sees x + branch, not the branch alone.
        scaling: A number, or a tensor (1,) or (output,).
        gate: Of a gate for each row, weight (1, input) and bias (1,).
        dropout: Probability of dropping an output feature in training.
        stochastic_depth: Probability of dropping a row's whole branch in training.
        batch_axis: The axis of the rows, for the gate and stochastic depth.
        training: Whether anything is dropped.

    Shape: z (..., input); x and the result (..., output).
    """
    h = z if norm_before is None else F.layer_norm(z, z.shape[-1:], *norm_before)
    branch = project(h)
    if stochastic_depth and training:
        branch = drop_rows(branch, stochastic_depth, batch_axis)
    branch = branch * scaling
    if dropout:
        branch = F.dropout(branch, dropout, training)
    if gate is not None:
        branch = branch * row_gate(z, gate, batch_axis)  # it reads z itself, before the norm
    if norm_after is None:
        return branch
    if residual_before_norm:
        return F.layer_norm(x + branch, x.shape[-1:], *norm_after) - x
    return F.layer_norm(branch, x.shape[-1:], *norm_after)


def drop_rows(branch: Tensor, probability: float, batch_axis: int) -> Tensor:
    """Drop the branch of some rows, and scale the others up so that the mean stays. Shape: any, both the same."""
    keep = 1.0 - probability
    shape = [size if axis == batch_axis else 1 for axis, size in enumerate(branch.shape)]  # (batch, 1, ...): one draw a row
    kept = torch.rand(shape, device=branch.device) < keep
    return branch * kept / keep


def row_gate(z: Tensor, gate: Affine, batch_axis: int) -> Tensor:
    """Return the gate of each row, in (0, 1): the mean over its tokens of sigmoid(w z + b).

    Shape: z (..., input); the result has z's axes, of size 1 but for that of the rows.
    """
    values = torch.sigmoid(F.linear(z, *gate))  # (batch, ..., 1)
    tokens = [axis for axis in range(values.dim() - 1) if axis != batch_axis]
    # Without an axis of tokens there is nothing to take a mean of; dim=[] would take it over all axes.
    return values.mean(dim=tokens, keepdim=True) if tokens else values
