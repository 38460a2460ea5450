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

COPY = {f"ml-100k{Path(name).suffix}": text for name, text in FILES["recbole"].items()}
NO_WHEEL = ("--no-index", "--find-links", os.devnull)


def archive(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as bundle:
        for name, text in files.items():
            bundle.writestr(name, text)
    return data.getvalue()


RELEASE = archive({f"ml-100k/{name}": text for name, text in FILES["100k"].items()} | {"__MACOSX/u.data": "junk"})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of nothing, or after `release()` of a zip that is the expected one; notes in `asked` what it was asked for."""
    monkeypatch.setenv("no_proxy", "*")
    root, asked = tmp_path / "site", []
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given):
            super().__init__(*given, directory=root)

        def log_message(self, *args):
            asked.append(self.path)

    def release():
        (root / "ml-100k.zip").write_bytes(RELEASE)
        monkeypatch.setattr(fetch, "MD5", hashlib.md5(RELEASE, usedforsecurity=False).hexdigest())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running, ThreadPoolExecutor(1) as thread:
        thread.submit(running.serve_forever, 0.02)
        yield types.SimpleNamespace(url=f"http://127.0.0.1:{running.server_port}", release=release, asked=asked)
        running.shutdown()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Makes a small wheel in RecBole's place, and gives pip's arguments to find nothing else."""
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


def test_grouplens_then_cache(tmp_path, server):
    server.release()
    cache = tmp_path / "new" / "cache"
    first = fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=NO_WHEEL)
    assert first == (cache / "ml-100k", "GroupLens", False, "")
    assert sorted(os.listdir(first.path)) == ["u.data", "u.item", "u.user"]
    assert len(movielens.read(first.path).log) == 3
    assert fetch_movielens(cache_dir=cache, base_url=server.url) == (cache / "ml-100k", "GroupLens", True, "")
    assert server.asked == ["/ml-100k.zip"] and os.listdir(cache) == ["ml-100k"]


def test_the_wheel_stands_in_and_says_why(tmp_path, server, wheel):
    arguments, cache = wheel(), tmp_path / "cache"
    first = fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=arguments)
    assert first[:3] == (cache / "ml-100k-recbole", "RecBole wheel", False) and "HTTP Error 404" in first.reason
    assert len(movielens.read(first.path).log) == 3
    asked = len(server.asked)
    again = fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=arguments)
    assert again[:3] == (cache / "ml-100k-recbole", "RecBole wheel", True) and len(server.asked) == asked
    assert os.listdir(cache) == ["ml-100k-recbole"]


@pytest.mark.parametrize(("files", "message"), [
    (COPY | {"ml-100k.user": "changed"}, r"expected SHA-256 \w+ of ml-100k.user, got \w+"),
    ({"ml-100k.inter": COPY["ml-100k.inter"]}, r"a wheel with .*no item named 'recbole/dataset_example/ml-100k/ml-100k.item'"),
])  # fmt: skip
def test_a_wheel_with_other_files_is_refused(tmp_path, server, wheel, files, message):
    refused(FetchError, message, fetch_movielens, cache_dir=tmp_path / "cache", base_url=server.url, pip_arguments=wheel(files))
    assert os.listdir(tmp_path / "cache") == []


def test_pip_that_does_not_run_and_a_cache_that_cannot_be_written_are_named(tmp_path, server, monkeypatch):
    monkeypatch.setattr(fetch.sys, "executable", str(tmp_path / "no-python"))
    message = r"RecBole wheel: pip did not run to its end: .*no-python"
    refused(FetchError, message, fetch_movielens, cache_dir=tmp_path / "cache", base_url=server.url)
    (tmp_path / "file").write_text("")
    message = "the cache directory .*file cannot be written"
    refused(FetchError, message, fetch_movielens, cache_dir=tmp_path / "file", base_url=server.url)


@contextlib.contextmanager
def raw_server(head, piece):
    """A server that sends `head`, then `piece` over and over, or ends where that is empty; yields its URL."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)  # closed with bytes unread, a connection is reset
                    connection.sendall(head)
                    while piece and not stop.wait(0 if piece.strip() else 0.5):
                        connection.sendall(piece)

        with ThreadPoolExecutor(1) as thread:
            thread.submit(serve)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            stop.set()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(("head", "piece", "message"), [
    (OK + b"\r\n" + RELEASE, b"", rf"expected MD5 \w+, got \w+ of {len(RELEASE)} bytes"),
    (OK + b"Content-Length: 999999\r\n\r\n" + RELEASE[:-20], b"", rf"expected MD5 \w+, got \w+ of {len(RELEASE) - 20} bytes"),
    (b"HTTP/1.1 404 Not Found\r\n\r\n", b"", "HTTP Error 404"),
    (b"", b" ", r"ml-100k\.zip: .*timed out"),
    (OK + b"\r\n", b"x" * 65536, "expected at most 1000000 bytes, got more"),
    (OK + b"Content-Length: 2000000\r\n\r\n", b"x" * 65536, "expected at most 1000000 bytes, got more"),
    (b"what?\r\n\r\n", b"", "what"),
], ids=["wrong checksum", "truncated", "not found", "silent", "endless", "too large", "no HTTP"])  # fmt: skip
def test_where_nothing_works_the_error_names_every_try_and_nothing_is_left(tmp_path, monkeypatch, head, piece, message):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "MOST_BYTES", 10**6)
    given = dict(cache_dir=tmp_path / "cache", timeout=0.2, pip_arguments=NO_WHEEL)
    with raw_server(head, piece) as url, pytest.raises(FetchError) as error:
        fetch_movielens(base_url=url, **given)
    text = str(error.value)
    assert re.search(message, text) and "RecBole wheel: `pip download recbole==1.2.1` failed" in text and "by hand" in text
    assert os.listdir(tmp_path / "cache") == []
    refused(FetchError, r"ml-100k: .*ml-100k\.zip: .*refused", fetch_movielens, base_url=url, **given)


def test_two_at_once_both_succeed(tmp_path, server):
    server.release()
    barrier = threading.Barrier(4)

    def run(_):
        barrier.wait()
        return fetch_movielens(cache_dir=tmp_path / "cache", base_url=server.url, pip_arguments=NO_WHEEL)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert [r.source for r in results] == ["GroupLens"] * 4
    assert os.listdir(tmp_path / "cache") == ["ml-100k"] and len(movielens.read(results[0].path).log) == 3


def test_an_interrupted_download_leaves_nothing(tmp_path, server, monkeypatch):
    server.release()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.zipfile, "ZipFile", interrupt)
    refused(KeyboardInterrupt, "", fetch_movielens, cache_dir=tmp_path / "cache", base_url=server.url)
    assert os.listdir(tmp_path / "cache") == []


def test_default_cache_dir(monkeypatch, tmp_path):
    for home, folder in ((str(tmp_path), tmp_path), ("", Path.home() / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert fetch.default_cache_dir() == folder / "aif_jax"
