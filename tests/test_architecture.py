"""The tree is the architecture: imports point downwards, public names are listed, importing is cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterkit

from .helpers import typed_names

SOURCE = Path(adapterkit.__file__).parent
# The rooms, from the bottom up. A file may import from its own room and from the layers above it in this list.
LAYERS = [
    {"errors"},
    {"composition", "config", "nn", "structure"},
    {"placement"},
    {"runtime"},
    {"heads", "methods"},
    {"lifecycle"},
    {"store", "inspection"},
    {"kit"},
    {"cli", "__init__", "__main__"},
]
# Layers whose rooms do not import one another.
APART = [LAYERS[1], LAYERS[4], LAYERS[6]]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# The core dependencies and what they are made of.
CORE = {
    "adapterkit",
    "torch",
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_extensions",
    "typing_inspection",
    "safetensors",
}
FILES = sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a syntax tree, but for those that a type checker alone sees."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from running(child)


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports when it runs, relative to the package.

    Imports for annotations alone, under `if TYPE_CHECKING`, are left out.
    """
    here = list(path.relative_to(SOURCE).parts[:-1])
    found = set()
    for node in running(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = here[: len(here) - node.level + 1]
            target = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = ".".join(filter(None, [target, alias.name]))
                is_module = (SOURCE / f"{inner.replace('.', '/')}.py").exists() or (
                    SOURCE / inner.replace(".", "/")
                ).is_dir()
                found.add(inner if is_module else target)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("adapterkit"):
            pytest.fail(f"{path} imports its own package by its absolute name")
    return found


def test_every_file_has_a_layer() -> None:
    assert {module_of(path).split(".")[0] for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_downwards(path: Path) -> None:
    here = module_of(path).split(".")[0]
    upward = {name for name in imports_of(path) if RANK[name.split(".")[0]] > RANK[here]}
    assert not upward


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_rooms_of_one_layer_know_nothing_of_one_another(path: Path) -> None:
    here = module_of(path).split(".")[0]
    beside = {room for rooms in APART if here in rooms for room in rooms} - {here}
    assert {name.split(".")[0] for name in imports_of(path)}.isdisjoint(beside)


def test_there_are_no_cycles() -> None:
    graph = {module_of(path).removesuffix(".__init__"): imports_of(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"cycle: {' -> '.join((*above, name))}"
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_public_names_are_listed_sorted_and_there() -> None:
    assert adapterkit.__all__ == sorted(adapterkit.__all__) == dir(adapterkit)
    assert all(getattr(adapterkit, name).__doc__ for name in adapterkit.__all__ if name != "__version__")
    typed = typed_names(SOURCE / "__init__.py")
    assert typed == set(adapterkit.__all__) - {"__version__"}, "what a type checker sees is what there is"
    everything: dict[str, object] = {}
    exec("from adapterkit import *", everything)  # noqa: S102
    assert set(adapterkit.__all__) <= set(everything)
    for name in ("nothing", "NoConfig"):
        with pytest.raises(AttributeError, match=f"'adapterkit' has no attribute '{name}'"):
            getattr(adapterkit, name)


def in_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_brings_in_the_core_dependencies_only() -> None:
    code = (
        "import sys, torch, pydantic, safetensors.torch; before = set(sys.modules); import adapterkit; adapterkit.wrap;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names) - {'_sysconfigdata__linux_x86_64-linux-gnu'})"
    )
    assert set(in_new_process(code).split()) <= CORE


def test_importing_takes_at_most_250_ms_over_torch() -> None:
    """Of processor time: another process on the same machine must not decide."""
    code = "import torch, time; t = time.process_time(); import adapterkit; print(time.process_time() - t)"
    assert any(float(in_new_process(code)) < 0.25 for _ in range(5))


def test_the_types_are_shipped() -> None:
    assert (SOURCE / "py.typed").exists()


def test_the_package_is_at_most_fourteen_rooms_and_files() -> None:
    """Beside the two files that Python asks for and the mark for type checkers."""
    entries = {path.name for path in SOURCE.iterdir()} - {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    assert entries == {"kit.py", "errors.py"} | {room for rooms in LAYERS for room in rooms if (SOURCE / room).is_dir()}
    assert len(entries) <= 14
