"""Label Studio's own JSON: tasks with `data` and `annotations`, or JSON-MIN; a file for all or a file a task.

project-1-at-2024-05-02.json    and    images/000.jpg, <folder>/000.jpg or images/1a2b3c4d-000.jpg
"""

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from adfm.data.readers.annotations import Shape, box, outlined, sample, unlisted
from adfm.data.readers.files import IMAGES, DataSet, NoImage, folders, holds, images, listing, walk
from adfm.data.readers.lookup import Images
from adfm.data.readers.shapes import Point, bitmap, check_mask_size, ellipse, turned_box
from adfm.data.readers.textfiles import Size, member, mentions, number, optional, parsed, pixel_size, point
from adfm.data.readers.verdicts import class_name, defect_type, is_verdict
from adfm.records import Box, Sample

FORM = "*.json of Label Studio's JSON or JSON-MIN export; images/*, or the folders that its paths name"
# Keys of the `value` of a result that make it a region; results without any are answers about the image.
_GEOMETRY = ("x", "y", "width", "height", "rotation", "points", "radiusX", "radiusY", "rle", "vertices", "imageDataURL")
_UPLOAD = re.compile(r"(?:^|[/\\])(upload[/\\]\d+[/\\][^/\\]+)$")  # the number is the project's
# Paths as Label Studio's server serves them, and what they mean on its disk: local files, uploads to a storage.
_SERVER = re.compile(r"^https?://[^/]+(?=/(?:data|storage-data)/)")
_STORAGES = (
    (re.compile(r"/data/local-files/?\?d="), "/data/local-files/?d="),
    (re.compile(r"/storage-data/uploaded/?\?filepath="), "/data/"),
)

_Task = tuple[str, str, dict[str, Any]]  # with the names of its file and its own in messages
_Region = tuple[int, dict[str, Any], list[str]]  # the place of its first result, from 1, that result, all its labels


class _Verdict(NamedTuple):
    """What one annotation says of its image."""

    shapes: list[Shape]
    defect: str | None  # chosen for the whole image; "" if it is normal, `None` if nothing was chosen
    size: Size  # of the image; `None` if it is not stated: then shapes are fractions
    notes: tuple[str, ...]
    undecided: bool  # whether there are choices about the whole image whose meaning is not known

    @property
    def key(self) -> object:
        """Equal for annotations that say the same."""
        drawn = [(shape.name, *(round(side, 3) for side in shape.box)) for shape in self.shapes]
        return sorted(set(drawn)), self.defect


