"""The change drill of a way of acting: entering and leaving a host's call, knowing the forward's mask and cache.

A copy of the package gets it as a developer would write it: two new files, and a line in each of two that exist.
"""

from pathlib import Path

from ..drill import copy_of_package, insert, run_with

WAY = '''
"""Acting around a host's call: enter it with more tokens than the model knows of, and leave it without them."""

from dataclasses import dataclass
from typing import Any

import torch

from ..composition.nodes import Composition
from ..placement.spec import SiteSpec
from ..structure.paths import SITE
from .forward_call import ForwardCall
from .handover import Handover
from .hooks import KitHook
from .steps import Step


class EnterHook(KitHook):
    is_pre = True

    def __call__(self, module, args, kwargs):
        site = module._modules[SITE]
        steps = site.steps.get("call")
        if not steps or not site.state.activation.check(steps[0].adapter):
            return None
        call = (args, kwargs)
        for step in steps:
            call = step(site, module, args, kwargs, call)
        return call


class LeaveHook(KitHook):
    is_first = True

    def __call__(self, module, args, kwargs, output):
        site = module._modules[SITE]
        steps = site.steps.get("call")
        if not steps or not site.state.activation.check(steps[0].adapter):
            return None
        for step in reversed(steps):
            output = step.leave(site, output) if isinstance(step, Prepend) else output
        return output


@dataclass(frozen=True)
class Prepend(Step):
    key: str
    adapter: Composition | None
    spec: SiteSpec
    handover: Handover[ForwardCall]

    @property
    def module_keys(self):
        return (self.key,)

    def __call__(self, site, host, args, kwargs, value):
        prefix, forward = site._modules[self.key].prefix, self.handover.peek()
        if forward.cache is not None:
            return value
        (x, *rest), kwargs = value
        rows = prefix.expand(x.shape[0], *prefix.shape)
        if forward.mask is not None:
            mask = kwargs.get("mask", forward.mask)  # as the model was given it, or as another step has lengthened it
            kwargs = {**kwargs, "mask": torch.cat([mask.new_ones(x.shape[0], prefix.shape[0]), mask], 1)}
        return (torch.cat([rows, x], 1), *rest), kwargs

    def leave(self, site, output):
        forward = self.handover.peek()
        return output if forward.cache is not None else output[:, site._modules[self.key].prefix.shape[0] :]


def prepend(entry, active, module):
    return Prepend(entry.key, active, entry.spec, entry.handover)
'''

METHOD = '''
"""Learned tokens in front of what an attention takes."""

from typing import ClassVar, Literal

import torch
from torch import nn

from ..config.settings import TensorConfig
from ..placement.rule import Placement


class SoftTokensConfig(TensorConfig):
    method: Literal["soft_tokens"] = "soft_tokens"
    length: int = 3


class SoftTokensModule(nn.Module):
    def __init__(self, length, width, dtype):
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(length, width, dtype=dtype))

    @property
    def compute_dtype(self):
        return self.prefix.dtype

    def forward(self, z, x):
        raise NotImplementedError


class SoftTokens:
    name = "soft_tokens"
    config_type = SoftTokensConfig
    presets: ClassVar = {"soft_tokens": {}}

    def placements(self, config):
        return (Placement(at="call"),)

    def build(self, config, site, *, host, dtype):
        return SoftTokensModule(config.length, site.width, dtype)
'''

# In files that exist: what a developer adds, and before which line.
LINES = {
    "runtime/acting.py": [
        ("from .hooks import", "from .around_call import EnterHook, LeaveHook, prepend\n"),
        (
            '    Acting("input"',
            '    Acting("call", prepend, before=EnterHook, after=LeaveHook, is_shared=True, reads_forward=True, label="(call)"),\n',
        ),
    ],
    "methods/in_tree.py": [("from .vera import", "from .soft_tokens import SoftTokensConfig as SoftTokensConfig\n")],
}

SCRIPT = '''
import tempfile

import torch
from torch import nn

import adapterkit as ak

torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, mask=None):
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 8**0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, :] == 0, float("-inf"))
        return self.o(scores.softmax(-1) @ self.v(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Attention()

    def forward(self, x, mask):
        return x + self.attention(self.norm(x), mask=mask)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 8), nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids, attention_mask=None, cache=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, attention_mask)
        return x


def by_hand(model, prefixes, ids, mask):
    """The definition: keys and values of learned tokens before those of the text, whose queries alone count."""
    x = model.embed(ids)
    for block, prefix in zip(model.blocks, prefixes):
        h, a = block.norm(x), block.attention
        more = torch.cat([prefix.expand(len(ids), -1, -1), h], 1)
        scores = a.q(h) @ a.k(more).transpose(1, 2) / 8**0.5
        seen = torch.cat([mask.new_ones(len(ids), prefix.shape[0]), mask], 1)
        scores = scores.masked_fill(seen[:, None, :] == 0, float("-inf"))
        x = x + a.o(scores.softmax(-1) @ a.v(more))
    return x


model = Model().eval()
ids = torch.randint(0, 11, (2, 5))
mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
base = model(ids, attention_mask=mask)
kit = ak.wrap(model, {"ids": ids, "attention_mask": mask})
kit.add("a", {"method": "soft_tokens", "targets": ["attention"]})
assert torch.equal(model(ids, attention_mask=mask), base), "not active yet"
kit.train_adapter("a")
prefixes = [block.attention._adapterkit.a.prefix for block in model.blocks]
found = model(ids, attention_mask=mask)
torch.testing.assert_close(found, by_hand(model, prefixes, ids, mask))
torch.testing.assert_close(model(ids, mask), found, msg="the mask by position, too")
assert torch.equal(model(ids, attention_mask=mask, cache=object()), base), "a cache holds them already"
found.square().mean().backward()
assert all(prefix.grad.abs().sum() > 0 for prefix in prefixes)
assert model.embed.weight.grad is None
assert "(call)" in str(kit.tree(depth=None)), kit.tree(depth=None)
kit.verify(optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1))
try:
    kit.merge("a")
except ak.CompatibilityError as error:
    assert "no change of a weight" in str(error), error
kit.add("b", {"method": "soft_tokens", "targets": ["attention"]})
try:
    kit.activate(ak.Rows(["a", "b"]))
except ak.CompatibilityError as error:
    assert "which all rows and tokens share" in str(error), error
kit.activate(ak.Stack("a", "b"))
assert not torch.allclose(model(ids, attention_mask=mask), found)
kit.activate("a")
folder = kit.save("a", tempfile.mkdtemp() + "/a")
kit.unwrap()
assert torch.equal(model(ids, attention_mask=mask), base)
assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
kit = ak.wrap(model, {"ids": ids, "attention_mask": mask})
kit.load(folder)
kit.activate("a")
assert torch.equal(model(ids, attention_mask=mask), found)
print("ran")
'''


def test_a_way_of_acting_is_two_new_files_and_lines_in_two_that_exist(tmp_path: Path) -> None:
    package = copy_of_package(tmp_path)
    (package / "runtime" / "around_call.py").write_text(WAY)
    (package / "methods" / "soft_tokens.py").write_text(METHOD)
    for name, lines in LINES.items():
        for before, line in lines:
            insert(package / name, line, before=before)
    assert run_with(package, SCRIPT) == "ran"
