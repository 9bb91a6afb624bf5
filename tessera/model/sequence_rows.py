"""Bringing the inputs of a target module into the form of one sequence per row."""

from __future__ import annotations

from torch import Tensor

from tessera.errors import UnsupportedModel


def by_sequence(x: Tensor, num_rows: int, length: int | None, name: str) -> Tensor:
    """View x as [num_rows, length, d], with the tokens of one sequence in each row.

    Contiguous x is not copied. Before a linear layer, some models flatten the tokens in order, [S · L, d]
    (OPT, shared experts), or add a dimension, [S, 1, L, d] (latent attention). A routed expert gets some of
    the tokens in another order.

    name: name of the module. length: None if unknown; then only [S, L, d] is accepted. Raises
    `UnsupportedModel`, with the module, if its tokens cannot be assigned to sequences.
    """
    if x.dim() == 3 and x.shape[0] == num_rows and length in (None, x.shape[1]):
        return x
    if length is None or x.shape[:-1].numel() != num_rows * length or "experts" in name.split("."):
        raise UnsupportedModel(
            f"target module {name} receives {list(x.shape)} instead of one sequence per row, so its tokens "
            "cannot be assigned to users; leave it out of the target modules",
            param="target_modules",
        )
    return x.reshape(num_rows, length, x.shape[-1])
