"""Block tables on the device equal the lists of the requests, whatever requests came and went."""

from __future__ import annotations

import random

import pytest
import torch

from service.engine.kv.block_tables import BlockTables

CPU = torch.device("cpu")


def write(tables: BlockTables, lists: list[list[int]]) -> list[list[int]]:
    """The tables of these lists after the upload of a step, up to the length of the lists."""
    rows, entries = tables.plan(lists)
    tables.write(torch.from_numpy(entries))
    assert len(set(rows)) == len(lists)
    assert 0 not in rows
    assert not tables.tables[0].any()
    return [tables.tables[row, : len(blocks)].tolist() for row, blocks in zip(rows, lists, strict=True)]


def test_only_what_is_new_is_uploaded() -> None:
    tables = BlockTables(4, 8, CPU)
    first, second = [3, 4], [5]
    assert write(tables, [first, second]) == [first, second]
    second.append(6)
    rows, entries = tables.plan([first, second])
    assert entries.tolist() == [[rows[1] * 8 + 1], [6]]


@pytest.mark.parametrize("seed", range(3))
def test_follows_lists_that_grow_end_and_begin_again(seed: int) -> None:
    chance = random.Random(seed)
    tables = BlockTables(5, 6, CPU)
    lists = [[chance.randrange(1, 99)] for _ in range(5)]
    for _ in range(200):
        for index, blocks in enumerate(lists):
            if len(blocks) == 6 or chance.random() < 0.1:
                lists[index] = [chance.randrange(1, 99) for _ in range(chance.randrange(1, 4))]
            elif chance.random() < 0.5:
                blocks.append(chance.randrange(1, 99))
        chosen = chance.sample(lists, chance.randrange(1, 6))
        assert write(tables, chosen) == chosen
