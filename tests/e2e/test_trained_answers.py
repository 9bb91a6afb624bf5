"""What was trained through the API comes back through the API, where the two once saw different tokens.

An answer that begins with white space merges with the end of a prompt that is tokenised together with it, if
that is a line break as in this template. An end token that is written in a text has to be learned. Each has a
control: the same as prompt and completion.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tessera.chat.tokenizer import load_tokenizer
from tessera.defaults import BUNDLED_MODEL
from tests.e2e.conftest import Stack
from tests.tessera.chat.tokenizer_kinds import TEMPLATES
from tests.waiting import wait_until_sync

pytestmark = pytest.mark.xdist_group("e2e")

WORDS = ("nose", "hand", "lamp", "door", "salt", "corn")
ASKED = {word: [{"role": "user", "content": f"Define {word}."}] for word in WORDS}
INDENTED = {word: f"    return {word}\n" for word in WORDS}
SHORT = {word: f" thing {number}." for number, word in enumerate(WORDS)}
FILES: dict[str, list[dict[str, Any]]] = {
    "indent": [
        {"messages": [*ASKED[word], {"role": "assistant", "content": INDENTED[word]}]} for word in WORDS
    ],
    "indent-pair": [
        {"prompt": f"<|bos|><|user|>\nDefine {word}.<|end|>\n<|assistant|>\n", "completion": INDENTED[word]}
        for word in WORDS
    ],
    "text": [{"text": f"Q: Define {word}.\nA:{SHORT[word]}<|end|>"} for word in WORDS],
    "text-pair": [{"prompt": f"Q: Define {word}.\nA:", "completion": SHORT[word]} for word in WORDS],
}


@pytest.fixture(scope="module")
def lines_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack over the bundled model with another chat template."""
    model = tmp_path_factory.mktemp("models") / "lines"
    shutil.copytree(BUNDLED_MODEL, model)
    (model / "chat_template.jinja").write_text(TEMPLATES["lines"], encoding="utf-8")
    running = Stack(tmp_path_factory.mktemp("stack"), TESSERA_BASE_MODEL=str(model))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def trained(lines_stack: Stack) -> openai.OpenAI:
    """Adapters named as their files, trained side by side until they know them by heart."""
    client, jobs = lines_stack.client, []
    for name, lines in FILES.items():
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=(f"{name}.jsonl", content), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="lines",
            training_file=file.id,
            seed=1,
            hyperparameters={"n_epochs": 40, "batch_size": 6, "learning_rate_multiplier": 3},
            extra_body={"adapter": {"id": name, "rank": 16}},
        )
        jobs.append(job.id)

    def has_ended() -> bool:
        statuses = {client.fine_tuning.jobs.retrieve(job).status for job in jobs}
        assert "failed" not in statuses
        return statuses == {"succeeded"}

    wait_until_sync(has_ended)
    return client


def test_the_answers_would_merge_with_their_prompts() -> None:
    """Or nothing would be shown here."""
    tokenizer = load_tokenizer(BUNDLED_MODEL)
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\n", INDENTED["nose"])]
    assert tokenizer("\n" + INDENTED["nose"], add_special_tokens=False)["input_ids"] != apart[0] + apart[1]


@pytest.mark.parametrize("name", ["indent", "indent-pair"])
def test_an_answer_that_begins_with_white_space_comes_back(trained: openai.OpenAI, name: str) -> None:
    for word, messages in ASKED.items():
        answer = trained.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=20)
        choice = answer.choices[0]
        assert (choice.message.content, choice.finish_reason) == (INDENTED[word], "stop")


@pytest.mark.parametrize("name", ["text", "text-pair"])
def test_an_end_token_that_was_written_ends_the_answer(trained: openai.OpenAI, name: str) -> None:
    for word in WORDS:
        prompt = f"Q: Define {word}.\nA:"
        choice = trained.completions.create(model=name, prompt=prompt, temperature=0, max_tokens=20).choices[
            0
        ]
        assert (choice.text, choice.finish_reason) == (SHORT[word], "stop")
