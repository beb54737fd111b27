"""Draw a contact sheet of a data set, raw or converted: `adfm show DIR`."""

import hashlib
import heapq
import html
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image, ImageDraw

from adfm import drawing
from adfm.data import inspection, pictures, samples, shards
from adfm.data.images import png
from adfm.data.pictures import Picture
from adfm.data.readers import files, resolve
from adfm.drawing import FAINT, INK, MARK, TRUTH
from adfm.errors import AdfmError
from adfm.files import replacing
from adfm.params import Convert, Params
from adfm.process import cpus
from adfm.records import SPLITS, Sample
from adfm.text import printable

MAX_IMAGES = 1000
# Side of a picture in pixels when there are no more than 48, and when there are very few; more are smaller.
_SIDES = {".html": (360, 640), ".png": (240, 480)}
_T = TypeVar("_T")


class _Entry(NamedTuple):  # an image that may be drawn
    category: str
    label: str
    defect: str
    split: str
    name: str
    content: Sample | int  # or the number of its row in the shards


_Tile = tuple[_Entry, Picture]


def show(folder: Path, out: Path | None, params: Params, split: str | None = None, images: int = 48) -> Path:
    """Draw some of a data set's images, with what is marked on them, on one sheet, and return its file.

    Categories have equal parts of the sheet, and so have the labels in a category and the defects in a label. An image
    that cannot be drawn has a place that says why. Boxes and problems of raw images are those of conversion.

    Args:
        folder: A raw data set in any layout that has a reader, or shards.
        out: File to write: a page (.html), which needs no network, or an image (.png). By default a page in the current
            folder, named after `folder`.
        params: Reads `seed` and `convert`.
        split: The only split to draw; all of them without one.
        images: How many to draw at most.

    Raises:
        AdfmError: There is no such data set, it has no image to show, or the file cannot be written.
    """
    out = out or Path(f"show-{folder.resolve().name}.html")
    if out.suffix.lower() not in _SIDES:
        raise AdfmError(f"{out}: a sheet is a page or an image; give it a name that ends in .html or .png.")
    if not 1 <= images <= MAX_IMAGES:
        raise AdfmError(f"a sheet shows 1 to {MAX_IMAGES} images; {images} were asked for.")
    if split not in (None, *SPLITS):
        raise AdfmError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if not folder.is_dir():
        raise AdfmError(f"{folder}: no such folder; get a data set there with `adfm fetch URI {folder}`.")
    counts: Counter[_Entry] = Counter()
    problem = ""

    def entries() -> Iterator[_Entry]:
        nonlocal problem
        try:
            for entry in _entries(folder, params.convert):
                counts[entry._replace(name="", content=0)] += 1
                if split in (None, entry.split):
                    yield entry
        except AdfmError as error:  # a reader lists at its end what is wrong with the data set
            problem = str(error)

    chosen = _choose(entries(), images, params.seed)
    if not chosen:
        there = ", ".join(sorted({entry.split or "no split" for entry in counts})) or "none"
        raise AdfmError(problem or f"{folder}: no image is of the split {split}, but of {there}.")
    usual, most = _SIDES[out.suffix.lower()]
    side = min(most, int(usual * (48 / len(chosen)) ** 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged images: the tile says what matters of it
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        tiles = [*_tiles(folder, chosen, side, params.convert)]
    sheet = _page if out.suffix.lower() == ".html" else _image
    content = sheet(folder.resolve().name, tiles, counts, problem, side)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise AdfmError(f"{out} cannot be written ({error.strerror}); choose another file with --out.") from error
    print(f"{out}: {len(tiles)} of {counts.total()} images of {folder}" + (f"\n{problem}" if problem else ""))
    return out


def _entries(folder: Path, settings: Convert) -> Iterator[_Entry]:
    columns = ["category", "label", "defect", "split", "source"]
    if any(path for split in SPLITS for path in folder.glob(f"{split}-*.parquet")):
        rows = (row for batch in shards.batches(folder, None, columns) for row in batch.to_pylist())
        yield from (_entry(number, *row.values()) for number, row in enumerate(rows))
        return
    layout, _ = resolve(folder, settings.layout)
    for sample in samples.read(folder, layout, settings):
        yield _entry(sample, *(getattr(sample, name) for name in columns))


def _entry(content: Sample | int, *texts: str | None) -> _Entry:
    category, label, defect, split, name = (printable(text or "") for text in texts)
    return _Entry(category, label, defect, split, name, content)


def _choose(entries: Iterable[_Entry], number: int, seed: int) -> list[_Entry]:
    """Draw entries at random, in one pass: of every category, label and defect in turn, until there are enough."""
    kept: dict[str, dict[str, dict[str, list[tuple[int, int, _Entry]]]]] = {}
    for count, entry in enumerate(entries):
        drawn = kept.setdefault(entry.category, {}).setdefault(entry.label, {}).setdefault(entry.defect, [])
        # Only the entries that may be chosen are kept: memory does not grow with the number of images.
        heapq.heappush(drawn, (-_draw(seed, entry.name), count, entry))
        if len(drawn) > number:
            heapq.heappop(drawn)
    categories = []
    for turn, category in enumerate(sorted(kept, key=partial(_draw, seed))):
        labels = []
        for _, defects in sorted(kept[category].items()):
            labels.append([*_in_turn([[entry for *_, entry in sorted(drawn)[::-1]] for drawn in defects.values()])])
        # Not the same label of every category first, if that is all.
        categories.append([*_in_turn(labels[::-1] if turn % 2 else labels)])
    return sorted(islice(_in_turn(categories), number), key=lambda entry: entry[:5])


def _draw(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])


def _in_turn(lists: Iterable[list[_T]]) -> Iterator[_T]:
    nothing = object()
    for row in zip_longest(*lists, fillvalue=nothing):
        yield from (item for item in row if item is not nothing)  # type: ignore[misc]


def _tiles(folder: Path, chosen: list[_Entry], side: int, settings: Convert) -> Iterator[_Tile]:
    numbers = [entry.content for entry in chosen if isinstance(entry.content, int)]
    of_row = {number: pictures.of_row(row, side) for number, row in pictures.rows(folder, numbers)}
    with ThreadPoolExecutor(cpus.count()) as pool:
        yield from pool.map(partial(_tile, of_row, side, settings), chosen)


def _tile(of_row: dict[int, Picture], side: int, settings: Convert, entry: _Entry) -> _Tile:
    if isinstance(entry.content, int):
        return entry, of_row[entry.content]
    row = inspection.inspect(entry.content, settings)
    content = files.content(entry.content.image) if entry.content.image.is_file() else b""
    mask = {"bytes": row["mask"]} if row["mask"] else None
    picture = pictures.of_row(row | {"image": {"bytes": content}, "mask": mask}, side)
    problem = "; ".join(line.removeprefix(f"{entry.content.source}: ") for line in row["problems"])
    if row["label"] == "normal":  # as some images are that are not marked
        entry = entry._replace(label="normal", defect="")
    return entry, replace(picture, problem=printable(problem or picture.problem))


def _lines(entry: _Entry, picture: Picture) -> list[str]:
    alone = entry.label == "anomalous" and not picture.boxes and picture.mask is None and not picture.problem
    label = " · ".join(part for part in (entry.label, entry.defect, "label alone" if alone else "") if part)
    size = "{}x{}".format(*picture.size) if any(picture.size) else ""
    return [entry.category, label, " · ".join(part for part in (entry.split, size) if part)]


def _summary(counts: Counter[_Entry], tiles: int) -> str:
    labels, splits = Counter[str](), Counter[str]()
    for entry, count in counts.items():
        labels[entry.label] += count
        splits[entry.split or "no split"] += count
    categories = len({entry.category for entry in counts})
    noun = "category" if categories == 1 else "categories"
    of_label = ", ".join(f"{count:,} {label or 'without label'}" for label, count in sorted(labels.items()))
    of_split = ", ".join(f"{count:,} {split}" for split, count in splits.most_common())
    return f"{counts.total():,} images, {tiles:,} shown · {categories:,} {noun} · {of_label} · {of_split}"


_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1.2em clamp(.8em, 3vw, 2.5em); max-width: 120em }
h1 { font-size: 1.6em; margin: 0 } header p { margin: .2em 0 1em; opacity: .75 }
nav { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .2em 1.4em; padding: .6em 0;
  background: Canvas }
