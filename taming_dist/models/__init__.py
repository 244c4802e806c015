"""The networks: pure torch, without ranks, files or logging; shapes are in the signatures."""
