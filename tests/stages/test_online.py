"""Images that are encoded as they are read: the batches that code shards would give."""

import dataclasses
import io
import json
import runpy
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.batching import BatchSizes
from taming_dist.data.codes import CodeBatch, CodesConfig
from taming_dist.data.online import OnlineConfig
from taming_dist.errors import UserError
from taming_dist.formats.npy import to_npy
from taming_dist.launch import Place
from taming_dist.models.modalities import RGB, LabelMap
from taming_dist.models.prior.conditions import CodesCondition, Condition, Unconditional
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.stages import STAGES
from taming_dist.stages.code_sources import SOURCES
from taming_dist.stages.interface import Config, RunConfig, Start
from taming_dist.stages.online import Encoder
from taming_dist.stages.prior import PriorStage, TokenLossConfig
from taming_dist.training.clock import Clock
from taming_dist.training.run import LoopConfig
from tests.data.shard_files import writing_shards
from tests.tiny_models import save_vqgan

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "tokenize_dataset.py"))["main"]
SAMPLES, COLUMNS = 20, ("cls", "cond", "crop", "boxes", "txt")


def export(folder: Path, modality: RGB | LabelMap, codes: int) -> str:
    save_vqgan(folder, modality, codes)
    return str(folder)


@dataclasses.dataclass
class Made:
    """Image shards, their codes, and the exports that made them."""

    images: str
    codes: str
    vqgan: str
    condition: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("online")
    with writing_shards(folder / "images", "train", 8) as write:
        for number in range(SAMPLES):
            draw = np.random.default_rng(number)
            files = {"cls": str(number % 3).encode()}
            for column, shape in (("png", (12, 16, 3)), ("seg.png", (12, 16))):
                out = io.BytesIO()
                most = 256 if column == "png" else 3
                Image.fromarray(draw.integers(0, most, shape, dtype=np.uint8)).save(out, "PNG")
                files[column] = out.getvalue()
            boxes = [{"category": k, "box": [0.2 * k, 0.1, 0.4, 0.5]} for k in range(number % 4)]
            files["json"] = json.dumps({"objects": boxes}).encode()
            files["txt.npy"] = to_npy(draw.normal(size=(3, 4)).astype(np.float16))
            write(f"{number:04d}", files)
    vqgan, condition = export(folder / "v", RGB(), 16), export(folder / "c", LabelMap(3), 12)
    arguments = ["--model", vqgan, "--condition-model", condition, "--coordinates", "--boxes"]
    arguments += ["--text", "txt.npy"]
    arguments += ["--shards", str(folder / "images"), "--out", str(folder / "codes")]
    TOOL([*arguments, "--shard-samples", "8", "--batch", "4", "--threads", "1"])
    return Made(str(folder / "images"), str(folder / "codes"), vqgan, condition)


def config_of(made: Made, online: bool, condition: Condition | None = None, **data: Any) -> Config:
    cut = {"global_batch": 4, "micro_batch": 4, "lanes": 4, "block": 2}
    condition = condition or Unconditional()
    shown = made.condition if isinstance(condition, CodesCondition) else ""
    if online:
        data = {"crop": "center", "flip": False, "threads": 1} | data
        given = {"vqgan": made.vqgan, "condition_vqgan": made.condition}
        chosen: Any = OnlineConfig(made.images, made.images, **cut | given | data)
    else:
        chosen = CodesConfig(made.codes, made.codes, vqgan=made.vqgan, condition_vqgan=shown, **cut)
    sizes = {"layers": 1, "heads": 2, "width": 16}
    model = TransformerConfig(0, [], condition=condition, condition_table="own", **sizes)
    train = LoopConfig(preview_images=2)
    return Config(RunConfig("a"), train, model=model, loss=TokenLossConfig(), data=chosen)


