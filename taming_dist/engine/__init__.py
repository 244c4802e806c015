"""Training networks on any number of ranks: DeepSpeed, its settings, checkpoints, averages."""
