"""Files of preference pairs: every form gives the same pair, and every problem is found by its line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tessera.data.examples import Example, parse_examples
from tessera.data.pairs import Pair, holds_pairs, parse_pairs
from tessera.errors import InvalidTrainingData

ASK = {"role": "user", "content": "What color is the sky?"}
BLUE, GREEN = ({"role": "assistant", "content": f"It is {color}."} for color in ("blue", "green"))


def openai(chosen: Any = (BLUE,), rejected: Any = (GREEN,), **more: Any) -> str:
    value = {
        "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
        "preferred_output": list(chosen) if isinstance(chosen, tuple) else chosen,
        "non_preferred_output": list(rejected) if isinstance(rejected, tuple) else rejected,
    }
    return json.dumps({**value, **more})


def trl(**value: Any) -> str:
    return json.dumps(value)


GOOD = openai()


def only(line: str) -> Pair:
    [pair] = parse_pairs(line.encode())
    return pair


def problems(text: str) -> list[tuple[int, str]]:
    with pytest.raises(InvalidTrainingData) as caught:
        parse_pairs(text.encode())
    return [(error.line, error.code) for error in caught.value.errors]


@pytest.mark.parametrize(
    "line",
    [
        GOOD,
        trl(prompt=[ASK], chosen=[BLUE], rejected=[GREEN]),
        trl(chosen=[ASK, BLUE], rejected=[ASK, GREEN]),
        trl(prompt=ASK["content"], chosen=[ASK, BLUE], rejected=[ASK, GREEN]),
        trl(rejected=[ASK, GREEN], chosen=[ASK, BLUE], prompt=None),
    ],
    ids=["OpenAI", "explicit", "implicit", "with its prompt repeated", "other order"],
)
def test_every_form_of_a_conversation_gives_the_same_pair(line: str) -> None:
    pair = only(line)
    assert pair.chosen == Example(messages=(ASK, BLUE), line=1)
    assert pair.rejected == Example(messages=(ASK, GREEN), line=1)
    assert pair.prompt == only(GOOD).prompt


@pytest.mark.parametrize(
    ("line", "prompt", "chosen", "rejected"),
    [
        (trl(prompt="The sky is", chosen=" blue.", rejected=" green."), "The sky is", " blue.", " green."),
        (trl(chosen="The sky is blue.", rejected="The sky is green."), "The sky is", " blue.", " green."),
        (trl(chosen="It is black", rejected="It is blue"), "It is", " black", " blue"),
        (trl(chosen="It is", rejected="It is blue"), "It", " is", " is blue"),
        (
            trl(chosen="\n\nHuman: Hi\n\nAssistant: Hello.", rejected="\n\nHuman: Hi\n\nAssistant: No."),
            "\n\nHuman: Hi\n\nAssistant:",
            " Hello.",
            " No.",
        ),
        (trl(chosen="Yes", rejected="No"), "", "Yes", "No"),
    ],
)
def test_texts_are_split_between_words(line: str, prompt: str, chosen: str, rejected: str) -> None:
    pair = only(line)
    assert pair.chosen == Example(prompt=prompt, completion=chosen, line=1)
    assert pair.rejected == Example(prompt=prompt, completion=rejected, line=1)


def test_earlier_answers_belong_to_the_prompt_and_are_not_learned() -> None:
    before = [ASK, BLUE, {"role": "user", "content": "Sure?"}]
    answers = [{"role": "assistant", "content": text} for text in ("Yes.", "No.")]
    expected = (ASK, {**BLUE, "weight": 0}, before[2], answers[0])
    for line in (
        openai((answers[0],), (answers[1],), input={"messages": before}),
        trl(chosen=[*before, answers[0]], rejected=[*before, answers[1]]),
    ):
        assert only(line).chosen.messages == expected


def test_a_file_may_mix_the_forms() -> None:
    more = trl(chosen=[ASK, BLUE], rejected=[ASK, {"role": "assistant", "content": "No idea."}])
    texts = trl(prompt="a", chosen=" b", rejected=" c")
    assert [pair.line for pair in parse_pairs(f"{GOOD}\n\n{more}\n{texts}".encode())] == [1, 3, 4]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (openai(rejected=(BLUE,)), "identical_answers"),
        (trl(chosen=[ASK, BLUE], rejected=[ASK, BLUE]), "identical_answers"),
        (trl(prompt="a", chosen=" b", rejected=" b"), "identical_answers"),
        (openai(chosen=({"role": "assistant", "content": " "},)), "empty_assistant"),
        (openai(chosen=()), "empty_messages"),
        (trl(prompt="a", chosen=" ", rejected=" b"), "empty_answer"),
        (trl(chosen=[ASK, BLUE], rejected=[ASK]), "empty_answer"),
        (openai(input=None), "missing_key"),
        (openai(input={}), "missing_key"),
        (openai(input="What?"), "wrong_type"),
        (openai(rejected=None), "missing_key"),
        (openai(rejected="green"), "wrong_type"),
        (openai(input={"messages": [ASK], "tools": [{"type": "function"}]}), "unsupported_tools"),
        (openai(chosen=(ASK,)), "no_assistant_message"),
        (openai(chosen=({**BLUE, "weight": 0},)), "nothing_trained"),
        (openai(score=1), "unknown_key"),
        (trl(prompt="a", chosen="b"), "missing_key"),
        (trl(prompt="a", rejected="b"), "missing_key"),
        (trl(prompt="a", chosen="b", rejected=[GREEN]), "wrong_type"),
        (trl(prompt="a", chosen=1, rejected=2), "wrong_type"),
        (trl(prompt=[ASK], chosen="b", rejected="c"), "wrong_type"),
        (trl(prompt="Other words", chosen=[ASK, BLUE], rejected=[ASK, GREEN]), "wrong_type"),
        (trl(prompt="a", chosen=[BLUE], rejected=[GREEN]), "wrong_type"),
        (trl(chosen=[ASK, BLUE], rejected=[{**ASK, "content": "?"}, GREEN]), "different_prompts"),
        (trl(prompt="a", chosen="b", rejected="c", margin=0.5), "unknown_key"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "not_a_pair"),
        ("{}", "not_a_pair"),
        ("[]", "not_an_object"),
    ],
)
def test_one_bad_line_between_good_ones_is_named(line: str, code: str) -> None:
    found = problems(f"{GOOD}\n{line}\n{GOOD}\n")
    assert {number for number, _ in found} == {2}
    assert code in [name for _, name in found]


def test_all_problems_are_reported_at_once() -> None:
    bad = [openai(rejected=(BLUE,)), "{", trl(prompt="a", chosen="b")]
    assert problems("\n".join([GOOD, *bad])) == [
        (2, "identical_answers"), (3, "invalid_json"), (4, "missing_key"),
    ]  # fmt: skip


def test_a_pair_in_both_orders_is_a_problem_of_the_later_line() -> None:
    """However the two are written: the line that contradicts says which one it contradicts."""
    turned = trl(chosen=[ASK, GREEN], rejected=[ASK, BLUE])
    other = openai(
        input={"messages": [{**ASK, "content": "And at night?"}]}, chosen=(GREEN,), rejected=(BLUE,)
    )
    assert problems("\n".join([GOOD, other, GOOD, turned])) == [(4, "contradicting_pairs")]
    with pytest.raises(InvalidTrainingData, match="line 1 prefers"):
        parse_pairs("\n".join([GOOD, turned]).encode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, True),
        (f"\n\n{trl(chosen='a', rejected='b')}", True),
        (f"{{\n{GOOD}", True),
        ('{"rejected": "a"}', True),
        ('{"messages": []}', False),
        (f'{{"text": "a"}}\n{GOOD}', False),
        ("", False),
        ("[1]", False),
        ("\x1f\x8b", False),
    ],
)
def test_the_first_readable_line_says_what_a_file_holds(text: str, expected: bool) -> None:
    assert holds_pairs(text.encode()) is expected


def test_a_file_without_pairs_is_refused() -> None:
    assert problems("\n") == [(1, "empty_file")]


def test_pairs_among_other_examples_are_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidTrainingData, match="a file of their own, for jobs with the method dpo"):
        parse_examples(f'{{"text": "a"}}\n{GOOD}'.encode())
