"""The `peft` library: a model adapted by it, and its tensors in our layout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.beft.layer import BeftLayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn

from .case import NAME, SHARED, Case, Key, Leaf, Place, same
from .draw import draw_

__all__ = ["PeftPeer"]


class PeftPeer:
    """A copy of a model, adapted by `peft`."""

    def __init__(self, case: Case, host: nn.Module) -> None:
        self.model = copy.deepcopy(host)
        self._case, self._host = case, host
        self._wrapper = peft.get_peft_model(self.model, _config(case), adapter_name=NAME)
        self._wrapper.double().eval()
        self.leaves = self._leaves(NAME)
        draw_(self.leaves, seed=2)

    def merge(self) -> None:
        """Put the adapter into the model's weights."""
        self._wrapper.merge_adapter()

    def unmerge(self) -> None:
        """Take it out again."""
        self._wrapper.unmerge_adapter()

    def add_other(self) -> Mapping[Key, Leaf]:
        """Add a second adapter of the same config, called "other"."""
        self._wrapper.add_adapter("other", _config(self._case))
        self._wrapper.double().eval()
        leaves = self._leaves("other")
        draw_(leaves, seed=4)
        return leaves

    def combine(self, weights: Mapping[str, float], how: str) -> None:
        """Activate a combination of the adapters "parity" and "other", made anew."""
        kind = {"linear": "linear", "factors": "linear", "concatenate": "cat", "svd": "svd"}[how]
        options = {"svd_rank": 2 * self._case.config["rank"]} if kind == "svd" else {}
        self._wrapper.add_weighted_adapter(list(weights), list(weights.values()), "combined", kind, **options)
        self._wrapper.set_adapter("combined")
        self._wrapper.double().eval()

    def _leaves(self, name: str) -> dict[Key, Leaf]:
        """All tensors of an adapter; what sites share comes last."""
        leaves: dict[Key, Leaf] = {}
        for path, layer in self.model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                place = Place(path.replace(".base_layer", ""))
                if isinstance(layer, ParamWrapper):
                    place = Place(f"{place.path}.{layer.parameter_name}")
                    found = _of_parameter(layer, name)
                elif isinstance(layer, IA3Layer):
                    place = place._replace(at="input" if layer.is_feedforward else "output")
                    found = iter([("scale", Leaf(layer.ia3_l[name], torch.flatten))])
                else:
                    if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
                        place = Place(f"{place.path}.in_proj_weight")
                    elif place.path.endswith("out_proj") and "in_proj_weight" in str(list(leaves)):
                        place = Place(f"{place.path}.weight")  # torch reads it around its module
                    found = self._of_module(layer, name, place)
                leaves |= {Key(place, tensor): leaf for tensor, leaf in found}
        for tensor in ("vera_A", "vera_B"):
            buffers = getattr(self._wrapper.base_model, tensor, None)
            if buffers is not None:
                leaves[Key(SHARED, tensor)] = Leaf(buffers[name], is_trained=False)
        return leaves

    def _of_module(self, layer: BaseTunerLayer, name: str, place: Place) -> Iterator[tuple[str, Leaf]]:
        """The tensors at a module, other than IA3's."""
        if isinstance(layer, VeraLayer):
            yield "lambda_b", Leaf(layer.vera_lambda_b[name])
            yield "lambda_d", Leaf(layer.vera_lambda_d[name])
        elif isinstance(layer, BeftLayer):
            yield "bias", Leaf(layer.beft_bias[name], torch.flatten)
        elif isinstance(layer, LNTuningLayer):
            base = self._host.get_submodule(place.path)
            for tensor, parameter in layer.ln_tuning_layers[name].named_parameters():
                yield tensor, Leaf(parameter, offset=base.get_parameter(tensor))
        elif isinstance(layer, LoraLayer):
            yield from _of_lora(layer, name)


