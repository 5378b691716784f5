import copy

import pytest
import torch

from adapterkit.nn.parameter_delta import ParameterDelta

from ..hosts.layers import randomise


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
@pytest.mark.parametrize("host", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_new_delta_changes_no_bit_and_a_trained_one_is_added(shape: tuple[int, ...], host: torch.dtype) -> None:
    weight = torch.randn(shape, dtype=host)
    module = ParameterDelta(shape, dtype=torch.float32)
    assert torch.equal(module.adapted(weight), weight)
    randomise(module)
    wide = torch.promote_types(host, torch.float32)
    expected = (weight.to(wide) + module.delta.to(wide)).to(host)
    assert module.adapted(weight).dtype == host
    assert torch.equal(module.adapted(weight), expected)
    assert torch.equal(module.merged({"bias": weight})["bias"], expected)
    module.adapted(weight).sum().backward()
    assert torch.equal(module.delta.grad, torch.ones(shape))


def test_it_follows_the_path_that_the_parameter_would_take() -> None:
    """Some steps of SGD with momentum on the delta, and on the parameter itself."""
    bias, target = torch.randn(4), torch.randn(4)
    own, module = bias.clone().requires_grad_(), ParameterDelta((4,))
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in (own, module.delta)]
    for _ in range(5):
        for optimizer, value in zip(optimizers, (own, module.adapted(bias)), strict=True):
            optimizer.zero_grad()
            (value - target).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(module.adapted(bias), own)


def test_it_compiles_copies_and_resets() -> None:
    module, weight = ParameterDelta((3,)), torch.randn(3)
    randomise(module)
    compiled = torch.compile(module.adapted, fullgraph=True, backend="eager")
    assert torch.equal(compiled(weight), module.adapted(weight))
    twin = copy.deepcopy(module)
    module.reset_parameters()
    assert torch.equal(module.adapted(weight), weight)
    assert not torch.equal(twin.adapted(weight), weight)
    assert repr(module) == "ParameterDelta((3,))"
