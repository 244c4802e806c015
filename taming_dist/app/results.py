"""Where pictures appear on the page, and the work that makes them."""

import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from taming_dist import cli
from taming_dist.app.controls import (
    one_line,
    told,
)
from taming_dist.app.jobs import Job, Jobs
from taming_dist.app.making import (
    Made,
    Progress,
    Story,
    make,
    shown,
)
from taming_dist.app.models import Models
from taming_dist.errors import UserError
from taming_dist.sampling.config import SampleConfig

KEPT_FOLDERS = 64  # of pictures that can still be downloaded
SMALL = 64  # pixels of a side
Ask = Callable[..., tuple[SampleConfig, list[Path]]]


@dataclass
class Desk:
    """The models, the work on them, and folders for what it makes, the last ones of which stay."""

    models: Models
    scratch: Path
    jobs: Jobs = field(default_factory=Jobs)
    _folders: deque[Path] = field(default_factory=deque)

    def folder(self) -> Path:
        """A new folder, whose name nobody can guess."""
        found = self.scratch / secrets.token_hex(16)
        found.mkdir()
        self._folders.append(found)
        if len(self._folders) > KEPT_FOLDERS:
            shutil.rmtree(self._folders.popleft(), ignore_errors=True)
        return found


def stopping(jobs: Jobs) -> Callable[[gr.Request], None]:
    """A handler that stops the work of its user, who wants that or has closed the page."""

    def stop(request: gr.Request) -> None:
        jobs.stop(session(request))

    return stop


def session(request: gr.Request) -> str:
    """What tells users apart."""
    return str(request.session_hash)


@dataclass(frozen=True)
class Result:
    """Where a picture appears: while it is made, and afterwards code by code."""

    picture: gr.Image
    status: gr.HTML
    files: gr.File
    story: gr.State
    step: gr.Slider
    start: gr.Button
    stop: gr.Button

    @classmethod
    def build(cls, desk: Desk, start: gr.Button, stop: gr.Button) -> "Result":
        """Place it."""
        picture = gr.Image(
            label="Picture",
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],
            height=460,
            elem_classes=sharp(desk.models),
        )
        status = gr.HTML(bar(0, "Nothing made yet."), elem_classes="bar")
        step = gr.Slider(
            0, 1, 1, step=1, label="Code by code", info="drag to see it appear", visible=False
        )
        files = gr.File(
            label="Download: the picture with its recipe inside, and what it was made from",
            file_count="multiple",
            interactive=False,
            visible=False,
        )
        found = cls(picture, status, files, gr.State(None), step, start, stop)
        step.input(
            told(partial(retold, desk.models)),
            [step, found.story],
            picture,
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_id="look",
            api_visibility="private",
        )
        return found

    @property
    def outputs(self) -> list[Any]:
        """What `news` gives values for."""
        return [
            self.picture,
            self.status,
            self.files,
            self.story,
            self.step,
            self.start,
            self.stop,
        ]


def retold(models: Models, step: float, story: Story | None) -> Any:
    """A finished picture as it was after so many codes."""
    if story is None or models.generator is None:
        return gr.skip()
    return pixels(shown(models.generator, story.after(int(step))))


def pixels(picture: Any) -> Any:
    """A picture uint8 [3, h, w] as Gradio takes it."""
    return picture.permute(1, 2, 0).numpy()


def bar(share: float, text: str) -> str:
    """How far a picture has got."""
    return f'<progress value="{share:.4f}" max="1"></progress><div>{text}</div>'


def sharp(models: Models) -> list[str]:
    """How pictures are shown: those of few pixels with edges between them."""
    return ["picture", "small"] if models.vqgan.config.resolution <= SMALL else ["picture"]


def running(is_running: bool) -> tuple[Any, Any]:
    """The buttons that start and stop."""
    return gr.update(interactive=not is_running), gr.update(interactive=is_running)


def news(told_: Progress | Made, files: list[Path]) -> tuple[Any, ...]:
    """Values for `Result.outputs`."""
    if isinstance(told_, Made):
        text = "<br>".join([f"Done: {cli.count(len(told_.story), 'step')}.", *told_.notes])
        everything = [str(told_.file), *map(str, files)]
        steps = len(told_.story)
        slider = gr.update(maximum=steps, value=steps, visible=True)
        listed = gr.update(value=everything, visible=True)
        return str(told_.file), bar(1, text), listed, told_.story, slider, *running(False)
    look = gr.skip() if told_.look is None else pixels(told_.look)
    hidden = gr.update(visible=False)
    if not told_.codes:
        said = "Stopped before the first code." if told_.stopped else "Reading what is given ..."
        return look, bar(0, said), hidden, None, hidden, *running(not told_.stopped)
    said = f"{told_.known:,} of {told_.codes:,} codes"
    said = f"Stopped: {said} were written." if told_.stopped else f"{said} ..."
    share = told_.known / told_.codes
    return look, bar(share, said), hidden, None, hidden, *running(not told_.stopped)


def making(desk: Desk, ask: Ask, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
    """Make what the controls ask for, and yield how it gets on."""
    try:
        folder = desk.folder()
        config, files = ask(folder, *values)
        yield news(Progress(0, 0), files)

        def work(job: Job[Progress | Made]) -> None:
            make(desk.models, config, folder, job)

        for each in desk.jobs.run(session(request), work):
            yield news(each, files)
    except UserError as error:
        hidden = gr.update(visible=False)
        yield gr.skip(), bar(0, "Nothing made."), hidden, None, hidden, *running(False)
        raise one_line(error) from error


def connected(desk: Desk, result: Result, ask: Ask, inputs: list[Any]) -> None:
    """Have the buttons of a tab work."""

    def start(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from making(desk, ask, request, *values)

    result.start.click(
        start,
        inputs,
        result.outputs,
        show_progress="minimal",
        show_progress_on=result.status,
        concurrency_id="job",
        concurrency_limit=1,
        trigger_mode="once",
        api_visibility="private",
    )
    result.stop.click(stopping(desk.jobs), queue=False, api_visibility="private")


def buttons(label: str) -> tuple[gr.Button, gr.Button]:
    """Those that start and stop."""
    with gr.Row():
        start = gr.Button(label, variant="primary", scale=2)
        stop = gr.Button("Stop", variant="stop", interactive=False, scale=1, min_width=90)
    return start, stop
