"""Where rows lie in a model's tensors, as running it shows."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.structure.tracing.row_layout import NO_ROWS, RowLayout
from adapterkit.structure.tracing.rows import discover_rows

from ...hosts.composed import (
    AlignmentBlock,
    Alignments,
    FlatAlignmentBlock,
    FlatBlock,
    TokensFirstBlock,
    TokensFirstInside,
    Windows,
    encoder,
)  # fmt: skip
from ...hosts.tiny import Blocks, CheckpointedBlocks, PostNormBlock, PreNormBlock, randomise

FIRST, SECOND, FLAT = RowLayout(0), RowLayout(1), RowLayout(0, is_flat=True)
OF_TOKENS = RowLayout(0, is_flat=True, of_tokens=True)
IN_TURN = RowLayout(0, is_flat=True, of_tokens=True, in_turn=True)


def ids(rows: int = 4, tokens: int = 6) -> Tensor:
    return torch.randint(0, 11, (rows, tokens))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(
    ("model", "inner", "path", "layout"),
    [
        (Blocks, PostNormBlock, "blocks.1.down", FIRST),
        (Blocks, FlatBlock, "blocks.1.mlp.2", OF_TOKENS),
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


def test_a_tensor_for_all_rows_is_told_from_one_of_rows_and_from_one_of_rows_in_turn() -> None:
    found = discover_rows(Positions().eval(), ids())
    assert found["project"][("output",)] == found["positions"][("output",)] == NO_ROWS
    assert found["words"][("output",)] == FIRST
    assert found["by_token"][("output",)] == IN_TURN


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
    with (
        kit.active(ak.Split("a", "b")),
        pytest.raises(ak.CompatibilityError, match=r"'blocks\.0\.mlp\.2' has .* \(8, 3, 8\), .* windows of it"),
    ):
        kit.model(ids())


@pytest.mark.parametrize(
    "tree", [ak.BatchSplit("a", "b"), ak.BatchSplit("a", "b", sizes=[1, 3]), ak.Parallel("a", "b")], ids=str
)
def test_flat_rows_compile(tree: Any) -> None:
    kit = kit_of(Blocks(FlatBlock), ["mlp"])
    x = ids()
    with kit.active(tree):
        right = kit.model(x)
        torch.testing.assert_close(torch.compile(kit.model, backend="eager", fullgraph=True)(x), right)


def test_tokens_of_another_tensor_are_no_rows_of_the_batch() -> None:
    kit = kit_of(Blocks(FlatBlock), ["mlp"])
    kit.model.blocks[1].mlp.register_forward_pre_hook(lambda _module, args: (args[0][:-2],))
    with (
        kit.active(ak.BatchSplit("a", "b")),
        pytest.raises(ak.CompatibilityError, match=r"\(22, 8\), .* 4 rows of \[6\] tokens do not"),
    ):
        kit.model(ids())


def test_flat_rows_without_sizes_are_recomputed_as_they_were() -> None:
    x, grads = ids(), []
    for model in (Blocks, CheckpointedBlocks):
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
    with pytest.raises(ak.TargetError, match=r"'blocks\.0\.mlp\.2' has its batch on axis 1; .* set batch_axis=1"):
        kit.add("a", config)
    assert list(kit.adapters) == []
    kit.add("a", config.override({"batch_axis": 1}))


class Chosen(Blocks):
    """Leaves padding out before a feed-forward, or sends each token to one of two."""

    def __init__(self, how: str) -> None:
        super().__init__(PreNormBlock)
        self.how = how
        self.halves = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = super().forward(ids)
        flat = x.flatten(0, 1)
        if self.how == "unpadded":
            kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
            return x.index_put((kept,), self.halves[0](x[kept]))
        first = flat[:, 0] > flat[:, 1]
        return flat.index_put((first,), self.halves[0](flat[first])).view_as(x)


def test_tokens_without_padding_are_rows_only_where_nothing_was_left_out() -> None:
    kit = kit_of(Chosen("unpadded"), ["halves.0"])
    x, padding = ids(), torch.arange(6) < torch.tensor([6, 4, 6, 4])[:, None]
    with kit.active(ak.Rows(["a", "b", None, "a"])):
        together = kit.model(x)
        with pytest.raises(ak.CompatibilityError, match=r"\(20, 8\), .* 4 rows of \[6\] tokens do not make it"):
            kit.model(x, mask=padding)
    with kit.active("b"):
        torch.testing.assert_close(together[1:2], kit.model(x[1:2]), atol=1e-6, rtol=1e-5)


def test_tokens_that_are_sent_somewhere_are_never_taken_for_rows() -> None:
    refused = 0
    for seed in range(40):
        torch.manual_seed(seed)
        kit, x = kit_of(Chosen("sent"), ["halves.0"]), ids()
        try:
            with kit.active(ak.BatchSplit("a", "b")):
                together = kit.model(x)
        except ak.CompatibilityError:
            refused += 1
            continue
        with kit.active("a"):  # only where it got all tokens, or none
            torch.testing.assert_close(together[:2], kit.model(x[:2]), atol=1e-6, rtol=1e-5)
    assert refused > 30


class Places(nn.Module):
    """Takes positions before its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Blocks(FlatBlock)

    def forward(self, places: Tensor, ids: Tensor) -> Tensor:
        return self.inner(ids) + places[:, None]


