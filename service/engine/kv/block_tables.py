"""The block tables of the requests in flight, kept on the device so that a step uploads only what has
changed.

    tables[row] = the blocks of a request, in order        row 0 stays zero: the null block, for padding

At 256 requests of 8 Ki tokens the tables of a step are half a megabyte, and making them from Python lists
takes milliseconds; what changes is one entry for each request that got a block. Knows lists of blocks, but no
requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.engine.kv.memory import Ints


@dataclass(eq=False)
class _Row:
    """One row of the tables."""

    index: int
    #: A request extends this list in place, and replaces it when it starts again.
    blocks: list[int]
    #: The row holds this many of `blocks`.
    length: int = 0


class BlockTables:
    """Tables for up to `num_rows` requests of up to `max_blocks` blocks."""

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device) -> None:
        #: int32 [num_rows + 1, max_blocks], on the device.
        self.tables = torch.zeros(num_rows + 1, max_blocks, device=device, dtype=torch.int32)
        self._rows: dict[int, _Row] = {}  # by the id of the list, which the row keeps alive
        self._free = list(range(num_rows, 0, -1))

    @property
    def nbytes(self) -> int:
        return self.tables.nbytes

    def plan(self, lists: Sequence[list[int]]) -> tuple[list[int], Ints]:
        """Return the row of each of these lists, and the entries [2, n] that `write` must set before a step
        reads them: places in the flat tables, and blocks. Rows of other lists may be given up."""
        rows = self._rows_of(lists)
        places: list[int] = []
        values: list[int] = []
        width = self.tables.shape[1]
        for row, blocks in zip(rows, lists, strict=True):
            if row.length != len(blocks):
                places += range(row.index * width + row.length, row.index * width + len(blocks))
                values += blocks[row.length :]
                row.length = len(blocks)
        return [row.index for row in rows], np.asarray([places, values], np.int64)

    def write(self, entries: Tensor) -> None:
        """Set entries of the tables. entries: int64 [2, n] from `plan`, on the device."""
        if entries.shape[1]:
            self.tables.view(-1).index_copy_(0, entries[0], entries[1].to(torch.int32))

    def _rows_of(self, lists: Sequence[list[int]]) -> list[_Row]:
        """Return the rows of these lists, new rows for those that have none."""
        known = list(map(self._rows.get, map(id, lists)))
        if None in known:
            if known.count(None) > len(self._free):
                self._give_up_all_but(lists)
            for blocks in lists:
                if id(blocks) not in self._rows:
                    self._rows[id(blocks)] = _Row(self._free.pop(), blocks)
        return [self._rows[id(blocks)] for blocks in lists]

    def _give_up_all_but(self, lists: Sequence[list[int]]) -> None:
        kept = {id(blocks) for blocks in lists}
        for key in [key for key in self._rows if key not in kept]:
            self._free.append(self._rows.pop(key).index)
