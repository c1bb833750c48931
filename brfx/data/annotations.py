"""Files that say which boxes are in which image: COCO's JSON and Pascal VOC's XML."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from brfx.data.image_files import IMAGE_SUFFIXES
from brfx.errors import DataError, first_line


@dataclass(frozen=True)
class Box:
    """One object.

    Attributes:
        where: it is said, for messages: ``"train.json: annotation 17"``.
        corners: left, top, right and bottom edge in pixels from the left and top edge of the image.
        name: its class.
        crowd: whether it is a region that no detector is to be trained on, and whose detections are no errors.
    """

    where: str
    corners: tuple[float, float, float, float]
    name: str
    crowd: bool = False


@dataclass(frozen=True)
class Annotated:
    """One image, with no box or several.

    Attributes:
        path: of the image.
        where: it is listed, for messages.
        size: width and height that are said of it, ``None`` where nothing is.
        boxes: its objects.
    """

    path: Path
    where: str
    size: tuple[int, int] | None
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Annotations:
    """The images of one part of a data set.

    Attributes:
        images: in the order of their numbers or names.
        ids: of each class the number that the file has for it, in the order of these; of VOC, which has none, empty.
    """

    images: tuple[Annotated, ...]
    ids: dict[str, int] = field(default_factory=dict)


def read_coco(path: Path, folder: Path) -> Annotations:
    """``{"images": [..], "categories": [..], "annotations": [..]}``, boxes as ``[left, top, width, height]``.

    Args:
        path: the JSON file.
        folder: where the images' ``file_name`` begins.

    Raises:
        DataError: the file cannot be read or lacks something, two entries have one number, or one names an image or a
            category that is not there; names the entry, and what mends it.
    """
    content = _json(path)
    images, categories, annotations = (
        _by_id(path, what, _table(path, content, name))
        for name, what in (("images", "image"), ("categories", "category"), ("annotations", "annotation"))
    )
    names = {number: _word(f"{path}: category {number}", row, "name") for number, row in sorted(categories.items())}
    _require_different(f"{path}: categories", names.values())
    boxes: dict[int, list[Box]] = {number: [] for number in images}
    for number, row in annotations.items():
        where = f"{path}: annotation {number}"
        image, category = (_reference(where, row, key) for key in ("image_id", "category_id"))
        if image not in images:
            raise DataError(f"{where}: image {image} is not among the file's images: add it, or remove the annotation")
        if category not in names:
            raise DataError(f"{where}: category {category} is not among the file's categories: add it, or mend this")
        left, top, width, height = _numbers(where, row.get("bbox"))
        corners = left, top, left + width, top + height
        crowd = row.get("iscrowd") or 0
        if crowd not in (0, 1):
            raise DataError(f"{where}: its iscrowd is {crowd!r:.40}: it takes 0 or 1")
        boxes[image].append(Box(where, corners, names[category], bool(crowd)))
    found = []
    for number, row in sorted(images.items()):
        where = f"{path}: image {number}"
        file = folder / _word(where, row, "file_name")
        found.append(Annotated(file, where, _size(row.get("width"), row.get("height")), tuple(boxes[number])))
    _require_different(f"{path}: images", (str(image.path) for image in found))
    return Annotations(tuple(found), {name: number for number, name in names.items()})


def read_voc(files: Sequence[Path], folder: Path) -> Annotations:
    """An XML file for each image, with ``<object>`` for each box.

    Pixels are counted from 1 and a box includes its last: the left edge of ``xmin`` 1 is that of the image. What is
    ``difficult`` is a :attr:`Box.crowd`.

    Args:
        files: the XML files.
        folder: of the images, each with the name of its XML file, or the one that ``<filename>`` says.

    Raises:
        DataError: a file cannot be read, declares a document type, or lacks something; or its image is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder, which the images of {len(files)} XML files are to be in")
    images: dict[str, list[Path]] = {}
    for image in sorted(folder.iterdir()):
        if image.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(image.stem, []).append(image)
    found = []
    for path in files:
        root = _xml(path)
        image = _image_of(path, root, folder, images.get(path.stem, []))
        boxes = [_voc_box(f"{path}: object {number}", part) for number, part in enumerate(root.findall("object"), 1)]
        size = _size(*(_text(root, f"size/{name}") for name in ("width", "height")))
        found.append(Annotated(image, str(path), size, tuple(boxes)))
    for name, count in Counter(image.path for image in found).items():
        if count > 1:
            raise DataError(f"{name}: {count} XML files are of this image: leave one")
    return Annotations(tuple(found))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({first_line(error)}): mend it") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: is a {type(content).__name__}, no COCO file: it takes images, categories, annotations"
        )
    return content


def _table(path: Path, content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    rows = content.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path}: has no list "{name}": a COCO file has images, categories and annotations')
    return rows


def _by_id(path: Path, what: str, rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for place, row in enumerate(rows, 1):
        number = _reference(f"{path}: {what} in place {place}", row, "id")
        if number in found:
            raise DataError(f"{path}: {what} {number} is there twice: give each an id of its own")
        found[number] = row
    return found


def _reference(where: str, row: dict[str, Any], key: str) -> int:
    number = row.get(key)
    if isinstance(number, bool) or not isinstance(number, int):
        raise DataError(f"{where}: its {key} is {number!r:.40}: it takes a whole number")
    return number


def _word(where: str, row: dict[str, Any], key: str) -> str:
    word = row.get(key)
    if not isinstance(word, str) or not word:
        raise DataError(f"{where}: has no {key}: add it")
    return word


def _numbers(where: str, values: Any) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: its box is {values!r:.80}: it takes four numbers") from error
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise DataError(f"{where}: its box is {values!r:.80}: it takes finite numbers")
    return left, top, right, bottom


def _require_different(where: str, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"{where}: {count} have the name {name}: give each its own")


def _size(width: Any, height: Any) -> tuple[int, int] | None:
    """Where both are numbers above 0; some tools write 0 or nothing."""
    try:
        size = round(float(width)), round(float(height))
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _xml(path: Path) -> Element:
    """The root. A file that declares a document type, with which entities could be any size, is refused."""

    def refuse(*_: Any) -> None:
        raise DataError(f"{path}: declares a document type (<!DOCTYPE), which is not read: remove that line")

    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
        root = builder.close()
    except (OSError, expat.ExpatError, AssertionError) as error:
        raise DataError(f"{path}: cannot be read as XML ({first_line(error)}): mend it") from error
    if root.tag != "annotation":
        raise DataError(f"{path}: is a <{root.tag}>, no <annotation> as Pascal VOC has it")
    return root


def _text(element: Element, name: str) -> str | None:
    text = element.findtext(name)
    return text.strip() if text and text.strip() else None


def _image_of(path: Path, root: Element, folder: Path, same_name: list[Path]) -> Path:
    named = folder / (_text(root, "filename") or "")
    if len(same_name) > 1 and named not in same_name:
        raise DataError(f"{path}: {' and '.join(image.name for image in same_name)} have its name: leave one of them")
    if same_name:
        return named if named in same_name else same_name[0]
    if not named.is_file():
        raise DataError(f"{path}: its image is missing: add {folder}/{path.stem}.jpg (or .png ...), or remove the XML")
    return named


def _voc_box(where: str, part: Element) -> Box:
    name = _text(part, "name")
    if name is None:
        raise DataError(f"{where}: has no <name>, its class: add it")
    edges = [_text(part, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = _numbers(f"{where} ({name})", edges)
    return Box(f"{where} ({name})", (left - 1, top - 1, right, bottom), name, _text(part, "difficult") == "1")
