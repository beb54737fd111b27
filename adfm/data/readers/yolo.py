"""YOLO: a text file an image, one line a defect, in fractions of the image's width and height.

images/train/000.jpg    and    labels/train/000.txt    or    train/images/000.jpg    and    train/labels/000.txt
or both in one folder; and data.yaml, classes.txt, obj.names or _darknet.labels with the names of the classes.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from adfm.data.readers.annotations import Shape, box, bracketed, by_stem, nfc, outlined, sample, shapes_of_lines
from adfm.data.readers.files import DataSet, NoImage, holds, images, listing, partners, split_of, walk, within
from adfm.data.readers.textfiles import decimal, lines, mentions, text
from adfm.data.readers.verdicts import class_name
from adfm.records import Box, Sample, Split

FORM = "images/*, labels/*.txt, data.yaml"
# Ultralytics finds labels by /labels/ in the place of the last /images/.
_IMAGES, _LABELS = frozenset(("images",)), frozenset(("labels",))
# Ends of the names of lists of classes, one a line: of LabelImg and Label Studio, of Darknet and CVAT, of Roboflow.
_LISTS = ("classes.txt", ".names", "_darknet.labels")
_KEYS: dict[str, Split] = {"train": "train", "val": "validation", "test": "test"}  # of the YAML file
_SLACK = 0.01  # rounding of the tools that write the files; Ultralytics allows as much
_REACH = 1.0  # how far the corner of a turned box may lie outside, in widths and heights of the image
_ELSEWHERE = "the YAML file names folders or lists of a split that are not here; the folders' names count instead"


class _TextLoader(yaml.BaseLoader):
    """YAML as text alone: other loaders make booleans of classes called `no` or `off`. Repeated keys are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key.value, str))
        if repeated := [key for key, count in keys.items() if count > 1]:
            raise ValueError(f"line {node.start_mark.line + 1}: the key {repeated[0]!r} is there more than once")
        return super().construct_mapping(node, deep)


@dataclass
class _Settings:
    names: dict[int, str] = field(default_factory=dict)  # of the classes
    splits: dict[Path, set[Split]] = field(default_factory=lambda: defaultdict(set))  # of a folder or an image
    lost: bool = False  # whether a place that a YAML file gives to a split is not in the data set


def matches(raw: Path) -> bool:
    """Whether there are images, and a data.yaml with names or a text file of such lines, near the top."""
    return holds(raw, _is_part) and any(images(folder) for folder in walk(raw))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images, folder by folder. One without a text file, or with an empty one, is normal.

    `class cx cy width height` is a box, `class x1 y1 x2 y2 x3 y3 …` a polygon or, of four corners, a turned box. The
    names of classes are those in the YAML file or in a list of names, else `class 0` and so on. `split` is that of the
    YAML file, where its train, val and test are in the data set, else that of the folders' names; images that are both
    validation and test count as test, images that are training and something else have none.
    """
    data = DataSet(raw, "yolo")
    settings = _settings(data)
    shape = partial(_shape, names=settings.names)
    defects = False
    for folder in walk(raw):
        for image, file in _paired(data, folder):
            shapes = list(shapes_of_lines(data, file, shape)) if file else []
            defects = defects or bool(shapes)
            split, notes = _split(data, image, settings)
            yield sample(data, image, shapes, split, notes, normalized=True)
    # Without labels all images would be taken for normal.
    data.finish("no image has a text file with a defect, beside it or in labels/ instead of images/", defects)


def _is_part(folder: Path) -> bool:
    # Below a folder of labels they may lie at any depth: labels/train/<product>/<camera>.
    for place in walk(folder) if folder.name.lower() in _LABELS else (folder,):
        # The text files of DeepPCB have folders of this name; their numbers are pixels.
        texts = listing(place, ".txt") if not place.name.endswith("_not") else ()
        if any(map(_is_settings, listing(place, ".yaml", ".yml"))) or any(map(_is_labels, texts)):
            return True
    return False


def _is_settings(file: Path) -> bool:
    return file.stem == "data" or mentions(file, b"names:")


def _is_labels(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            first = next((line for line in opened if line.strip()), "").split()
        return len(first) > 4 and _class(first[0]) >= 0 and all(math.isfinite(float(word)) for word in first)
    except (OSError, ValueError):
        return False


def _paired(data: DataSet, folder: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield the images of a folder, each with its text file; add the text files without an image to the problems."""
    pictures = by_stem(images(folder))
    places = partners(data.raw, folder, _IMAGES, _LABELS) if pictures else []
    files = by_stem(file for place in places for file in listing(place, ".txt"))
    for stem, same in pictures.items():
        for path, *several in filter(None, (same, files.get(stem))):
            if several:
                others = ", ".join(data.relative(Path(other)) for other in several)
                data.add(Path(path), f"has the same name as {others}")
        for image in same:
            yield Path(image), Path(files[stem][0]) if stem in files else None

    texts = listing(folder, ".txt")
    places = partners(data.raw, folder, _LABELS, _IMAGES) if texts else []
    # Of these, the folders whose images look for their text files here.
    theirs = [place for place in places if folder in partners(data.raw, place, _IMAGES, _LABELS)]
    stems = {nfc(image.stem) for place in theirs for image in images(place)}
    in_labels = any(name.lower() in _LABELS for name in folder.relative_to(data.raw).parts)
    for file in texts:
        if nfc(file.stem) not in stems and not file.name.lower().endswith(_LISTS) and (in_labels or _is_labels(file)):
            data.add(file, NoImage(f"its image {file.stem}.* is missing"))


