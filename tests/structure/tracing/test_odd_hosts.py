"""A look at a model leaves no trace, and never dies of its own: whatever a host does beside, its places are the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.structure.tracing.forward import forward
from adapterkit.structure.tracing.surroundings import not_compiled
from adapterkit.structure.tracing.tensors import is_plain

from ...hosts.odd import ODD, WIDTH, Labelled, NoText, Plain

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
PRESETS = ("pfeiffer", "houlsby", "lora")


def places(model: nn.Module, inputs: Any = X) -> dict[str, list[str]]:
    kit = ak.wrap(model, inputs)
    return {preset: [site.path for site in kit.sites(preset)] for preset in PRESETS}


def settings() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    return (
        *(cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision()),
        *(torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()),
    )


def held(model: nn.Module) -> dict[str, Any]:
    """What a model holds, as text: attributes, values of buffers, gradients, what generators would draw next."""
    plain = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    drawn = {name: getattr(model, name).__class__ for name in ("torchs", "numpys", "pythons") if name in plain}
    if drawn:
        states = (model.torchs.get_state().tolist(), model.numpys.bit_generator.state, model.pythons.getstate())
        plain |= dict(zip(drawn, states, strict=True))
    dense = {
        name: f"{tuple(b.shape)} {b._values() if b.is_sparse else b.tolist() if is_plain(b) and type(b) is Tensor else ''}"
        for name, b in model.named_buffers()
    }
    return {
        "attributes": {name: value if isinstance(value, NoText) else str(value) for name, value in plain.items()},
        "buffers": dense,
        "gradients": [p.grad is None for p in model.parameters()],
        "settings": settings(),
    }


@pytest.fixture(autouse=True)
def _as_they_were() -> Iterator[None]:
    """Tests that fail would leave settings to others."""
    before = settings()
    yield
    torch.set_default_dtype(before[4])
    torch.set_autocast_enabled("cpu", before[5])
    torch.set_float32_matmul_precision(before[3])
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[1], before[2]


@pytest.mark.parametrize("name", list(ODD))
def test_an_odd_host_has_the_places_of_a_plain_one_and_is_as_before(name: str) -> None:
    model = ODD[name]().eval()
    before = held(model)
    assert places(model) == places(Plain().eval())
    forward(model, X)
    assert held(model) == before


@pytest.mark.parametrize("name", list(ODD))
def test_an_odd_host_is_adapted_proven_and_saved(name: str, tmp_path: Path) -> None:
    kit = ak.wrap(ODD[name]().eval(), X)
    kit.add("a", "pfeiffer", bottleneck_size=2)
    kit.train_adapter("a")
    try:
        kit.verify(X)
        kit.save("a", tmp_path / "a")
    except ak.AdapterKitError as error:
        assert str(error)  # a refusal is right as well; an error of torch's is not
    kit.unwrap()


def test_a_number_before_the_features_is_passed_over() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.layer(x)
            return h.square().mean(), h

    model, x = Experts(), torch.randn(3, 6)
    kit = ak.wrap(model, x)
    kit.add("a", ak.BottleneckConfig(targets=[""], bottleneck_size=2))
    with torch.no_grad():
        for parameter in kit.parameters("a"):
            parameter.fill_(0.5)
    loss, h = model(x)
    kit.activate("a")
    adapted = model(x)
    assert torch.equal(adapted[0], loss)
    assert not torch.equal(adapted[1], h)


@pytest.mark.parametrize("make", [Tensor.mean, lambda h: h.argmax(-1)], ids=["a number", "integers"])
def test_a_host_without_features_is_refused(make: Any) -> None:
    class Without(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return make(super().forward(x))  # type: ignore[no-any-return]  # a tensor

    kit = ak.wrap(Without(6, 6), torch.randn(3, 6))
    with pytest.raises(ak.TargetError, match="has no floating-point tensor at its output"):
        kit.add("a", ak.BottleneckConfig(targets=[""], bottleneck_size=2))


def test_losses_of_rows_before_the_features_are_asked_about() -> None:
    class Losses(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = super().forward(x)
            return h.mean(-1), h

    kit = ak.wrap(Losses(6, 6), torch.randn(3, 6))
    with pytest.raises(ak.TargetError, match=r"shapes \(0,\): \(3,\), \(1,\): \(3, 6\).* by output="):
        kit.add("a", ak.BottleneckConfig(targets=[""], bottleneck_size=2))
    kit.add("a", ak.BottleneckConfig(targets=[""], bottleneck_size=2, output=1))


def test_what_a_subclass_is_made_of_is_known() -> None:
    """torch makes a new object of what each operation returns, and tells no one."""
    found = places(Plain().eval(), X.as_subclass(Labelled))
    assert found == places(Plain().eval())


def test_roles_inside_of_a_compiled_block_are_those_of_the_block() -> None:
    """It runs compiled before and after; a look that added hooks to what is compiled would see no module in it run."""
    roles = ("@attention.k", "@feedforward.first", "@feedforward.last")

    def found(model: nn.Module) -> list[str]:
        kit = ak.wrap(model, X)
        return [site.path.replace("_orig_mod.", "") for role in roles for site in kit.sites("lora", targets=[role])]

    compiled = Plain().eval()
    for name, block in compiled.blocks.named_children():
        compiled.blocks.register_module(name, torch.compile(block, backend="eager"))
    with torch.no_grad():
        compiled(X)
    assert found(compiled) == found(Plain().eval())


def test_looks_at_once_leave_the_compiler_as_it_was() -> None:
    torch._dynamo.reset()  # loads it
    stances = []
    first, second = not_compiled(), not_compiled()
    for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        step()
        stances.append(torch._dynamo.eval_frame._stance.stance)
    second.__exit__(None, None, None)
    stances.append(torch._dynamo.eval_frame._stance.stance)
    assert stances == ["force_eager"] * 3 + ["default"]


def test_a_class_may_have_a_train_that_returns_nothing() -> None:
    """As the backbones of mmcv have."""

    class Own(Plain):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)

    model = Own()
    model.eval()
    assert places(model) == places(Plain().eval())


def test_tokens_of_different_numbers_in_one_tensor_are_looked_at_or_refused() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.plain = nn.Parameter(torch.ones(WIDTH)), Plain()

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            x = torch.nested.nested_tensor([one, other], layout=torch.jagged) * self.scale
            return self.plain.inner(x).values()

    with pytest.raises(ak.TargetError, match="speaks of transformer blocks"):
        ak.wrap(Ragged().eval(), (torch.randn(3, WIDTH), torch.randn(5, WIDTH))).sites("pfeiffer")
