"""The fused ops in Triton. Imported only where a tensor is on a CUDA device (or by tests, interpreted)."""
