"""Every kind of host: identity at init, changed when trained, gradients, save and restore, in train and eval."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak

from ..hosts.any_module import HOSTS, IDS, IMAGE, MASK, TOKENS, Wrapped, same, tensors
from ..hosts.tiny import randomise


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
