"""Activation under gradient checkpointing and threads: right numbers, or an error."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.runtime.state import without_adapters
from adapterkit.structure.anatomy import discover

from ..hosts.tiny import Checkpointed, PostNormBlock, PreNormBlock, Tiny, randomise

CONFIG = ak.BottleneckConfig(targets=["attention.out", "down"], bottleneck_size=3, non_linearity="gelu")


def kit_with(*names: str, block: type[nn.Module] = PostNormBlock, config: ak.BottleneckConfig = CONFIG) -> ak.AdapterKit:
    kit = ak.wrap(Checkpointed(block), torch.zeros(1, 2, dtype=torch.long))
    for name in names:
        kit.add(name, config)
        randomise(kit, name)
    return kit


def loss(kit: ak.AdapterKit, ids: Tensor) -> Tensor:
    return kit.model(ids).square().sum()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("block", "config"),
    [
        (PostNormBlock, CONFIG),
        (PostNormBlock, CONFIG.override({"targets": ["norm_2"], "at": "renormalised"})),
        (PreNormBlock, CONFIG.override({"targets": ["attention"], "residual": "norm_1"})),
        (PreNormBlock, CONFIG.override({"targets": ["mlp"], "residual": "norm_2", "placement": "parallel"})),
        (PreNormBlock, CONFIG.override({"targets": ["blocks.*"]})),
    ],
)
def test_checkpointing_gives_equal_gradients(
    ids: Tensor, reentrant: bool, block: type[nn.Module], config: ak.BottleneckConfig
) -> None:
    kit = kit_with("a", block=block, config=config)
    kit.train_adapter("a")
    gradients = {}
    for mode in (None, reentrant):
        kit.model.reentrant = mode
        kit.model.zero_grad()
        loss(kit, ids).backward()
        gradients[mode] = [p.grad for p in kit.parameters("a")]
    for plain, recomputed in zip(gradients[None], gradients[reentrant], strict=True):
        torch.testing.assert_close(recomputed, plain)
        assert plain.any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_changing_the_adapter_between_forward_and_backward_raises(ids: Tensor, reentrant: bool) -> None:
    kit = kit_with("a", "b")
    kit.train_adapter("a")
    kit.unfreeze("b")
    kit.model.reentrant = reentrant
    first = loss(kit, ids)
    kit.activate("b")
    with pytest.raises(ak.ActivationError, match="ran with 'a', its recomputation would run with 'b'"):
        first.backward()
    assert all(p.grad is None for p in kit.parameters("b"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_before_one_backward_raise_as_well(ids: Tensor, reentrant: bool) -> None:
    kit = kit_with("a", "b")
    kit.train_adapter("a")
    kit.unfreeze("b")
    kit.model.reentrant = reentrant
    first = loss(kit, ids)
    with kit.active("b"):
        second = loss(kit, ids)
        with pytest.raises(ak.ActivationError, match="ran with 'a'"):
            first.backward()
        second.backward()
    with pytest.raises(ak.ActivationError, match="ran with 'b'"):
        with kit.active("b"):
            third = loss(kit, ids)
        third.backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # torch, of any no-grad forward
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_reference_forward_in_between_is_no_change(ids: Tensor, reentrant: bool) -> None:
    kit = kit_with("a", "b")
    kit.train_adapter("a")
    kit.model.reentrant = reentrant
    value = loss(kit, ids)
    with kit.base(), torch.no_grad():
        loss(kit, ids)
    value.backward()
    assert all(p.grad.any() for p in kit.parameters("a"))  # type: ignore[union-attr]  # trained above


def test_without_checkpointing_backward_trains_what_ran_whatever_is_active(ids: Tensor) -> None:
    kit = kit_with("a", "b")
    kit.train_adapter("a")
    value = loss(kit, ids)
    kit.activate("b")
    value.backward()
    assert all(p.grad is not None for p in kit.parameters("a"))
    assert all(p.grad is None for p in kit.parameters("b"))


@pytest.mark.parametrize("config", [CONFIG, CONFIG.override({"targets": ["down"], "residual": "up"})])
def test_an_exception_in_mid_forward_leaves_nothing_behind(ids: Tensor, config: ak.BottleneckConfig) -> None:
    kit = kit_with("a", config=config)
    kit.activate("a")
    expected = kit.model(ids)
    handle = kit.model.blocks[1].down.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="zero"):
        kit.model(ids)
    handle.remove()
    from adapterkit.runtime.this_call import THIS_CALL

    assert not THIS_CALL.handed
    assert torch.equal(kit.model(ids), expected)
    assert not THIS_CALL.handed


def in_threads(*work: Callable[[], None]) -> list[BaseException]:
    """Run these at the same time and return what they raised."""
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("config", [CONFIG, CONFIG.override({"targets": ["down"], "residual": "up"})])
@pytest.mark.parametrize("scoped", [True, False])
def test_threads_with_the_same_adapter_get_right_answers(config: ak.BottleneckConfig, scoped: bool) -> None:
    kit = kit_with("a", config=config)
    batches = [torch.randint(0, 11, (n, 4)) for n in (1, 2, 3)]
    with kit.active("a"), torch.no_grad():
        expected = [kit.model(ids) for ids in batches]
    if not scoped:
        kit.activate("a")

    def task(ids: Tensor, answer: Tensor) -> None:
        for _ in range(100):
            with torch.no_grad():
                if scoped:
                    with kit.active("a"):
                        result = kit.model(ids)
                else:
                    result = kit.model(ids)
            torch.testing.assert_close(result, answer)

    assert in_threads(*[lambda i=i, y=y: task(i, y) for i, y in zip(batches, expected, strict=True)]) == []  # type: ignore[misc]  # lambdas with defaults


@pytest.mark.parametrize("scoped", [True, False])
def test_threads_with_different_adapters_get_right_answers_or_an_error(scoped: bool) -> None:
    kit, ids = kit_with("a", "b"), torch.randint(0, 11, (3, 5))
    expected = {}
    for name in ("a", "b"):
        with kit.active(name), torch.no_grad():
            expected[name] = kit.model(ids)
    outcomes: list[str] = []
    start = threading.Barrier(2)

    def task(name: str) -> None:
        start.wait()
        for _ in range(200):
            try:
                with torch.no_grad():
                    if scoped:
                        with kit.active(name):
                            result = kit.model(ids)
                    else:
                        kit.activate(name)
                        result = kit.model(ids)
            except ak.ActivationError:
                outcomes.append("error")
            else:
                outcomes.append("right" if torch.allclose(result, expected[name]) else "wrong")

    assert in_threads(lambda: task("a"), lambda: task("b")) == []
    assert "wrong" not in outcomes
    assert "right" in outcomes


def test_an_adapter_that_another_thread_activated_meanwhile_is_an_error_until_asked_for_again() -> None:
    kit, ids = kit_with("a", "b"), torch.randint(0, 11, (3, 5))
    kit.activate("a")
    keep = threading.Event()
    ready = threading.Event()

    def other() -> None:
        kit.activate("b")
        ready.set()
        keep.wait()

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    with pytest.raises(ak.ActivationError, match="this thread activated 'a', but another thread has since activated 'b'"):
        kit.model(ids)
    kit.activate("a")
    kit.model(ids)
    keep.set()
    thread.join()


def test_a_scope_that_another_thread_is_in_cannot_be_overruled() -> None:
    kit = kit_with("a", "b")
    errors = []
    with kit.active("a"):
        errors += in_threads(lambda: kit.activate("b"), lambda: kit.active("b").__enter__(), kit.deactivate)
        assert [type(e) for e in in_threads(lambda: kit.remove("a"), kit.unwrap)] == [ak.ActivationError] * 2
        assert in_threads(lambda: kit.remove("b")) == []
        assert in_threads(lambda: kit.active("a").__enter__() and None) == []
    assert [type(error) for error in errors] == [ak.ActivationError] * 3
    assert "is running this model with 'a'" in str(errors[0])


def test_a_thread_that_leaves_its_scope_first_does_not_pull_it_from_under_the_other() -> None:
    kit, ids = kit_with("a"), torch.randint(0, 11, (3, 5))
    with kit.active("a"):
        expected = kit.model(ids)
    inside, leave = threading.Event(), threading.Event()
    results: list[Tensor] = []

    def other() -> None:
        with kit.active("a"):
            inside.set()
            leave.wait()
            results.append(kit.model(ids))

    thread = threading.Thread(target=other)
    with kit.active("a"):
        thread.start()
        inside.wait()
    with pytest.raises(ak.ActivationError, match="this thread activated None"):
        kit.model(ids)
    leave.set()
    thread.join()
    assert torch.equal(results[0], expected)
    kit.model(ids)
    assert not kit.summary().adapters[0].is_active


def test_worker_threads_run_what_the_main_thread_activated(ids: Tensor) -> None:
    kit = kit_with("a")
    kit.activate("a")
    expected, results = kit.model(ids), []
    assert in_threads(lambda: results.append(kit.model(ids))) == []
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("leave", ["scope", "deactivate"])
def test_deactivating_between_forward_and_backward_raises_too(ids: Tensor, reentrant: bool, leave: str) -> None:
    kit = kit_with("a")
    kit.train_adapter("a")
    kit.model.reentrant = reentrant
    if leave == "scope":
        kit.deactivate()
        with kit.active("a"):
            value = loss(kit, ids)
    else:
        value = loss(kit, ids)
        kit.deactivate()
    with pytest.raises(ak.ActivationError, match="ran with 'a', its recomputation would run with None"):
        value.backward()


def test_an_adapter_that_another_thread_deactivated_is_an_error() -> None:
    kit, ids = kit_with("a"), torch.randint(0, 11, (3, 5))
    kit.activate("a")
    holding, done = threading.Event(), threading.Event()

    def other() -> None:
        kit.deactivate()
        holding.set()
        done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    holding.wait()
    with pytest.raises(ak.ActivationError, match="this thread activated 'a', but another thread has since activated None"):
        kit.model(ids)
    done.set()
    thread.join()


@pytest.mark.parametrize("reentrant", [True, False])
def test_threads_that_come_after_one_another_may_train(reentrant: bool) -> None:
    """A thread's number may be that of one that has ended; autograd counts anew in each."""
    kit, ids = kit_with("a"), torch.randint(0, 11, (3, 5))
    kit.train_adapter("a")
    kit.model.reentrant = reentrant

    def work(forwards: int) -> None:
        for _ in range(forwards):
            loss(kit, ids)
        with kit.base(), torch.no_grad():
            kit.model.embedding(ids)
        kit.activate("a")
        loss(kit, ids).backward()

    for forwards in (30, 0, 0, 3, 0):
        assert in_threads(lambda n=forwards: work(n)) == []  # type: ignore[misc]  # lambdas with defaults


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_thread_trains_what_another_activated_long_before(reentrant: bool) -> None:
    """The numbers of autograd in one thread say nothing of those in another."""
    kit, ids = kit_with("a"), torch.randint(0, 11, (3, 5))
    for _ in range(30):
        loss(kit, ids)
    kit.train_adapter("a")
    kit.model.reentrant = reentrant
    assert in_threads(lambda: loss(kit, ids).backward()) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_change_by_another_thread_between_forward_and_backward_raises(reentrant: bool) -> None:
    kit, ids = kit_with("a", "b"), torch.randint(0, 11, (3, 5))
    kit.train_adapter("a")
    kit.unfreeze("b")
    kit.model.reentrant = reentrant
    ready, changed = threading.Event(), threading.Event()

    def work() -> None:
        value = loss(kit, ids)
        ready.set()
        changed.wait()
        value.backward()

    errors: list[BaseException] = []
    thread = threading.Thread(target=lambda: errors.extend(in_threads(work)))
    thread.start()
    ready.wait()
    kit.activate("b")
    changed.set()
    thread.join()
    assert [type(error) for error in errors] == [ak.ActivationError]


