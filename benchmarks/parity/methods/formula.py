"""The methods as their papers write them, for one dense host: no library of adapters is imported here.

Whatever changes weights is computed as the changed weight, W' (`torch.func.functional_call` runs the host with it): LoRA
2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, VeRA 2310.11454, IA3 2205.05638 (scaled activations are scaled rows or
columns), BitFit 2106.10199 and norms as differences. Whatever is no weight is a hook: Compacter 2106.04647 at the places
of `adapters`, and MAD-X' coupling (2005.00052; NICE 1410.8516; GLOW 1807.03039, its log-scale bounded as Real NVP's is,
1605.08803).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..measure import float_tensors
from .case import SHARED, Case, Key, Place, by_pattern
from .hosts import Host, rows_of

__all__ = ["adapted", "by_factor", "combined", "outputs"]

Tensors = Mapping[Key, Tensor]
Grouped = dict[Place, dict[str, Tensor]]
Change = tuple[Tensor, Tensor]


def outputs(case: Case, host: Host, *adapters: tuple[float, Tensors]) -> list[Tensor]:
    """The outputs of the host with these adapters, each with its weight (other than 1 for LoRA alone)."""
    changed: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for weight, tensors in adapters:
            groups = _by_place(tensors)
            shared = groups.pop(SHARED, {})
            for place, own in groups.items():
                if "down.W_left" in own or "down_weight" in own:
                    hooks.enter_context(_bottleneck(case, host.model, place, own | shared))
                elif "F.0.weight" in own:
                    hooks.enter_context(_coupling(case, host, own))
                elif "gate_weight" in own:
                    hooks.enter_context(_gated(case, host, place, own))
                else:
                    _change(case, host, place, own | shared, weight, changed)
                    hooks.enter_context(_bias_of_no_bias(case, host.model, place, own))
        return float_tensors(functional_call(host.model, changed, (), dict(host.inputs), tie_weights=False))


def combined(case: Case, host: Host, adapters: Mapping[str, Tensors]) -> list[Tensor]:
    """The outputs with the weighted sum of several LoRAs, or, where that is asked for, with that of their factors."""
    weights = case.config["weights"]
    if case.config["how"] != "factors":
        return outputs(case, host, *((weight, adapters[name]) for name, weight in weights.items()))
    sides = {name: (math.sqrt(abs(w)), math.copysign(math.sqrt(abs(w)), w)) for name, w in weights.items()}
    return by_factor(case, host, adapters, sides, case.config["alpha"] / case.config["rank"])


def by_factor(
    case: Case, host: Host, adapters: Mapping[str, Tensors], sides: Mapping[str, tuple[float, float]], scaling: float
) -> list[Tensor]:
    """A and B each summed with weights of their own, and their product with this scaling."""
    summed: dict[Key, Tensor] = {}
    for name, (of_a, of_b) in sides.items():
        for key, tensor in adapters[name].items():
            summed[key] = summed.get(key, 0) + (of_a if key.name == "lora_A" else of_b) * tensor
    settings = {**case.config, "alpha": scaling * case.config["rank"], "use_rslora": False}
    return outputs(replace(case, config=settings), host, (1.0, summed))


def adapted(case: Case, host: Host, tensors: Tensors) -> dict[str, Tensor]:
    """The weights that change, by their names in the host."""
    changed: dict[str, Tensor] = {}
    groups = _by_place(tensors)
    shared = groups.pop(SHARED, {})
    for place, own in groups.items():
        _change(case, host, place, own | shared, 1.0, changed)
    return changed


def _by_place(tensors: Tensors) -> Grouped:
    groups: Grouped = {}
    for key, tensor in tensors.items():
        groups.setdefault(key.place, {})[key.name] = tensor
    return groups


def _change(
    case: Case, host: Host, place: Place, own: dict[str, Tensor], weight: float, changed: dict[str, Tensor]
) -> None:
    """Change one module's weight and bias, or one parameter."""
    parameters = dict(host.model.named_parameters(remove_duplicate=False))
    current = parameters | changed
    if place.path in parameters:
        delta = own["lora_B"] @ own["lora_A"]  # (..., a, b)
        new = current[place.path] + weight * _scaling(case, place, own["lora_A"].shape[-2]) * delta
        changed[place.path] = _in_length(new, own["magnitude"]) if "magnitude" in own else new
        return
    module = host.model.get_submodule(place.path)
    weight_name, bias_name = f"{place.path}.weight", f"{place.path}.bias"
    rows = _rows(module, current[weight_name])
    which = rows_of(host.name, place.part, len(rows)) if place.part else torch.arange(len(rows))
    bias = current.get(bias_name)
    new, new_bias = _new(case, module, place, own, weight, rows[which], bias if bias is None else bias[which])
    changed[weight_name] = _weight(module, rows.index_copy(0, which, new), current[weight_name].shape)
    if bias is not None:
        changed[bias_name] = bias.index_copy(0, which, new_bias)


