import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from taming_dist.errors import UserError
from taming_dist.formats.manifest import (
    CODES_FORMATS,
    IMAGES_FORMAT,
    Manifest,
    Shard,
    read_index,
    resolve,
    write_index,
)
from taming_dist.formats.shards import scan, split_name
from tests.data.shard_files import writing_shards


def png(value: int, size: int = 4) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


def write_shards(folder: Path, samples: int = 5, shard_samples: int = 2) -> Path:
    with writing_shards(folder, "train", shard_samples, classes=("a", "b")) as write:
        for number in range(samples):
            cls = str(number % 2).encode()
            write(f"x/{number:04d}", {"png": png(number), "cls": cls})
    return folder


def foreign_tar(path: Path, tar_format: int, samples: int = 3) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number in range(samples):
            for extension, data in (("png", png(number)), ("json", b"{}")):
                info = tarfile.TarInfo(f"{'long/' * 30}{number:03d}.{extension}")
                info.size, info.mtime = len(data), 1.5
                tar.addfile(info, io.BytesIO(data))
    return path


def test_written_shards_are_read_by_stock_webdataset(tmp_path: Path) -> None:
    write_shards(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"x/{n:04d}" for n in range(5)]
    assert [sample["cls"] for sample in samples] == [0, 1, 0, 1, 0]
    assert samples[3]["png"][0, 0].tolist() == [3, 0, 0]


def test_written_bytes_depend_on_the_samples_only(tmp_path: Path) -> None:
    one, other = write_shards(tmp_path / "one"), write_shards(tmp_path / "other")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_the_written_manifest_and_index_are_what_a_scan_finds(tmp_path: Path) -> None:
    write_shards(tmp_path)
    manifest = Manifest.load(tmp_path)
    assert manifest.classes == ("a", "b")
    for shard in manifest.shards:
        found, offsets = scan(tmp_path / shard.name)
        assert found == shard
        assert offsets.tolist() == read_index(str(tmp_path / shard.name), shard).tolist()


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_tars_of_others_are_scanned(tmp_path: Path, tar_format: int) -> None:
    shard, offsets = scan(foreign_tar(tmp_path / "a.tar", tar_format))
    assert (shard.samples, shard.columns) == (3, {"json": 3, "png": 3})
    assert offsets[0] == 0
    assert len(offsets) == 4


def test_a_tar_of_the_stock_writer_is_scanned(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": f"k{number}", "png": png(number), "cls": number})
    assert scan(tmp_path / "a.tar")[0].columns == {"cls": 4, "png": 4}


def test_a_tar_cut_anywhere_is_reported_with_its_name_and_byte(tmp_path: Path) -> None:
    path = foreign_tar(tmp_path / "whole.tar", tarfile.GNU_FORMAT)
    whole = path.read_bytes()
    end = int(scan(path)[1][-1])
    cut = tmp_path / "cut.tar"
    for length in [*range(512, end + 1, 512), 100, end - 300]:
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.tar.* byte "):
            scan(cut)


def test_a_damaged_header_is_reported_and_never_ends_the_shard(tmp_path: Path) -> None:
    path = foreign_tar(tmp_path / "a.tar", tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    middle = int(scan(path)[1][1])
    for damage in (bytes(512), b"x" * 512, whole[middle : middle + 511] + b"x"):
        path.write_bytes(whole[:middle] + damage + whole[middle + 512 :])
        with pytest.raises(UserError, match=rf"a\.tar.* byte {middle}"):
            scan(path)


def test_an_empty_file_and_a_gzip_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(range(256)) * 4)
    for name in ("a.tar", "b.tar"):
        with pytest.raises(UserError, match=name):
            scan(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.c/img.v1.JPG", ("a/b.c/img", "v1.jpg")),
        ("img.seg.png", ("img", "seg.png")),
        ("noextension", None),
        ("a/.hidden", None),
        ("__meta.json__", None),
    ],
)
def test_keys_end_at_the_first_dot_of_the_basename(
    name: str, parts: tuple[str, str] | None
) -> None:
    assert split_name(name) == parts


