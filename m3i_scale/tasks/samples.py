"""The samples of pre-training: image-text pairs and categorised images from WebDataset shards."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_scale.config import Config, ConfigError
from m3i_scale.data import Stream
from m3i_scale.models.tokenizer import load_tokenizer
from m3i_scale.objective.masks import PatchMask


def build_stream(config: Config) -> Stream:
    """The stream of samples that the configuration describes.

    Raises:
        ConfigError: a tokenizer or an index is missing or does not fit.
    """
    text = config.model.text
    try:
        tokenizer = load_tokenizer(text.tokenizer) if text else None
        if tokenizer and text and tokenizer.vocab_size > text.vocab_size:
            raise ValueError(
                f"the tokenizer {text.tokenizer} has {tokenizer.vocab_size} tokens; set "
                f"model.text.vocab_size to that or more (it is {text.vocab_size})"
            )
        stream = Stream(
            config.data,
            seed=config.seed,
            lanes=config.lanes,
            tokenize=(
                functools.partial(tokenizer, max_length=text.max_length)
                if tokenizer and text
                else no_tokens
            ),
            mask_sampler=functools.partial(
                draw_mask,
                {size: PatchMask.of(config.objective.input, size) for size in config.data.sizes},
            ),
            batch=config.optimizer.global_batch_size,
        )
        stream.require_categories(config.model.categories)
        return stream
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error


def draw_mask(
    masks: dict[int, PatchMask], rng: np.random.Generator, size: int
) -> NDArray[np.bool_]:
    """A mask of views of that side."""
    return masks[size](rng)


def no_tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens (B, 0) and mask (B, 0) of an objective without texts."""
    ids = torch.zeros(len(texts), 0, dtype=torch.int64)
    return ids, torch.zeros_like(ids, dtype=torch.bool)
