"""Pre-ranking with AIF (arXiv 2511.12934) in JAX: user, item and interaction as three pure functions.

Public names are in the order in which a request meets them: your files, a model, training, the index, serving, export.
"""

from aif_jax import (
    blocks,
    checkpoint,
    data,
    export,
    index,
    jobs,
    metrics,
    neighbours,
    presets,
    serving,
    sharding,
    train,
    user_table,
)
from aif_jax.catalogue import Catalogue
from aif_jax.checkpoint import Checkpoints
from aif_jax.columns import Columns
from aif_jax.config import Config
from aif_jax.data.dataset import Dataset
from aif_jax.data.events import EventLog
from aif_jax.encoder import Encoder
from aif_jax.features import check_item_features, check_user_features, empty_items, empty_user
from aif_jax.index import IndexWriter, ItemIndex
from aif_jax.model import Component, PreRanker, assemble, build, fit_tables
from aif_jax.readers import check, read, read_cascade
from aif_jax.run import Run, fit
from aif_jax.schema import Attribute, Schema
from aif_jax.serving import (
    AsyncPreRanker,
    Candidates,
    DeadlineExceeded,
    EngineClosed,
    Overloaded,
    Ranking,
    Request,
    Scores,
    ServingConfig,
)
from aif_jax.train import Evaluation, evaluate
from aif_jax.types import Behaviours, Events, ItemFeatures, ItemRow, Streamed, UserFeatures, UserMemory, UserState
from aif_jax.user_table import UserTable, UserTableWriter
from aif_jax.version import EncodingMismatch, VersionMismatch, fingerprint
from aif_jax.version import __version__ as __version__
from aif_jax.vocabulary import Vocabulary
from aif_jax.warm_start import grow_vocabulary, unseen_as_unknown

__all__ = [
    # your files
    "Columns", "check", "read", "read_cascade", "Dataset", "EventLog", "Catalogue", "Encoder", "Vocabulary", "data",
    # features
    "Attribute", "Schema", "Behaviours", "Events", "Streamed", "UserFeatures", "ItemFeatures",
    "check_user_features", "check_item_features", "empty_user", "empty_items",
    # a model
    "presets", "blocks", "Config", "build", "assemble", "Component", "PreRanker", "fit_tables", "UserState", "ItemRow",
    "UserMemory",
    # training
    "fit", "Run", "evaluate", "Evaluation", "train", "metrics", "Checkpoints", "checkpoint", "grow_vocabulary",
    "unseen_as_unknown", "sharding",
    # the index
    "ItemIndex", "IndexWriter", "index",
    # users nearline
    "UserTable", "UserTableWriter", "user_table",
    # both by jobs on an engine
    "jobs",
    # serving
    "AsyncPreRanker", "ServingConfig", "Request", "Candidates", "Ranking", "Scores",
    "Overloaded", "DeadlineExceeded", "EngineClosed", "serving",
    # neighbours: feature stores, streams, snapshot stores, retrieval
    "neighbours",
    # export and versions
    "export", "fingerprint", "VersionMismatch", "EncodingMismatch",
]  # fmt: skip