def _new(
    case: Case, module: nn.Module, place: Place, own: dict[str, Tensor], weight: float, rows: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The rows (output features by everything else) and the bias as the method changes them."""
    if "scale" in own:
        if place.at == "input":
            return rows * own["scale"].repeat_interleave(rows.shape[1] // len(own["scale"])), bias
        return rows * own["scale"][:, None], None if bias is None else bias * own["scale"]
    if "lambda_b" in own:
        a, b = own["vera_A"][:, : rows.shape[1]], own["vera_B"][: rows.shape[0]]
        return rows + own["lambda_b"][:, None] * (b @ (own["lambda_d"][:, None] * a)), bias
    if "lora_A" in own:
        scaling = weight * _scaling(case, place, own["lora_A"].shape[0])
        rows = rows + scaling * _delta(own["lora_A"], own["lora_B"], getattr(module, "groups", 1))
        rows = _in_length(rows, own["magnitude"]) if "magnitude" in own else rows
        return rows, bias + scaling * own["lora_bias"] if bias is not None and "lora_bias" in own else bias
    rows = rows + own["weight"][:, None] if "weight" in own else rows  # of a norm
    return rows, bias + own["bias"] if bias is not None and "bias" in own else bias


def _in_length(rows: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: each row in a length of its own; its norm is a constant for the gradient (section 4.3)."""
    return magnitude.unsqueeze(-1) * rows / rows.norm(dim=-1, keepdim=True).detach()


def _delta(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """B A for each group: a (rank, ...), b (out, rank / groups, ...) -> (out, ...), flat."""
    a = a.reshape(groups, a.shape[0] // groups, -1)
    return torch.bmm(b.reshape(groups, b.shape[0] // groups, -1), a).flatten(0, 1)


def _scaling(case: Case, place: Place, rank: int) -> float:
    """The factor of B A: alpha / rank, or alpha / sqrt(rank)."""
    alpha = by_pattern(case.config.get("alpha", 8), place.path)
    return float(alpha / (rank**0.5 if case.config.get("use_rslora") else rank))


def _is_transposed(module: nn.Module) -> bool:
    """Whether a weight has its outputs last: embeddings (ids, width), and GPT-2's Conv1D (in, out)."""
    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def _rows(module: nn.Module, weight: Tensor) -> Tensor:
    """(out, everything else)."""
    return weight.T if _is_transposed(module) else weight.reshape(weight.shape[0], -1)


def _weight(module: nn.Module, rows: Tensor, shape: torch.Size) -> Tensor:
    return rows.T if _is_transposed(module) else rows.reshape(shape)


@contextmanager
def _bias_of_no_bias(case: Case, model: nn.Module, place: Place, own: dict[str, Tensor]) -> Iterator[None]:
    """A trained bias where the module has none: added to its output."""
    module = None if place.path in dict(model.named_parameters()) else model.get_submodule(place.path)
    name = next((name for name in ("bias", "lora_bias") if name in own), None)
    if module is None or name is None or getattr(module, "bias", None) is not None:
        yield
        return
    scaling = _scaling(case, place, own["lora_A"].shape[0]) if name == "lora_bias" else 1.0
    shape = (-1, *(1,) * (module.weight.dim() - 2)) if module.weight.dim() > 2 else (-1,)
    with _hooked(module, lambda output: output + scaling * own[name].view(shape)):
        yield


@contextmanager
def _gated(case: Case, host: Host, place: Place, own: dict[str, Tensor]) -> Iterator[None]:
    """W x + g s B A x, g the mean over tokens of sigmoid(G x) (UniPELT 2110.07577, with LoRA's alpha / rank)."""
    module = host.model.get_submodule(place.path)
    scaling = _scaling(case, place, own["lora_A"].shape[0])

    def add(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0]
        gate = torch.sigmoid(F.linear(x, own["gate_weight"], own["gate_bias"])).mean(dim=1, keepdim=True)
        return output + scaling * gate * (x @ own["lora_A"].T @ own["lora_B"].T)

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _bottleneck(case: Case, model: nn.Module, place: Place, own: dict[str, Tensor]) -> Iterator[None]:
    """A bottleneck where `adapters` has it in a block of BERT or GPT-2, its projections dense or Kronecker products."""
    block, f = model.get_submodule(place.path), partial(_branch, case, own)
    is_bert = hasattr(block, "intermediate")
    if case.config.get("original_ln_before"):  # after the feed-forward: LN(s + f(LN(s))), or s + f(s)
        if is_bert:
            norm = block.output.LayerNorm
            before = partial(F.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias)
            with _hooked(norm, lambda s: s + f(before(s, eps=norm.eps)), before=True):
                yield
        else:
            with _hooked(block, lambda s: s + f(s)):
                yield
        return
    attention = block.attention.output.dropout if is_bert else block.attn
    feedforward = block.output.dropout if is_bert else block.mlp
    with _hooked(attention if place.part == "attention" else feedforward, lambda x: x + f(x)):
        yield


def _branch(case: Case, own: dict[str, Tensor], x: Tensor) -> Tensor:
    """up(act(down(x))), where a PHM layer's weight is the sum of kron(P_k, L_k R_k)."""
    act: Callable[[Tensor], Tensor] = {"relu": torch.relu, "gelu": F.gelu}[case.config["non_linearity"]]
    if "down_weight" in own:
        hidden = act(F.linear(x, own["down_weight"], own["down_bias"]))
        return F.linear(hidden, own["up_weight"], own["up_bias"])
    return _phm(own, "up", act(_phm(own, "down", x)))


def _phm(own: dict[str, Tensor], which: str, x: Tensor) -> Tensor:
    factors = zip(own["phm_rule"], own[f"{which}.W_left"], own[f"{which}.W_right"], strict=True)
    return x @ sum(torch.kron(rule, left @ right) for rule, left, right in factors) + own[f"{which}.b"]


@contextmanager
def _coupling(case: Case, host: Host, own: dict[str, Tensor]) -> Iterator[None]:
    """A coupling after the embeddings, and its inverse before the output embedding."""
    model = host.model
    first = model.bert.embeddings if hasattr(model, "bert") else model.transformer.drop
    last = model.get_output_embeddings()
    with ExitStack() as hooks:
        hooks.enter_context(_hooked(first, partial(_coupled, own)))
        if case.config.get("inverse", True):
            hooks.enter_context(_hooked(last, partial(_uncoupled, own), before=True))
        yield


def _net(own: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = torch.relu(F.linear(x, own[f"{name}.0.weight"], own[f"{name}.0.bias"]))
    return F.linear(hidden, own[f"{name}.2.weight"], own[f"{name}.2.bias"])


def _change_by(own: dict[str, Tensor], name: str, x: Tensor, width: int) -> Change:
    """Log-scale and shift of the other half: NICE only shifts it, GLOW scales it, too, by e to at most 1."""
    out = _net(own, name, x)
    if out.shape[-1] == width:
        return torch.zeros_like(out), out
    log_scale, shift = out.split(width, dim=-1)
    return torch.tanh(log_scale), shift


def _coupled(own: dict[str, Tensor], x: Tensor) -> Tensor:
    x1, x2 = x.split([x.shape[-1] // 2, x.shape[-1] - x.shape[-1] // 2], dim=-1)
    log_scale, shift = _change_by(own, "F", x2, x1.shape[-1])
    y1 = x1 * log_scale.exp() + shift
    log_scale, shift = _change_by(own, "G", y1, x2.shape[-1])
    return torch.cat([y1, x2 * log_scale.exp() + shift], dim=-1)


def _uncoupled(own: dict[str, Tensor], y: Tensor) -> Tensor:
    y1, y2 = y.split([y.shape[-1] // 2, y.shape[-1] - y.shape[-1] // 2], dim=-1)
    log_scale, shift = _change_by(own, "G", y1, y2.shape[-1])
    x2 = (y2 - shift) / log_scale.exp()
    log_scale, shift = _change_by(own, "F", x2, y1.shape[-1])
    return torch.cat([(y1 - shift) / log_scale.exp(), x2], dim=-1)


@contextmanager
def _hooked(module: nn.Module, change: Callable[[Tensor], Tensor], *, before: bool = False) -> Iterator[None]:
    """Within the block, this module's output (its first, of several), or with `before` its input, is changed."""

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_pre_hook(enter) if before else module.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()
