"""All that a step brings to the device goes through `copies.to_device`."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from taming_dist.copies import to_device
from taming_dist.data.codes import CodeBatch
from taming_dist.models.prior.schemes import NextIndex
from taming_dist.models.quantizers import EMAQuantizerConfig
from taming_dist.training.clock import Clock

MAKING = {torch.tensor, torch.as_tensor, torch.asarray}
MOVING = {Tensor.to, Tensor.cuda, Tensor.pin_memory}


class Watch(TorchFunctionMode):
    """Counts the tensors that are brought to a device, and collects who does it in another way.

    On the CPU a device is named just as on a GPU. What is made on a device (zeros, arange) is not
    copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.brought = 0
        self.others: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [*args[1:], *(kwargs or {}).values()]
        names_device = any(isinstance(value, torch.device | str) for value in given)
        if func in MAKING | MOVING and names_device:
            callers = list(code_of_callers())
            if to_device.__code__ in callers:
                self.brought += 1
            else:
                self.others.append(f"{callers[0].co_filename}: {callers[0].co_name}")
        return func(*args, **(kwargs or {}))


def code_of_callers() -> Iterable[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def watched(recipe: Any, batches: list[Any]) -> Watch:
    """What the second step brings to the device; the first also brings constants."""
    size = sum(len(batch) for batch in batches)
    for _ in recipe.train_step(batches, Clock(size, 10)):
        pass
    with Watch() as watch:
        for _ in recipe.train_step(batches, Clock(size, 10, images=size)):
            pass
    return watch


def test_a_step_of_stage_1_copies_its_images_its_draws_and_what_restarts_codes(
    recipe: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    quantizer = EMAQuantizerConfig(codes=24, dim=8, decay=0.0, revive_below=0.9)
    made = recipe(model={"quantizer": quantizer}, accumulation=2, augment=["color", "translation"])
    watch = watched(made, [batch(seed=0), batch(seed=1)])
    assert watch.others == []
    # two micro-batches of images, the draws for both; which latents take the places of dead codes
    assert watch.brought == 2 + 1 + 1


@pytest.mark.parametrize(
    ("parts", "condition_dropout", "drawn"),
    [
        ({}, 0.0, 0),
        ({"scheme": NextIndex(pkeep=0.5), "order": "rar", "block": "rar"}, 0.5, 4),
        ({"scheme": "masked", "block": "llama"}, 0.5, 4),
    ],
    ids=["plain", "rar", "masked"],
)
def test_a_step_of_stage_2_copies_its_codes_its_classes_and_what_is_drawn(
    code_recipe: Callable[..., Any], parts: Any, condition_dropout: float, drawn: int
) -> None:
    """Drawn are chances, noise, orders, and which conditions are dropped; or numbers, weights and
    scores of masks."""

    def batch() -> CodeBatch:
        columns = {"codes": torch.randint(24, (2, 3, 4)), "cls": torch.tensor([0, 2])}
        return CodeBatch(columns, torch.arange(2))

    made = code_recipe(accumulation=2, condition_dropout=condition_dropout, parts=parts)
    watch = watched(made, [batch(), batch()])
    assert watch.others == []
    assert watch.brought == 2 * (2 + drawn)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x.to("cpu"),
        lambda x: x.to(device=torch.device("cpu")),
        lambda x: torch.tensor([1.0], device="cpu"),
    ],
)
def test_another_copy_would_be_noticed(copy: Callable[[Tensor], Tensor]) -> None:
    with Watch() as watch:
        to_device(torch.zeros(2), torch.device("cpu"))
        copy(torch.zeros(2))
    assert watch.brought == 1
    (line,) = watch.others
    assert line.startswith(__file__)
