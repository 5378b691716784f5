"""Paths of modules: which there are, what lies around them, which come nearest."""

from collections.abc import Sequence

from torch import nn

__all__ = ["SITE", "ancestors", "modules_by_path", "nearest_to"]


# The name under which a host holds its AdapterSite: nothing below it is part of the user's model.
SITE = "_adapterkit"


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the user's own model under each of its names; the model itself is ''.

    Left out: what adapterkit added, and the insides of `torch.nn.utils.parametrize`.
    """
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if SITE not in (parts := path.split(".")) and "parametrizations" not in parts
    }


def nearest_to(path: str, candidates: Sequence[str]) -> list[str]:
    """Of these paths, the ones that share the longest run of leading components with `path`."""

    def shared(candidate: str) -> int:
        pairs = zip(path.split("."), candidate.split("."), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(candidate.split(".")))

    longest = max(map(shared, candidates), default=0)
    return [candidate for candidate in candidates if shared(candidate) == longest]


def ancestors(path: str) -> list[str]:
    """The path and those of all modules around it, innermost first, the root's '' last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
