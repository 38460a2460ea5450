"""Users nearline: what is kept of every user's whole history, updated event by event, as the item index is for items."""

from aif_jax.user_table.rows import MemoryRows, Progress, RemoteRows, Rows, Stored, UserId
from aif_jax.user_table.table import ClockError, UpdateCounts, UserTable, UserTableWriter, Written

__all__ = [
    "UserTable", "UserTableWriter", "UpdateCounts", "Rows", "Stored", "MemoryRows", "RemoteRows", "Progress", "UserId",
    "ClockError", "Written",
]  # fmt: skip
