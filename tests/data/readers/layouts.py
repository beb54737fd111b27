"""A small data set in every layout, written file by file, with what is true of each of its images."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Truth(NamedTuple):
    category: str
    defect: str | None = None
    masks: tuple[str, ...] = ()
    split: str | None = None
    group: str | None = None


Truths = dict[str, Truth]


def image(root: Path, name: str, size: tuple[int, int] = (32, 24)) -> str:
    """An image of noise that differs from file to file."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(name.encode()))
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return name


def mask(root: Path, name: str, value: int = 255, size: tuple[int, int] = (32, 24)) -> str:
    """A mask with a defect of 4 x 3 pixels in `value`."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[5:8, 10:14] = value
    Image.fromarray(pixels).save(path)
    return name


def table(path: Path, rows: Iterable[Iterable[str]], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)


def mvtec(root: Path) -> Truths:
    truths = {}
    for category in ("bottle", "metal_nut"):
        for number in range(3):
            truths[image(root, f"{category}/train/good/{number:03d}.png")] = Truth(category, split="train")
        truths[image(root, f"{category}/test/good/000.png")] = Truth(category, split="test")
        for defect in ("broken_large", "contamination"):
            drawn = mask(root, f"{category}/ground_truth/{defect}/000_mask.png")
            truths[image(root, f"{category}/test/{defect}/000.png")] = Truth(category, defect, (drawn,), "test")
    return truths


def mpdd(root: Path) -> Truths:
    """Extensions in upper and lower case."""
    truths = {}
    for name, drawn in (("000.png", "000_mask.PNG"), ("001.PNG", "001_mask.png"), ("002.Png", "002_mask.png")):
        truth = mask(root, f"bracket_black/ground_truth/hole/{drawn}")
        truths[image(root, f"bracket_black/test/hole/{name}")] = Truth("bracket_black", "hole", (truth,), "test")
    truths[image(root, "bracket_black/train/good/000.PNG")] = Truth("bracket_black", split="train")
    truths[image(root, "bracket_black/test/good/000.png")] = Truth("bracket_black", split="test")
    return truths


def dtd_synthetic(root: Path) -> Truths:
    """Within two more folders of one name, and beside a file."""
    truths = {}
    inside = "DTD-Synthetic/DTD-Synthetic"
    for category in ("Blotchy_099", "Woven_001"):
        drawn = mask(root, f"{inside}/{category}/ground_truth/bad/000_mask.png")
        truths[image(root, f"{inside}/{category}/test/bad/000.png")] = Truth(category, "bad", (drawn,), "test")
        truths[image(root, f"{inside}/{category}/test/good/000.png")] = Truth(category, split="test")
        truths[image(root, f"{inside}/{category}/train/good/000.png")] = Truth(category, split="train")
    (root / "manifest.json").write_text("{}")
    return truths


def goodsad(root: Path) -> Truths:
    """Photographs, and masks of the same name."""
    truths = {}
    for category in ("cigarette_box", "food_package"):
        drawn = mask(root, f"{category}/ground_truth/opened/0001.png")
        truths[image(root, f"{category}/test/opened/0001.jpg")] = Truth(category, "opened", (drawn,), "test")
        truths[image(root, f"{category}/test/good/0001.jpg")] = Truth(category, split="test")
        truths[image(root, f"{category}/train/good/0001.jpg")] = Truth(category, split="train")
    return truths


def visa_1cls(root: Path) -> Truths:
    truths = {}
    for category in ("candle", "pcb1"):
        drawn = mask(root, f"{category}/ground_truth/bad/000.png", value=1)
        truths[image(root, f"{category}/test/bad/000.JPG")] = Truth(category, "bad", (drawn,), "test")
        truths[image(root, f"{category}/test/good/0001.JPG")] = Truth(category, split="test")
        truths[image(root, f"{category}/train/good/0000.JPG")] = Truth(category, split="train")
    return truths


def loco(root: Path) -> Truths:
    truths = {}
    for category in ("breakfast_box", "screw_bag"):
        for split in ("train", "validation", "test"):
            truths[image(root, f"{category}/{split}/good/000.png")] = Truth(category, split=split)
        for defect, number in (("logical_anomalies", 2), ("structural_anomalies", 1)):
            folder = f"{category}/ground_truth/{defect}/000"
            drawn = tuple(mask(root, f"{folder}/{part:03d}.png", value=200 + part) for part in range(number))
            truths[image(root, f"{category}/test/{defect}/000.png")] = Truth(category, defect, drawn, "test")
    return truths


def visa(root: Path) -> Truths:
    rows = [["object", "split", "label", "image", "mask"]]
    truths = {}
    for category in ("candle", "pcb1"):
        kinds = [["image", "label", "mask"]]
        for number, split in enumerate(("train", "train", "test")):
            normal = image(root, f"{category}/Data/Images/Normal/{number:04d}.JPG")
            truths[normal] = Truth(category, split=split)
            rows.append([category, split, "normal", normal, ""])
            kinds.append([normal, "normal", ""])
        for number, kind in enumerate(("melt", "bubble,scratch")):
            bad = image(root, f"{category}/Data/Images/Anomaly/{number:03d}.JPG")
            drawn = mask(root, f"{category}/Data/Masks/Anomaly/{number:03d}.png", value=1 + number)
            truths[bad] = Truth(category, kind if category == "pcb1" else "anomaly", (drawn,), "test")
            rows.append([category, "test", "anomaly", bad, drawn])
            kinds.append([bad, kind, drawn])
        if category == "pcb1":
            table(root / category / "image_anno.csv", kinds)
    table(root / "split_csv/1cls.csv", rows)
    table(root / "split_csv/2cls_fewshot.csv", rows[:1])
    return truths


def real_iad(root: Path) -> Truths:
    """`toy` and `toy_brick` begin alike; of the defective part three views of five show the defect."""
    parts = [("train", "OK", "OK/S0001"), ("test", "OK", "OK/S0002"), ("test", "AK", "NG/AK/S0001")]
    truths = {}
    for category in ("toy", "toy_brick"):
        listed: dict[str, list[dict[str, str | None]]] = {"train": [], "test": []}
        for split, kind, place in parts:
            for number in range(1, 6):
                name = f"{place}/{category}_{place[-4:]}_C{number}_20230922"
                path = image(root, f"{category}/{name}.jpg")
                shows = kind == "AK" and number < 4
                drawn = (mask(root, f"{category}/{name}.png"),) if shows else ()
                truths[path] = Truth(category, kind if shows else None, drawn, split, f"{category}/{place}")
                given = f"{name}.png" if shows else "" if number == 5 else None
                listed[split].append(
                    {"category": category, "anomaly_class": kind, "image_path": f"{name}.jpg", "mask_path": given}
                )
        meta = {"normal_class": "OK", "prefix": f"{category}/", "pre_transform": False}
        (root / f"{category}.json").write_text(json.dumps({"meta": meta, **listed}))
    return truths


def btad(root: Path) -> Truths:
    truths = {}
    for category, kind, drawn_kind in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        drawn = mask(root, f"{category}/ground_truth/ko/0000.{drawn_kind}")
        truths[image(root, f"{category}/test/ko/0000.{kind}")] = Truth(category, "ko", (drawn,), "test")
        truths[image(root, f"{category}/test/ok/0001.{kind}")] = Truth(category, split="test")
        truths[image(root, f"{category}/train/ok/0000.{kind}")] = Truth(category, split="train")
    return truths


def dagm(root: Path) -> Truths:
    truths = {}
    for category in ("Class1", "Class10"):
        for split in ("Train", "Test"):
            truths[image(root, f"{category}/{split}/0001.PNG")] = Truth(category, split=split.lower())
            drawn = mask(root, f"{category}/{split}/Label/0002_label.PNG")
            bad = image(root, f"{category}/{split}/0002.PNG")
            truths[bad] = Truth(category, "defect", (drawn,), split.lower())
            (root / category / split / "Label" / "Labels.txt").write_text("1\n")
    return truths


def kolektor(root: Path) -> Truths:
    truths = {}
    for folder in ("kos01", "kos02"):
        for number in range(3):
            drawn = mask(root, f"{folder}/Part{number}_label.bmp", value=255 if number == 1 else 0)
            defect = "defect" if number == 1 else None
            name = image(root, f"{folder}/Part{number}.jpg")
            truths[name] = Truth("kolektor", defect, (drawn,), None, folder)
    return truths


def severstal(root: Path) -> Truths:
    """Masks as run lengths, and images without labels."""
    table(
        root / "train.csv",
        [
            ["ImageId", "ClassId", "EncodedPixels"],
            ["0002cc93b.jpg", "1", "29102 12 29346 24"],
            ["0007a71bf.JPG", "3", "18661 28 18863 82"],
            ["0007a71bf.JPG", "4", "1 4 257 4"],
        ],
    )
    size = (1600, 256)
    image(root, "test_images/0000f269f.jpg", size)
    return {
        image(root, "train_images/0002cc93b.jpg", size): Truth("steel", "class 1"),
        image(root, "train_images/0007a71bf.JPG", size): Truth("steel", "class 3+class 4"),
        image(root, "train_images/00031f466.jpg", size): Truth("steel"),
    }


def mmad(root: Path) -> Truths:
    truths = {}
    listed: dict[str, dict[str, object]] = {}

    def add(name: str, drawn: str | None = None) -> None:
        """`drawn` is relative to the category, as MMAD has it."""
        part, category, rest = name.split("/", 2)
        kind = name.split("/")[-2]
        image(root, name)
        masks = (mask(root, f"{part}/{category}/{drawn}"),) if drawn else ()
        truths[name] = Truth(category, None if kind == "good" else kind, masks, "test")
        listed[name] = {
            "image_path": rest,
            "mask_path": drawn,
            "conversation": [{"Question": "Is there any defect?", "Answer": "A", "Options": {"A": "Yes.", "B": "No."}}],
            "similar_templates": ["MVTec-AD/bottle/train/good/000.png"],
            "random_templates": [],
        }

    add("DS-MVTec/bottle/image/broken_large/000.png", "mask/broken_large/000_mask.png")
    add("DS-MVTec/bottle/image/good/000.png")
    add("MVTec-AD/bottle/test/good/001.png")
    add("MVTec-LOCO/screw_bag/test/logical_anomalies/000.png", "ground_truth/logical_anomalies/000/000.png")
    add("VisA/candle/test/bad/000.JPG", "ground_truth/bad/000.png")
    add("GoodsAD/drink_can/test/opened/001.jpg", "ground_truth/opened/001.png")
    image(root, "MVTec-AD/bottle/train/good/000.png")  # a template
    (root / "mmad.json").write_text(json.dumps(listed))
    return truths


def ok_ng(root: Path) -> Truths:
    """Labels alone, with splits, of two categories."""
    truths = {}
    for category in ("bolt", "nut"):
        for split in ("train", "test"):
            truths[image(root, f"{category}/{split}/OK/000.jpg")] = Truth(category, split=split)
            truths[image(root, f"{category}/{split}/NG/000.jpg")] = Truth(category, "NG", split=split)
            truths[image(root, f"{category}/{split}/NG/dent/001.jpg")] = Truth(category, "dent", split=split)
    return truths


def mvtec_without_masks(root: Path) -> Truths:
    truths = {}
    for category in ("bottle", "metal_nut"):
        truths[image(root, f"{category}/train/good/000.png")] = Truth(category, split="train")
        truths[image(root, f"{category}/test/good/000.png")] = Truth(category, split="test")
        truths[image(root, f"{category}/test/crack/000.png")] = Truth(category, "crack", split="test")
    return truths


def anomalib(root: Path) -> Truths:
    truths = {}
    for category in ("hazelnut_toy", "walnut_toy"):
        truths[image(root, f"{category}/good/00.jpg")] = Truth(category)
        for kind in ("crack", "colour"):
            drawn = mask(root, f"{category}/mask/{kind}/00.png")
            truths[image(root, f"{category}/{kind}/00.jpg")] = Truth(category, kind, (drawn,))
    return truths


def magnetic_tile(root: Path) -> Truths:
    """Masks beside the photographs, all black for normal ones; and a figure of the whole data set."""
    truths = {}
    for kind in ("Blowhole", "Free"):
        defect = None if kind == "Free" else kind
        for number in range(2):
            drawn = mask(root, f"tiles/MT_{kind}/Imgs/exp1_num_{number}.png", value=255 if defect else 0)
            truths[image(root, f"tiles/MT_{kind}/Imgs/exp1_num_{number}.jpg")] = Truth("tiles", defect, (drawn,))
    image(root, "tiles/dataset.jpg")
    return truths


def images_and_masks(root: Path) -> Truths:
    """The mask alone says what is normal, once it is opened."""
    truths = {}
    for split in ("train", "val"):
        for number, value in enumerate((0, 255)):
            drawn = mask(root, f"{split}/masks/{number}.png", value)
            official = "validation" if split == "val" else split
            truths[image(root, f"{split}/images/{number}.jpg")] = Truth(root.name, "defect", (drawn,), official)
    return truths


def kolektor2(root: Path) -> Truths:
    """Masks beside the photographs, with an ending."""
    truths = {}
    for split in ("train", "test"):
        drawn = mask(root, f"{split}/10000_GT.png")
        truths[image(root, f"{split}/10000.png")] = Truth(root.name, "defect", (drawn,), split)
    return truths


def coco(root: Path) -> None:
    listed = {
        "images": [{"id": 1, "file_name": "000.jpg", "width": 32, "height": 24}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 5, 4, 3]}],
        "categories": [{"id": 1, "name": "scratch"}],
    }
    image(root, "train/000.jpg")
    (root / "train/_annotations.coco.json").write_text(json.dumps(listed))


def yolo(root: Path) -> None:
    for split in ("train", "test"):
        image(root, f"{split}/images/000.jpg")
        (root / split / "labels").mkdir()
        (root / split / "labels/000.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    (root / "data.yaml").write_text("train: train/images\ntest: test/images\nnames: [scratch]\n")


def imagefolder(root: Path) -> None:
    image(root, "train/000.jpg")
    row = {"file_name": "000.jpg", "objects": {"bbox": [[10, 5, 4, 3]], "categories": [0]}}
    (root / "train/metadata.jsonl").write_text(json.dumps(row))


def deeppcb(root: Path) -> None:
    for kind in ("temp", "test"):
        image(root, f"PCBData/group00041/00041/00041000_{kind}.jpg")
    (root / "PCBData/group00041/00041_not").mkdir()
    (root / "PCBData/group00041/00041_not/00041000.txt").write_text("10 5 14 8 3\n")
    (root / "PCBData/test.txt").write_text("group00041/00041/00041000.jpg group00041/00041_not/00041000.txt\n")
    (root / "tools").mkdir()


def voc(root: Path) -> None:
    image(root, "JPEGImages/000.jpg")
    box = "<xmin>11</xmin><ymin>6</ymin><xmax>14</xmax><ymax>8</ymax>"
    (root / "Annotations").mkdir()
    (root / "Annotations/000.xml").write_text(
        f"<annotation><object><name>scratch</name><bndbox>{box}</bndbox></object></annotation>"
    )


def labelme(root: Path) -> None:
    image(root, "000.jpg")
    shape = {"label": "scratch", "shape_type": "rectangle", "points": [[10, 5], [14, 8]]}
    (root / "000.json").write_text(json.dumps({"version": "5.5.0", "imagePath": "000.jpg", "shapes": [shape]}))


def label_studio(root: Path) -> None:
    image(root, "images/1a2b3c4d-000.jpg")
    value = {"x": 31.25, "y": 25, "width": 12.5, "height": 12.5, "rotation": 0, "rectanglelabels": ["scratch"]}
    region = {"original_width": 32, "original_height": 24, "type": "rectanglelabels", "from_name": "label"}
    annotation = {"id": 1, "result": [region | {"value": value}], "was_cancelled": False, "ground_truth": False}
    task = {"id": 1, "annotations": [annotation], "data": {"image": "/data/upload/1/1a2b3c4d-000.jpg"}}
    (root / "project-1-at-2024-05-02-10-00.json").write_text(json.dumps([task]))


def via(root: Path) -> None:
    image(root, "000.jpg")
    shape = {"name": "rect", "x": 10, "y": 5, "width": 4, "height": 3}
    region = {"shape_attributes": shape, "region_attributes": {"defect": "scratch"}}
    entry = {"filename": "000.jpg", "size": -1, "regions": [region], "file_attributes": {}}
    (root / "via_export_json.json").write_text(json.dumps({"000.jpg-1": entry}))


def cvat(root: Path) -> None:
    image(root, "images/000.jpg")
    box = (
        '<box label="scratch" source="manual" occluded="0" xtl="10.00" ytl="5.00" xbr="14.00" ybr="8.00" z_order="0"/>'
    )
    (root / "annotations.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version><meta><task/></meta>'
        f'<image id="0" name="000.jpg" width="32" height="24">{box}</image></annotations>'
    )


def supervisely(root: Path) -> None:
    image(root, "project/ds0/img/000.jpg")
    drawn = {
        "classTitle": "scratch",
        "geometryType": "rectangle",
        "points": {"exterior": [[10, 5], [13, 7]], "interior": []},
    }
    content = {"description": "", "tags": [], "size": {"height": 24, "width": 32}, "objects": [drawn]}
    (root / "project/ds0/ann").mkdir()
    (root / "project/ds0/ann/000.jpg.json").write_text(json.dumps(content))
    meta = {"classes": [{"title": "scratch", "shape": "any", "color": "#ff0000"}], "tags": [], "projectType": "images"}
    (root / "project/meta.json").write_text(json.dumps(meta))


def own_table(root: Path) -> None:
    image(root, "images/000.jpg")
    table(
        root / "parts.csv",
        [
            ["image", "label", "defect", "x1", "y1", "x2", "y2"],
            ["000.jpg", "anomalous", "scratch", "10", "5", "14", "8"],
        ],
    )


LAYOUTS: dict[str, tuple[str, Callable[[Path], Truths]]] = {
    "mvtec": ("mvtec", mvtec),
    "mpdd": ("mvtec", mpdd),
    "dtd-synthetic": ("mvtec", dtd_synthetic),
    "goodsad": ("mvtec", goodsad),
    "visa-1cls": ("mvtec", visa_1cls),
    "loco": ("loco", loco),
    "visa": ("visa", visa),
    "real-iad": ("real-iad", real_iad),
    "btad": ("btad", btad),
    "dagm": ("dagm", dagm),
    "kolektor": ("kolektor", kolektor),
    "severstal": ("severstal", severstal),
    "mmad": ("mmad", mmad),
    "ok-ng": ("folders", ok_ng),
    "mvtec-without-masks": ("folders", mvtec_without_masks),
    "anomalib": ("folders", anomalib),
    "magnetic-tile": ("folders", magnetic_tile),
    "images-and-masks": ("folders", images_and_masks),
    "kolektor-2": ("folders", kolektor2),
}
"""Data set -> the layout that it is detected as, and its builder."""

DRAWN: dict[str, Callable[[Path], None]] = {
    "coco": coco,
    "yolo": yolo,
    "voc": voc,
    "cvat": cvat,
    "supervisely": supervisely,
    "labelme": labelme,
    "label-studio": label_studio,
    "via": via,
    "csv": own_table,
    "imagefolder": imagefolder,
    "deeppcb": deeppcb,
}
"""The layouts of drawn annotations; of these only what tells them apart."""
