"""What a checkpoint says about the run that wrote it, and whether the run that resumes agrees.

The stream position of a checkpoint means something only in the same order of the same samples, and
its averages only for the same objective. A checkpoint therefore states all that these depend on,
key by key; a difference is refused unless it is accepted by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3i_scale.config import Config, ConfigError
from m3i_scale.engine.schedules import BatchSplit

log = logging.getLogger(__name__)

ABSENT = "absent"


def statement(config: Config, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that order, samples and loss depend on: configuration key -> JSON value.

    Args:
        config: the whole configuration.
        sources: what each source is, whatever its path (`data.Stream.identities`).
    """
    tree = config.model_dump(mode="json")
    data = tree["data"]
    stated: dict[str, Any] = {
        "seed": config.seed,
        "optimizer.global_batch_size": config.optimizer.global_batch_size,
        "data.lanes": config.lanes,
        "data.chunk_mebibytes": data["chunk_mebibytes"],
        "data.image_size": data["image_size"],
        "data.mean": data["mean"],
        "data.std": data["std"],
    }
    if config.model.init is not None:
        stated["model.init"] = tree["model"]["init"]
    stated |= _flat("data.augmentation", data["augmentation"])
    for number, source in enumerate(data["sources"]):
        own = {key: value for key, value in source.items() if key not in ("name", "index")}
        identity = sources[number] if number < len(sources) else {}
        stated |= _flat(f"data.sources.{number}", own | {"index": dict(identity)})
    objective = dict(tree["objective"])
    targets = {target["name"]: target for target in objective.pop("targets")}
    stated |= _flat("objective", objective | {"targets": targets})
    return stated


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inside in value.items():
        found |= _flat(f"{prefix}.{key}", inside)
    return found


def require_agreement(
    path: Path, stored: Mapping[str, Any] | None, now: Mapping[str, Any], accepted: Iterable[str]
) -> list[str]:
    """Refuse to resume under another order, other samples or another objective.

    Args:
        path: the checkpoint.
        stored: its statement; None if it was written before there were any.
        now: the statement of the run that resumes.
        accepted: keys whose change is wanted; a key stands for all below it, too.

    Returns:
        What differs and is accepted, one phrase for each key.

    Raises:
        ConfigError: something differs that is not accepted, or an accepted key does not exist.
    """
    accepted = list(accepted)
    known = {*now, *(stored or ())}
    for word in accepted:
        if not any(_covers(word, key) for key in known):
            raise ConfigError(
                f"--accept-change {word}: there is no such key among those that a checkpoint "
                f"states; the first parts of these are {', '.join(sorted(_roots(known)))}"
            )
    if stored is None:
        return [f"{path} does not say what its order was, so that nothing could be compared"]
    differing = [key for key in sorted(known) if stored.get(key, ABSENT) != now.get(key, ABSENT)]
    phrases = {
        key: f"{key} was {stored.get(key, ABSENT)!r} and is {now.get(key, ABSENT)!r}"
        for key in differing
    }
    refused = [key for key in differing if not any(_covers(word, key) for word in accepted)]
    if refused:
        shown = "; ".join(phrases[key] for key in refused[:4])
        more = f"; and {len(refused) - 4} more" if len(refused) > 4 else ""
        raise ConfigError(
            f"{path} was written under other settings, with which order, samples or loss differ: "
            f"{shown}{more}. Set them back, choose another run name, or accept it with "
            f"--accept-change {','.join(_shortest(refused))}"
        )
    return [f"accepted: {phrases[key]}" for key in differing]


def _covers(word: str, key: str) -> bool:
    return key == word or key.startswith(f"{word}.")


def _roots(keys: Iterable[str]) -> set[str]:
    """Keys down to their second part."""
    return {".".join(key.split(".")[:2]) for key in keys}


def _shortest(keys: Sequence[str]) -> list[str]:
    """The keys themselves if they are few, else what they have in common."""
    return list(keys) if len(keys) <= 4 else sorted(_roots(keys))


def candidates(config: Config, split: BatchSplit, ranks: int) -> int:
    """Samples that one softmax compares."""
    whole = config.objective.negatives == "batch"
    return split.batch if whole else split.micro * ranks


def candidates_phrase(
    old: Mapping[str, Any], ranks: int, candidates: int, *, contrastive: bool
) -> str | None:
    """What another number of ranks does to the loss; None if it does nothing.

    Args:
        old: the state in the checkpoint (`ranks`, `candidates`).
        ranks: ranks now.
        candidates: samples of one softmax now.
        contrastive: whether a target has a softmax over samples.
    """
    before = old.get("candidates")
    moved = f"the checkpoint is of {old['ranks']} ranks and this run has {ranks}"
    if contrastive and before is not None and before != candidates:
        return (
            f"{moved}; the softmax over samples has {candidates} candidates instead of {before}, "
            "so that its losses are not comparable with those before"
        )
    return moved if old["ranks"] != ranks else None
