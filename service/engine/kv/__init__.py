"""The paged KV cache: blocks, their tensors and tables, and how much memory there is for them."""
