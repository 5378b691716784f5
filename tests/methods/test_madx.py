"""examples/madx.py: the files it reads, and the whole of MAD-X on a model of one layer."""

import json
import random
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch

import adapterkit as ak
from adapterkit.nn.invertible import Coupling

ROOT = Path(__file__).parents[2]
HIDDEN, PIECES = 32, ["<s>", "<pad>", "</s>", "<unk>", "▁in", "▁the", "▁beginning", "▁pa", "chi", "yambi", "▁", "<mask>"]


class Example(NamedTuple):
    madx: ModuleType
    base: ModuleType
    text: ModuleType


@pytest.fixture
def example(monkeypatch) -> Example:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import madx
    import madx_base
    import madx_text

    return Example(madx, madx_base, madx_text)


# --- text -------------------------------------------------------------------------------------------------------------


def test_english_verses_are_cut_out_of_one_long_string(example, tmp_path):
    source = 'bible = Bible(VERSION, """In the beginning. And so. """, {1001001: 0, 66022021: 18}, {1001001: 18, 66022021: 26}, {})'
    (tmp_path / "plain_text_readers_bible.py").write_text(source)
    verses = example.text.english(tmp_path)
    assert verses == [example.text.Verse(1, 1, "In the beginning."), example.text.Verse(66, 22, "And so.")]


def test_english_text_in_another_form_is_refused(example, tmp_path):
    (tmp_path / "plain_text_readers_bible.py").write_text("bible = 3")
    with pytest.raises(TypeError, match="otherwise than expected"):
        example.text.english(tmp_path)


def test_chichewa_verses_come_in_the_order_of_books_and_chapters_and_empty_ones_are_left_out(example, tmp_path):
    for book, chapter, texts in ((10, 1, ["c"]), (2, 10, ["b"]), (2, 9, ["a", " "])):
        path = tmp_path / "resources" / str(book) / f"{chapter}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(texts))
    assert [verse.text for verse in example.text.chichewa(tmp_path)] == ["a", "b", "c"]


def test_a_chapter_is_in_one_split_and_in_the_same_one_in_each_language(example):
    verses = {
        language: [example.text.Verse(1, chapter, f"{language} {chapter}") for chapter in range(first, first + 40)]
        for language, first in (("english", 1), ("chichewa", 3))
    }
    chapters = [
        {name: {verse.chapter for verse in part} for name, part in vars(splits).items()}
        for splits in example.text.split(verses).values()
    ]
    assert chapters[0] == chapters[1]
    assert sorted(chapter for part in chapters[0].values() for chapter in part) == list(
        range(3, 41)
    )  # those of both, once each
    assert len(chapters[0]["test"]) in (7, 8)


def test_the_parts_of_the_bible_end_where_they_end(example):
    parts = {book: example.text.part_of(example.text.Verse(book, 1, "")) for book in (1, 5, 6, 22, 23, 39, 40, 45, 66)}
    assert parts == {1: 0, 5: 0, 6: 1, 22: 2, 23: 3, 39: 3, 40: 4, 45: 5, 66: 5}


# --- tokens and weights -----------------------------------------------------------------------------------------------


def pack(values: np.ndarray) -> bytes:
    """Blocks of 32: a scale of 0.5, and whole numbers from -8 to 7 in half a byte each, the lower half first."""
    nibbles = (values.reshape(-1, 32) / 0.5 + 8).astype(np.uint8)
    packed = nibbles[:, :16] | nibbles[:, 16:] << 4
    return b"".join(struct.pack("<e", 0.5) + row.tobytes() for row in packed)


