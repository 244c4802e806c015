"""The command, with a real open_clip model of tiny size and random weights."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from taming_dist.clip import main
from taming_dist.errors import UserError
from taming_dist.guiding.config import ClipConfig
from taming_dist.guiding.open_clip_model import OpenClip, open_clip_model
from taming_dist.guiding.optimise import Optimisation
from taming_dist.models.modalities import RGB, LabelMap
from taming_dist.models.vqgan import VQGAN
from taming_dist.sampling.given import cut
from taming_dist.vision import torchvision_models
from tests.tiny_models import save_vqgan

pytestmark = pytest.mark.slow

CONTEXT = 12
CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export, one of label maps, a model of open_clip, and a picture."""
    torchvision_models("CLIP")
    import open_clip

    folder = tmp_path_factory.mktemp("made")
    save_vqgan(folder / "vqgan", RGB(), 16)
    save_vqgan(folder / "maps", LabelMap(classes=3), 16)
    (folder / "clip").mkdir()
    record = {
        "model_cfg": CLIP,
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]},
    }
    (folder / "clip/open_clip_config.json").write_text(json.dumps(record))
    state = open_clip.model.CLIP(**CLIP).state_dict()
    save_file(state, folder / "clip/open_clip_model.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def config(made: Path, out: Path, **settings: Any) -> ClipConfig:
    usual: dict[str, Any] = {"text": "a red barn | fog:-0.5", "steps": 5, "every": 2, "cuts": 3}
    places = {"vqgan": f"{made}/vqgan", "out": str(out), "clip_model": f"{made}/clip"}
    return ClipConfig(**usual | places | settings)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "picture.json").read_text())


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "taming_dist.clip", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_writes_pictures_and_what_made_them(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_command(
        f"vqgan={made}/vqgan", f"out={out}", f"clip_model={made}/clip", "steps=5", "every=2",
        "cuts=3", "size=8x12", "text=a red barn | fog:-0.5", "optimise=codes",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 steps, loss ")
    assert "5/5 steps, " in done.stderr
    assert sorted(os.listdir(out)) == ["picture.json", "picture.png", "steps"]
    assert sorted(os.listdir(out / "steps")) == ["000002.png", "000004.png"]
    assert pixels(out / "picture.png").shape == (8, 12, 3)
    found = record(out)
    assert [step for step, _ in found["losses"]] == [2, 4, 5]
    assert found["settings"]["text"] == "a red barn | fog:-0.5"
    assert found["fingerprints"]["vqgan"] == VQGAN.from_pretrained(made / "vqgan").fingerprint
    with Image.open(out / "picture.png") as picture:
        inside = json.loads(picture.text["taming_dist"])  # type: ignore[attr-defined]
    assert inside == {name: own for name, own in found.items() if name != "losses"}
    assert (inside["format"], inside["steps_made"]) == ("taming_dist.clip.v1", 5)


@pytest.mark.parametrize("optimise", ["latents", "codes"])
def test_a_seed_gives_one_picture_and_another_another(
    made: Path, tmp_path: Path, optimise: str
) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        main(config(made, tmp_path / name, seed=seed, optimise=optimise))
    one, two, three = (pixels(tmp_path / name / "picture.png") for name in ("one", "two", "three"))
    assert (one == two).all()
    assert (one != three).any()
    assert record(tmp_path / "one")["losses"] == record(tmp_path / "two")["losses"]


def test_it_begins_with_a_picture_and_is_led_to_others(made: Path, tmp_path: Path) -> None:
    photo = str(made / "photo.png")
    begun = {"text": "", "target": f"{photo}:2", "image": photo, "pull": 1.0, "steps": 1}
    main(config(made, tmp_path, **begun, lr=1e-6))
    vqgan = VQGAN.from_pretrained(made / "vqgan")
    square = cut(pixels(made / "photo.png"), (8, 8), Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(square).permute(2, 0, 1)[None] / 127.5 - 1
    expected = (vqgan.decode_codes(vqgan.encode(tensor)).clamp(-1, 1) + 1) * 127.5
    found = pixels(tmp_path / "picture.png").transpose(2, 0, 1)
    assert np.abs(found - expected[0].detach().numpy()).max() <= 1
    assert set(record(tmp_path)["inputs"]) == {"image", "target"}


def test_a_run_that_is_stopped_keeps_its_picture(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Optimisation.steps

    def steps(self: Optimisation) -> Iterator[Tensor]:
        for number, loss in enumerate(whole(self)):
            yield loss
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Optimisation, "steps", steps)
    main(config(made, tmp_path, steps=500))
    assert capsys.readouterr().out.startswith("stopped by SIGINT after 3 of 500 steps: ")
    assert record(tmp_path)["steps_made"] == 3
    assert pixels(tmp_path / "picture.png").shape == (8, 8, 3)


def test_a_second_run_replaces_the_first_and_nothing_of_others(made: Path, tmp_path: Path) -> None:
    main(config(made, tmp_path / "out"))
    (tmp_path / "out/steps/mine.png").write_text("a holiday")
    main(config(made, tmp_path / "out", every=0))
    assert os.listdir(tmp_path / "out/steps") == ["mine.png"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/picture.png").write_text("a holiday")
    with pytest.raises(UserError, match=r"out: .*picture\.png is there already"):
        main(config(made, tmp_path / "other"))
    assert os.listdir(tmp_path / "other") == ["picture.png"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": ""}, r"text=\.\.\. is missing"),
        ({"text": "a | "}, "text: a part of it is empty"),
        ({"target": "absent.png"}, r"target: there is no file absent\.png"),
        ({"image": "absent.png"}, r"image: there is no file absent\.png"),
        ({"pull": 1.0}, r"pull=1\.0: toward what"),
        ({"size": "8x9"}, "size: the sides of 8x9 are not multiples .* give 8x8"),
        ({"size": "0x8"}, "size: the sides of 0x8"),
        ({"size": "8 px"}, "size: '8 px' is no size"),
        ({"vqgan": "absent"}, "absent: no such export folder"),
        ({"clip_model": "ViT-B-33"}, "clip_model=ViT-B-33: there is no such folder"),
        ({"clip_model": "RN50"}, "clip_weights is missing: .* of RN50, or what open_clip"),
        ({"clip_model": "RN50", "clip_weights": "absent.pt"}, "there is no such file"),
        ({"clip_weights": "openai"}, "clip_weights=openai: the folder .* has its own"),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(
    made: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(config(made, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_maps_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="makes maps"):
        main(config(made, tmp_path / "out", vqgan=f"{made}/maps"))


def test_weights_that_are_programs_or_of_another_model_are_refused(
    made: Path, tmp_path: Path
) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"code": print}))
    torch.save({"code": os.system}, tmp_path / "code.pt")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "weights.npz").write_text("")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    for name, message in (
        ("script.pt", "is a TorchScript program"),
        ("pickle.pt", "holds more than tensors"),
        ("code.pt", "holds more than tensors"),
        ("pointer.safetensors", "is a Git LFS pointer"),
        ("weights.npz", "is no file of weights"),
        ("other.safetensors", "do not fit"),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            main(config(made, tmp_path / "out", clip_model="RN50",
                        clip_weights=str(tmp_path / name)))  # fmt: skip
        assert "\n" not in str(refusal.value)


def test_weights_that_cannot_be_downloaded_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import open_clip

    def failing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("no network\nat all")

    monkeypatch.setattr(open_clip, "download_pretrained", failing)
    with pytest.raises(UserError, match=r"laion2b_s34b_b79k: .* failed \(no network at all\)"):
        open_clip_model("ViT-B-32", "", torch.device("cpu"))


@pytest.fixture
def network(made: Path) -> OpenClip:
    return open_clip_model(f"{made}/clip", "", torch.device("cpu"))


def test_the_model_is_what_its_folder_says(network: OpenClip) -> None:
    assert (network.size, network.mean, network.std) == (16, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert network.encode_image(torch.zeros(2, 3, 16, 16)).shape == (2, 16)
    assert network.encode_text(network.tokenize(["a barn"])).shape == (1, 16)


def test_a_text_that_clip_cannot_read_whole_is_known(network: OpenClip) -> None:
    fitting = " ".join(["barn"] * (CONTEXT - 2))  # and a token at either end
    assert not network.is_cut(fitting)
    assert network.is_cut(f"{fitting} barn")


def test_one_that_is_cut_is_told(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config(made, tmp_path, text="barn " * CONTEXT, steps=1))
    assert capsys.readouterr().err.count("is longer than CLIP reads: it is cut") == 1
