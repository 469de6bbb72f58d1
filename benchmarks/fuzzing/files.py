"""Damaged checkpoints, configurations, exported and published weights, and a run's own records."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzzing.damage import (
    NAMED,
    NUMBERS,
    REFUSED,
    UNHARMED,
    Random,
    attempt,
    damaged,
    require,
)

SHAPES = {"a.weight": [50, 30], "a.bias": [1], "b.weight": [7]}
RANKS = 2

# ------------------------------------------------------------------------------------- checkpoints


def checkpoint_damaged(rng: Random, folder: Path) -> str:
    """Files of the newest checkpoint are damaged, cut, emptied or gone: the one before is taken."""
    run = _checkpoints(folder)
    for path in rng.choice(sorted((run / "step-00000002").iterdir()), int(rng.integers(1, 3))):
        match int(rng.integers(6)):
            case 0:
                path.unlink(missing_ok=True)
            case 1:
                path.write_bytes(b"")
            case 2:
                path.write_bytes(bytes(path.stat().st_size if path.exists() else 10))
            case _ if path.exists():
                path.write_bytes(damaged(rng, path.read_bytes()))
    if rng.random() < 0.2:
        (run / "lineage.json").write_bytes(damaged(rng, (run / "lineage.json").read_bytes()))
    return _resumed(run, allowed={1, 2})


def checkpoint_lying(rng: Random, folder: Path) -> str:
    """Records of the newest checkpoint say what is not so, with right checksums."""
    run = _checkpoints(folder)
    newest = run / "step-00000002"
    name = str(rng.choice(["state.json", "complete.json", "lineage.json"]))
    path = run / name if name == "lineage.json" else newest / name
    content = json.loads(path.read_text())
    text = json.dumps(changed_tree(rng, content))
    if rng.random() < 0.1:
        text = "[" * 200_000
    path.write_text(text)
    if name == "state.json":
        _sign(newest, name)
    return _resumed(run, allowed={1, 2})


def _sign(path: Path, name: str) -> None:
    """Put the right size and checksum of a file into the marker."""
    marker = json.loads((path / "complete.json").read_text())
    data = (path / name).read_bytes()
    entry = {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    marker["files"] = [entry if old["file"] == name else old for old in marker["files"]]
    (path / "complete.json").write_text(json.dumps(marker))


def _resumed(run: Path, allowed: set[int]) -> str:
    """Resume: what is loaded is one checkpoint to the last bit, or there is a sentence."""
    from m3i_scale.cluster.launch import World
    from m3i_scale.engine.saver import newest_good
    from m3i_scale.engine.state import require_same_networks

    world, found = World(0, 0, 1, torch.device("cpu")), list[int]()

    def resume() -> None:
        reader = newest_good(run, "auto", world)
        if reader is None:
            return
        require_same_networks(reader, SHAPES)
        step = int(reader.path.name[-1])
        require(reader.state["step"] == step, "silent", "the state is of another step")
        for kind in ("weight", "exp_avg"):
            for name in SHAPES:
                tensor = reader.tensor(kind, name)
                require(tensor.equal(_weights(name, step)), "silent", f"{kind}/{name} differs")
        require(set(reader.generator_states(1)) == {"cpu"}, "silent", "generators differ")
        found.append(step)

    if attempt(resume) is not None:
        return REFUSED
    require(bool(found) and found[0] in allowed, "silent", f"resumed {found} of {allowed}")
    return UNHARMED if found == [2] else NAMED


def _weights(name: str, step: int) -> Tensor:
    count = int(torch.Size(SHAPES[name]).numel())
    return (torch.arange(count, dtype=torch.float32) + 100 * step).reshape(SHAPES[name])


def _checkpoints(folder: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2 of a run on two ranks."""
    sound, run = folder / "sound", folder / "checkpoints"
    if not sound.exists():
        _write_checkpoints(sound)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(sound, run)
    return run


def _write_checkpoints(folder: Path) -> None:
    from m3i_scale.engine import checkpoint, lineage

    line = lineage.begin_anew()
    for step in (1, 2):
        writes = []
        for rank in range(RANKS):
            tensors = {"rng/cpu": torch.full((4,), rank, dtype=torch.uint8)}
            for kind in ("weight", "exp_avg"):
                for name in SHAPES:
                    flat = _weights(name, step).flatten()
                    own = checkpoint.extent(flat.numel(), rank, RANKS)
                    tensors[f"{kind}/{name}"] = flat[own.start : own.stop].clone()
            state = {"ranks": RANKS, "shapes": SHAPES, "buffers": {}, "step": step, "position": 12,
                     "skipped": 0, "adam_step": step, "balance": {}}  # fmt: skip
            writes.append(checkpoint.begin_write(folder, step, rank, RANKS, tensors, state))
        for write in writes:
            write.thread.join()
        checkpoint.publish(writes[0], RANKS, line)
    lineage.write_file(folder / lineage.FILE, line)


