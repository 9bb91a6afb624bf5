"""From examples to batches: the split, the order, the rows."""

from __future__ import annotations

import hashlib
import json
from array import array

import pytest
import torch

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.data.examples import Example, parse_examples
from tessera.errors import InvalidTrainingData
from tessera.methods.bases import CalibrationSet
from tests.tessera.chat.tokenizer_kinds import tokenizer_of
from tests.trainer_worker.conftest import DATA, random_examples
from trainer_worker.data.training_data import MIN_FILL, TrainingData, encode_data, micro_batches


def texts(*words: str) -> list[Example]:
    return [Example(text=f"the word {word}", line=line) for line, word in enumerate(words, start=1)]


def numbered(count: int, start: int = 0) -> list[Example]:
    return texts(*(f"number {i}" for i in range(start, start + count)))


@pytest.mark.parametrize(
    ("count", "held_back"), [(1, 0), (9, 0), (10, 2), (25, 5), (60, 8), (300, 30), (3000, 200)]
)
def test_a_tenth_is_held_back_within_limits(chat: ChatFormat, count: int, held_back: int) -> None:
    data = encode_data(chat, numbered(count), max_tokens=64)
    assert (len(data.train), len(data.valid)) == (count - held_back, held_back)


def test_the_split_depends_on_the_examples_alone(chat: ChatFormat) -> None:
    examples = numbered(40)
    data = encode_data(chat, examples, max_tokens=64)
    again = encode_data(chat, examples[::-1], max_tokens=64)
    assert {tuple(e.token_ids) for e in data.valid} == {tuple(e.token_ids) for e in again.valid}
    assert data.digest != again.digest


def test_duplicates_stay_on_one_side(chat: ChatFormat) -> None:
    data = encode_data(chat, numbered(20) * 3, max_tokens=64)
    train, valid = ({tuple(e.token_ids) for e in part} for part in (data.train, data.valid))
    assert not train & valid
    assert len(data.valid) == 9
    alike = encode_data(chat, texts("same") * 50, max_tokens=64)
    assert (len(alike.train), len(alike.valid)) == (50, 0)


def test_a_validation_file_takes_the_place_of_the_split(chat: ChatFormat) -> None:
    data = encode_data(chat, numbered(20), max_tokens=64, validation=numbered(5, start=18))
    assert (len(data.train), len(data.valid)) == (20, 5)
    assert data.num_overlapping == 2


def test_truncated_examples_are_counted(chat: ChatFormat) -> None:
    examples = [*numbered(3), Example(text="word " * 100, line=4)]
    assert encode_data(chat, examples, max_tokens=32).num_truncated == 1


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_examples_with_nothing_to_learn_are_named_by_line(chat: ChatFormat, param: str) -> None:
    bad = [Example(text="<|end|>", line=3), *numbered(1), Example(text="<|end|>", line=7)]
    files = {"training_file": numbered(3), "validation_file": numbered(3)} | {param: bad}
    with pytest.raises(InvalidTrainingData) as caught:
        encode_data(chat, files["training_file"], max_tokens=64, validation=files["validation_file"])
    assert [error.line for error in caught.value.errors] == [3, 7]
    assert caught.value.param == param


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_an_epoch_visits_every_example_once_in_an_order_of_its_own(batch_size: int) -> None:
    data = TrainingData(random_examples(0, 23), (), digest="")
    steps = -(-23 // batch_size)

    def epoch(number: int, seed: int = 5) -> list[int]:
        found = []
        for step in range(number * steps, (number + 1) * steps):
            found += [id(e) for e in data.batch(step, batch_size=batch_size, seed=seed)]
        return found

    assert sorted(epoch(0)) == sorted(epoch(1)) == sorted(id(e) for e in data.train)
    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=6)


def conversations(count: int) -> list[Example]:
    """Conversations with one to three answers each."""
    examples = []
    for line in range(1, count + 1):
        turns = [
            {"role": role, "content": f"{role} {line} {turn}"}
            for turn in range(1 + line % 3)
            for role in ("user", "assistant")
        ]
        examples.append(Example(messages=tuple(turns), line=line))
    return examples


def test_no_template_changes_what_is_an_example() -> None:
    """The template changes only the number of rows per example, not the split, the order or the batches."""
    kept, rewritten = (
        encode_data(ChatFormat(tokenizer_of("byte_level", template)), conversations(30), max_tokens=512)
        for template in ("lines", "opens_thoughts")
    )
    assert set(kept.train_sizes) == {1}
    assert set(rewritten.train_sizes) == {1, 2, 3}
    assert len(rewritten.train) == sum(rewritten.train_sizes)
    for data in (kept, rewritten):
        assert (data.num_train, data.num_valid) == (24, 6)
    sizes = {id(row): size for row, size in zip(kept.train, rewritten.train_sizes, strict=True)}
    for step in range(10):
        together, apart = (data.batch(step, batch_size=4, seed=3) for data in (kept, rewritten))
        assert len(apart) == sum(sizes[id(row)] for row in together)
        assert sum(row.num_loss_tokens for row in apart) == sum(row.num_loss_tokens for row in together)


