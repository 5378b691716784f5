import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adapterkit.nn.bottleneck import BottleneckAdapter
from adapterkit.nn.functional.non_linearities import NON_LINEARITIES


def random_adapter(**options: object) -> BottleneckAdapter:
    adapter = BottleneckAdapter(6, 3, **options)  # type: ignore[arg-type]  # parametrised
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    return adapter


X, Z = torch.randn(2, 4, 6), torch.randn(2, 4, 6)


def branch(a: BottleneckAdapter, z: Tensor) -> Tensor:
    return torch.relu(z @ a.down_weight.T + a.down_bias) @ a.up_weight.T + a.up_bias


@pytest.mark.parametrize("size", [1, 3, 9])
def test_the_delta_is_down_non_linearity_up(size: int) -> None:
    a = random_adapter()
    torch.testing.assert_close(a(Z, X), branch(a, Z))


@pytest.mark.parametrize("name", sorted(NON_LINEARITIES))
def test_every_non_linearity_is_applied_elementwise(name: str) -> None:
    a = random_adapter(non_linearity=name)
    inner = NON_LINEARITIES[name](Z @ a.down_weight.T + a.down_bias)
    torch.testing.assert_close(a(Z, X), inner @ a.up_weight.T + a.up_bias)


def test_each_non_linearity_is_its_formula() -> None:
    x = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(NON_LINEARITIES["quick_gelu"](x), x / (1 + torch.exp(-1.702 * x)))
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    torch.testing.assert_close(NON_LINEARITIES["gelu_tanh"](x), x / 2 * (1 + torch.tanh(inner)))
    torch.testing.assert_close(NON_LINEARITIES["swish"](x), x * torch.sigmoid(x))
    assert torch.equal(NON_LINEARITIES["identity"](x), x)


@pytest.mark.parametrize("scaling", [0.0, 4.0, "learned", "channel"])
def test_scaling_multiplies_the_branch(scaling: object) -> None:
    a = random_adapter(scaling=scaling)
    factor = a.scale if isinstance(scaling, str) else scaling
    torch.testing.assert_close(a(Z, X), factor * branch(a, Z))
    if isinstance(scaling, str):
        assert a.scale.shape == ({"learned": 1, "channel": 6}[scaling],)


def test_a_norm_before_normalises_what_the_adapter_reads() -> None:
    a = random_adapter(norm_before=True)
    normed = F.layer_norm(Z, (6,), a.norm_before_weight, a.norm_before_bias)
    torch.testing.assert_close(a(Z, X), branch(a, normed))


def test_a_norm_after_normalises_the_branch_or_the_sum() -> None:
    a = random_adapter(norm_after=True)
    norm = (6,), a.norm_after_weight, a.norm_after_bias
    torch.testing.assert_close(a(Z, X), F.layer_norm(branch(a, Z), *norm))
    a.residual_before_norm = True
    torch.testing.assert_close(X + a(Z, X), F.layer_norm(X + branch(a, Z), *norm), atol=1e-5, rtol=1e-5)


def test_a_gate_is_the_mean_over_tokens_of_a_sigmoid() -> None:
    a = random_adapter(gating=True)
    gate = torch.sigmoid(Z @ a.gate_weight.T + a.gate_bias).mean(1, keepdim=True)
    torch.testing.assert_close(a(Z, X), gate * branch(a, Z))
    torch.testing.assert_close(
        a(Z[:, 0], X[:, 0]), torch.sigmoid(Z[:, 0] @ a.gate_weight.T + a.gate_bias) * branch(a, Z[:, 0])
    )


def test_dropout_acts_in_training_only() -> None:
    a = random_adapter(dropout=0.5)
    delta, whole = a(Z, X), branch(a, Z)
    dropped = delta == 0
    assert 0 < dropped.float().mean() < 1
    torch.testing.assert_close(delta[~dropped], 2 * whole[~dropped])
    torch.testing.assert_close(a.eval()(Z, X), whole)


def test_stochastic_depth_drops_whole_rows_in_training_only() -> None:
    a = random_adapter(stochastic_depth=0.25)
    z = torch.randn(400, 2, 6)
    delta, whole = a(z, z), branch(a, z)
    dropped = (delta == 0).all(-1).all(-1)
    assert 0.15 < dropped.float().mean() < 0.35
    torch.testing.assert_close(delta[~dropped], whole[~dropped] / 0.75)
    torch.testing.assert_close(a.eval()(z, z), whole)


def test_input_and_output_may_differ_in_width() -> None:
    assert BottleneckAdapter(5, 2, input_size=7)(torch.randn(3, 7), torch.randn(3, 5)).shape == (3, 5)


@pytest.mark.parametrize("init", ["lora", "mam", "houlsby", "bert"])
def test_inits_follow_their_distributions(init: str) -> None:
    a = BottleneckAdapter(300, 200, init=init, gating=True, scaling="channel", norm_before=True)  # type: ignore[arg-type]  # parametrised
    assert not any(bias.any() for bias in (a.down_bias, a.up_bias, a.gate_bias, a.norm_before_bias))
    assert (a.scale == 1).all()
    assert (a.norm_before_weight == 1).all()
    if init in ("lora", "mam"):
        assert not a.up_weight.any()
        assert a.down_weight.abs().max() <= 300**-0.5
        assert a.down_weight.std().item() == pytest.approx(300**-0.5 / 3**0.5, rel=0.05)
    else:
        std = 0.02 if init == "bert" else 0.01 * 0.8796  # a normal cut off at two standard deviations is narrower
        assert a.up_weight.std().item() == pytest.approx(std, rel=0.05)
        assert (a.up_weight.abs().max() <= 0.02) == (init == "houlsby")


def test_the_parameters_are_those_of_one_module() -> None:
    a = BottleneckAdapter(6, 3)
    assert [name for name, _ in a.named_parameters()] == ["down_weight", "down_bias", "up_weight", "up_bias"]
    assert sum(p.numel() for p in a.parameters()) == 2 * 6 * 3 + 3 + 6
