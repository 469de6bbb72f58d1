"""Names of categories in sentences: zero-shot classification as CLIP has it.

A file has the name of each category, one a line, in the order of their numbers; another one
templates with {} for the name, one a line (ImageNet's 80 are in CLIP's notebook). The embedding of
a category is the mean over all templates, of unit length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from m3i_scale.transfer import labels
from m3i_scale.transfer.features import Encoded, Known
from m3i_scale.transfer.judge import Judge, Score, given, of_own_rows

TEMPLATE = "a photo of a {}."  # where no file has others


class Prompts(NamedTuple):
    """Names and templates, in order."""

    classes: list[str]  # C
    templates: list[str]  # P

    @classmethod
    def read(cls, classes: Path, templates: Path | None) -> Prompts:
        """From files.

        Raises:
            ValueError: one cannot be used.
        """
        names = _lines(classes, "--classes")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            where = [number for number, name in enumerate(names) if name == twice][:2]
            raise ValueError(
                f"--classes: {classes} has {twice!r} as category {where[0]} and {where[1]}, which "
                "nothing would tell apart; name each category once"
            )
        found = [TEMPLATE] if templates is None else _lines(templates, "--templates")
        odd = next((template for template in found if template.count("{}") != 1), None)
        if odd is not None:
            raise ValueError(
                f"--templates: {templates} has the line {odd!r}; each has {{}} once, in the place "
                "of the name"
            )
        return cls(names, found)

    @property
    def sentences(self) -> list[str]:
        """All templates of the first category, then of the second, ...: C * P."""
        return [
            template.replace("{}", name) for name in self.classes for template in self.templates
        ]

    def of_classes(self, embedded: Tensor) -> Tensor:
        """Embeddings (C * P, T) of the sentences -> of the categories (C, T), of unit length."""
        each = embedded.view(len(self.classes), len(self.templates), -1)
        return F.normalize(each.mean(1), dim=-1)

    def require(self, largest: int) -> None:
        """Raise ValueError where a category has no name."""
        if largest >= len(self.classes):
            raise ValueError(
                f"a query is of category {largest} and --classes has {len(self.classes)} names, of "
                f"0 to {len(self.classes) - 1}; name all categories, one a line"
            )


def scores(
    asked: Prompts | None,
    judge: Judge,
    queries: Known,
    encoded: Mapping[str, Encoded],
    embedded: Mapping[str, Tensor],
    category: str,
) -> Iterator[Score]:
    """Categories by the embeddings of their names (a collective).

    Args:
        asked: None: nothing is.
        judge: of the queries.
        queries: what is known of them.
        encoded: their features, by the networks' names.
        embedded: `Prompts.sentences`, likewise.
        category: what a category is, in the table.

    Raises:
        ValueError: no query has a category, or one has no name.
    """
    if asked is None:
        return
    wanted = labels.rows_with(labels.categories(queries))
    if not len(wanted):
        raise ValueError("--classes names categories, and no query has one; name other indexes")
    truth, shares = queries.category[wanted], {}
    asked.require(int(truth.max()))
    for who, one in encoded.items():
        scorer = functools.partial(torch.matmul, other=asked.of_classes(embedded[who]).T)
        scores_of = functools.partial(of_own_rows, scorer, given(one.text), one.own)
        shares[who] = judge.shares(scores_of, wanted, truth, (1, 5))
    for place, k in enumerate((1, 5)):
        accuracy = {who: found[place] for who, found in shares.items()}
        title, key = f"zero-shot {category} by name, top-{k}", f"zero_shot_class_top{k}"
        yield Score(title, key, accuracy, labels.chance(truth, k), len(truth), len(asked.classes))


def _lines(path: Path, option: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{option}: {path} cannot be read ({error})") from None
    if not any(lines):
        raise ValueError(f"{option}: {path} is empty; write one a line")
    while not lines[-1]:
        lines.pop()
    if "" in lines:
        raise ValueError(
            f"{option}: line {lines.index('') + 1} of {path} is empty; each line is one, without "
            "gaps"
        )
    return lines
