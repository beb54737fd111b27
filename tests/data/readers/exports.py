"""Exports of annotation tools, written as the tools write them: one scene, drawn once, in every format.

`tests/data/readers/test_exports.py` reads each back; `scripts/draw-exports.py` draws the pictures of docs/tools.md.
"""

from __future__ import annotations

import csv
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from adfm.data import synthetic

WIDTH, HEIGHT = 200, 160
CLASSES = ("scratch", "spot")


class Drawn(NamedTuple):
    """A shape that a person drew; a rectangle's points are two opposite corners."""

    label: str
    kind: Literal["rectangle", "polygon"]
    points: tuple[tuple[float, float], ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2, half-open."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Of the outline."""
        x1, y1, x2, y2 = self.box
        return list(self.points) if self.kind == "polygon" else [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


class Part(NamedTuple):
    """A photograph and what is drawn on it: nothing on a good part."""

    name: str
    image: Image.Image
    mask: Image.Image
    shapes: tuple[Drawn, ...]


def parts(count: int, seed: int = 0) -> list[Part]:
    """Photographs of parts: every other one is good, the others have scratches and spots by turns."""
    rng = np.random.default_rng(seed)
    categories = list(synthetic.TARGET_CATEGORIES.values())
    made = []
    for number in range(count):
        kind = (None, "scratch", None, "spot")[number % 4]
        pixels, mask = synthetic.draw(rng, categories[0], kind, HEIGHT)
        room = ((0, 0), ((WIDTH - HEIGHT) // 2,) * 2)
        image = Image.fromarray(np.pad(pixels, (*room, (0, 0)), mode="edge"))
        marked = np.pad(mask, room)
        made.append(Part(f"part_{number:03}", image, Image.fromarray(marked), _shapes(kind, marked)))
    return made


def _shapes(kind: str | None, mask: np.ndarray) -> tuple[Drawn, ...]:
    if kind is None:
        return ()
    labels, _ = ndimage.label(ndimage.binary_dilation(mask > 0, iterations=2))
    shapes = []
    for y, x in ndimage.find_objects(labels):
        left, top, right, bottom = x.start, y.start, x.stop, y.stop
        if kind == "spot":
            shapes.append(Drawn(kind, "rectangle", ((left, top), (right, bottom))))
        else:
            middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
            corners = ((middle_x, top), (right, middle_y), (middle_x, bottom), (left, middle_y))
            shapes.append(Drawn(kind, "polygon", corners))
    return tuple(shapes)


def _save(part: Part, folder: Path, suffix: str = ".png") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    part.image.save(folder / f"{part.name}{suffix}")
    return f"{part.name}{suffix}"


def _image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def labelme(out: Path, scene: Sequence[Part]) -> None:
    for part in scene:
        name = _save(part, out)
        shapes = [
            {
                "label": shape.label,
                "points": [list(point) for point in shape.points],
                "group_id": None,
                "description": "",
                "shape_type": shape.kind,
                "flags": {},
                "mask": None,
            }
            for shape in part.shapes
        ]
        if shapes:
            content = {"version": "5.8.1", "flags": {}, "shapes": shapes, "imagePath": name, "imageData": None}
            _dump(out / f"{part.name}.json", content | {"imageHeight": HEIGHT, "imageWidth": WIDTH})


def _coco(scene: Sequence[Part], names: Sequence[str], first: int = 1, **more: Any) -> dict[str, Any]:
    annotations = []
    for number, part in enumerate(scene, start=1):
        for shape in part.shapes:
            x1, y1, x2, y2 = shape.box
            outline = [side for corner in shape.corners for side in corner] if shape.kind == "polygon" else None
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": CLASSES.index(shape.label) + first,
                    "segmentation": [outline] if outline else [],
                    "area": (x2 - x1) * (y2 - y1) / (2 if outline else 1),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": 0,
                    **more,
                }
            )
    return {
        "info": {"description": ""},
        "licenses": [{"id": 0, "name": "", "url": ""}],
        "categories": [{"id": first + n, "name": name, "supercategory": ""} for n, name in enumerate(CLASSES)],
        "images": [
            {"id": number, "width": WIDTH, "height": HEIGHT, "file_name": name, "license": 0, "date_captured": 0}
            for number, name in enumerate(names, start=1)
        ],
        "annotations": annotations,
    }


def cvat_coco(out: Path, scene: Sequence[Part]) -> None:
    names = [_save(part, out / "images" / "default") for part in scene]
    attributes = {"attributes": {"occluded": False, "rotation": 0.0}}
    _dump(out / "annotations" / "instances_default.json", _coco(scene, names, **attributes))


def fiftyone_coco(out: Path, scene: Sequence[Part]) -> None:
    names = [_save(part, out / "data", ".jpg") for part in scene]
    _dump(out / "labels.json", _coco(scene, names, first=0))


def roboflow_coco(out: Path, scene: Sequence[Part]) -> None:
    for split, some in _folders(scene):
        names = [_save(part._replace(name=_roboflow(part)), out / split, ".jpg") for part in some]
        _dump(out / split / "_annotations.coco.json", _coco(some, names, first=1))


def _folders(scene: Sequence[Part]) -> list[tuple[str, list[Part]]]:
    """Roboflow's folders; each has good and bad parts."""
    turn = [scene[start : start + 2] for start in range(0, len(scene), 2)]
    splits = ("train", "valid", "test")
    return [(name, [part for pair in turn[at::3] for part in pair]) for at, name in enumerate(splits)]


def _roboflow(part: Part) -> str:
    return f"{part.name}_png.rf.{zlib.crc32(part.name.encode()):032x}"


def cvat_images(out: Path, scene: Sequence[Part]) -> None:
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<annotations>", "  <version>1.1</version>", "  <meta>"]
    lines += ["    <job>", f"      <id>1</id><size>{len(scene)}</size>", "    </job>", "  </meta>"]
    for number, part in enumerate(scene):
        name = _save(part, out / "images")
        lines.append(f'  <image id="{number}" name="{name}" width="{WIDTH}" height="{HEIGHT}">')
        for shape in part.shapes:
            start = f'label="{shape.label}" source="manual" occluded="0"'
            if shape.kind == "rectangle":
                sides = zip(("xtl", "ytl", "xbr", "ybr"), shape.box, strict=True)
                place = " ".join(f'{side}="{value:.2f}"' for side, value in sides)
                lines += [f'    <box {start} {place} z_order="0">', "    </box>"]
            else:
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in shape.points)
                lines += [f'    <polygon {start} points="{points}" z_order="0">', "    </polygon>"]
        lines.append("  </image>")
    _text(out / "annotations.xml", *lines, "</annotations>")


def cvat_masks(out: Path, scene: Sequence[Part]) -> None:
    """Segmentation mask 1.1."""
    colors = {"scratch": (250, 50, 83), "spot": (51, 221, 255)}
    _text(
        out / "labelmap.txt",
        "# label:color_rgb:parts:actions",
        "background:0,0,0::",
        *(f"{name}:{','.join(map(str, color))}::" for name, color in colors.items()),
    )
    for part in scene:
        _save(part, out / "JPEGImages")
        objects, _ = ndimage.label(np.asarray(part.mask), np.ones((3, 3)))
        palette = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)], np.uint8)
        color = np.array(colors[part.shapes[0].label] if part.shapes else (0, 0, 0), np.uint8)
        _image(out / "SegmentationClass" / f"{part.name}.png", (objects > 0)[..., None] * color)
        _image(out / "SegmentationObject" / f"{part.name}.png", palette[objects])
    _text(out / "ImageSets" / "Segmentation" / "default.txt", *(part.name for part in scene))


