"""The public names of `aif_jax` and the modules that they come from; `__init__.py` reads this file."""

from . import (
    blocks,
    checkpoint,
    connectors,
    data,
    engines,
    export,
    heads,
    index,
    metrics,
    presets,
    refreshing,
    serving,
    sharding,
    train,
)
from .catalogue import Catalogue
from .checkpoint import Checkpoints
from .checks import EncodingMismatch, VersionMismatch
from .config import Config
from .data.dataset import Dataset
from .data.events import EventLog
from .encoding.columns import Columns
from .encoding.encoder import Encoder
from .encoding.vocabulary import Vocabulary
from .export.contents import open
from .features import check_item_features, check_user_features, empty_items, empty_user
from .index import IndexWriter, ItemIndex
from .model import Component, PreRanker, assemble, build, fit_tables
from .readers import check, read, read_cascade
from .refreshing import RefreshConfig, refresh
from .run import Run, fit
from .schema import Attribute, Schema
from .serving import (
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
from .store.trained import Trained, fingerprint
from .store.trained import __version__ as __version__
from .train import Evaluation, FitConfig, evaluate
from .types import Behaviours, ItemFeatures, ItemRow, UserFeatures, UserState

__all__ = [
    # your files
    "Columns", "check", "read", "read_cascade", "Dataset", "EventLog", "Catalogue", "Encoder", "Vocabulary", "data",
    # features
    "Attribute", "Schema", "Behaviours", "UserFeatures", "ItemFeatures",
    "check_user_features", "check_item_features", "empty_user", "empty_items",
    # a model
    "presets", "blocks", "heads", "Config", "build", "assemble", "Component", "PreRanker", "fit_tables", "UserState", "ItemRow",
    # training
    "fit", "FitConfig", "Run", "evaluate", "Evaluation", "train", "metrics", "Checkpoints", "checkpoint", "sharding",
    # the next model
    "refresh", "RefreshConfig", "refreshing",
    # a trained model
    "Trained", "open",
    # the index
    "ItemIndex", "IndexWriter", "index",
    # a catalogue on an engine
    "engines",
    # serving
    "AsyncPreRanker", "ServingConfig", "Request", "Candidates", "Ranking", "Scores",
    "Overloaded", "DeadlineExceeded", "EngineClosed", "serving",
    # connectors: feature stores, streams, snapshot stores
    "connectors",
    # export and versions
    "export", "fingerprint", "VersionMismatch", "EncodingMismatch",
]  # fmt: skip
