"""Layers that are described from outside: a quantised linear that is no nn.Linear costs nothing here."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.placement.hosts import HostShape, HostType, Projection, register_host
from adapterkit.placement.projections import projection_of
from adapterkit.structure import hosts, plugins
from adapterkit.structure.anatomy import discover
from adapterkit.structure.hosts import all_hosts, channel_axis, is_called, known_shape, resolve_host
from adapterkit.structure.paths import modules_by_path
from adapterkit.structure.tracing import rows

from ..hosts.blocks import VOCAB, WIDTH, Model, Post, Pre
from ..hosts.tiny import randomise

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapterkit_int8"
FORGET = (hosts._from_packages.cache_clear, plugins.load.cache_clear, discover._REMEMBERED.clear, rows._REMEMBERED.clear)
IDS = torch.randint(0, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adapterkit_int8", EXAMPLE / "adapterkit_int8.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


int8 = load_example()
Int8Linear = int8.Int8Linear


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test with a table of its own: what it registers is gone afterwards."""
    monkeypatch.setattr(hosts, "_REGISTERED", {})
    monkeypatch.setattr(hosts, "_VERSIONS", list(hosts._VERSIONS))
    for forget in FORGET:
        forget()
    yield
    for forget in FORGET:
        forget()


@pytest.fixture
def described() -> None:
    register_host(int8.INT8_LINEAR)


def quantised(block: type[nn.Module] = Pre) -> Model:
    """A small transformer in whose blocks every linear layer is quantised."""
    model = Model(block).eval()
    for path, module in list(model.blocks.named_modules()):
        if isinstance(module, nn.Linear):
            way, _, name = path.rpartition(".")
            setattr(model.blocks.get_submodule(way), name, Int8Linear.of(module))
    assert not any(isinstance(module, nn.Linear) for module in model.blocks.modules())
    return model


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("targets", ["attention.q", "blocks.*.attention.q", "@attention.q"])
def test_lora_finds_its_layers_by_pattern_and_by_role(targets: str) -> None:
    kit = ak.wrap(quantised())
    found = kit.sites(ak.LoRAConfig(targets=[targets]))
    assert [site.path for site in found] == ["blocks.0.attention.q", "blocks.1.attention.q"]
    assert {(site.host, site.width, site.input_width, site.axis) for site in found} == {("Int8Linear", WIDTH, WIDTH, -1)}


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("block", [Pre, Post])
@pytest.mark.parametrize("role", ["q", "k", "v", "out", "first", "last"])
def test_roles_are_those_of_the_same_model_with_torchs_layers(role: str, block: type[nn.Module]) -> None:
    config = ak.LoRAConfig(
        targets=[f"@{kind}.{role}" for kind in ("attention", "feedforward") if role not in "qkv"] or [f"@attention.{role}"]
    )
    if role == "out":
        config = ak.BottleneckConfig(targets=["@attention.out", "@feedforward.out"])
    ours, torchs = (ak.wrap(model).sites(config) for model in (quantised(block), Model(block).eval()))
    assert [site.path for site in ours] == [site.path for site in torchs]


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("preset", ["pfeiffer", "houlsby", "parallel", "scaled_parallel"])
@pytest.mark.parametrize("block", [Pre, Post])
def test_bottleneck_presets_need_no_example_inputs(preset: str, block: type[nn.Module]) -> None:
    model = quantised(block)
    plain = model(IDS)
    kit = ak.wrap(model)
    kit.add("a", preset)
    kit.train_adapter("a")
    assert torch.equal(model(IDS), plain), "identity at init"
    randomise(kit, "a")
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a")), "adapters train through layers that do not"
    kit.verify(IDS).require()


@pytest.mark.usefixtures("described")
def test_the_output_is_the_base_plus_alpha_over_rank_times_b_a_x(tmp_path: Path) -> None:
    layer = Int8Linear.of(nn.Linear(6, 4))
    model = nn.Sequential(layer)
    kit = ak.wrap(model)
    kit.add("a", ak.LoRAConfig(targets=["0"], rank=2, alpha=6))
    randomise(kit, "a")
    a, b = kit.state_dict("a").values()
    assert (a.shape, b.shape) == ((2, 6), (4, 2))
    x = torch.randn(3, 5, 6)
    base = x @ (layer.weight * layer.scale[:, None]).T + layer.bias
    torch.testing.assert_close(model(x), base)
    kit.activate("a")
    expected = base + 6 / 2 * (x @ a.T @ b.T)
    torch.testing.assert_close(model(x), expected)
    other = ak.wrap(nn.Sequential(Int8Linear(6, 4)))
    other.model.load_state_dict(layer.state_dict(prefix="0."), strict=False)
    other.load(kit.save("a", tmp_path), "b")
    other.activate("b")
    torch.testing.assert_close(other.model(x), expected)


