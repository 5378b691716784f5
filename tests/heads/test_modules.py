"""Heads as modules: their formulas, their losses, what they refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkit.errors import CompatibilityError
from adapterkit.heads.losses import class_loss, label_loss, span_loss, target_loss
from adapterkit.heads.modules import ChoiceScorer, HeadLayers, RowScorer, TokenPredictor, TokenScorer
from adapterkit.heads.pooling import pooled

HIDDEN = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]])


def layers(outputs: int, **settings: Any) -> HeadLayers:
    return HeadLayers(6, outputs, **settings)


def test_pooling_is_of_the_real_positions() -> None:
    assert torch.equal(pooled(HIDDEN, MASK, "first"), HIDDEN[:, 0])
    last = torch.stack([HIDDEN[row, position] for row, position in enumerate([2, 4, 4, 0])])
    mean = torch.stack([HIDDEN[row][MASK[row].bool()].mean(0) for row in range(4)])
    for mask in (MASK, MASK.bool(), MASK.float()):
        assert torch.equal(pooled(HIDDEN, mask, "last"), last)
        torch.testing.assert_close(pooled(HIDDEN, mask, "mean"), mean)
    assert torch.equal(pooled(HIDDEN, None, "last"), HIDDEN[:, -1])
    torch.testing.assert_close(pooled(HIDDEN, None, "mean"), HIDDEN.mean(1))
    assert torch.equal(pooled(HIDDEN[:, 0], MASK, "mean"), HIDDEN[:, 0]), "pooled already"
    with pytest.raises(
        CompatibilityError, match=r"pooling='mean' needs a mask of shape \(batch, seq\), here \(4, 5\); found \(4, 3\)"
    ):
        pooled(HIDDEN, MASK[:, :3], "mean")


def test_a_row_without_any_real_position_is_finite() -> None:
    none = torch.zeros_like(MASK)
    assert pooled(HIDDEN, none, "mean").isfinite().all()
    assert pooled(HIDDEN, none, "last").isfinite().all()


def test_layers_have_the_non_linearity_between_them() -> None:
    head = layers(3, layers=2, non_linearity="gelu")
    by_hand = F.linear(F.gelu(F.linear(HIDDEN, head.inner[0].weight, head.inner[0].bias)), head.last.weight, head.last.bias)
    torch.testing.assert_close(head(HIDDEN), by_hand)
    head = layers(3, dropout=0.5)
    assert not torch.equal(head(HIDDEN), head(HIDDEN))
    head.eval()
    assert torch.equal(head(HIDDEN), head(HIDDEN))


def test_a_classifier_has_the_cross_entropy() -> None:
    head, labels = RowScorer(layers(3), class_loss, pooling="mean"), torch.tensor([0, 2, 1, 1])
    logits = head(HIDDEN, MASK)
    torch.testing.assert_close(logits, head.layers(pooled(HIDDEN, MASK, "mean")))
    torch.testing.assert_close(head.loss(logits, labels), F.cross_entropy(logits, labels))
    torch.testing.assert_close(head.loss(logits, labels[:, None]), F.cross_entropy(logits, labels))
    with pytest.raises(CompatibilityError, match=r"labels of shape \(4,\) are wanted here; found \(3,\)"):
        head.loss(logits, labels[:3])
    with pytest.raises(CompatibilityError, match=r"whole numbers; found torch.float32"):
        head.loss(logits, labels.float())


def test_labels_of_minus_100_do_not_count_and_a_batch_of_them_costs_nothing() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, -100, 1, -100])
    torch.testing.assert_close(class_loss(logits, labels), F.cross_entropy(logits[[0, 2]], labels[[0, 2]]))
    assert class_loss(logits, torch.full((4,), -100)) == 0


def test_a_multi_label_classifier_has_the_binary_cross_entropy() -> None:
    head, labels = RowScorer(layers(3), label_loss), torch.tensor([[0, 1, 1]] * 4)
    logits = head(HIDDEN)
    torch.testing.assert_close(head.loss(logits, labels), F.binary_cross_entropy_with_logits(logits, labels.float()))


def test_a_regressor_has_the_squared_error() -> None:
    one, two = RowScorer(layers(1), target_loss), RowScorer(layers(2), target_loss, pooling="last")
    for labels in (torch.randn(4), torch.randn(4, 1)):
        torch.testing.assert_close(one.loss(one(HIDDEN), labels), F.mse_loss(one(HIDDEN)[:, 0], labels.flatten()))
    labels = torch.randn(4, 2)
    torch.testing.assert_close(two.loss(two(HIDDEN), labels), F.mse_loss(two(HIDDEN), labels))
    with pytest.raises(CompatibilityError, match=r"labels of shape \(4, 2\)"):
        two.loss(two(HIDDEN), labels[:, 0])


def test_a_tagger_scores_each_position() -> None:
    head, labels = TokenScorer(layers(3), class_loss), torch.randint(0, 3, (4, 5))
    labels[0, 3:] = -100
    logits = head(HIDDEN)
    assert logits.shape == (4, 5, 3)
    torch.testing.assert_close(head.loss(logits, labels), F.cross_entropy(logits.transpose(1, 2), labels))
    with pytest.raises(CompatibilityError, match=r"reads \(batch, seq, hidden\), and was given \(4, 6\)"):
        head(HIDDEN[:, 0])


def test_choices_are_rows_that_lie_together() -> None:
    head, labels = ChoiceScorer(layers(1), choices=2), torch.tensor([1, 0])
    logits = head(HIDDEN)
    torch.testing.assert_close(logits.flatten(), head.layers(HIDDEN[:, 0])[:, 0])
    torch.testing.assert_close(head.loss(logits, labels), F.cross_entropy(logits, labels))
    with pytest.raises(CompatibilityError, match=r"2 choices are so many rows .*; found 3 rows"):
        head(HIDDEN[:3])


def test_a_span_has_a_start_and_an_end() -> None:
    head, labels = TokenScorer(layers(2), span_loss), torch.tensor([[0, 1], [2, 4], [1, 1], [3, 99]])
    logits = head(HIDDEN)
    start, end = logits[..., 0], logits[..., 1]
    parts = [F.cross_entropy(start[i : i + 1], labels[i : i + 1, 0]) for i in range(4)]
    parts += [F.cross_entropy(end[i : i + 1], labels[i : i + 1, 1]) for i in range(3)]
    torch.testing.assert_close(head.loss(logits, labels), torch.stack(parts).mean(), msg="99 is beyond the sequence")


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_token_predictor_maps_to_the_vocabulary(is_tied: bool) -> None:
    head, weight = TokenPredictor(6, 9, layers=2, is_tied=is_tied, has_bias=True), torch.randn(9, 6)
    with torch.no_grad():
        head.bias.normal_()
    inner = head.norms[0](F.gelu(head.inner[0](HIDDEN)))
    used = weight if is_tied else head.weight
    torch.testing.assert_close(head(HIDDEN, weight=weight if is_tied else None), F.linear(inner, used, head.bias))
    assert ("weight" in dict(head.named_parameters())) != is_tied
    if is_tied:
        with pytest.raises(CompatibilityError, match=r"tied to an embedding, and none was given: .* shape \(9, 6\)"):
            head(HIDDEN)


def test_a_causal_one_is_compared_with_the_next_token() -> None:
    logits, labels = torch.randn(4, 5, 9), torch.randint(0, 9, (4, 5))
    labels[0, 2] = -100
    causal, masked = (TokenPredictor(6, 9, is_causal=which) for which in (True, False))
    torch.testing.assert_close(causal.loss(logits, labels), F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:]))
    torch.testing.assert_close(masked.loss(logits, labels), F.cross_entropy(logits.transpose(1, 2), labels))


def test_a_token_predictor_undoes_adapters_before_the_vocabulary() -> None:
    class Doubled:
        def undone(self, x: Tensor) -> Tensor:
            return x / 2

    class Shifted:
        def undone(self, x: Tensor) -> Tensor:
            return x - 1

    head, weight = TokenPredictor(6, 9), torch.randn(9, 6)
    found = head(HIDDEN, weight=weight, undoing=[Doubled(), Shifted()])
    torch.testing.assert_close(found, (HIDDEN / 2 - 1) @ weight.T)


def test_half_precision_embeddings_are_read_as_they_are() -> None:
    head, weight = TokenPredictor(6, 9), torch.randn(9, 6).bfloat16()
    logits = head(HIDDEN, weight=weight)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, (HIDDEN @ weight.float().T), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("made", "loss_of", "labels"),
    [
        (RowScorer, class_loss, torch.zeros(4).long()),
        (RowScorer, label_loss, torch.tensor([[0.0, 1.0]] * 4)),
        (RowScorer, target_loss, torch.tensor([[0.2, -0.7]] * 4)),
        (TokenScorer, class_loss, torch.zeros(4, 5).long()),
        (TokenScorer, span_loss, torch.zeros(4, 2).long()),
    ],
)
def test_losses_reach_every_parameter(made: Any, loss_of: Any, labels: Tensor) -> None:
    head: nn.Module = made(layers(2, layers=3), loss_of)
    loss = head.loss(head(HIDDEN), labels)
    assert loss.shape == ()
    assert math.isfinite(loss.item())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
