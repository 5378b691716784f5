import copy
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import adapterkit as ak
from adapterkit.inspection.tree import Mark, TreeNode, tree_of
from adapterkit.inspection.tree.cells import number, size
from adapterkit.inspection.tree.fold import cut, numbers_as_text
from adapterkit.runtime.lookup import sites_of
from adapterkit.runtime.steps import Pass

from ..hosts.blocks import (
    WIDTH,
    EncoderDecoder,
    FeedForward,
    Functional,
    Mixture,
    Model,
    Parallel,
    Post,
    Pre,
    Sandwich,
    Scaled,
)


class Picky(nn.Module):
    """Runs on nothing that could be made for it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, graph: object) -> None:
        raise ValueError("no such graph")


def nodes(model: nn.Module, **settings: object) -> dict[str, TreeNode]:
    """The nodes of a model's tree by the path of the first module that each stands for."""
    return {node.paths[0]: node for node in tree_of(model, **settings).root.walk()}


def printed(tree: object, width: int, **settings: object) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, **settings)
    console.print(tree)
    return console.file.getvalue()


# --- folding ----------------------------------------------------------------------------------------------------------


def test_blocks_of_the_same_build_are_one_node() -> None:
    root = tree_of(Model(Pre, layers=12)).root
    labels = [child.label for child in root.children]
    assert labels == ["embedding", "blocks.0-11", "norm", "head"]
    block = root.children[1]
    assert block.count == 12
    assert block.paths == tuple(f"blocks.{i}" for i in range(12))
    assert block.parameters == sum(p.numel() for p in Pre().parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "norm1", nn.RMSNorm(WIDTH)),
        lambda block: setattr(block.mlp, "up", nn.Linear(WIDTH, 2 * WIDTH, bias=False)),
        lambda block: block.norm2.requires_grad_(False),
        lambda block: block.mlp.half(),
        lambda block: block.add_module("extra", nn.Linear(2, 2)),
    ],
    ids=["type", "shape", "frozen", "dtype", "child"],
)
def test_a_block_that_differs_in_anything_is_a_node_of_its_own(change: object) -> None:
    model = Model(Pre, layers=4)
    change(model.blocks[2])  # type: ignore[operator]  # a function
    assert [child.label for child in tree_of(model).root.children][1:3] == ["blocks.0-1, 3", "blocks.2"]


def test_a_block_with_other_roles_is_a_node_of_its_own() -> None:
    class Either(Pre):
        is_parallel = False

        def forward(self, x: Tensor) -> Tensor:
            return (Parallel if self.is_parallel else Pre).forward(self, x)  # type: ignore[arg-type]  # either is a Pre

    model = Model(Either, layers=3)
    model.blocks[0].is_parallel = True
    found = nodes(model)
    assert (found["blocks.0"].notes, found["blocks.1"].notes) == (("pre-norm parallel block",), ("pre-norm block",))
    assert found["blocks.1"].count == 2


def test_a_block_with_another_adapter_is_a_node_of_its_own() -> None:
    model = Model(Pre, layers=4)
    ak.wrap(model).add("a", ak.BottleneckConfig(targets=["@feedforward.out"], layers=[1, 2], bottleneck_size=2))
    assert [child.label for child in tree_of(model).root.children][1:3] == ["blocks.0, 3", "blocks.1-2"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([5], "5"),
        (range(12), "0-11"),
        ([0, 1], "0-1"),
        ([0, 2], "0, 2"),
        ([0, 2, 4, 6], "0, 2, …, 6"),
        ([0, 1, 3, 4, 7, 9], "0-1, 3-4, 7, 9"),
        ([0, 2, 3, 5, 6, 8, 9, 11, 14], "0, 2-3, 5-6, …, 14"),
    ],
)
def test_numbers_are_said_in_short(numbers: list[int], text: str) -> None:
    assert numbers_as_text(list(numbers)) == text


def test_a_module_that_only_holds_another_shares_its_line() -> None:
    found = nodes(nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2)))
    assert [node.label for node in found.values()] == ["Sequential", "0.0", "1"]


def test_what_has_no_parameters_and_no_role_has_no_line() -> None:
    assert "blocks.0.dropout" not in nodes(Model(Pre))
    with_role = nodes(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))
    assert with_role["layers.0.dropout1"].roles == ("@attention.out",)
    assert "layers.0.dropout" not in with_role


