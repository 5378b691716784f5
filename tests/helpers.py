"""What tests of several rooms share beside their hosts: all presets, and what `unwrap` must restore."""

import ast
from pathlib import Path
from typing import Any

from torch import nn

from adapterkit.methods import UNION_PRESETS, presets


def one_spelling_of_each() -> list[str]:
    """The presets, each once: several names may lead to the same settings."""
    plain = {(method.name, repr(settings)): name for name, (method, settings) in reversed(presets().items())}
    unions = {members: name for name, members in reversed(UNION_PRESETS.items())}
    return [*reversed(plain.values()), *reversed(unions.values())]


PRESETS = one_spelling_of_each()


def trace_of(model: nn.Module) -> Any:
    """All that `unwrap` must restore, apart from outputs."""
    hooks = ["_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"]
    hooks += ["_forward_pre_hooks_with_kwargs", "_backward_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks"]
    modules = {
        path: (id(m), type(m), m.training, list(m.__dict__), [dict(getattr(m, name)) for name in hooks])
        for path, m in model.named_modules()
    }
    return modules, {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}, list(model.state_dict())


def typed_names(path: Path) -> set[str]:
    """The names that a file offers to type checkers: `from … import name as name`, and those of a file it takes all of."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level and [alias.name for alias in node.names] == ["*"]:
            names |= typed_names(path.parent / f"{str(node.module).replace('.', '/')}.py")
        elif isinstance(node, ast.ImportFrom) and node.level:
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
    return names
