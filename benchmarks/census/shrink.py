"""A configuration of transformers with small sizes that fit each other.

Comes in: a configuration class. Goes out: an instance in which every width is one number, every layer count two and so on, subconfigs
included. Only fields with a number as their default are set; what a configuration derives from others it still derives. Where the sizes do
not fit (an architecture that adds two widths), ``attempts`` names weaker shrinks, in which one group of fields keeps its defaults.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

WIDTH, INNER, HEADS, HEAD, RANK, VOCABULARY, POSITIONS, IMAGE, PATCH = 32, 64, 4, 8, 16, 120, 64, 32, 8
FIRST_WORD = 60  # special tokens lie below: ids of inputs are drawn from here on
GROUPS = ("layers", "words", "widths", "heads", "experts", "lists", "positions", "images", "sound")


def most(limit: int) -> Callable[[int], int]:
    """At most that many."""
    return lambda default: min(default, limit)


def exactly(value: int) -> Callable[[int], int]:
    """That many, unless it was fewer."""
    return lambda default: value if default >= value else default


def unchanged(default: int) -> int:
    """As many as by default."""
    return default


# In this order: the first pattern that matches the whole name decides.
RULES: list[tuple[str, str, Callable[[int], int]]] = [
    ("layers", r"first_k_dense_replace|max_window_layers|num_dense_layers|attn_layer_offset|expert_layer_offset", most(1)),
    ("layers", r".*_interval|.*_pattern|.*_period|.*_freq|.*_sparse_step", most(2)),
    ("layers", r"num_encoder_blocks|num_stages|num_feature_levels|n_fft|num_mtp_layers|num_nextn_predict_layers", unchanged),
    ("layers", r".*layers|n_layers?|.*depth|num_blocks|num_(encoder|decoder)_blocks|.*_layers_count|.*hidden_layers", most(2)),
    ("words", r"num_.*labels|num_classes", most(10)),
    ("words", r".*vocab_size.*|vocab|vocabulary_size|n_words|num_embeddings|num_text_tokens", most(VOCABULARY)),
    ("words", r"codebook_size|num_codevectors_per_group|num_codebook_vectors|n_codes", most(64)),
    ("experts", r".*num_experts_per_tok|.*top_?k(_experts)?|moe_k|num_selected_experts|num_experts_per_token|experts_top_k", most(2)),
    ("experts", r"n_group|topk_group|num_expert_group|n_groups|.*limited_groups", most(1)),
    ("experts", r".*num_.*experts|.*n_.*experts|moe_num_experts|num_local_experts", most(4)),
    ("heads", r".*(key_value|kv)_heads|n_kv_heads|.*num_key_heads|num_query_groups", most(2)),
    ("heads", r".*heads|n_heads?|.*head_count", most(HEADS)),
    ("heads", r".*head_dim|d_kv|d_head|head_size|attention_head_size|dim_head|kv_channels|rotary_dim", most(HEAD)),
    ("heads", r".*key_dim|.*value_dim|hidden_size_per_layer_input", most(HEAD)),
    ("widths", r".*lora_rank|.*_rank|rank", most(RANK)),
    ("widths", r".*intermediate_size|.*ffn_dim|d_?ff|mlp_dim|n_inner|ff_dim|.*ffn_size", most(INNER)),
    ("widths", r".*mlp_hidden.*|.*feedforward.*|.*ffn_hidden.*", most(INNER)),
    ("images", r".*image_size|img_size|.*image_height|.*image_width|input_size|eval_size|crop_size|resolution", exactly(IMAGE)),
    ("images", r".*patch_size|patch_stride|stride_size", most(PATCH)),
    ("images", r"num_frames|frames|max_num_frames", most(4)),
    ("sound", r"num_mel_bins|.*n_mels|feature_size|num_mels|input_feat_per_channel|mel_bins", most(16)),
    ("sound", r"max_source_positions", most(16)),
    ("sound", r"num_conv_pos_embeddings|num_conv_pos_embedding_groups", most(4)),
    ("positions", r"sliding_window|.*attention_window|attention_chunk_size|local_window_size|.*chunk_size|.*chunk_length", most(8)),
    ("positions", r".*max_position_embeddings|n_positions|n_ctx|.*max_.*positions", most(POSITIONS)),
    ("positions", r"max_seq_len(gth)?|max_seq_length|max_sequence_length", most(POSITIONS)),
    ("positions", r"context_length|prediction_length|max_length", most(24)),
    ("widths", r".*(kernel|window|stride|patch|vocab|grid|pool|batch|image|token).*", unchanged),
    ("widths", r".*(block|bucket|chunk|step|downsample|upsample|scale|crop).*", unchanged),
    ("widths", r"type_vocab_size|.*state_size|.*d_state|.*_levels|.*points", most(16)),
    ("widths", r".*hidden_size|d_model|n_embd|d_embed|dim|.*_dims?|.*hidden|.*width|d_inner|.*_size", most(WIDTH)),
    ("widths", r".*channels|.*filters|.*features|num_queries|.*num_latents|dim_.*", most(WIDTH)),
]
SILENT = re.compile(r".*(dropout|pdrop|drop_path|layer_?drop|drop_rate|drop_prob|mask_time_prob|mask_feature_prob|jitter|drop).*")
OFF = {"apply_spec_augment", "use_cache", "use_mems_train"}
SPECIAL = re.compile(r".*_token_(id|index)|.*_(id|token)|image_token|.*_token_idx")


def attempts() -> Iterator[tuple[str, frozenset[str]]]:
    """Shrinks from the strongest to the weakest: a name, and the groups of fields that become small."""
    everything = frozenset(GROUPS)
    yield "all", everything
    for group in ("positions", "lists", "widths", "heads", "images", "sound", "experts", "words", "layers"):
        yield f"all but {group}", everything - {group}
    yield "not widths, heads", everything - {"widths", "heads"}
    yield "not widths, heads, lists", everything - {"widths", "heads", "lists"}
    yield "layers and words", frozenset({"layers", "words"})
    yield "layers", frozenset({"layers"})
    yield "as it is", frozenset()


def small(cls: type, groups: frozenset[str]) -> Any:
    """An instance of a configuration class with the sizes of these groups small."""
    return _instance(cls, {}, groups, {})


def _instance(cls: type, given: dict[str, Any], groups: frozenset[str], special: dict[str, int]) -> Any:
    values = _values(cls, given, groups, special)
    for key, spec in getattr(cls, "sub_configs_defaults", {}).items():
        default = values.get(key, given.get(key))
        if default is None and spec.optional:
            continue
        init = {**(spec.init_kwargs or {}), **(default if isinstance(default, dict) else {})}
        sub = spec.config_class
        if not dataclasses.is_dataclass(sub):
            sub = spec.get_config_class(init.pop("model_type", spec.model_type))
        init.pop("model_type", None)
        values[key] = _instance(sub, init, groups, special)
    config = cls(**values)
    if "heads" in groups:
        _divide_rotation(config)
    return config


def _divide_rotation(config: Any) -> None:
    """Rotary embeddings in three parts (time, height, width) that are as long together as half a head."""
    rope = getattr(config, "rope_parameters", None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(rope, dict) or "rope_type" not in rope or type(heads) is not int:
        return
    head = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    half = int(head * (rope.get("partial_rotary_factor") or 1.0)) // 2
    rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _values(cls: type, given: dict[str, Any], groups: frozenset[str], special: dict[str, int]) -> dict[str, Any]:
    """The fields to set: those ``given``, and those that have a rule."""
    values = dict(given)
    defaults = {field.name: _default(field) for field in dataclasses.fields(cls) if field.init}
    defaults.update(given)
    count = next((defaults[n] for n in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers") if type(defaults.get(n)) is int), 0)
    for name, default in defaults.items():
        changed = _changed(name, default, groups, special, count)
        if changed is not None:
            values[name] = changed
    return values


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _changed(name: str, default: Any, groups: frozenset[str], special: dict[str, int], count: int) -> Any:
    """The small value of a field; None where it keeps its default."""
    if name in OFF:
        return False
    if SILENT.fullmatch(name) and type(default) in (float, int) and default is not True:
        return type(default)(0)
    if "words" in groups and SPECIAL.fullmatch(name):
        if type(default) is int and default >= FIRST_WORD:
            return special.setdefault(name, 10 + len(special))
        return [2] if isinstance(default, list) and default and type(default[0]) is int and default[0] >= FIRST_WORD else None
    if type(default) is int:
        group, rule = _rule(name)
        return rule(default) if group in groups and rule is not None else None
    if isinstance(default, (list, tuple)) and default:
        changed = _list(name, list(default), groups, count)
        return None if changed is None else type(default)(changed)
    return None


def _rule(name: str) -> tuple[str, Callable[[int], int] | None]:
    for group, pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return group, rule
    return "", None


def _list(name: str, default: list[Any], groups: frozenset[str], count: int) -> list[Any] | None:
    """A list of one number per stage keeps its length and its ratios; one with an entry per layer is cut with the layers."""
    if "layers" in groups and count > 2 and len(default) == count:
        other = next((index for index, item in enumerate(default) if item != default[0]), 1)
        default = [default[0], default[other]]
        return default if type(default[0]) is not int else _list(name, default, groups, 0) or default
    if any(type(item) is not int for item in default):
        return None
    if re.fullmatch(r".*depths?|.*layers|num_blocks|.*block_repeats", name):
        return [1] * len(default) if "layers" in groups else None
    if re.fullmatch(r".*ind(ex|ic)es|extract_layers|.*hook_ids", name) and max(default) > 1:
        return [index // max(default) for index in default] if "layers" in groups else None
    if re.fullmatch(r".*(image|img|input|eval|anchor_image)_size", name):
        return [min(IMAGE, item) for item in default] if "images" in groups else None
    if re.fullmatch(r"patch_size", name):
        return [min(PATCH, item) for item in default] if "images" in groups else None
    if "lists" in groups and re.fullmatch(r".*heads|.*hidden_sizes?|.*dims?|.*channels?|.*widths?|.*filters", name):
        least = max(min(default), 1)
        unit = 1 if name.endswith("heads") else min(16, least)
        return [max(1, item * unit // least) for item in default]
    return None
