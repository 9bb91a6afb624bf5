"""Methods, initializations and LoRA forms as plain data, for processes that only check requests.

`catalogue.json` holds what the registries describe. The registries themselves also hold the functions and so
import torch, which costs 300 MB in every API process. `python -m tessera.methods.write_catalogue` writes the
file again, and `tests/tessera/methods/test_method_catalogue.py` fails if it differs from the registries.
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
    """A method that builds a basis, as far as a request needs it."""

    name: str
    #: Whether it reads calibration data, whatever its options.
    needs_data: bool
    options: Mapping[str, Option]

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> Self:
        return cls(name, entry["needs_calibration"] != "none", _options(entry))

    def check(self, rank: int, options: Options) -> None:
        """Raise `InvalidInput` for a rank or a combination of options that cannot work."""
        if self.name in _CHECKS:
            _CHECKS[self.name](rank, options)

    def stores_factors(self, options: Options) -> bool:
        """Return whether its factors are stored, and not only a manifest. options: as given."""
        return self.name not in _STORES or _STORES[self.name](options)


@dataclass(frozen=True)
class InitEntry:
    """An initialization, as far as a request needs it."""

    name: str
    options: Mapping[str, Option]
    needs_adapter: bool

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> Self:
        return cls(name, _options(entry), entry["needs_adapter"])


@dataclass(frozen=True)
class FormEntry:
    """A LoRA form, as far as a request needs it."""

    name: str
    options: Mapping[str, Option]
    #: Whether it is initialized from data.
    needs_examples: bool
    #: The rank of the stored basis, as a multiple of the trained rank.
    rank_factor: int

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> Self:
        return cls(name, _options(entry), entry["needs_examples"], entry["stored_rank"])

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise `InvalidInput` for options that its method does not have."""
        fill_options(f"LoRA form {self.name}", self.options, options)

    def stored_rank(self, rank: int) -> int:
        """Return the rank of the basis in which the trained factors are stored."""
        return self.rank_factor * rank


def _options(entry: Mapping[str, Any]) -> dict[str, Option]:
    return {name: Option.from_description(option) for name, option in entry["options"].items()}


#: The whole file. Its keys are "methods", "starts" (the initializations), "presets" and "lora_forms", each in
#: the order of its registry.
CATALOGUE: dict[str, dict[str, Any]] = json.loads(PATH.read_bytes())
METHODS = {name: MethodEntry.read(name, entry) for name, entry in CATALOGUE["methods"].items()}
INITS = {name: InitEntry.read(name, entry) for name, entry in CATALOGUE["starts"].items()}
FORMS = {name: FormEntry.read(name, entry) for name, entry in CATALOGUE["lora_forms"].items()}