def start(tmp_path: Path, rank: int = 0, world_size: int = 1) -> Start:
    batch = BatchSizes(4, world_size, 4 // world_size, 1)
    return Start(Place(rank, world_size, rank), batch, tmp_path / "run")


def batches(config: Config, start: Start, count: int, at: int = 0) -> list[CodeBatch]:
    """Training batches as a recipe takes them, with every column."""
    source = SOURCES[type(config.data)](config, COLUMNS)
    found = list(islice(source.open(start).train.batches(at), count))
    return [batch if source.encoder is None else source.encoder(batch) for batch in found]


def test_centre_crops_give_the_batches_of_code_shards(made: Made, tmp_path: Path) -> None:
    stored, fresh = (batches(config_of(made, way), start(tmp_path), 7) for way in (False, True))
    for expected, batch in zip(stored, fresh, strict=True):
        assert torch.equal(batch.ids, expected.ids)
        assert batch.columns.keys() == expected.columns.keys()
        for name, column in expected.columns.items():
            assert torch.equal(batch.columns[name], column), name
            assert batch.columns[name].dtype == column.dtype
        assert batch.coded is not None
        assert batch.coded.all()


def test_training_on_them_and_validation_are_those_on_code_shards(
    made: Made, tmp_path: Path, code_recipe: Callable[..., Any]
) -> None:
    stage, found = PriorStage(), []
    for online in (False, True):
        config = config_of(made, online, CodesCondition())
        opened = stage.open_data(config, start(tmp_path))
        code_recipe()  # on plain engines from here on
        recipe = stage.recipe(config, opened, code_recipe().context)
        losses = []
        for step, batch in enumerate(islice(opened.data.train.batches(0), 3)):
            (scalars,) = recipe.train_step([batch], Clock(4, 10, images=4 * step))
            losses.append(scalars["loss"].item())
        val = [(batch, True) for batch in opened.data.val.epoch_batches()]
        picture = recipe.preview(opened.data.preview)
        found.append((opened.model, losses, recipe.validate(val), picture))
    (model, losses, val, picture), (model2, losses2, val2, picture2) = found
    assert (model2, losses2, val2) == (model, losses, val)
    assert picture.rows == picture2.rows
    assert torch.equal(picture.picture, picture2.picture)


def test_random_crops_are_the_same_global_batches_on_any_ranks_and_after_a_stop(
    made: Made, tmp_path: Path
) -> None:
    config = config_of(made, True, crop="random", flip=True)
    alone = batches(config, start(tmp_path), 12)
    ranks = [batches(config, start(tmp_path, rank, 2), 6, at=24) for rank in (0, 1)]
    for whole, *parts in zip(alone[6:], *ranks, strict=True):
        for name in ("codes", "cond", "crop", "cls"):
            joined = torch.stack([part.columns[name] for part in parts], 1).flatten(0, 1)
            assert torch.equal(joined, whole.columns[name]), name
    crops = torch.cat([batch.columns["crop"] for batch in alone])
    assert set(crops[:, 4].tolist()) == {0, 1}
    pixels = {}
    for batch in alone:
        for id, codes in zip(batch.ids.tolist(), batch.codes, strict=True):
            pixels.setdefault(id, []).append(codes)
    assert any(not torch.equal(seen[0], seen[1]) for seen in pixels.values() if len(seen) > 1)


def test_a_step_whose_images_have_no_codes_is_spoilt(
    made: Made, tmp_path: Path, code_recipe: Callable[..., Any]
) -> None:
    config, stage = config_of(made, True), PriorStage()
    opened = stage.open_data(config, start(tmp_path))
    assert opened.encoder is not None
    vqgan = VQGAN.from_pretrained(made.vqgan)
    vqgan.quant_conv.weight.data[:] = torch.nan
    spoilt = dataclasses.replace(opened, encoder=Encoder(vqgan, None, ()))
    recipe = stage.recipe(config, spoilt, code_recipe().context)
    batch = next(opened.data.train.batches(0))
    (scalars,) = recipe.train_step([batch], Clock(4, 10))
    assert scalars["loss"].isnan()
    assert not recipe.transformer.moved


def test_a_run_does_not_resume_with_another_encoder(made: Made, tmp_path: Path) -> None:
    opened = PriorStage().open_data(config_of(made, True), start(tmp_path)).data
    state = json.loads(json.dumps(opened.train.plan.state(8)))
    opened.train.plan.check_state(state)
    other = config_of(made, True, vqgan=export(tmp_path / "other", RGB(), 17))
    plan = PriorStage().open_data(other, start(tmp_path)).data.train.plan
    with pytest.raises(UserError, match=r"data\.vqgan or data\.condition_vqgan .*set it back"):
        plan.check_state(state)


@pytest.mark.parametrize(
    ("condition", "data", "expected"),
    [
        (None, {"vqgan": "nowhere"}, r"data\.vqgan: nowhere: no such export folder"),
        (None, {"size": 7}, r"data\.size=7: .*multiple of 2"),
        (None, {"precision": "fp16"}, r"data\.precision=fp16: use fp32 or bf16"),
        (None, {"streaming": True}, r"data\.streaming=true: .*leave it out"),
        (CodesCondition(), {"condition_vqgan": ""}, r"data\.condition_vqgan: .* give it"),
        (CodesCondition(), {"condition_vqgan": "x"}, r"data\.condition_vqgan: x: no such"),
        (CodesCondition(vocabulary=9), {}, r"model\.condition\.vocabulary is 9, but .* 12"),
    ],
)
def test_what_does_not_fit_is_one_line(
    made: Made, tmp_path: Path, condition: Condition | None, data: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        PriorStage().open_data(config_of(made, True, condition, **data), start(tmp_path))


def test_only_a_prior_is_trained_on_them(made: Made) -> None:
    from taming_dist.stages import stage_of

    config = config_of(made, True)
    assert stage_of(config) is STAGES["transformer"]
    config.model = VQGANConfig(VectorQuantizerConfig(codes=8, dim=4))
    with pytest.raises(UserError, match="data=OnlineConfig: choose"):
        stage_of(config)
