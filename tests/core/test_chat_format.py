"""Chat templates to tokens: what is learned, what is not, and that nothing is lost silently."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import PreTrainedTokenizerBase as Tokenizer

from adapter_core.base_model import BUNDLED_MODEL, load_tokenizer
from adapter_core.chat_format import ChatFormat, EncodedExample
from adapter_core.errors import InvalidInput
from adapter_core.examples import Example

#: Renders what the bundled template renders, without marks.
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
#: Renders an assistant message that is not the last one otherwise than the last one.
NOT_PREFIX_PRESERVING = UNMARKED.replace(
    "m['content']", "(m['content'] if loop.last or m['role'] != 'assistant' else 'cut')"
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
    encoded = bundled.encode_example(example, max_tokens=512)
    assert example.messages is not None
    prompt = bundled.prompt_ids([dict(example.messages[0])])
    assert encoded.token_ids[: len(prompt)] == prompt
    assert encoded.loss_mask == [False] * len(prompt) + [True] * (len(encoded.token_ids) - len(prompt))


@pytest.mark.parametrize("template", ["bundled", UNMARKED, MARKS_WITHOUT_END])
def test_assistant_text_and_its_end_token_are_learned_and_nothing_else(
    tokenizer: Tokenizer, template: str
) -> None:
    chat = ChatFormat(tokenizer) if template == "bundled" else with_template(template)
    encoded = chat.encode_example(TWO_TURNS, max_tokens=512)
    assert learned(chat, encoded) == "organ of quell<|end|>an office\n<|end|>"
    assert encoded.token_ids == ChatFormat(tokenizer).encode_example(TWO_TURNS, max_tokens=512).token_ids
    assert not encoded.truncated
    assert encoded.num_loss_tokens == sum(encoded.loss_mask)


@pytest.mark.parametrize("template", ["bundled", UNMARKED])
def test_weight_0_takes_an_assistant_message_out(tokenizer: Tokenizer, template: str) -> None:
    chat = ChatFormat(tokenizer) if template == "bundled" else with_template(template)
    example = conversation(
        ("user", "a"), ("assistant", "first", 0), ("user", "b"), ("assistant", "second", 1), ("user", "c")
    )
    assert learned(chat, chat.encode_example(example, max_tokens=512)) == "second<|end|>"


def test_a_one_token_answer_learns_its_end_token() -> None:
    chat = with_template(MARKS_WITHOUT_END)
    encoded = chat.encode_example(conversation(("user", "a"), ("assistant", "x")), max_tokens=512)
    assert learned(chat, encoded) == "x<|end|>"


def test_a_template_without_an_end_token_gets_the_tokenizers_own() -> None:
    chat = with_template(WITHOUT_END)
    encoded = chat.encode_example(conversation(("user", "a"), ("assistant", "foo bar")), max_tokens=512)
    assert learned(chat, encoded) == "foo bar\n<|end|>"
    assert encoded.token_ids[-1] == chat.tokenizer.eos_token_id


def test_a_template_that_is_not_prefix_preserving_is_refused() -> None:
    chat = with_template(NOT_PREFIX_PRESERVING)
    with pytest.raises(InvalidInput, match="not prefix preserving") as caught:
        chat.encode_example(TWO_TURNS, max_tokens=512)
    assert caught.value.code == "template_not_prefix_preserving"
    single = conversation(("user", "a"), ("assistant", "b"))
    assert learned(chat, chat.encode_example(single, max_tokens=512)) == "b<|end|>"


def test_without_a_template_chats_are_refused_and_plain_text_works() -> None:
    chat = with_template(None)
    assert not chat.has_template
    with pytest.raises(InvalidInput, match="no chat template"):
        chat.prompt_ids([{"role": "user", "content": "a"}])
    with pytest.raises(InvalidInput, match="no chat template"):
        chat.encode_example(TWO_TURNS, max_tokens=512)
    assert chat.encode_example(Example(prompt="a", completion=" b"), max_tokens=512).num_loss_tokens == 2


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


def test_a_completion_is_learned_with_its_end_token(bundled: ChatFormat) -> None:
    encoded = bundled.encode_example(Example(prompt="The nose is", completion=" an organ"), max_tokens=512)
    assert learned(bundled, encoded) == " an organ<|end|>"
    pair = bundled.encode_pair("The nose is", " an organ")
    assert pair.token_ids == encoded.token_ids[:-1]
    assert learned(bundled, pair) == " an organ"


def test_a_pair_with_an_empty_prompt_begins_with_the_start_token(bundled: ChatFormat) -> None:
    pair = bundled.encode_pair("", "an organ")
    assert pair.token_ids[0] == bundled.tokenizer.bos_token_id
    assert learned(bundled, pair) == "an organ"
    assert bundled.encode_pair("a", "").num_loss_tokens == 0


def test_of_a_text_everything_but_the_first_token_is_learned(bundled: ChatFormat) -> None:
    encoded = bundled.encode_example(Example(text="The nose is an organ."), max_tokens=512)
    assert encoded.loss_mask == [False] + [True] * (len(encoded.token_ids) - 1)
    with pytest.raises(InvalidInput, match="no token to learn"):
        bundled.encode_example(Example(text="a"), max_tokens=512)


def test_too_long_a_prompt_loses_its_beginning(bundled: ChatFormat) -> None:
    example = conversation(("user", "word " * 200 + "Define nose."), ("assistant", "organ of quell"))
    encoded = bundled.encode_example(example, max_tokens=40)
    text = str(bundled.tokenizer.decode(encoded.token_ids))
    assert encoded.truncated
    assert len(encoded.token_ids) == 40
    assert text.startswith("<|bos|>")
    assert text.endswith("Define nose.<|end|><|assistant|>organ of quell<|end|>")
    assert learned(bundled, encoded) == "organ of quell<|end|>"


def test_too_long_an_answer_loses_its_end(bundled: ChatFormat) -> None:
    example = conversation(("user", "Define " + "very " * 50 + "nose."), ("assistant", "organ " * 100))
    encoded = bundled.encode_example(example, max_tokens=40)
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
    encoded = bundled.encode_example(example, max_tokens=max_tokens)
    assert len(encoded.token_ids) <= max_tokens
    assert len(encoded.token_ids) == len(encoded.loss_mask)
    assert encoded.num_loss_tokens >= 1
    assert not encoded.loss_mask[0]


def test_examples_encoded_by_many_threads_are_those_encoded_alone(bundled: ChatFormat) -> None:
    question = {"role": "user", "content": "a"}
    examples = [
        Example(messages=(question, {"role": "assistant", "content": "b" * i})) for i in range(1, 200)
    ]
    alone = [bundled.encode_example(example, max_tokens=300) for example in examples]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as unlucky as can be
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda e: bundled.encode_example(e, max_tokens=300), examples))
    finally:
        sys.setswitchinterval(interval)

    assert together == alone
