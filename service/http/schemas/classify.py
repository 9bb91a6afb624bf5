"""Request and response of /v1/classify, in vLLM's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from service.http.schemas.common import AdapterUsed, Answer, Measured, ModelRequest, Request, UsageReport

#: The most texts of one request.
MAX_TEXTS = 256

Text = Annotated[str, Field(min_length=1)]


class TextPair(Request):
    """Two texts that are classified together, such as a premise and a hypothesis."""

    text_a: Text
    text_b: Text


def _kind_of_item(value: Any) -> str:
    return "~text" if isinstance(value, str) else "~pair"


Item = Annotated[
    Annotated[Text, Tag("~text")] | Annotated[TextPair, Tag("~pair")], Discriminator(_kind_of_item)
]


def _kind_of_input(value: Any) -> str:
    return "~list" if isinstance(value, list) else _kind_of_item(value)


Texts = Annotated[list[Item], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]


class ClassifyRequest(ModelRequest):
    """Texts to classify with an adapter that has a classification head."""

    input: Annotated[
        Annotated[Text, Tag("~text")] | Annotated[TextPair, Tag("~pair")] | Annotated[Texts, Tag("~list")],
        Discriminator(_kind_of_input),
    ] = Field(description="A text, a pair of texts, or a list of these.")

    def texts(self) -> list[tuple[str, str | None]]:
        """Return the texts, each with its second one or None."""
        items = self.input if isinstance(self.input, list) else [self.input]
        return [(item, None) if isinstance(item, str) else (item.text_a, item.text_b) for item in items]


class ClassifiedItem(Answer):
    """The outcome for one text."""

    index: int
    label: str | None = Field(description="The most likely class; null for a regression.")
    probs: list[float] = Field(description="Probabilities by class index; for a regression the score.")
    num_classes: int


class ClassifyReport(Answer):
    """The outcomes for all texts."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifiedItem]
    usage: UsageReport
    adapter: AdapterUsed | None
    x_tessera: Measured