def test_depth_cuts_the_tree_and_keeps_count_and_adapters_of_what_it_hides() -> None:
    model = Model(Pre)
    ak.wrap(model).add("a", ak.BottleneckConfig(targets=["@feedforward.out"], bottleneck_size=2))
    block = nodes(model, depth=1)["blocks.0"]
    assert block.children == ()
    assert block.hidden == 10
    assert block.adapters == (Mark("a", "output", is_active=False),)
    assert "… 10 more" in str(tree_of(model, depth=1))
    root = tree_of(model).root
    assert cut(root, None) is root
    assert cut(root, 9) == root
    assert cut(root, 0).children == ()


# --- what the parts are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "note"),
    [
        (Pre, "pre-norm block"),
        (Post, "post-norm block"),
        (Sandwich, "sandwich-norm block"),
        (Parallel, "pre-norm parallel block"),
        (Functional, "pre-norm block"),
    ],
)
def test_a_block_says_where_it_normalises(block: type[Pre], note: str) -> None:
    assert nodes(Model(block))["blocks.0"].notes == (note,)


def test_roles_are_those_that_targets_may_use() -> None:
    model = EncoderDecoder()
    found = nodes(model)
    assert nodes(Model(Pre))["embedding"].roles == ("@embedding",)
    assert found["encoder.0.attention"].roles == ("@attention.out",)
    assert found["decoder.0.cross"].roles == ("@crossattention.out",)
    assert found["encoder.0.attention.q"].roles == ("@attention.q", "@attention.first")
    assert found["encoder.0.mlp.down"].roles == ("@feedforward.last",)
    for node in found.values():
        for role in node.roles:
            sites = ak.wrap(model).sites(ak.BottleneckConfig(targets=[role], bottleneck_size=2))
            assert {*node.paths} <= {site.path for site in sites}


def test_the_roles_shown_are_those_that_no_other_implies() -> None:
    text = str(tree_of(Model(Pre)))
    assert "@attention.q" in text
    assert "@attention.first" not in text

    class Flat(Pre):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp.down(self.mlp.up(self.norm1(x)).relu())

    down = nodes(Model(Flat))["blocks.0.mlp.down"]
    assert down.roles == ("@feedforward.out", "@feedforward.last")
    assert "@feedforward.out/last" not in str(tree_of(Model(Flat)))
    fused = str(tree_of(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)))
    assert "@attention.q/k/v" in fused


def test_mixtures_parallel_and_scaled_branches_say_so() -> None:
    assert nodes(Model(Mixture))["blocks.0.mlp"].notes == ("MoE",)
    assert nodes(Model(Parallel))["blocks.0.attention"].notes == ("parallel",)
    assert nodes(Model(Scaled))["blocks.0.attention"].notes == ("scaled",)


def test_sublayers_outside_of_blocks_say_what_they_are() -> None:
    class Tail(Model):
        def __init__(self) -> None:
            super().__init__(Pre)
            self.tail = FeedForward()

        def forward(self, input_ids: Tensor) -> Tensor:
            x = super().forward(input_ids) @ self.head.weight
            return x + self.tail(x)

    assert nodes(Tail())["tail"].notes == ("feed-forward",)


def test_a_model_that_cannot_be_traced_has_a_tree_and_says_why_in_one_line() -> None:
    tree = tree_of(Picky())
    assert [node.label for node in tree.root.walk()] == ["Picky", "layers.0-2"]
    assert tree.root.parameters == 60
    assert tree.note is not None
    assert tree.note.startswith("roles unknown: Picky does not run on any inputs made for it")
    assert str(tree).splitlines()[-1].startswith("roles unknown: Picky")
    assert "role" not in str(tree).splitlines()[0]


def test_a_model_without_sublayers_says_so() -> None:
    tree = tree_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    assert tree.note == "no roles: a trace shows no sub-layers that are added to a stream"


def test_example_inputs_are_used() -> None:
    class Odd(Pre):
        def forward(self, x: Tensor, *, scale: float) -> Tensor:
            return super().forward(x) * scale

    model = Odd()
    assert tree_of(model, {"x": torch.randn(1, 3, WIDTH), "scale": 2.0}).note is None
    kit = ak.wrap(model, {"x": torch.randn(1, 3, WIDTH), "scale": 2.0})
    assert kit.tree() == tree_of(model, kit.example_inputs)


def test_a_model_without_weights_has_the_same_tree() -> None:
    with torch.device("meta"):
        model = Model(Post)
    assert tree_of(model) == tree_of(Model(Post))


