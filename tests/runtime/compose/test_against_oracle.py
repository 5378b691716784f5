"""Every method under random compositions, on models of many kinds, against adapters run one by one (`oracle`).

A composition that means nothing for a batch or a place must be refused with a typed error, and no other may be.
"""

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.composition.nodes import Average, BatchSplit, Parallel, Rows, Split, Stack, names_in

from ...hosts.composed import HOSTS, ROWS, TINY, TOKENS, WIDTH, Built, built, encoder, example, input_ids
from ...hosts.tiny import Blocks, CheckpointedBlocks, PostNormBlock, PreNormBlock, randomise
from ...strategies import compositions
from .oracle import NoMeaningError, expected, pieces_of

FAST = ["pre-norm", "post-norm", "encoder", "encoder, seq first", "square encoder, seq first", "convs", "recurrent"]
LAID = ["flat tokens", "windows", "square, tokens first inside", "square, tokens first", "alignments", "flat alignments"]
LAID += ["flat tokens in turn"]


def on_hosts(*fast: str) -> Any:
    """On every host; those that are not named here in the slow tests."""
    return pytest.mark.parametrize("name", [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in HOSTS])


on_every_host = on_hosts(*FAST, *LAID, "gpt2")


def wanted(host: Built, composition: Any, inputs: dict[str, Tensor]) -> Tensor:
    return expected(
        host.kit, host.bare, composition, inputs, host.call, row_axis=host.host.row_axis, token_axis=host.host.token_axis
    )


