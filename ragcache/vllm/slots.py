"""Rows of a prompt in paged memory, and contiguous runs of rows for attention kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def slot_mapping(rows: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """The slot of every row, int64 (n,).

    Row r is at offset r % block_size of block blocks[r // block_size]. Raises ValueError for a row
    beyond the last block.
    """
    number = rows // block_size
    if len(rows) and int(number.max()) >= len(blocks):
        raise ValueError(f"row {int(rows.max())} is beyond {len(blocks)} blocks of {block_size}")
    return blocks[number].to(torch.int64) * block_size + rows % block_size


@dataclass(frozen=True, slots=True)
class _RowRuns:
    """Contiguous runs of rows.

    Attention kernels treat each run as the end of a sequence that contains all rows before it: its
    queries attend to all rows up to their own.
    """

    starts: Tensor  # int32 (runs + 1,): index of each run's first row, then the number of rows
    lengths: Tensor  # int32 (runs,): number of rows of the prompt up to the end of each run

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Rows of the longest run."""
        return int((self.starts[1:] - self.starts[:-1]).max())


def contiguous_runs(rows: Tensor) -> _RowRuns:
    """The runs of ``rows``, int64 (n,), sorted and distinct, n >= 1."""
    breaks = (rows[1:] != rows[:-1] + 1).nonzero()[:, 0] + 1
    ends = torch.cat([breaks, torch.tensor([len(rows)], device=rows.device)])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64, device=rows.device), ends])
    return _RowRuns(starts.to(torch.int32), (rows[ends - 1] + 1).to(torch.int32))


def blocks_before(stop: int, blocks: Sequence[int], block_size: int) -> list[int]:
    """The blocks that hold the rows before ``stop``."""
    return list(blocks[: -(-stop // block_size)])
