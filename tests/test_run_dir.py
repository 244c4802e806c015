"""A run directory is resumed by a run whose networks and optimizer are those of its checkpoints."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from taming_dist.config import to_yaml
from taming_dist.errors import UserError
from taming_dist.run_dir import check_run_dir
from taming_dist.stages.interface import Config

Compose = Callable[..., Config]

STAGE_1 = ("+experiment=flickr", "+scale=laptop")
STAGE_2 = ("+experiment=flickr_transformer", "+scale=laptop")
EMA = (*STAGE_1, "model/quantizer=ema")
DROPPING = (*STAGE_2, "model/condition=class", "loss.condition_dropout=0.1")
DINO = (*STAGE_1, "loss/discriminator=dino")


@pytest.mark.parametrize(
    ("before", "change", "key", "was", "now"),
    [
        (STAGE_1, "loss.discriminator.channels=8", "loss.discriminator.channels", "16", "8"),
        (STAGE_1, "loss.discriminator.norm=group", "loss.discriminator.norm", "batch", "group"),
        (STAGE_1, "loss.discriminator=null", "loss.discriminator", "patchgan", "null"),
        (STAGE_1, "loss/discriminator=dino", "loss.discriminator", "patchgan", "dino"),
        (DINO, "loss.discriminator.depths=[1,5]", "loss.discriminator.depths", "", "[1, 5]"),
        (STAGE_1, "model.channels=64", "model.channels", "32", "64"),
        (STAGE_1, "model.quantizer.codes=512", "model.quantizer.codes", "1024", "512"),
        (STAGE_1, "model/quantizer=ema", "model.quantizer", "", "ema"),
        (STAGE_1, "model/quantizer=fsq", "model.quantizer", "vector", "fsq"),
        (EMA, "model.quantizer.initial=data", "model.quantizer.initial", "random", "data"),
        (STAGE_1, "model/modality=edges", "model.modality.name", "rgb", "edges"),
        (STAGE_1, "optim.name=adamw", "optim.name", "adam", "adamw"),
        (STAGE_1, "optim.ema_half_life=1000", "optim.ema_half_life", "0", "1000"),
        (STAGE_2, "model.layers=2", "model.layers", "4", "2"),
        (STAGE_2, "model/condition=class", "model.condition.name", "none", "class"),
        (STAGE_2, "loss.condition_dropout=0.1", "loss.condition_dropout", "0.0", "0.1"),
        (DROPPING, "loss.condition_dropout=0", "loss.condition_dropout", "0.1", "0.0"),
    ],
)
def test_what_a_checkpoint_depends_on_is_compared_and_named_in_one_line(
    compose: Compose,
    tmp_path: Path,
    before: tuple[str, ...],
    change: str,
    key: str,
    was: str,
    now: str,
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose(*before)))
    with pytest.raises(UserError) as refusal:
        check_run_dir(compose(*before, change), tmp_path)
    said = str(refusal.value)
    assert f" holds a run with {key}={was}" in said
    assert f", and this one has {now}: set it back, or choose another run.name" in said
    assert "\n" not in said


def test_a_discriminator_that_the_run_did_without_is_named(
    compose: Compose, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose(*STAGE_1, "loss.discriminator=null")))
    with pytest.raises(UserError, match=r"loss\.discriminator=null, and this one has patchgan: "):
        check_run_dir(compose(*STAGE_1), tmp_path)


def test_a_run_of_the_other_stage_is_named(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose(*STAGE_2)))
    with pytest.raises(UserError, match=r"model=transformer, and this one has vqgan: set it back"):
        check_run_dir(compose(*STAGE_1), tmp_path)


def test_what_no_checkpoint_depends_on_may_change(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose(*DINO, "optim.ema_half_life=10")))
    changed = ["optim.lr=2e-5", "optim.weight_decay=0.1", "optim.clip=1", "optim.ema_half_life=20"]
    changed += ["train.steps=7", "train.log_every=3", "train.keep_last=9", "run.name=renamed"]
    changed += ["data.global_batch=16", "data.micro_batch=4", "data.flip=false", "data.train=moved"]
    changed += ["loss.terms.perceptual.weight=0.5", "loss.disc_start=9", "loss.disc_weight=0.1"]
    changed += ["loss.gan=vanilla", "loss.adaptive=lagged", "loss.lecam_weight=0.1"]
    changed += ["loss.discriminator.weights=moved.pth", "engine.precision=bf16", "engine=zero3"]
    check_run_dir(compose(*DINO, *changed), tmp_path)


def test_a_run_of_several_conditions_resumes_with_the_same_ones_in_the_same_order(
    compose: Compose, tmp_path: Path
) -> None:
    def of(*names: str) -> Config:
        several = ["model/condition=several", f"model.condition.of=[{','.join(names)}]"]
        return compose(*STAGE_2, *several)

    objects = "{name: objects, categories: 80}"
    (tmp_path / "config.yaml").write_text(to_yaml(of("class", objects)))
    check_run_dir(of("class", objects), tmp_path)
    check_run_dir(of("{name: class, classes: 3}", objects), tmp_path)
    with pytest.raises(UserError, match=r"condition\.of\.1\.categories=80, and this one has 8:"):
        check_run_dir(of("class", "{name: objects, categories: 8}"), tmp_path)
    with pytest.raises(UserError, match=r"model\.condition\.of\.0=class, and this one has objects"):
        check_run_dir(of(objects, "class"), tmp_path)
    with pytest.raises(UserError, match=r"of=\['class', 'objects'\], and this one has \['class'\]"):
        check_run_dir(of("class"), tmp_path)


@pytest.mark.parametrize("stated", ["model.vocabulary=512", "model.grid=[8,8]"])
def test_what_is_left_to_the_codes_may_be_stated_later_and_not_changed(
    compose: Compose, tmp_path: Path, stated: str
) -> None:
    key = stated.partition("=")[0]
    (tmp_path / "config.yaml").write_text(to_yaml(compose(*STAGE_2)))
    check_run_dir(compose(*STAGE_2, stated), tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(compose(*STAGE_2, stated)))
    check_run_dir(compose(*STAGE_2), tmp_path)
    other = stated.replace("512", "1024").replace("8", "4")
    with pytest.raises(UserError, match=f" holds a run with {key}="):
        check_run_dir(compose(*STAGE_2, other), tmp_path)


def test_how_often_conditions_are_dropped_may_change_where_there_is_a_null_prefix(
    compose: Compose, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(compose(*DROPPING)))
    check_run_dir(compose(*DROPPING, "loss.condition_dropout=0.2"), tmp_path)
    kept = (*DROPPING, "model.null_prefix=true")
    (tmp_path / "config.yaml").write_text(to_yaml(compose(*kept)))
    check_run_dir(compose(*kept, "loss.condition_dropout=0"), tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "it is empty"),
        (b"model: {channels: ", "while parsing"),
        (b"model:\n  channels: 1\n", "it is not the configuration of a run"),
        (b"- a list", "it is not the configuration of a run"),
        (b"\xff\xfe\x00", "can't decode"),
        (b"a\x00b", "special characters"),
    ],
)
def test_a_damaged_config_file_is_one_line(
    compose: Compose, tmp_path: Path, text: bytes, why: str
) -> None:
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(UserError) as refusal:
        check_run_dir(compose(*STAGE_1), tmp_path)
    said = str(refusal.value)
    assert said.startswith(f"{tmp_path / 'config.yaml'} is damaged (")
    assert why in said
    assert "\n" not in said


def test_a_run_from_before_a_key_had_what_the_keys_class_gives_it(
    compose: Compose, tmp_path: Path
) -> None:
    classes = (*STAGE_2, "model/condition=class")
    text = to_yaml(compose(*classes))
    assert "  condition_table: own\n" in text
    (tmp_path / "config.yaml").write_text(text.replace("  condition_table: own\n", ""))
    with pytest.raises(UserError, match=r"condition_table=shared, and this one has own: set it"):
        check_run_dir(compose(*classes), tmp_path)
    check_run_dir(compose(*classes, "model.condition_table=shared"), tmp_path)


def test_a_run_from_before_conditions_had_keys_of_their_own_resumes(
    compose: Compose, tmp_path: Path
) -> None:
    config = compose(*STAGE_2, "model/condition=class", "model.condition.classes=5")
    written = yaml.safe_load(to_yaml(config))
    former = {"condition": "class", "classes": 5, "condition_vocabulary": 0}
    former |= {"condition_grid": [], "condition_fingerprint": ""}
    kept = {k: v for k, v in written["model"].items() if k not in ("block", "order", "scheme")}
    written["model"] = kept | former
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    check_run_dir(config, tmp_path)
    with pytest.raises(UserError, match=r"model\.condition\.classes=5, and this one has 6"):
        check_run_dir(
            compose(*STAGE_2, "model/condition=class", "model.condition.classes=6"), tmp_path
        )
