"""The layout of MMAD: questions about images of MVTec AD, MVTec LOCO, VisA and GoodsAD.

mmad.json
DS-MVTec/<category>/image/<good or defect>/000.png
VisA/<category>/test/<good or bad>/000.JPG          (and likewise MVTec-AD, MVTec-LOCO, GoodsAD)

{"DS-MVTec/bottle/image/broken_large/000.png":
    {"image_path": "image/broken_large/000.png", "mask_path": "mask/broken_large/000_mask.png", "conversation": [...]}}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from adfm.data.readers import files
from adfm.records import Sample


class _Image(BaseModel):
    mask_path: str | None = None


_FORM = TypeAdapter(dict[str, _Image])


def matches(raw: Path) -> bool:
    """Whether there is an `mmad.json`."""
    return _root(raw) is not None


def read(raw: Path) -> Iterator[Sample]:
    """Yields the samples that `mmad.json` names, by path. `split` is `test` throughout: MMAD is there to evaluate.

    `split.redivide: true` divides it all the same: the published run of AD-FM trained on a fifth, not published which.
    Copies of one picture stay in one split while `split.near_duplicates` is true.

    A path says it all: `dataset` is its first folder, `category` its second, and the folder of the image is `good` or
    the `defect`. (MMAD itself has 22 metal nuts in a folder of pills; here they are what their path says.) A mask's
    path begins at the category, or at any other folder of its image's path. A mask in a folder of its image's name, as
    LOCO has them, stands for all that lie there. Other images, such as templates, are left out.

    The images are those of the data sets above, so do not evaluate on MMAD what was trained on the tests of those.

    Args:
        raw: The raw data set.

    Raises:
        AdfmError: No or no such JSON, images and masks that it names and that do not exist, an anomalous image without
            a mask: all in one error, after the last sample.
    """
    problems: list[str] = []
    root = _root(raw)
    samples = _samples(raw, root, problems) if root else ()
    return files.checked(raw, "mmad", [(None, samples)], problems)


def _samples(raw: Path, root: Path, problems: list[str]) -> Iterator[Sample]:
    content = files.parse(raw, root / "mmad.json", _FORM, problems) or {}
    for path, entry in sorted(content.items()):
        image = files.listed_path([root], path)
        parts = image.relative_to(root).parts if image else ()
        if image is None or len(parts) < 4:
            problems.append(f"mmad.json: {path!r} is not a path of a data set, category, good or defect, and image")
            continue
        kind = image.parent.name
        masks: tuple[Path, ...] = ()
        if kind != "good" and entry.mask_path:
            above = [folder for folder in image.parents if folder.is_relative_to(root)]
            mask = files.listed_path([root / parts[0] / parts[1], *above], entry.mask_path)
            if mask is None:
                problems.append(f"mmad.json: {entry.mask_path!r}, the mask of {path}, is not a path in the data set")
                continue
            masks = tuple(files.images(mask.parent)) if mask.parent.name == image.stem else (mask,)
        yield files.sample(raw, parts[0], parts[1], image, None if kind == "good" else kind, masks, "test")


def _root(raw: Path) -> Path | None:
    return files.root(raw, lambda folder: (folder / "mmad.json").is_file())
