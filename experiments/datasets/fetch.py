"""Downloads MovieLens from GroupLens, or 100K from the copy inside the RecBole wheel; the only file that downloads.

Everything is bounded: bytes of an archive, bytes and files that it unpacks to, seconds until a server answers, bytes a second
after that. Whatever breaks is a `FetchError`, and nothing is left in the cache. The data are GroupLens's, under its terms
(research use, no commercial use; see the README in each archive).
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import lzma
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from aif_jax.output import Bar
from aif_jax.store.folders import new_folder

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
RELEASES: dict[str, str | None] = {  # MD5 as GroupLens publishes it; None: the release changes, its .md5 file is read
    "ml-100k": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-32m": "d472be332d4daa821edc399621853b57",
    "ml-latest-small": None,
    "ml-latest": None,
}
RECBOLE = "recbole==1.2.1"
RECBOLE_FOLDER = "recbole/dataset_example/ml-100k"
RECBOLE_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
CHUNK = 1 << 16
MAX_ARCHIVE, MAX_UNPACKED, MAX_MEMBERS = 1 << 30, 8 << 30, 1000  # bytes, bytes, files: three times the largest release
SLOWEST = 10_000  # bytes a second on average, after the first `timeout` seconds
BROKEN = (OSError, http.client.HTTPException, ValueError)  # URLError, HTTPError and timeouts are OSErrors
# what `zipfile` raises for archives that are broken, encrypted, or have names that no file can have
BAD_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, RuntimeError, EOFError, ValueError, OSError)


class FetchError(RuntimeError):
    """Data could not be fetched. The message names what was tried and how each try ended."""


class Fetched(NamedTuple):
    """Where fetched data are, and where they came from."""

    path: Path  # folder that `movielens.read` reads
    source: Literal["GroupLens", "RecBole wheel"]
    cached: bool  # true where nothing had to be downloaded
    reason: str = ""  # why it was not GroupLens


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/aif_jax`, or `~/.cache/aif_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aif_jax"


def fetch_movielens(
    name: str = "ml-100k",
    *,
    cache_dir: str | os.PathLike | None = None,
    timeout: float = 20.0,
    base_url: str = GROUPLENS,
    pip_arguments: Sequence[str] = (),
) -> Fetched:
    """Downloads a MovieLens release once and returns its folder.

    GroupLens comes first, over HTTPS; the archive's MD5 is checked. Where that fails, ml-100k comes out of the RecBole wheel
    (`pip download`, then only the data files are read; nothing of it is installed or imported), checked by SHA-256. A folder
    appears in the cache complete or not at all.

    Args:
      name: one of RELEASES; ValueError for another.
      timeout: seconds that GroupLens may be silent; pip gets as long for each try to connect.
      base_url: the folder of `<name>.zip`.
      pip_arguments: more arguments for `pip download`, such as `("--find-links", DIR)`.

    Example:
      >>> try:
      ...     fetch_movielens("ml-7k")
      ... except ValueError as error:
      ...     print(str(error)[:40])
      fetch_movielens: expected one of ml-100k
    """
    if name not in RELEASES:
        raise ValueError(f"fetch_movielens: expected one of {', '.join(RELEASES)}, got {name!r}")
    cache = Path(default_cache_dir() if cache_dir is None else cache_dir)
    original, copy = cache / name, cache / f"{name}-recbole"
    if original.is_dir():
        return Fetched(original, "GroupLens", True)
    if name == "ml-100k" and copy.is_dir():
        return Fetched(copy, "RecBole wheel", True, "an earlier call could not reach GroupLens")
    try:
        _fill(original, lambda folder: _from_grouplens(name, folder, base_url, timeout))
        return Fetched(original, "GroupLens", False)
    except FetchError as error:
        reason = str(error)
    if name != "ml-100k":
        raise FetchError(f"{name}: {reason}. Download it by hand and pass its folder to the reader")
    try:
        _fill(copy, lambda folder: _from_recbole(folder, timeout, pip_arguments))
        return Fetched(copy, "RecBole wheel", False, reason)
    except FetchError as error:
        raise FetchError(
            f"{name}: no source works. GroupLens: {reason}. RecBole wheel: {error}. "
            "Download it by hand and pass its folder to the reader"
        ) from error


def _fill(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes the folder `target` of what `fill` writes; where another process is faster, its folder stays."""
    try:
        with new_folder(target) as folder:
            fill(folder)
    except OSError as error:
        if not target.is_dir():
            raise FetchError(f"the cache directory {target.parent} cannot be written: {error}") from error


def _from_grouplens(name: str, folder: Path, base_url: str, timeout: float) -> None:
    url = f"{base_url}/{name}.zip"
    checksum = RELEASES[name] or _published_checksum(f"{url}.md5", timeout)
    archive = folder.parent / f"{name}.zip"
    received = _download(url, archive, timeout)
    if received != checksum:
        raise FetchError(f"{url}: expected MD5 {checksum}, got {received}")
    _unzip(archive, name, folder)