@pytest.mark.usefixtures("described")
def test_an_adapter_is_not_merged_into_quantised_weights() -> None:
    model = quantised()
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["attention.q"])
    kit.activate("a")
    message = (
        r"cannot be merged into 'blocks\.0\.attention\.q': its weight is a buffer of torch\.int8, no Parameter \(quantised"
    )
    with pytest.raises(ak.CompatibilityError, match=message):
        kit.merge("a")


@pytest.mark.usefixtures("described")
def test_dora_is_refused_where_the_weight_has_no_length() -> None:
    kit = ak.wrap(quantised())
    with pytest.raises(
        ak.TargetError, match=r"the weight of 'blocks\.0\.attention\.q' is torch\.int8, quantised.*use LoRA there"
    ):
        kit.add("a", "dora", targets=["attention.q"])
    assert kit.adapters == {}


def test_weights_under_another_name_are_not_merged_into_either() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.zeros(4, 6, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.codes.to(x.dtype).T

    register_host(HostType((Packed,), lambda _: HostShape(4, 6), lambda _: Projection("linear", (4, 6), 0, 1)))
    kit = ak.wrap(nn.Sequential(Packed()))
    kit.add("a", "lora", targets=["0"])
    kit.activate("a")
    with pytest.raises(ak.CompatibilityError, match=r"'0': it has no 'weight' \(it holds 'codes'; quantised, perhaps"):
        kit.merge("a")


@pytest.mark.parametrize(("factor", "axes"), [(3.0, (1, 0)), (1.0, (0, 1))], ids=["does more", "swapped axes"])
def test_merging_tries_a_described_layer_and_refuses_where_it_would_change_what_is_computed(
    factor: float, axes: tuple[int, int]
) -> None:
    class Own(nn.Module):
        """Its weight has the shape (in, out); it is square, so that swapped axes fit as well."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight * factor

    register_host(HostType((Own,), lambda _: HostShape(5, 5), lambda _: Projection("linear", (5, 5), *axes)))
    model, x = nn.Sequential(Own()), torch.randn(3, 5)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["0"])
    for parameter in kit.parameters("a"):
        nn.init.normal_(parameter)
    kit.activate("a")
    expected = model(x)
    with pytest.raises(ak.CompatibilityError, match="Own does more than multiply by its weight"):
        kit.merge("a")
    assert torch.equal(model(x), expected)
    with pytest.raises(ak.TargetError, match=r"does more than multiply by its weight .* use LoRA there"):
        kit.add("b", "dora", targets=["0"])


def test_a_described_layer_that_only_multiplies_is_merged() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    register_host(HostType((Own,), lambda _: HostShape(4, 5), lambda _: Projection("linear", (5, 4), 1, 0)))
    model, x = nn.Sequential(Own()), torch.randn(3, 5)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["0"])
    for parameter in kit.parameters("a"):
        nn.init.normal_(parameter)
    kit.activate("a")
    expected = model(x)
    kit.merge("a")
    torch.testing.assert_close(model(x), expected)


def test_the_weight_of_a_described_layer_may_be_a_buffer() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    register_host(HostType((Fixed,), lambda _: HostShape(5, 4), lambda _: Projection("linear", (5, 4), 0, 1)))
    model, x = nn.Sequential(Fixed()), torch.randn(3, 4)
    kit = ak.wrap(model)
    kit.add("a", "dora", targets=["0"])
    expected = model(x)
    kit.activate("a")
    torch.testing.assert_close(model(x), expected)


def test_a_layer_that_nobody_describes_is_unknown_until_it_is_described() -> None:
    """In one process: what was found before is not remembered after it."""
    kit = ak.wrap(quantised())
    with pytest.raises(ak.TargetError, match=r"\(Int8Linear\) applies no weight that this method can change"):
        kit.sites(ak.LoRAConfig(targets=["attention.q"]))
    with pytest.raises(
        ak.TargetError, match=r"the width of 'blocks\.0\.attention\.q' \(Int8Linear\) cannot be told from its type"
    ):
        kit.sites(ak.BottleneckConfig(targets=["attention.q"]))
    with pytest.raises(ak.TargetError, match="'@attention\\.q'"):
        kit.sites(ak.LoRAConfig(targets=["@attention.q"]))
    register_host(int8.INT8_LINEAR)
    assert len(kit.sites(ak.LoRAConfig(targets=["@attention.q"]))) == 2


@pytest.mark.usefixtures("described")
def test_a_model_of_described_layers_alone_is_run_without_example_inputs() -> None:
    class Ladder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(Int8Linear(8, 9), nn.ReLU(), Int8Linear(9, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    found = ak.wrap(Ladder()).sites(ak.LoRAConfig(targets=["@feedforward.last"]))
    assert [site.path for site in found] == ["blocks.0.2", "blocks.1.2"]


def test_a_class_derived_from_a_described_one_is_described_by_the_nearest() -> None:
    class Mine(nn.Linear):
        pass

    class MineToo(Mine):
        pass

    assert known_shape(MineToo(6, 4)) == HostShape(4, 6)
    register_host(HostType((Mine,), shape=lambda m: HostShape(2 * m.out_features, m.in_features)))
    assert known_shape(MineToo(6, 4)) == HostShape(8, 6)
    assert projection_of(MineToo(6, 4)) == projection_of(nn.Linear(6, 4)), "what is left out is what nn.Linear tells"
    register_host(HostType((MineToo,), projection=lambda _: Projection("linear", (6, 4), 1, 0)))
    assert known_shape(MineToo(6, 4)) == HostShape(8, 6)
    assert projection_of(MineToo(6, 4)) == Projection("linear", (6, 4), 1, 0)


def test_a_container_that_is_never_called_is_refused_and_looked_through() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = Bag()

        def forward(self, x: Tensor) -> Tensor:
            return self.bag.layer(x)

    register_host(HostType((Bag,), is_called=False))
    model = Holder()
    assert not is_called(model.bag)
    with pytest.raises(
        ak.TargetError, match=r"'bag' is an Bag, which is never called as it is; target its children: 'bag\.\*'"
    ):
        resolve_host("bag", modules_by_path(model), at_input=False)
    assert "bag.layer" in str(ak.wrap(model).tree())


def test_channels_of_a_described_convolution_are_found() -> None:
    class Int8Conv(nn.Module):
        pass

    register_host(HostType((Int8Conv,), shape=lambda _: HostShape(6, 3, axis=-3)))
    assert channel_axis(nn.Sequential(Int8Conv(), nn.ReLU()), (2, 6, 5, 5)) == 1
    assert channel_axis(nn.Sequential(Int8Conv(), nn.ReLU()), (2, 5, 5, 6)) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HostType((nn.Linear(2, 2),)), r"classes must be a tuple of nn.Module classes; found \(Linear"),  # type: ignore[arg-type]
        (lambda: HostType(nn.Linear), "classes must be a tuple of nn.Module classes; found <class"),  # type: ignore[arg-type]
        (lambda: HostType(()), r"classes must be a tuple of nn.Module classes; found \(\)"),
        (lambda: HostType((Int8Linear,), products=("linear",)), r"operators with their namespaces.*found \('linear',\)"),
        (lambda: HostType((Int8Linear,), products="a::b"), "operators with their namespaces.*found 'a::b'"),  # type: ignore[arg-type]
        (
            lambda: register_host(HostType((nn.Linear,))),
            "register_host describes torch.nn.modules.linear.Linear, which is described already",
        ),
    ],
)
def test_a_description_that_describes_nothing_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ak.ConfigError, match=message):
        make()


def test_a_function_that_gives_something_else_is_named() -> None:
    class Odd(nn.Module):
        pass

    register_host(HostType((Odd,), shape=lambda _: (4, 6), projection=lambda _: (4, 6)))  # type: ignore[arg-type,return-value]
    with pytest.raises(ak.ConfigError, match=r"HostType of Odd must give a HostShape as its shape; found \(4, 6\)"):
        known_shape(Odd())
    with pytest.raises(ak.ConfigError, match=r"HostType of Odd must give a Projection .*found \(4, 6\)"):
        projection_of(Odd())


# --- by entry point ---------------------------------------------------------------------------------------------------

USE = """
import torch
import adapterkit as ak
from adapterkit_int8 import Int8Linear
from tests.hosts.blocks import Model, Pre
from torch import nn

model = Model(Pre).eval()
for block in model.blocks:
    for name in "qkvo":
        setattr(block.attention, name, Int8Linear.of(getattr(block.attention, name)))
kit = ak.wrap(model)
kit.add("a", "lora", targets=["@attention.q"])
kit.add("b", "pfeiffer", targets=["@attention.out"])
kit.activate("a")
kit.verify().require()
print(*(site.path for site in kit.sites("lora", targets=["@attention.v"])))
"""


def install(directory: Path, entry_points: str) -> None:
    """What pip leaves of a package's metadata."""
    info = directory / "some_hosts-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-hosts\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[adapterkit.hosts]\n{entry_points}\n")


