#!/usr/bin/env bash
# torch.zeros on a CPU writes every page at once, where numpy.zeros takes no memory before it is used.
#
# Versions: torch 2.13.0 (CPU build), numpy 2.4.6, Linux. numpy asks for pages that are zero already (calloc), so 256 MiB of
# zeros cost nothing until they are written. torch allocates as for torch.empty and then fills, also in new_zeros and
# zeros_like: 256 MiB are resident at once, although nobody has written a number. torch.from_numpy over numpy.zeros is a
# tensor of zeros that costs nothing yet. It shows in a cache that is reserved for the worst case: its memory is taken at
# start, and not when the first entries are written.
#
# Output seen:
#   numpy.zeros: 0 MiB
#   torch.empty: 0 MiB
#   torch.zeros: 256 MiB
#   new_zeros: 256 MiB
#   zeros_like: 256 MiB
#   torch.from_numpy(numpy.zeros): 0 MiB
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch

N = 64 << 20  # numbers of 4 bytes: 256 MiB


def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20


one, empty = torch.ones(1), torch.empty(N)
made = {
    "numpy.zeros": lambda: np.zeros(N, np.float32),
    "torch.empty": lambda: torch.empty(N),
    "torch.zeros": lambda: torch.zeros(N),
    "new_zeros": lambda: one.new_zeros(N),
    "zeros_like": lambda: torch.zeros_like(empty),
    "torch.from_numpy(numpy.zeros)": lambda: torch.from_numpy(np.zeros(N, np.float32)),
}
taken = {}
torch.zeros(1024)  # what the first operation sets up is not counted
for name, make in made.items():
    before = resident_mib()
    kept = make()
    taken[name] = round((resident_mib() - before) / 16) * 16  # the allocator's own pages are not counted
    del kept
    print(f"{name}: {taken[name]} MiB")
assert [name for name, size in taken.items() if size >= 240] == ["torch.zeros", "new_zeros", "zeros_like"]
assert all(size == 0 for name, size in taken.items() if size < 240)
PYTHON
