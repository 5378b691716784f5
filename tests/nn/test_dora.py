import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapterkit.errors import CompatibilityError, ConfigError
from adapterkit.nn.dora import DoRA, magnitude_of
from adapterkit.nn.functional.projections import parameter_projection
from adapterkit.nn.functional.slices import Slices

from ..hosts.layers import (
    LAYERS,
    Adapted,
    Conv1D,
    convs,
    exact,
    geometry,
    layer,
    parts_of,
    randomise,
    run,
    run_merged,
    some_input,
)

QV: Slices = (("q", ((0, 2),)), ("v", ((5, 9),)))

# torch says it of the host, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def new(host: nn.Module, rank: int = 3, **options: Any) -> DoRA:
    dtype = options.setdefault("dtype", host.weight.dtype)
    m = magnitude_of(geometry(host), host.weight.detach().to(dtype), slices=options.get("slices", ()))
    return DoRA(geometry(host), rank, **{"scaling": 1.7, "magnitude": m, **options})


def dora(host: nn.Module, rank: int = 3, **options: Any) -> DoRA:
    """With random weights, and a scaling that is not 1."""
    module = new(host, rank, **options)
    randomise(module)
    return module


def test_the_output_is_that_of_the_paper() -> None:
    """W' = m * V / |V| by output feature, V = W + s B A; the host's bias is not scaled."""
    host = nn.Linear(6, 9).double()
    d, z = dora(host), some_input(host)
    v = host.weight + 1.7 * d.lora_B @ d.lora_A
    weight = d.magnitude[:, None] * v / v.square().sum(1, keepdim=True).sqrt()
    exact(run(host, d, z), z @ weight.T + host.bias)
    exact(d.merged({"weight": host.weight})["weight"], weight)


@pytest.mark.parametrize(
    ("name", "other_axes"),
    [("linear", 1), ("Conv1D", 0), ("conv2d", (1, 2, 3)), ("grouped", (1, 2, 3)), ("embedding", 0)],
)
def test_the_magnitude_starts_as_the_norm_of_each_output_feature(name: str, other_axes: Any) -> None:
    host = layer(name).double()
    exact(new(host).magnitude, host.weight.square().sum(other_axes).sqrt())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_is_what_the_forward_computes(name: str, dtype: torch.dtype) -> None:
    host = layer(name).to(dtype)
    d, z = dora(host, dropout=0.5).eval(), some_input(host)
    assert not torch.equal(run(host, d, z), host(z))
    exact(run(host, d, z), run_merged(host, d, z))


@given(convs(), st.integers(1, 5))
def test_every_geometry_of_a_conv_is_kept(host: nn.Module, rank: int) -> None:
    d, z = dora(host, rank), some_input(host)
    exact(run(host, d, z), run_merged(host, d, z))


@given(parts_of(9), st.sampled_from(["linear", "Conv1D", "conv"]))
def test_outside_its_parts_nothing_changes(slices: Slices, kind: str) -> None:
    host = (nn.Conv2d(6, 9, 1) if kind == "conv" else layer(kind)).double()
    d, z = dora(host, slices=slices), some_input(host)
    exact(run(host, d, z), run_merged(host, d, z))
    covered = {row for _, ranges in slices for r in ranges for row in range(*r)}
    elsewhere = [row for row in range(9) if row not in covered]
    assert not d(z, host(z), host).movedim(geometry(host).channel_axis, 0)[elsewhere].any()


def test_parts_are_as_separate_layers() -> None:
    host, z = nn.Linear(6, 9).double(), torch.randn(2, 6).double()
    d, whole = dora(host, slices=QV), host(z)
    delta = d(z, whole, host)
    for rows, a, own in ((slice(0, 2), slice(0, 3), slice(0, 2)), (slice(5, 9), slice(3, 6), slice(2, 6))):
        one = nn.Linear(6, rows.stop - rows.start).double()
        one.weight, one.bias = nn.Parameter(host.weight[rows]), nn.Parameter(host.bias[rows])
        single = new(one)
        single.lora_A, single.lora_B = nn.Parameter(d.lora_A[a]), nn.Parameter(d.lora_B[own])
        single.magnitude = nn.Parameter(d.magnitude[own])
        exact(delta[:, rows], single(z, one(z), one))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("init", ["lora", "gaussian"])
@pytest.mark.parametrize("host_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_is_the_identity(name: str, init: Any, host_dtype: torch.dtype, dtype: torch.dtype) -> None:
    host = layer(name).to(host_dtype)
    d, z = new(host, init=init, dropout=0.1, dtype=dtype), some_input(host)
    assert torch.equal(run(host, d, z), host(z))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(host, d, z), host(z))
    wide = host.weight.detach().to(dtype)
    assert torch.equal(d.merged({"weight": wide})["weight"], wide)


def test_the_norm_is_a_constant_in_the_backward() -> None:
    """Section 4.3: with C = |V| held fixed, the gradient of sum(y) is that of (m / C) * (W + s B A) z."""
    host = nn.Linear(6, 9).double()
    d, z = dora(host), some_input(host)
    run(host, d, z).square().sum().backward()
    a, b, m = (p.detach().clone().requires_grad_() for p in (d.lora_A, d.lora_B, d.magnitude))
    v = host.weight.detach() + 1.7 * b @ a
    constant = v.detach().norm(dim=1)
    (z @ ((m / constant)[:, None] * v).T + host.bias.detach()).square().sum().backward()
    for p, q in ((d.lora_A, a), (d.lora_B, b), (d.magnitude, m)):
        exact(p.grad, q.grad)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_every_parameter(name: str) -> None:
    host = layer(name)
    d, z = dora(host), some_input(host)
    run(host, d, z).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in d.parameters())


