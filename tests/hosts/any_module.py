"""A host of every kind that torch has and of every kind of output, with an input for each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from adapterkit.structure import pytree


class Wrapped(nn.Module):
    """A host inside a model, called as `call` says."""

    def __init__(self, host: nn.Module, call: Callable[[nn.Module, Any], Any] = lambda host, x: host(x)) -> None:
        super().__init__()
        self.host, self.call = host, call

    def forward(self, x: Any) -> Any:
        return self.call(self.host, x)


class Returns(nn.Module):
    """A host that returns what `make` puts around its tensor."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(6, 6), make

    def forward(self, hidden: Tensor, scale: float = 1.0) -> Any:
        return self.make(self.linear(hidden) * scale)


class Named(NamedTuple):
    flag: bool
    hidden: Tensor


@dataclass
class Made:
    hidden: Tensor
    note: str = "kept"


def first(host: nn.Module, x: Tensor) -> Tensor:
    return host(x)[0]


def twice(host: nn.Module, x: Tensor) -> Tensor:
    return host(host(x))


def keyword(host: nn.Module, x: Tensor) -> Tensor:
    return host(scale=0.5, hidden=x)


DRAW = torch.Generator().manual_seed(0)  # the same values whatever was imported before
TOKENS, IMAGE, SIGNAL, IDS = (
    torch.randn(2, 5, 6, generator=DRAW),
    torch.randn(2, 6, 7, 7, generator=DRAW),
    torch.randn(2, 6, 9, generator=DRAW),
    torch.randint(0, 9, (2, 5), generator=DRAW),
)
MASK = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
HOSTS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "linear": (lambda: nn.Linear(6, 4), TOKENS),
    "layer norm": (lambda: nn.LayerNorm(6), TOKENS),
    "rms norm": (lambda: nn.RMSNorm(6), TOKENS),
    "embedding": (lambda: nn.Embedding(9, 6), IDS),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), SIGNAL),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, groups=2), IMAGE),
    "conv2d, one unbatched image": (lambda: nn.Conv2d(6, 8, 3), IMAGE[0]),
    "transposed conv": (lambda: nn.ConvTranspose2d(6, 3, 2), IMAGE),
    "batch norm": (lambda: nn.BatchNorm2d(6), IMAGE),
    "batch norm of features": (lambda: nn.BatchNorm1d(6), TOKENS[:, 0]),
    "group norm": (lambda: nn.GroupNorm(2, 6), IMAGE),
    "gru": (lambda: nn.GRU(6, 3, bidirectional=True, batch_first=True), TOKENS),
    "lstm": (lambda: nn.LSTM(6, 5, num_layers=2), TOKENS),
    "lstm with projection": (lambda: nn.LSTM(6, 5, proj_size=2), TOKENS),
    "lstm, packed": (lambda: nn.LSTM(6, 5), pack_sequence([TOKENS[0], TOKENS[1, :3]])),
    "lstm cell": (lambda: nn.LSTMCell(6, 5), TOKENS[:, 0]),
    "gru cell": (lambda: nn.GRUCell(6, 5), TOKENS[:, 0]),
    "multi-head attention": (lambda: Wrapped(nn.MultiheadAttention(6, 2), lambda host, x: host(x, x, x)), TOKENS),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0), TOKENS),
    "tuple": (lambda: Wrapped(Returns(lambda x: (x, None, 3))), TOKENS),
    "list": (lambda: Wrapped(Returns(lambda x: [IDS, x])), TOKENS),
    "mapping": (lambda: Wrapped(Returns(lambda x: {"ids": IDS, "x": x})), TOKENS),
    "named tuple": (lambda: Wrapped(Returns(lambda x: Named(True, x))), TOKENS),
    "dataclass": (lambda: Wrapped(Returns(Made)), TOKENS),
    "called by keyword": (lambda: Wrapped(Returns(lambda x: x), keyword), TOKENS),
    "called twice": (lambda: Wrapped(nn.Linear(6, 6), twice), TOKENS),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), TOKENS),
    "identity": (lambda: Wrapped(nn.Identity()), TOKENS),
    "dropout": (lambda: Wrapped(nn.Dropout(0.0)), TOKENS),
    "pooling": (lambda: Wrapped(nn.MaxPool2d(2)), IMAGE),
    "sequential": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 3))), TOKENS),
    "block of convolutions": (lambda: Wrapped(Residual()), IMAGE),
}


class Residual(nn.Module):
    """The block of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for _, item in pytree._items(value) for t in tensors(item)]


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and all(map(torch.equal, tensors(one), tensors(other)))
