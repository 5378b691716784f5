"""Saved is what runs; damaged, hostile or foreign files are refused before the model is touched."""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.store import files
from adapterkit.store.identity import structure_of
from adapterkit.store.manifest import parse_manifest
from adapterkit.store.own_format import read_manifest

from ..helpers import trace_of
from ..hosts.tiny import PostNormBlock, Tiny, randomise
from ..strategies import adapter_names, configs
from .helpers import CONFIG, fresh


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved adapter with a head."""
    kit = ak.wrap(fresh())
    kit.add("a", CONFIG, heads=["classifier"])
    randomise(kit, "a")
    return kit.save("a", tmp_path / "adapter")


@given(configs, adapter_names)
def test_what_is_saved_is_what_runs(
    tmp_path_factory: pytest.TempPathFactory, config: ak.BottleneckConfig, name: str
) -> None:
    ids = torch.randint(0, 11, (3, 5))
    kit = ak.wrap(fresh().eval(), ids)
    kit.add(name, config, heads=["classifier"])
    randomise(kit, name)
    kit.activate(name)
    expected = kit.model(ids)
    folder = kit.save(name, tmp_path_factory.mktemp("adapter"))
    other = ak.wrap(fresh().eval())
    assert other.load(folder) == name
    assert torch.equal(other.model(ids), fresh()(ids)), "loaded, not active"
    other.activate(name)
    assert torch.equal(other.model(ids), expected)
    assert other.adapters == kit.adapters
    assert all(
        torch.equal(a, b) for a, b in zip(kit.state_dict(name).values(), other.state_dict(name).values(), strict=True)
    )
    again = other.save(name, tmp_path_factory.mktemp("again"))
    for file in ("adapter.safetensors", "adapter.json"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_an_adapter_loads_in_a_new_process_with_equal_outputs(saved: Path, tmp_path: Path, ids: Tensor) -> None:
    kit = ak.wrap(fresh())
    kit.activate(kit.load(saved))
    torch.save((ids, kit.model(ids)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, adapterkit as ak\n"
        "from tests.store.helpers import fresh\n"
        "ids, expected = torch.load(sys.argv[2])\n"
        "kit = ak.wrap(fresh()); kit.activate(kit.load(sys.argv[1]))\n"
        "assert torch.equal(kit.model(ids), expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, saved, tmp_path / "expected.pt"], check=True, cwd=Path(__file__).parents[2])


def test_an_adapter_may_take_another_name_and_leave_its_heads(saved: Path, ids: Tensor) -> None:
    kit = ak.wrap(fresh())
    assert kit.load(saved, "b", heads=False) == "b"
    assert kit.load(saved) == "a"
    rows = {row.name: row.head_parameters for row in kit.summary().adapters}
    assert rows == {"a": 27, "b": 0}
    with pytest.raises(ak.AdapterNameError, match="already has an adapter 'a'"):
        kit.load(saved)


def test_heads_may_be_left_out_of_the_file(tmp_path: Path) -> None:
    kit = ak.wrap(fresh())
    kit.add("a", CONFIG, heads=["classifier"])
    folder = kit.save("a", tmp_path, heads=False)
    assert read_manifest(folder).heads == ()
    other = ak.wrap(fresh())
    other.load(folder)
    assert other.summary().adapters[0].head_parameters == 0


def test_metadata_travel_with_the_adapter(tmp_path: Path) -> None:
    kit = ak.wrap(fresh())
    kit.add("a", CONFIG)
    metric = {"name": "accuracy", "value": 81.0, "dataset": "rt", "split": "test", "provenance": "bench"}
    meta = ak.Metadata(task="sentiment", language="en", license="Apache-2.0", metrics=[metric], base_id="org/tiny")
    manifest = read_manifest(kit.save("a", tmp_path, metadata=meta))
    assert manifest.metadata == meta
    assert manifest.base.hub_id == "org/tiny"
    card = (tmp_path / "README.md").read_text()
    assert "| task | sentiment |" in card
    assert "| accuracy | 81.0 (rt) |" in card
    with pytest.raises(ak.StoreError, match="taks: Extra inputs"):
        kit.save("a", tmp_path, metadata={"taks": "sentiment"})


def test_files_of_the_user_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    kit = ak.wrap(fresh())
    kit.add("a", CONFIG)
    kit.save("a", tmp_path)
    kit.save("a", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter.json",
        "adapter.safetensors",
        "notes.txt",
    ]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_dtypes_are_restored_and_devices_follow_the_host(tmp_path: Path) -> None:
    kit = ak.wrap(fresh().to(torch.bfloat16))
    kit.add("a", CONFIG, heads=["classifier"], dtype="float16")
    kit.save("a", tmp_path)
    other = ak.wrap(fresh().to(torch.bfloat16))
    other.load(tmp_path)
    assert {p.dtype for p in other.parameters("a", heads=False)} == {torch.float16}
    other.activate("a")
    assert other.model(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.bfloat16


# --- the wrong base ---------------------------------------------------------------------------------------------------


class Wider(PostNormBlock):
    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.up, self.down = nn.Linear(hidden, 24), nn.Linear(24, hidden)


def shallower() -> nn.Module:
    model = Tiny(PostNormBlock)
    del model.blocks[1]
    return model


def other_type() -> nn.Module:
    model = Tiny(PostNormBlock)
    model.blocks[0].down = nn.Bilinear(16, 16, 8)
    return model


def more_labels() -> nn.Module:
    model = Tiny(PostNormBlock)
    model.classifier = nn.Linear(8, 5)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (shallower, r"2 of its sites and heads differ: 'blocks.1.attention.out' \(Linear\) does not exist"),
        (
            lambda: Tiny(Wider),
            r"2 of.*'blocks.0.down' has .* shape \(saved: Linear of 8 features, .* weight \(8, 24\), bias",
        ),
        (
            lambda: Tiny(PostNormBlock, hidden=4),
            r"5 of its sites and heads differ: .* \(saved: Linear of 8 features, here: Linear of 4 features\)",
        ),
        (other_type, r"'blocks.0.down' has another type or shape \(saved: Linear of 8 features, here: Bilinear of 8 "),
        (
            more_labels,
            r"1 of.*'classifier' has another .* \(saved: Linear, here: Linear, with the parameters weight \(5, 8\), ",
        ),
        (lambda: nn.Linear(2, 2), "5 of its sites"),
    ],
)
def test_another_structure_is_refused_and_says_which_sites_differ(saved: Path, make: Any, message: str) -> None:
    model = make()
    before = trace_of(model)
    for any_base in (False, True):
        with pytest.raises(ak.CompatibilityError, match=message):
            ak.wrap(model).load(saved, any_base=any_base)
    assert trace_of(model) == before


class Around(nn.Module):
    """A larger model that holds the base as `inner`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = fresh(), nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(ids))  # type: ignore[no-any-return]  # a tensor