class InPlace(nn.Module):
    """Changes its residual stream in place before the branch ends, as some published blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.ln, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln(x)
        x.mul_(0.5)
        return x + self.fc(h)


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_a_stream_that_was_changed_in_place_is_an_error(placement: str) -> None:
    kit = ak.wrap(InPlace())
    kit.add("a", ak.BottleneckConfig(targets=["fc"], residual="ln", placement=placement))
    kit.activate("a")
    with pytest.raises(
        ak.CompatibilityError, match=r"changes its residual stream in place .* shape \(2, 4\), changed 1 times"
    ):
        kit.model(torch.randn(2, 4))


def test_an_input_that_the_host_changes_in_place_is_an_error() -> None:
    host = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    kit = ak.wrap(nn.ModuleDict({"host": host})["host"], torch.randn(2, 4))
    kit.add("a", ak.BottleneckConfig(targets=[""], placement="parallel"))
    kit.activate("a")
    with pytest.raises(ak.CompatibilityError, match="in place"):
        kit.model(torch.randn(2, 4))


def in_another_thread(run: Callable[[], Tensor]) -> Tensor:
    out: list[Tensor] = []
    thread = threading.Thread(target=lambda: out.append(run()))
    thread.start()
    thread.join()
    return out[0]


def test_a_thread_that_looks_at_the_base_silences_no_other(post_norm: Tiny, ids: Tensor) -> None:
    kit = ak.wrap(post_norm.eval())
    kit.add("a", CONFIG)
    randomise(kit, "a")
    plain = post_norm(ids)
    kit.activate("a")
    adapted = post_norm(ids)
    with without_adapters():
        assert torch.equal(post_norm(ids), plain)
        assert torch.equal(in_another_thread(lambda: post_norm(ids)), adapted)
    assert torch.equal(post_norm(ids), adapted)


def test_what_other_threads_run_is_no_part_of_a_trace(post_norm: Tiny, ids: Tensor) -> None:
    main = threading.get_ident()

    def run_beside(*_: object) -> None:
        if threading.get_ident() == main:
            in_another_thread(lambda: post_norm(ids))

    kit = ak.wrap(post_norm.eval(), ids)
    expected = kit.sites("houlsby")
    post_norm.embedding.register_forward_hook(run_beside)
    discover._REMEMBERED.clear()
    assert kit.sites("houlsby") == expected
    kit.add("a", "houlsby", bottleneck_size=3)
    kit.activate("a")
    assert all(site.fired_in_eval == 1 and site.agrees for site in kit.verify().sites or ())
