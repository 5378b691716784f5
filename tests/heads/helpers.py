"""A small BERT with heads, batches for it, and the modules that a head holds."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import adapterkit as ak
from adapterkit.runtime.site import HeadEntry

from ..hosts.tiny import randomise

SMALL = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
ADAPTER = ak.BottleneckConfig(targets=["attention.output.dense"], bottleneck_size=3)
CLASSES = ak.ClassificationHead(("x", "y", "z"), pooling="mean", layers=2)


def bert() -> BertModel:
    return BertModel(BertConfig(**SMALL)).eval()


def batch(rows: int = 4) -> dict[str, Tensor]:
    mask = torch.ones(rows, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(0, 20, (rows, 6)), "attention_mask": mask}


def kit_of(model: nn.Module, heads: dict[str, Any], config: Any = ADAPTER) -> ak.AdapterKit:
    kit = ak.wrap(model)
    for name, head in heads.items():
        kit.add(name, config, heads=head)
        randomise(kit, name)
    return kit


def held(kit: ak.AdapterKit, name: str, index: int = 0, path: str = "") -> Any:
    """The module of an adapter's head at a host."""
    site = kit.model.get_submodule(path)._adapterkit
    return [module for entry, module in site.modules_of(name) if isinstance(entry, HeadEntry)][index]


def row(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index : index + 1] for name, tensor in inputs.items()}


def mixed_kit() -> ak.AdapterKit:
    heads = {
        "a": CLASSES,
        "b": ak.ClassificationHead(num_labels=3),
        "tags": [ak.TaggingHead(num_labels=2), ak.RegressionHead()],
        "none": (),
    }
    return kit_of(bert(), heads)


class Custom(nn.Module):
    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(8, outputs)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.linear(hidden[:, 0]) if mask is None else self.linear(hidden.mean(1)) * mask.sum()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.sum(-1) - labels).abs().mean()
