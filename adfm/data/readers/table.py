"""A folder of images and CSV files: `image,label,defect,x1,y1,x2,y2`, a row a box or a normal image.

parts.csv    and    000.jpg    or    images/000.jpg

Also TensorFlow's and Roboflow's `filename,width,height,class,xmin,ymin,xmax,ymax`, a table in each folder of a split;
tables of labels without boxes; and, without names of columns, RetinaNet's `000.jpg,x1,y1,x2,y2,class` and ELPV's
`000.png 0.33 mono`, the probability of a defect.
"""

import csv
import difflib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from adfm.data.problems import Unlisted
from adfm.data.readers import verdicts
from adfm.data.readers.annotations import Shape, box, bracketed, sample
from adfm.data.readers.files import IMAGES, DataSet, NoImage, holds, images, listing, root, split_of, walk, within
from adfm.data.readers.textfiles import decimal, encoding_of, pixel_size, text
from adfm.data.readers.verdicts import class_name
from adfm.records import Box, Label, Sample, Split

FORM = "*.jpg, *.csv with the columns image, label, defect, x1, y1, x2, y2 or filename, class, xmin, ymin, xmax, ymax"
_SIDES = ("x1", "y1", "x2", "y2")
_COLUMNS = ("image", "label", "defect", *_SIDES, "category", "split", "mask")
# What other tools call the columns. The first of a row that is there counts.
_NAMES = {
    "image": ("image", "filename", "file_name", "file", "path", "image_path", "file_path", "filepath", "image_name"),
    "label": ("label", "target", "is_anomaly", "is_anomalous", "is_defective", "anomalous", "defective"),
    "defect": ("defect", "class", "class_name", "defect_type"),
    "x1": ("x1", "xmin", "x_min"),
    "y1": ("y1", "ymin", "y_min"),
    "x2": ("x2", "xmax", "x_max"),
    "y2": ("y2", "ymax", "y_max"),
    "category": ("category",),
    "split": ("split", "subset"),
    "mask": ("mask", "mask_path"),
    "probability": ("probability",),
}
SIDES = frozenset(name for side in _SIDES for name in _NAMES[side])
# fmt: off
MAY_BE_BOXES = frozenset(
    (
        "x", "y", "w", "h", "x0", "y0", "cx", "cy", "xc", "yc", "x_center", "y_center", "x_centre", "y_centre",
        "left", "top", "right", "bottom", "bbox", "bndbox", "box", "boxes", "polygon", "points", "segmentation",
        "region_shape_attributes", "rle", "encodedpixels"
    )
)
# fmt: on
_NOTHING = ("", "-", "none")
_YES_OR_NO = {"true": "1", "yes": "1", "y": "1", "false": "0", "no": "0", "n": "0"}  # to `is_anomaly` and alike
# Tables of other layouts: of VisA, and of Hugging Face's imagefolder.
_OTHERS = frozenset(("image_anno.csv", "1cls.csv", "2cls_fewshot.csv", "2cls_highshot.csv", "metadata.csv"))
_UNCERTAIN = "its label is uncertain: the probability of a defect is neither 0 nor 1, and counts from 0.5"


@dataclass(frozen=True, slots=True)
class _Header:
    names: tuple[str, ...]  # of the columns, in lower case
    columns: dict[str, int]  # the place of each column that is known, by its name in `_NAMES`
    further: dict[str, int]  # the places of those that are not, by their names
    line: int  # 0: the table has none

    def name(self, column: str) -> str:
        """Return what the table calls a column."""
        return self.names[self.columns[column]]


@dataclass(frozen=True, slots=True)
class _Row:
    table: Path
    line: int
    label: Label
    category: str
    split: Split | None
    defect: str
    box: Box | None
    mask: Path | None
    marking: str  # "mask", "box" or ""
    size: tuple[int, int] | None
    columns: dict[str, str]
    notes: tuple[str, ...]


