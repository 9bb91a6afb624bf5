"""The lock on the base model: order, interruption, memory, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from tessera.errors import InvalidInput, TesseraError
from tessera.methods.bases import CalibrationSet, build_basis_and_step
from tessera.model.base_model import BaseModel
from tests.trainer_worker.conftest import random_examples
from tests.waiting import HANG_S
from trainer_worker.common.model_lock import ModelLock, Progress

MODULES = ["layer.0.q_proj", "layer.1.q_proj"]


def nothing(done: int, total: int) -> None:
    return None


def batch() -> torch.Tensor:
    return torch.tensor([[1, 2, 3]])


async def test_progress_arrives_in_the_event_loop_while_the_work_runs(small: BaseModel) -> None:
    received: list[tuple[int, int]] = []
    seen = threading.Event()
    home = threading.get_ident()

    def listen(done: int, total: int) -> None:
        assert threading.get_ident() == home
        received.append((done, total))
        seen.set()

    def work(progress: Progress) -> str:
        assert threading.get_ident() != home
        progress(1, 2)
        assert seen.wait(HANG_S), "the event loop stood still"
        progress(2, 2)
        return "made"

    made = await ModelLock(small).run(work, modules=MODULES, on_progress=listen)
    await asyncio.sleep(0)

    assert made == "made"
    assert received == [(1, 2), (2, 2)]


@pytest.mark.parametrize("where", ["between modules", "between batches"])
async def test_a_cancelled_piece_of_work_ends_before_the_model_is_free(small: BaseModel, where: str) -> None:
    model_lock, begun, cancelled = ModelLock(small), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    ended = threading.Event()

    def work(progress: Progress) -> None:
        loop.call_soon_threadsafe(begun.set)
        assert cancelled.wait(HANG_S)
        assert model_lock.locked()
        try:
            while True:
                if where == "between modules":
                    progress(0, 2)
                else:
                    small.model(batch())
        finally:
            ended.set()

    task = asyncio.create_task(model_lock.run(work, modules=MODULES, on_progress=nothing))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # a second cancellation must not release the model either
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert ended.is_set()
    assert not model_lock.locked()
    assert not small.model._forward_pre_hooks
    logits = await model_lock.run(
        lambda progress: small.model(batch()).logits, modules=[], on_progress=nothing
    )
    assert bool(logits.isfinite().all())


async def test_two_pieces_never_run_together(small: BaseModel) -> None:
    model_lock, running, most = ModelLock(small), [], []

    def work(progress: Progress) -> None:
        running.append(1)
        most.append(len(running))
        small.model(batch())
        running.pop()

    await asyncio.gather(*(model_lock.run(work, modules=[], on_progress=nothing) for _ in range(4)))

    assert most == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["device", "host", "torch on the host"],
)
async def test_memory_that_runs_out_names_the_module(small: BaseModel, error: BaseException) -> None:
    def work(progress: Progress) -> None:
        progress(1, 2)
        raise error

    with pytest.raises(TesseraError, match=r"layer\.1\.q_proj \(1 of 2 modules done\)") as caught:
        await ModelLock(small).run(work, modules=MODULES, on_progress=nothing)

    assert caught.value.code == "out_of_memory"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("error", [InvalidInput("no"), RuntimeError("CUDA error: an illegal access")])
async def test_other_errors_pass_unchanged(small: BaseModel, error: Exception) -> None:
    def work(progress: Progress) -> None:
        raise error

    model_lock = ModelLock(small)
    with pytest.raises(type(error)) as caught:
        await model_lock.run(work, modules=MODULES, on_progress=nothing)

    assert caught.value is error
    assert not model_lock.locked()


@pytest.mark.gpu
async def test_the_memory_of_a_device_is_free_afterwards(small: BaseModel) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    small.model.to("cuda")
    examples = CalibrationSet.from_encoded(random_examples(3, 8))
    model_lock = ModelLock(small)

    def build(progress: Progress) -> None:
        build_basis_and_step(small, method="lora_da", rank=2, calibration=examples, progress=progress)

    def exceed(progress: Progress) -> None:
        held = [torch.empty(2**20, device="cuda")]
        held.append(torch.empty(2**44, device="cuda"))

    await model_lock.run(
        build, modules=[], on_progress=nothing
    )  # so that libraries have allocated their own memory
    before = torch.cuda.memory_allocated()
    await model_lock.run(build, modules=[], on_progress=nothing)
    with pytest.raises(TesseraError) as caught:
        await model_lock.run(exceed, modules=MODULES, on_progress=nothing)

    assert caught.value.code == "out_of_memory"
    assert torch.cuda.memory_allocated() == before
