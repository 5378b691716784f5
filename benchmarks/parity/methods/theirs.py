"""What peers compute where they are wrong, as the formula with one thing changed: it proves that a reason is the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..measure import float_tensors
from . import formula
from .case import Case, Key
from .hosts import Host

__all__ = [
    "bare_convolution",
    "bias_is_scaled",
    "bias_is_unscaled",
    "combined",
    "merged_without_alpha",
    "no_inverse",
    "no_scaling_if_gated",
    "second_output_projection",
    "thirds",
]

Tensors = Mapping[Key, Tensor]


def thirds(case: Case, host: Host, tensors: Tensors) -> list[Tensor]:
    """DeBERTa's queries, keys and values taken for three blocks of rows."""
    return formula.outputs(case, replace(host, name="thirds"), (1.0, tensors))


def no_scaling_if_gated(case: Case, host: Host, tensors: Tensors) -> list[Tensor]:
    """Gated LoRA with 1 in place of alpha / rank."""
    return formula.outputs(_with(case, alpha=case.config["rank"]), host, (1.0, tensors))


def no_inverse(case: Case, host: Host, tensors: Tensors) -> list[Tensor]:
    """A coupling whose inverse never runs."""
    return formula.outputs(_with(case, inverse=False), host, (1.0, tensors))


def second_output_projection(case: Case, host: Host, tensors: Tensors) -> list[Tensor]:
    """The change of an attention's output projection added twice."""
    twice = {
        key: 2 * tensor if key.place.path.endswith("out_proj.weight") and key.name == "lora_B" else tensor
        for key, tensor in tensors.items()
    }
    return formula.outputs(case, host, (1.0, twice))


def bias_is_unscaled(case: Case, host: Host, tensors: Tensors) -> list[Tensor]:
    """Changed weights beside the biases of before."""
    weights = {name: new for name, new in formula.adapted(case, host, tensors).items() if not name.endswith("bias")}
    return _outputs(host, weights)


def bias_is_scaled(case: Case, host: Host, tensors: Tensors) -> list[Tensor]:
    """DoRA as m / |W + B A| (W x + b + alpha / rank B A x): the bias is scaled, and the norm knows no alpha."""
    changed = {}
    for name, weight, bias, factor, delta, scaling in _dora(case, host, tensors):
        changed[f"{name}.weight"] = factor[:, None] * (weight + scaling * delta)
        if bias is not None:
            changed[f"{name}.bias"] = factor * bias
    return _outputs(host, changed)


def merged_without_alpha(case: Case, host: Host, tensors: Tensors) -> list[Tensor]:
    """DoRA merged as m (W + B A) / |W + B A|."""
    parts = _dora(case, host, tensors)
    return _outputs(host, {f"{name}.weight": factor[:, None] * (w + delta) for name, w, _, factor, delta, _ in parts})


def bare_convolution(case: Case, host: Host, tensors: Tensors) -> list[Tensor]:
    """A beside a convolution with its stride and padding, but without its dilation, and padding with zeros."""
    own = {key.name: tensor for key, tensor in tensors.items()}
    conv = host.model.get_submodule("conv")
    scaling = case.config["alpha"] / case.config["rank"]
    factor: Any = 1.0
    if "magnitude" in own:
        delta = (own["lora_B"].flatten(1) @ own["lora_A"].flatten(1)).reshape(conv.weight.shape)
        norm = (conv.weight + scaling * delta).flatten(1).norm(dim=1)
        factor = (own["magnitude"] / norm).view(-1, 1, 1)
    bias = 0 if conv.bias is None else conv.bias.view(-1, 1, 1)

    def change(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        inner = F.conv2d(args[0], own["lora_A"], stride=module.stride, padding=module.padding)
        return factor * (output - bias + scaling * F.conv2d(inner, own["lora_B"])) + bias

    handle = conv.register_forward_hook(change)
    try:
        return _outputs(host, {})
    finally:
        handle.remove()


def _dora(case: Case, host: Host, tensors: Tensors) -> list[tuple[str, Tensor, Tensor | None, Tensor, Tensor, float]]:
    """By linear layer: its path, weight and bias, m / |W + B A|, B A, and alpha / rank."""
    by_path: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        by_path.setdefault(key.place.path, {})[key.name] = tensor
    found = []
    for path, own in by_path.items():
        module, delta = host.model.get_submodule(path), own["lora_B"] @ own["lora_A"]
        factor = own["magnitude"] / (module.weight + delta).norm(dim=1)
        found.append((path, module.weight, module.bias, factor, delta, case.config["alpha"] / case.config["rank"]))
    return found


def combined(case: Case, host: Host, adapters: Mapping[str, Tensors]) -> list[Tensor]:
    """What combining gives there, where it is wrong."""
    config, how = case.config, case.config["how"]
    weights, rank, alpha = config["weights"], config["rank"], config["alpha"]
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if case.peer == "peft" and (
        how == "linear" or len(weights) == 1
    ):  # sqrt(w s) on A and on B, the sign on A; the sum is given scaling 1,
        again = math.sqrt(rank) if config.get("use_rslora") else 1.0  # or, alpha being the rank, rank / sqrt(rank)
        sides = {
            name: (math.copysign(math.sqrt(abs(w * scaling)), w), math.sqrt(abs(w * scaling)))
            for name, w in weights.items()
        }
        return formula.by_factor(case, host, adapters, sides, again)
    if case.peer == "peft":
        new_rank = 2 * rank if how == "svd" else rank * len(weights)
        return formula.outputs(case, host, *((w * math.sqrt(new_rank), adapters[name]) for name, w in weights.items()))
    if how == "svd":  # the rank changes, alpha stays, and the scaling is left out of the sum
        return formula.outputs(case, host, *((w * rank / (2 * rank), adapters[name]) for name, w in weights.items()))
    sides = {name: (abs(w) if how == "negate_b" else w, w) for name, w in weights.items()}
    return formula.by_factor(case, host, adapters, sides, scaling)


def _outputs(host: Host, changed: Mapping[str, Tensor]) -> list[Tensor]:
    return float_tensors(functional_call(host.model, dict(changed), (), dict(host.inputs), tie_weights=False))


def _with(case: Case, **config: Any) -> Case:
    return replace(case, config={**case.config, **config})
