"""The sentences of examples/fusion.py: how they are read, and that nothing leaks between the splits."""

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import domains
from domains import Rated


def archive_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def write_archive(path: Path, lines: str) -> str:
    """An archive laid out as vaderSentiment's is; returns its SHA-256."""
    inner = archive_of({name: lines.encode("utf-8-sig") for name in domains.FILES.values()})
    path.write_bytes(archive_of({domains.INNER: inner}))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rated(texts: int, each: int = 3) -> dict[str, list[Rated]]:
    """So many texts in each domain, so many sentences in each text, all different."""
    return {
        name: [Rated(str(text), 2.0, f"{name} {text} {n}") for text in range(texts) for n in range(each)]
        for name in domains.FILES
    }


def test_sentences_are_read_with_their_text_rating_and_entities(tmp_path):
    sha256 = write_archive(
        tmp_path / "a.tar.gz", "1_1\t-0.9\tno picture &amp; no sound\r\n1_2\t3.5\tgreat\r\n2\t0.1\tso\r\n"
    )
    read = domains.read_rated(tmp_path / "a.tar.gz", sha256)
    assert list(read) == ["products", "movies", "tweets", "editorials"]
    assert read["movies"] == [Rated("1", -0.9, "no picture & no sound"), Rated("1", 3.5, "great"), Rated("2", 0.1, "so")]


def test_another_archive_is_refused_with_its_hash(tmp_path):
    sha256 = write_archive(tmp_path / "a.tar.gz", "1\t1.0\tgood\n")
    with pytest.raises(ValueError, match=f"has the SHA-256 {sha256}.*pip download"):
        domains.read_rated(tmp_path / "a.tar.gz")


def test_no_text_is_in_two_splits():
    made = domains.make_domains(rated(30), seed=0, train_size=1000, target_size=1000)
    for domain in made.values():
        texts = [{sentence.split()[1] for sentence, _ in part} for part in (domain.train, domain.validation, domain.test)]
        assert all(texts)
        assert len(set.union(*texts)) == sum(map(len, texts)) == 30


def test_a_seed_draws_what_trains_and_nothing_else():
    one, other = (domains.make_domains(rated(30), seed, train_size=20, target_size=5) for seed in (0, 1))
    assert [len(domain.train) for domain in one.values()] == [5, 20, 20, 20]
    for name, domain in one.items():
        assert domain.train != other[name].train
        assert (domain.validation, domain.test) == (other[name].validation, other[name].test)


def test_labels_are_the_sign_of_the_rating_and_neutral_sentences_are_left_out():
    sentences = {"movies": [Rated(str(n), rating, f"s{n}") for n, rating in enumerate((-0.5, -0.49, 0.0, 0.49, 0.5) * 10)]}
    domain = domains.make_domains(sentences, 0, 1000, 1000)["movies"]
    labels = {sentence: label for part in (domain.train, domain.validation, domain.test) for sentence, label in part}
    assert labels == {f"s{n}": int(n % 5 == 4) for n in range(50) if n % 5 in (0, 4)}


def test_sentences_that_differ_in_case_punctuation_and_repeated_letters_are_kept_once_over_all_domains():
    given = {
        "products": [Rated("1", 1.0, "Wow!"), Rated("2", 2.0, "!"), Rated("3", 2.0, ":)")],
        "tweets": [Rated("1", 1.0, "woooow"), Rated("2", 1.0, "wow, again")],
    }
    kept = domains.without_duplicates(given)
    assert {name: [one.sentence for one in ones] for name, ones in kept.items()} == {
        "products": ["Wow!", "!", ":)"],
        "tweets": ["wow, again"],
    }
