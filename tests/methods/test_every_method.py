"""What holds for every preset of every method, on models of several kinds."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.methods import METHODS, UNION_PRESETS, presets

from ..helpers import PRESETS
from ..hosts.language_models import first, give_biases, gpt2, llama
from ..hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise

# Presets whose initialisation is near the identity, not at it, as their papers say.
NEAR = {"adapter_plus"}
BIASED = [name for name in PRESETS if name != "bitfit"]


HOSTS: dict[str, Any] = {
    "post-norm": lambda: Tiny(PostNormBlock).eval(),
    "pre-norm": lambda: Tiny(PreNormBlock).eval(),
    "gpt2": gpt2,
    "llama": llama,
}


# Each preset on each host that has what it trains: LLaMA has no biases.
PAIRS = [(host, preset) for host in HOSTS for preset in PRESETS if (host, preset) != ("llama", "bitfit")]
on_every_host = pytest.mark.parametrize(("host", "preset"), PAIRS)


@pytest.fixture
def host() -> str:
    return "pre-norm"


@pytest.fixture
def model(host: str) -> nn.Module:
    made = HOSTS[host]()
    give_biases(made)
    return made


@pytest.fixture
def ids() -> Tensor:
    """Token ids, (batch 3, seq 5)."""
    return torch.randint(0, 11, (3, 5))


def added(model: nn.Module, ids: Tensor, preset: str, name: str = "a", **settings: Any) -> ak.AdapterKit:
    """The kit of a model with this preset."""
    kit = ak.wrap(model, ids)
    if preset in UNION_PRESETS or "reduction_factor" in presets()[preset][0].config_type.model_fields:
        settings = {"reduction_factor": 1.0, **settings}  # a bottleneck of one unit would often be dead in these tiny hosts
    kit.add(name, preset, **settings)
    return kit


@on_every_host
def test_a_new_adapter_is_the_identity_to_the_bit(model: nn.Module, ids: Tensor, preset: str) -> None:
    base = first(model(ids))
    kit = added(model, ids, preset)
    kit.activate("a")
    adapted = first(model(ids))
    if preset in NEAR:
        torch.testing.assert_close(adapted, base, atol=0.05, rtol=0)
    else:
        assert torch.equal(adapted, base)
    randomise(kit, "a")
    assert not torch.allclose(first(model(ids)), base, atol=1e-4)


@on_every_host
def test_training_moves_every_tensor_of_the_adapter_and_none_of_the_base(
    model: nn.Module, ids: Tensor, preset: str
) -> None:
    kit = added(model, ids, preset)
    kit.train_adapter("a")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = [p.detach().clone() for p in kit.parameters("a")]
    for _ in range(3):  # where a factor starts at zero, the other one moves a step later
        first(model(ids)).pow(2).mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(kit.parameters("a"), before, strict=True))
    proof = kit.verify(ids, optimizer=optimizer)
    proof.require()
    assert proof.base_is_unmoved


@on_every_host
def test_save_and_load_give_equal_outputs_under_another_seed_and_name(
    model: nn.Module, ids: Tensor, preset: str, tmp_path: Path
) -> None:
    fresh = copy.deepcopy(model)
    kit = added(model, ids, preset)
    randomise(kit, "a")
    kit.activate("a")
    expected = first(model(ids))
    kit.save("a", tmp_path)
    torch.manual_seed(1234)
    other = ak.wrap(fresh, ids)
    assert other.load(tmp_path, "another name") == "another name"
    other.activate("another name")
    assert torch.equal(first(fresh(ids)), expected)
    assert other.adapters["another name"] == kit.adapters["a"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_seed_makes_the_same_adapter_again(ids: Tensor, preset: str) -> None:
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        kit = ak.wrap(Tiny(PreNormBlock).eval(), ids)
        kit.add("a", preset, seed=7)
        states.append(
            {k: v for k, v in kit.model.state_dict().items() if "_adapterkit" in k and not k.endswith(("magnitude",))}
        )
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@on_every_host
def test_copies_and_pickles_run_their_own_adapter(model: nn.Module, ids: Tensor, preset: str) -> None:
    kit = added(model, ids, preset)
    randomise(kit, "a")
    kit.activate("a")
    expected = first(model(ids))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    randomise(kit, "a")
    assert not torch.equal(first(model(ids)), expected)
    assert all(torch.equal(first(other(ids)), expected) for other in copies)


COMPILED = [(preset, "pre-norm") for preset in PRESETS] + [("pfeiffer", "gpt2"), ("lora", "gpt2")]
SLOWLY = [(preset, "gpt2") for preset in PRESETS if (preset, "gpt2") not in COMPILED]


@pytest.mark.parametrize(("preset", "host"), [*COMPILED, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOWLY)])
def test_it_compiles_without_a_graph_break(ids: Tensor, preset: str, host: str) -> None:
    model = HOSTS[host]()
    kit = added(model, ids, preset)
    randomise(kit, "a")
    kit.activate("a")
    expected = first(model(ids))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(first(compiled(ids)), expected)
    kit.deactivate()
    torch.testing.assert_close(first(compiled(ids)), first(model(ids)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on_every_host
def test_it_runs_on_half_precision_hosts_and_is_the_identity_there(
    model: nn.Module, ids: Tensor, preset: str, dtype: torch.dtype
) -> None:
    model.to(dtype)
    base = first(model(ids))
    kit = added(model, ids, preset)
    kit.activate("a")
    if preset not in NEAR:
        assert torch.equal(first(model(ids)), base)
    randomise(kit, "a")
    adapted = first(model(ids))
    assert adapted.dtype == dtype
    assert all(p.dtype == torch.float32 for p in kit.parameters("a"))
    assert not torch.equal(adapted, base)


@on_every_host
def test_it_trains_under_autocast(model: nn.Module, ids: Tensor, preset: str) -> None:
    kit = added(model, ids, preset)
    randomise(kit, "a")
    kit.train_adapter("a")
    plain = first(model(ids))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = first(model(ids))
        loss = mixed.float().pow(2).mean()
    loss.backward()
    torch.testing.assert_close(mixed.float(), plain, atol=0.3, rtol=0.3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in kit.parameters("a"))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_gradient_checkpointing_gives_equal_gradients(ids: Tensor, preset: str, reentrant: bool) -> None:
    model = gpt2()
    kit = added(model, ids, preset, **({"stochastic_depth": 0.0} if preset == "adapter_plus" else {}))
    randomise(kit, "a")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    kit.train_adapter("a")
    model.train()

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        first(model(ids)).pow(2).mean().backward()
        return [p.grad for p in kit.parameters("a")]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("preset", BIASED)
def test_generation_with_a_cache_equals_generation_without(ids: Tensor, preset: str) -> None:
    model = llama()
    kit = added(model, ids, preset)
    randomise(kit, "a")
    kit.activate("a")
    cached, uncached = (
        model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize(
    ("host", "preset"), [pair for pair in PAIRS if pair[1] in ("lora", "dora", "vera", "ia3", "bitfit", "norm_tuning")]
)
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(model: nn.Module, ids: Tensor, preset: str) -> None:
    kit = added(model, ids, preset, **({"alpha": 3.0} if preset in ("lora", "dora") else {}))
    before = {name: p.clone() for name, p in model.named_parameters() if "_adapterkit" not in name}
    randomise(kit, "a")
    kit.activate("a")
    expected = first(model(ids))
    kit.merge("a")
    torch.testing.assert_close(first(model(ids)), expected, atol=1e-5, rtol=1e-5)
    kit.unmerge("a")
    assert torch.equal(first(model(ids)), expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_a_model_without_biases_is_refused_by_bitfit(ids: Tensor) -> None:
    kit = ak.wrap(llama(), ids)
    with pytest.raises(
        ak.TargetError, match="names no bias of LlamaForCausalLM, which has 21 Parameters and 0 of that kind"
    ):
        kit.add("a", "bitfit")


@pytest.mark.parametrize("preset", ["pfeiffer", "houlsby", "parallel", "compacter", "invertible", "madx"])
def test_what_is_no_change_of_a_weight_is_not_merged(ids: Tensor, preset: str) -> None:
    model = Tiny(PreNormBlock).eval()
    kit = added(model, ids, preset)
    kit.activate("a")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ak.CompatibilityError, match="is no change of a weight; only methods that are can be merged"):
        kit.merge("a")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@on_every_host
def test_unwrap_leaves_no_trace(model: nn.Module, ids: Tensor, preset: str) -> None:
    base, keys = first(model(ids)), list(model.state_dict())
    kit = added(model, ids, preset)
    kit.train_adapter("a")
    kit.unwrap()
    assert torch.equal(first(model(ids)), base)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("_adapterkit" in key for m in model.modules() for key in vars(m))


def test_every_in_tree_method_has_a_short_file_and_a_documented_config() -> None:
    for method in METHODS:
        source = Path(__file__).parents[2] / "src/adapterkit/methods" / f"{method.name}.py"
        lines = [line for line in source.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert len(lines) <= 220  # with the config
        assert "arXiv" in str(method.config_type.__doc__)
