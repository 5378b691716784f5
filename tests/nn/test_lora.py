import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapterkit.errors import CompatibilityError, ConfigError
from adapterkit.nn.functional.projections import parameter_projection
from adapterkit.nn.functional.slices import Slices
from adapterkit.nn.lora import LoRA

from ..hosts.layers import LAYERS, Adapted, convs, exact, geometry, layer, parts_of, randomise, run, run_merged, some_input

QV: Slices = (("q", ((0, 2),)), ("v", ((5, 9),)))

# torch says it of the host, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def lora(host: nn.Module, rank: int = 3, **options: Any) -> LoRA:
    """With random weights, and a scaling that is not 1."""
    module = LoRA(geometry(host), rank, **{"scaling": 1.7, "dtype": host.weight.dtype, **options})
    randomise(module)
    return module


def test_the_delta_is_b_a_z() -> None:
    host = nn.Linear(6, 9).double()
    m, z = lora(host, bias=True), some_input(host)
    exact(m(z, host(z), host), 1.7 * (z @ m.lora_A.T @ m.lora_B.T + m.lora_bias))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_merged_is_what_the_forward_computes(name: str, dtype: torch.dtype, bias: bool) -> None:
    host = layer(name).to(dtype)
    m, z = lora(host, bias=bias and name != "embedding", dropout=0.5).eval(), some_input(host)
    assert not torch.equal(run(host, m, z), host(z))
    exact(run(host, m, z), run_merged(host, m, z))


@given(convs(), st.integers(1, 5), st.booleans())
def test_every_geometry_of_a_conv_is_kept(host: nn.Module, rank: int, bias: bool) -> None:
    m, z = lora(host, rank, bias=bias and host.bias is not None), some_input(host)
    exact(run(host, m, z), run_merged(host, m, z))


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.booleans())
def test_a_linear_layer_of_any_size_computes_the_same_merged(inputs: int, outputs: int, rank: int, has_bias: bool) -> None:
    host = nn.Linear(inputs, outputs, bias=has_bias).double()
    m = lora(host, rank, bias=has_bias)
    for z in (some_input(host), torch.randn(inputs).double(), torch.randn(0, inputs).double()):
        exact(run(host, m, z), run_merged(host, m, z))