def test_an_adapter_that_fits_a_submodule_says_which(saved: Path, ids: Tensor) -> None:
    whole = Around()
    with pytest.raises(ak.CompatibilityError, match=r"It fits the submodule 'inner' .* ak\.wrap\(model\.inner\)"):
        ak.wrap(whole).load(saved)
    kit = ak.wrap(whole.inner)
    kit.activate(kit.load(saved))
    expected = ak.wrap(fresh())
    expected.activate(expected.load(saved))
    assert torch.equal(whole.inner(ids), expected.model(ids))


def test_an_adapter_of_a_larger_model_says_where_it_fits(tmp_path: Path) -> None:
    kit = ak.wrap(Around())
    kit.add("a", CONFIG)
    with pytest.raises(ak.CompatibilityError, match=r"holds this one as 'inner': load .*ak\.wrap\(whole\.inner\)\.save"):
        ak.wrap(fresh()).load(kit.save("a", tmp_path / "whole"))
    assert ak.wrap(fresh()).load(ak.wrap(kit.model.inner).save("a", tmp_path / "part")) == "a"


def test_a_folder_of_no_known_format_says_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(ak.StoreError, match=r"has no adapter\.json \(the format of adapterkit\)\. Found: nothing"):
        ak.wrap(fresh()).load(tmp_path)
    for name in ("model.bin", "a.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ak.StoreError, match=r"Found: 'a\.txt', 'model\.bin'"):
        ak.wrap(fresh()).load(tmp_path)


def test_a_base_with_other_weights_loads_with_a_warning_that_names_it_or_when_told_to(saved: Path) -> None:
    with pytest.warns(ak.BaseMismatchWarning, match=r"'a' was trained on 'tests.hosts.tiny.Tiny' with other weights"):
        ak.wrap(Tiny(PostNormBlock)).load(saved)
    ak.wrap(Tiny(PostNormBlock)).load(saved, any_base=True)
    ak.wrap(fresh()).load(saved)


def test_a_base_with_another_head_is_no_obstacle_without_heads(saved: Path) -> None:
    ak.wrap(more_labels()).load(saved, heads=False, any_base=True)


# --- damage and malice ------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "adapter.json").read_text())
    change(content)
    (folder / "adapter.json").write_text(json.dumps(content))


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Replace the tensors, with a manifest whose hash and size agree with them."""
    tensors = safetensors.torch.load_file(folder / "adapter.safetensors")
    change(tensors)
    content = safetensors.torch.save(tensors)
    (folder / "adapter.safetensors").write_bytes(content)
    agree(folder)


def agree(folder: Path) -> None:
    content = (folder / "adapter.safetensors").read_bytes()
    edit(folder, lambda m: m.update(tensors_sha256=hashlib.sha256(content).hexdigest(), tensors_size_bytes=len(content)))


def flip(folder: Path) -> None:
    content = bytearray((folder / "adapter.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "adapter.safetensors").write_bytes(content)


def truncate(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def oversized_header(folder: Path) -> None:
    (folder / "adapter.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{" * 1000)
    agree(folder)


def grown_file(folder: Path) -> None:
    with (folder / "adapter.safetensors").open("ab") as file:
        file.truncate(2**26)
    agree(folder)


def huge_manifest(folder: Path) -> None:
    with (folder / "adapter.json").open("ab") as file:
        file.truncate(2**27)


def link_out(folder: Path) -> None:
    target = folder.parent / "elsewhere.safetensors"
    (folder / "adapter.safetensors").rename(target)
    (folder / "adapter.safetensors").symlink_to(target)


def link_manifest_out(folder: Path) -> None:
    (folder / "adapter.json").unlink()
    (folder / "adapter.json").symlink_to("/etc/hostname")


def a_directory(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()
    (folder / "adapter.safetensors").mkdir()


def first_key(tensors: dict[str, Tensor]) -> str:
    return sorted(tensors)[-1]


def place_of_a_block() -> dict[str, str]:
    return {"path": "blocks.0", "host": "PostNormBlock", "structure": structure_of(fresh(), "blocks.0")}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit flipped": (flip, "SHA-256"),
    "tensors truncated": (truncate, "bytes, not"),
    "tensors gone": (lambda f: (f / "adapter.safetensors").unlink(), "no adapter.safetensors"),
    "tensors are a directory": (a_directory, "not a regular file"),
    "manifest gone": (lambda f: (f / "adapter.json").unlink(), "has no adapter.json"),
    "manifest empty": (lambda f: (f / "adapter.json").write_bytes(b""), "not an adapter manifest"),
    "manifest truncated": (
        lambda f: (f / "adapter.json").write_bytes((f / "adapter.json").read_bytes()[:200]),
        "not an adapter",
    ),
    "manifest not text": (lambda f: (f / "adapter.json").write_bytes(b"\xff\xfe\x00"), "not an adapter manifest"),
    "manifest a list": (lambda f: (f / "adapter.json").write_text("[]"), "not an adapter manifest"),
    "manifest nested": (lambda f: (f / "adapter.json").write_text("[" * 10**5), "not an adapter manifest"),
    "manifest huge": (huge_manifest, "a manifest has at most"),
    "header huge": (oversized_header, "not safetensors"),
    "file grown": (grown_file, "more than the"),
    "link out of the directory": (link_out, "outside the adapter's directory"),
    "manifest a link out": (link_manifest_out, "outside the adapter's directory"),
    "newer format": (lambda f: edit(f, lambda m: m.update(format_version=2)), "format version 2.*upgrade"),
    "unknown key": (lambda f: edit(f, lambda m: m.update(run="rm -rf")), "run: Extra inputs"),
    "unknown site key": (lambda f: edit(f, lambda m: m["sites"][0].update(file="../../x")), "file: Extra inputs"),
    "missing key": (lambda f: edit(f, lambda m: m.pop("sites")), "sites: Field required"),
    "no sites": (lambda f: edit(f, lambda m: m.update(sites=[])), "sites"),
    "unknown method": (
        lambda f: edit(f, lambda m: m["config"].update(method="exec")),
        "cannot be loaded: the method 'exec' is not here: install the package .*found 'exec'",
    ),
    "unknown setting": (lambda f: edit(f, lambda m: m["config"].update(code="x")), "no setting code"),
    "bad setting": (lambda f: edit(f, lambda m: m["config"].update(dropout=7)), "dropout"),
    "huge bottleneck": (
        lambda f: edit(f, lambda m: m["config"].update(bottleneck_size=10**9)),
        "does not match its config",
    ),
    "overflowing bottleneck": (
        lambda f: edit(f, lambda m: m["config"].update(bottleneck_size=10**30)),
        "bottleneck_size",
    ),
    "huge width": (lambda f: edit(f, lambda m: m["sites"][0].update(width=10**9)), "does not match its config"),
    "other place": (lambda f: edit(f, lambda m: m["sites"][0].update(reads="norm")), "its config says otherwise"),
    "shape beyond memory": (
        lambda f: edit(f, lambda m: next(iter(m["tensors"].values())).update(shape=[10**30])),
        "tensors",
    ),
    "axis beyond reason": (lambda f: edit(f, lambda m: m["sites"][0].update(axis=50)), "axis"),
    "a site twice": (lambda f: edit(f, lambda m: m["sites"].append(m["sites"][0])), "twice"),
    "a head around a site": (lambda f: edit(f, lambda m: m["heads"].append(place_of_a_block())), "lie inside the head"),
    "name with a newline": (lambda f: edit(f, lambda m: m.update(name="a\nb")), "printable"),
    "wrong shape": (
        lambda f: with_tensors(f, lambda t: t.update({first_key(t): torch.zeros(2, 2)})),
        r"\(\(2, 2\), 'float32'\)",
    ),
    "wrong dtype": (lambda f: with_tensors(f, lambda t: t.update({first_key(t): t[first_key(t)].long()})), "int64"),
    "unknown tensor": (lambda f: with_tensors(f, lambda t: t.update(extra=torch.zeros(3))), "'extra' is unknown"),
    "missing tensor": (lambda f: with_tensors(f, lambda t: t.pop(first_key(t))), "is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_hostile_adapter_is_refused_and_nothing_is_loaded(saved: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(saved)
    kit = ak.wrap(fresh())
    before = trace_of(kit.model)
    with pytest.raises((ak.StoreError, ak.AdapterNameError), match=message):
        kit.load(saved)
    assert trace_of(kit.model) == before


@given(st.data())
def test_any_byte_changed_is_refused_or_changes_nothing_that_runs(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    kit = ak.wrap(fresh())
    kit.add("a", CONFIG, seed=1, heads=["classifier"])
    folder = kit.save("a", tmp_path_factory.mktemp("adapter"))
    path = folder / data.draw(st.sampled_from(["adapter.json", "adapter.safetensors"]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    other = ak.wrap(fresh())
    before = trace_of(other.model)
    try:
        name = other.load(folder, any_base=True)
    except ak.AdapterKitError:
        assert trace_of(other.model) == before
    else:  # in a name or a note, say
        assert all(torch.equal(p, q) for p, q in zip(kit.parameters("a"), other.parameters(name), strict=True))


def declared(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors, and let the manifest declare them so."""
    with_tensors(folder, change)
    tensors = safetensors.torch.load_file(folder / "adapter.safetensors")
    records = {k: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for k, t in tensors.items()}
    edit(folder, lambda m: m.update(tensors=records))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({first_key(t): torch.zeros(2, 2)}), r"is \(2, 2\), its config says"),
        (lambda t: t.update({first_key(t): t[first_key(t)].long()}), "not one float dtype"),
        (lambda t: t.update({"sites/embedding/up_weight": torch.zeros(3)}), "unknown to its config"),
        (lambda t: t.pop(first_key(t)), "is missing"),
        (lambda t: t.update({first_key(t): torch.zeros(3, dtype=torch.complex64)}), "dtype 'complex64'"),
    ],
)
def test_tensors_that_agree_with_their_manifest_must_agree_with_the_config_too(
    saved: Path, change: Any, message: str
) -> None:
    declared(saved, change)
    with pytest.raises(ak.StoreError, match=message):
        ak.wrap(fresh()).load(saved)


