"""The functions that say what a bottleneck computes, against the formula written out."""

import torch
from torch import nn

from adapterkit.nn.functional.bottleneck import bottleneck, drop_rows, full_bottleneck, row_gate


def test_a_bottleneck_is_two_linear_layers_with_a_function_between() -> None:
    down, up, z = nn.Linear(6, 3), nn.Linear(3, 4), torch.randn(2, 5, 6)
    found = bottleneck(z, (down.weight, down.bias), (up.weight, up.bias), torch.tanh)
    assert torch.equal(found, up(torch.tanh(down(z))))


def test_without_options_the_full_formula_is_the_projection() -> None:
    z, x = torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    assert torch.equal(full_bottleneck(z, x, lambda h: 2 * h[..., :4]), 2 * z[..., :4])


def test_the_norms_stand_before_and_after() -> None:
    z, x = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    before, after = nn.LayerNorm(4), nn.LayerNorm(4)
    with torch.no_grad():
        for parameter in (*before.parameters(), *after.parameters()):
            parameter.normal_()
    norms = {"norm_before": (before.weight, before.bias), "norm_after": (after.weight, after.bias)}
    torch.testing.assert_close(full_bottleneck(z, x, torch.tanh, **norms), after(torch.tanh(before(z))))
    found = full_bottleneck(z, x, torch.tanh, **norms, residual_before_norm=True)
    torch.testing.assert_close(found, after(x + torch.tanh(before(z))) - x)


def test_the_gate_is_the_mean_over_the_tokens_of_a_row() -> None:
    z, weight, bias = torch.randn(2, 5, 4), torch.randn(1, 4), torch.randn(1)
    each = torch.sigmoid(z @ weight.t() + bias)  # (2, 5, 1)
    torch.testing.assert_close(row_gate(z, (weight, bias), 0), each.mean(1, keepdim=True))
    torch.testing.assert_close(row_gate(z, (weight, bias), 1), each.mean(0, keepdim=True))
    torch.testing.assert_close(row_gate(z[:, 0], (weight, bias), 0), each[:, 0])
    gated = full_bottleneck(z, z, torch.tanh, gate=(weight, bias), scaling=3.0)
    torch.testing.assert_close(gated, each.mean(1, keepdim=True) * 3 * torch.tanh(z))


def test_dropped_rows_are_zero_and_the_others_scaled_up() -> None:
    torch.manual_seed(0)
    branch = torch.ones(4, 1000, 2)
    found = drop_rows(branch, 0.5, 1)
    assert set(found.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(found, found[:1, :, :1].expand_as(found)), "a row is one index of the axis of rows"
    assert 0.4 < found.mean() / 2 < 0.6


def test_nothing_is_dropped_outside_of_training() -> None:
    z = torch.randn(3, 4)
    drops = {"dropout": 0.9, "stochastic_depth": 0.9}
    assert torch.equal(full_bottleneck(z, z, torch.tanh, **drops), torch.tanh(z))
    assert not torch.equal(full_bottleneck(z, z, torch.tanh, **drops, training=True), torch.tanh(z))
