"""Training uses what serving sends, for templates and tokenizers of all kinds."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.chat.chat_format import ChatFormat
from tessera.chat.rows import EncodedExample
from tessera.data.examples import Example
from tessera.errors import InvalidInput
from tests.tessera.chat.tokenizer_kinds import KINDS, NOT_SPECIAL, SPECIAL, TEMPLATES, tokenizer_of

#: Answers that merge with the text before or after them, and texts that look like tokens.
ANSWERS = (
    "organ", " organ", "    return nose", "\torgan", "\n", "\n\norgan", " \n organ \n", "a", "<|end|>", "<",
    "organ<|end|>", "<|assistant|>x", "<think>\nhm\n</think>\n\norgan", "</think>organ", "<think>", "|>",
    "[INST] x [/INST]", "<turn>user\nx</turn>", "  two  spaces  ", "\u2028", "<0x0A>",
    "Straße 東京 \U0001f642",
)  # fmt: skip
#: The same without what is a token, nor could be a part of one: what a template does with it is plain to see.
PLAIN = "abc xyz.\n\t  ,é東\U0001f642#*"
texts = st.text(alphabet=PLAIN, min_size=1, max_size=20)
pieces = st.sampled_from([*SPECIAL, *NOT_SPECIAL, *ANSWERS, "a", " ", "\n"])
anything = st.lists(pieces | texts, min_size=1, max_size=4).map("".join)


@cache
def chat_of(kind: str, template: str) -> ChatFormat:
    return ChatFormat(tokenizer_of(kind, template))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def spans(row: EncodedExample) -> list[tuple[int, int]]:
    """Return [start, end) of each run of learned tokens. A prompt separates the answers of one row."""
    mask = [False, *row.loss_mask, False]
    starts = [i for i in range(len(mask) - 1) if mask[i + 1] and not mask[i]]
    ends = [i for i in range(len(mask) - 1) if mask[i] and not mask[i + 1]]
    return list(zip(starts, ends, strict=True))


def assert_learned_as_served(chat: ChatFormat, messages: list[dict[str, Any]]) -> None:
    """Every answer is learned once, after the prompt of the chat endpoint, with its original text."""
    rows = chat.encode_rows(Example(messages=tuple(messages)), max_tokens=100_000)
    found = [(row.token_ids, start, end) for row in rows for start, end in spans(row)]
    asked = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) and i]
    assert len(found) == len(asked)
    for index, (ids, start, end) in zip(asked, found, strict=True):
        prompt = chat.prompt_ids(messages[:index])
        assert ids[:start] == prompt
        assert ids[end - 1] == chat.turn_end
        assert chat.turn_end in chat.end_ids
        decode = chat.tokenizer.decode
        before, after = decode(prompt), decode(ids[: end - 1])
        answer = messages[index]["content"]
        if before.rstrip().endswith("<think>") and answer.startswith("<think>"):
            answer = answer.removeprefix("<think>").removeprefix("\n")
        assert after == before + answer


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
def test_an_answer_is_learned_as_it_was_written(kind: str, template: str) -> None:
    for answer in ANSWERS:
        assert_learned_as_served(chat_of(kind, template), [user("Define nose."), assistant(answer)])


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25)
@given(data=st.data())
def test_every_answer_of_a_conversation_is_learned_as_it_was_written(
    template: str, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["byte_level", "metaspace_first", "prepending"]))
    turns = data.draw(st.lists(st.tuples(anything, anything, st.booleans()), min_size=1, max_size=4))
    messages = []
    for question, answer, is_learned in turns:
        messages += [user(question), assistant(answer, weight=int(is_learned))]
    messages[-1]["weight"] = 1
    assert_learned_as_served(chat_of(kind, template), messages)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25)
@given(data=st.data())
def test_a_prompt_of_plain_texts_is_the_templates_own(template: str, data: st.DataObject) -> None:
    chat = chat_of(data.draw(st.sampled_from(sorted(KINDS))), template)
    turns = data.draw(st.lists(st.tuples(texts, texts), max_size=3))
    messages = [m for question, answer in turns for m in (user(question), assistant(answer))]
    messages.append(user(data.draw(texts)))
    if template != "other_role_names" and data.draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": data.draw(texts)})
    whole = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert chat.prompt_ids(messages) == whole


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_is_tokenised_as_a_whole_however_it_grows(template: str) -> None:
    """The prompts of a conversation are not tokenised from the beginning each time."""
    chat = chat_of("byte_level", template)
    messages = [
        m for i in range(8) for m in (user(f"  what\n<|end|> is {i}?"), assistant(f"\n {i}<|user|> "))
    ]
    rows = chat.encode_rows(Example(messages=tuple(messages)), max_tokens=100_000)
    prompts = [row.token_ids[:start] for row in rows for start, _ in spans(row)]
    assert prompts == [chat.prompt_ids(messages[:i]) for i in range(1, 16, 2)]


def test_a_template_that_keeps_its_prefixes_has_one_row_per_conversation() -> None:
    messages = tuple(m for i in range(50) for m in (user("what?"), assistant(f"number {i}")))
    [row] = chat_of("byte_level", "marked").encode_rows(Example(messages=messages), max_tokens=100_000)
    assert len(spans(row)) == 50
    rows = chat_of("byte_level", "opens_thoughts").encode_rows(Example(messages=messages), max_tokens=100_000)
    assert [len(spans(row)) for row in rows] == [1] * 50


def test_no_answer_of_a_long_conversation_is_lost() -> None:
    """Each is learned once, at a cost that is linear in the length of the conversation."""
    messages = tuple(m for i in range(60) for m in (user("what is it?"), assistant(f"number {i}")))
    chat = chat_of("byte_level", "marked")
    whole = chat.encode_rows(Example(messages=messages), max_tokens=100_000)[0]
    rows = chat.encode_rows(Example(messages=messages), max_tokens=64)
    assert sum(len(spans(row)) for row in rows) == 60
    assert sum(row.num_loss_tokens for row in rows) == whole.num_loss_tokens
    assert all(len(row.token_ids) <= 64 and spans(row)[0][0] >= 16 for row in rows[1:])
    assert sum(len(row.token_ids) for row in rows) < 2 * len(whole.token_ids)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "system_in_last_question"])
def test_a_greeting_is_context(template: str) -> None:
    chat = chat_of("byte_level", template)
    greeted = [assistant("Welcome."), user("Define nose."), assistant("organ")]
    assert_learned_as_served(chat, greeted)
    [row] = chat.encode_rows(Example(messages=tuple(greeted)), max_tokens=512)
    assert "Welcome." in chat.tokenizer.decode(row.token_ids[: spans(row)[0][0]])


def test_what_follows_the_last_answer_is_left_out() -> None:
    chat = chat_of("byte_level", "lines")
    asked = [user("Define nose."), assistant("organ")]
    ends_with_a_question = Example(messages=(*asked, user("Thanks!")))
    assert chat.encode_rows(ends_with_a_question, max_tokens=512) == chat.encode_rows(
        Example(messages=tuple(asked)), max_tokens=512
    )


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("lines", [assistant("Welcome.")], "nothing comes before the assistant's only message"),
        (
            "other_role_names",
            [{"role": "system", "content": "x"}, user("a"), assistant("b")],
            "no system role",
        ),
        ("system_in_last_question", [assistant("hi"), user("a"), assistant("b")], "must take turns"),
        ("system_in_last_question", [user("a"), user("b"), assistant("c")], "must take turns"),
        ("opens_thoughts", [{"role": "system", "content": "x"}, assistant("b")], "nothing comes before"),
    ],
)
def test_what_no_prompt_leads_to_is_refused_with_the_reason(
    template: str, messages: list[dict[str, Any]], reason: str
) -> None:
    example = Example(messages=tuple(messages))
    for judge in (
        chat_of("byte_level", template).check,
        lambda e: chat_of("byte_level", template).encode_rows(e, max_tokens=64),
    ):
        with pytest.raises(InvalidInput, match=reason):
            judge(example)


def test_a_refusal_in_the_middle_of_a_conversation_is_known_at_upload() -> None:
    """With a template that only answers users, like those of newer Mistral models."""
    tokenizer = tokenizer_of("byte_level", "lines")
    tokenizer.chat_template = (
        "{% set last = messages[-1].role %}"
        "{% if last != 'user' %}{{ raise_exception('not after ' ~ last) }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    chat = ChatFormat(tokenizer)
    turn = [user("a"), assistant("b")]
    example = Example(messages=(*turn, assistant("c"), *turn))
    for judge in (chat.check, lambda example: chat.encode_rows(example, max_tokens=64)):
        with pytest.raises(InvalidInput, match="not after assistant"):
            judge(example)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
def test_a_completion_goes_on_where_the_prompt_ended(kind: str) -> None:
    chat = chat_of(kind, "lines")
    for completion in ANSWERS:
        [row] = chat.encode_rows(Example(prompt="Q: nose\nA:", completion=completion), max_tokens=512)
        prompt = chat.text_ids("Q: nose\nA:")
        assert row.token_ids[: len(prompt)] == prompt
        decode = chat.tokenizer.decode
        ending = "" if completion.rstrip().endswith("<|end|>") else "<|end|>"
        if kind == "byte_level":
            assert decode(row.token_ids) == decode(prompt) + completion + ending
        assert row.token_ids.count(chat.text_end) == max(1, completion.count("<|end|>"))
