import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import adapterkit as ak

from ...hosts.blocks import (
    VOCAB,
    WIDTH,
    EncoderDecoder,
    Functional,
    Model,
    Parallel,
    Post,
    PostByHand,
    Pre,
    Scaled,
    randomised,
)

IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))


def paths(model: nn.Module, *targets: str, **settings: object) -> list[str]:
    return [site.path for site in ak.wrap(model).sites(ak.BottleneckConfig(targets=targets, **settings))]


@pytest.mark.parametrize(
    ("role", "found"),
    [
        ("@attention.out", ["attention"]),
        ("@attention.q", ["attention.q"]),
        ("@attention.k", ["attention.k"]),
        ("@attention.v", ["attention.v"]),
        ("@attention.last", ["attention.o"]),
        ("@feedforward.out", ["mlp"]),
        ("@feedforward.first", ["mlp.up"]),
        ("@feedforward.last", ["mlp.down"]),
        ("@sublayer.out", ["attention", "mlp"]),
        ("@block.last", ["mlp"]),
        ("@block.out", [""]),
    ],
)
def test_a_role_names_its_modules_in_each_block(role: str, found: list[str]) -> None:
    assert paths(Model(Pre), role) == [f"blocks.{i}.{name}".rstrip(".") for i in (0, 1) for name in found]


def test_roles_mix_with_patterns_layers_and_exclude() -> None:
    model = Model(Pre, layers=3)
    assert paths(model, "@embedding", "head") == ["embedding", "head"]
    assert paths(model, "@attention.out", "mlp.down", layers=[-1]) == ["blocks.2.attention", "blocks.2.mlp.down"]
    assert paths(model, "@sublayer.out", exclude=["@attention.out", "blocks.0.mlp"]) == ["blocks.1.mlp", "blocks.2.mlp"]


def test_cross_attention_has_a_role_of_its_own() -> None:
    model = EncoderDecoder()
    cross = ["decoder.0.cross", "decoder.1.cross"]
    assert paths(model, "@crossattention.out") == cross
    assert paths(model, "@crossattention.k") == [f"{path}.k" for path in cross]
    assert not set(cross) & set(paths(model, "@sublayer.out"))


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("@attention.output", r"'@attention.output' is not a role; there are @attention.out, "),
        ("@mixer.out", r"'@mixer.out': tracing Model finds no such place"),
    ],
)
def test_a_role_that_is_not_there_is_an_error(role: str, message: str) -> None:
    with pytest.raises(ak.TargetError, match=message):
        paths(Model(Pre), role)


def test_a_branch_without_a_module_is_an_error() -> None:
    with pytest.raises(ak.TargetError, match=r"no module returns what is added in 'blocks.0'"):
        paths(Model(Functional), "@feedforward.out")


# --- presets, against their formulas ---


def weights(kit: ak.AdapterKit, path: str) -> list[Tensor]:
    return [p for name, p in kit.named_parameters("a") if name.startswith(f"{path}._adapterkit.")]


def add_random(model: nn.Module, preset: str, **settings: object) -> ak.AdapterKit:
    kit = ak.wrap(model)
    kit.add("a", preset, bottleneck_size=3, **settings)
    kit.activate("a")
    with torch.no_grad():
        for i, parameter in enumerate(kit.parameters("a")):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return kit


def bottleneck(kit: ak.AdapterKit, path: str, z: Tensor, activation: object = torch.relu) -> Tensor:
    down, down_bias, up, up_bias = weights(kit, path)[:4]
    return activation(z @ down.T + down_bias) @ up.T + up_bias  # type: ignore[operator]  # a function


def run(model: nn.Module, block: object) -> Tensor:
    x = model.embedding(IDS)
    for i, module in enumerate(model.blocks):
        x = block(x, module, f"blocks.{i}")  # type: ignore[operator]  # a function
    return model.head(model.norm(x))


def pre(x: Tensor, b: Pre, path: str, kit: ak.AdapterKit, preset: str) -> Tensor:
    a = b.attention(b.norm1(x))
    x = x + a + (bottleneck(kit, f"{path}.attention", a, F.silu) if preset == "houlsby" else 0)
    m = b.mlp(b.norm2(x))
    if preset == "houlsby":
        return x + m + bottleneck(kit, f"{path}.mlp", m, F.silu)
    if preset == "parallel":
        return x + m + 4 * bottleneck(kit, f"{path}.mlp", x)
    s = x + m
    f = bottleneck(kit, path, s, F.gelu if preset == "adapter_plus" else torch.relu)
    return s + f * (weights(kit, path)[4] if preset == "adapter_plus" else 1)


