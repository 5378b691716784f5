"""Whether each row of a batch gets what its own adapter alone would give it, on an architecture of the zoo."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import adapterkit as ak

from .gates import SMALL, GateError, Inputs, outputs, randomise

__all__ = ["check_rows"]

_PRESETS = {"one": ("pfeiffer", SMALL), "other": ("houlsby", SMALL)}
# Of the largest number. In float64, since deep models with random weights magnify rounding; some compute in float32 inside.
_TOLERANCE, _TOLERANCE_OF_FLOAT32 = 1e-5, 2e-4
_Apart = tuple[tuple[int, int], ...]  # the outputs whose rows are apart: their index, and the axis of the rows


def check_rows(model: nn.Module, inputs: Inputs) -> str:
    """What came of two adapters in one batch of two rows: "each as alone", or why that cannot be compared, or is refused.

    Raises:
        GateError: a row got something else.
    """
    if any(isinstance(value, Tensor) and value.shape[:1] != (2,) for value in inputs.values()):
        return "the inputs are not those of two rows"
    model, inputs, tolerance = _in_double(copy.deepcopy(model), inputs)
    rows = [{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()} for i in range(2)]
    try:
        base = [outputs(model, row) for row in rows]
    except Exception:  # whatever a model says of a single row
        return "the base does not run on one row"
    apart = tuple(_apart(outputs(model, inputs), base, tolerance))
    if not apart:
        return "the base mixes the rows"
    kit = ak.wrap(model, example_inputs=inputs)
    alone = {None: base}
    try:
        for name, (preset, settings) in _PRESETS.items():
            kit.add(name, preset, **settings)
            randomise(kit, name, seed=len(name))
            with kit.active(name):
                alone[name] = [outputs(model, row) for row in rows]
        for tree, wanted in (
            (ak.Rows(["one", "other"]), ("one", "other")),
            (ak.Rows([None, "one"]), (None, "one")),
            (ak.BatchSplit("other", "one"), ("other", "one")),
            (ak.Parallel("one", "other"), ("one", "one", "other", "other")),
        ):
            with kit.active(tree):
                found = outputs(model, inputs)
            _compare(tree, found, [alone[name][row % 2] for row, name in enumerate(wanted)], apart, tolerance)
    except ak.CompatibilityError as error:
        return f"refused: {error}"
    finally:
        kit.unwrap()
    return "each as alone"


def _in_double(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs, float]:
    """The model and its inputs in float64, if it runs so, and how far numbers may lie apart."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    try:
        outputs(model.double(), wide)
    except Exception:  # its own dtypes, written into its code
        return model.float(), inputs, _TOLERANCE_OF_FLOAT32
    return model, wide, _TOLERANCE


def _apart(both: Sequence[Tensor], alone: Sequence[Sequence[Tensor]], tolerance: float) -> Iterator[tuple[int, int]]:
    """The outputs of the base in which each row is what it is alone, with the axis of the rows."""
    if not len(both) == len(alone[0]) == len(alone[1]):
        return
    for index, tensor in enumerate(both):
        for axis in range(min(2, tensor.dim())):
            rows = [row[index] for row in alone]
            are_rows = len({row.shape for row in rows}) == 1 and rows[0].shape[axis : axis + 1] == (1,)
            if are_rows and _close(tensor, rows, axis, tolerance):
                yield index, axis
                break


def _compare(tree: Any, found: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], apart: _Apart, tolerance: float) -> None:
    for index, axis in apart:
        if len({row[index].shape for row in rows}) > 1:
            continue  # as long as its numbers say, as sound may be
        if len(found) != len(rows[0]) or not _close(found[index], [row[index] for row in rows], axis, tolerance):
            raise GateError(f"{tree!r}: a row of output {index} is not what its adapter alone gives it")


def _close(tensor: Tensor, rows: Sequence[Tensor], axis: int, tolerance: float) -> bool:
    together = torch.cat(list(rows), axis)
    scale = max(1.0, together.abs().max().item())
    return tensor.shape == together.shape and torch.allclose(tensor, together, tolerance, tolerance * scale, equal_nan=True)
