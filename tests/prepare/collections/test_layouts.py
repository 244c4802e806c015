import json
from pathlib import Path

import numpy as np
import pytest

from taming_dist.errors import UserError
from taming_dist.formats.objects import FLAGS, objects_of
from taming_dist.prepare.collections.entry import Collection, Entry
from taming_dist.prepare.collections.layouts import open_layout


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def entries(collection: Collection) -> dict[str, Entry]:
    return {entry.name: entry for entry in collection if isinstance(entry, Entry)}


def test_imagenet_numbers_the_synsets_of_both_splits_alike(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/n02000000/n02000000_1.JPEG",
        "train/n01000000/images/n01000000_1.JPEG",
        "train/n01000000/n06596364_9591.JPEG",
        "val/n02000000/a.JPEG",
    )
    write(tmp_path, "LOC_synset_mapping.txt", "n01000000 tench, Tinca tinca\nn02000000 goldfish\n")
    train = open_layout(["imagenet", str(tmp_path), "train"])
    assert train.classes == ("n01000000", "n02000000")
    assert train.details == {"class_names": ["tench, Tinca tinca", "goldfish"]}
    assert {name: entry.cls for name, entry in entries(train).items()} == {
        "n02000000/n02000000_1.JPEG": 1,
        "n01000000/images/n01000000_1.JPEG": 0,
    }
    val = open_layout(["imagenet", str(tmp_path), "validation"])
    assert [entry.cls for entry in entries(val).values()] == [1]


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\nv1,n02000000 1 2\nv2,n01000000 1\n",
        ),
        ("validation_synset.txt", "v1.JPEG n02000000\nv2.JPEG n01000000/v2.JPEG\n"),
        ("val/val_annotations.txt", "v1.JPEG\tn02000000\t0\t0\nv2.JPEG\tn01000000\t0\t0\n"),
    ],
)
def test_imagenet_reads_the_synsets_of_a_flat_folder(tmp_path: Path, truth: str, text: str) -> None:
    touch(tmp_path, "val/v1.JPEG", "val/v2.JPEG")
    write(tmp_path, truth, text)
    found = entries(open_layout(["imagenet", str(tmp_path), "val"]))
    assert {name: entry.cls for name, entry in found.items()} == {"v1.JPEG": 1, "v2.JPEG": 0}


def test_imagenet_refuses_images_of_unknown_class(tmp_path: Path) -> None:
    touch(tmp_path, "val/v1.JPEG")
    with pytest.raises(UserError, match="no synset folders"):
        open_layout(["imagenet", str(tmp_path), "val"])
    touch(tmp_path, "train/n01000000/a.JPEG")
    with pytest.raises(UserError, match=r"v1\.JPEG: its synset \(unknown\)"):
        list(open_layout(["imagenet", str(tmp_path), "val"]))
    with pytest.raises(UserError, match="/tset: there is no such folder"):
        open_layout(["imagenet", str(tmp_path), "tset"])


@pytest.mark.parametrize("prefix", ["", "sflckr_"])
def test_sflckr_pairs_photographs_and_maps(tmp_path: Path, prefix: str) -> None:
    touch(tmp_path, *(f"{prefix}images/{name}.jpg" for name in ("x/a", "b")))
    touch(tmp_path, *(f"{prefix}segmentations/{name}.png" for name in ("x/a", "b")))
    found = entries(open_layout(["sflckr", str(tmp_path)]))
    assert set(found) == {"x/a.jpg", "b.jpg"}
    assert found["x/a.jpg"].pairs == {"seg": tmp_path / f"{prefix}segmentations/x/a.png"}
    write(tmp_path, "sflckr_test.txt", "b.jpg\n")
    assert set(entries(open_layout(["sflckr", str(tmp_path), "test"]))) == {"b.jpg"}


def test_ade20k_has_maps_and_scenes(tmp_path: Path) -> None:
    for folder, suffix in (("images", "jpg"), ("annotations", "png")):
        touch(tmp_path, *(f"{folder}/validation/ADE_val_{n}.{suffix}" for n in (1, 2)))
    write(
        tmp_path, "sceneCategories.txt", "ADE_val_1 street\nADE_val_2 bedroom\nADE_train_1 attic\n"
    )
    collection = open_layout(["ade20k", str(tmp_path), "val"])
    assert collection.classes == ("attic", "bedroom", "street")
    entry = entries(collection)["ADE_val_1.jpg"]
    assert entry.cls == 2
    assert entry.pairs == {"seg": tmp_path / "annotations/validation/ADE_val_1.png"}


def make_coco(root: Path) -> None:
    images = [{"id": 9, "file_name": "000000000009.jpg", "width": 200, "height": 100}]
    images += [{"id": 10, "file_name": "000000000010.jpg", "width": 10, "height": 10}]
    things = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    stuff = [{"id": 92, "name": "banner"}, {"id": 183, "name": "other"}]
    boxes = [
        {"image_id": 9, "category_id": 18, "bbox": [20, 10, 100, 50], "iscrowd": 0},
        {"image_id": 9, "category_id": 1, "bbox": [0, 0, 200, 100], "iscrowd": 1},
    ]
    del boxes[0]["iscrowd"]
    for box in boxes:
        box["segmentation"] = [[1, 2, 3]]
    others = [
        {"image_id": 9, "category_id": 92, "bbox": [0, 50, 200, 50], "iscrowd": 0},
        {"image_id": 9, "category_id": 183, "bbox": [0, 50, 200, 50], "iscrowd": 0},
    ]
    for name, categories, annotations in (
        ("instances", things, boxes),
        ("stuff", stuff, others),
        ("captions", [], [{"image_id": 9, "caption": "A dog."}]),
    ):
        whole = {"images": images, "categories": categories, "annotations": annotations}
        write(root, f"annotations/{name}_val2017.json", json.dumps(whole))
    for name in ("000000000009", "000000000010"):
        touch(root, f"val2017/{name}.jpg", f"cocostuffthings/val2017/{name}.png")


