"""What an operator may choose about the engine. What is unset is derived from the model and the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from tessera.errors import InvalidInput

#: Words that a field may be.
CHOICES = {
    "attention": ("auto", "triton", "torch"),
    "decode_graphs": ("auto", "static", "off"),
    "lookahead": ("auto", "on", "off"),
}


@dataclass(frozen=True)
class EngineConfig:
    """num_slots: adapters resident at once, per basis (slot 0, the base model, comes on top).
    max_batch_tokens, max_batch_seqs: of one step. block_size: tokens of one KV block. num_blocks goes before
    kv_cache_bytes. max_model_len: prompt and output of one sequence in tokens. max_waiting: requests that may
    wait, of all tenants and of one. tenant_weights: shares of the tokens by tenant, 1 for those not named.
    host_cache_bytes: adapters kept in host memory beside those that a waiting request needs. enable_fused:
    run the layers of known architectures by our own ops. attention: see `backend.py`. decode_graphs:
    steps by the fused path run over static tensors, "auto": on CUDA, as CUDA graphs; "static": on any
    device, not captured (what the graphs are tested by); "off": never. lookahead: start a step before the
    last one's tokens are read, "on", "off", or "auto": on CUDA, where the device would wait meanwhile.

    Raises `InvalidInput` for a number that is out of range or a word that is unknown.
    """

    num_slots: int = 256
    max_batch_tokens: int = 512
    max_batch_seqs: int = 256
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    max_model_len: int | None = None
    max_waiting: int = 4096
    max_waiting_per_tenant: int = 2048
    tenant_weights: Mapping[str, float] | None = None
    host_cache_bytes: int = 256 * 1024**2
    max_resident_bases: int = 4
    enable_prefix_cache: bool = True
    enable_fused: bool = True
    attention: str = "auto"
    decode_graphs: str = "auto"
    lookahead: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = 0 if field.name == "host_cache_bytes" else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < lowest:
                raise InvalidInput(f"{field.name} must be at least {lowest}, got {value}", param=field.name)
        for name, words in CHOICES.items():
            if getattr(self, name) not in words:
                raise InvalidInput(
                    f"{name} is one of {', '.join(words)}, got {getattr(self, name)!r}", param=name
                )
        for tenant, weight in (self.tenant_weights or {}).items():
            if not 0 < weight < math.inf:
                raise InvalidInput(
                    f"the weight of {tenant} must be above 0, got {weight}", param="tenant_weights"
                )

    @property
    def max_running(self) -> int:
        """Sequences in flight at once. One token of budget each, so that decoding never starves a prefill."""
        return min(self.max_batch_seqs, self.max_batch_tokens)
