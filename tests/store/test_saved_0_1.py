"""Adapters saved at commit aeb8dc3 load, and the model returns with them what it returned there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import adapterkit as ak

SAVED = Path(__file__).parent / "saved_0_1"
SEEN = json.loads((SAVED / "model.json").read_text())
OUTPUTS = load_file(SAVED / "outputs.safetensors")
IDS = torch.arange(8).reshape(2, 4)


def base() -> nn.Module:
    model = GPT2LMHeadModel(GPT2Config(**SEEN["config"])).eval()
    missing, unexpected = model.load_state_dict(load_file(SAVED / "base.safetensors"), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        seen = model(input_ids=IDS)
    return seen.logits if hasattr(seen, "logits") else seen[0]


@pytest.mark.parametrize("name", sorted(SEEN["adapters"]))
def test_an_adapter_saved_at_the_first_format_runs_as_it_did(name: str) -> None:
    model = base()
    kit = ak.wrap(model, {"input_ids": IDS})
    if name == "fusion":
        kit.load(SAVED / "pfeiffer")
        kit.load(SAVED / "head")
    kit.load(SAVED / name)
    kit.activate(kit.fusions[name] if name == "fusion" else name)
    torch.testing.assert_close(logits(model), OUTPUTS[name], rtol=1e-5, atol=1e-6)
    without = logits(base())
    assert OUTPUTS[name].shape != without.shape or not torch.allclose(OUTPUTS[name], without), "it does something"


def test_the_fixtures_cover_every_method() -> None:
    methods = {json.loads((SAVED / name / "adapter.json").read_text())["config"]["method"] for name in SEEN["adapters"]}
    assert methods >= {"bottleneck", "compacter", "lora", "vera", "ia3", "bitfit", "norm_tuning", "union", "fusion"}
