import io
import runpy
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from taming_dist.data.images import Preprocess
from taming_dist.data.manifest import Manifest, resolve
from taming_dist.data.reader import Reader
from taming_dist.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "index_shards.py"
index_shards = runpy.run_path(str(TOOL))["main"]


def foreign(path: Path, first: int, count: int = 4) -> Path:
    path.parent.mkdir(exist_ok=True)
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    with wds.TarWriter(str(path)) as writer:
        for number in range(first, first + count):
            writer.write({"__key__": f"{number:05d}", "jpg": out.getvalue(), "cls": number})
    return path


def test_shards_of_the_stock_writer_are_read_after_one_pass(tmp_path: Path) -> None:
    paths = [foreign(tmp_path / f"{number}.tar", number * 4) for number in range(3)]
    index_shards([str(path) for path in paths])
    reader = Reader(resolve(f"{tmp_path}/*.tar"), Preprocess(8), micro_batch=5)
    batches = list(reader.epoch_batches())
    classes = [cls for b in batches if b.classes is not None for cls in b.classes.tolist()]
    assert classes == list(range(12))
    assert [key for batch in batches for key in batch.keys] == [f"{n:05d}" for n in range(12)]


def test_a_folder_can_be_named_and_shards_can_be_added(tmp_path: Path) -> None:
    foreign(tmp_path / "b.tar", 4)
    index_shards([str(tmp_path)])
    index_shards([str(foreign(tmp_path / "a.tar", 0))])
    assert [shard.name for shard in Manifest.load(tmp_path).shards] == ["a.tar", "b.tar"]
    (tmp_path / "b.tar").unlink()
    index_shards([str(tmp_path / "a.tar")])
    assert [shard.name for shard in Manifest.load(tmp_path).shards] == ["a.tar"]


def test_a_damaged_shard_is_named_and_its_folder_gets_no_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(tmp_path / "a.tar", 0)
    cut = foreign(tmp_path / "b.tar", 4)
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(UserError, match="1 damaged shards"):
        index_shards([str(tmp_path)])
    assert "b.tar is damaged" in capsys.readouterr().out
    assert not (tmp_path / "manifest.json").exists()


def test_missing_files_and_empty_folders_are_mistakes(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "x.tar", "no such file"), (tmp_path, "no tar files")):
        with pytest.raises(UserError, match=message):
            index_shards([str(path)])
