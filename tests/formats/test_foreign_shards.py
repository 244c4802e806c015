"""Shards that other tools wrote are read and trained on after one indexing pass."""

import io
import json
import os
import runpy
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds

from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Reader, Reading
from taming_dist.errors import UserError
from taming_dist.formats.manifest import resolve
from taming_dist.formats.shards import scan
from tests.data.pictures import jpeg

SAMPLES = 12
TOOL = Path(__file__).parents[2] / "tools" / "index_shards.py"
index_shards = runpy.run_path(str(TOOL))["main"]
Writer = Callable[[Path], None]


def stock_writer(folder: Path) -> None:
    """As webdataset's ShardWriter leaves them: with owners and times; class and facts as well."""
    with wds.ShardWriter(str(folder / "set-%06d.tar"), maxcount=5, verbose=0) as writer:
        for number in range(SAMPLES):
            facts = {"number": number}
            key = f"sub/{number:05d}"
            writer.write({"__key__": key, "jpg": picture(number), "cls": number % 3, "json": facts})


def img2dataset(folder: Path) -> None:
    """As img2dataset leaves them: text and facts beside the image, statistics beside the tars, and
    numbers that leave out what could not be fetched."""
    for shard in range(2):
        with wds.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(shard * 6, shard * 6 + 6):
                key = f"{shard:05d}{number * 2:04d}"
                facts = {
                    "caption": "a picture",
                    "url": "http://host/a.jpg?b=c",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": 40,
                    "height": 36,
                    "exif": "{}",
                    "sha256": "0" * 64,
                }
                sample = {
                    "jpg": picture(number),
                    "txt": "a picture",
                    "json": json.dumps(facts).encode(),
                }
                writer.write({"__key__": key} | sample)
        statistics = {"count": 6, "successes": 6, "status_dict": {"success": 6}}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(statistics))
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")


def picture(number: int) -> bytes:
    return jpeg(number, (36, 40))


WRITERS: dict[str, Writer] = {"stock writer": stock_writer, "img2dataset": img2dataset}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_foreign_shards_are_read_after_one_pass(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path)
    index_shards([str(tmp_path)])
    stock = wds.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False)
    theirs = [(sample["__key__"], sample.get("cls")) for sample in stock]
    found = list(Reader(resolve(str(tmp_path)), Reading(Preprocess(16), 5)).epoch_batches())
    assert [key for batch in found for key in batch.keys] == [key for key, _ in theirs]
    assert len(theirs) == SAMPLES
    if kind == "stock writer":
        classes = [cls for b in found if b.classes is not None for cls in b.classes.tolist()]
        assert classes == [int(cls) for _, cls in theirs]
    else:
        assert found[0].classes is None


@pytest.mark.slow
def test_two_steps_of_training_on_a_mixture_of_foreign_shards(tmp_path: Path) -> None:
    for kind, write in WRITERS.items():
        folder = tmp_path / kind.replace(" ", "-")
        folder.mkdir()
        write(folder)
        index_shards([str(folder)])
    settings = [
        "+experiment=flickr",
        "+scale=laptop",
        "data.train={a:{shards:stock-writer,weight:2},b:{shards:img2dataset}}",
        "data.val=img2dataset",
        "model.resolution=32",
        "model.multipliers=[1,1,1]",
        "data.size=32",
        "loss.terms.perceptual.net=alex",
        "loss.terms.perceptual.weights=random",
        "optim.lr=1e-4",
        "data.global_batch=3",
        "data.micro_batch=3",
        "data.lanes=3",
        "train.steps=2",
        "train.log_every=1",
        "log.wandb=disabled",
        "run.dir=out",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "taming_dist.train", *settings]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=280)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "train/loss" in line] == [1, 2]


def pack(path: Path, names: list[str], *links: tuple[str, str, bytes]) -> Path:
    """A tar of pictures, and of links: name, what they name, type."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(picture(number))
            tar.addfile(member, io.BytesIO(picture(number)))
        for name, target, kind in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


def test_a_tar_whose_images_have_longer_endings_is_told_what_it_holds(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", ["a.image.jpg", "b.image.jpg"])
    with pytest.raises(UserError, match=r"holds no image .*, only \.image\.jpg: .* KEY\.jpg \(tar"):
        scan(path)
    path = pack(tmp_path / "quote.tar", ["a.'$(id)'.jpg"])
    with pytest.raises(UserError) as refusal:
        scan(path)
    advice = shlex.split(str(refusal.value).partition("(tar ")[2])
    assert advice == ["--transform", "s/[.]'$(id)'.jpg$/.jpg/)"]  # nothing that a shell would run
    path = pack(tmp_path / "b.tar", [f"img.{number}.JPG" for number in range(5)])
    with pytest.raises(UserError, match=r"only \.0\.jpg, \.1\.jpg, \.2\.jpg and 2 other ext"):
        scan(path)


def test_links_in_a_tar_are_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    links = [("b.jpg", "a.jpg", tarfile.LNKTYPE), ("c.jpg", "a.jpg", tarfile.LNKTYPE),
             ("d.jpg", "a.jpg", tarfile.SYMTYPE)]  # fmt: skip
    shard, _ = scan(pack(tmp_path / "a.tar", ["a.jpg"], *links))
    assert shard.samples == 1
    assert "2 hard links and 1 symbolic link in the tar: links are not followed" in caplog.text
    with pytest.raises(UserError, match=r"holds no image .*; 2 hard links and 1 symbolic link"):
        scan(pack(tmp_path / "b.tar", [], *links))
