"""The training loop and what it needs of a recipe: clock, metrics, sinks, signals, the end."""
