"""What is wrong with a config, in words: of each bad field what was found, and what it may be."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from pydantic import BaseModel, ValidationError

__all__ = ["describe", "no_setting"]

# What other libraries call it.
_PEERS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "attn_matrices": "targets",
    "layers_to_transform": "layers",
    "leave_out": "layers",
}
_OF_ADD = {"modules_to_save", "heads"}


def describe(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """A pydantic error in one line: each bad field, what was found, what is wanted.

    Args:
        model: What was to be built, if the names of its settings may be told.
    """
    items = error.errors(include_url=False)
    unknown = [i for i in items if model is not None and i["type"] == "extra_forbidden" and len(i["loc"]) == 1]
    parts: list[str] = []
    for field, group in groupby((item for item in items if item not in unknown), key=lambda item: item["loc"][:1]):
        known = None if model is None or not field else model.model_fields.get(str(field[0]))
        parts += _described(list(group), known.description if known is not None else None)
    fields = [] if model is None else list(model.model_fields)
    parts += [no_setting(str(item["loc"][0]), fields) for item in unknown]
    listed = f"the settings are {', '.join(name for name in fields if name not in ('method', 'kind'))}"
    return "; ".join([*parts, listed] if unknown else parts).replace("?; ", "? ")


def no_setting(name: str, fields: Iterable[str]) -> str:
    """The message for a setting that does not exist, with the one that was probably meant."""
    fields = list(fields)
    if name in _OF_ADD:
        return f"no setting {name}; did you mean heads=, an argument of kit.add?"
    peer = [_PEERS[name]] if _PEERS.get(name) in fields else difflib.get_close_matches(name, fields, n=1)
    return f"no setting {name}" + "".join(f"; did you mean {near}?" for near in peer)


def _described(items: Sequence[Any], may_be: str | None) -> Iterator[str]:
    """What is wrong with one field."""
    first = min(items, key=lambda item: len(item["loc"]))
    if first["type"] == "too_short" and first["loc"] == ("targets",):
        yield "targets: an empty list adapts nothing; name at least 1 module, such as targets=['output.dense']"
    elif may_be is not None and first["type"] != "missing" and not all(item["type"] == "value_error" for item in items):
        # One of several things, and none of them: what each of them lacks would confuse.
        inner = next((item for item in items if len(item["loc"]) > len(first["loc"])), None)
        within = "" if inner is None else f"[{inner['loc'][len(first['loc'])]!r}]"
        yield f"{first['loc'][0]}{within}: found {_found(inner or first)}; the setting may be {may_be}"
    else:
        for item in items:
            field = ".".join(str(part) for part in item["loc"]) or "config"
            found = "" if item["type"] == "missing" else f" (found {_found(item)})"
            yield f"{field}: {item['msg'].removeprefix('Value error, ')}{found}"


def _found(item: Any) -> str:
    """The value that was found, with its type where that is what is wrong."""
    value = item["input"]
    of_type = f", a {type(value).__name__}" if item["type"] == "int_type" and isinstance(value, (str, bool)) else ""
    return f"{str(value)[:80]!r}{of_type}"
