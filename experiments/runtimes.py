"""The same weights and inputs in other runtimes: ONNX Runtime, PyTorch, PyTorch compiled.

Claim     none of the three programs is slower here than in ONNX Runtime; on two cores compiled PyTorch is mostly faster.
Command   python -m experiments.runtimes --json runtimes.json   (or --smoke; --pause 0: back to back); `experiments.cost` too
Time      4 minutes on two cores, most of it `torch.compile`, which needs a C++ compiler; others need the extra "benchmarks"
Programs  user   features on the host -> state in the runtime's memory
          score  rows of the candidates on the host, state -> logits and places of the best 100 on the host
          whole  user, then score
          head   the head's MLP on ready inputs and top-100, in JAX alone: what the score program is compared with
          bfloat16, int8   ours alone: `score` over an index of such rows (`experiments.study.storage`: what they do to ranking)
          Ours are the engine's own compiled functions; `experiments/torch_aif.py` has the others, split in the same way.
Checked   the logits of the best 100 agree to 1e-4 before anything is timed.
Figures   medians of turns interleaved in one process, each after a pause, in which the threads of the others go to sleep, and a
          call that does not count. `over_X` is the time of X over ours: above 1, ours is faster; for PyTorch the faster of
          eager and compiled counts. `score_over_head`, `score_over_bfloat16`, `score_over_int8`: of ours over these, at
          C=1,000, and as `score_10000_over_head` at 10,000. Weights are as initialised.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

import aif_jax as aif
from aif_jax.output import track
from aif_jax.serving import compute_inline
from aif_jax.store.codec import Storage
from experiments import common
from experiments.services import Best, Model, Program, Runtime, World, head, of_engine, turn

PAUSE = 0.01
NARROW: tuple[Storage, ...] = ("bfloat16", "int8")
NEEDED = {"torch": ("torch",), "onnxruntime": ("torch", "onnx", "onnxscript", "onnxruntime")}


@common.script
def main(arguments: list[str] | None = None) -> None:
    """Run the comparison and print its ratios."""
    settings = {"rounds": (200, 3, "turns of each program"), "pause": (PAUSE, None, "seconds before each turn")}
    options = common.options(__doc__, arguments, settings)
    common.report(measure(rounds=options.rounds, pause=options.pause, smoke=options.smoke), options.json)


def measure(*, rounds: int, pause: float = PAUSE, smoke: bool = False) -> dict[str, Any]:
    """Return every figure; a runtime that is not installed is left out, with a line that says so."""
    sizes: dict[str, Any] = dict(short_length=8, long_length=32, width=8) if smoke else {}
    world, counts = World(items=300 if smoke else 20_000), (60, 120) if smoke else (1000, 10_000)
    config = aif.presets.aif(world.schema, **sizes)
    made = Model.drawn(world, config)
    top, features = min(100, counts[0]), [flat(made.user(number)) for number in range(world.users)]
    ours = of_engine(made, counts, top)
    narrow = {storage: of_engine(Model.drawn(world, config, storage=storage), counts, top) for storage in NARROW}
    others: dict[str, Any] = {}
    for name, packages in NEEDED.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            print(f'{name}: left out, {", ".join(missing)} not installed: pip install "aif_jax[benchmarks]"')
            continue
        if name == "torch":
            others |= torch_programs(made, features, counts, top, compiled=not smoke)
        else:
            others |= onnx_programs(made, features, counts, top)
    for name, other in others.items():
        for count in counts:
            check(name, ours.whole(count, 0), other.whole(count, 0))
    timed: dict[str, Program] = {}
    for count, more in zip(counts, ("", f"_{counts[1]}"), strict=True):
        timed[f"head{more}"] = head(made, count, top)
        for name, each in {"aif_jax": ours, **others}.items():
            programs = {} if more else {"user": each.user}
            programs |= {what: partial(getattr(each, what), count) for what in ("score", "whole")}
            timed |= {f"{name} {what}{more}": program for what, program in programs.items()}
        timed |= {f"{storage}{more}": partial(each.score, count) for storage, each in narrow.items()}
    turns = {name: partial(turn, program, pause=pause) for name, program in timed.items()}
    for once in track(turns.values(), label="first calls", unit="programs"):
        once(0)
    medians = {name: float(np.median(ms)) for name, ms in common.interleaved(turns, rounds).items()}
    return summary(medians, list(others), f"_{counts[1]}")


def summary(medians: dict[str, float], others: list[str], large: str) -> dict[str, Any]:
    """Return milliseconds by runtime and program, and ratios; the second size is called 10,000, also where it is smaller."""
    programs = {what: what for what in ("user", "score", "whole")}
    programs |= {f"{what}_10000": f"{what}{large}" for what in ("score", "whole")}
    ms = {name: {what: medians[f"{name} {at}"] for what, at in programs.items()} for name in ("aif_jax", *others)}
    figures: dict[str, Any] = {"runtime_ms": ms, "head_ms": {"": medians["head"], "10000": medians[f"head{large}"]}}
    for score, more in (("score", ""), ("score_10000", large)):
        ours = ms["aif_jax"][score]
        figures[f"{score}_over_head"] = ours / medians[f"head{more}"]
        figures |= {f"{score}_over_{storage}": ours / medians[f"{storage}{more}"] for storage in NARROW}
    for runtime in NEEDED:
        found = [ms[name] for name in others if name.startswith(runtime)]
        if found:
            figures[f"over_{runtime}"] = {what: min(one[what] for one in found) / ms["aif_jax"][what] for what in programs}
    return figures


def check(name: str, ours: Best, theirs: Best) -> None:
    """Raise SystemExit where the best candidates of two runtimes differ: then it is another network."""
    difference = float(np.abs(ours[0] - theirs[0]).max())
    if not difference < 1e-4:
        raise SystemExit(f"{name}: expected the logits of ours, got some that differ by {difference:.1e}: nothing is timed")


def flat(user: aif.UserFeatures) -> list[np.ndarray]:
    """Return the features of one user as arrays, as `TorchServing.state` takes them."""
    history = user.history
    arrays = [history.item, history.action, history.age, history.mask, *user.ids.values()]
    return [np.array(array) for array in arrays]


def rows_of(made: Model) -> Any:
    """Return rows of the whole index as NumPy arrays."""
    with made.index.reading() as table:
        return jax.device_get(made.index.decode(table, np.arange(made.world.items)))


def torch_programs(
    made: Model, features: list[list[np.ndarray]], counts: tuple[int, ...], top: int, *, compiled: bool
) -> dict[str, Any]:
    """Return PyTorch, and PyTorch compiled where there is a C++ compiler."""
    import torch

    from experiments.torch_aif import TorchServing

    torch.set_num_threads(common.threads())
    network = TorchServing(made.params, made.config, rows_of(made)).eval()
    found = {"torch": torch_runtime(made, features, network.state, dict.fromkeys(counts, network.best), top)}
    if compiled and shutil.which(os.environ.get("CXX", "g++")):
        best = {count: torch.compile(network.best, dynamic=False) for count in counts}
        found["torch compiled"] = torch_runtime(made, features, torch.compile(network.state, dynamic=False), best, top)
    elif compiled:
        print("torch compiled: left out, there is no C++ compiler (g++, or the one that CXX names)")
    return found


def torch_runtime(made: Model, features: list[list[np.ndarray]], state: Any, best: dict[int, Any], top: int) -> Runtime:
    """Return the programs as PyTorch functions."""
    import torch

    def user(number: int) -> Any:
        with torch.inference_mode():
            return state(*map(torch.from_numpy, features[number % len(features)]))

    def scored(rows: np.ndarray, values: Any) -> Best:
        with torch.inference_mode():
            logits, places = best[len(rows)](torch.from_numpy(rows), *values, top)
        return logits.numpy(), places.numpy()

    return Runtime(made, user, scored)


def onnx_programs(made: Model, features: list[list[np.ndarray]], counts: tuple[int, ...], top: int) -> dict[str, Any]:
    """Return ONNX Runtime, with graphs that PyTorch exports."""
    import torch

    from experiments.torch_aif import ForOnnx, Part

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names operators of torchvision that it goes without
    network = ForOnnx(made.params, made.config, rows_of(made)).eval()
    user = tuple(map(torch.from_numpy, features[0]))
    state = Part(network, network.state)
    with torch.inference_mode():
        example = tuple(state(*user))
    score = Part(network, lambda *inputs: network.best(*inputs, top))
    rows = {count: torch.from_numpy(made.world.candidates(0, count)) for count in counts}
    find_state, best = session(state, user), {count: session(score, (each, *example)) for count, each in rows.items()}
    runtime = Runtime(
        made, lambda number: find_state(features[number % len(features)]), lambda rows, values: best[len(rows)]([rows, *values])
    )
    return {"onnxruntime": runtime}


def session(module: Any, inputs: tuple[Any, ...]) -> Callable[[list[np.ndarray]], Any]:
    """Return a module as a function of its inputs, in ONNX Runtime on as many threads as there are cores."""
    import onnxruntime
    import torch

    written = io.BytesIO()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its inner parts
        torch.onnx.export(module.eval(), inputs, dynamo=True, opset_version=18, verbose=False).save(written)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = common.threads()
    made = onnxruntime.InferenceSession(written.getvalue(), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in made.get_inputs()]
    return lambda values: made.run(None, dict(zip(names, values, strict=True)))


if __name__ == "__main__":
    compute_inline()  # as `aif-jax serve`
    main()
