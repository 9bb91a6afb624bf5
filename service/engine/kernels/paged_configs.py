"""Launch shapes of the paged attention kernels as data: one row per phase, head dimension and element size.

`python -m benchmarks.attention --tune` measures the candidates on the present device and prints this table.
Knows neither torch nor Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Phase(StrEnum):
    """The kind of tiles that a launch computes."""

    #: Tiles of one query.
    DECODE = "decode"
    #: Tiles of several queries of one sequence.
    PREFILL = "prefill"


@dataclass(frozen=True)
class KernelConfig:
    """How one phase of attention is launched."""

    #: Rows of a program's tile: query heads of a group × queries. Decode takes as many as the group needs.
    block_m: int
    #: Keys that a program reads at a time.
    block_n: int
    num_warps: int
    num_stages: int
    #: Contexts are split until each multiprocessor has about this many programs.
    programs_per_sm: int
    #: The smallest part of a context in tokens, a multiple of block_n.
    part_tokens: int

    def __post_init__(self) -> None:
        assert self.part_tokens % self.block_n == 0, self

    def shared_bytes(self, key_pad: int, value_pad: int, itemsize: int) -> int:
        """Return an upper bound of the shared memory of one program: its queries, and the keys and values
        that are being loaded. A key waits for its block number, so half of the pipeline's stages hold keys
        (the layout of Triton 3.6 to 3.9 for sm_90)."""
        keys = (self.num_stages + 1) // 2 * self.block_n * (key_pad + value_pad)
        return (self.block_m * key_pad + keys) * itemsize


#: The smallest row count of a matrix product on tensor cores.
MIN_BLOCK_M = 16

#: (phase, head dimension padded to a power of two, bytes per element) → launch shape. The row for decode with
#: 128 dimensions of two bytes (64 keys, 4 warps, 3 stages) reached 0.82 to 1.13 of copy bandwidth on an H200
#: in a prototype (batch 32 and 256, contexts 256 and 1k); the other rows keep about as many bytes in flight.
#: None is tuned.
CONFIGS: dict[tuple[Phase, int, int], KernelConfig] = {
    (Phase.DECODE, 16, 2): KernelConfig(16, 128, 4, 4, 4, 128),
    (Phase.DECODE, 32, 2): KernelConfig(16, 128, 4, 4, 4, 128),
    (Phase.DECODE, 64, 2): KernelConfig(16, 64, 4, 4, 4, 64),
    (Phase.DECODE, 128, 2): KernelConfig(16, 64, 4, 3, 2, 64),
    (Phase.DECODE, 256, 2): KernelConfig(16, 32, 4, 3, 2, 64),
    (Phase.DECODE, 16, 4): KernelConfig(16, 64, 4, 3, 4, 64),
    (Phase.DECODE, 32, 4): KernelConfig(16, 64, 4, 3, 4, 64),
    (Phase.DECODE, 64, 4): KernelConfig(16, 64, 4, 3, 2, 64),
    (Phase.DECODE, 128, 4): KernelConfig(16, 32, 4, 3, 2, 64),
    (Phase.DECODE, 256, 4): KernelConfig(16, 16, 4, 3, 2, 64),
    (Phase.PREFILL, 16, 2): KernelConfig(128, 64, 4, 3, 2, 256),
    (Phase.PREFILL, 32, 2): KernelConfig(128, 64, 4, 3, 2, 256),
    (Phase.PREFILL, 64, 2): KernelConfig(128, 64, 4, 3, 2, 256),
    (Phase.PREFILL, 128, 2): KernelConfig(128, 64, 8, 3, 1, 256),
    (Phase.PREFILL, 256, 2): KernelConfig(64, 32, 4, 3, 1, 256),
    (Phase.PREFILL, 16, 4): KernelConfig(64, 32, 4, 2, 2, 256),
    (Phase.PREFILL, 32, 4): KernelConfig(64, 32, 4, 2, 2, 256),
    (Phase.PREFILL, 64, 4): KernelConfig(64, 32, 4, 2, 1, 256),
    (Phase.PREFILL, 128, 4): KernelConfig(32, 32, 4, 2, 1, 256),
    (Phase.PREFILL, 256, 4): KernelConfig(32, 16, 4, 2, 1, 256),
}

#: The largest head dimension that the kernels serve.
MAX_HEAD_DIM = 256


def padded_dim(head_dim: int) -> int:
    """Return the power of two, at least 16, that holds `head_dim`."""
    return max(16, 1 << (head_dim - 1).bit_length())


def find_config(
    phase: Phase, key_dim: int, value_dim: int, itemsize: int, *, shared_bytes: int | None = None
) -> KernelConfig:
    """Return the launch shape for heads of these dimensions. It has fewer stages or keys than the table says
    if a program would need more than `shared_bytes` (None: no limit)."""
    key_pad, value_pad = padded_dim(key_dim), padded_dim(value_dim)
    config = CONFIGS[phase, max(key_pad, value_pad), itemsize]
    while shared_bytes is not None and config.shared_bytes(key_pad, value_pad, itemsize) > shared_bytes:
        if config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        else:
            break
    return config
