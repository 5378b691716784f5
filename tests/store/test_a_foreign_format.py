"""The drill of decision 0015: a reader of another format is one new file and one line, and reads what that library wrote."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import adapterkit as ak

from ..drill import copy_of_package

READER = '''
"""Reads a folder of LoRA weights as PEFT lays them out."""

import json
import re
from pathlib import Path

from ..errors import StoreError
from ..methods.lora import LoRAConfig
from .files import read_inside
from .saved_adapter import SavedAdapter
from .tensors import parse_tensors

_OURS = re.compile(r"sites/(.+)/(lora_[AB])")


class PeftFolder:
    format = "PEFT"
    sign = "adapter_config.json"

    def reads(self, directory: Path) -> bool:
        return (directory / self.sign).exists()

    def read(self, directory: Path) -> SavedAdapter:
        settings = json.loads(read_inside(directory, self.sign, 2**20, what="a config"))
        if settings["peft_type"] != "LORA":
            raise StoreError(f"{str(directory)!r} holds {settings['peft_type']!r}; only 'LORA' is read")
        config = LoRAConfig(targets=settings["target_modules"], rank=settings["r"], alpha=settings["lora_alpha"])
        tensors = parse_tensors(read_inside(directory, "adapter_model.safetensors", 2**30, what="this file"), directory)
        return SavedAdapter(directory.name, config, directory, tensors, key_in_file=_theirs)


def _theirs(key: str) -> str:
    return _OURS.sub(r"base_model.model.\\1.\\2.weight", key)
'''
LINE = "READERS: tuple[Reader, ...] = (OwnFormat(),)"
USE = """
import sys, pathlib, torch, adapterkit as ak
from safetensors.torch import load_file
torch.manual_seed(0)
model = torch.nn.Sequential()
model.add_module("q", torch.nn.Linear(6, 8))
model.add_module("v", torch.nn.Linear(8, 4))
model.load_state_dict(load_file(sys.argv[2]))
kit = ak.wrap(model)
kit.activate(kit.load(sys.argv[1]))
assert "site-packages" not in ak.__file__ and str(pathlib.Path.cwd()) in ak.__file__, ak.__file__
print(kit.adapters["theirs"].method, torch.save(model(torch.load(sys.argv[3])), sys.argv[4]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder written by hand: what PEFT would write for the Linear "q" of `host`."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(3)
    start = "base_model.model.q"
    tensors = {f"{start}.lora_A.weight": torch.randn(2, 6), f"{start}.lora_B.weight": torch.randn(8, 2)}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the package with the reader: one new file, and one line changed in one that was there."""
    there = copy_of_package(tmp_path / "src")
    (there / "store" / "peft_folder.py").write_text(READER)
    readers = there / "store" / "readers.py"
    text = readers.read_text()
    assert text.count(LINE) == 1
    text = text.replace(LINE, "READERS: tuple[Reader, ...] = (OwnFormat(), PeftFolder())")
    readers.write_text(text.replace("from .own_format", "from .peft_folder import PeftFolder\nfrom .own_format"))
    return there.parent


def host() -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential()
    model.add_module("q", nn.Linear(6, 8))
    model.add_module("v", nn.Linear(8, 4))
    return model


def loaded(source: Path, folder: Path, tmp_path: Path, x: Tensor) -> subprocess.CompletedProcess[str]:
    """Load a folder into the host, with the package that lies in `source`, in a new process."""
    safetensors.torch.save_file(host().state_dict(), tmp_path / "base.safetensors")
    torch.save(x, tmp_path / "x.pt")
    arguments = [folder, tmp_path / "base.safetensors", tmp_path / "x.pt", tmp_path / "y.pt"]
    command = [sys.executable, "-W", "error", "-c", USE, *map(str, arguments)]
    return subprocess.run(command, env={"PYTHONPATH": str(source)}, cwd=source, capture_output=True, text=True, check=False)


def test_a_reader_of_another_format_is_one_file_and_one_line(folder: Path, extended: Path, tmp_path: Path) -> None:
    x, model = torch.randn(3, 6), host()
    done = loaded(extended, folder, tmp_path, x)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lora")
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    a, b = tensors["base_model.model.q.lora_A.weight"], tensors["base_model.model.q.lora_B.weight"]
    q, v = model.get_submodule("q"), model.get_submodule("v")
    weight = q.weight + (6 / 2) * b @ a  # W + (alpha / r) B A
    expected = v(nn.functional.linear(x, weight, q.bias))
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.popitem(), "StoreError: .*'base_model.model.q.lora_[AB].weight' is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "StoreError: .*'extra' is unknown to its config"),
        (
            lambda tensors: tensors.update({"base_model.model.q.lora_A.weight": torch.zeros(3, 6)}),
            r"StoreError: .*'base_model.model.q.lora_A.weight' is \(3, 6\), its config says \(2, 6\)",
        ),
    ],
)
def test_its_tensors_must_be_those_that_its_config_asks_for(
    change: object, message: str, folder: Path, extended: Path, tmp_path: Path
) -> None:
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    change(tensors)  # type: ignore[operator]  # a function
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    done = loaded(extended, folder, tmp_path, torch.randn(3, 6))
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr


def test_a_config_that_leads_nowhere_in_this_model_is_said(folder: Path, extended: Path, tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    done = loaded(extended, folder, tmp_path, torch.randn(3, 6))
    assert "CompatibilityError" in done.stderr
    assert "does not fit this Sequential" in done.stderr


def test_without_the_reader_both_what_is_there_and_what_is_known_is_said(folder: Path) -> None:
    with pytest.raises(ak.StoreError, match=r"has no adapter\.json .* Found: 'adapter_config\.json', 'adapter_model"):
        ak.wrap(host()).load(folder)
