"""Where adapters sit: each placement against the formula written out, and the hosts that are refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak
from adapterkit.runtime.lookup import sites_of

from ..hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise


def adapted(block: nn.Module, **config: object) -> nn.Module:
    """The block with a random adapter, as a function f(z) for the formulas, and the block itself."""
    kit = ak.wrap(block, example_inputs=torch.randn(1, 2, 8))
    kit.add("a", ak.BottleneckConfig(bottleneck_size=3, **config))  # type: ignore[arg-type]  # parametrised
    randomise(kit, "a")
    kit.activate("a")
    [(_, _, site)] = sites_of(block)
    return site.first_module("a")


X = torch.randn(2, 5, 8)


def attend(block: nn.Module, x: Tensor) -> Tensor:
    return type(block.attention).forward(block.attention, x)[0]


def feed(block: PostNormBlock, x: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(x, block.up.weight, block.up.bias)), block.down.weight, block.down.bias)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, (8,), layer.weight, layer.bias)


@pytest.mark.parametrize("residual", [None, "up"])
@pytest.mark.parametrize("target", ["down", "norm_2"])
def test_each_placement_in_a_post_norm_block_follows_its_formula(target: str, residual: str | None) -> None:
    """Houlsby LN(x + f(x) + r), Pfeiffer LN(s + f(LN(s))), parallel LN(x + f(r) + r)."""
    block = PostNormBlock(8)
    if target == "norm_2":
        f = adapted(block, targets=[target], at="renormalised")
    else:
        f = adapted(block, targets=[target], residual=residual, placement="sequential" if residual is None else "parallel")
    r = norm(block.norm_1, attend(block, X) + X)
    x = feed(block, r)
    s = x + r
    if target == "norm_2":
        expected = norm(block.norm_2, s + f(norm(block.norm_2, s), s))
    elif residual is None:
        expected = norm(block.norm_2, x + f(x, x) + r)
    else:
        expected = norm(block.norm_2, x + f(r, x) + r)
    torch.testing.assert_close(block(X), expected)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel", "he", "whole block"])
def test_each_placement_in_a_pre_norm_block_follows_its_formula(placement: str) -> None:
    """Houlsby x + f(x) + r, Pfeiffer s + f(s), parallel x + f(r) + r, or reading the module's own input LN(r)."""
    block = PreNormBlock(8)
    config: dict[str, object] = {
        "houlsby": {"targets": ["attention"]},
        "pfeiffer": {"targets": ["attention"], "residual": "norm_1"},
        "parallel": {"targets": ["attention"], "residual": "norm_1", "placement": "parallel"},
        "he": {"targets": ["attention"], "placement": "parallel"},
        "whole block": {"targets": [""]},
    }[placement]
    f = adapted(block, **config)
    x = attend(block, norm(block.norm_1, X))
    delta = {
        "houlsby": lambda: f(x, x),
        "pfeiffer": lambda: f(x + X, x),
        "parallel": lambda: f(X, x),
        "he": lambda: f(norm(block.norm_1, X), x),
        "whole block": lambda: 0,
    }[placement]()
    s = X + x + delta
    y = s + nn.Sequential.forward(block.mlp, norm(block.norm_2, s))
    torch.testing.assert_close(block(X), y + f(y, y) if placement == "whole block" else y)


def test_an_adapter_on_the_input_changes_what_the_module_receives() -> None:
    block = PostNormBlock(8)
    f = adapted(block, targets=["up"], at="input")
    r = norm(block.norm_1, attend(block, X) + X)
    torch.testing.assert_close(block(X), norm(block.norm_2, feed(block, r + f(r, r)) + r))


def test_the_residual_is_the_one_nearest_to_each_site(pre_norm: Tiny, ids: Tensor) -> None:
    sites = ak.wrap(pre_norm, ids).sites(ak.BottleneckConfig(targets=["mlp"], residual="norm_2"))
    assert [(s.path, s.residual) for s in sites] == [
        ("blocks.0.mlp.2", "blocks.0.norm_2"),
        ("blocks.1.mlp.2", "blocks.1.norm_2"),
    ]


def test_an_ambiguous_residual_is_refused(pre_norm: Tiny, ids: Tensor) -> None:
    with pytest.raises(ak.TargetError, match=r"residual='norm_\?' names \['blocks.0.norm_1', 'blocks.0.norm_2'\]"):
        ak.wrap(pre_norm, ids).sites(ak.BottleneckConfig(targets=["mlp"], residual="norm_?"))


