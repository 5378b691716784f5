"""A method from another package, found by its entry point: nothing of adapterkit is edited for it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.methods import METHODS, UNION_PRESETS, all_methods, preset_names, register, registry

EXAMPLE = Path(__file__).parents[2] / "examples" / "adapterkit_ssf"

# What a user would do with it, in a process where the package is installed.
USE = """
import sys, torch
import adapterkit as ak
from tests.hosts.tiny import PreNormBlock, Tiny, randomise

torch.manual_seed(0)
ids = torch.randint(0, 11, (3, 5))
model, fresh = Tiny(PreNormBlock).eval(), Tiny(PreNormBlock).eval()
fresh.load_state_dict(model.state_dict())
base = model(ids)
kit = ak.wrap(model, ids)
kit.add("a", "ssf")
assert [site.path for site in kit.sites("ssf")] == [site for i in "01" for site in
    (f"blocks.{i}.attention.out", f"blocks.{i}.mlp.2")], kit.sites("ssf")
kit.activate("a")
assert torch.equal(model(ids), base)
randomise(kit, "a")
adapted = model(ids)
assert not torch.allclose(adapted, base)
kit.verify(ids).require()
before = [p.clone() for p in kit.model.parameters()]
kit.merge("a")
assert torch.allclose(model(ids), adapted, atol=1e-5)
kit.unmerge("a")
assert all(torch.equal(p, old) for p, old in zip(kit.model.parameters(), before))
kit.save("a", sys.argv[1])
other = ak.wrap(fresh)
other.load(sys.argv[1], "b")
other.activate("b")
assert torch.equal(fresh(ids), adapted)
print(kit.summary())
"""


def install(directory: Path, entry_points: str) -> None:
    """What pip leaves of a package's metadata."""
    info = directory / "a_method-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-method\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[adapterkit.methods]\n{entry_points}\n")


def run(code: str, *arguments: str, path: list[Path]) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parents[2]
    where = ":".join(map(str, [*path, here, here / "src"]))
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, env={"PYTHONPATH": where}, capture_output=True, text=True, check=False)


def test_the_example_package_works_like_a_method_of_ours(tmp_path: Path) -> None:
    (entry,) = re.findall(r'^ssf = "(.+)"$', (EXAMPLE / "pyproject.toml").read_text(), re.MULTILINE)
    install(tmp_path, f"ssf = {entry}")
    done = run(USE, str(tmp_path / "saved"), path=[tmp_path, EXAMPLE])
    assert done.returncode == 0, done.stderr
    assert "ssf" in done.stdout


def test_a_file_of_a_method_that_is_not_installed_names_what_is_missing(tmp_path: Path) -> None:
    install(tmp_path, "ssf = adapterkit_ssf:ScaleAndShift")
    assert run(USE, str(tmp_path / "saved"), path=[tmp_path, EXAMPLE]).returncode == 0
    code = "import sys, adapterkit as ak; from tests.hosts.tiny import *; ak.wrap(Tiny(PreNormBlock)).load(sys.argv[1])"
    done = run(code, str(tmp_path / "saved"), path=[])
    assert "StoreError" in done.stderr
    missing = "cannot be loaded: the method 'ssf' is not here: install the package that brings it, or register it with"
    assert missing in done.stderr
    assert "adapterkit.methods.register" in done.stderr


# A cell of a notebook. Run again with another FACTOR, it is another class of the same name.
CELL = """
import torch
from typing import Literal
from torch import nn
from adapterkit.methods import AdapterConfig, Placement, Targets, register

class ShiftConfig(AdapterConfig):
    method: Literal["shift"] = "shift"
    targets: Targets = ("out",)

class Shift(nn.Module):
    def __init__(self, width, dtype):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width, dtype=dtype))

    @property
    def compute_dtype(self):
        return self.shift.dtype

    def forward(self, z, x):
        return FACTOR * self.shift.expand(x.shape)

@register
class ShiftMethod:
    name, config_type, presets = "shift", ShiftConfig, {"shift": {}, "shift_all": {"targets": ("**",)}}

    def placements(self, config):
        return (Placement(level="projection"),)

    def build(self, config, site, *, host, dtype):
        return Shift(site.width, dtype)
"""


