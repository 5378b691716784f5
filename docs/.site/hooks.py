"""Pages of the site that are made of files outside of docs/, and links that lead there.

The front page is README.md. CONTRIBUTING.md, CHANGELOG.md and LICENSE are pages, too. Any other file that a page links to
(a source file, a picture, a JSON of numbers) comes along. Links are written for readers of the repository; here each is
changed to where its file is on the site. A link that leads nowhere is left as it is, and `--strict` names it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
}
SHOWN_AS_CODE = {".py": "python", ".toml": "toml"}
# Code, in which nothing is a link; or the target of a link: what stands before it, the path, an anchor.
PARTS = re.compile(
    r"^```.*?^```|`[^`\n]*`|(?P<before>\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(?=\))", re.MULTILINE | re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of PAGES, and every file outside of docs/ that a page links to."""
    for source, where in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(
            File.generated(config, where, content=text if source.endswith(".md") else f"# License\n\n```text\n{text}```\n")
        )
    for file in list(files.documentation_pages()):
        for match in PARTS.finditer(file.content_string):
            source = _source(match["path"], file.src_uri) if match["path"] else None
            if source is None or source in PAGES or source.startswith("docs/"):
                continue
            where = _on_the_site(source)
            if where in files.src_uris:
                continue
            if where.endswith(".md"):
                code = f"# `{source}`\n\n```{SHOWN_AS_CODE[Path(source).suffix]}\n{(ROOT / source).read_text()}```\n"
                files.append(File.generated(config, where, content=code, inclusion=InclusionLevel.NOT_IN_NAV))
            else:
                files.append(File.generated(config, where, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Lead each link to where its file is on the site."""

    def changed(match: re.Match[str]) -> str:
        source = _source(match["path"], page.file.src_uri) if match["path"] else None
        if source is None:
            return match[0]
        way = posixpath.relpath(_on_the_site(source), posixpath.dirname(page.file.src_uri))
        return f"{match['before']}{way}{match['anchor'] or ''}"

    return PARTS.sub(changed, markdown)


def _source(link: str, page: str) -> str | None:
    """The file in the repository that a link on a page of the site leads to; None if there is none."""
    homes = {where: source for source, where in PAGES.items()}
    folder = posixpath.dirname(homes.get(page, f"docs/{page}"))
    source = posixpath.normpath(posixpath.join(folder, link))
    if (ROOT / source).is_dir():
        source = f"{source}/README.md"
    return source if not source.startswith("..") and (ROOT / source).is_file() else None


def _on_the_site(source: str) -> str:
    """Where a file of the repository is on the site, from the site's root."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return f"{source}.md" if Path(source).suffix in SHOWN_AS_CODE else source
