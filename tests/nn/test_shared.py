"""Tensors that several modules share, held by one of them."""

import torch
from torch import nn

from adapterkit.nn.shared import borrowed, share


def sharing() -> tuple[nn.Module, nn.Module, nn.Module]:
    owner, other, shared = nn.Identity(), nn.Identity(), nn.Linear(2, 3)
    share(shared, [other, owner], owner=owner)
    return owner, other, shared


def test_every_module_finds_what_is_shared() -> None:
    owner, other, shared = sharing()
    assert owner.shared is other.shared is shared


def test_the_owner_alone_has_it_for_a_child() -> None:
    owner, other, shared = sharing()
    assert list(owner.state_dict()) == ["shared.weight", "shared.bias"]
    assert list(other.state_dict()) == []
    other.to(torch.float64)
    assert shared.weight.dtype == torch.float32
    owner.to(torch.float64)
    assert other.shared.weight.dtype == torch.float64


def test_borrowed_is_what_another_module_holds() -> None:
    owner, other, shared = sharing()
    assert borrowed(other) is shared
    assert borrowed(owner) is None
    assert borrowed(nn.Identity()) is None
