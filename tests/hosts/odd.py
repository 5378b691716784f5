"""Hosts at which looking may die, or leave a trace: each computes what `Plain` does, and something odd beside it."""

import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .tiny import PreNormBlock

WIDTH = 8


class Plain(nn.Module):
    """Two blocks that take (batch, seq, hidden). `prepare` gives it something when it is made, `beside` is run in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([PreNormBlock(WIDTH) for _ in range(2)])
        self.prepare()

    def prepare(self) -> None:
        """Nothing here."""

    def beside(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.beside(self.inner(x))
        for block in self.blocks:
            x = block(x)
        return x


def holding(
    make: Callable[[], Tensor], change: Callable[[nn.Module, Tensor], Any] = lambda _model, _x: None
) -> type[Plain]:
    """A host that holds a buffer, and does something with it in its forward."""

    class Holding(Plain):
        def prepare(self) -> None:
            self.register_buffer("held", make(), persistent=False)

        def beside(self, x: Tensor) -> Tensor:
            change(self, x)
            return x

    return Holding


def doing(function: Callable[[Any, Tensor], Any]) -> type[Plain]:
    """A host that goes on with what a function makes of its hidden states."""

    class Doing(Plain):
        def prepare(self) -> None:
            self.calls, self.history, self.deep = 0, [], {"by name": [0]}  # type: ignore[var-annotated]  # anything
            self.last, self.counted = deque([0], maxlen=2), Counter(a=1)
            self.draws = [0.0]
            self.torchs, self.numpys, self.pythons = torch.Generator(), numpy.random.default_rng(1), random.Random(1)  # noqa: S311  # no secrets

        def beside(self, x: Tensor) -> Tensor:
            made = function(self, x)
            return made if isinstance(made, Tensor) else x

    return Doing


def _count(model: Any, x: Tensor) -> None:
    model.calls += 1
    model.history.append(x)
    model.deep["by name"].append(x)
    model.last.append(1)
    model.counted["a"] += 1


def _draw(model: Any, _x: Tensor) -> None:
    torch.rand(1, generator=model.torchs), model.numpys.random(), model.pythons.random()


def _set(_model: Any, _x: Tensor) -> None:
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.float64)
    torch.set_autocast_enabled("cpu", True)


def _backward(model: Any, _x: Tensor) -> None:
    with torch.enable_grad():
        for parameter in model.inner.parameters():
            (parameter**2).sum().backward() if parameter.requires_grad else None


class Labelled(torch.Tensor):
    """A subclass that adds nothing."""


class Wrapper(torch.Tensor):
    """A subclass that holds its values in another tensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]  # torch's
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bare = torch.utils._pytree.tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {}))
        return torch.utils._pytree.tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, func(*bare[0], **bare[1]))


class NoText:
    def __repr__(self) -> str:
        raise RuntimeError("it cannot be written")


class NoConfig(Plain):
    @property
    def config(self) -> Any:
        raise RuntimeError("it has none yet")


def _mask(_model: Any, x: Tensor) -> Tensor:
    """All of the first row is masked, so that its softmax is NaN."""
    return x + torch.full_like(x[:1, :, :1], -torch.inf).softmax(1)[0].isnan() * torch.nan


# Hosts that are to be seen as `Plain` is.
ODD: dict[str, type[Plain]] = {
    "sparse": holding(lambda: torch.eye(3).to_sparse()),
    "sparse, changed": holding(lambda: torch.eye(3).to_sparse(), lambda model, _x: model.held.mul_(2)),
    "sparse rows": holding(lambda: torch.eye(3).to_sparse_csr()),
    "ragged": holding(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
    "not a number": holding(lambda: torch.full((3,), torch.nan)),
    "resized": holding(lambda: torch.zeros(1), lambda model, x: model.held.resize_(x.shape[1]).fill_(1)),
    "given other data": holding(lambda: torch.zeros(1), lambda model, x: setattr(model.held, "data", torch.ones(7))),
    "replaced": holding(lambda: torch.zeros(1), lambda model, x: setattr(model, "held", torch.ones(7))),
    "registered": doing(lambda model, x: model.register_buffer("new", torch.ones(3))),
    "wrapped": holding(lambda: Wrapper(torch.ones(3))),
    "counting": doing(_count),
    "drawing": doing(_draw),
    "setting": doing(_set),
    "backward inside": doing(_backward),
    "numpy": doing(lambda _model, x: x + float(numpy.abs(x.detach().numpy()).max())),
    "numbers": doing(lambda _model, x: x / x.abs().max().item() + x.argmax(-1).tolist()[0][0]),
    "out of torch and back": doing(lambda _model, x: torch.from_numpy(x.detach().numpy())),
    "subclass": doing(lambda _model, x: x.as_subclass(Labelled)),
    "vmap of a module": doing(lambda model, x: torch.vmap(model.inner)(x)),
    "functional call": doing(
        lambda model, x: torch.func.functional_call(model.inner, {"weight": model.inner.weight}, (x,))
    ),
    "gradient inside": doing(lambda _model, x: x + torch.func.grad(lambda y: (y**2).sum())(x)),
    "all of it not a number": doing(lambda _model, x: x * torch.nan),
    "a row not a number": doing(_mask),
    "unwritable": doing(lambda model, _x: setattr(model, "odd", [NoText()])),
    "no config": NoConfig,
}
