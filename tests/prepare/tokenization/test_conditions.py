"""Two VQGANs: images and what they are conditioned on, tokenized together and learned."""

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from taming_dist.data.codes import CodeDataset, CodeReader
from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Reader, Reading
from taming_dist.errors import UserError
from taming_dist.formats.manifest import resolve
from taming_dist.formats.strict_json import read_json
from taming_dist.generation.generator import Generator
from taming_dist.models.prior.conditions import Request
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.vqgan import VQGAN

TOOL = Path(__file__).parents[3] / "tools" / "tokenize_dataset.py"
GPT = TransformerConfig(0, [], layers=1, heads=2, width=8, condition="codes")


@pytest.fixture
def codes(
    model: Path, condition_model: Path, images: Callable[[int], Path], tmp_path: Path
) -> Path:
    arguments = ["--condition-model", condition_model, "--views", "flip"]
    return tokenized(tmp_path / "codes", model, images(1), *arguments)


def tokenized(out: Path, model: Path, shards: Path, *options: object) -> Path:
    """What the command makes of image shards."""
    arguments = ["--model", model, "--shards", shards, "--out", out, "--batch", "8", *options]
    runpy.run_path(str(TOOL))["main"]([str(argument) for argument in arguments])
    return out


def test_the_condition_of_a_view_is_the_code_of_its_label_map(
    codes: Path, condition_model: Path, images: Callable[[int], Path]
) -> None:
    dataset = CodeDataset.open(str(codes))
    second = VQGAN.from_pretrained(condition_model).eval()
    assert dataset.condition == {
        "fingerprint": second.tokenizer_fingerprint,
        "vocab": 12,
        "grid": [4, 4],
    }
    reader = Reader(resolve(str(images(1))), Reading(Preprocess(8), 8, columns=["seg.png"]))
    (batch,) = reader.epoch_batches()
    labels = batch.columns["seg.png"]
    with torch.inference_mode():
        expected = [
            second.encode(second.config.modality.tensor(maps)) for maps in (labels, labels.flip(-1))
        ]
    (found,) = CodeReader(dataset, micro_batch=16, columns=["cond"]).epoch_batches()
    assert torch.equal(found.columns["cond"], torch.stack(expected, 1).flatten(0, 1))


def test_maps_that_are_scaled_down_first_have_fewer_codes(
    model: Path, condition_model: Path, images: Callable[[int], Path], tmp_path: Path
) -> None:
    shards, options = images(1), ["--condition-model", condition_model, "--condition-size", "4"]
    codes = tokenized(tmp_path / "codes", model, shards, *options)
    dataset, second = CodeDataset.open(str(codes)), VQGAN.from_pretrained(condition_model)
    reader = Reader(resolve(str(shards)), Reading(Preprocess(8), 8, columns=["seg.png"]))
    (batch,) = reader.epoch_batches()
    maps = second.config.modality.tensor(batch.columns["seg.png"])
    with torch.inference_mode():
        expected = second.eval().encode(F.interpolate(maps, size=(4, 4)))
    (found,) = CodeReader(dataset, micro_batch=8, columns=["cond"]).epoch_batches()
    assert torch.equal(found.columns["cond"], expected)
    config = GPT.fitted(dataset, "codes")
    assert (dataset.grid, config.condition.grid) == ((4, 4), [2, 2])
    given = config.condition.requested(Request(3, CodeDataset.open, read_json, None, str(codes)))
    generator = Generator(Transformer(config), VQGAN.from_pretrained(model))
    assert generator.sample(condition=given).images.shape == (3, 3, 8, 8)
    with pytest.raises(UserError, match="condition .*'size': 4.* but this command requires .*"):
        tokenized(codes, model, shards, *options[:2])
    with pytest.raises(UserError, match=r"--condition-size=3: .*use a multiple of 2"):
        tokenized(tmp_path / "odd", model, shards, *options[:3], 3)
    with pytest.raises(UserError, match="--condition-size is for --condition-model"):
        tokenized(tmp_path / "none", model, shards, *options[2:])


def test_a_transformer_learns_and_samples_images_from_the_codes_of_their_label_maps(
    codes: Path, model: Path
) -> None:
    dataset = CodeDataset.open(str(codes))
    config = GPT.fitted(dataset, "codes")
    assert (config.condition.grid, config.condition.vocabulary) == ([4, 4], 12)
    transformer = Transformer(config)
    assert transformer.config.positions == 16 + 16 - 1
    columns = transformer.condition.columns
    batch = next(CodeReader(dataset, lanes=4, micro_batch=4, columns=columns).batches())
    prefix = transformer.condition.prefix(4, batch.columns)
    assert transformer(batch.codes.flatten(1), prefix).shape == (4, 16, 16)
    request = Request(3, CodeDataset.open, read_json, condition=str(codes))
    given = transformer.condition.requested(request)
    images = Generator(transformer, VQGAN.from_pretrained(model)).sample(condition=given).images
    assert images.shape == (3, 3, 8, 8)


def test_what_a_condition_on_codes_cannot_use_is_refused(
    codes: Path, run: Callable[..., None], images: Callable[[int], Path], tmp_path: Path
) -> None:
    run(images(1), tmp_path / "plain")
    plain = CodeDataset.open(str(tmp_path / "plain"))
    with pytest.raises(UserError, match="plain has codes of images only.*--condition-model"):
        GPT.fitted(plain, "plain")
    config = GPT.fitted(CodeDataset.open(str(codes)), "codes")
    asked = config.condition
    with pytest.raises(UserError, match=r"condition: .*plain has codes of images only"):
        asked.requested(Request(3, CodeDataset.open, read_json, condition=str(tmp_path / "plain")))
    with pytest.raises(UserError, match="n: 17 images"):
        asked.requested(Request(17, CodeDataset.open, read_json, condition=str(codes)))
    other = dataclasses.replace(asked, fingerprint="f" * 64)
    with pytest.raises(UserError, match=f"condition: .*fingerprint is {'f' * 64}, but the codes"):
        other.requested(Request(3, CodeDataset.open, read_json, condition=str(codes)))
    with pytest.raises(UserError, match="class_id: .*leave it out"):
        asked.requested(Request(3, CodeDataset.open, read_json, class_id=1))
