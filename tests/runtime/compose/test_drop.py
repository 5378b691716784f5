"""Drop at work: an adapter that is the identity in some layers, against one that has no modules there."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.composition.nodes import Average, BatchSplit, Drop, Rows, Split, Stack
from adapterkit.runtime.compose.compose_step import ComposeStep
from adapterkit.runtime.lookup import sites_of
from adapterkit.runtime.steps import AddDelta, Pass
from adapterkit.runtime.this_call import THIS_CALL

from ...hosts.tiny import PreNormBlock, Tiny, randomise
from .helpers import CONFIGS, hidden

# With a seed: the frozen projections of VeRA, which are no parameters, are then the same in another adapter.
EVERYWHERE = {name: config.override({"layers": None, "seed": 1}) for name, config in CONFIGS.items()}
BIAS = ak.BitFitConfig(exclude=["classifier"])


def kit_of(**configs: Any) -> tuple[ak.AdapterKit, Tensor]:
    torch.manual_seed(0)
    kit = ak.wrap(Tiny(PreNormBlock).eval(), torch.zeros(1, 5, dtype=torch.long))
    for name, config in configs.items():
        kit.add(name, config)
        randomise(kit, name)
    return kit, torch.randint(0, 11, (4, 6))


def add_without_layer(kit: ak.AdapterKit, name: str, dropped: int, new: str) -> None:
    """Another adapter: the same weights, but no modules in one of the two layers."""
    config: Any = kit.adapters[name]
    kit.add(new, config.override({"layers": [1 - dropped]}))
    there = {key.replace(f"._adapterkit.{name}.", f"._adapterkit.{new}."): p for key, p in kit.named_parameters(name)}
    shared = {key.partition(".shared.")[2]: p for key, p in there.items()}  # held by the first module of each adapter
    with torch.no_grad():
        for key, parameter in kit.named_parameters(new):
            parameter.copy_(there[key] if ".shared." not in key else shared[key.partition(".shared.")[2]])


def outputs_and_gradients(kit: ak.AdapterKit, ids: Tensor, name: str, composition: Any) -> tuple[Tensor, list[Any]]:
    kit.model.zero_grad()
    with kit.active(composition):
        output = hidden(kit, ids)
        output.pow(2).sum().backward()
    return output, [None if p.grad is None else p.grad.clone() for p in kit.parameters(name)]


@pytest.mark.parametrize("dropped", [0, 1])
@pytest.mark.parametrize("name", list(EVERYWHERE))
def test_a_dropped_layer_is_one_in_which_the_adapter_has_no_modules(name: str, dropped: int) -> None:
    kit, ids = kit_of(**{name: EVERYWHERE[name]})
    add_without_layer(kit, name, dropped, "other")
    output, gradients = outputs_and_gradients(kit, ids, name, Drop(name, layers=[dropped]))
    expected, others = outputs_and_gradients(kit, ids, "other", "other")
    assert torch.equal(output, expected)
    kept = [gradient for gradient in gradients if gradient is not None]
    assert len(kept) == len(others) < len(gradients)
    assert sum(float(g.square().sum()) for g in kept) == pytest.approx(sum(float(g.square().sum()) for g in others))


def test_layers_count_from_the_end_too_and_may_be_all_or_none() -> None:
    kit, ids = kit_of(p=CONFIGS["p"])
    seen = {}
    compositions: dict[str, Any] = {
        "p": "p", "none": Drop("p", layers=()), "lowest": Drop("p", layers=range(1)), "-2": Drop("p", layers=[-2]),
        "top": Drop("p", layers=[1]), "-1": Drop("p", layers=[-1]), "all": Drop("p", layers=[0, -1]),
    }  # fmt: skip
    for key, composition in compositions.items():
        with kit.active(composition):
            seen[key] = hidden(kit, ids)
    with kit.base():
        base = hidden(kit, ids)
    assert torch.equal(seen["none"], seen["p"])
    assert torch.equal(seen["lowest"], seen["-2"])
    assert torch.equal(seen["top"], seen["-1"])
    assert torch.equal(seen["all"], base)
    assert not any(torch.equal(seen[a], seen[b]) for a, b in (("p", "lowest"), ("p", "top"), ("lowest", "top")))


def test_drops_add_up_and_are_shared_out_among_children() -> None:
    kit, ids = kit_of(p=CONFIGS["p"], l=CONFIGS["l"], q=CONFIGS["q"])
    pairs: list[tuple[Any, Any]] = [
        (Drop(Drop("p", layers=[0]), layers=[1]), Drop("p", layers=[0, 1])),
        (Drop(Stack("p", "l"), layers=[0]), Stack(Drop("p", layers=[0]), Drop("l", layers=[0]))),
        (Drop(Average("p", "q"), layers=[1]), Average(Drop("p", layers=[1]), Drop("q", layers=[1]))),
        (Drop(Split("p", "l"), layers=[1]), Split(Drop("p", layers=[1]), Drop("l", layers=[1]))),
        (Drop(Rows(["p", "l", None, "q"]), layers=[0]), Rows([Drop("p", layers=[0]), Drop("l", layers=[0]), None, Drop("q", layers=[0])])),
        (Drop(BatchSplit("p", "l"), layers=[0]), BatchSplit(Drop("p", layers=[0]), Drop("l", layers=[0]))),
    ]  # fmt: skip
    for whole, parts in pairs:
        with kit.active(whole):
            one = hidden(kit, ids)
        with kit.active(parts):
            torch.testing.assert_close(one, hidden(kit, ids))


def test_a_row_is_dropped_alone() -> None:
    kit, ids = kit_of(p=CONFIGS["p"], q=CONFIGS["q"])
    rows = [Drop("p", layers=[0]), "p", Drop("q", layers=[1]), None]
    with kit.active(Rows(rows)):
        mixed = hidden(kit, ids)
    for index, row in enumerate(rows):
        with kit.base() if row is None else kit.active(row):
            torch.testing.assert_close(mixed[index : index + 1], hidden(kit, ids[index : index + 1]))


def test_a_drop_needs_none_of_the_machinery_for_parts_and_a_dropped_place_runs_nothing() -> None:
    kit, _ = kit_of(p=CONFIGS["p"], q=CONFIGS["q"])
    steps = {}
    for composition in (Drop("p", layers=[0]), Drop(Stack("p", Drop("q", layers=[1])), layers=[0])):
        with kit.active(composition):
            for path, _host, site in sites_of(kit.model):
                steps[path] = [type(step) for step in site.steps["output"]]
        assert steps == {"blocks.0": [Pass], "blocks.1": [AddDelta]}
    with kit.active(Average("p", Drop("q", layers=[0]))):
        assert all(type(step) is ComposeStep for _, _, site in sites_of(kit.model) for step in site.steps["output"])


def test_places_outside_of_blocks_and_heads_are_never_dropped() -> None:
    kit, ids = kit_of()
    kit.add("a", ak.BottleneckConfig(targets=["embedding", "blocks.*"], bottleneck_size=2), heads=["classifier"])
    randomise(kit, "a")
    with torch.no_grad():
        for parameter in kit.parameters("a", heads=True):
            parameter.add_(1.0)
    kit.activate("a")
    full = kit.model(ids)
    kit.activate(Drop("a", layers=range(2)))
    dropped = kit.model(ids)
    kit.add("rest", ak.BottleneckConfig(targets=["embedding"], bottleneck_size=2), heads=["classifier"])
    there = {key.replace(".a.", "."): p for key, p in kit.named_parameters("a", heads=True)}
    with torch.no_grad():
        for key, parameter in kit.named_parameters("rest", heads=True):
            parameter.copy_(there[key.replace(".rest.", ".")])
    kit.activate("rest")
    assert torch.equal(kit.model(ids), dropped)
    assert not torch.equal(full, dropped)


def test_a_stream_is_handed_over_only_where_it_is_read() -> None:
    kit, ids = kit_of(parallel=CONFIGS["parallel"], mix=CONFIGS["parallel"])
    for composition in (Drop("parallel", layers=[0]), Average("mix", Drop("parallel", layers=[0]))):
        kit.activate(composition)
        wanted = {
            (path, name): entry.handover.wanted
            for path, _, site in sites_of(kit.model)
            for name, entries in site.entries.items()
            for entry in entries
            if entry.handover is not None
        }
        names = {"parallel"} if isinstance(composition, Drop) else {"parallel", "mix"}
        assert {at for at, is_wanted in wanted.items() if is_wanted} == {
            (f"blocks.{layer}.mlp.2", name)
            for layer in (0, 1)
            for name in names
            if (layer, name) != (0, "parallel")
        }  # fmt: skip
        kit.model(ids)
        assert THIS_CALL.handed == {}


def test_a_change_of_a_parameter_can_be_dropped_since_all_rows_share_it() -> None:
    kit, ids = kit_of(bias=BIAS)
    add_without_layer(kit, "bias", 0, "other")
    with kit.active("other"):
        expected = hidden(kit, ids)
    kit.remove("other")
    with kit.active(Drop("bias", layers=[0])):
        torch.testing.assert_close(hidden(kit, ids), expected)
    with kit.base():
        base = hidden(kit, ids)
    with kit.active(Rows([Drop("bias", layers=[0, 1]), None, None, None])):
        assert torch.equal(hidden(kit, ids), base)
    with pytest.raises(ak.CompatibilityError, match=r"changes the Parameter .*bias, which all rows and tokens share"):
        kit.activate(Rows([Drop("bias", layers=[0]), None, None, None]))


class Shares(nn.Module):
    """Two blocks of which both read one weight, around the module that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(nn.functional.linear(x, block.weight, block.bias))
        return x


