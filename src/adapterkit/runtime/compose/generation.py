"""Whether a model runs inside `generate` of transformers, which makes demands on what it returns."""

import sys
from types import FrameType

import torch

__all__ = ["is_generating"]


def is_generating() -> bool:
    """Whether `generate` of transformers is running the model; never while a compiler traces it."""
    if torch.compiler.is_compiling():
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "generate":
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("transformers.")
