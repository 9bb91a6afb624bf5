"""The discrete sine transform (type I) as an orthonormal basis, the same bits on every machine.

    Φ_d[i, j] = √(2 / (d + 1)) sin((i + 1)(j + 1) π / (d + 1))        (LoRAM, arXiv 2507.06558, eq. 12)

Φ_d is symmetric and orthogonal. The last bit of a library's sine differs between machines, and a basis that
is computed again from its shapes must not differ. So the table of sines is computed in integers (fixed point,
with far more bits than float64) and rounded once.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

#: Bits of the fixed-point numbers. The recurrence loses about 2 log2(d) of them; float64 needs 53.
_BITS = 192


def dst_columns(width: int, rank: int) -> Tensor:
    """Return the first `rank` columns of Φ, which are orthonormal: [width, rank] float64."""
    period = 2 * (width + 1)
    products = torch.outer(torch.arange(1, width + 1), torch.arange(1, rank + 1)) % period
    return math.sqrt(2 / (width + 1)) * torch.tensor(_sines(width), dtype=torch.float64)[products]


@lru_cache(maxsize=16)
def _sines(width: int) -> tuple[float, ...]:
    """Return sin(k π / (width + 1)) for k in one whole period, correctly rounded."""
    half = width + 1
    theta = _pi() // half
    sine, cosine = _sine_and_cosine(theta)
    values = [0, sine]  # s_{k+1} = 2 cos θ s_k - s_{k-1} up to the middle; the rest is its reflection
    while len(values) <= half // 2:
        values.append(((2 * cosine * values[-1]) >> _BITS) - values[-2])
    rising = [value / (1 << _BITS) for value in values[: half // 2 + 1]]
    wave = [rising[min(k, half - k)] for k in range(half)]
    return (*wave, *(-value for value in wave))


def _pi() -> int:
    """Return π in fixed point, by Machin's formula."""
    return 4 * (4 * _inverse_arctangent(5) - _inverse_arctangent(239))


def _inverse_arctangent(n: int) -> int:
    """Return arctan(1 / n) in fixed point."""
    power = total = (1 << _BITS) // n
    k = 1
    while power:
        power //= -n * n
        k += 2
        total += power // k
    return total


def _sine_and_cosine(theta: int) -> tuple[int, int]:
    """Return sine and cosine of a fixed-point angle, by their Taylor series."""
    sine, cosine, term, k = 0, 0, 1 << _BITS, 0
    while term:
        if k % 2:
            sine += term if k % 4 == 1 else -term
        else:
            cosine += term if k % 4 == 0 else -term
        k += 1
        term = ((term * theta) >> _BITS) // k
    return sine, cosine