def changed_tree(rng: Random, tree: Any) -> Any:
    """A JSON tree with one place changed: another value, gone, or more."""
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = str(rng.choice(sorted(tree)))
        if rng.random() < 0.15:
            return {name: value for name, value in tree.items() if name != key}
        return {**tree, key: changed_tree(rng, tree[key])}
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        at = int(rng.integers(len(tree)))
        if rng.random() < 0.15:
            return tree[:at] + tree[at + 1 :]
        return [*tree[:at], changed_tree(rng, tree[at]), *tree[at + 1 :]]
    number = int(rng.choice(np.array(NUMBERS, dtype=object)))
    odd: list[Any] = [
        None, True, number, -number, 1.5, float("nan"), float("inf"), "", "x", "../x", "/dev/zero",
        "\0", "x" * 3000, [], [[]], {}, {"": None}, [number], "\ud800",
    ]  # fmt: skip
    return odd[int(rng.integers(len(odd)))]


# ----------------------------------------------------------------------------------- configurations


_CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@cache
def _shipped() -> list[tuple[Path, bytes]]:
    """All shipped configurations by their paths below configs/."""
    return [(p.relative_to(_CONFIGS), p.read_bytes()) for p in sorted(_CONFIGS.rglob("*.yaml"))]


def config_damaged(rng: Random, folder: Path) -> str:
    """Bytes of a configuration file are changed, cut, repeated or inserted."""
    name, text = _shipped()[int(rng.integers(len(_shipped())))]
    for _ in range(int(rng.integers(1, 3))):
        text = _misspelt(rng, text) if rng.random() < 0.6 else damaged(rng, text)
    return _load(folder, text, name=name)


def _misspelt(rng: Random, text: bytes) -> bytes:
    """One line is gone, repeated, indented, or has another value."""
    lines = text.split(b"\n")
    at = int(rng.integers(len(lines)))
    key, colon, _ = lines[at].partition(b":")
    values = [b" 3", b" -1", b" x", b" []", b" {}", b" null", b" 1e30", b" '", b" true", b" .nan"]
    replaced = key + colon + values[int(rng.integers(len(values)))]
    changed_lines = [[], [lines[at]] * 2, [b"  " + lines[at]], [b"\t" + lines[at]], [replaced]]
    return b"\n".join([*lines[:at], *changed_lines[int(rng.integers(5))], *lines[at + 1 :]])


def config_hostile(rng: Random, folder: Path) -> str:
    """A configuration that is deep, huge, circular, tagged, or has values of any type and size."""
    n = int(rng.choice([3, 200, 5000, 60_000]))
    number = int(rng.choice(np.array(NUMBERS, dtype=object)))
    texts: list[str] = [
        "[" * n, "{" * n, "- " * n, "a: " * min(n, 5000), "&a " * n, "? " * n, "!!x " * n, "#" * n,
        "\n".join(f"k{i}: {i}" for i in range(n)), "x: '" + "y" * n, "x: |\n" + " a\n" * n,
        "a: &a [" + "x," * n + "]\n" + "".join(f"k{i}: *a\n" for i in range(50)),
        "a: &a [1]\n" + "b: &b [*a,*a]\n" * 2, _laughs(min(n, 30)), "a: &a\n  b: *a",
        "<<: [" + "{a: 1}," * n + "]", "<<: 3", "<<: {a: 1}\n<<: {b: 1}", "run: " + "x" * n,
        "run: !!bool x", "run: !!int ''", "run: !!float ''", "run: !!null x", "run: !!binary x",
        "run: !!timestamp x", "run: !!set {a}", "run: !!python/object/apply:os.system [true]",
        'run: "\\UFFFFFFFF"', 'run: "\\uD800"', 'run: "\\x00"', 'base: "\\uD800.yaml"',
        "base: '\0'", "base: " + "x" * n, "base: [/dev/null]", "base: [/]", "base: .",
        "base: c.yaml", "%YAML 9.9\n---",
        "--- a\n--- b", "run: 0x" + "f" * n, "run: " + "9" * n, "seed: " + "9" * n, "seed: 1e999",
        f"seed: {number}", f"optimizer: {{duration: {number} steps}}", "run: ../..", "run: /",
        f"optimizer: {{duration: {number / 7} epochs, global_batch_size: {number}}}",
        f"data: {{image_size: {number}}}", f"data: {{sources: [{'{},' * min(n, 5000)}]}}",
        f"model: {{backbone: {{name: vit, options: {{width: {number}}}}}}}", "model: 3", "[]", "",
        f"checkpoint: {{every: {number} samples}}", f"objective: {{targets: {{a: {number}}}}}",
        f"optimizer: {{warmup: {'9' * min(n, 300)} steps}}", "data: {mean: [1, 2]}", "\ufeffrun: x",
        "run: x\n\tfolder: y", "~: 1", "1: 2", "[a]: 1", "? {a: b}\n: c", "run: *nothing",
        "folder: $NOT_SET_ANYWHERE", "folder: ~nobody-at-all/x", "folder: ${", "null", "'x'",
        "engine: {zero: {extra: " + "{a: " * min(n, 5000) + "1" + "}" * min(n, 5000) + "}}",
    ]  # fmt: skip
    text = texts[int(rng.integers(len(texts)))]
    encoded = text.encode(str(rng.choice(["utf-8"] * 8 + ["utf-16", "utf-32"])), "surrogatepass")
    if rng.random() < 0.5:
        return _load(folder, encoded)
    name, encoded = _shipped()[int(rng.integers(len(_shipped())))]
    return _load(folder, encoded, [_override(rng, number)], name)