def test_at_a_host_outside_of_blocks_the_layer_is_that_of_the_parameter() -> None:
    x = torch.randn(3, 4)
    kit = ak.wrap(Shares(), x)
    kit.add("l", "lora", targets=["blocks.0.weight", "blocks.1.weight"], rank=2)
    randomise(kit, "l")
    assert {site.path for site in kit.sites(kit.adapters["l"])} == {""}
    first, second = (block.weight.detach() for block in kit.model.blocks)
    with kit.active("l"):
        whole = kit.model(x)
    with kit.active(Drop("l", layers=[0])):
        dropped = kit.model(x)
    with kit.active(Drop("l", layers=[0, 1])):
        assert torch.equal(kit.model(x), kit.model(x))
        base = kit.model(x)
    site = kit.model._adapterkit
    changed = [module.adapted(weight) for (_, module), weight in zip(site.modules_of("l"), (first, second), strict=True)]

    def run(weights: list[Tensor]) -> Tensor:
        out = x
        for weight, block in zip(weights, kit.model.blocks, strict=True):
            out = torch.tanh(nn.functional.linear(out, weight, block.bias))
        return out

    torch.testing.assert_close(whole, run(changed))
    torch.testing.assert_close(dropped, run([first, changed[1]]))
    torch.testing.assert_close(base, run([first, second]))