@pytest.fixture
def registered() -> Iterator[dict[str, Any]]:
    """What `register` was given so far; afterwards as before."""
    before = dict(registry._registered)
    yield registry._registered
    registry._registered.clear()
    registry._registered.update(before)


def run_cell(factor: float) -> dict[str, Any]:
    names: dict[str, Any] = {"FACTOR": factor, "__name__": "__main__"}
    exec(CELL, names)  # noqa: S102
    return names


def shifted(factor: float, tmp_path: Path) -> Tensor:
    """What a linear layer of zeros returns with a shift of one, before and after a file."""
    layer, fresh = nn.Linear(2, 2), nn.Linear(2, 2)
    for module in (layer, fresh):
        module.load_state_dict({name: torch.zeros_like(p) for name, p in module.state_dict().items()})
    kit, other = ak.wrap(layer), ak.wrap(fresh)
    kit.add("a", "shift", targets=[""])
    with torch.no_grad():
        next(kit.parameters("a")).fill_(1.0)
    kit.activate("a")
    kit.save("a", tmp_path)
    other.activate(other.load(tmp_path))
    assert torch.equal(layer(torch.ones(1, 2)), fresh(torch.ones(1, 2)))
    return layer(torch.ones(1, 2))


def test_a_registered_method_works_and_a_cell_that_runs_again_replaces_it(
    registered: dict[str, Any], tmp_path: Path
) -> None:
    names = run_cell(2.0)
    assert isinstance(names["ShiftMethod"], type), "register is a decorator, too"
    assert "shift_all" in preset_names()[0]
    assert torch.equal(shifted(2.0, tmp_path / "a"), torch.full((1, 2), 2.0))
    run_cell(3.0)
    assert torch.equal(shifted(3.0, tmp_path / "b"), torch.full((1, 2), 3.0))
    assert list(registered) == ["shift"]


def test_an_object_can_be_registered_as_well(registered: dict[str, Any]) -> None:
    kind = run_cell(2.0)["ShiftMethod"]
    made = kind()
    assert register(made) is made
    assert all_methods()["shift"] is made