def check(host: Built, composition: Any, inputs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Compare the model with the oracle."""
    try:
        right = wanted(host, composition, inputs)
    except NoMeaningError:
        with pytest.raises(ak.AdapterKitError), host.kit.active(composition):
            host.call(host.kit.model, inputs)
        return
    with host.kit.active(composition):
        found = host.call(host.kit.model, inputs)
    torch.testing.assert_close(found, right, atol=tolerance, rtol=tolerance)


def holds_for_trees(host: Built, law: Any, examples: int, names: Any = None) -> None:
    """Check a law of compositions on random ones of the host's adapters."""
    held = names or host.names
    leaves = [*held, *(fuse for fuse in host.fusions if {*names_in(fuse)} <= {*held, fuse.fusion})]
    trees = compositions(st.sampled_from(leaves), ROWS, TOKENS).filter(lambda tree: any(names_in(tree)))
    settings(max_examples=examples, suppress_health_check=list(HealthCheck))(given(trees)(law))()


def rest(host: Built) -> list[str]:
    """The adapters that change no Parameter: those act on some rows alone."""
    pieces = pieces_of(host.kit.model)
    return [name for name in host.names if all(piece.spec.at != "weight" for piece in pieces[name])]


@on_every_host
def test_each_row_is_what_its_own_composition_gives_it(name: str) -> None:
    host = built(name)
    inputs = example(host.host, torch.float32)
    with torch.no_grad():
        holds_for_trees(host, lambda tree: check(host, tree, inputs), 12)


@on_hosts("pre-norm", "encoder, seq first", "flat tokens", "square, tokens first inside")
def test_each_child_of_a_parallel_gets_the_whole_batch(name: str) -> None:
    host = built(name)
    inputs = example(host.host, torch.float32)
    leaf = st.sampled_from([*rest(host), *host.fusions])
    children = st.lists(compositions(leaf, ROWS, TOKENS, 2), min_size=1, max_size=2)
    trees = children.map(lambda held: Parallel(*held)) | st.builds(
        lambda below, held: Stack(below, Parallel(*held)), compositions(leaf, None, TOKENS, 1), children
    )
    trees = trees.filter(lambda tree: any(names_in(tree)))
    with torch.no_grad():
        settings(max_examples=8, suppress_health_check=list(HealthCheck))(
            given(trees)(lambda tree: check(host, tree, inputs))
        )()


@on_hosts("pre-norm", "convs", "recurrent", "square encoder, seq first")
def test_every_adapter_alone_stacked_averaged_and_by_rows_is_that_of_the_oracle(name: str) -> None:
    host = built(name)
    inputs = example(host.host, torch.float32)
    with torch.no_grad():
        for one, other in zip(host.names, host.names[1:] + host.names[:1], strict=True):
            for tree in (one, Stack(one, other), Average(one, one, weights=[3, 1]), Rows([one, None, other, one])):
                check(host, tree, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(HOSTS))
def test_each_row_is_that_of_the_oracle_to_the_rounding_of_double_precision(name: str) -> None:
    host = built(name, torch.float64)
    inputs = example(host.host, torch.float64)
    with torch.no_grad():
        holds_for_trees(host, lambda tree: check(host, tree, inputs, 1e-9), 400)
        holds_for_trees(host, lambda tree: check(host, tree, inputs, 1e-9), 200, rest(host))


def gradients(output: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(output.pow(2).sum(), list(parameters.values()), allow_unused=True)
    return {name: p.new_zeros(p.shape) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)}


def check_gradients(host: Built, tree: Any, inputs: dict[str, Tensor]) -> None:
    """In double precision: what differs is no rounding."""
    parameters = {key: p for name in dict.fromkeys(names_in(tree)) for key, p in host.kit.named_parameters(name)}
    try:
        right = gradients(wanted(host, tree, inputs), parameters)
    except NoMeaningError:
        return
    except RuntimeError as error:  # no adapter acts on any row
        assert "does not require grad" in str(error)
        return
    with host.kit.active(tree):
        found = gradients(host.call(host.kit.model, inputs), parameters)
    for name, gradient in right.items():
        # Sums over rows in another order, in the adapter's own dtype.
        tolerance = max(1e-7, 16 * torch.finfo(gradient.dtype).eps * gradient.abs().max().item())
        torch.testing.assert_close(
            found[name], gradient, atol=tolerance, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@on_hosts("pre-norm", "convs", "square encoder, seq first")
def test_gradients_of_a_mixed_batch_are_those_of_the_separate_runs(name: str) -> None:
    host = built(name, torch.float64)
    inputs = example(host.host, torch.float64)
    holds_for_trees(host, lambda tree: check_gradients(host, tree, inputs), 6, rest(host))


def test_rows_without_an_adapter_are_those_of_the_bare_model() -> None:
    host = built("pre-norm")
    inputs = example(host.host, torch.float32)
    base = host.call(host.bare, inputs)
    for name in rest(host):
        with host.kit.active(Rows([None, name, None, None])):
            found = host.call(host.kit.model, inputs)
        torch.testing.assert_close(found[[0, 2, 3]], base[[0, 2, 3]], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(found[1], base[1], atol=1e-5)


MIXED = [
    Rows(["plain", "lora wide", None, Stack("gated", "ia3")]),
    BatchSplit("compacter", Stack("stream", "vera"), sizes=[1, 3]),
    Stack("embedded", Rows(["plain", "plain 2", "tanh", "beside"]), Average("lora bias", "dora")),
    Split("plain", Rows(["lora wide", "lora gated", None, "union"]), sizes=[2, 4]),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 16 * 2**-8), (torch.float16, 16 * 2**-11)])
@pytest.mark.parametrize("tree", MIXED, ids=str)
def test_hosts_of_half_precision_agree_to_a_few_roundings(tree: Any, dtype: torch.dtype, tolerance: float) -> None:
    """A step of the dtype for each of the places on a row's way, some sixteen."""
    host = built("pre-norm", dtype)
    check(host, tree, example(host.host, dtype), tolerance)


@pytest.mark.parametrize("tree", MIXED, ids=str)
def test_under_autocast_rows_are_what_they_are_alone(tree: Any) -> None:
    host = built("pre-norm")
    with torch.autocast("cpu", torch.bfloat16):
        check(host, tree, example(host.host, torch.float32), 16 * 2**-8)


@contextmanager
def training(host: Built) -> Iterator[None]:
    host.kit.model.train(), host.bare.train()
    try:
        yield
    finally:
        host.kit.model.eval(), host.bare.eval()


def test_training_mode_without_dropout_changes_nothing() -> None:
    host = built("pre-norm")
    inputs = example(host.host, torch.float32)
    names = [n for n in rest(host) if "dropped" not in n and "adapter_plus" not in n]
    with training(host):
        holds_for_trees(host, lambda tree: check(host, tree, inputs), 10, names)


@pytest.mark.parametrize("tree", [MIXED[0], pytest.param(MIXED[1], marks=pytest.mark.slow)], ids=str)
def test_compiled_rows_are_those_of_the_oracle(tree: Any) -> None:
    host = built("pre-norm")
    inputs = example(host.host, torch.float32)
    right = wanted(host, tree, inputs)
    with host.kit.active(tree):
        compiled = torch.compile(host.kit.model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("tree", MIXED, ids=str)
def test_recomputed_blocks_give_the_gradients_of_the_oracle(tree: Any, reentrant: bool) -> None:
    host = built("pre-norm", torch.float64)
    inputs = example(host.host, torch.float64)
    parameters = {key: p for name in dict.fromkeys(names_in(tree)) for key, p in host.kit.named_parameters(name)}
    right = gradients(wanted(host, tree, inputs), parameters)
    model = host.kit.model
    with host.kit.active(tree):
        model.__class__, model.reentrant = CheckpointedBlocks, reentrant
        try:
            model(**inputs).pow(2).sum().backward()
        finally:
            model.__class__ = Blocks
    found = {name: p.grad for name, p in parameters.items()}
    model.zero_grad()
    for name, gradient in right.items():
        got = torch.zeros_like(gradient) if found[name] is None else found[name]
        torch.testing.assert_close(got, gradient, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("tree", MIXED, ids=str)
def test_copies_pickles_and_threads_run_the_same(tree: Any) -> None:
    host = built("pre-norm")
    inputs = example(host.host, torch.float32)
    right = wanted(host, tree, inputs)
    found: list[Tensor] = []

    def run() -> None:
        with host.kit.active(tree):
            for _ in range(5):
                found.append(host.call(host.kit.model, inputs))

    threads = [threading.Thread(target=run) for _ in range(2)]
    with host.kit.active(tree):
        for other in (copy.deepcopy(host.kit.model), pickle.loads(pickle.dumps(host.kit.model))):
            found.append(other(**inputs))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 12
    for output in found:
        torch.testing.assert_close(output, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_of_one_row_and_an_empty_one_run(rows: int) -> None:
    host = built("pre-norm")
    inputs = {"ids": torch.randint(0, 11, (rows, TOKENS))}
    for tree in (BatchSplit("plain", "lora wide", sizes=[0, rows]), Split("plain", "tanh"), Stack("plain", "dora")):
        if rows:
            check(host, tree, inputs)
        else:
            with host.kit.active(tree):
                assert host.call(host.kit.model, inputs).shape == (0, TOKENS, WIDTH)
    if rows:
        check(host, Rows(["gated"]), inputs)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_rows_generate_what_their_adapters_generate_alone(name: str) -> None:
    host = built(name)
    ids = input_ids(ROWS)["input_ids"]
    rows = ["preset pfeiffer", "preset lora", None, Stack("preset parallel", "preset ia3")]
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model: Any = host.kit.model
    with host.kit.active(Rows(rows)):
        together = [model.generate(ids, use_cache=cache, **how) for cache in (True, False)]
    for index, row in enumerate(rows):
        with host.kit.base() if row is None else host.kit.active(row):
            alone = model.generate(ids[index : index + 1], **how)
        assert all(torch.equal(found[index : index + 1], alone) for found in together)


# --- what this oracle found -------------------------------------------------------------------------------------------


def fresh(block: Any, adapters: dict[str, Any]) -> tuple[ak.AdapterKit, Blocks]:
    """A model with these adapters, added in this order, and a bare copy."""
    model = Blocks(block).double().eval()
    bare, kit = copy.deepcopy(model), ak.wrap(model, torch.zeros(1, 5, dtype=torch.long))
    for name, config in adapters.items():
        kit.add(name, config)
        randomise(kit, name)
    return kit, bare


def agrees(kit: ak.AdapterKit, bare: nn.Module, tree: Any) -> None:
    inputs = {"ids": torch.randint(0, 11, (ROWS, TOKENS))}
    with kit.active(tree):
        found = kit.model(**inputs)
    right = expected(kit, bare, tree, inputs, lambda model, own: model(**own))
    torch.testing.assert_close(found, right, atol=1e-9, rtol=1e-9)


def test_modules_whose_shared_part_differs_in_a_setting_are_not_computed_as_one() -> None:
    kit, bare = fresh(PreNormBlock, {"relu": TINY["invertible"], "tanh": TINY["invertible tanh"]})
    agrees(kit, bare, Rows(["relu", "tanh", None, "relu"]))


@pytest.mark.parametrize("order", [1, -1])
def test_a_stream_is_what_the_module_takes_whichever_adapter_was_added_first(order: int) -> None:
    configs = {
        "parallel": ak.BottleneckConfig(targets=["mlp"], placement="parallel", residual="norm_2", bottleneck_size=2),
        "before": ak.BottleneckConfig(targets=["norm_2"], at="input", bottleneck_size=2),
    }
    kit, bare = fresh(PreNormBlock, dict(list(configs.items())[::order]))
    agrees(kit, bare, Stack("parallel", "before"))


@pytest.mark.parametrize("order", [1, -1])
def test_an_adapter_reads_a_norm_as_the_others_of_the_stack_leave_its_weights(order: int) -> None:
    configs = {
        "bottleneck": ak.BottleneckConfig(targets=["norm_2"], at="renormalised", bottleneck_size=2),
        "norms": ak.NormTuningConfig(targets=["norm_2"]),
    }
    kit, bare = fresh(PostNormBlock, dict(list(configs.items())[::order]))
    agrees(kit, bare, Stack("bottleneck", "norms"))


def test_rows_at_the_end_of_an_encoder_lie_where_those_of_its_layers_do() -> None:
    """As many rows as tokens: a wrong axis would be no error."""
    host = built("square encoder, seq first", torch.float64)
    inputs = example(host.host, torch.float64)
    for name in ("at the end", "before the end", "at the root"):
        check(host, Rows([name, None, "plain", name]), inputs, 1e-9)


class Turned(nn.Module):
    """Rows first outside, tokens first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.encoder, self.after = nn.Linear(WIDTH, WIDTH), encoder(False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.encoder(self.before(x).transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("tokens", [TOKENS, ROWS])
def test_where_modules_differ_in_the_axis_of_rows_each_has_its_own(tokens: int) -> None:
    model = Turned().eval()
    kit = ak.wrap(model)
    for name in ("a", "b"):
        kit.add(name, ak.BottleneckConfig(targets=["before", "after", "linear2"], bottleneck_size=2))
        randomise(kit, name)
    x, tree = torch.randn(ROWS, tokens, WIDTH), Rows(["a", "b", None, "a"])
    with kit.active(tree):
        found = model(x)
    for row, name in enumerate(tree.children):
        with kit.base() if name is None else kit.active(name):
            torch.testing.assert_close(found[row], model(x)[row], atol=1e-5, rtol=1e-5)


def test_a_tensor_without_rows_or_tokens_is_not_divided() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 4))
    kit = ak.wrap(model, torch.randn(2, 4, 4))
    kit.add("conv", "lora", targets=["0"])
    kit.add("linear", "lora", targets=["1"])
    with kit.active(Rows(["conv"] * 4)), pytest.raises(ak.CompatibilityError, match=r"\(4, 4\): it has no rows on axis 0"):
        model(torch.randn(4, 4))
    with kit.active(Split("linear", "linear")), pytest.raises(ak.CompatibilityError, match=r"shape \(2, 3, 4, 4\)"):
        model[1](torch.randn(2, 3, 4, 4))


def test_a_mean_of_narrow_adapters_is_not_rounded_to_their_dtype() -> None:
    kit, bare = fresh(PreNormBlock, {"half": TINY["half"], "plain": TINY["plain"]})
    agrees(kit, bare, Average("half", "half", "plain"))


def test_a_gate_asks_where_rows_are_that_are_on_the_second_axis() -> None:
    kit = ak.wrap(encoder(False))
    with pytest.raises(ak.TargetError, match=r"'norm' has its batch on axis 1; .* set batch_axis=1"):
        kit.add("a", ak.BottleneckConfig(targets=["norm"], bottleneck_size=2, gating=True))
    ak.wrap(Turned()).add("a", ak.BottleneckConfig(targets=["after"], bottleneck_size=2, gating=True))
