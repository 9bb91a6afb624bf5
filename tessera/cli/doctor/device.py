"""The device that engine and trainer compute on: torch's build, CUDA, memory, and what Triton needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tessera.cli.doctor.findings import Finding, ok, problem, warning

#: This file exists if NVIDIA's driver runs, whatever torch was built for.
_DRIVER = Path("/dev/nvidiactl")
#: The compute capability of the oldest GPUs (Ampere) with bfloat16, the dtype of weights on CUDA.
_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class DeviceFacts:
    """The facts that torch and the machine report about the device."""

    torch: str
    #: The version of CUDA that torch was built for; None for a build without CUDA.
    cuda: str | None
    is_cuda_available: bool
    has_driver: bool
    #: Name, capability and memory of the device that would be used; known only if CUDA is available.
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    free_bytes: int = 0
    total_bytes: int = 0
    #: The version of Triton; None if it is not installed.
    triton: str | None = None
    has_compiler: bool = True
    is_triton_interpreted: bool = False


def check(device: str) -> Iterator[Finding]:
    """Yield findings about the device that the setting names. device: auto, cpu, cuda, cuda:1 …"""
    yield from judge(device, look(device))


def look(device: str) -> DeviceFacts:
    """Collect the facts about the device. Imports torch, and queries the driver if there is a GPU."""
    import torch

    is_available = torch.cuda.is_available()
    seen = DeviceFacts(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        is_cuda_available=is_available,
        has_driver=_DRIVER.exists(),
        triton=version("triton") if importlib.util.find_spec("triton") else None,
        has_compiler=any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")),
        is_triton_interpreted=os.environ.get("TRITON_INTERPRET") == "1",
    )
    if not is_available or device == "cpu":
        return seen
    index = torch.device("cuda" if device == "auto" else device).index or 0
    if index >= torch.cuda.device_count():
        return seen
    free, total = torch.cuda.mem_get_info(index)
    return DeviceFacts(
        **{
            **seen.__dict__,
            "name": torch.cuda.get_device_name(index),
            "capability": torch.cuda.get_device_capability(index),
            "free_bytes": free,
            "total_bytes": total,
        }
    )


def judge(device: str, facts: DeviceFacts) -> Iterator[Finding]:
    """Yield the findings that follow from these facts for the setting TESSERA_DEVICE."""
    build = f"torch {facts.torch}, " + (
        f"built for CUDA {facts.cuda}" if facts.cuda else "a build without CUDA"
    )
    wants_cuda = device.startswith("cuda")
    if device != "cpu" and facts.is_cuda_available and not facts.name:
        yield problem("device", f"{build}; there is no {device}", "correct TESSERA_DEVICE, or unset it")
        return
    if device != "cpu" and facts.is_cuda_available:
        yield _gpu(build, facts)
        yield _triton(facts)
        return
    if facts.has_driver and not facts.cuda and device != "cpu":
        finding = problem if wants_cuda else warning
        yield finding(
            "device",
            f"{build}, on a machine with an NVIDIA driver: the GPU is not used",
            "install a build of torch with CUDA, or set TESSERA_DEVICE=cpu if this is intended",
        )
    elif wants_cuda:
        yield problem(
            "device",
            f"{build}; TESSERA_DEVICE is {device}, but torch finds no CUDA device",
            "check whether `nvidia-smi` shows one and, in a container, whether the GPU was passed to it",
        )
    elif facts.has_driver and device != "cpu":
        yield warning(
            "device",
            f"{build}, which finds no CUDA device although there is an NVIDIA driver",
            "check whether `nvidia-smi` works, and whether the driver is new enough for this CUDA",
        )
    else:
        yield ok("device", f"{build}; the model runs on the CPU, which is only fast enough for trials")


def _gpu(build: str, facts: DeviceFacts) -> Finding:
    gib = 2**30
    what = f"{facts.name}, {facts.free_bytes / gib:.1f} of {facts.total_bytes / gib:.1f} GiB free; {build}"
    if facts.capability < _MIN_CAPABILITY:
        return warning(
            "device",
            f"{what}; compute capability {'.'.join(map(str, facts.capability))} has no bfloat16",
            "set TESSERA_DTYPE=float16, and expect less speed",
        )
    if facts.free_bytes < facts.total_bytes / 2:
        return warning(
            "device",
            f"{what}: something else uses most of it",
            "see `nvidia-smi`; where service and trainer share a GPU, bound TESSERA_ENGINE_KV_CACHE_BYTES",
        )
    return ok("device", what)


def _triton(facts: DeviceFacts) -> Finding:
    if facts.triton is None:
        return warning(
            "triton",
            "Triton is not installed, so the fused kernels are not used",
            "install the version of `triton` that this build of torch requires",
        )
    if facts.is_triton_interpreted:
        return warning("triton", "TRITON_INTERPRET=1: kernels run in Python, far too slow", "unset it")
    if not facts.has_compiler:
        return warning(
            "triton",
            f"Triton {facts.triton} finds no C compiler to build its launchers with",
            "install one: `apt install gcc libc6-dev`",
        )
    return ok("triton", f"Triton {facts.triton}, and a C compiler for its launchers")
