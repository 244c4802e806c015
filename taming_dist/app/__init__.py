"""The interactive page: what `python -m taming_dist.demo` serves to a browser."""