def test_rows_are_those_of_the_first_tensor_of_several_axes() -> None:
    inputs = {"places": torch.arange(6.0), "ids": ids()}
    kit = ak.wrap(Places().eval(), inputs)
    for name in "ab":
        kit.add(name, ak.BottleneckConfig(targets=["mlp"], bottleneck_size=2))
        randomise(kit, name)
    with kit.active("b"):
        right = kit.model(**inputs)[1]
    with kit.active(ak.Rows(["a", "b", None, "a"])):
        torch.testing.assert_close(kit.model(**inputs)[1], right)
    with kit.active(ak.Rows(["a", "b", None, "a", "b", "a"])), pytest.raises(ak.CompatibilityError, match="batch has 4"):
        kit.model(**inputs)


class Pair(TokensFirstInside):
    """Returns what it computes second, by a name."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"first": x.sum((0, 1)), "second": self.linear(x)}

    def __init__(self) -> None:
        super().__init__(TokensFirstBlock)
        self.pair = Pair.Blocks()

    def forward(self, ids: Tensor) -> Tensor:
        return self.pair(super().forward(ids).transpose(0, 1))["second"].transpose(0, 1)


@pytest.mark.parametrize("output", [1, "second"])
def test_an_output_is_known_by_its_place_and_by_its_name(output: Any) -> None:
    x = ids(4, 4)
    kit = ak.wrap(Pair().eval(), x)
    for name in "ab":
        kit.add(name, ak.BottleneckConfig(targets=["pair"], output=output, bottleneck_size=2))
        randomise(kit, name)
    with kit.active("b"):
        right = kit.model(x)[1]
    with kit.active(ak.Rows(["a", "b", None, "a"])):
        torch.testing.assert_close(kit.model(x)[1], right)


def test_heads_of_rows_lie_where_rows_were_seen() -> None:
    x = ids(4, 4)
    kit = ak.wrap(TokensFirstInside(TokensFirstBlock).eval(), x)
    for name in "ab":
        kit.add(name, ak.BottleneckConfig(targets=["attention.out"], bottleneck_size=2), heads=["blocks.1.mlp.2"])
        randomise(kit, name)
    with torch.no_grad():
        for name in "ab":
            for parameter in kit.parameters(name, heads=True):
                parameter.add_(torch.randn_like(parameter))
    with kit.active(ak.Rows(["a", "b", None, "a"])):
        together = kit.model(x)
    with kit.active("b"):
        torch.testing.assert_close(together[1:2], kit.model(x[1:2]), atol=1e-5, rtol=1e-5)


def test_what_every_row_does_may_be_done_to_a_tensor_of_all_rows() -> None:
    kit, x = kit_of(Positions(), ["project"]), ids()
    with kit.active("a"):
        right = kit.model(x)
    with kit.active(ak.Rows(["a"] * 4)):
        torch.testing.assert_close(kit.model(x), right)


def test_without_inputs_the_model_is_looked_at_when_rows_are_divided() -> None:
    """Six names fit the six positions, whose tensor is one for all rows; and rows elsewhere are known."""
    kit = ak.wrap(Positions().eval())
    for name in "ab":
        kit.add(name, ak.BottleneckConfig(targets=["project", "words"], bottleneck_size=2))
    with pytest.raises(ak.CompatibilityError, match="its tensor there is one for all rows"):
        kit.activate(ak.Rows(["a", "b"] * 3))
    kit = ak.wrap(Alignments(AlignmentBlock).eval())
    for name in "ab":
        kit.add(name, ak.BottleneckConfig(targets=["mlp.2"], bottleneck_size=2))
        randomise(kit, name)
    x = torch.randint(0, 11, (2, 2, 3))
    with kit.active(ak.BatchSplit("a", "b")):
        together = kit.model(x)
    with kit.active("b"):
        torch.testing.assert_close(together[1:], kit.model(x)[1:])


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        return edges @ self.linear(x), x[:0]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("make", [Tensor.clone, Tensor.to_sparse, Tensor.to_sparse_csr])
def test_inputs_that_are_no_plain_tensors_are_no_reason_to_fail(make: Any) -> None:
    kit = ak.wrap(Graph().eval(), (torch.randn(5, 8), make(torch.eye(5))))
    kit.add("a", ak.BottleneckConfig(targets=["linear"], bottleneck_size=2))


def test_choices_in_the_place_of_rows_are_sequences() -> None:
    class Choices(Blocks):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])

    x = torch.randint(0, 11, (4, 2, 6))
    kit = kit_of(Choices(PreNormBlock), ["mlp"], x)
    with kit.active(ak.BatchSplit("a", "b")):
        together = kit.model(x)
    with kit.active("b"):
        torch.testing.assert_close(together[2:], kit.model(x[2:]), atol=1e-6, rtol=1e-5)


def test_a_stream_of_other_rows_is_refused_by_row_as_it_is_alone() -> None:
    kit = ak.wrap(Blocks(FlatBlock).eval(), ids())
    for name in "ab":
        kit.add(name, ak.BottleneckConfig(targets=["blocks.1.mlp"], residual="blocks.1", bottleneck_size=2))
    for tree in ("a", ak.Rows(["a", "b", "a", "b"])):
        with kit.active(tree), pytest.raises(ak.CompatibilityError, match=r"read (a tensor of shape|tensors of shapes)"):
            kit.model(ids())


class Again(Blocks):
    """Runs itself on the other half of its tokens."""

    def forward(self, ids: Tensor, *, again: bool = True) -> Tensor:
        half = self(ids[:, ::2], again=False).mean(1, keepdim=True) if again else 0.0
        return super().forward(ids) + half


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_that_calls_itself_says_nothing() -> None:
    assert discover_rows(Again(PreNormBlock).eval(), ids()) == {}
    assert discover_rows(torch.jit.trace(Blocks(PreNormBlock).eval(), ids()), ids()) == {}


# --- why nothing was seen ---------------------------------------------------------------------------------------------


class BesideTokensFirst(nn.Module):
    """A layer of tokens first, so that where rows lie elsewhere is unknown; refuses batches of one row if `is_strict`."""

    def __init__(self, *, is_strict: bool = False) -> None:
        super().__init__()
        self.lstm, self.project, self.is_strict = nn.LSTM(8, 8), nn.Linear(8, 8), is_strict

    def forward(self, x: Tensor) -> Tensor:
        if self.is_strict and 1 in x.shape[:2]:
            raise ValueError("one row has no variance")
        return self.project(self.lstm(x.transpose(0, 1))[0].transpose(0, 1))


class Computes(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (
            Positions(),
            ids(tokens=9),
            r"with rows on axis 0 of the inputs, Positions does not run on example_inputs: RuntimeError",
        ),
        (Again(PreNormBlock), ids(), "the model calls itself, or is TorchScript"),
        (BesideTokensFirst(is_strict=True), torch.randn(4, 3, 8), "ValueError: one row has no variance"),
        (
            nn.Identity(),
            torch.randn(4, 3, dtype=torch.complex64),
            "no rows can be cut out of a tensor that is nested, complex",
        ),
        (nn.Identity(), torch.randn(()), "they hold no tensor with rows"),
        (
            Computes(lambda x: x / x.sum()),
            torch.randn(4, 4),
            "output for two rows is not what it gives for each of them alone",
        ),
        (Computes(lambda x: x.sum()), torch.randn(4, 3), "no tensor of the model's output has them"),
    ],
)
def test_the_reason_why_nothing_was_seen_is_kept(model: nn.Module, inputs: Tensor, reason: str) -> None:
    found = discover_rows(model.eval(), inputs)
    assert found == {}
    assert re.search(reason, found.why_unknown), found.why_unknown
    assert reason == "" or re.search(reason, found.note("project"))


def test_what_was_seen_needs_no_reason_but_for_modules_that_are_missing() -> None:
    found = discover_rows(Blocks(PreNormBlock).eval(), ids())
    assert found.note("blocks.1") == ""
    assert "does not show it there" in found.note("no.such.module")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(found)))
    assert (copied, copied.why_unknown) == (found, found.why_unknown)


@pytest.mark.parametrize("inputs", [None, torch.randn(4, 3, 8)])
def test_an_error_that_needs_to_know_the_rows_says_why_they_were_not_seen(inputs: Tensor | None) -> None:
    kit = ak.wrap(BesideTokensFirst(is_strict=True).eval(), inputs)
    for name in "ab":
        kit.add(name, ak.BottleneckConfig(targets=["project"], bottleneck_size=2))
    reason = r"is not known \(where rows lie was not seen: .*ValueError: one row has no variance"
    for tree in (ak.Rows(["a", "b"]), ak.BatchSplit("a", "b"), ak.Parallel("a", "b"), ak.Split("a", "b")):
        with pytest.raises(ak.CompatibilityError, match=reason):
            kit.activate(tree)
    kit.activate(ak.Average("a", "b"))  # divides nothing
    for gated in (ak.BottleneckConfig, ak.LoRAConfig):
        config = gated(targets=["project"], gating=True)
        with pytest.raises(ak.TargetError, match=f"has its batch {reason}.*set batch_axis=0 or 1"):
            kit.add("c", config)
    kit.add("c", config.override({"batch_axis": 0}))
    seen = kit_of(BesideTokensFirst(), ["project"], torch.randn(4, 3, 8))
    seen.activate(ak.BatchSplit("a", "b"))


GATED = {"gating": True, "targets": ["mlp.2"]}


@pytest.mark.parametrize("config", [ak.BottleneckConfig(bottleneck_size=2, **GATED), ak.LoRAConfig(**GATED)])
def test_a_gate_sees_a_row_alone_on_the_third_axis(config: Any) -> None:
    x = torch.randint(0, 11, (2, 2, 3))
    kit = ak.wrap(Alignments(AlignmentBlock).eval(), x)
    for wrong in (None, 0, 1):
        with pytest.raises(ak.TargetError, match=r"has its batch on axis 2; gating .* set batch_axis=2"):
            kit.add("a", config.override({"batch_axis": wrong}))
    kit.add("a", config.override({"batch_axis": 2}))
    randomise(kit, "a")
    kit.activate("a")
    torch.testing.assert_close(kit.model(x)[:1], kit.model(x[:1]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("block", "axis"), [(AlignmentBlock, 2), (FlatAlignmentBlock, 1)])
def test_rows_are_found_behind_the_second_axis_and_flattened_with_another(block: Any, axis: int) -> None:
    found = discover_rows(Alignments(block).eval(), torch.randint(0, 11, (2, 2, 2)))
    flat = block is FlatAlignmentBlock
    assert found["blocks.1.mlp.2"][("output",)] == RowLayout(axis, is_flat=flat, of_tokens=flat, in_turn=flat)
    assert found["blocks.1"][("output",)] == RowLayout(2)


def test_rows_of_the_inputs_may_lie_behind_the_second_axis() -> None:
    """Sequences and columns are mixed, so that neither are rows."""

    class Mixed(AlignmentBlock):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x + x.cumsum(0)

    found = discover_rows(Mixed(8).eval(), torch.randn(3, 4, 2, 8))
    assert found[""][("input",)] == found["mlp.2"][("output",)] == RowLayout(2)


def test_a_run_that_fails_later_keeps_what_was_seen_and_tells_why_the_rest_is_not() -> None:
    model = BesideTokensFirst().eval()
    kit = ak.wrap(model, torch.randn(4, 3, 8))
    kit.add("a", ak.BottleneckConfig(targets=["project"], bottleneck_size=2))
    model.is_strict, model.later = True, nn.Linear(8, 8)
    kit.add("b", ak.BottleneckConfig(targets=["project"], bottleneck_size=2))
    kit.activate(ak.BatchSplit("a", "b"))