def test_a_feature_of_zeros_stays_zeros() -> None:
    host = nn.Linear(3, 2).double()
    nn.init.zeros_(host.weight)
    d, z = new(host), some_input(host)
    assert torch.equal(run(host, d, z), host(z))
    run(host, d, z).sum().backward()
    assert all(p.grad.isfinite().all() for p in d.parameters())


def test_dropout_acts_on_the_low_rank_branch_only() -> None:
    host = nn.Linear(4, 4)
    d, z = dora(host, dropout=0.999999), torch.randn(3, 4)
    factor = d.magnitude / (host.weight + d.weight_delta()).norm(dim=1)
    torch.testing.assert_close(run(host, d, z), factor * (host(z) - host.bias) + host.bias, atol=1e-5, rtol=1e-5)


def test_the_host_is_multiplied_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    host = nn.Linear(6, 9)
    d, z = dora(host), some_input(host)
    shapes, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda z, w, b=None: shapes.append(tuple(w.shape)) or linear(z, w, b))
    d(z, torch.zeros(2, 5, 9), host)
    assert shapes == [(3, 6), (9, 3)]


@given(st.lists(st.integers(1, 3), max_size=2), parts_of(8) | st.just(()))
def test_a_parameter_is_adapted_in_place(lead: list[int], slices: Slices) -> None:
    weight, projection = torch.randn(*lead, 8, 5).double(), parameter_projection((*lead, 8, 5))
    m = magnitude_of(projection, weight, slices=slices)
    d = DoRA(projection, 2, magnitude=m, scaling=1.7, slices=slices, dtype=weight.dtype)
    exact(d.adapted(weight), weight)
    randomise(d)
    v = weight + d.weight_delta()
    scaled = d.low_rank.layout.spread(d.magnitude)[..., None] * v / v.square().sum(-1, keepdim=True).sqrt()
    covered = d.low_rank.layout.spread(torch.ones_like(m))[..., None]
    exact(d.adapted(weight), covered * scaled + (1 - covered) * weight)
    d.adapted(weight).square().sum().backward()
    assert all(p.grad.any() for p in d.parameters())


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_parameter_keeps_its_dtype_and_its_bits(stored: torch.dtype, dtype: torch.dtype) -> None:
    weight, projection = torch.randn(3, 4, 5, dtype=stored), parameter_projection((3, 4, 5))
    d = DoRA(projection, 2, magnitude=magnitude_of(projection, weight.to(dtype)), dtype=dtype)
    assert d.adapted(weight).dtype == stored
    assert torch.equal(d.adapted(weight), weight)


def test_what_does_not_fit_is_refused() -> None:
    projection = geometry(nn.Linear(3, 4))
    with pytest.raises(ConfigError, match=r"magnitude has shape \(3,\), and there are \(4,\) output features"):
        DoRA(projection, 2, magnitude=torch.ones(3))
    with pytest.raises(ConfigError, match=r"no input: {'dropout': 0.1} cannot act on one of shape"):
        DoRA(parameter_projection((3, 4)), 2, magnitude=None, dropout=0.1)
    with pytest.raises(CompatibilityError, match=r"shape \(4, 3\), which is stored as \(6, 1\)"):
        magnitude_of(projection, torch.ones(6, 1))


@pytest.mark.parametrize("name", LAYERS)
def test_it_runs_under_autocast(name: str) -> None:
    host = layer(name)
    d, z = dora(host), some_input(host)
    expected = run(host, d, z)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(host, d, z)
        factor = d._factor(host.weight)
    assert torch.equal(factor, d._factor(host.weight))
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    found.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in d.parameters())


def test_under_autocast_the_bias_is_taken_off_as_it_was_added() -> None:
    """In bfloat16: nothing of it is left to be scaled."""
    host = nn.Linear(6, 9)
    nn.init.zeros_(host.weight)
    d, z = dora(host), some_input(host)
    nn.init.zeros_(d.lora_B)
    with torch.autocast("cpu", torch.bfloat16):
        assert not d(z, host(z), host).any()


@pytest.mark.parametrize(
    ("name", "slices"), [*((name, ()) for name in LAYERS), ("linear", QV), ("Conv1D", QV)], ids=lambda v: str(v)[:9]
)
def test_it_compiles_as_one_graph(name: str, slices: Slices) -> None:
    host = layer(name)
    adapted, z = Adapted(host, dora(host, slices=slices, dropout=0.1).eval()), some_input(host)
    compiled = torch.compile(adapted, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z), adapted(z))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(z), adapted(z))


def test_copies_are_apart_and_reset_leaves_the_magnitude() -> None:
    host = Conv1D(4, 3)
    d, z = dora(host), torch.randn(2, 3)
    twin = copy.deepcopy(d)
    expected = twin(z, host(z), host)
    magnitude = d.magnitude.clone()
    d.reset_parameters()
    assert torch.equal(twin(z, host(z), host), expected)
    assert torch.equal(d.magnitude, magnitude)
    assert not d.lora_B.any()


def test_on_the_meta_device_it_has_shapes_only() -> None:
    with torch.device("meta"):
        host = nn.Linear(3, 4)
        d = DoRA(geometry(host), 2, magnitude=None)
        assert run(host, d, torch.zeros(5, 3)).shape == (5, 4)
    assert {p.device.type for p in d.parameters()} == {"meta"}
