"""Drawing: charts, boxes on images, and letters on sheets of images."""

import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from adfm.records import Box

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2933", "#6b7785", "#e3e8ee"
TRUTH, PREDICTED, MARK = "#2ea043", "#da3633", "#ff2d55"
# Of models or other series; the first is that of the candidate. report.css has the same order.
PALETTE = ("#1f5fae", "#d9822b", "#8a94a0", "#8e5bbf", "#2a9d8f", "#c2477f", "#7a5c3e")
WIDTH = 7.5  # of a chart in inches: about that of a page, where its letters of 8 points can be read


@contextmanager
def drawn(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """Yield an empty figure of a size in inches, and write it to `path` when the block ends."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A dollar sign in the name of a category or a model begins no formula.
    look: Any = {"font.size": 8, "axes.titlesize": 9, "text.color": INK, "text.parse_math": False}
    with rc_context(look), warnings.catch_warnings():
        # A completion may hold any script; a glyph that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # A bare figure instead of pyplot: no window, backend or global state.
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        # Room at the edge: on a dark page the figure is a white card.
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr, call-arg]
        yield figure
        canvas: Any = FigureCanvasAgg(figure)  # untyped
        canvas.draw()
    full = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # 256 colours, dithered, are less than half the bytes and look the same; white is kept, which would come out grey.
    small = full.quantize(palette=full.quantize(255), dither=Image.Dither.FLOYDSTEINBERG)
    indices = np.where((np.asarray(full) == 255).all(-1), 255, np.asarray(small)).astype(np.uint8)
    white = Image.fromarray(indices, "P")
    white.putpalette([*(small.getpalette() or [])[: 3 * 255], *[255] * 3])
    white.save(path, optimize=True)


def panels(figure: "Figure", count: int, columns: int) -> list["Axes"]:
    """Add `count` axes in rows of `columns`, without frames and ticks, on a grid."""
    rows = -(-count // columns)
    made = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    for axes in made:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return made


def smoothed(values: NDArray[Any]) -> NDArray[np.float64]:
    """Smooth a curve: means weighted by a Gaussian, 6 % of the curve wide, and two steps at least."""
    width = max(2.0, 0.06 * len(values))
    reach = int(4 * width)
    kernel = np.exp(-((np.arange(-reach, reach + 1) / width) ** 2) / 2)
    total, weight = (np.convolve(each, kernel)[reach : reach + len(values)] for each in (values, np.ones(len(values))))
    return np.asarray(total / weight)


def frame(pixels: NDArray[Any], boxes: Iterable[Box], colour: str) -> None:
    """Frame boxes (pixels, half-open) on an image, [height, width, 3], in place: in the colour, white around it."""
    height, width = pixels.shape[:2]
    boxes = [*boxes]
    # From outside, so that nothing in the box is covered, as far as the image has room for the frame.
    for inner, outer, paint in ((2, 3, (255, 255, 255)), (0, 2, (*bytes.fromhex(colour[1:]),))):
        for x1, y1, x2, y2 in (map(round, box) for box in boxes):
            left, top = min(max(outer, x1), width - outer - 1), min(max(outer, y1), height - outer - 1)
            right, bottom = max(left + 1, min(width - outer, x2)), max(top + 1, min(height - outer, y2))
            ring = np.zeros((height, width), bool)
            for room, inside in ((outer, True), (inner, False)):
                ring[max(0, top - room) : bottom + room, max(0, left - room) : right + room] = inside
            pixels[ring] = paint


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans."""
    import matplotlib  # brings the font, which is free

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def line_height(font: ImageFont.FreeTypeFont) -> int:
    """Return the pixels from one line to the next."""
    return round(1.4 * font.size)


def write(sheet: Image.Image, place: tuple[int, int], lines: Iterable[str], font: ImageFont.FreeTypeFont) -> None:
    """Write lines on a sheet, the first with its upper left corner at `place`."""
    pen, (x, y) = ImageDraw.Draw(sheet), place
    for number, line in enumerate(lines):
        pen.text((x, y + number * line_height(font)), line, INK, font)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """Wrap a text to lines of at most `width` pixels; an ellipsis ends the last of `most` lines if more are left."""
    lines: list[str] = []  # broken at spaces and hyphens, and within a word only where it alone is too wide
    for paragraph in text.splitlines():
        # Lines of the average width first, then fewer letters until each is narrow enough.
        letters = max(1, int(width / max(1.0, font.getlength(paragraph) / max(1, len(paragraph)))))
        while letters > 1 and any(font.getlength(line) > width for line in textwrap.wrap(paragraph, letters)):
            letters -= 1
        lines += textwrap.wrap(paragraph, letters) or [""]
    return lines if len(lines) <= most else [*lines[: most - 1], fitted(f"{lines[most - 1]}…", font, width)]


def stages(completion: str) -> str:
    """Prepare a completion for `wrapped` or `textwrap`: each stage begins a line, and no line breaks within a box."""
    parted = re.sub(r">\s*(?=<(?:rethink|answer)>)", ">\n", completion.strip())
    return re.sub(r",\s(?=[^\[\]]*\])", ",\u00a0", parted)


def fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten a text to `width` pixels by leaving out its middle: a file's name ends in its number."""
    short, kept = text, len(text)
    while font.getlength(short) > width and kept > 1:
        kept -= 1
        short = f"{text[: kept // 3]}…{text[len(text) - (kept - kept // 3) :]}"
    return short
