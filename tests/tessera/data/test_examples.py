"""Training files: every problem is reported at once, by line, and no good line is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage

from tessera.data.examples import ExampleFile, parse_examples
from tessera.errors import InvalidTrainingData

GOOD = '{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}]}'


def problems(content: str | bytes, **limits: int) -> list[tuple[int, str]]:
    """Return (line, code) of every problem."""
    with pytest.raises(InvalidTrainingData) as caught:
        parse_examples(content.encode() if isinstance(content, str) else content, **limits)
    assert all(error.message for error in caught.value.errors)
    return [(error.line, error.code) for error in caught.value.errors]


def chat(*messages: dict[str, object], **more: object) -> str:
    return json.dumps({"messages": list(messages), **more})


def test_the_three_formats_in_one_file() -> None:
    lines = [
        chat(
            {"role": "system", "content": ""},
            {"role": "user", "content": "Hi", "weight": 0},
            {"role": "assistant", "content": "a", "weight": 0},
            {"role": "assistant", "content": "b", "weight": 1},
        ),
        '{"prompt": "", "completion": "x"}',
        '{"text": "some text"}',
    ]
    examples = parse_examples("\n".join(lines).encode())
    assert [example.line for example in examples] == [1, 2, 3]
    assert examples[0].messages is not None
    assert examples[0].messages[3] == {"role": "assistant", "content": "b", "weight": 1}
    assert (examples[1].prompt, examples[1].completion) == ("", "x")
    assert examples[2].text == "some text"


def test_byte_order_mark_crlf_blank_lines_and_u2028_are_let_pass() -> None:
    content = "\ufeff" + GOOD + "\r\n\r\n   \n" + '{"text": "a\u2028b"}' + "\r\n"
    examples = parse_examples(content.encode())
    assert [example.line for example in examples] == [1, 4]
    assert examples[1].text == "a\u2028b"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{", "invalid_json"),
        ('{"text": "a"', "invalid_json"),
        ('{"text": NaN}', "invalid_json"),
        ('{"text": -Infinity}', "invalid_json"),
        ('{"text": ' + "[" * 100_000, "invalid_json"),
        ('{"text": ' + "1" * 5_000 + "}", "invalid_json"),
        ('{"text": "a"} {"text": "b"}', "invalid_json"),
        ('{"text": "a", "text": "b"}', "duplicate_key"),
        ('{"text": "\\ud800"}', "lone_surrogate"),
        ("[1]", "not_an_object"),
        ("null", "not_an_object"),
        ("{}", "unknown_format"),
        ('{"a": 1}', "unknown_format"),
        ('{"text": 3}', "wrong_type"),
        ('{"text": "  "}', "empty_text"),
        ('{"text": "a", "label": 1}', "unknown_key"),
        ('{"prompt": "a"}', "missing_key"),
        ('{"completion": "a"}', "missing_key"),
        ('{"prompt": "a", "completion": ""}', "empty_completion"),
        ('{"prompt": null, "completion": "a"}', "missing_key"),
        ('{"messages": {}}', "wrong_type"),
        ('{"messages": []}', "empty_messages"),
        ('{"messages": ["hello"]}', "wrong_type"),
        (chat({"role": "user", "content": "a"}), "no_assistant_message"),
        (chat({"role": "assistant", "content": " \n"}), "empty_assistant"),
        (chat({"role": "assistant", "content": "a", "weight": 0}), "nothing_trained"),
        (chat({"role": "assistant", "content": "a", "weight": 0.5}), "invalid_weight"),
        (chat({"role": "assistant", "content": "a", "weight": True}), "invalid_weight"),
        (chat({"role": "assistant", "content": "a", "weight": "1"}), "invalid_weight"),
        (
            chat({"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b"}),
            "invalid_weight",
        ),
        (chat({"role": "bot", "content": "a"}), "unknown_role"),
        (chat({"role": ["user"], "content": "a"}), "wrong_type"),
        (chat({"role": "assistant", "content": None}), "missing_key"),
        (chat({"role": "assistant"}), "missing_key"),
        (chat({"content": "a"}), "missing_key"),
        (chat({"role": "assistant", "content": "a", "nmae": "x"}), "unknown_key"),
        (chat({"role": "assistant", "content": "a", "name": 3}), "wrong_type"),
        (chat({"role": "assistant", "content": "a", "name": "x" * 300}), "invalid_name"),
        (chat({"role": "assistant", "content": "a"}, tools=[{"type": "function"}]), "unsupported_tools"),
        (chat({"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}), "unsupported_tools"),
        (chat({"role": "assistant", "content": "a", "function_call": {"name": "f"}}), "unsupported_tools"),
        (chat({"role": "tool", "content": "1"}, {"role": "assistant", "content": "a"}), "unsupported_tools"),
        (chat({"role": "assistant", "content": None, "refusal": "no"}), "unsupported_content"),
        (chat({"role": "assistant", "content": "a", "reasoning_content": "hm"}), "unsupported_content"),
        (chat({"role": "assistant", "content": []}), "wrong_type"),
        (chat({"role": "assistant", "content": ["a"]}), "wrong_type"),
        (chat({"role": "assistant", "content": [{"type": "text"}]}), "missing_key"),
        (chat({"role": "assistant", "content": [{"type": "image_url"}]}), "unsupported_content"),
        (chat({"role": "assistant", "content": [{"type": ["text"]}]}), "unsupported_content"),
        (chat({"role": "assistant", "content": [{"type": "text", "text": " "}]}), "empty_assistant"),
        (chat(*[{"role": "assistant", "content": "a"}] * 2049), "too_many_messages"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', "wrong_type"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "wrong_type"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": []}', "empty_messages"),
        (
            '{"prompt": [{"role": "assistant", "content": "a"}],'
            ' "completion": [{"role": "user", "content": "b"}]}',
            "no_assistant_message",
        ),
    ],
)
def test_one_bad_line_between_good_ones_is_named(line: str, code: str) -> None:
    assert problems(f"{GOOD}\n{line}\n{GOOD}\n") == [(2, code)]


#: Lines that other tools write, and what the message says about them.
OTHER_FORMATS = {
    '{"instruction": "a", "input": "", "output": "b"}': "user is instruction and input, assistant output",
    '{"instruction": "a", "input": null, "output": "b"}': "user is instruction and input",
    '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}': "gpt is assistant",
    '{"contents": [{"role": "user", "parts": [{"text": "a"}]}]}': "role model is assistant",
    '{"system": "a", "messages": []}': "put the system text into messages",
    '{"prompt": "a", "response": "b"}': "call response completion",
    '{"question": "a", "answer": "b"}': '"role": "user"',
    '{"prompt": "a", "chosen": "b", "rejected": "c"}': "a pair of answers",
    '{"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}': "a pair of answers",
    '{"prompt": "a", "completion": "b", "label": true}': "rated answers",
    '{"input_ids": [1, 2], "labels": [1, 2]}': "token ids are not taken",
}


@pytest.mark.parametrize(("line", "advice"), OTHER_FORMATS.items())
def test_other_tools_formats_are_named_with_what_to_write_instead(line: str, advice: str) -> None:
    assert problems(f"{GOOD}\n{line}") == [(2, "other_format")]
    with pytest.raises(InvalidTrainingData, match=re.escape(advice)):
        parse_examples(line.encode())


QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "message",
    [
        {
            **ANSWER,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        },
        {**ANSWER, "tool_calls": [], "annotations": [], "refusal": None, "name": None, "weight": None},
        {**ANSWER, "annotations": [{"type": "url_citation"}], "reasoning_content": ""},
        {**ANSWER, "content": [{"type": "text", "text": "b"}]},
        {
            **ANSWER,
            "content": [{"type": "text", "text": "b", "annotations": []}, {"type": "text", "text": ""}],
        },
    ],
)
def test_what_the_official_client_writes_is_read(message: dict[str, Any]) -> None:
    [example] = parse_examples(chat(QUESTION, message, tools=None, functions=[]).encode())
    assert example.messages == (QUESTION, ANSWER)


def test_messages_of_the_official_clients_own_types_are_read() -> None:
    answer = ChatCompletionMessage(role="assistant", content="b")
    [example] = parse_examples(chat(QUESTION, answer.model_dump()).encode())
    assert example.messages == (QUESTION, ANSWER)


def test_a_developer_is_a_system_and_names_are_kept() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {**QUESTION, "name": "ann"}, ANSWER]
    [example] = parse_examples(chat(*messages).encode())
    assert example.messages == (
        {"role": "system", "content": "Be brief."},
        {**QUESTION, "name": "ann"},
        ANSWER,
    )


def test_null_is_absent_at_every_level() -> None:
    lines = [
        json.dumps(
            {"messages": [QUESTION, {**ANSWER, "weight": None}], "prompt": None, "text": None, "x": None}
        ),
        json.dumps({"messages": None, "prompt": "a", "completion": "b", "text": None}),
        json.dumps({"prompt": None, "completion": None, "text": "c"}),
    ]
    examples = parse_examples("\n".join(lines).encode())
    assert [(e.messages, e.prompt, e.completion, e.text) for e in examples] == [
        ((QUESTION, ANSWER), None, None, None),
        (None, "a", "b", None),
        (None, None, None, "c"),
    ]


def test_a_prompt_and_a_completion_of_messages_learn_the_completion() -> None:
    line = {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER, QUESTION, {**ANSWER, "weight": 0}]}
    [example] = parse_examples(json.dumps(line).encode())
    assert example.messages is not None
    assert [message.get("weight") for message in example.messages] == [None, 0, None, None, None, 0]


@pytest.mark.parametrize(
    "line",
    [
        chat(QUESTION, {"role": "assistant", "content": "", "weight": 0}, QUESTION, ANSWER),
        json.dumps(
            {"prompt": [QUESTION, {"role": "assistant", "content": " "}, QUESTION], "completion": [ANSWER]}
        ),
    ],
)
def test_an_answer_that_is_not_learned_may_be_empty_as_in_the_chat_endpoint(line: str) -> None:
    [example] = parse_examples(line.encode())
    assert example.messages is not None
    assert not example.messages[1]["content"].strip()


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ({"messages": [{"from": "human", "value": "a"}]}, "call it role"),
        ({"messages": [QUESTION, {**ANSWER, "train": True}]}, "write weight 1 for true"),
        ({"prompt": "a", "output": "b"}, "call output completion"),
        ({"instruction": "a", "context": "", "response": "b"}, "user is instruction, assistant response"),
        (
            {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {}},
            "a line of a batch",
        ),
    ],
)
def test_what_other_tools_write_gets_a_hint(line: dict[str, object], advice: str) -> None:
    with pytest.raises(InvalidTrainingData, match=advice):
        parse_examples(json.dumps(line).encode())


def test_all_problems_are_listed_at_once() -> None:
    bad_message = chat({"role": "bot", "content": 3, "x": 1}, {"role": "assistant", "content": ""})
    content = "\n".join(["{", GOOD, bad_message, '{"prompt": 1, "completion": 2, "y": 3}'])
    assert problems(content) == [
        (1, "invalid_json"),
        (3, "unknown_key"),
        (3, "wrong_type"),
        (3, "unknown_role"),
        (3, "empty_assistant"),
        (4, "unknown_key"),
        (4, "wrong_type"),
        (4, "wrong_type"),
    ]


def test_beyond_the_limit_problems_are_counted() -> None:
    with pytest.raises(InvalidTrainingData) as caught:
        parse_examples(b"{\n" * 250, max_errors=100)
    errors = caught.value.errors
    assert len(errors) == 101
    assert (errors[-1].line, errors[-1].code) == (101, "more_errors")
    assert "150 more" in errors[-1].message
    assert caught.value.num_problems == 250
    assert caught.value.message.startswith("250 problem(s)")


@pytest.mark.parametrize("content", [b"", b"\n\n  \r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_has_its_own_code(content: bytes) -> None:
    assert problems(content) == [(1, "empty_file")]
    with pytest.raises(InvalidTrainingData) as caught:
        parse_examples(content)
    assert caught.value.code == "empty_file"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_recognised(encoding: str) -> None:
    assert problems(GOOD.encode(encoding)) == [(1, "not_utf8")]


def test_latin_1_is_named_by_line_and_byte() -> None:
    content = GOOD.encode() + b"\n" + '{"text": "caf\u00e9"}'.encode("latin-1")
    assert problems(content) == [(2, "not_utf8")]
    with pytest.raises(InvalidTrainingData, match="byte 14 of the line"):
        parse_examples(content)


@pytest.mark.parametrize("content", [f"[{GOOD},{GOOD}]", f"[\n{GOOD},\n{GOOD}\n]\n", f"[{GOOD},\n{GOOD}]"])
def test_a_json_array_is_one_problem_with_a_hint(content: str) -> None:
    assert problems(content) == [(1, "json_array")]
    with pytest.raises(InvalidTrainingData, match="one JSON object per line"):
        parse_examples(content.encode())


def test_a_compressed_file_is_one_problem() -> None:
    assert problems(b"\x1f\x8b\x08\x00\n\n\nxx") == [(1, "compressed_file")]


def test_limits_are_errors_of_their_own() -> None:
    content = f"{GOOD}\n" + '{"text": "' + "a" * 200 + '"}\n' + GOOD
    assert problems(content, max_line_bytes=150) == [(2, "line_too_long")]
    assert problems("\n".join([GOOD] * 5), max_examples=3) == [(4, "too_many_examples")]
    assert len(parse_examples("\n".join([GOOD] * 3).encode(), max_examples=3)) == 3


def test_an_object_with_very_many_equal_keys_is_refused_quickly() -> None:
    # Quadratic work would exceed the time limit of the test.
    assert problems("{" + ",".join(['"k": 1'] * 100_000) + "}") == [(1, "duplicate_key")]


def is_judged(content: bytes) -> bool:
    """Check that the file gives either examples or a list of problems."""
    try:
        return bool(parse_examples(content))
    except InvalidTrainingData as error:
        return bool(error.errors)


@given(st.binary(max_size=200))
def test_any_bytes_are_judged(content: bytes) -> None:
    assert is_judged(content)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "weight", "prompt", "completion", "text"]), inner
        )
    ),
    max_leaves=12,
)


@given(st.lists(JSON_VALUES, max_size=4))
def test_any_json_is_judged(values: list[object]) -> None:
    assert is_judged("\n".join(json.dumps(value) for value in values).encode())


def test_a_file_that_is_read_again_and_again_holds_the_same_examples_and_finds_the_same_problems() -> None:
    sound = "\n".join([GOOD, "", '{"text": "b"}', GOOD]).encode()
    broken = "\n".join([GOOD, "{", '{"text": " "}']).encode()
    named = b'{"text": "a", "user": "u"}\n{"text": "b"}\n'

    file = ExampleFile(sound)

    assert len(file) == 3
    assert list(file) == list(file) == parse_examples(sound)
    for content, with_users in ((broken, False), (b"", False), (b"[]", False), (named, True), (named, False)):
        with pytest.raises(InvalidTrainingData) as expected:
            parse_examples(content, with_users=with_users)
        with pytest.raises(InvalidTrainingData) as found:
            ExampleFile(content, with_users=with_users)
        assert (found.value.errors, found.value.code) == (expected.value.errors, expected.value.code)
    with pytest.raises(InvalidTrainingData) as found:
        ExampleFile("\n".join([GOOD] * 5).encode(), max_examples=3)
    assert [(e.line, e.code) for e in found.value.errors] == [(4, "too_many_examples")]