def test_a_place_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ak.StoreError, match="no such directory"):
        ak.wrap(fresh()).load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    kit = ak.wrap(fresh())
    kit.add("a", CONFIG)
    with pytest.raises(ak.StoreError, match="cannot save an adapter in"):
        kit.save("a", tmp_path / "file")


def test_a_snapshot_of_the_hugging_face_cache_loads(saved: Path, tmp_path: Path) -> None:
    """There the files are links to blobs beside the snapshots."""
    snapshot, blobs = tmp_path / "models--org--x" / "snapshots" / "abc", tmp_path / "models--org--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (files.MANIFEST, files.TENSORS):
        (saved / name).rename(blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    ak.wrap(fresh()).load(snapshot)


# --- killed saves -----------------------------------------------------------------------------------------------------

SAVE_FOREVER = """
import sys, torch, adapterkit as ak
from tests.store.helpers import CONFIG, fresh
kit = ak.wrap(fresh())
kit.add("a", CONFIG, heads=["classifier"])
for n in range(10**9):
    with torch.no_grad():
        for p in kit.parameters("a", heads=True): p.fill_(n)
    kit.save("a", sys.argv[1])
    print(n, flush=True)
"""


def test_kill_during_save_never_leaves_a_broken_adapter(tmp_path: Path) -> None:
    root, folder = Path(__file__).parents[2], tmp_path / "adapter"
    torch.manual_seed(int(time.time()))
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, folder], cwd=root, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + 0.05 * torch.rand(()).item())
        os.kill(process.pid, signal.SIGKILL)
        done = [int(line) for line in process.communicate()[0].split()]
        kit = ak.wrap(fresh())
        kit.load(folder)
        [value] = {p.unique().item() for p in kit.parameters("a", heads=True)}
        assert value >= (done[-1] if done else 0), f"attempt {attempt}: an older adapter than the last one saved"


