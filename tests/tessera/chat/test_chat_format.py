"""From chat templates to tokens: what is learned, what is not, and that nothing is lost silently.

Over templates and tokenizers of all kinds: `test_prompts_and_answers.py`.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase as Tokenizer

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.chat.end_tokens import named_end_tokens
from tessera.chat.tokenizer import load_tokenizer
from tessera.data.examples import Example
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import InvalidInput
from tests.tessera.chat.tokenizer_kinds import TEMPLATES, tokenizer_of

#: Renders the same as the bundled template, without marks.
UNMARKED = (
    "{{- bos_token -}}{%- for m in messages -%}{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
#: Marks that leave out the token that ends the turn.
MARKS_WITHOUT_END = UNMARKED.replace(
    "m['content'] + '<|end|>' -}}",
    "'' -}}{%- generation -%}{{- m['content'] -}}{%- endgeneration -%}{{- '<|end|>' -}}",
)
#: Closes no turn with any special token.
WITHOUT_END = (
    "{%- for m in messages -%}{{- m['role'] + ':\n' + m['content'] + '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:\n' -}}{%- endif -%}"
)
REFUSING = "{{- raise_exception('roles must alternate') -}}"


def with_template(template: str | None) -> ChatFormat:
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def bundled(tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)


def conversation(*turns: tuple[str, str] | tuple[str, str, int]) -> Example:
    keys = ("role", "content", "weight")
    return Example(messages=tuple(dict(zip(keys, turn, strict=False)) for turn in turns))


TWO_TURNS = conversation(
    ("system", "Be brief."), ("user", "Define nose."), ("assistant", "organ of quell"),
    ("user", "And\nconsul?"), ("assistant", "an office\n"),
)  # fmt: skip


def one_row(chat: ChatFormat, example: Example, *, max_tokens: int = 512) -> EncodedExample:
    [row] = chat.encode_rows(example, max_tokens=max_tokens)
    return row


def learned(chat: ChatFormat, encoded: EncodedExample) -> str:
    ids = [
        token for token, is_learned in zip(encoded.token_ids, encoded.loss_mask, strict=True) if is_learned
    ]
    return str(chat.tokenizer.decode(ids))


def test_prompt_ids_are_the_template_with_the_assistant_opened(bundled: ChatFormat) -> None:
    ids = bundled.prompt_ids([{"role": "user", "content": "Define nose."}])
    assert bundled.tokenizer.decode(ids) == "<|bos|><|user|>Define nose.<|end|><|assistant|>"


def test_training_tokens_begin_with_the_prompt_that_serving_sends(bundled: ChatFormat) -> None:
    example = conversation(("user", "Define nose."), ("assistant", "organ of quell"))
    encoded = one_row(bundled, example)
    assert example.messages is not None
    prompt = bundled.prompt_ids([dict(example.messages[0])])
    assert encoded.token_ids[: len(prompt)] == prompt
    assert encoded.loss_mask == [False] * len(prompt) + [True] * (len(encoded.token_ids) - len(prompt))


@pytest.mark.parametrize("template", ["bundled", UNMARKED, MARKS_WITHOUT_END])
def test_assistant_text_and_its_end_token_are_learned_and_nothing_else(
    tokenizer: Tokenizer, template: str
) -> None:
    chat = ChatFormat(tokenizer) if template == "bundled" else with_template(template)
    encoded = one_row(chat, TWO_TURNS)
    assert learned(chat, encoded) == "organ of quell<|end|>an office\n<|end|>"
    assert encoded.token_ids == one_row(ChatFormat(tokenizer), TWO_TURNS).token_ids
    assert not encoded.truncated
    assert encoded.num_loss_tokens == sum(encoded.loss_mask)


@pytest.mark.parametrize("template", ["bundled", UNMARKED])
def test_weight_0_takes_an_assistant_message_out(tokenizer: Tokenizer, template: str) -> None:
    chat = ChatFormat(tokenizer) if template == "bundled" else with_template(template)
    example = conversation(
        ("user", "a"), ("assistant", "first", 0), ("user", "b"), ("assistant", "second", 1), ("user", "c")
    )
    assert learned(chat, one_row(chat, example)) == "second<|end|>"


def test_a_one_token_answer_learns_its_end_token() -> None:
    chat = with_template(MARKS_WITHOUT_END)
    encoded = one_row(chat, conversation(("user", "a"), ("assistant", "x")))
    assert learned(chat, encoded) == "x<|end|>"


def test_a_template_without_an_end_token_gets_the_tokenizers_own() -> None:
    chat = with_template(WITHOUT_END)
    encoded = one_row(chat, conversation(("user", "a"), ("assistant", "foo bar")))
    assert learned(chat, encoded) == "foo bar<|end|>"
    assert encoded.token_ids[-1] == chat.turn_end == chat.tokenizer.eos_token_id


def test_without_a_template_chats_are_refused_and_plain_text_works() -> None:
    chat = with_template(None)
    assert not chat.has_template
    with pytest.raises(InvalidInput, match="no chat template"):
        chat.prompt_ids([{"role": "user", "content": "a"}])
    with pytest.raises(InvalidInput, match="no chat template"):
        one_row(chat, TWO_TURNS)
    assert one_row(chat, Example(prompt="a", completion=" b")).num_loss_tokens == 2


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"role": "user", "content": "\ud800"}]])
def test_messages_that_cannot_be_encoded_are_refused(
    bundled: ChatFormat, messages: list[dict[str, str]]
) -> None:
    with pytest.raises(InvalidInput):
        bundled.prompt_ids(messages)


def test_the_templates_own_refusal_reaches_the_caller() -> None:
    with pytest.raises(InvalidInput, match="roles must alternate") as caught:
        with_template(REFUSING).prompt_ids([{"role": "user", "content": "a"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("completion", [" an organ", " an organ<|end|>", " an organ<|end|>\n", "<|end|>"])
def test_a_completion_is_learned_with_one_end_token(bundled: ChatFormat, completion: str) -> None:
    encoded = one_row(bundled, Example(prompt="The nose is", completion=completion))
    assert learned(bundled, encoded) == (completion if "<|end|>" in completion else f"{completion}<|end|>")


def test_a_pair_with_an_empty_prompt_begins_with_the_start_token(bundled: ChatFormat) -> None:
    encoded = one_row(bundled, Example(prompt="", completion="an organ"))
    assert encoded.token_ids[0] == bundled.tokenizer.bos_token_id
    assert learned(bundled, encoded) == "an organ<|end|>"


@pytest.mark.parametrize(
    "text",
    ["The nose.", "The nose.<|end|>", "a<|end|>b", "The nose.<|end|><|end|>", "The nose.<|end|>\n", "a"],
)
def test_a_text_is_learned_as_it_was_written_with_an_end_token(bundled: ChatFormat, text: str) -> None:
    encoded = one_row(bundled, Example(text=text))
    assert encoded.loss_mask == [False] + [True] * (len(encoded.token_ids) - 1)
    whole = text if text.rstrip().endswith("<|end|>") else f"{text}<|end|>"
    assert bundled.tokenizer.decode(encoded.token_ids) == whole


def test_a_text_of_one_end_token_has_nothing_to_learn(bundled: ChatFormat) -> None:
    for judge in (bundled.check, lambda example: bundled.encode_rows(example, max_tokens=8)):
        with pytest.raises(InvalidInput, match="no token to learn"):
            judge(Example(text="<|end|>"))


def test_raw_prompts_keep_the_tokens_that_are_written_in_them(bundled: ChatFormat) -> None:
    ids = bundled.text_ids("<|bos|><|user|>a<|end|><|end|>")
    assert bundled.tokenizer.convert_ids_to_tokens(ids) == ["<|bos|>", "<|user|>", "a", "<|end|>", "<|end|>"]


def test_no_start_token_is_doubled_and_no_end_token_added_to_a_prompt() -> None:
    chat = ChatFormat(tokenizer_of("with_bos_and_eos", "lines"))
    bos, end = chat.tokenizer.bos_token_id, chat.tokenizer.eos_token_id
    assert chat.text_ids("a") == [bos, *chat.tokenizer("a", add_special_tokens=False)["input_ids"]]
    assert chat.text_ids("<|bos|>a") == chat.text_ids("a")
    assert chat.text_ids("") == [bos]
    assert chat.text_ids("a<|end|>") == [*chat.text_ids("a"), end]
    assert chat.prompt_ids([{"role": "user", "content": "<|bos|>a"}]).count(bos) == 1
    assert one_row(chat, Example(prompt="<|bos|>a", completion="b")).token_ids.count(bos) == 1


def test_too_long_a_prompt_loses_its_beginning(bundled: ChatFormat) -> None:
    example = conversation(("user", "word " * 200 + "Define nose."), ("assistant", "organ of quell"))
    encoded = one_row(bundled, example, max_tokens=40)
    text = str(bundled.tokenizer.decode(encoded.token_ids))
    assert encoded.truncated
    assert len(encoded.token_ids) == 40
    assert text.startswith("<|bos|>")
    assert text.endswith("Define nose.<|end|><|assistant|>organ of quell<|end|>")
    assert learned(bundled, encoded) == "organ of quell<|end|>"


def test_too_long_an_answer_loses_its_end(bundled: ChatFormat) -> None:
    example = conversation(("user", "Define " + "very " * 50 + "nose."), ("assistant", "organ " * 100))
    encoded = one_row(bundled, example, max_tokens=40)
    text = str(bundled.tokenizer.decode(encoded.token_ids))
    assert encoded.truncated
    assert len(encoded.token_ids) == 40
    assert "nose.<|end|><|assistant|>organ organ" in text
    assert encoded.num_loss_tokens == 30


@pytest.mark.parametrize("max_tokens", [2, 3, 5, 8, 13, 21, 34])
@pytest.mark.parametrize(
    "example",
    [
        TWO_TURNS,
        Example(prompt="word " * 30, completion=" more" * 30),
        Example(prompt="", completion="word " * 40),
        Example(text="word " * 40),
    ],
)
def test_truncation_keeps_the_limit_and_something_to_learn(
    bundled: ChatFormat, example: Example, max_tokens: int
) -> None:
    for encoded in bundled.encode_rows(example, max_tokens=max_tokens):
        assert len(encoded.token_ids) <= max_tokens
        assert len(encoded.token_ids) == len(encoded.loss_mask)
        assert encoded.num_loss_tokens >= 1
        assert not encoded.loss_mask[0]


def test_examples_encoded_by_many_threads_are_those_encoded_alone(bundled: ChatFormat) -> None:
    question = {"role": "user", "content": "a"}
    examples = [
        Example(messages=(question, {"role": "assistant", "content": "b" * i})) for i in range(1, 200)
    ]
    alone = [one_row(bundled, example, max_tokens=300) for example in examples]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # provokes races
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda e: one_row(bundled, e, max_tokens=300), examples))
    finally:
        sys.setswitchinterval(interval)

    assert together == alone


def test_the_end_of_a_turn_is_what_the_template_writes_and_where_generation_stops() -> None:
    """A base model with another end token than its template."""
    tokenizer = tokenizer_of("byte_level", "lines")
    tokenizer.eos_token = "<|return|>"
    chat = ChatFormat(tokenizer, eos_token_ids=[7])
    end, own = tokenizer.convert_tokens_to_ids(["<|end|>", "<|return|>"])
    assert (chat.turn_end, chat.text_end) == (end, own)
    assert chat.end_ids == tuple(sorted({7, end, own}))
    assert one_row(chat, conversation(("user", "a"), ("assistant", "b"))).token_ids[-1] == end
    assert one_row(chat, Example(text="ab")).token_ids[-1] == own


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATES["opens_last_turn"], "<|end|>"),
        # Every turn begins with a token and none ends with one, so the end of a text ends a turn.
        ("{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}{% endfor %}", "<|return|>"),
        ("{% for m in messages %}{{ '<|message|>' ~ m.role ~ m.content }}{% endfor %}", "<|return|>"),
        (
            "<|system|>x{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}{% endfor %}",
            "<|return|>",
        ),
    ],
)
def test_a_last_turn_that_the_template_leaves_open_ends_like_the_others(template: str, end: str) -> None:
    tokenizer = tokenizer_of("byte_level")
    tokenizer.chat_template, tokenizer.eos_token = template, "<|return|>"
    chat = ChatFormat(tokenizer)
    assert chat.turn_end == tokenizer.convert_tokens_to_ids(end)
    assert chat.turn_end in chat.end_ids


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, ()),
        ({"config.json": {"eos_token_id": 5}}, (5,)),
        ({"config.json": {"eos_token_id": [5, 6]}}, (5, 6)),
        ({"config.json": {"eos_token_id": None}}, ()),
        ({"config.json": {"text_config": {"eos_token_id": [5]}}}, (5,)),
        ({"config.json": {"eos_token_id": 5}, "generation_config.json": {"eos_token_id": [7, 8]}}, (7, 8)),
        ({"config.json": {"eos_token_id": 5}, "generation_config.json": {"do_sample": True}}, (5,)),
        ({"config.json": {"eos_token_id": 5}, "generation_config.json": {"eos_token_id": 0}}, (0,)),
    ],
)
def test_end_tokens_are_those_that_the_files_name(
    tmp_path: Path, files: dict[str, Any], named: tuple[int, ...]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert named_end_tokens(tmp_path) == named


def test_a_date_is_fixed_for_a_job_and_is_todays_for_others() -> None:
    chat = ChatFormat(tokenizer_of("byte_level", "channels"))
    asked = [{"role": "user", "content": "a"}]
    then = chat.at(datetime(2024, 2, 29, 23, 59, tzinfo=UTC))
    assert "2024-02-29" in chat.tokenizer.decode(then.prompt_ids(asked))
    example = conversation(("user", "a"), ("assistant", "b"))
    assert "2024-02-29" in chat.tokenizer.decode(one_row(then, example).token_ids)
    today = chat.tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert chat.prompt_ids(asked) == today


def test_template_variables_reach_the_template() -> None:
    chat = ChatFormat(tokenizer_of("byte_level", "forgets_thoughts"))
    asked = [{"role": "user", "content": "a"}]
    thinking = chat.tokenizer.decode(chat.prompt_ids(asked, variables={"enable_thinking": True}))
    plain = chat.tokenizer.decode(chat.prompt_ids(asked, variables={"enable_thinking": False}))
    assert plain == f"{thinking}<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{{ a }}{% set a = 1 %}{{ a }}", {"a"}),
        ("{% set a = 1 %}{{ a }}", set()),
        ("{% if x %}{% set a = 1 %}{% else %}{% set a = 2 %}{% endif %}{{ a }}", {"x"}),
        ("{% if x %}{% set a = 1 %}{% elif y %}{% set a = 2 %}{% endif %}{{ a }}", {"a", "x", "y"}),
        ("{% if a is not defined %}{% set a = 1 %}{% endif %}{{ a }}", {"a"}),
        ("{% for m in messages %}{% set a = m %}{{ a }}{% endfor %}", set()),
        ("{% for m in messages %}{% set a = m %}{% endfor %}{{ a }}{{ loop }}", {"a", "loop"}),
        ("{% for k, v in a.items() if v %}{{ k ~ v ~ loop.index }}{% else %}{{ k }}{% endfor %}", {"a", "k"}),
        ("{% macro f(p, q=d) %}{{ p ~ q ~ r }}{% endmacro %}{{ f(1) }}", {"d", "r"}),
        ("{% set ns = namespace(a=b) %}{% set ns.c = ns.a %}{{ ns.c }}", {"b"}),
        ("{% set a %}{{ b }}{% endset %}{{ a }}", {"b"}),
        ("{% set a, b = c %}{{ a ~ b }}", {"c"}),
        ("{% generation %}{{ a }}{% endgeneration %}", {"a"}),
        ("{% filter upper %}{{ a }}{% endfilter %}", {"a"}),
        ("{{ x if y else z }}", {"x", "y", "z"}),
    ],
)
def test_variables_are_the_names_that_a_template_reads_before_it_sets_them(
    source: str, names: set[str]
) -> None:
    tokenizer = tokenizer_of("byte_level")
    tokenizer.chat_template = source
    assert ChatFormat(tokenizer).template_variables == names
