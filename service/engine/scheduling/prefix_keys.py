"""Names of KV blocks by content: a SHA-256 chain over the tokens whose root says whose KV it is.

    root  = H(model id, tenant, the adapter's owner | id | version | basis | checksum, or "base")
    key_i = H(key_(i-1) | tokens of block i)

Two tenants, two adapters, two versions of one adapter or two contents under one version number have
different roots, so they never share a block, whatever their tokens are. 256 bits: equal keys are taken for
equal contents without comparing tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple

import numpy as np

from tessera.formats.adapter_ref import AdapterRef


def root_key(model_id: str, tenant: str, adapter: AdapterRef | None) -> bytes:
    whose = "base" if adapter is None else astuple(adapter)
    # JSON, because plain concatenation would let ("ab", "c") and ("a", "bc") meet.
    return hashlib.sha256(json.dumps([model_id, tenant, whose]).encode()).digest()


def chain_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(parent + np.asarray(token_ids, np.int64).tobytes()).digest()
