import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapterkit.errors import ConfigError
from adapterkit.nn.functional.projections import parameter_projection
from adapterkit.nn.functional.slices import Slices
from adapterkit.nn.vera import VeRA, VeRABases

from ..hosts.layers import Adapted, Conv1D, exact, geometry, layer, parts_of, randomise, run, run_merged, some_input

QV: Slices = (("q", ((0, 2),)), ("v", ((5, 9),)))
LINEAR = ["linear", "Conv1D"]


def new(host: nn.Module, rank: int = 4, **options: Any) -> VeRA:
    """With bases that are larger than the host."""
    dtype = options.setdefault("dtype", host.weight.dtype)
    module = VeRA(geometry(host), rank, **options)
    module.shared = VeRABases(rank, 8, 12, dtype=dtype)
    return module


def vera(host: nn.Module, rank: int = 4, **options: Any) -> VeRA:
    module = new(host, rank, **options)
    randomise(module)
    return module


def test_the_delta_is_that_of_the_paper() -> None:
    """Equation 2: Lambda_b B Lambda_d A z, with the first columns of A and the first rows of B."""
    host = nn.Linear(6, 9).double()
    v, z = vera(host), some_input(host)
    a, b = v.shared.vera_A[:, :6], v.shared.vera_B[:9]
    weight = torch.diag(v.lambda_b) @ b @ torch.diag(v.lambda_d[0]) @ a
    exact(v(z, host(z), host), z @ weight.T)
    exact(v.weight_delta(), weight)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slices", [(), QV], ids=["whole", "parts"])
def test_merged_is_what_the_forward_computes(name: str, dtype: torch.dtype, slices: Slices) -> None:
    host = layer(name).to(dtype)
    v, z = vera(host, slices=slices, dropout=0.5).eval(), some_input(host)
    assert not torch.equal(run(host, v, z), host(z))
    exact(run(host, v, z), run_merged(host, v, z))


@given(parts_of(9), st.sampled_from(LINEAR))
def test_a_part_is_adapted_as_a_layer_of_its_own(slices: Slices, name: str) -> None:
    host = layer(name).double()
    v, z = vera(host, slices=slices), some_input(host)
    delta = v(z, host(z), host)
    exact(host(z) + delta, run_merged(host, v, z))
    own = [sorted(row for r in ranges for row in range(*r)) for _, ranges in slices]
    covered = sorted(row for rows in own for row in rows)
    for index, rows in enumerate(own):
        single = VeRA(parameter_projection((len(rows), 6)), 4, dtype=torch.float64)
        single.shared, single.lambda_d = v.shared, nn.Parameter(v.lambda_d[index : index + 1])
        single.lambda_b = nn.Parameter(v.lambda_b[[covered.index(row) for row in rows]])
        exact(delta[..., rows], z @ single.weight_delta().T)
    assert not delta[..., [row for row in range(9) if row not in covered]].any()


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("host_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_is_the_identity(name: str, host_dtype: torch.dtype, dtype: torch.dtype) -> None:
    host = layer(name).to(host_dtype)
    v, z = new(host, dtype=dtype, dropout=0.1), some_input(host)
    assert torch.equal(run(host, v, z), host(z))
    run(host, v, z).sum().backward()
    assert v.lambda_b.grad.any()


def test_vectors_start_as_in_the_paper_and_bases_are_kaiming_uniform() -> None:
    v = new(nn.Linear(6, 9), slices=QV)
    assert (v.lambda_d == 0.1).all()
    assert v.lambda_d.shape == (2, 4)
    assert not v.lambda_b.any()
    assert VeRA(geometry(nn.Linear(6, 9)), 4, initial=0.5).lambda_d.tolist() == [[0.5] * 4]
    torch.manual_seed(5)
    bases = VeRABases(16, 300, 200)
    for matrix, fan_in in ((bases.vera_A, 300), (bases.vera_B, 16)):
        bound = math.sqrt(6 / fan_in)
        assert bound * 0.98 < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
    torch.manual_seed(5)
    assert torch.equal(VeRABases(16, 300, 200).vera_B, bases.vera_B)


def test_only_vectors_are_trained() -> None:
    host = nn.Linear(6, 9)
    v, z = vera(host), some_input(host)
    assert [name for name, _ in v.named_parameters()] == ["lambda_d", "lambda_b"]
    run(host, v, z).square().sum().backward()
    assert v.lambda_d.grad.any()
    assert v.lambda_b.grad.any()
    assert set(v.shared.state_dict()) == {"vera_A", "vera_B"}


def test_dropout_acts_in_training_only() -> None:
    host = nn.Linear(6, 9)
    v, z = vera(host, dropout=0.999999), torch.randn(4, 6)
    assert not v(z, host(z), host).any()
    exact(v.eval()(z, host(z), host), z @ v.weight_delta().T)


def test_a_parameter_is_adapted_in_place() -> None:
    weight = torch.randn(9, 6, dtype=torch.bfloat16)
    v = VeRA(parameter_projection((9, 6)), 4, slices=QV, dtype=torch.float32)
    v.shared = VeRABases(4, 6, 9)
    assert torch.equal(v.adapted(weight), weight)
    randomise(v)
    assert v.adapted(weight).dtype == torch.bfloat16
    exact(v.adapted(weight.float()), weight + v.weight_delta())


def test_what_it_cannot_adapt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"found conv, weight \(6, 4, 3\); use LoRA"):
        VeRA(geometry(layer("conv1d")), 2)
    with pytest.raises(ConfigError, match=r"found parameter, weight \(2, 3, 4\)"):
        VeRA(parameter_projection((2, 3, 4)), 2)
    with pytest.raises(ConfigError, match=r"no input: {'dropout': 0.1} cannot act on one of shape"):
        VeRA(parameter_projection((3, 4)), 2, dropout=0.1)
    with pytest.raises(ConfigError, match="rank=0 is not positive"):
        VeRA(parameter_projection((3, 4)), 0)
    with pytest.raises(ConfigError, match="rank=0 is not positive"):
        VeRABases(0, 3, 4)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("slices", [(), QV], ids=["whole", "parts"])
def test_it_compiles_as_one_graph_and_runs_under_autocast(name: str, slices: Slices) -> None:
    host = layer(name)
    adapted, z = Adapted(host, vera(host, slices=slices)), some_input(host)
    compiled = torch.compile(adapted, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z), adapted(z))
    expected = adapted(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = adapted(z)
    torch.testing.assert_close(found.float(), expected, atol=0.2, rtol=0.1)
    found.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapted.module.parameters())


def test_copies_share_among_themselves() -> None:
    host = Conv1D(9, 6)
    sites = nn.ModuleList([vera(host), vera(host)])
    sites[1].shared = sites[0].shared
    twins = copy.deepcopy(sites)
    assert twins[1].shared is twins[0].shared is not sites[0].shared
    assert torch.equal(twins[1].weight_delta(), sites[1].weight_delta())


def test_bases_follow_in_dtype() -> None:
    v = vera(nn.Linear(6, 9), dtype=torch.bfloat16)
    v.shared.float()
    assert v.weight_delta().dtype == torch.bfloat16
