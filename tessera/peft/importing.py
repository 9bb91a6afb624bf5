"""Importing an ordinary LoRA, as PEFT saves it: as an adapter in a private basis, or in the basis it came
from.

    adapter_config.json, adapter_model.safetensors   →   delta_W of every module, as PEFT computes it

What A, B and a scale per module cannot represent is refused by name. Pickled files are never opened. A file
that Tessera exported (`exporting.py`) names the basis of its A's. If they equal the factors of that basis bit
for bit, the import gives back the small adapter instead of a copy of the basis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.formats.basis import Basis
from tessera.formats.manifest import ModuleShape
from tessera.formats.single_adapter import LowRank, SingleAdapter, make_single_adapter, stored_rank
from tessera.peft.config import (
    CONFIG_NAME,
    MLX_ADVICE,
    PeftConfig,
    parse_config,
    peft_type_of,
    printable,
    read_config,
)
from tessera.peft.tensor_file import check_entry, load_tensors, module_of, read_header, refuse_tensors
from tessera.peft.tinylora import METHOD, TinyLora, read_tinylora
from tessera.peft.tinylora import PEFT_TYPE as TINYLORA

#: PEFT writes `base_model.model.<module>.lora_A.weight`. A state dict of the model itself also contains the
#: name of the adapter, and those of wrappers.
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<side>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
#: Tensors left over from training, without effect on what a trained LoRA computes.
_TRAINING_ONLY = (".lora_velora_", ".lora_monteclora_sampler.")
_WHOLE = (
    "whole embeddings and output heads cannot be replaced; if they are the base model's own, write the files "
    "with PEFT's save_pretrained(..., save_embedding_layers=False)"
)
#: Why other tensors in such a file are refused, by a part of their name.
_OTHER_TENSORS = {
    "lora_magnitude_vector": "DoRA rescales the columns of W + BA",
    "lora_embedding_": "embeddings cannot carry adapters",
    "modules_to_save": "whole modules cannot be replaced",
    "base_layer": (
        "PEFT adds it where the embeddings or the output head have a LoRA, and neither can carry an adapter; "
        "train without them in target_modules"
    ),
    ".bias": "an adapter cannot change a bias",
    ".lora_a": f"that is a factor as mlx-lm writes it; {MLX_ADVICE}",
    ".lora_b": f"that is a factor as mlx-lm writes it; {MLX_ADVICE}",
    "lora_diag": "KaSA's diagonal stands between the factors",
    "embed": _WHOLE,
    "lm_head": _WHOLE,
}
_SOURCE = f"{CONFIG_NAME} and the model"
#: A core in the labelled basis is accepted if it reproduces B within the rounding of its dtype.
_SPAN_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class PeftLora:
    """The changes that a LoRA makes to the base model, and what its files claim."""

    #: Change of each module, in model order.
    changes: dict[ModuleShape, LowRank]
    base_model: str | None
    #: Id of the basis that the A's are claimed to come from. Anybody can write one, so it has to be verified.
    label: str | None

    @property
    def rank(self) -> int:
        """The rank of a private basis for this LoRA."""
        return stored_rank(self.changes)

    @property
    def storage_dtype(self) -> str:
        """The dtype of that basis.

        Orthonormal factors lose less in float16 than a half-precision file has lost.
        """
        for change in self.changes.values():
            if torch.float32 in (change.A.dtype, change.B.dtype):
                return "float32"
        return "float16"


def read_adapter(config: bytes, model: bytes, modules: Mapping[str, ModuleShape]) -> PeftLora | TinyLora:
    """Parse and check the two files of any method that can be imported.

    modules: the linear layers of the base model by name (`linear_shapes`). Raises `InvalidInput`, with the
    key, tensor or module and its value, before any work is done.
    """
    values = read_config(config)
    if peft_type_of(values) == TINYLORA:
        return read_tinylora(values, model, modules)
    return read_peft(config, model, modules)


def read_peft(config: bytes, model: bytes, modules: Mapping[str, ModuleShape]) -> PeftLora:
    """Parse and check the files of a LoRA as `read_adapter` does."""
    settings = parse_config(config)
    header = read_header(model)
    label = header.pop("__metadata__", {}).get("tessera_basis")
    names = _find_factors(header, modules)
    settings.check_effort(len(names))
    _check_tensors(header, names, settings, modules)
    tensors = load_tensors(model, (name for sides in names.values() for name in sides.values()))
    changes = {}
    for shape in modules.values():
        if shape.name in names:
            A, B = (tensors[names[shape.name][side]] for side in ("lora_A", "lora_B"))
            changes[shape] = LowRank(A, B, settings.scale_of(shape.name))
    stored_rank(changes)  # raises
    return PeftLora(changes, settings.base_model, label if isinstance(label, str) else None)


def to_single_adapter(lora: PeftLora | TinyLora, *, model_id: str) -> SingleAdapter:
    """Turn what was read into a private basis with its adapter. Raises `InvalidInput`."""
    if isinstance(lora, TinyLora):
        return lora.to_single_adapter(model_id=model_id)
    provenance: dict[str, Any] = {"source": "peft", "base_model": lora.base_model, "rank": lora.rank}
    return make_single_adapter(
        lora.changes, model_id=model_id, method=METHOD, recipe=provenance, metadata=provenance,
        dtype=lora.storage_dtype,
    )  # fmt: skip


def core_in(lora: PeftLora, basis: Basis) -> Tensor | None:
    """Return R [M, r, r] of the LoRA in `basis`, or None if the LoRA does not come from that basis.

    Its A's must equal those of the basis bit for bit, and its B's must lie in the span of the basis.
    Otherwise the label is wrong, or the files have been changed.
    """
    if tuple(lora.changes) != basis.manifest.modules:
        return None
    cores = []
    for A, B, change in zip(basis.A, basis.B, lora.changes.values(), strict=True):
        if not torch.equal(A.to(change.A.dtype), change.A):
            return None
        # Rounding to its dtype leaves B not quite orthonormal, so Bᵀ alone would not do.
        target = change.scale * change.B.double()
        core = torch.linalg.lstsq(B.double(), target).solution
        error = torch.linalg.matrix_norm(B.double() @ core - target)
        if error > _SPAN_TOLERANCE[change.B.dtype] * torch.linalg.matrix_norm(target):
            return None
        cores.append(core)
    return torch.stack(cores).float().contiguous()


def _find_factors(header: Mapping[str, Any], modules: Mapping[str, ModuleShape]) -> dict[str, dict[str, str]]:
    """Return module → {"lora_A": name, "lora_B": name}.

    Accepts the names that PEFT writes and those of a state dict, if they can mean only one module and one
    adapter.
    """
    found: dict[str, dict[str, str]] = {}
    adapters: dict[str, str] = {}  # adapter → the first tensor name that contains it
    for name in header:
        if any(part in name for part in _TRAINING_ONLY):
            continue
        match = _FACTOR.fullmatch(name)
        if match is None:
            reasons = (why for part, why in _OTHER_TENSORS.items() if part in name)
            reason = next(reasons, "only lora_A and lora_B weights can be imported")
            refuse_tensors(f"holds {printable(name)}: {reason}")
        module, side = module_of(match["module"], modules), match["side"]
        adapters.setdefault(match["adapter"] or "", name)
        other = found.setdefault(module, {}).setdefault(side, name)
        if other != name:
            refuse_tensors(
                f"holds {printable(other)} and {printable(name)}, which are both {side} of {module}; keep "
                "those of one adapter"
            )
    if not found:
        refuse_tensors("holds no LoRA")
    if len(adapters) > 1:
        names = " and ".join(printable(name) for name in list(adapters.values())[:2])
        refuse_tensors(f"holds factors of several adapters ({names}); keep those of one")
    return found


def _check_tensors(
    header: Mapping[str, Any],
    names: Mapping[str, Mapping[str, str]],
    settings: PeftConfig,
    modules: Mapping[str, ModuleShape],
) -> None:
    """Check that all factors are present, with fitting dtypes and shapes."""
    for module, sides in names.items():
        for side, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if side not in sides:
                refuse_tensors(f"holds {other} of {module} without its {side}")
        rank, shape = settings.rank_of(module), modules[module]
        for side, expected in (("lora_A", [rank, shape.d_in]), ("lora_B", [shape.d_out, rank])):
            check_entry(
                header[sides[side]], expected, name=sides[side], what=f"{side} of {module}", source=_SOURCE
            )
