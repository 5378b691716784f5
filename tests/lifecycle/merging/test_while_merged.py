"""While an adapter is merged: what may be activated, trained, added and saved, and what is told of it."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.runtime.hooks import KitHook

from ...hosts.tiny import PostNormBlock, Tiny, randomise
from .helpers import LORA, adapted, close, same, weights

# --- what is active ---------------------------------------------------------------------------------------------------


def test_only_the_active_adapter_can_be_merged(kit: ak.AdapterKit) -> None:
    with pytest.raises(ak.ActivationError, match=r"'b' is not active.*kit.activate\('b'\)"):
        kit.merge("b")
    kit.deactivate()
    with pytest.raises(ak.ActivationError, match="'a' is not active"):
        kit.merge("a")
    with pytest.raises(ak.AdapterNameError, match="no adapter 'c'"):
        kit.merge("c")
    with kit.active("a"), pytest.raises(ak.ActivationError, match="within a `with` block"):
        kit.merge("a")


def test_within_a_block_that_comes_back_to_it_an_adapter_can_be_merged(kit: ak.AdapterKit, ids: Tensor) -> None:
    expected = kit.model(ids)
    with kit.active("a"):
        kit.merge("a")
        close(kit.model(ids), expected)
    close(kit.model(ids), expected)


def test_while_an_adapter_is_merged_nothing_runs_without_it(kit: ak.AdapterKit, ids: Tensor) -> None:
    expected = kit.model(ids)
    kit.merge("a")
    way_out = r"'a' is merged into the weights.*kit.unmerge\('a'\)"
    for refused in (lambda: kit.activate("b"), kit.deactivate, lambda: kit.train_adapter("b")):
        with pytest.raises(ak.ActivationError, match=way_out):
            refused()
    for scope in (kit.base, lambda: kit.active("b")):
        with pytest.raises(ak.ActivationError, match=way_out), scope():
            pass
    kit.activate("a")
    with kit.active("a"):
        close(kit.model(ids), expected)
    kit.unmerge("a")
    with kit.base():
        assert not torch.allclose(kit.model(ids), expected)


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors(kit: ak.AdapterKit) -> None:
    kit.merge("a")
    with pytest.raises(ak.ActivationError, match="'a' is merged already"):
        kit.merge("a")
    with pytest.raises(ak.ActivationError, match=r"'b' is not merged; merged are: \['a'\]"):
        kit.unmerge("b")
    kit.unmerge("a")
    with pytest.raises(ak.ActivationError, match="'a' is not merged; merged are: none"):
        kit.unmerge("a")
    with pytest.raises(ak.AdapterNameError, match="no adapter 'c'"):
        kit.unmerge("c")


def test_hooks_stay_and_do_no_more_than_those_of_an_inactive_adapter(kit: ak.AdapterKit) -> None:
    def hooks() -> int:
        return sum(isinstance(h, KitHook) for m in kit.model.modules() for h in m._forward_hooks.values())

    def steps() -> set[str]:
        held = [m for m in kit.model.modules() if type(m).__name__ == "AdapterSite"]
        return {type(s).__name__ for m in held for steps in m.steps.values() for s in steps}

    before = hooks()
    kit.merge("a")
    assert (hooks(), steps()) == (before, {"Pass"})
    kit.unmerge("a")
    assert "AddProjected" in steps()


def test_heads_are_no_weights_and_go_on_running(ids: Tensor) -> None:
    kit = ak.wrap(Tiny(PostNormBlock).eval(), ids)
    kit.add("a", LORA, heads=["classifier"])
    randomise(kit, "a")
    kit.activate("a")
    with torch.no_grad():
        for _, parameter in list(kit.named_parameters("a", heads=True))[-2:]:
            parameter.add_(1.0)
    expected, own = kit.model(ids), kit.model.classifier.weight.clone()
    kit.merge("a")
    close(kit.model(ids), expected)
    assert torch.equal(kit.model.classifier.weight, own)


def test_a_compiled_model_notices(kit: ak.AdapterKit, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, resets, reset = torch.compile(kit.model, backend="eager"), [], torch._dynamo.reset
    monkeypatch.setattr(torch._dynamo, "reset", lambda: (resets.append(1), reset()))
    expected = kit.model(ids)
    close(compiled(ids), expected)
    kit.merge("a")
    close(compiled(ids), expected)
    kit.unmerge("a")
    close(compiled(ids), expected)
    assert len(resets) == 2, "weights may be folded into a graph"


# --- what trains ------------------------------------------------------------------------------------------------------


def test_a_merged_adapter_does_not_train_and_goes_on_where_it_was(kit: ak.AdapterKit) -> None:
    kit.train_adapter("a")
    kit.merge("a")
    assert not any(p.requires_grad for p in kit.parameters("a"))
    for refused in (lambda: kit.train_adapter("a"), lambda: kit.unfreeze("a")):
        with pytest.raises(ak.ActivationError, match=r"'a' is merged into the weights.*kit.unmerge\('a'\)"):
            refused()
    assert not any(p.requires_grad for p in kit.model.parameters())
    kit.unmerge("a")
    assert all(p.requires_grad for p in kit.parameters("a"))
    assert not any(p.requires_grad for p in kit.parameters("b"))


def test_an_adapter_that_is_frozen_while_merged_stays_frozen(kit: ak.AdapterKit) -> None:
    kit.train_adapter("a")
    kit.merge("a")
    kit.freeze("a")
    kit.unmerge("a")
    assert not any(p.requires_grad for p in kit.parameters("a"))


def test_a_failed_train_adapter_freezes_nothing(kit: ak.AdapterKit) -> None:
    kit.merge("a")
    with pytest.raises(ak.ActivationError):
        kit.train_adapter("a")
    assert all(p.requires_grad for name, p in kit.model.named_parameters() if "_adapterkit" not in name)


def test_autograd_notices_that_weights_changed_before_backward(kit: ak.AdapterKit, ids: Tensor) -> None:
    kit.train_adapter("a")
    loss = kit.model(ids).sum()
    kit.merge("a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_not_recomputed_with_merged_weights(reentrant: bool) -> None:
    class Checkpointed(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if torch.is_grad_enabled() else block(x)
            return self.classifier(x.mean(1))

    ids = torch.randint(0, 11, (3, 5))
    kit = adapted(Checkpointed(PostNormBlock), inputs=ids)
    kit.train_adapter("a")
    loss = kit.model(ids).sum()
    kit.merge("a")
    with pytest.raises(
        ak.ActivationError, match="merged or unmerged between forward and backward: a checkpointed forward of 'a'"
    ):
        loss.backward()
    kit.unmerge("a")
    kit.model(ids).sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a"))


# --- θ stays θ --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["freeze", "merge"])
def test_a_merged_base_has_not_moved(kit: ak.AdapterKit, first: str, ids: Tensor) -> None:
    before = weights(kit.model)
    for step in [kit.freeze, lambda: kit.merge("a")][:: 1 if first == "freeze" else -1]:
        step()
    kit.verify(ids).require()
    assert kit.verify(ids).base_is_unmoved
    kit.unmerge("a")
    assert kit.verify(ids).base_is_unmoved
    kit.unfreeze()
    assert same(weights(kit.model), before)


def test_verify_names_what_changed_after_merging(kit: ak.AdapterKit, ids: Tensor) -> None:
    kit.merge("a")
    with torch.no_grad():
        kit.model.blocks[0].up.weight[0, 0] += 1
    assert any("changed since ['a'] were merged into them: blocks.0.up.weight" in p for p in kit.verify(ids).problems)


def test_an_adapter_that_is_saved_while_merged_names_the_base_without_it(
    kit: ak.AdapterKit, ids: Tensor, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = Tiny(PostNormBlock).eval()
    base.load_state_dict({k: v for k, v in kit.model.state_dict().items() if "_adapterkit" not in k})
    expected = kit.model(ids)
    kit.merge("a")
    kit.save("a", tmp_path / "a")
    fresh = ak.wrap(base, ids)
    fresh.activate(fresh.load(tmp_path / "a"))
    assert torch.equal(base(ids), expected)
    kit.load(tmp_path / "a", "again")
    assert not recwarn.list, "no other base"


def test_the_summary_says_what_is_merged(kit: ak.AdapterKit) -> None:
    kit.merge("a")
    assert [row.is_merged for row in kit.summary().adapters] == [True, False]
    assert str(kit.summary()).splitlines()[0].endswith("merged")


def test_a_merged_model_is_exported_as_a_plain_checkpoint(kit: ak.AdapterKit, ids: Tensor) -> None:
    expected = kit.model(ids)
    kit.merge("a")
    with kit.base_checkpoint():
        state = copy.deepcopy(kit.model.state_dict())
    plain = Tiny(PostNormBlock).eval()
    plain.load_state_dict(state, strict=True)
    close(plain(ids), expected)
    with pytest.warns(UserWarning, match=r"\['a'\] merged into them, and the adapters as well"):
        kit.model.state_dict()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_merged_model_are_merged_and_can_be_unmerged(kit: ak.AdapterKit, ids: Tensor, how: str) -> None:
    before, expected = weights(kit.model), kit.model(ids)
    kit.merge("a")
    if how == "deepcopy":
        twin = copy.deepcopy(kit.model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(kit.model))
    else:
        file = io.BytesIO()
        torch.save(kit.model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    close(twin(ids), expected)
    ak.wrap(twin).unmerge("a")
    assert same(weights(twin), before)
    close(twin(ids), expected)
    assert not same(weights(kit.model), before), "the copy has originals of its own"
