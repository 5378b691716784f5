"""Every Python snippet of the README and the docs runs, in the order in which they stand."""

import json
import re
import warnings
from pathlib import Path

import pytest

import adapterkit as ak
from benchmarks.parity.table import page
from benchmarks.zoo import table as zoo

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if "```python" in path.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's nested tensors
        for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(snippet, names)  # noqa: S102 (our own docs)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_docs_name_the_sessions_that_exist() -> None:
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    text = "".join(path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"))
    assert set(re.findall(r"nox -s (\w+)", text)) <= sessions


def test_every_public_name_stands_in_one_page_of_the_reference() -> None:
    pages = "\n".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
    assert sorted(re.findall(r"^::: adapterkit\.(\w+)$", pages, re.MULTILINE)) == sorted(ak.__all__)


def test_the_menu_of_the_site_names_every_page() -> None:
    menu = re.findall(r"([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2], re.MULTILINE)
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert pages <= set(menu)
    assert len(menu) == len(set(menu))


def test_the_parity_page_says_what_its_numbers_say() -> None:
    names = ("parity", "parity_methods", "parity_compositions")
    parts = [json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in names]
    assert (ROOT / "docs/parity.md").read_text() == page(*parts)


def test_the_zoo_page_says_what_its_numbers_say() -> None:
    assert (ROOT / "docs/zoo.md").read_text() == zoo.page(zoo.load())
