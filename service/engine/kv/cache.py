"""The paged KV tensors: keys and values of every layer, in blocks.

    K[layer]: [num_blocks + 1, Hkv, block_size, D_k]      V[layer]: [num_blocks + 1, Hkv, block_size, D_v]

Block 0 is the null block and stays zero. A block is cleared when it gets a new holder: positions beyond the
end of a sequence are read under a mask, and a NaN that another user left there would pass any mask (0 · NaN).
Knows nothing of who holds which block.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVShape:
    """The shape of K and V that one layer stores per token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class PagedKV:
    """The KV of `num_blocks` blocks for layers of the given shapes."""

    def __init__(
        self,
        shapes: Sequence[KVShape],
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.block_size = block_size
        self.dtype = dtype
        self.shapes = tuple(shapes)
        self._K: list[Tensor] = [torch.empty(0)] * len(self.shapes)
        self._V: list[Tensor] = [torch.empty(0)] * len(self.shapes)
        self._stacks: list[Tensor] = []
        # Layers of one shape share a tensor, so that one operation clears a block in all of them.
        for shape in dict.fromkeys(self.shapes):
            layers = [index for index, other in enumerate(self.shapes) if other == shape]
            size = (len(layers), num_blocks + 1, shape.num_kv_heads, block_size)
            K = _zeros((*size, shape.key_dim), device=device, dtype=dtype)
            V = _zeros((*size, shape.value_dim), device=device, dtype=dtype)
            self._stacks += [K, V]
            for place, index in enumerate(layers):
                self._K[index], self._V[index] = K[place], V[place]
        self.nbytes = sum(stack.nbytes for stack in self._stacks)

    def clear(self, blocks: Tensor) -> None:
        """Zero these blocks in every layer. blocks: int64 [n]."""
        for stack in self._stacks:
            stack.index_fill_(1, blocks, 0)

    def write(self, layer: int, K: Tensor, V: Tensor, rows: Tensor) -> None:
        """Store the KV of T tokens. K: [Hkv, T, D_k], V: [Hkv, T, D_v]; rows: int64 [Hkv * T], see `rows`."""
        self._K[layer].flatten(0, 2).index_copy_(0, rows, K.flatten(0, 1))
        self._V[layer].flatten(0, 2).index_copy_(0, rows, V.flatten(0, 1))

    def read(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """K [n, Hkv, L, D_k] and V [n, Hkv, L, D_v] of n sequences, L = pages each * block_size.

        pages: int64 [n, Hkv, L / block_size], see `pages`.
        """
        n, heads, count = pages.shape
        K, V = (
            stack[layer].flatten(0, 1).flatten(1).index_select(0, pages.flatten())
            for stack in (self._K, self._V)
        )
        length = count * self.block_size
        return K.view(n, heads, length, -1), V.view(n, heads, length, -1)

    def read_rows(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """K [n, D_k] and V [n, D_v] of single entries. rows: int64 [n], see `rows`."""
        K, V = (stack[layer].flatten(0, 2).index_select(0, rows) for stack in (self._K, self._V))
        return K, V

    def pages_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return all blocks of one layer: K [num_blocks + 1, Hkv, block_size, D_k] and V [..., D_v]."""
        return self._K[layer], self._V[layer]

    def rows(self, num_kv_heads: int, blocks: Tensor, offsets: Tensor) -> Tensor:
        """Return where `write` puts the entries of each head for T tokens: int64 [Hkv * T].

        blocks, offsets: int64 [T], or [n, T] for n sequences. The entries of one sequence then follow those
        of the one before, in [n * Hkv * T].
        """
        heads = torch.arange(num_kv_heads, device=blocks.device)[:, None]
        places = (blocks[..., None, :] * num_kv_heads + heads) * self.block_size + offsets[..., None, :]
        return places.flatten()

    def pages(self, num_kv_heads: int, table: Tensor) -> Tensor:
        """Return where `read` finds the blocks of each head. table: int64 [n, blocks each], padded with block
        0."""
        heads = torch.arange(num_kv_heads, device=table.device)[:, None]
        return table[:, None, :] * num_kv_heads + heads


def _zeros(size: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros. On a CPU its pages take no memory before they are written: `torch.zeros`
    would write them all, 268 MB for an engine that has not answered anything."""
    num_bytes = math.prod(size) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(*size, device=device, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*size)
