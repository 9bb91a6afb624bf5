"""Importing a TinyLoRA (arXiv 2602.04118) as PEFT saves it: exactly, as a core between its own factors.

    delta_W = B (sum_i v_i P_i) A        A [r, d_in], B [d_out, r], P [u, r, r] frozen; v [u] trained

Each module has a frozen A, B and P of its own in the file. The vectors v belong to groups of modules
(`weight_tying`). All are read from the file, so the import does not depend on the base model's weights, nor
on a random generator. What PEFT would make again when it loads the file is refused:

* without P, or with `save_projection: false`, PEFT draws P from `projection_seed`, whatever the file holds;
* modules that `target_modules` names and the file lacks get factors from PEFT's own decomposition, and
  which group a module belongs to depends on how many modules come before it.

Checked against PEFT 0.21.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tessera.errors import InvalidInput
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import MAX_RANK
from tessera.formats.basis import make_basis
from tessera.formats.cores import MAX_PROJECTION_BYTES, SPANNED
from tessera.formats.manifest import ModuleShape
from tessera.formats.single_adapter import LowRank, SingleAdapter, make_single_adapter
from tessera.peft.config import (
    ABSENT,
    CONFIG_NAME,
    base_model_of,
    check_common,
    compile_pattern,
    refuse,
    whole_number,
)
from tessera.peft.methods import MERGE
from tessera.peft.tensor_file import check_entry, load_tensors, module_of, read_header, refuse_tensors

PEFT_TYPE = "TINYLORA"
#: The method in the manifest of an imported basis.
METHOD = "peft"
_FACTOR = re.compile(r"(?P<module>.+)\.tinylora_(?P<part>[ABP])(?:\.(?P<adapter>[^.]+))?")
_VECTOR = re.compile(r"(?:base_model\.)?tinylora_v\.(?:(?P<adapter>[^.]+)\.)?(?P<group>\d{1,6})")
_PARTS = ("A", "B", "P")
#: Keys without effect on what a trained TinyLoRA computes.
_IGNORED = frozenset((
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "init_v_bound",
    "init_weights", "layers_pattern", "peft_version", "projection_seed", "revision", "runtime_config",
    "tinylora_dropout",
))  # fmt: skip
_PARSED = frozenset((
    "bias", "layers_to_transform", "modules_to_save", "peft_type", "r", "save_projection", "target_modules",
    "task_type", "u", "weight_tying",
))  # fmt: skip
_SAVE_AGAIN = (
    "set it to true in the file, load that in PEFT where it was trained, and write it again with "
    "save_pretrained, which then saves P"
)
_SOURCE = f"{CONFIG_NAME} and the model"


@dataclass(frozen=True)
class TinyModule:
    """The frozen tensors of one module, and the group whose vector it uses."""

    A: Tensor  # [k, d_in], k at most r
    B: Tensor  # [d_out, k]
    P: Tensor  # [u, k, k]
    group: int


@dataclass(frozen=True)
class TinyLora:
    """A TinyLoRA as its files hold it."""

    #: In model order.
    modules: dict[ModuleShape, TinyModule]
    #: v, one for each group, all of one length u.
    vectors: tuple[Tensor, ...]
    base_model: str | None

    @property
    def rank(self) -> int:
        return max(len(module.A) for module in self.modules.values())

    @property
    def storage_dtype(self) -> str:
        """The dtype of the basis. Files in half precision lose less in float16 than they have lost."""
        is_whole = any(torch.float32 in (m.A.dtype, m.B.dtype) for m in self.modules.values())
        return "float32" if is_whole else "float16"

    def core(self, module: TinyModule) -> Tensor:
        """Return sum_i v_i P_i, [k, k] float64."""
        return torch.einsum("i,ijk->jk", self.vectors[module.group].double(), module.P.double())

    def to_single_adapter(self, *, model_id: str) -> SingleAdapter:
        """Return the basis of the file's A, B and P, and the adapter in it. Raises `InvalidInput`.

        Files that PEFT trained on one model with one config have the same A, B and P, and so share a basis;
        each user's adapter is stored as its vectors. Without room for P, R is stored.
        """
        recipe = {"source": METHOD, "peft_type": PEFT_TYPE, "base_model": self.base_model, "rank": self.rank}
        factors, projections = {}, []
        for shape, module in self.modules.items():
            unused = (0, self.rank - len(module.A))
            A, B = (X.cpu().double() for X in (module.A, module.B))
            factors[shape] = (F.pad(A.mT, unused).mT, F.pad(B, unused))
            projections.append(F.pad(module.P.float(), unused + unused))
        P, v = torch.stack(projections), torch.stack(self.vectors).float()
        groups = [module.group for module in self.modules.values()]
        core = {"kind": SPANNED, "num_vectors": v.shape[1], "groups": groups}
        if P.nbytes > MAX_PROJECTION_BYTES:
            return self._as_product(model_id, recipe)
        try:
            basis = make_basis(
                model_id=model_id, method=METHOD, factors=factors, recipe=recipe, dtype=self.storage_dtype,
                core=core, projection=P,
            )  # fmt: skip
        except InvalidInput:  # a weight of a lower rank, whose factors hold zeros
            return self._as_product(model_id, recipe)
        R = basis.cores.expand(v[None].double()).float().contiguous()
        return SingleAdapter(basis, Adapter(basis.basis_id, R, recipe, trained=v[None]))

    def _as_product(self, model_id: str, recipe: dict[str, Any]) -> SingleAdapter:
        changes = {
            shape: LowRank(module.A, module.B.double() @ self.core(module))
            for shape, module in self.modules.items()
        }
        return make_single_adapter(
            changes,
            model_id=model_id,
            method=METHOD,
            recipe=recipe,
            metadata=recipe,
            dtype=self.storage_dtype,
        )


def read_tinylora(values: Mapping[str, Any], model: bytes, modules: Mapping[str, ModuleShape]) -> TinyLora:
    """Parse and check both files. values: the config; modules: the base model's, in model order.

    Raises `InvalidInput`, with the key, tensor or module and its value.
    """
    _check_config(values)
    rank, length = whole_number("r", values.get("r", 2)), whole_number("u", values.get("u", 64))
    header = read_header(model)
    header.pop("__metadata__", None)
    names, vectors = _find_tensors(header, modules)
    present = [shape for shape in modules.values() if shape.name in names]
    _check_targets(values, present, modules)
    groups = groups_of(len(present), _weight_tying(values))
    _check_vectors(vectors, max(groups) + 1, len(present))
    for name in vectors.values():
        check_entry(header[name], [length], name=name, what="a vector v", source=CONFIG_NAME)
    for shape in present:
        _check_shapes(header, names[shape.name], shape, rank, length)
    needed = [*vectors.values(), *(name for parts in names.values() for name in parts.values())]
    tensors = load_tensors(model, needed)
    found = {}
    for shape, group in zip(present, groups, strict=True):
        A, B, P = (tensors[names[shape.name][part]] for part in _PARTS)
        found[shape] = TinyModule(A, B, P, group)
    in_order = tuple(tensors[vectors[group]] for group in range(len(vectors)))
    return TinyLora(found, in_order, base_model_of(values))


def groups_of(num_modules: int, weight_tying: float) -> list[int]:
    """Return the group of each module in model order, as PEFT assigns them.

    The last group takes what the division leaves: 60 modules at 0.4 are 35 groups of one module and one
    of 25.
    """
    num_groups = max(1, round(num_modules * (1.0 - weight_tying)))
    size = max(1, num_modules // num_groups)
    return [min(index // size, num_groups - 1) for index in range(num_modules)]


def _check_config(values: Mapping[str, Any]) -> None:
    check_common(values)
    if values.get("modules_to_save") not in ABSENT:
        reason = f"whole modules would have to be replaced; train without it, or {MERGE}"
        refuse("modules_to_save", values["modules_to_save"], reason)
    if values.get("save_projection", True) is not True:
        reason = f"PEFT then draws P anew from projection_seed, whatever the file holds; {_SAVE_AGAIN}"
        refuse("save_projection", values["save_projection"], reason)
    for key, value in values.items():
        if key not in _PARSED | _IGNORED and value not in ABSENT:
            refuse(key, value, "this key is unknown here; remove it if it has no effect")


def _weight_tying(values: Mapping[str, Any]) -> float:
    value = values.get("weight_tying", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        refuse("weight_tying", value, "it must be a number from 0 to 1")
    return float(value)


def _find_tensors(
    header: Mapping[str, Any], modules: Mapping[str, ModuleShape]
) -> tuple[dict[str, dict[str, str]], dict[int, str]]:
    """Return module → part → name of its tensor, and group → name of its vector."""
    found: dict[str, dict[str, str]] = {}
    vectors: dict[int, str] = {}
    adapters: dict[str, str] = {}
    for name in header:
        vector, factor = _VECTOR.fullmatch(name), _FACTOR.fullmatch(name)
        match = vector or factor
        if match is None:
            refuse_tensors(f"holds {name[:200]!a}; only the tensors of a TinyLoRA can be imported")
        adapters.setdefault(match["adapter"] or "", name)
        if vector is not None:
            other = vectors.setdefault(int(vector["group"]), name)
        else:
            module = module_of(match["module"], modules)
            other = found.setdefault(module, {}).setdefault(match["part"], name)
        if other != name:
            refuse_tensors(f"holds {other[:200]!a} and {name[:200]!a}, which mean the same; keep one of them")
    if not found:
        refuse_tensors("holds no TinyLoRA")
    if len(adapters) > 1:
        first, second = list(adapters.values())[:2]
        refuse_tensors(f"holds several adapters ({first[:200]!a} and {second[:200]!a}); keep one")
    for module, parts in found.items():
        for part in _PARTS:
            if part not in parts:
                refuse_tensors(
                    f"lacks tinylora_{part} of {module}, which PEFT would make again; {_resave(part)}"
                )
    return found, vectors


def _resave(part: str) -> str:
    how = "load it in PEFT where it was trained and write it again with save_pretrained"
    return f"{how} and save_projection true" if part == "P" else how


def _check_vectors(vectors: Mapping[int, str], num_groups: int, num_modules: int) -> None:
    if sorted(vectors) != list(range(num_groups)):
        refuse_tensors(
            f"has {len(vectors)} vectors v, but weight_tying makes {num_groups} groups, 0 to "
            f"{num_groups - 1}, of the {num_modules} modules in the file"
        )


def _check_shapes(
    header: Mapping[str, Any], parts: Mapping[str, str], shape: ModuleShape, rank: int, length: int
) -> None:
    k = min(rank, shape.d_in, shape.d_out)
    if k > MAX_RANK:
        refuse("r", rank, f"the largest rank is {MAX_RANK}")
    for part, expected in (("A", [k, shape.d_in]), ("B", [shape.d_out, k]), ("P", [length, k, k])):
        what = f"tinylora_{part} of {shape.name}"
        check_entry(header[parts[part]], expected, name=parts[part], what=what, source=_SOURCE)


def _check_targets(
    values: Mapping[str, Any], present: Sequence[ModuleShape], modules: Mapping[str, ModuleShape]
) -> None:
    """Check that the file holds exactly the modules that PEFT would change."""
    targets = values.get("target_modules")
    if targets in ABSENT:
        return
    expected = set(_matched(targets, modules))
    changed = {shape.name for shape in present}
    if values.get("layers_to_transform") in ABSENT:
        for name in expected - changed:
            refuse_tensors(
                f"lacks the tensors of {name}, which target_modules names; PEFT would make them again"
            )
    for name in changed - expected:
        refuse_tensors(f"changes {name}, which target_modules does not name, so that PEFT would ignore it")


def _matched(targets: Any, modules: Mapping[str, ModuleShape]) -> list[str]:
    """Return the modules that PEFT's `target_modules` names: ends of names, or one regular expression."""
    if targets == "all-linear":
        return list(modules)
    if isinstance(targets, str):
        pattern = compile_pattern("target_modules", targets, rf"(?:{targets})$")
        return [name for name in modules if pattern.match(name)]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        refuse("target_modules", targets, "it must be a regular expression or a list of names")
    ends = tuple(f".{target}" for target in targets)
    return [name for name in modules if f".{name}".endswith(ends)]
