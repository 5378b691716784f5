"""Four domains of sentences that people rated: tweets, movie reviews, product reviews, newspaper editorials.

They lie in the source distribution of the PyPI package vaderSentiment 3.3.2 (MIT):

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2

Source: Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text". Twenty
or so people rated each sentence from -4 to 4; the files hold the means.
"""

import hashlib
import html
import io
import random
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "products": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "editorials": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}
TARGET = "products"  # with few labelled sentences; see docs/fusion-on-text.md for why
NEUTRAL = 0.5  # a mean nearer to 0 than to 1 or -1 is nobody's clear opinion

Example = tuple[str, int]  # sentence, label: 1 is positive


@dataclass(frozen=True)
class Rated:
    """A sentence with its mean rating, and the text that it is from: a review, an article, or itself."""

    group: str
    rating: float
    sentence: str


@dataclass(frozen=True)
class Domain:
    """Labelled sentences of one domain; no review or article is in two of the splits."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def read_rated(archive: Path, sha256: str = ARCHIVE_SHA256) -> dict[str, list[Rated]]:
    """All rated sentences by domain, as the archive has them. Nothing is written to disk.

    Raises:
        ValueError: the archive is another one.
    """
    content = archive.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{archive} has the SHA-256 {found}, and vaderSentiment-3.3.2.tar.gz has {sha256}; get it by "
            "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2"
        )
    inner = _member(content, INNER)
    return {domain: list(_rated(_member(inner, name).decode("utf-8-sig"))) for domain, name in FILES.items()}


def make_domains(rated: Mapping[str, list[Rated]], seed: int, train_size: int, target_size: int) -> dict[str, Domain]:
    """Domains with their splits. Validation and test are the same for every seed, which draws and shuffles what trains.

    Args:
        rated: What `read_rated` gives.
        seed: Of the draw.
        train_size: Sentences to train on at most, in each domain but the target.
        target_size: The same in the target domain.
    """
    domains = {}
    for name, sentences in without_duplicates(rated).items():
        groups = sorted({one.group for one in sentences})
        random.Random(0).shuffle(groups)
        fold = {group: index % 10 for index, group in enumerate(groups)}
        last = {"test": 5, "validation": 7} if name == TARGET else {"test": 2, "validation": 3}  # folds below these
        parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
        for one in sentences:
            if abs(one.rating) >= NEUTRAL:
                split = next((split for split, end in last.items() if fold[one.group] < end), "train")
                parts[split].append((one.sentence, int(one.rating > 0)))
        random.Random(seed).shuffle(parts["train"])
        for split in last:
            parts[split].sort(key=lambda example: len(example[0]))  # less padding
        parts["train"] = parts["train"][: target_size if name == TARGET else train_size]
        domains[name] = Domain(**parts)
    return domains


def without_duplicates(rated: Mapping[str, list[Rated]]) -> dict[str, list[Rated]]:
    """The first of sentences that differ in case, punctuation and repeated letters alone, over all domains."""
    seen: set[str] = set()
    kept: dict[str, list[Rated]] = {}
    for name, sentences in rated.items():
        kept[name] = []
        for one in sentences:
            letters = " ".join(re.findall(r"\w+", re.sub(r"([^\W\d])\1+", r"\1", one.sentence.lower()))) or one.sentence
            if letters not in seen:
                seen.add(letters)
                kept[name].append(one)
    return kept


def _member(archive: bytes, name: str) -> bytes:
    """One file of a tar archive, read into memory."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        if file is None:
            raise ValueError(f"{name} is no file in the archive")
        return file.read()


def _rated(text: str) -> Iterator[Rated]:
    """The lines of one file: id, mean rating, sentence. Ids such as 12_3 are the third sentence of text 12."""
    for line in text.splitlines():
        if line.strip():
            number, rating, sentence = line.split("\t")
            yield Rated(number.partition("_")[0], float(rating), html.unescape(sentence))
