"""Training: losses, the step, the loop, the usual run, evaluation."""

from aif_jax.logs import JsonLines, TensorBoard
from aif_jax.train import losses
from aif_jax.train.calibrate import calibrate
from aif_jax.train.evaluate import Evaluation, evaluate, predict
from aif_jax.train.loop import BadBatch, loop, resume
from aif_jax.train.optimizers import default_optimizer, rowwise_adagrad
from aif_jax.train.sparse import SparseConfig
from aif_jax.train.step import TrainState, init_state, make_step, score
from aif_jax.train.tasks import Impressions, Liked, NextItem

__all__ = [
    "NextItem", "Liked", "Impressions", "evaluate", "Evaluation", "calibrate",
    "losses", "make_step", "init_state", "TrainState", "default_optimizer", "rowwise_adagrad", "SparseConfig",
    "loop", "resume", "BadBatch", "score", "predict", "JsonLines", "TensorBoard",
]  # fmt: skip
