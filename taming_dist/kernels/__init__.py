"""Kernels of our own, each beside the plain formula that it is tested against: Triton for NVIDIA
GPUs, and `winograd` for CPUs.

Tensors are channels_last; everything is added up in fp32, whatever the dtype of what is read.
"""