def test_each_group_of_a_conv_has_its_own_pair() -> None:
    """The weight delta, summed by hand: within group g, sum over its own ranks only."""
    host = nn.Conv1d(6, 4, 3, groups=2).double()
    m = lora(host, 4)
    assert (m.lora_A.shape, m.lora_B.shape) == ((4, 3, 3), (4, 2, 1))
    a, b, delta = m.lora_A.detach(), m.lora_B.detach(), torch.zeros(4, 3, 3).double()
    for o, i, k, r in itertools.product(range(4), range(3), range(3), range(2)):
        delta[o, i, k] += 1.7 * b[o, r, 0] * a[2 * (o // 2) + r, i, k]
    exact(m.weight_delta(), delta)


@pytest.mark.parametrize(("rank", "of_each"), [(1, 1), (3, 1), (4, 2), (6, 2)])
def test_the_rank_of_all_groups_together_is_rounded_up(rank: int, of_each: int) -> None:
    m = lora(nn.Conv2d(6, 9, 3, groups=3), rank)
    assert (m.lora_A.shape, m.lora_B.shape) == ((3 * of_each, 2, 3, 3), (9, of_each, 1, 1))


def test_a_conv_without_a_batch_axis_computes_the_same_as_with_one() -> None:
    host = layer("conv2d").double()
    m, z = lora(host, bias=True), some_input(host)
    exact(run(host, m, z[0]), run_merged(host, m, z)[0])


def test_an_embedding_adds_the_rows_of_its_ids() -> None:
    host = layer("embedding").double()
    m, ids = lora(host), torch.tensor([[0, 2, 2], [10, 1, 0]])
    assert (m.lora_A.shape, m.lora_B.shape) == ((3, 11), (6, 3))
    exact(m(ids, host(ids), host), 1.7 * (m.lora_B @ m.lora_A).T[ids])
    m(ids, host(ids), host).sum().backward()
    assert m.lora_A.grad.any(0).nonzero().flatten().tolist() == [0, 1, 10], "the row of padding gets no gradient"
    assert not m.lora_A.grad.is_sparse


def test_an_embedding_scales_gradients_by_frequency_where_the_host_does() -> None:
    host = nn.Embedding(4, 6, scale_grad_by_freq=True)
    m, ids = lora(host), torch.tensor([0, 1, 1, 1])
    m(ids, host(ids), host).sum().backward()
    torch.testing.assert_close(m.lora_A.grad[:, 1], m.lora_A.grad[:, 0])


def test_an_embedding_with_max_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_norm=1\.5 changes its rows"):
        LoRA(geometry(nn.Embedding(5, 4, max_norm=1.5)), 2)


@given(parts_of(9), st.sampled_from(["linear", "Conv1D", "conv"]), st.booleans())
def test_parts_have_their_own_pairs_and_nothing_else_changes(slices: Slices, kind: str, bias: bool) -> None:
    host = (nn.Conv2d(6, 9, 1) if kind == "conv" else layer(kind)).double()
    m, z = lora(host, 2, slices=slices, bias=bias), some_input(host)
    exact(run(host, m, z), run_merged(host, m, z))
    rows = [sorted(row for r in ranges for row in range(*r)) for _, ranges in slices]
    covered = sorted(itertools.chain.from_iterable(rows))
    delta = m.weight_delta().detach().flatten(1)
    delta = delta.T if kind == "Conv1D" else delta
    expected = torch.zeros(9, 6).double()
    for index, own in enumerate(rows):
        b = m.lora_B[[covered.index(row) for row in own]].flatten(1)
        expected[own] = 1.7 * b.detach() @ m.lora_A[2 * index : 2 * index + 2].detach().flatten(1)
    exact(delta, expected)
    elsewhere = [row for row in range(9) if row not in covered]
    added = m(z, host(z), host).movedim(geometry(host).channel_axis, 0)
    assert not added[elsewhere].any()


def test_parts_are_as_separate_layers() -> None:
    """Two parts of a fused layer do what two LoRAs at two layers would."""
    host, z = nn.Linear(6, 9).double(), torch.randn(2, 6).double()
    m = lora(host, slices=QV)
    delta = m(z, host(z), host)
    exact(delta[:, :2], 1.7 * z @ m.lora_A[:3].T @ m.lora_B[:2].T)
    exact(delta[:, 5:], 1.7 * z @ m.lora_A[3:].T @ m.lora_B[2:].T)


def test_an_embedding_with_parts_computes_the_same_merged() -> None:
    host = layer("embedding").double()
    m, z = lora(host, slices=(("a", ((1, 3),)), ("b", ((3, 4),)))), some_input(host)
    exact(run(host, m, z), run_merged(host, m, z))


def test_parts_of_a_grouped_conv_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"groups=3 has no slices; found \['q', 'v'\]"):
        LoRA(geometry(layer("grouped")), 2, slices=QV)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_that_is_not_positive_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank={rank} is not positive"):
        LoRA(geometry(nn.Linear(2, 2)), rank)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("init", ["lora", "gaussian"])
@pytest.mark.parametrize("host_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_is_the_identity(name: str, init: Any, host_dtype: torch.dtype, dtype: torch.dtype) -> None:
    host = layer(name).to(host_dtype)
    m = LoRA(geometry(host), 3, init=init, bias=name != "embedding", gating=True, scaling=2.0, dropout=0.1, dtype=dtype)
    z = some_input(host)
    assert torch.equal(run(host, m, z), host(z))
    run(host, m, z).sum().backward()
    starts_at_zero = m.lora_A if name == "embedding" and init == "lora" else m.lora_B
    assert starts_at_zero.grad.any()


def test_inits_follow_their_distributions() -> None:
    host, conv, embedding = nn.Linear(300, 200), nn.Conv2d(30, 20, 5), nn.Embedding(300, 200)
    m = LoRA(geometry(host), 100, bias=True, gating=True)
    assert m.lora_A.abs().max() <= 300**-0.5
    assert m.lora_A.std().item() == pytest.approx((300 * 3) ** -0.5, rel=0.05)
    assert not m.lora_B.any()
    assert not m.lora_bias.any()
    assert not m.gate_bias.any()
    assert m.gate_weight.std().item() == pytest.approx((300 * 3) ** -0.5, rel=0.2)
    assert LoRA(geometry(conv), 100).lora_A.std().item() == pytest.approx((30 * 25 * 3) ** -0.5, rel=0.05)
    m = LoRA(geometry(embedding), 100)
    assert not m.lora_A.any()
    assert m.lora_B.std().item() == pytest.approx(1, rel=0.05)
    m = LoRA(geometry(host), 100, init="gaussian")
    assert m.lora_A.std().item() == pytest.approx(1 / 100, rel=0.05)
    assert not m.lora_B.any()


def test_initialisation_is_that_of_torch_and_of_its_seed() -> None:
    torch.manual_seed(3)
    m = LoRA(geometry(nn.Linear(6, 9)), 3)
    torch.manual_seed(3)
    nn.Linear(6, 9)
    expected = nn.init.kaiming_uniform_(torch.empty(3, 6), a=math.sqrt(5))
    assert torch.equal(m.lora_A, expected)


def test_dropout_drops_input_features_in_training_only() -> None:
    host = nn.Linear(4, 4, bias=False)
    m = LoRA(geometry(host), 4, dropout=0.25)
    with torch.no_grad():
        m.lora_A.copy_(torch.eye(4))
        m.lora_B.copy_(torch.eye(4))
    z = torch.ones(500, 4)
    delta = m(z, host(z), host)
    assert 0.2 < (delta == 0).float().mean() < 0.3
    torch.testing.assert_close(delta[delta != 0], torch.full_like(delta[delta != 0], 1 / 0.75))
    assert torch.equal(m.eval()(z, host(z), host), z)


def test_dropout_of_an_embedding_drops_tokens() -> None:
    host = nn.Embedding(4, 6)
    m, ids = lora(host, dropout=0.25), torch.randint(0, 4, (40, 10))
    delta = m(ids, host(ids), host)
    whole = m.eval()(ids, host(ids), host)
    dropped = (delta == 0).all(-1)
    assert 0.15 < dropped.float().mean() < 0.35
    torch.testing.assert_close(delta[~dropped], whole[~dropped] / 0.75)


def test_a_gate_is_the_mean_over_tokens_of_a_sigmoid_and_keeps_the_scaling() -> None:
    host = nn.Linear(6, 9).double()
    m, z = lora(host, gating=True, bias=True), torch.randn(2, 5, 6).double()
    plain = 1.7 * (z @ m.lora_A.T @ m.lora_B.T + m.lora_bias)
    gate = torch.sigmoid(z @ m.gate_weight.T + m.gate_bias)
    exact(m(z, host(z), host), gate.mean(1, keepdim=True) * plain)
    exact(m(z[:, 0], host(z[:, 0]), host), gate[:, 0] * plain[:, 0])
    m.batch_axis = 1
    exact(m(z, host(z), host), gate.mean(0, keepdim=True) * plain)


def test_the_gate_of_a_conv_and_of_an_embedding_is_the_mean_over_their_positions() -> None:
    conv, z = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 6, 5).double()
    m = lora(conv, gating=True)
    gate = torch.sigmoid(torch.einsum("bchw,c->bhw", z, m.gate_weight[0]) + m.gate_bias).mean((1, 2))
    delta = m(z, conv(z), conv)
    exact(delta, gate[:, None, None, None] * nn.functional.conv2d(z, m.weight_delta()))
    exact(m(z[0], conv(z[0]), conv), delta[0])

    embedding, ids = nn.Embedding(7, 4).double(), torch.randint(0, 7, (2, 5))
    m = lora(embedding, gating=True)
    gate = torch.sigmoid(m.gate_weight[0, ids] + m.gate_bias).mean(1)
    exact(m(ids, embedding(ids), embedding), gate[:, None, None] * m.weight_delta()[ids])


def test_what_cannot_be_merged_says_why() -> None:
    host = nn.Linear(3, 4, bias=False)
    with pytest.raises(CompatibilityError, match="trained bias of 4 features and the host has none"):
        lora(host, bias=True).merged({"weight": host.weight})
    with pytest.raises(CompatibilityError, match=r"a gated LoRA cannot be merged: .* of 3 features"):
        lora(host, gating=True).merged({"weight": host.weight})


def test_merging_changes_the_bias_only_if_one_is_trained() -> None:
    host = nn.Linear(3, 4)
    given_tensors = {"weight": host.weight, "bias": host.bias}
    before = copy.deepcopy(given_tensors)
    assert set(lora(host).merged(given_tensors)) == {"weight"}
    assert set(lora(host, bias=True).merged(given_tensors)) == {"weight", "bias"}
    assert all(torch.equal(given_tensors[name], before[name]) for name in before)


@given(st.lists(st.integers(1, 3), max_size=2), parts_of(8) | st.just(()), st.sampled_from([torch.float64, torch.float32]))
def test_a_parameter_is_adapted_in_place(lead: list[int], slices: Slices, dtype: torch.dtype) -> None:
    """One pair for each index of the leading axes (experts), on the last two axes."""
    weight = torch.randn(*lead, 8, 5, dtype=dtype)
    m = LoRA(parameter_projection(weight.shape), 2, scaling=1.7, slices=slices, dtype=dtype)
    assert torch.equal(m.adapted(weight), weight)
    randomise(m)
    for index in itertools.product(*map(range, lead)):
        one = LoRA(parameter_projection((8, 5)), 2, scaling=1.7, slices=slices, dtype=dtype)
        one.lora_A, one.lora_B = nn.Parameter(m.lora_A[index]), nn.Parameter(m.lora_B[index])
        exact(m.adapted(weight)[index], one.adapted(weight[index]))
    if not slices:
        exact(m.adapted(weight), weight + 1.7 * m.lora_B @ m.lora_A)
    m.adapted(weight).sum().backward()
    assert m.lora_A.grad.any()
    assert m.lora_B.grad.any()


def test_a_parameter_keeps_its_dtype_and_its_bits() -> None:
    weight = torch.randn(3, 4, 5, dtype=torch.bfloat16)
    m = LoRA(parameter_projection(weight.shape), 2, dtype=torch.float32)
    assert torch.equal(m.adapted(weight), weight)
    assert m.adapted(weight).dtype == torch.bfloat16
    assert m.adapted(weight.double()).dtype == torch.float64
    m = LoRA(parameter_projection((20, 4, 50)), 20)
    assert m.lora_A.abs().max() <= 50**-0.5
    assert m.lora_A.std().item() == pytest.approx((50 * 3) ** -0.5, rel=0.05)


def test_a_parameter_has_no_input() -> None:
    for setting, value in (("dropout", 0.1), ("bias", True), ("gating", True)):
        with pytest.raises(ConfigError, match=rf"no input: {{'{setting}': {value}}} cannot act on one of shape"):
            LoRA(parameter_projection((3, 4)), 2, **{setting: value})
    m, z = LoRA(parameter_projection((2, 3, 4)), 2), torch.randn(2, 4)
    with pytest.raises(CompatibilityError, match=r"\(2, 3, 4\) is adapted in place"):
        m(z, z, nn.Linear(4, 3))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_every_parameter(name: str) -> None:
    host = layer(name)
    m, z = lora(host, bias=name != "embedding", gating=True), some_input(host)
    run(host, m, z).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in m.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_it_runs_under_autocast(name: str) -> None:
    host = layer(name)
    m, z = lora(host, bias=name != "embedding", gating=True), some_input(host)
    expected = run(host, m, z)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(host, m, z)
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    found.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in m.parameters())


@pytest.mark.parametrize(
    ("name", "slices"), [*((name, ()) for name in LAYERS), ("linear", QV), ("Conv1D", QV)], ids=lambda v: str(v)[:9]
)
def test_it_compiles_as_one_graph(name: str, slices: Slices) -> None:
    host = layer(name)
    adapted, z = Adapted(host, lora(host, slices=slices, dropout=0.1, gating=True).eval()), some_input(host)
    compiled = torch.compile(adapted, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z), adapted(z))


def test_copies_are_apart() -> None:
    host = nn.Linear(3, 4)
    m, z = lora(host), torch.randn(2, 3)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(m)))
    expected = twin(z, host(z), host)
    randomise(m)
    assert torch.equal(twin(z, host(z), host), expected)
    assert repr(m) == "LoRA(linear, 3 -> 3 -> 4, scaling=1.7)"


def test_on_the_meta_device_it_has_shapes_only() -> None:
    with torch.device("meta"):
        m = LoRA(geometry(nn.Linear(3, 4)), 2, slices=(("q", ((0, 2),)),))
    assert {p.device.type for p in m.parameters()} == {"meta"}
    assert m.lora_B.shape == (2, 2)