def test_a_spec_is_a_folder_a_glob_braces_or_a_list(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    names = [f"train-{number:06d}.tar" for number in range(3)]
    for spec in (
        str(folder),
        f"{folder}/*.tar",
        f"{folder}/train-{{000000..000002}}.tar",
        [str(folder / name) for name in names],
        f"{tmp_path}/dat?",
    ):
        dataset = resolve(spec)
        assert [path.name for path in dataset.paths] == names
        assert dataset.num_samples == 5
        assert dataset.classes == ("a", "b")
        assert dataset.columns == {"cls": 5, "png": 5}
        assert dataset.fingerprint == resolve(str(folder)).fingerprint
    assert resolve(f"{folder}/train-000002.tar").num_samples == 1


def test_mistakes_in_a_spec_name_the_file_and_the_fix(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data")
    (tmp_path / "bare").mkdir()
    Manifest(IMAGES_FORMAT, ()).save(tmp_path)
    foreign_tar(tmp_path / "bare" / "a.tar", tarfile.USTAR_FORMAT)
    foreign_tar(folder / "other.tar", tarfile.USTAR_FORMAT)
    for spec, message in (
        ("", "names no shards"),
        (str(tmp_path / "none.tar"), r"no shard .*none\.tar: .*make_shards"),
        (str(tmp_path / "none" / "0.tar"), r"no shard .*none.*make_shards"),
        (f"{tmp_path}/none/*.tar", r"no file matches .*none.*make_shards"),
        (f"{folder}/train-{{000000..000003}}.tar", r"no shard .*train-000003\.tar"),
        (f"{folder}/train-{{000000", "unbalanced"),
        (str(tmp_path / "bare"), r"bare has no manifest\.json.*index_shards"),
        (f"{folder}/other.tar", r"other\.tar is not in .*index_shards"),
        ("ftp://host/a.tar", r"ftp://host/a\.tar: cannot read ftp://"),
        ("pipe:cat a.tar", r"data\.streaming=true data\.allow_pipe=true"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(spec)
    with pytest.raises(UserError, match=r"taming_dist\.images\.v1.*taming_dist\.codes\.v1"):
        resolve(str(folder), *CODES_FORMATS)


def test_a_shard_that_changed_its_size_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"train-000001\.tar has \d+ bytes but its manifest says"):
        resolve(str(tmp_path))


def test_a_lost_or_wrong_index_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "train-000000.tar"
    shard = Manifest.load(tmp_path).by_name[path.name]
    whole = scan(path)[1]
    for offsets in ([0, 2048, 1024], [0, 2000, 4096], whole[:-1], [*whole, whole[-1] + 512]):
        write_index(path, np.array(offsets))
        with pytest.raises(UserError, match=r"train-000000\.tar\.idx does not match"):
            read_index(str(path), shard)
    (tmp_path / "train-000000.tar.idx").unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar\.idx is missing"):
        resolve(str(tmp_path))


def test_a_damaged_or_edited_manifest_is_refused(tmp_path: Path) -> None:
    Manifest(IMAGES_FORMAT, (Shard("a.tar", 1, 2048, "00"),)).save(tmp_path)
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    record["shards"][0]["samples"] = 2
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="edited"):
        Manifest.load(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="damaged"):
        Manifest.load(tmp_path)


def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    Manifest(IMAGES_FORMAT, (Shard("../a.tar", 1, 2048, "00"),)).save(tmp_path)
    with pytest.raises(UserError, match="damaged"):
        Manifest.load(tmp_path)


def test_folders_with_different_class_names_do_not_mix(tmp_path: Path) -> None:
    write_shards(tmp_path / "one")
    with writing_shards(tmp_path / "two", "train", 2, classes=("b", "c")) as write:
        write("0", {"png": png(0), "cls": b"0"})
    with pytest.raises(UserError, match="different class names"):
        resolve([str(tmp_path / "one"), str(tmp_path / "two")])
