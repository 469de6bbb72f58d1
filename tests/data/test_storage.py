"""Storage against a real S3 server on loopback and an HTTP server that fails in every way."""

from __future__ import annotations

import datetime
import email.utils
import http.server
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import pytest

from helpers.shards import category_members, make_source, text_members, write_tar
from helpers.streams import assert_same, by_position, client, make_stream
from m3i_scale.data import StorageClient, TooManyBadSamples
from m3i_scale.data.index import Index
from m3i_scale.data.storage import StorageError
from m3i_scale.shards.indexing import index_shards

FAULTS = ("refuse", "500", "short", "ignore range", "reset", "stall")


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves files with ranges; every `server.every`-th data request goes wrong in some way."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        server = self.server
        path = os.path.join(server.folder, self.path.lstrip("/"))
        if not os.path.isfile(path):
            self.send_error(404)
            return
        with server.lock:
            server.requests += body
            number = server.requests
        fault = ""
        if body and server.every and number % server.every == 0:
            fault = FAULTS[number // server.every % len(FAULTS)]
            server.faults.append(fault)
        if fault == "reset":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "stall":
            time.sleep(1.5)
        if fault in ("refuse", "500"):
            self.send_error(503 if fault == "refuse" else 500)
            return
        self.serve(path, body, fault)

    def serve(self, path: str, body: bool, fault: str):
        data = Path(path).read_bytes()
        size, wanted = len(data), self.headers.get("Range")
        status = 200
        if wanted and fault != "ignore range":
            low, high = wanted.removeprefix("bytes=").split("-")
            start, stop = int(low), min(int(high) + 1 if high else size, size)
            if start >= size:
                self.send_error(416)
                return
            data, status = data[start:stop], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if fault == "short" else data)
            if fault == "short":
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def flaky(tmp_path):
    (tmp_path / "www").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    server.folder, server.every, server.requests = str(tmp_path / "www"), 0, 0
    server.lock, server.faults = threading.Lock(), []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def s3():
    """moto's S3 server; the storage options that lead to it."""
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.setdefault(name, "test")
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"s3": {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}}
    server.stop()


def fast(options=None, **more) -> StorageClient:
    http_timeout = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_read=0.5)}}
    return client(options=options or {"http": http_timeout}, **more)


def test_flaky_http_delivers_every_byte(flaky):
    data = os.urandom(300_000)
    with open(f"{flaky.folder}/x", "wb") as file:
        file.write(data)
    flaky.every = 2
    storage = fast()
    for start in range(0, 300_000, 20_000):
        assert storage.read(f"{flaky.url}/x", start, start + 20_000) == data[start : start + 20_000]
    assert storage.read(f"{flaky.url}/x", 299_990, 300_500) == data[299_990:]
    assert set(flaky.faults) == set(FAULTS)


def test_what_is_not_there_fails_at_once_and_what_stays_broken_after_all_attempts(flaky):
    storage = client(retries=2, first_wait=30)
    with pytest.raises(FileNotFoundError):  # at once: the second attempt would come after 30 s
        storage.read(f"{flaky.url}/none", 0, 10)
    assert flaky.requests == 0
    with open(f"{flaky.folder}/x", "wb") as file:
        file.write(b"0" * 100)
    flaky.every = 1
    with pytest.raises(StorageError, match="failed 2 times"):
        client(retries=1).read(f"{flaky.url}/x", 0, 10)


