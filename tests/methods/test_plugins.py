"""A method from another package, found by its entry point: nothing of adapterkit is edited for it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from adapterkit.methods import METHODS, UNION_PRESETS

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
    assert "'method' must be one of" in done.stderr
    assert "found 'ssf'" in done.stderr


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
