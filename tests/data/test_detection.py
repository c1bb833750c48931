"""Boxes from COCO's and Pascal VOC's files, mirrored with their images, and what is wrong with them, by name."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from brfx.data import DetectionLoader, load_detection
from brfx.data.detection import mirror
from brfx.errors import ConfigError, DataError

RACCOON = Path(__file__).resolve().parents[3] / "shared" / "data" / "raccoon"

#: Of each image the class and box of its objects, COCO's way: left, top, width, height. Of these pixels it is white.
OBJECTS = [[("cat", [4, 6, 10, 8])], [], [("dog", [0, 0, 12, 20]), ("cat", [20, 3, 20, 27])], [("dog", [1, 2, 3, 4])]]
SIZE = (40, 30)


def draw(path: Path, objects, size=SIZE, exif=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    for _, (left, top, width, height) in objects:
        pixels[top : top + height, left : left + width] = 255
    Image.fromarray(pixels).save(path, exif=exif or Image.Exif())


def coco(objects, ids=(("cat", 3), ("dog", 7))):
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(len(objects))]
    annotations = [
        {"id": 10 * i + k, "image_id": i, "category_id": dict(ids)[name], "bbox": box, "iscrowd": 0}
        for i, found in enumerate(objects)
        for k, (name, box) in enumerate(found)
    ]
    return {"images": images, "categories": [{"id": i, "name": n} for n, i in ids], "annotations": annotations}


def voc(objects, size=SIZE, difficult=()):
    parts = [
        f"<object><name>{name}</name><difficult>{int(k in difficult)}</difficult><bndbox><xmin>{x + 1}</xmin>"
        f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for k, (name, (x, y, w, h)) in enumerate(objects)
    ]
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{''.join(parts)}</annotation>"


@pytest.fixture
def folder(tmp_path):
    """Four images for training and two for the test, as COCO has them."""
    for part, objects in (("train", OBJECTS), ("test", OBJECTS[2:])):
        for number, found in enumerate(objects):
            draw(tmp_path / part / f"{number}.png", found)
        (tmp_path / f"{part}.json").write_text(json.dumps(coco(objects)))
    return tmp_path


def load(folder, **settings):
    return load_detection(folder, workers=0, **{"val_fraction": 0.0} | settings)


def corners(objects):
    return [[x, y, x + w, y + h] for _, (x, y, w, h) in objects]


def require_objects(data, objects=OBJECTS):
    """All boxes and labels of training are those of ``objects``, and what is in them is white."""
    assert data.classes == ("background", "cat", "dog") and data.preprocessing is None
    assert (len(data.train), len(data.test)) == (len(objects), 2)
    images, targets = next(iter(DetectionLoader(data.train, len(objects))))
    for image, target, found in zip(images, targets, objects, strict=True):
        assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (len(found), 4)
        assert target["boxes"].tolist() == corners(found)
        assert target["labels"].tolist() == [data.classes.index(name) for name, _ in found]
        assert target["labels"].dtype == torch.int64
        require_white(image, target)


def require_white(image, target):
    inside = torch.zeros_like(image, dtype=torch.bool)
    for left, top, right, bottom in target["boxes"].int().tolist():
        inside[:, top:bottom, left:right] = True
    assert torch.equal(image, inside.float())


def test_cocos_boxes_are_those_of_the_images_in_every_layout(folder):
    require_objects(load(folder))
    (folder / "annotations").mkdir()
    (folder / "images").mkdir()
    other = folder / "annotations" / "instances_train2014.json"
    for part, year in (("train", "2017"), ("test", "")):
        (folder / f"{part}.json").rename(folder / "annotations" / f"instances_{part}{year}.json")
        (folder / part).rename(folder / "images" / f"{part}{year}")
    require_objects(load(folder))
    other.write_text("{}")
    with pytest.raises(DataError, match=r"instances_train2014.json: instances_train2017.json is of train too"):
        load(folder)
    other.unlink()
    for part, year in (("train", "2017"), ("test", "")):
        (folder / "images" / f"{part}{year}").rename(folder / part)
        (folder / "annotations" / f"instances_{part}{year}.json").rename(folder / part / "_annotations.coco.json")
    require_objects(load(folder))


def test_images_and_classes_are_in_the_order_of_their_ids(folder):
    content = json.loads((folder / "train.json").read_text())
    for table in content.values():
        table.reverse()
    (folder / "train.json").write_text(json.dumps(content))
    require_objects(load(folder, num_classes=3), [OBJECTS[0], [], OBJECTS[2][::-1], OBJECTS[3]])


def test_the_image_of_an_xml_file_has_its_name_or_the_one_that_it_says(folder):
    as_voc("0.xml", voc(OBJECTS[0], size=(0, 0)))(folder)  # tools that do not know the size write 0
    require_objects(load(folder))
    draw(folder / "train" / "0.bmp", [])
    with pytest.raises(DataError, match=r"train/0.xml: 0.bmp and 0.png have its name: leave one of them"):
        load(folder)
    (folder / "train" / "0.xml").write_text(voc(OBJECTS[0]).replace("<size>", "<filename>0.png</filename><size>"))
    require_objects(load(folder))
    (folder / "train" / "0.bmp").unlink()
    (folder / "train" / "0.xml").rename(folder / "train" / "a.xml")
    (folder / "train" / "0.png").rename(folder / "elsewhere.png")
    text = voc(OBJECTS[0]).replace("<size>", "<filename>../elsewhere.png</filename><size>")
    (folder / "train" / "a.xml").write_text(text)
    require_objects(load(folder), [*OBJECTS[1:], OBJECTS[0]])
    (folder / "train" / "b.xml").write_text(text)
    with pytest.raises(DataError, match=r"elsewhere.png: 2 XML files are of this image: leave one"):
        load(folder)


def test_vocs_boxes_are_those_of_the_images_in_every_layout(folder):
    """The XML beside the images; in folders of a part; in one folder, with lists."""
    for part, objects in (("train", OBJECTS), ("test", OBJECTS[2:])):
        (folder / f"{part}.json").unlink()
        for number, found in enumerate(objects):
            (folder / part / f"{number}.xml").write_text(voc(found))
    require_objects(load(folder))
    for part in ("train", "test"):
        for name, suffix in (("Annotations", "xml"), ("JPEGImages", "png")):
            (folder / part / name).mkdir()
            for path in (folder / part).glob(f"*.{suffix}"):
                path.rename(folder / part / name / path.name)
    require_objects(load(folder))
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("Annotations", "JPEGImages"):
        (folder / "train" / name).rename(folder / name)
        for path in (folder / "test" / name).iterdir():
            path.rename(folder / name / f"t{path.name}")
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("0\n1\n2  1\n\n3\n")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("t0\nt1\n")
    require_objects(load(folder))


def test_pycocotools_reads_the_same_from_real_files():
    coco_tools = pytest.importorskip("pycocotools.coco")
    if not RACCOON.is_dir():
        pytest.skip(f"needs photographs of raccoons with boxes, which are not at {RACCOON}")
    data = load(RACCOON)
    for part, split in (("train", data.train), ("test", data.test)):
        reference = coco_tools.COCO(str(RACCOON / f"{part}.json"))
        assert len(split) == len(reference.imgs)
        for number, path, target in zip(sorted(reference.imgs), split.paths, split.targets, strict=True):
            assert path == RACCOON / part / reference.imgs[number]["file_name"]
            boxes = torch.tensor([row["bbox"] for row in reference.imgToAnns[number]]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            torch.testing.assert_close(target["boxes"], boxes, rtol=0, atol=1e-4)
            assert target["labels"].tolist() == [row["category_id"] for row in reference.imgToAnns[number]]
    assert (len(data.train), data.train.num_boxes, len(data.test), data.test.num_boxes) == (160, 173, 40, 44)


def test_val_is_cut_from_training_and_images_keep_their_boxes(folder):
    data = load(folder, val_fraction=0.5, seed=1)
    assert (len(data.train), len(data.val)) == (2, 2) and not set(data.train.paths) & set(data.val.paths)
    for split in (data.train, data.val):
        for path, target in zip(split.paths, split.targets, strict=True):
            assert target["boxes"].tolist() == corners(OBJECTS[int(path.stem)])


def test_crowds_are_not_trained_on_and_are_marked_for_the_metric(folder):
    content = coco(OBJECTS)
    content["annotations"][1]["iscrowd"] = 1  # the dog of image 2
    (folder / "train.json").write_text(json.dumps(content))
    split = load(folder).train
    assert split.targets[2]["iscrowd"].tolist() == [1, 0] and split.num_boxes == 3
    _, targets = next(iter(DetectionLoader(split, 4)))
    assert targets[2]["iscrowd"].tolist() == [1, 0] and len(targets[2]["boxes"]) == 2
    loader = DetectionLoader(split, 4, augment=True, flip=False)
    _, targets = next(iter(loader))
    assert sorted(target["labels"].tolist() for target in targets) == [[], [1], [1], [2]]
    assert all(set(target) == {"boxes", "labels"} for target in targets)


def test_what_is_difficult_in_voc_is_a_crowd(folder):
    (folder / "train.json").unlink()
    for number, found in enumerate(OBJECTS):
        (folder / "train" / f"{number}.xml").write_text(voc(found, difficult=(1,)))
    assert [target["iscrowd"].tolist() for target in load(folder).train.targets] == [[0], [], [0, 1], [0]]


def test_images_are_mirrored_with_their_boxes_by_seed_epoch_and_sample_alone(folder):
    split = load(folder).train
    loader = DetectionLoader(split, 3, augment=True, seed=5)
    seen, mixed = [], False
    for epoch in range(1, 7):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert [len(images) for images, _ in batches] == [3, 1]
        for images, targets in batches:
            for image, target in zip(images, targets, strict=True):
                require_white(image, target)
        again = DetectionLoader(split, 3, augment=True, seed=5)
        again.set_epoch(epoch)
        (rest,) = again.starting_at(1)
        assert torch.equal(rest[0][0], batches[1][0][0]) and torch.equal(rest[1][0]["boxes"], batches[1][1][0]["boxes"])
        boxes = [target["boxes"].tolist() for _, targets in batches for target in targets]
        seen += [box[0] for box in boxes if box]
        lefts = {box[0][0] for box in boxes if box}
        mixed |= bool(lefts & {4, 0, 1} and lefts & {26, 28, 36})  # each image on its own
    assert mixed
    assert {(box[0], box[1]) for box in seen} >= {(4, 6), (26, 6), (1, 2), (36, 2)}  # as they are, and mirrored
    plain = DetectionLoader(split, 4, augment=True, flip=False)
    lefts = {target["boxes"][0, 0].item() for _, targets in plain for target in targets if len(target["boxes"])}
    assert lefts == {4, 0, 1}


def test_a_box_is_mirrored_about_the_middle():
    image = torch.arange(8).reshape(1, 2, 4)
    flipped, target = mirror(image, {"boxes": torch.tensor([[0.5, 0.0, 1.0, 2.0]]), "labels": torch.tensor([1])})
    assert torch.equal(flipped, image.flip(-1)) and type(target["boxes"]) is torch.Tensor
    assert target["boxes"].tolist() == [[3.0, 0.0, 3.5, 2.0]] and target["labels"].tolist() == [1]


def test_ranks_share_every_batch_and_workers_give_the_same(folder):
    data = load_detection(folder, workers=1, val_fraction=0.0)
    one = list(DetectionLoader(data.train, 2, augment=True, seed=3))
    parts = [list(DetectionLoader(load(folder).train, 2, augment=True, seed=3, rank=r, world_size=2)) for r in (0, 1)]
    assert len(one) == 2
    for whole, *shares in zip(one, *parts, strict=True):
        assert torch.equal(torch.stack(whole[0]), torch.stack([images[0] for images, _ in shares]))
        assert [t["boxes"].tolist() for t in whole[1]] == [targets[0]["boxes"].tolist() for _, targets in shares]
    with pytest.raises(ConfigError, match="batch_size=3: takes a multiple of world_size=2"):
        DetectionLoader(data.train, 3, rank=0, world_size=2)


def test_boxes_are_of_the_upright_image(folder):
    """Orientation 6: the file lies on its side, and viewers turn it to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(folder / "train" / "0.png", [("cat", [6, 26, 8, 10])], exif=exif)  # upright 30x40
    with pytest.raises(DataError, match=r"image 0: says 40x30 pixels, 0.png has 30x40, turned upright as its EXIF"):
        load(folder)
    content = coco([[("cat", [0, 6, 4, 8])], *OBJECTS[1:]])
    content["images"][0] |= {"width": 30, "height": 40}
    (folder / "train.json").write_text(json.dumps(content))
    image = next(iter(DetectionLoader(load(folder).train, 1)))[0][0]
    upright = torch.zeros(30, 40)
    upright[26:36, 6:14] = 1
    assert image.shape == (3, 40, 30) and torch.equal(image[0], upright.rot90(-1))


