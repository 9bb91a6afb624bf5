"""The methods, initializations and LoRA forms as plain data, for processes that only check requests.

`catalogue.json` is what the registries say of themselves. They hold the functions as well, and with them
torch: 300 MB in every API process. `python -m tessera.methods.write_catalogue` writes the file anew, and
`tests/tessera/methods/test_method_catalogue.py` fails where it is not what the registries say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tessera.methods.checks import check_lora_da, check_lora_ga, check_loram, stores_loram
from tessera.methods.options import Option, Options, fill_options

PATH = Path(__file__).with_name("catalogue.json")

_CHECKS: dict[str, Callable[[int, Options], None]] = {
    "lora_da": check_lora_da,
    "lora_ga": check_lora_ga,
    "loram": check_loram,
}
_STORES: dict[str, Callable[[Options], bool]] = {"loram": stores_loram}


@dataclass(frozen=True)
class MethodEntry:
    """What a caller may ask of a method that builds a basis."""

    name: str
    #: Whether it reads calibration data, whatever its options.
    needs_data: bool
    options: Mapping[str, Option]

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> Self:
        return cls(name, entry["needs_calibration"] != "none", _options(entry))

    def check(self, rank: int, options: Options) -> None:
        """Raises `InvalidInput` for a rank or a combination of options that cannot work."""
        if self.name in _CHECKS:
            _CHECKS[self.name](rank, options)

    def stores_factors(self, options: Options) -> bool:
        """Whether its factors need room in a store, not only a manifest. options: as given."""
        return self.name not in _STORES or _STORES[self.name](options)


@dataclass(frozen=True)
class InitEntry:
    """What a caller may ask of an initialization."""

    name: str
    options: Mapping[str, Option]
    needs_adapter: bool

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> Self:
        return cls(name, _options(entry), entry["needs_adapter"])


@dataclass(frozen=True)
class FormEntry:
    """What a caller may ask of a LoRA form. rank_factor: its basis is stored at so many times the rank."""

    name: str
    options: Mapping[str, Option]
    needs_examples: bool
    rank_factor: int

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> Self:
        return cls(name, _options(entry), entry["needs_examples"], entry["stored_rank"])

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises `InvalidInput` for what its method has no option for."""
        fill_options(f"LoRA form {self.name}", self.options, options)

    def stored_rank(self, rank: int) -> int:
        """Of the basis that the trained factors are stored as."""
        return self.rank_factor * rank


def _options(entry: Mapping[str, Any]) -> dict[str, Option]:
    return {name: Option.from_description(option) for name, option in entry["options"].items()}


#: As JSON, by "methods", "starts", "presets" and "lora_forms"; the order is that of the registries.
CATALOGUE: dict[str, dict[str, Any]] = json.loads(PATH.read_bytes())
METHODS = {name: MethodEntry.read(name, entry) for name, entry in CATALOGUE["methods"].items()}
INITS = {name: InitEntry.read(name, entry) for name, entry in CATALOGUE["starts"].items()}
FORMS = {name: FormEntry.read(name, entry) for name, entry in CATALOGUE["lora_forms"].items()}
