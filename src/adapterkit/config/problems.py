"""What is wrong with a config, in words: of each bad field what was found, and what it may be."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel, ValidationError

__all__ = ["describe", "no_setting"]

# Settings of other libraries (peft, adapters) that have another name here, and mean the same.
_PEERS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "vera_dropout": "dropout",
    "lora_bias": "bias",
    "d_initial": "initial",
    "vera_d": "initial",
    "target_modules": "targets",
    "target_parameters": "targets",
    "attn_matrices": "targets",
    "exclude_modules": "exclude",
    "feedforward_modules": "feedforward_targets",
    "layers_to_transform": "layers",
    "init_weights": "init",
    "init_lora_weights": "init",
    "init_weights_seed": "seed",
    "projection_prng_key": "seed",
    "use_gating": "gating",
    "ln_before": "layer_norm_before",
    "ln_after": "layer_norm_after",
    "adapter_residual_before_ln": "residual_before_layer_norm",
    "shared_phm_rule": "shared_rule",
    "shared_W_phm": "shared_factors",
    "inv_adapter_reduction_factor": "reduction_factor",
}

# Settings of other libraries that are said in another way here: the setting that says it, and how.
_BY_PATTERN = "takes a map by layer or pattern"
_PLACE = "says where adapters sit"
_NORMS = "says on which side of the block's own norm the adapter reads and adds: 'sum', 'normalised', 'renormalised'"
_SAID_BY = {
    "leave_out": ("layers", "lists the layers to keep, not those to leave out; or name the latter in exclude="),
    "rank_pattern": ("rank", f"{_BY_PATTERN}: rank={{'default': 8, 'layer.0.**': 16}}"),
    "alpha_pattern": ("alpha", f"{_BY_PATTERN}: alpha={{'default': 8, 'layer.0.**': 16}}"),
    "is_parallel": ("placement", "says it: placement='parallel'"),
    "mh_adapter": ("targets", f"{_PLACE}: targets=['@attention.out'] is after the attention"),
    "output_adapter": ("targets", f"{_PLACE}: targets=['@feedforward.out'] is after the feed-forward"),
    "cross_adapter": ("targets", f"{_PLACE}: targets=['@crossattention.out'] is after the cross-attention"),
    "selfattn_lora": ("targets", f"{_PLACE}: targets=['@attention.q', '@attention.v'] is in the attention"),
    "intermediate_lora": ("targets", f"{_PLACE}: targets=['@feedforward.first'] is the feed-forward's first layer"),
    "output_lora": ("targets", f"{_PLACE}: targets=['@feedforward.last'] is the feed-forward's last layer"),
    "original_ln_before": ("at", _NORMS),
    "original_ln_after": ("at", _NORMS),
    "residual_before_ln": ("at", _NORMS),
    "factorized_phm_W": ("phm_rank", "says it: phm_rank=None is not factorised"),
}

# Settings of other libraries that are other configs, or arguments, here.
_ELSEWHERE = {
    "inv_adapter": "an invertible adapter is a config of its own: the preset 'madx', or ak.InvertibleConfig in ak.Union",
    "phm_layer": "a bottleneck of Kronecker products is a config of its own: ak.CompacterConfig",
    "composition_mode": "scaling in place of adding is a config of its own: ak.IA3Config",
    "vera_b": "VeRA is a config of its own: ak.VeRAConfig, whose second vector starts at zero",
    "modules_to_save": "did you mean heads=, an argument of kit.add?",
    "heads": "did you mean heads=, an argument of kit.add?",
    "task_type": "heads are given to kit.add, as heads=; the task needs no name",
    "fan_in_fan_out": "leave it out: which way round a weight lies is read off the layer",
}


def describe(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Write a pydantic error in one line: each bad field, what was found, what is wanted.

    Args:
        model: What was to be built, if the names of its settings may be told.
    """
    items = error.errors(include_url=False)
    fields = {} if model is None else model.model_fields
    # Unknown settings come last in the message, followed by the list of those that there are.
    unknown = [i for i in items if model is not None and i["type"] == "extra_forbidden" and len(i["loc"]) == 1]
    parts: list[str] = []
    # A field that may be one of several things has an item for each of them, side by side.
    for name, group in groupby((item for item in items if item not in unknown), key=lambda item: item["loc"][:1]):
        field = fields.get(str(name[0])) if name else None
        parts += _wrong_field(list(group), None if field is None else field.description)
    parts += [no_setting(str(item["loc"][0]), fields) for item in unknown]
    if unknown:
        parts.append(f"the settings are {', '.join(name for name in fields if name not in ('method', 'kind'))}")
    # "did you mean rank?; the settings are …" reads as two sentences.
    return "; ".join(parts).replace("?; ", "? ")


def no_setting(name: str, fields: Iterable[str]) -> str:
    """Write the message for a setting that does not exist, with what says the same here.

    Args:
        name: The setting that was given.
        fields: The settings that there are.
    """
    fields = list(fields)
    start = f"no setting {name}"
    if name in _ELSEWHERE:
        return f"{start}; {_ELSEWHERE[name]}"
    # An advice counts only where the config at hand has the setting that it speaks of; "" is in none.
    setting, how = _SAID_BY.get(name, ("", ""))
    if setting in fields:
        return f"{start}; {setting}= {how}"
    # A name that another library uses beats one that merely looks alike: "r" is near to nothing.
    peer = [_PEERS[name]] if _PEERS.get(name) in fields else difflib.get_close_matches(name, fields, n=1)
    return start + "".join(f"; did you mean {near}?" for near in peer)


def _wrong_field(items: Sequence[Any], may_be: str | None) -> Iterator[str]:
    """Say what is wrong with one field.

    Args:
        items: What pydantic has to say of it.
        may_be: What the setting may be, in words, where it may be one of several things.
    """
    # The shortest way is that of the setting itself; the others lead into a list or map that it might have been.
    first = min(items, key=lambda item: len(item["loc"]))
    if first["type"] == "too_short" and first["loc"] == ("targets",):
        yield "targets: an empty list adapts nothing; name at least 1 module, such as targets=['output.dense']"
    elif may_be is not None and first["type"] != "missing" and not all(item["type"] == "value_error" for item in items):
        # One of several things, and none of them: what each of them lacks would confuse. (A validator of ours does not.)
        # e.g. ("rank", …, "default") beside ("rank", …): one value of a map is wrong, and the message says rank['default'].
        inner = next((item for item in items if len(item["loc"]) > len(first["loc"])), None)
        within = "" if inner is None else f"[{inner['loc'][len(first['loc'])]!r}]"
        yield f"{first['loc'][0]}{within}: found {_found(inner or first)}; the setting may be {may_be}"
    else:
        yield from map(_complaint, items)


def _complaint(item: Any) -> str:
    """Write what pydantic says of a field, with the value that was found."""
    field = ".".join(map(str, item["loc"])) or "config"  # a check of several settings together belongs to none of them
    found = "" if item["type"] == "missing" else f" (found {_found(item)})"
    return f"{field}: {item['msg'].removeprefix('Value error, ')}{found}"


def _found(item: Any) -> str:
    """Write the value that was found, with its type where that is what is wrong."""
    value = item["input"]
    # "8" and True would otherwise look like the numbers that were wanted.
    of_type = f", a {type(value).__name__}" if item["type"] == "int_type" and isinstance(value, (str, bool)) else ""
    return f"{str(value)[:80]!r}{of_type}"