def test_boxes_are_cut_by_up_to_a_pixel(folder):
    content = coco(OBJECTS)
    content["annotations"][0]["bbox"] = [-0.5, 20.0, 41.25, 10.9]
    (folder / "train.json").write_text(json.dumps(content))
    assert load(folder).train.targets[0]["boxes"].tolist() == [[0.0, 20.0, 40.0, 30.0]]


def test_cocos_own_numbers_are_the_labels_where_as_many_classes_are_asked_for(folder):
    data = load(folder, num_classes=9)
    assert data.classes == ("background", "N/A", "N/A", "cat", "N/A", "N/A", "N/A", "dog", "N/A")
    assert [target["labels"].tolist() for target in data.train.targets] == [[3], [], [7, 3], [7]]
    assert load(folder, num_classes=3).classes == ("background", "cat", "dog")
    for number in (2, 7):
        with pytest.raises(DataError, match=rf"--num-classes {number}: .* has 3, background included: cat, dog"):
            load(folder, num_classes=number)
    for part, objects in (("train", OBJECTS), ("test", OBJECTS[2:])):
        (folder / f"{part}.json").write_text(json.dumps(coco(objects, ids=(("cat", 0), ("dog", 7)))))
    assert load(folder).classes == ("background", "cat", "dog")
    with pytest.raises(DataError, match="--num-classes 9: "):  # an id of 0 is the background's
        load(folder, num_classes=9)


