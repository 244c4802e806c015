"""What is kept between runs outside of their folders."""

import os
from pathlib import Path

# The variables by which torch.compile and Triton are told where to keep what they have compiled.
COMPILED = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def cache_folder() -> Path:
    """`$TAMING_DIST_CACHE`, or ~/.cache/taming_dist."""
    return Path(os.environ.get("TAMING_DIST_CACHE") or Path.home() / ".cache" / "taming_dist")


def keep_compiled() -> None:
    """Have this process and its children keep what is compiled in the cache folder, unless the
    user's variables name others: torch would use /tmp, which a job finds empty."""
    for variable, name in COMPILED.items():
        os.environ.setdefault(variable, str(cache_folder() / name))
