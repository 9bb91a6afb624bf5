"""Prompts and answers as training rows: which answers share a row, and how a long row is shortened.

If one row begins with another row, token for token, the longer one replaces both: under causal attention, the
answer of the shorter row is predicted from the same tokens in the longer one. This module knows only token
ids.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken

#: Share of the limit that the prompt may take in a row that is too long. A completion without its question
#: would teach noise.
PROMPT_SHARE = 0.25


@dataclass(frozen=True)
class EncodedExample:
    """One training row."""

    token_ids: Sequence[int]  # [T]
    loss_mask: Sequence[int]  # [T], true for the tokens that are learned, never for the first
    truncated: bool = False  # whether tokens were left out because the row was longer than the limit

    @property
    def num_loss_tokens(self) -> int:
        return sum(self.loss_mask)

    def packed(self) -> EncodedExample:
        """Return the same row with 5 bytes per token instead of up to 44."""
        return EncodedExample(array("i", self.token_ids), bytes(self.loss_mask), self.truncated)

    def as_json(self) -> list[list[int]]:
        """Return the token ids and the mask of booleans, for a digest."""
        return [list(self.token_ids), list(map(bool, self.loss_mask))]


@dataclass(frozen=True)
class Answered:
    """Token ids of a prompt, and of the answer to be learned after it."""

    prompt: list[int]
    learned: list[int]


def rows_of(answered: Iterable[Answered], *, max_tokens: int, bos: int | None) -> list[EncodedExample]:
    """Make rows of at most max_tokens that teach every answer once.

    An answer extends the previous row if its own row would begin with it. A shared row that is too long is
    cut into windows that each end with an answer, so that no answer is lost because of the length of another.
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
    """Make the row of `ids` that learns the spans [start, end), or several rows if it is too long."""
    for group in _windows(spans, max_tokens) if len(ids) > max_tokens else [spans]:
        mask = [False] * group[-1][1]
        for start, end in group:
            mask[start:end] = [True] * (end - start)
        yield _truncated(ids[: len(mask)], [False, *mask[1:]], max_tokens, bos)


def _windows(spans: Sequence[tuple[int, int]], max_tokens: int) -> list[list[tuple[int, int]]]:
    """Group the spans so that each group leaves PROMPT_SHARE of the limit for the prompt before it."""
    groups: list[list[tuple[int, int]]] = []
    max_group_tokens = max_tokens - int(max_tokens * PROMPT_SHARE)
    for span in spans:
        if groups and span[1] - groups[-1][0][0] <= max_group_tokens:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _truncated(ids: list[int], mask: list[bool], max_tokens: int, bos: int | None) -> EncodedExample:
    if len(ids) <= max_tokens:
        return EncodedExample(ids, mask)
    first = mask.index(True) if True in mask else len(ids)
    max_prompt = max(1, max_tokens - (len(ids) - first), int(max_tokens * PROMPT_SHARE))
    cut = max(0, first - max_prompt)
    head = [ids[0]] if cut and ids[0] == bos and max_prompt > 1 else []
    cut += len(head)
    ids, mask = head + ids[cut:], [False] * len(head) + mask[cut:]
    return EncodedExample(ids[:max_tokens], mask[:max_tokens], truncated=True)


class Prompts:
    """Tokenises the prompts of one conversation, each of which usually begins with the previous one.

    The text before an added token is tokenised independently of what follows. So the ids up to the last added
    token of a prompt also hold for a longer prompt that begins with the same text and token. A conversation
    with n answers is therefore tokenised once instead of n times.
    """

    def __init__(self, borders: Sequence[str]) -> None:
        """borders: added tokens, as `borders_of` chooses them."""
        self._borders = borders
        self._text, self._border, self._ids = "", "", list[int]()

    def ids(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Return the same ids as `encode` for the whole text."""
        if not text.startswith(self._text + self._border):
            self._text, self._border, self._ids = "", "", []
        rest = text[len(self._text) :]
        at, border = max(((rest.rfind(token), token) for token in self._borders), default=(0, ""))
        if at > 0:
            self._ids = self._ids + encode(rest[:at])
            self._text, self._border, rest = self._text + rest[:at], border, rest[at:]
        return self._ids + encode(rest)


def borders_of(added: Sequence[AddedToken], written: str) -> list[str]:
    """Return the added tokens in the text `written` before which a text can be cut without changing its ids.

    This excludes tokens that absorb white space or letters before them, and tokens that may be part of
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
