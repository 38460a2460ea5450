"""Users nearline: what is kept of every user's whole history, updated event by event, as the item index is for items."""

from aif_jax.user_table.clock import ClockError, Written
from aif_jax.user_table.remote import Progress, RemoteRows
from aif_jax.user_table.rows import MemoryRows, Rows, Stored, UserId
from aif_jax.user_table.table import UpdateCounts, UserTable
from aif_jax.user_table.writer import UserTableWriter

__all__ = [
    "UserTable", "UserTableWriter", "UpdateCounts", "Rows", "Stored", "MemoryRows", "RemoteRows", "Progress", "UserId",
    "ClockError", "Written",
]  # fmt: skip
