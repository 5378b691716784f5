import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from adapterkit.nn.functional.projections import Projection, parameter_projection, project, projection_of

from ...hosts.layers import LAYERS, Conv1D, convs, geometry, layer, some_input

# torch says it of the host, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.mark.parametrize("name", LAYERS)
def test_project_does_what_the_host_does(name: str) -> None:
    host = layer(name)
    z = some_input(host)
    bias = getattr(host, "bias", None)
    torch.testing.assert_close(project(geometry(host), z, host.weight, bias), host(z))


@given(convs())
def test_project_knows_every_geometry_of_a_conv(host: nn.Module) -> None:
    z = some_input(host)
    p = geometry(host)
    assert torch.equal(project(p, z, host.weight, host.bias), host(z))
    assert (p.in_features, p.out_features, p.kernel) == (host.in_channels, host.out_channels, host.kernel_size)


def test_a_projection_knows_its_axes_and_sizes() -> None:
    assert projection_of(nn.Linear(3, 5)) == Projection("linear", (5, 3), 0, 1)
    assert projection_of(Conv1D(5, 3)) == Projection("linear", (3, 5), 1, 0)
    embedding = geometry(nn.Embedding(11, 4, padding_idx=-1, max_norm=2.0, norm_type=1.0, scale_grad_by_freq=True))
    assert (embedding.in_features, embedding.out_features, embedding.padding_idx) == (11, 4, 10)
    assert (embedding.max_norm, embedding.norm_type, embedding.scale_grad_by_freq) == (2.0, 1.0, True)
    bare = parameter_projection((2, 7, 3))
    assert (bare.kind, bare.out_features, bare.in_features, bare.kernel) == ("parameter", 7, 3, ())
    assert [geometry(layer(n)).channel_axis for n in ("linear", "conv1d", "conv2d", "embedding")] == [-1, -2, -3, -1]
    assert len({geometry(nn.Linear(3, 5)), geometry(nn.Linear(3, 5)), geometry(nn.Conv1d(3, 5, 1))}) == 2


def test_subclasses_and_parametrised_layers_are_known() -> None:
    plain = Projection("linear", (5, 3), 0, 1)
    assert projection_of(parametrizations.weight_norm(nn.Linear(3, 5))) == plain
    assert projection_of(nn.modules.linear.NonDynamicallyQuantizableLinear(3, 5)) == plain


def test_a_packed_weight_is_known_by_the_sizes_that_its_layer_says() -> None:
    host = nn.Linear(3, 5)
    host.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert projection_of(host) == Projection("linear", (5, 3), 0, 1)


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 8


class Standardised(nn.Conv1d):
    def _conv_forward(self, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(z, weight - weight.mean(), bias)


def test_a_forward_of_its_own_is_told() -> None:
    assert geometry(Scaled(5, 3)).has_own_forward
    assert geometry(Standardised(5, 3, 1)).has_own_forward
    assert not any(geometry(layer(name)).has_own_forward for name in LAYERS)


@pytest.mark.parametrize(
    "host",
    [
        nn.ConvTranspose1d(2, 3, 1),
        nn.Bilinear(2, 2, 2),
        nn.LayerNorm(3),
        nn.EmbeddingBag(3, 2),
        nn.ReLU(),
        nn.LazyLinear(3),
    ],
    ids=lambda host: type(host).__name__,
)
def test_other_modules_are_no_projections(host: nn.Module) -> None:
    assert projection_of(host) is None