def _settings(data: DataSet) -> _Settings:
    settings = _Settings()
    sources: dict[Path, dict[int, str]] = {}
    for folder in walk(data.raw, 2):
        for file in listing(folder, ".yaml", ".yml"):
            try:
                content = yaml.load(text(file), _TextLoader) if _is_settings(file) else None
                if isinstance(content, dict) and "names" in content:
                    sources[file] = _names(content)
                    _add_splits(data, file, content, settings)
            except (yaml.YAMLError, RecursionError, ValueError) as error:
                data.add(file, " ".join(str(error).split()))
        for file in listing(folder, *_LISTS):
            with data.at(file):
                sources[file] = {n: name.strip() for n, name in enumerate(text(file).strip().splitlines())}
    for names in sources.values():
        if any(settings.names.get(number, name) != name for number, name in names.items()):
            data.add(", ".join(map(data.relative, sources)), "name the classes differently; keep one of them")
            break
        settings.names |= names
    return settings


def _names(content: dict[Any, Any]) -> dict[int, str]:
    names = content["names"]
    if "kpt_shape" in content:
        raise ValueError("kpt_shape says that the labels are points of a pose; export boxes or polygons")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    numbered = isinstance(names, dict) and names and all(str(number).isdecimal() for number in names)
    if not numbered or not all(isinstance(name, str) for name in names.values()):
        raise ValueError("'names' is neither a list of names nor names under their numbers")
    count = content.get("nc", "")
    if isinstance(count, str) and count.isdecimal() and int(count) != len(names):
        raise ValueError(f"'nc' is {count}, but there are {len(names)} names; correct one of them")
    return {int(number): name for number, name in names.items()}


def _add_splits(data: DataSet, file: Path, content: dict[Any, Any], settings: _Settings) -> None:
    """Add train, val and test of a YAML file where they lead to something in the data set."""
    # The files of several tools lead out of the data set (`../train/images`, or to the machine that wrote them).
    roots = [file.parent, data.raw]
    if base := within(data.raw, file.parent, str(content.get("path", "")), os.path.isdir):
        roots.insert(0, base)
    for key, split in _KEYS.items():
        places = content.get(key)
        for place in places if isinstance(places, list) else [places]:
            if not isinstance(place, str) or place.lower() in ("", "null", "~"):
                continue
            path = _resolved(data.raw, roots, place)
            settings.lost = settings.lost or not path
            if path and path.is_file() and path.suffix == ".txt":
                _add_list(data, path, split, roots, settings)
            elif path:
                settings.splits[path].add(split)


def _add_list(data: DataSet, file: Path, split: Split, roots: list[Path], settings: _Settings) -> None:
    where = data.relative(file)
    bases = list(dict.fromkeys([file.parent, *roots]))
    folders: dict[str, Path] = {}  # as the list writes them; a list has a hundred thousand lines
    with data.at(where):
        for number, line in enumerate(map(str.strip, lines(file)), start=1):
            if not line:
                continue
            written, _, name = line.replace("\\", "/").rpartition("/")
            image = folders[written] / name if written in folders else None
            if not image or not image.is_file():
                image = _resolved(data.raw, bases, line)
            if image and image.is_file():
                folders[written] = image.parent
                settings.splits[image].add(split)
            else:
                data.add(f"{where}: line {number}", NoImage(f"image {line[:200]!r} is missing"))


