"""VGG Image Annotator: one JSON or CSV file, a project or an export, of version 1, 2 or 3.

via_project.json or via_export_json.json or via_export_csv.csv    and    000.jpg or images/000.jpg
"""

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from adfm.data.readers.annotations import Shape, box, outlined, sample, unlisted
from adfm.data.readers.files import DataSet, holds, listing, walk
from adfm.data.readers.lookup import Images
from adfm.data.readers.shapes import ellipse, line
from adfm.data.readers.textfiles import member, mentions, number, optional, parsed, text
from adfm.data.readers.verdicts import class_name, defect_type, is_verdict
from adfm.records import Sample

FORM = "*.json or *.csv of VGG Image Annotator, a project or an export; *.jpg or images/*"
# What people call the attribute that names the class, if a region has several.
_CLASS_ATTRIBUTES = frozenset(("class", "classes", "label", "name", "type", "category", "defect", "defect_type"))
_SHAPES = {2: "rect", 3: "circle", 4: "ellipse", 5: "polyline", 6: "polyline", 7: "polygon", 8: "box"}  # of VIA 3
_UNNAMED = "defect"  # the class where no region has an attribute

Attributes = dict[str, str]


class _Region(NamedTuple):
    shape: dict[str, Any]
    attributes: Attributes


class _Image(NamedTuple):
    name: str  # a path or URL
    size: int  # in bytes; -1 if unknown
    regions: list[_Region]
    attributes: Attributes  # of the image as a whole


def matches(raw: Path) -> bool:
    """Whether there is a JSON or CSV file of VIA near the top."""
    return holds(raw, lambda folder: any(map(_is_export, listing(folder, ".json", ".csv"))))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images that the files list, file by file. In memory are one file, and the paths of all images.

    Regions are defects. The class of one is its only attribute, or the one that is called class, label, name, type,
    category or defect; where no region has any, all are called defect. An attribute of the file is the image's label if
    it is ever OK, good, NG, bad or the like.
    """
    data, pictures = DataSet(raw, "via"), Images(raw)
    seen = False
    for folder in walk(raw):
        for file in [*listing(folder, ".json"), *listing(folder, ".csv")]:
            images = None
            with data.at(file):
                images = _images(data, file)
            if images is not None:
                seen = True
                yield from _samples(data, file, images, pictures)
    data.problems += unlisted(data) if seen else []
    data.finish("no JSON or CSV file of VIA: none with regions and file_attributes", seen)


def _is_export(file: Path) -> bool:
    if file.suffix.lower() == ".csv":
        return mentions(file, b"file_attributes", b"region_shape_attributes", b"region_attributes")
    return (
        mentions(file, b'"_via_img_metadata"')
        or mentions(file, b'"filename"', b'"regions"', b'"file_attributes"')
        or mentions(file, b'"vid_list"', b'"fid_list"', b'"metadata"')
    )


def _samples(data: DataSet, file: Path, images: list[_Image], pictures: Images) -> Iterator[Sample]:
    where, split = data.relative(file), data.split(file, file.stem)
    with data.at(where):
        kind, notes = _class_attribute(region for image in images for region in image.regions)
        labels = _label_attributes(images)
        for image in images:
            with data.at(where):
                path = pictures.locate(image.name, file.parent, file.stem)
                data.claim(path, where)
                defect = defect_type(image.attributes[name] for name in labels if name in image.attributes)
                is_same = image.size < 0 or path.stat().st_size == image.size
                shapes = []
                for place, region in enumerate(image.regions):
                    with data.at(f"{where}: {image.name}: region {place}"):
                        shapes.append(_shape(region, kind, is_same))
                if defect == "" and image.regions:
                    drawn = f"{len(image.regions)} regions are drawn on it"
                    raise ValueError(f"{image.name} is labelled normal, and {drawn}; correct either")
                its_notes = list(notes) if image.regions else []
                if defect is not None:
                    its_notes += [f"the attribute {name!r} is taken for the label of the image" for name in labels]
                if not is_same:
                    its_notes.append("the image file is not the one that was annotated: it has another size in bytes")
                yield sample(data, path, shapes, split or data.split(path), its_notes, label=defect)


def _images(data: DataSet, file: Path) -> list[_Image] | None:
    """Return the images that a file lists; `None` if it is not one of VIA."""
    if file.suffix.lower() == ".csv":
        return _from_csv(data, file) if _is_export(file) else None
    content = parsed(file)
    if not isinstance(content, dict):
        return None
    if all(isinstance(content.get(key), dict) for key in ("file", "view", "metadata", "attribute")):
        return _from_version_3(content)
    entries = content.get("_via_img_metadata", content)
    values = list(entries.values()) if isinstance(entries, dict) else [entries]
    are_images = all(isinstance(optional(entry, "filename", str), str) and "regions" in entry for entry in values)
    if "_via_img_metadata" in content and not are_images:
        raise ValueError("_via_img_metadata is not an object of images with filename and regions")
    if "_via_img_metadata" not in content and not (values and are_images):
        return None
    return [_from_entry(entry, content.get("_via_attributes")) for entry in values]


def _from_entry(entry: dict[str, Any], declared: object) -> _Image:
    """Return an image of version 1 or 2; `declared` are the project's attributes, with the options to choose from."""
    regions = entry["regions"] or []
    if isinstance(regions, dict):  # version 1
        regions = list(regions.values())
    if not isinstance(regions, list):
        raise ValueError(f"the regions of {entry['filename']!r} are not a list")
    drawn = []
    for region in regions:
        shape = member(region, "shape_attributes", dict)
        drawn.append(_Region(shape, _attributes(region.get("region_attributes"), declared, "region")))
    size = entry["size"] if type(entry.get("size")) is int else -1
    return _Image(entry["filename"], size, drawn, _attributes(entry.get("file_attributes"), declared, "file"))


