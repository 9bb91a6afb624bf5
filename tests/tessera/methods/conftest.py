"""A small random model and calibration data of it, once per session."""

from __future__ import annotations

import pytest

from tessera.chat.chat_format import ChatFormat
from tessera.chat.tokenizer import load_tokenizer
from tessera.data.examples import Example
from tessera.defaults import BUNDLED_MODEL
from tessera.methods.bases import CalibrationSet
from tessera.model.base_model import BaseModel
from tests.tessera.methods.matrices import small_calibration, small_model

TEXT = (
    "the kernel writes a page of memory to disk when no process has asked for it since the last pass over it"
)
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def small() -> BaseModel:
    """A Llama of two layers, 32 wide, float32. Do not modify it."""
    return small_model()


@pytest.fixture(scope="session")
def calibration() -> CalibrationSet:
    """Twelve examples of 9 to 27 random tokens, the second half of each labelled."""
    return small_calibration()


@pytest.fixture(scope="session")
def tiny_examples() -> CalibrationSet:
    """Twelve short conversations of 20 to 60 tokens, for the bundled model."""
    chat = ChatFormat(load_tokenizer(BUNDLED_MODEL))
    encoded = []
    for i in range(12):
        question, answer = WORDS[i : i + 5], WORDS[(i * 3) % 7 :] + WORDS[: i + 3]
        messages = (
            {"role": "user", "content": " ".join(question)},
            {"role": "assistant", "content": " ".join(answer)},
        )
        encoded += chat.encode_rows(Example(messages=messages), max_tokens=64)
    return CalibrationSet.from_encoded(encoded)
