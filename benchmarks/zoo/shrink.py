"""Make the config of any architecture describe a tiny model of the same structure."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PretrainedConfig

__all__ = ["WAYS", "configs_in", "override", "set_as_given"]

VOCAB, HIDDEN, HEADS, LAYERS, IMAGE, PATCH, EXPERTS = 99, 32, 4, 2, 32, 8, 4

# By the name of a setting: the first rule that matches the whole name says how large it may be.
_LAYER_RULES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_.*)?|n_tokens|num_codebook_vectors", VOCAB),
    (r".*codebook_size", 64),
    (r".*(hidden|num|encoder|decoder|n|transformer|text|vision|attention|conformer)_layers?|.*depth|num_blocks", LAYERS),
    (r"layers|num_hidden_groups|num_.*_layers|.*_num_layers|n_layer_.*|.*_num_hidden_layers|.*num_layers.*", LAYERS),
    (r".*max_(position|seq|source|target).*|n_positions|n_ctx|max_length|max_.*_positions|max_position_embeddings", 128),
]
_RULES: list[tuple[str, int]] = [
    *_LAYER_RULES,
    (r"(num|n)_(key_value|kv)_heads|.*num_(key_value|kv)_heads|num_key_value_groups", 2),
    (r"(num|n)_.*heads?|.*_n_heads|.*_attention_heads|.*num_heads|n_head|num_head|nhead|heads", HEADS),
    (r"(qk_|v_|attention_|.*)head_dim|d_kv|d_head|head_size|attention_head_size|.*_head_dim", HIDDEN // HEADS),
    (r"num_experts_per_tok|moe_topk|top_k|num_selected_experts|moe_k|.*topk.*|moe_top_k", 2),
    (r".*num.*experts|n_routed_experts|moe_num_experts|num_local_experts|.*_experts", EXPERTS),
    (r".*(intermediate|ffn|mlp|inner|ff).*(size|dim)|d_ff|ffn_hidden_size|n_inner|d_inner", 2 * HIDDEN),
    (r".*lora_rank|dt_rank|time_step_rank|.*_rank", 8),
    (
        r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|projection_dim|projection_size)|model_dim",
        HIDDEN,
    ),
    (r"dim|width|hidden|embedding_dim|.*_embed_dim|.*_dim|.*_hidden_size|.*_width|.*emb.*_size", HIDDEN),
    (r"image_size|img_size|input_size|.*image_size", IMAGE),
    (r"patch_size|.*patch_size", PATCH),
    (r"sliding_window|attention_window|.*chunk_size.*|block_size|local_attention|window", 16),
    (r"state_size|ssm_state_size|mamba_d_state|d_state|n_mels", 16),
]
_HEAD_COUNT = re.compile(r"(num|n|encoder|decoder|.*_num)_.*heads?|num_heads|n_head|heads|.*attention_heads")
_WIDTH = re.compile(
    r".*(hidden|embed|embedding|intermediate|ffn|ff|model|inner|proj|projection|mlp|feature|out|in).*_(size|dim|dims|sizes|"
    r"channels|width)|d_model|d_ff|n_embd|n_inner|d_inner|dim|dims|width|depths?_dim|embed_dim|model_dim|hidden_sizes|conv_dim|"
    r"hidden_dim|mlp_dim|lru_width|d_attn|attention_hidden_size"
)
_NOT_A_WIDTH = re.compile(r".*(head_dim|rank|vocab|patch|image|kernel|stride|max_|position|rope|head_size|in_channels).*")
_FEW = {"depths", "num_blocks", "layers", "layer_depths", "encoder_layers", "num_layers"}
_TOKEN_ID = re.compile(r".*(token_id|_token_index|_idx|token_ids?)$")
_KINDS_BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "attn_types", "attention_layers")
Rule = Callable[[str, int], int]


def _by_rules(name: str, value: int) -> int:
    return _limited(_RULES, name, value)


def _by_layers(name: str, value: int) -> int:
    if re.fullmatch(r".*num.*experts|n_routed_experts|.*_experts", name) and value > 16:
        return 16
    return _limited(_LAYER_RULES, name, value)


def _divided(by: int) -> Rule:
    """Divide all widths and head counts by one number: what must agree goes on to agree."""

    def rule(name: str, value: int) -> int:
        is_width = _WIDTH.fullmatch(name) and not _NOT_A_WIDTH.fullmatch(name) and value > by
        if is_width or _HEAD_COUNT.fullmatch(name):
            return value // by if value % by == 0 else max(1, value if is_width else value // by)
        return _by_layers(name, value)

    return rule


def _by_divisor(config: PretrainedConfig) -> Rule:
    heads = [
        v
        for each in configs_in(config)
        for name, value in vars(each).items()
        if _HEAD_COUNT.fullmatch(name) and "key_value" not in name and "kv" not in name
        for v in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(v, int) and v > 1
    ]
    return _divided(math.gcd(16, *heads))


# Ways of shrinking a config, the smallest result first: each makes a new one.
WAYS: tuple[Callable[[PretrainedConfig], PretrainedConfig], ...] = (
    lambda config: _fitted(_set_anew(config, _by_rules)),
    lambda config: _fitted(_changed(config, _by_rules)),
    lambda config: _fitted(_set_anew(config, _by_divisor(config))),
    lambda config: _fitted(_changed(config, _by_divisor(config))),
    lambda config: _fitted(_set_anew(config, _by_layers)),
    lambda config: _fitted(_changed(config, _by_layers)),
)


def configs_in(config: Any) -> Iterator[Any]:
    """A config, and the configs in it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from configs_in(value)


