"""Incremental decoding and stop strings, with the real tokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from service.generation.text import StopStrings, TextCodec
from tessera.errors import UnsupportedModel

EMOJI = "naïve 🙂 日本語 ok"

#: Text as users write it; NFC, because the tokenizer composes what it reads.
TEXTS = st.text(alphabet="ab 🙂é日\n.", max_size=40)


def pieces(codec: TextCodec, token_ids: list[int], **options: object) -> list[str]:
    stream = codec.stream([], **options)
    shown = []
    for token_id in token_ids:
        shown.append(stream.push(token_id))
        if stream.is_stopped:
            break
    return [*shown, stream.flush()]


def stopped(codec: TextCodec, token_ids: list[int], stop: list[str]) -> str:
    """The reference implementation: decode and search everything again after every token."""
    text = ""
    for end in range(1, len(token_ids) + 1):
        text = codec.decode(token_ids[:end])
        if found := [text.find(s) for s in stop if s in text]:
            return text[: min(found)]
    return text


def test_a_character_of_several_tokens_comes_whole(codec: TextCodec) -> None:
    shown = pieces(codec, codec.chat.text_ids(EMOJI))

    assert "".join(shown) == EMOJI
    assert not any("\ufffd" in piece for piece in shown)
    assert "🙂" in shown


def test_half_a_character_at_the_end_is_dropped(codec: TextCodec) -> None:
    token_ids = codec.chat.text_ids("ok 🙂")[:-1]

    assert "".join(pieces(codec, token_ids)) == "ok "


def test_bytes_that_are_no_text_are_let_go(codec: TextCodec) -> None:
    continuation = codec.chat.text_ids("🙂")[-1]

    shown = pieces(codec, [continuation] * 20 + codec.chat.text_ids("end"))

    assert "".join(shown).endswith("end")
    assert any(shown[:10]), "nothing was shown although the bytes can never become a character"


def test_special_tokens_are_not_shown(codec: TextCodec) -> None:
    hello = codec.chat.text_ids("hello")

    assert "".join(pieces(codec, [1, *hello, 6])) == "hello"


@given(text=TEXTS)
def test_the_pieces_make_up_the_text(codec: TextCodec, text: str) -> None:
    token_ids = codec.chat.text_ids(text) if text else []

    assert "".join(pieces(codec, token_ids)) == codec.decode(token_ids)


@given(text=TEXTS, stop=st.lists(st.text(alphabet="ab 🙂", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_is_never_shown_not_even_in_part(codec: TextCodec, text: str, stop: list[str]) -> None:
    token_ids = codec.chat.text_ids(text) if text else []

    assert "".join(pieces(codec, token_ids, stop=stop)) == stopped(codec, token_ids, stop)


def test_text_that_may_begin_a_stop_string_is_held_back(codec: TextCodec) -> None:
    stream = codec.stream([], stop=["abcd"])
    shown = [stream.push(token_id) for token_id in codec.chat.text_ids("xx ab")]

    assert "".join(shown) == "xx "
    assert stream.push(codec.chat.text_ids("z")[0]) == "abz"


def test_stop_strings_are_not_looked_for_before_min_tokens(codec: TextCodec) -> None:
    token_ids = codec.chat.text_ids("one stop two stop three")
    half = len(token_ids) // 2

    text = "".join(pieces(codec, token_ids, stop=["stop"], min_tokens=half))

    assert text == "one stop two "


def test_the_earliest_of_several_stop_strings_counts() -> None:
    stop = StopStrings(["later", "late", "soon"])

    assert stop.find("as soon as later") == 3
    assert stop.find("nothing") is None
    assert StopStrings(["later", "late"], are_included=True).find("as later") == len("as late")


@given(text=TEXTS, stop=st.lists(st.text(alphabet="ab 🙂", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_may_be_a_part_of_the_text(codec: TextCodec, text: str, stop: list[str]) -> None:
    token_ids = codec.chat.text_ids(text) if text else []
    before = "".join(pieces(codec, token_ids, stop=stop))

    with_stop = "".join(pieces(codec, token_ids, stop=stop, include_stop=True))

    if any(string in codec.decode(token_ids) for string in stop):
        assert with_stop in [before + string for string in stop]
    else:
        assert with_stop == before == codec.decode(token_ids)


def test_a_token_has_bytes_and_a_name(codec: TextCodec) -> None:
    emoji = codec.chat.text_ids("🙂")

    assert bytes(byte for token_id in emoji for byte in codec.token_bytes(token_id)) == "🙂".encode()
    assert codec.token_text(emoji[0]).startswith("bytes:\\x")
    assert codec.token_text(codec.chat.text_ids("hello")[0]) == "hello"
    assert codec.token_text(6) == "<|end|>"
    assert codec.token_bytes(10**6) == b""


def test_a_tokenizer_that_strips_the_first_space_keeps_it_in_a_continuation() -> None:
    codec = TextCodec(_sentencepiece())

    stream = codec.stream([1])
    continued = "".join(stream.push(token_id) for token_id in [2, 3, 4, 5, 6])

    assert continued == " world€!"
    assert codec.token_bytes(3) == b"\xe2"
    assert codec.token_text(2) == " world"


def test_a_prompt_that_ends_within_a_character_is_not_repeated(codec: TextCodec) -> None:
    prompt = codec.chat.text_ids("hello 🙂")[:-1]
    stream = codec.stream(prompt)

    assert "hello" not in "".join(stream.push(token_id) for token_id in codec.chat.text_ids("xyz"))


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    class Slow:
        eos_token_id = 1

    with pytest.raises(UnsupportedModel):
        TextCodec(Slow())


def _sentencepiece() -> PreTrainedTokenizerFast:
    """Words with "▁" for their space, and bytes for everything else, as in SentencePiece models."""
    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5, "!": 6}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
