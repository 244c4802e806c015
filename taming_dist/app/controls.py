"""The controls of the page, and what their values mean to the sampling command."""

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gradio as gr
import numpy as np

from taming_dist.app.making import save_map
from taming_dist.app.models import Models
from taming_dist.app.painting import (
    coloured,
    colours,
    enlargement,
    hexadecimal,
    kept_codes,
    label_map,
)
from taming_dist.data.images import Shape
from taming_dist.errors import UserError
from taming_dist.models.modalities import LabelMap
from taming_dist.models.prior.schemes import Masked
from taming_dist.ranges import LARGEST_SEED
from taming_dist.sampling.given import read_column

PICTURES = {  # name of a modality -> what is asked for
    "rgb": "Picture",
    "low_resolution": "Picture to enlarge",
    "depth": "Depth map (grey PNG)",
    "edges": "Picture or map of edges (grey PNG)",
}
MOST_SIDE = 2048  # pixels that the sliders of a size lead to, at most
Values = Sequence[Any]


@dataclass(frozen=True)
class Sampled:
    """The controls of how codes are chosen, by the names of the sampling command's keys."""

    components: dict[str, gr.components.Component]

    @classmethod
    def build(cls, models: Models) -> "Sampled":
        """Place them."""
        assert models.generator is not None
        transformer = models.generator.transformer
        found: dict[str, Any] = {}
        with gr.Group():
            found["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED)
            anew = gr.Button("New seed", size="sm")
        anew.click(
            lambda: random.randrange(2**31),
            outputs=found["seed"],
            queue=False,
            api_visibility="private",
        )
        with gr.Accordion("Sampling", open=False):
            found["temperature"] = gr.Slider(
                0, 2, 1, step=0.05, label="Temperature", info="0: always the likeliest code"
            )
            found["top_k"] = gr.Slider(
                0,
                transformer.config.vocabulary,
                0,
                step=1,
                label="Top-k",
                info="of the likeliest codes so many may be chosen; 0: all",
            )
            found["top_p"] = gr.Slider(
                0.05, 1, 1, step=0.05, label="Top-p", info="or those with this probability; 1: all"
            )
            if transformer.config.null_prefix:
                found["guidance"] = gr.Slider(
                    0, 10, 1, step=0.1, label="Guidance", info="toward what is asked for; 1: off"
                )
            if isinstance(transformer.scheme, Masked):
                found["steps"] = gr.Slider(
                    1,
                    transformer.config.num_tokens,
                    transformer.scheme.steps,
                    step=1,
                    label="Steps",
                    info="in which the codes are written",
                )
        return cls(found)

    def settings(self, values: Values) -> dict[str, Any]:
        """What the values of the components mean; off is as if it were not given."""
        found = dict(zip(self.components, values, strict=True))
        if found["seed"] is None:
            raise UserError("seed: give a whole number from 0 on")
        found["top_k"] = found["top_k"] or None
        found["top_p"] = None if found["top_p"] == 1 else found["top_p"]
        whole = {name: int(own) for name, own in found.items() if name in ("seed", "steps")}
        parts = {name: float(own) for name, own in found.items() if name not in whole and own}
        if found["top_k"]:
            whole["top_k"] = int(found["top_k"])
        return found | parts | whole


@dataclass(frozen=True)
class Conditioned:
    """The controls of what a picture is conditioned on."""

    models: Models
    components: dict[str, gr.components.Component]

    @classmethod
    def build(cls, models: Models) -> "Conditioned":
        """Place them."""
        wants = models.wants
        found: dict[str, Any] = {}
        if wants.classes:
            found["class_id"] = gr.Dropdown(
                [(name, number) for number, name in enumerate(wants.classes)],
                value=0,
                label=f"Class (0 to {len(wants.classes) - 1})",
            )
        if wants.prompt:
            found["prompt"] = gr.Textbox(label="Text", placeholder="What the picture is to show")
        if isinstance(wants.picture, LabelMap):
            found["labels"] = painted_labels(models, wants.picture.classes)
        elif wants.picture is not None:
            found["picture"] = uploaded(PICTURES[wants.picture.name], 280)
        return cls(models, found)

    def settings(self, values: Values, folder: Path) -> tuple[dict[str, Any], Path | None]:
        """What the values mean, and the file of the picture that is the condition.

        Raises:
            UserError: something is missing.
        """
        found, condition = dict(zip(self.components, values, strict=True)), None
        if "prompt" in found and not (found["prompt"] or "").strip():
            raise UserError("text: say what the picture is to show")
        if "class_id" in found and not isinstance(found["class_id"], int):
            raise UserError("class: choose one")
        wanted = self.models.wants.picture
        if isinstance(wanted, LabelMap):
            assert self.models.generator is not None
            canvas = (found.pop("labels") or {}).get("composite")
            if canvas is None:
                raise UserError("label map: paint one first")
            pixels = label_map(canvas[..., :3], wanted.classes, self.models.generator.size)
            condition = save_map(pixels, folder / "labels.png")
        elif wanted is not None:
            if not found["picture"]:
                raise UserError(f"{PICTURES[wanted.name].lower()}: upload one first")
            condition = Path(found.pop("picture"))
        return found, condition


with mock.patch("gradio.component_meta.create_or_modify_pyi"):  # it writes among our sources

    class Upload(gr.Image):
        """Where a file with a picture is dropped. It is opened only by what reads pictures, which
        says in one line what is wrong with it: Gradio would open it before, and fail in its own
        way."""

        is_template = True  # for the browser it is an Image

        def preprocess(self, payload: Any) -> str | None:
            return None if payload is None else payload.path


def uploaded(label: str, height: int, name: str | None = None) -> gr.Image:
    """Place an upload, `height` pixels high on the page."""
    return Upload(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload"],
        height=height,
        elem_id=name,
    )


def painter(
    label: str,
    shape: tuple[int, int],
    swatches: Sequence[str],
    thickness: int,
    first: int = 0,
    **more: Any,
) -> gr.ImageEditor:
    """A canvas of (h, w) pixels, with a brush in the colours `swatches`, of which it begins with
    the number `first`, and an eraser; `more`: what else Gradio is told of it."""
    return gr.ImageEditor(
        label=label,
        type="numpy",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(
            default_size=thickness,
            colors=list(swatches),
            default_color=swatches[first],
            color_mode="fixed",
        ),
        eraser=gr.Eraser(default_size=thickness),
        canvas_size=(shape[1], shape[0]),
        fixed_canvas=True,
        **more,
    )


def painted_labels(models: Models, classes: int) -> gr.ImageEditor:
    """A canvas for label maps, which may begin with the file of one."""
    assert models.generator is not None
    shape = models.generator.size
    times = enlargement(shape)

    def opened(path: str) -> dict[str, Any]:
        return canvas_of(read_labels(Path(path), classes, shape, times))

    gr.Markdown("Paint a label map: each class has a colour.")
    swatches = [hexadecimal(colour) for colour in colours(classes)]
    editor = painter(
        "Label map",
        (shape[0] * times, shape[1] * times),
        swatches,
        thickness=max(shape) * times // 12,
        first=1,
        value=canvas_of(coloured(np.zeros(shape, np.uint8), classes, times)),
        image_mode="RGB",
        elem_id="labels",
    )
    gr.HTML(legend(swatches))
    begin = gr.UploadButton(
        "Begin with a label map (PNG of class ids)", file_types=[".png"], size="sm"
    )
    begin.upload(told(opened), begin, editor, api_visibility="private")
    return editor


def read_labels(path: Path, classes: int, shape: Shape, times: int) -> np.ndarray:
    """The canvas of a label map in a file; `UserError` if it is none of these classes."""
    labels = read_column("label map", path, LabelMap.column, shape)
    if int(labels.max()) >= classes:
        raise UserError(
            f"label map: it has the class {int(labels.max())}, but the model knows 0 to "
            f"{classes - 1}"
        )
    return coloured(labels, classes, times)


def canvas_of(pixels: np.ndarray) -> Any:
    """The value of an editor that shows a picture with nothing painted on it."""
    return {"background": pixels, "layers": [], "composite": pixels}


def legend(swatches: Sequence[str]) -> str:
    """The colours of classes and their numbers."""
    items = "".join(
        f'<span><i style="background:{colour}"></i>{number}</span>'
        for number, colour in enumerate(swatches)
    )
    return f'<div class="legend" aria-label="Colours of the classes">{items}</div>'


@dataclass(frozen=True)
class Enlarged:
    """The controls of the size of a picture; none where it is always the learned one."""

    components: tuple[gr.components.Component, ...]

    @classmethod
    def build(cls, models: Models) -> "Enlarged":
        """Place them."""
        assert models.generator is not None
        if not models.can_enlarge:
            return cls(())
        factor = models.vqgan.config.factor
        sliders = []
        with gr.Row():
            for name, side in zip(("Height", "Width"), models.generator.size, strict=True):
                most = min(MOST_SIDE, max(2 * side, models.config.most_pixels // side))
                most = most // factor * factor
                slider = gr.Slider(side, most, side, step=factor, label=name, min_width=140)
                sliders.append(slider)
        return cls(tuple(sliders))

    def size(self, values: Values) -> tuple[int, int] | None:
        """What their values mean; None: the learned size."""
        return (int(values[0]), int(values[1])) if self.components else None


def painted_mask(models: Models, canvas: dict[str, Any] | None, folder: Path) -> Path:
    """The file of the mask that is painted over a picture on a canvas.

    Raises:
        UserError: nothing is painted, or everything.
    """
    assert models.generator is not None
    times, factor = enlargement(models.generator.size), models.vqgan.config.factor
    layers = [] if canvas is None else canvas["layers"]
    painted = np.any([layer[..., 3] > 0 for layer in layers], axis=0) if layers else None
    if painted is None or not np.any(painted):
        raise UserError("brush: paint over what is to be made anew")
    high, wide = (side * times for side in models.generator.size)
    if painted.shape != (high, wide):
        raise UserError(
            f"brush: the canvas has {painted.shape[0]} x {painted.shape[1]} pixels, not {high} x "
            f"{wide}: choose the picture again"
        )
    mask = kept_codes(painted, factor, times)
    if mask.all():
        raise UserError("brush: it covers the whole picture: leave some of it as it is")
    return save_map(mask, folder / "mask.png")


def told(act: Any) -> Any:
    """A handler of the page whose mistakes of the user are shown to the user, as one line."""

    def shown(*values: Any) -> Any:
        try:
            return act(*values)
        except UserError as error:
            raise one_line(error) from error

    return shown


def one_line(error: UserError) -> gr.Error:
    """What shows a mistake of the user to the user, with uploads by their own names alone."""
    kept = re.escape(os.environ.get("GRADIO_TEMP_DIR", ""))
    said = re.sub(rf"{kept}/\w+/", "", str(error)) if kept else str(error)
    return gr.Error(said, title="This cannot be done", print_exception=False)