@pytest.mark.parametrize(
    ("composition", "message"),
    [
        (Drop("p", layers=range(5)), r"layers=\[0, 1, 2, 3, 4\]: there is no layer \[2, 3, 4\]; .* of which there are 2"),
        (Drop("p", layers=[-3]), r"there is no layer \[-3\]"),
        (Stack("p", Rows([Drop("l", layers=[7])])), r"there is no layer \[7\]"),
        (Drop("outside", layers=[0]), "none of the 1 places of the adapters lies in a repeated block"),
        (Drop("nothing", layers=[0]), "no adapter 'nothing'"),
    ],
)
def test_layers_that_there_are_not_are_refused_and_nothing_changes(composition: Any, message: str) -> None:
    kit, ids = kit_of(p=CONFIGS["p"], l=CONFIGS["l"], outside=ak.BottleneckConfig(targets=["embedding"]))
    kit.activate("p")
    before = kit.model(ids)
    with pytest.raises(ak.AdapterKitError, match=message) as raised:
        kit.activate(composition)
    assert isinstance(raised.value, (ak.TargetError, ak.AdapterNameError))
    with pytest.raises(type(raised.value), match=message), kit.active(composition):
        pass
    assert torch.equal(kit.model(ids), before)


def test_dropping_layers_where_the_adapter_has_no_modules_is_fine() -> None:
    kit, ids = kit_of(wide=CONFIGS["wide"])  # in layer 1 alone
    with kit.active("wide"):
        expected = kit.model(ids)
    with kit.active(Drop("wide", layers=[0])):
        assert torch.equal(kit.model(ids), expected)


def test_what_is_merged_cannot_be_dropped() -> None:
    kit, ids = kit_of(l=CONFIGS["l"])
    kit.activate(Drop("l", layers=[0]))
    with pytest.raises(ak.ActivationError, match="'l' is not active"):
        kit.merge("l")
    kit.activate(Drop("l", layers=()))
    expected = hidden(kit, ids)
    kit.merge("l")
    torch.testing.assert_close(hidden(kit, ids), expected)
    with pytest.raises(ak.ActivationError, match="'l' is merged into the weights"):
        kit.activate(Drop("l", layers=[0]))


def test_heads_are_not_dropped_and_are_each_rows_own() -> None:
    kit, ids = kit_of()
    for name in ("a", "b"):
        kit.add(name, CONFIGS["p"], heads=["classifier"])
        with torch.no_grad():
            for parameter in kit.parameters(name, heads=True):
                parameter.normal_()
    rows = [Drop("a", layers=[0]), Stack("a", Drop("b", layers=[0, 1])), "b", None]
    with kit.active(Rows(rows)):
        mixed = kit.model(ids)
    for row, composition in enumerate(rows):
        with kit.base() if composition is None else kit.active(composition):
            torch.testing.assert_close(mixed[row], kit.model(ids)[row], atol=1e-5, rtol=1e-5)


def test_copies_and_pickles_run_the_drop_and_it_is_proven_and_compiles() -> None:
    kit, ids = kit_of(p=CONFIGS["p"], parallel=CONFIGS["parallel"])
    kit.activate(Drop(Stack("p", "parallel"), layers=[0]))
    expected = kit.model(ids)
    for other in (copy.deepcopy(kit.model), pickle.loads(pickle.dumps(kit.model))):
        assert torch.equal(other(ids), expected)
    assert [row.name for row in kit.summary().adapters if row.is_active] == ["p", "parallel"]
    kit.verify(ids).require()
    compiled = torch.compile(kit.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), expected)
    kit.activate(Drop(Stack("p", "parallel"), layers=[1]))
    torch.testing.assert_close(compiled(ids), kit.model(ids))
    assert not torch.equal(kit.model(ids), expected)
