"""The heads of combined adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak

from ...hosts.tiny import Blocks, PostNormBlock, Tiny, randomise
from .helpers import check_loads, exact


def test_heads_are_the_models_own_and_the_weighted_differences_to_it(ids: Tensor, tmp_path: Path) -> None:
    model = Tiny(PostNormBlock).double().eval()
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["query"], heads=["classifier"])
    kit.add("b", "lora", targets=["query"], heads=["classifier"])
    kit.add("c", "lora", targets=["query"])
    with torch.no_grad():
        for name in "ab":
            for parameter in kit.parameters(name, heads=True):
                parameter.add_(torch.randn_like(parameter))
    kit.combine("sum", {"c": 1, "a": 2, "b": -0.5})
    heads = [list(kit.parameters(name, heads=True))[-2:] for name in ("a", "b", "sum")]
    own = [p for name, p in model.classifier.named_parameters() if "_adapterkit" not in name]
    for base, a, b, found in zip(own, *heads, strict=True):
        exact(found, base + 2 * (a - base) - 0.5 * (b - base))
    check_loads(kit, "sum", ids, tmp_path)
    kit.add("d", "lora", targets=["classifier"])
    randomise(kit, "d")
    kit.activate("d")
    kit.merge("d")
    kit.combine("while one is merged", {"c": 1, "a": 2, "b": -0.5})
    for one, other in zip(*(kit.parameters(name, heads=True) for name in ("sum", "while one is merged")), strict=True):
        assert torch.equal(one, other)
    kit.combine("without", {"a": 1, "b": 1}, heads=False)
    assert len(list(kit.parameters("without", heads=True))) == len(list(kit.parameters("without", heads=False)))


def test_a_head_with_tied_weights_and_a_counter_is_combined_once() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.two(self.one(x)))

    model = nn.Sequential(nn.Linear(4, 4), Head()).double()
    kit = ak.wrap(model)
    for name in "ab":
        kit.add(name, "lora", targets=["0"], heads=["1"])
    own = model[1].one.weight
    for index, name in enumerate("ab"):
        head: Any = model[1]._adapterkit.first_module(name)
        with torch.no_grad():
            head.one.weight.add_(index + 1.0)
            head.norm.running_mean.add_(index + 1.0)
            head.norm.num_batches_tracked.add_(7 + index)
    kit.combine("sum", {"a": 3, "b": -1})
    found: Any = model[1]._adapterkit.first_module("sum")
    assert found.two.weight is found.one.weight
    exact(found.one.weight, own + 1.0)
    exact(found.norm.running_mean, torch.ones(4).double())
    assert found.norm.num_batches_tracked == 7


def test_a_head_and_a_site_in_it_are_refused(ids: Tensor) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).eval())
    kit.add("a", "lora", targets=["query"], heads=["classifier"])
    kit.add("b", "lora", targets=["query", "classifier"])
    with pytest.raises(ak.TargetError, match=r"\['classifier'\] lie inside the head 'classifier'"):
        kit.combine("sum", {"a": 1, "b": 1})
    assert [*kit.adapters] == ["a", "b"]
    kit.combine("sum", {"a": 1, "b": 1}, heads=False)


def test_new_heads_are_copied_from_their_only_owner_and_averaged_where_there_are_several(
    ids: Tensor, tmp_path: Path
) -> None:
    kit = ak.wrap(Blocks(PostNormBlock).double().eval(), ids)
    tags, classes = ak.TaggingHead(("O", "B")), ak.ClassificationHead(num_labels=3, seed=1)
    for name, heads in {
        "a": [tags, classes],
        "b": [ak.ClassificationHead(num_labels=3, seed=2)],
        "c": [ak.TaggingHead(("O", "C"))],
    }.items():
        kit.add(name, "lora", targets=["query"], heads=heads)
    kit.combine("mean", {"a": 0.25, "b": 0.75})
    a, b, mean = (
        {entry.spec.config.name: module for entry, module in kit.model._adapterkit.modules_of(name)}
        for name in ("a", "b", "mean")
    )
    for key, tensor in mean["tagging"].state_dict().items():
        assert torch.equal(tensor, a["tagging"].state_dict()[key])
    assert mean["tagging"].layers.last.weight is not a["tagging"].layers.last.weight
    for key, tensor in mean["classification"].state_dict().items():
        exact(tensor, 0.25 * a["classification"].state_dict()[key] + 0.75 * b["classification"].state_dict()[key])
    kit.activate("mean")
    found = kit.model(ids)
    kit.save("mean", tmp_path)
    kit.remove("mean")
    kit.activate(kit.load(tmp_path))
    assert torch.equal(kit.model(ids).heads["classification"], found.heads["classification"])
    for weights, message in (
        ({"a": 1, "b": 1}, r"the heads 'classification' of \['a', 'b'\] are no copies .* but the weights sum to 2"),
        ({"a": 0.5, "c": 0.5}, r"the heads 'tagging' of \['a', 'c'\] .* but they have other settings or shapes"),
    ):
        with pytest.raises(ak.ConfigError, match=message):
            kit.combine("sum", weights)
    kit.combine("sum", {"a": 1, "b": 1}, heads=False)


def test_copies_of_one_head_for_other_labels_are_not_summed(ids: Tensor) -> None:
    kit = ak.wrap(Tiny(PostNormBlock), ids)
    for name, labels in (("a", ("x", "y", "z")), ("b", ("z", "y", "x"))):
        kit.add(name, "lora", targets=["query"], heads=ak.OwnHead("classifier", labels=labels))
    with pytest.raises(ak.ConfigError, match=r"the heads 'classifier' of \['a', 'b'\] have other labels"):
        kit.combine("sum", {"a": 0.5, "b": 0.5})
