"""`python -m tessera.methods.write_catalogue` writes `catalogue.json` from the registries."""

from __future__ import annotations

import json
from typing import Any

from tessera.methods.bases import METHODS
from tessera.methods.catalogue import PATH
from tessera.methods.forms import LORA_PRESETS
from tessera.methods.init import INIT_METHODS, PRESETS


def catalogue() -> dict[str, dict[str, Any]]:
    """Return the descriptions of everything in the registries."""
    return {
        "methods": {name: method.describe() for name, method in METHODS.items()},
        "starts": {name: method.describe() for name, method in INIT_METHODS.items()},
        "presets": {name: preset.describe() for name, preset in PRESETS.items()},
        "lora_forms": {name: form.describe() for name, form in LORA_PRESETS.items()},
    }


def as_text() -> str:
    return json.dumps(catalogue(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(as_text(), encoding="utf-8")
