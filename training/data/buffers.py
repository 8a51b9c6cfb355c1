"""Memory for batches, used again once nobody looks at it."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch


class Buffers:
    """Hands out memory for batches, all of one size.

    A buffer comes back when the last tensor or array that shows it is gone, so that a consumer may keep what it likes.
    Using it again saves the kernel from clearing fresh pages. With CUDA, memory is pinned, for copies that the device
    makes by itself, and torch's own allocator uses it again: it knows which copies are still under way.

    Args:
        size: bytes of the largest batch.
        keep: buffers that wait for their next use, at most.
    """

    def __init__(self, size: int, keep: int) -> None:
        self.size = int(size)
        self._pinned = torch.cuda.is_available()
        self._free: deque[np.ndarray] = deque(maxlen=keep)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> torch.Tensor:
        """A tensor of any contents."""
        used = math.prod(shape) * dtype.itemsize
        if self._pinned:  # not by way of numpy: the allocator knows copies by the tensor's own storage
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
            return torch.empty(shape, dtype=kind, pin_memory=True)
        try:
            whole = self._free.pop()
        except IndexError:
            whole = np.empty(self.size, dtype=np.uint8)
        # a new object over the same memory: everything made from it keeps it alive, and it goes when they have gone
        shown = np.frombuffer(whole.data[:used], dtype=dtype)
        weakref.finalize(shown, self._free.append, whole).atexit = False
        return torch.from_numpy(shown.reshape(shape))