def test_the_tests_classes_go_by_name(folder):
    (folder / "test.json").write_text(json.dumps(coco(OBJECTS[2:], ids=(("dog", 3), ("cat", 7), ("fox", 8)))))
    assert [target["labels"].tolist() for target in load(folder).test.targets] == [[2, 1], [2]]


def changed(**changes):
    """One entry of train.json's tables with other values."""

    def spoil(folder):
        content = json.loads((folder / "train.json").read_text())
        for table, (place, values) in changes.items():
            content[table][place] |= values
        (folder / "train.json").write_text(json.dumps(content))

    return spoil


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def as_voc(name, text):
    def spoil(folder):
        (folder / "train.json").unlink()
        for number, found in enumerate(OBJECTS):
            (folder / "train" / f"{number}.xml").write_text(voc(found))
        if text is None:
            (folder / "train" / name).unlink()
        else:
            (folder / "train" / name).write_text(text)

    return spoil


BOMB = '<!DOCTYPE a [<!ENTITY b "c">]><annotation><object><name>&b;</name></object></annotation>'


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            changed(annotations=(0, {"bbox": [35, 6, 10, 8]})),
            r"annotation 0: its box, 35 to 45 across and 6 to 14 down, is outside of 0.png, 40x30",
        ),
        (
            changed(annotations=(0, {"bbox": [-2, 6, 10, 8]})),
            r"annotation 0: its box, -2 to 8 across and 6 to 14 down, is",
        ),
        (
            changed(annotations=(0, {"bbox": [4, -2, 10, 8]})),
            r"annotation 0: its box, 4 to 14 across and -2 to 6 down, is",
        ),
        (
            changed(annotations=(0, {"bbox": [4, 6, 10, 26]})),
            r"annotation 0: its box, 4 to 14 across and 6 to 32 down, is",
        ),
        (
            changed(annotations=(0, {"bbox": [5, 6, 0, 8]})),
            r"annotation 0: its box is 0x8 pixels: give it a size, or remove",
        ),
        (changed(annotations=(0, {"bbox": [5, 6, 4, -8]})), r"annotation 0: its box is 4x-8 pixels"),
        (changed(annotations=(0, {"bbox": [5, 6, 4]})), r"annotation 0: its box is \[5, 6, 4\]: it takes four numbers"),
        (
            changed(annotations=(0, {"bbox": [5, 6, 4, float("nan")]})),
            r"annotation 0: its box .*: it takes finite numbers",
        ),
        (changed(annotations=(0, {"iscrowd": "0"})), r"annotation 0: its iscrowd is '0': it takes 0 or 1"),
        (changed(annotations=(0, {"category_id": 5})), r"annotation 0: category 5 is not among the file's categories"),
        (changed(annotations=(0, {"image_id": 44})), r"annotation 0: image 44 is not among the file's images"),
        (changed(annotations=(1, {"id": 0})), r"train.json: annotation 0 is there twice: give each an id of its own"),
        (changed(images=(1, {"id": 0})), r"train.json: image 0 is there twice"),
        (
            changed(images=(1, {"file_name": "0.png"})),
            r"train.json: images: 2 have the name .*0.png: give each its own",
        ),
        (
            changed(images=(1, {"file_name": "9.png"})),
            r"image 1: there is no .*train/9.png: put the image there, or remove",
        ),
        (changed(images=(1, {"file_name": None})), r"image 1: has no file_name: add it"),
        (changed(images=(1, {"id": "one"})), r"image in place 2: its id is 'one': it takes a whole number"),
        (
            changed(images=(1, {"width": 41})),
            r"image 1: says 41x30 pixels, 1.png has 40x30: boxes must be of that image",
        ),
        (changed(categories=(1, {"name": "cat"})), r"train.json: categories: 2 have the name cat"),
        (changed(categories=(1, {"name": "background"})), r"a class has the name 'background', which class 0 has"),
        (written("train.json", "{"), r"train.json: cannot be read as JSON \(.*\): mend it"),
        (written("train.json", "[]"), r"train.json: is a list, no COCO file"),
        (written("train.json", "{}"), r'train.json: has no list "images"'),
        (written("test.json", json.dumps(coco([[], []]))), r"no box in all 2 images of test: annotate some"),
        (
            written("test.json", json.dumps(coco([[("fox", [1, 2, 3, 4])], []], (("fox", 1),)))),
            r"annotation 0: class fox is none of training's \(cat, dog\)",
        ),
        (
            written("train/0.png", "no image"),
            r"train/0.png: cannot read this image .*, or take it out of the annotations",
        ),
        (lambda folder: (folder / "test.json").unlink(), r"expected .*train.json with images in .*train \(COCO\), or"),
        (as_voc("0.xml", BOMB), r"0.xml: declares a document type \(<!DOCTYPE\), which is not read: remove that line"),
        (as_voc("0.xml", "<annotation>"), r"0.xml: cannot be read as XML \(.*\): mend it"),
        (as_voc("0.xml", "<labels></labels>"), r"0.xml: is a <labels>, no <annotation>"),
        (as_voc("0.xml", None), r"train/0.png: its annotation is missing: add .*train/0.xml, without <object> if"),
        (as_voc("9.xml", voc([])), r"9.xml: its image is missing: add .*train/9.jpg"),
        (as_voc("0.xml", voc([("cat", [4, 6, 60, 8])])), r"0.xml: object 1 \(cat\): its box, 4 to 64 across"),
        (as_voc("0.xml", voc([("cat", [4, 6, 5, 8])]).replace("cat", "")), r"0.xml: object 1: has no <name>"),
        (
            as_voc("0.xml", voc([("cat", [4, 6, 5, 8])]).replace("xmax", "x")),
            r"object 1 \(cat\): its box is \['5', '7', None, '14'\]: it takes four",
        ),
        (as_voc("0.xml", voc([], size=(30, 40))), r"0.xml: says 30x40 pixels, 0.png has 40x30"),
    ],
)
def test_what_is_wrong_is_named_with_what_mends_it(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_voc_in_one_folder_needs_lists_and_an_image_is_in_one_of_them(folder):
    lists = folder / "ImageSets" / "Main"
    (folder / "train.json").unlink()
    (folder / "train").rename(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for number, found in enumerate(OBJECTS):
        (folder / "Annotations" / f"{number}.xml").write_text(voc(found))
    with pytest.raises(DataError, match=r"say which images are of which part: .*Main/train.txt and .*Main/test.txt"):
        load(folder)
    (folder / "test.json").unlink()
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n2\n")
    (lists / "test.txt").write_text("2\n3\n")
    with pytest.raises(DataError, match=r"JPEGImages/2.png: is in training and in test: take it out of one"):
        load(folder)
    (lists / "test.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"Main/test.txt: cannot be read as text \(.*\): mend it"):
        load(folder)
    (lists / "test.txt").write_text("3\n")
    (folder / "JPEGImages").rename(folder / "Pictures")
    with pytest.raises(DataError, match=r"JPEGImages: there is no such folder, which the images of 2 XML files are"):
        load(folder)


def test_an_image_that_breaks_off_is_named_when_it_is_decoded(folder):
    path = folder / "train" / "2.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"train/2.png: cannot read this image \(.*\): mend it, or take it out of the"):
        list(DetectionLoader(load(folder).train, 4))


def test_a_class_without_a_box_is_told(folder, caplog):
    caplog.set_level(logging.WARNING, "brfx")
    (folder / "train.json").write_text(json.dumps(coco([*OBJECTS[:2], [], []])))
    (folder / "test.json").write_text(json.dumps(coco([OBJECTS[0], []])))
    draw(folder / "test" / "0.png", OBJECTS[0])
    load(folder)
    assert "no box of dog in training" in caplog.text
