"""Texts of images: tokenized, stored, read, and sampled from."""

import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.codes import CodeDataset, CodeReader
from taming_dist.errors import UserError
from taming_dist.formats.npy import to_npy
from taming_dist.models.prior.conditions import TextCondition
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.sample import SampleConfig
from taming_dist.sample import main as sample
from taming_dist.text_encoders import open_text_encoder
from tests.data.shard_files import writing_shards
from tests.prepare.tokenization.conftest import text
from tests.text_encoder import TOKENS, WIDTH, WORDS, save_text_encoder

TOOLS = Path(__file__).parents[3] / "tools"
TOOL = runpy.run_path(str(TOOLS / "tokenize_dataset.py"))["main"]
verify_shards = runpy.run_path(str(TOOLS / "verify_shards.py"))["main"]
SAMPLES = 10


def caption(number: int) -> str:
    """A text of 1 to 8 words."""
    return " ".join(WORDS[(number + k) % len(WORDS)] for k in range(1 + number % 8))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_text_encoder(tmp_path_factory.mktemp("texts") / "encoder")


def write_images(folder: Path, **files: Any) -> Path:
    """Images with a caption in .txt, two in .json, and an embedding; `files` change those of 3."""
    with writing_shards(folder, "train", 8) as write:
        for number in range(SAMPLES):
            out = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out, "PNG")
            both = {"captions": [caption(number), "the house"]}
            known = {"png": out.getvalue(), "txt": f"{caption(number)}\n".encode()}
            known |= {"json": json.dumps(both).encode(), "txt.npy": to_npy(text(number))}
            write(
                f"{number:04d}", known | ({k: v for k, v in files.items()} if number == 3 else {})
            )
    return folder


def run(model: Path, images: Path, out: Path, *options: Any) -> CodeDataset:
    arguments = ["--model", model, "--shards", images, "--out", out, "--shard-samples", 6]
    TOOL([str(argument) for argument in (*arguments, "--batch", 4, *options)])
    return CodeDataset.open(str(out))


def texts_of(dataset: CodeDataset) -> torch.Tensor:
    (batch,) = CodeReader(dataset, micro_batch=100, columns=["txt"]).epoch_batches()
    return batch.columns["txt"]


@pytest.mark.parametrize("column", ["txt", "captions"])
def test_captions_are_stored_as_the_encoder_has_them(
    model: Path, encoder: str, tmp_path: Path, column: str
) -> None:
    images = write_images(tmp_path / "images")
    given = ("--text", column, "--text-encoder", encoder)
    dataset = run(model, images, tmp_path / "out", *given, "--views", "flip")
    verify_shards([str(tmp_path / "out")])
    opened = open_text_encoder(encoder, "")
    expected = torch.stack([opened.encode([caption(k)])[0] for k in range(SAMPLES)])
    found = texts_of(dataset)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected.repeat_interleave(2, 0), atol=2e-3, rtol=2e-3)
    lengths = [min(TOKENS, 2 + k % 8) for k in range(SAMPLES)]  # with the end
    assert (found != 0).any(-1).sum(1)[::2].tolist() == lengths
    facts = {"encoder": encoder, "fingerprint": opened.fingerprint}
    assert dataset.text == facts | {"tokens": TOKENS, "width": WIDTH}


def test_embeddings_of_image_shards_are_stored_as_they_are(model: Path, tmp_path: Path) -> None:
    wrong = to_npy(np.ones((2, 4), np.float16))
    images = write_images(tmp_path / "images", **{"txt.npy": wrong})
    dataset = run(model, images, tmp_path / "out", "--text", "txt.npy")
    kept = [number for number in range(SAMPLES) if number != 3]  # of another shape: left out
    assert torch.equal(texts_of(dataset), torch.from_numpy(np.stack([text(k) for k in kept])))
    assert dataset.text == {"encoder": "", "fingerprint": "", "tokens": 3, "width": 4}
    fitted = TransformerConfig(0, [], condition=TextCondition()).fitted(dataset, "x").condition
    assert (fitted.tokens, fitted.width) == (3, 4)


