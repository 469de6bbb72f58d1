"""The block cache: never a wrong byte, whoever writes, dies or damages it; never a stopped run."""

from __future__ import annotations

import logging
import os
import random
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from helpers.shards import make_source, text_members, write_tar
from helpers.small import labelled_tree
from helpers.streams import assert_same, by_position, client, make_stream
from m3i_scale.config import Config
from m3i_scale.data.cache import DiskCache
from m3i_scale.shards.indexing import index_shards

DATA = np.random.default_rng(0).integers(1, 255, 3_000_000, dtype=np.uint8).tobytes()


def reader_of(data: bytes):
    calls = []

    def fetch(start: int, stop: int) -> bytes:
        calls.append((start, stop))
        return data[start:stop]

    return fetch, calls


def test_cache_reads_each_block_once_and_joins_what_is_missing(tmp_path):
    data = bytes(range(256)) * 20  # 5120 bytes
    fetch, calls = reader_of(data)
    cache = DiskCache(tmp_path, 100_000, block_bytes=1000)
    assert cache.read("u", 1500, 1600, fetch) == data[1500:1600]
    assert cache.read("u", 500, 4500, fetch) == data[500:4500]
    assert calls == [(1000, 2000), (0, 1000), (2000, 5000)]
    assert cache.read("u", 4900, 6000, fetch) == data[4900:]
    assert cache.read("u", 0, 5120, fetch) == data
    assert len(calls) == 4


def test_cache_keeps_its_limit_and_drops_what_was_used_least_recently(tmp_path):
    fetch, _ = reader_of(os.urandom(100_000))
    cache = DiskCache(tmp_path, 20_000, block_bytes=1000)
    for block in range(60):
        cache.read("u", block * 1000, block * 1000 + 10, fetch)
        cache.read("u", 0, 10, fetch)  # used all the time
        assert cache.used() <= 20_000
    assert cache._load("u", 0, 0, 10) is not None
    assert cache._load("u", 1, 0, 10) is None


def _hammer(folder: str, seed: int) -> int:
    import random

    data = bytes(range(256)) * 400
    cache, rng = DiskCache(folder, 12_000, block_bytes=1000), random.Random(seed)
    wrong = 0
    for _ in range(150):
        start = rng.randrange(0, 100_000)
        stop = start + rng.randrange(1, 3000)
        wrong += cache.read("u", start, stop, lambda a, b: data[a:b]) != data[start:stop]
        wrong += cache.used() > 12_000
    return wrong


def test_cache_is_shared_by_processes(tmp_path):
    with get_context("fork").Pool(4) as pool:
        assert pool.starmap(_hammer, [(str(tmp_path), seed) for seed in range(4)]) == [0] * 4


def test_cache_survives_a_crash(tmp_path):
    fetch, _ = reader_of(b"x" * 10_000)
    cache = DiskCache(tmp_path, 5000, block_bytes=1000)
    cache.read("u", 0, 2000, fetch)
    block = cache._path("u", 0)
    half = block.with_name(f"{block.name}.999.tmp")  # what a writer that was killed leaves behind
    half.write_bytes(b"half")
    os.utime(half, (1, 1))
    (tmp_path / "used").write_bytes(b"garbage")
    after = DiskCache(tmp_path, 5000, block_bytes=1000)
    assert after.read("u", 0, 10_000, fetch) == b"x" * 10_000
    assert after.used() <= 5000
    assert not half.exists()


def test_a_cache_that_cannot_be_written_costs_no_data(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, 5000, block_bytes=1000)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    fetch, _ = reader_of(b"y" * 3000)
    assert cache.read("u", 0, 3000, fetch) == b"y" * 3000
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cache_too_small_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too small"):
        DiskCache(tmp_path, 1000)


def blocks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.suffix != ".tmp")


def random_reads(cache: DiskCache, seed: int, count: int) -> int:
    """How many of `count` reads return something else than the bytes of DATA."""
    rng, wrong = random.Random(seed), 0
    for _ in range(count):
        start = rng.randrange(len(DATA))
        stop = start + rng.randrange(1, 200_000)
        wrong += cache.read("u", start, stop, lambda a, b: DATA[a:b]) != DATA[start:stop]
    return wrong


