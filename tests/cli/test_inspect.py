import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import BertConfig

from adapterkit.cli import main
from adapterkit.cli import models as loading

from ..hosts.blocks import Model, Pre

HOST = "tests.hosts.blocks:EncoderDecoder"


@pytest.fixture
def bert(tmp_path: Path) -> str:
    """A folder with the config of a tiny BERT, and no weights."""
    config = BertConfig(num_hidden_layers=3, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for timm, which is not installed here: one model."""
    module = ModuleType("timm")

    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        if name != "pre_tiny":
            raise RuntimeError(f"Unknown model ({name})")
        assert not pretrained
        return Model(Pre)

    module.create_model = create_model  # type: ignore[attr-defined]  # a module made up
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says on stderr when it cannot use its input."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


# --- where models come from -------------------------------------------------------------------------------------------


def test_a_hugging_face_folder_is_built_from_its_config_without_weights(
    bert: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", bert]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("BertForMaskedLM")
    assert "encoder.layer.0-2" in out
    assert "@attention.out" in out
    assert all(p.is_meta for p in loading.load_model(bert).parameters())


def test_a_config_that_names_no_class_is_built_as_its_types_base(tmp_path: Path) -> None:
    BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=20).save_pretrained(tmp_path)
    assert type(loading.load_model(str(tmp_path))).__name__ == "BertModel"


@pytest.mark.parametrize("architectures", [None, ["BertForMaskedLM"]])
def test_the_dtype_of_the_checkpoint_is_that_of_the_tree(architectures: list[str] | None, tmp_path: Path) -> None:
    config = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=20, dtype="bfloat16")
    config.architectures = architectures
    config.save_pretrained(tmp_path)
    assert {p.dtype for p in loading.load_model(str(tmp_path)).parameters()} == {torch.bfloat16}


def test_a_callable_is_imported_and_called(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", HOST]) == 0
    assert "@crossattention.out" in capsys.readouterr().out


def test_a_module_object_in_the_current_directory_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_models.py").write_text("from torch import nn\nclass Zoo:\n    net = nn.Linear(3, 5)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["inspect", "my_models:Zoo.net"]) == 0
    assert "Linear" in capsys.readouterr().out


def test_timm_models_are_built_without_weights(timm: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "timm:pre_tiny"]) == 0
    assert "blocks.0-1" in capsys.readouterr().out
    assert all(p.is_meta for p in loading.load_model("timm:pre_tiny").parameters())


class Reads(nn.Module):
    """Needs numbers to decide what to do: it does not run on `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y if y.sum().item() > 0 else -y


class CpuOnly(nn.Linear):
    """Cannot be built on `meta`."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.bias.data.sum().item()


def test_what_cannot_be_traced_or_built_without_weights_is_built_with_them(
    timm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (Reads, CpuOnly):
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained, kind=kind: kind())
        assert not any(p.is_meta for p in loading.load_model("timm:any").parameters())


def test_what_is_too_large_to_be_built_is_shown_without_roles(
    timm: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: Reads())
    monkeypatch.setattr(loading, "_LARGE", 10)
    assert main(["inspect", "timm:any"]) == 0
    out = capsys.readouterr().out
    assert "linear" in out
    assert out.splitlines()[-1].startswith("roles unknown: Reads does not run on any inputs made for it")


# --- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("no/such-model", "'no/such-model' is not a model that transformers can find: OSError"),
        ("./nothing/here", "'./nothing/here' is not a model that transformers can find"),
        ("tests.nothing:x", "'tests.nothing:x' cannot be imported: ModuleNotFoundError: No module named 'tests.nothing'"),
        ("tests.hosts.blocks:Nothing", "cannot be imported: AttributeError: .* has no attribute 'Nothing'"),
        ("tests.hosts.blocks:WIDTH", "must be an nn.Module, or return one when called; found int"),
        ("builtins:dict", "must be an nn.Module, or return one when called; found dict"),
        ("tests.hosts.blocks:Model", "cannot be built: TypeError: .* missing 1 required positional argument: 'block'"),
        (":x", "':x' cannot be imported: ValueError"),
        ("timm:nothing", "'timm:nothing' cannot be built: RuntimeError: Unknown model"),
    ],
)
@pytest.mark.usefixtures("timm")
def test_a_model_that_cannot_be_had_is_an_error_that_says_why(
    model: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert re.search(said, complaint(capsys, "inspect", model))


def test_a_folder_with_code_of_its_own_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.MyConfig", "AutoModel": "code.MyModel"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    assert "trust_remote_code" in complaint(capsys, "inspect", str(tmp_path))


@pytest.mark.parametrize(
    ("missing", "model", "said"),
    [
        (
            "rich",
            HOST,
            "adapterkit inspect: the command line needs the package 'rich', .*: pip install \"adapterkit\\[cli\\]\"",
        ),
        (
            "transformers",
            "bert-base-uncased",
            "'bert-base-uncased' needs the package 'transformers', .*: pip install transformers",
        ),
        ("timm", "timm:vit", "'timm:vit' needs the package 'timm', .*: pip install timm"),
    ],
)
def test_a_missing_package_is_named(
    missing: str, model: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert re.search(said, complaint(capsys, "inspect", model))


def test_json_needs_no_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["inspect", HOST, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tree"]["label"] == "EncoderDecoder"
    assert found["tree"]["children"][1]["count"] == 2
    assert (found["adapters"], found["note"]) == ([], None)


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["dance"], ["inspect", HOST, "--depth", "-1"], ["inspect", HOST, "--depth", "x"]]
)
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: adapterkit" in capsys.readouterr().err


# --- options ----------------------------------------------------------------------------------------------------------


def test_an_adapter_is_shown_where_it_would_sit(bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", bert, "--adapter", "pfeiffer"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert ["LayerNorm" in row and "@block.out" in row for row in rows if "○ pfeiffer (input)" in row] == [True]
    assert rows[-1].startswith("○ pfeiffer: bottleneck at 3 sites")
    config = tmp_path / "mine.json"
    config.write_text(json.dumps({"method": "bottleneck", "targets": ["@attention.out"], "bottleneck_size": 2}))
    assert main(["inspect", bert, "--adapter", str(config)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("○ mine: bottleneck at 3 sites")


def test_an_adapter_that_does_not_fit_is_an_error(bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'pfeiffer'" in complaint(capsys, "inspect", bert, "--adapter", "pfeifer")


def test_depth_limits_the_tree(bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", bert, "--depth", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


# --- on the screen ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stdout that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *arguments: str, **environment: str) -> str:
    """What a command writes to a terminal with colours."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        screen = Terminal()
        patch.setattr(sys, "stdout", screen)
        assert main(arguments) == 0
    return screen.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_colours_and_lines_that_fit(width: int, bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_a_terminal(monkeypatch, "inspect", bert, "--adapter", "pfeiffer", COLUMNS=str(width))
    assert "\x1b[36m@attention.q\x1b[0m" in text
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= width
    assert "○ pfeiffer (input)" in plain


def test_no_color_means_no_escape_codes(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_a_terminal(monkeypatch, "inspect", bert, NO_COLOR="1")
    assert "\x1b" not in text
    assert "@attention.q" in text


def in_new_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.run(  # noqa: PLW1510 (the exit code is what is tested)
        [sys.executable, "-m", "adapterkit", *arguments], cwd=root, capture_output=True, env=os.environ | environment
    )


def test_a_pipe_gets_plain_text_of_full_width() -> None:
    done = in_new_process("inspect", HOST, COLUMNS="40")
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout
    assert "@feedforward.out, like encoder.0.mlp" in done.stdout.decode()
    assert done.stderr == b""


def test_an_encoding_without_the_lines_of_a_tree_is_no_error() -> None:
    done = in_new_process("inspect", HOST, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"@feedforward.out" in done.stdout
