"""The forward passes of a trial (`model_trial.py`): one sequence by the model itself, or several by the
engine.

Both can have adapters on any linear layers. The engine has them in the slots of a basis, as in service. The
model itself has them as hooks that add their deltas, so that no code of the engine takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.engine.adapters.resident_bases import ResidentBases
from service.engine.attention.reference import TiledLayout, implementation_of
from service.engine.forward.forward_pass import ForwardPass, ModelFacts
from service.engine.kv.cache import PagedKV
from service.engine.scheduling.plan import Chunk, StepPlan
from service.engine.scheduling.request import EngineRequest
from service.engine.settings import EngineConfig
from service.engine.steps.batch import build_batch
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.formats.manifest import BasisManifest, ModuleShape
from tessera.model.base_model import BaseModel

_BLOCK_SIZE = 4
_RANK = 4
#: Size of an adapter's delta as a share of its layer's output: large enough to show an adapter that is left
#: out or confused with another.
_DELTA = 0.3
_BASIS_ID = "trial"


@dataclass(frozen=True)
class TrialAdapter:
    """An adapter in `slot` of the trial's basis."""

    slot: int
    #: One hook per layer, which adds the adapter's delta to the output.
    hooks: Mapping[str, Callable[..., Tensor]]


@dataclass(frozen=True)
class Way:
    """How the engine computes the sequences."""

    #: All in the same steps, or one sequence after another.
    together: bool
    #: A part, the rest and the last token; or all tokens in one step.
    in_pieces: bool


class AdaptedModel:
    """The model with a random basis on some layers, given by name, and two adapters of it; without layers,
    the model as it is. max_tokens: of one step."""

    def __init__(
        self,
        base: BaseModel,
        facts: ModelFacts,
        linears: Mapping[str, nn.Linear],
        *,
        max_tokens: int,
        seed: int,
    ) -> None:
        self.adapters: list[TrialAdapter] = []
        self._base = base
        self._facts = facts
        self._max_tokens = max_tokens
        generator = torch.Generator().manual_seed(seed)
        self._basis = _random_basis(base.model_id, linears, generator) if linears else None
        if self._basis is not None:
            size = (2, len(linears), _RANK, _RANK)
            self._R = torch.randn(size, generator=generator).to(base.device, base.model.dtype)
            for index, R in enumerate(self._R):
                hooks = {
                    module.name: _adding(self._basis.A[i], R[i], self._basis.B[i])
                    for i, module in enumerate(self._basis.manifest.modules)
                }
                self.adapters.append(TrialAdapter(index + 1, hooks))

    def own_logits(
        self, token_ids: list[int], adapter: TrialAdapter | None = None, **inputs: Tensor
    ) -> Tensor:
        """Return the logits [n, V] of one sequence by the model itself, with its eager attention. inputs:
        further inputs of the model."""
        model, before = self._base.model, implementation_of(self._base.model)
        model.set_attn_implementation("eager")
        try:
            with ExitStack() as hooks:
                for name, add in adapter.hooks.items() if adapter is not None else ():
                    hooks.callback(model.get_submodule(name).register_forward_hook(add).remove)
                ids = torch.tensor([token_ids], device=model.device)
                logits: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits[0]
                return logits
        finally:
            model.set_attn_implementation(before)

    def served_logits(
        self, sequences: Sequence[tuple[list[int], TrialAdapter | None]], way: Way
    ) -> list[Tensor]:
        """Return the logits [n, V] of every sequence, by steps of the engine."""
        model = self._base.model
        requests, first = [], 1
        for index, (token_ids, adapter) in enumerate(sequences):
            requests.append(_request(str(index), token_ids, adapter, first_block=first))
            first += len(requests[-1].blocks)
        kv = PagedKV(
            self._facts.kv_shapes,
            num_blocks=first - 1,
            block_size=_BLOCK_SIZE,
            device=self._base.device,
            dtype=model.dtype,
        )
        pieces: dict[str, list[Tensor]] = {request.request_id: [] for request in requests}
        with self._installed() as bases:
            forward_pass = ForwardPass(model, self._facts, bases, num_positions=1, enable_fused=False)
            for group in [requests] if way.together else [[request] for request in requests]:
                for plan in _plans(group, in_pieces=way.in_pieces):
                    batch = build_batch(plan, kv, TiledLayout(), self._base.device)
                    for basis_id, table in bases.tables.items():
                        table.stage(batch.slots.get(basis_id))
                    rows = forward_pass.forward_generic(batch.rows, kv, batch.attention)
                    lengths = [chunk.length for chunk in plan.chunks]
                    for chunk, own in zip(plan.chunks, torch.split(rows, lengths), strict=True):
                        pieces[chunk.request.request_id].append(own)
        return [torch.cat(own) for own in pieces.values()]

    @contextmanager
    def _installed(self) -> Iterator[ResidentBases]:
        """Install the basis in the model's layers, and the adapters in its slots."""
        config = EngineConfig(num_slots=2, max_batch_tokens=self._max_tokens)
        base = self._base
        bases = ResidentBases(base.model, base.model_id, config, device=base.device, dtype=base.model.dtype)
        try:
            if self._basis is not None:
                bases.add(self._basis, is_permanent=True)
                bases.tables[_BASIS_ID].R_slots[1:] = self._R
            yield bases
        finally:
            bases.close()


def _random_basis(model_id: str, linears: Mapping[str, nn.Linear], generator: torch.Generator) -> Basis:
    """Return a basis in which A holds random directions, and B = W Aᵀ the layer's response to them, scaled so
    that a random R of size 1 gives a delta of `_DELTA` times W x."""
    A, B, shapes = [], [], []
    for name, linear in linears.items():
        d_in = linear.in_features
        directions = torch.randn(_RANK, d_in, generator=generator).to(linear.weight) / d_in**0.5
        A.append(directions)
        B.append(linear.weight @ directions.T * (_DELTA * d_in**0.5 / _RANK))
        shapes.append(ModuleShape(name, d_in, linear.out_features))
    manifest = BasisManifest(_BASIS_ID, model_id, "trial", _RANK, "float32", tuple(shapes), recipe={})
    unused = torch.empty(0)
    return Basis(manifest, tuple(A), tuple(B), unused, unused)


def _adding(A: Tensor, R: Tensor, B: Tensor) -> Callable[..., Tensor]:
    def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(F.linear(inputs[0], A), R), B)

    return add


def _request(
    name: str, token_ids: list[int], adapter: TrialAdapter | None, *, first_block: int
) -> EngineRequest:
    ref = AdapterRef("", name, 1, _BASIS_ID) if adapter is not None else None
    request = EngineRequest(GenerationRequest(name, "", token_ids, SamplingParams(), ref), 0, b"")
    request.slot = adapter.slot if adapter is not None else 0
    request.blocks = list(range(first_block, first_block + -(-len(token_ids) // _BLOCK_SIZE)))
    return request


def _plans(requests: Sequence[EngineRequest], *, in_pieces: bool) -> Iterator[StepPlan]:
    """Steps that compute all tokens of every request."""
    cuts = []
    for request in requests:
        n = len(request.token_ids)
        cuts.append([0, max(1, 2 * n // 5), max(1, n - 1), n] if in_pieces else [0, n])
    for step in range(len(cuts[0]) - 1):
        chunks = [
            Chunk(request, own[step], own[step + 1] - own[step])
            for request, own in zip(requests, cuts, strict=True)
            if own[step + 1] > own[step]
        ]
        chunks.sort(key=lambda chunk: (chunk.length > 1, -chunk.end))
        if chunks:
            yield StepPlan(chunks)
