"""The engine's settings are written once: read from the environment they are the engine's configuration, and
`docs/settings.md` describes each as the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.engine.settings import PREFIX, EngineConfig, EngineSettings

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"
OF_THE_PROCESS = {"threads", "heartbeat_timeout_s"}


def test_settings_are_the_configuration_that_the_engine_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {
        "num_slots": 5,
        "block_size": 8,
        "num_blocks": 9,
        "enable_prefix_cache": False,
        "max_waiting_per_tenant": 7,
        "tenant_weights": {"acme": 2.5},
    }
    for name, value in chosen.items():
        monkeypatch.setenv(f"{PREFIX}{name}".upper(), str(value).replace("'", '"'))

    settings = EngineSettings()

    assert isinstance(settings, EngineConfig)
    assert settings.model_dump(exclude=OF_THE_PROCESS) == EngineConfig(**chosen).model_dump()
    assert EngineSettings.model_fields.keys() - EngineConfig.model_fields.keys() == OF_THE_PROCESS


def test_the_configuration_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_ENGINE_NUM_SLOTS", "5")

    assert EngineConfig().num_slots == 256


def test_the_documentation_describes_every_setting_as_the_code_does() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `TESSERA_ENGINE_(\w+)` \| [^|]* \| (.*) \|$", text, re.MULTILINE)

    described = {name.lower(): meaning for name, meaning in rows}

    assert described == {name: field.description for name, field in EngineSettings.model_fields.items()}


def test_settings_load_no_torch() -> None:
    code = "import sys, service.engine.settings; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
