"""Prompts and answers as training rows: which answers share a row, and what of a long one is kept.

Knows token ids only. A row that begins with another one, token for token, holds it: under causal attention
the shorter row's answer is predicted from the same tokens there, so one row teaches both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken

#: Of a text that is too long, this part of the limit may be prompt: a completion without its question would
#: train on noise.
PROMPT_SHARE = 0.25


@dataclass(frozen=True)
class EncodedExample:
    """One training row: token_ids [T]; loss_mask [T]: which tokens are learned (never the first).

    truncated: the row was longer than the limit, and tokens were left out.
    """

    token_ids: list[int]
    loss_mask: list[bool]
    truncated: bool = False

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.loss_mask)


@dataclass(frozen=True)
class Answered:
    """Token ids of a prompt, and of what is to be learned after it."""

    prompt: list[int]
    learned: list[int]


def rows_of(answered: Iterable[Answered], *, max_tokens: int, bos: int | None) -> list[EncodedExample]:
    """Rows of at most max_tokens that teach every answer once.

    An answer whose row begins with the row before it shares it. A shared row that is too long is cut into
    windows that end with an answer each, so that no answer is lost to another one's length.
    """
    rows: list[EncodedExample] = []
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for item in answered:
        longer = item.prompt + item.learned
        if spans and longer[: len(ids)] != ids:
            rows += _cut(ids, spans, max_tokens, bos)
            spans = []
        ids, spans = longer, [*spans, (len(item.prompt), len(longer))]
    return [*rows, *_cut(ids, spans, max_tokens, bos)]


def _cut(
    ids: list[int], spans: Sequence[tuple[int, int]], max_tokens: int, bos: int | None
) -> Iterator[EncodedExample]:
    """The row of `ids` that learns the spans [start, end), or several if it is too long."""
    for group in _windows(spans, max_tokens) if len(ids) > max_tokens else [spans]:
        mask = [False] * group[-1][1]
        for start, end in group:
            mask[start:end] = [True] * (end - start)
        yield _truncated(ids[: len(mask)], [False, *mask[1:]], max_tokens, bos)


def _windows(spans: Sequence[tuple[int, int]], max_tokens: int) -> list[list[tuple[int, int]]]:
    """The spans in groups, each of which leaves room for PROMPT_SHARE of the limit before it."""
    groups: list[list[tuple[int, int]]] = []
    room = max_tokens - int(max_tokens * PROMPT_SHARE)
    for span in spans:
        if groups and span[1] - groups[-1][0][0] <= room:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _truncated(ids: list[int], mask: list[bool], max_tokens: int, bos: int | None) -> EncodedExample:
    if len(ids) <= max_tokens:
        return EncodedExample(ids, mask)
    first = mask.index(True) if True in mask else len(ids)
    room = max(1, max_tokens - (len(ids) - first), int(max_tokens * PROMPT_SHARE))
    cut = max(0, first - room)
    head = [ids[0]] if cut and ids[0] == bos and room > 1 else []
    cut += len(head)
    ids, mask = head + ids[cut:], [False] * len(head) + mask[cut:]
    return EncodedExample(ids[:max_tokens], mask[:max_tokens], truncated=True)


class Prompts:
    """Tokenises the prompts of one conversation, of which each mostly begins with the one before.

    What stands before an added token is tokenised by itself, whatever follows, so the ids up to the last such
    token of a prompt hold for any longer prompt that begins with the same text and that token. A conversation
    of n answers is then tokenised once and not n times.
    """

    def __init__(self, borders: Sequence[str]) -> None:
        """borders: added tokens, as `borders_of` chooses them."""
        self._borders = borders
        self._text, self._border, self._ids = "", "", list[int]()

    def ids(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """As `encode` gives them for the whole text."""
        if not text.startswith(self._text + self._border):
            self._text, self._border, self._ids = "", "", []
        rest = text[len(self._text) :]
        at, border = max(((rest.rfind(token), token) for token in self._borders), default=(0, ""))
        if at > 0:
            self._ids = self._ids + encode(rest[:at])
            self._text, self._border, rest = self._text + rest[:at], border, rest[at:]
        return self._ids + encode(rest)


def borders_of(added: Sequence[AddedToken], written: str) -> list[str]:
    """The added tokens in the text `written` at which a text may be cut without a change to its ids.

    Not those that take white space or letters of what stands before them, nor those that may lie inside
    another token or begin it.
    """
    contents = [token.content for token in added]
    later = {character for content in contents for character in content[1:]}
    return [
        token.content
        for token in added
        if token.content in written
        and token.content[0] not in later
        and sum(content.startswith(token.content) for content in contents) == 1
        and not (token.lstrip or token.normalized or token.single_word)
    ]
