"""An image and what is marked on it, small enough for a page: for `adfm show` and the report of `adfm validate`."""

import base64
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps

from adfm import drawing
from adfm.data import images
from adfm.data.images import Size
from adfm.drawing import MARK
from adfm.records import SPLITS, Box

_MASK_OPACITY = 90  # of 255


@dataclass(frozen=True)
class Picture:
    """A thumbnail, RGB and upright, with its marks."""

    image: Image.Image | None  # `None` if it cannot be decoded
    size: Size = (0, 0)  # of the image itself; (0, 0) if unknown
    mask: NDArray[np.bool_] | None = None  # [height, width] of the thumbnail: whether a pixel is marked
    boxes: tuple[Box, ...] = ()  # in pixels of the thumbnail
    problem: str = ""  # with the image or its marks


def thumbnail(content: bytes, side: int) -> tuple[Image.Image, Size]:
    """Decode an image to an upright RGB thumbnail of at most `side` pixels a side; it is never enlarged.

    Returns:
        The thumbnail; width and height of the image itself, upright.

    Raises:
        Exception: It cannot be decoded: Pillow raises nearly anything.
    """
    with Image.open(io.BytesIO(content)) as opened:
        width, height = opened.size
        turned = images.orientation(opened) >= 5
        opened.draft("RGB", (side, side))
        opened.load()
        image: Image.Image = opened
        values = images.grey(opened, content)
        if values is not None:
            image = images.scaled(values, (int(values.min()), int(values.max())))
        elif image.mode == "F":
            raise ValueError("its pixels are floating point")
        elif image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image = ImageOps.exif_transpose(image).convert("RGB")
    return image, (height, width) if turned else (width, height)