def test_coco_has_boxes_captions_and_maps(tmp_path: Path) -> None:
    make_coco(tmp_path)
    collection = open_layout(["coco", str(tmp_path), "validation"])
    # ids sorted as text, as in the original: 1, 18, 92; "other" is no category
    assert collection.details == {"categories": ["person", "dog", "banner"]}
    assert collection.label_shift == 1
    found = entries(collection)
    assert found["000000000009.jpg"].facts == {
        "image_id": 9,
        "width": 200,
        "height": 100,
        "captions": ["A dog."],
        "objects": [
            {"category": 1, "box": [0.1, 0.1, 0.5, 0.5], "unknown_flags": ["group"]},
            {"category": 0, "box": [0, 0, 1, 1], "flags": ["group"]},
            {"category": 2, "box": [0, 0.5, 1, 0.5]},
        ],
    }
    assert found["000000000010.jpg"].facts["objects"] == []
    assert found["000000000010.jpg"].pairs == {
        "seg": tmp_path / "cocostuffthings/val2017/000000000010.png"
    }


def test_open_images_has_boxes_with_flags(tmp_path: Path) -> None:
    touch(tmp_path, "train/0000000000000abc.jpg", "train/00000000000000ff.jpg")
    write(tmp_path, "class-descriptions-boxable.csv", "/m/01s55n,Suitcase\n/m/02,Dog\n/m/01,Cat\n")
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax"
    header += ",IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    rows = [
        "0000000000000abc,x,/m/02,1,0.25,0.5,0.125,0.875,0,1,1,0,-1",
        "0000000000000abc,x,/m/unknown,1,0,1,0,1,0,0,0,0,0",
        "0000000000000abc,x,/m/01,1,0,1,0,1,-1,-1,-1,-1,-1",
        "ff,x,/m/01s55n,1,0,1,0,1,0,0,0,0,0",
    ]
    write(tmp_path, "oidv6-train-annotations-bbox.csv", "\n".join([header, *rows]))
    collection = open_layout(["openimages", str(tmp_path)])
    assert collection.details == {"categories": ["Cat", "Dog", "Suitcase"]}
    found = entries(collection)
    assert found["0000000000000abc.jpg"].facts["objects"] == [
        {
            "category": 1,
            "box": [0.25, 0.125, 0.25, 0.75],
            "flags": ["group", "truncated"],
            "unknown_flags": ["inside"],
        },
        {"category": 0, "box": [0, 0, 1, 1], "unknown_flags": list(FLAGS)},
    ]
    assert found["00000000000000ff.jpg"].facts["objects"] == [{"category": 2, "box": [0, 0, 1, 1]}]
    assert objects_of(found["0000000000000abc.jpg"].facts).flags.tolist() == [0b101, 0]


def test_faces_are_those_of_the_lists(tmp_path: Path) -> None:
    for name, file in (("celebahq", "imgHQ1.npy"), ("ffhq", "00001.png")):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.zeros(1))
        write(tmp_path, f"{name}train.txt", f"{file}\n")
    write(tmp_path, "ffhqvalidation.txt", "00002.png\n")
    assert set(entries(open_layout(["celebahq", str(tmp_path)]))) == {"imgHQ1.npy"}
    assert set(entries(open_layout(["ffhq", str(tmp_path), "val"]))) == {"00002.png"}
    both = open_layout(["faceshq", str(tmp_path)])
    assert both.classes == ("celebahq", "ffhq")
    assert {name: entry.cls for name, entry in entries(both).items()} == {
        "celebahq/imgHQ1.npy": 0,
        "ffhq/00001.png": 1,
    }


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    root = str(tmp_path)
    for words, message in (
        (["cocoa", root], "choose one of imagenet, sflckr"),
        (["coco"], "give its folder"),
        (["coco", root + "/none"], "there is no such folder"),
        (["coco", root], "/train2017: there is no such folder"),
        (["sflckr", root], "there is no such folder"),
        (["ffhq", root], "ffhqtrain.txt: there is no such file"),
        (["openimages", root], "there is no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_layout(words)
    make_coco(tmp_path)
    write(tmp_path, "annotations/instances_val2017.json", "[]")
    with pytest.raises(UserError, match=r"instances_val2017\.json is not a COCO annotation file"):
        open_layout(["coco", root, "val"])
    write(tmp_path, "annotations/instances_val2017.json", '{"images": [], "annotations": [{}]}')
    with pytest.raises(UserError, match="is not a COCO annotation file"):
        open_layout(["coco", root, "val"])
    whole = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [], "annotations": []}
    write(tmp_path, "annotations/instances_val2017.json", json.dumps(whole))
    with pytest.raises(UserError, match="not in COCO's format .*'width'"):
        list(open_layout(["coco", root, "val"]))
    touch(tmp_path, "train/a.jpg")
    write(tmp_path, "class-descriptions-boxable.csv", "/m/1,Cat\n")
    write(tmp_path, "train-annotations-bbox.csv", "ImageID,LabelName\na,/m/1\n")
    with pytest.raises(UserError, match="line 2: not an Open Images box"):
        list(open_layout(["openimages", root]))
    box = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsInside\na,/m/1,0,1,0,1,2\n"
    write(tmp_path, "train-annotations-bbox.csv", box)
    with pytest.raises(UserError, match="line 2: not an Open Images box .*'inside': 2"):
        list(open_layout(["openimages", root]))
