"""Report of a conversion: `conversion.json`, and the table on the terminal."""

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from adfm.data import duplicates, inventory, splits
from adfm.data.contradictions import near_duplicates_with_two_labels
from adfm.data.inventory import Inventory
from adfm.data.problems import EXAMPLES
from adfm.params import Split
from adfm.records import SPLITS
from adfm.text import printable, shortened

# A cluster of near-duplicates above both, in images and as a share of its category, gets a warning.
_FEW, _LARGE_SHARE = 10, 0.25
# Of the table: defects by name, lines of a list, characters of a name and of a line.
_DEFECTS, _LINES, _NAME, _WIDTH = 10, 3, 30, 118
_SOME = 3  # names of a longer list


def notes(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Count the images by `note`, the most frequent first, with the first few of each as `examples`."""
    images: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        for row in pq.read_table(run, columns=["source", "notes"]).to_pylist():
            for note in row["notes"]:
                images[note] += 1
                examples[note] = [*examples[note], row["source"]][:EXAMPLES]
    return [{"note": note, "images": count, "examples": examples[note]} for note, count in images.most_common()]


def report(
    images: pa.Table,
    pairs: duplicates.Pairs,
    assigned: NDArray[np.int8],
    settings: Split,
    notes: list[dict[str, Any]],
    marks: dict[str, Any],
    files: Inventory,
    missing: list[str],
) -> dict[str, Any]:
    """Return the part of `conversion.json` about images and files.

    Args:
        images: The columns of `splits.COLUMNS`, and `boxes`, `fragments`, `unmarked` and `source`.
        pairs: Near-duplicates.
        assigned: The split of each image.
        settings: The section `split`.
        notes: As `notes` returns them.
        marks: As `contradictions.marked_differently` returns it.
        files: The files of the data set.
        missing: The problems of annotations whose image is missing, which `convert.missing: skip` skips.
    """
    clusters = duplicates.clusters(pairs)
    kept_together = clusters if settings.near_duplicates else []
    together = pairs[: len(pairs) if settings.near_duplicates else 0]
    two_labels = near_duplicates_with_two_labels(images, pairs)
    counts = _counts(images, assigned)
    normal, anomalous = (pc.equal(images["label"], name) for name in ("normal", "anomalous"))
    boxes, fragments = images["boxes"], images["fragments"]
    return {
        "dataset": images["dataset"][0].as_py(),
        "images": len(images),
        "normal": pc.sum(normal).as_py(),
        "anomalous": pc.sum(anomalous).as_py(),
        "image_level_labels": pc.sum(pc.and_(anomalous, pc.equal(boxes, 0))).as_py(),
        "unmarked_images": pc.sum(images["unmarked"]).as_py() or 0,
        "boxes": {"before_dilation": pc.sum(fragments).as_py(), "after_dilation": pc.sum(boxes).as_py()},
        "identical_images": len(splits.repeated(images["sha256"].combine_chunks())),
        "identical_images_marked_differently": marks,
        "near_duplicates": {
            "clusters": len(clusters),
            "images": sum(map(len, clusters)),
            "clusters_in_several_splits": sum(len(np.unique(assigned[cluster])) > 1 for cluster in clusters),
            "two_labels": two_labels,
        },
        "parts": {name: _parts(images[column]) for name, column in (("split.group", "part"), ("layout", "group"))}
        | {"roboflow": _parts(images["photograph"])},
        "moved": splits.moved(images, together, assigned, settings),
        "counts": counts,
        "notes": notes,
        "files": {
            "total": files.files,
            "images": files.images,
            "annotations_and_masks": files.annotations,
            "left_out": sum(row["files"] for row in files.left_out),
        },
        "left_out": files.left_out,
        "official_splits_kept": splits.official_kept(images, settings),
        "kinds_missing": _kinds_missing(counts, settings.holdout_categories),
        "missing": {"annotations": len(missing), "examples": missing[:EXAMPLES]},
        "warnings": [*_warnings(images, assigned, files, marks, two_labels, kept_together)],
    }


def _parts(column: pa.ChunkedArray) -> dict[str, int]:
    parts = pc.count_distinct(column.drop_null().cast(pa.string())).as_py()
    return {"parts": parts, "images": len(column) - column.null_count}


def _counts(images: pa.Table, assigned: NDArray[np.int8]) -> list[dict[str, Any]]:
    columns = ["split", "category", "label", "defect"]
    table = images.select(columns[1:]).add_column(0, "split", pa.array(assigned))
    groups = table.group_by(columns).aggregate([([], "count_all")]).select([*columns, "count_all"])
    rows = [row | {"split": SPLITS[row["split"]]} for row in groups.rename_columns([*columns, "images"]).to_pylist()]
    return sorted(rows, key=lambda row: [row[name] or "" for name in columns])


def _kinds_missing(counts: list[dict[str, Any]], held_out: Sequence[str]) -> dict[str, list[str]]:
    """Return the kinds of defect of which a split has no image, by split, for splits that have any anomalous image."""
    several = len({row["category"] for row in counts}) > 1
    kinds: dict[str, set[str]] = {split: set() for split in SPLITS}
    for row in counts:
        if row["label"] == "anomalous" and row["category"] not in held_out:  # those are in test alone, on purpose
            names = (kind or "without a name" for kind in splits.kinds_of(row["defect"]))
            kinds[row["split"]].update(f"{row['category']}/{name}" if several else name for name in names)
    every = set().union(*kinds.values())
    return {split: sorted(every - its) for split, its in kinds.items() if its and every - its}


def _warnings(
    images: pa.Table,
    assigned: NDArray[np.int8],
    files: Inventory,
    marks: dict[str, Any],
    two_labels: dict[str, Any],
    clusters: Sequence[NDArray[np.int64]],
) -> Iterator[str]:
    if not (assigned == SPLITS.index("train")).any():
        yield "no image is for training: the data set fixes none for it; split.redivide=true divides all of it"
    for row in files.left_out:
        if row["reason"] in inventory.LOST:  # they may hold images which the user expects to be converted
            yield f"{row['files']} {row['kind']} left out: {row['reason']}; e.g. {row['examples'][0]}"
    if marks["pictures"]:
        number, copies = _plural(marks["pictures"], "picture", "pictures"), " and ".join(marks["examples"][0])
        yield f"copies of {number} have different boxes or defects, e.g. {copies}"
    if two_labels["pairs"]:
        number, pair = _plural(two_labels["pairs"], "pair", "pairs"), " and ".join(two_labels["examples"][0])
        yield f"{number} of pictures that look like copies: one is normal and one anomalous, e.g. {pair}"
    of_category = {row["values"]: row["counts"] for row in pc.value_counts(images["category"]).to_pylist()}
    for cluster in clusters:
        for row in pc.value_counts(images["category"].take(cluster)).to_pylist() if len(cluster) > _FEW else ():
            category, total = row["values"], of_category[row["values"]]
            if row["counts"] > max(_FEW, _LARGE_SHARE * total):
                yield (
                    f"{row['counts']} of the {total} images of {category} look like copies of one picture, so they are"
                    " all in one split; if they show different parts, set split.near_duplicates to false"
                )


def table(report: dict[str, Any], out: Path, seconds: float) -> str:
    """Return the table for the terminal: at most 25 lines of plain text, whatever the names in the data set."""
    splits_, defects, categories = Counter[str](), Counter[str](), set()
    for row in report["counts"]:
        splits_[row["split"]] += row["images"]
        categories.add(row["category"])
        for name in splits.kinds_of(row["defect"]) if row["label"] == "anomalous" else ():
            defects[name] += row["images"]
    listed = [f"{_short(name) or 'without a name'} {count:,}" for name, count in defects.most_common(_DEFECTS)]
    if len(defects) > _DEFECTS:
        listed.append(f"and {len(defects) - _DEFECTS} more")
    lines = textwrap.wrap(", ".join(listed), _WIDTH - 25, break_on_hyphens=False, max_lines=3, placeholder=" …")
    level, boxes = report["image_level_labels"], report["boxes"]["after_dilation"]
    files, missing, parts = report["files"], report["missing"], report["parts"]["split.group"]
    by_group = ("parts", f"{parts['parts']:,}", f"on {parts['images']:,} images, by split.group")
    rows = [
        ("images", f"{report['images']:,}", _plural(len(categories), "category", "categories")),
        ("normal", f"{report['normal']:,}", ""),
        ("anomalous", f"{report['anomalous']:,}", f"{level:,} with a label alone, without boxes" if level else ""),
        ("boxes", f"{boxes:,}", ""),
        ("defects", f"{len(defects):,}", lines[0] if lines else ""),
        *(("", "", line) for line in lines[1:]),
        ("splits", "", ", ".join(f"{name} {splits_[name]:,}" for name in SPLITS)),
        *_not_in_every_split(report["kinds_missing"]),
        *([by_group] if parts["parts"] else []),
        ("annotations", f"{files['annotations_and_masks']:,}", "files, masks included"),
        ("left out", f"{files['left_out']:,}", "files" if files["left_out"] else ""),
        *_more(_left_out(report["left_out"])),
    ]
    if missing["annotations"]:
        example = f"annotations without image, e.g. {missing['examples'][0]}"
        rows.append(("skipped", f"{missing['annotations']:,}", example))
    rows += _more([("note", f"{row['images']:,}", f"{_noun(row)}: {row['note']}") for row in report["notes"]])
    rows += _more([("moved", f"{row['images']:,}", _moved(row)) for row in report["moved"]])
    rows.append(("seconds", f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}", ""))
    head = f"{out}: {_short(report['dataset'])}, layout {report['layout']['name']}"
    body = [shortened(printable(f"  {name:<12}{count:>9}  {text}").rstrip(), _WIDTH) for name, count, text in rows]
    return "\n".join([printable(head), *body])


def _not_in_every_split(missing: dict[str, list[str]]) -> list[tuple[str, str, str]]:
    """Return one line on the kinds of defect that a split lacks: those that cannot be judged first."""
    kinds = set().union(*missing.values())
    words = {"test": "not in test, so not judged", "train": "not in train", "validation": "not in validation"}
    parts = [f"{words[split]}: {_some(missing[split])}" for split in words if split in missing]
    return [("rare", f"{len(kinds):,}", "; ".join(parts))] if kinds else []


def _left_out(left_out: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return one line on the files that are left out for each reason."""
    by_reason: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in left_out:
        by_reason[row["reason"]].append(row)
    lines = []
    for reason, rows in by_reason.items():
        kinds, example = _some([row["kind"] for row in rows]), _short(rows[0]["examples"][0])
        lines.append(("", f"{sum(row['files'] for row in rows):,}", f"{kinds} (e.g. {example}): {reason}"))
    return lines


def _moved(row: dict[str, Any]) -> str:
    why = {"copies": "a copy", "part": "the same part or photograph", "near-duplicates": "a near-duplicate"}
    return f"{_noun(row)} from {row['from']} to {row['to']}: {why[row['because']]} is there"


def _more(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    if len(rows) <= _LINES:
        return rows
    return [*rows[: _LINES - 1], (rows[0][0], "", f"and {len(rows) - _LINES + 1} more kinds, see conversion.json")]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(_short, names[:_SOME])) + (", …" if len(names) > _SOME else "")


def _noun(row: dict[str, Any]) -> str:
    return "image" if row["images"] == 1 else "images"


def _plural(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _NAME else f"…{name[-_NAME + 1 :]}"
