"""Compile the fused ops for sm_90 without a device, through Triton's own launch path; print what was loaded.

Run by `test_compiling.py` in a process of its own, because kernels are interpreted in the tests' process. The
interpreter accepts much that the compiler refuses: names with two types, constants lost in tuples.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from service.engine.kernels import AddedDelta, QKVShape, ResidualAdd, StepRows, arguments, launch
from tests.service.engine.kernels.fused_cases import Case, make_factors, make_rows, make_y, with_delta

#: Shared memory that a program may have on sm_90, in bytes.
MAX_SHARED = 227 * 1024


class DriverWithoutDevice:
    """Triton's driver for a device that accepts kernels and runs none. loaded: names and shared memory."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, int]] = []
        self.utils = self
        self.launcher_cls = Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED}

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        self.loaded.append((name, shared))
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class Launcher:
    """Called in place of a launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


def run_ops(case: Case) -> None:
    """Run each op once, so that every option that changes the compiled code is used."""
    shape = QKVShape(2, 1, 80, 32, case.random(320), case.norm(80), case.norm(80))
    pages = torch.zeros(3, 1, 16, 80, dtype=case.dtype)
    angles = torch.zeros(case.num_tokens, 32)
    zeros = torch.zeros(case.num_tokens, dtype=torch.int32)
    rows = StepRows(angles, angles, pages, pages, zeros, zeros)
    squares = case.squares(256, 4)
    factors = make_factors(case, (160, 80, 80), (4, 0, 2))
    launch.qkv_rope(make_y(case, 320, factors), shape, rows, with_delta(case, factors), squares)
    factors = make_factors(case, (256, 256), (1, 3))
    y, delta = make_y(case, 512, factors), with_delta(case, factors)
    launch.glu(y, 256, "gelu_tanh", delta, bias=case.random(512), squares=squares)
    h = make_rows(case, factors.h_width)
    launch.add_deltas(y, [AddedDelta(factors, case.token_slots, h), AddedDelta(factors, case.token_slots, h)])
    factors, norm = make_factors(case, (256,), (2,)), case.norm(256, plus_one=True)
    y, residual, delta = (
        make_y(case, 256, factors),
        case.random(case.num_tokens, 256),
        with_delta(case, factors),
    )
    launch.add_residual(y, residual, norm, delta, ResidualAdd(bias=case.random(256)))
    launch.add_rms_norm(y, residual, norm, delta, ResidualAdd(post=norm))


def main() -> None:
    compiling = DriverWithoutDevice()
    driver.set_active(compiling)
    arguments.is_early = lambda like: True  # the tensors are on the CPU here, but the kernels as on a device
    for case in (
        Case(1, 16, dtype=torch.bfloat16),
        Case(33, 16, dtype=torch.bfloat16, R_dtype=torch.int8),
        Case(600, 48, dtype=torch.bfloat16),
    ):
        run_ops(case)
    json.dump(compiling.loaded, sys.stdout)


if __name__ == "__main__":
    main()