def test_making_a_tree_leaves_no_trace() -> None:
    model = Model(Pre).train()
    before = copy.deepcopy(model.state_dict())
    tree_of(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert not any("adapterkit" in name for m in model.modules() for name in vars(m))


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [Pre, Mixture, Scaled])
def test_parameters_and_bytes_add_up(block: type[Pre]) -> None:
    root = tree_of(Model(block, layers=3).half()).root
    expected = sum(p.numel() for p in Model(block, layers=3).parameters())
    assert (root.parameters, root.size_bytes, root.trainable) == (expected, 2 * expected, expected)


def test_tied_weights_count_once_and_say_whose_they_are() -> None:
    model = Model(Pre)
    model.head = nn.Linear(WIDTH, 11)
    model.head.weight = model.embedding.weight
    model.again = model.norm
    found = nodes(model)
    assert found["head"].tied_to == "embedding"
    assert found["head"].parameters == 11, "its bias"
    assert (found["again"].tied_to, found["again"].parameters) == ("norm", 0)
    assert found[""].parameters == sum(p.numel() for p in model.parameters())
    assert "tied to embedding" in str(tree_of(model))


def test_modules_shared_within_blocks_do_not_keep_these_from_folding() -> None:
    class Twice(Pre):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.mlp

    assert nodes(Model(Twice, layers=3))["blocks.0"].count == 3


def test_parametrised_and_lazy_weights_are_counted_as_far_as_they_exist() -> None:
    linear = parametrizations.weight_norm(nn.Linear(3, 4))
    model = nn.Sequential(linear, nn.LazyLinear(5))
    root = tree_of(model).root
    assert root.parameters == 4 + 4 + 12
    assert [child.label for child in root.children] == ["0", "1"]
    assert [child.tied_to for child in root.children] == [None, None]
    assert isinstance(model[1].weight, nn.UninitializedParameter)
    assert str(tree_of(model)).endswith("Sequential has lazy layers ('1.weight'), which have no shape yet; run it once")


def test_widths_come_from_the_type_and_else_from_the_trace() -> None:
    found = nodes(Model(Pre))
    widths = {path: (found[path].input_width, found[path].width) for path in ("blocks.0", "blocks.0.mlp.up", "embedding")}
    assert widths == {"blocks.0": (WIDTH, WIDTH), "blocks.0.mlp.up": (WIDTH, 2 * WIDTH), "embedding": (None, WIDTH)}
    assert "8 → 16" in str(tree_of(Model(Pre)))


def test_what_trains_is_a_column_only_where_it_differs() -> None:
    model = Model(Pre)
    assert "trains" not in str(tree_of(model)).splitlines()[0]
    assert str(tree_of(model)).splitlines()[-1].endswith("parameters, open")
    model.blocks.requires_grad_(False)
    rows = str(tree_of(model)).splitlines()
    assert rows[0].endswith("trains")
    assert next(row for row in rows if "blocks.0-1" in row).endswith("frozen")
    assert next(row for row in rows if "head" in row).endswith("trains")
    assert rows[1].endswith(" %")
    model.requires_grad_(False)
    assert str(tree_of(model)).splitlines()[-1].endswith("parameters, frozen")


@pytest.mark.parametrize(
    ("count", "short"), [(0, "0"), (768, "768"), (999, "999"), (1000, "1.0K"), (999_999, "1.0M"), (46_702_792_704, "46.7B")]
)
def test_counts_are_said_in_short(count: int, short: str) -> None:
    assert number(count) == short


def test_bytes_are_said_in_short() -> None:
    assert [size(count) for count in (12, 6144, 437_935_104)] == ["12 B", "6.1 KB", "437.9 MB"]


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_are_shown_where_they_sit() -> None:
    model = Model(Post)
    kit = ak.wrap(model)
    kit.add("a", "pfeiffer", bottleneck_size=2, heads=["head"])
    kit.add("b", "houlsby", bottleneck_size=2)
    kit.train_adapter("a")
    found = nodes(model)
    assert {path: node.adapters for path, node in found.items() if node.adapters} == {
        "blocks.0.norm2": (Mark("a", "input", is_active=True),),
        "blocks.0.attention": (Mark("b", "output", is_active=False),),
        "blocks.0.mlp": (Mark("b", "output", is_active=False),),
        "head": (Mark("a", "head", is_active=True),),
    }
    text = str(kit.tree())
    assert "● a (input)" in text
    assert "● a (head)" in text
    assert "○ b\n" in text
    lines = text.splitlines()[-3:]
    assert lines[0].endswith("parameters, frozen")
    assert lines[1].startswith("● a: bottleneck at 2 sites, ")
    assert lines[1].endswith("of the base), active, open")
    assert lines[2].endswith("not active, frozen")


