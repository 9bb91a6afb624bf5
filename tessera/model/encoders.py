"""Encoders that can be base models: which types there are, and where the head of their classes reads.

An encoder is loaded as transformers' own class for sequence classification without its last linear layer, so
its "logits" are what that layer would read: the pooled state of a text, as that class computes it. Texts are
classified and none are generated. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Encoder:
    """One architecture."""

    #: The last linear layer of its class for sequence classification, by dotted name.
    head: str
    #: The linear layers between the encoder and the head. One that a checkpoint lacks, as a checkpoint of a
    #: masked language model usually does, becomes the identity.
    pooler: tuple[str, ...] = ()
    #: Parts of the first names of modules that are no layers of the encoder, and carry no adapters.
    outside: tuple[str, ...] = ("classifier", "pooler", "pre_classifier", "head")
    #: Whether positions are counted from pad_token_id + 1, so that the table has so many rows more.
    is_offset: bool = False
    #: Whether it tells the second of two texts from the first by token types.
    has_token_types: bool = False


_ROBERTA = Encoder("classifier.out_proj", ("classifier.dense",), is_offset=True)
#: By `model_type` of config.json. `tests/tessera/model/test_encoders.py` compares each with transformers.
ENCODERS: Mapping[str, Encoder] = {
    "bert": Encoder("classifier", ("bert.pooler.dense",), has_token_types=True),
    "distilbert": Encoder("classifier", ("pre_classifier",)),
    "electra": Encoder("classifier.out_proj", ("classifier.dense",), has_token_types=True),
    "modernbert": Encoder("classifier", ("head.dense",)),
    "roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}


def find_encoder(folder: Path) -> Encoder | None:
    """Return the encoder that is in a folder, None for any other model.

    A model of one of these types whose config.json says `is_decoder` is a causal model. A broken config.json
    counts as empty: loading the model reports what is wrong with it.
    """
    try:
        config: Any = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or config.get("is_decoder"):
        return None
    return ENCODERS.get(str(config.get("model_type")))
