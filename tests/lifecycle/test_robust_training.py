"""Robust training with AdapterDrop: random depths, checkpointing, several processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import adapterkit as ak

from ..hosts.deep import CONFIG, LAYERS, Deep, deep_kit, depth_of


def trained(reentrant: bool | None, *, in_scope: bool) -> list[Tensor]:
    kit, ids = deep_kit(), torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    kit.model.reentrant = reentrant
    optimizer = torch.optim.AdamW(kit.parameters("a"), lr=0.01)
    for step in range(8):
        drop = ak.random_drop("a", most=LAYERS - 1, step=step)
        if in_scope:
            with kit.active(drop):
                kit.model(ids).square().sum().backward()
        else:
            kit.activate(drop)
            kit.model(ids).square().sum().backward()
        before = [p.detach().clone() for p in kit.parameters("a")]
        optimizer.step()
        each = len(before) // LAYERS
        moved = [not torch.equal(p, q) for p, q in zip(kit.parameters("a"), before, strict=True)]
        assert moved == [False] * each * depth_of(drop) + [True] * each * (LAYERS - depth_of(drop))
        optimizer.zero_grad()
    return list(kit.parameters("a"))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("in_scope", [True, False])
def test_robust_training_is_the_same_under_checkpointing_and_moves_what_acts_alone(reentrant: bool, in_scope: bool) -> None:
    for one, other in zip(trained(reentrant, in_scope=in_scope), trained(None, in_scope=True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_another_depth_between_forward_and_backward_raises(reentrant: bool) -> None:
    kit, ids = deep_kit(), torch.randint(0, 11, (3, 5))
    kit.model.reentrant = reentrant
    kit.activate(ak.Drop("a", layers=range(1)))
    loss = kit.model(ids).sum()
    kit.activate(ak.Drop("a", layers=range(2)))
    with pytest.raises(ak.ActivationError, match="the active adapter changed between forward and backward"):
        loss.backward()


def test_an_adapter_that_rests_in_each_layer_trains_nothing_and_its_head_all_the_same() -> None:
    torch.manual_seed(0)
    kit, ids = ak.wrap(Deep()), torch.randint(0, 11, (3, 5))
    kit.add("a", CONFIG, heads=["classifier"])
    kit.train_adapter("a")
    with kit.active(ak.Drop("a", layers=range(LAYERS))):
        kit.model(ids).sum().backward()
    assert all(p.grad is None for p in kit.parameters("a", heads=False))
    assert all(p.grad is not None for p in list(kit.parameters("a", heads=True))[-2:])


def _work(rank: int, folder: str) -> None:
    """One of two processes: train on its half of each batch, and save."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    kit = deep_kit()
    kit.model.reentrant = False
    model = DistributedDataParallel(kit.model, find_unused_parameters=True)
    _train_in_halves(kit, model, slice(2 * rank, 2 * rank + 2))
    torch.save([p.detach() for p in kit.parameters("a")], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _train_in_halves(kit: ak.AdapterKit, model: nn.Module, rows: slice) -> None:
    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(kit.parameters("a"), lr=0.1)
    for step in range(6):
        with kit.active(ak.random_drop("a", most=LAYERS - 1, step=step)):
            model(ids[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_two_processes_train_what_one_does_with_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_work, (str(tmp_path),), nprocs=2)
    kit = deep_kit()
    _train_in_halves(kit, kit.model, slice(None))
    assert len({depth_of(ak.random_drop("a", most=LAYERS - 1, step=step)) for step in range(6)}) > 2
    for rank in range(2):
        for one, other in zip(torch.load(tmp_path / f"{rank}.pt"), kit.parameters("a"), strict=True):
            torch.testing.assert_close(one, other)