def test_adapters_change_neither_the_numbers_nor_the_roles_of_the_base() -> None:
    model = Model(Post)
    before = tree_of(model).root
    kit = ak.wrap(model)
    kit.add("a", "pfeiffer", bottleneck_size=2)
    kit.activate("a")
    with_adapter = [(n.label, n.roles, n.notes, n.parameters, n.width) for n in tree_of(model).root.walk()]
    assert with_adapter == [(n.label, n.roles, n.notes, n.parameters, n.width) for n in before.walk()]
    kit.unwrap()
    assert tree_of(model).root == before


def test_the_trace_is_of_the_base_alone() -> None:
    class Explode(Pass):
        def __call__(self, *_: object) -> None:
            raise AssertionError("an adapter ran")

    model = Model(Pre, layers=3)
    kit = ak.wrap(model)
    kit.add("a", "houlsby", bottleneck_size=2)
    kit.activate("a")
    for _, _, site in sites_of(model):
        site.steps["output"] = (Explode("a"),)
    assert kit.tree().note is None


# --- on the screen ----------------------------------------------------------------------------------------------------


def test_columns_are_aligned() -> None:
    rows = str(tree_of(EncoderDecoder())).splitlines()
    start = rows[0].index("role")
    assert all(row[start - 2 : start] == "  " for row in rows[1:-1] if len(row) > start)
    end = rows[0].index("parameters") + len("parameters")
    assert all(row[end - 1] != " " for row in rows[1:-1] if len(row) >= end)


def test_what_was_shown_before_is_not_shown_again() -> None:
    text = str(tree_of(EncoderDecoder()))
    assert "like encoder.0.attention" in text
    assert text.count("@attention.q") == 1
    assert len([node for node in tree_of(EncoderDecoder()).root.walk() if "@attention.q" in node.roles]) == 2


def test_what_is_like_another_names_it_by_as_little_as_tells_it_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleList([Pre(), nn.Sequential(Pre(), nn.Linear(WIDTH, WIDTH))])

        def forward(self, x: Tensor) -> Tensor:
            return self.a[1](self.a[0](x))

    text = str(tree_of(Two()))
    assert "like a.0" in text
    assert "like 0" not in text


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_lines_fit_the_screen(width: int) -> None:
    model = EncoderDecoder()
    ak.wrap(model).add("a", "houlsby", bottleneck_size=2)
    tree = tree_of(model)
    text = printed(tree, width)
    assert max(map(len, text.splitlines())) <= width
    rows = [row for row in tree.text(width).splitlines() if row[0] not in "b○"]
    assert text.splitlines()[: len(rows)] == [row.rstrip() for row in rows]
    heading = text.splitlines()[0].split()
    assert ("type" in heading) == (width == 120)
    assert ("parameters" in heading) == (width >= 60)
    assert ("○ a\n" in text) == (width >= 60)


def test_colours_tell_what_is_what() -> None:
    model = Model(Pre)
    ak.wrap(model).add("a", "houlsby", bottleneck_size=2)
    ak.wrap(model).activate("a")
    text = printed(tree_of(model), 120, force_terminal=True, color_system="standard")
    assert "\x1b[36m@attention.out\x1b[0m" in text
    assert "\x1b[33m@feedforward.out\x1b[0m" in text
    assert "\x1b[1;32m● a\x1b[0m" in text
    assert "\x1b" not in printed(tree_of(model), 120)


def test_names_are_not_read_as_markup() -> None:
    model = Model(Pre)
    ak.wrap(model).add("[red]a[/red]", "houlsby", bottleneck_size=2)
    assert "○ [red]a[/red]" in printed(tree_of(model), 120)


def test_a_tree_is_printed_without_rich() -> None:
    code = (
        "import sys; sys.modules['rich'] = None\n"
        "from torch import nn; import adapterkit as ak\n"
        "print(ak.wrap(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))).tree())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "└─ 1" in done.stdout


def test_a_tree_has_a_short_repr_and_a_plain_form() -> None:
    tree = tree_of(Model(Pre))
    assert repr(tree) == "Tree(Model, 14 nodes)"
    block = tree.as_dict()["tree"]["children"][1]
    assert (block["label"], block["count"], block["notes"]) == ("blocks.0-1", 2, ("pre-norm block",))


def test_the_docs_show_what_is_printed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    names: dict[str, object] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)  # noqa: S102 (our own docs)
    assert f"```text\n{names['tree']}\n```" in page


def test_bert_fits_on_a_screen() -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    text = str(tree_of(model))
    assert len(text.splitlines()) <= 25
    assert "encoder.layer.0-11" in text
    assert "7.1M" in text
