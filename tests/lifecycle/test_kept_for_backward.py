"""What a forward keeps for backward: nothing of frozen layers below the first adapter that acts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import adapterkit as ak

from ..hosts.deep import CONFIG, LAYERS, Deep, deep_kit


def kept_bytes(model: nn.Module, *inputs: Any) -> int:
    """What a forward keeps for backward, without the model's own parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)  # noqa: F841  # held, so that no memory is used twice meanwhile
    return sum(kept.values())


def bert_kit(**settings: Any) -> ak.AdapterKit:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    kit = ak.wrap(BertModel(BertConfig(**sizes, vocab_size=20), add_pooling_layer=False))
    kit.add("a", "pfeiffer", bottleneck_size=3)
    kit.train_adapter("a", **settings)
    return kit


def encoder_kit(**settings: Any) -> ak.AdapterKit:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    kit = ak.wrap(nn.Sequential(nn.Embedding(11, 8), nn.TransformerEncoder(layer, LAYERS)))
    kit.add("a", ak.BottleneckConfig(targets=["norm2"], bottleneck_size=3))
    kit.train_adapter("a", **settings)
    return kit


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (bert_kit, {}),
        (bert_kit, {"reentrant": False}),
        (deep_kit, {"reentrant": False}),
        (encoder_kit, {"reentrant": False}),
    ],
)
def test_frozen_layers_below_the_first_adapter_that_acts_keep_nothing_for_backward(make: Any, settings: Any) -> None:
    kit, ids = make(**settings), torch.randint(0, 11, (8, 16))
    kit.model.train()
    kept = {}
    for count in range(LAYERS):
        with kit.active(ak.Drop("a", layers=range(count))):
            kept[count] = kept_bytes(kit.model, ids)
    with kit.base():
        assert kept_bytes(kit.model, ids) == 0
    layer = kept[1] - kept[2]
    assert layer > 0
    for count in range(LAYERS):  # of the lowest that acts, what comes before its adapter is not kept either
        assert kept[count] == kept[LAYERS - 1] + (LAYERS - 1 - count) * layer
    assert kept[LAYERS - 1] <= layer
    kit.add("upper", kit.adapters["a"].override({"layers": [2, 3]}))
    kit.train_adapter("upper", **settings)
    assert kept_bytes(kit.model, ids) == kept[2]


def test_a_model_that_does_not_say_whether_it_is_checkpointed_keeps_what_lies_below_unless_told() -> None:
    kit, ids = deep_kit(), torch.randint(0, 11, (8, 16))
    kit.activate(ak.Drop("a", layers=range(3)))
    all_layers = kept_bytes(kit.model, ids)
    kit.freeze(reentrant=False)
    one_layer = kept_bytes(kit.model, ids)
    assert one_layer < all_layers / 3
    kit.freeze()
    assert kept_bytes(kit.model, ids) == all_layers


def test_a_model_told_not_to_be_checkpointed_in_the_reentrant_way_says_so_when_it_is() -> None:
    kit, ids = ak.wrap(Deep()), torch.randint(0, 11, (3, 5))
    kit.add("a", CONFIG, heads=["classifier"])
    kit.train_adapter("a", reentrant=False)
    kit.model.reentrant = True
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        kit.model(ids).sum().backward()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        problems = kit.verify(ids).problems
    assert problems[0].startswith("no gradient of the model's output reaches blocks.0.norm_2._adapterkit.a.down_weight")
    kit.model.reentrant = False
    kit.model(ids).sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a"))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_a_model_that_says_whether_it_is_checkpointed_is_believed_whatever_is_told() -> None:
    kit, ids = bert_kit(reentrant=False), torch.randint(0, 11, (3, 5))
    kit.model.train()
    kit.model.gradient_checkpointing_enable({"use_reentrant": True})
    kit.model.disable_input_require_grads()
    kit.model(ids).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for p in kit.parameters("a"))
