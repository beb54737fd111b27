"""The layout of BTAD (beanTech).

<category>/train/ok/0000.bmp
<category>/test/ok/0000.bmp
<category>/test/ko/0000.bmp
<category>/ground_truth/ko/0000.png    (or .bmp: masks are images of the same name)
"""

from collections.abc import Iterator
from pathlib import Path

from adfm.data.readers import files
from adfm.records import Sample

FORM = "<category>/train/ok/*.png, <category>/test/<ok or ko>/*.png, <category>/ground_truth/ko/*.png"


def matches(raw: Path) -> bool:
    """Whether there is a category in this layout, and one with masks."""
    # Without masks the labels are all there is: then it is the layout `folders`.
    return files.has_category(raw, _is_category, "ground_truth")


def read(raw: Path) -> Iterator[Sample]:
    """Yield the samples by category and name, as `mvtec.read` does. BTAD names no defects: each is `ko`, its folder."""
    return files.DataSet(raw, "btad").by_category(_is_category, _category, files.ADD_MASK)


def _category(data: files.DataSet, folder: Path) -> Iterator[Sample]:
    truth = folder / "ground_truth" / "ko"
    masks = {mask.stem: mask for mask in files.images(truth)}
    for split, kind in (("train", "ok"), ("test", "ko"), ("test", "ok")):
        for image in files.images(folder / split / kind):
            mask = masks.get(image.stem, truth / f"{image.stem}.png")
            yield data.sample(folder.resolve().name, image, None if kind == "ok" else kind, [mask], split)


def _is_category(folder: Path) -> bool:
    return any((folder / sign).is_dir() for sign in ("train/ok", "test/ok", "test/ko"))
