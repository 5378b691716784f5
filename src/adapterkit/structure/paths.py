"""Paths of modules: which there are, what lies around them, which come nearest.

A path is a module's name as `model.named_modules()` gives it: "blocks.0.attention", and "" for the model itself.
"""

from collections.abc import Sequence

from torch import nn

__all__ = ["SITE", "ancestors", "modules_by_path", "nearest_to"]


# The name under which a host holds its AdapterSite: nothing below it is part of the user's model.
SITE = "_adapterkit"


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Map each path in the user's own model to its module; a module under two names stands there twice.

    Left out is what adapterkit added, and the insides of `torch.nn.utils.parametrize`, which compute weights and no hidden
    states.
    """
    return {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if SITE not in (parts := path.split(".")) and "parametrizations" not in parts
    }


def nearest_to(path: str, candidates: Sequence[str]) -> list[str]:
    """Return those of the candidates that share the most leading components with `path`.

    Example: of "a.b.x" and "a.c.x", "a.b.x" is nearer to "a.b.y".
    """

    def shared(candidate: str) -> int:
        # Where one is the other's beginning, no pair differs, and all of the candidate is shared.
        pairs = zip(path.split("."), candidate.split("."), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(candidate.split(".")))

    longest = max(map(shared, candidates), default=0)
    return [candidate for candidate in candidates if shared(candidate) == longest]


def ancestors(path: str) -> list[str]:
    """Return the path and those of all modules around it, innermost first: "a.b" gives ["a.b", "a", ""]."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
