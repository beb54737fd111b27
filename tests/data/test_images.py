import contextlib
import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from adfm.data import images

WIDTH, HEIGHT = 8, 6
GREY = (np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) * 80 + 100).astype(np.uint16)  # 12 bits
COLOUR = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)


def _saved(image: Image.Image, format_: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **how)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits in each of 3 channels, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _tiff16(values: np.ndarray, photometric: int, order: str = "<", planar: int = 1) -> bytes:
    channels = 1 if values.ndim == 2 else values.shape[2]
    planes = np.moveaxis(values, 2, 0) if planar == 2 else values
    data = planes.astype(f"{order}u2").tobytes()
    tags = [
        *((256, 4, [values.shape[1]]), (257, 4, [values.shape[0]]), (258, 3, [16] * channels), (259, 3, [1])),
        *((262, 3, [photometric]), (273, 4, [8]), (277, 3, [channels]), (278, 4, [values.shape[0]])),
        *((279, 4, [len(data)]), (284, 3, [planar])),
    ]
    place = 8 + len(data)
    later, entries = b"", b""
    for number, kind, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers)}{'HI'[kind == 4]}", *numbers)
        if len(packed) > 4:
            packed, later = struct.pack(f"{order}I", place + 6 + 12 * len(tags) + len(later)), later + packed
        entries += struct.pack(f"{order}HHI", number, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", place)
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0) + later


def _grey(content: bytes) -> np.ndarray | None:
    with images.open_image(content) as file:
        return images.grey(file, content)


@pytest.mark.parametrize(
    "content",
    [
        _saved(Image.fromarray(GREY), "PNG"),
        _saved(Image.fromarray(GREY), "TIFF"),
        _saved(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
        _tiff16(GREY, 1, ">"),
        _tiff16(65535 - GREY, 0),
        b"P5 8 6 4095\n" + GREY.astype(">u2").tobytes(),
        b"P5\n# a camera's\n8 6\n65535\n" + GREY.astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "lzw", "big-endian", "white is 0", "pgm", "pgm with a comment"],
)
def test_grey_values_of_more_than_8_bits_are_those_of_the_camera(content: bytes) -> None:
    values = _grey(content)
    assert values is not None and values.tolist() == GREY.tolist()
    image = images.upright(content, (100, 100 + 80 * 47))
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((7, 5))) == ("RGB", (0, 0, 0), (255, 255, 255))
    with pytest.raises(ValueError, match="more than 8 bits, and the model was trained on none such"):
        images.upright(content)


def test_a_truncated_pgm_is_damaged() -> None:
    with pytest.raises(OSError, match="truncated"):
        _grey(b"P5 8 6 4095\n" + GREY.astype(">u2").tobytes()[:-1])


@given(
    values=hnp.arrays(np.int64, (3, 4), elements=st.integers(-100_000, 100_000)),
    low=st.integers(-70_000, 70_000),
    span=st.integers(1, 70_000),
)
def test_scaling_is_linear_between_the_bounds(values: np.ndarray, low: int, span: int) -> None:
    pixels = np.asarray(images.scaled(values, (low, low + span))).astype(float)
    expected = np.clip((values - low) / span, 0, 1) * 255
    assert np.abs(pixels - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("value", "shade"), [(0, 0), (1, 255), (4095, 255)])
def test_a_blank_set_is_black_or_white(value: int, shade: int) -> None:
    assert images.scaled(np.full((2, 2), value), (value, value)).getextrema() == (shade, shade)


def test_colours_of_16_bits_are_refused_where_their_upper_byte_is_not_the_picture() -> None:
    full = COLOUR.astype(np.uint16) * 257
    for content in (_png16(full), _tiff16(full, 2), _tiff16(full, 2, ">"), _ppm16(full)):
        assert np.abs(np.asarray(images.upright(content)).astype(int) - COLOUR).max() <= 1
    twelve = full >> 4
    for content in (_png16(twelve), _tiff16(twelve, 2), _ppm16(twelve)):
        with pytest.raises(ValueError, match="its colours have 16 bits, and the brightest is 6% of white"):
            images.upright(content)
    with pytest.raises(ValueError, match="16 bits, channel after channel"):
        images.upright(_tiff16(full, 2, planar=2))


def _ppm16(values: np.ndarray) -> bytes:
    height, width, _ = values.shape
    return b"P6 %d %d 65535\n" % (width, height) + values.astype(">u2").tobytes()


def test_heif_is_its_primary_image_upright() -> None:
    photograph, other = Image.fromarray(COLOUR).resize((64, 48)), Image.new("RGB", (32, 32), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = _saved(photograph, "HEIF", quality=95, exif=exif.tobytes())
    assert images.size(turned) == images.upright(turned).size == (48, 64)
    second = _saved(photograph, "HEIF", save_all=True, append_images=[other], primary_index=1)
    assert images.upright(second).size == (32, 32)
    avif = _saved(photograph, "AVIF", quality=95, exif=exif.tobytes())
    assert images.upright(avif).size == (48, 64)
    with ThreadPoolExecutor(8) as pool:
        pixels = set(pool.map(lambda _: images.upright(turned).tobytes(), range(40)))
    assert len(pixels) == 1
    for damaged in (turned[: len(turned) // 2], avif[: len(avif) // 2]):
        with pytest.raises((OSError, ValueError)):
            images.upright(damaged)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_bitmaps_of_1_to_32_bits(mode: str) -> None:
    white = Image.new("RGB", (5, 4), "white").convert(mode)
    assert images.upright(_saved(white, "BMP")).getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer.*git lfs pull"),
        (_saved(Image.new("L", (3, 3)), "TIFF", save_all=True, append_images=[Image.new("L", (3, 3))]), "2 frames"),
        (_saved(Image.new("F", (3, 3)), "TIFF"), "floating point"),
    ],
)
def test_what_is_not_one_image_says_why(content: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        images.upright(content)


@settings(max_examples=25, deadline=None)
@given(
    content=st.binary(max_size=60),
    kind=st.sampled_from([b"P5 ", b"P6 ", b"P5 9 9 999 ", b"II*\0", b"\x89PNG\r\n\x1a\n"]),
)
def test_a_damaged_file_is_an_error(content: bytes, kind: bytes) -> None:
    with contextlib.suppress(Exception):  # Pillow raises nearly anything; the process must not end, nor take for ever
        images.upright(kind + content, (0, 99))


def test_a_dead_and_a_hot_pixel_do_not_set_the_range() -> None:
    values = np.random.default_rng(0).integers(500, 4000, (200, 300))
    values[:3, :3] = 600
    values[4:8, :3] = 5000  # a small highlight counts
    least = int(values.min())
    values[0, 0], values[-1, -1] = 0, 65535
    assert images.extent(values) == (least, 5000)
    assert images.extent(values[:90, :90]) == (0, 5000)  # of few pixels, each may matter
    assert images.extent(np.full((200, 300), 700)) == (700, 700)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="NOT TESTED: this system has no affinity")
def test_a_decoder_starts_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives AVIF one for each core of a node, and conversion decodes an image on each of the pod's CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    image = images.open_image(_saved(Image.fromarray(COLOUR), "AVIF"))
    before = set(Path("/proc/self/task").iterdir())
    image.load()
    assert set(Path("/proc/self/task").iterdir()) <= before
