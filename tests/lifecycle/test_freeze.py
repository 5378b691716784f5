"""θ does not move, φ does, and everything is put back."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.structure.base_tensors import digest

from ..hosts.tiny import Tiny

CONFIG = ak.BottleneckConfig(targets=["attention.out", "down"], bottleneck_size=3)


class WithNorms(nn.Module):
    """Every kind of norm that keeps running statistics, and one buffer that just counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.batch, self.instance = nn.BatchNorm1d(4), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.untracked, self.dropout = nn.BatchNorm1d(4, track_running_stats=False), nn.Dropout(0.2)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.register_buffer("calls", torch.zeros(()))
        self.counts = False

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.calls += 1
        return self.head(self.dropout(self.untracked(self.instance(self.batch(self.conv(x))))).mean(-1))


def base_of(model: nn.Module) -> dict[str, Tensor]:
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in state.items() if "_adapterkit" not in name}


def train(model: nn.Module, x: Tensor, parameters: list[Tensor], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_training_moves_the_adapter_and_not_one_bit_of_the_base() -> None:
    model, x = WithNorms(), 3 * torch.randn(5, 4, 6) + 2
    model(x)  # statistics other than the initial ones
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["conv"], bottleneck_size=2), heads=["head"])
    kit.train_adapter("a")
    before, adapter = base_of(model), [p.detach().clone() for p in kit.parameters("a", heads=True)]
    model.train()
    train(model, x, list(model.parameters()))  # all of them: the frozen ones must not move even so
    after = base_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all((p != q).any() for p, q in zip(kit.parameters("a", heads=True), adapter, strict=True))
    assert kit.verify().base_is_unmoved


def test_frozen_norms_use_their_running_statistics_in_train_mode() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(7, 4)
    model(x)
    expected = copy.deepcopy(model).eval()(x)
    kit = ak.wrap(model)
    kit.freeze()
    assert torch.equal(model.train()(x), expected)
    kit.unfreeze()
    assert model[1].training
    assert not torch.equal(model(x), expected)


def test_the_norms_of_a_head_copy_train_as_usual() -> None:
    model, x = WithNorms().train(), torch.randn(5, 4, 6)
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["conv"], bottleneck_size=2), heads=["head"])
    kit.train_adapter("a")
    model(x)
    copies = [b for name, b in model.named_buffers() if "_adapterkit" in name and name.endswith("num_batches_tracked")]
    assert [int(b) for b in copies] == [1]
    assert int(model.head[1].num_batches_tracked) == 0


def test_any_other_buffer_that_moved_is_reported() -> None:
    model = WithNorms()
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["conv"], bottleneck_size=2))
    kit.train_adapter("a")
    assert kit.verify().is_ok
    model.counts = True
    model.train()(torch.randn(5, 4, 6))
    assert kit.verify().problems == ("the base moved since it was frozen: calls",)
    with pytest.raises(ak.AdapterKitError, match="base moved since it was frozen: calls"):
        kit.verify().require()


@pytest.mark.parametrize("change", ["value", "order", "sign of zero", "gone"])
def test_a_base_that_moved_is_told_from_one_that_did_not(post_norm: Tiny, change: str) -> None:
    kit = ak.wrap(post_norm)
    kit.freeze()
    with torch.no_grad():
        weight = post_norm.blocks[1].up.weight
        if change == "value":
            weight.data[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
        elif change == "order":
            weight.data.copy_(weight.flip(0))
        elif change == "sign of zero":
            post_norm.blocks[1].up.bias.data[0] = 0.0
            kit.unfreeze()
            kit.freeze()
            post_norm.blocks[1].up.bias.data[0] = -0.0
        else:
            del post_norm.blocks[1].up
    assert not kit.verify().base_is_unmoved
    assert "blocks.1.up" in kit.verify().problems[0]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.complex64, torch.bool]
)
def test_a_digest_tells_values_shapes_and_dtypes_apart(dtype: torch.dtype) -> None:
    one = torch.tensor([0, 1, 0, 1, 1, 0]).to(dtype)
    assert digest(one) == digest(one.clone()) == digest(one[None][0])
    others = [one.flip(0), one.reshape(2, 3), one[:5], torch.zeros_like(one), one[:0]]
    assert len({digest(tensor) for tensor in (one, *others)}) == len(others) + 1
    assert digest(one.reshape(2, 3).T.contiguous()) == digest(one.reshape(2, 3).T)


def test_unfreezing_restores_what_was_found(post_norm: Tiny, ids: Tensor) -> None:
    post_norm.embedding.weight.requires_grad_(False)
    post_norm.eval()
    flags = {name: p.requires_grad for name, p in post_norm.named_parameters()}
    kit = ak.wrap(post_norm)
    kit.freeze()
    kit.freeze()
    assert not any(p.requires_grad for p in post_norm.parameters())
    kit.unfreeze()
    assert {name: p.requires_grad for name, p in post_norm.named_parameters()} == flags
    kit.unfreeze()
    assert not any(m.training for m in post_norm.modules())
    assert post_norm(ids).grad_fn is not None


