"""What cannot be merged is refused with the reason; hosts of their own kind are tried."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import adapterkit as ak

from ...hosts.merging import (
    Bound,
    SameForward,
    Scaled,
    ScaledEmbedding,
    ScalingConfig,
    Strange,
    expanded,
    pruned,
    subclassed,
    weight_normed,
)
from .helpers import LAYER, adapted, close, rows, same, weights

REFUSALS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "bottleneck": (
        lambda: nn.Sequential(nn.Linear(6, 4)),
        ak.BottleneckConfig(targets=["0"]),
        "'0': 'bottleneck' is no change",
    ),
    "union": (
        lambda: nn.Sequential(nn.Linear(6, 4)),
        ak.Union(LAYER, ak.BottleneckConfig(targets=["0"])),
        "'bottleneck' is no change of a weight",
    ),
    "gated": (lambda: nn.Sequential(nn.Linear(6, 4)), LAYER.override({"gating": True}), "'0': a gated LoRA.*depends"),
    "bias of none": (
        lambda: nn.Sequential(nn.Linear(6, 4, bias=False)),
        LAYER.override({"bias": True}),
        "trained bias of 4 features and the host has none",
    ),
    "tied": (lambda: Bound("Parameter"), ak.LoRAConfig(targets=["one"]), "'one'.*weight is shared with 'two.weight'"),
    "same memory": (lambda: Bound("memory"), ak.LoRAConfig(targets=["one"]), "weight is shared with 'two.weight'"),
    "transposed": (lambda: Bound("transposed"), ak.LoRAConfig(targets=["two"]), "weight is shared with 'one.weight'"),
    "weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4))),
        LAYER,
        r"computed by torch.nn.utils.parametrize \(_WeightNorm\).*remove_parametrizations",
    ),
    "orthogonal": (
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6))),
        LAYER,
        "torch.nn.utils.parametrize.*remove_parametrizations",
    ),
    "old weight_norm": (weight_normed, LAYER, r"computed from \['weight_g', 'weight_v'\].*remove_weight_norm"),
    "spectral_norm": (
        lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(6, 4))),
        LAYER,
        r"computed from \['weight_orig'\].*remove_spectral_norm",
    ),
    "pruned": (pruned, LAYER, r"computed from \['weight_orig'\]"),
    "expanded": (expanded, LAYER, "several of whose values are one in memory"),
    "subclass": (subclassed, LAYER, r"weight is a MyTensor \(packed, quantised or sharded\)"),
    "own forward": (
        lambda: nn.Sequential(Strange(6, 4)),
        LAYER,
        "its own forward could not be tried: ValueError: no factor",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_merged_is_refused_with_the_reason_and_nothing_changes(case: str) -> None:
    build, config, reason = REFUSALS[case]
    model = build()
    kit = adapted(model, config=config)
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ak.CompatibilityError, match=rf"adapter 'a' cannot be merged into .*{reason}.*Nothing was changed"):
        kit.merge("a")
    assert same(weights(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not kit.summary().adapters[0].is_merged
    kit.deactivate()


def test_a_host_that_does_more_than_multiply_is_tried() -> None:
    ids = torch.randint(0, 11, (3, 5))
    model = nn.Sequential(ScaledEmbedding(11, 6), nn.Linear(6, 4))
    kit = adapted(model, inputs=ids, config=LAYER)
    with pytest.raises(ak.CompatibilityError, match="ScaledEmbedding does more than multiply by its weight"):
        kit.merge("a")
    for harmless in (ScaledEmbedding(11, 6), nn.Embedding(11, 6)):
        harmless.scale = 1.0
        model = nn.Sequential(harmless, SameForward(6, 4))
        kit = adapted(model, inputs=ids, config=ak.LoRAConfig(targets=["0", "1"]))
        expected, state = model(ids), torch.get_rng_state()
        kit.merge("a")
        close(model(ids), expected)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_was_put_on_the_instance_is_tried_too() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    plain = model[0].forward
    model[0].forward = lambda x: plain(x).abs()  # type: ignore[method-assign]  # as some libraries do
    kit = adapted(model, inputs=rows(), config=LAYER)
    with pytest.raises(ak.CompatibilityError, match="does more than multiply"):
        kit.merge("a")
    model[0].forward = lambda x: plain(x + 0)
    kit.merge("a")


def test_a_trial_looks_at_the_rows_of_a_vocabulary_that_change() -> None:
    model = nn.Sequential(ScaledEmbedding(5000, 6))
    kit = adapted(model, inputs=torch.randint(0, 11, (3, 5)), config=LAYER)
    with torch.no_grad():
        a = next(p for name, p in kit.named_parameters("a") if name.endswith("lora_A"))
        a[:, torch.arange(5000) != 1234] = 0.0
    with pytest.raises(ak.CompatibilityError, match="does more than multiply"):
        kit.merge("a")


def test_a_trial_is_without_dropout_and_leaves_the_mode_alone() -> None:
    class Dropping(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(z, 0.5, self.training))

    model = nn.Sequential(Dropping(6, 4))
    kit = adapted(model, inputs=rows(), config=LAYER.override({"dropout": 0.5}))
    model.train()
    kit.merge("a")
    assert all(module.training for module in model.modules())


@pytest.mark.usefixtures("scaling")
def test_modules_at_one_host_that_depend_on_one_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that scales by what it reads of the host's own weight, not of the changed one."""
    monkeypatch.setattr(Scaled, "forward", lambda self, z, x: x * self.l.mean() - x * 0.5)
    monkeypatch.setattr(Scaled, "merged", lambda self, tensors: {"weight": tensors["weight"] * self.l.mean()})
    kit = adapted(nn.Sequential(nn.Linear(6, 4)), inputs=rows(), config=ak.Union(LAYER, ScalingConfig(targets=["0"])))
    with pytest.raises(ak.CompatibilityError, match="the modules at it depend on one another"):
        kit.merge("a")


