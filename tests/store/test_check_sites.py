"""Another structure under the same names and shapes is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak

from ..helpers import trace_of
from ..hosts.blocks import VOCAB, Model, Post, Pre, randomised
from ..hosts.tiny import randomise

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
PRESETS = ["houlsby", "pfeiffer", "adapter_plus", "parallel"]


def saved(model: nn.Module, config: Any, directory: Path, inputs: Any = None, **settings: Any) -> Path:
    kit = ak.wrap(model, inputs)
    kit.add("a", config, **settings)
    randomise(kit, "a")
    return kit.save("a", directory)


def alike(model: nn.Module, block: type[nn.Module]) -> nn.Module:
    """A copy with the same weights, whose blocks are put together in another way."""
    other = copy.deepcopy(model)
    for name in ak.wrap(other).adapters:
        ak.wrap(other).remove(name)
    ak.wrap(other).unwrap()
    for inner in other.blocks:  # type: ignore[union-attr]  # a Model
        inner.__class__ = type(type(inner).__name__, (block,), {})
    return other


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("one", "other"), [(Pre, Post), (Post, Pre)])
def test_blocks_that_add_in_another_order_are_another_structure(
    preset: str, one: type[Pre], other: type[Pre], tmp_path: Path
) -> None:
    model = randomised(Model(one))
    path = saved(model, preset, tmp_path)
    target = alike(model, other)
    before = trace_of(target)
    with pytest.raises(
        ak.CompatibilityError, match=r"another structure than this Model: 'blocks\.0[^']*': saved .*; here "
    ):
        ak.wrap(target).load(path)
    assert trace_of(target) == before


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("block", [Pre, Post])
@pytest.mark.parametrize("inputs", [None, IDS], ids=["made", "given"])
def test_the_same_structure_loads(preset: str, block: type[Pre], inputs: Tensor | None, tmp_path: Path) -> None:
    model = randomised(Model(block)).eval()
    path = saved(model, preset, tmp_path, inputs)
    kit = ak.wrap(alike(model, block), inputs)
    kit.load(path)
    kit.activate("a")
    ak.wrap(model).activate("a")
    assert torch.equal(kit.model(IDS), model(IDS))


def test_a_manifest_that_knows_of_no_norms_loads(tmp_path: Path) -> None:
    model = randomised(Model(Pre))
    path = saved(model, "houlsby", tmp_path)
    manifest = json.loads((path / "adapter.json").read_text())
    assert {site.pop("norm") for site in manifest["sites"]} == {"pre"}
    (path / "adapter.json").write_text(json.dumps(manifest))
    assert ak.wrap(alike(model, Pre)).load(path) == "a"


def test_a_model_without_the_place_is_refused(tmp_path: Path) -> None:
    class Plain(Pre):
        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.norm2(self.attention(self.norm1(x))))

    model = randomised(Model(Pre))
    path = saved(model, "houlsby", tmp_path)
    with pytest.raises(ak.CompatibilityError, match=r"another structure than this Model: '@sublayer.out'"):
        ak.wrap(alike(model, Plain)).load(path)


def test_a_model_that_cannot_be_traced_loads_unchecked_with_a_warning(tmp_path: Path) -> None:
    class Closed(Model):
        def forward(self, input_ids: Tensor, key: object = None) -> Tensor:
            if key != "open":
                raise ValueError("closed")
            return super().forward(input_ids)

    model = randomised(Closed(Pre))
    path = saved(model, "pfeiffer", tmp_path, {"input_ids": IDS, "key": "open"})
    other = alike(model, Pre)
    with pytest.warns(ak.SitesNotCheckedWarning, match=r"could not be checked against this Closed.*example_inputs=batch"):
        assert ak.wrap(other).load(path) == "a"


def test_sites_that_names_decide_on_are_not_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Model(Pre))
    path = saved(model, ak.BottleneckConfig(targets=["mlp"], bottleneck_size=2), tmp_path, IDS)
    other = alike(model, Post)
    monkeypatch.setattr(type(other), "forward", lambda *_: pytest.fail("was run"))
    assert ak.wrap(other).load(path) == "a"