@pytest.mark.parametrize("turn", range(4))
def test_threads_that_fetch_the_same_blocks_never_see_others(tmp_path, turn):
    cache = DiskCache(tmp_path, 8 << 20, block_bytes=1 << 20)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda n: random_reads(cache, 8 * turn + n, 12), range(8))) == 0
    stored = [path.read_bytes() for path in blocks(tmp_path)]
    assert len(stored) == 3
    for block in stored:
        data = block[: len(block) - 4 * -(-len(block) // (65536 + 4))]
        assert data in DATA
    assert cache.read("u", 0, len(DATA), lambda a, b: b"") == DATA  # all blocks verify
    assert not cache.faults
    assert not list(tmp_path.rglob("*.tmp"))


def _read_in_threads(folder: str, seed: int, count: int, limit: int) -> int:
    """In a process with the number of all others, as in containers that share a folder."""
    cache = DiskCache(folder, limit, block_bytes=256 << 10)
    os.getpid = lambda: 17
    with ThreadPoolExecutor(3) as pool:
        wrong = sum(pool.map(lambda n: random_reads(cache, seed + n, count), range(3)))
    return wrong + sum(cache.faults.values())


def test_threads_of_processes_with_equal_numbers_share_a_small_cache(tmp_path):
    with get_context("fork").Pool(4) as pool:
        limit = 2 << 20  # less than the data: blocks are thrown out all the time
        jobs = [(str(tmp_path), 10 * n, 15, limit) for n in range(4)]
        assert pool.starmap(_read_in_threads, jobs) == [0] * 4
    assert DiskCache(tmp_path, limit, block_bytes=256 << 10).used() <= limit


def test_readers_killed_at_any_moment_leave_no_wrong_block(tmp_path):
    for seed in range(6):
        reader = get_context("fork").Process(
            target=_read_in_threads, args=(str(tmp_path), 10 * seed, 10**9, 16 << 20)
        )
        reader.start()
        while not blocks(tmp_path):
            time.sleep(0.01)
        time.sleep(0.02 * seed)
        for block in blocks(tmp_path)[::2]:  # so that there is something to write
            block.unlink()
        reader.kill()
        reader.join()
        assert reader.exitcode == -signal.SIGKILL
    cache = DiskCache(tmp_path, 16 << 20, block_bytes=256 << 10)
    assert random_reads(cache, 99, 40) == 0
    assert not cache.faults
    assert cache.used() <= 16 << 20


def zeros(block: Path) -> None:
    block.write_bytes(bytes(block.stat().st_size))


def flipped(block: Path) -> None:
    data = bytearray(block.read_bytes())
    data[len(data) // 2] ^= 1
    block.write_bytes(bytes(data))


def shortened(block: Path) -> None:
    block.write_bytes(block.read_bytes()[:-70_000])


def emptied(block: Path) -> None:
    block.write_bytes(b"")


def another(block: Path) -> None:
    other = next(path for path in blocks(block.parent.parent) if path != block)
    block.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [zeros, flipped, shortened, emptied, another])
def test_a_damaged_block_is_dropped_said_and_read_again(tmp_path, damage, caplog):
    cache = DiskCache(tmp_path, 8 << 20, block_bytes=1 << 20)
    fetch, calls = reader_of(DATA)
    cache.read("u", 0, len(DATA), fetch)
    block = cache._path("u", 1)
    damage(block)
    calls.clear()
    with caplog.at_level(logging.WARNING, logger="m3i_scale.data"):
        assert cache.read("u", 1 << 20, 2 << 20, fetch) == DATA[1 << 20 : 2 << 20]
    assert calls == [(1 << 20, 2 << 20)]
    assert dict(cache.faults) == {"damaged block": 1}
    assert str(block) in caplog.text
    calls.clear()
    assert cache.read("u", 1 << 20, 2 << 20, fetch) == DATA[1 << 20 : 2 << 20]
    assert not calls


def test_the_end_of_a_file_is_not_taken_from_a_shortened_block(tmp_path):
    cache = DiskCache(tmp_path, 8 << 20, block_bytes=1 << 20)
    fetch, _ = reader_of(DATA)
    cache.read("u", 0, len(DATA), fetch)
    last = cache._path("u", 2)
    data = last.read_bytes()
    last.write_bytes(data[:65536] + data[-4 * 14 :][:4])  # one whole page and its checksum
    assert cache.read("u", 2_900_000, 3_100_000, fetch) == DATA[2_900_000:]


def test_another_version_of_a_file_is_another_file(tmp_path):
    storage = client(cache=str(tmp_path), cache_gibibytes=1 / 16)
    storage._fetch = lambda url, start, stop: b"old"[start:stop]
    assert storage.read("http://h/x", 0, 3, version="1") == b"old"
    storage._fetch = lambda url, start, stop: b"new"[start:stop]
    assert storage.read("http://h/x", 0, 3, version="1") == b"old"
    assert storage.read("http://h/x", 0, 3, version="2") == b"new"


# A cache that cannot be used as it should.


def _read_as(user: int, folder: str, answer) -> None:
    os.seteuid(user)
    cache = DiskCache(folder, 8 << 20, block_bytes=1 << 20)
    fetch, calls = reader_of(DATA)
    for _ in range(3):
        assert cache.read("u", 0, 1 << 20, fetch) == DATA[: 1 << 20]
        assert cache.read("u", 2 << 20, 3 << 20, fetch) == DATA[2 << 20 :]
    answer.put((len([start for start, _ in calls if start == 0]), len(calls), dict(cache.faults)))


@pytest.fixture
def anyones_folder():
    """A folder that all users may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as somebody else")
@pytest.mark.parametrize(
    ("mode", "block_mode", "fetched", "faults"),
    [
        pytest.param(0o755, 0o644, (0, 3), {"cannot write": 1}, id="readable"),
        pytest.param(0o755, 0o600, (3, 6), {"cannot read": 3, "cannot write": 1}, id="blocks"),
        pytest.param(0o700, 0o644, (3, 6), {"cannot read": 6, "cannot write": 1}, id="folder"),
    ],
)
def test_the_cache_of_another_user(anyones_folder, mode, block_mode, fetched, faults):
    folder = anyones_folder / "cache"
    DiskCache(folder, 8 << 20, block_bytes=1 << 20).read("u", 0, 1 << 20, reader_of(DATA)[0])
    for path in [folder, *folder.rglob("*")]:
        path.chmod(mode if path.is_dir() else block_mode)
    answer = get_context("fork").Queue()
    other = get_context("fork").Process(target=_read_as, args=(54321, str(folder), answer))
    other.start()
    assert answer.get(timeout=60) == (*fetched, faults)
    other.join()


@pytest.mark.parametrize("below", ["", "/sub/folder"])
def test_a_file_in_place_of_the_folder_is_refused(tmp_path, below):
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cache.* is a file or lies below one"):
        DiskCache(f"{tmp_path}/cache{below}", 64 << 20)


def test_a_folder_that_cannot_be_made_costs_speed_alone(tmp_path, caplog):
    cache = DiskCache("/proc/none/cache", 8 << 20, block_bytes=1 << 20)
    assert cache.read("u", 0, 100, lambda a, b: DATA[a:b]) == DATA[:100]
    assert cache.faults["cannot write"] == 2
    assert caplog.text.count("cannot write") == 1


def test_a_folder_that_is_removed_during_the_run_is_made_again(tmp_path):
    import shutil

    cache = DiskCache(tmp_path / "cache", 8 << 20, block_bytes=1 << 20)
    fetch, calls = reader_of(DATA)
    cache.read("u", 0, 100, fetch)
    shutil.rmtree(tmp_path / "cache")
    for _ in range(2):
        assert cache.read("u", 0, 100, fetch) == DATA[:100]
    assert len(calls) == 2
    assert not cache.faults


def test_a_full_disk_is_said_once_counted_and_not_asked_at_every_block(tmp_path, caplog):
    cache = DiskCache(tmp_path, 8 << 20, block_bytes=1 << 20)
    asked = []

    def full(*_):
        asked.append(1)
        raise OSError(28, "No space left on device")

    cache._reserve = full
    with caplog.at_level(logging.WARNING, logger="m3i_scale.data"):
        for _ in range(3):
            assert cache.read("u", 0, len(DATA), lambda a, b: DATA[a:b]) == DATA
    assert len(asked) == 1
    assert cache.faults == {"cannot write": 1}
    assert caplog.text.count("No space left") == 1


def test_blocks_that_cannot_be_removed_do_not_push_the_cache_over_its_limit(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, 5000, block_bytes=1000)
    fetch, _ = reader_of(DATA)
    cache.read("u", 0, 4000, fetch)

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert cache.read("u", 4000, 8000, fetch) == DATA[4000:8000]
    assert cache.used() <= 5000
    assert cache.faults == {"cannot write": 1}


def test_a_loader_counts_the_faults_of_the_cache_of_its_workers(tmp_path):
    import http.server
    from functools import partial

    write_tar(tmp_path / "www" / "0.tar", text_members(0, 12))
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(quiet, directory=str(tmp_path / "www"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    index = str(tmp_path / "i.parquet")
    index_shards([f"http://127.0.0.1:{server.server_port}/0.tar"], index, kind="text",
                 progress=False)  # fmt: skip
    caching = client(cache=str(tmp_path / "cache"), cache_gibibytes=1 / 16)
    source = make_source("pairs", index, "text")
    expected = by_position([make_stream([source]).loader(start=0, micro_batch=4, end=12)])
    for damaged in (False, True):
        loader = make_stream([source], storage=caching).loader(
            start=0, micro_batch=4, end=12, workers=1
        )
        assert_same(by_position([loader]), expected)
        assert bool(loader.read["cache_faults"]) == damaged
        for block in blocks(tmp_path / "cache"):
            zeros(block)
    server.shutdown()
    server.server_close()


def test_a_configuration_with_a_file_as_cache_is_refused_in_one_sentence(tmp_path):
    from m3i_scale.config import ConfigError
    from m3i_scale.tasks.samples import build_stream

    (tmp_path / "cache").write_bytes(b"")
    config = Config.model_validate(
        labelled_tree("i.parquet", {"data.storage": {"cache": str(tmp_path / "cache")}})
    )
    with pytest.raises(ConfigError, match=r"^data: the cache .* is a file"):
        build_stream(config)