def matches(raw: Path) -> bool:
    """Whether there is a JSON file of Label Studio near the top."""
    return holds(raw, lambda folder: any(map(_is_export, listing(folder, ".json"))))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images of the tasks that have an annotation, file by file.

    Regions are defects: rectangles and ellipses (turned or not), polygons and brush masks. A submitted annotation
    without regions is a normal image. A choice about the whole image is its label if the choices of that name are
    ever OK, good, NG, bad or the like; an image with such a label alone has no boxes. Predictions and drafts are not
    read. The image is the file in the data set that the end of the task's path or URL names. A JSON file is in memory
    whole while its images are yielded; so are the paths of all images.
    """
    data, pictures = DataSet(raw, "label-studio"), Images(raw)
    seen = False
    for folder in walk(raw):
        tasks: list[_Task] = []
        for file in listing(folder, ".json"):
            with data.at(file):
                if (content := _tasks(parsed(file))) is not None:  # else the file is not of Label Studio
                    seen = True
                    for place, task in enumerate(content, start=1):
                        tasks.append((data.relative(file), f"task {task.get('id', f'no. {place}')}", task))
        yield from _samples(data, folder, tasks, pictures)
    data.problems += unlisted(data) if seen else []
    data.finish("no JSON file of Label Studio: no list of tasks with data and annotations", seen)


def _is_export(file: Path) -> bool:
    try:
        with file.open("rb") as content:
            first = content.read(64).removeprefix(codecs.BOM_UTF8).strip()[:1]
    except OSError:
        return False
    words = {
        b"[": ((b'"annotations"', b'"result"', b'"data"'), (b'"annotation_id"', b'"annotator"', b'"lead_time"')),
        b"{": ((b'"result"', b'"data"', b'"was_cancelled"'),),
    }
    return any(mentions(file, *its) for its in words.get(first, ()))


def _tasks(content: Any) -> list[dict[str, Any]] | None:
    """Return the tasks in a file, all in the form of the JSON export; `None` if it holds none."""
    if isinstance(content, dict):
        if isinstance(content.get("result"), list) and isinstance(content.get("task"), dict):  # of a target storage
            return [content["task"] | {"annotations": [content]}]
        return [content] if _is_task(content) else None
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        return None
    if content and all("annotation_id" in entry and "data" not in entry for entry in content):
        return _from_min(content)
    return content if any(map(_is_task, content)) else None


def _is_task(entry: dict[str, Any]) -> bool:
    has_list = any(isinstance(entry.get(key), list) for key in ("annotations", "completions"))
    return has_list and isinstance(entry.get("data"), dict)


def _from_min(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # JSON-MIN has an entry an annotation, and the results by the name of their control.
    tasks: dict[str, dict[str, Any]] = {}
    # A single choice is a text, as are the data of the task; it is known by a word such as OK or NG.
    choices = {name for entry in entries for name, answer in entry.items() if is_verdict(answer)}
    for place, entry in enumerate(entries, start=1):
        identifier = entry.get("id", f"no. {place}")
        task = tasks.setdefault(str(identifier), {"id": identifier, "data": entry, "annotations": []})
        results = []
        for name, answer in entry.items():
            for value in answer if isinstance(answer, list) else [answer]:
                if isinstance(value, dict):
                    sizes = {key: value.get(key) for key in ("original_width", "original_height")}
                    results.append({"from_name": name, "value": value} | sizes)
                elif isinstance(value, str) and name in choices:
                    results.append({"from_name": name, "value": {"choices": [value]}})
        if entry["annotation_id"] is not None:
            task["annotations"].append({"id": entry["annotation_id"], "result": results})
    return list(tasks.values())


def _samples(data: DataSet, folder: Path, tasks: list[_Task], pictures: Images) -> Iterator[Sample]:
    written = [optional(each, "result", list) or () for _, _, task in tasks for each in _annotations(task)]
    results = [result for its in written for result in its if isinstance(result, dict)]
    # The names of the choices that are labels: a word such as OK or NG is chosen there at least once.
    verdicts = (result for result in results if any(map(is_verdict, _choices(result) or ())))
    labels = frozenset(str(result.get("from_name")) for result in verdicts)
    draws = any(map(_is_region, results))
    for where, name, task in tasks:
        with data.at(f"{where}: {name}"):
            image = _image(data, task, pictures, folder)
            data.claim(image, f"{name} of {where}")
            verdict = _verdict(data.relative(image), task, labels)
            # Beside regions, choices may say anything else.
            if not draws and verdict.undecided:
                what = "no region is drawn in any task, and which choice means a defect is not known"
                raise ValueError(f"{what}; call that of a normal image OK, good or normal")
            shapes, defect, size, notes, _ = verdict
            fractions = bool(shapes) and size is None
            yield sample(data, image, shapes, data.split(image), notes, label=defect, size=size, normalized=fractions)


def _annotations(task: dict[str, Any]) -> list[dict[str, Any]]:
    key = "annotations" if "annotations" in task else "completions"
    return [one for one in optional(task, key, list) or () if isinstance(one, dict)]


def _choices(result: object) -> list[Any] | None:
    return optional(optional(result, "value", dict), "choices", list)


def _image(data: DataSet, task: dict[str, Any], pictures: Images, folder: Path) -> Path:
    fields = member(task, "data", dict)
    names = {key: value for key, value in fields.items() if isinstance(value, str) and _is_image_name(value)}
    names = {"image": names["image"]} if "image" in names else names
    if len(names) != 1:
        keys = ", ".join(map(repr, names)) or "none"
        raise ValueError(f"its data should have the path of one image; the keys that have one: {keys}")
    name = _SERVER.sub("", next(iter(names.values())))
    for storage, prefix in _STORAGES:
        name = storage.sub(prefix, name)
    try:
        return pictures.locate(name, folder)
    except NoImage:
        path = _UPLOAD.search(name)
        if path and (uploaded := _uploaded(data, unquote(path[1].replace("\\", "/")), pictures, folder)):
            return uploaded
        raise


def _uploaded(data: DataSet, path: str, pictures: Images, folder: Path) -> Path | None:
    # The file may have the name that Label Studio gave it, or the one that it had before.
    # Label Studio puts a hash before the name, and replaces spaces and other signs (Django's `get_valid_filename`).
    name = path.rsplit("/", 1)[1]
    before = re.sub("^[0-9a-f]{8}-", "", name)
    for one in dict.fromkeys((f"media/{path}", name, before)):
        with contextlib.suppress(NoImage):
            return pictures.locate(one, folder)
    places = [folder, *(inside for inside in folders(folder) if inside.name.lower() in ("images", "data"))]
    everything = [image for place in places for image in images(place)]
    alike = [image for image in everything if re.sub(r"[^-\w.]", "", image.name.strip().replace(" ", "_")) == before]
    if len(alike) > 1:
        several = ", ".join(map(data.relative, alike))
        raise ValueError(f"the image {name!r} may be any of {several}; name its file {name}")
    return alike[0] if alike else None


def _is_image_name(value: str) -> bool:
    path = re.split("[#?](?!d=|filepath=)", value)[0]
    return Path(path.replace("\\", "/")).suffix.lower() in IMAGES


def _verdict(image: str, task: dict[str, Any], labels: frozenset[str]) -> _Verdict:
    annotations = _annotations(task)
    valid = [one for one in annotations if not (one.get("was_cancelled") or one.get("skipped"))]
    if not valid:
        what = "was skipped" if annotations else "has no submitted annotation (a prediction is not one)"
        # A `NoImage`: `convert.missing: skip` leaves it out as it does a missing image.
        raise NoImage(f"{image} {what}; annotate it, or set convert.missing to skip to leave such images out")
    truths = [one for one in valid if one.get("ground_truth") is True]
    notes: tuple[str, ...] = ()
    if len(truths) == 1 and len(valid) > 1:
        valid, notes = truths, ("of several annotations, the one marked as ground truth counts",)
    verdicts = []
    for annotation in valid:
        try:
            verdicts.append(_of_annotation(annotation, labels))
        except ValueError as error:
            raise ValueError(f"annotation {annotation.get('id')}: {error}") from error
    first, *others = verdicts
    if any(other.key != first.key for other in others):
        ids = ", ".join(str(annotation.get("id")) for annotation in valid)
        raise ValueError(f"the annotations {ids} of {image} differ; delete all but one, or mark one as ground truth")
    if others:
        notes = ("of several annotations that agree, the first counts",)
    return first._replace(notes=notes + first.notes)


def _of_annotation(annotation: dict[str, Any], labels: frozenset[str]) -> _Verdict:
    results = member(annotation, "result", list)
    shapes: list[Shape] = []
    sizes: set[Size] = set()
    for place, result, names in _regions(results):
        try:
            size = pixel_size(result.get("original_width"), result.get("original_height"))
            shapes.append(_shape(result, names, size))
        except ValueError as error:
            raise ValueError(f"result {place}: {error}") from error
        sizes.add(size)
    if len(sizes) > 1:
        raise ValueError("its results state different sizes of the image")
    defect, notes = _choice(results, labels, {str(result.get("id")) for result in results if _is_region(result)})
    if defect == "" and shapes:
        raise ValueError(f"the image is labelled normal, and {len(shapes)} defects are drawn on it; correct either")
    return _Verdict(shapes, defect, next(iter(sizes), None), notes, undecided=defect is None and bool(notes))


def _is_region(result: object) -> bool:
    return any(key in (optional(result, "value", dict) or ()) for key in _GEOMETRY)


def _regions(results: list[Any]) -> list[_Region]:
    # The geometry of a region, its labels and what was answered about it are results of one id.
    regions: dict[str, _Region] = {}
    for place, result in enumerate(results, start=1):
        if not _is_region(result):
            continue
        value = result["value"]
        geometry = {key: value[key] for key in _GEOMETRY if key in value}
        key = str(result["id"]) if result.get("id") is not None else json.dumps(geometry, sort_keys=True)
        *_, labels = regions.setdefault(key, (place, result, []))
        for kind, names in value.items():
            if kind.endswith("labels") and isinstance(names, list):
                labels.extend(str(name) for name in names if name not in labels)
    return list(regions.values())


def _choice(results: list[Any], labels: frozenset[str], regions: set[str]) -> tuple[str | None, tuple[str, ...]]:
    """Return the label of the whole image, as in `_Verdict`, and notes about its choices."""
    chosen: list[str] = []
    notes: list[str] = []
    for result in results:
        choices = _choices(result)
        if choices is None or _is_region(result) or str(result.get("id")) in regions:
            continue
        name = str(result.get("from_name"))
        if name in labels:
            chosen += [choice for choice in choices if isinstance(choice, str)]
            notes.append(f"the choice {name!r} is taken for the label of the image")
        else:
            notes.append(f"the choice {name!r} is not about a defect and is left out")
    return defect_type(chosen), tuple(notes)


def _shape(result: dict[str, Any], names: list[str], size: Size) -> Shape:
    if turned := result.get("image_rotation"):
        raise ValueError(f"the image was turned by {turned} degrees in Label Studio; turn the file, and annotate that")
    if not names:
        raise ValueError("the region has no label; choose one, or delete it")
    name = "+".join(sorted(map(class_name, names)))  # a region may have several labels
    value, (width, height) = result["value"], size or (1, 1)
    scale = (width / 100, height / 100)  # positions are percentages
    rotation = number(value.get("rotation") or 0) % 360
    if "rle" in value:
        if not size:
            raise ValueError("a brush mask without original_width and original_height cannot be read")
        check_mask_size(width, height)
        opacity = _unpacked(value["rle"], width * height * 4).reshape(height, width, 4)[..., 3]
        # A pixel belongs to the mask where its opacity is more than half of the largest.
        return bitmap(name, opacity > opacity.max() / 2, 0, 0, size)
    if rotation and not size:
        raise ValueError("a turned region without original_width and original_height cannot be read")
    if "points" in value:
        return outlined(name, [_point(one, scale) for one in member(value, "points", list)], cut=True)
    if "vertices" in value or "imageDataURL" in value:
        raise ValueError("a region of this kind is not read; draw a rectangle, polygon, ellipse or brush mask instead")
    x, y = _point([value.get("x"), value.get("y")], scale)
    if "radiusX" in value:
        return ellipse(name, (x, y), _point([value["radiusX"], value.get("radiusY")], scale), rotation)
    if "width" not in value or "height" not in value:
        raise ValueError("a point has no area; draw a rectangle, polygon, ellipse or mask in its place")
    across, down = _point([value["width"], value["height"]], scale)
    if not rotation:
        return Shape(name, box(x, y, x + across, y + down))
    # Label Studio turns a box about its upper left corner.
    return turned_box(name, Box(x, y, x + across, y + down), rotation, pivot=(x, y))


def _point(value: object, scale: Point) -> Point:
    x, y = point(value)
    return x * scale[0], y * scale[1]


def _unpacked(packed: object, length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of an image (red, green, blue, opacity) from Label Studio's run lengths."""
    damaged = ValueError("its mask is damaged; paint it again")
    if not isinstance(packed, list) or not all(type(value) is int and 0 <= value < 256 for value in packed):
        raise ValueError("'rle' is not a list of bytes")
    bits = np.unpackbits(np.array(packed, np.uint8))
    at = 0

    def take(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        nonlocal at
        at += count
        if at > bits.size:
            raise damaged
        return bits[at - count : at]

    def integer(size: int) -> int:
        return int((take(size) + ord("0")).tobytes(), 2)

    # The header: 32 bits for the number of bytes, 5 for the size of a word, 4 times 4 for the sizes of a run length.
    values, word = integer(32), integer(5) + 1
    sizes = [integer(4) + 1 for _ in range(4)]
    if values != length:
        raise ValueError(f"its mask has {values} values, and an image of the size that is stated has {length}")
    if word != 8:
        raise damaged
    unpacked = np.zeros(length, np.uint8)
    filled = 0
    while filled < length:
        # A run: whether one word is repeated, which of the four sizes the length has, the length, the word or words.
        repeated = integer(1)
        count = integer(sizes[integer(2)]) + 1
        if filled + count > length:
            raise damaged
        unpacked[filled : filled + count] = np.packbits(take(8 if repeated else 8 * count))
        filled += count
    return unpacked
