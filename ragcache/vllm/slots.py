"""Where a prompt's rows lie in paged memory, and how rows that are computed are told to kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def slot_mapping(rows: Tensor, blocks: Tensor, block_size: int) -> Tensor:
    """Slot of every row, int64: row r is at place r % block_size of block blocks[r // block_size].

    ValueError where a row is behind the last block.
    """
    number = rows // block_size
    if len(rows) and int(number.max()) >= len(blocks):
        raise ValueError(f"row {int(rows.max())} is behind {len(blocks)} blocks of {block_size}")
    return blocks[number].to(torch.int64) * block_size + rows % block_size


@dataclass(frozen=True, slots=True)
class _RowRuns:
    """Rows in contiguous runs. Kernels take each for a sequence of its own that all rows before it
    belong to: its queries attend to everything up to themselves, and to nothing behind."""

    starts: Tensor  # (runs + 1,), int32: where each begins among the rows, and their number
    lengths: Tensor  # (runs,), int32: rows up to the last one of each run

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Rows of the longest run."""
        return int((self.starts[1:] - self.starts[:-1]).max())


def contiguous_runs(rows: Tensor) -> _RowRuns:
    """Of sorted, different ``rows``, at least one, int64."""
    breaks = (rows[1:] != rows[:-1] + 1).nonzero()[:, 0] + 1
    ends = torch.cat([breaks, torch.tensor([len(rows)], device=rows.device)])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64, device=rows.device), ends])
    return _RowRuns(starts.to(torch.int32), (rows[ends - 1] + 1).to(torch.int32))


def blocks_before(stop: int, blocks: Sequence[int], block_size: int) -> list[int]:
    """The blocks that hold the rows before ``stop``."""
    return list(blocks[: -(-stop // block_size)])
