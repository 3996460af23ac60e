"""CUDA kernels, their reference implementations in torch, and the choice between them."""
