"""Checkpoints: the state of a run in safetensors, with its progress as JSON in the metadata. Never pickle.

    tensors    R, m, v, best_R   [M, r, r], float32 (float64 for a model in float64). Fewer for a method that
                                 trains fewer (`tessera/formats/cores.py`). For a LoRA form [2, P],
                                 with its initial factors and the state of its local rules.
               reference         [n, 2], float64, of a run with pairs: the log-probabilities of its first n
                                 pairs under the reference.
    metadata   tessera_run       {"format": 1, "fingerprint": …, "progress": {…}, "start": {…} or null,
                                  "history": [[…], …]}

The order of the data follows from the seed and the step, so no random generator is stored. A checkpoint is
valid only for the basis, data and plan that the fingerprint covers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, fields
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from tessera.errors import Conflict, CorruptRecord
from trainer_worker.training.history import History
from trainer_worker.training.objectives.preference import Preference
from trainer_worker.training.run import Progress, TrainRun

FORMAT = 1
_KEY = "tessera_run"
_LENGTH = struct.Struct("<Q")


def to_bytes(run: TrainRun) -> bytes:
    """Return the state of a run between two steps. 8B Llama, r = 16: 0.9 MB."""
    state = {
        "format": FORMAT,
        "fingerprint": fingerprint(run),
        "progress": asdict(run.progress),
        "start": run.init_notes,
        "history": run.history.to_json(),
    }
    return safetensors.torch.save(run.state(), metadata={_KEY: json.dumps(state)})


def restore(run: TrainRun, content: bytes) -> None:
    """Put a run that is not resident into the state that `to_bytes` has stored.

    Raises `CorruptRecord`, or `Conflict` if the state belongs to other data, another basis or another plan.
    Afterwards a run with more state than its cores (`TrainRun.more_state`) is unusable, others are unchanged.
    """
    try:
        state = _metadata(content)
        tensors = safetensors.torch.load(content)
    except (ValueError, KeyError, TypeError, struct.error, SafetensorError) as error:
        raise CorruptRecord(f"unreadable checkpoint: {error}") from error
    if state.get("format") != FORMAT or state.get("fingerprint") != fingerprint(run):
        raise Conflict("the checkpoint belongs to other data, another basis or another plan")
    progress = _progress(state.get("progress"))
    try:
        run.restore_state(tensors)
    except (KeyError, ValueError, TypeError, IndexError) as error:  # also of another release
        raise CorruptRecord(f"the checkpoint lacks a part, or one has another shape: {error}") from error
    run.progress = progress
    run.init_notes = state.get("start")
    run.history = History.from_json(state.get("history", []))  # earlier releases wrote none


def try_restore(run: TrainRun, content: bytes) -> list[tuple[str, str]]:
    """Like `restore`; instead of raising, returns a warning as (code, sentence) if the state is unusable."""
    try:
        restore(run, content)
    except (CorruptRecord, Conflict) as error:
        return [("checkpoint_unusable", f"training starts afresh: {error.message}")]
    return []


def fingerprint(run: TrainRun) -> str:
    """SHA-256 over everything that two runs must have in common to share a checkpoint."""
    parts: list[Any] = [run.identity, run.data.digest, asdict(run.plan)]
    if isinstance(run.objective, Preference):
        parts.append(asdict(run.objective))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _metadata(content: bytes) -> dict[str, Any]:
    """Return the JSON in the header of a safetensors file, which `safetensors.torch.load` does not return."""
    (length,) = _LENGTH.unpack_from(content)
    header: dict[str, Any] = json.loads(content[_LENGTH.size : _LENGTH.size + length])
    state: dict[str, Any] = json.loads(header["__metadata__"][_KEY])
    return state


def _progress(values: Any) -> Progress:
    names = {field.name for field in fields(Progress)}
    if not isinstance(values, dict) or set(values) != names:
        raise CorruptRecord("the checkpoint's progress has other fields than this build's")
    return Progress(**values)
