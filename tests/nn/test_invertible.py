import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adapterkit.errors import ConfigError
from adapterkit.nn.functional.non_linearities import NON_LINEARITIES
from adapterkit.nn.invertible import Coupling, CouplingKind, InvertibleAdapter
from adapterkit.nn.shared import share

BLOCKS: list[CouplingKind] = ["nice", "glow"]


def random_coupling(width: int, block: CouplingKind, *, dtype: torch.dtype = torch.float64, **options: Any) -> Coupling:
    coupling = Coupling(width, block=block, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.normal_(std=0.5)
    return coupling


def pair(coupling: Coupling) -> nn.ModuleList:
    """The modules of one adapter, with the coupling where the core puts it: a child of the first alone."""
    modules = nn.ModuleList([InvertibleAdapter("forward"), InvertibleAdapter("inverse")])
    share(coupling, modules, owner=modules[0])
    return modules


def network(c: Any, name: str, half: Tensor, activation: Any = torch.relu) -> Tensor:
    p = dict(c.named_parameters())
    inner = activation(half @ p[f"{name}_down_weight"].T + p[f"{name}_down_bias"])
    return inner @ p[f"{name}_up_weight"].T + p[f"{name}_up_bias"]


def by_formula(c: Coupling, e: Tensor) -> Tensor:
    """y of the paper."""
    half = c.width // 2
    e1, e2 = e[..., :half], e[..., half:]
    if c.block == "nice":
        y1 = e1 + network(c, "f", e2)
        return torch.cat((y1, e2 + network(c, "g", y1)), -1)
    out = network(c, "f", e2)
    y1 = e1 * out[..., :half].tanh().exp() + out[..., half:]
    out = network(c, "g", y1)
    rest = c.width - half
    return torch.cat((y1, e2 * out[..., :rest].tanh().exp() + out[..., rest:]), -1)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("width", [2, 3, 8, 9])
def test_forward_is_the_papers_formula(block: CouplingKind, width: int) -> None:
    c, e = random_coupling(width, block), torch.randn(2, 5, width, dtype=torch.float64)
    torch.testing.assert_close(e + c(e), by_formula(c, e))


@given(
    st.integers(2, 17),
    st.sampled_from(BLOCKS),
    st.sampled_from([0.5, 1.0, 2.0, 64.0]),
    st.sampled_from(["relu", "gelu", "tanh"]),
    st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_the_inverse_undoes_it(width: int, block: CouplingKind, factor: float, non_linearity: Any, size: float) -> None:
    c = random_coupling(width, block, reduction_factor=factor, non_linearity=non_linearity)
    e = size * torch.randn(3, 4, width, dtype=torch.float64)
    y, single, f = e + c(e), e.float(), copy.deepcopy(c).float()
    scale = max(1.0, y.abs().max().item())
    assert (y + c(y, inverse=True) - e).abs().max() <= 1e-12 * scale
    # In float32 no better than what it undoes is known: as far as the inverse moves where that is off by its rounding.
    rounding = torch.finfo(torch.float32).eps * scale
    off = y + rounding * torch.randn_like(y)
    moved = (off + c(off, inverse=True) - e).abs().max()
    y = single + f(single)
    assert (y + f(y, inverse=True) - single).abs().max() <= 4 * (moved + rounding)
    back = e + c(e, inverse=True)  # and the other way round
    assert (back + c(back) - e).abs().max() <= 1e-12 * max(1.0, back.abs().max().item())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("width", [2, 7, 64])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_new_one_changes_nothing_bit_for_bit(block: CouplingKind, width: int, inverse: bool) -> None:
    z = 1e3 * torch.randn(4, width)
    assert torch.equal(z + Coupling(width, block=block)(z, inverse=inverse), z)


@pytest.mark.parametrize("huge", [1e4, -1e4])
def test_no_scale_of_glow_leaves_its_bounds(huge: float) -> None:
    c = Coupling(2, block="glow", dtype=torch.float64)
    with torch.no_grad():
        c.f_up_bias[0] = c.g_up_bias[0] = huge
    z = torch.randn(50, 2, dtype=torch.float64)
    y = z + c(z)
    torch.testing.assert_close(y, z * torch.tensor(huge, dtype=torch.float64).sign().exp())
    torch.testing.assert_close(y + c(y, inverse=True), z)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_two_places_run_one_coupling_in_both_directions(block: CouplingKind) -> None:
    c = random_coupling(6, block)
    there, back = pair(c)
    z = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(there(z, z), c(z))
    assert torch.equal(back(z, z), c(z, inverse=True))
    assert there.compute_dtype is back.compute_dtype is torch.float64
    assert [name for name, _ in nn.ModuleList([there, back]).named_parameters()] == [
        f"0.shared.{name}" for name, _ in c.named_parameters()
    ]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_trains_from_a_new_one(block: CouplingKind) -> None:
    """After a first step, which moves the second layers alone."""
    c = Coupling(8, block=block, dtype=torch.float64)
    before = {name: parameter.detach().clone() for name, parameter in c.named_parameters()}
    optimizer = torch.optim.SGD(c.parameters(), lr=0.1)
    z = torch.randn(9, 8, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        (z + c(z) - z.roll(1, 0)).square().mean().backward()
        optimizer.step()
    assert not [name for name, parameter in c.named_parameters() if torch.equal(parameter, before[name])]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("inverse", [False, True])
def test_its_gradients_are_right(block: CouplingKind, inverse: bool) -> None:
    c = random_coupling(5, block, non_linearity="tanh")
    z = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, *_: c(z, inverse=inverse), (z, *c.parameters()))


@pytest.mark.parametrize(
    ("width", "factor", "block", "shapes"),
    [
        (8, 2.0, "nice", {"f_down_weight": (2, 4), "f_up_weight": (4, 2), "g_down_weight": (2, 4), "g_up_weight": (4, 2)}),
        (8, 1.0, "glow", {"f_down_weight": (4, 4), "f_up_weight": (8, 4), "g_down_weight": (4, 4), "g_up_weight": (8, 4)}),
        (7, 64.0, "glow", {"f_down_weight": (1, 4), "f_up_weight": (6, 1), "g_down_weight": (1, 3), "g_up_weight": (8, 1)}),
    ],
)
def test_each_network_reads_one_half_and_is_as_wide_as_the_reduction_factor_says(
    width: int, factor: float, block: CouplingKind, shapes: dict[str, tuple[int, ...]]
) -> None:
    c = Coupling(width, block=block, reduction_factor=factor)
    assert {name: tuple(p.shape) for name, p in c.named_parameters() if name.endswith("weight")} == shapes


def test_first_layers_are_kaiming_uniform_the_rest_zero() -> None:
    c = Coupling(800, reduction_factor=1)
    assert c.f_down_weight.std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.02)
    assert not any(p.any() for name, p in c.named_parameters() if not name.endswith("down_weight"))


@pytest.mark.parametrize("name", ["gelu", "tanh"])
def test_the_non_linearity_is_the_one_named(name: Any) -> None:
    c, e = random_coupling(4, "nice", non_linearity=name), torch.randn(3, 4, dtype=torch.float64)
    y1 = e[:, :2] + network(c, "f", e[:, 2:], NON_LINEARITIES[name])
    torch.testing.assert_close((e + c(e))[:, :2], y1)


@pytest.mark.parametrize("block", BLOCKS)
def test_copies_and_pickles_keep_one_coupling(block: CouplingKind) -> None:
    modules = pair(random_coupling(6, block))
    z = torch.randn(3, 6, dtype=torch.float64)
    for again in (copy.deepcopy(modules), pickle.loads(pickle.dumps(modules))):
        assert again[1].shared is again[0].shared is not modules[0].shared
        assert torch.equal(again[1](z, z), modules[1](z, z))


@pytest.mark.parametrize("block", BLOCKS)
def test_it_compiles_as_one_graph(block: CouplingKind) -> None:
    modules = pair(random_coupling(7, block))
    z = torch.randn(3, 7, dtype=torch.float64)

    def both(z: Tensor) -> Tensor:
        y = z + modules[0](z, z)
        return modules[1](y, y)

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="eager")(z), both(z))


@pytest.mark.parametrize("block", BLOCKS)
def test_it_computes_in_bfloat16_and_under_autocast(block: CouplingKind) -> None:
    c = random_coupling(8, block)
    z = torch.randn(5, 8, dtype=torch.float64)
    exact = c(z)
    single, half = copy.deepcopy(c).float(), copy.deepcopy(c).bfloat16()
    assert half.compute_dtype is torch.bfloat16
    tolerance = {"atol": 0.05 * exact.abs().max().item(), "rtol": 0.0, "check_dtype": False}
    torch.testing.assert_close(half(z.bfloat16()).double(), exact, **tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(single(z.float()).double(), exact, **tolerance)


def test_a_place_may_lie_on_another_device_than_the_coupling() -> None:
    _, back = pair(random_coupling(6, "glow", dtype=torch.float32))
    assert back(torch.empty(3, 6, device="meta"), torch.empty(0)).device.type == "meta"


def test_one_feature_has_no_halves() -> None:
    with pytest.raises(ConfigError, match="found a width of 1"):
        Coupling(1)
