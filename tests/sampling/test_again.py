"""Pictures carry their recipe, and are made again from it, bit for bit."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from taming_dist.errors import UserError
from taming_dist.models.prior.transformer import Transformer
from taming_dist.sampling.again import read_text
from tests.sampling.conftest import Sample, record

SETTINGS = {"seed": 5, "temperature": 0.9, "top_k": 9, "top_p": 0.9}


def recipe_in(picture: Path) -> dict[str, Any]:
    with Image.open(picture) as image:
        return json.loads(image.text["taming_dist"])


def test_every_picture_says_what_made_it(sample: Sample) -> None:
    out = sample(**SETTINGS)
    said, whole = recipe_in(out / "000003.png"), record(out)
    assert said.pop("image") == 3
    assert said == {name: own for name, own in whole.items() if name not in ("images", "size")}
    assert {"settings", "fingerprints", "inputs", "version", "torch", "device"} < said.keys()


def test_a_run_is_made_again_from_its_record(sample: Sample) -> None:
    out = sample(**SETTINGS)
    again = sample("again", from_=str(out / "samples.json"))
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_a_run_is_made_again_and_continued_with_the_threads_that_it_began_with(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        out = sample()
        assert record(out)["threads"] == threads + 1
        with monkeypatch.context() as killing:
            killing.setattr("taming_dist.sampling.work.Work._make", killed)
            with pytest.raises(Killed):
                sample("continued")
        for name, given in (("again", {"from_": str(out)}), ("continued", {})):
            torch.set_num_threads(threads)
            sample(name, **given)
            assert torch.get_num_threads() == threads + 1
            for path in out.iterdir():
                assert path.read_bytes() == (tmp_path / name / path.name).read_bytes()
    finally:
        torch.set_num_threads(threads)


class Killed(BaseException):
    pass


def killed(*_: Any) -> None:
    raise Killed


def test_one_picture_is_made_again_from_itself_alone(sample: Sample) -> None:
    out = sample(**SETTINGS)
    again = sample("again", from_=str(out / "000005.png"))
    assert sorted(path.name for path in again.iterdir()) == [
        "000005.png",
        "grid.png",
        "samples.json",
    ]
    assert (out / "000005.png").read_bytes() == (again / "000005.png").read_bytes()
    twice = sample("twice", from_=str(again / "samples.json"))
    assert (twice / "grid.png").read_bytes() == (again / "grid.png").read_bytes()


def test_a_picture_of_any_size_is_read_for_its_recipe_alone(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow refuses large ones, and pixels are not looked at."""
    out = sample(**SETTINGS)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    whole = (out / "000005.png").read_bytes()
    (out / "000005.png").write_bytes(whole[: whole.index(b"IDAT") + 8])
    said = read_text(str(out / "000005.png"))
    assert said.pop("image") == 5
    assert said.items() <= record(out).items()


def test_exports_may_have_moved_but_not_changed(
    sample: Sample, exports: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(exports / "class", moved)
    out = sample("out", **SETTINGS, transformer=str(moved))
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="moved: no such export folder"):
        sample("again", from_=str(out / "samples.json"))
    given = {"from_": str(out / "samples.json")}
    sample("again", **given, transformer=str(exports / "class"))
    other = Transformer.from_pretrained(exports / "class")
    other.head.weight.data.add_(1)
    other.save_pretrained(moved)
    with pytest.raises(UserError, match=r"was made with the transformer's fingerprint=\w+, here"):
        sample("other", **given, transformer=str(moved))
    assert not (tmp_path / "other").exists()


def test_another_version_or_device_is_noted(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    out = sample()
    said = record(out) | {"device": "NVIDIA H200", "torch": "2.9.0"}
    (out / "samples.json").write_text(json.dumps(said))
    capsys.readouterr()
    sample("again", from_=str(out))
    found = capsys.readouterr().err
    assert re.search(r"note: made with torch 2\.9\.0, here .*; device NVIDIA H200, here cpu", found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "taming_dist.samples.v9"}, r"is not of this version \(taming_dist.samples.v9"),
        ({"settings": 3}, "has no recipe of pictures"),
        ({"fingerprints": [1]}, "has a damaged recipe"),
        ({"image": 99}, "has a damaged recipe"),
        ({"threads": 10**9}, "has a damaged recipe"),
        ({"settings": {"n": 2, "colour": "red"}}, "has colour=red, which .* cannot read"),
        ({"settings": {"n": "many"}}, "has n=many, which .* cannot read"),
        ({"settings": {"n": -2}}, "n=-2: use a whole number"),
        ({"settings": {"n": 10**8}}, "n=100000000: use a whole number from 1 to 10000000"),
    ],
)
def test_a_record_that_is_no_recipe_is_refused(
    sample: Sample, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    made = {"format": "taming_dist.samples.v1", "settings": {}, "fingerprints": {}, "inputs": {}}
    facts = {"version": "0", "torch": "0", "device": "cpu", "threads": 1}
    (tmp_path / "samples.json").write_text(json.dumps(made | facts | change))
    with pytest.raises(UserError, match=message):
        sample("again", from_=str(tmp_path / "samples.json"))


def test_what_has_no_recipe_or_is_no_picture_is_refused(sample: Sample, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    texts = PngInfo()
    texts.add_text("taming_dist", "[" * 10_000)
    Image.new("RGB", (4, 4)).save(tmp_path / "deep.png", pnginfo=texts)
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (
        ("plain.png", "has no recipe of pictures"),
        ("deep.png", "is no PNG of a run"),
        ("text.png", "is no PNG of a run"),
        ("absent.png", "there is no file"),
        ("absent.json", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            sample("again", from_=str(tmp_path / name))


def test_what_the_recipe_says_cannot_be_given_too(sample: Sample) -> None:
    out = sample()
    with pytest.raises(UserError, match=r"seed: from=.* says it already, leave it out"):
        sample("again", from_=str(out), seed=3)
