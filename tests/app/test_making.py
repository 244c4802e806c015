"""What the page makes, without a browser: the pictures of the sampling command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist import sample
from taming_dist.app.config import DemoConfig
from taming_dist.app.jobs import Halted, Job, Jobs
from taming_dist.app.making import Made, Progress, asked, make, reconstruct, shown
from taming_dist.app.models import Models, load
from taming_dist.app.painting import coloured, kept_codes, label_map
from taming_dist.errors import UserError
from taming_dist.formats.manifest import IMAGES_FORMAT, Manifest
from taming_dist.generation.pictures import to_uint8
from taming_dist.models.prior.conditions import Unconditional
from taming_dist.models.prior.schemes.next_scale import NextScale
from taming_dist.models.quantizers import MultiScaleConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.sampling.config import SampleConfig
from tests.app.conftest import GRID, LABELS, SIDE
from tests.tiny_models import save_transformer, tiny_config

SETTINGS: dict[str, Any] = {"seed": 3, "temperature": 0.9, "top_k": 5, "top_p": 0.95}


def models_of(exports: Path, kind: str = "class", **more: Any) -> Models:
    config = {"transformer": str(exports / kind), "vqgan": str(exports / "vqgan")} | more
    return load(DemoConfig(**config))


def made(models: Models, config: SampleConfig, folder: Path) -> tuple[Made, list[Progress]]:
    """The picture of a command, and what was told before it."""
    jobs = Jobs()
    try:
        *news, last = jobs.run("me", lambda job: make(models, config, folder, job))
    finally:
        jobs.close()
    assert isinstance(last, Made)
    return last, news


def commanded(config: SampleConfig, out: Path) -> bytes:
    """The file that the sampling command writes with the same settings."""
    sample.main(SampleConfig(**{**vars(config), "out": str(out)}))
    return (out / "000000.png").read_bytes()


@pytest.mark.parametrize(
    ("kind", "settings", "size"),
    [
        ("class", {"class_id": 2}, None),
        ("class", {"class_id": 1}, (SIDE, 2 * SIDE)),
        ("masked", {"steps": 3}, None),
    ],
)
def test_a_picture_is_the_very_file_that_the_sampling_command_writes(
    exports: Path, tmp_path: Path, kind: str, settings: dict[str, Any], size: Any
) -> None:
    models = models_of(exports, kind)
    config = asked(models, SETTINGS | settings, size=size)
    found, news = made(models, config, tmp_path)
    assert found.file.read_bytes() == commanded(config, tmp_path / "out")
    shares = [each.known / each.codes for each in news]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1


def test_a_completed_picture_is_that_of_the_sampling_command_too(
    exports: Path, tmp_path: Path, photo: Path
) -> None:
    models = models_of(exports)
    mask = tmp_path / "mask.png"
    painted = np.zeros((SIDE * 4, SIDE * 4), bool)
    painted[20:40, 20:50] = True
    Image.fromarray(kept_codes(painted, 2, 4)).save(mask)
    given = {"class_id": 0, "image": str(photo), "mask": str(mask)}
    config = asked(models, SETTINGS | given)
    found, _ = made(models, config, tmp_path)
    assert found.file.read_bytes() == commanded(config, tmp_path / "out")
    assert found.story.start.sum() == GRID * GRID - 3 * 5


def test_a_label_map_is_a_condition_as_it_is_of_the_sampling_command(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = models_of(exports, "seg", condition_vqgan=str(exports / "labels"))
    labels = tmp_path / "labels.png"
    Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % LABELS).save(
        labels
    )
    config = asked(models, SETTINGS, labels)
    monkeypatch.setattr(VQGAN, "from_pretrained", None)  # it is open already
    found, _ = made(models, config, tmp_path)
    monkeypatch.undo()
    assert found.file.read_bytes() == commanded(config, tmp_path / "out")


def named_shards(folder: Path, names: list[str] | None, **details: Any) -> str:
    """A folder of shards, of which there are none, whose manifest names classes."""
    folder.mkdir()
    Manifest(IMAGES_FORMAT, (), None if names is None else tuple(names), details).save(folder)
    return str(folder)


def test_classes_are_chosen_by_the_names_that_shards_give_them(
    exports: Path, tmp_path: Path
) -> None:
    assert models_of(exports).wants.classes == ("0", "1", "2")
    shards = named_shards(tmp_path / "some", ["barn", "cat"])
    assert models_of(exports, classes=shards).wants.classes == ("0: barn", "1: cat", "2")
    synsets = ["n01", "n02", "n03"]
    shards = named_shards(tmp_path / "words", synsets, class_names=["tench", "shark", "ray"])
    assert models_of(exports, classes=shards).wants.classes == ("0: tench", "1: shark", "2: ray")


@pytest.mark.parametrize(
    ("kind", "names", "line"),
    [
        ("class", None, "classes: the shards of .* do not name their classes"),
        ("class", list("abcd"), "classes: .* names 4 classes, but the transformer has learned 3"),
        ("masked", ["a"], "classes: this transformer is not conditioned on classes"),
    ],
)
def test_names_that_are_not_those_of_the_transformers_classes_are_refused(
    exports: Path, tmp_path: Path, kind: str, names: list[str] | None, line: str
) -> None:
    with pytest.raises(UserError, match=line):
        models_of(exports, kind, classes=named_shards(tmp_path / "shards", names))


def test_the_story_of_a_picture_goes_from_nothing_to_all_of_its_codes_in_the_order(
    exports: Path, tmp_path: Path
) -> None:
    for kind, steps in (("class", GRID * GRID), ("masked", 4)):
        models = models_of(exports, kind)
        settings = SETTINGS | ({"class_id": 0} if kind == "class" else {})
        story = made(models, asked(models, settings), tmp_path)[0].story
        assert len(story) == steps
        known = [int(story.after(step).mask.sum()) for step in range(steps + 1)]
        assert known[0] == 0
        assert known == sorted(set(known))
        assert known[-1] == GRID * GRID
        if kind == "class":
            assert story.after(5).mask.flatten().nonzero().flatten().tolist() == list(range(5))


def test_a_picture_that_is_written_by_scales_is_seen_after_each_of_them(tmp_path: Path) -> None:
    quantizer = MultiScaleConfig(codes=24, dim=4, scales=[1, 2, 4])
    torch.manual_seed(0)
    vqgan = VQGAN(tiny_config(quantizer, latent_channels=32))
    vqgan.save_pretrained(tmp_path / "vqgan")
    scheme, condition = NextScale([1, 2, 4]), Unconditional()
    save_transformer(tmp_path / "t", vqgan, grid=[21], scheme=scheme, condition=condition)
    models = load(DemoConfig(transformer=str(tmp_path / "t"), vqgan=str(tmp_path / "vqgan")))
    story = made(models, asked(models, SETTINGS), tmp_path)[0].story
    assert len(story) == 3
    seen = [shown(models.generator, story.after(step)) for step in range(4)]
    assert seen[0].float().std() == 0
    for picture, end in zip(seen[1:], (1, 5, 21), strict=True):
        first = models.generator.pictures(story.codes[None, :end])[0]
        assert torch.equal(picture, to_uint8(first))
    assert not torch.equal(seen[1], seen[2])


def test_a_picture_is_stopped_between_two_codes(exports: Path, tmp_path: Path) -> None:
    models, news = models_of(exports), []
    config = asked(models, SETTINGS | {"class_id": 0})
    jobs = Jobs()
    for each in jobs.run("me", lambda job: make(models, config, tmp_path, Stopping(job, 13))):
        news.append(each)
    jobs.close()
    last = news[-1]
    assert isinstance(last, Progress)
    assert last.stopped
    assert last.known == 13
    assert not (tmp_path / "picture.png").exists()


class Stopping(Job[Any]):
    """A job that is stopped at its `calls`-th step."""

    def __init__(self, job: Job[Any], calls: int) -> None:
        self.tell, self.left = job.tell, calls

    def go_on(self) -> None:
        self.left -= 1
        if not self.left:
            raise Halted


def test_a_user_stops_the_own_work_only_and_work_is_done_one_piece_at_a_time() -> None:
    jobs, steps = Jobs(), []

    def endless(job: Job[int]) -> None:
        for step in range(10**9):
            job.go_on()
            steps.append(step)
            job.tell(step)

    running = jobs.run("one", endless)
    next(running)
    other = jobs.run("two", lambda job: job.tell(-1))
    jobs.stop("three")
    next(running)
    jobs.stop("one")
    with pytest.raises(Halted):
        list(running)
    count = len(steps)
    assert list(other) == [-1]
    assert len(steps) == count
    jobs.close()


def test_who_listens_no_longer_has_stopped_the_work() -> None:
    jobs, ended = Jobs(), []

    def endless(job: Job[int]) -> None:
        try:
            while True:
                job.go_on()
                job.tell(1)
        finally:
            ended.append(True)

    running = jobs.run("one", endless)
    next(running)
    running.close()
    jobs.close()
    assert ended == [True]


def test_a_painted_map_is_read_back_also_with_softened_rims() -> None:
    labels = np.random.default_rng(1).integers(0, LABELS, (6, 8)).astype(np.uint8)
    canvas = coloured(labels, LABELS, 10)
    assert (label_map(canvas, LABELS, (6, 8)) == labels).all()
    soft = canvas.copy()
    soft[9::10] = (soft[9::10].astype(int) + 77) % 256  # a row of each square has no class' colour
    assert (label_map(soft, LABELS, (6, 8)) == labels).all()
    with pytest.raises(UserError, match="label map: nothing is painted"):
        label_map(np.full((60, 80, 3), 1, np.uint8), LABELS, (6, 8))


def test_a_code_is_made_anew_where_any_of_its_square_is_painted() -> None:
    painted = np.zeros((32, 32), bool)
    painted[0, 0] = painted[17, 31] = True
    mask = kept_codes(painted, 2, 4)
    assert np.argwhere(mask == 255).tolist() == [[0, 0], [2, 3]]


def test_a_reconstruction_has_the_codes_of_the_vqgan(
    exports: Path, tmp_path: Path, photo: Path
) -> None:
    models = load(DemoConfig(vqgan=str(exports / "vqgan")))
    found = reconstruct(models, photo, tmp_path)
    assert found.seen.shape == found.picture.shape == (3, SIDE, 20)
    vqgan = VQGAN.from_pretrained(exports / "vqgan").eval()
    codes = vqgan.encode(found.seen[None].float() / 127.5 - 1)
    assert torch.equal(codes[0], found.codes)
    assert (np.load(tmp_path / "codes.npy") == codes[0].numpy()).all()
    written = np.asarray(Image.open(tmp_path / "reconstruction.png"))
    assert (written == found.picture.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"vqgan": ""}, "an export is missing: give vqgan="),
        ({"condition_vqgan": "labels"}, "condition_vqgan: the transformer is not conditioned on"),
        ({"transformer": "", "text_encoder": "clip"}, "text_encoder: it is for a transformer"),
        ({"transformer": "seg"}, "condition_vqgan: the transformer is conditioned on pictures"),
        ({"transformer": "seg", "condition_vqgan": "vqgan"}, "condition_vqgan: its codebook has"),
        ({"text_encoder": "clip"}, "text_encoder: this transformer is not conditioned on text"),
        ({"vqgan": "labels"}, "vqgan: its codebook has 8 codes"),
    ],
)
def test_exports_that_do_not_fit_are_refused_in_one_line(
    exports: Path, settings: dict[str, str], line: str
) -> None:
    given = {"transformer": "class", "vqgan": "vqgan"} | settings
    places = {
        name: str(exports / own) if own and name != "text_encoder" else own
        for name, own in given.items()
    }
    with pytest.raises(UserError, match=line):
        load(DemoConfig(**places))


def test_more_pixels_than_the_page_makes_are_refused(exports: Path) -> None:
    models = models_of(exports, most_pixels=1024)
    asked(models, SETTINGS, size=(32, 32))
    with pytest.raises(UserError, match=r"size: 32x34 are 1088 pixels, .* at most 1024"):
        asked(models, SETTINGS, size=(32, 34))
