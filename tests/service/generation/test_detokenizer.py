"""Any tokens of any kind of tokenizer: the text of single tokens against the text of the whole."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from service.generation.text import TextCodec
from tests.service.generation.token_kinds import BYTE_FALLBACK, EXACT, byte_fallback_text

ALL = {**EXACT, **BYTE_FALLBACK}
#: Kinds of tokenizer where the text of a token depends on more than whether it is the first.
CONTEXTUAL = ("ctc", "word ends", "several spaces stripped")
SEEDS = st.lists(st.integers(0, 2**20), max_size=14)


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return ALL[kind]()


@cache
def codec_of(kind: str) -> TextCodec:
    return TextCodec(tokenizer(kind))


def ids_of(codec: TextCodec, seeds: list[int]) -> list[int]:
    """Token ids: half of them below 600, where the bytes are, and some beyond the vocabulary."""
    size = codec.vocab_size + 3
    return [seed // 2 % (min(600, size) if seed % 2 else size) for seed in seeds]


def streamed(codec: TextCodec, prompt: list[int], ids: list[int], **options: bool) -> str:
    stream = codec.stream(prompt, **options)
    return "".join(map(stream.push, ids)) + stream.flush()


def check_stream(codec: TextCodec, prompt: list[int], ids: list[int], *, skip: bool) -> None:
    """The pieces make up the whole text without the prompt's."""
    whole, before = (codec.decode(part, skip_special_tokens=skip) for part in (prompt + ids, prompt))
    text = streamed(codec, prompt, ids, skip_special_tokens=skip)
    if whole.startswith(before):
        left_out = whole.removeprefix(before).removeprefix(text)
        assert before + text + left_out == whole
    else:  # the text finishes a character that the prompt began
        assert before.endswith("\ufffd")
        begun = before.rstrip("\ufffd")
        left_out = whole[whole.rindex(text) + len(text) :] if text else ""
        assert whole.startswith(begun)
        assert whole.endswith(text + left_out)
    assert set(left_out) <= {"\ufffd"}
    assert len(left_out) <= 3


def check_echo(codec: TextCodec, prompt: list[int], ids: list[int]) -> None:
    """The prompt up to an unfinished character, and the text after it, make up the whole."""
    whole = codec.decode(prompt + ids)
    both = streamed(codec, [], prompt) + streamed(codec, prompt, ids, is_prompt_shown=False)
    assert whole.startswith(both)
    assert set(whole[len(both) :]) <= {"\ufffd"}


@given(prompt=SEEDS, ids=SEEDS, skip=st.booleans())
@pytest.mark.parametrize("kind", ALL)
def test_pieces_make_up_what_follows_the_prompt(
    kind: str, prompt: list[int], ids: list[int], skip: bool
) -> None:
    codec = codec_of(kind)

    check_stream(codec, ids_of(codec, prompt), ids_of(codec, ids), skip=skip)
    check_echo(codec, ids_of(codec, prompt), ids_of(codec, ids))


@given(prompt=SEEDS, ids=SEEDS, skip=st.booleans())
def test_pieces_make_up_what_follows_the_prompt_of_a_byte_level_tokenizer(
    codec: TextCodec, prompt: list[int], ids: list[int], skip: bool
) -> None:
    check_stream(codec, ids_of(codec, prompt), ids_of(codec, ids), skip=skip)
    check_echo(codec, ids_of(codec, prompt), ids_of(codec, ids))


@given(seeds=SEEDS, skip=st.booleans())
@pytest.mark.parametrize("kind", EXACT)
def test_the_whole_text_is_the_tokenizers(kind: str, seeds: list[int], skip: bool) -> None:
    codec = codec_of(kind)
    ids = ids_of(codec, seeds)

    expected = tokenizer(kind).backend_tokenizer.decode(ids, skip_special_tokens=skip)
    assert codec.decode(ids, skip_special_tokens=skip) == expected


@given(seeds=SEEDS, skip=st.booleans())
def test_the_whole_text_of_a_byte_level_tokenizer_is_its_own(
    codec: TextCodec, seeds: list[int], skip: bool
) -> None:
    ids = ids_of(codec, seeds)

    expected = codec.chat.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)
    assert codec.decode(ids, skip_special_tokens=skip) == expected


@given(seeds=SEEDS)
@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_byte_runs_keep_every_valid_character(kind: str, seeds: list[int]) -> None:
    codec, backend = codec_of(kind), tokenizer(kind).backend_tokenizer
    ids = ids_of(codec, seeds)

    tokens = [backend.id_to_token(i) for i in ids if i > 3 and i < codec.vocab_size]
    assert codec.decode(ids) == byte_fallback_text(tokens, strips="strips" in kind)


