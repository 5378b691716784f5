"""Change drills: make a change as a developer would, in a copy of the package, and run a script with that copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import adapterkit

__all__ = ["copy_of_package", "insert", "run_with"]

ROOT = Path(__file__).parents[1]


def copy_of_package(folder: Path) -> Path:
    """Copy the package into a folder, and return where its files lie then."""
    package = folder / "adapterkit"
    shutil.copytree(Path(adapterkit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def insert(file: Path, line: str, *, before: str) -> None:
    """Write a line into a file, before the only one that starts so."""
    text = file.read_text()
    assert text.count(f"\n{before}") == 1, f"{file} has {text.count(before)} lines that start with {before!r}"
    file.write_text(text.replace(f"\n{before}", f"\n{line}{before}"))


def run_with(package: Path, code: str, *arguments: object) -> str:
    """Run code in a new process that imports this copy of the package, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=package.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
