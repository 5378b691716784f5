"""The attention of AdapterFusion."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Fusion"]


class Fusion(nn.Module):
    """Weigh what several adapters add at one place, for each token, by attention; the formula is at `FusionConfig`.

    Keys and values are linear in what the adapters add, so that Wk is applied to the query (score_i = u_i . Wk^T q) and Wv
    to the weighted sum: three products of matrices, however many adapters there are.

    Args:
        size: Features of the tensor at the site.
        query_size: Features of what the query reads; `size` if not given.
        query: Have a projection of the query.
        key: Have one of the keys.
        value: Have one of the values.
        value_init: "identity" or "normal".
        residual_before: Add x before the values' projection.
        temperature: Of the softmax.
        dropout: Probability of dropping a child at a token in training, in [0, 1).
        dtype: What the parameters are.

    Shape:
        q: (..., query), deltas: (..., children, hidden), x: (..., hidden)
        result: what is added (..., hidden), and the attention (..., children)

    Reference: Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2. The weights of Wv start at the identity, not near it;
    dropout is on the attention.
    """

    def __init__(
        self,
        size: int,
        *,
        query_size: int | None = None,
        query: bool = True,
        key: bool = True,
        value: bool = True,
        value_init: Literal["identity", "normal"] = "identity",
        residual_before: bool = False,
        temperature: float = 1.0,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.value_init, self.residual_before, self.dropout = value_init, residual_before, dropout

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype))

        self.query_weight = parameter(size, query_size or size) if query else None
        self.query_bias = parameter(size) if query else None
        self.key_weight = parameter(size, size) if key else None
        self.value_weight = parameter(size, size) if value else None
        # A buffer: it is saved, and a graph that was compiled need not be made anew when it changes.
        self.register_buffer("temperature", torch.full((), temperature, dtype=dtype or torch.get_default_dtype()))
        self.reset_parameters()

    temperature: Tensor

    def reset_parameters(self) -> None:
        """Initialise every parameter, from torch's current random generator."""
        for weight in (self.query_weight, self.key_weight, self.value_weight):
            if weight is not None:
                nn.init.normal_(weight, std=0.02)
        if self.query_bias is not None:
            nn.init.zeros_(self.query_bias)
        if self.value_weight is not None and self.value_init == "identity":
            nn.init.eye_(self.value_weight)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the fusion computes in."""
        return self.temperature.dtype

    def forward(self, q: Tensor, deltas: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to x, and the attention. Shape: see the class."""
        if self.query_weight is not None:
            q = F.linear(q, self.query_weight, self.query_bias)  # (..., hidden)
        if self.key_weight is not None:  # Wk^T q, in place of Wk u_i for each child
            q = q @ self.key_weight
        scores = (deltas @ q.unsqueeze(-1)).squeeze(-1)  # (..., children)
        attention = (scores / self.temperature).softmax(-1)
        weights = F.dropout(attention, self.dropout, self.training)
        mixed = (weights.unsqueeze(-2) @ deltas).squeeze(-2)  # (..., hidden)
        if self.residual_before:
            # Each child is weighed with x added to it, so x has the sum of the weights: 1, but for dropout.
            mixed = mixed + weights.sum(-1, keepdim=True) * x
        if self.value_weight is not None:
            mixed = F.linear(mixed, self.value_weight)
        # The site adds x to what is returned, and here it is in already.
        return (mixed - x if self.residual_before else mixed), attention

    def distance_to_identity(self) -> Tensor:
        """Return the squared distance of Wv to the identity; 0 without Wv. Shape: ()."""
        if self.value_weight is None:
            return self.temperature.new_zeros(())
        return (self.value_weight - torch.eye(len(self.value_weight), device=self.value_weight.device)).square().sum()
