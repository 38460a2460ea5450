"""Training: losses, the step, the loop, the usual run, evaluation."""

from aif_jax.data.pipeline import BadBatch
from aif_jax.train import edits, losses
from aif_jax.train.baselines import baseline_scores
from aif_jax.train.distillation import Teacher
from aif_jax.train.edits import carry_over, svd_factors
from aif_jax.train.evaluate import Evaluation, evaluate, predict
from aif_jax.train.loop import JsonLines, Saving, loop, resume
from aif_jax.train.optimizers import default_optimizer
from aif_jax.train.settings import FitConfig
from aif_jax.train.step import TrainState, init_state, make_step, score
from aif_jax.train.tasks import Cascaded, Impressions, NextItem

__all__ = [
    "NextItem", "Impressions", "Cascaded", "FitConfig", "Teacher",
    "evaluate", "Evaluation", "baseline_scores", "edits", "svd_factors",
    "losses", "make_step", "init_state", "TrainState", "default_optimizer",
    "loop", "Saving", "resume", "BadBatch", "score", "predict", "JsonLines",
    "carry_over",
]  # fmt: skip
