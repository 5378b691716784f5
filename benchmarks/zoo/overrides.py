"""What single types need beyond the rules of `models.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# Settings of a config, of sub-configs by a dotted name.
SETTINGS: dict[str, dict[str, Any]] = {}

# Keyword inputs for a built model.
INPUTS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {}

# Types that cannot run on this kind of machine, and why.
UNRUNNABLE: dict[str, str] = {}
