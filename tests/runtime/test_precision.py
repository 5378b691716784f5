"""Devices, dtypes, autocast and torch.compile."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak

from ..hosts.any_module import HOSTS, same, tensors
from ..hosts.tiny import PostNormBlock, PreNormBlock, Tiny, randomise

CONFIG = ak.BottleneckConfig(targets=["attention.out", "down"], bottleneck_size=3)
PLACES: dict[str, tuple[type[nn.Module], dict[str, object]]] = {
    "output": (PostNormBlock, {"targets": ["attention.out", "down"]}),
    "tuple": (PostNormBlock, {"targets": ["attention"]}),
    "renormalised": (PostNormBlock, {"targets": ["norm_1", "norm_2"], "at": "renormalised"}),
    "parallel": (PreNormBlock, {"targets": ["mlp.0"], "placement": "parallel"}),
    "residual": (PreNormBlock, {"targets": ["mlp"], "residual": "norm_2"}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_adapter_is_float32_on_a_half_base_and_float64_on_a_double_one(dtype: torch.dtype, ids: Tensor) -> None:
    model = Tiny(PostNormBlock).to(dtype)
    expected = model(ids)
    kit = ak.wrap(model)
    kit.add("a", CONFIG)
    kit.add("b", CONFIG, dtype="bfloat16")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in kit.parameters("a")} == {wide}
    assert {p.dtype for p in kit.parameters("b")} == {torch.bfloat16}
    for name in "ab":
        kit.activate(name)
        assert torch.equal(model(ids), expected)
        randomise(kit, name)
        assert model(ids).dtype == dtype
        model(ids).sum().backward()
        assert all(p.grad is not None for p in kit.parameters(name))


@pytest.mark.parametrize("place", PLACES)
def test_adapters_run_under_autocast(place: str, ids: Tensor) -> None:
    block, config = PLACES[place]
    model = Tiny(block)
    kit = ak.wrap(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids)
    kit.add("a", ak.BottleneckConfig(**config))  # type: ignore[arg-type]  # parametrised
    kit.train_adapter("a")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids), expected)
        model(ids).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in kit.parameters("a"))


def test_adapters_follow_the_model(post_norm: Tiny) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)
    post_norm.to(torch.bfloat16)
    assert {p.dtype for p in kit.parameters("a")} == {torch.bfloat16}
    kit.activate("a")
    assert post_norm(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.bfloat16
    post_norm.to("meta")
    assert {p.device.type for p in kit.parameters("a")} == {"meta"}
    kit.add("b", CONFIG)
    assert {p.device.type for p in kit.parameters("b")} == {"meta"}


def frames(counter: list[int]) -> Callable[..., Callable[..., object]]:
    """A backend that counts the graphs it is given."""

    def compile_graph(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        counter.append(1)
        return graph.forward

    return compile_graph


@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("place", PLACES)
def test_a_model_compiles_as_one_graph_and_switching_is_right(place: str, ids: Tensor, training: bool) -> None:
    block, config = PLACES[place]
    model, graphs = Tiny(block).train(training), []
    kit = ak.wrap(model, ids)
    outputs: dict[str | None, Tensor] = {None: model(ids)}
    for name in ("a", "b"):
        kit.add(name, ak.BottleneckConfig(**config))  # type: ignore[arg-type]  # parametrised
        randomise(kit, name)
        with kit.active(name):
            outputs[name] = model(ids)
    compiled = torch.compile(model, fullgraph=True, backend=frames(graphs))
    for name in ("a", "b", None, "b", "a", None):
        with kit.active(name) if name else kit.base():
            torch.testing.assert_close(compiled(ids), outputs[name])
    assert len(graphs) == 3, "one graph for each, then cached"
    kit.train_adapter("a")
    compiled(ids).sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a"))


def test_adapters_added_after_a_compiled_call_run(post_norm: Tiny, ids: Tensor) -> None:
    compiled = torch.compile(post_norm, fullgraph=True, backend="eager")
    base = compiled(ids)
    kit = ak.wrap(compiled)
    assert kit.model is post_norm
    kit.add("a", CONFIG)
    randomise(kit, "a")
    kit.activate("a")
    adapted = compiled(ids)
    torch.testing.assert_close(adapted, post_norm(ids))
    assert not torch.equal(adapted, base)
    kit.unwrap()
    torch.testing.assert_close(compiled(ids), base)


@pytest.mark.parametrize("host", ["conv2d", "batch norm", "lstm", "tuple", "named tuple", "mapping", "dataclass", "list"])
def test_any_host_compiles(host: str) -> None:
    make, x = HOSTS[host]
    model = make().eval()
    kit = ak.wrap(model, (x,))
    kit.add("a", ak.BottleneckConfig(targets=["host" if hasattr(model, "host") else ""], bottleneck_size=2))
    randomise(kit, "a")
    kit.train_adapter("a")
    compiled = torch.compile(model, fullgraph=host != "lstm", backend="eager")  # torch breaks the graph at an LSTM
    for one, other in zip(tensors(compiled(x)), tensors(model(x)), strict=True):
        torch.testing.assert_close(one, other)


def test_frozen_norms_compile() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(), torch.randn(3, 4)
    kit = ak.wrap(model)
    kit.add("a", ak.BottleneckConfig(targets=["0"]))
    kit.train_adapter("a")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    model.train()
    torch.testing.assert_close(compiled(x), model(x))
    assert kit.verify().base_is_unmoved


def test_norms_frozen_after_a_compiled_call_stay() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(), torch.randn(3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x)
    kit = ak.wrap(model)
    kit.freeze()
    compiled(x)
    assert kit.verify().base_is_unmoved
    kit.unfreeze()
    kit.freeze()
    kit.unfreeze()
    before = model[1].running_mean.clone()
    compiled(x)
    assert not torch.equal(model[1].running_mean, before)


def test_an_adapted_model_is_exported_with_its_adapter(post_norm: Tiny, ids: Tensor) -> None:
    kit = ak.wrap(post_norm.eval())
    kit.add("a", CONFIG)
    randomise(kit, "a")
    kit.activate("a")
    program = torch.export.export(post_norm, (ids,))
    assert "blocks.0.down._adapterkit.a.up_weight" in program.state_dict
    torch.testing.assert_close(program.module()(ids), post_norm(ids))


def test_a_pickled_model_keeps_its_hooks_in_a_new_process(post_norm: Tiny, ids: Tensor, tmp_path: Path) -> None:
    """Hook ids start from 0 in a new process: a hook registered there must not take the place of a loaded one."""
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)
    randomise(kit, "a")
    kit.train_adapter("a")
    torch.save((post_norm, ids, post_norm(ids)), tmp_path / "model.pt")
    code = (
        "import sys, torch; import adapterkit\n"
        "model, ids, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "host = model.blocks[0].down\n"
        "for _ in range(max(host._forward_hooks) + 10): host.register_forward_hook(lambda *_: None)\n"
        "assert torch.equal(model(ids), expected)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True, cwd=root)


def replica_of(model: nn.Module) -> nn.Module:
    """A copy as `torch.nn.parallel.replicate` makes it, on the same device: tensors in place of Parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            setattr(replica, name, copies[child]) if child is not None else None
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            setattr(replica, name, None if tensor is None else tensor.detach().clone())
    return copies[model]