def _voc(part: Part, name: str, folder: str = "") -> list[str]:
    lines = ["<annotation>", f"  <folder>{folder}</folder>", f"  <filename>{name}</filename>"]
    lines += [f"  <size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"]
    lines += ["  <segmented>0</segmented>"]
    for shape in part.shapes:
        x1, y1, x2, y2 = shape.box
        sides = (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2))  # from 1, the last pixel included
        box = "".join(f"<{side}>{value:g}</{side}>" for side, value in sides)
        lines += ["  <object>", f"    <name>{shape.label}</name><pose>Unspecified</pose><truncated>0</truncated>"]
        lines += [f"    <difficult>0</difficult><bndbox>{box}</bndbox>", "  </object>"]
    return [*lines, "</annotation>"]


def labelimg(out: Path, scene: Sequence[Part]) -> None:
    for part in scene:
        name = _save(part, out)
        if part.shapes:
            _text(out / f"{part.name}.xml", *_voc(part, name))


def rolabelimg(out: Path, scene: Sequence[Part]) -> None:
    """Every rectangle is turned, such that the box round it is the one of the shape."""
    for part in scene:
        name = _save(part, out)
        lines = _voc(part._replace(shapes=()), name)[:-1]
        for shape in part.shapes:
            x1, y1, x2, y2 = shape.box
            width, height = x2 - x1, y2 - y1
            angle = math.atan(min(width, height) / max(width, height) / 2)
            c, s = math.cos(angle), math.sin(angle)
            own = {"w": (width * c - height * s) / (c * c - s * s), "h": (height * c - width * s) / (c * c - s * s)}
            numbers = {"cx": (x1 + x2) / 2, "cy": (y1 + y2) / 2, **own, "angle": angle}
            box = "".join(f"<{key}>{value:.4f}</{key}>" for key, value in numbers.items())
            lines += ["  <object>", "    <type>robndbox</type>", f"    <name>{shape.label}</name>"]
            lines += [f"    <difficult>0</difficult><robndbox>{box}</robndbox>", "  </object>"]
        if part.shapes:
            _text(out / f"{part.name}.xml", *lines, "</annotation>")


