import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adapterkit.errors import CompatibilityError, ConfigError
from adapterkit.nn.functional.projections import parameter_projection
from adapterkit.nn.functional.slices import Slices
from adapterkit.nn.ia3 import IA3

from ..hosts.layers import LAYERS, convs, exact, geometry, layer, parts_of, randomise, run_merged, some_input

# torch says it of the host, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def ia3(host: nn.Module, **options: Any) -> IA3:
    p = geometry(host)
    width = p.in_features if options.get("scales") == "input" else p.out_features
    module = IA3(width, projection=p, dtype=host.weight.dtype, **options)
    randomise(module)
    return module


def scaled(module: IA3, x: Tensor, axis: int) -> Tensor:
    """What the hook does: add the delta, with the features last."""
    last = x.movedim(axis, -1)
    delta = module(last.to(module.compute_dtype), last)
    return (last + delta.to(x.dtype)).movedim(-1, axis)


def unmerged(host: nn.Module, module: IA3, z: Tensor) -> Tensor:
    axis = geometry(host).channel_axis
    return host(scaled(module, z, axis)) if module.scales == "input" else scaled(module, host(z), axis)


def test_every_feature_is_multiplied_by_its_factor() -> None:
    module, x = IA3(6).double(), torch.randn(2, 5, 6).double()
    randomise(module)
    exact(x + module(x, x), x * module.ia3_l)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scales", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_is_what_the_forward_computes(name: str, scales: str, dtype: torch.dtype) -> None:
    if (name, scales) == ("embedding", "input"):
        return
    host = layer(name).to(dtype)
    module, z = ia3(host, scales=scales), some_input(host)
    exact(unmerged(host, module, z), run_merged(host, module, z))


@given(convs(), st.sampled_from(["output", "input"]))
def test_every_geometry_of_a_conv_is_kept(host: nn.Module, scales: str) -> None:
    module, z = ia3(host, scales=scales), some_input(host)
    exact(unmerged(host, module, z), run_merged(host, module, z))


def test_the_bias_is_scaled_with_the_output_only() -> None:
    host = nn.Linear(3, 4)
    tensors = {"weight": host.weight, "bias": host.bias}
    output, inner = ia3(host), ia3(host, scales="input")
    torch.testing.assert_close(output.merged(tensors)["bias"], host.bias * output.ia3_l)
    assert set(inner.merged(tensors)) == {"weight"}
    assert set(output.merged({"weight": host.weight})) == {"weight"}


@given(parts_of(9), st.sampled_from(["linear", "Conv1D"]))
def test_only_the_parts_are_scaled(slices: Slices, name: str) -> None:
    host = layer(name).double()
    module, z = ia3(host, slices=slices), some_input(host)
    factors = torch.ones(9).double()
    factors[sorted(row for _, ranges in slices for r in ranges for row in range(*r))] = module.ia3_l.detach()
    exact(unmerged(host, module, z), host(z) * factors)
    exact(unmerged(host, module, z), run_merged(host, module, z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_adapter_is_the_identity(dtype: torch.dtype, site: torch.dtype) -> None:
    x = torch.randn(4, 6, dtype=site)
    module = IA3(6, slices=(("k", ((1, 3),)),), dtype=dtype)
    assert torch.equal(scaled(module, x, -1), x)
    scaled(module, x, -1).sum().backward()
    assert module.ia3_l.grad.all()


def test_a_bare_parameter_is_scaled_in_place() -> None:
    weight = torch.randn(2, 4, 3)
    for scales, width, axes in (("output", 4, (1, 4, 1)), ("input", 3, (1, 1, 3))):
        module = IA3(width, scales=scales, projection=parameter_projection((2, 4, 3)))  # type: ignore[arg-type]  # parametrised
        assert torch.equal(module.adapted(weight.bfloat16()), weight.bfloat16())
        randomise(module)
        torch.testing.assert_close(module.adapted(weight), weight * module.ia3_l.view(axes))


def test_what_does_not_fit_is_refused() -> None:
    embedding = nn.Embedding(5, 4, max_norm=1.5)
    with pytest.raises(ConfigError, match=r"input of an embedding is ids, .* found scales='input'"):
        IA3(5, scales="input", projection=geometry(embedding))
    with pytest.raises(ConfigError, match="the output of this linear has 4 features; found width=3"):
        IA3(3, projection=geometry(nn.Linear(3, 4)))
    with pytest.raises(CompatibilityError, match=r"no projection .* scales 3 features of the module's output"):
        IA3(3).merged({"weight": torch.ones(3)})
    with pytest.raises(CompatibilityError, match=r"max_norm=1\.5 would shorten"):
        ia3(embedding).merged({"weight": embedding.weight})


def test_it_compiles_runs_under_autocast_and_copies() -> None:
    module, x = IA3(6, slices=(("k", ((1, 3),)),)), torch.randn(4, 6)
    randomise(module)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x), module(x, x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x, x), compiled(x, x))
    twin = copy.deepcopy(module)
    module.reset_parameters()
    assert twin(x, x).any()
    assert not module(x, x).any()
