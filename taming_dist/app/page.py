"""The page: what is on it, and what happens when its controls are used."""

from pathlib import Path
from typing import Any

import gradio as gr

from taming_dist.app.controls import (
    Conditioned,
    Enlarged,
    Sampled,
    canvas_of,
    painted_mask,
    painter,
    told,
    uploaded,
)
from taming_dist.app.jobs import Job, Jobs
from taming_dist.app.making import (
    Reconstructed,
    asked,
    code_picture,
    given_picture,
    reconstruct,
)
from taming_dist.app.models import Models
from taming_dist.app.painting import enlarged, enlargement
from taming_dist.app.results import (
    Desk,
    Result,
    bar,
    buttons,
    connected,
    pixels,
    session,
    sharp,
    stopping,
)
from taming_dist.errors import UserError
from taming_dist.sampling.config import SampleConfig

SWEEP_S, KEPT_S = 600, 3600  # how often copies are looked for that are older than this
WAITING = 32  # users in the queue
RED = "#e53935"  # the brush over what is made anew
TITLE = "taming_dist"
STYLE = """
.gradio-container {width: 100%; max-width: 1180px !important; margin: 0 auto !important;}
.facts {opacity: 0.75;}
.picture img {width: 100%; height: 100%; object-fit: contain;}
.small img {image-rendering: pixelated;}
.bar progress {width: 100%; height: 0.6em; accent-color: var(--color-accent);}
.legend {display: flex; flex-wrap: wrap; gap: 0.3em 0.9em; font-size: 0.85em;
  max-height: 7em; overflow-y: auto;}
.legend i {display: inline-block; width: 1em; height: 1em; margin-right: 0.35em;
  vertical-align: -0.12em; border: 1px solid var(--border-color-primary);}
"""


def page(models: Models, scratch: str) -> tuple[gr.Blocks, Jobs, dict[str, Any]]:
    """Return the page for models, the work behind it, and how it looks. What it makes lies in
    `scratch`."""
    desk = Desk(models, Path(scratch))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(SWEEP_S, KEPT_S)) as blocks:
        gr.Markdown(f"# {TITLE}")
        gr.Markdown(facts(models), elem_classes="facts")
        with gr.Tabs():
            if models.generator is not None:
                with gr.Tab("Create"):
                    create_tab(desk)
                with gr.Tab("Complete"):
                    complete_tab(desk)
            with gr.Tab("Reconstruct"):
                reconstruct_tab(desk)
        blocks.unload(stopping(desk.jobs))
    blocks.queue(max_size=WAITING, default_concurrency_limit=1)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return blocks, desk.jobs, {"theme": theme, "css": STYLE}


def facts(models: Models) -> str:
    """What the page works with, in a line."""
    config = models.vqgan.config
    parts = [f"VQGAN with {config.vocabulary:,} codes, {config.factor} pixels each"]
    if models.generator is not None:
        transformer = models.generator.transformer
        count = sum(each.numel() for each in transformer.parameters())
        height, width = models.generator.size
        kind = transformer.config.condition.name
        parts.append(f"transformer of {count / 1e6:,.1f} M parameters, condition: {kind}")
        parts.append(f"{height} x {width} pixels")
    return ", ".join([*parts, f"on {models.device.type}"])


def create_tab(desk: Desk) -> None:
    """Pictures from nothing but their condition."""
    models = desk.models
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            conditioned = Conditioned.build(models)
            sizes = Enlarged.build(models)
            sampled = Sampled.build(models)
            both = buttons("Create")
        with gr.Column(scale=1, min_width=300):
            result = Result.build(desk, *both)
    parts = [conditioned.components.values(), sizes.components, sampled.components.values()]
    first, second = len(parts[0]), len(parts[0]) + len(parts[1])

    def ask(folder: Path, *values: Any) -> tuple[SampleConfig, list[Path]]:
        settings, condition = conditioned.settings(values[:first], folder)
        size = sizes.size(values[first:second])
        settings |= sampled.settings(values[second:])
        files = [] if condition is None else [condition]
        return asked(models, settings, condition, size), files

    connected(desk, result, ask, [each for part in parts for each in part])


def complete_tab(desk: Desk) -> None:
    """Pictures of which a part is made anew."""
    models = desk.models
    assert models.generator is not None
    times = enlargement(models.generator.size)
    high, wide = (side * times for side in models.generator.size)

    def opened(path: str | None) -> Any:
        if path is None:
            return gr.update(value=None, visible=False)
        canvas = enlarged(given_picture(models, Path(path)), times)
        return gr.update(value=canvas_of(canvas), visible=True)

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            gr.Markdown("The largest part in the middle is used; what you brush over is made anew.")
            picture = uploaded("1. Upload a picture", 200, "completed")
            editor = painter(
                "2. Brush",
                (high, wide),
                [RED],
                thickness=max(high, wide) // 8,
                image_mode="RGBA",
                visible=False,
                elem_id="brushed",
            )
            conditioned = Conditioned.build(models)
            sampled = Sampled.build(models)
            both = buttons("Complete")
        with gr.Column(scale=1, min_width=300):
            result = Result.build(desk, *both)
    picture.change(told(opened), picture, editor, api_visibility="private")
    first = len(conditioned.components)

    def ask(folder: Path, path: str | None, canvas: Any, *values: Any) -> Any:
        if path is None:
            raise UserError("picture: upload one first")
        mask = painted_mask(models, canvas, folder)
        settings, condition = conditioned.settings(values[:first], folder)
        settings |= sampled.settings(values[first:])
        settings |= {"image": path, "mask": str(mask)}
        files = [mask] if condition is None else [mask, condition]
        return asked(models, settings, condition), [*files, Path(path)]

    parts = [conditioned.components.values(), sampled.components.values()]
    connected(desk, result, ask, [picture, editor, *(each for part in parts for each in part)])


def reconstruct_tab(desk: Desk) -> None:
    """What the VQGAN keeps of a picture."""
    models = desk.models
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            picture = uploaded("Upload a picture", 280, "reconstructed")
            start = gr.Button("Reconstruct", variant="primary")
            status = gr.HTML(bar(0, "Nothing made yet."), elem_classes="bar")
            files = gr.File(
                label="Download: the reconstruction and its codes",
                file_count="multiple",
                interactive=False,
                visible=False,
            )
        with gr.Column(scale=1, min_width=300), gr.Row():
            images = [
                gr.Image(
                    label=label,
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    height=280,
                    elem_classes=sharp(models),
                    min_width=200,
                )
                for label in ("What the VQGAN is given", "Reconstruction", "Codes, in colours")
            ]

    def act(request: gr.Request, path: str | None) -> Any:
        if path is None:
            raise UserError("picture: upload one first")

        def work(job: Job[Reconstructed]) -> None:
            job.tell(reconstruct(models, Path(path), desk.folder()))

        for found in desk.jobs.run(session(request), work):
            vocabulary = models.vqgan.config.vocabulary
            shape = " x ".join(map(str, found.codes.shape))
            said = f"{shape} codes, {found.used:,} of the {vocabulary:,}"
            codes = code_picture(found.codes, vocabulary, models.vqgan.config.factor)
            listed = gr.update(value=list(map(str, found.files)), visible=True)
            return pixels(found.seen), pixels(found.picture), codes, bar(1, said), listed
        return (gr.skip(),) * 5

    def reconstructed(request: gr.Request, path: str | None) -> Any:
        return told(act)(request, path)

    start.click(
        reconstructed,
        picture,
        [*images, status, files],
        show_progress="minimal",
        show_progress_on=status,
        concurrency_id="job",
        concurrency_limit=1,
        api_visibility="private",
    )
