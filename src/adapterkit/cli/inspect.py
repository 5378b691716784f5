"""`adapterkit inspect MODEL`: show what a model is made of."""

import argparse
import json
import sys
from pathlib import Path

from ..kit import wrap
from .models import MODEL, load_model
from .screen import show

__all__ = ["Inspect"]


class Inspect:
    """Show a model as a folded tree: roles, widths, parameters, what trains, where adapters sit."""

    name = "inspect"
    summary = "show what a model is made of, and where an adapter would sit"
    description = (
        "Show a model as a tree: repeated blocks folded, the role of each part (a name that a config's `targets` may use), "
        "widths, parameters and bytes, what trains, where adapters sit. Hugging Face models are built from their config "
        "alone: no weights are downloaded."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare MODEL and how to show it."""
        parser.add_argument("model", metavar="MODEL", help=MODEL)
        parser.add_argument(
            "--adapter", metavar="CONFIG", help="show where this adapter would sit: a preset, or a JSON file with a config"
        )
        parser.add_argument("--depth", type=_depth, metavar="N", help="levels to show below the model; all by default")
        parser.add_argument("--json", action="store_true", help="write the tree as JSON")

    def run(self, options: argparse.Namespace) -> None:
        """Build the model, add the adapter, write the tree. Raises: see `load_model` and `AdapterKit.add`."""
        kit = wrap(load_model(options.model))
        if options.adapter is not None:
            # The tree names the adapter: "pfeiffer" for the preset, "mine" for configs/mine.json.
            kit.add(Path(options.adapter).stem, options.adapter)
        tree = kit.tree(depth=options.depth)
        if options.json:
            sys.stdout.write(f"{json.dumps(tree.as_dict(), indent=2)}\n")
        else:
            show(tree)


def _depth(text: str) -> int:
    # Not `int(text)` alone, which takes "-1" and "1_0".
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a depth is a whole number, 0 or more; found {text!r}")
    return int(text)
