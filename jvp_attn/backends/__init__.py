"""What computes the four primitives: PyTorch operations, CPU kernels, CUDA kernels."""
