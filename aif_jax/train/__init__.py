"""Training: losses, the step, the loop, the usual run, evaluation."""

from aif_jax.sharding.processes import ProcessError
from aif_jax.train import edits, losses
from aif_jax.train.calibrate import calibrate
from aif_jax.train.consistency import margin_info_nce, pairwise_ndcg
from aif_jax.train.edits import fit_pure_svd, svd_factors
from aif_jax.train.evaluate import Evaluation, evaluate, predict
from aif_jax.train.goals import Goal, Goals
from aif_jax.train.logs import JsonLines, TensorBoard
from aif_jax.train.loop import BadBatch, loop, resume
from aif_jax.train.optimizers import default_optimizer, rowwise_adagrad
from aif_jax.train.sparse import SparseConfig
from aif_jax.train.step import TrainState, init_state, make_step, score
from aif_jax.train.tasks import Cascaded, Impressions, Liked, NextItem
from aif_jax.train.warm_start import carry_over, carry_over_state

__all__ = [
    "NextItem", "Liked", "Impressions", "Cascaded", "evaluate", "Evaluation", "calibrate", "edits", "fit_pure_svd",
    "svd_factors",
    "losses", "Goal", "Goals", "pairwise_ndcg", "margin_info_nce",
    "make_step", "init_state", "TrainState", "default_optimizer", "rowwise_adagrad", "SparseConfig",
    "loop", "resume", "BadBatch", "ProcessError", "score", "predict", "JsonLines", "TensorBoard",
    "carry_over", "carry_over_state",
]  # fmt: skip
