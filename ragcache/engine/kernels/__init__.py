"""Kernels for CUDA, their references in torch, and the choice between them."""
