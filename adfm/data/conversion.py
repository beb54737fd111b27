"""Convert a raw data set to shards: `adfm convert RAW OUT`, or in parts.

    adfm convert RAW PART1 --part 1/2      on one machine,
    adfm convert RAW PART2 --part 2/2      on another, and then
    adfm convert RAW OUT --parts PART1 PART2

Images are inspected, divided into splits and written as shards. A conversion that was killed is resumed.
"""

import difflib
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from adfm import __version__
from adfm.data import contradictions, duplicates, inspection, inventory, samples, shards, splits, summary
from adfm.data.duplicates import Looks, Pairs
from adfm.data.images import GreyRange, png, upright
from adfm.data.problems import BadData, MissingImage
from adfm.data.readers import files, resolve
from adfm.errors import AdfmError
from adfm.files import atomic_folder, replacing, write_json
from adfm.params import Convert, Params
from adfm.process import cpus
from adfm.process.progress import bar
from adfm.records import SPLITS, Box, Record, Sample, Split
from adfm.text import printable

RUN = 500  # images of a file in the work folder, the unit in which a conversion is resumed
PART = "inspection.json"
_WORK = "inspected"
# The work folder of an earlier version is not used where that recorded other columns.
_COLUMNS = zlib.crc32(str(inspection.SCHEMA).encode())
T = TypeVar("T")
R = TypeVar("R")


class _Raw(NamedTuple):
    folder: Path
    layout: str
    seen: str | None  # where the layout was detected
    images: int
    grouping: samples.Grouping
    files: inventory.Inventory
    missing: list[str]  # problems that `convert.missing: skip` skips


def convert(raw: Path, out: Path, params: Params, parts: Sequence[Path] = ()) -> None:
    """Write the shards of a raw data set and `conversion.json`; print a table of all images and files, and warnings.

    The same raw data and parameters give the same bytes, in parts or at once, resumed or not.

    PNG and JPEG files in RGB or grey are embedded byte for byte. All others become upright RGB PNGs: transparency is
    dropped; grey of more than 8 bits is scaled from the range of values of all such images together (`grey_range`) to 0
    to 255. Boxes come from the masks; boxes that a person drew are kept, but for rounding errors at the edge.

    Args:
        raw: A folder in a layout that has a reader.
        out: Folder of the shards. If conversion fails, `<out>.partial` keeps what is finished of it for the next one.
        params: The sections `convert` and `split`, and `seed`.
        parts: The folders that `inspect_part` wrote, all of them; without any, the images are inspected here.

    Raises:
        AdfmError: No such folder, layout or category; bad data, all of them in one error; one picture under two labels;
            parts that are missing, or come from other parameters or data; a `split.group` that fits nothing.
    """
    begin = time.monotonic()
    with _listing(out):
        data = _scan(raw, params)
        runs = _joined(parts, data, params) if parts else []
        report = _converted(data, runs, out, params)
    for warning in report["warnings"]:
        print(f"adfm: warning: {printable(warning)}", file=sys.stderr)
    print(summary.table(report, out, time.monotonic() - begin))


def _converted(data: _Raw, runs: list[Path], out: Path, params: Params) -> dict[str, Any]:
    with _resumable(out, data) as folder:
        work = folder / _WORK
        work.mkdir(exist_ok=True)
        runs = runs or _inspected(data, work, params)
        if problems := inspection.frame_problems(runs) + inspection.mask_problems(runs):
            raise BadData(data.folder, data.layout, problems)
        grey_range = inspection.grey_range(runs)
        images, looks = _gathered(runs, work / "thumbnails")
        pairs = duplicates.near_duplicates(looks)
        rows, decode = partial(_rows, runs), partial(upright, bounds=grey_range)
        if problems := contradictions.under_two_labels(data.folder, images, pairs, rows, decode):
            raise BadData(data.folder, data.layout, problems)
        pairs, assigned = _assigned(images, looks, pairs, params)
        marks = contradictions.marked_differently(images, rows)
        report: dict[str, Any] = {
            "layout": {"name": data.layout, "detected": data.seen is not None, "seen": data.seen},
            "params": params.model_dump(include={"seed", "convert", "split"}),
        }
        notes = summary.notes(runs)
        report |= summary.report(images, pairs, assigned, params.split, notes, marks, data.files, data.missing)
        _write(data.folder, runs, assigned, folder, params.convert.shard_images, grey_range)
        shutil.rmtree(work)
        report |= {"grey_range": grey_range, "fingerprint": shards.fingerprint(folder)}
        write_json(report, folder / "conversion.json")
    return report


