"""What training reads: which samples come when, and the batches that they become."""
