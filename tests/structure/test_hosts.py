"""Every kind of host: identity at init, changed when trained, gradients, save and restore, in train and eval."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import adapterkit as ak
from adapterkit.structure import pytree
from adapterkit.structure.hosts import channel_axis

from ..conftest import randomise


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


TOKENS, IMAGE, SIGNAL, IDS = (
    torch.randn(2, 5, 6),
    torch.randn(2, 6, 7, 7),
    torch.randn(2, 6, 9),
    torch.randint(0, 9, (2, 5)),
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


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("training", [True, False])
def test_any_host_is_adapted_and_restored(name: str, training: bool, tmp_path: Path) -> None:
    make, x = HOSTS[name]
    model = make().train(training)
    target = "host" if isinstance(model, Wrapped) else ""
    twin = copy.deepcopy(model)
    expected = copy.deepcopy(model)(x)
    kit = ak.wrap(model, example_inputs=(x,))
    kit.add("a", ak.BottleneckConfig(targets=[target], bottleneck_size=3, non_linearity="gelu"))
    kit.activate("a")
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        assert same(model(x), expected), "identity at init"
    kit.train_adapter("a")
    model.eval()
    plain = twin.eval()(x)
    randomise(kit, "a")
    changed = model(x)
    with torch.no_grad():  # torch chooses the kernel of a recurrent layer by what needs a gradient
        silent = model(x)
    assert not same(changed, plain)
    assert type(changed) is type(plain)
    sum(t.sum() for t in tensors(changed) if t.is_floating_point() and t.requires_grad).backward()
    assert all(p.grad is not None for p in kit.parameters("a"))
    kit.verify().require()

    other = ak.wrap(twin)
    other.activate(other.load(kit.save("a", tmp_path)))
    other.freeze()
    with torch.no_grad():
        assert same(twin(x), silent), "saved and loaded, without example inputs"
    kit.unwrap()
    assert same(model.eval()(x), plain)


@pytest.mark.parametrize("host", ["linear", "conv1d", "conv2d", "gru", "layer norm"])
def test_standard_layers_need_no_example_inputs_and_agree_with_them(host: str) -> None:
    make, x = HOSTS[host]
    model = make()
    for config in ({"targets": [""]}, {"targets": [""], "at": "input"}):
        [told], [seen] = (ak.wrap(make(), inputs).sites(ak.BottleneckConfig(**config)) for inputs in (None, (x,)))
        assert (told.width, told.input_width, told.axis) == (seen.width, seen.input_width, seen.axis)
        assert told.width == (model(x) if config == {"targets": [""]} and host != "gru" else x).shape[told.axis]


def test_the_channels_of_an_image_are_adapted_pixel_by_pixel() -> None:
    model = nn.Conv2d(6, 8, 3)
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=[""], bottleneck_size=3))
    randomise(kit, "a")
    y = model(IMAGE)
    with kit.active("a"):
        adapted = model(IMAGE)
    adapter = model._adapterkit.first_module("a")
    pixel = y[1, :, 2, 3]
    torch.testing.assert_close(adapted[1, :, 2, 3], pixel + adapter(pixel, pixel))


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), (2, 6, 5, 5), 1),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm(6)), (2, 5, 5, 6), -1),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm(6)), (2, 6, 5, 6), None),
        (nn.Sequential(nn.Conv1d(6, 6, 3), nn.Linear(6, 4)), (2, 5, 4), -1),
        (nn.ReLU(), (2, 6, 5, 5), None),
        (nn.ReLU(), (2, 5, 6), -1),
        (nn.Dropout2d(), (2, 6, 5, 5), 1),
    ],
)
def test_the_feature_axis_is_told_by_what_a_module_holds_or_left_open(
    module: nn.Module, shape: tuple[int, ...], axis: int | None
) -> None:
    assert channel_axis(module, shape) == axis


def test_a_feature_axis_that_cannot_be_told_is_asked_for() -> None:
    model = Wrapped(nn.Identity())
    kit = ak.wrap(model, IMAGE)
    with pytest.raises(ak.TargetError, match=r"which axis of 'host'.*\(2, 6, 7, 7\).*channel_axis=1"):
        kit.add("a", ak.BottleneckConfig(targets=["host"]))
    kit.add("a", ak.BottleneckConfig(targets=["host"], channel_axis=1))
    assert kit.sites(kit.adapters["a"])[0].width == 6


def test_output_names_another_tensor_of_several() -> None:
    model = Wrapped(nn.LSTM(6, 5))
    kit = ak.wrap(model, TOKENS)
    kit.add("a", ak.BottleneckConfig(targets=["host"], output=(1, 0), bottleneck_size=2))
    out, (h, c) = model(TOKENS)
    randomise(kit, "a")
    kit.activate("a")
    new_out, (new_h, new_c) = model(TOKENS)
    assert torch.equal(out, new_out)
    assert torch.equal(c, new_c)
    assert not torch.equal(h, new_h)


def test_input_names_another_argument_however_it_is_passed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(6, 6)

        def forward(self, bias: Tensor, hidden: Tensor) -> Tensor:
            return self.w(hidden) + bias

    host = Two()
    bias, hidden = torch.zeros(6), TOKENS
    kit = ak.wrap(host, (bias, hidden))
    kit.add("a", ak.BottleneckConfig(targets=[""], at="input", input="hidden", bottleneck_size=2))
    randomise(kit, "a")
    kit.activate("a")
    by_position, by_keyword = host(bias, hidden), host(hidden=hidden, bias=bias)
    assert torch.equal(by_position, by_keyword)
    kit.deactivate()
    assert not torch.equal(by_position, host(bias, hidden))
    assert kit.sites(kit.adapters["a"])[0].input == (1, "hidden")


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("target", "placement"),
    [
        ("linear2", ""),
        ("self_attn", ""),
        ("norm1", ""),
        ("layers.*", ""),
        ("", ""),
        ("linear2", "parallel"),
        ("layers.*", "parallel"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor is True:UserWarning", "ignore:.*nested tensors is in prototype")
def test_a_transformer_encoder_is_adapted_in_train_and_eval(
    target: str, placement: str, norm_first: bool, mask: Tensor | None
) -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(6) if norm_first else None)
    kit = ak.wrap(encoder)
    beside = {"placement": "parallel"} if placement == "parallel" else {}
    outputs: dict[object, Tensor] = {}
    for training in (True, False):
        with torch.no_grad():
            outputs[training] = encoder.train(training)(TOKENS, src_key_padding_mask=mask)
    kit.add("a", ak.BottleneckConfig(targets=[target], bottleneck_size=3, non_linearity="hardswish", **beside))
    kit.activate("a")
    for training in (True, False):
        encoder.train(training)
        with torch.no_grad():
            torch.testing.assert_close(encoder(TOKENS, src_key_padding_mask=mask), outputs[training], atol=1e-6, rtol=1e-5)
    randomise(kit, "a")
    kit.freeze()
    results = []
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                results.append(encoder.train(training)(TOKENS, src_key_padding_mask=mask))
    kept = torch.ones_like(MASK) if mask is None else ~mask
    for result in results[1:]:
        torch.testing.assert_close(result[kept], results[0][kept], atol=1e-5, rtol=1e-5)
    assert (results[0] - outputs[True])[kept].abs().max() > 1e-3, "the fast path must not skip the adapter"
    results[2].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in kit.parameters("a"))


def test_a_tied_head_is_adapted_without_its_twin() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    model = Tied()
    kit = ak.wrap(model)
    logits = model(IDS)
    kit.add("a", ak.BottleneckConfig(targets=["head"], bottleneck_size=2))
    randomise(kit, "a")
    kit.activate("a")
    adapter = model.head._adapterkit.first_module("a")
    torch.testing.assert_close(model(IDS), logits + adapter(logits, logits))
    assert model.head.weight is model.embed.weight
    assert kit.summary().base_parameters == 54


def test_a_module_under_two_names_is_one_site() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(nn.ModuleDict({"a": layer})["a"], nn.ReLU(), layer)
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["0", "2"], bottleneck_size=2))
    assert kit.summary().adapters[0].sites == 1
    kit.verify(TOKENS)
    kit.activate("a")
    assert kit.verify(TOKENS).fired == {"0": 2}


def test_a_hook_that_was_there_first_sees_what_the_module_returns_with_its_adapter() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    model[1].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["0"], bottleneck_size=2))
    randomise(kit, "a")
    kit.activate("a")
    model(torch.randn(4, 3))
    assert torch.equal(*seen)
