"""The pool of KV blocks, and the keys by which requests share blocks with the same prefix.

A block is

    free        not held, and its content is not kept
    held        referenced by one request or more
    cached      unreferenced, but registered under a key: shared again when its key is matched, else reused,
                oldest first

Block 0 is the null block: it is always zeros, pads the block tables, and is never handed out. The pool knows
blocks as numbers and contents as prefix keys. A prefix key is a SHA-256 chain over tokens, and its root says
who may share the block:

    root  = H(model id, tenant, the adapter's owner | id | version | basis | checksum, or "base")
    key_i = H(key_(i-1) | tokens of block i)

Two tenants, two adapters, two versions of one adapter or two contents under one version number have different
roots, so they never share a block, whatever their tokens are. With 256 bits, equal keys are taken for equal
contents without comparing tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import astuple

import numpy as np

from tessera.formats.adapter_ref import AdapterRef

NULL_BLOCK = 0


def root_key(model_id: str, tenant: str, adapter: AdapterRef | None) -> bytes:
    """Return the root of the prefix keys of one tenant's requests for one adapter version, or for the base
    model."""
    owner = "base" if adapter is None else astuple(adapter)
    # JSON, because plain concatenation would confuse ("ab", "c") with ("a", "bc").
    return hashlib.sha256(json.dumps([model_id, tenant, owner]).encode()).digest()


def chain_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the key of a block with these tokens behind the block with the key `parent`."""
    return hashlib.sha256(parent + np.asarray(token_ids, np.int64).tobytes()).digest()


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
        """Number of blocks that `acquire` can return."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks that are registered under the longest known prefix of `keys`. Takes no
        reference."""
        blocks = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, shared: Sequence[int], num_new: int, *, reserve: int = 0) -> list[int] | None:
        """Take references to the `shared` blocks and to `num_new` others, and return them in this order.

        Returns None and changes nothing if that would leave fewer than `reserve` blocks available.
        """
        idle = sum(self._refs[block] == 0 for block in shared)
        if self.num_available - idle - num_new < reserve:
            return None
        for block in shared:
            self._cached.pop(block, None)
            self._refs[block] += 1
        return [*shared, *(self._take() for _ in range(num_new))]

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each block. The end of a chain, which is the least useful, is evicted
        first."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            assert self._refs[block] >= 0
            if self._refs[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def register(self, block: int, key: bytes, owner: Hashable = None) -> None:
        """Let others share a held block, which must be full and computed, until `forget(owner)`. If the key
        is registered already, its first block stays."""
        assert self._refs[block] > 0
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key
            if owner is not None:
                self._owner_of[block] = owner
                self._blocks_of.setdefault(owner, set()).add(block)

    def forget(self, owner: Hashable) -> None:
        """Stop sharing this owner's blocks. Those that are not held become free."""
        for block in list(self._blocks_of.get(owner, ())):
            self._unregister(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def check_integrity(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Assert that the books balance. With `holders`, the blocks of every running request, also check the
        references."""
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
