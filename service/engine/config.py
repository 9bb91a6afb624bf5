"""What an operator may choose about the engine. What is unset is derived from the model and the device."""

from __future__ import annotations

from dataclasses import dataclass, fields

from adapter_core.errors import InvalidInput


@dataclass(frozen=True)
class EngineConfig:
    """num_slots: adapters resident at once, per basis (slot 0, the base model, comes on top).
    max_batch_tokens, max_batch_seqs: of one step. block_size: tokens of one KV block. num_blocks goes before
    kv_cache_bytes. max_model_len: prompt and output of one sequence in tokens. max_waiting: requests that may
    wait. host_cache_bytes: adapters kept in host memory beside those that a waiting request needs.

    Raises `InvalidInput` for a number that is out of range.
    """

    num_slots: int = 256
    max_batch_tokens: int = 512
    max_batch_seqs: int = 256
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    max_model_len: int | None = None
    max_waiting: int = 4096
    host_cache_bytes: int = 256 * 1024**2
    max_resident_bases: int = 4
    enable_prefix_cache: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            lowest = 0 if field.name == "host_cache_bytes" else 1
            if value is not None and not isinstance(value, bool) and value < lowest:
                raise InvalidInput(f"{field.name} must be at least {lowest}, got {value}", param=field.name)

    @property
    def max_running(self) -> int:
        """Sequences in flight at once. One token of budget each, so that decoding never starves a prefill."""
        return min(self.max_batch_seqs, self.max_batch_tokens)
