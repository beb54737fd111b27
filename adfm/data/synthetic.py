"""Synthetic data set: pictures of products with defects, drawn from a seed, in the MVTec AD layout with masks.

    synthetic://?seed=0&images=360

Colours are RGB floats in [0, 1]; arrays are `[size, size]` or `[size, size, 3]`; coordinates are pixels with the origin
at the top left. The embedded base model is trained on `SOURCE_CATEGORIES`, which never appear in the data set.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adfm.errors import AdfmError
from adfm.process import cpus
from adfm.process.progress import bar
from adfm.process.stopping import signals_blocked

Array = NDArray[Any]
Pixels = NDArray[np.uint8]
Rng = np.random.Generator  # the order of draws is part of the data set: the same seed gives the same bytes
SIZE = 128
T = TypeVar("T")


class Part(NamedTuple):
    """One drawn part."""

    image: Array
    region: Array  # where the part is, from 0 to 1; 1 everywhere for a texture
    under: Array  # what shows where a piece of the part is missing


Category = Callable[[Rng, int], Part]  # draws one part of a size


def _grid(size: int) -> tuple[Array, Array]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    return x, y


def _noise(rng: Rng, size: int, cells: int) -> Array:
    """Return smooth noise with about `cells` bumps a side, zero mean, unit spread."""
    coarse = rng.normal(size=(cells + 2, cells + 2)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    return np.asarray((smooth - smooth.mean()) / (smooth.std() + 1e-6), np.float32)


def _edge(distance: Array, width: float = 1.0) -> Array:
    """Return the antialiased inside of a signed distance: 1 where `distance` is below 0."""
    return np.clip(0.5 - distance / width, 0.0, 1.0)


def _mix(below: Array, above: Array, alpha: Array) -> Array:
    return np.asarray(below + (above - below) * alpha[..., None])


def _colour(rng: Rng, base: tuple[float, float, float], spread: float = 0.05) -> Array:
    colour = np.array(base) + rng.normal(0, spread / 2, 3) + rng.normal(0, spread)
    return np.asarray(colour, np.float32).clip(0.05, 0.95)


def _plain(colour: Array, size: int) -> Array:
    return np.broadcast_to(colour, (size, size, 3)).astype(np.float32)


def _shade(height: Array, strength: float) -> Array:
    """Return light from the upper left on a height map."""
    dy, dx = np.gradient(height)
    return np.asarray(-(dx + dy) * strength, np.float32)


def _rotated(grid: tuple[Array, Array], centre: tuple[float, float], angle: float) -> tuple[Array, Array]:
    dx, dy = grid[0] - centre[0], grid[1] - centre[1]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.asarray(dx * cos + dy * sin, np.float32), np.asarray(dy * cos - dx * sin, np.float32)


def _texture(image: Array, under: Array) -> Part:
    return Part(np.asarray(image, np.float32), np.ones(image.shape[:2], np.float32), _plain(under, image.shape[0]))


def _placed(rng: Rng, size: int) -> tuple[Array, Array, float]:
    """Return centred coordinates of an object on the table, turned and shifted a little, and its radius."""
    centre = (size / 2 + rng.uniform(-0.05, 0.05) * size, size / 2 + rng.uniform(-0.05, 0.05) * size)
    u, v = _rotated(_grid(size), centre, rng.uniform(0, 2 * np.pi))
    return u, v, float(rng.uniform(0.36, 0.42) * size)


def _on_table(rng: Rng, body: Array, region: Array, table: tuple[float, float, float]) -> Part:
    size, body, region = body.shape[0], np.asarray(body, np.float32), np.asarray(region, np.float32)
    x, y = _grid(size)
    light = 1 + 0.08 * (x + y - size)[..., None] / size
    under = _plain(_colour(rng, table, 0.03), size) * light + 0.008 * _noise(rng, size, 24)[..., None]
    shadow = np.roll(region, (size // 40, size // 40), (0, 1))
    below = under * (1 - 0.35 * shadow[..., None])
    return Part(_mix(below, body, region), region, np.asarray(under, np.float32))


def _weave(rng: Rng, size: int) -> Part:
    u, v = _rotated(_grid(size), (0, 0), rng.uniform(-0.15, 0.15))
    period = rng.uniform(7, 10)
    warp, weft = np.sin(2 * np.pi * u / period), np.sin(2 * np.pi * v / period)
    over = np.sin(np.pi * u / period) * np.sin(np.pi * v / period) > 0
    height = np.where(over, np.abs(warp), np.abs(weft))
    colour = _colour(rng, (0.42, 0.47, 0.58))
    tone = np.where(over, 1.06, 0.9) * (0.72 + 0.38 * height) + 0.03 * _noise(rng, size, 40)
    return _texture(colour * tone[..., None], colour * 0.35)


def _leather(rng: Rng, size: int) -> Part:
    height = _noise(rng, size, 18) + 0.7 * _noise(rng, size, 34)
    creases = np.exp(-(_noise(rng, size, 14) ** 2) / 0.02)
    colour = _colour(rng, (0.5, 0.31, 0.2))
    tone = 1 + _shade(height, 0.28) - 0.1 * creases
    return _texture(colour * tone[..., None], _colour(rng, (0.72, 0.6, 0.45), 0.03))


def _terrazzo(rng: Rng, size: int) -> Part:
    x, y = _grid(size)
    image = _plain(_colour(rng, (0.74, 0.72, 0.68), 0.03), size) + 0.012 * _noise(rng, size, 50)[..., None]
    chips = [(0.55, 0.47, 0.4), (0.86, 0.84, 0.8), (0.6, 0.6, 0.6), (0.66, 0.52, 0.44)]
    for _ in range(int(rng.integers(45, 60))):
        cx, cy = rng.uniform(0, size, 2)
        near = np.s_[max(0, int(cy) - 12) : int(cy) + 12, max(0, int(cx) - 12) : int(cx) + 12]
        u, v = _rotated((x[near], y[near]), (cx, cy), rng.uniform(0, np.pi))
        a, b = rng.uniform(2.0, 6.5), rng.uniform(1.5, 4.0)
        wobble = 1 + 0.25 * np.sin(3 * np.arctan2(v, u) + rng.uniform(0, 6))
        chip = _colour(rng, chips[rng.integers(4)], 0.03)
        image[near] = _mix(image[near], chip, _edge(np.hypot(u / a, v / b) * b - b * wobble))
    return _texture(image, _colour(rng, (0.3, 0.29, 0.28), 0.02))


def _gear(rng: Rng, size: int) -> Part:
    u, v, radius = _placed(rng, size)
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    teeth = int(rng.integers(12, 17))
    outline = radius * (0.9 + 0.1 * np.clip(3 * np.sin(teeth * angle), -1, 1))
    region = _edge(r - outline) * (1 - _edge(r - 0.24 * radius))
    brushed = 0.035 * np.sin(r * 2.2 + 0.5 * _noise(rng, size, 8)) + 0.02 * _noise(rng, size, 50)
    sheen = 0.1 * np.cos(2 * (angle - rng.uniform(0, np.pi)))
    ring = r - 0.66 * radius
    groove = -0.12 * np.exp(-((ring / 2.0) ** 2)) + 0.1 * np.exp(-(((ring - 2.5) / 2.0) ** 2))
    colour = _colour(rng, (0.62, 0.63, 0.66))
    body = colour * (1 + brushed + sheen + groove)[..., None]
    for k in range(5):
        hole = 2 * np.pi * k / 5
        distance = np.hypot(u - 0.45 * radius * np.cos(hole), v - 0.45 * radius * np.sin(hole)) - 0.075 * radius
        body = _mix(body, _plain(colour * 0.3, size), _edge(distance))
    return _on_table(rng, body, region, (0.22, 0.27, 0.3))


def _tablet(rng: Rng, size: int) -> Part:
    u, v, radius = _placed(rng, size)
    flat = rng.uniform(0.62, 0.8)
    d = np.hypot(u, v / flat)
    region = _edge((d - radius) * flat)
    dome = np.sqrt(np.clip(1 - (d / radius) ** 2, 0, 1))
    colour = _colour(rng, (0.86, 0.72, 0.5))
    speckle = 0.03 * _noise(rng, size, 60)
    line = -0.22 * np.exp(-((u / 1.6) ** 2)) + 0.1 * np.exp(-(((u - 3) / 1.6) ** 2))
    light = 0.72 + 0.36 * dome + _shade(dome, 2.0) + speckle + line * (np.abs(v) < 0.8 * radius * flat)
    body = colour * light[..., None]
    return _on_table(rng, body, region, (0.32, 0.42, 0.4))


def _circuit(rng: Rng, size: int) -> Part:
    u, v = _rotated(_grid(size), (0, 0), rng.uniform(-0.06, 0.06))
    board = _colour(rng, (0.1, 0.36, 0.24), 0.03)
    image = _plain(board, size) * (1 + 0.04 * _noise(rng, size, 30))[..., None]
    copper = _plain(_colour(rng, (0.2, 0.5, 0.33), 0.02), size)
    pitch = size / 6
    offset = rng.uniform(0, pitch, 2)
    column, row = np.round((u - offset[0]) / pitch), np.round((v - offset[1]) / pitch)
    du, dv = u - offset[0] - column * pitch, v - offset[1] - row * pitch
    image = _mix(image, copper, _edge(np.abs(dv) - 1.3))
    image = _mix(image, copper, _edge(np.abs(np.abs(du) - pitch / 2) - 0.9))
    metal = _plain(_colour(rng, (0.78, 0.78, 0.74), 0.03), size)
    black = _plain(_colour(rng, (0.14, 0.14, 0.16), 0.02), size)
    via, chip = (column + row) % 2 == 1, (column + row) % 2 == 0
    image = _mix(image, metal, _edge(np.hypot(du, dv) - 3.2) * via)
    image = _mix(image, black, _edge(np.hypot(du, dv) - 1.3) * via)
    image = _mix(image, metal, _edge(np.maximum(np.abs(du) - 6.2, np.abs(dv) - 2.8)) * chip)
    image = _mix(image, black, _edge(np.maximum(np.abs(du) - 4.2, np.abs(dv) - 3.2)) * chip)
    return _texture(image, _colour(rng, (0.5, 0.45, 0.3), 0.02))


def _stripes(rng: Rng, size: int) -> Part:
    u, _ = _rotated(_grid(size), (0, 0), rng.uniform(0, np.pi))
    wave = np.sin(2 * np.pi * u / rng.uniform(9, 20) + rng.uniform(0, 6))
    colour = _colour(rng, tuple(rng.uniform(0.3, 0.7, 3)))
    tone = 1 + rng.uniform(0.08, 0.2) * np.clip(wave * rng.uniform(1, 4), -1, 1) + 0.02 * _noise(rng, size, 50)
    return _texture(colour * tone[..., None], colour * rng.uniform(0.3, 0.6))


def _dots(rng: Rng, size: int) -> Part:
    u, v = _rotated(_grid(size), (0, 0), rng.uniform(0, np.pi))
    period = rng.uniform(12, 22)
    d = np.hypot((u % period) - period / 2, (v % period) - period / 2) - period * rng.uniform(0.15, 0.3)
    colour = _colour(rng, tuple(rng.uniform(0.3, 0.7, 3)))
    image = _mix(_plain(colour, size), _plain(_colour(rng, tuple(colour), 0.16), size), _edge(d))
    return _texture(image + 0.015 * _noise(rng, size, 50)[..., None], colour * rng.uniform(0.3, 0.6))


def _wood(rng: Rng, size: int) -> Part:
    u, v = _rotated(_grid(size), (size / 2, size / 2), rng.uniform(0, np.pi))
    rings = np.sin(0.35 * u + 2.2 * _noise(rng, size, 3) + 0.03 * v)
    colour = _colour(rng, (0.62, 0.45, 0.28))
    tone = 1 + 0.12 * rings + 0.04 * _noise(rng, size, 60)
    return _texture(colour * tone[..., None], colour * 0.4)


def _brushed(rng: Rng, size: int) -> Part:
    streaks = rng.normal(size=(size, 1)).astype(np.float32) * np.ones((1, size), np.float32)
    streaks = streaks if rng.random() < 0.5 else streaks.T
    colour = _colour(rng, (0.6, 0.6, 0.62))
    tone = 1 + 0.045 * streaks + 0.06 * _noise(rng, size, 2) + 0.02 * _noise(rng, size, 60)
    return _texture(colour * tone[..., None], colour * 0.35)


def _mesh(rng: Rng, size: int) -> Part:
    u, v = _rotated(_grid(size), (0, 0), rng.uniform(0.5, 1.1))
    period = rng.uniform(10, 16)
    wire = np.minimum(np.abs((u % period) - period / 2), np.abs((v % period) - period / 2)) - rng.uniform(1.2, 2.2)
    back = _plain(_colour(rng, (0.2, 0.2, 0.22), 0.04), size)
    front = _plain(_colour(rng, (0.6, 0.58, 0.52)), size) * (1 + 0.05 * _noise(rng, size, 40))[..., None]
    return _texture(_mix(back, front, _edge(wire)), back[0, 0])


def _washer(rng: Rng, size: int) -> Part:
    u, v, radius = _placed(rng, size)
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    region = _edge(r - radius) * (1 - _edge(r - rng.uniform(0.35, 0.5) * radius))
    sheen = 0.12 * np.cos(2 * (angle - rng.uniform(0, 3))) + 0.03 * _noise(rng, size, 40)
    body = _colour(rng, tuple(rng.uniform(0.45, 0.75, 3))) * (1 + sheen)[..., None]
    return _on_table(rng, body, region, tuple(rng.uniform(0.15, 0.4, 3)))


def _button(rng: Rng, size: int) -> Part:
    u, v, radius = _placed(rng, size)
    r = np.hypot(u, v)
    region = _edge(r - radius)
    for hx, hy in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        region = region * (1 - _edge(np.hypot(u - 0.22 * hx * radius, v - 0.22 * hy * radius) - 0.1 * radius))
    rim = 0.12 * np.exp(-(((r - 0.82 * radius) / 3.0) ** 2))
    body = _colour(rng, tuple(rng.uniform(0.3, 0.8, 3))) * (1 + rim + 0.03 * _noise(rng, size, 12))[..., None]
    return _on_table(rng, body, region, tuple(rng.uniform(0.15, 0.5, 3)))


def _hexnut(rng: Rng, size: int) -> Part:
    u, v, radius = _placed(rng, size)
    r = np.hypot(u, v)
    sector = np.abs((np.arctan2(v, u) + np.pi) % (np.pi / 3) - np.pi / 6)
    region = _edge(r * np.cos(sector) - 0.88 * radius) * (1 - _edge(r - 0.45 * radius))
    thread = 0.15 * np.sin(1.6 * r) * (r < 0.56 * radius)
    body = _colour(rng, (0.6, 0.56, 0.48)) * (1 + thread + 0.04 * _noise(rng, size, 20))[..., None]
    return _on_table(rng, body, region, tuple(rng.uniform(0.15, 0.4, 3)))


TARGET_CATEGORIES: dict[str, Category] = {
    "circuit": _circuit,
    "gear": _gear,
    "leather": _leather,
    "tablet": _tablet,
    "terrazzo": _terrazzo,
    "weave": _weave,
}
SOURCE_CATEGORIES: dict[str, Category] = {
    "brushed": _brushed,
    "button": _button,
    "dots": _dots,
    "hexnut": _hexnut,
    "mesh": _mesh,
    "stripes": _stripes,
    "washer": _washer,
    "wood": _wood,
}


Point = tuple[float, float]
Drawn = tuple[Array, Array]  # the image with the defect, and the defect's coverage in [0, 1]
# Takes the image so far, the defect's centre, its radius (half of its extent) and its contrast (about 0.15 to 0.5).
Defect = Callable[[Rng, Array, Part, Point, float, float], Drawn]


def _scratch(rng: Rng, image: Array, part: Part, centre: Point, radius: float, contrast: float) -> Drawn:
    u, v = _rotated(_grid(image.shape[0]), centre, rng.uniform(0, np.pi))
    bend = rng.uniform(-0.3, 0.3) * radius * np.cos(u / radius * rng.uniform(0.5, 1.8))
    width = rng.uniform(0.9, 1.8) * np.sqrt(np.clip(1 - (u / radius) ** 2, 0, 1))
    alpha = _edge(np.abs(v - bend) - width) * (np.abs(u) < radius)
    return image + (rng.choice([-1.0, 1.0]) * contrast * alpha)[..., None], alpha


def _blob(rng: Rng, size: int, centre: tuple[float, float], radius: float) -> Array:
    """Return the signed distance to an irregular round outline."""
    u, v = _rotated(_grid(size), centre, rng.uniform(0, np.pi))
    angle = np.arctan2(v, u)
    outline = 1 + sum(rng.uniform(-0.14, 0.14) * np.sin(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5))
    return np.hypot(u, v / rng.uniform(0.65, 1.0)) - radius * outline * 0.9


def _spot(rng: Rng, image: Array, part: Part, centre: Point, radius: float, contrast: float) -> Drawn:
    alpha = _edge(_blob(rng, image.shape[0], centre, radius * 0.8), 2.0)
    tint = rng.choice([-1.0, 1.0]) * contrast * np.array([1.0, rng.uniform(0.75, 1), rng.uniform(0.5, 1)])
    return image + alpha[..., None] * tint * 0.9, alpha


def _dent(rng: Rng, image: Array, part: Part, centre: Point, radius: float, contrast: float) -> Drawn:
    x, y = _grid(image.shape[0])
    dx, dy = (x - centre[0]) / radius, (y - centre[1]) / radius
    inside = np.clip(1 - np.hypot(dx, dy), 0, 1)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (dx * np.cos(angle) + dy * np.sin(angle)) * np.sqrt(inside)
    return image + (3.0 * contrast * slope)[..., None], np.asarray(inside > 0.06, np.float32)


def _contamination(rng: Rng, image: Array, part: Part, centre: Point, radius: float, contrast: float) -> Drawn:
    size = image.shape[0]
    x, y = _grid(size)
    alpha = np.zeros((size, size), np.float32)
    for _ in range(int(rng.integers(6, 13))):
        px, py = np.array(centre) + rng.uniform(-0.8, 0.8, 2) * radius
        alpha = np.maximum(alpha, _edge(np.hypot(x - px, y - py) - rng.uniform(0.1, 0.25) * radius - 0.6))
    hue = rng.uniform(-1, 1, 3)
    return image + alpha[..., None] * (hue / np.abs(hue).max()) * contrast * 1.3, alpha


def _missing(rng: Rng, image: Array, part: Part, centre: Point, radius: float, contrast: float) -> Drawn:
    alpha = _edge(_blob(rng, image.shape[0], centre, radius * 0.85), 1.2)
    strength = min(1.0, 0.45 + 1.3 * contrast)
    return _mix(image, part.under, alpha * strength), alpha


DEFECTS: dict[str, Defect] = {
    "contamination": _contamination,
    "dent": _dent,
    "missing": _missing,
    "scratch": _scratch,
    "spot": _spot,
}


def _normal_variation(rng: Rng, image: Array, part: Part) -> Array:
    """Return what a good part may show too: uneven light, a soft stain, a faint grain line, dust, a reflection."""
    size = image.shape[0]
    x, y = _grid(size)
    image = image * (1 + 0.05 * _noise(rng, size, 1))[..., None]
    for _ in range(int(rng.integers(0, 3))):
        cx, cy = rng.uniform(0.1, 0.9, 2) * size
        kind = rng.integers(4)
        if kind == 0:
            soft = np.exp(-(((x - cx) ** 2 + (y - cy) ** 2) / (2 * (rng.uniform(0.05, 0.14) * size) ** 2)))
            change = rng.uniform(-0.07, 0.07) * soft
        elif kind == 1:
            u, v = _rotated((x, y), (cx, cy), rng.uniform(0, np.pi))
            change = rng.choice([-0.05, 0.05]) * _edge(np.abs(v) - 0.4) * (np.abs(u) < rng.uniform(0.1, 0.3) * size)
        elif kind == 2:
            change = np.zeros_like(x)
            for px, py in rng.uniform(0, size, (int(rng.integers(2, 6)), 2)):
                change += rng.choice([-0.16, 0.16]) * _edge(np.hypot(x - px, y - py) - 0.7)
        else:
            u, v = _rotated((x, y), (cx, cy), rng.uniform(0, np.pi))
            change = 0.08 * np.exp(-((v / (0.05 * size)) ** 2) - (u / (0.25 * size)) ** 2)
        image = image + (change * part.region)[..., None]
    return np.asarray(image, np.float32)


def draw(rng: Rng, category: Category, defect: str | None = None, size: int = SIZE) -> tuple[Pixels, Pixels]:
    """Draw one part, good (`defect=None`) or with one to three defects of a kind.

    Returns:
        The RGB image `[size, size, 3]` and the mask `[size, size]`, 255 where a defect is.
    """
    part = category(rng, size)
    image = _normal_variation(rng, part.image, part)
    mask = np.zeros((size, size), bool)
    if defect is not None:
        for _ in range(int(rng.choice([1, 2, 3], p=[0.78, 0.16, 0.06]))):
            image, mask = _add_defect(rng, image, part, defect, mask)
    image = image + rng.normal(0, 0.012, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8), mask.astype(np.uint8) * 255


def _add_defect(rng: Rng, image: Array, part: Part, defect: str, mask: Array) -> Drawn:
    """Try positions until the defect lies on the part, is visible, and does not touch an earlier one."""
    size = image.shape[0]
    where = np.argwhere(part.region > 0.9)
    for _ in range(20):
        cy, cx = where[rng.integers(len(where))]
        radius = float(np.exp(rng.uniform(np.log(0.05), np.log(0.2))) * size)
        if defect == "scratch":
            radius *= 1.5
        contrast = float(rng.uniform(0.16, 0.45))
        drawn, alpha = DEFECTS[defect](rng, image, part, (float(cx), float(cy)), radius, contrast)
        alpha = alpha * part.region
        changed = np.abs(drawn - image).mean(-1) * part.region
        new = (alpha > 0.5) & (changed > 0.02)
        if new.sum() >= 12 and changed[new].mean() > 0.07 and not (new & _grown(mask, size // 24)).any():
            return np.asarray(_mix(image, np.asarray(drawn, np.float32), part.region), np.float32), mask | new
    return image, mask


def _grown(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """Return the rectangle around `mask`, `pixels` larger on each side."""
    ys, xs = np.nonzero(mask)
    grown = np.zeros_like(mask)
    if len(ys):
        grown[max(0, ys.min() - pixels) : ys.max() + pixels + 1, max(0, xs.min() - pixels) : xs.max() + pixels + 1] = 1
    return grown


def generate(out: Path, seed: int = 0, images: int = 360) -> None:
    """Write the data set to `out`, the same bytes for the same arguments.

    A category has `images` images. One part in nine is `train/good`; of the rest, which is `test`, one half is good and
    one half shared out evenly among the five kinds of defect.

    Raises:
        AdfmError: `images` is below 20, or `seed` is negative.
    """
    if images < 20 or seed < 0:
        raise AdfmError(f"synthetic://?seed={seed}&images={images}: images must be at least 20 and seed at least 0")
    jobs = [job for name in TARGET_CATEGORIES for job in _plan(name, seed, images)]
    list(on_all_cores(_write, [out] * len(jobs), *zip(*jobs, strict=True), chunksize=32))


def on_all_cores(draw: Callable[..., T], *columns: Sequence[Any], chunksize: int) -> Iterator[T]:
    """Map `draw` over equally long columns, one process per core, `chunksize` rows at a time; yield results in order.

    An interrupt cancels the waiting chunks and waits for the running ones, so that nothing is written afterwards.
    """
    with ProcessPoolExecutor(cpus.count()) as pool:
        try:
            # The workers never see an interrupt: ended by it, they would leave a traceback of the pool's thread.
            with signals_blocked():
                drawn = pool.map(draw, *columns, chunksize=chunksize)
            yield from bar(drawn, total=len(columns[0]), desc="draw images", unit="image")
        except BaseException:  # an interrupt too; only running chunks end, so that nothing is written afterwards
            pool.shutdown(cancel_futures=True)
            raise


def _plan(category: str, seed: int, images: int) -> Iterator[tuple[str, str | None, str, int, tuple[int, int, int]]]:
    """Yield the arguments of `_write` for each image of a category, but for the folder of the data set."""
    train = images // 9
    good = (images - train) // 2
    defects = sorted(islice(cycle(DEFECTS), images - train - good))
    kinds = [("train/good", None)] * train + [("test/good", None)] * good + [(f"test/{kind}", kind) for kind in defects]
    numbers: Counter[str] = Counter()
    for i, (folder, defect) in enumerate(kinds):
        yield category, defect, folder, numbers[folder], (seed, list(TARGET_CATEGORIES).index(category), i)
        numbers[folder] += 1


def _write(out: Path, category: str, defect: str | None, folder: str, number: int, seed: tuple[int, int, int]) -> None:
    image, mask = draw(np.random.default_rng(seed), TARGET_CATEGORIES[category], defect)
    files = {f"{folder}/{number:03d}.png": image}
    if defect:
        files[f"ground_truth/{defect}/{number:03d}_mask.png"] = mask
    for name, pixels in files.items():
        path = out / category / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
