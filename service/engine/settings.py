"""Settings of the engine process: TESSERA_ENGINE_*, read once, frozen.

The API process reads them, passes them on to the engine process through its environment, and never changes
them. Knows neither the engine nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "TESSERA_ENGINE_"


class EngineSettings(BaseSettings):
    """How the engine uses the machine. What is unset is derived from the model and the device."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    num_slots: int = Field(default=256, ge=1, description="adapters resident at once, per basis")
    max_batch_tokens: int = Field(
        default=512, ge=1, description="tokens of one step, prefill chunks included"
    )
    max_batch_seqs: int = Field(default=256, ge=1, description="sequences of one step")
    max_waiting: int = Field(
        default=4096, ge=1, description="requests that may wait; further ones are refused"
    )
    max_waiting_per_tenant: int = Field(
        default=2048, ge=1, description="requests of one tenant that may wait; further ones get 429"
    )
    tenant_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        default=None, description="shares of the tokens by tenant, as a JSON object; 1 for those not named"
    )
    block_size: int = Field(default=16, ge=1, description="tokens of one KV block")
    num_blocks: int | None = Field(default=None, ge=1, description="KV blocks; goes before kv_cache_bytes")
    kv_cache_bytes: int | None = Field(default=None, ge=1, description="memory for the KV cache")
    host_cache_bytes: int = Field(
        default=256 * 1024**2, ge=0, description="host memory for adapters not in a slot"
    )
    max_resident_bases: int = Field(default=4, ge=1, description="bases on the device at once")
    enable_prefix_cache: bool = Field(
        default=True, description="share the KV of equal prompts of one adapter"
    )
    enable_fused: bool = Field(
        default=True,
        description="run the layers of known architectures by fused ops; 0: the model's own layers, always",
    )
    attention: Literal["auto", "triton", "torch"] = Field(
        default="auto",
        description="auto: Triton kernels on CUDA if they pass a trial at start, else torch; or force one",
    )
    decode_graphs: Literal["auto", "static", "off"] = Field(
        default="auto",
        description="steps by the fused path: auto: as CUDA graphs where there is CUDA; static: over the "
        "same static tensors, not captured; off: op by op",
    )
    lookahead: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="start a step before the last one's tokens are read; auto: on CUDA, whose device would "
        "wait meanwhile",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of the engine; unset: torch's choice"
    )
    heartbeat_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="an engine that is silent, or busy with one step, for this long is killed and started "
        "again; must exceed the longest step",
    )


def to_environment(sections: Sequence[BaseSettings]) -> dict[str, str]:
    """The environment from which objects equal to `sections` are read again; unset fields are left out."""
    variables = {}
    for section in sections:
        prefix = section.model_config.get("env_prefix", "")
        for name, value in section.model_dump(mode="json").items():
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value)
                variables[f"{prefix}{name}".upper()] = text
    return variables