def _attributes(given: object, declared: object, kind: str) -> Attributes:
    """Return attributes with their values as text; several options are their names, joined by `+`."""
    attributes = {}
    for name, value in given.items() if isinstance(given, dict) else ():
        options = optional(optional(optional(declared, kind, dict), name, dict), "options", dict)
        chosen = [option for option, on in value.items() if on] if isinstance(value, dict) else [value]
        attributes[name] = _joined((option for option in chosen if option not in (None, "")), options)
    return attributes


def _joined(chosen: Iterable[object], options: object) -> str:
    # The ids of options may be mere numbers: their names say what they are.
    descriptions = ((option, optional(options, str(option), str) or "") for option in chosen)
    return "+".join(sorted(name if name.strip() else str(option) for option, name in descriptions)).strip()


def _from_csv(data: DataSet, file: Path) -> list[_Image]:
    # A row a region, or a row with `{}` for an image without.
    images: dict[tuple[str, str], _Image] = {}
    try:
        for row in csv.DictReader(io.StringIO(text(file).lstrip("#")), strict=True):
            name, size = row.get("filename") or row.get("#filename") or "", row.get("file_size") or ""
            try:
                cells = (row.get(f"{column}_attributes") or "{}" for column in ("region_shape", "region", "file"))
                shape, attributes, whole = map(json.loads, cells)
            except (ValueError, RecursionError):
                data.add(file, f"{name}: its attributes are not JSON")
                continue
            its_size = int(size) if size.isascii() and size.isdigit() and len(size) < 16 else -1
            image = images.setdefault((name, size), _Image(name, its_size, [], _attributes(whole, None, "file")))
            if shape and isinstance(shape, dict):
                image.regions.append(_Region(shape, _attributes(attributes, None, "region")))
    except csv.Error as error:
        raise ValueError(f"is not CSV that can be read ({error})") from error
    return list(images.values())


def _from_version_3(content: dict[str, Any]) -> list[_Image]:
    declared = content["attribute"]
    images: dict[str, _Image] = {}
    for view, of_view in content["view"].items():
        files_of = member(of_view, "fid_list", list)
        if len(files_of) != 1:
            raise ValueError(f"view {view} shows {len(files_of)} files; only projects with one image a view are read")
        file = member(content["file"], str(files_of[0]), dict)
        images[view] = _Image(member(file, "fname", str), -1, [], {})
    for metadata in content["metadata"].values():
        view, points = str(member(metadata, "vid", object)), member(metadata, "xy", list)
        if view not in images:
            raise ValueError(f"a region is in the view {view!r}, which does not exist")
        attributes = {}
        for key, value in member(metadata, "av", dict).items():
            attribute = declared.get(key)
            if not isinstance(attribute, dict) or value in (None, ""):
                continue
            chosen = str(value).split(",") if attribute.get("type") == 2 else [str(value)]  # 2: several of the options
            attributes[str(attribute.get("aname"))] = _joined(chosen, attribute.get("options"))
        if points:
            images[view].regions.append(_Region(_shape_of_version_3(points), attributes))
        else:
            images[view].attributes.update(attributes)
    return list(images.values())