def inspect_part(raw: Path, out: Path, params: Params, part: int, of: int) -> None:
    """Inspect a part of the images, for `convert(..., parts=...)`: every `of`th run of `RUN`, from the `part`th on.

    Data set and parameters are the same for all parts. A part that was killed is resumed.

    Raises:
        AdfmError: As of `convert`, for the images of this part.
    """
    begin = time.monotonic()
    with _listing(out):
        data = _scan(raw, params)
        with _resumable(out, data) as folder:
            runs = _inspected(data, folder, params, part, of)
            write_json({"part": part, "of": of, "settings": _settings(data.layout, params)}, folder / PART)
            images = sum(pq.read_metadata(run).num_rows for run in runs)
    seconds = time.monotonic() - begin
    print(f"{out}: part {part} of {of}, {images:,} of {data.images:,} images inspected in {seconds:.1f} s")


def _scan(raw: Path, params: Params) -> _Raw:
    if not raw.is_dir():
        raise AdfmError(f"{raw}: no such folder; get a data set there with `adfm fetch URI {raw}`.")
    layout, seen = resolve(raw, params.convert.layout)
    if seen is not None:
        print(f"layout {layout}; seen in {raw}: {seen}", file=sys.stderr)
    # All samples once, to know how many there are, and which files are not used.
    survey = samples.Survey(params.split.group)
    converted, masks = set[str](), set[str]()
    missing: list[str] = []
    try:
        for sample in samples.read(raw, layout, params.convert):
            survey.add(sample)
            converted.add(sample.file)
            masks.update(os.path.relpath(mask, raw) for mask in sample.masks)
    except BadData as error:
        if not survey.images:
            raise
        # The problems are raised again, together with those of the images themselves.
        missing = [one for one in error.problems if isinstance(one, MissingImage)]
    if unknown := [name for name in params.split.holdout_categories if name not in survey.categories]:
        near = difflib.get_close_matches(unknown[0], sorted(survey.categories), n=1, cutoff=0)[0]
        raise AdfmError(
            f"split.holdout_categories: {raw} has no category {', '.join(map(repr, unknown))}; did you mean {near!r}?"
            f" There are: {', '.join(map(printable, sorted(survey.categories)))}."
        )
    inventory_ = inventory.take(raw, converted, masks)
    skipped = missing if params.convert.missing == "skip" else []
    return _Raw(raw, layout, seen, survey.images, survey.grouping(), inventory_, skipped)


@contextmanager
def _resumable(out: Path, raw: _Raw) -> Iterator[Path]:
    """Yield a folder that is kept if the block fails, unless the images are too few for that to save time."""
    with atomic_folder(out, keep_partial=raw.images > RUN) as folder, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's guard; a problem of that image
        yield folder


