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

from tessera.methods.checks import (
    check_lora_da,
    check_lora_ga,
    check_loram,
    loram_needs_data,
    stores_loram,
)
from tessera.methods.options import Option, Options, fill_options

PATH = Path(__file__).with_name("catalogue.json")

_CHECKS: dict[str, Callable[[int, Options], None]] = {
    "lora_da": check_lora_da,
    "lora_ga": check_lora_ga,
    "loram": check_loram,
}
_STORES: dict[str, Callable[[Options], bool]] = {"loram": stores_loram}
#: Methods that read calibration data with some of their options only.
_NEEDS_DATA: dict[str, Callable[[Options], bool]] = {"loram": loram_needs_data}


@dataclass(frozen=True)
class MethodEntry:
    """A method that builds a basis, as far as a request needs it."""

    name: str
    #: Whether it reads calibration data, whatever its options.
    always_needs_data: bool
    options: Mapping[str, Option]

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> Self:
        return cls(name, entry["needs_calibration"] != "none", _options(entry))

    def needs_data(self, options: Options) -> bool:
        """Return whether it reads calibration data. options: all of them, with defaults filled in."""
        return self.always_needs_data or (self.name in _NEEDS_DATA and _NEEDS_DATA[self.name](options))

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
    #: Name of the method that computes its factors; None: they need neither weights nor data.
    method: str | None
    #: The options of the method that the form sets.
    fixed_options: Mapping[str, Any]
    #: The rank of the stored basis, as a multiple of the trained rank.
    rank_factor: int

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> Self:
        fixed = entry.get("fixed_options", {})
        return cls(name, _options(entry), entry["method"], fixed, entry["stored_rank"])

    def needs_examples(self, options: Mapping[str, Any]) -> bool:
        """Return whether it is initialized from data. options: those of a request, already checked."""
        return self.method is not None and METHODS[self.method].needs_data(self._filled(options))

    def check_options(self, options: Mapping[str, Any], rank: int) -> None:
        """Raise `InvalidInput` for options that the form or its method does not have, or that cannot work."""
        fill_options(f"LoRA form {self.name}", self.options, options)
        if self.method is not None:
            METHODS[self.method].check(rank, self._filled(options))

    def _filled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options of the form's method."""
        assert self.method is not None
        known = METHODS[self.method].options
        given = {**options, **self.fixed_options}
        return fill_options(self.method, known, {name: given[name] for name in given if name in known})

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
