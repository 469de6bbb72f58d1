"""Indexes that are sound Parquet and say what is not so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fuzzing.damage import NUMBERS, Random
from m3i_scale.data import index as written

_LISTS = (*written._LISTS, "check")
_MEMBERS = ("json", "json:", "json:x", "", "jpg", "\0", "x" * 5000, "[", '["txt", 3]',
            '["txt", "alt.txt"]', "[" * 5000)  # fmt: skip


def lie(rng: Random, path: Path) -> None:
    """Write the index at `path` again with something in it that is not so."""
    file = pq.ParquetFile(path)
    row = file.read().to_pylist()[0]
    notes: Any = {"largest_category": 7, "classes": {}}
    match int(rng.integers(8)):
        case 0 | 1 | 2:
            _lie_in_list(rng, row)
        case 3:
            row["bytes"] = _number(rng, np.int64)
        case 4:
            row["samples"] = _number(rng, np.int32)
        case 5:
            row[str(rng.choice(["text_member", "category_member"]))] = str(rng.choice(_MEMBERS))
        case 6:
            notes = [
                [], None, {"largest_category": "x"}, {"classes": []}, {"classes": {"a": "b"}}, 3,
                {"largest_category": 1e300}, {"largest_category": None},
            ][int(rng.integers(8))]  # fmt: skip
        case _:
            names = ["", ".", "..", "/dev/zero", "no.tar", "pipe:true", "x" * 300, "s3://",
                     "a.tar/x", "file://a.tar"]  # fmt: skip
            row["shard"] = str(rng.choice(names))
    table = pa.table({name: [row[name]] for name in written.SCHEMA.names}, schema=written.SCHEMA)
    written.write_index(str(path), [table], notes)


def _number(rng: Random, kind: type[Any]) -> int:
    limits = np.iinfo(kind)
    value = int(rng.choice(np.array(NUMBERS, dtype=object)))
    return max(int(limits.min), min(int(limits.max), value))


def _lie_in_list(rng: Random, row: dict[str, Any]) -> None:
    name = str(rng.choice(_LISTS))
    values = list(row[name])
    kind = np.int64 if name.endswith("offset") else np.uint32 if name == "check" else np.int32
    match int(rng.integers(5)):
        case 0:
            values[int(rng.integers(len(values)))] = _number(rng, kind)
        case 1:
            del values[int(rng.integers(len(values))) :]
        case 2:
            values = values[:1]
        case 3:
            values = [values[i] for i in rng.permutation(len(values))]
        case _:
            values = values * 2
    row[name] = values