def _inspected(raw: _Raw, work: Path, params: Params, part: int = 1, of: int = 1) -> list[Path]:
    """Inspect the images of a part that are not inspected yet, and return the file of each run."""
    settings = _settings(raw.layout, params)
    problems: list[str] = []
    runs: list[Path] = []
    unfinished: deque[tuple[Path, _Key, list[Sample]]] = deque()
    total = sum(min(RUN, raw.images - first) for first in range((part - 1) * RUN, raw.images, of * RUN))
    progress = bar(total=total, desc="inspect images", unit="image")

    def samples_to_inspect() -> Iterator[Sample]:
        for number, run in enumerate(_runs(raw, params.convert, problems)):
            if number % of == part - 1:
                path = work / f"{number:06d}.parquet"
                key = _key(pool, raw.folder, run, settings)
                runs.append(path)
                if _read_key(path) == key:
                    progress.update(len(run))
                else:
                    unfinished.append((path, key, run))
                    yield from run

    with progress, ThreadPoolExecutor(cpus.count()) as pool:
        rows: list[dict[str, Any]] = []
        saving: Future[None] | None = None
        # One `map` over all runs: the threads have work while a run is saved and the next one is read.
        for row in map_in_order(pool, partial(inspection.inspect, settings=params.convert), samples_to_inspect()):
            progress.update()
            path, key, run = unfinished[0]
            row["part"] = raw.grouping.part(run[len(rows)])
            rows.append(row)
            if len(rows) == len(run):
                if saving:
                    saving.result()
                saving = pool.submit(_save, rows, path, key)
                rows = []
                unfinished.popleft()
        if saving:
            saving.result()
    for path in runs:
        listed = pq.read_table(path, columns=["problems"])["problems"]
        problems += [problem for some in listed.to_pylist() for problem in some or ()]
    if problems:
        raise BadData(raw.folder, raw.layout, problems)
    for path in set(work.glob("*.parquet*")) - set(runs):  # of more raw data, or of another part
        path.unlink()
    return runs


def _runs(raw: _Raw, settings: Convert, problems: list[str]) -> Iterator[list[Sample]]:
    """Yield the samples, `RUN` at a time; `problems` gets those that the reader raises after its last sample."""
    run = []
    try:
        for sample in samples.read(raw.folder, raw.layout, settings):
            run.append(sample)
            if len(run) == RUN:
                yield run
                run = []
    except BadData as error:
        refuse = settings.missing == "refuse"
        problems += [problem for problem in error.problems if refuse or not isinstance(problem, MissingImage)]
    if run:
        yield run


@contextmanager
def _listing(out: Path) -> Iterator[None]:
    """Write the problems of bad data to `<out>.problems.txt`; that of an earlier conversion is removed."""
    path = out.with_name(f"{out.name}.problems.txt")
    path.unlink(missing_ok=True)
    try:
        yield
    except BadData as error:
        raise error.written(path) from None


def _settings(layout: str, params: Params) -> dict[str, Any]:
    """Return what the inspection of an image depends on besides the image."""
    own = params.convert.model_dump(exclude={"layout", "shard_images"})
    versions = {"adfm": __version__, "pillow": PIL.__version__}
    return {"layout": layout, **own, "group": params.split.group, **versions, "run": RUN, "columns": _COLUMNS}


class _Key(NamedTuple):  # of the files of a run
    content: str
    times: str  # of use in this folder alone: a copy of the data set has others


def _key(pool: ThreadPoolExecutor, raw: Path, samples: Sequence[Sample], settings: dict[str, Any]) -> _Key:
    content, times = hashlib.sha256(json.dumps(settings).encode()), hashlib.sha256()
    for of_content, of_times in pool.map(partial(_identity, raw), samples):
        content.update(of_content.encode())
        times.update(of_times.encode())
    return _Key(content.hexdigest(), times.hexdigest())


def _identity(raw: Path, sample: Sample) -> tuple[str, str]:
    sizes, times = [], []
    for path in (sample.image, *sample.masks):
        try:
            status = path.stat()
            sizes.append(status.st_size)
            times.append(status.st_mtime_ns)
        except OSError:
            sizes.append(-1)
    fields = {name: getattr(sample, name) for name in Sample.__slots__ if name not in ("image", "masks")}
    return repr((fields, [os.path.relpath(path, raw) for path in sample.masks], sizes)), repr(times)


def _read_key(path: Path) -> _Key | None:
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):  # there is none, or it is damaged
        return None
    return _Key(metadata.get(b"content", b"").decode(), metadata.get(b"times", b"").decode())


