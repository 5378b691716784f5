"""The whole batch through several adapters at once: repeated as the model is called, shared where they are alike."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak

from ...hosts.composed import TokensFirstBlock, TokensFirstInside
from ...hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise
from .helpers import hidden, names, same

ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [0, 2, 4, 6, 8]])


def wrapped(model: nn.Module, inputs: Any, **settings: Any) -> ak.AdapterKit:
    """The model with adapters a, b, c that do something."""
    kit = ak.wrap(model.eval(), inputs)
    for name in "abc":
        kit.add(name, "pfeiffer", bottleneck_size=3, **settings)
        randomise(kit, name)
    return kit


def assert_each_alone(kit: ak.AdapterKit, children: Any, run: Any, tolerance: float = 1e-5) -> Tensor:
    """Compare the parts of what Parallel gives with each child alone, and return the whole."""
    with kit.active(ak.Parallel(*children)):
        together = run()
    for child, part in zip(children, together.chunk(len(children)), strict=True):
        with kit.active(child):
            torch.testing.assert_close(part, run(), atol=tolerance, rtol=tolerance)
    return together  # type: ignore[no-any-return]  # a tensor


@given(
    st.lists(same | st.lists(names, min_size=2, max_size=2).map(lambda held: ak.BatchSplit(*held)), min_size=1, max_size=3)
)
def test_each_child_gets_the_whole_batch(shared_kit: ak.AdapterKit, batch: Tensor, children: list[Any]) -> None:
    assert_each_alone(shared_kit, children, lambda: hidden(shared_kit, batch))


@given(names, names, names)
def test_what_is_around_a_parallel_acts_on_all_of_it(
    shared_kit: ak.AdapterKit, batch: Tensor, below: str, one: str, other: str
) -> None:
    with shared_kit.active(ak.Stack(below, ak.Parallel(one, other))):
        together = hidden(shared_kit, batch)
    for child, part in zip((one, other), together.chunk(2), strict=True):
        with shared_kit.active(ak.Stack(below, child)):
            torch.testing.assert_close(part, hidden(shared_kit, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [PostNormBlock, PreNormBlock])
@pytest.mark.parametrize(
    ("composition", "first"),
    [
        (ak.Parallel("a", "b"), 3),
        (ak.Stack("c", ak.Parallel("a", "b")), 3),  # c is below, and the same for both
        (ak.Parallel("c", "a"), 6),
    ],
)
def test_blocks_below_the_first_difference_run_once(block: type[nn.Module], composition: Any, first: int) -> None:
    kit = wrapped(Tiny(block), ids, layers=[1])
    kit.remove("c")
    kit.add("c", "pfeiffer", bottleneck_size=3)
    randomise(kit, "c")
    rows: list[int] = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            rows.append(len(x))
            return super().forward(x)

    kit.model.blocks[0].attention.query.__class__ = Counting
    with kit.active(composition):
        assert len(kit.model(ids)) == 6
    assert rows == [first]


def test_hooks_of_others_in_a_shared_block_see_all_rows() -> None:
    kit = wrapped(Tiny(PreNormBlock), ids, layers=[1])
    seen: list[Tensor] = []
    kit.model.blocks[0].attention.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    with kit.active(ak.Parallel("a", "b")):
        kit.model(ids)
    with kit.base():
        kit.model(ids)
    torch.testing.assert_close(seen[0], seen[1].repeat(2, 1, 1))


class PositionBlock(nn.Module):
    """A block that is given positions, (seq, hidden)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(hidden), nn.Linear(hidden, 16), nn.Linear(16, hidden)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x) + positions)))


