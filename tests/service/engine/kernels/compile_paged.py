"""Compile the paged attention kernels for a GPU that is not present; print the name and shared memory of
each.

    python -m tests.service.engine.kernels.compile_paged 90        the compute capability, 90 for Hopper

Runs in a process of its own, because a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from service.engine.kernels import paged_attention
from service.engine.kernels.paged_configs import MIN_BLOCK_M, Phase, find_config

HEAD_DIM, GROUP = 128, 4
HEADS = {"NUM_KV_HEADS": 8, "KEY_DIM": HEAD_DIM, "VALUE_DIM": HEAD_DIM, "PAGE": 16}
PADS = {"KEY_PAD": HEAD_DIM, "VALUE_PAD": HEAD_DIM}
#: Types of the arguments that are not 32-bit integers.
TYPES = {
    **dict.fromkeys(("q", "K", "V", "k", "v", "out", "sinks"), "*bf16"),
    **dict.fromkeys(("part_out", "part_stats"), "*fp32"),
    **dict.fromkeys(("items", "parts", "table"), "*i32"),
    **dict.fromkeys(("tiles", "blocks", "offsets"), "*i64"),
    **dict.fromkeys(("scaling", "softcap"), "fp32"),
}


def main() -> None:
    capability = int(sys.argv[1])
    cut = {"UNIT": 64, "TILES": 256, "IS_DECODE": True, "CAN_SPLIT": True}
    add = {"NUM_KV_HEADS": 8, "GROUP": GROUP, "VALUE_DIM": HEAD_DIM, "ROWS": GROUP, "BLOCK_P": 16}
    add |= {"VALUE_PAD": HEAD_DIM, "HAS_SINKS": True}
    report(capability, paged_attention.cut_work, cut)
    report(capability, paged_attention.cut_work, {**cut, "IS_DECODE": False})
    report(capability, paged_attention.add_parts, add, num_warps=1)
    report(capability, paged_attention.keep_kv, {**HEADS, **PADS, "HEADS_PAD": 8})
    for phase, has_window in ((Phase.DECODE, True), (Phase.PREFILL, False)):
        config = find_config(phase, HEAD_DIM, HEAD_DIM, 2)
        rows = GROUP if phase == Phase.DECODE else config.block_m
        constants = {
            **HEADS,
            **PADS,
            "GROUP": GROUP,
            "ROWS": rows,
            "BLOCK_M": max(MIN_BLOCK_M, rows),
            "BLOCK_N": config.block_n,
            "IS_DECODE": phase == Phase.DECODE,
            "HAS_WINDOW": has_window,
            "HAS_SOFTCAP": has_window,
            "CAN_SPLIT": True,
            "HAS_SINKS": has_window,
        }
        report(
            capability,
            paged_attention.attend_items,
            constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def report(capability: int, kernel: Any, constants: dict[str, Any], **options: int) -> None:
    signature = {name: TYPES.get(name, "i32") for name in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    places = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    aligned = {
        places[name]: [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name.endswith(("row_stride", "head_stride"))
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    sys.stdout.write(f"{kernel.__name__} {compiled.metadata.shared}\n")


if __name__ == "__main__":
    main()
