"""What the service adds to the engine, how much load it carries, and whether publishing under load disturbs anyone.

Claim     The lean HTTP way adds at most 0.3 ms to the median of a ranking and keeps 85 % of the engine's requests a second;
          gRPC adds at most 0.6 ms and keeps 60 %; two workers carry 1.8 times what one does where cores allow; 20 publishes
          under load fail no call and mix no two versions.
Command   python -m experiments.service_load --json service_load.json      (or --smoke; --soak 600 adds ten minutes of load)
Time      about 5 minutes on 2 CPU cores
Measured  experiments/README.md, with the machine
Load      1,000 candidates, k=300, users with cached states, so that what differs is the way in. Clients are processes with
          connections that stay open and messages that are packed before the clock starts.
Method    overhead: one caller, engine in this process and service in another, interleaved request by request. Requests a
          second: `--callers` of each way in turn, each alone on the machine. Publishes: two exports take turns while callers
          compare every answer with what its version must say.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax import export
from aif_jax.index import ItemIndex
from aif_jax.service import frame, messages, rpc
from aif_jax.service.features import Context
from aif_jax.service.folder import publish
from aif_jax.service.models import Models
from aif_jax.serving import Candidates, Request, ServingConfig
from experiments import common

NAMES = ("monday", "tuesday")
NOW = 1_700_000_000
Caller = Callable[[int], Awaitable[bytes]]
"""`await caller(user)` is the raw answer to one ranking."""


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the figures."""
    parser = common.parser(__doc__)
    parser.add_argument("--items", type=int, default=20_000, help="catalogue size (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=1000, help="of a request (default: %(default)s)")
    parser.add_argument("-k", type=int, default=300, help="of a request (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1000, help="interleaved requests of each way (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=8, help="at once (default: %(default)s)")
    parser.add_argument("--publishes", type=int, default=20, help="under load (default: %(default)s)")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of load over which memory is watched (default: none)")
    parser.add_argument("--client", nargs=3, metavar=("WAY", "ADDRESS", "FILE"), help="for the clients that this script starts")
    options = parser.parse_args(arguments)
    if options.client is not None:
        print(json.dumps(asyncio.run(client(options))))
        return
    if options.smoke:
        options.items, options.candidates, options.k, options.rounds = 200, 50, 10, 10
        options.seconds, options.callers, options.publishes, options.soak = 0.5, 2, 2, 0.5
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options)
    print(common.table(list(figures.items()), ("figure", "value")))
    common.write_json(options.json, figures)


class World:
    """Two exports of one model, the calls, and what they must be answered."""

    def __init__(self, folder: Path, options: Any):
        rng = np.random.default_rng(0)
        self.folder, self.options = folder, options
        self.config = ServingConfig(buckets=(options.candidates,), max_k=options.k)
        ids = 1000 + np.arange(options.items)
        items = {"item": ids, "category": [f"c{number % 50}" for number in range(options.items)]}
        events = {
            "user": rng.integers(0, 50, 2000),
            "item": rng.choice(ids, 2000),
            "time": NOW - rng.integers(100, 10**6, 2000),
        }
        data = aif.read(events, items=items, columns=aif.Columns())
        small: dict[str, Any] = {"width": 8, "short_length": 4, "long_length": 8, "towers": (8,), "sequence": False}
        preset = aif.presets.two_tower(data.schema, **small) if options.smoke else aif.presets.aif(data.schema, long_length=512)
        self.model = aif.build(preset)
        encode = data.encoder.with_length(self.model.config.history_length)
        self.users = [encode.user({}, {name: values[n::50] for name, values in events.items()}, NOW) for n in range(16)]
        self.candidates = rng.choice(ids, options.candidates, replace=False)
        self.logits: dict[str, list[np.ndarray]] = {}
        for seed, name in enumerate(NAMES):
            params = self.model.init(jax.random.key(seed), data.catalogue)
            index = ItemIndex.build(self.model, params, [items], encoder=data.encoder, progress=False)
            platforms = (jax.default_backend(),)
            export.save(folder / name, self.model, params, index, encoder=data.encoder, platforms=platforms, stablehlo=False)
            rows, _ = index.take(self.candidates)
            states = [jax.jit(self.model.user)(params, user) for user in self.users]
            self.logits[index.version] = [np.asarray(jax.jit(self.model.interaction)(params, state, rows)) for state in states]
        publish(folder, NAMES[:1])

    def fields(self, user: int) -> dict[str, Any]:
        """A call by its fields; users have a feature version, so their states are cached."""
        history = {f"history.{name}": value for name, value in vars(self.users[user].history).items()}
        features = {"floats": np.asarray(self.users[user].floats), **history}
        common = {"user": user, "feature_version": 1, "features": features, "encoding": self.users[user].encoding}
        return common | {"candidates": self.candidates, "k": self.options.k}

    def save(self, folder: Path) -> None:
        """Packed calls of every way, for the clients."""
        folder.mkdir()
        for user in range(len(self.users)):
            (folder / f"http-{user}").write_bytes(frame.pack(self.fields(user)))
            (folder / f"grpc-{user}").write_bytes(self._message(user))

    def _message(self, user: int) -> bytes:
        fields = self.fields(user)
        tensors = {n: {"dtype": a.dtype.name, "shape": a.shape, "data": a.tobytes()} for n, a in fields["features"].items()}
        who = {"id": {"number": user}, "feature_version": {"number": 1}, "features": tensors, "encoding": fields["encoding"]}
        made = messages.kind(f"{messages.PACKAGE}.RankRequest")
        return made(user=who, candidates={"ids": self.candidates.tolist()}, k=self.options.k).SerializeToString()

    def is_whole(self, version: str, user: int, ids: np.ndarray, logits: np.ndarray) -> bool:
        """Whether an answer is what that version says, and nothing of another."""
        expected = self.logits.get(version)
        if expected is None:
            return False
        order = np.argsort(-expected[user], kind="stable")[: len(ids)]
        near = np.allclose(logits, expected[user][order], atol=1e-3)
        return near and len(set(ids.tolist()) & set(self.candidates[order].tolist())) >= 0.95 * len(ids)


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """All figures."""
    world, calls = World(folder / "models", options), folder / "calls"
    world.save(calls)
    with serving(world) as (process, addresses):  # idle while the engine in this process has the machine
        figures = asyncio.run(overheads(world, calls, addresses))
        for way in ("http", "grpc"):
            figures[f"{way}_rps"] = load(way, addresses[way], calls, options)
        figures["engine_rps"] = asyncio.run(engine_load(world))
        for way in ("http", "grpc"):
            figures[f"{way}_rps_share"] = figures[f"{way}_rps"] / figures["engine_rps"]
        if options.soak:
            figures |= soak(process, addresses, calls, options)
        figures |= asyncio.run(publishing(world, addresses))
    with serving(world, workers=2) as (_, addresses):
        # two clients, so that the load is not what one process can send
        figures["workers_scaling"] = load("http", addresses["http"], calls, options, clients=2) / figures["http_rps"]
    return figures


@contextlib.contextmanager
def serving(world: World, *, workers: int = 1) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """`aif-jax serve` in a process, until the end of the block."""
    options = world.options
    command = [sys.executable, "-m", "aif_jax", "serve", str(world.folder), "--port", "0", "--grpc-port", "0", "--poll", "0.1"]
    command += ["--workers", str(workers), "--log-level", "warning"]
    command += ["--serving", f"buckets=[{options.candidates}]", f"max_k={options.k}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(workers)]
        if not all(lines):
            raise RuntimeError(f"the service did not start: exit code {process.wait()}")
        yield process, json.loads(lines[0])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


@contextlib.asynccontextmanager
async def caller(way: str, address: str, calls: list[bytes]) -> AsyncIterator[Caller]:
    """One caller with a connection that stays open."""
    if way == "grpc":
        import grpc

        async with grpc.aio.insecure_channel(address) as channel:
            rank = channel.unary_unary(f"/{rpc.PRE_RANKING}/Rank")
            yield lambda user: rank(calls[user])
        return
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/rank HTTP/1.1\r\nhost: {host}\r\ncontent-type: {frame.CONTENT_TYPE}\r\ncontent-length: "

    async def rank(user: int) -> bytes:
        writer.write(f"{head}{len(calls[user])}\r\n\r\n".encode() + calls[user])
        lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
        body = await reader.readexactly(length)
        if b" 200 " not in lines[0]:
            raise RuntimeError(f"{lines[0].decode()}: {body[:200]!r}")
        return body

    try:
        yield rank
    finally:
        writer.close()
        await writer.wait_closed()


def packed(folder: Path, way: str) -> list[bytes]:
    """The calls of a way, by user."""
    return [(folder / f"{way}-{user}").read_bytes() for user in range(len(list(folder.glob(f"{way}-*"))))]


async def overheads(world: World, calls: Path, addresses: dict[str, str]) -> dict[str, Any]:
    """Medians of one caller over the engine in this process, interleaved."""
    times: dict[str, list[float]] = {"engine": [], "http": [], "grpc": []}
    async with engine(world) as in_process, contextlib.AsyncExitStack() as stack:
        callers = {"engine": in_process}
        for way in ("http", "grpc"):
            callers[way] = await stack.enter_async_context(caller(way, addresses[way], packed(calls, way)))
        for each in callers.values():
            for user in range(len(world.users)):
                await each(user)  # states are cached from here on
        for number in range(world.options.rounds):
            for name in list(callers) if number % 2 else reversed(callers):
                start = time.perf_counter()
                await callers[name](number % len(world.users))
                times[name].append(time.perf_counter() - start)
    medians = {name: 1e3 * float(np.median(values)) for name, values in times.items()}
    figures = {f"{name}_p50_ms": value for name, value in medians.items()}
    return figures | {f"{way}_overhead_p50_ms": medians[way] - medians["engine"] for way in ("http", "grpc")}


@contextlib.asynccontextmanager
async def engine(world: World) -> AsyncIterator[Caller]:
    """The engine of the same export, in this process."""
    models = Models(world.folder, config=world.config, only=NAMES[0])
    await models.start()
    served, given = models.held[0], Candidates.of(world.candidates)

    async def rank(user: int) -> bytes:
        request = Request(user=user, feature_version=1, context=Context(world.users[user], given))
        await served.engine.rank(request, world.options.k)
        return b""

    try:
        yield rank
    finally:
        await models.close()


async def closed_loop(callers: list[Caller], users: int, seconds: float) -> float:
    """Requests a second of callers that each wait for their answer."""
    for each in callers:
        for user in range(users):
            await each(user)
    count, start = 0, time.perf_counter()

    async def run(each: Caller, first: int) -> None:
        nonlocal count
        user = first
        while time.perf_counter() - start < seconds:
            await each(user % users)
            user, count = user + 1, count + 1

    await asyncio.gather(*(run(each, number) for number, each in enumerate(callers)))
    return count / (time.perf_counter() - start)


async def engine_load(world: World) -> float:
    """Requests a second of the engine in this process."""
    async with engine(world) as rank:
        return await closed_loop([rank] * world.options.callers, len(world.users), world.options.seconds)


async def client(options: Any) -> float:
    """A client process: requests a second."""
    way, address, folder = options.client
    calls = packed(Path(folder), way)
    async with contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(caller(way, address, calls)) for _ in range(options.callers)]
        return await closed_loop(callers, len(calls), options.seconds)


def load(way: str, address: str, calls: Path, options: Any, *, clients: int = 1) -> float:
    """Requests a second of client processes with `--callers` callers in all."""
    words = ["--callers", str(max(1, options.callers // clients)), "--seconds", str(options.seconds)]
    command = [sys.executable, "-m", "experiments.service_load", *words, "--client", way, address, str(calls)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(clients)]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("a client failed")
    return sum(float(output.splitlines()[-1]) for output in outputs)


async def publishing(world: World, addresses: dict[str, str]) -> dict[str, Any]:
    """Calls that failed and answers that mixed versions while versions took turns."""
    calls = [frame.pack(world.fields(user)) for user in range(len(world.users))]
    done, failed, mixed, seen = asyncio.Event(), 0, 0, [""]

    async def run(first: int) -> None:
        nonlocal failed, mixed
        async with caller("http", addresses["http"], calls) as rank:
            user = first
            while not done.is_set():
                user = (user + 1) % len(calls)
                try:
                    answer = frame.unpack(await rank(user))
                except (OSError, RuntimeError, asyncio.IncompleteReadError):
                    failed += 1
                    return
                seen.append(answer["version"])
                mixed += not world.is_whole(answer["version"], user, answer["ids"], answer["logits"])

    tasks = [asyncio.create_task(run(number)) for number in range(world.options.callers)]
    versions = list(world.logits)
    for number in range(world.options.publishes):
        place = (number + 1) % 2
        await asyncio.to_thread(publish, world.folder, [NAMES[place]])
        async with asyncio.timeout(120):
            while seen[-1] != versions[place]:
                await asyncio.sleep(0.01)
    done.set()
    await asyncio.gather(*tasks)
    await asyncio.to_thread(publish, world.folder, NAMES[:1])
    return {
        "publishes": world.options.publishes,
        "publish_calls": len(seen) - 1,
        "publish_failed": failed,
        "publish_mixed": mixed,
    }


def soak(process: subprocess.Popen[str], addresses: dict[str, str], calls: Path, options: Any) -> dict[str, Any]:
    """Growth of the service's memory under load, from the end of the first tenth on."""

    def run(seconds: float) -> int:
        words = argparse.Namespace(callers=options.callers, seconds=seconds)
        load("http", addresses["http"], calls, words)
        return resident(process.pid)

    before = run(options.soak / 10)
    growth = run(0.9 * options.soak) - before
    return {"soak_seconds": options.soak, "soak_growth_mb": growth / 2**20}


def resident(process: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
