"""Where rows lie in a model's tensors, as running it shows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.row_axis import NO_ROWS, RowLayout
from adapterkit.structure.rows import discover_rows

from ..composed_hosts import Blocks, FlatBlock, TokensFirstBlock, TokensFirstInside, Windows, encoder
from ..conftest import PostNormBlock, PreNormBlock, randomise

FIRST, SECOND, FLAT = RowLayout(0), RowLayout(1), RowLayout(0, is_flat=True)


def ids(rows: int = 4, tokens: int = 6) -> Tensor:
    return torch.randint(0, 11, (rows, tokens))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(
    ("model", "inner", "path", "layout"),
    [
        (Blocks, PostNormBlock, "blocks.1.down", FIRST),
        (Blocks, FlatBlock, "blocks.1.mlp.2", FLAT),
        (Blocks, FlatBlock, "blocks.1.attention.out", FIRST),
        (Windows, PreNormBlock, "blocks.0.attention.query", FLAT),
        (TokensFirstInside, TokensFirstBlock, "blocks.1.attention.query", SECOND),
        (TokensFirstInside, TokensFirstBlock, "embedding", FIRST),
    ],
)
def test_rows_are_found_whatever_their_number_in_the_example(
    rows: int, model: Any, inner: Any, path: str, layout: RowLayout
) -> None:
    found = discover_rows(model(inner).eval(), ids(rows))[path]
    assert found[("output",)] == layout
    assert found.get(("input",), layout) == layout


def test_equal_rows_are_told_apart_by_turning_one_round() -> None:
    found = discover_rows(Windows(PreNormBlock).eval(), ids(1).repeat(3, 1))
    assert found["blocks.0.attention.query"][("output",)] == FLAT


def test_torchs_own_layers_of_tokens_first_have_rows_second() -> None:
    found = discover_rows(encoder(False).eval(), torch.randn(5, 3, 8))
    assert {found[path][("output",)] for path in ("", "layers.0.linear1", "norm")} == {SECOND}


class Positions(nn.Module):
    """Positions that are one tensor for all rows, and a mixture of tokens in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.project, self.by_token = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.project(self.positions(torch.arange(6)))
        by_token = self.by_token(x.transpose(0, 1).flatten(0, 1))
        return by_token.unflatten(0, (6, -1)).transpose(0, 1)


def test_a_tensor_for_all_rows_is_told_from_one_of_rows_and_rows_in_turn_are_not_known() -> None:
    found = discover_rows(Positions().eval(), ids())
    assert found["project"][("output",)] == found["positions"][("output",)] == NO_ROWS
    assert found["words"][("output",)] == FIRST
    assert ("output",) not in found["by_token"]


def test_what_cannot_be_run_says_nothing() -> None:
    assert discover_rows(Positions().eval(), ids(tokens=9)) == {}
    assert discover_rows(nn.Bilinear(2, 2, 2)) == {}


def test_looking_leaves_the_model_as_it_was() -> None:
    model = Blocks(FlatBlock).train()
    x = ids()
    state, hooks = torch.random.get_rng_state(), [len(m._forward_hooks) for m in model.modules()]
    discover_rows(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(module.training for module in model.modules())


def kit_of(model: nn.Module, targets: list[str], inputs: Tensor | None = None) -> ak.AdapterKit:
    kit = ak.wrap(model.eval(), ids() if inputs is None else inputs)
    for name in "ab":
        kit.add(name, ak.BottleneckConfig(targets=targets, bottleneck_size=2))
        randomise(kit, name)
    return kit


def test_a_place_whose_tensor_is_one_for_all_rows_is_refused_however_many_it_has() -> None:
    kit = kit_of(Positions(), ["project"])
    with pytest.raises(ak.CompatibilityError, match="cannot act on 'project': its tensor there is one for all rows"):
        kit.activate(ak.Rows(["a", "b", None, "a", "b", "a"]))
    kit.activate(ak.Average("a", "b"))


def test_rows_of_another_number_than_the_batch_are_no_rows_of_flat_tokens() -> None:
    """Six names for two rows of six tokens: twelve indices, which six would divide."""
    kit = kit_of(Blocks(FlatBlock), ["mlp"])
    with (
        kit.active(ak.Rows(["a", "b", None, "a", "b", "a"])),
        pytest.raises(ak.CompatibilityError, match="Rows names 6 rows, and the batch has 2"),
    ):
        kit.model(ids(2))


def test_windows_are_no_sequence_to_split() -> None:
    kit = kit_of(Windows(PreNormBlock), ["mlp"])
    with pytest.raises(ak.CompatibilityError, match=r"'blocks\.0\.mlp\.2': its tensor there holds the tokens of a row"):
        kit.activate(ak.Split("a", "b"))


def test_under_a_compiler_flat_rows_need_a_number() -> None:
    kit = kit_of(Blocks(FlatBlock), ["mlp"])
    x = ids()
    with kit.active(ak.BatchSplit("a", "b", sizes=[1, 3])):
        right = kit.model(x)
        torch.testing.assert_close(torch.compile(kit.model, backend="eager", fullgraph=True)(x), right)
    compiled = torch.compile(kit.model, backend="eager", fullgraph=True)
    with kit.active(ak.BatchSplit("a", "b")), pytest.raises(Exception, match="nothing says how many rows there are"):
        compiled(x)


def test_tokens_of_another_tensor_are_no_rows_of_the_batch() -> None:
    kit = kit_of(Blocks(FlatBlock), ["mlp"])
    kit.model.blocks[1].mlp.register_forward_pre_hook(lambda _module, args: (args[0][:-2],))
    with (
        kit.active(ak.BatchSplit("a", "b")),
        pytest.raises(ak.CompatibilityError, match=r"\(22, 8\).* the batch has 4 rows"),
    ):
        kit.model(ids())


class CheckpointedFlat(Blocks):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_flat_rows_without_sizes_are_recomputed_as_they_were() -> None:
    x, grads = ids(), []
    for model in (Blocks, CheckpointedFlat):
        torch.manual_seed(0)
        kit = kit_of(model(FlatBlock), ["mlp"], x)
        with kit.active(ak.BatchSplit("a", "b")):
            kit.model(x).pow(2).sum().backward()
        grads.append([p.grad for p in kit.parameters("a")])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_loaded_adapter_knows_where_rows_lie(tmp_path: Any) -> None:
    model = Blocks(FlatBlock).eval()
    kit = kit_of(model, ["mlp"])
    kit.save("a", tmp_path / "a")
    kit.save("b", tmp_path / "b")
    x, tree = ids(), ak.Rows(["a", "b", None, "a"])
    with kit.active(tree):
        right = kit.model(x)
    kit.remove("a"), kit.remove("b")
    kit.load(tmp_path / "a"), kit.load(tmp_path / "b")
    with kit.active(tree):
        assert torch.equal(kit.model(x), right)


def test_a_gate_asks_for_the_axis_that_was_seen() -> None:
    kit = ak.wrap(TokensFirstInside(TokensFirstBlock).eval(), ids())
    config = ak.BottleneckConfig(targets=["mlp"], bottleneck_size=2, gating=True)
    with pytest.raises(ak.TargetError, match=r"'blocks\.0\.mlp\.2' has its batch on axis 1 .* set batch_axis=1"):
        kit.add("a", config)
    assert list(kit.adapters) == []
    kit.add("a", config.override({"batch_axis": 1}))