@pytest.mark.parametrize(("rows", "tokens"), [(1, 2), (2, 4), (3, 4)])
def test_positions_of_as_many_tokens_as_repeated_rows_are_no_rows(rows: int, tokens: int) -> None:
    class Positioned(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            positions = self.embedding.weight[: ids.shape[1]]
            for block in self.blocks:
                x = block(x, positions)
            return self.classifier(x.mean(1))

    kit = ak.wrap(Positioned(PositionBlock).eval(), ids)
    for name in "ab":
        kit.add(name, "lora", targets=["down"], layers=[1])
        randomise(kit, name)
    batch = torch.arange(rows * tokens).view(rows, tokens) % 11
    assert_each_alone(kit, ["a", "b"], lambda: kit.model(batch))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_of_the_separate_runs_with_checkpointing_too(reentrant: bool) -> None:
    class Checkpointed(Tiny):
        checkpoints = False

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if self.checkpoints else block(x)
            return self.classifier(x.mean(1))

    kit = wrapped(Checkpointed(PostNormBlock), ids, layers=[1])
    kit.freeze()
    kit.model.checkpoints = True
    kit.activate(ak.Parallel("a", "b"))
    kit.model(ids).square().sum().backward()
    together = {name: [p.grad.clone() for p in kit.parameters(name)] for name in "ab"}
    kit.model.zero_grad()
    for name in "ab":
        kit.activate(name)
        kit.model(ids).square().sum().backward()
        for one, parameter in zip(together[name], kit.parameters(name), strict=True):
            torch.testing.assert_close(one, parameter.grad)


def test_copies_and_compiled_models_repeat_the_batch_too() -> None:
    kit = wrapped(Tiny(PreNormBlock), ids, layers=[1])
    kit.activate(ak.Parallel("a", "b"))
    expected = kit.model(ids)
    for other in (copy.deepcopy(kit.model), pickle.loads(pickle.dumps(kit.model))):
        assert torch.equal(other(ids), expected)
    torch.testing.assert_close(torch.compile(kit.model, backend="eager", fullgraph=True)(ids), expected)
    kit.verify(ids).require()
    kit.deactivate()
    assert len(kit.model(ids)) == 3
    kit.unwrap()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in kit.model.modules())


def test_other_adapters_and_the_base_see_the_batch_as_it_is() -> None:
    kit = wrapped(Tiny(PreNormBlock), ids)
    with kit.active(ak.Parallel("a", "b")):
        with kit.base():
            assert len(kit.model(ids)) == 3
        with kit.active("c"):
            assert len(kit.model(ids)) == 3
        assert len(kit.model(ids[:1])) == 2
        with pytest.raises(IndexError):
            kit.model(ids + 100)
        assert len(kit.model(ids)) == 6


