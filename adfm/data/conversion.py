"""Raw data set -> shards: `adfm convert RAW OUT`. The last place where raw images are read."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from adfm.data import masks, shards, sources, splits
from adfm.data.readers import READERS, detect
from adfm.errors import AdfmError
from adfm.files import atomic_folder
from adfm.params import Convert, Params
from adfm.records import Box, Record, Sample
from adfm.records import Split as SplitName


def convert(raw: Path, out: Path, params: Params) -> None:
    """Writes the shards of a raw data set and `conversion.json`, which says what was converted and how.

    Every image is decoded once, as proof that it can be. PNG and JPEG files in RGB or grey are embedded byte for byte.
    All others become RGB PNGs: other formats; palette, CMYK; transparency is dropped; 16 bit grey keeps its upper 8
    bits; images with an EXIF orientation are turned upright, and their masks with them. Masks become PNGs of 0 and 255.

    The same raw data and parameters give the same bytes. Memory does not grow with the number of images, but for their
    paths.

    Args:
        raw: A folder in a layout that has a reader.
        out: Folder of the shards.
        params: The sections `convert` and `split`, and `seed`.

    Raises:
        AdfmError: No such folder or layout, or bad data: unreadable images and masks, masks of another size than their
            image, masks that show nothing; all of them in one error. An earlier result at `out` is left as it is.
    """
    if not raw.is_dir():
        raise AdfmError(f"{raw}: no such folder; get a data set there with `adfm fetch URI {raw}`.")
    layout = _layout(raw, params.convert.layout)
    samples = sorted(READERS[layout](raw), key=lambda sample: sample.source)
    digests = sources.digests(raw, [sample.source for sample in samples])
    assigned = splits.assign(samples, digests, params)

    problems: list[str] = []
    images: Counter[tuple[str, str, str, str]] = Counter()
    boxes: Counter[str] = Counter()

    def records() -> Iterator[Record]:
        for result in _converted(samples, digests, assigned, params.convert):
            if isinstance(result, str):
                problems.append(result)
            elif not problems:
                record, fragments = result
                images[record.split, record.category, record.label, record.defect or ""] += 1
                boxes["before_dilation"] += fragments
                boxes["after_dilation"] += len(record.boxes)
                yield record

    with atomic_folder(out) as folder:
        shards.write(records(), folder, params.convert.shard_images)
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise AdfmError(f"{raw}: {len(problems)} bad files; mend or remove them and convert again:\n{listed}")
        report = {
            "dataset": samples[0].dataset,
            "layout": {"name": layout, "detected": params.convert.layout == "auto"},
            "params": {
                "seed": params.seed,
                "convert": params.convert.model_dump(),
                "split": params.split.model_dump(),
            },
            "images": images.total(),
            "boxes": dict(boxes),
            "counts": [
                {"split": split, "category": category, "label": label, "defect": defect or None, "images": number}
                for (split, category, label, defect), number in sorted(images.items())
            ],
            "fingerprint": shards.fingerprint(folder),
        }
        (folder / "conversion.json").write_text(json.dumps(report, indent=2) + "\n")


def _layout(raw: Path, name: str) -> str:
    if name == "auto":
        return detect(raw)
    if name not in READERS:
        near = difflib.get_close_matches(name, [*READERS, "auto"], n=1, cutoff=0)[0]
        raise AdfmError(
            f"convert.layout: there is no layout {name!r}; did you mean {near!r}? Known: auto, {', '.join(READERS)}."
        )
    return name


# A record and its number of boxes before dilation, or what is wrong with the sample.
_Result = tuple[Record, int] | str


def _converted(
    samples: Sequence[Sample], digests: Sequence[str], assigned: Sequence[SplitName], params: Convert
) -> Iterator[_Result]:
    """Converts in threads (Pillow and SciPy free the interpreter lock), in order, a few ahead of the writer."""
    workers = os.cpu_count() or 1
    ahead: deque[Future[_Result]] = deque()
    progress = tqdm(total=len(samples), desc="convert", unit="image", disable=None)
    with progress, ThreadPoolExecutor(workers) as pool:
        for job in zip(samples, digests, assigned, strict=True):
            ahead.append(pool.submit(_convert, *job, params))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
                progress.update()
        while ahead:
            yield ahead.popleft().result()
            progress.update()


def _convert(sample: Sample, digest: str, split: SplitName, params: Convert) -> _Result:
    try:
        content = sample.image.read_bytes()
        encoded, (width, height), orientation = _decoded(content)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        return f"{sample.source}: cannot be read ({error})"
    if hashlib.sha256(content).hexdigest() != digest:
        return f"{sample.source}: is not the file in manifest.json; fetch the data set again"

    mask: bytes | None = None
    boxes: list[Box] = []
    fragments = 0
    if sample.mask and sample.label == "anomalous":
        try:
            pixels = masks.load_mask(sample.mask, orientation)
            if orientation != 1 and pixels.shape != (height, width):
                pixels = masks.load_mask(sample.mask)  # drawn on the upright image
        except Exception as error:
            return f"{sample.source}: its mask {sample.mask} cannot be read ({error})"
        if pixels.shape != (height, width):
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            return f"{sample.source}: is {width}x{height}, but its mask {sample.mask} is {size}"
        if not pixels.any():
            return f"{sample.source}: is anomalous, but its mask {sample.mask} shows no defect"
        mask = _png(Image.fromarray(pixels))
        boxes = masks.to_boxes(pixels, params.dilation, params.connectivity, params.min_area)
        fragments = len(masks.to_boxes(pixels, 0, params.connectivity, params.min_area))
        if not boxes:
            return f"{sample.source}: every defect is smaller than convert.min_area ({params.min_area} pixels)"

    record = Record(
        id=hashlib.sha256(f"{sample.source}\n{digest}".encode()).hexdigest()[:16],
        image=encoded,
        mask=mask,
        width=width,
        height=height,
        dataset=sample.dataset,
        category=sample.category,
        defect=sample.defect,
        label=sample.label,
        boxes=tuple(boxes),
        split=split,
        source=sample.source,
        sha256=digest,
    )
    return record, fragments


def _decoded(content: bytes) -> tuple[bytes, tuple[int, int], int]:
    """Decodes an image: what to embed, its (width, height), and the EXIF orientation that was undone."""
    with Image.open(io.BytesIO(content)) as file:
        file.load()
        orientation = int(file.getexif().get(ExifTags.Base.Orientation, 1))
        if orientation == 1 and file.format in ("PNG", "JPEG") and file.mode in ("RGB", "L"):
            return content, file.size, 1
        image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating point; save it with 8 or 16 bits")
    image = image.convert("RGB")
    return _png(image), image.size, orientation


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