def test_local_files(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    storage = StorageClient()
    assert storage.read(str(tmp_path / "x"), 2, 5) == b"234"
    assert storage.read(f"file://{tmp_path}/x", 8, 20) == b"89"
    with pytest.raises(FileNotFoundError):
        storage.read(str(tmp_path / "y"), 0, 1)


def test_a_stream_over_flaky_http_is_the_stream_over_local_files(flaky, tmp_path):
    paths = [write_tar(tmp_path / "www" / f"{n}.tar", text_members(9 * n, 9)) for n in range(3)]
    index_shards([str(p) for p in paths], str(tmp_path / "www" / "i.parquet"), kind="text",
                 progress=False)  # fmt: skip
    local = make_stream([make_source("pairs", str(tmp_path / "www" / "i.parquet"), "text")])
    expected = by_position([local.loader(start=0, micro_batch=9, end=54)])
    flaky.every = 3
    remote = make_stream([make_source("pairs", f"{flaky.url}/i.parquet", "text")], storage=fast())
    got = by_position([remote.loader(start=0, micro_batch=9, end=54, workers=2)])
    assert_same(got, expected)
    assert flaky.faults


def test_index_and_stream_on_s3(s3, tmp_path):
    import s3fs

    filesystem = s3fs.S3FileSystem(**s3["s3"])
    filesystem.mkdir("bucket")
    for number in range(3):
        path = write_tar(tmp_path / f"{number}.tar", category_members(7 * number, 7))
        filesystem.put(str(path), f"bucket/shards/{number}.tar")
    storage = fast(options=s3)
    index = str(tmp_path / "remote.parquet")
    summary = index_shards(["s3://bucket/shards/*.tar"], index, kind="category", processes=2,
                           storage=storage, progress=False)  # fmt: skip
    assert (summary.shards, summary.samples, summary.problems) == (3, 21, {})
    caching = fast(options=s3, cache=str(tmp_path / "cache"), cache_gibibytes=1 / 16)
    cached = make_stream([make_source("labels", index, "category")], storage=caching)
    got = by_position([cached.loader(start=0, micro_batch=7, end=21, workers=2)])
    index_shards([str(tmp_path / f"{n}.tar") for n in range(3)], str(tmp_path / "here.parquet"),
                 kind="category", progress=False)  # fmt: skip
    local = make_stream([make_source("labels", str(tmp_path / "here.parquet"), "category")])
    expected = by_position([local.loader(start=0, micro_batch=7, end=21)])
    strip = lambda rows: {  # noqa: E731  (the keys differ by the name of the shard alone)
        n: (key.split("/")[-1], row) for n, (key, row) in rows.items()
    }
    assert_same(strip(got), strip(expected))
    stored = sum((tmp_path / f"{n}.tar").stat().st_size for n in range(3))
    assert stored < caching.cache.used() < 1.001 * stored  # and the checksums
    filesystem.rm("bucket/shards", recursive=True)  # from now on only the cache has the bytes
    again = by_position([cached.loader(start=0, micro_batch=7, end=21)])
    assert_same(strip(again), strip(expected))


def test_pipe_is_refused_unless_allowed(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    tar = write_tar(tmp_path / "a.tar", text_members(0, 4))
    url = f"pipe:touch {marker}; cat {tar}"
    with pytest.raises(ValueError, match="allow_pipe"):
        StorageClient().read(url, 0, 10)
    index = str(tmp_path / "i.parquet")
    with pytest.raises(ValueError, match="allow_pipe"):
        index_shards([url], index, kind="text", progress=False)
    assert not marker.exists()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trusting = client(allow_pipe=True)
    index_shards([url], index, kind="text", storage=trusting, progress=False)
    assert marker.exists()
    with pytest.raises(ValueError, match="allow_pipe"):
        make_stream([make_source("p", index, "text")])
    stream = make_stream([make_source("p", index, "text")], storage=trusting)
    assert len(next(iter(stream.loader(start=0, micro_batch=4)))) == 4


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers with `server.answers` (status, headers) in turn, then as it should."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        self.server.asked.append(time.monotonic())
        status, headers = self.server.answers.pop(0) if self.server.answers else (200, {})
        data, wanted = self.server.data, self.headers.get("Range")
        if status != 200:
            data = b"an error page"
        elif wanted:
            low, high = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            headers = {"Content-Range": f"bytes {low}-{high}/{len(data)}"}
            data, status = data[low : high + 1], 206
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def scripted(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.answers, server.asked, server.data = [], [], os.urandom(5000)
    server.url = f"http://127.0.0.1:{server.server_port}/x.tar"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def read_and_size(storage: StorageClient, url: str):
    return (lambda: storage.read(url, 10, 90), lambda: storage.size(url),
            lambda: storage.open(url).read(90)[10:])  # fmt: skip


@pytest.mark.parametrize("way", range(3), ids=["read", "size", "open"])
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_for_a_while_is_asked_again(scripted, status, way):
    scripted.answers = [(status, {})] * 4
    got = read_and_size(client(), scripted.url)[way]()
    assert got == (5000 if way == 1 else scripted.data[10:90])


@pytest.mark.parametrize("way", range(3), ids=["read", "size", "open"])
@pytest.mark.parametrize(
    ("status", "error"),
    [(404, FileNotFoundError), (410, FileNotFoundError), (401, PermissionError),
     (403, PermissionError), (503, StorageError)],
)  # fmt: skip
def test_what_stays_so_has_its_own_error(scripted, status, error, way):
    scripted.answers = [(status, {})] * 100
    storage = client(retries=2, first_wait=0.01 if status == 503 else 30)
    with pytest.raises(error, match=r"503|404|410|401|403|x\.tar") as caught:
        read_and_size(storage, scripted.url)[way]()
    assert type(caught.value) is error


def test_a_server_that_is_not_there_is_no_missing_file():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x.tar"
        for way in read_and_size(client(retries=1), url):
            with pytest.raises(StorageError, match="failed 2 times"):
                way()


def test_a_busy_server_is_asked_no_more_than_once_an_attempt(scripted):
    scripted.answers = [(503, {})] * 2
    client().read(scripted.url, 10, 90)
    assert len(scripted.asked) == 3


def test_retry_after_is_respected_within_a_bound(scripted, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    later = email.utils.format_datetime(
        datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=20)
    )
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    asked = ["7", later, "86400", "soon", past, "-3"]
    scripted.answers = [(503, {"Retry-After": text}) for text in asked]
    client(retries=6).read(scripted.url, 10, 90)
    assert waits[0] == 7
    assert 17 < waits[1] <= 20
    assert waits[2] == 60
    assert max(waits[3:]) < 1


def test_reasons_have_names_in_the_stream(scripted, tmp_path, caplog):
    scripted.data = write_tar(tmp_path / "a.tar", text_members(0, 6)).read_bytes()
    index = str(tmp_path / "i.parquet")
    storage = client(retries=1)
    index_shards([scripted.url], index, kind="text", storage=storage, progress=False)
    for status, cause in (
        (404, "missing shard"), (403, "forbidden shard"), (503, "unreadable shard")
    ):  # fmt: skip
        scripted.answers = [(status, {})] * 1000
        stream = make_stream(
            [make_source("pairs", index, "text")], storage=storage, max_bad_rate=0.0
        )
        with pytest.raises(TooManyBadSamples, match=f"{cause}: .*{scripted.url}"):
            list(stream.loader(start=0, micro_batch=6, end=6))


def test_a_folder_in_place_of_a_shard_has_its_own_name(tmp_path):
    source = make_source("pairs", str(tmp_path / "i.parquet"), "text")
    path = write_tar(tmp_path / "a.tar", text_members(0, 6))
    index_shards([str(path)], source.index, kind="text", progress=False)
    path.unlink()
    path.mkdir()
    with pytest.raises(TooManyBadSamples, match="shard is a folder"):
        list(make_stream([source]).loader(start=0, micro_batch=6, end=6))


def test_an_index_that_is_a_folder_or_private_is_refused_with_its_name(tmp_path):
    (tmp_path / "i.parquet").mkdir()
    with pytest.raises(ValueError, match=r"source 'pairs': .*i\.parquet"):
        make_stream([make_source("pairs", str(tmp_path / "i.parquet"), "text")])


def test_a_remote_index_that_is_made_again_is_not_taken_from_the_cache(flaky, tmp_path):
    cache = {"cache": str(tmp_path / "cache"), "cache_gibibytes": 1 / 16}
    for count in (4, 9):
        path = write_tar(tmp_path / "www" / "a.tar", text_members(0, count))
        index_shards([str(path)], str(tmp_path / "www" / "i.parquet"), kind="text",
                     progress=False)  # fmt: skip
        assert Index(f"{flaky.url}/i.parquet", fast(**cache)).samples == count


@pytest.mark.parametrize("name", [b"d\xe9", b"\x83h"])
def test_names_that_are_not_utf_8_are_refused_with_the_name(tmp_path, name):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    os.mkdir(folder)
    path = write_tar(tmp_path / "a.tar", text_members(0, 4)).rename(Path(folder) / "a.tar")
    good = str(tmp_path / "i.parquet")
    for shards, output in (([str(path)], good), ([f"{tmp_path}/*/*.tar"], good)):
        with pytest.raises(ValueError, match=r"the path '.*\\udc.*' is not UTF-8"):
            index_shards(shards, output, kind="text", progress=False)
    with pytest.raises(ValueError, match="is not UTF-8"):
        StorageClient().read(str(path), 0, 10)
    with pytest.raises(ValueError, match="is not UTF-8"):
        make_stream([make_source("pairs", f"{folder}/i.parquet", "text")])


def test_a_pipe_that_fails_is_an_unreadable_shard_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage = client(allow_pipe=True)
    with pytest.raises(StorageError, match="ended with status 3"):
        storage.read("pipe:echo half; exit 3", 0, 10)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    command = "pipe:echo whole >> " + str(tmp_path / "ran") + "; sleep 0.2; echo whole"
    with ThreadPoolExecutor(4) as pool:  # as a reader does
        assert list(pool.map(lambda _: storage.read(command, 0, 99), range(4))) == [b"whole\n"] * 4
