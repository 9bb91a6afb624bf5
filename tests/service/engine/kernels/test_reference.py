"""The batched reference ops against the one-adapter definition, token by token."""

import pytest
import torch

from service.engine.kernels import adapter_delta, rank_delta
from tessera.formats.adapter import delta
from tests.popularity import POPULARITIES, make_token_slots

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("num_tokens", "rank"), [(1, 2), (7, 8), (64, 16), (133, 5)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_adapter_delta_is_each_tokens_own_delta(
    num_tokens: int, rank: int, popularity: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    d_in, d_out = 48, 33
    x = torch.randn(num_tokens, d_in, dtype=dtype)
    A, B = torch.randn(rank, d_in, dtype=dtype) / 7, torch.randn(d_out, rank, dtype=dtype)
    R_slots = torch.randn(num_tokens + 1, rank, rank, dtype=dtype) / rank
    R_slots[0] = 0
    token_slots = make_token_slots(popularity, num_tokens)

    y = adapter_delta(x, A, B, R_slots, token_slots)

    expected = torch.stack([delta(x[t], A, R_slots[s], B) for t, s in enumerate(token_slots.tolist())])
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert bool((y[token_slots == 0] == 0).all())


def test_a_slot_with_nan_touches_only_its_own_tokens() -> None:
    h = torch.randn(6, 4)
    R_slots = torch.randn(3, 4, 4)
    R_slots[2] = float("nan")
    token_slots = torch.tensor([0, 1, 2, 1, 2, 0])

    z = rank_delta(h, R_slots, token_slots)

    assert torch.isnan(z).any(dim=1).tolist() == [False, False, True, False, True, False]