def test_a_norm_that_was_in_eval_mode_on_purpose_stays_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    kit = ak.wrap(model)
    kit.freeze()
    model(torch.randn(3, 4))
    kit.unfreeze()
    assert [m.training for m in model] == [True, False, True]


def test_training_an_adapter_leaves_the_mode_alone_and_closes_the_others(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm.eval())
    kit.add("a", CONFIG, heads=["classifier"])
    kit.add("b", CONFIG)
    kit.train_adapter("a")
    assert not post_norm.training
    assert {
        n.split(".")[-2] if "_adapterkit" in n else "base" for n, p in post_norm.named_parameters() if p.requires_grad
    } == {"a"}
    kit.train_adapter("b")
    assert all(not p.requires_grad for p in kit.parameters("a", heads=True))
    kit.unfreeze("a")
    assert all(p.requires_grad for p in kit.parameters("a", heads=True))


def test_verify_finds_what_an_optimizer_lacks(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG, heads=["classifier"])
    early = torch.optim.SGD(post_norm.parameters(), lr=0.1)
    theta = sum(p.numel() for name, p in post_norm.named_parameters() if "_adapterkit" not in name)
    trap = (
        "adapter 'a' is there but not active, so that nothing could be proven, and the base is open: training now would "
        f"train all {theta:,} base parameters; call kit.train_adapter('a')"
    )
    assert kit.verify(optimizer=early).problems[0] == trap
    kit.activate("a")
    assert kit.verify(optimizer=early).problems[-1] == "the base is not frozen: call kit.train_adapter or kit.freeze"
    kit.train_adapter("a")
    assert kit.verify(optimizer=early).is_ok
    kit.freeze("a")
    assert kit.verify(optimizer=early).problems == ("nothing is to train: call kit.train_adapter",)
    kit.unfreeze("a")
    partial = torch.optim.SGD(kit.parameters("a", heads=False), lr=0.1)
    assert kit.verify(optimizer=partial).problems == (
        "18 parameters of adapter 'a' train, but the optimizer does not hold 2 of them (kit.parameters('a') gives all): "
        "'classifier._adapterkit.a.weight', 'classifier._adapterkit.a.bias'",
    )


def test_verify_finds_a_hook_that_is_gone_and_a_host_that_never_ran(post_norm: Tiny, ids: Tensor) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)
    kit.train_adapter("a")
    report = kit.verify(ids)
    assert report.is_ok
    assert set(report.fired.values()) == {1}  # type: ignore[union-attr]  # never None with inputs
    post_norm.blocks[0].down._forward_hooks.clear()
    gone, dead = kit.verify(ids).problems
    assert gone == "the hook of adapter 'a' on 'blocks.0.down' is gone: someone removed it"
    assert dead.startswith("no gradient of the model's output reaches blocks.0.down._adapterkit.a.down_weight")
    post_norm.blocks[0].forward = lambda x: x  # type: ignore[method-assign]  # what the test is about
    assert any("'blocks.0.down' never ran on the example inputs" in problem for problem in kit.verify(ids).problems)


def test_verify_finds_a_frozen_parameter_that_was_opened(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.freeze()
    post_norm.classifier.bias.requires_grad_(True)
    assert kit.verify().problems == ("the base is frozen, yet 1 of its parameters requires grad: 'classifier.bias'",)


def test_looking_at_example_inputs_moves_nothing() -> None:
    model = WithNorms().train()
    model.counts = True
    model.batch.eval()
    before, flags = base_of(model), [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    ak.wrap(model, torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))).sites(
        ak.BottleneckConfig(targets=["dropout"])
    )
    assert all(torch.equal(base_of(model)[name], tensor) for name, tensor in before.items())
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_head_is_a_copy_and_the_models_own_never_moves(post_norm: Tiny, ids: Tensor) -> None:
    kit = ak.wrap(post_norm)
    own, expected = copy.deepcopy(post_norm.classifier.state_dict()), post_norm(ids)
    kit.add("a", CONFIG, heads=["classifier"])
    kit.train_adapter("a")
    assert torch.equal(post_norm(ids), expected)
    train(post_norm, ids, [p for p in post_norm.parameters() if p.requires_grad])
    assert not torch.equal(post_norm(ids), expected)
    assert all(torch.equal(post_norm.classifier.state_dict()[name], value) for name, value in own.items())
    with kit.base():
        assert torch.equal(post_norm(ids), expected)


def test_a_sequential_head_is_copied_layer_by_layer() -> None:
    model, x = WithNorms().eval(), torch.randn(5, 4, 6)
    expected = model(x)
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["conv"], bottleneck_size=2), heads=["head"])
    kit.activate("a")
    assert torch.equal(model(x), expected)
    assert len(model.head) == 3
    with torch.no_grad():
        model.head[0].weight.zero_()
        model.head[2].weight.zero_()
    assert torch.equal(model(x), expected), "the copies run, not the model's own layers"


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (["dropout"], "no parameters of their own"),
        (["nothing"], "'nothing' matches no module"),
        (["conv"], r"\['conv'\] lie inside the head 'conv'"),
        ([""], "lie inside the head ''"),
    ],
)
def test_a_head_that_cannot_be_one_is_refused(heads: list[str], message: str) -> None:
    with pytest.raises(ak.TargetError, match=message):
        ak.wrap(WithNorms()).add("a", ak.BottleneckConfig(targets=["conv"]), heads=heads)


