"""An image and what is marked on it, small enough for a page: for `adfm show` and the report of `adfm validate`."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from adfm import drawing
from adfm.data import images
from adfm.drawing import MARK
from adfm.records import SPLITS, Box

_MASK_OPACITY = 90  # of 255


@dataclass(frozen=True)
class Picture:
    """A thumbnail, upright, and its marks.

    Args:
        image: RGB; `None` if it cannot be shown.
        size: Width and height of the image itself, in pixels; (0, 0) if unknown.
        mask: [height, width] of the thumbnail; whether a pixel is marked. `None` without a mask.
        boxes: In pixels of the thumbnail, half-open.
        problem: What is wrong with the image or its marks; empty if nothing is.
    """

    image: Image.Image | None
    size: tuple[int, int] = (0, 0)
    mask: NDArray[np.bool_] | None = None
    boxes: tuple[Box, ...] = ()
    problem: str = ""


def thumbnail(file: Path | bytes, side: int) -> tuple[Image.Image, tuple[int, int], int]:
    """Decodes an image, no larger than it has to be.

    Args:
        file: A file or its content, in any format that Pillow reads; of an animation the first frame.
        side: Length of the longer side, in pixels; smaller images are not enlarged.

    Returns:
        The thumbnail, RGB and upright; width and height of the image itself, upright; its EXIF orientation.

    Raises:
        Exception: It cannot be decoded: Pillow raises nearly anything.
    """
    content = file if isinstance(file, bytes) else file.read_bytes()
    with Image.open(io.BytesIO(content)) as opened:
        orientation = int(opened.getexif().get(ExifTags.Base.Orientation, 1))
        width, height = opened.size
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
    return image, (height, width) if 5 <= orientation <= 8 else (width, height), orientation


def marked(
    image: Image.Image,
    size: tuple[int, int],
    mask: NDArray[Any] | None,
    boxes: Iterable[Sequence[float]],
    problem: str = "",
) -> Picture:
    """A thumbnail with the marks of its image.

    Args:
        image: The thumbnail.
        size: Width and height of the image itself.
        mask: [height, width] of the image itself; a defect is what is not 0.
        boxes: In pixels of the image itself; those that are not finite are left out.
        problem: What is wrong with the marks.
    """
    width, height = image.size
    if mask is not None:
        # Of the pixels that a pixel of the thumbnail stands for one is enough: a scratch must not fade away.
        mask = mask != 0
        for axis, side in enumerate((height, width)):
            mask = np.logical_or.reduceat(mask, np.arange(side) * mask.shape[axis] // side, axis=axis)
    across, down = width / max(1, size[0]), height / max(1, size[1])
    scaled = (Box(x1 * across, y1 * down, x2 * across, y2 * down) for x1, y1, x2, y2 in boxes)
    return Picture(image, size, mask, tuple(box for box in scaled if np.isfinite(box).all()), problem)


def of_row(row: dict[str, Any], side: int) -> Picture:
    """The picture of a row of the shards, of which `image`, `mask` and `boxes` are needed."""
    try:
        image, size, _ = thumbnail(row["image"]["bytes"], side)
    except Exception as error:
        return Picture(None, (row["width"] or 0, row["height"] or 0), problem=f"does not decode: {reason(error)}")
    mask, problem = None, ""
    if row["mask"]:
        try:
            with Image.open(io.BytesIO(row["mask"]["bytes"])) as file:
                mask = np.asarray(file.convert("L"))
            if mask.shape != (size[1], size[0]):
                mask, problem = None, f"its mask is {file.size[0]}x{file.size[1]}"
        except Exception as error:
            problem = f"its mask does not decode: {reason(error)}"
    return marked(image, size, mask, row["boxes"] or [], problem)


def reason(error: Exception) -> str:
    """Why an image cannot be read, without the path of the file."""
    if isinstance(error, UnidentifiedImageError):
        return "this is no image"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def rows(folder: Path, numbers: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of shards for `of_row` and their numbers, counted from 0 in the order of `shards.batches`, in that order.

    Of the shards, only the row groups that hold them are read, one at a time.
    """
    wanted = sorted(set(numbers))
    columns = ["image", "mask", "width", "height", "boxes"]
    first = 0
    for path in (path for split in SPLITS for path in sorted(folder.glob(f"{split}-*.parquet"))):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                inside = [number for number in wanted if first <= number < last]
                if inside:
                    found = file.read_row_group(group, columns=columns).take([number - first for number in inside])
                    yield from zip(inside, found.to_pylist(), strict=True)
                first = last


