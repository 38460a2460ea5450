"""Fetches MovieLens: from GroupLens, or for 100K from the copy inside the RecBole wheel. This is the only file that downloads.

The data are GroupLens's, under its terms (research use, no commercial use; see the README in each archive).
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from tqdm import tqdm

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
RELEASES: dict[str, str | None] = {  # MD5 as GroupLens publishes it; None: the release changes, its .md5 file is asked
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
BROKEN = (OSError, http.client.HTTPException)  # URLError, HTTPError and timeouts are OSErrors
BAD_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError)  # zipfile's word for a compression it cannot undo


class FetchError(RuntimeError):
    """Data could not be fetched. The message names what was tried and how each try ended."""


class Fetched(NamedTuple):
    """Where fetched data lie, and where they came from."""

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

    GroupLens is asked over HTTPS and the archive's MD5 is checked. Where that fails, ml-100k comes out of the RecBole wheel
    (`pip download`, then only the data files are read; nothing of it is installed or imported), checked by SHA-256. A folder
    appears in the cache whole or not at all, so an interrupted download leaves nothing to trip over.

    Args:
      name: "ml-100k", "ml-1m", "ml-20m", "ml-25m", "ml-32m", "ml-latest-small" or "ml-latest".
      cache_dir: default: `default_cache_dir()`.
      timeout: seconds that GroupLens may stay silent; pip gets as long for each try to connect.
      base_url: where `<name>.zip` lies.
      pip_arguments: more arguments for `pip download`, such as `("--find-links", DIR)`.

    Returns:
      The folder, its source, and whether it was in the cache.

    Raises:
      ValueError: unknown name.
      FetchError: no source works; the message says how each failed and what to do.

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
        with _new_folder(original) as folder:
            _from_grouplens(name, folder, base_url, timeout)
        return Fetched(original, "GroupLens", False)
    except FetchError as error:
        reason = str(error)
    if name != "ml-100k":
        raise FetchError(f"{name}: {reason}. Download it by hand and pass its folder to the reader")
    try:
        with _new_folder(copy) as folder:
            _from_recbole(folder, timeout, pip_arguments)
        return Fetched(copy, "RecBole wheel", False, reason)
    except FetchError as error:
        raise FetchError(
            f"{name}: no source works. GroupLens: {reason}. RecBole wheel: {error}. "
            "Download it by hand and pass its folder to the reader"
        ) from error


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` in one step if the block ends well."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise FetchError(f"the cache directory {target.parent} cannot be written: {error}") from error
    try:
        filled = work / "data"
        filled.mkdir()
        yield filled
        try:
            os.rename(filled, target)
        except OSError:
            if not target.is_dir():  # else another process was quicker, with the same data
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _from_grouplens(name: str, folder: Path, base_url: str, timeout: float) -> None:
    url = f"{base_url}/{name}.zip"
    checksum = RELEASES[name] or _published_checksum(f"{url}.md5", timeout)
    archive = folder.parent / f"{name}.zip"
    received = _download(url, archive, timeout)
    if received != checksum:
        raise FetchError(f"{url}: expected MD5 {checksum}, got {received}")
    _unzip(archive, name, folder)


def _published_checksum(url: str, timeout: float) -> str:
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            words = response.read(1000).decode("ascii", "replace").lower().split()
    except BROKEN as error:
        raise FetchError(f"{url}: {error}") from error
    sums = [word for word in words if len(word) == 32 and set(word) <= set("0123456789abcdef")]
    if len(sums) != 1:
        raise FetchError(f"{url}: expected one MD5 sum, got {' '.join(words)[:60]!r}")
    return sums[0]


def _download(url: str, target: Path, timeout: float) -> str:
    """Writes the body of `url` to `target` and returns its MD5."""
    digest = hashlib.md5(usedforsecurity=False)
    received, start = 0, time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, open(target, "wb") as file:
            length = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=length or None, unit="B", unit_scale=True, desc=url.rpartition("/")[2], delay=1) as bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    bar.update(len(chunk))
    except BROKEN as error:
        raise FetchError(f"{url}: {error} after {time.monotonic() - start:.0f} s") from error
    if length and received != length:
        raise FetchError(f"{url}: expected {length} bytes, got {received}: the connection was cut")
    return digest.hexdigest()


def _unzip(archive: Path, name: str, folder: Path) -> None:
    """Unpacks what the archive has under `name`/ into `folder`, which nothing can leave."""
    try:
        with zipfile.ZipFile(archive) as bundle:
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
    except BAD_ZIP as error:
        raise FetchError(f"{archive.name}: expected a zip archive, got one that does not open: {error}") from error
    if not any(folder.iterdir()):
        raise FetchError(f"{archive.name}: expected files under {name}/, got none")


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
    for name, checksum in RECBOLE_SHA256.items():
        try:
            with zipfile.ZipFile(found[0]) as wheel:
                data = wheel.read(f"{RECBOLE_FOLDER}/{name}")
        except (KeyError, *BAD_ZIP) as error:
            raise FetchError(f"{found[0].name}: expected a wheel with {RECBOLE_FOLDER}/{name}, got {error}") from error
        received = hashlib.sha256(data).hexdigest()
        if received != checksum:
            raise FetchError(f"{found[0].name}: expected SHA-256 {checksum} of {name}, got {received}")
        (folder / name).write_bytes(data)