@pytest.mark.parametrize(
    "preset", ["pfeiffer", "compacter", "invertible", "lora", "dora", "vera", "ia3", "bitfit", "norm_tuning"]
)
def test_replicas_without_parameters_run_every_method(post_norm: Tiny, ids: Tensor, preset: str) -> None:
    kit = ak.wrap(post_norm.eval(), ids)
    kit.add("a", preset)
    randomise(kit, "a")
    kit.activate("a")
    torch.testing.assert_close(replica_of(post_norm)(ids), post_norm(ids))


def test_data_parallel_replicas_run_their_own_adapters(post_norm: Tiny, ids: Tensor) -> None:
    kit = ak.wrap(post_norm)
    kit.add("a", CONFIG)
    randomise(kit, "a")
    kit.activate("a")
    host = post_norm.blocks[0].down
    replica = host._replicate_for_data_parallel()
    site = host._adapterkit._replicate_for_data_parallel()
    site._modules = {key: adapter._replicate_for_data_parallel() for key, adapter in host._adapterkit._modules.items()}
    for adapter in site._modules.values():
        adapter._parameters = {
            key: torch.zeros_like(p) for key, p in host._adapterkit.first_module("a")._parameters.items()
        }
    replica._modules = {"_adapterkit": site}
    replica._parameters = host._parameters
    x = torch.randn(2, 16)
    assert torch.equal(replica(x), torch.nn.functional.linear(x, host.weight, host.bias))
    assert not same(replica(x), host(x))