class Masked(nn.Module):
    """Takes what batches hold, by keyword: ids, a mask, positions, something nested, a number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny(PreNormBlock)

    def forward(self, ids: Tensor, *, mask: Tensor, positions: Tensor, more: dict[str, Any], scale: float) -> Any:
        x = self.inner.embedding(ids) + self.inner.embedding(positions)
        for block in self.inner.blocks:
            x = block(x)
        pooled = (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return {"logits": self.inner.classifier(pooled) * scale + more["bias"][0], "note": "text"}


def test_every_tensor_of_the_call_that_has_the_batchs_rows_is_repeated() -> None:
    model = Masked()
    given = {
        "mask": torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]),
        "positions": torch.arange(5)[None],
        "more": {"bias": [torch.randn(3, 3), "x"]},
        "scale": 2.0,
    }
    kit = wrapped(model, {"ids": ids, **given})
    assert_each_alone(kit, ["a", "b", ak.Stack("b", "c")], lambda: model(ids, **given)["logits"])


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_encoder_is_repeated_on_its_axis_of_rows(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    kit = wrapped(model, x, layers=[1, 2])

    def run() -> Tensor:
        out: Tensor = model(x, src_key_padding_mask=padding)
        return out if batch_first else out.transpose(0, 1)

    assert len(assert_each_alone(kit, ["a", "b"], run)) == 6


def test_a_mask_over_as_many_tokens_as_there_are_rows_is_asked_about() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    x, mask = torch.randn(5, 5, 8), torch.triu(torch.full((5, 5), -torch.inf), diagonal=1)
    kit = wrapped(model, x)
    with (
        kit.active(ak.Parallel("a", "b")),
        pytest.raises(ak.CompatibilityError, match=r"argument 'mask', of shape \(5, 5\), .* shared=\['mask'\]"),
    ):
        model(x, mask=mask)
    with kit.active(ak.Parallel("a", "b", shared=["mask"])):
        together = model(x, mask=mask)
    with kit.active("b"):
        torch.testing.assert_close(together[5:], model(x, mask=mask), atol=1e-5, rtol=1e-5)
    padding = torch.zeros(5, 5, dtype=torch.bool)
    with kit.active(ak.Parallel("a", "b", shared=())):
        assert model(x, src_key_padding_mask=padding).shape == (10, 5, 8)
    with pytest.raises(ak.ConfigError, match="shared is a list of arguments; found 'mask'"):
        ak.Parallel("a", "b", shared="mask")


def test_a_mask_over_as_many_target_tokens_as_there_are_rows_is_asked_about_too() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True).eval()
    source, target, mask = torch.randn(3, 5, 8), torch.randn(3, 3, 8), torch.zeros(3, 3)
    kit = ak.wrap(model, (source, target))
    for name in "ab":
        kit.add(name, "lora", targets=["linear1"])
        randomise(kit, name)
    kit.activate(ak.Parallel("a", "b"))
    with pytest.raises(ak.CompatibilityError, match=r"'tgt_mask', of shape \(3, 3\), .* shared=\['tgt_mask'\]"):
        model(source, target, tgt_mask=mask)
    kit.activate(ak.Parallel("a", "b", shared=["tgt_mask"]))
    assert len(model(source, target, tgt_mask=mask)) == 6


def test_what_runs_outside_of_the_models_own_call_is_refused() -> None:
    kit = wrapped(Tiny(PreNormBlock), ids)
    with (
        kit.active(ak.Parallel("a", "b")),
        pytest.raises(ak.CompatibilityError, match=r"'blocks.0' ran outside of that: call the model"),
    ):
        kit.model.blocks[0](torch.randn(4, 5, 8))


def test_places_that_do_not_have_the_batchs_rows_are_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.flatten(0, 1)).view(x.shape)

        def part(self, x: Tensor) -> Tensor:
            return self.linear(x.flatten(0, 1)[1:])

    kit = ak.wrap(Flat())
    for name in "ab":
        kit.add(name, "lora", targets=["linear"])
    kit.activate(ak.Parallel("a", "b"))
    assert kit.model(torch.randn(3, 5, 8)).shape == (6, 5, 8)
    Flat.forward = Flat.part  # type: ignore[method-assign]  # it changes its mind
    with pytest.raises(ak.CompatibilityError, match=r"'linear' has a tensor of shape \(29, 8\)"):
        kit.model(torch.randn(3, 5, 8))


def test_the_rows_of_a_batch_are_counted_where_all_of_them_run_the_same_too() -> None:
    kit = wrapped(Tiny(PreNormBlock), ids)
    kit.activate(ak.Stack("c", ak.Parallel(ak.Rows(["a", "a"]), ak.Rows(["a", "a"]))))
    with pytest.raises(ak.CompatibilityError, match="Rows names 2 rows, and the batch has 3"):
        kit.model(ids)
    assert len(kit.model(ids[:2])) == 4


def test_a_call_without_rows_is_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, scale: float | Tensor) -> Tensor:
            return self.linear(torch.ones(1, 8) * scale)

    kit = ak.wrap(Constant(), torch.randn(2, 1))
    for name in "ab":
        kit.add(name, "lora", targets=["linear"])
    kit.activate(ak.Parallel("a", "b"))
    with pytest.raises(ak.CompatibilityError, match="this call has no tensor with rows"):
        kit.model(1.0)


def test_a_block_that_runs_again_after_a_difference_is_not_shared_in_silence() -> None:
    class Looped(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for _ in range(2):
                for block in self.blocks:
                    x = block(x)
            return self.classifier(x.mean(1))

    kit = wrapped(Looped(PreNormBlock), ids, layers=[1])
    kit.activate(ak.Parallel("a", "b"))
    with pytest.raises(ak.CompatibilityError, match=r"that Parallel cannot share it: .* ak.BatchSplit"):
        kit.model(ids)
    kit.activate(ak.BatchSplit("a", "b"))
    assert len(kit.model(ids.repeat(2, 1))) == 6


class TurnedWithin(PreNormBlock):
    """Takes (seq, batch, hidden), and computes with the batch first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("block", [TurnedWithin, TokensFirstBlock])
def test_blocks_with_tokens_first_are_not_shared_by_halves_of_their_tokens(block: type[nn.Module]) -> None:
    ids = torch.randint(0, 11, (3, 4))
    kit = ak.wrap(TokensFirstInside(block).eval(), ids)
    for name in "ab":
        kit.add(name, ak.BottleneckConfig(targets=["blocks.*.mlp"], bottleneck_size=3, layers=[1]))
        randomise(kit, name)
    with kit.active(ak.Parallel("a", "b")):
        together = kit.model(ids)
    for name, found in zip("ab", together.chunk(2), strict=True):
        with kit.active(name):
            torch.testing.assert_close(found, kit.model(ids), atol=1e-6, rtol=1e-5)


