"""The inputs of a target module as one sequence per row, whatever shape its caller gives them."""

from __future__ import annotations

from torch import Tensor

from tessera.errors import UnsupportedModel


def by_sequence(x: Tensor, num_rows: int, length: int | None, name: str) -> Tensor:
    """x as [num_rows, length, d], each row the tokens of one sequence; no copy where x is contiguous.

    Some models flatten the tokens in front of a linear layer, in order: [S · L, d] (OPT, shared experts), or
    add a dimension: [S, 1, L, d] (latent attention). A routed expert gets some of the tokens in an order of
    its own. name: of the module. length: None if it is not known; then only [S, L, d] will do.

    Raises `UnsupportedModel` naming the module if its tokens cannot be told apart.
    """
    if x.dim() == 3 and x.shape[0] == num_rows and length in (None, x.shape[1]):
        return x
    if length is None or x.shape[:-1].numel() != num_rows * length or "experts" in name.split("."):
        raise UnsupportedModel(
            f"target module {name} receives {list(x.shape)} instead of one sequence per row: its tokens "
            "cannot be told apart by user; leave it out of the target modules",
            param="target_modules",
        )
    return x.reshape(num_rows, length, x.shape[-1])