def post(x: Tensor, b: Post, path: str, kit: ak.AdapterKit, preset: str) -> Tensor:
    a = b.attention(x)
    x = b.norm1(a + x + (bottleneck(kit, f"{path}.attention", a, F.silu) if preset == "houlsby" else 0))
    m = b.mlp(x)
    if preset == "houlsby":
        return b.norm2(m + x + bottleneck(kit, f"{path}.mlp", m, F.silu))
    if preset == "parallel":
        return b.norm2(m + x + 4 * bottleneck(kit, f"{path}.mlp", x))
    s = m + x
    if preset == "pfeiffer":
        return b.norm2(s + bottleneck(kit, f"{path}.norm2", b.norm2(s)))
    z = b.norm2(s)
    return z + bottleneck(kit, f"{path}.norm2", z, F.gelu) * weights(kit, f"{path}.norm2")[4]


@pytest.mark.parametrize("preset", ["pfeiffer", "houlsby", "parallel", "adapter_plus"])
@pytest.mark.parametrize(("block", "formula"), [(Pre, pre), (Post, post), (PostByHand, post)])
def test_a_preset_computes_its_formula(block: type[Pre], formula: object, preset: str) -> None:
    model = randomised(Model(block)).double()
    plain = model(IDS)
    kit = add_random(model, preset, dtype="float64")
    adapted = model(IDS)
    with kit.base():
        expected = run(model, lambda x, b, path: formula(x, b, path, kit, preset))
    assert torch.allclose(adapted, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(adapted, plain)


def test_pfeiffer_in_a_parallel_block_reads_the_whole_sum() -> None:
    model = randomised(Model(Parallel))
    assert [(s.path, s.reads) for s in ak.wrap(model).sites("pfeiffer")] == [("blocks.0", "site"), ("blocks.1", "site")]


def test_a_sum_that_no_module_returns_is_read_as_its_two_parts() -> None:
    class Continued(Pre):
        """Its sum is scaled before the block returns it."""

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            return 0.5 * (x + self.mlp(self.norm2(x)))

    model = randomised(Model(Continued)).double()
    kit = add_random(model, "pfeiffer", dtype="float64")
    adapted = model(IDS)

    def formula(x: Tensor, b: Pre, path: str) -> Tensor:
        x = x + b.attention(b.norm1(x))
        s = x + b.mlp(b.norm2(x))
        return 0.5 * (s + bottleneck(kit, f"{path}.mlp", s))

    with kit.base():
        assert torch.allclose(adapted, run(model, formula), rtol=1e-9, atol=1e-9)


def test_a_sum_that_cannot_be_adapted_is_refused_with_the_reason() -> None:
    class Hidden(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)

    with pytest.raises(ak.TargetError, match=r"no module returns it, and the branch is scaled before it is added"):
        ak.wrap(Model(Hidden)).sites("pfeiffer")


@pytest.mark.parametrize("preset", ["pfeiffer", "adapter_plus"])
def test_a_norm_that_runs_on_other_tensors_too_is_refused(preset: str) -> None:
    class Shared(Post):
        """One norm after both of its sub-layers, as in X-MOD."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(self.attention(x) + x)
            return self.norm1(self.mlp(x) + x)

    with pytest.raises(ak.TargetError, match=r"the norm 'blocks.0.norm1' after the feedforward runs on other tensors"):
        ak.wrap(Model(Shared)).sites(preset)


def test_two_sums_that_are_one_are_refused() -> None:
    with pytest.raises(
        ak.TargetError, match=r"two targets lead to 'blocks.0' \(parallel branches have one sum\)|yields no"
    ):
        ak.wrap(Model(Parallel)).sites(ak.BottleneckConfig(targets=["@sublayer.out", "mlp.up"], at="sum"))


def test_a_module_that_yields_no_branch_has_no_sum() -> None:
    with pytest.raises(ak.TargetError, match=r"'blocks.0.mlp.up' yields no branch"):
        ak.wrap(Model(Pre)).sites(ak.BottleneckConfig(targets=["blocks.0.mlp.up"], at="sum"))


@pytest.mark.parametrize("preset", ["pfeiffer", "seq_bn", "houlsby", "double_seq_bn", "parallel", "par_bn"])
def test_a_preset_saves_and_loads(preset: str, tmp_path: object) -> None:
    model = randomised(Model(Pre))
    kit = add_random(model, preset)
    adapted = model(IDS)
    kit.save("a", tmp_path)  # type: ignore[arg-type]  # a path
    other = ak.wrap(randomised(Model(Pre)))
    other.activate(other.load(tmp_path, "b"))  # type: ignore[arg-type]  # a path
    assert torch.equal(other.model(IDS), adapted)


@pytest.mark.parametrize("preset", ["pfeiffer", "houlsby", "parallel", "scaled_parallel"])
def test_a_new_preset_changes_no_bit(preset: str) -> None:
    for block in (Pre, Post, Parallel, Scaled):
        model = randomised(Model(block))
        plain = model(IDS)
        kit = ak.wrap(model)
        kit.add("a", preset)
        kit.activate("a")
        assert torch.equal(model(IDS), plain)
        kit.unwrap()


def test_a_preset_found_while_another_adapter_runs_is_the_same() -> None:
    model = randomised(Model(Pre))
    kit = add_random(model, "houlsby")
    before = model(IDS)
    assert [site.path for site in kit.sites("pfeiffer")] == ["blocks.0", "blocks.1"]
    assert len(kit.sites("houlsby")) == 4
    assert torch.equal(model(IDS), before)


def test_a_misspelt_preset_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ak.ConfigError, match=r"'pfeifer' is neither a preset .*did you mean 'pfeiffer'"):
        ak.wrap(Model(Pre)).add("a", "pfeifer")


# --- proofs ---


def test_verify_proves_a_preset_and_prints_it() -> None:
    model = randomised(Model(Scaled))
    kit = ak.wrap(model)
    kit.add("a", "houlsby")
    kit.train_adapter("a")
    proof = kit.verify()
    assert proof.is_ok
    assert [site.place for site in proof.sites or ()] == ["attention branch", "feedforward branch"] * 2
    assert all(site.fired_in_eval == site.fired_in_training == 1 for site in proof.sites or ())
    assert "times " in str(proof)
    assert "base: frozen, unmoved\nno problems" in str(proof)


@pytest.mark.parametrize(("block", "place"), [(Post, "norm after feedforward"), (Pre, "sum after feedforward")])
def test_verify_says_what_a_site_is(block: type[Pre], place: str) -> None:
    kit = ak.wrap(randomised(Model(block)))
    kit.add("a", "pfeiffer")
    kit.activate("a")
    assert {site.place for site in kit.verify().sites or ()} == {place}


def test_verify_finds_a_host_that_was_replaced() -> None:
    model = randomised(Model(Pre))
    kit = ak.wrap(model)
    kit.add("a", "houlsby")
    kit.activate("a")
    model.blocks[1].mlp = type(model.blocks[1].mlp)()
    assert kit.verify().problems == (
        "'blocks.1.mlp' was replaced since adapter 'a' was added: remove the adapter, and add it anew",
    )


def test_verify_finds_a_host_that_is_read_around() -> None:
    class Tied(Model):
        """Computes its head as a function of the head's weight, around the module."""

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for block in self.blocks:
                x = block(x)
            return F.linear(self.norm(x), self.head.weight)

    kit = ak.wrap(randomised(Tied(Pre)))
    kit.add("a", ak.BottleneckConfig(targets=["head"]))
    kit.activate("a")
    never, dead = kit.verify().problems
    assert never.startswith("'head' never ran on the example inputs")
    assert dead.startswith("no gradient of the model's output reaches head._adapterkit.a.down_weight")
    with pytest.raises(ak.TargetError, match=r"\['head'\] never ran .* target what runs around them: \[''\]"):
        ak.wrap(kit.unwrap(), example_inputs=IDS).sites(ak.BottleneckConfig(targets=["head"]))


class Checkpointed(Model):
    """Recomputes its blocks in the backward, the reentrant way."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if torch.is_grad_enabled() else block(x)
        return self.head(self.norm(x))


def test_verify_sees_gradients_through_reentrant_checkpointing_and_leaves_those_that_were_there() -> None:
    model = randomised(Checkpointed(Pre))
    kit = ak.wrap(model)
    kit.add("a", "houlsby")
    kit.train_adapter("a")
    gradients = {}
    for name, parameter in kit.named_parameters("a"):
        gradients[name] = parameter.grad = torch.ones_like(parameter)
    kit.verify(IDS).require()
    assert all(p.grad is gradients[name] and p.grad.eq(1).all() for name, p in kit.named_parameters("a"))


def test_verify_runs_no_hooks_on_gradients() -> None:
    model = randomised(Checkpointed(Pre))
    kit = ak.wrap(model)
    kit.add("a", "houlsby")
    kit.train_adapter("a")
    stepped: list[Tensor] = []
    next(iter(kit.parameters("a"))).register_post_accumulate_grad_hook(stepped.append)
    kit.verify(IDS)
    assert not stepped


class Changing(Pre):
    """Computes otherwise when it is told to: what its adapters were added for is not what they then do."""

    how = "add"

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        f = self.mlp(self.norm2(x))
        return {
            "add": lambda: x + f,
            "multiply": lambda: x * f,
            "replace": lambda: f,
            "rectify": lambda: x + f.relu(),
            "nothing": lambda: x + 0 * f,
            "twice": lambda: x + self.mlp(f),
            "both": lambda: x + f + f,
        }[self.how]()


@pytest.mark.parametrize("how", ["multiply", "replace", "rectify", "nothing", "twice", "both"])
def test_verify_refutes_places_that_are_not_what_they_were(how: str) -> None:
    model = randomised(Model(Changing))
    kit = ak.wrap(model)
    kit.add("a", "houlsby")
    kit.train_adapter("a")
    kit.verify(IDS).require()
    for block in model.blocks:
        block.how = how
    assert not kit.verify(IDS).is_ok


@pytest.mark.parametrize("how", ["multiply", "replace"])
def test_verify_refutes_sums_that_are_none(how: str) -> None:
    model = randomised(Model(Changing))
    kit = ak.wrap(model)
    kit.add("a", "pfeiffer")
    kit.train_adapter("a")
    kit.verify(IDS).require()
    for block in model.blocks:
        block.how = how
    problems = kit.verify(IDS).problems
    assert any("computes otherwise than when" in p or "are not found any more" in p for p in problems)


def test_verify_tells_why_no_gradients_can_be_computed() -> None:
    class Overwriting(Pre):
        """Adds in place to what its norm has saved for the backward."""

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm1(x).exp()
            out = x + self.mlp(z)
            z.add_(1)
            return out

    model = randomised(Model(Overwriting))
    kit = ak.wrap(model)
    kit.add("a", "pfeiffer")
    kit.train_adapter("a")
    assert any(p.startswith("no gradients can be computed: one of the variables") for p in kit.verify(IDS).problems)


@pytest.mark.parametrize("preset", ["pfeiffer", "houlsby", "parallel", "adapter_plus"])
@pytest.mark.parametrize("block", [Pre, Post])
def test_presets_run_in_inference_mode(block: type[Pre], preset: str) -> None:
    model = randomised(Model(block))
    add_random(model, preset)
    expected = model(IDS)
    with torch.inference_mode():
        assert torch.equal(model(IDS), expected)


def test_a_stream_that_is_overwritten_is_read_as_it_was_in_inference_mode() -> None:
    class Overwritten(Pre):
        """The norm takes the stream, which is then overwritten before the feed-forward returns."""

        def forward(self, x: Tensor) -> Tensor:
            x, y = x.clone(), x
            z = self.norm2(x)
            x.zero_()
            return y + self.mlp(z)

    model = randomised(Model(Overwritten))
    kit = ak.wrap(model, IDS)
    kit.add("a", ak.BottleneckConfig(targets=["mlp"], residual="norm2", placement="parallel", bottleneck_size=3))
    kit.activate("a")
    with torch.no_grad():
        for i, parameter in enumerate(kit.parameters("a")):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    with torch.inference_mode():
        adapted = model(IDS)
    with kit.base():
        expected = run(model, lambda x, b, path: x + b.mlp(b.norm2(x)) + bottleneck(kit, f"{path}.mlp", x))
    assert torch.allclose(adapted, expected, atol=1e-4)


def test_an_attention_that_is_added_to_nothing_is_not_left_out_of_its_roles() -> None:
    """The first layer of SAM's mask decoder goes on with what its attention returns."""

    class Block(Pre):
        def __init__(self, *, adds: bool) -> None:
            super().__init__()
            self.adds = adds

        def forward(self, x: Tensor) -> Tensor:
            attended = self.attention(self.norm1(x))
            x = x + attended if self.adds else attended
            return x + self.mlp(self.norm2(x))

    model = randomised(nn.Sequential(nn.Embedding(VOCAB, WIDTH), Block(adds=False), Block(adds=True)))
    kit = ak.wrap(model, IDS)
    lora = ak.LoRAConfig(targets=["@attention.q"])
    with pytest.raises(
        ak.TargetError, match=r"attention that '1\.attention' computes in the block '1' is added to nothing"
    ):
        kit.sites(lora)
    assert [s.path for s in kit.sites(lora, exclude=["1.attention"])] == ["2.attention.q"]
    assert [s.path for s in kit.sites("houlsby")] == ["1.mlp", "2.attention", "2.mlp"]