def neu_det(out: Path, scene: Sequence[Part]) -> None:
    """As on Kaggle: photographs in a folder for each class, XML files in one folder; every part has a defect."""
    for part in _defective(scene).values():
        kind = part.shapes[0].label
        name = _save(part, out / "train" / "images" / kind, ".jpg")
        _text(out / "train" / "annotations" / f"{part.name}.xml", *_voc(part, name, kind))


def cvat_voc(out: Path, scene: Sequence[Part]) -> None:
    for part in scene:
        name = _save(part, out / "JPEGImages")
        _text(out / "Annotations" / f"{part.name}.xml", *_voc(part, name))
    _text(out / "ImageSets" / "Main" / "default.txt", *(part.name for part in scene))


def fiftyone_voc(out: Path, scene: Sequence[Part]) -> None:
    for part in scene:
        name = _save(part, out / "data")
        _text(out / "labels" / f"{part.name}.xml", *_voc(part, name))


def _yolo(part: Part) -> list[str]:
    lines = []
    for shape in part.shapes:
        x1, y1, x2, y2 = shape.box
        centre = ((x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT)
        lines.append(" ".join([str(CLASSES.index(shape.label)), *(f"{value:.10f}" for value in centre)]))
    return lines


def ultralytics(out: Path, scene: Sequence[Part]) -> None:
    for part in scene:
        _save(part, out / "images" / "train", ".jpg")
        if part.shapes:
            _text(out / "labels" / "train" / f"{part.name}.txt", *_yolo(part))
    _text(
        out / "data.yaml", "path: .", "train: images/train", "names:", *(f"  {n}: {c}" for n, c in enumerate(CLASSES))
    )


def ultralytics_segment(out: Path, scene: Sequence[Part]) -> None:
    """Outlines as corners; a turned box (OBB) is an outline of four corners, the same line."""
    ultralytics(out, scene)
    for part in scene:
        if part.shapes:
            _text(out / "labels" / "train" / f"{part.name}.txt", *map(_outline, part.shapes))


def _outline(shape: Drawn) -> str:
    sides = [f"{value:.10f}" for x, y in shape.corners for value in (x / WIDTH, y / HEIGHT)]
    return " ".join([str(CLASSES.index(shape.label)), *sides])


def cvat_yolo(out: Path, scene: Sequence[Part]) -> None:
    """YOLO 1.1."""
    names = [_save(part, out / "obj_train_data") for part in scene]
    for part in scene:
        _text(out / "obj_train_data" / f"{part.name}.txt", *_yolo(part))
    _text(out / "obj.names", *CLASSES)
    _text(out / "obj.data", "classes = 2", "train = data/train.txt", "names = data/obj.names", "backup = backup/")
    _text(out / "train.txt", *(f"data/obj_train_data/{name}" for name in names))


def roboflow_darknet(out: Path, scene: Sequence[Part]) -> None:
    for split, some in _folders(scene):
        _text(out / split / "_darknet.labels", *CLASSES)
        for part in some:
            name = _roboflow(part)
            _save(part._replace(name=name), out / split, ".jpg")
            _text(out / split / f"{name}.txt", *_yolo(part))


def roboflow_csv(out: Path, scene: Sequence[Part]) -> None:
    """Tensorflow Object Detection, of parts with a defect: it has no row for others."""
    for split, some in _folders(scene):
        rows: list[list[Any]] = [["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"]]
        for part in _defective(some).values():
            name = _save(part._replace(name=_roboflow(part)), out / split, ".jpg")
            rows += [[name, WIDTH, HEIGHT, shape.label, *shape.box] for shape in part.shapes]
        with (out / split / "_annotations.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def label_studio(out: Path, scene: Sequence[Part]) -> None:
    tasks = []
    for number, part in enumerate(scene, start=1):
        name = _save(part, out / "images")
        results = []
        for at, shape in enumerate(part.shapes):
            x1, y1, x2, y2 = shape.box
            value: dict[str, Any]
            if shape.kind == "rectangle":
                kind = "rectanglelabels"
                value = {"x": x1 / WIDTH * 100, "y": y1 / HEIGHT * 100, "rotation": 0}
                value |= {"width": (x2 - x1) / WIDTH * 100, "height": (y2 - y1) / HEIGHT * 100}
            else:
                kind = "polygonlabels"
                value = {"points": [[x / WIDTH * 100, y / HEIGHT * 100] for x, y in shape.points], "closed": True}
            results.append(
                {
                    "original_width": WIDTH,
                    "original_height": HEIGHT,
                    "image_rotation": 0,
                    "value": value | {kind: [shape.label]},
                    "id": f"r{number}-{at}",
                    "from_name": "label",
                    "to_name": "image",
                    "type": kind,
                    "origin": "manual",
                }
            )
        annotation = {"id": number, "completed_by": 1, "result": results, "was_cancelled": False, "ground_truth": False}
        data = {"image": f"/data/local-files/?d=images/{name}"}
        tasks.append({"id": number, "annotations": [annotation], "predictions": [], "data": data, "meta": {}})
    _dump(out / "project-1.json", tasks)


def via(out: Path, scene: Sequence[Part]) -> None:
    metadata = {}
    for part in scene:
        name = _save(part, out)
        regions = []
        for shape in part.shapes:
            x1, y1, x2, y2 = shape.box
            attributes: dict[str, Any] = {"name": "rect", "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
            if shape.kind == "polygon":
                xs, ys = ([point[axis] for point in shape.points] for axis in (0, 1))
                attributes = {"name": "polygon", "all_points_x": xs, "all_points_y": ys}
            regions.append({"shape_attributes": attributes, "region_attributes": {"defect": shape.label}})
        size = (out / name).stat().st_size
        metadata[f"{name}{size}"] = {"filename": name, "size": size, "regions": regions, "file_attributes": {}}
    options = dict.fromkeys(CLASSES, "")
    attributes = {"region": {"defect": {"type": "dropdown", "description": "", "options": options}}, "file": {}}
    _dump(
        out / "via_project.json",
        {
            "_via_settings": {"ui": {}, "core": {}, "project": {"name": "line"}},
            "_via_img_metadata": metadata,
            "_via_attributes": attributes,
            "_via_data_format_version": "2.0.10",
            "_via_image_id_list": list(metadata),
        },
    )


def _last_pixels(shape: Drawn) -> list[list[float]]:
    """The points with the last pixel of the shape, not the one past it, on the right and below."""
    _, _, right, bottom = shape.box
    return [[x - (x == right), y - (y == bottom)] for x, y in shape.points]


def supervisely(out: Path, scene: Sequence[Part]) -> None:
    classes = [{"title": name, "shape": "any", "color": "#FF0000", "id": n} for n, name in enumerate(CLASSES, start=1)]
    _dump(out / "meta.json", {"classes": classes, "tags": [], "projectType": "images"})
    for part in scene:
        name = _save(part, out / "line" / "img")
        objects = [
            {
                "classTitle": shape.label,
                "geometryType": shape.kind,
                "points": {"exterior": _last_pixels(shape), "interior": []},
                "tags": [],
                "description": "",
            }
            for shape in part.shapes
        ]
        content = {"description": "", "tags": [], "size": {"height": HEIGHT, "width": WIDTH}, "objects": objects}
        _dump(out / "line" / "ann" / f"{name}.json", content)


def hugging_face(out: Path, scene: Sequence[Part]) -> None:
    lines = []
    for part in scene:
        name = _save(part, out / "train")
        boxes = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in (shape.box for shape in part.shapes)]
        objects = {"bbox": boxes, "categories": [shape.label for shape in part.shapes]}
        lines.append(json.dumps({"file_name": name, "objects": objects}))
    _text(out / "train" / "metadata.jsonl", *lines)


def table(out: Path, scene: Sequence[Part]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "parts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "defect", "x1", "y1", "x2", "y2"])
        for part in scene:
            name = _save(part, out)
            for shape in part.shapes:
                writer.writerow([name, "anomalous", shape.label, *shape.box])
            if not part.shapes:
                writer.writerow([name, "normal", "", "", "", "", ""])


def labels(out: Path, scene: Sequence[Part]) -> None:
    """A table of labels alone."""
    names = [_save(part, out / "images") for part in scene]
    kinds = [part.shapes[0].label if part.shapes else "normal" for part in scene]
    _text(out / "labels.csv", "image,label,defect", *map(_labelled, names, kinds))


def _labelled(name: str, kind: str) -> str:
    return f"{name},normal," if kind == "normal" else f"{name},anomalous,{kind}"


def elpv(out: Path, scene: Sequence[Part]) -> None:
    names = [_save(part, out / "images") for part in scene]
    _text(out / "labels.csv", *(f"images/{n}  {float(bool(p.shapes))} mono" for n, p in zip(names, scene, strict=True)))


def deeppcb(out: Path, scene: Sequence[Part]) -> None:
    """A good part is the template of the bad one after it."""
    folder = out / "PCBData" / "group00041"
    for name, part in _pairs(scene).items():
        _save(part._replace(name=name), folder / "00041", ".jpg")
        if name.endswith("_test"):
            boxes = [" ".join(map(str, map(round, shape.box))) for shape in part.shapes]
            _text(folder / "00041_not" / f"{name.removesuffix('_test')}.txt", *(f"{box} 5" for box in boxes))


def mvtec(out: Path, scene: Sequence[Part]) -> None:
    for number, part in enumerate(scene):
        kind = part.shapes[0].label if part.shapes else "good"
        split = "train" if kind == "good" and number % 8 == 0 else "test"
        _save(part, out / "gear" / split / kind)
        if part.shapes:
            folder = out / "gear" / "ground_truth" / kind
            folder.mkdir(parents=True, exist_ok=True)
            part.mask.save(folder / f"{part.name}_mask.png")


def mvtec_labels(out: Path, scene: Sequence[Part]) -> None:
    """Without `ground_truth`."""
    for part in scene:
        _save(part, out / "gear" / "test" / part.shapes[0].label if part.shapes else out / "gear" / "train" / "good")


def magnetic_tiles(out: Path, scene: Sequence[Part]) -> None:
    """Masks beside the photographs, of the same name; good parts have black ones."""
    for part in scene:
        folder = out / f"MT_{part.shapes[0].label.capitalize() if part.shapes else 'Free'}" / "Imgs"
        _save(part, folder, ".jpg")
        part.mask.save(folder / f"{part.name}.png")


def images_masks(out: Path, scene: Sequence[Part]) -> None:
    for part in scene:
        _save(part, out / "images", ".jpg")
        (out / "masks").mkdir(exist_ok=True)
        part.mask.save(out / "masks" / f"{part.name}.png")


def anomalib(out: Path, scene: Sequence[Part]) -> None:
    for part in scene:
        kind = part.shapes[0].label if part.shapes else "good"
        _save(part, out / kind)
        if part.shapes:
            (out / "mask" / kind).mkdir(parents=True, exist_ok=True)
            part.mask.save(out / "mask" / kind / f"{part.name}.png")


def ok_ng(out: Path, scene: Sequence[Part]) -> None:
    for part in scene:
        _save(part, out / ("NG" if part.shapes else "OK"), ".jpg")


def _by_name(scene: Sequence[Part]) -> dict[str, Part]:
    return {part.name: part for part in scene}


def _by_hash(scene: Sequence[Part]) -> dict[str, Part]:
    return {_roboflow(part): part for part in scene}


def _defective(scene: Sequence[Part]) -> dict[str, Part]:
    return {part.name: part for part in scene if part.shapes}


def _defective_by_hash(scene: Sequence[Part]) -> dict[str, Part]:
    return _by_hash([part for part in scene if part.shapes])


def _pairs(scene: Sequence[Part]) -> dict[str, Part]:
    turns = ("temp", "test")
    return {f"0004100{number // 2}_{turns[number % 2]}": part for number, part in enumerate(scene)}


class Export(NamedTuple):
    """An export of the scene.

    Args:
        write: Writes it.
        layout: That it is in.
        says: What of the scene it can say.
        names: Whether it says what the defects are called.
        parts: The parts in it by the names of their photographs, without the suffix.
    """

    write: Callable[[Path, Sequence[Part]], None]
    layout: str
    says: Literal["boxes", "mask", "label"] = "boxes"
    names: bool = True
    parts: Callable[[Sequence[Part]], Mapping[str, Part]] = _by_name


EXPORTS = {
    "labelme": Export(labelme, "labelme"),
    "cvat-images": Export(cvat_images, "cvat"),
    "cvat-coco": Export(cvat_coco, "coco"),
    "cvat-voc": Export(cvat_voc, "voc"),
    "cvat-yolo": Export(cvat_yolo, "yolo"),
    "cvat-masks": Export(cvat_masks, "voc", "mask"),
    "label-studio": Export(label_studio, "label-studio"),
    "labelimg": Export(labelimg, "voc"),
    "rolabelimg": Export(rolabelimg, "voc"),
    "via": Export(via, "via"),
    "roboflow-coco": Export(roboflow_coco, "coco", parts=_by_hash),
    "roboflow-darknet": Export(roboflow_darknet, "yolo", parts=_by_hash),
    "roboflow-csv": Export(roboflow_csv, "csv", parts=_defective_by_hash),
    "supervisely": Export(supervisely, "supervisely"),
    "fiftyone-coco": Export(fiftyone_coco, "coco"),
    "fiftyone-voc": Export(fiftyone_voc, "voc"),
    "ultralytics": Export(ultralytics, "yolo"),
    "ultralytics-segment": Export(ultralytics_segment, "yolo"),
    "hugging-face": Export(hugging_face, "imagefolder"),
    "csv": Export(table, "csv"),
    "labels": Export(labels, "csv", "label"),
    "mvtec": Export(mvtec, "mvtec", "mask"),
    "mvtec-labels": Export(mvtec_labels, "folders", "label"),
    "anomalib": Export(anomalib, "folders", "mask"),
    "magnetic-tiles": Export(magnetic_tiles, "folders", "mask"),
    "images-masks": Export(images_masks, "folders", "mask", names=False),
    "ok-ng": Export(ok_ng, "folders", "label", names=False),
    "deeppcb": Export(deeppcb, "deeppcb", names=False, parts=_pairs),
    "neu-det": Export(neu_det, "voc", parts=_defective),
    "elpv": Export(elpv, "csv", "label", names=False),
}
