"""What modules say of themselves."""

import torch
from torch import nn

from adapterkit.nn.bottleneck import BottleneckAdapter
from adapterkit.nn.dora import DoRA
from adapterkit.nn.functional.projections import projection_of
from adapterkit.nn.invertible import InvertibleAdapter
from adapterkit.nn.lora import LoRA
from adapterkit.nn.traits import (
    BiasDelta,
    LowRankDelta,
    WeightDelta,
    reads_bare_output,
    takes_back,
    why_not_summed,
)

PROJECTION = projection_of(nn.Linear(3, 2))
assert PROJECTION is not None
DORA = DoRA(PROJECTION, 1, magnitude=None)


def test_a_module_that_says_nothing_is_the_ordinary_case() -> None:
    module = BottleneckAdapter(4, 2)
    assert not reads_bare_output(module)
    assert not takes_back(module)
    assert why_not_summed(module) is None
    assert not isinstance(module, (LowRankDelta, WeightDelta, BiasDelta))


def test_a_dora_reads_what_its_host_returned_and_is_no_term_of_a_sum() -> None:
    assert reads_bare_output(DORA)
    assert why_not_summed(DORA) == "is a DoRA, whose magnitudes multiply the weight and do not add up"


def test_the_inverse_of_a_coupling_takes_back() -> None:
    assert takes_back(InvertibleAdapter("inverse"))
    assert not takes_back(InvertibleAdapter("forward"))


def test_a_gated_lora_is_no_term_of_a_sum() -> None:
    assert why_not_summed(LoRA(PROJECTION, 1)) is None
    assert str(why_not_summed(LoRA(PROJECTION, 1, gating=True))).startswith("is a gated LoRA, whose gate depends on")


def test_the_delta_of_a_bias_is_scaled() -> None:
    assert LoRA(PROJECTION, 1).bias_delta() is None
    lora = LoRA(PROJECTION, 1, bias=True, scaling=3.0)
    with torch.no_grad():
        lora.lora_bias.copy_(torch.tensor([1.0, 2.0]))
    assert torch.equal(lora.bias_delta(), torch.tensor([3.0, 6.0]))
