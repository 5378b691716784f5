"""Every Python snippet of the README and the docs runs, in the order in which they stand; pictures are as drawn."""

import json
import re
import runpy
import warnings
from pathlib import Path

import pytest

import adapterkit as ak
from benchmarks.parity.table import page
from benchmarks.zoo import table as zoo
from tests.stand_ins import stand_ins

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if "```python" in path.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_snippets_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    if "from_pretrained(" in text:
        stand_ins(tmp_path)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's nested tensors, and of transformers
        warnings.simplefilter("error", ak.BaseMismatchWarning)  # no page loads an adapter that does not belong there
        for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(snippet, names)  # noqa: S102 (our own docs)


def test_the_pictures_are_as_the_script_draws_them() -> None:
    folder = ROOT / "docs/images"
    drawn = runpy.run_path(str(folder / "draw.py"))["pictures"]()
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.svg")} == drawn


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: lower case, words joined by hyphens, nothing else."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *ROOT.glob("docs/**/*.md")], ids=lambda p: p.name)
def test_links_to_headings_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([\w./-]*\.md|)#([^)]+)\)", page.read_text())
    assert [link for link in links if link[1] not in _anchors(page.parent / link[0] if link[0] else page)] == []


def test_the_readme_says_what_was_measured() -> None:
    """Accuracies and sizes as in the committed results; bytes of the demo as on its own page."""
    readme, sentiment = (ROOT / "README.md").read_text(), (ROOT / "docs/sentiment.md").read_text()
    for arm in json.loads((ROOT / "benchmarks/results/sentiment.json").read_text())["summary"]:
        row = re.search(rf"^\| {arm['arm']} \|.*$", readme, re.MULTILINE)
        assert row is not None
        _, _, accuracy, parameters, size, _ = (cell.strip() for cell in row[0].split("|"))
        assert accuracy == f"{arm['mean']:.1f} ± {arm['stdev']:.1f} %"
        assert re.search(rf"^\| {arm['arm']} \| .* \| {parameters.split()[0]} \| .* \| {size} \|", sentiment, re.MULTILINE)
    widths = {
        row["bottleneck_size"]: row["bytes"] / 1e6
        for row in json.loads((ROOT / "benchmarks/results/savings.json").read_text())["rows"]
        if (row["base"], row["method"]) == ("RoBERTa-base", "pfeiffer")
    }
    said = re.search(r"takes ([\d.]+) MB at a width of 12, ([\d.]+) MB\s+at 48 .* and ([\d.]+) MB at 384", readme)
    assert said is not None
    assert [float(number) for number in said.groups()] == [round(widths[12], 1), round(widths[48], 1), round(widths[384])]


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