def test_hidden_states_and_heads_on_them_have_all_rows_where_blocks_are_shared() -> None:
    """Transformers keeps them by hooks, which it registers in the first call that asks for them."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
    config = transformers.BertConfig(**small, attn_implementation="eager")
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    tokens, asked = torch.randint(0, 30, (2, 5)), {"output_hidden_states": True, "output_attentions": True}
    kit = ak.wrap(model, {"input_ids": tokens, **asked})
    for name in "ab":
        head = ak.ClassificationHead(num_labels=2, output=("hidden_states", 1))
        kit.add(name, "pfeiffer", layers=[2], bottleneck_size=3, heads=head)
        randomise(kit, name)
    with kit.active(ak.Parallel("a", "b")):
        together = model(tokens, **asked)
    apart = []
    for name in "ab":
        with kit.active(name):
            apart.append(model(tokens, **asked))
    torch.testing.assert_close(together.logits, torch.cat([out.logits for out in apart]))
    for what in ("hidden_states", "attentions"):
        for index, tensor in enumerate(together.output[what]):
            torch.testing.assert_close(tensor, torch.cat([out.output[what][index] for out in apart]))


def test_as_many_images_as_channels_are_no_tokens() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=8, patch_size=4)).eval()
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 1])
    kit = wrapped(model, images)
    with kit.active(ak.Parallel("a", "b")):
        loss = model(images, labels=labels).loss
    apart = []
    for name in "ab":
        with kit.active(name):
            apart.append(model(images, labels=labels).loss)
    torch.testing.assert_close(loss, torch.stack(apart).mean())


def test_generation_is_refused_and_has_the_batch_repeated_by_hand() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, bos_token_id=0, eos_token_id=29)
    model, prompts = transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 29, (2, 5))
    kit = wrapped(model, prompts)

    def generated(tokens: Tensor) -> Any:
        return model.generate(tokens, min_new_tokens=3, max_new_tokens=3, do_sample=False, pad_token_id=0)

    with (
        kit.active(ak.Parallel("a", "b")),
        pytest.raises(ak.CompatibilityError, match=r"BatchSplit\('a', 'b'\), and .*\(2, 1\)"),
    ):
        generated(prompts)
    with kit.active(ak.BatchSplit("a", "b")):
        together = generated(prompts.repeat(2, 1))
    for name, part in zip("ab", together.chunk(2), strict=True):
        with kit.active(name):
            assert torch.equal(part, generated(prompts))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "llama"])
def test_transformers_run_several_adapters_side_by_side(name: str) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
    configs = {
        "bert": lambda: transformers.BertConfig(**small),
        "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=30),
        "t5": lambda: transformers.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, vocab_size=30, decoder_start_token_id=0
        ),
        "vit": lambda: transformers.ViTConfig(**{**small, "image_size": 8, "patch_size": 4}),
        "llama": lambda: transformers.LlamaConfig(**small, num_key_value_heads=1),
    }
    model = transformers.AutoModel.from_config(configs[name]()).eval()
    tokens = torch.randint(0, 30, (4, 7))
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    inputs["attention_mask"][1, 5:] = 0
    if name == "t5":
        inputs |= {"decoder_input_ids": tokens[:, :3]}
    if name == "vit":
        inputs = {"pixel_values": torch.randn(4, 3, 8, 8)}
    kit = ak.wrap(model, inputs)
    for adapter, method in (("a", "pfeiffer"), ("b", "houlsby"), ("c", "lora")):
        kit.add(adapter, method, layers=[1, 2])
        randomise(kit, adapter)
    assert_each_alone(kit, ["a", "b", "c"], lambda: model(**inputs).last_hidden_state, tolerance=1e-4)


def test_patches_of_all_rows_in_turn_are_each_of_its_own_row() -> None:
    class Patches(nn.Module):
        """Cuts images into patches, all rows' first patches first; as pyramids of patches are run (DepthPro)."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:  # (batch, patches, 4)
            y = self.layer(x.transpose(0, 1).flatten(0, 1))  # (patches * batch, 4)
            return y.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)

    x = torch.randn(2, 3, 4)
    kit = ak.wrap(Patches(), x)
    for name in "ab":
        kit.add(name, "lora", targets=["layer"], rank=2)
        randomise(kit, name)
    with kit.active("a"):
        a = kit.model(x)
    with kit.active("b"):
        b = kit.model(x)
    with kit.active(ak.Parallel("a", "b")):
        torch.testing.assert_close(kit.model(x), torch.cat([a, b]))
        with pytest.raises(ak.CompatibilityError, match="they lie in turn, and how many rows there are is not seen"):
            kit.model.layer(x.flatten(0, 1))