def test_an_image_without_a_caption_is_left_out(
    model: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images", txt=b" \n")
    given = ("--text", "txt", "--text-encoder", encoder)
    assert run(model, images, tmp_path / "out", *given).num_samples == SAMPLES - 1
    assert "left out: 0003" in capsys.readouterr().out


def test_a_folder_of_other_texts_is_refused(model: Path, encoder: str, tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "images"), tmp_path / "out"
    run(model, images, out, "--text", "txt", "--text-encoder", encoder)
    other = save_text_encoder(tmp_path / "other", seed=1)
    for given in (("txt", other), ("captions", encoder)):
        with pytest.raises(UserError, match=r"with the (text|preprocessing) .*another --out"):
            run(model, images, out, "--text", given[0], "--text-encoder", given[1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--text", "txt"], r"--text txt needs --text-encoder"),
        (["--text", "titles", "--text-encoder", "E"], r"--text titles: its json has no 'titles'"),
        (["--text", "emb.npy"], r"--text emb\.npy: 0 of 10 samples .* have a \.emb\.npy"),
        (["--text", "txt.npy", "--text-encoder", "E"], r"has embeddings already: leave out"),
        (["--text", "txt", "--text-encoder", "/nowhere"], r"--text-encoder=/nowhere cannot be lo"),
        (["--text-encoder", "E"], r"--text-encoder requires --text COLUMN"),
        (["--text", "txt", "--text-encoder", "E", "--text-tokens", 7], r"takes 6 tokens"),
    ],
)
def test_texts_that_cannot_be_had_are_one_line(
    model: Path, encoder: str, tmp_path: Path, options: list[Any], expected: str
) -> None:
    images = write_images(tmp_path / "images")
    given = [encoder if option == "E" else option for option in options]
    with pytest.raises(UserError, match=expected):
        run(model, images, tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package transformers: pip install 'taming-d"):
        open_text_encoder("x", "text_encoder")


def test_a_prompt_samples_what_the_same_text_of_code_shards_does(
    model: Path, encoder: str, tmp_path: Path
) -> None:
    codes = run(model, write_images(tmp_path / "i"), tmp_path / "codes", "--text", "txt", *(
        "--text-encoder", encoder,
    ))  # fmt: skip
    torch.manual_seed(0)
    sizes = {"layers": 1, "heads": 2, "width": 16}
    config = TransformerConfig(0, [], condition=TextCondition(), null_prefix=True, **sizes)
    transformer = Transformer(config.fitted(codes, "codes"))
    for parameter in transformer.parameters():
        parameter.data.normal_(0, 0.3)
    transformer.save_pretrained(tmp_path / "prior")
    made = {"transformer": str(tmp_path / "prior"), "vqgan": str(model), "n": 3, "guidance": 2.0}

    def pictures(name: str, **given: Any) -> list[bytes]:
        sample(SampleConfig(**made, out=str(tmp_path / name), **given))
        files = [tmp_path / name / f"{k:06d}.png" for k in range(3)]
        return [Image.open(file).tobytes() for file in files]  # their recipes differ

    stored = pictures("stored", condition=str(tmp_path / "codes"))
    assert pictures("prompts", prompt=[caption(k) for k in range(3)]) == stored
    assert pictures("other", prompt="two red house") != stored
    other = save_text_encoder(tmp_path / "other", seed=1)
    for given, expected in (
        ({"prompt": "a cat", "text_encoder": other}, r"has the fingerprint .* give that encoder"),
        ({"prompt": "a cat", "condition": str(tmp_path / "codes")}, "give one of the two"),
        ({"prompt": 3}, "prompt: 3 is no text"),
        ({}, r"give prompt=\.\.\. or code shards with texts"),
    ):
        with pytest.raises(UserError, match=expected):
            sample(SampleConfig(**made, out=str(tmp_path / "refused"), **given))
