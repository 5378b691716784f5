"""Heads in files: what travels, what old files say, what contradicts itself."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.store.own_format import read_manifest

from ..helpers import trace_of
from ..hosts.tiny import PostNormBlock, Tiny, randomise
from .helpers import fresh_encoder

CONFIG = ak.BottleneckConfig(targets=["down"], bottleneck_size=3)
TAGS = ak.TaggingHead(("O", "B-PER"), name="entities", layers=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two heads on the output, and a copy of the model's own."""
    kit = ak.wrap(fresh_encoder(), torch.zeros(1, 5, dtype=torch.long))
    kit.example_inputs = None
    kit.add("a", CONFIG)
    kit.add_head("a", [TAGS, ak.CausalLMHead(tied="embedding"), "blocks.1.up"])
    with torch.no_grad():
        for parameter in kit.parameters("a", heads=True):
            parameter.normal_()
    return kit.save("a", tmp_path / "adapter")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "adapter.json").read_text())
    change(content)
    (folder / "adapter.json").write_text(json.dumps(content))


def test_heads_and_their_labels_load_in_a_new_process(saved: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 11, (3, 5))
    kit = ak.wrap(fresh_encoder())
    kit.activate(kit.load(saved))
    assert list(kit.heads("a")) == ["entities", "causal_lm", "blocks.1.up"]
    assert kit.labels("a") == {"entities": {0: "O", 1: "B-PER"}}
    torch.save((ids, kit.model(ids, labels={"causal_lm": ids})[:2]), tmp_path / "expected.pt")
    code = (
        "import torch, adapterkit as ak; from tests.store.helpers import fresh_encoder; "
        f"ids, (loss, logits) = torch.load({str(tmp_path / 'expected.pt')!r}); kit = ak.wrap(fresh_encoder()); "
        f"kit.activate(kit.load({str(saved)!r})); out = kit.model(ids, labels={{'causal_lm': ids}}); "
        "assert torch.equal(out.loss, loss) and torch.equal(out.logits, logits); print(kit.labels('a'))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "{'entities': {0: 'O', 1: 'B-PER'}}" in done.stdout


def test_a_saved_head_saves_the_same_again(saved: Path, tmp_path: Path) -> None:
    kit = ak.wrap(fresh_encoder())
    kit.load(saved)
    again = kit.save("a", tmp_path / "again")
    for file in ("adapter.safetensors", "adapter.json"):
        assert (again / file).read_bytes() == (saved / file).read_bytes()
    assert "entities (O, B-PER), causal_lm, blocks.1.up" in (again / "README.md").read_text()


def test_the_embedding_that_a_head_reads_is_not_in_the_file(saved: Path) -> None:
    assert not any("causal_lm" in key for key in read_manifest(saved).tensors)


def test_heads_may_be_left_out_on_both_ways(saved: Path, tmp_path: Path) -> None:
    kit = ak.wrap(fresh_encoder())
    kit.load(saved, heads=False)
    assert kit.heads("a") == {}
    assert "_adapterkit" not in kit.model._modules
    kit.load(saved, "whole")
    kit.save("whole", tmp_path / "none", heads=False)
    assert read_manifest(tmp_path / "none").heads == ()


def test_a_file_of_before_there_were_kinds_of_heads_loads(tmp_path: Path) -> None:
    kit, ids = ak.wrap(Tiny(PostNormBlock).eval()), torch.randint(0, 11, (3, 5))
    base = copy.deepcopy(kit.model)
    kit.add("a", CONFIG, heads=["classifier"])
    randomise(kit, "a")
    kit.save("a", tmp_path)
    edit(tmp_path, lambda m: m.update(heads=[{key: m["heads"][0][key] for key in ("path", "host", "structure")}]))
    other = ak.wrap(base)
    other.activate(other.load(tmp_path))
    kit.activate("a")
    assert torch.equal(base(ids), kit.model(ids))
    assert other.heads("a") == kit.heads("a") == {"classifier": ak.OwnHead("classifier", name="classifier")}


def head(index: int, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["heads"][index].update(changes)


def setting(index: int, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["heads"][index]["config"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting(0, kind="nothing"), "a head that is none: a head has a kind of"),
        (setting(0, num_labels=7), "num_labels=7, and labels names 2"),
        (setting(0, kind="own"), "a head that is none"),
        (setting(0, self=1), "a head that is none"),
        (setting(0, layers=3), "'heads/@entities/layers.inner.1.bias' is missing"),
        (setting(0, layers=10**6), "a head that is none"),
        (setting(0, name="causal_lm"), r"different names, and \['causal_lm'\]"),
        (setting(2, target="classifier"), "contradicts its place, 'blocks.1.up'"),
        (head(0, config={"kind": "own", "target": "", "name": "entities"}), "contradicts its place, ''"),
        (head(0, above=None), "has another type or shape"),
        (head(0, width=9), "does not match its config"),
        (head(0, width=2**31 - 1), "does not match its config|describes no adapter"),
        (head(0, above=3), "is not behind the last layer"),
        (head(0, path="blocks.1", above=1), "is not behind the last layer"),
        (head(1, embedding="nothing"), r"reads the weight of 'nothing', \(11, 8\), which is not there here"),
        (head(1, embedding="blocks.0.up"), r"which is \(16, 8\) here"),
        (head(1, vocabulary=12), r"reads the weight of 'embedding', \(12, 8\), which is \(11, 8\) here"),
        (head(0, config={"kind": "custom", "name": "mine"}), r"the heads \['mine'\] .* are modules of someone's own"),
        (head(0, config={"kind": "custom", "module": "os"}), "a head that is none"),
        (head(0, nothing=1), "not a valid manifest"),
    ],
)  # fmt: skip
def test_a_head_that_contradicts_itself_or_the_model_is_refused(saved: Path, change: Any, message: str) -> None:
    edit(saved, change)
    model = fresh_encoder()
    before = trace_of(model)
    with pytest.raises((ak.StoreError, ak.CompatibilityError), match=message):
        ak.wrap(model).load(saved, any_base=True)
    assert trace_of(model) == before


def test_a_model_of_another_width_or_vocabulary_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    kit = ak.wrap(model)
    kit.add("a", ak.LoRAConfig(targets=["0"], rank=2), heads=[ak.TaggingHead(num_labels=2), ak.MaskedLMHead()])
    kit.save("a", tmp_path)
    other = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))
    with pytest.raises(
        ak.CompatibilityError, match="the head on the output of '1' reads 8 features, and this one returns 4"
    ):
        ak.wrap(other).load(tmp_path, any_base=True)
    longer = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Tanh())
    with pytest.raises(ak.CompatibilityError, match="the head on the output of '1' is not behind the last layer"):
        ak.wrap(longer).load(tmp_path, any_base=True)


def test_an_adapter_of_a_part_has_its_head_on_that_part(tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor) -> Any:
            return self.inner(ids)

    part, ids = fresh_encoder(), torch.randint(0, 11, (3, 5))
    kit = ak.wrap(part, ids)
    kit.add("a", CONFIG, heads=TAGS)
    kit.activate("a")
    expected = part(ids).logits
    whole = ak.wrap(Around(part))
    assert torch.equal(whole.model(ids).logits, expected)
    whole.save("a", tmp_path)
    other = ak.wrap(Around(fresh_encoder()))
    other.activate(other.load(tmp_path))
    assert torch.equal(other.model(ids).logits, expected)
