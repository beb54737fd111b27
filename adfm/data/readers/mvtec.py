"""The layout of MVTec AD, and of MPDD, DTD-Synthetic, GoodsAD and VisA's 1cls form.

<category>/train/good/000.png
<category>/test/good/000.png
<category>/test/<defect>/000.png
<category>/ground_truth/<defect>/000_mask.png    (or 000.png)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from adfm.errors import AdfmError
from adfm.records import Sample

IMAGES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"))


def recognises(raw: Path) -> bool:
    """Whether there is a category in this layout."""
    return any(_is_category(folder) for folder in _candidates(raw))


def read(raw: Path) -> Iterator[Sample]:
    """Yields the samples, category by category, by name. `split` is the official one, `train` or `test`.

    A folder that holds one folder alone is gone into until there are categories; a data set may also be one category
    itself. Files and folders whose names start with a dot are ignored, as are files that are no images.

    Args:
        raw: The raw data set; its name is the name of the data set.

    Raises:
        AdfmError: No image, an anomalous image without a mask, or images and masks without a place in the layout: all
            that was found, in one error, after the last sample.
    """
    problems: list[str] = []
    used: set[Path] = set()
    for folder in _candidates(raw):
        for sample in _category(raw, folder):
            if sample.label == "anomalous" and not sample.mask:
                wanted = f"{folder.relative_to(raw)}/ground_truth/{sample.defect}/{sample.image.stem}_mask.png"
                problems.append(f"{sample.source}: has no mask {wanted}")
            used |= {sample.image, sample.mask or sample.image}
            yield sample

    strays: dict[Path, list[str]] = defaultdict(list)
    for folder in _candidates(raw):
        for stray in sorted(set(_images(folder, "**/*")) - used):
            parts = stray.relative_to(folder).parts
            if parts[:2] != ("ground_truth", "good") and not any(part.startswith(".") for part in parts):
                strays[stray.parent.relative_to(raw)].append(stray.name)
    for parent, names in strays.items():
        problems.append(f"{parent}: no place in the layout, or no image for the mask: {', '.join(names)}")
    if not used:
        problems.append("no image in any <category>/train/good or <category>/test/<good or defect>")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise AdfmError(
            f"{raw}: problems in the data set (layout mvtec):\n{listed}\n"
            "Add what is missing, or take these files away, and convert again."
        )


def _category(raw: Path, folder: Path) -> Iterator[Sample]:
    dataset, category = raw.resolve().name, folder.resolve().name
    for part, kind in [("train", folder / "train" / "good"), *(("test", kind) for kind in _folders(folder / "test"))]:
        normal = kind.name == "good"
        masks = {} if normal else {mask.stem: mask for mask in _images(folder / "ground_truth" / kind.name)}
        for image in _images(kind):
            yield Sample(
                image=image,
                source=image.relative_to(raw).as_posix(),
                dataset=dataset,
                category=category,
                label="normal" if normal else "anomalous",
                defect=None if normal else kind.name,
                mask=masks.get(f"{image.stem}_mask") or masks.get(image.stem),
                split=part,
            )


def _candidates(raw: Path) -> list[Path]:
    """The folders that should be categories."""
    root = raw
    while not _is_category(root) and len(inside := _folders(root)) == 1 and not _is_category(inside[0]):
        root = inside[0]
    return [root] if _is_category(root) else _folders(root)


def _is_category(folder: Path) -> bool:
    return (folder / "train" / "good").is_dir() or (folder / "test").is_dir()


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_dir() and _counts(path))


def _images(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.suffix.lower() in IMAGES and _counts(path))


def _counts(path: Path) -> bool:
    return not path.name.startswith((".", "__MACOSX"))
