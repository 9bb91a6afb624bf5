"""The block pool (references, sharing by content, eviction) and prefix keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from service.engine.kv.blocks import NULL_BLOCK, BlockPool, chain_key, root_key
from tessera.formats.adapter_ref import AdapterRef

REF = AdapterRef("t", "a", 1, "basis")


def test_a_registered_block_is_shared_until_it_is_evicted() -> None:
    pool = BlockPool(3, 4)
    blocks = pool.acquire([], 2)
    assert blocks is not None
    pool.register(blocks[0], b"0")
    pool.register(blocks[1], b"1")
    pool.release(blocks)

    assert pool.match([b"0", b"1", b"2"]) == blocks
    assert (pool.num_cached, pool.num_used, pool.num_available) == (2, 0, 3)
    assert pool.acquire([], 2) is not None  # the free one, then the end of the chain
    assert pool.match([b"0", b"1"]) == blocks[:1]


def test_matching_ends_at_the_first_unknown_key() -> None:
    pool = BlockPool(3, 4)
    blocks = pool.acquire([], 2)
    assert blocks is not None
    pool.register(blocks[1], b"1")
    assert pool.match([b"0", b"1"]) == []


def test_acquire_is_all_or_nothing() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.acquire([], 2)
    assert blocks is not None
    pool.register(blocks[0], b"0")
    pool.release(blocks)

    assert pool.acquire(blocks[:1], 4) is None  # the shared block is one of the four available
    assert pool.acquire([], 2, reserve=3) is None
    pool.check_integrity([])
    shared = pool.acquire(blocks[:1], 3)
    assert shared is not None
    assert len(set(shared)) == 4
    pool.check_integrity([shared])


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5, 4)
    blocks = pool.acquire([], 5)
    assert blocks is not None
    assert NULL_BLOCK not in blocks


def test_of_two_equal_blocks_the_first_stays_registered() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.acquire([], 2)
    assert blocks is not None
    for block in blocks:
        pool.register(block, b"same")
    assert pool.match([b"same"]) == blocks[:1]
    pool.release(blocks)
    assert pool.num_cached == 1


@pytest.mark.parametrize(
    ("tenant", "adapter"),
    [
        ("t", None),
        ("u", REF),
        ("t", replace(REF, adapter_id="b")),
        ("t", replace(REF, version=2)),
        ("t", replace(REF, basis_id="other")),
        ("t", replace(REF, checksum="ab")),
        ("t", replace(REF, tenant="u")),
    ],
)
def test_no_two_owners_have_the_same_root(tenant: str, adapter: AdapterRef | None) -> None:
    assert root_key("model", tenant, adapter) != root_key("model", "t", REF)
    assert root_key("other model", tenant, adapter) != root_key("model", tenant, adapter)


def test_a_key_depends_on_all_tokens_before() -> None:
    root = root_key("model", "t", None)
    assert chain_key(chain_key(root, [1, 2]), [3]) != chain_key(chain_key(root, [2, 1]), [3])
    assert chain_key(root, [1]) != chain_key(root, [256])


class BlockPoolMachine(RuleBasedStateMachine):
    """Random holders over a small alphabet of keys, so that they often share blocks and evict each other."""

    held: Bundle[tuple[int, ...]] = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, 2)
        self.holders: list[tuple[int, ...]] = []

    @rule(target=held, keys=st.lists(st.integers(0, 5), max_size=4, unique=True), num_new=st.integers(0, 4))
    def acquire(self, keys: list[int], num_new: int) -> tuple[int, ...]:
        shared = self.pool.match([bytes([key]) for key in keys])
        before = self.pool.num_available
        blocks = self.pool.acquire(shared, num_new)
        if blocks is None:
            assert before - num_new < len(shared)
            return multiple()
        assert blocks[: len(shared)] == shared
        assert len(blocks) == len(shared) + num_new
        self.holders.append(tuple(blocks))
        return tuple(blocks)

    @rule(blocks=held, index=st.integers(0, 7), key=st.integers(0, 5))
    def register(self, blocks: tuple[int, ...], index: int, key: int) -> None:
        if index < len(blocks) and blocks in self.holders:
            self.pool.register(blocks[index], bytes([key]), owner=(None, "x", "y")[key % 3])

    @rule(owner=st.sampled_from("xyz"))
    def forget(self, owner: str) -> None:
        """Forget an owner: none of its blocks is shared any more, and those of others still are."""
        before = {key: self.pool.match([bytes([key])]) for key in range(6)}
        self.pool.forget(owner)
        for key, blocks in before.items():
            is_forgotten = owner == (None, "x", "y")[key % 3]
            assert self.pool.match([bytes([key])]) == ([] if is_forgotten else blocks)

    @rule(blocks=consumes(held))
    def release(self, blocks: tuple[int, ...]) -> None:
        self.holders.remove(blocks)
        self.pool.release(blocks)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity(self.holders)


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=40, stateful_step_count=30)
