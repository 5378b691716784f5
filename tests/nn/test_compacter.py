import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adapterkit.errors import ConfigError
from adapterkit.nn.compacter import CompacterAdapter, SharedFactors
from adapterkit.nn.functional.non_linearities import NON_LINEARITIES
from adapterkit.nn.shared import share

KINDS: list[dict[str, Any]] = [
    {},
    {"shared_rule": False},
    {"rank": 2},
    {"rank": None},
    {"shared_factors": True},
    {"shared_factors": True, "shared_rule": False, "rank": None},
]


def compacters(
    *widths: int, size: int = 4, phm_dim: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> nn.ModuleList:
    """The modules of one adapter, with what they share where the core puts it: a child of the first alone."""
    torch.manual_seed(seed)
    module_options = {"non_linearity": "gelu", **options}
    rank, init = options.get("rank", 1), options.get("init", "lora")
    rule, factors = options.get("shared_rule", True), options.get("shared_factors", False)
    shared = SharedFactors(
        phm_dim, rule=rule, sizes=(widths[0], size, widths[0]) if factors else None, rank=rank, init=init, dtype=dtype
    )
    modules = [CompacterAdapter(width, size, phm_dim=phm_dim, dtype=dtype, **module_options) for width in widths]
    if rule or factors:
        share(shared, modules, owner=modules[0])
    return nn.ModuleList(modules)


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def weight(a: Any, which: str) -> Tensor:
    """W of y = x W + b, by the paper's formula."""
    rule = a.shared.rule if a.shared_rule else getattr(a, f"{which}_rule")
    factors = a.shared if a.shared_factors else a
    if a.rank is None:
        blocks = getattr(factors, f"{which}_blocks")
    else:
        blocks = torch.stack(
            [
                left @ right
                for left, right in zip(getattr(factors, f"{which}_left"), getattr(factors, f"{which}_right"), strict=True)
            ]
        )
    return sum(torch.kron(p, block) for p, block in zip(rule, blocks, strict=True))  # type: ignore[return-value]  # not empty


def branch(a: Any, z: Tensor) -> Tensor:
    """The delta of a plain one, with surplus features of the site zero and not written."""
    down, up = weight(a, "down"), weight(a, "up")
    h = nn.functional.gelu(z @ down[: z.shape[-1]] + a.down_bias)
    return (h @ up)[..., : a.output_size] + a.up_bias


@pytest.mark.parametrize("width", [8, 7, 48, 45, 1])
@pytest.mark.parametrize("options", KINDS)
def test_the_delta_is_down_non_linearity_up_by_the_papers_formula(width: int, options: dict[str, Any]) -> None:
    (a,) = randomise(compacters(width, **options))
    z = torch.randn(2, 3, width, dtype=torch.float64)
    torch.testing.assert_close(a(z, z), branch(a, z))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_sizes_that_phm_dim_does_not_divide_are_rounded_up(width: int, reads: int, size: int, n: int) -> None:
    a = CompacterAdapter(width, size, input_size=reads, phm_dim=n, shared_rule=False, dtype=torch.float64)
    assert a.bottleneck_size % n == 0
    assert 0 <= a.bottleneck_size - size < n
    assert a.down_left.shape == (n, -(-reads // n), 1)
    assert a.up_right.shape == (n, 1, -(-width // n))
    z, x = torch.randn(3, reads, dtype=torch.float64), torch.randn(3, width, dtype=torch.float64)
    assert a(z, x).shape == x.shape


@pytest.mark.parametrize("options", KINDS)
def test_a_new_one_adds_nothing_bit_for_bit(options: dict[str, Any]) -> None:
    x = torch.randn(2, 7)
    for a in compacters(7, 7, dtype=torch.float32, **options):
        assert torch.equal(a(x, x), torch.zeros(2, 7))


@pytest.mark.parametrize("options", KINDS)
def test_the_papers_init_starts_near_the_identity(options: dict[str, Any]) -> None:
    a = compacters(64, size=8, phm_dim=4, init="compacter", **options)[0]
    delta = a(torch.randn(9, 64, dtype=torch.float64), torch.empty(9, 64))
    assert 0 < delta.abs().max() < 1e-5


@pytest.mark.parametrize("options", KINDS)
def test_every_parameter_trains_from_a_new_one(options: dict[str, Any]) -> None:
    """After a first step, which moves the zero factor alone."""
    modules = compacters(8, 8, **options)
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in modules.named_parameters()}
    z = torch.randn(5, 8, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        (sum(a(z, z) for a in modules) - z).square().sum().backward()
        optimizer.step()
    assert not [name for name, parameter in modules.named_parameters() if torch.equal(parameter, before[name])]


def test_inits_follow_their_distributions() -> None:
    a, b = (compacters(400, size=40, phm_dim=20, rank=10, init=init)[0] for init in ("lora", "compacter"))
    assert a.shared.rule.std().item() == pytest.approx(0.1, rel=0.05)
    assert b.shared.rule.std().item() == pytest.approx(1e-4, rel=0.05)
    assert not a.up_right.any()
    for left, shape in ((a.down_left, (20, 20, 10)), (b.down_left, (20, 20, 10)), (b.up_right, (20, 10, 20))):
        assert left.shape == shape
        bound = (6 / 30) ** 0.5
        assert left.abs().max() <= bound
        assert left.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not any(bias.any() for bias in (a.down_bias, a.up_bias, b.down_bias, b.up_bias))


def test_resetting_is_reproducible_and_leaves_what_is_shared_alone() -> None:
    one, other = compacters(8, 8, seed=3), compacters(8, 8, seed=3)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    rule = one[0].shared.rule.detach().clone()
    torch.manual_seed(5)
    one[0].reset_parameters()
    assert torch.equal(one[0].shared.rule, rule)
    assert not torch.equal(one[0].down_left, other[0].down_left)


@pytest.mark.parametrize(
    ("options", "names", "count"),
    [
        ({}, ["down_left", "down_right", "down_bias", "up_left", "up_right", "up_bias"], 2 * (8 + 4) + 4 + 8),
        ({"rank": None}, ["down_blocks", "up_blocks", "down_bias", "up_bias"], 2 * (2 * 4 * 2) + 4 + 8),
        ({"shared_factors": True}, ["down_bias", "up_bias"], 4 + 8),
        ({"shared_factors": True, "shared_rule": False}, ["down_rule", "up_rule", "down_bias", "up_bias"], 16 + 12),
    ],
)
def test_the_parameters_are_those_of_the_paper(options: dict[str, Any], names: list[str], count: int) -> None:
    a = CompacterAdapter(8, 4, phm_dim=2, **options)
    assert {name for name, _ in a.named_parameters()} == {*names}
    assert sum(parameter.numel() for parameter in a.parameters()) == count


def test_modules_share_one_rule_and_its_gradient() -> None:
    modules = randomise(compacters(8, 8))
    assert [name for name, _ in modules.named_parameters() if "rule" in name] == ["0.shared.rule"]
    z = torch.randn(3, 8, dtype=torch.float64)
    rule = modules[0].shared.rule
    parts = [torch.autograd.grad(a(z, z).sum(), rule)[0] for a in modules]
    (whole,) = torch.autograd.grad(sum(a(z, z).sum() for a in modules), rule)
    torch.testing.assert_close(whole, parts[0] + parts[1])


@pytest.mark.parametrize("options", KINDS)
def test_copies_and_pickles_share_among_themselves(options: dict[str, Any]) -> None:
    modules = randomise(compacters(8, 8, **options))
    z = torch.randn(3, 8, dtype=torch.float64)
    for again in (copy.deepcopy(modules), pickle.loads(pickle.dumps(modules))):
        for a, b in zip(modules, again, strict=True):
            assert torch.equal(a(z, z), b(z, z))
        if "shared" in modules[0]._modules:
            assert again[1].shared is again[0].shared is not modules[0].shared


@pytest.mark.parametrize(
    "options",
    [
        {"norm_before": True},
        {"norm_after": True},
        {"scaling": 4.0},
        {"scaling": "learned"},
        {"scaling": "channel"},
        {"gating": True},
    ],
)
def test_it_has_the_options_of_a_bottleneck(options: dict[str, Any]) -> None:
    (a,) = randomise(compacters(7, **options))
    z = torch.randn(2, 3, 7, dtype=torch.float64)
    layer_norm = nn.functional.layer_norm
    read = layer_norm(z, (7,), a.norm_before_weight, a.norm_before_bias) if a.norm_before else z
    expected = branch(a, read) * (a.scale if isinstance(a.scaling, str) else a.scaling)
    if a.gating:
        expected = expected * torch.sigmoid(z @ a.gate_weight.T + a.gate_bias).mean(1, keepdim=True)
    if a.norm_after:
        expected = layer_norm(expected, (7,), a.norm_after_weight, a.norm_after_bias)
    torch.testing.assert_close(a(z, z), expected)


@pytest.mark.parametrize("name", ["relu", "tanh", "identity"])
def test_the_non_linearity_is_the_one_named(name: str) -> None:
    (a,) = randomise(compacters(8, non_linearity=name))
    z = torch.randn(3, 8, dtype=torch.float64)
    inner = NON_LINEARITIES[name](z @ weight(a, "down") + a.down_bias)
    torch.testing.assert_close(a(z, z), inner @ weight(a, "up") + a.up_bias)


def test_dropout_acts_in_training_only() -> None:
    (a,) = randomise(compacters(8, dropout=0.5))
    z = torch.randn(9, 8, dtype=torch.float64)
    assert (a(z, z) == 0).any()
    torch.testing.assert_close(a.eval()(z, z), branch(a, z))


@pytest.mark.parametrize("width", [64, 63])
def test_it_computes_in_bfloat16_and_under_autocast(width: int) -> None:
    exact = randomise(compacters(width, phm_dim=4))[0]
    z = torch.randn(5, width, dtype=torch.float64)
    whole = exact(z, z)
    single, half = copy.deepcopy(exact).float(), copy.deepcopy(exact).bfloat16()
    assert half.compute_dtype is torch.bfloat16
    tolerance = {"atol": 0.05 * whole.abs().max().item(), "rtol": 0.0, "check_dtype": False}
    torch.testing.assert_close(half(z.bfloat16(), z), whole.bfloat16(), **tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        delta = single(z.float(), z.float())
        assert delta.dtype is torch.bfloat16
        torch.testing.assert_close(delta, whole.bfloat16(), **tolerance)


@pytest.mark.parametrize("options", [*KINDS, {"scaling": "learned", "gating": True}])
@pytest.mark.parametrize("width", [64, 7])
def test_it_compiles_as_one_graph(options: dict[str, Any], width: int) -> None:
    modules = randomise(compacters(width, width, **options))
    z = torch.randn(3, 5, width, dtype=torch.float64)

    def both(z: Tensor) -> Tensor:
        return modules[1](modules[0](z, z), z)

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="eager")(z), both(z))


@pytest.mark.parametrize("options", KINDS)
def test_a_site_may_be_of_another_device_and_dtype_than_what_is_shared(options: dict[str, Any]) -> None:
    _, other = compacters(64, 64, phm_dim=4, **options)
    shared = other.__dict__.pop("shared", None)
    other.to("meta", torch.float16)
    other.__dict__["shared"] = shared
    delta = other(torch.empty(2, 64, device="meta", dtype=torch.float16), torch.empty(0))
    assert (delta.device.type, delta.dtype) == ("meta", torch.float16)


@pytest.mark.parametrize("wrong", [{"phm_dim": 0}, {"rank": 0}])
def test_sizes_that_are_not_positive_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"found .*=0"):
        CompacterAdapter(8, 4, **wrong)
