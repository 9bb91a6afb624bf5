"""What is the same for every run of one benchmark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.quality.data import DataSet
from tessera.methods.building.method import Method
from trainer_worker.training.plan import TrainingPlan

#: Evaluations of a run beside the first: the validation curve.
NUM_EVALUATIONS = 5
WARMUP_SHARE = 0.05
#: A personal set's training, about what a job of the service makes of so few examples.
PERSONAL_EPOCHS, PERSONAL_BATCH_SIZE = 5, 8


@dataclass(frozen=True)
class Settings:
    """examples: at most so many are trained on; validation: at most so many are held out. calibration:
    examples that the data-aware methods see. token_budget: tokens with padding in one pass. svd: as the
    methods' option. is_fast: training passes may use TF32 on a GPU; the last validation never does.
    """

    model: str
    device: str = "auto"
    examples: int = 1600
    validation: int = 160
    epochs: int = 2
    batch_size: int = 16
    max_tokens: int = 256
    calibration: int = 256
    token_budget: int = 4096
    svd: str = "auto"
    by_length: bool = False
    is_fast: bool = False
    rates: tuple[float, ...] = ()
    lora_rates: tuple[float, ...] = ()

    def plan(self, data: DataSet, *, rate: float, seed: int) -> TrainingPlan:
        """Of one run: no early stopping, so that all methods make the same steps."""
        epochs, batch_size = self.epochs, self.batch_size
        if data.is_personal:
            epochs, batch_size = PERSONAL_EPOCHS, PERSONAL_BATCH_SIZE
        total_steps = epochs * -(-len(data.data.train) // batch_size)
        return TrainingPlan(
            num_epochs=epochs,
            batch_size=batch_size,
            total_steps=total_steps,
            learning_rate=rate,
            seed=seed,
            warmup_steps=max(1, round(WARMUP_SHARE * total_steps)),
            evaluate_every=max(1, -(-total_steps // NUM_EVALUATIONS)),
            patience=None,
        )

    def options(self, method: Method) -> dict[str, Any]:
        """The options that all methods share, as far as this one has them."""
        shared = {"svd": self.svd, "num_examples": self.calibration}
        return {name: value for name, value in shared.items() if name in method.options}

    @contextmanager
    def training_precision(self, *, exact: bool) -> Iterator[None]:
        """Matrix products in TF32 while this lasts, unless `exact` or not asked for."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if exact or not self.is_fast else "high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def synchronize() -> None:
    """Wait for the GPU, if there is one, before a clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class BuildMeter:
    """Seconds, and on a GPU the peak of memory above what was there, of what happens within `with`."""

    seconds = 0.0
    peak_bytes: int | None = None

    def __enter__(self) -> BuildMeter:
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        synchronize()
        self.seconds = round(time.perf_counter() - self._started, 3)
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated() - self._before
