"""What would keep the host waiting if the tensors were on a GPU, found on the CPU."""

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Values asked of the device, and numbers copied to it (by `torch.tensor`).
WAITING = {"_local_scalar_dense", "bincount", "equal", "is_nonzero", "item", "lift_fresh"}
WAITING |= {"masked_select", "nonzero", "unique_dim", "_unique2"}
INDEXING = {"index", "index_put", "index_put_"}  # by a mask
OURS = ("taming_dist", "deepspeed", "tests")
# What these read is on the host: the norm that `engine.layouts` answers DeepSpeed, and classes
# and numbers of codes and images before they are copied to the device.
ON_THE_HOST = {"combine_grad_norm_groups", "is_invalid_grad_norm", "numbers", "part", "prefix"}


class Waiting(TorchDispatchMode):
    """Notes what waits in `found`: the operation, and the line that it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def note(self, name: str) -> None:
        frames = traceback.extract_stack()[:-2]
        frames = [f for f in frames if any(f"/{part}/" in f.filename for part in OURS)]
        frames = [f for f in frames if not f.filename.endswith("/waiting.py")]
        last = frames[-1]
        if not ON_THE_HOST & {frame.name for frame in frames[-2:]}:
            self.found.append(f"{name} at {last.filename.split('/')[-1]}:{last.lineno}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING or (name in INDEXING and has_mask(args[1])):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "Waiting":
        self._tolist = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.note("tolist")
            return self._tolist(tensor)

        Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Tensor.tolist = self._tolist
        super().__exit__(*error)


def has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
