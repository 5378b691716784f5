"""One Parameter in several places: tied, under two names, or read around the module that holds it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

import adapterkit as ak
from adapterkit.runtime.lookup import sites_of

from ..hosts.parameters import AroundToo, ReadsAround, SharedLayers, Skips, Tied
from ..hosts.tiny import randomise
from .helpers import places


def test_a_tied_parameter_is_changed_for_all_that_read_it() -> None:
    model, ids = Tied(), torch.randint(0, 7, (2, 3))
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["embed.weight"], rank=2)
    assert places(kit, "lora", targets=["embed.weight"]) == [("embed", ("weight",)), ("head", ("weight",))]
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    weight = model.embed.weight + 4.0 * b @ a
    expected = model.second(F.linear(F.embedding(ids, weight), weight, model.head.bias))
    torch.testing.assert_close(model(ids), expected)
    assert places(kit, "bitfit") == [("head", ("bias",)), ("second", ("bias",))]
    assert (kit.summary().adapters[0].parameters, len(list(kit.parameters("a")))) == (2 * (4 + 7), 2), "trains once"


def test_a_module_of_a_tied_weight_is_adapted_alone() -> None:
    model, ids = Tied(), torch.randint(0, 7, (2, 3))
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["head"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    hidden = model.embed(ids)
    expected = model.second(F.linear(hidden, model.head.weight, model.head.bias) + 4.0 * hidden @ a.T @ b.T)
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_read_around_its_module_is_adapted_by_its_name_alone() -> None:
    model, x = ReadsAround(), torch.randn(2, 4)
    kit = ak.wrap(model, x)
    with pytest.raises(ak.TargetError, match=r"'proj' never ran .* If '' reads it, name the Parameter \('proj.weight'"):
        kit.add("a", "lora", targets=["proj"])
    base = model(x)
    kit.add("a", "lora", targets=["proj.weight"])
    assert places(kit, "lora", targets=["proj.weight"]) == [("", ("proj.weight",))]
    randomise(kit, "a")
    kit.activate("a")
    assert not torch.allclose(model(x), base)
    kit.verify().require()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [ak.BitFitConfig(targets=["a.bias"]), ak.LoRAConfig(targets=["a.weight"], rank=2)])
def test_a_tied_parameter_has_the_same_gradients_in_checkpointed_blocks(config: Any, reentrant: bool) -> None:
    x, gradients = torch.randn(3, 6, dtype=torch.float64), []
    state = SharedLayers().double().state_dict()
    for model in (SharedLayers().double(), SharedLayers(reentrant).double()):
        model.load_state_dict(state)
        kit = ak.wrap(model)
        kit.add("a", config)
        torch.manual_seed(1)
        randomise(kit, "a")
        kit.train_adapter("a")
        model(x.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad for p in kit.parameters("a")])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_parameter_is_adapted_in_its_module_and_around_it() -> None:
    model, ids = AroundToo().double(), torch.randint(0, 11, (2, 3))
    kit = ak.wrap(model, ids)
    kit.add("a", "lora", targets=["emb.weight"], rank=2, alpha=6)
    assert places(kit, "lora", targets=["emb.weight"]) == [("", ("emb.weight",))]
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    weight = model.emb.weight + 3.0 * b @ a
    torch.testing.assert_close(model(ids), F.embedding(ids, weight).tanh() @ weight.T)
    kit.verify().require()


def test_of_a_tied_parameter_only_the_holder_that_is_read_around_has_another_host() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = AroundToo(), nn.Linear(6, 11, bias=False)
            self.head.weight = self.inner.emb.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.inner(ids)) @ self.head.weight.new_ones(11, 6))

    kit = ak.wrap(Both(), torch.randint(0, 11, (2, 3)))
    assert places(kit, "lora", targets=["emb.weight"]) == [("inner", ("emb.weight",)), ("head", ("weight",))]


def test_a_holder_that_does_not_run_on_the_inputs_is_adapted_for_others_that_run_it(tmp_path: Path) -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor, second: bool = False) -> Tensor:
            return (self.two if second else self.one)(x)

    model, x = Switch().double(), torch.randn(2, 4, dtype=torch.float64)
    kit = ak.wrap(model, x)
    kit.add("a", "lora", targets=["one.weight"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    torch.testing.assert_close(model(x, True), F.linear(x, model.one.weight + 4.0 * b @ a, model.two.bias))
    kit.verify().require()


def test_both_names_of_a_parameter_in_one_module_are_adapted() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.w2 = self.w

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w.T).tanh() @ self.w2

    model, x = TwoNames().double(), torch.randn(2, 4, dtype=torch.float64)
    kit = ak.wrap(model, x)
    kit.add("a", "lora", targets=["w"], rank=2)
    assert places(kit, "lora", targets=["w"]) == [("", ("w", "w2"))]
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    w = model.w + 4.0 * b @ a
    torch.testing.assert_close(model(x), (x @ w.T).tanh() @ w)


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=1, vocab_size=20, decoder_start_token_id=0, eos_token_id=19
    )
    return T5ForConditionalGeneration(config).eval()


def test_generation_of_an_encoder_decoder_reads_the_adapted_embedding_as_its_forward_does() -> None:
    """It calls the encoder on its own."""
    model, ids = t5(), torch.randint(1, 19, (2, 5))
    kit = ak.wrap(model, {"input_ids": ids, "decoder_input_ids": ids})
    kit.add("a", "lora", targets=["shared.weight"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    found = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with kit.base():
        base = model(input_ids=ids, decoder_input_ids=found.sequences[:, :1]).logits
    for step, logits in enumerate(found.logits, 1):
        expected = model(input_ids=ids, decoder_input_ids=found.sequences[:, :step]).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.logits[0], base[:, -1], atol=0.1)


@pytest.mark.parametrize("method", ["lora", "vera", "dora"])
def test_copies_files_and_merging_know_a_tied_parameter_once(method: str, tmp_path: Path) -> None:
    model, ids = Tied(), torch.randint(0, 7, (2, 3))
    kit = ak.wrap(model)
    kit.add("a", method, targets=["head.weight"], rank=2)
    randomise(kit, "a")
    kit.train_adapter("a")
    expected = model(ids)
    expected.sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a"))
    kit.save("a", tmp_path)
    kit.load(tmp_path, "b")
    assert {k: v.shape for k, v in kit.state_dict("b").items()} == {
        k.replace(".a.", ".b."): v.shape for k, v in kit.state_dict("a").items()
    }
    with kit.active("b"):
        assert torch.equal(model(ids), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in ak.wrap(twin).parameters("a"):
            parameter.zero_()
        assert not torch.allclose(twin(ids), expected), "trains its own"
    assert torch.equal(model(ids), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), expected)
    before = model.embed.weight.clone()
    kit.merge("a")
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
    kit.unmerge("a")
    assert torch.equal(model.embed.weight, before)
    kit.unwrap()
    assert not any("_adapterkit" in name for name, _ in model.named_modules())


def test_a_part_that_holds_a_twin_is_saved_with_what_it_stands_for(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)
    model[1][0].weight = model[0].weight
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["0.weight"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    part = ak.wrap(model[1])
    part.save("a", tmp_path)
    plain = nn.Sequential(nn.Linear(4, 4))
    plain.load_state_dict({k: v for k, v in model[1].state_dict().items() if "_adapterkit" not in k})
    loaded = ak.wrap(plain)
    loaded.activate(loaded.load(tmp_path))
    assert torch.equal(plain(x), model[1](x))


def test_a_tied_parameter_has_the_rank_that_a_pattern_gives_it_under_any_of_its_names() -> None:
    kit = ak.wrap(Tied())
    kit.add("a", "lora", targets=["embed.weight"], rank={"default": 1, "head": 3})
    assert [p.shape for p in kit.parameters("a")] == [(3, 4), (7, 3)]
    with pytest.raises(ak.TargetError, match=r"\['embed', 'head'\] hold one Parameter, which has one change"):
        kit.add("b", "lora", targets=["embed.weight"], rank={"default": 1, "head": 3, "embed": 2})


def test_a_tied_parameter_outside_of_a_head_is_adapted_there() -> None:
    model, ids = Tied(), torch.randint(0, 7, (2, 3))
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["embed.weight"], rank=2, heads=["head"])
    assert [path for path, _, site in sites_of(model) for _ in site.adapting("a")] == ["embed"]
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a", heads=False)
    hidden = F.embedding(ids, model.embed.weight + 4.0 * b @ a)
    torch.testing.assert_close(model(ids), model.second(F.linear(hidden, model.head.weight, model.head.bias)))


def test_a_compiled_model_adapts_a_tied_parameter() -> None:
    model, ids = Tied(), torch.randint(0, 7, (2, 3))
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["embed.weight"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))


def test_verify_says_who_reads_a_parameter_around_its_module() -> None:
    model, x = ReadsAround(), torch.randn(2, 4)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["proj.weight"])
    kit.activate("a")
    (problem,) = [p for p in kit.verify(x).problems if "never ran" in p]
    assert "'proj' never ran on the example inputs: ReadsAround reads its 'weight' around it" in problem
    assert "example_inputs=batch" in problem


def test_verify_says_that_nothing_reads_a_parameter() -> None:
    model = Skips()
    kit = ak.wrap(model)
    kit.add("a", "bitfit")
    kit.activate("a")
    problems = [p for p in kit.verify(torch.randn(2, 4)).problems if "never ran" in p]
    assert [p.partition(",")[0] for p in problems] == [
        "'vision.0' never ran on the example inputs",
        "'vision.1' never ran on the example inputs",
    ]
    assert all("nothing else read its 'bias'" in p and "verify with inputs that run it" in p for p in problems)
