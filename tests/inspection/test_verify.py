"""Reports count where a list would be long, and say why something could not be looked at."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak

from ..hosts.tiny import PostNormBlock, Tiny, randomise

CONFIG = ak.BottleneckConfig(targets=["attention.out", "down"], bottleneck_size=3)


def theta(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "_adapterkit" not in name)


def test_what_an_optimizer_lacks_is_one_line_for_each_owner(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    kit.add("a", CONFIG)
    kit.activate("a")
    (alone,) = [text for text in kit.verify(optimizer=other).problems if "optimizer" in text]
    assert alone.startswith("16 parameters of adapter 'a' train"), "an open base is a problem of its own"
    base = [parameter for name, parameter in post_norm.named_parameters() if "_adapterkit" not in name]
    count = len(base)
    kit.freeze()
    for parameter in base:
        parameter.requires_grad_(True)  # behind the kit
    lacking = [text for text in kit.verify(optimizer=other).problems if "optimizer" in text]
    assert len(lacking) == 2
    assert re.fullmatch(
        rf"{count} parameters of the base train, but the optimizer holds none of them: '.*', '.*', '.*' and "
        rf"{count - 3} more",
        lacking[0],
    )
    assert lacking[1].startswith(
        "16 parameters of adapter 'a' train, but the optimizer holds none of them (kit.parameters('a') gives all): "
        "'blocks.0.attention.out._adapterkit.a.down_weight', "
    )
    assert lacking[1].endswith("and 13 more")


def test_a_first_step_that_would_train_the_base_is_noticed(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)
    total = theta(post_norm)
    expected = f"adapter 'a' is there but not active, .* would train all {total:,} base .* kit.train_adapter\\('a'\\)"
    (problem,) = kit.verify().problems
    assert re.fullmatch(expected, problem)
    post_norm.embedding.requires_grad_(False)
    (problem,) = kit.verify().problems
    assert f"would train {total - 11 * 8:,} of the {total:,} base parameters" in problem
    kit.add("b", CONFIG)
    assert kit.verify().problems[0].startswith("adapters 'a', 'b' are there but not active")
    kit.freeze()
    (problem,) = kit.verify().problems
    assert problem.startswith("no adapter is active, so that none could be proven")


def test_parameters_that_were_opened_behind_the_kit_are_counted(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.freeze()
    post_norm.blocks.requires_grad_(True)
    count = len(list(post_norm.blocks.parameters()))
    (problem,) = kit.verify().problems
    assert problem.startswith(f"the base is frozen, yet {count} of its parameters require grad: 'blocks.0.")
    assert problem.endswith(f" and {count - 3} more")


def test_require_gives_the_report_back(post_norm: Tiny, ids: Tensor) -> None:
    kit = ak.wrap(post_norm, ids)
    kit.add("a", CONFIG)
    kit.train_adapter("a")
    report = kit.verify()
    assert report.require() is report
    assert str(report.require()).endswith("base: frozen, unmoved\nno problems")


class Refusing(nn.Module):
    """A model that runs on nothing that can be guessed, and not in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, key: object = None) -> Tensor:
        if key != "open":
            raise ValueError("the door is closed")
        if self.training:
            raise ValueError("labels are needed")
        return self.linear(x)  # type: ignore[no-any-return]  # a tensor


def test_why_a_model_could_not_be_run_is_in_the_report() -> None:
    kit = ak.wrap(Refusing().eval())
    kit.add("a", "lora", targets=["linear"])
    kit.train_adapter("a")
    report = kit.verify()
    assert report.sites is None
    assert report.note
    assert f"no site was run: {report.note}" in str(report)


def test_why_a_model_does_not_run_in_training_mode_is_said() -> None:
    kit = ak.wrap(Refusing().eval())
    kit.add("a", "lora", targets=["linear"])
    kit.train_adapter("a")
    problems = kit.verify((torch.zeros(2, 4), "open")).problems
    assert any(
        "'linear' ran in eval mode, but never in training mode" in text and "labels are needed" in text for text in problems
    )


class OneWay(torch.autograd.Function):
    """The identity, without a backward."""

    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_context: Any, *_gradients: Tensor) -> Tensor:
        raise RuntimeError("this layer has no backward\nand more lines")


class EndsOneWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return OneWay.apply(self.linear(x))  # type: ignore[no-untyped-call]  # torch's


@pytest.mark.parametrize("trains_in_backward", [False, True])
def test_a_model_that_refuses_to_give_gradients_says_why(trains_in_backward: bool) -> None:
    """Where a hook may train in a backward, none is run to look: the refusal itself is the reason then."""
    kit, x = ak.wrap(EndsOneWay()), torch.randn(2, 4)
    kit.add("a", "lora", targets=["linear"])
    kit.train_adapter("a")
    if trains_in_backward:
        next(iter(kit.parameters("a"))).register_post_accumulate_grad_hook(lambda _: None)
    assert kit.verify(x).problems == ("no gradients can be computed: this layer has no backward",)


def test_the_summary_says_whether_the_base_is_open(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)

    rows = str(kit.summary()).splitlines()
    assert [rows[1].split()[-3:], rows[2].split()[-1]] == [["no", "open", "no"], "open"], "added: neither active nor frozen"
    assert kit.summary().base_open == theta(post_norm)
    assert not kit.summary().adapters[0].is_active
    kit.train_adapter("a")
    rows = str(kit.summary()).splitlines()
    assert [rows[1].split()[-3:], rows[2].split()[-1]] == [["yes", "open", "no"], "frozen"]
    assert kit.summary().base_open == 0
    kit.unfreeze()
    post_norm.embedding.requires_grad_(False)
    assert "% open" in str(kit.summary()).splitlines()[-1]


def test_what_a_fusion_attends_to_fits_a_screen(ids: Tensor) -> None:
    torch.manual_seed(0)
    model = Tiny(PostNormBlock).eval()
    kit = ak.wrap(model, ids)
    for name in ("a", "b"):
        kit.add(name, CONFIG)
        randomise(kit, name)
    kit.add_fusion(ak.Fuse("a", "b"))
    kit.activate(ak.Fuse("a", "b"))
    with kit.fusion_attention() as seen:
        assert repr(seen) == "FusionAttention('a,b', 2 children at 4 sites, 0 forwards)"
        for _ in range(3):
            model(ids)
    text = str(seen)
    assert text.startswith("FusionAttention('a,b', 2 children at 4 sites, 3 forwards)\nsite")
    assert len(text.splitlines()) == 2 + 4
    for line, mean in zip(text.splitlines()[2:], seen.mean().tolist(), strict=True):
        assert line.split()[-2:] == [f"{value:.2f}" for value in mean]
    many = ak.FusionAttention(seen.fusion, seen.children, {f"blocks.{i}": [torch.ones(3, 2) / 2] for i in range(96)})
    assert len(str(many).splitlines()) == 2 + 21
    assert "… 76 more" in str(many)
    assert len(str(many)) < 2000


@pytest.mark.parametrize("count", [0, 1])
def test_an_attention_that_saw_little_prints_all_the_same(count: int) -> None:
    seen = ak.FusionAttention("f", ("a", "b"), {"x": [torch.ones(2, 2) / 2] * count})
    assert f"{count} forwards" in repr(seen)
    assert ("0.50" in str(seen)) == bool(count)