def test_a_residual_that_has_not_run_yet_is_an_error_and_leaves_nothing(pre_norm: Tiny, ids: Tensor) -> None:
    kit = ak.wrap(pre_norm, ids)
    kit.add("a", ak.BottleneckConfig(targets=["attention"], residual="norm_2"))
    kit.activate("a")
    with pytest.raises(ak.CompatibilityError, match=r"what enters 'blocks.0.norm_2', which has not run before it"):
        pre_norm(ids)


@pytest.mark.parametrize(("layers", "kept"), [([0], [0]), ([-1], [2]), (range(1, 3), [1, 2]), ([0, -3], [0])])
def test_layers_choose_among_the_repeated_blocks(layers: object, kept: list[int]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"inner": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}))
    sites = ak.wrap(model).sites(ak.BottleneckConfig(targets=["inner.*"], layers=layers))  # type: ignore[arg-type]  # parametrised
    assert [site.layer for site in sites] == [(i, 3) for i in kept]


def test_sizes_may_differ_by_layer(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", ak.BottleneckConfig(targets=["down"], reduction_factor={"default": 4, "1": 100}))
    kit.add("b", ak.BottleneckConfig(targets=["down"], bottleneck_size={"default": 5, "0": 3}))
    widths = {name: [p.shape[0] for key, p in kit.named_parameters(name) if key.endswith("down_weight")] for name in "ab"}
    assert widths == {"a": [2, 1], "b": [3, 5]}


class Caller(nn.Module):
    """Runs one layer in some other way than calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


def own_forward() -> nn.Module:
    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    return nn.ModuleDict({"own": Own(nn.Linear(2, 2))})


def shared_last() -> nn.Module:
    last = nn.Linear(2, 2)
    return nn.ModuleDict({"one": nn.Sequential(nn.Linear(2, 2), last), "two": last})


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (lambda: nn.MultiheadAttention(4, 2), {"targets": ["out_proj"]}, "read around its module.*Target ''"),
        (lambda: nn.TransformerEncoderLayer(4, 2), {"targets": ["self_attn.out_proj"]}, "Target 'self_attn'"),
        (
            lambda: Tiny(PostNormBlock),
            {"targets": ["blocks"]},
            r"nn.ModuleList, which is never called as it is.*'blocks.\*'",
        ),
        (own_forward, {"targets": ["own"]}, "forward of its own"),
        (shared_last, {"targets": ["one"]}, "'one.1' is used elsewhere"),
        (lambda: nn.ModuleDict({"empty": nn.Sequential()}), {"targets": ["empty"]}, "empty nn.Sequential"),
        (
            lambda: nn.ModuleDict({"d": nn.Dropout()}),
            {"targets": ["d"]},
            "cannot be told from its type.*example_inputs",
        ),
        (lambda: nn.Embedding(3, 4), {"targets": [""], "at": "input"}, "takes no features"),
        (lambda: nn.LazyLinear(3), {"targets": [""], "at": "input"}, "lazy"),
        (lambda: nn.BatchNorm1d(4), {"targets": [""], "at": "renormalised"}, "without running statistics"),
        (lambda: nn.Linear(4, 5), {"targets": [""], "at": "renormalised"}, "'' is Linear"),
    ],
)
def test_a_host_that_cannot_be_adapted_is_refused_with_the_way_out(model: object, config: dict, message: str) -> None:
    with pytest.raises(ak.TargetError, match=message):
        ak.wrap(model()).sites(ak.BottleneckConfig(**config))  # type: ignore[operator]  # parametrised


@pytest.mark.parametrize("traced", [True, False])
def test_beside_a_sequential_an_adapter_reads_what_enters_the_first_layer(traced: bool) -> None:
    mlp = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 5))
    x = torch.randn(2, 3, 8)
    expected = mlp(x)
    kit = ak.wrap(mlp, x if traced else None)
    kit.add("a", ak.BottleneckConfig(targets=[""], placement="parallel", bottleneck_size=3))
    randomise(kit, "a")
    kit.activate("a")
    [site] = kit.sites(kit.adapters["a"])
    assert (site.path, site.residual, site.input_width, site.width) == ("2", "0", 8, 5)
    torch.testing.assert_close(mlp(x), expected + mlp[2]._adapterkit.first_module("a")(x, expected))


class ChannelsFirstNorm(nn.LayerNorm):
    """A layer norm over the channels of an image, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def test_a_norm_that_uses_another_axis_than_its_base_class_is_told_by_its_shape() -> None:
    config = ak.BottleneckConfig(targets=[""])
    [site] = ak.wrap(ChannelsFirstNorm(6), torch.randn(2, 6, 5, 9)).sites(config)
    assert (site.width, site.axis) == (6, 1)
    for inputs, message in ((torch.randn(2, 6, 5, 6), "which axis"), (None, "cannot be told from its type")):
        with pytest.raises(ak.TargetError, match=message):
            ak.wrap(ChannelsFirstNorm(6), inputs).sites(config)


@pytest.mark.parametrize("setting", [{"gating": True}, {"stochastic_depth": 0.5}])
def test_settings_by_row_ask_for_the_batch_axis_where_it_is_not_the_first(setting: dict) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    for target in ("linear2", "self_attn", ""):
        with pytest.raises(ak.TargetError, match=r"has its batch on axis 1.*; .*batch_axis=1"):
            ak.wrap(layer).add("a", ak.BottleneckConfig(targets=[target], **setting))
    kit = ak.wrap(layer.eval())
    kit.add("a", ak.BottleneckConfig(targets=["linear2"], batch_axis=1, bottleneck_size=3, **setting))
    randomise(kit, "a")
    kit.activate("a")
    x = torch.randn(5, 3, 8)
    torch.testing.assert_close(layer(x)[:, :1], layer(x[:, :1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": ["down"], "exclude": ["upp"]}, "exclude: 'upp' matches no module"),
        ({"targets": ["down"], "layers": [0, 9]}, r"lies in \[9\]; they lie in layers \[0, 1\]"),
        ({"targets": ["[z-a]"]}, r"'\[z-a\]' is not a pattern"),
        ({"targets": [nn.Linear(1, 1)]}, "named by its path.*found Linear"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(post_norm: Tiny, config: dict, message: str) -> None:
    with pytest.raises(ak.TargetError, match=message):
        ak.wrap(post_norm).sites(ak.BottleneckConfig(**config))


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_a_torchscript_host_is_refused() -> None:
    model = nn.ModuleDict({"scripted": torch.jit.script(nn.Linear(2, 2))})
    with pytest.raises(ak.TargetError, match="TorchScript"):
        ak.wrap(model).sites(ak.BottleneckConfig(targets=["scripted"]))


@pytest.mark.parametrize("target", ["layer", "unused"])
def test_a_host_that_never_runs_on_the_example_inputs_is_refused(target: str) -> None:
    with pytest.raises(ak.TargetError, match=rf"\['{target}'\] never ran"):
        ak.wrap(Caller(), torch.randn(2, 4)).sites(ak.BottleneckConfig(targets=[target]))


def test_example_inputs_that_do_not_run_are_an_error(post_norm: Tiny) -> None:
    with pytest.raises(ak.CompatibilityError, match="Tiny does not run on example_inputs: "):
        ak.wrap(post_norm, torch.randn(2, 4)).sites(ak.BottleneckConfig(targets=["down"]))


def test_a_host_that_runs_all_its_children_is_an_error_that_names_it() -> None:
    class RunsAll(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for child in self.children():
                x = child(x)
            return x

    model = nn.Sequential(RunsAll())
    kit = ak.wrap(model, torch.randn(2, 4))
    kit.add("a", ak.BottleneckConfig(targets=[lambda module, _path: isinstance(module, RunsAll)]))
    with pytest.raises(ak.AdapterKitError, match="the host '0' runs all of its children"):
        model(torch.randn(2, 4))
    kit.unwrap()
    assert model(torch.randn(2, 4)).shape == (2, 4)


def test_a_tensor_of_another_width_at_run_time_is_an_error_that_names_the_site() -> None:
    class Widening(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x], -1) if x.shape[0] > 1 else x

    model = nn.ModuleDict({"w": Widening()})["w"]
    kit = ak.wrap(model, torch.randn(1, 4))
    kit.add("a", ak.BottleneckConfig(targets=[""]))
    kit.activate("a")
    with pytest.raises(ak.CompatibilityError, match=r"'a' at '' reads 4 features .*shape \(2, 8\)"):
        model(torch.randn(2, 4))
