"""Rows that are divided are the batch's."""

import pytest
import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.runtime.compose.batch import BatchHook
from adapterkit.runtime.this_call import THIS_CALL

from ...hosts.tiny import randomise


class Flat(nn.Module):
    """Runs a layer on the tokens of all sequences, one after the other, and one on the sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.rows = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(self.tokens(x.flatten(0, 1)).view(x.shape))


def wrapped(target: str) -> ak.AdapterKit:
    kit = ak.wrap(Flat())
    for name in "ab":
        kit.add(name, "lora", targets=[target])
        randomise(kit, name)
    return kit


@pytest.mark.parametrize("composition", [ak.Rows(["a", "b"] * 6), ak.BatchSplit("a", "b", sizes=[5, 7])])
def test_tokens_of_all_sequences_are_not_taken_for_rows(composition: object) -> None:
    kit = wrapped("tokens")
    kit.activate(composition)
    with pytest.raises(ak.CompatibilityError, match=r"'tokens' has .* \(12, 8\), .* the batch has 4"):
        kit.model(torch.randn(4, 3, 8))
    assert not THIS_CALL.batches, "nothing is left behind"


def test_the_batch_is_divided_wherever_the_model_is_called_from() -> None:
    kit, x = wrapped("rows"), torch.randn(4, 3, 8)
    kit.activate(ak.BatchSplit("a", "b"))
    mixed = kit.model(x)
    for name, rows in (("a", slice(0, 2)), ("b", slice(2, 4))):
        with kit.active(name):
            torch.testing.assert_close(mixed[rows], kit.model(x)[rows])
    assert torch.equal(nn.Sequential(nn.Identity(), kit.model)(x), mixed)
    assert kit.model.rows(torch.randn(6, 8)).shape == (6, 8), (
        "a part that is called on its own has no batch to compare with"
    )
    kit.activate("a")
    assert not any(isinstance(hook, BatchHook) for hook in kit.model._forward_pre_hooks.values())


def test_a_list_has_as_many_rows_as_items() -> None:
    class Stacking(Flat):
        def forward(self, images: list[Tensor]) -> Tensor:
            return self.rows(torch.stack(images))

    kit = ak.wrap(Stacking(), ([torch.randn(8), torch.randn(8)],))
    for name in "ab":
        kit.add(name, "lora", targets=["rows"])
    kit.activate(ak.Rows(["a", "b", None]))
    assert kit.model([torch.randn(8)] * 3).shape == (3, 8)
