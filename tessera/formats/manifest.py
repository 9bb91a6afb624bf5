"""The description of a basis without its tensors, which are in `basis.py`. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from tessera.errors import CorruptRecord

FORMAT = 1
#: Bytes of one number in the dtypes that factors are stored in.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModuleShape:
    """A target module: its dotted name in the base model and its widths."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class BasisManifest:
    """Everything about a basis but its tensors. Names and shapes of the modules are written only here."""

    #: SHA-256 over the model id, the layout and the stored bytes of all factors, as hex.
    basis_id: str
    #: Id of the base model that the basis was built for.
    model_id: str
    method: str
    rank: int
    dtype: str
    modules: tuple[ModuleShape, ...]
    #: How the basis was built: method, options, seed, library versions. Not part of the digest, because two
    #: recipes that give the same bytes give the same basis.
    recipe: dict[str, Any]
    format: int = FORMAT

    @property
    def core(self) -> dict[str, Any]:
        """Return how adapters of this basis are trained (`cores.py`); part of the digest unless it is "free".

        kind: free, spanned (num_vectors; groups: the group of each module), orthogonal (scales, terms).
        """
        core = self.recipe.get("core")
        return dict(core) if isinstance(core, dict) else {"kind": "free"}

    @property
    def projection_numbers(self) -> int:
        """Return how many numbers the fixed matrices of a spanned core have: num_vectors · M · r²."""
        return int(self.core.get("num_vectors", 0)) * len(self.modules) * self.rank**2

    @property
    def factor_bytes(self) -> int:
        """Return the bytes of all A and B in the storage dtype."""
        numbers = sum(self.rank * (m.d_in + m.d_out) for m in self.modules)
        return numbers * ITEM_BYTES[self.dtype]

    @property
    def is_regenerated(self) -> bool:
        """Return whether the tensors follow from this manifest alone, so that only it is stored (LoRAM)."""
        return bool(self.recipe.get("is_regenerated"))

    @property
    def stored_bytes(self) -> int:
        """Return the bytes that a quota counts: the factors, or this manifest if only it is stored.

        The fixed matrices of a spanned core count too.
        """
        if self.is_regenerated:
            return len(self.to_json())
        return self.factor_bytes + 4 * self.projection_numbers

    @property
    def is_own(self) -> bool:
        """Return whether this is a private basis."""
        return bool(self.recipe.get("is_own"))

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> BasisManifest:
        """Parse a stored manifest. Raises `CorruptRecord`."""
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise CorruptRecord(
                    f"the basis manifest has format {fields['format']}; this build reads {FORMAT}"
                )
            modules = tuple(ModuleShape(**module) for module in fields.pop("modules"))
            return cls(modules=modules, **fields)
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptRecord(f"the basis manifest cannot be read: {error}") from error