def _resolved(raw: Path, bases: list[Path], name: str) -> Path | None:
    # The path may have been written elsewhere: its longest end that is in the data set counts.
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    split = split_of(*reversed(parts))
    for first in range(len(parts)):
        end = parts[first:]
        # The end has to name the same split as the whole: `elsewhere/train/images` does not lead to `images`.
        if ".." in end or split_of(*reversed(end)) != split:
            continue
        for base in bases:
            path = within(raw, base, "/".join(end), os.path.exists)
            # A file's name alone leads to it only from the folder that the path names before it.
            bare = len(end) == 1 and first and parts[first - 1] not in ("..", base.resolve().name)
            if path and not (bare and path.is_file()):
                return path
    return None


def _split(data: DataSet, image: Path, settings: _Settings) -> tuple[Split | None, list[str]]:
    paths = (image, *image.parents) if settings.splits else ()
    given = [splits for path in paths if (splits := settings.splits.get(path))]
    if not given:
        return data.split(image), [_ELSEWHERE] if settings.lost else []
    nearest = given[0]
    if nearest == {"validation", "test"}:
        return "test", ["the YAML file has it for validation and for test; it counts as test"]
    if len(nearest) > 1:
        others = " and for ".join(sorted(nearest - {"train"}, reverse=True))
        return None, [f"the YAML file has it for training and for {others}, so that neither counts"]
    split = next(iter(nearest))
    if set().union(*given) != nearest:
        return split, [f"the YAML file has it for more than {split} by a folder further up; the nearest counts"]
    return split, []


def _shape(words: list[str], names: dict[int, str]) -> Shape:
    if len(words) == 6:
        raise ValueError("has 6 numbers: the last is a confidence, and predictions are not labels")
    if len(words) < 5 or len(words) % 2 == 0:
        raise ValueError(f"is neither class, cx, cy, width, height nor class and points: has {len(words)} numbers")
    number = _class(words[0])
    if names and number not in names:
        raise ValueError(f"the class {number} has no name; there are {', '.join(map(str, sorted(names)))}")
    name = class_name(names[number]) if names else f"class {number}"
    if len(words) == 5:
        return _drawn(name, words[1:])
    values = [_fraction(word, _REACH if len(words) == 9 else _SLACK) for word in words[1:]]  # 9: a turned box
    drawn = outlined(name, list(zip(values[::2], values[1::2], strict=True)), side=1)
    return replace(drawn, cut=_reaches_out(drawn.box, 0))


def _drawn(name: str, words: list[str]) -> Shape:
    cx, cy = (_fraction(word, _SLACK) for word in words[:2])
    for word in words[2:]:
        if _fraction(word, math.inf) < 0:
            cause = "the box was drawn upwards or to the left, and where it is depends on the tool"
            raise ValueError(f"its width or height is {word}: {cause}; draw it again")
    width, height = (_fraction(word, _SLACK) for word in words[2:])
    drawn = box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2, side=1)
    if _reaches_out(drawn, _SLACK):
        raise ValueError(f"the box {bracketed(drawn)} reaches out of the image; draw it again")
    return Shape(name, drawn, cut=_reaches_out(drawn, 0))


def _reaches_out(drawn: Box, slack: float) -> bool:
    return min(drawn.x1, drawn.y1) < -slack or max(drawn.x2, drawn.y2) > 1 + slack


def _class(word: str) -> int:
    number = decimal(word, "the class")  # np.savetxt writes 1 as 1.000000e+00
    if not (0 <= number < 1e6 and number.is_integer()):
        raise ValueError(f"the class {word!r} is not a whole number from 0")
    return int(number)


def _fraction(word: str, slack: float) -> float:
    value = decimal(word, "a position or size")
    if not -slack <= value <= 1 + slack:
        raise ValueError(f"{word} is not a fraction of the image; write positions and sizes from 0 to 1, not pixels")
    return value