def marked(image: Image.Image, size: Size, mask: NDArray[Any] | None, boxes: Iterable[Sequence[float]]) -> Picture:
    """Mark a thumbnail with a mask (a defect is not 0) and finite boxes, both in pixels of the image of `size`."""
    width, height = image.size
    if mask is not None:
        # Of the pixels that a pixel of the thumbnail stands for one is enough: a scratch must not fade away.
        mask = mask != 0
        for axis, side in enumerate((height, width)):
            mask = np.logical_or.reduceat(mask, np.arange(side) * mask.shape[axis] // side, axis=axis)
    across, down = width / max(1, size[0]), height / max(1, size[1])
    scaled = (Box(x1 * across, y1 * down, x2 * across, y2 * down) for x1, y1, x2, y2 in boxes)
    return Picture(image, size, mask, tuple(box for box in scaled if np.isfinite(box).all()))


def of_row(row: dict[str, Any], side: int) -> Picture:
    """Return the picture of a row of the shards, from `image`, `mask`, `boxes`, `width` and `height`."""
    try:
        image, size = thumbnail(row["image"]["bytes"], side)
    except Exception as error:
        stated = (row["width"] or 0, row["height"] or 0)
        return Picture(None, stated, problem=f"does not decode: {images.reason(error)}")
    mask, problem = None, ""
    if row["mask"]:
        try:
            with Image.open(io.BytesIO(row["mask"]["bytes"])) as file:
                mask = np.asarray(file.convert("L"))
            if mask.shape != (size[1], size[0]):
                mask, problem = None, f"its mask is {file.size[0]}x{file.size[1]}"
        except Exception as error:
            problem = f"its mask does not decode: {images.reason(error)}"
    return replace(marked(image, size, mask, row["boxes"] or []), problem=problem)


def rows(folder: Path, numbers: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of shards for `of_row`, with their numbers, which count from 0 in the order of `shards.batches`."""
    numbers = sorted(set(numbers))
    columns = ["image", "mask", "width", "height", "boxes"]
    first = 0
    for path in (path for split in SPLITS for path in sorted(folder.glob(f"{split}-*.parquet"))):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                # Other row groups are not read: a few images of a large set take no time.
                if inside := [number for number in numbers if first <= number < last]:
                    table = file.read_row_group(group, columns=columns).take([number - first for number in inside])
                    yield from zip(inside, table.to_pylist(), strict=True)
                first = last


# For pages that hold figures. Nothing is fetched and no script runs, whatever the images and their names are.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = f"""
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(11em, 44%), 1fr)); gap: .9em }}
figure {{ margin: 0; min-width: 0; font-size: .8rem; line-height: 1.4 }}
.plate {{ aspect-ratio: 1; display: grid; place-items: center; border-radius: 8px; overflow: hidden;
  background: #8881; container-type: size }}
.picture {{ position: relative; max-width: 100%; max-height: 100% }}
.picture img {{ display: block; width: 100%; height: 100% }}
.picture svg {{ position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible }}
.tiny img, .picture image {{ image-rendering: pixelated }}
.picture rect {{ fill: none; stroke: {MARK}; stroke-width: 2; vector-effect: non-scaling-stroke }}
.picture .halo {{ stroke: #fffa; stroke-width: 4 }}
.missing {{ padding: 1em; text-align: center; overflow-wrap: anywhere; opacity: .8 }}
figcaption {{ padding: .35em .1em 0 }}
figcaption span {{ display: block; overflow-wrap: anywhere }}
.problem {{ color: light-dark(#b3261e, #ff8078) }}
"""


def figure(picture: Picture, *lines: str, kind: str = "") -> str:
    """Return a picture with lines of text under it, which are escaped, as an HTML figure of the class `kind`."""
    # The path of a file may break after each folder.
    spans = [f"<span>{html.escape(text).replace('/', '/<wbr>')}</span>" for text in lines]
    plate = f'<div class="missing">{html.escape(picture.problem)}</div>'
    if picture.image:
        width, height = picture.image.size
        tiny = " tiny" if max(width, height) < 100 else ""
        # As large as the plate allows, whichever side meets it first.
        room = f"width: min(100cqw, 100cqh * {width / height:.6f}); aspect-ratio: {width} / {height}"
        plate = (
            f'<div class="picture{tiny}" style="{room}"><img loading="lazy" alt="" '
            f'width="{width}" height="{height}" src="{_uri(picture.image, "jpeg", quality=80)}">'
            f"{_marks(picture, width, height)}</div>"
        )
        if picture.problem:
            problem = html.escape(picture.problem).replace("/", "/<wbr>")
            spans.append(f'<span class="problem">{problem}</span>')
    return f'<figure class="{kind}"><div class="plate">{plate}</div><figcaption>{"".join(spans)}</figcaption></figure>'


def _marks(picture: Picture, width: int, height: int) -> str:
    parts = []
    if picture.mask is not None and picture.mask.any():
        layer = Image.fromarray(picture.mask.astype(np.uint8), "P")
        layer.putpalette([0, 0, 0, *bytes.fromhex(MARK[1:])])
        tint = _uri(layer, "png", bits=1, transparency=bytes((0, _MASK_OPACITY)))
        parts.append(f'<image width="{width}" height="{height}" href="{tint}"/>')
    for kind in (' class="halo"', ""):
        for x1, y1, x2, y2 in picture.boxes:
            place = f'x="{x1:.2f}" y="{y1:.2f}" width="{max(0, x2 - x1):.2f}" height="{max(0, y2 - y1):.2f}"'
            parts.append(f"<rect{kind} {place}/>")
    shapes = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{shapes}</svg>' if shapes else ""


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def drawn(picture: Picture, side: int) -> Image.Image:
    """Draw the marks on a picture, scaled such that its longer side is `side` pixels."""
    if picture.image is None:
        raise ValueError("there is no image to draw on")
    times = side / max(picture.image.size)
    width, height = (max(1, round(length * times)) for length in picture.image.size)
    # Enlarged that much, single pixels are what there is to see.
    smooth = Image.Resampling.BICUBIC if times < 4 else Image.Resampling.NEAREST
    pixels = np.asarray(picture.image.resize((width, height), smooth)).astype(np.float32)
    colour = np.array([*bytes.fromhex(MARK[1:])], np.float32)
    if picture.mask is not None:
        layer = np.asarray(Image.fromarray(picture.mask).resize((width, height), Image.Resampling.NEAREST))
        share = _MASK_OPACITY / 255
        pixels[layer] = (1 - share) * pixels[layer] + share * colour
    drawing.frame(pixels, (Box(*(edge * times for edge in box)) for box in picture.boxes), MARK)
    return Image.fromarray(pixels.round().astype(np.uint8))
