"""Triton kernels for NVIDIA GPUs, each beside the plain formula that it is tested against.

Tensors are channels_last; everything is added up in fp32, whatever the dtype of what is read.
"""