def _save(rows: list[dict[str, Any]], path: Path, key: _Key) -> None:
    table = pa.Table.from_pylist(rows, schema=inspection.SCHEMA).replace_schema_metadata(key._asdict())
    with replacing(path) as unfinished:
        pq.write_table(table, unfinished, compression="zstd")


def map_in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Map a function over items in threads, only a few items ahead of the consumer."""
    # Threads are enough: Pillow, SciPy and hashing free the interpreter lock.
    ahead: deque[Future[R]] = deque()
    limit = 2 * cpus.count()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > limit:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def _joined(parts: Sequence[Path], raw: _Raw, params: Params) -> list[Path]:
    settings = _settings(raw.layout, params)
    folders = _folders_of_parts(parts, settings)
    runs: list[Path] = []
    problems: list[str] = []
    strangers = set()
    with ThreadPoolExecutor(cpus.count()) as pool:
        for number, run in enumerate(_runs(raw, params.convert, problems)):
            folder = folders[number % len(folders)]
            runs.append(folder / f"{number:06d}.parquet")
            key = _read_key(runs[-1])
            if key is None or key.content != _key(pool, raw.folder, run, settings).content:
                strangers.add(folder)
    strangers |= {folder for folder in folders if set(folder.glob("*.parquet")) - set(runs)}
    if problems:
        raise BadData(raw.folder, raw.layout, problems)
    if strangers:
        listed = "\n".join(f"  {folder}" for folder in sorted(strangers))
        raise AdfmError(f"{raw.folder}: these parts were made from other raw data:\n{listed}")
    return runs


def _folders_of_parts(parts: Sequence[Path], settings: dict[str, Any]) -> list[Path]:
    """Return the folders of all parts, in order; refuse parts that are missing, doubled or of other settings."""
    problems: list[str] = []
    folders: dict[int, Path] = {}
    counts = set()
    for folder in parts:
        try:
            description = json.loads((folder / PART).read_text())
            part, of, its = description["part"], description["of"], description["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            problems.append(f"{folder}: is not a part of a conversion, or not finished")
            continue
        counts.add(of)
        if part in folders:
            problems.append(f"{folder}: is part {part} of {of}, and so is {folders[part]}")
        folders[part] = folder
        if other := [f"{name} {its.get(name)!r}" for name in settings if its.get(name) != settings[name]]:
            problems.append(f"{folder}: was made with {', '.join(other)}")
    if len(counts) > 1:
        problems.append(f"some are parts of {' and others of '.join(map(str, sorted(counts)))}")
    numbers = range(1, max(counts, default=0) + 1)
    problems += [f"part {part} of {len(numbers)} is missing" for part in numbers if part not in folders]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise AdfmError(
            f"these parts are not all of one conversion; make them again with `adfm convert RAW PART --part`:\n{listed}"
        )
    return [folders[part] for part in numbers]


def _gathered(runs: Sequence[Path], path: Path) -> tuple[pa.Table, Looks]:
    """Return what splits and report depend on, of all images; the thumbnails are mapped from the file `path`."""
    # Of these, many images share a value, so that a dictionary saves memory.
    encoded = [name for name in splits.COLUMNS if name not in ("sha256", "photograph")]
    plain = ["source", "sha256", "width", "height", "embedded", "contrast", "fragments", "unmarked"]
    tables, coarse = [], []
    with path.open("wb") as file:
        for run in runs:
            table = pq.read_table(run, columns=[*encoded, *plain, "boxes", "thumbnail"])
            looks = table["thumbnail"].to_pylist()
            thumbnails = np.frombuffer(b"".join(looks), np.float16).reshape(-1, duplicates.SIDE, duplicates.SIDE)
            coarse.append(duplicates.coarse(thumbnails))
            file.write(thumbnails.tobytes())
            sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
            columns = {name: table[name].dictionary_encode() for name in encoded}
            columns |= {name: table[name] for name in plain}
            columns["boxes"] = pc.list_value_length(table["boxes"])
            columns["photograph"] = pa.array(map(samples.photograph, table["source"].to_pylist()), pa.string())
            columns["look"] = pa.array(map(hash, zip(looks, sizes, strict=True)), pa.int64())
            tables.append(pa.table(columns))
    images = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    tables.clear()  # memory peaks below
    contrasts = images["contrast"].to_numpy().copy()
    contrasts[splits.repeated(images["sha256"].combine_chunks())[:, 0]] = 0  # identical ones are together anyhow
    return images, Looks(duplicates.mapped(path), contrasts, np.concatenate(coarse))


def _assigned(images: pa.Table, looks: Looks, pairs: Pairs, params: Params) -> tuple[Pairs, NDArray[np.int8]]:
    """Return the pairs of near-duplicates, with those that a split would divide added, and the split of each image."""
    if not params.split.near_duplicates:
        return pairs, splits.assign(images, pairs[:0], params)
    while True:  # keeping the copies of one pair together may divide those of another
        assigned = splits.assign(images, pairs, params)
        divided = duplicates.near_duplicates_across(looks, assigned)
        if not len(divided):
            return pairs, assigned
        pairs = np.concatenate([pairs, divided])


def _write(
    raw: Path, runs: Sequence[Path], assigned: NDArray[np.int8], folder: Path, size: int, grey_range: GreyRange | None
) -> None:
    plan = hashlib.sha256(b"%d" % size + assigned.tobytes())
    for run in runs:
        plan.update(repr(_read_key(run)).encode())
    written = folder / _WORK / "plan"
    same = written.is_file() and written.read_text() == plan.hexdigest()
    for path in folder.glob("*.parquet.partial" if same else "*.parquet*"):  # of a conversion that was killed
        path.unlink()
    written.write_text(plan.hexdigest())
    progress = bar(total=len(assigned), desc="write shards", unit="image")
    with progress, ThreadPoolExecutor(cpus.count()) as pool:
        for code, split in enumerate(SPLITS):
            # In the order in which they were read: the order of rows decides which images a training step draws.
            images = np.flatnonzero(assigned == code)
            for number, first in enumerate(range(0, len(images), size)):
                path, some = folder / shards.name(split, number), images[first : first + size]
                if path.is_file():
                    progress.update(len(some))
                    continue
                records = map_in_order(pool, partial(_record, raw, split, grey_range), _rows(runs, some))
                shards.write_one((record for record in records if progress.update() or True), path)


def _rows(runs: Sequence[Path], images: NDArray[np.int64], columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield what inspection wrote of some images, in ascending order."""
    left_out = ("thumbnail", "contrast", "problems", "notes")
    columns = columns or [name for name in inspection.SCHEMA.names if name not in left_out]
    for number in np.unique(images // RUN):
        table = pq.read_table(runs[number], columns=columns)
        yield from table.take(images[images // RUN == number] % RUN).to_pylist()


def _record(raw: Path, split: Split, grey_range: GreyRange | None, row: dict[str, Any]) -> Record:
    where = f"{raw}: {printable(row['source'])}"
    try:
        content = files.content(raw / row["file"])
    except OSError as error:
        raise AdfmError(f"{where} cannot be read any more ({error}); convert again.") from error
    if zlib.crc32(content) != row["crc32"]:  # boxes and splits are those of another image
        raise AdfmError(f"{where} has changed since it was inspected; convert again.")
    made: dict[str, Any] = {
        "id": hashlib.sha256(f"{row['source']}\n{row['sha256']}".encode()).hexdigest()[:16],
        "image": content if row["embedded"] else png(upright(content, grey_range)),
        "boxes": tuple(Box(*box) for box in row["boxes"]),
        "split": split,
        "group": row["part"] or row["group"] or samples.photograph(row["source"]),
    }
    return Record(**made, **{name: row[name] for name in shards.COLUMNS.schema.names if name not in made})