def _shape_of_version_3(points: list[Any]) -> dict[str, Any]:
    # A number for the kind of the shape, then its coordinates.
    name = _SHAPES.get(points[0]) if isinstance(points[0], int) else None
    keys = {"rect": ("x", "y", "width", "height"), "circle": ("cx", "cy", "r"), "ellipse": ("cx", "cy", "rx", "ry")}
    if name in keys:
        return {"name": name} | dict(zip(keys[name], points[1:], strict=False))
    return {"name": name or f"number {points[0]}", "all_points_x": points[1::2], "all_points_y": points[2::2]}


def _class_attribute(regions: Iterable[_Region]) -> tuple[str | None, tuple[str, ...]]:
    """Return the attribute that names the class of a region, `None` if no region has any, and notes."""
    names = dict.fromkeys(name for region in regions for name, value in region.attributes.items() if value)
    if not names:
        return None, (f"no region has a class; all are called {_UNNAMED}",)  # only images with regions get notes
    likely = [name for name in names if name.strip().lower() in _CLASS_ATTRIBUTES] if len(names) > 1 else [*names]
    if len(likely) != 1:
        several = ", ".join(map(repr, names))
        raise ValueError(f"the regions have the attributes {several}; call the class 'class', and rename the others")
    others = [name for name in names if name != likely[0]]
    return likely[0], tuple(f"the attribute {name!r} of regions is left out" for name in others)


def _label_attributes(images: list[_Image]) -> list[str]:
    """List the attributes of files that say whether an image is normal."""
    values: dict[str, set[str]] = defaultdict(set)
    for name, value in (pair for image in images for pair in image.attributes.items()):
        values[name].add(value)
    labels = [name for name, its in values.items() if any(map(is_verdict, its))]
    for name in labels:
        others = sorted(value for value in values[name] if value and not is_verdict(value))
        if others and name.strip().lower() not in _CLASS_ATTRIBUTES:
            what = f"is the label of some images, and {others[0]!r} for others"
            raise ValueError(f"the attribute {name!r} of files {what}; call it label if that is a defect")
    return labels


def _shape(region: _Region, kind: str | None, is_same: bool) -> Shape:
    # What reaches out is cut off if the image is the one that was annotated; of another it is an error.
    if kind is not None and not region.attributes.get(kind):
        raise ValueError(f"it has no {kind!r}; choose one, or delete the region")
    name = _UNNAMED if kind is None else class_name(region.attributes[kind])
    shape, form = region.shape, region.shape.get("name")
    if form == "rect":
        x, y, width, height = (number(shape.get(key)) for key in ("x", "y", "width", "height"))
        return Shape(name, box(x, y, x + width, y + height))
    if form in ("circle", "ellipse"):
        radii = ("r", "r") if form == "circle" else ("rx", "ry")
        x, y, across, down = (number(shape.get(key)) for key in ("cx", "cy", *radii))
        turn = number(shape.get("theta") or 0)  # radians, clockwise; early versions had none
        return replace(ellipse(name, (x, y), (across, down), math.degrees(turn)), cut=is_same)
    if form not in ("polygon", "polyline", "box"):
        raise ValueError(f"a shape of the kind {form!r} has no area; draw a rectangle, circle, ellipse or polygon")
    xs, ys = ([number(side) for side in member(shape, f"all_points_{axis}", list)] for axis in "xy")
    if len(xs) != len(ys) or len(xs) < 2:
        raise ValueError(f"its points are {len(xs)} x and {len(ys)} y, not two or more of each")
    points = list(zip(xs, ys, strict=True))
    is_outline = form == "polygon" and len(points) > 2
    return outlined(name, points, cut=is_same) if is_outline else replace(line(name, points), cut=is_same)
