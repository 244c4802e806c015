"""Pictures of a VQGAN that are optimised toward texts and pictures by CLIP.

Source: VQGAN-CLIP, arXiv 2204.08583; CLIP, arXiv 2103.00020.
"""
