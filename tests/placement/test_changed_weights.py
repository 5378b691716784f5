"""What a changed weight does: in recurrent layers, under keywords, in threads, after errors, compiled."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapterkit as ak

from ..hosts.parameters import Caller, OwnParameter
from ..hosts.tiny import randomise


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_read_their_changed_weights(kind: type[nn.Module]) -> None:
    model, x = kind(4, 6, num_layers=2), torch.randn(3, 2, 4)
    base = model(x)[0]
    kit = ak.wrap(model)
    kit.add("a", ak.Union(ak.BitFitConfig(), ak.LoRAConfig(targets=["weight_hh_l1"], rank=2)))
    kit.train_adapter("a")
    assert torch.equal(model(x)[0], base)
    randomise(kit, "a")
    adapted = model(x)[0]
    expected = kind(4, 6, num_layers=2)
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "_adapterkit" not in k})
    with torch.no_grad():
        for entry, module in model._adapterkit.modules_of("a"):
            name = entry.spec.parameters[0]
            expected.get_parameter(name).copy_(module.adapted(model.get_parameter(name)))
    torch.testing.assert_close(adapted, expected(x)[0])
    adapted.sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a"))
    with kit.base():
        assert torch.equal(model(x)[0], base)


def test_a_layer_called_by_keyword_is_adapted() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    model, x = ByKeyword(), torch.randn(2, 4)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["inner"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    torch.testing.assert_close(model(x), model.inner.weight.matmul(x.T).T + model.inner.bias + 4.0 * x @ a.T @ b.T)


def test_an_exception_in_the_host_takes_the_changed_weight_away() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    kit = ak.wrap(model)
    kit.add("a", "bitfit")
    randomise(kit, "a")
    kit.activate("a")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 5))
    assert "bias" not in vars(model[0])
    assert model[0].bias is model[0]._parameters["bias"]
    model(torch.randn(2, 4))


def test_parameters_stay_where_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    bias, seen = model[0].bias, []
    kit = ak.wrap(model)
    kit.add("a", "bitfit")
    kit.activate("a")
    model[0].register_forward_hook(lambda *_: seen.append(model[0].bias))
    model(torch.randn(2, 4))
    assert model[0].bias is bias
    assert dict(model.named_parameters())["0.bias"] is bias
    assert seen == [bias], "taken away before the hooks of others"


def test_threads_with_one_adapter_get_right_answers() -> None:
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    kit = ak.wrap(model)
    kit.add("a", ak.Union(ak.BitFitConfig(), ak.LoRAConfig(targets=["0.weight"], rank=2)))
    randomise(kit, "a")
    kit.train_adapter("a")
    inputs = [torch.randn(3, 16) for _ in range(4)]
    expected = [model(x).detach() for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(60):
            y = model(inputs[index])
            y.sum().backward()
            if not torch.equal(y.detach(), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_functional_call_and_vmap_see_the_change() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    kit = ak.wrap(model)
    kit.add("a", ak.Union(ak.BitFitConfig(), ak.LoRAConfig(targets=["weight"], rank=2)))
    randomise(kit, "a")
    kit.activate("a")
    torch.testing.assert_close(torch.vmap(model)(x), model(x))
    doubled = {"weight": 2 * model.weight, "bias": model.bias}
    torch.testing.assert_close(
        torch.func.functional_call(model, doubled, (x,)), model(x) + x @ model.weight.T, rtol=1e-4, atol=1e-5
    )


def test_the_members_of_a_union_act_in_order_at_one_host() -> None:
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    kit = ak.wrap(model)
    bottleneck = ak.BottleneckConfig(targets=[""], bottleneck_size=2)
    kit.add(
        "a", ak.Union(ak.LoRAConfig(targets=[""], rank=2), bottleneck, ak.IA3Config(targets=[""], feedforward_targets=()))
    )
    randomise(kit, "a")
    kit.activate("a")
    lora, adapter, ia3 = (module for _, module in model._adapterkit.modules_of("a"))
    y = F.linear(x, model.weight + 4.0 * lora.lora_B @ lora.lora_A, model.bias)
    y = y + adapter(y, y)
    torch.testing.assert_close(model(x), y * ia3.ia3_l)
    summary = kit.summary().adapters[0]
    assert (summary.method, summary.sites) == ("union", 3)


def test_the_input_is_told_by_its_keyword_whatever_the_order() -> None:
    model, x = Caller(), torch.randn(2, 6)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["layer"], rank=2)
    randomise(kit, "a")
    kit.activate("a")
    a, b = kit.parameters("a")
    torch.testing.assert_close(model(x), F.linear(x, model.layer.weight + 4.0 * b @ a, model.layer.bias))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks at it
def test_a_compiled_root_that_ran_the_base_first_runs_its_adapter_afterwards() -> None:
    model, x = OwnParameter(), torch.randn(2, 6)
    kit = ak.wrap(model)
    kit.add("a", "lora", targets=["w"])
    randomise(kit, "a")
    kit.activate("a")
    adapted = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with kit.base():
        torch.testing.assert_close(compiled(x), x @ model.w)
    torch.testing.assert_close(compiled(x), adapted)
