"""Kernels of our own for NVIDIA GPUs (Triton) and CPUs, each tested against the plain formula.

Tensors are channels_last; everything is added up in fp32, whatever the dtype of what is read.
"""