_KEYS = ("seed", "run", "folder", "optimizer.duration", "optimizer.global_batch_size",
         "optimizer.learning_rate", "data.image_size", "data.sources.0.index", "data.sources.9",
         "data.max_pixels", "model.backbone.options.depth", "checkpoint.every", "engine.zero.stage",
         "optimizer.warmup", "logging.every", "data.bad_window", "objective.targets", "data", "",
         "data.augmentation.scale", "engine.stall_minutes", "data.chunk_mebibytes", "a.b.c",
         "objective.input.patch", "model.text.vocab_size", "data.lanes")  # fmt: skip


def _override(rng: Random, number: int) -> str:
    values = [
        f"{number}", f"{-number}", "nan", ".nan", ".inf", "1e400", "-1e-400", "'", "[", "{", "",
        "null", "yes", f"{number} steps", f"{number} epochs", "0.1 x", "9" * 5000, "!!int ''",
        "\ud800", "*a", "&a", "[1,2", "# x", "a # b", "|", '"\\UFFFFFFFF"', "[" * 2000, "\0",
        f"[{number}, {number}]", "../../x", "$NOPE", "x" * 20_000, "{a: " * 500,
    ]  # fmt: skip
    return f"{_KEYS[int(rng.integers(len(_KEYS)))]}={values[int(rng.integers(len(values)))]}"


def _laughs(depth: int) -> str:
    """Aliases of aliases, each twice the one before."""
    lines = ["a0: &a0 x", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, depth))]
    return "\n".join(lines)


def _load(
    folder: Path, text: bytes, overrides: list[str] | None = None, name: Path = Path("c.yaml")
) -> str:
    """Load a configuration that stands in the place of a shipped one, beside all others."""
    from m3i_scale.config import ConfigError, dump_config, load_config

    tree = folder / "configs"
    if not tree.exists():
        shutil.copytree(_CONFIGS, tree)
    path = tree / name
    sound = path.read_bytes() if path.exists() else b""
    path.write_bytes(text)

    def load() -> None:
        try:
            if name.parent.name == "methods":  # these are laid over others
                config = load_config(tree / "demo.yaml", overrides or [], over=[path])
            else:
                config = load_config(path, overrides or [])
        except ConfigError:
            raise
        (folder / "again.yaml").write_text(dump_config(config))
        again = load_config(folder / "again.yaml")
        same = again.model_dump_json() == config.model_dump_json()
        require(same, "silent", "what is written is not read back")

    try:
        return UNHARMED if attempt(load) is None else REFUSED
    finally:
        path.write_bytes(sound)


# ------------------------------------------------------------------------------------------ weights


def weights_damaged(rng: Random, folder: Path) -> str:
    """Exported weights (safetensors) are damaged or lie in their header or metadata."""
    from m3i_scale.transfer.export import load_backbone

    sound = _exported()
    match int(rng.integers(3)):
        case 0:
            data = damaged(rng, sound)
        case 1:
            data = _other_header(rng, sound)
        case _:
            data = damaged(rng, sound[:8]) + sound[8:]
    path = folder / "model.safetensors"
    path.write_bytes(data)
    refused = [
        attempt(lambda: load_backbone(path), tool=True),
        attempt(lambda: _read_folder(path), tool=True),
        attempt(lambda: _initial(path)),
    ]
    return REFUSED if any(refused) else UNHARMED


