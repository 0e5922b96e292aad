"""Inputs of a model of transformers, from the signature of its forward and its configuration.

Comes in: a small model. Goes out: recipes, the likeliest first; a recipe makes keyword arguments for any batch size, sequence length
and seed. Ids are drawn from above the special tokens, numbers are normal. Which recipe fits is found by calling the model.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from census.shrink import FIRST_WORD

MOST_RECIPES = 24
# What a model may be about, in the order in which it is offered all that it knows.
PRIMARY = (
    "input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values", "decoder_input_ids", "bbox", "past_values",
    "past_observed_mask", "past_time_features", "states", "actions", "rewards", "returns_to_go", "timesteps", "flattened_patches",
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """The sizes of one call, and where its numbers come from."""

    rows: int
    length: int
    random: torch.Generator
    config: Any

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.random)

    def below(self, limit: int, *sizes: int, first: int = 0) -> Tensor:
        return torch.randint(min(first, limit - 1), limit, sizes, generator=self.random)


Maker = Callable[[Call], Tensor]


def find(config: Any, *names: str, default: int = 0) -> int:
    """The first of these numbers that the configuration, or one inside it, has."""
    for name in names:
        for each in _configs(config):
            value = getattr(each, name, None)
            if isinstance(value, (list, tuple)) and value and type(value[0]) is int:
                value = value[0]
            if type(value) is int and value > 0:
                return value
    return default


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for key in getattr(config, "sub_configs", {}):
        inner = getattr(config, key, None)
        if inner is not None:
            yield from _configs(inner)


def image(config: Any) -> tuple[int, int, int]:
    """Channels, height, width."""
    side: Any = next((s for each in _configs(config) if (s := getattr(each, "image_size", None))), None)
    if isinstance(side, dict):
        side = (side.get("height", 32), side.get("width", 32))
    square = (find(config, "image_size", default=64),) * 2
    height, width = tuple(side)[-2:] if isinstance(side, (list, tuple)) and len(side) >= 2 else square
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    return channels if channels <= 16 else 3, height, width


def ids(call: Call) -> Tensor:
    """Words, none of them a special token."""
    limit = find(call.config.get_text_config(), "vocab_size", "n_words", default=find(call.config, "vocab_size", default=100))
    return call.below(limit, call.rows, call.length, first=FIRST_WORD if limit > FIRST_WORD else 3)


def _with_images(tokens: Callable[[Any], int]) -> Maker:
    def make(call: Call) -> Tensor:
        token = find(call.config, "image_token_id", "image_token_index", "image_token")
        count = tokens(call.config)
        if not token or not 0 < count < 400:
            raise LookupError("no image tokens")
        return torch.cat([torch.full((call.rows, count), token), ids(call)], 1)

    return make


def _patches(config: Any, merge: int = 1) -> int:
    size = find(config, "patch_size", default=8)
    return (image(config)[1] // size // merge) * (image(config)[2] // size // merge)


def _patch_numbers(config: Any) -> int:
    return find(config, "in_channels", default=3) * find(config, "temporal_patch_size", default=1) * find(config, "patch_size") ** 2


def _features(call: Call) -> tuple[int, int]:
    names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
    bins = find(call.config, *names, default=16)
    positions = find(call.config, "max_source_positions")
    return bins, 2 * positions if 0 < positions <= 200 else 8 * call.length


def _boxes(call: Call) -> Tensor:
    corners = call.below(30, call.rows, call.length, 4)
    return torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:] + 1], -1)


def _history(call: Call) -> int:
    lags = max(getattr(call.config, "lags_sequence", None) or [0])
    return find(call.config, "context_length", default=24) + lags


VARIANTS: dict[str, list[Maker]] = {
    "input_ids": [
        ids, _with_images(lambda c: find(c, "image_seq_length", "image_seq_len")), _with_images(lambda c: _patches(c)),
        _with_images(lambda c: _patches(c, find(c, "spatial_merge_size", "downsample_factor", "scale_factor", default=2))),
    ],
    "decoder_input_ids": [ids],
    "pixel_values": [
        lambda c: c.normal(c.rows, *image(c.config)),
        lambda c: c.normal(c.rows, find(c.config, "num_frames", default=2), *image(c.config)),
        lambda c: c.normal(c.rows, 1, *image(c.config)),
    ],
    "pixel_values_videos": [lambda c: c.normal(c.rows, find(c.config, "num_frames", "frames_per_clip", default=4), *image(c.config))],
    "input_values": [
        lambda c: c.normal(c.rows, 400 * c.length),
        lambda c: c.normal(c.rows, find(c.config, "audio_channels", default=1), 400 * c.length),
        lambda c: c.normal(c.rows, find(c.config, "max_length", default=24), find(c.config, "num_mel_bins", default=16)),
    ],
    "input_features": [lambda c: c.normal(c.rows, *_features(c)), lambda c: c.normal(c.rows, *_features(c)[::-1])],
    "bbox": [_boxes, lambda c: c.normal(c.rows, c.length, 8)],
    "past_values": [
        lambda c: c.normal(c.rows, _history(c), find(c.config, "num_input_channels", default=1)), lambda c: c.normal(c.rows, _history(c)),
    ],
    "past_observed_mask": [lambda c: torch.ones(c.rows, _history(c))],
    "past_time_features": [lambda c: c.normal(c.rows, _history(c), find(c.config, "num_time_features"))],
    "states": [lambda c: c.normal(c.rows, c.length, find(c.config, "state_dim"))],
    "actions": [lambda c: c.normal(c.rows, c.length, find(c.config, "act_dim"))],
    "rewards": [lambda c: c.normal(c.rows, c.length, 1)],
    "returns_to_go": [lambda c: c.normal(c.rows, c.length, 1)],
    "timesteps": [lambda c: torch.arange(c.length).expand(c.rows, -1).clone()],
    "flattened_patches": [lambda c: c.normal(c.rows, c.length, find(c.config, "patch_embed_hidden_size", default=32))],
    "inputs": [lambda c: c.normal(c.rows, c.length, find(c.config, "d_model", "hidden_size", default=32)), ids],
    "hidden_states": [
        lambda c: c.normal(c.rows, c.length, find(c.config, "hidden_size", "d_model", default=32)),
        lambda c: c.normal(c.rows, find(c.config, "hidden_size", "d_model", default=32), c.length),
        lambda c: c.normal(16, _patch_numbers(c.config)),
    ],
    "grid_thw": [lambda c: torch.tensor([[1, 4, 4]])],
    "query_embeds": [lambda c: c.normal(c.rows, c.length, find(c.config, "hidden_size", default=32))],
    "inputs_embeds": [lambda c: c.normal(c.rows, c.length, find(c.config, "hidden_size", "d_model", default=32))],
    "spectrogram": [lambda c: c.normal(c.rows, c.length, find(c.config, "model_in_dim", "num_mel_bins", default=16))],
    "attention_mask": [lambda c: torch.ones(c.rows, c.length, dtype=torch.int64)],
    "speaker_embedding": [lambda c: c.normal(c.rows, find(c.config, "speaker_embedding_dim", default=32))],
    "token_type_ids": [lambda c: torch.zeros(c.rows, c.length, dtype=torch.int64)],
    "encoder_hidden_states": [lambda c: c.normal(c.rows, c.length, find(c.config, "encoder_hidden_size", "hidden_size", default=32))],
    "latents": [lambda c: c.normal(c.rows, find(c.config, "latent_channels", "hidden_size", default=32), c.length)],
    "visual_feats": [lambda c: c.normal(c.rows, 3, find(c.config, "visual_feat_dim", default=32))],
    "visual_pos": [lambda c: c.normal(c.rows, 3, 4)],
    "image": [lambda c: c.normal(c.rows, *image(c.config))],
    "qformer_input_ids": [ids],
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Which arguments, and of their variants which."""

    config: Any
    chosen: tuple[tuple[str, int], ...]

    def make(self, rows: int, length: int, seed: int) -> dict[str, Tensor]:
        """The arguments of one call."""
        call = Call(rows, length, torch.Generator().manual_seed(seed), self.config)
        return {name: VARIANTS[name][variant](call) for name, variant in self.chosen}