@given(text=st.text(alphabet="ab é🙂世\n ", max_size=12))
@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_valid_byte_runs_read_as_the_tokenizer_reads_them(kind: str, text: str) -> None:
    codec, backend = codec_of(kind), tokenizer(kind).backend_tokenizer
    ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]

    assert codec.decode(ids) == backend.decode(ids)
    assert streamed(codec, [], ids) == backend.decode(ids)


@given(ids=SEEDS)
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in CONTEXTUAL])
def test_the_bytes_of_the_tokens_make_up_the_text(kind: str, ids: list[int]) -> None:
    check_bytes(codec_of(kind), ids_of(codec_of(kind), ids))


@given(ids=SEEDS)
def test_the_bytes_of_byte_level_tokens_make_up_the_text(codec: TextCodec, ids: list[int]) -> None:
    check_bytes(codec, ids_of(codec, ids))


def check_bytes(codec: TextCodec, ids: list[int]) -> None:
    stream, text, raw = codec.stream([]), "", b""
    for token_id in ids:
        raw += codec.token_bytes(token_id, is_first=stream.is_at_start)
        text += stream.push(token_id)
    assert one_for_a_run(raw.decode("utf-8", "replace")) == one_for_a_run(text)


def one_for_a_run(text: str) -> str:
    """`text` with one U+FFFD instead of several, and none at its end."""
    return re.sub("\ufffd+", "\ufffd", text).rstrip("\ufffd")


@pytest.mark.parametrize("kind", ALL)
def test_a_space_is_kept_after_many_tokens_without_text(kind: str) -> None:
    codec, backend = codec_of(kind), tokenizer(kind).backend_tokenizer
    words = range(4, codec.vocab_size)
    word = next((i for i in words if backend.decode([i, i]) != 2 * backend.decode([i])), words[-1])
    empty = [1, 2, 3, codec.vocab_size, codec.vocab_size + 7] * 1000

    expected = backend.decode([word, word]).removeprefix(backend.decode([word]))
    assert streamed(codec, [word], [*empty, word]) == expected
    assert streamed(codec, [word, *empty], [word, *empty]) == expected
    assert streamed(codec, empty, [word, *empty, word]) == backend.decode([word, word])


@given(seeds=SEEDS)
@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_nothing_is_held_back_but_an_unfinished_character(kind: str, seeds: list[int]) -> None:
    codec = codec_of(kind)
    ids = ids_of(codec, seeds)
    stream, text = codec.stream([]), ""

    for end, token_id in enumerate(ids, start=1):
        text += stream.push(token_id)
        held = codec.decode(ids[:end]).removeprefix(text)
        assert text + held == codec.decode(ids[:end])
        assert held in ("", "\ufffd", "\ufffd" * 2, "\ufffd" * 3)


def test_a_literal_replacement_character_is_text() -> None:
    codec, backend = codec_of("byte fallback"), tokenizer("byte fallback").backend_tokenizer
    literal, lead = backend.token_to_id("�"), backend.token_to_id("<0xE4>")

    stream = codec.stream([])

    assert [stream.push(i) for i in [literal, literal, lead, literal]] == ["�", "�", "", "��"]


def test_an_unfinished_character_at_the_end_is_left_out_and_what_is_before_it_kept(codec: TextCodec) -> None:
    backend = codec.chat.tokenizer.backend_tokenizer
    with_space = next(i for i in range(codec.vocab_size) if codec.token_bytes(i) in (b" \xe2", b" \xc3"))

    assert streamed(codec, [], [with_space]) == " "
    assert codec.decode([with_space]) == backend.decode([with_space]) == " �"


def test_a_character_that_the_prompt_began_is_finished(codec: TextCodec) -> None:
    *begun, end = codec.chat.text_ids("🙂")

    assert streamed(codec, begun, [end]) == "🙂"
    assert streamed(codec, begun, codec.chat.text_ids("x")) == "x", "its U+FFFD belongs to the prompt"
    assert streamed(codec, begun, codec.chat.text_ids("x"), is_prompt_shown=False) == "�x"


def test_special_tokens_are_shown_if_asked_for() -> None:
    codec = codec_of("byte fallback that strips")
    ids = [1, codec.chat.tokenizer.convert_tokens_to_ids("▁hello"), 3, 2]

    assert streamed(codec, [], ids) == "hello"
    assert streamed(codec, [], ids, skip_special_tokens=False) == "<s> hello<|user|></s>"
    assert codec.token_text(1) == "<s>"
    assert codec.token_bytes(1) == b""
    assert codec.token_bytes(1, skip_special_tokens=False) == b"<s>"