def weights_published(rng: Random, folder: Path) -> str:
    """Published weights: damaged pickles, pickles that run code, bombs, odd contents."""
    from m3i_scale.models.weights import load_published

    path = folder / str(rng.choice(["w.pth", "w.bin", "w.pt"]))
    path.write_bytes(_pickle(rng, folder))
    refused = [
        attempt(lambda: load_published(path), tool=True),
        attempt(lambda: _read_folder(path), tool=True),
        attempt(lambda: _initial(path)),
    ]
    require(not (folder / "ran").exists(), "silent", "a pickle ran code")
    return REFUSED if refused[0] else UNHARMED


def weights_folders(rng: Random, folder: Path) -> str:
    """A folder of another library: config.json and the index of several files are damaged."""
    from m3i_scale.models.tokenizer import load_tokenizer

    (folder / "model.safetensors").unlink(missing_ok=True)
    sound = [
        {"model_type": "internimage", "channels": 16, "depths": [1, 1, 1, 1]},
        {"architecture": "intern_image_t", "model_args": {"channels": 16}},
        {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 2}},
        {"model_type": "ijepa", "num_attention_heads": 2},
    ][int(rng.integers(4))]
    index = {"metadata": {"total_size": 3}, "weight_map": {"a": "part.safetensors"}}
    (folder / "part.safetensors").write_bytes(_exported())
    tokenizer = folder / "tokenizer.json"
    bad = int(rng.integers(3))
    for number, (path, content) in enumerate((
        (folder / "config.json", sound), (folder / "model.safetensors.index.json", index),
        (tokenizer, _tokenizer()),
    )):  # fmt: skip
        path.write_bytes(_json_damage(rng, content) if number == bad else as_json(content))
    tokens = lambda: load_tokenizer(tokenizer)(["caption 1", ""], max_length=8)  # noqa: E731
    refused = [
        attempt(lambda: _read_folder(folder), tool=True),
        attempt(lambda: _initial(folder)),
        attempt(tokens, tool=True),
    ]
    return REFUSED if any(refused) else UNHARMED


def as_json(content: Any) -> bytes:
    """A JSON document."""
    return json.dumps(content).encode()


def _json_damage(rng: Random, content: Any) -> bytes:
    if rng.random() < 0.05:
        return b"[" * 100_000
    if rng.random() < 0.4:
        return damaged(rng, json.dumps(content).encode())
    return json.dumps(changed_tree(rng, content)).encode()


def _read_folder(path: Path) -> None:
    from m3i_scale.integrations.folders import open_weights

    for entry in open_weights(str(path)).entries.values():
        entry.load().float()


def _initial(path: Path) -> None:
    from m3i_scale.config.model import Model
    from m3i_scale.integrations.initial import open_initial

    model = Model.model_validate({"backbone": _BACKBONE, "init": str(path)})
    initial = open_initial(model)
    for name in initial.names:
        initial.tensor(name)


_BACKBONE: dict[str, Any] = {
    "name": "vit",
    "options": {"width": 16, "depth": 2, "heads": 2, "patch_size": 8, "pool_heads": 2,
                "embed_dim": 16},
}  # fmt: skip


@cache
def _exported() -> bytes:
    from safetensors.torch import save

    metadata = {"format": "pt", "part": "backbone", "which": "student", "step": "3",
                "backbone": json.dumps(_BACKBONE), "config": "{}"}  # fmt: skip
    return save(_state(), metadata)


@cache
def _state() -> dict[str, Tensor]:
    from m3i_scale.models.vit import ViT

    with torch.random.fork_rng(devices=[]):
        backbone = ViT(**_BACKBONE["options"])
    return {name: value.contiguous() for name, value in backbone.state_dict().items()}


def _other_header(rng: Random, data: bytes) -> bytes:
    """The same tensors under a header in which something is not so."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    for _ in range(int(rng.integers(1, 3))):
        if rng.random() < 0.3:
            metadata = dict(header.get("__metadata__") or {}) | {"backbone": json.dumps(
                changed_tree(rng, _BACKBONE))}  # fmt: skip
            header["__metadata__"] = metadata
        else:
            header = changed_tree(rng, header)
        if not isinstance(header, dict):
            break
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


class _Runs:
    """Unpickled by a reader that executes: it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.path), "w")