class Vision(nn.Module):
    """Takes images, not ids, and checkpoints its blocks in the reentrant way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(lambda x: self.block(self.embed(x)), pixels, use_reentrant=True)
        logits = self.head(hidden)
        return logits.sum() if labels is None else nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_reentrant_checkpointing_trains_where_floats_and_labels_go_in(by_keyword: bool) -> None:
    kit = ak.wrap(Vision())
    kit.add("a", ak.BottleneckConfig(targets=["block"], bottleneck_size=2), heads=["head"])
    kit.train_adapter("a")
    pixels, labels = torch.randn(2, 6), torch.tensor([0, 1])
    loss = kit.model(labels=labels, pixels=pixels) if by_keyword else kit.model(pixels, labels)
    loss.backward()
    assert all(p.grad is not None for p in kit.parameters("a"))


@pytest.mark.parametrize("size", [(1000, 64), (1024, 512)])
def test_a_digest_moves_with_any_exchange_or_compensated_change(size: tuple[int, int]) -> None:
    one = torch.randn(size)
    before = digest(one)
    for i, j in [((0, 0), (0, 1)), ((3, 5), (999, 63)), ((10, 0), (18, 0))]:
        other = one.clone()
        other[i], other[j] = one[j].clone(), one[i].clone()
        assert digest(other) != before
        words = one.clone().view(torch.int32)
        words[i] += 1
        words[j] -= 1
        assert digest(words.view(torch.float32)) != before


def test_a_frozen_model_can_be_vmapped() -> None:
    model = nn.Linear(4, 3)
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=[""], bottleneck_size=2))
    kit.train_adapter("a")
    x = torch.randn(5, 4)
    torch.testing.assert_close(torch.vmap(model)(x), model(x))


def test_a_head_with_integers_is_copied_and_trained_where_it_can_be() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.order = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)[..., self.order]

    model = nn.Sequential(nn.Linear(4, 4), Picks())
    expected = model(torch.ones(1, 4))
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["0"], bottleneck_size=2), heads=["re:1"])
    kit.train_adapter("a")
    assert torch.equal(model(torch.ones(1, 4)), expected)
    assert [p.requires_grad for p in kit.parameters("a", heads=True)][-3:] == [False, True, True]


def test_heads_that_share_a_weight_share_it_in_the_copies() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "one": nn.Linear(4, 3), "two": nn.Linear(4, 3)})
    model["two"].weight = model["one"].weight
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["body"]), heads=["one", "two"])
    assert model["one"]._adapterkit.first_module("a").weight is model["two"]._adapterkit.first_module("a").weight
    assert model["one"]._adapterkit.first_module("a").weight is not model["one"].weight


def test_a_head_that_never_runs_on_the_example_inputs_is_refused() -> None:
    class ReadsAround(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.body(x), self.head.weight)

    with pytest.raises(ak.TargetError, match=r"the heads \['head'\] never ran"):
        ak.wrap(ReadsAround(), torch.randn(2, 4)).add("a", ak.BottleneckConfig(targets=["body"]), heads=["head"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("mode", [True, False])
def test_scripted_norms_are_frozen_too(mode: bool) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    head = nn.Linear(4, 4)
    head.unused = torch.jit.script(nn.Tanh())
    layers = {"first": nn.Linear(4, 4), "scripted": torch.jit.script(inner), "head": head}
    model = nn.Sequential(OrderedDict(layers)).train(mode)
    before, x = base_of(model), 3 * torch.randn(5, 4) + 2
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["first"], bottleneck_size=2), heads=["head"])
    assert kit.tree() is not None
    kit.train_adapter("a")
    model.train()
    train(model, x, list(kit.parameters("a")))
    assert kit.verify(x).problems == ()
    assert all(torch.equal(value, before[name]) for name, value in base_of(model).items())
    copy.deepcopy(model)(x)
    kit.unwrap()
    assert all(module.training for module in model.modules())
    model(x)
    assert not torch.equal(model.state_dict()["scripted.1.running_mean"], before["scripted.1.running_mean"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_unfreezing_gives_scripted_norms_their_own_mode_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.BatchNorm1d(4)), torch.jit.script(nn.BatchNorm1d(4)))
    model[1].eval()
    kit = ak.wrap(model)
    kit.freeze()
    assert [layer.training for layer in model] == [True, False, False]
    kit.unfreeze()
    assert [layer.training for layer in model] == [True, False, True]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_freezing_again_leaves_hooks_of_others_behind_ours() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))
    kit, ids = ak.wrap(model), torch.tensor([[1, 2]])
    kit.add("a", "lora", targets=["1"])
    kit.train_adapter("a")
    seen = []
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output.requires_grad))
    model(ids)
    for again in (lambda: kit.train_adapter("a"), kit.freeze):
        again()
        model(ids)
    assert seen == [True, True, True]
