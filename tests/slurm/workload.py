"""A very small pre-training run: data, configuration, and its loss curve by step."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from m3i_scale.models.tokenizer import train_wordpiece
from m3i_scale.shards.indexing import index_shards

STEPS = 24
CONFIGURATION = """
run: unnamed
model:
  backbone:
    name: vit
    options: {width: 32, depth: 2, heads: 2, pool_heads: 2, embed_dim: 24}
  decoder: {depth: 1, width: 32, heads: 4, ffn: 64}
  text: {tokenizer: none, vocab_size: 100, depth: 1, width: 32, heads: 4, ffn: 64, max_length: 8,
         embed_dim: 16}
  categories: 5
objective:
  targets:
    - {name: image_i, image: i, view: same, representation: features, regularisation: stop_gradient,
       likelihood: {form: gaussian}, positions: masked, normalise: layer_norm}
    - {name: text_i, image: i, representation: text, regularisation: negatives,
       likelihood: {form: boltzmann, learnable: true}}
    - {name: category_j, image: j, representation: category, regularisation: negatives,
       likelihood: {form: boltzmann, temperature: 1.0, label_smoothing: 0.1}}
data: {image_size: 64, workers: 0}
optimizer: {global_batch_size: 8, max_micro_batch: 8, warmup: 2 steps}
engine: {precision: fp32, timeout_minutes: 2}
checkpoint: {every: 4 steps}
logging: {tensorboard: false, pictures: false}
"""


def write_workload(folder: Path) -> Path:
    """Write data and configuration into the folder; the configuration's path."""
    tree = yaml.safe_load(CONFIGURATION)
    captions = [f"caption {number} of many" for number in range(96)]
    tokenizer = folder / "tokenizer.json"
    train_wordpiece(captions, 100, tokenizer)
    tree["model"]["text"]["tokenizer"] = str(tokenizer)
    texts = [(".txt", caption.encode()) for caption in captions]
    classes = [(".cls", b"%d" % (number % 5)) for number in range(64)]
    tree["data"]["sources"] = [
        {"name": kind, "index": _source(folder, kind, labels), "kind": kind}
        for kind, labels in (("text", texts), ("category", classes))
    ]
    _source(folder, "heldout", classes[:20])
    tree["optimizer"]["duration"] = f"{STEPS} steps"
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _source(folder: Path, name: str, labels: list[tuple[str, bytes]]) -> str:
    """A shard of as many images as there are labels (suffix, content), and its index."""
    shard = folder / f"{name}.tar"
    with tarfile.open(shard, "w") as tar:
        for number, (suffix, label) in enumerate(labels):
            for ending, content in ((suffix, label), (".jpg", _jpeg(number))):
                info = tarfile.TarInfo(f"{number:06d}{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index = folder / f"{name}.parquet"
    kind = "text" if labels[0][0] == ".txt" else "category"
    index_shards([str(shard)], str(index), kind=kind, progress=False)
    return str(index)


def _jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((72, 72), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def steps_done(run_folder: Path) -> int:
    """Steps that the metrics of a run tell of so far."""
    path = run_folder / "metrics.jsonl"
    return max(curve(run_folder), default=-1) + 1 if path.exists() else 0


def curve(run_folder: Path) -> dict[int, dict[str, float]]:
    """Everything measured of each step but times and machines; what ran twice must be the same.

    Raises:
        AssertionError: it did not.
    """
    found: dict[int, dict[str, float]] = {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True):
        if not line.endswith("\n"):  # being written
            break
        values = json.loads(line, parse_constant=str)  # or NaN would differ from itself
        step = values.pop("step")
        of_time = ("second", "machine/", "time")
        kept = {k: v for k, v in values.items() if not any(word in k for word in of_time)}
        assert found.setdefault(step, kept) == kept, f"step {step} differs when repeated"
    return found
