"""The Compacter: a bottleneck whose two projections are sums of Kronecker products of small factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .bottleneck import AnyBottleneck, BottleneckOptions
from .functional.phm import phm_linear
from .own_tensors import own_tensors

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

__all__ = ["CompacterAdapter", "CompacterInit", "SharedFactors"]

CompacterInit = Literal["lora", "compacter"]
Shapes = Mapping[str, tuple[int, ...]]

# Beside an up-projection that starts at zero the paper's 1e-4 would leave its gradient at 1e-9: it goes with the rule's
# square. From 0.1 on both Adam and plain gradient descent train from the first step.
RULE_STD: Mapping[CompacterInit, float] = {"lora": 0.1, "compacter": 1e-4}


class SharedFactors(nn.Module):
    """What all modules of one Compacter share: the rule, the factors of both projections, or both.

    Args:
        phm_dim: n, the number of Kronecker products in a sum, and the size of the rule.
        rule: Whether the rule is shared; one for both projections.
        sizes: (input, bottleneck, output) if the factors are shared: the widths of every site.
        rank: Inner width of a factorised block; None for whole blocks.
        init: As of `CompacterAdapter`.
        dtype: What the parameters are.

    Reference: Mahabadi et al. 2021, arXiv:2106.04647.
    """

    def __init__(
        self,
        phm_dim: int,
        *,
        rule: bool = True,
        sizes: tuple[int, int, int] | None = None,
        rank: int | None = 1,
        init: CompacterInit = "lora",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init = init
        shapes = {"rule": (phm_dim,) * 3} if rule else {}
        _register(self, {**shapes, **(_factor_shapes(phm_dim, sizes, rank) if sizes else {})}, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter as `init` says, from torch's current random generator."""
        for name, parameter in self.named_parameters():
            _init(name, parameter, self.init)


class CompacterAdapter(AnyBottleneck):
    """Compute what a Compacter adds to the tensor at its site: `AnyBottleneck`, with two PHM projections.

    Both projections are y = x W + b with W = sum_k kron(P_k, L_k R_k), k = 1 … n, where the rule P is (n, n, n), and of a
    projection from `input` to `output` features L is (n, input / n, rank) and R is (n, rank, output / n).

    Sizes that n does not divide are rounded up: the bottleneck gets that much wider; of the site, features that are not
    there read as zero and are not written.

    Args:
        output_size: Width of the tensor at the site, in features.
        bottleneck_size: Inner width, in features, rounded up to a multiple of `phm_dim`.
        phm_dim: n, above.
        rank: Inner width of a factorised block L_k R_k; None for whole blocks, as in Zhang et al.
        shared_rule: P is `self.shared.rule`, for both projections; otherwise each has one of its own.
        shared_factors: L and R are those in `self.shared`; what is left of its own are biases.
        init: "lora" (P normal, 0.1; L and R Glorot-uniform, but for the up-projection's R, zero: a new adapter is the
            identity) or "compacter" (the paper's: P normal, 0.0001; L and R Glorot-uniform; near the identity).
        dtype: What the parameters are.
        options: See `AnyBottleneck`.

    Attributes:
        shared: Set from outside, after construction, where something is shared.

    Shape:
        z: (..., input), x and the result: (..., output)

    Raises:
        ConfigError: phm_dim or rank is not positive.

    Reference: Mahabadi et al. 2021, arXiv:2106.04647; PHM: Zhang et al. 2021, arXiv:2102.08597. The up-projection starts
    at zero where the paper's is near zero.
    """

    shared: SharedFactors

    def __init__(
        self,
        output_size: int,
        bottleneck_size: int,
        *,
        phm_dim: int = 4,
        rank: int | None = 1,
        shared_rule: bool = True,
        shared_factors: bool = False,
        init: CompacterInit = "lora",
        dtype: torch.dtype | None = None,
        **options: Unpack[BottleneckOptions],
    ) -> None:
        if phm_dim < 1 or (rank is not None and rank < 1):
            raise ConfigError(f"phm_dim and rank must be positive; found phm_dim={phm_dim}, rank={rank}")
        super().__init__(output_size, phm_dim * -(-bottleneck_size // phm_dim), **options)  # rounded up: -(-10 // 4) is 3
        self.phm_dim, self.rank, self.init = phm_dim, rank, init
        self.shared_rule, self.shared_factors = shared_rule, shared_factors
        rules = {} if shared_rule else {"down_rule": (phm_dim,) * 3, "up_rule": (phm_dim,) * 3}
        sizes = self.input_size, self.bottleneck_size, output_size
        factors = {} if shared_factors else _factor_shapes(phm_dim, sizes, rank)
        biases = {"down_bias": (self.bottleneck_size,), "up_bias": (output_size,)}
        _register(self, {**rules, **factors, **biases}, dtype)
        self._add_options(dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter of its own as `init` says, from torch's current random generator."""
        self._reset(lambda name, parameter: _init(name, parameter, self.init))

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype that the adapter computes in."""
        return own_tensors(self)["up_bias"].dtype  # type: ignore[no-any-return]  # a tensor

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the delta for the site. Shape: z (..., input); x and result (..., output)."""
        return self._project(z) if self._is_plain else self._full_forward(z, x)

    def _project(self, h: Tensor) -> Tensor:
        return self._phm(self._activation(self._phm(h, "down")), "up")  # (..., input) -> (..., bottleneck) -> (..., output)

    def _phm(self, h: Tensor, which: Literal["down", "up"]) -> Tensor:
        """Apply the down- or the up-projection. Shape: (..., input) to (..., output), of the projection."""
        own = own_tensors(self)
        # Where nothing is shared, nobody sets `self.shared`.
        shared = own_tensors(self.shared) if self.shared_rule or self.shared_factors else own
        factors = shared if self.shared_factors else own
        rule = shared["rule"] if self.shared_rule else own[f"{which}_rule"]
        parts = ("blocks",) if self.rank is None else ("left", "right")
        bias = own[f"{which}_bias"]
        # What is shared lies where the first site does, and is of its dtype; this one may be on another device.
        tensors = [tensor.to(bias) for tensor in (rule, *(factors[f"{which}_{part}"] for part in parts))]
        return phm_linear(h, *tensors, bias=bias)


def _factor_shapes(n: int, sizes: tuple[int, int, int], rank: int | None) -> Shapes:
    """Map the name of each factor of both projections → its shape, for widths (input, bottleneck, output)."""
    read, inner, written = (-(-size // n) for size in sizes)  # rounded up: n need not divide a width
    if rank is None:
        return {"down_blocks": (n, read, inner), "up_blocks": (n, inner, written)}
    down = {"down_left": (n, read, rank), "down_right": (n, rank, inner)}
    return {**down, "up_left": (n, inner, rank), "up_right": (n, rank, written)}


def _register(module: nn.Module, shapes: Shapes, dtype: torch.dtype | None) -> None:
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))


def _init(name: str, parameter: nn.Parameter, init: CompacterInit) -> None:
    """Initialise a rule or a factor, or the weight of a gate."""
    if name.endswith("rule"):
        nn.init.normal_(parameter, std=RULE_STD[init])
    elif init == "lora" and name in ("up_right", "up_blocks"):
        nn.init.zeros_(parameter)
    else:
        # Glorot's bound for each of the n matrices; torch's own would take the first axis for one of features.
        bound = (6 / (parameter.shape[-2] + parameter.shape[-1])) ** 0.5
        nn.init.uniform_(parameter, -bound, bound)
