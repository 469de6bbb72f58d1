"""Small configurations, and batches of random data in the stream's own type."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from m3i_scale.config import Config
from m3i_scale.data.batch import Batch
from m3i_scale.objective.masks import PatchMask

SMALL = """
run: small
model:
  backbone:
    name: intern_image
    options: {channels: 8, depths: [1, 1, 1, 1], groups: [1, 2, 4, 8], mlp_ratio: 2.0,
              offset_scale: 1.0, dw_kernel_size: 3, clip_projector_width: 32, clip_heads: 4,
              clip_embed_dim: 24}
  decoder: {depth: 1, width: 32, heads: 4, ffn: 64}
  text: {tokenizer: none, vocab_size: 50, depth: 1, width: 32, heads: 4, ffn: 64, max_length: 8,
         embed_dim: 16}
  categories: 5
objective:
  targets:
    - {name: image_i, image: i, view: same, representation: features,
       regularisation: stop_gradient, likelihood: {form: gaussian}, positions: masked,
       normalise: layer_norm}
    - {name: image_j, image: j, view: other, representation: features,
       regularisation: stop_gradient, likelihood: {form: gaussian}, positions: all,
       normalise: layer_norm}
    - {name: text_i, image: i, representation: text, regularisation: negatives,
       likelihood: {form: boltzmann, learnable: true}}
    - {name: text_j, image: j, representation: text, regularisation: negatives,
       likelihood: {form: boltzmann, learnable: true}}
    - {name: category_i, image: i, representation: category, regularisation: negatives,
       likelihood: {form: boltzmann, temperature: 1.0, label_smoothing: 0.1}}
    - {name: category_j, image: j, representation: category, regularisation: negatives,
       likelihood: {form: boltzmann, temperature: 1.0, label_smoothing: 0.1}}
data:
  image_size: 64
  workers: 0
  sources: [{name: texts, index: none, kind: text}, {name: classes, index: none, kind: category}]
optimizer: {global_batch_size: 8, max_micro_batch: 8, duration: 6 steps, warmup: 2 steps}
engine: {precision: fp32, device: cpu}
logging: {trackers: [], pictures: false}
"""

# Images and categories, no text and no teacher: what starts and steps in the least time.
LABELLED = """
run: small
model:
  backbone: {name: vit, options: {width: 32, depth: 1, heads: 2}}
  decoder: {depth: 1, width: 32, heads: 2, ffn: 64}
  categories: 5
objective:
  input: {corruption: mask, mask: random, patch: 16, ratio: 0.5, pairing: neighbours,
          both_views: false}
  targets:
    - {name: pixels, representation: pixels, regularisation: none, likelihood: {form: gaussian},
       decoder: linear, normalise: norm_pix}
    - {name: category, representation: category, regularisation: negatives,
       likelihood: {form: boltzmann, temperature: 1.0}}
data: {image_size: 32, workers: 0}
optimizer: {global_batch_size: 8, max_micro_batch: 8, duration: 6 steps, warmup: 1 steps}
engine: {precision: fp32, device: cpu}
logging: {trackers: [], pictures: false}
"""


def small_tree(text: str = SMALL, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A configuration as a tree that a test may change; keys of `overrides` are `a.b`."""
    tree: dict[str, Any] = yaml.safe_load(text)
    for path, value in (overrides or {}).items():
        node = tree
        *parents, last = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = copy.deepcopy(value)
    return tree


def small_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The small configuration with its runs under `folder`; keys of `overrides` are `a.b`."""
    return Config.model_validate(small_tree(SMALL, {"folder": str(folder), **(overrides or {})}))


def labelled_tree(index: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration without text, of the labelled images of an index, as a tree."""
    sources = [{"name": "c", "index": index, "kind": "category"}]
    return small_tree(LABELLED, {"data.sources": sources, **(overrides or {})})


def small_targets(*names: str) -> list[dict[str, Any]]:
    """Targets of the small configuration by name, in full; all of them without a name."""
    targets = Config.model_validate(small_tree()).objective.model_dump(mode="json")["targets"]
    return [target for target in targets if not names or target["name"] in names]


def random_batch(size: int, *, start: int = 0, image_size: int = 64, patch: int = 16) -> Batch:
    """Samples `start .. start + size`, each a function of its own position."""
    rows = [_random_sample(start + n, image_size, patch) for n in range(size)]
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    identity = {
        "brightness": torch.ones(size), "contrast": torch.ones(size),
        "saturation": torch.ones(size), "hue": torch.zeros(size),
        "order": torch.arange(4).repeat(size, 1), "grayscale": torch.zeros(size, dtype=torch.bool),
        "blur_sigma": torch.zeros(size), "solarize": torch.full((size,), 256.0),
    }  # fmt: skip
    return Batch(
        photometric_a=identity, photometric_b=identity, key=[str(n) for n in range(size)], **stacked
    )


def _random_sample(position: int, image_size: int, patch: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(position)
    side = image_size // patch
    has_text = position % 3 != 0
    tokens = np.zeros(8, dtype=np.int64)
    length = rng.integers(3, 9) if has_text else 2
    tokens[:length] = rng.integers(1, 50, length)
    drawn: dict[str, Any] = {
        "view_a": rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8),
        "view_b": rng.integers(0, 256, (image_size, image_size, 3), dtype=np.uint8),
        "box_a": np.array([*rng.uniform(0, 20, 2), *rng.uniform(30, 60, 2)], np.float32),
        "box_b": np.array([*rng.uniform(0, 20, 2), *rng.uniform(30, 60, 2)], np.float32),
        "flip_a": np.bool_(rng.random() < 0.5),
        "flip_b": np.bool_(rng.random() < 0.5),
        "tokens": tokens,
        "token_mask": np.arange(8) < length,
        "has_text": np.bool_(has_text),
        "category": np.int64(rng.integers(5) if position % 2 else -1),
        "mask": PatchMask(side, side, 0.5, "block")(rng),
        "position": np.int64(position),
    }
    return {key: torch.as_tensor(value) for key, value in drawn.items()}
