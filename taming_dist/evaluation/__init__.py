"""How good a trained model is on a set of images or codes: sums over batches, and metrics."""