def _of_lora(layer: LoraLayer, name: str) -> Iterator[tuple[str, Leaf]]:
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        kept = torch.ones_like(layer.lora_embedding_A[name])
        if base.padding_idx is not None:
            kept[:, base.padding_idx] = 0  # that row of A starts at 0 there and never has a gradient
        yield "lora_A", Leaf(layer.lora_embedding_A[name], within=kept)
        yield "lora_B", Leaf(layer.lora_embedding_B[name])
    else:
        a, b, groups = layer.lora_A[name], layer.lora_B[name], getattr(base, "groups", 1)
        mask = None if groups == 1 else _block_diagonal(a.weight, groups)
        yield "lora_A", Leaf(a.weight, same if groups == 1 else partial(_blocks, groups=groups), within=mask)
        yield "lora_B", Leaf(b.weight)
        if b.bias is not None:
            yield "lora_bias", Leaf(b.bias)
    if name in layer.lora_magnitude_vector:
        yield "magnitude", Leaf(layer.lora_magnitude_vector[name].weight, torch.flatten)


def _of_parameter(layer: ParamWrapper, name: str) -> Iterator[tuple[str, Leaf]]:
    """A parameter (experts, a, b): theirs is called by in and out, ours by a and b; the experts of B change fastest."""
    experts = layer.num_experts
    in_first = experts > 1 and not layer._did_swap_in_out_features
    names = ("lora_B", "lora_A") if in_first else ("lora_A", "lora_B")
    if experts == 1:
        yield "lora_A", Leaf(layer.lora_A[name].weight)
        yield "lora_B", Leaf(layer.lora_B[name].weight)
        return
    yield names[0], Leaf(layer.lora_A[name].weight, partial(_expert_a, experts=experts, flip=in_first))
    yield names[1], Leaf(layer.lora_B[name].weight, partial(_expert_b, experts=experts, flip=in_first))


def _expert_a(weight: Tensor, *, experts: int, flip: bool) -> Tensor:
    """(experts * rank, in) -> (experts, rank, in), or with `flip` (experts, in, rank)."""
    stacked = weight.reshape(experts, -1, weight.shape[1])
    return stacked.mT if flip else stacked


def _expert_b(weight: Tensor, *, experts: int, flip: bool) -> Tensor:
    """(out, rank * experts) -> (experts, out, rank), or with `flip` (experts, rank, out)."""
    stacked = weight.reshape(weight.shape[0], -1, experts).permute(2, 0, 1)
    return stacked.mT if flip else stacked


def _block_diagonal(weight: Tensor, groups: int) -> Tensor:
    """1 where a rank's row and an input channel belong to the same group."""
    rank, width = weight.shape[:2]
    same_group = (torch.arange(rank) // (rank // groups))[:, None] == torch.arange(width) // (width // groups)
    return same_group.to(weight.dtype).reshape(rank, width, *(1,) * (weight.dim() - 2)).expand_as(weight)


def _blocks(weight: Tensor, *, groups: int) -> Tensor:
    """(rank, in, ...) -> (rank, in / groups, ...): of each row the channels of its own group."""
    rank, width = weight.shape[0] // groups, weight.shape[1] // groups
    parts = [weight[g * rank : (g + 1) * rank, g * width : (g + 1) * width] for g in range(groups)]
    return torch.cat(parts)


def _config(case: Case) -> peft.PeftConfig:
    """Our settings in their words."""
    makers: dict[str, Callable[[Case], peft.PeftConfig]] = {
        "lora": _lora,
        "dora": _lora,
        "combine": _lora,
        "vera": lambda case: peft.VeraConfig(r=case.config["rank"], **case.there),
        "ia3": lambda case: peft.IA3Config(**case.there),
        "bitfit": lambda case: peft.BeftConfig(**case.there),
        "norm_tuning": lambda case: peft.LNTuningConfig(**case.there),
    }
    return makers[case.method](case)


def _lora(case: Case) -> peft.LoraConfig:
    rank, alpha = (case.config.get(name, 8) for name in ("rank", "alpha"))
    settings: dict[str, Any] = {
        "use_rslora": case.config.get("use_rslora", False),
        "use_dora": case.config.get("use_dora", False),
        "lora_bias": case.config.get("bias", False),
    }
    for name, pattern, value in (("r", "rank_pattern", rank), ("lora_alpha", "alpha_pattern", alpha)):
        rest = dict(value) if isinstance(value, Mapping) else {"default": value}
        settings |= {name: rest.pop("default"), pattern: rest}
    return peft.LoraConfig(**settings, **case.there)
