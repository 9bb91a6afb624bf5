"""The pool of KV blocks: who holds which, and which may be shared by content.

Knows neither tensors nor tokens: blocks are numbers, contents are prefix keys (`prefix_keys.py`). A block is

    free        nobody's, holds nothing worth keeping
    held        referenced by one sequence or more
    cached      unreferenced, but registered under a key: shared again if asked for, else taken, oldest first

Block 0 is the null block: always zeros, what tables are padded with, never handed out.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence

NULL_BLOCK = 0


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, numbered from 1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(1, num_blocks + 1))
        self._refs = [0] * (num_blocks + 1)
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._owner_of: dict[int, Hashable] = {}  # of registered blocks that have one
        self._blocks_of: dict[Hashable, set[int]] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that `acquire` can hand out."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks registered under the longest known prefix of `keys`. Takes no reference."""
        blocks = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, shared: Sequence[int], num_new: int, *, reserve: int = 0) -> list[int] | None:
        """References to the `shared` blocks and `num_new` others, or None, and nothing is changed, if that
        would leave fewer than `reserve` available."""
        idle = sum(self._refs[block] == 0 for block in shared)
        if self.num_available - idle - num_new < reserve:
            return None
        for block in shared:
            self._cached.pop(block, None)
            self._refs[block] += 1
        return [*shared, *(self._take() for _ in range(num_new))]

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each. The end of a chain is the first to be evicted: it is worth least."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0
            if self._refs[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def register(self, block: int, key: bytes, owner: Hashable = None) -> None:
        """Let others share a held block, which must be full and computed, until `forget(owner)`. The first
        under a key stays."""
        assert self._refs[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key
            if owner is not None:
                self._owner_of[block] = owner
                self._blocks_of.setdefault(owner, set()).add(block)

    def forget(self, owner: Hashable) -> None:
        """Share no block of this owner's any more; those that nobody holds are free."""
        for block in list(self._blocks_of.get(owner, ())):
            self._unregister(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def check_integrity(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that the books balance; with `holders`, the blocks of every sequence, the references too."""
        free, cached = set(self._free), set(self._cached)
        held = {block for block in range(1, self.num_blocks + 1) if self._refs[block] > 0}
        assert len(free) == len(self._free)
        assert free | cached | held == set(range(1, self.num_blocks + 1))
        assert len(free) + len(cached) + len(held) == self.num_blocks
        assert self._refs[NULL_BLOCK] == 0
        assert {key: block for block, key in self._key_of.items()} == self._block_of
        assert cached <= self._key_of.keys() <= cached | held
        assert self._owner_of.keys() <= self._key_of.keys()
        owned = {block: owner for owner, blocks in self._blocks_of.items() for block in blocks}
        assert owned == self._owner_of
        assert all(self._blocks_of.values())
        if holders is not None:
            refs = Counter(block for blocks in holders for block in blocks)
            assert all(refs[block] == count for block, count in enumerate(self._refs))

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unregister(block)
        self._refs[block] = 1
        return block

    def _unregister(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
        owner = self._owner_of.pop(block, None)
        if owner is not None:
            self._blocks_of[owner].discard(block)
            if not self._blocks_of[owner]:
                del self._blocks_of[owner]
