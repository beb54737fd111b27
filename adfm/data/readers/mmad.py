"""The layout of MMAD: questions about images of MVTec AD, MVTec LOCO, VisA and GoodsAD.

mmad.json
DS-MVTec/<category>/image/<good or defect>/000.png
VisA/<category>/test/<good or bad>/000.JPG          (and likewise MVTec-AD, MVTec-LOCO, GoodsAD)

{"DS-MVTec/bottle/image/broken_large/000.png":
    {"image_path": "image/broken_large/000.png", "mask_path": "mask/broken_large/000_mask.png", "conversation": [...]}}
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from adfm.data.readers import files
from adfm.records import Sample

FORM = "mmad.json, <data set>/<category>/.../<good or defect>/*"


class _Image(BaseModel):
    mask_path: str | None = None


def matches(raw: Path) -> bool:
    """Whether there is an `mmad.json`."""
    return _root(raw) is not None


def read(raw: Path) -> Iterator[Sample]:
    """Yield the samples that `mmad.json` names, by path. `split` is `test` throughout: MMAD is there to evaluate.

    `split.redivide: true` divides it all the same: the published run of AD-FM trained on a fifth, not published which.
    Copies of one picture stay in one split while `split.near_duplicates` is true. The images are those of the data sets
    above, so do not evaluate on MMAD what was trained on the tests of those.

    `dataset` is the first folder of a path, `category` its second, and the folder of the image is `good` or the
    `defect`. Other images, such as templates, are left out.
    """
    data = files.DataSet(raw, "mmad")
    root = _root(raw)
    return data.checked([(None, _samples(data, root) if root else ())])


def _samples(data: files.DataSet, root: Path) -> Iterator[Sample]:
    entries = data.parse(root / "mmad.json", TypeAdapter(dict[str, _Image])) or {}
    for path, entry in sorted(entries.items()):
        with data.at("mmad.json"):
            image = files.listed_path([root], path)
            parts = image.relative_to(root).parts if image else ()
            if image is None or len(parts) < 4:
                raise ValueError(f"{path!r} is not a path of a data set, category, good or defect, and image")
            defect = None if image.parent.name == "good" else image.parent.name
            masks: Iterable[Path] = ()
            if defect and entry.mask_path:
                # The path of a mask begins at the category, or at any other folder of its image's path.
                above = [folder for folder in image.parents if folder.is_relative_to(root)]
                mask = files.listed_path([root / parts[0] / parts[1], *above], entry.mask_path)
                if mask is None:
                    raise ValueError(f"{entry.mask_path!r}, the mask of {path}, is not a path in the data set")
                # One in a folder of its image's name, as LOCO has them, stands for all that lie there.
                masks = files.images(mask.parent) if mask.parent.name == image.stem else (mask,)
            # MMAD itself has 22 metal nuts in a folder of pills; here they are what their path says.
            yield data.sample(parts[1], image, defect, masks, "test", dataset=parts[0])


def _root(raw: Path) -> Path | None:
    return files.root(raw, lambda folder: (folder / "mmad.json").is_file())
