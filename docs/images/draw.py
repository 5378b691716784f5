"""Draw the pictures of the README and of docs/words.md, and the README's badges: `python docs/images/draw.py`.

Everything is plain SVG, made of boxes, lines and text. `tests/test_docs.py` draws all of it anew and compares.
"""

import re
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parents[1] / "pyproject.toml"

INK, QUIET, PAPER, FRAME, FROZEN = "#1f2328", "#57606a", "#ffffff", "#d0d7de", "#eaeef2"
ORANGE, BLUE, GREEN, PURPLE = "#bc4c00", "#0969da", "#1a7f37", "#8250df"  # each is dark enough for white text
SANS = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Drawing:
    """A picture that grows by boxes, lines and text, in pixels from the top left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = FROZEN,
        stroke: str = QUIET,
        radius: float = 6,
    ) -> None:
        """Draw a rectangle with round corners; x and y are its top left corner."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"'
        self.parts.append(f'<rect {place} fill="{fill}" stroke="{stroke}"/>')

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 15,
        colour: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Write a line of text; y is its baseline. What is in `backticks` as a whole is code."""
        font = MONO if words.startswith("`") else SANS
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{font}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}>{escape(words.strip("`"), quote=False)}</text>'
        )

    def label(self, x: float, y: float, width: float, height: float, words: str, *, fill: str | None = None) -> None:
        """Draw a box with words; x is its middle, y its top. With a colour it is a pill: what trains; without, frozen."""
        if fill is None:
            self.box(x - width / 2, y, width, height)
        else:
            self.box(x - width / 2, y, width, height, fill=fill, stroke=fill, radius=height / 2)
        self.text(x, y + height / 2 + 5, words, colour=INK if fill is None else PAPER, bold=fill is not None)

    def line(self, *points: tuple[float, float], colour: str = QUIET, thick: float = 1.5, dashed: bool = False) -> None:
        """Draw a line through points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{thick:g}"{dash}/>')

    def arrow(self, *points: tuple[float, float], colour: str = QUIET, thick: float = 1.5, dashed: bool = False) -> None:
        """Draw a line through points, with a head at its end."""
        self.line(*points, colour=colour, thick=thick, dashed=dashed)
        (x0, y0), (x, y) = points[-2:]
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        u, v = (x - x0) / length, (y - y0) / length
        corners = [(x, y), (x - 9 * u + 4.5 * v, y - 9 * v - 4.5 * u), (x - 9 * u - 4.5 * v, y - 9 * v + 4.5 * u)]
        self.parts.append(f'<polygon points="{" ".join(f"{a:g},{b:g}" for a, b in corners)}" fill="{colour}"/>')

    def plus(self, x: float, y: float) -> None:
        """Draw a residual addition."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="12" fill="{PAPER}" stroke="{INK}" stroke-width="2"/>')
        self.line((x - 6, y), (x + 6, y), colour=INK, thick=2)
        self.line((x, y - 6), (x, y + 6), colour=INK, thick=2)

    def dot(self, x: float, y: float, colour: str) -> None:
        """Draw a small filled circle."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{colour}"/>')

    def svg(self) -> str:
        """Return the picture as the text of an SVG file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self.title)}">'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", *self.parts, "</svg>"]) + "\n"


def blocks() -> str:
    """Draw a post-norm and a pre-norm block, and where each placement sits in them."""
    drawing = Drawing(1000, 800, "A post-norm and a pre-norm transformer block, with the place of each adapter")
    drawing.box(1, 1, 998, 798, fill=PAPER, stroke=FRAME, radius=10)
    _post_norm(drawing, 20)
    drawing.line((500, 30), (500, 700), colour=FRAME)
    _pre_norm(drawing, 515)
    drawing.line((30, 720), (970, 720), colour=FRAME)
    drawing.box(36, 737, 26, 18)
    drawing.text(72, 751, "frozen: the base, θ", size=14, anchor="start")
    drawing.box(268, 737, 26, 18, fill=BLUE, stroke=BLUE, radius=9)
    drawing.text(304, 751, "trained: one placement; an adapter takes one of them, or several", size=14, anchor="start")
    for x, words in (
        (36, "r: the stream"),
        (152, "x: what the branch returns"),
        (370, "s = x + r"),
        (470, "f: the bottleneck"),
        (620, "LN: the norm"),
        (740, "z: what the projection takes"),
    ):
        drawing.text(x, 780, words, size=14, colour=QUIET, anchor="start")
    return drawing.svg()


def _post_norm(drawing: Drawing, left: float) -> None:
    stream, branch = left + 60, left + 215
    drawing.text(left + 15, 42, "post-norm block", size=19, anchor="start", bold=True)
    drawing.text(left + 205, 42, "BERT, RoBERTa", colour=QUIET, anchor="start")
    drawing.line((stream, 62), (stream, 560), colour=INK, thick=4)
    drawing.text(stream - 12, 82, "r", size=17, anchor="end")
    drawing.text(stream + 12, 76, "stream", size=13, colour=QUIET, anchor="start")
    _attention(drawing, stream, branch, fork=88, top=110, end=256)
    drawing.label(stream, 278, 62, 30, "norm")
    _feedforward(drawing, stream, branch, fork=328, top=350, end=462)
    drawing.text(stream - 12, 492, "s", size=17, anchor="end")
    drawing.label(stream, 500, 92, 30, "pfeiffer", fill=BLUE)
    drawing.label(stream, 544, 62, 30, "norm")
    drawing.arrow((stream, 574), (stream, 600), colour=INK, thick=4)
    drawing.text(stream + 40, 564, "`@block.out`", size=13, colour=QUIET, anchor="start")
    _formulas(drawing, left + 15, ("LN(x + f(x) + r)", "LN(s + f(LN(s)))", "LN(x + f(r) + r)"))


def _pre_norm(drawing: Drawing, left: float) -> None:
    stream, branch = left + 60, left + 215
    drawing.text(left + 15, 42, "pre-norm block", size=19, anchor="start", bold=True)
    drawing.text(left + 205, 42, "GPT-2, LLaMA, T5, ViT", colour=QUIET, anchor="start")
    drawing.line((stream, 62), (stream, 580), colour=INK, thick=4)
    drawing.text(stream - 12, 82, "r", size=17, anchor="end")
    drawing.text(stream + 12, 76, "stream", size=13, colour=QUIET, anchor="start")
    _attention(drawing, stream, branch, fork=88, top=138, end=284, norm=True)
    _feedforward(drawing, stream, branch, fork=320, top=370, end=482, norm=True)
    drawing.text(stream - 12, 514, "s", size=17, anchor="end")
    drawing.label(stream, 520, 92, 30, "pfeiffer", fill=BLUE)
    drawing.arrow((stream, 550), (stream, 600), colour=INK, thick=4)
    drawing.text(stream + 14, 580, "`@block.out`", size=13, colour=QUIET, anchor="start")
    _formulas(drawing, left + 15, ("x + f(x) + r", "s + f(s)", "x + f(r) + r"))


def _attention(
    drawing: Drawing, stream: float, branch: float, *, fork: float, top: float, end: float, norm: bool = False
) -> None:
    """Draw the branch from the stream through the attention and houlsby's place, and back."""
    _branch(drawing, stream, branch, fork=fork, top=top, height=58, end=end, role="`@attention.out`", norm=norm)
    drawing.text(branch, top + 20, "attention")
    for offset, name, colour in ((-48, "q", PURPLE), (0, "k", None), (48, "v", PURPLE)):
        drawing.box(branch + offset - 18, top + 28, 36, 22, fill=colour or PAPER, stroke=colour or QUIET, radius=4)
        drawing.text(branch + offset, top + 44, name, colour=PAPER if colour else INK, bold=colour is not None)
    drawing.label(branch + 180, top + 24, 80, 30, "lora", fill=PURPLE)
    drawing.line((branch + 85, top + 39), (branch + 140, top + 39), colour=PURPLE, dashed=True)