nav label { cursor: pointer; white-space: nowrap }
details { margin-bottom: 1em } summary { cursor: pointer } pre { white-space: pre-wrap; overflow-wrap: anywhere }
table { border-collapse: collapse; margin: .6em 0; font-size: .9em }
th, td { text-align: left; vertical-align: top; padding: .25em .9em .25em 0; border-bottom: 1px solid #8884 }
td:nth-child(2), td:nth-child(3) { text-align: right; font-variant-numeric: tabular-nums }
td { overflow-wrap: anywhere }
figcaption span:nth-child(1) { font-weight: 600 } figcaption span:nth-child(n + 3) { opacity: .7 }
figcaption span:nth-child(2)::before { content: "●"; margin-right: .4em; color: #8a8f98 }
.normal span:nth-child(2)::before { color: #2ea043 } .anomalous span:nth-child(2)::before { color: #ff2d55 }
body:has(#marks:not(:checked)) .picture svg { display: none }
body:has(#only-normal:checked) .anomalous, body:has(#only-anomalous:checked) .normal { display: none }
"""

_CONTROLS = """<nav><label><input type="checkbox" id="marks" checked> marks</label>
<label><input type="radio" name="only" checked> all</label>
<label><input type="radio" name="only" id="only-anomalous"> anomalous</label>
<label><input type="radio" name="only" id="only-normal"> normal</label></nav>"""


def _page(title: str, tiles: list[_Tile], counts: Counter[_Entry], problem: str, side: int) -> bytes:
    title, summary = html.escape(printable(title)), html.escape(_summary(counts, len(tiles)))
    problems = f"<details open><summary>problems</summary><pre>{html.escape(problem)}</pre></details>"
    figures = [pictures.figure(tile, *_lines(entry, tile), entry.name, kind=_kind(entry)) for entry, tile in tiles]
    newline = "\n"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{pictures.POLICY}">
<title>{title}</title><style>{pictures.STYLE}{_STYLE}</style></head>
<body><header><h1>{title}</h1><p>{summary}</p></header>
{problems if problem else ""}<details><summary>what there is</summary>{_table(counts)}</details>
{_CONTROLS}
<main class="pictures">
{newline.join(figures)}
</main></body></html>
"""
    return page.encode()


def _kind(entry: _Entry) -> str:
    return entry.label if entry.label in ("normal", "anomalous") else ""


def _table(counts: Counter[_Entry]) -> str:
    categories: dict[str, Counter[str]] = defaultdict(Counter)
    defects: dict[str, Counter[str]] = defaultdict(Counter)
    for entry, count in counts.items():
        categories[entry.category][entry.label] += count
        if entry.defect:
            defects[entry.category][entry.defect] += count
    rows = []
    for category, labels in sorted(categories.items()):
        listed = ", ".join(f"{defect} {count:,}" for defect, count in sorted(defects[category].items()))
        cells = [category, f"{labels['normal']:,}", f"{labels['anomalous']:,}", listed]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in ("category", "normal", "anomalous", "defects"))
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


_DOTS = {"normal": TRUTH, "anomalous": MARK, "": "#8a8f98"}


def _image(title: str, tiles: list[_Tile], counts: Counter[_Entry], problem: str, side: int) -> bytes:
    size = max(10, min(14, side // 14))
    plain, bold, large = drawing.font(size), drawing.font(size, bold=True), drawing.font(26, bold=True)
    line, gap, margin = round(size * 1.45), side // 12, 28
    columns = _columns(len(tiles))
    width = max(columns * (side + gap) - gap, 480) + 2 * margin
    summary = _summary(counts, len(tiles)) + (" · the data set has problems" if problem else "")
    header = drawing.wrapped(summary, plain, width - 2 * margin, 9)
    top = margin + 40 + line * len(header) + gap
    height = side + 4 * line + 6 + gap
    sheet = Image.new("RGB", (width, top + -(-len(tiles) // columns) * height + margin - gap), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, margin - 6), drawing.fitted(printable(title), large, width - 2 * margin), INK, large)
    pen.text((margin, margin + 34), "\n".join(header), FAINT, plain, spacing=line - size)
    for number, (entry, picture) in enumerate(tiles):
        x, y = margin + number % columns * (side + gap), top + number // columns * height
        pen.rounded_rectangle((x, y, x + side - 1, y + side - 1), 6, "#eef1f4")
        if picture.image:
            drawn = pictures.drawn(picture, side)
            sheet.paste(drawn, (x + (side - drawn.width) // 2, y + (side - drawn.height) // 2))
        if picture.problem:
            lines = "\n".join(drawing.wrapped(picture.problem, plain, side - 16, side // line - 1))
            x_, y_, anchor = (x + 8, y + side - 8, "ld") if picture.image else (x + side / 2, y + side / 2, "mm")
            pen.multiline_text((x_, y_), lines, "#b3261e", plain, anchor=anchor, align="center")
        for row, text in enumerate((*_lines(entry, picture), entry.name)):
            at = y + side + 6 + row * line
            if dot := size if row == 1 else 0:
                pen.ellipse((x, at + size * 0.3, x + size * 0.6, at + size * 0.9), _DOTS[_kind(entry)])
            font = plain if row else bold
            pen.text((x + dot, at), drawing.fitted(text, font, side - dot), INK if row < 2 else FAINT, font)
    return png(sheet)


def _columns(tiles: int) -> int:
    wide = max(4, round((1.6 * tiles) ** 0.5))  # a sheet a little wider than high, with few empty places
    return min(tiles, min(range(wide * 3 // 4, wide * 5 // 4 + 1), key=lambda n: (-tiles % n, abs(n - wide))))
