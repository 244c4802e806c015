"""torchvision, also where its compiled operators do not load."""

import importlib
import sys
from types import ModuleType

import torch

from taming_dist.errors import UserError

_declared: list[torch.library.Library] = []


def torchvision_models(what: str) -> ModuleType:
    """Import torchvision.models, also where torchvision's compiled operators do not load.

    That is so on a CPU-only torch: torchvision then stumbles over two operators that are not
    there. Declaring their schemas is enough, no model here calls them.

    Raises:
        UserError: it is not installed; says that `what` needs it.
    """
    try:
        return importlib.import_module("torchvision.models")
    except ImportError as error:
        raise UserError(f"torchvision is missing, for {what}: {error}") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # dropping the object would undeclare them
        return importlib.import_module("torchvision.models")
