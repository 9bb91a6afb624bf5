"""Every setting of the engine, written once: default, range and meaning stand beside the field.

`EngineConfig` is what the engine itself reads. `EngineSettings` is the same read from TESSERA_ENGINE_*, with
what concerns the process around the engine. The API process reads them, passes them on to the engine process
through its environment, and never changes them. The table in `docs/settings.md` is checked against the
descriptions. Imports neither the engine nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "TESSERA_ENGINE_"


class EngineConfig(BaseModel):
    """How the engine uses the model and the device. Unset values are derived from both.

    Raises pydantic's `ValidationError` for an unknown field, a number out of range or an unknown word.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Slot 0, the base model alone, is additional.
    num_slots: int = Field(default=256, ge=1, description="adapters resident at once, per basis")
    max_batch_tokens: int = Field(
        default=512, ge=1, description="tokens of one step, prefill chunks included"
    )
    max_batch_seqs: int = Field(default=256, ge=1, description="requests that run in one step")
    max_waiting: int = Field(
        default=4096, ge=1, description="requests that may wait; further ones are refused"
    )
    max_waiting_per_tenant: int = Field(
        default=2048, ge=1, description="requests of one tenant that may wait; further ones get 429"
    )
    tenant_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(
        default=None,
        description='shares of the tokens by tenant, as JSON: `{"acme": 4}`; 1 for those not named',
    )
    block_size: int = Field(default=16, ge=1, description="tokens of one KV block")
    num_blocks: int | None = Field(
        default=None, ge=1, description="KV blocks; takes precedence over kv_cache_bytes"
    )
    # Unset: see `kv/memory.py`.
    kv_cache_bytes: int | None = Field(default=None, ge=1, description="memory for the KV cache")
    # Adapters that a waiting request needs stay in host memory beyond this limit.
    host_cache_bytes: int = Field(
        default=256 * 1024**2, ge=0, description="host memory for adapters not in a slot"
    )
    max_resident_bases: int = Field(default=4, ge=1, description="bases on the device at once")
    enable_prefix_cache: bool = Field(
        default=True, description="share the KV of equal prompts of one adapter"
    )
    enable_fused: bool = Field(
        default=True,
        description="run the layers of known architectures by fused ops; `0`: always run the model's own "
        "layers",
    )
    attention: Literal["auto", "triton", "torch"] = Field(
        default="auto",
        description="`auto`: Triton kernels on CUDA if they pass a self-check at start, else torch; "
        "`triton`, `torch`: force one",
    )
    # "static" runs on any device, and is how the CPU tests reach what the graphs capture.
    decode_graphs: Literal["auto", "static", "off"] = Field(
        default="auto",
        description="steps of the fused path: `auto`: as CUDA graphs where there is CUDA; `static`: over the "
        "same static tensors, not captured; `off`: op by op",
    )
    lookahead: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="`on`, `off`: start a step before the tokens of the last one are read; `auto`: on CUDA, "
        "where the device would wait meanwhile",
    )

    @property
    def max_running(self) -> int:
        """Requests that run at once. Each has one token of the budget, so that decoding never starves a
        prefill."""
        return min(self.max_batch_seqs, self.max_batch_tokens)


class EngineSettings(EngineConfig, BaseSettings):
    """`EngineConfig` read from TESSERA_ENGINE_*, and the settings of the process around the engine."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of the engine; unset: torch's choice"
    )
    # Must exceed the longest step.
    heartbeat_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="an engine that is silent, or busy with one step, for longer is killed and replaced",
    )


def to_environment(sections: Sequence[BaseSettings]) -> dict[str, str]:
    """Return the environment from which objects equal to `sections` are read again; unset fields are left
    out."""
    variables = {}
    for section in sections:
        prefix = section.model_config.get("env_prefix", "")
        for name, value in section.model_dump(mode="json").items():
            if value is not None:
                text = value if isinstance(value, str) else json.dumps(value)
                variables[f"{prefix}{name}".upper()] = text
    return variables
