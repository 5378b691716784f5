"""One value on its way, within one call, from the hook that sees it to the site that reads it."""

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import CompatibilityError
from .this_call import THIS_CALL

__all__ = ["Handover"]

T = TypeVar("T")


class Handover(Generic[T]):
    """Carry a value from the hook that sees it to the site that reads it: the residual stream, or labels for heads.

    Per thread in eager mode; as a plain attribute under `torch.compile`, which sees it set and cleared in one graph.

    Attributes:
        wanted: What the site's module wants of the call: True for a stream, a `HeadRequest` for heads. None while that
            module does not act: nothing is handed over then.
    """

    def __init__(self) -> None:
        self.wanted: Any = None
        self._traced: T | None = None

    def give(self, value: T) -> None:
        """Leave the value for the site."""
        if torch.compiler.is_compiling():
            self._traced = value
        elif not isinstance(value, Tensor):
            THIS_CALL.handed[id(self)] = value, None
        elif value.is_inference():  # counts no versions, so that a change in place could not be told: a copy has none
            THIS_CALL.handed[id(self)] = value.clone(), None
        else:
            THIS_CALL.handed[id(self)] = value, value._version

    def take(self) -> T | None:
        """Take the value away; None if none was left.

        Raises:
            CompatibilityError: it is a tensor that the model has changed in place since it was left.
        """
        # torch.compile runs the hooks of the outermost module as graphs of their own: the hook that gave may have been
        # compiled and the one that takes not, or the other way round. So both are asked.
        traced, self._traced = self._traced, None
        if traced is not None:
            return traced
        value, version = THIS_CALL.handed.pop(id(self), (None, None))
        if version is not None and value._version != version:
            raise CompatibilityError(
                f"the model changes its residual stream in place before the adapter reads it: a tensor of shape "
                f"{tuple(value.shape)}, changed {value._version - version} times; adapt another site"
            )
        return value  # type: ignore[no-any-return]  # what was given

    def peek(self) -> T | None:
        """Return the value and leave it there; None if none was left.

        For ways of acting whose hosts may run several times in one call of the model, each time with the same value. A
        tensor that the model has changed in place since is not noticed, as it is by `take`.
        """
        return THIS_CALL.handed.get(id(self), (None, None))[0] if self._traced is None else self._traced

    def drop(self) -> None:
        """Let go of the value, if nobody took it."""
        self._traced = None
        THIS_CALL.handed.pop(id(self), None)