def _pickle(rng: Random, folder: Path) -> bytes:
    tensor = torch.arange(12.0)
    contents: list[Any] = [
        {"model": {"a": tensor}}, {"a": tensor}, {"module": {"a": tensor}}, [tensor], tensor, None,
        {1: tensor}, {("a", "b"): tensor}, {"model": {"a": tensor, "b": 3}}, {}, {"model": {}},
        {"a": tensor.to_sparse()}, {"a": torch.empty(10, device="meta")}, {"a": tensor.bool()},
        {"a": tensor.as_strided((3, 4), (0, 0))}, {"a": torch.tensor(1 + 2j)}, {"a": tensor.half()},
        {"model": _state()}, {"a": torch.empty(1).expand(10**9)}, {"a": {"b": tensor}},
        {"\ud800": tensor},
    ]  # fmt: skip
    buffer = io.BytesIO()
    zipped = bool(rng.integers(2))
    torch.save(contents[int(rng.integers(len(contents)))], buffer,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    data = buffer.getvalue()
    match int(rng.integers(6)):
        case 0:
            return data
        case 1:
            return pickle.dumps({"model": _Runs(folder / "ran")})
        case 2:
            return _repacked(rng, folder)
        case _:
            return damaged(rng, data)


@cache
def _packed_bomb() -> bytes:
    """A file of torch.save whose tensor has 100 MB and is packed in 100 kB."""
    return _repack(lambda name, content: bytes(100_000_000) if name.endswith("data/0") else content)


def _repacked(rng: Random, folder: Path) -> bytes:
    """A file of torch.save whose pickle, storage or packing is not what torch writes."""
    choice, nested = int(rng.integers(5)), b"]" * int(rng.integers(1, 10**6))

    def change(name: str, content: bytes) -> bytes | None:
        if choice == 4 and rng.random() < 0.5:
            return None
        if name.endswith("data.pkl") and choice == 1:
            return content.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f")
        if name.endswith("data.pkl") and choice == 2:
            return pickle.dumps(_Runs(folder / "ran"), 2)
        if name.endswith("data.pkl") and choice == 3:
            return b"\x80\x02" + b"(" * 10 + nested + b"."
        return content

    return _packed_bomb() if choice == 0 else _repack(change)


def _repack(change: Callable[[str, bytes], bytes | None]) -> bytes:
    """A file of torch.save, packed, with other content, or without a part where that is None."""
    buffer, out = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.arange(1000.0)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            content = change(info.filename, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return out.getvalue()


# ------------------------------------------------------------------------------------------ records


def run_records(rng: Random, folder: Path) -> str:
    """events.jsonl and metrics.jsonl are damaged or say what is not so: the report still works."""
    for name, lines in _records().items():
        changed_lines = [json.dumps(changed_tree(rng, line) if rng.random() < 0.1 else line)
                         for line in lines]  # fmt: skip
        data = "\n".join(changed_lines).encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(damaged(rng, data) if rng.random() < 0.5 else data)
    refused = attempt(lambda: _report(folder), tool=True)
    return REFUSED if refused is not None else UNHARMED


def _report(folder: Path) -> None:
    from m3i_scale.report import page, read, summary

    report, _ = summary.summarise(read.read_trace(folder), now=2000.0)
    json.dumps(report)
    page.markdown(report, "report.png")


@cache
def _records() -> dict[str, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    for attempt_number in range(3):
        at, name = 1000.0 + 100 * attempt_number, f"a{attempt_number}"
        parts = [["launch", at], ["imports", at + 1], ["nodes", at + 3]]
        head = {"attempt": name, "time": at}
        events += [
            {"event": "start", **head, "parts": parts, "ranks": 2, "hosts": ["x", "y"], "job": "1",
             "restart": 0, "submitted": at - 5, "last_sign": None},
            {"event": "part", **head, "part": "networks"},
            {"event": "begin", **head, "step": 5 * attempt_number, "run": "r", "rollback": False},
            {"event": "end", **head, "cause": "stopped", "words": "x",
             "checkpoint_wait_seconds": 1},
        ]  # fmt: skip
        metrics += [
            {"step": 5 * attempt_number + n, "time": at + 10 + n, "attempt": name,
             "step_seconds": 0.9, "loss/total": 1.0, "machine/slowest_rank": 1,
             "machine/slowest_rank_seconds": 0.8, "machine/slowest_rank_ratio": 1.1}
            for n in range(6)
        ]  # fmt: skip
    return {"events.jsonl": events, "metrics.jsonl": metrics}


@cache
def _tokenizer() -> Any:
    import tempfile

    from m3i_scale.models.tokenizer import train_wordpiece

    with tempfile.TemporaryDirectory() as name:
        train_wordpiece(["caption 1", "a b c"], 40, Path(name) / "t.json")
        return json.loads((Path(name) / "t.json").read_text())
