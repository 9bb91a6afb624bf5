"""Attention over the paged KV cache: a reference implementation, Triton kernels, and the choice of one."""