def _feedforward(
    drawing: Drawing, stream: float, branch: float, *, fork: float, top: float, end: float, norm: bool = False
) -> None:
    """Draw the branch from the stream through the feed-forward and houlsby's place, and back; parallel's beside it."""
    _branch(drawing, stream, branch, fork=fork, top=top, height=30, end=end, role="`@feedforward.out`", norm=norm)
    drawing.text(branch, top + 20, "feed-forward")
    beside = branch + 195
    drawing.arrow((branch, fork), (beside, fork), (beside, top), colour=GREEN, dashed=True)
    drawing.label(beside, top, 92, 30, "parallel", fill=GREEN)
    drawing.arrow((beside, top + 30), (beside, end), (branch + 6, end), colour=GREEN, dashed=True)


def _branch(
    drawing: Drawing,
    stream: float,
    branch: float,
    *,
    fork: float,
    top: float,
    height: float,
    end: float,
    role: str,
    norm: bool,
) -> None:
    """Draw a fork of the stream, a norm if asked, a frozen box at `top`, houlsby's place, and the addition at `end`."""
    if norm:
        drawing.arrow((stream, fork), (branch, fork), (branch, fork + 12))
        drawing.label(branch, fork + 12, 62, 26, "norm")
        drawing.arrow((branch, fork + 38), (branch, top))
    else:
        drawing.arrow((stream, fork), (branch, fork), (branch, top))
    drawing.box(branch - 85, top, 170, height)
    drawing.line((branch, top + height), (branch, end - 48))
    drawing.text(branch - 10, top + height + 21, "x", size=17, anchor="end")
    drawing.text(branch + 10, top + height + 20, role, size=13, colour=QUIET, anchor="start")
    drawing.label(branch, end - 46, 92, 30, "houlsby", fill=ORANGE)
    drawing.arrow((branch, end - 16), (branch, end), (stream + 12, end))
    drawing.plus(stream, end)


