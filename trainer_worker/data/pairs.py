"""From preference pairs to training data: encoding, and the split, which keeps a prompt's pairs together.

Knows no model and no optimizer. The two answers of a pair are one example with the rows of both
(`TrainingData.train_chosen`), so batches, epochs and evaluations are those of other data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.data.examples import for_each
from tessera.data.pairs import Pair
from trainer_worker.data.training_data import TrainingData, data_digest, validation_digests


@dataclass(frozen=True)
class _Encoded:
    chosen: list[EncodedExample]
    rejected: list[EncodedExample]

    @property
    def rows(self) -> list[EncodedExample]:
        return [*self.chosen, *self.rejected]


def encode_pairs(
    chat: ChatFormat,
    pairs: Sequence[Pair],
    *,
    max_tokens: int,
    validation: Sequence[Pair] | None = None,
    share: float | None = None,
) -> TrainingData:
    """Encode a file of pairs, and split off validation pairs unless there is a validation file.

    The split is chosen by the hashes of the prompts, so all pairs with one prompt are on one side.
    share: of the prompts that are held back; None decides by their number. Raises `InvalidTrainingData`
    with every line that the chat template refuses or that has no token to learn.
    """
    encoded = _encode(chat, pairs, max_tokens, param="training_file")
    if validation is not None:
        train, valid = encoded, _encode(chat, validation, max_tokens, param="validation_file")
        overlap = len({_identity(pair) for pair in pairs} & {_identity(pair) for pair in validation})
    else:
        prompts = [hashlib.sha256(pair.prompt.encode()).hexdigest() for pair in pairs]
        held_out = validation_digests(prompts, share)
        train = [item for item, prompt in zip(encoded, prompts, strict=True) if prompt not in held_out]
        valid = [item for item, prompt in zip(encoded, prompts, strict=True) if prompt in held_out]
        overlap = 0
    parts = [[item.rows for item in part] for part in (train, valid)]
    return TrainingData(
        tuple(chain.from_iterable(parts[0])),
        tuple(chain.from_iterable(parts[1])),
        digest=data_digest(*parts),
        num_truncated=sum(any(row.truncated for row in rows) for rows in chain(*parts)),
        num_overlapping=overlap,
        train_sizes=tuple(map(len, parts[0])),
        valid_sizes=tuple(map(len, parts[1])),
        train_chosen=tuple(len(item.chosen) for item in train),
        valid_chosen=tuple(len(item.chosen) for item in valid),
        max_tokens=max_tokens,
    )


def _encode(chat: ChatFormat, pairs: Sequence[Pair], max_tokens: int, *, param: str) -> list[_Encoded]:
    def encode(pair: Pair) -> _Encoded:
        chosen = chat.encode_rows(pair.chosen, max_tokens=max_tokens)
        return _Encoded(chosen, chat.encode_rows(pair.rejected, max_tokens=max_tokens))

    return for_each(pairs, encode, param=param)


def _identity(pair: Pair) -> str:
    chosen, rejected = pair.chosen, pair.rejected
    return repr((pair.prompt, chosen.messages or chosen.completion, rejected.messages or rejected.completion))