def _published_checksum(url: str, timeout: float) -> str:
    with _open(url, timeout) as response:
        words = b"".join(_body(response, url, timeout, most=1000)).decode("ascii", "replace").lower().split()
    sums = [word for word in words if len(word) == 32 and set(word) <= set("0123456789abcdef")]
    if len(sums) != 1:
        raise FetchError(f"{url}: expected one MD5 sum, got {' '.join(words)[:60]!r}")
    return sums[0]


def _download(url: str, target: Path, timeout: float) -> str:
    """Writes the body of `url` to `target` and returns its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    with _open(url, timeout) as response, open(target, "wb") as file:
        with Bar(response.length, label=url.rpartition("/")[2], unit="bytes") as bar:
            for chunk in _body(response, url, timeout, most=MAX_ARCHIVE):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()


def _open(url: str, timeout: float) -> http.client.HTTPResponse:
    """The response, its headers read within 2 * `timeout` seconds in all, however slowly they drip."""
    answer: Future[http.client.HTTPResponse] = Future()

    def request() -> None:
        try:
            answer.set_result(urllib.request.urlopen(url, timeout=timeout))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=request, daemon=True).start()  # a thread that hangs must not keep the process from its end
    try:
        return answer.result(2 * timeout)
    except BROKEN as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise FetchError(f"{url}: {str(error) or f'no answer, timed out after {2 * timeout:g} s'}") from error


def _body(response: http.client.HTTPResponse, url: str, timeout: float, *, most: int) -> Iterator[bytes]:
    """The body in chunks; raises where it is longer than `most` bytes, cut off, or slower than SLOWEST."""
    received, start, length = 0, time.monotonic(), response.length
    if length is not None and length > most:
        raise FetchError(f"{url}: expected at most {most} bytes, got {length}")
    try:
        while chunk := response.read1(CHUNK):
            received += len(chunk)
            seconds = time.monotonic() - start
            if received > most:
                raise FetchError(f"{url}: expected at most {most} bytes, got more")
            if seconds > timeout and received < SLOWEST * seconds:
                raise FetchError(f"{url}: expected at least {SLOWEST} bytes a second, got {received} in {seconds:.0f} s")
            yield chunk
    except BROKEN as error:
        raise FetchError(f"{url}: {error} after {time.monotonic() - start:.0f} s") from error
    if length is not None and received != length:
        raise FetchError(f"{url}: expected {length} bytes, got {received}: the connection was cut")


def _unzip(archive: Path, name: str, folder: Path) -> None:
    """Unpacks what the archive has under `name`/ into `folder`, which nothing can leave."""
    with _opened(archive) as bundle:
        for member in bundle.infolist():
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in member.filename:
                raise FetchError(f"{archive.name}: expected paths inside the archive, got {member.filename!r}")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise FetchError(f"{archive.name}: expected files, got the link {member.filename!r}")
            if member.is_dir() or path.parts[0] != name or len(path.parts) < 2:
                continue
            target = folder.joinpath(*path.parts[1:])
            target.parent.mkdir(parents=True, exist_ok=True)
            with bundle.open(member) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
    if not any(folder.iterdir()):
        raise FetchError(f"{archive.name}: expected files under {name}/, got none")


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, whose members together unpack to at most MAX_UNPACKED bytes: `zipfile` reads no more than each declares."""
    try:
        with zipfile.ZipFile(archive) as bundle:
            size, members = sum(member.file_size for member in bundle.infolist()), len(bundle.infolist())
            if size > MAX_UNPACKED or members > MAX_MEMBERS:
                limits = f"at most {MAX_MEMBERS} files and {MAX_UNPACKED} bytes"
                raise FetchError(f"{archive.name}: expected {limits}, got {members} files and {size} bytes")
            yield bundle
    except FetchError:
        raise
    except BAD_ZIP as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of the archive
        raise FetchError(f"{archive.name}: expected a zip archive, got one that does not open: {error!r}") from error


def _from_recbole(folder: Path, timeout: float, pip_arguments: Sequence[str]) -> None:
    wheels = folder.parent / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--timeout"]
    command += [f"{timeout:g}", "--disable-pip-version-check", "--dest", str(wheels), *pip_arguments, RECBOLE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"pip did not run to its end: {error}") from error
    found = sorted(wheels.glob("*.whl"))
    if done.returncode or len(found) != 1:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise FetchError(f"`pip download {RECBOLE}` failed: {last}")
    with _opened(found[0]) as wheel:
        for name, checksum in RECBOLE_SHA256.items():
            try:
                data = wheel.read(f"{RECBOLE_FOLDER}/{name}")
            except KeyError as error:
                raise FetchError(f"{found[0].name}: expected a wheel with {RECBOLE_FOLDER}/{name}, got {error}") from error
            received = hashlib.sha256(data).hexdigest()
            if received != checksum:
                raise FetchError(f"{found[0].name}: expected SHA-256 {checksum} of {name}, got {received}")
            (folder / name).write_bytes(data)