def _formulas(drawing: Drawing, x: float, formulas: tuple[str, str, str]) -> None:
    names = (("houlsby", ORANGE), ("pfeiffer", BLUE), ("parallel", GREEN), ("lora", PURPLE))
    for row, ((name, colour), formula) in enumerate(zip(names, (*formulas, "(W + scaling · B A) z"), strict=True)):
        y = 630 + 22 * row
        drawing.dot(x + 5, y - 5, colour)
        drawing.text(x + 20, y, name, anchor="start", bold=True, colour=colour)
        drawing.text(x + 110, y, f"`{formula}`", anchor="start")


def overview() -> str:
    """Draw one frozen model, the adapter whose modules its hooks call, and adapters as folders."""
    drawing = Drawing(900, 420, "A frozen model, the adapter that its hooks call, and adapters saved as folders")
    drawing.box(1, 1, 898, 418, fill=PAPER, stroke=FRAME, radius=10)
    for x, head, below in (
        (145, "your model", "frozen, unchanged"),
        (430, "the active adapter", "trained; called by hooks"),
        (735, "adapters", "a small folder each"),
    ):
        drawing.text(x, 40, head, size=18, bold=True)
        drawing.text(x, 62, below, size=14, colour=QUIET)
    _model_and_adapter(drawing, 145, 430)
    _folders(drawing, 735)
    drawing.arrow((530, 124), (620, 124))
    drawing.text(575, 114, "`kit.save`", size=14)
    drawing.arrow((620, 150), (530, 150))
    drawing.text(575, 172, "`kit.load`", size=14)
    return drawing.svg()


def _model_and_adapter(drawing: Drawing, model: float, adapter: float) -> None:
    rows = ((86, "embedding", None), (142, "block 1", "bottleneck"), (198, "block 2", "bottleneck"), (254, "…", "…"))
    for y, name, module in (*rows, (310, "block 12", "bottleneck")):
        drawing.label(model, y, 170, 36, name)
        drawing.line((model, y + 36), (model, y + (68 if y == 310 else 56)), thick=3, colour=INK)
        if module:
            drawing.dot(model + 85, y + 18, BLUE)
            drawing.line((model + 85, y + 18), (adapter - 75, y + 18), colour=BLUE, dashed=True)
            drawing.label(adapter, y + 3, 150, 30, module, fill=BLUE)
    drawing.dot(model, 378, GREEN)
    drawing.line((model, 378), (adapter - 75, 378), colour=GREEN, dashed=True)
    drawing.label(adapter, 363, 150, 30, "head", fill=GREEN)


def _folders(drawing: Drawing, x: float) -> None:
    for y, name, colour in ((92, "reviews", BLUE), (192, "names", ORANGE), (292, "german", PURPLE)):
        drawing.box(x - 105, y, 70, 14, fill=colour, stroke=colour, radius=4)
        drawing.box(x - 105, y + 8, 210, 74, fill=PAPER, stroke=colour)
        drawing.text(x - 92, y + 32, f"`adapters/{name}`", size=14, anchor="start", colour=colour, bold=True)
        drawing.text(x - 92, y + 52, "`adapter.safetensors`", size=13, anchor="start")
        drawing.text(x - 92, y + 70, "`adapter.json`", size=13, anchor="start")


def badge(name: str, value: str) -> str:
    """Draw a badge: a name on grey, a value on blue."""
    left, right = 16 + 7 * len(name), 16 + 7 * len(value)
    drawing = Drawing(left + right, 22, f"{name}: {value}")
    drawing.box(0, 0, left + right, 22, fill=BLUE, stroke="none", radius=4)
    drawing.box(0, 0, left, 22, fill=QUIET, stroke="none", radius=4)
    drawing.box(left - 4, 0, 4, 22, fill=QUIET, stroke="none", radius=0)
    drawing.text(left / 2, 15, name, size=12, colour=PAPER)
    drawing.text(left + right / 2, 15, value, size=12, colour=PAPER)
    return drawing.svg()


def badges() -> dict[str, str]:
    """Draw a badge for each thing that pyproject.toml says: the licence, and the oldest Python and torch."""
    project = PROJECT.read_text()
    said = {
        "licence": re.search(r'^license = "(.+)"', project, re.MULTILINE),
        "python": re.search(r'^requires-python = "(.+)"', project, re.MULTILINE),
        "torch": re.search(r'"torch(>=[\d.]+)"', project),
    }
    missing = [name for name, found in said.items() if found is None]
    if missing:
        raise ValueError(f"pyproject.toml says nothing of {missing}: a badge has nothing to show")
    return {f"badge-{name}.svg": badge(name, found[1].replace(">=", "≥ ")) for name, found in said.items() if found}


def pictures() -> dict[str, str]:
    """Return every picture by the name of its file."""
    return {"blocks.svg": blocks(), "overview.svg": overview(), **badges()}


if __name__ == "__main__":
    for file_name, content in pictures().items():
        (HERE / file_name).write_text(content, encoding="utf-8")