def test_a_file_of_a_method_that_is_registered_no_more_names_it(registered: dict[str, Any], tmp_path: Path) -> None:
    run_cell(2.0)
    shifted(2.0, tmp_path / "a")
    union = ak.wrap(nn.Linear(2, 2))
    union.add("u", ak.Union(ak.LoRAConfig(targets=[""]), registry.method_named("shift").config_type(targets=[""])))
    union.save("u", tmp_path / "u")
    registered.clear()
    for name in "au":
        kit = ak.wrap(nn.Linear(2, 2))
        with pytest.raises(ak.StoreError, match="cannot be loaded: the method 'shift' is not here: install the package"):
            kit.load(tmp_path / name)
        assert not kit.adapters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lora"}, "__main__.ShiftMethod brings a method 'lora', which exists"),
        ({"name": "union"}, "__main__.ShiftMethod brings a method 'union', which exists"),
        ({"presets": {"madx": {}}}, "brings a preset 'madx', which exists"),
        ({"presets": {"dora": {}}}, "brings a preset 'dora', which exists"),
        ({"presets": 3}, "cannot be loaded: TypeError"),
        ({"__qualname__": "Other"}, "__main__.Other brings a method 'shift', which __main__.ShiftMethod has registered"),
    ],
)
def test_a_method_whose_names_are_taken_is_not_registered(
    registered: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    kind = run_cell(2.0)["ShiftMethod"]
    other = type("ShiftMethod", (), {**vars(kind), "__qualname__": "ShiftMethod", **changes})
    with pytest.raises(ak.ConfigError, match=message):
        register(other)
    assert [type(method) for method in registered.values()] == [kind]


def test_what_is_no_method_is_not_registered(registered: dict[str, Any]) -> None:
    lacks = r"leads to no method: it has no \['name', 'config_type', 'presets', 'placements', 'build'\]"
    with pytest.raises(ak.ConfigError, match=lacks):
        register(nn.Identity)
    assert not registered


def test_the_method_of_an_installed_package_is_not_registered_over(tmp_path: Path) -> None:
    (entry,) = re.findall(r'^ssf = "(.+)"$', (EXAMPLE / "pyproject.toml").read_text(), re.MULTILINE)
    install(tmp_path, f"ssf = {entry}")
    code = """
import adapterkit as ak
from adapterkit.methods import register
from adapterkit_ssf import ScaleAndShift
try:
    register(ScaleAndShift)
except ak.ConfigError as error:
    print(error)
"""
    done = run(code, path=[tmp_path, EXAMPLE])
    assert "adapterkit_ssf.ScaleAndShift brings a method 'ssf', which exists" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "x = no_such_module:X",
            "the entry point 'no_such_module:X' in 'adapterkit.methods' of the package 'a-method' cannot be loaded",
        ),
        ("x = json:loads", r"leads to no method: it has no \['name', 'config_type', 'presets', 'placements', 'build'\]"),
        ("x = adapterkit.methods.lora:LoRA", "brings a method 'lora', which exists"),
    ],
)
def test_a_package_with_a_bad_entry_point_is_named(tmp_path: Path, entry: str, message: str) -> None:
    install(tmp_path, entry)
    done = run("from adapterkit.methods import all_methods; all_methods()", path=[tmp_path])
    assert "ConfigError" in done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_packages_with_bad_entry_points_are_in_the_way_of_nothing_else(tmp_path: Path) -> None:
    (found,) = re.findall(r'^ssf = "(.+)"$', (EXAMPLE / "pyproject.toml").read_text(), re.MULTILINE)
    bad = "x = no_such_module:X\ny = json:loads\nz = adapterkit.methods.lora:LoRA"
    install(tmp_path, f"{bad}\nssf = {found}")
    code = """
import adapterkit as ak
from torch import nn
kit = ak.wrap(nn.Linear(4, 4))
for number, config in enumerate(["lora", ak.BitFitConfig(targets=[""]), {"method": "vera"}, {"method": "ssf"}, "ssf"]):
    kit.add(str(number), config, targets=[""])
for config in ["sff", {"method": "sff"}, {"method": ["sff"]}]:
    try:
        kit.sites(config)
    except ak.ConfigError as error:
        assert "sff" in str(error)
        assert "'no_such_module:X' in 'adapterkit.methods' of the package 'a-method' cannot be loaded" in str(error), error
    else:
        raise AssertionError(config)
"""
    done = run(code, path=[tmp_path, EXAMPLE])
    assert done.returncode == 0, done.stderr


def test_no_package_is_loaded_for_what_is_here(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("raise SystemExit('loaded')")
    install(tmp_path, "x = loud:X")
    code = "import adapterkit as ak; from torch import nn; ak.wrap(nn.Linear(4, 4)).add('a', 'lora', targets=[''])"
    done = run(code, path=[tmp_path])
    assert done.returncode == 0, done.stderr
    assert "loaded" in run("from adapterkit.methods import all_methods; all_methods()", path=[tmp_path]).stderr


def test_each_name_is_one_methods_or_presets() -> None:
    assert len({method.name for method in METHODS}) == len(METHODS)
    names = [name for method in METHODS for name in method.presets] + [*UNION_PRESETS]
    assert len(set(names)) == len(names)


def test_a_method_whose_configs_name_another_one_is_refused() -> None:
    class Copied(type(METHODS[0])):  # type: ignore[misc]  # as copied and renamed by half
        name = "copied"
        presets: ClassVar[dict[str, Any]] = {"copied": {}}

    with pytest.raises(ak.ConfigError, match=r"brings the method 'copied', whose configs \(\w+\) say method='bitfit'"):
        register(Copied)
