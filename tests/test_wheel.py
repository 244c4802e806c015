"""The wheel, installed where nothing else of the repository is: commands run from any folder."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = [
    "+experiment=custom",
    "+scale=laptop",
    "data.train=shards",
    "data.val=shards",
    "model.resolution=32",
    "model.multipliers=[1,1,1]",
    "data.size=32",
    "data.global_batch=4",
    "loss.terms.perceptual.net=alex",
    "loss.terms.perceptual.weights=random",
    "train.steps=2",
    "train.validate_images=3",
    "train.preview_images=2",
    "run.dir=run",
]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and with the packages of this one but for ours."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, REPOSITORY]
    subprocess.run(build, check=True)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    # such files of the folder it names are not followed: an editable install stays behind
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (wheel,) = folder.glob("*.whl")
    python = environment / "bin/python"
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True
    )
    return environment


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run a program of the environment in an empty folder; it must end with this status."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(program: str, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [installed / "bin/python" if program == "python" else program, *words],
            cwd=tmp_path,
            env=inherited | {"PATH": f"{installed / 'bin'}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done

    return call


def test_it_is_the_package_of_the_wheel_that_runs(installed: Path, run: Run) -> None:
    said = run("python", "-m", "taming_dist", "--version").stdout
    assert said.startswith("taming_dist")
    assert f"in {installed}/" in said.splitlines()[0]
    assert str(REPOSITORY) not in said


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "taming_dist"),
        ("-m", "taming_dist.train", "--help"),
        ("-m", "taming_dist.sample", "--help"),
        ("share/inspect_codes.py", "--help"),  # which imports from a tool beside it
    ],
    ids=" ".join,
)
def test_commands_have_their_help(installed: Path, run: Run, words: tuple[str, ...]) -> None:
    tools = f"{installed}/share/taming_dist/tools"
    assert run("python", *(word.replace("share", tools) for word in words)).stdout


def test_the_chain_of_commands_runs_in_an_empty_folder(
    installed: Path, run: Run, tmp_path: Path
) -> None:
    tools = installed / "share/taming_dist/tools"
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"images/{index}.png")
    run("python", f"{tools}/make_shards.py", "--images", "images", "--out", "shards")
    run("python", "-m", "taming_dist.train", *TINY)
    model = "run/export"
    run("python", f"{tools}/tokenize_dataset.py", "--model", model, "--shards", "shards",
        "--out", "codes")  # fmt: skip
    assert list(tmp_path.glob("codes/*.tar"))
    run("python", "-m", "taming_dist.evaluate", f"model={model}", "data=shards", "out=metrics")
    assert list(tmp_path.glob("metrics/*.json"))


def test_job_scripts_find_what_belongs_to_them(installed: Path, run: Run) -> None:
    folder = installed / "share/taming_dist"
    for script in folder.glob("slurm/*.sh"):
        original = REPOSITORY / "slurm" / script.name
        assert os.access(script, os.X_OK) == os.access(original, os.X_OK)
    (folder / "start").write_text(f'TAMING_DIST={folder} exec bash "$@"\n')
    said = run("bash", f"{folder}/start", f"{folder}/slurm/train_vqgan.sh", status=2).stderr
    assert said == "error: this is a Slurm job: start it with sbatch\n"