def override(config: Any, settings: dict[str, Any]) -> None:
    """Set attributes, of sub-configs by a dotted name."""
    for name, value in settings.items():
        *path, last = name.split(".")
        holder = config
        for part in path:
            holder = getattr(holder, part)
        setattr(holder, last, value)


def set_as_given(settings: dict[str, Any]) -> Callable[[PretrainedConfig], PretrainedConfig]:
    """A way that makes the config anew with these settings, without shrinking any."""
    return lambda config: type(config)(**copy.deepcopy(settings))


def _limited(rules: list[tuple[str, int]], name: str, value: int) -> int:
    for pattern, limit in rules:
        if re.fullmatch(pattern, name):
            return min(value, limit) if value > 0 else value
    return value


def _set_anew(config: PretrainedConfig, rule: Rule) -> PretrainedConfig:
    """A new config, made with smaller settings, which computes anew what it computes from them."""
    smaller = {name: _set_anew(v, rule) if isinstance(v, PretrainedConfig) else v for name, v in _smaller(config, rule)}
    new: PretrainedConfig = type(config)(**smaller)
    return new


def _changed(config: PretrainedConfig, rule: Rule) -> PretrainedConfig:
    """A copy with smaller settings; what was computed from them stays."""
    config = copy.deepcopy(config)
    for each in list(configs_in(config)):
        for name, value in _smaller(each, rule):
            if not isinstance(value, PretrainedConfig):
                _set(each, name, value)
    return config


def _smaller(config: PretrainedConfig, rule: Rule) -> Iterator[tuple[str, Any]]:
    """The settings that a rule makes smaller, and the configs in it."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            yield name, value
        elif isinstance(value, int) and not isinstance(value, bool):
            heads = name.replace("key_value", "attention")  # as many for keys as for queries: so they stay
            smaller = rule(heads if name.endswith("num_key_value_heads") and value == _of(config, heads) else name, value)
            if smaller != value:
                yield name, smaller
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            limit = (lambda v: min(v, LAYERS)) if name in _FEW else (lambda v, name=name: rule(name, v))
            if [limit(v) for v in value] != list(value):
                yield name, type(value)(limit(v) for v in value)


def _of(config: Any, name: str) -> Any:
    """A setting by its common name, without what a config of unequal layers says to that."""
    return vars(config).get(getattr(config, "attribute_map", {}).get(name, name))


def _fitted(config: PretrainedConfig) -> PretrainedConfig:
    """The config with lists by layer as long as there are layers, and token ids inside the vocabulary."""
    for each in configs_in(config):
        layers = getattr(each, "num_hidden_layers", None)
        for name in _KINDS_BY_LAYER:
            kinds = getattr(each, name, None)
            if isinstance(kinds, (list, tuple)) and isinstance(layers, int) and len(kinds) > layers:
                _set(each, name, _varied(list(kinds), layers))
        _fit_tokens(each)
    return config


def _varied(kinds: list[Any], length: int) -> list[Any]:
    """So many of these, with as many different ones as fit, in their order."""
    distinct = list(dict.fromkeys(kinds))[:length]
    return (distinct + kinds)[:length]


def _fit_tokens(config: Any) -> None:
    vocab = next((v for c in configs_in(config) if (v := getattr(c, "vocab_size", None))), VOCAB)
    for name, value in list(vars(config).items()):
        if _TOKEN_ID.match(name) and isinstance(value, int) and not isinstance(value, bool) and value >= vocab:
            _set(config, name, vocab - 1 - sum(map(ord, name)) % 8)


def _set(config: Any, name: str, value: Any) -> None:
    """Set an attribute, unless the config computes or refuses it."""
    try:
        setattr(config, name, value)
    except Exception:  # whatever a config raises: it keeps what it had
        return
