"""Batches of NumPy arrays as PyTorch tensors."""

from __future__ import annotations

import numpy as np
import torch


def tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same as tensors; copies, since an array may be part of a file that is mapped."""
    return {name: torch.tensor(values) for name, values in batch.items()}
