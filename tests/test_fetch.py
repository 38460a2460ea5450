"""Fetching: against a local server and a local wheel; nothing here leaves the machine."""

import contextlib
import hashlib
import http.server
import io
import os
import re
import socket
import threading
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.datasets import fetch, movielens
from experiments.datasets.fetch import FetchError, fetch_movielens
from tests.refusals import refused
from tests.test_datasets import FILES

ORIGINAL = {f"ml-100k/{name}": text for name, text in FILES["100k"].items()}
COPY = {f"ml-100k{Path(name).suffix}": text for name, text in FILES["recbole"].items()}
NO_WHEEL = ("--no-index", "--find-links", os.devnull)


def archive(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as bundle:
        for name, text in files.items():
            bundle.writestr(name, text)
    return data.getvalue()


@pytest.fixture
def server(monkeypatch):
    """A server of `files`, path to body or (body, Content-Length), that notes in `asked` what it was asked for."""
    monkeypatch.setenv("no_proxy", "*")
    served = types.SimpleNamespace(files={}, asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.asked.append(self.path)
            if self.path not in served.files:
                self.send_error(404)
                return
            body = served.files[self.path]
            body, length = body if isinstance(body, tuple) else (body, len(body))
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running, ThreadPoolExecutor(1) as thread:
        served.url = f"http://127.0.0.1:{running.server_port}"
        thread.submit(running.serve_forever, 0.02)
        yield served
        running.shutdown()


@pytest.fixture
def release(monkeypatch):
    """Makes the bytes of a zip the release that is expected."""

    def expect(data):
        monkeypatch.setattr(fetch, "MD5", hashlib.md5(data, usedforsecurity=False).hexdigest())
        return data

    return expect


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A folder with a small wheel in RecBole's place, and pip's arguments to find nothing else."""
    folder = tmp_path / "links"
    folder.mkdir()

    def make(files=COPY):
        info = "recbole-1.2.1.dist-info"
        contents = {f"{fetch.RECBOLE_FOLDER}/{name}": text for name, text in files.items()} | {
            f"{info}/METADATA": "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": "",
        }
        (folder / "recbole-1.2.1-py3-none-any.whl").write_bytes(archive(contents))
        return "--no-index", "--find-links", str(folder)

    for name, text in COPY.items():
        monkeypatch.setitem(fetch.RECBOLE_SHA256, name, hashlib.sha256(text.encode()).hexdigest())
    return make


def test_grouplens_then_cache(tmp_path, server, release):
    server.files["/ml-100k.zip"] = release(archive(ORIGINAL | {"__MACOSX/u.data": "junk"}))
    cache = tmp_path / "new" / "cache"
    first = fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=NO_WHEEL)
    assert first == (cache / "ml-100k", "GroupLens", False, "")
    assert sorted(os.listdir(first.path)) == ["u.data", "u.item", "u.user"]
    assert len(movielens.read(first.path).log) == 3
    assert fetch_movielens(cache_dir=cache, base_url=server.url) == (cache / "ml-100k", "GroupLens", True, "")
    assert server.asked == ["/ml-100k.zip"]
    assert os.listdir(cache) == ["ml-100k"]


@pytest.mark.parametrize("kind", ["wrong checksum", "not found", "truncated"])
def test_where_nothing_works_the_error_names_every_try_and_nothing_is_left(tmp_path, server, release, kind):
    data, cache = archive(ORIGINAL), tmp_path / "cache"
    sent = data[:-20] if kind == "truncated" else data
    message = rf"expected MD5 \w+, got {hashlib.md5(sent, usedforsecurity=False).hexdigest()}"
    if kind == "wrong checksum":
        server.files["/ml-100k.zip"] = data
    elif kind == "truncated":
        server.files["/ml-100k.zip"], message = (sent, len(release(data))), f"{message} of {len(sent)} bytes"
    else:
        message = "HTTP Error 404"
    with pytest.raises(FetchError) as error:
        fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=NO_WHEEL)
    text = str(error.value)
    assert re.search(message, text) and "RecBole wheel: `pip download recbole==1.2.1` failed" in text and "by hand" in text
    assert os.listdir(cache) == []


def test_the_wheel_stands_in_and_says_why(tmp_path, server, wheel):
    arguments, cache = wheel(), tmp_path / "cache"
    first = fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=arguments)
    assert first[:3] == (cache / "ml-100k-recbole", "RecBole wheel", False) and "HTTP Error 404" in first.reason
    assert len(movielens.read(first.path).log) == 3
    asked = len(server.asked)
    again = fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=arguments)
    assert again[:3] == (cache / "ml-100k-recbole", "RecBole wheel", True) and len(server.asked) == asked
    assert os.listdir(cache) == ["ml-100k-recbole"]


def test_a_host_that_refuses_or_stays_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(FetchError, match=r"ml-100k: .*ml-100k\.zip: .*timed out"):
            fetch_movielens(cache_dir=tmp_path, base_url=url, timeout=0.2, pip_arguments=NO_WHEEL)
    with pytest.raises(FetchError, match=r"ml-100k: .*ml-100k\.zip: .*refused"):
        fetch_movielens(cache_dir=tmp_path, base_url=url, pip_arguments=NO_WHEEL)


@pytest.mark.parametrize(("files", "message"), [
    (COPY | {"ml-100k.user": "changed"}, r"expected SHA-256 \w+ of ml-100k.user, got \w+"),
    ({"ml-100k.inter": COPY["ml-100k.inter"]}, r"a wheel with .*no item named 'recbole/dataset_example/ml-100k/ml-100k.item'"),
])  # fmt: skip
def test_a_wheel_with_other_files_is_refused(tmp_path, server, wheel, files, message):
    refused(FetchError, message, fetch_movielens, cache_dir=tmp_path / "cache", base_url=server.url, pip_arguments=wheel(files))
    assert os.listdir(tmp_path / "cache") == []


def test_pip_that_does_not_run_and_a_cache_that_cannot_be_written_are_named(tmp_path, server, monkeypatch):
    monkeypatch.setattr(fetch.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(FetchError, match=r"RecBole wheel: pip did not run to its end: .*no-python"):
        fetch_movielens(cache_dir=tmp_path / "cache", base_url=server.url)
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="the cache directory .*file cannot be written"):
        fetch_movielens(cache_dir=tmp_path / "file", base_url=server.url)


@contextlib.contextmanager
def raw_server(head, piece, pause=0.0):
    """A server that sends `head`, then `piece` over and over; yields its URL."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(head)
                    while not stop.wait(pause):
                        connection.sendall(piece)

        with ThreadPoolExecutor(1) as thread:
            thread.submit(serve)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            stop.set()


@pytest.mark.parametrize(("head", "piece", "pause", "message"), [
    (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, 0.0, "expected at most 1000000 bytes, got more"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n", b"x" * 65536, 0.0, "expected at most 1000000 bytes, got more"),
    (b"what?\r\n\r\n", b"", 0.01, "what"),
], ids=["endless body", "announced", "no HTTP"])  # fmt: skip
def test_a_server_that_never_ends_is_left(tmp_path, monkeypatch, head, piece, pause, message):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "MOST_BYTES", 10**6)
    with raw_server(head, piece, pause) as url, pytest.raises(FetchError, match=message):
        fetch_movielens(cache_dir=tmp_path, base_url=url, timeout=0.2, pip_arguments=NO_WHEEL)
    assert os.listdir(tmp_path) == []


def test_two_at_once_both_succeed(tmp_path, server, release):
    server.files["/ml-100k.zip"] = release(archive(ORIGINAL))
    barrier = threading.Barrier(4)

    def run(_):
        barrier.wait()
        return fetch_movielens(cache_dir=tmp_path / "cache", base_url=server.url, pip_arguments=NO_WHEEL)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert [r.source for r in results] == ["GroupLens"] * 4
    assert os.listdir(tmp_path / "cache") == ["ml-100k"] and len(movielens.read(results[0].path).log) == 3


def test_an_interrupted_download_leaves_nothing(tmp_path, server, release, monkeypatch):
    server.files["/ml-100k.zip"] = release(archive(ORIGINAL))

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.zipfile, "ZipFile", interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        fetch_movielens(cache_dir=tmp_path / "cache", base_url=server.url)
    assert os.listdir(tmp_path / "cache") == []


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.default_cache_dir() == tmp_path / "aif_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert fetch.default_cache_dir() == Path.home() / ".cache" / "aif_jax"


def test_checksums_are_whole():
    assert len(bytes.fromhex(fetch.MD5)) == 16
    assert all(len(bytes.fromhex(sha)) == 32 for sha in fetch.RECBOLE_SHA256.values())
