"""FID and its kin within real runs: they are those of the evaluation command, on any number of
ranks, and choose the best model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taming_dist.errors import UserError
from taming_dist.evaluate import EvaluateConfig, main
from taming_dist.evaluation.distribution import HIGHER_IS_BETTER
from taming_dist.formats.strict_json import read_json
from taming_dist.stages import stage_of
from taming_dist.stages.interface import Config
from taming_dist.training.best import Criterion
from tests.test_evaluate import inputs  # noqa: F401  (a fixture)
from tests.test_train import SETTINGS, Line, Runs, finish, make_images, meeting_of_two

STEPS = 5
EVALUATED = [
    "train.evaluate_every=2",
    "train.evaluate_features=random",
    f"train.steps={STEPS}",
    "log.wandb=disabled",
]
FIRST_STAGE = [*SETTINGS, *EVALUATED, "train.validate_images=0", "train.best=eval/rfid"]
PRIOR = [
    "+experiment=flickr_transformer",
    "+scale=laptop",
    "data.global_batch=4",
    "data.lanes=2",
    "data.block=2",
    "model.layers=1",
    "model.heads=2",
    "model.width=16",
    "model/condition=class",
    "train.preview_every=0",
    *EVALUATED,
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("runs")
    make_images(folder / "train", seed=0, count=12)
    make_images(folder / "val", seed=1, count=9)
    made = Runs(folder)
    yield made
    made.end()


def trained(runs: Runs, name: str, *settings: str) -> list[Line]:
    """What a run has evaluated, on one rank."""
    finish(runs.start(*settings, f"run.name={name}"))
    return evaluated(runs, name)


def trained_by_two(runs: Runs, name: str, *settings: str) -> list[Line]:
    """The same on two ranks, which share the weights at ZeRO 3."""
    master, micro_batch = meeting_of_two(), "data.micro_batch=2"
    own = (*settings, micro_batch, "engine=zero3", f"run.name={name}")
    ranks = [runs.start(*own, RANK=rank, LOCAL_RANK=rank, **master) for rank in ("0", "1")]
    for rank in ranks:
        finish(rank)
    return evaluated(runs, name)


def evaluated(runs: Runs, name: str) -> list[Line]:
    lines = [line for line in runs.lines(name) if any(key.startswith("eval/") for key in line)]
    assert all(line.pop("eval/seconds") > 0 for line in lines)
    return lines


def assert_alike(some: list[Line], others: list[Line]) -> None:
    """Figures of the steps 2, 4 and 5, but for what rounding does to training."""
    assert [line["step"] for line in some] == [line["step"] for line in others] == [2, 4, STEPS]
    for one, other in zip(some, others, strict=True):
        for name in one:
            if name.startswith("eval/"):
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_reconstructions_are_measured_as_by_the_evaluation_command_and_choose_the_best_model(
    runs: Runs,
) -> None:
    lines = trained(runs, "stage1", *FIRST_STAGE)
    assert_alike(lines, trained_by_two(runs, "stage1-pair", *FIRST_STAGE))
    assert {f"eval/r{name}" for name in HIGHER_IS_BETTER} <= lines[0].keys()
    best = min(lines, key=lambda line: line["eval/rfid"])
    folder = runs.folder / "outputs" / "stage1"
    for export, line in (("export", lines[-1]), ("export-best", best)):
        asked = {"features": "random", "lpips_net": "alex", "lpips_weights": "random"}
        out = runs.folder / f"measured-{export}"
        data = str(runs.folder / "val")
        main(EvaluateConfig(model=str(folder / export), data=data, out=str(out), **asked))
        measured = read_json(out / "metrics.json")
        for name in HIGHER_IS_BETTER:
            expected = line[f"eval/r{name}"]
            assert measured[f"r{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_samples_are_compared_with_decoded_validation_codes_or_with_the_images_of_a_reference(
    runs: Runs,
    inputs: Path,  # noqa: F811
) -> None:
    codes = f"data.train={inputs / 'codes'}", f"data.val={inputs / 'codes'}"
    settings = [*PRIOR, *codes, f"data.vqgan={inputs / 'vqgan'}", "train.best=eval/fid"]
    lines = trained(runs, "stage2", *settings, "data.micro_batch=4")
    assert_alike(lines, trained_by_two(runs, "stage2-pair", *settings))
    assert (runs.folder / "outputs" / "stage2" / "export-best").is_dir()
    other = f"train.evaluate_reference={inputs / 'images'}"
    found = trained(runs, "referred", *settings, "data.micro_batch=4", other)
    assert all(line["eval/fid"] != own["eval/fid"] for line, own in zip(found, lines, strict=True))


def test_figures_of_evaluation_can_choose_the_best_model_only_where_they_are_measured(
    compose: Callable[..., Config],
) -> None:
    asked = "+experiment=flickr", "+scale=laptop", "train.best=eval/rprecision"
    config = compose(*asked, "train.evaluate_every=100")
    assert stage_of(config).criterion(config) == Criterion("eval/rprecision", higher=True)
    config = compose(*asked)
    with pytest.raises(UserError, match=r"train\.best=eval/rprecision: use auto, null, or one of"):
        stage_of(config).criterion(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((*FIRST_STAGE, "train.validate_images=3"), "evaluate_every: 3 images of data.val"),
        ((*FIRST_STAGE, "train.evaluate_reference=val"), "evaluate_reference: reconstructions"),
        ((*PRIOR, "data.micro_batch=4", "data.vqgan="), "evaluate_every: FID is of pictures"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line_and_leaves_nothing(
    runs: Runs,
    inputs: Path,  # noqa: F811
    settings: tuple[str, ...],
    said: str,
) -> None:
    codes = f"data.train={inputs / 'codes'}", f"data.val={inputs / 'codes'}"
    given = codes if settings[0] == PRIOR[0] else ()
    process = runs.start(*settings, *given, "run.name=refused")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    (line,) = [line for line in err.splitlines() if not line.startswith("WARNING: LPIPS")]
    assert line.startswith(f"error: train.{said}")
    assert not (runs.folder / "outputs" / "refused" / "config.yaml").exists()
