"""Losses, as functions and small modules; the networks that they need are arguments."""