@pytest.fixture
def weights(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A file in the package's format, of one layer, and the numbers in it."""
    draw = np.random.default_rng(0)
    shapes = {"emb.word": (len(PIECES), HIDDEN), "emb.pos": (16, HIDDEN), "emb.type": (2, HIDDEN)}
    shapes |= {"emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    for part in ("q", "k", "v", "ao", "fi", "fo", "aln", "oln"):
        shapes |= {f"l0.{part}.w": (HIDDEN,) if part.endswith("ln") else (HIDDEN, HIDDEN), f"l0.{part}.b": (HIDDEN,)}
    packed = {name for name, shape in shapes.items() if len(shape) == 2 and name not in ("emb.pos", "emb.type")}
    numbers = {
        name: draw.integers(-8, 8, shape) * np.float32(0.5)
        if name in packed
        else draw.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    text = [piece.encode() for piece in PIECES]
    head = b"E5S1" + struct.pack("<I7ifi", 1, HIDDEN, 1, 2, HIDDEN, len(PIECES), 16, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, sum(map(len, text)))
    head += np.cumsum([0, *map(len, text)]).astype("<u4").tobytes()
    head += np.full(len(PIECES), -1, "<f4").tobytes() + b"".join(text) + struct.pack("<iI", 0, 0)
    data = {name: pack(array) if name in packed else array.tobytes() for name, array in numbers.items()}
    at = len(head) + 4 + sum(2 + len(name) + 21 for name in data)
    directory = struct.pack("<i", len(data))
    for name, values in data.items():
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", name in packed, numbers[name].size, at, len(values))
        at += len(values)
    path = tmp_path / "weights.bin"
    path.write_bytes(head + directory + b"".join(data.values()))
    return path, numbers


def test_weights_are_read_as_they_were_written_four_bit_ones_too(example, weights):
    path, numbers = weights
    file = example.base.WeightFile(path)
    assert [piece for piece, _ in file.pieces] == PIECES
    for name, values in numbers.items():
        assert torch.equal(file.tensor(name), torch.from_numpy(values.reshape(-1)))


def test_a_file_of_another_format_is_refused(example, tmp_path):
    (tmp_path / "other.bin").write_bytes(b"GGUF....")
    with pytest.raises(ValueError, match="b'GGUF'"):
        example.base.WeightFile(tmp_path / "other.bin")


def test_the_vocabulary_is_cut_to_what_the_text_uses(example, weights):
    file = example.base.WeightFile(weights[0])
    tokens = example.base.Tokens(file.pieces, ["In the beginning".lower(), "in"])
    assert [PIECES[index] for index in tokens.kept] == [*example.base.SPECIAL, "▁in", "▁the", "▁beginning"]
    assert tokens(["in  the", "in pachiyambi"], 6) == [[1, 5, 6, 2], [1, 5, 3, 3, 3, 2]]
    assert tokens(["in the beginning"], 4) == [[1, 5, 6, 2]]
    words = example.base.encoder(file, tokens.kept, 1).embeddings.word_embeddings.weight
    assert torch.equal(words, torch.from_numpy(weights[1]["emb.word"])[tokens.kept])


def test_hidden_words_are_neither_special_nor_lost(example):
    ids = torch.randint(0, 40, (64, 64))
    shown, masked = example.madx.hide(ids, 40, torch.Generator().manual_seed(0))
    assert (ids[masked] >= len(example.base.SPECIAL)).all()
    assert torch.equal(shown[~masked], ids[~masked])
    assert masked.float().mean().item() == pytest.approx(0.15 * 35 / 40, abs=0.02)
    assert (shown[masked] == example.base.Tokens.mask).float().mean().item() == pytest.approx(0.8, abs=0.05)


# --- MAD-X ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(example, weights):
    """A model of one layer, wrapped, and rows of random tokens in two languages, with labels."""
    file = example.base.WeightFile(weights[0])
    kept = list(range(len(PIECES)))
    encoder = example.base.encoder(file, kept, 1)
    model = example.madx.Reader(encoder, HIDDEN, encoder.embeddings.word_embeddings, 3)
    draw = random.Random(0)  # noqa: S311 (a fixture)
    split = [([1, *draw.choices(range(5, 12), k=draw.randint(3, 8)), 2], draw.randrange(3)) for _ in range(40)]
    rows = {language: {"train": split, "validation": split} for language in example.madx.LANGUAGES}
    ids, mask, _ = example.madx.collate(split[:4])
    return model, rows, ak.wrap(model, (ids, mask, ids == ids[0, 1])), (ids, mask)


@pytest.fixture
def settings(example):
    return example.madx.Settings(
        batch_size=8, head_steps=3, base_steps=3, language_steps=5, task_steps=5, language_rate=0.05, task_rate=0.05
    )


def test_a_swapped_language_changes_what_the_task_adapter_sees_and_the_base_stays(example, tiny, settings):
    model, rows, kit, (ids, mask) = tiny
    example.madx.train_base(model, rows, settings)
    base = {name: values.clone() for name, values in model.state_dict().items()}
    example.madx.train_languages(kit, model, rows, settings, seed=0)
    languages = [[tensor.clone() for tensor in kit.state_dict(name).values()] for name in example.madx.LANGUAGES]
    ways = example.madx.train_tasks(kit, model, rows, settings, seed=0)
    for name, before in zip(example.madx.LANGUAGES, languages, strict=True):  # the task trained on top of them, not them
        assert all(map(torch.equal, kit.state_dict(name).values(), before))
    assert all(torch.equal(model.state_dict()[name], values) for name, values in base.items())
    model.eval()
    classes = []
    for way in ways.values():
        with kit.active(way), torch.no_grad():
            classes.append(model(ids, mask)[1])
    assert not any(torch.equal(a, b) for index, a in enumerate(classes) for b in classes[:index])
    assert ways["swapped (MAD-X)"] == ak.Stack("chichewa", "task")
    scores = example.madx.measure_tasks(kit, model, rows, ways, "validation", 40)
    assert scores["majority"]["english"] == max(np.bincount([label for _, label in rows["english"]["train"]])) / 40 * 100
    kit.verify().require()


def test_what_enters_the_output_embedding_went_through_the_inverse(example, tiny, settings):
    model, rows, kit, (ids, mask) = tiny
    assert {site.path: site.tag for site in kit.sites("madx") if site.tag} == {
        "encoder.embeddings": "forward",
        "output": "inverse",
    }
    kit.add("chichewa", "madx")
    kit.train_adapter("chichewa")
    example.madx.train_words(model, rows["chichewa"]["train"], 5, 0.05, settings, 0, "words")
    seen = {}
    model.transform.register_forward_hook(lambda module, args, output: seen.update(leaving=output))
    model.output.register_forward_pre_hook(lambda module, args: seen.update(entering=args[0]))
    model.eval()
    with torch.no_grad():
        model(ids, mask, ids == ids[0, 1])
        [coupling] = [module for module in model.modules() if isinstance(module, Coupling)]
        again = seen["entering"] + coupling(seen["entering"])
    assert (seen["entering"] - seen["leaving"]).abs().max() > 0.01
    torch.testing.assert_close(again, seen["leaving"], atol=1e-5, rtol=0)


def test_the_language_adapter_learns_its_language(example, tiny, settings):
    model, rows, kit, _ = tiny
    example.madx.train_base(model, rows, settings)
    example.madx.train_languages(kit, model, rows, settings, seed=0)
    losses = example.madx.measure_words(kit, model, rows, "validation", 40)
    assert losses["english adapter"]["english"] < losses["no adapter"]["english"]


def test_the_page_says_what_the_numbers_say(example, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import bench_madx

    content = json.loads((ROOT / "benchmarks/results/madx.json").read_text())
    assert bench_madx.summarise(content["runs"]) == content["summary"]
    assert bench_madx.tables(content["summary"], content["swapped_minus"]) in (ROOT / "docs/madx.md").read_text()