def test_the_rows_of_an_example_stay_together(chat: ChatFormat) -> None:
    rows = random_examples(0, 6)
    data = TrainingData(rows, (), digest="", train_sizes=(1, 3, 2))
    assert data.num_train == 3
    found = [tuple(map(id, data.batch(step, batch_size=1, seed=1))) for step in range(3)]
    assert sorted(found) == sorted([tuple(map(id, part)) for part in (rows[:1], rows[1:4], rows[4:])])


@pytest.mark.parametrize("token_budget", [1, 50, 10_000])
def test_micro_batches_hold_every_row_once_within_the_budget(token_budget: int) -> None:
    items = [(i % 3, example) for i, example in enumerate(random_examples(1, 30))]
    batches = list(micro_batches(items, token_budget=token_budget))
    found = []
    for batch in batches:
        S, L = batch.token_ids.shape
        assert S == 1 or token_budget >= S * L
        assert batch.num_padding <= (1 - MIN_FILL) * S * L
        flat = batch.token_ids.flatten()
        assert torch.equal(flat[batch.positions + 1], batch.targets)
        assert torch.equal(batch.rows[batch.positions // L], batch.owners)
        for row in range(S):
            mine = batch.positions // L == row
            found.append((int(batch.rows[row]), batch.token_ids[row].tolist(), batch.targets[mine].tolist()))
    expected = [
        (owner, e.token_ids, [t for t, m in zip(e.token_ids, e.loss_mask, strict=True) if m])
        for owner, e in items
    ]
    assert len(found) == len(expected)
    for owner, ids, targets in expected:
        assert any(o == owner and row[: len(ids)] == ids and t == targets for o, row, t in found)
    assert sum(batch.num_tokens for batch in batches) == sum(len(e.token_ids) for _, e in items)


def test_small_micro_batches_are_not_split_where_that_costs_more_than_padding() -> None:
    items = [(0, example) for example in random_examples(2, 30)]
    assert len(list(micro_batches(items, token_budget=10_000))) > 2
    assert len(list(micro_batches(items, token_budget=10_000, min_tokens=2048))) == 1


def test_the_sample_data_are_encoded_without_loss(chat: ChatFormat) -> None:
    for name in ("devil", "jargon"):
        examples = parse_examples((DATA / f"{name}.jsonl").read_bytes())
        data = encode_data(chat, examples, max_tokens=512)
        assert (len(data.train), len(data.valid), data.num_truncated) == (52, 8, 0)
        assert all(e.token_ids[-1] == chat.tokenizer.eos_token_id and e.loss_mask[-1] for e in data.train)


def test_rows_are_packed_and_digests_are_those_of_lists(chat: ChatFormat) -> None:
    examples = parse_examples((DATA / "jargon.jsonl").read_bytes())[:30]
    data = encode_data(chat, examples, max_tokens=256)
    rows = [row for example in examples for row in chat.encode_rows(example, max_tokens=256)]

    assert all(type(row.token_ids) is array and type(row.loss_mask) is bytes for row in data.train)
    assert sorted(row.as_json() for row in (*data.train, *data.valid)) == sorted(
        row.as_json() for row in rows
    )
    assert [row.packed().as_json() for row in rows] == [[row.token_ids, row.loss_mask] for row in rows]
    plain = CalibrationSet(tuple((tuple(row.token_ids), tuple(row.loss_mask)) for row in rows))
    packed = CalibrationSet.from_encoded(row.packed() for row in rows)
    as_one = json.dumps([[row.token_ids, row.loss_mask] for row in rows]).encode()
    assert plain.digest == packed.digest == hashlib.sha256(as_one).hexdigest()
    assert packed.num_label_tokens == plain.num_label_tokens
    for one, other in zip(plain.batches(), packed.batches(), strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.labels, other.labels)


def test_an_order_is_drawn_once_per_epoch_and_covers_all_examples() -> None:
    rows = tuple(EncodedExample([i, i + 1], [False, True]) for i in range(10))
    data = TrainingData(rows, (), digest="")
    for epoch in range(2):
        steps = range(4 * epoch, 4 * epoch + 4)
        seen = [i for step in steps for i in data.batch_indices(step, batch_size=3, seed=1)]
        assert sorted(seen) == list(range(10))