def test_an_embedding_that_shortens_its_rows_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(11, 6))
    kit = adapted(model, config=LAYER)
    model[0].max_norm = 1.0
    with pytest.raises(ak.CompatibilityError, match=r"max_norm=1.0 it changes its weight as it looks rows up"):
        kit.merge("a")


def test_a_small_delta_at_a_host_of_its_own_kind_is_not_drowned_in_rounding() -> None:
    for scale, merges in ((1.0, True), (1.01, False)):
        model = nn.Sequential(ScaledEmbedding(11, 6)).bfloat16()
        model[0].scale = scale
        kit = adapted(model, inputs=torch.randint(0, 11, (3, 5)), config=LAYER)
        with torch.no_grad():
            for parameter in kit.parameters("a"):
                parameter.mul_(0.1)
        if merges:
            kit.merge("a")
        else:
            with pytest.raises(ak.CompatibilityError, match="does more than multiply"):
                kit.merge("a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_values_that_are_not_finite_leave_every_weight_as_it_was(dtype: torch.dtype, bad: float) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)
    kit = adapted(model, inputs=rows().to(dtype), config=ak.LoRAConfig(targets=["0", "2"]))
    list(kit.parameters("a"))[-1].data[0, 0] = bad
    before = weights(model)
    if bad == 1e6 and dtype == torch.float32:
        kit.merge("a")
        kit.unmerge("a")
    else:
        reason = "the adapter has values" if bad != 1e6 else "in torch.float16 the merged weight would have values"
        with pytest.raises(ak.CompatibilityError, match=f"into '2': {reason} that are not finite"):
            kit.merge("a")
    assert same(weights(model), before)


def test_a_product_that_overflows_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    kit = adapted(model, inputs=rows(), config=LAYER)
    for parameter in kit.parameters("a"):
        parameter.data.fill_(1e30)
    with pytest.raises(ak.CompatibilityError, match=r"in torch.float32 the merged weight would have values that are not"):
        kit.merge("a")


def test_quantised_and_offloaded_weights_are_refused() -> None:
    for change, reason in (
        (lambda w: nn.Parameter(w.to(torch.int32), requires_grad=False), r"int32 \(quantised"),
        (lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), requires_grad=False), r"float8_e4m3fn \(quantised"),
        (lambda w: nn.Parameter(w.new_empty(0)), "is empty here"),
        (lambda w: nn.Parameter(w.to("meta")), "on the meta device"),
        (lambda w: nn.Parameter(w.to_sparse()), "not a dense tensor"),
    ):
        model = nn.Sequential(nn.Linear(6, 6))
        kit = adapted(model, config=LAYER)
        model[0].weight = change(model[0].weight.detach())
        with pytest.raises(ak.CompatibilityError, match=reason):
            kit.merge("a")
