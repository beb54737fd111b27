"""Decode image files of any format to upright images of 8 bits."""

import io
import re
import zlib
from typing import Any

import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import AvifImagePlugin, ExifTags, Image, ImageOps, UnidentifiedImageError

# The values of grey files of more than 8 bits that become 0 and 255; those between are scaled linearly.
GreyRange = tuple[int, int]
Size = tuple[int, int]  # width and height in pixels

# No threads of their own: conversion has a thread for each core already.
pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # else one for each core of the machine, whatever the pod's limit

_POINTER = b"version https://git-lfs.github.com/spec/"
_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PGM = re.compile(rb"P5%b(\d+)%b(\d+)%b(\d+)\s" % (_SPACE, _SPACE, _SPACE))
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # tags of TIFF
_DARK = 64  # of 255: files of 16 bits in which a camera of 14 bits or fewer left the upper ones empty stay below


def open_image(content: bytes) -> Image.Image:
    """Open an image file of one picture.

    Raises:
        ValueError: It is empty, a pointer of Git LFS, or has several frames or pages.
        Exception: It is not an image, or damaged: Pillow raises nearly anything.
    """
    if not content:
        raise ValueError("it is empty")
    if content.startswith(_POINTER):
        raise ValueError("it is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned")
    file = Image.open(io.BytesIO(content))
    frames = getattr(file, "n_frames", 1)
    # MPO has a preview of the photograph beside it; HEIF says which of its images is the primary one.
    if frames > 1 and file.format not in ("MPO", "HEIF"):
        file.close()
        raise ValueError(f"it has {frames} frames or pages; save the one that counts as a file of its own")
    return file


def orientation(file: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; load a PNG first."""
    value = file.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def is_deep_colour(file: Image.Image) -> bool:
    """Return whether a file that is open, but not loaded, has more than 8 bits in each of several channels."""
    if file.mode.startswith("I") or file.mode == "F":
        return False
    if file.format == "TIFF":
        return bool(np.max(_tag(file, _BITS_PER_SAMPLE, 8)) > 8)
    if file.format in ("PNG", "PPM") and (tiles := getattr(file, "tile", None)):
        arguments = tiles[0][3]
        if isinstance(arguments, str):
            return ";16" in arguments
        return isinstance(arguments, tuple) and isinstance(arguments[-1], int) and arguments[-1] > 255
    return False


def grey(file: Image.Image, content: bytes) -> NDArray[np.int64] | None:
    """Return the upright grey values of a file that has more than 8 bits of them; `None` for any other."""
    if not file.mode.startswith("I"):
        return None
    if header := _PGM.match(content):  # Pillow would take minutes, and stretch the values to 16 bits
        width, height, _ = map(int, header.groups())
        if len(content) - header.end() < 2 * width * height:
            raise OSError("image file is truncated")
        values = np.frombuffer(content, ">u2", width * height, header.end()).reshape(height, width)
    else:
        values = np.asarray(ImageOps.exif_transpose(file))
        if file.format == "TIFF" and _tag(file, _PHOTOMETRIC, 1) == 0:
            if values.dtype.itemsize != 2:
                raise ValueError("its value 0 is white, and it has more than 16 bits; save it with 8 or 16 bits")
            values = 65535 - values  # Pillow leaves values as they are
    return values.astype(np.int64)


def extent(values: NDArray[np.int64]) -> GreyRange:
    """Return the least and the greatest grey value of an image, but for one pixel in 10,000 at either end."""
    # Sensors have dead and hot pixels; a single one at 65535 would darken all images of a camera of 12 bits.
    few = values.size // 10_000
    low, high = np.partition(values, (few, values.size - 1 - few), axis=None)[[few, values.size - 1 - few]]
    return int(low), int(high)


def scaled(values: NDArray[np.int64], bounds: GreyRange) -> Image.Image:
    """Scale grey values to an image of 8 bits; values out of `bounds` become black or white."""
    # Cameras of 10 and 12 bits write files of 16 bits whose upper byte is nearly black.
    low, high = bounds
    if low == high:  # all values of the set are the same
        low, high = 0, max(1, high)
    shares = (np.clip(values, low, high) - low) / (high - low)
    return Image.fromarray(np.rint(shares * 255).astype(np.uint8))


def size(content: bytes) -> Size:
    """Return width and height of the image as it is stored, from its header alone."""
    with open_image(content) as file:
        return file.size


def upright(content: bytes, bounds: GreyRange | None = None) -> Image.Image:
    """Decode an image as a model sees it: upright, RGB.

    Raises:
        ValueError: It has grey values of more than 8 bits, and `bounds` for them are missing.
        Exception: As of `open_image`.
    """
    with open_image(content) as file:
        values = grey(file, content)
        if values is None:
            return colour(file).convert("RGB")
    if bounds is None:
        raise ValueError(
            "its grey values have more than 8 bits, and the model was trained on none such, so that it is not known"
            " which values are black and white; save it with 8 bits, as the training images were"
        )
    return scaled(values, bounds).convert("RGB")


def reduced(content: bytes) -> tuple[Image.Image, Size]:
    """Decode an image of a shard, a JPEG to grey and at a smaller scale, and return it and its own size."""
    image = Image.open(io.BytesIO(content))
    size = image.size
    image.draft("L", (256, 256))
    image.load()  # reads all data of a JPEG also at a smaller scale
    return image, size


def colour(file: Image.Image) -> Image.Image:
    """Return the upright image of a file without grey values of more than 8 bits.

    Raises:
        ValueError: It has pixels that cannot be reduced to 8 bits.
    """
    if file.mode == "F":
        raise ValueError("its pixels are floating point; save it with 8 or 16 bits")
    deep = is_deep_colour(file)
    if deep and file.format == "TIFF" and _tag(file, _PLANAR, 1) != 1:
        raise ValueError("its colours have 16 bits, channel after channel; save it with 8 bits a channel")
    image: Image.Image = ImageOps.exif_transpose(file)
    if deep:
        brightest = max(high for _, high in image.convert("RGB").getextrema())  # type: ignore[misc]
        if brightest < _DARK:
            raise ValueError(
                f"its colours have 16 bits, and the brightest is {brightest / 255:.0%} of white, as of a camera of 10"
                " to 14 bits; save it with 8 bits a channel, and all images of the set by the same factor"
            )
    return image


def png(image: Image.Image, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    """Encode an image as PNG; zlib's `strategy` changes its size and the time that it takes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_type=strategy)
    return buffer.getvalue()


def reason(error: Exception) -> str:
    """Return what is wrong with a file that cannot be read."""
    return "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error)


def _tag(file: Image.Image, number: int, default: Any) -> Any:
    return file.tag_v2.get(number, default)  # type: ignore[attr-defined]