def test_the_example_package_works_without_a_change_here(tmp_path: Path) -> None:
    (entry,) = re.findall(r'^int8 = "(.+)"$', (EXAMPLE / "pyproject.toml").read_text(), re.MULTILINE)
    install(tmp_path, f"int8 = {entry}")
    root = Path(__file__).parents[2]
    where = ":".join(map(str, [tmp_path, EXAMPLE, root, root / "src"]))
    command = [sys.executable, "-W", "error", "-c", USE]
    done = subprocess.run(command, env={"PYTHONPATH": where}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["blocks.0.attention.v", "blocks.1.attention.v"]


BRINGS = """
from torch import nn
from adapterkit.placement.hosts import HostShape, HostType

class One(nn.Module): pass
class Two(nn.Module): pass

ONE = HostType((One,), shape=lambda _: HostShape(1))
TWO = HostType((Two,), shape=lambda _: HostShape(2))
BOTH = [ONE, TWO]
def make(): return (ONE, TWO)
def fail(): raise OSError("no kernel")
LINEAR = HostType((nn.Linear,))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "some_hosts.py").write_text(BRINGS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_hosts", raising=False)
    return tmp_path


@pytest.mark.parametrize("entry", ["x = some_hosts:BOTH", "x = some_hosts:make", "x = some_hosts:ONE\ny = some_hosts:TWO"])
def test_an_entry_point_leads_to_one_to_several_or_to_a_function_that_makes_them(package: Path, entry: str) -> None:
    install(package, entry)
    import some_hosts  # type: ignore[import-not-found]

    assert [known_shape(kind()) for kind in (some_hosts.One, some_hosts.Two)] == [HostShape(1), HostShape(2)]
    assert {some_hosts.ONE, some_hosts.TWO} <= {*all_hosts()}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "x = no_such_module:X",
            "the entry point 'no_such_module:X' in 'adapterkit.hosts' of the package 'some-hosts' cannot be loaded",
        ),
        ("x = some_hosts:One", "the entry point 'some_hosts:One' .* gives no HostType: TypeError"),
        ("x = json:__name__", r"must lead to a HostType, or to several; found \['j', 's', 'o', 'n'\]"),
        ("x = some_hosts:fail", r"gives no HostType: OSError\('no kernel'\)"),
        ("x = some_hosts:LINEAR", "describes torch.nn.modules.linear.Linear, which is described already"),
    ],
)
def test_a_package_with_a_bad_entry_point_is_named_and_in_the_way_of_nothing_else(
    package: Path, entry: str, message: str
) -> None:
    install(package, f"{entry}\ny = some_hosts:TWO")
    with pytest.raises(ak.ConfigError, match=message):
        all_hosts()
    import some_hosts

    assert known_shape(some_hosts.Two()) == HostShape(2), "the good one counts"
    ak.wrap(Model(Pre)).add("a", "pfeiffer")  # torch's own layers need no package
    with pytest.raises(ak.TargetError, match=rf"Layers of other packages may be unknown: .*{message}"):
        ak.wrap(nn.Sequential(some_hosts.One())).sites(ak.LoRAConfig(targets=["0"]))
    with pytest.raises(ak.ConfigError, match=message):  # its operators may be products, and roles are found by those
        ak.wrap(quantised()).sites(ak.LoRAConfig(targets=["@attention.q"]))


def test_no_package_is_loaded_for_torchs_own_layers(package: Path) -> None:
    (package / "some_hosts.py").write_text("raise SystemExit('loaded')")
    install(package, "x = some_hosts:X")
    ak.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU())).add("a", "lora", targets=["0"])
    with pytest.raises(SystemExit, match="loaded"):
        all_hosts()
