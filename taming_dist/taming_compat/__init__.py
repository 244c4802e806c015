"""Models in the layout of the original implementation (arXiv 2012.09841), in and out.

docs/checkpoints.md has the commands. Nothing of a checkpoint is ever run: tensors and numbers only.
"""