def matches(raw: Path) -> bool:
    """Whether there is a CSV file with images and labels, near the top."""
    return holds(raw, lambda folder: bool(_tables(folder)))


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images of the tables, in their order.

    Columns, in any order: `image` (path, from the table's folder or from images/ in it or beside it) and `label`; for
    defects `defect` (its name; "defect" if there is none), and either `x1`, `y1`, `x2`, `y2` (pixels, half-open) or
    `mask` (path of a pixel mask). May be there: `category` (the data set's name otherwise) and `split` (train,
    validation or test; otherwise what the folders or the table are called). A label is normal or 0, anomalous or 1,
    or a word that means the same (see `verdicts`). An image with several defects has several rows.
    Instead of `label` there may be the name of the defect alone, or normal, in `class`; or a `probability` of a
    defect, which is normal below 0.5. In a table without columns for boxes or masks the label is all that is known.
    Further columns are for `split.group`. Columns are separated by comma, semicolon, tab, `|` or blanks. The tables are
    in memory.
    """
    data = DataSet(raw, "csv")
    base = root(raw, lambda folder: any(map(_tables, walk(folder, 2))))
    tables = [table for folder in walk(base, 2) for table in _tables(folder)] if base else list(listing(raw, ".csv"))
    rows_of: dict[Path, list[_Row]] = {}
    image_columns = {table: _add_rows(data, table, rows_of) for table in tables}
    masks = {row.mask for rows in rows_of.values() for row in rows if row.mask}
    if all(image_columns.values()):  # rows that cannot be read may name any image
        data.problems += _unlisted(data, rows_of.keys() | masks, image_columns)
    for image, rows in rows_of.items():
        if rows:
            yield _sample(data, image, rows)
    data.finish("a CSV file with at least the columns image and label is missing")


def _sample(data: DataSet, image: Path, rows: list[_Row]) -> Sample:
    first = rows[0]
    notes = [note for row in rows for note in row.notes]
    unique = list({(row.defect, row.box, row.mask): row for row in reversed(rows)}.values())[::-1]
    if len(unique) < len(rows):
        notes.append("a row of the table is repeated; it counts once")
    shapes = [Shape(row.defect, row.box) for row in unique if row.box]
    split = first.split or data.split(image) or split_of(first.table.stem)
    located = first.label == "normal" or bool(first.marking)
    # A column on which the rows of an image differ says nothing of the image.
    columns = {name: cell for name, cell in first.columns.items() if all(row.columns[name] == cell for row in rows)}
    one = sample(data, image, shapes, split, notes, size=first.size, located=located, columns=columns)
    category, defect = first.category or one.category, "+".join(sorted({row.defect for row in rows})) or None
    masks = tuple(row.mask for row in unique if row.mask)
    return replace(one, category=category, label=first.label, defect=defect, masks=masks)


def _unlisted(data: DataSet, known: Container[Path], tables: dict[Path, str]) -> Iterator[str]:
    """Yield a problem for each image that is in no row, which names the nearest table above it, else the first."""
    for folder in walk(data.raw) if tables else []:
        above = [table for table in tables if folder.is_relative_to(table.parent)]
        table = max(above, key=lambda table: len(table.parts), default=next(iter(tables)))
        where = f"{data.relative(table)}, in its column {tables[table]!r}"
        remedy = "add a row (for a normal image its name and `normal`, the other cells empty), or remove the image"
        for image in images(folder):
            if image not in known:
                yield Unlisted(f"{data.relative(image)}: is in no row of {where}; {remedy}")


def _tables(folder: Path) -> list[Path]:
    return [file for file in listing(folder, ".csv") if file.name not in _OTHERS and _is_table(file)]


def _is_table(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            start = opened.read(20_000)
        header = _header(*next(_rows(start.decode(encoding_of(start), errors="replace")), (1, [])), strict=False)
    except (OSError, ValueError, csv.Error):
        return False
    return "image" in header.columns and bool(header.columns.keys() & {"label", "defect", "probability"})


def _rows(content: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table that are not empty, each with the number of its last line."""
    # The first line says what separates the columns: what it has most of.
    first = next(iter(content[:20_000].lstrip().splitlines()), "")
    declared = re.fullmatch(r"sep=(.)", first.strip())  # a line that Excel reads and writes
    delimiter = declared[1] if declared else max(",;\t|", key=first.count)
    file: Iterable[str] = io.StringIO(content, newline="")
    if delimiter not in first:  # blanks, as ELPV has them
        delimiter = " "
        file = (line.strip() + "\n" for line in file)
    reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
    for cells in reader:
        cells = [cell.strip() for cell in cells]
        if any(cells) and not (declared and reader.line_num == 1):
            yield reader.line_num, cells


def _header(line: int, cells: list[str], strict: bool = True) -> _Header:
    """Read what the columns are, by the first row; `strict`: what is missing is an error."""
    names = _nameless(cells)
    line = 0 if names else line
    names = names or [cell.lower() for cell in cells]
    while names and not names[-1]:  # a spreadsheet adds empty cells at the end
        names.pop()
    known = {column: next((name for name in others if name in names), "") for column, others in _NAMES.items()}
    columns = {column: names.index(name) for column, name in known.items() if name}
    if columns.keys() & {"label", "defect"}:
        columns.pop("probability", None)
    unknown = {name: names.index(name) for name in names if name and names.index(name) not in columns.values()}
    # pandas calls the column of its index `Unnamed: 0`.
    further = {name: place for name, place in unknown.items() if not name.startswith("unnamed:")}
    if strict and (wrong := _wrong(names, columns, further)):
        raise ValueError(f"line {max(line, 1)}: {'; '.join(wrong)} (known: {', '.join(_COLUMNS)})")
    return _Header(tuple(names), columns, further, line)


def _nameless(cells: list[str]) -> list[str] | None:
    """Return the names of the columns of a table whose first row has an image already; `None` for other tables."""
    if PurePosixPath(cells[0] if cells else "").suffix.lower() not in IMAGES:
        return None
    names = {2: ["image", "label"], 3: ["image", "probability", "type"], 6: ["image", *_SIDES, "class"]}
    is_other = len(cells) == 3 and not re.fullmatch(r"[01](\.\d+)?", cells[1])
    return None if is_other else names.get(len(cells))


def _wrong(names: list[str], columns: dict[str, int], further: dict[str, int]) -> list[str]:
    counts = Counter(name for name in names if name)
    wrong = [f"the column {name!r} is there {count} times" for name, count in counts.items() if count > 1]
    needed = ["image"] if "image" not in columns else []
    needed += [] if columns.keys() & {"label", "defect", "probability"} else ["label"]
    sides = _SIDES if columns.keys() & set(_SIDES) else ()
    unused = [column for column in _COLUMNS if column not in columns and (needed or column not in ("image", "label"))]
    for name in further:
        # What looks like a name that is known, mistyped, would be left out in silence.
        for near in difflib.get_close_matches(name, unused, n=1, cutoff=0 if needed else 0.77):
            wrong.append(f"the column {name!r} is unknown; the nearest is {near!r}")
    if not sides and (drawn := sorted(MAY_BE_BOXES & further.keys())):
        wrong.append(f"{', '.join(map(repr, drawn))} may say where the defects are; write boxes as x1, y1, x2, y2")
    return wrong + [f"the column {column!r} is missing" for column in (*needed, *sides) if column not in columns]


def _add_rows(data: DataSet, table: Path, rows_of: dict[Path, list[_Row]]) -> str:
    """Add the rows of a table to those of each image; return what it calls the column of the images, "" on an error."""
    where = data.relative(table)
    line, read, header = 0, False, None
    bases = _bases(data.raw, table)
    with data.at(where):
        try:
            for line, cells in _rows(text(table)):
                if header is None:
                    header = _header(line, cells)
                    if header.line:
                        continue
                read = True
                with data.at(f"{where}: line {line}"):
                    length = len(header.names)
                    if not any(cells[length:]):  # a spreadsheet adds empty cells at the end
                        cells = cells[:length]
                    if len(cells) != length:
                        raise ValueError(f"has {len(cells)} cells, and the first line has {length}")
                    name = cells[header.columns["image"]]
                    image = _file(data, bases, name)
                    if not image:
                        raise NoImage(f"file {name!r} is missing in {table.parent.resolve().name}")
                    rows = rows_of.setdefault(image, [])
                    row = _row(data, table, line, header, cells)
                    _agree(data, name, rows, row)
                    rows.append(row)
        except csv.Error as error:
            raise ValueError(f"line {line + 1}: is not CSV ({error})") from error
        if not read:
            data.add(where, "has no rows")
        return header.name("image") if header else "image"
    return ""


def _row(data: DataSet, table: Path, line: int, header: _Header, cells: list[str]) -> _Row:
    values = {column: cells[place] for column, place in header.columns.items()}
    mask, sides = values.get("mask", ""), [values.get(side, "") for side in _SIDES]
    split = split_of(values.get("split", ""))
    if values.get("split") and not split:
        raise ValueError(f"the split {values['split']!r} is not train, validation or test")
    has_box, has_mask = any(sides), bool(mask)
    label, defect, notes = _judgement(header, values, marked=has_box or has_mask)
    can_be_marked = header.columns.keys() & {"x1", "mask"}
    if label == "anomalous" and can_be_marked and has_box == has_mask:
        column = next(column for column in ("label", "defect", "probability") if column in values)
        word = values[column].lower() if column == "label" else values[column]
        needed = "either x1, y1, x2 and y2 or a mask is needed, not both"
        raise ValueError(f"the {header.name(column)} is {word}, so that {needed}")
    path = _file(data, [[table.parent]], mask) if mask else None
    if mask and not path:
        raise ValueError(f"file {mask!r} is missing in {table.parent.resolve().name}")
    drawn = None
    if has_box:
        drawn = box(*(_number(header.name(name), side) for name, side in zip(_SIDES, sides, strict=True)))
        if drawn.x2 <= 1 and drawn.y2 <= 1:
            raise ValueError(f"the box {bracketed(drawn)} is not larger than a pixel; write pixels, not fractions")
    # The size of the image is not one of the further columns where boxes are drawn on it.
    further, size = list(header.further), None
    if "x1" in header.columns:
        further = [name for name in further if name not in ("width", "height")]
        if header.further.keys() >= {"width", "height"}:
            size = pixel_size(cells[header.further["width"]], cells[header.further["height"]], as_text=True)
    if further:
        notes = (*notes, f"columns that only split.group reads: {', '.join(further)}")
    columns = {name: cells[header.further[name]] for name in further}
    if "probability" in values:
        columns["probability"] = values["probability"]
    category, defect = values.get("category", ""), class_name(defect) if label == "anomalous" else ""
    marking = "mask" if path else "box" if drawn else ""
    return _Row(table, line, label, category, split, defect, drawn, path, marking, size, columns, notes)


def _judgement(header: _Header, values: dict[str, str], marked: bool) -> tuple[Label, str, tuple[str, ...]]:
    """Return whether a row says normal or anomalous, the name of the defect, and notes."""
    defect = values.get("defect", "")
    if "label" in values:
        word = values["label"].lower()
        if header.name("label") not in ("label", "target"):
            word = _YES_OR_NO.get(word, word)
        if is_normal(word):
            if marked or not (defect.lower() in _NOTHING or is_normal(defect.lower())):
                raise ValueError(f"the label is {word}, but there is a defect, a box or a mask")
            return "normal", "", ()
        if is_anomalous(word):
            return "anomalous", defect or "defect", ()
        if marked and "defect" not in values and not _is_number(word):
            return "anomalous", values["label"], ()  # VoTT, for one, calls the class so
        raise ValueError(f"the label {values['label']!r} is unknown; write normal or anomalous, OK or NG, or 0 or 1")
    if "defect" in values:
        if not header.line and not marked and not defect:
            return "normal", "", ()  # RetinaNet's row of an image without defects has its name alone
        return (*_of_class(header.name("defect"), defect, marked), ())
    chance = _number(header.name("probability"), values["probability"])
    if not 0 <= chance <= 1 or chance == 0.5:
        raise ValueError(f"the probability {values['probability']} is not below or above 0.5, from 0 to 1")
    if marked and chance < 0.5:
        raise ValueError(f"the probability is {values['probability']}, but there is a box or a mask")
    return "anomalous" if chance > 0.5 else "normal", "defect", (_UNCERTAIN,) if 0 < chance < 1 else ()


def _of_class(column: str, name: str, marked: bool) -> tuple[Label, str]:
    """Return what a row says in a table without a column `label`."""
    if marked:
        return "anomalous", f"class {name}" if name.isdecimal() else name
    word = name.lower()
    if not word:
        raise ValueError(f"its {column} is empty; write `normal`, or the kind of the defect")
    if column == "defect":
        word = _YES_OR_NO.get(word, word)
        if word == "1":
            return "anomalous", "defect"
    elif _is_number(word) or word in _YES_OR_NO:
        raise ValueError(f"its {column} is {name!r}, which may mean either; write `normal`, or the kind of the defect")
    return ("normal", "") if word in _NOTHING or is_normal(word) else ("anomalous", name)


def is_normal(label: str) -> bool:
    """Whether a label says normal, as a word or as the number 0."""
    return label == "0" or verdicts.is_normal(label)


def is_anomalous(label: str) -> bool:
    """Whether a label says anomalous, as a word or as the number 1."""
    return label == "1" or verdicts.is_anomalous(label)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _number(name: str, written: str) -> float:
    if re.fullmatch(r"[-+]?\d+,\d*", written):
        raise ValueError(f"{name} is {written!r}; write it with a decimal point: {written.replace(',', '.')}")
    return decimal(written, name)


def _bases(raw: Path, table: Path) -> list[list[Path]]:
    """List the folders of a table's images, in groups: its own, images/ or one of its name there; or those beside."""
    # The scripts that make `images/train_labels.csv` for TensorFlow have the images in `images/train`, and those that
    # make `data/train_labels.csv` in `images`.
    name = re.sub(r"[-_ ]?(labels?|annotations?)$", "", table.stem, flags=re.IGNORECASE)
    here, above = table.parent, table.parent.parent / "images"
    groups = [[here, here / "images", here / name, here / "images" / name], [above, above / name]]
    return [[base for base in group if base.is_relative_to(raw) and base.is_dir()] for group in groups]


def _file(data: DataSet, groups: list[list[Path]], name: str) -> Path | None:
    """Return the file that a table names, in the first group of folders that has it."""
    slashed = name.replace("\\", "/")
    for written in dict.fromkeys((name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))):
        for group in groups if written else []:
            bases = group[:1] if ".." in written else dict.fromkeys(group)
            paths = [path for base in bases if (path := within(data.raw, base, written))]
            if len(paths) > 1:
                several = ", ".join(map(data.relative, paths))
                raise ValueError(f"the file {name!r} may be any of {several}; write its folder with it")
            if paths:
                return paths[0]
    return None


def _agree(data: DataSet, name: str, rows: list[_Row], row: _Row) -> None:
    """Raise `ValueError` if a row contradicts the earlier rows of its image."""
    for other in rows[:1]:  # with which all the earlier ones agree
        if other.table != row.table:
            raise ValueError(f"{name!r} is in {data.relative(other.table)} too; keep one of them")
        for field in ("label", "category", "split", "size", "marking"):
            was, now, key = getattr(other, field), getattr(row, field), field.replace("marking", "way of marking")
            if was != now:
                raise ValueError(f"line {other.line} has another {key} for {name!r}: {was or 'none'}, not {now}")
