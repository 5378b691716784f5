"""Settings of Compacters."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ..modules.compacter import CompacterInit
from ..ops.activations import NonLinearity
from .base import Int, Size
from .bottleneck import AnyBottleneckConfig

__all__ = ["CompacterConfig"]


class CompacterConfig(AnyBottleneckConfig):
    """A bottleneck whose projections are sums of Kronecker products: W = sum_k kron(P_k, L_k R_k), k = 1 … phm_dim.

    P, the rule, is (phm_dim, phm_dim, phm_dim) and shared; a projection's own are L (phm_dim, in / phm_dim, phm_rank), R
    (phm_dim, phm_rank, out / phm_dim) and its bias. Sizes that phm_dim does not divide are rounded up: the bottleneck is
    that much wider, and of the site, features that are not there read as zero and are not written.

    Args:
        reduction_factor: As of `BottleneckConfig`, but 32 if neither this nor `bottleneck_size` is given.
        non_linearity: The function in the middle.
        phm_dim: Number of Kronecker products in a sum, and the size of the rule.
        phm_rank: Inner width of a block L_k R_k. None: blocks that are not factorised.
        shared_rule: One rule for both projections of every site; otherwise each projection has its own.
        shared_factors: L and R are the same at every site, too, whose widths must then be equal; biases are not.
        init: "lora" (rule normal, 0.1; L and R Glorot-uniform, but the up-projection's R zero: a new adapter is the
            identity) or "compacter" (the paper's: rule normal, 0.0001; L and R Glorot-uniform: near the identity).

    Every other setting: see `BottleneckConfig`. The paper trains the host's layer norms as well: put norm tuning beside it
    in a union for that.

    Reference: Mahabadi et al. 2021, arXiv:2106.04647; PHM: Zhang et al. 2021, arXiv:2102.08597.
    """

    default_reduction_factor: ClassVar[float] = 32.0

    method: Literal["compacter"] = "compacter"
    non_linearity: NonLinearity = "gelu"
    phm_dim: Annotated[Int, Field(ge=1, le=256)] = 4
    phm_rank: Size | None = 1
    shared_rule: bool = True
    shared_factors: bool = False
    init: CompacterInit = "lora"
