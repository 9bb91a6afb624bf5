"""Whether the engine serves one architecture exactly: five requests at once against merged weights alone.

exact      tokens and log-probabilities of all requests are those of the merged model, twice
refused    the engine says at its start that, and why, it does not serve the model
wrong      anything else that a request was told
crash      an exception that is not one of ours, a killed process, or no end in time
not_built  this transformers cannot build the tiny model
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.architectures import tiny_models
from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from tessera.defaults import LLAMA_LINEARS
from tessera.errors import TesseraError, UnsupportedModel
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel, iter_target_modules
from tests.service.engine.driver import GREEDY, Answer, Driver
from tests.service.engine.models import svd_basis

OUTCOMES = ("exact", "refused", "wrong", "crash", "not_built")
TOLERANCE = 2e-3
_RANK = 3
_LENGTHS = (5, 23, 17, 38)
_CONFIG = EngineConfig(num_blocks=256, block_size=8, num_slots=8, max_batch_seqs=16, max_batch_tokens=24)

_Case = tuple[AdapterRef | None, list[int]]


@dataclass(frozen=True)
class Verdict:
    """One line of the table."""

    model_type: str
    #: One of `OUTCOMES`.
    outcome: str
    #: transformers' class; "" if it was not built.
    model_class: str = ""
    #: "fused" or "generic" where it is served.
    path: str = ""
    #: Why it is not served, or what came out instead.
    reason: str = ""
    #: Last names of the modules that carried adapters.
    targets: tuple[str, ...] = ()

    def to_map(self) -> dict[str, Any]:
        return asdict(self)


def judge(model_type: str, **fields: Any) -> Verdict:
    """The verdict on one architecture. fields: of its configuration, on top of the tiny sizes."""
    try:
        model = tiny_models.build(tiny_models.make_config(model_type, **fields))
    except Exception as error:  # whatever a configuration or a missing package raises
        return Verdict(model_type, "not_built", reason=f"{type(error).__name__}: {error}")
    name = type(model).__name__
    base = BaseModel(model_type, f"random-{model_type}", model)
    pristine = copy.deepcopy(model)
    try:
        basis = default_basis(base)
        engine = Engine(base, _CONFIG)
        if basis is not None:
            engine.add_basis(basis)
    except TesseraError as error:
        return Verdict(model_type, "refused", name, reason=str(error))
    targets = [] if basis is None else [m.name.split(".")[-1] for m in basis.manifest.modules]
    path = engine.runner.forward_mode.split(":")[0]
    faults = _faults(engine, basis, pristine)
    return Verdict(
        model_type,
        "wrong" if faults else "exact",
        name,
        path,
        "; ".join(dict.fromkeys(faults)),
        tuple(sorted(set(targets))),
    )


def default_basis(base: BaseModel) -> Basis | None:
    """A basis of the default target modules, else of all linear layers; None if there is none."""
    for patterns in (LLAMA_LINEARS, ("all-linear",)):
        try:
            list(iter_target_modules(base.model, patterns))
        except UnsupportedModel:
            continue
        return svd_basis(base, _RANK, patterns)
    return None


def _faults(engine: Engine, basis: Basis | None, pristine: PreTrainedModel) -> list[str]:
    """What two runs of the five requests got wrong; the second finds what the first left in the caches."""
    generator = torch.Generator().manual_seed(7)
    adapters: dict[AdapterRef, Adapter] = {}
    for index in range(4) if basis is not None else ():
        assert basis is not None
        R = torch.randn(basis.num_modules, _RANK, _RANK, generator=generator)
        adapters[AdapterRef("default", f"a{index}", 1, basis.basis_id)] = Adapter(basis.basis_id, R)
    a, b, c, d = list(adapters) or [None] * 4
    short, long, middle, longest = _prompts()
    cases: list[_Case] = [(a, short), (b, long), (None, middle), (c, longest), (d, long)]
    driver = Driver(engine, adapters)
    runs = []
    for _ in range(2):
        runs.append([driver.submit(prompt, GREEDY, ref) for ref, prompt in cases])
        driver.run(400)
    engine.close()
    expected = [
        _greedy(_merged(pristine, basis, adapters.get(ref) if ref else None), prompt) for ref, prompt in cases
    ]
    return [
        fault
        for answers in runs
        for answer, row in zip(answers, expected, strict=True)
        if (fault := _difference(answer, *row))
    ]


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, tiny_models.VOCAB_SIZE, (n,), generator=generator).tolist() for n in _LENGTHS]


def _merged(model: PreTrainedModel, basis: Basis | None, adapter: Adapter | None) -> PreTrainedModel:
    if basis is None or adapter is None:
        return model
    model = copy.deepcopy(model)
    for index, module in enumerate(basis.manifest.modules):
        weight = model.get_submodule(module.name).weight
        assert isinstance(weight, torch.Tensor)
        weight.data += (basis.B[index] @ adapter.R[index] @ basis.A[index]).to(weight)
    return model


@torch.inference_mode()
def _greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, each from the whole sequence: no cache that could err."""
    ids, logprobs = list(prompt), []
    for _ in range(GREEDY.max_tokens):
        row = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        ids.append(int(row.argmax()))
        logprobs.append(float(row[ids[-1]]))
    return ids[len(prompt) :], logprobs


def _difference(answer: Answer, tokens: list[int], logprobs: list[float]) -> str:
    if answer.last.error is not None:
        return ": ".join(answer.last.error)
    if answer.token_ids != tokens:
        return "other tokens than the merged model's"
    error = max(abs(got.logprob - want) for got, want in zip(answer.logprobs, logprobs, strict=True))
    return "" if error < TOLERANCE else f"log-probabilities off by {error:.0e}"