def recipes(model: nn.Module) -> Iterator[Recipe]:
    """Recipes for ``forward``: all that the model is about, then less."""
    parameters = inspect.signature(type(model).forward).parameters
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    required = [n for n, p in parameters.items() if n != "self" and p.default is p.empty and p.kind not in kinds]
    main = [n for n in _names(getattr(model, "main_input_name", "input_ids")) if n in parameters]
    known = [name for name in PRIMARY if name in parameters]
    with_decoder = [name for name in known if name.startswith("decoder")]
    sets = [known, [*main, *with_decoder], main, [], ["input_ids"], ["input_ids", "bbox"], ["inputs_embeds"]]
    sets.append(["input_ids", "visual_feats", "visual_pos"])
    seen: set[tuple[str, ...]] = set()
    found = 0
    for each in sets:
        names = tuple(dict.fromkeys([*required, *(name for name in each if name in parameters)]))
        if not names or names in seen or any(name not in VARIANTS for name in names):
            continue
        seen.add(names)
        pictures = "pixel_values" in names
        counts = [range(len(VARIANTS[name]) if name != "input_ids" or pictures else 1) for name in names]
        for chosen in itertools.islice(itertools.product(*counts), MOST_RECIPES // 2):
            found += 1
            if found > MOST_RECIPES:
                return
            yield Recipe(model.config, tuple(zip(names, chosen)))


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
