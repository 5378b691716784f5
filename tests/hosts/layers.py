"""What the tests of weight methods share: random projections, and the few lines that the hooks will do."""

from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from adapterkit.nn.functional.projections import Projection, projection_of


class Conv1D(nn.Module):
    """The layer of transformers' GPT-2: linear, with its weight (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 4), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Adapted(nn.Module):
    """A host called with the adapter at it, as one module."""

    def __init__(self, host: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.host, self.module = host, module

    def forward(self, z: Tensor) -> Tensor:
        return run(self.host, self.module, z)


def run(host: nn.Module, module: Any, z: Tensor) -> Tensor:
    """The host's output with the adapter's delta. Shape: z (..., in) or ids, result (..., out)."""
    x = host(z)
    delta = module(z.to(module.compute_dtype) if z.is_floating_point() else z, x, host)
    assert delta.shape == x.shape
    return x + delta.to(x.dtype)


def tensors(host: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The host's weight and bias, as `merged` takes them."""
    return {name: parameter.detach().to(dtype) for name, parameter in host.named_parameters(recurse=False)}


def run_merged(host: nn.Module, module: Any, z: Tensor) -> Tensor:
    """The host's output with the adapter merged into its tensors."""
    merged = module.merged(tensors(host, module.compute_dtype))
    dtypes = {name: p.dtype for name, p in host.named_parameters()}
    return torch.func.functional_call(host, {name: t.to(dtypes[name]) for name, t in merged.items()}, (z,))


def geometry(host: nn.Module) -> Projection:
    projection = projection_of(host)
    assert projection is not None
    return projection


def randomise(module: nn.Module) -> None:
    """Random values for every parameter, so that the adapter does something."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 3)


def some_input(host: nn.Module, *lead: int, size: int = 9) -> Tensor:
    """Random input for a host, (*lead, in), (2, in, *size) or ids; float64 as its weight is."""
    p = geometry(host)
    if p.kind == "embedding":
        return torch.randint(0, p.in_features, lead or (2, 5))
    shape = (
        (2, p.in_features, *(size + n for n in range(len(p.kernel)))) if p.kernel else (*(lead or (2, 5)), p.in_features)
    )
    return torch.randn(shape, dtype=host.weight.dtype)


def layer(name: str) -> nn.Module:
    """One host of each kind, with a bias that is not zero."""
    made: dict[str, Any] = {
        "linear": lambda: nn.Linear(6, 9),
        "Conv1D": lambda: Conv1D(9, 6),
        "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
        "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2)),
        "conv3d": lambda: nn.Conv3d(2, 3, 2, padding=1),
        "grouped": lambda: nn.Conv2d(6, 9, 3, groups=3, padding="same", padding_mode="circular"),
        "depthwise": lambda: nn.Conv1d(6, 6, 3, groups=6),
        "embedding": lambda: nn.Embedding(11, 6, padding_idx=2),
    }
    return made[name]()


LAYERS = ["linear", "Conv1D", "conv1d", "conv2d", "conv3d", "grouped", "depthwise", "embedding"]


@st.composite
def convs(draw: st.DrawFn) -> nn.Module:
    """A conv of any geometry, in float64, with a bias or none."""
    axes = draw(st.integers(1, 3))

    def each(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(st.tuples(*[values] * axes)))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    padding = each(st.integers(0, 2)) if padding == "numbers" else padding
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        each(st.integers(1, 3)),
        stride=1 if padding == "same" else each(st.integers(1, 3)),
        padding=padding,
        dilation=each(st.integers(1, 2)),
        groups=groups,
        padding_mode=mode,
        bias=draw(st.booleans()),
        dtype=torch.float64,
    )


@st.composite
def parts_of(draw: st.DrawFn, width: int) -> tuple[tuple[str, tuple[tuple[int, int], ...]], ...]:
    """One to three parts of an axis, in pieces, not in order, with gaps."""
    cuts = sorted(draw(st.sets(st.integers(0, width), min_size=2)))
    ranges = list(pairwise(cuts))
    owners = draw(st.lists(st.integers(-1, 2), min_size=len(ranges), max_size=len(ranges)).filter(lambda o: max(o) >= 0))
    order = draw(st.permutations(range(3)))
    found = [(f"part {n}", tuple(r for r, o in zip(ranges, owners, strict=True) if o == n)) for n in order]
    return tuple((name, pieces) for name, pieces in found if pieces)


def exact(a: Tensor, b: Tensor) -> None:
    """Equal, to the rounding of the dtype."""
    tolerance = 1e-12 if a.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
