"""The two files of a LoRA as PEFT saves it, as bytes. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PeftFiles:
    """The two files of a PEFT adapter directory."""

    adapter_config: bytes
    adapter_model: bytes

    def items(self) -> list[tuple[str, bytes]]:
        return [
            ("adapter_config.json", self.adapter_config),
            ("adapter_model.safetensors", self.adapter_model),
        ]