@pytest.mark.parametrize("stop", ["pending", "manifest", "tensors"])
def test_a_save_that_stops_at_any_point_leaves_the_old_or_the_new_adapter(
    saved: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    kit = ak.wrap(fresh())
    kit.load(saved)
    old = copy.deepcopy(kit.state_dict("a"))
    randomise(kit, "a")
    replace = os.replace

    def failing(source: Any, target: Any) -> None:
        kind = {".safetensors": "pending", ".json": "manifest"}[Path(target).suffix]
        if Path(target).name == files.TENSORS:
            kind = "tensors"
        if kind == stop:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ak.StoreError, match="no space left"):
        kit.save("a", saved)
    other = ak.wrap(fresh())
    other.load(saved)
    expected = kit.state_dict("a") if stop == "tensors" else old
    assert all(torch.equal(other.state_dict("a")[name], value) for name, value in expected.items())
    monkeypatch.undo()
    kit.save("a", saved)
    third = ak.wrap(fresh())
    third.load(saved)
    assert all(torch.equal(third.state_dict("a")[name], value) for name, value in kit.state_dict("a").items())


def test_two_processes_may_save_to_one_place_at_once(tmp_path: Path) -> None:
    root, folder = Path(__file__).parents[2], tmp_path / "adapter"
    command = [sys.executable, "-c", SAVE_FOREVER, folder]
    savers = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for saver in savers:
            assert saver.stdout is not None
            saver.stdout.readline()
        for _ in range(20):
            ak.wrap(fresh()).load(folder)
    finally:
        for saver in savers:
            saver.kill()
            saver.communicate()
    ak.wrap(fresh()).load(folder)


def test_a_path_of_this_machine_is_no_identity_of_a_base(tmp_path: Path) -> None:
    model = fresh()
    model.config = SimpleNamespace(_name_or_path=str(tmp_path))
    kit = ak.wrap(model)
    kit.add("a", CONFIG)
    assert read_manifest(kit.save("a", tmp_path / "x")).base.hub_id is None
    model.config._name_or_path = "org/tiny"
    assert read_manifest(kit.save("a", tmp_path / "x")).base.hub_id == "org/tiny"


def test_a_buffer_that_changes_its_shape_is_no_part_of_the_structure(saved: Path) -> None:
    model = fresh()
    model.blocks[0].down.register_buffer("cache", torch.zeros(3), persistent=False)
    ak.wrap(model).load(saved)


def test_the_manifest_reads_back_as_written(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert parse_manifest(manifest.model_dump_json().encode(), "here") == manifest
    assert ak.BottleneckConfig(**manifest.config) == CONFIG
    assert manifest.config.keys() == ak.BottleneckConfig.model_fields.keys()
