"""The layout of Real-IAD.

<category>/OK/S0001/<category>_0001_OK_C1_20230922.jpg
<category>/NG/<defect>/S0002/<category>_0002_NG_C1_20230922.jpg, .png
<category>.json    (beside the category, or one or two folders deeper)

{"meta": {"normal_class": "OK", "prefix": "<category>/"},
 "train": [{"category": "...", "anomaly_class": "OK", "image_path": "OK/S0001/....jpg", "mask_path": null}],
 "test": [...]}
"""

import glob
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from adfm.data.readers import files
from adfm.records import Sample

FORM = "<category>/OK/<part>/*.jpg, <category>/NG/<defect>/<part>/*.jpg, <category>.json"


class _Meta(BaseModel):
    normal_class: str


class _Image(BaseModel):
    anomaly_class: str
    image_path: str
    mask_path: str | None = None


class _Category(BaseModel):
    meta: _Meta
    train: list[_Image]
    test: list[_Image]


def matches(raw: Path) -> bool:
    """Whether there is a category in this layout, with its JSON file."""
    top = files.root(raw, lambda folder: bool(_places(folder)))
    return top is not None and any(_jsons(top, folder) for place in _places(top) for folder in _folders(place))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the samples by category, in the order of its JSON file. `split` is the list that has the image.

    Images that the JSON file does not name are left out (that of a single view names a fifth of them). A view of a
    defective part without a mask, or with an empty one, is normal. Of several JSON files for a category the one in the
    fewest folders counts, and then the one in `realiad_jsons`.
    """
    data = files.DataSet(raw, "real-iad")
    top = files.root(raw, lambda folder: bool(_places(folder))) or raw
    places = _places(top)
    if len(places) > 1:
        data.add("the images are there more than once, keep one", ", ".join(map(data.relative, places)))
    return data.checked((None, _category(data, top, folder)) for place in places[:1] for folder in _folders(place))


def _category(data: files.DataSet, top: Path, folder: Path) -> Iterator[Sample]:
    jsons = _jsons(top, folder)
    if len({file.read_bytes() for file in jsons}) > 1:
        jsons = [file for file in jsons if file.parent.name == "realiad_jsons"] or jsons
    if len({file.read_bytes() for file in jsons}) != 1:
        several = f"has several JSON files that differ, keep one: {', '.join(map(data.relative, jsons))}"
        data.add(folder, several if jsons else f"has no {folder.name}.json")
        return
    content = data.parse(jsons[0], TypeAdapter(_Category))
    if content is None:
        return
    # Paths begin at the category, or name it: `meta.prefix` is shared by two categories, so that it says nothing.
    bases = (folder, folder.parent)
    for split, entries in (("train", content.train), ("test", content.test)):
        for entry in entries:
            image = files.listed_path(bases, entry.image_path)
            mask = files.listed_path(bases, entry.mask_path) if entry.mask_path else None
            if image is None or (entry.mask_path and mask is None):
                path = entry.image_path if image is None else entry.mask_path
                data.add(jsons[0], f"{path!r} is not a path in the data set")
                continue
            # A view without a mask does not show the defect of its part.
            defect = entry.anomaly_class if mask and entry.anomaly_class != content.meta.normal_class else None
            masks, part = [mask] if mask else [], data.relative(image.parent)  # the folder of a part's five views
            yield data.sample(folder.name, image, defect, masks, split, unmarked_is_normal=True, group=part)


def _places(folder: Path) -> list[Path]:
    # The categories may lie in a folder of their own, `realiad_1024`, beside that of the JSON files.
    return [place for place in (folder, *files.folders(folder)) if _folders(place)]


def _folders(place: Path) -> list[Path]:
    return [folder for folder in files.folders(place) if (folder / "OK").is_dir() or (folder / "NG").is_dir()]


def _jsons(top: Path, folder: Path) -> list[Path]:
    """List the JSON files of a category that lie in the fewest folders."""
    name = glob.escape(f"{folder.name}.json")
    patterns = (name, f"*/{name}", f"*/*/{name}")
    return next((jsons for pattern in patterns if (jsons := sorted(top.glob(pattern)))), [])