# ------------------------------------------------------------------------------------------------------------ as HTML

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
    """A picture and lines of text under it as an HTML figure of the class `kind` that needs `STYLE` and nothing else.

    The text is escaped.
    """
    texts = [*lines, *([picture.problem] if picture.image and picture.problem else [])]
    # The path of a file may break after each folder.
    spans = [f"<span>{html.escape(text).replace('/', '/<wbr>')}</span>" for text in texts]
    if picture.image and picture.problem:
        spans[-1] = spans[-1].replace("<span", '<span class="problem"', 1)
    plate = f'<div class="missing">{html.escape(picture.problem)}</div>'
    if picture.image:
        width, height = picture.image.size
        tiny = " tiny" if max(width, height) < 100 else ""
        # As large as the plate allows, whichever side meets it first.
        room = f"width: min(100cqw, 100cqh * {width / height:.6f}); aspect-ratio: {width} / {height}"
        plate = (
            f'<div class="picture{tiny}" style="{room}"><img loading="lazy" alt="" '
            f'width="{width}" height="{height}" src="{_jpeg(picture.image)}">{_marks(picture, width, height)}</div>'
        )
    return f'<figure class="{kind}"><div class="plate">{plate}</div><figcaption>{"".join(spans)}</figcaption></figure>'


def _marks(picture: Picture, width: int, height: int) -> str:
    parts = []
    if picture.mask is not None and picture.mask.any():
        parts.append(f'<image width="{width}" height="{height}" href="{_tint(picture.mask)}"/>')
    for kind in (' class="halo"', ""):
        for x1, y1, x2, y2 in picture.boxes:
            place = f'x="{x1:.2f}" y="{y1:.2f}" width="{max(0, x2 - x1):.2f}" height="{max(0, y2 - y1):.2f}"'
            parts.append(f"<rect{kind} {place}/>")
    shapes = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{shapes}</svg>' if shapes else ""


def _jpeg(image: Image.Image) -> str:
    return _uri("image/jpeg", lambda buffer: image.save(buffer, "JPEG", quality=80))


def _tint(mask: NDArray[np.bool_]) -> str:
    layer = Image.fromarray(mask.astype(np.uint8), "P")
    layer.putpalette([0, 0, 0, *bytes.fromhex(MARK[1:])])
    transparency = bytes((0, _MASK_OPACITY))
    return _uri("image/png", lambda buffer: layer.save(buffer, "PNG", bits=1, transparency=transparency))


def _uri(kind: str, save: Callable[[io.BytesIO], None]) -> str:
    buffer = io.BytesIO()
    save(buffer)
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------------------ as pixels


def drawn(picture: Picture, side: int) -> Image.Image:
    """The picture with its marks drawn on it, scaled such that its longer side is `side` pixels."""
    if picture.image is None:
        raise ValueError("there is no image to draw on")
    times = side / max(picture.image.size)
    width, height = (max(1, round(length * times)) for length in picture.image.size)
    smooth = Image.Resampling.BICUBIC if times < 4 else Image.Resampling.NEAREST
    pixels = np.asarray(picture.image.resize((width, height), smooth)).astype(np.float32)
    colour = np.array([*bytes.fromhex(MARK[1:])], np.float32)
    if picture.mask is not None:
        layer = np.asarray(Image.fromarray(picture.mask).resize((width, height), Image.Resampling.NEAREST))
        share = _MASK_OPACITY / 255
        pixels[layer] = (1 - share) * pixels[layer] + share * colour
    drawing.frame(pixels, (Box(*(edge * times for edge in box)) for box in picture.boxes), MARK)
    return Image.fromarray(pixels.round().astype(np.uint8))
