"""Evaluation: several models on the same held-out images, side by side.

The folder that it writes; the candidate is the last model:

    predictions.parquet, <name>.parquet   one row an image: the candidate's, those of any other model
    validation/<name>.parquet             the same of the validation split, on which calibrations are fitted
    guard.json                            which images the model can judge, and how many of the split it cannot
    calibration.json                      the candidate's calibration and threshold, by which it decides once registered
    calibration/<name>.json               those of the other models
    metrics.json                          each model's metrics with intervals; candidate minus each other model
    metrics/<name>.json                   the headline alone, one row a model in `dvc metrics show`
    details.json                          the same by data set, category, defect and size of the defect
    evaluation.json                       what was evaluated: models, split, fingerprint of the shards, settings
    references.json                       the blind answers, how candidate and reference detector compare, and the
                                          verdict in words (adfm/evaluation/verdict.py), which is printed last
    comparison.md, comparison.csv         the tables that are printed, and those for which a terminal is too narrow
    cross-validation.json, .parquet       where `evaluate.folds` is set: what `adfm folds` wrote
    plots/                                confusion.csv, roc.csv, iou_by_size.csv for DVC; figures as PNG;
                                          kinds.csv, of rows only if the candidate's prompt asks for kinds
    report/                               report.html, the page for people to look at, and its pictures

Every table has what the model wrote (`predicted`, its letter) and what it would do in production: `probability`, the
calibrated score, and `decision`, the label at the threshold. Both are fitted on the validation split
(`adfm.evaluation.calibration`) and measured on the split that is evaluated. A registered version is shown with the
calibration that it was registered with. Where validation itself is evaluated, or there is none, letters decide.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from adfm import tracking
from adfm.data import shards as shards_
from adfm.data import tiles
from adfm.errors import AdfmError
from adfm.evaluation import calibration, crossvalidation, guard, metrics, plots, predictions, references, verdict
from adfm.evaluation import report as page
from adfm.evaluation.calibration import DECIDED, Calibration
from adfm.evaluation.predictions import KINDS
from adfm.files import atomic_folder, digest, replace_text, write_json
from adfm.models import loading, model_folder, versions
from adfm.params import Params
from adfm.text import markdown

if TYPE_CHECKING:
    import pandas as pd

_TERMINAL = 100  # columns
_CALIBRATION = {
    "ece_of_score": "calibration error, score",
    "ece": "calibration error, probability",
    "threshold": "threshold",
    **{f"{metric}_at_threshold": f"{plots.TITLES.get(metric, metric)} at threshold" for metric in metrics.AT_THRESHOLD},
    "miss_rate_at_threshold": "escape rate at threshold",
}

_OF_ALL = ("images", "normal", "anomalous", "without_boxes")
"""Counts of the images, which all models have in common."""


def evaluate(models: dict[str, str | Path], shards: Path, out: Path, params: Params, folds: Path | None = None) -> None:
    """Lets each model answer the split `params.evaluate.split`, writes all results to `out`, prints the comparison.

    An evaluation that was interrupted goes on where it was when it is started again with the same models, data and
    settings.

    Args:
        models: Base model names, model folders, folders of detectors, or registered versions
            (`models:/adfm@production`) by the name to show, in the order to show; the last is the candidate.
        shards: Folder of shards.
        out: Folder to write.
        params: Reads the sections `evaluate`, `model` and `register`, and `seed`.
        folds: Folder of a cross-validation of the same shards, by `adfm folds`, to show beside.

    Raises:
        AdfmError: A model or the shards cannot be read, MLflow cannot be reached, or `out` cannot be written.
    """
    if not models:
        raise AdfmError("There is no model to evaluate; name at least one.")
    for name in models:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in ("predictions", *references.BLIND):
            taken = ", ".join(("predictions", *references.BLIND))
            raise AdfmError(f"{name!r} cannot name a model: letters, digits, - and _ only, and none of {taken}.")
    crossed = crossvalidation.read(folds, shards) if folds else None
    if params.evaluate.folds and folds is None:
        print(
            f"evaluate.folds ({params.evaluate.folds}) is not used here: `adfm folds` cross-validates, --folds shows it"
        )
    *_, candidate = models
    kept = out.with_name(f"{out.name}.answers.partial")  # for an evaluation that is interrupted
    split, tokens = params.evaluate.split, params.evaluate.max_new_tokens
    fingerprint = shards_.fingerprint(shards, split)
    # Where validation itself is evaluated, a threshold chosen on it would flatter.
    with_validation = split != "validation" and any(shards.glob("validation-*.parquet"))
    splits = [split, "validation"] if with_validation else [split]
    with TemporaryDirectory() as downloads:
        local, shown = {}, {}
        for name, model in models.items():
            (Path(downloads) / name).mkdir()
            local[name], shown[name] = versions.fetch(model, Path(downloads) / name)
            if not model_folder.is_detector(local[name]):
                loading.base_of(local[name], params.model)  # before anything is done
        detectors = [name for name in models if name != candidate and model_folder.is_detector(local[name])]
        reference = references.Reference(detectors[0], shown[detectors[0]]) if detectors else None
        digests = {name: digest(Path(model)) if Path(model).is_dir() else None for name, model in local.items()}
        about = {
            "candidate": candidate,
            "candidate_digest": digests[candidate],
            "models": shown,
            "detector": reference.name if reference else None,
            "split": split,
            "images": len(shards_.ids(shards, split)),
            "fingerprint": fingerprint,
            "seed": params.seed,
            "settings": params.evaluate.model_dump(),
        }
        tags = {"candidate": candidate, "data_fingerprint": fingerprint}
        with tracking.start_run("evaluate", params, tags) as run, atomic_folder(out) as partial:
            answers = {
                name: predictions.predict_splits(model, shards, params, name, splits, kept)
                for name, model in local.items()
            }
            validation = {name: of["validation"] for name, of in answers.items() if len(splits) > 1}
            calibrations = _calibrate(shown, local, digests, validation, shards, params)
            tables = {name: calibrations[name].apply(of[split]) for name, of in answers.items()}
            write_json(about | {"mlflow_run_id": run.info.run_id}, partial / "evaluation.json")
            write_json(guard.fit(shards, params).model_dump(), partial / guard.FILE)
            for name, table in tables.items():
                # Travels with the file, so that the gate can refuse to compare what was not made in the same way.
                table.attrs = {"split": split, "fingerprint": fingerprint, "max_new_tokens": tokens}
                table.attrs["threshold"] = calibrations[name].threshold
                own, file = (
                    ("predictions", calibration.FILE) if name == candidate else (name, f"calibration/{name}.json")
                )
                _write_table(table, partial / f"{own}.parquet")
                (partial / file).parent.mkdir(exist_ok=True)
                write_json(calibrations[name].model_dump(), partial / file)
            for name, table in validation.items():
                _write_table(calibrations[name].apply(table), partial / "validation" / f"{name}.parquet")
            comparison = report(tables, shards, partial, params, calibrations, validation, reference)
            section = [crossvalidation.add(crossed, folds, partial)] if folds and crossed else []
            summary = _summarize(local[candidate], tables, shards, comparison, params, calibrations, reference, crossed)
            write_json(comparison.compared | {"summary": summary}, partial / references.FILE)
            sentences = references.lines(summary)
            paragraphs = [*map(markdown, sentences), *comparison.written, *section]
            replace_text("\n\n".join(paragraphs) + "\n", partial / "comparison.md")
            page.write(partial, shards, partial / "report")
            _log(partial, candidate)
        shutil.rmtree(kept, ignore_errors=True)
    file = f"Differences to the other models, and what the figures are: {out / 'comparison.md'}"
    print(_folded("\n\n".join([*comparison.printed, *section, file, *sentences])))


class Comparison(NamedTuple):
    """What follows from prediction tables: figures, and paragraphs of Markdown.

    Args:
        measured: The contents of `metrics.json`.
        compared: Those of `references.json`, without the summary.
        printed: For the terminal: all models, and the candidate beside production, or the model before it.
        written: For `comparison.md`: beside every model, and what the figures are.
    """

    measured: dict[str, Any]
    compared: dict[str, Any]
    printed: list[str]
    written: list[str]


def _summarize(
    model: str | Path,
    tables: Mapping[str, pd.DataFrame],
    shards: Path,
    comparison: Comparison,
    params: Params,
    calibrations: Mapping[str, Calibration],
    reference: references.Reference | None,
    crossed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The verdict in words, for `references.json` and above the comparison.

    Args:
        model: The candidate.
        tables: As of `report`.
        shards: The shards.
        comparison: What `report` returned.
        params: Reads `model` and `tile`.
        calibrations: By model.
        reference: The reference detector, if there is one.
        crossed: The cross-validation, if there was one.
    """
    *_, candidate = tables
    measured = comparison.measured
    images = shards_.table(shards).select(["split", "label", "defect"]).to_pandas()
    train = images[images["split"] == "train"]
    counts = tuple(int((train["label"] == label).sum()) for label in ("normal", "anomalous"))
    kind = verdict.kind_of(model, params.model, shards_.fingerprint(shards), (counts[0], counts[1]))
    limit = next(iter(calibrations[candidate].limit.items()), None)
    facts = verdict.Facts(
        kind,
        comparison.compared,
        measured[candidate],
        difference=measured.get(f"{candidate}_minus_{reference.name}", {}) if reference else {},
        detector=reference.folder if reference else "" if kind.base else str(model),
        train=(counts[0], counts[1]),
        images=len(images),
        kinds=verdict.parts(tables[candidate], train),
        tiles=tiles.propose(tiles.defects_of(shards), kind.pixels, params.tile.size, params.tile.overlap),
        limit=(f"evaluate.{limit[0].removesuffix('s')}_limit", limit[1]) if limit else None,
        crossed=crossed,
        shards=str(shards),
    )
    return verdict.summarize(facts)


def models_to_compare(about: Mapping[str, Any], candidate: str | Path) -> dict[str, str]:
    """Production and anchor, for `evaluate`; a version of the candidate itself is left out.

    Args:
        about: As `adfm.registry.production.in_production` gives it.
        candidate: The candidate, as of `evaluate`.

    Returns:
        `models:/<name>/<version>` by alias.
    """
    name, models = about["model"], {}
    is_folder = Path(candidate).is_dir()
    for alias in ("production", "anchor"):
        if (version := about[alias]) is not None:
            uri = f"models:/{name}/{version['version']}"
            by_name = str(candidate) in (uri, f"models:/{name}@{alias}")
            if not by_name and not (is_folder and digest(Path(candidate)) == version["artifact_digest"]):
                models[alias] = uri
    return models


def read_production(file: Path) -> dict[str, Any]:
    """What `adfm production` wrote.

    Raises:
        AdfmError: The file cannot be read, or is another one.
    """
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        versions = [about[alias] for alias in ("production", "anchor")]
        if any(version and not {"version", "artifact_digest"} <= version.keys() for version in versions):
            raise KeyError("version")
        return {"model": str(about["model"]), **about}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdfmError(f"{file} cannot be read ({error!r}); make it with `adfm production {file}`.") from error


def _calibrate(
    models: dict[str, str],
    local: dict[str, str | Path],
    digests: dict[str, str | None],
    validation: dict[str, pd.DataFrame],
    shards: Path,
    params: Params,
) -> dict[str, Calibration]:
    """The calibration of each model: a version's own, else one fitted on its predictions of the validation split."""
    fingerprint = shards_.fingerprint(shards, "validation") if validation else None
    calibrations = {}
    for name, model in models.items():
        if model.startswith("models:"):
            folder = Path(local[name])  # that of the model, within the version's
            calibrations[name] = calibration.of_version(folder.parent, digest(folder))
        elif name in validation:
            calibrations[name] = calibration.fit(validation[name], params.evaluate, digests[name], fingerprint)
        else:
            why = "is evaluated itself" if params.evaluate.split == "validation" else "is not there"
            note = f"the validation split, on which a threshold is chosen, {why}"
            calibrations[name] = Calibration(model=digests[name], note=note)
    return calibrations


def _write_table(table: pd.DataFrame, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    schema = pa.schema([*DECIDED, *KINDS]) if "predicted_kind" in table else DECIDED
    pq.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False), file)


def report(
    tables: dict[str, pd.DataFrame],
    shards: Path,
    out: Path,
    params: Params,
    calibrations: dict[str, Calibration],
    validation: Mapping[str, pd.DataFrame] | None = None,
    reference: references.Reference | None = None,
) -> Comparison:
    """Writes what follows from prediction tables, but for the verdict in words and what is shown beside it.

    Args:
        tables: Prediction tables of the same images by model, with decisions; the last is the candidate.
        shards: The shards, for the pictures.
        out: An existing folder.
        params: Reads the section `evaluate`, and `seed`.
        calibrations: By model, what the decisions were made with.
        validation: Prediction tables of the validation split by model, if there is one.
        reference: The reference detector among the models, if there is one.
    """
    *others, candidate = tables
    settings = params.evaluate
    details = {
        name: metrics.summarize(table, settings.bootstrap, params.seed, settings.small, settings.large)
        for name, table in tables.items()
    }
    overall = {name: found.pop("overall") for name, found in details.items()}
    differences = {
        f"{candidate}_minus_{other}": metrics.difference(
            tables[candidate], tables[other], settings.bootstrap, params.seed
        )
        for other in sorted(others, key="production".__eq__)[::-1]  # what it would replace comes first
    }
    at = {name: fitted.threshold for name, fitted in calibrations.items()}
    if any(threshold is not None for threshold in at.values()) and not metrics.without_normal(tables[candidate]):
        repeat = (settings.bootstrap, params.seed)
        for name, table in tables.items():
            overall[name] |= metrics.operating_point(table, at[name], *repeat)
        for other in others:
            differences[f"{candidate}_minus_{other}"] |= metrics.operating_difference(
                tables[candidate], at[candidate], tables[other], at[other], *repeat
            )
    blind = {
        name: metrics.overall(table, settings.bootstrap, params.seed)
        for name, table in references.blind_tables(tables[candidate]).items()
    }
    measured = overall | blind | differences
    write_json(measured, out / "metrics.json")
    write_json(details, out / "details.json")
    (out / "metrics").mkdir()
    for name, values in (overall | blind).items():
        headline = [metric for metric in (*metrics.HEADLINE, metrics.KIND) if metric in values]
        write_json({metric: values[metric] for metric in headline}, out / "metrics" / f"{name}.json")

    folder = out / "plots"
    folder.mkdir()
    sizes = {name: found["sizes"] for name, found in details.items()}
    _write_plot_data(tables[candidate], sizes, folder)
    plots.confusion(tables, folder / "confusion.png")
    plots.reliability(tables, folder / "reliability.png")
    plots.iou_by_size(sizes, settings.small, settings.large, folder / "iou_by_size.png")
    plots.comparison(overall, differences, folder / "comparison.png")
    shown = plots.choose(tables[candidate])
    ids = set(shown["id"])
    images = {record.id: record.image for record in shards_.read(shards, settings.split) if record.id in ids}
    plots.examples(shown, images, folder / "examples.png")
    compared = references.compare(tables, overall | blind, validation or {}, reference, settings.bootstrap, params.seed)
    titles = _titles(overall)
    _write_csv(
        ["metric", "model", "value", "low", "high"],
        (
            [metric, name, *(values.get(metric + end) for end in ("", "_low", "_high"))]
            for metric in titles
            for name, values in (overall | differences).items()
            if metric in values
        ),
        out / "comparison.csv",
    )
    everyone = _tables(_values(titles, overall, compared["rows"]))
    differing = _tables(_intervals(titles, {candidate: overall[candidate]}, differences))
    notes, explanations = _notes(overall[candidate], metrics.KIND in titles)
    decided = [markdown(f"{name}: {fitted.summary}") for name, fitted in calibrations.items()]
    written = [*everyone, *differing, *notes, *explanations, *decided]
    return Comparison(measured, compared, [*everyone, *differing[:1], *notes], written)


def _write_plot_data(candidate: pd.DataFrame, sizes: dict[str, dict[str, Any]], folder: Path) -> None:
    """What DVC's own templates draw: a row an answer, curves of the candidate, and IoU with a column a model."""
    from sklearn.metrics import roc_curve

    labels = (candidate[column].fillna("unparseable") for column in ("predicted", "decision"))
    answers = zip(candidate["label"], *labels, strict=True)
    _write_csv(["actual", "predicted", "decision"], answers, folder / "confusion.csv")
    # Without kinds the header alone: DVC reports a plot whose file is missing.
    pairs = metrics.kind_pairs(candidate) if "predicted_kind" in candidate else []
    _write_csv(["actual", "predicted"], (pair for pair in pairs if pair[0] is not None), folder / "kinds.csv")

    anomalous, score = metrics.ranked(candidate)
    curve = roc_curve(anomalous, score) if 0 < anomalous.sum() < len(anomalous) else ((), (), ())
    _write_csv(["fpr", "tpr", "threshold"], zip(*curve, strict=True), folder / "roc.csv")

    probability = candidate["probability"].to_numpy(dtype=float, na_value=np.nan)
    points = metrics.reliability(probability, anomalous)
    _write_csv(["probability", "defective", "images"], points, folder / "reliability.csv")

    there = [size for size in metrics.SIZES if size in sizes[[*sizes][-1]]]
    rows = ([size, *(of[size]["iou"] for of in sizes.values())] for size in there)
    _write_csv(["size", *sizes], rows, folder / "iou_by_size.csv")


def _titles(overall: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The metrics of the comparison, each with its title."""
    *_, candidate = overall.values()
    titles = {metric: plots.TITLES[metric] for metric in plots.ESCAPES_FIRST}
    if any(metrics.KIND in values for values in overall.values()):
        titles[metrics.KIND] = plots.TITLES[metrics.KIND]
    return titles | {metric: title for metric, title in _CALIBRATION.items() if metric in candidate}


def _values(titles: Mapping[str, str], overall: Mapping[str, Any], rows: Mapping[str, Any]) -> list[list[str]]:
    """A table of all models and the blind answers, without intervals.

    Args:
        titles: As `_titles` gives them.
        overall: Metrics by model.
        rows: Of `references.json`, which has the blind answers and the balanced accuracy by score.
    """
    beside = {name: {metric: values[0] for metric, values in row.items()} for name, row in rows.items()}
    columns = {name: {**row, **overall.get(name, {})} for name, row in beside.items()}
    listed = {**titles, references.BY_SCORE: references.METRICS[references.BY_SCORE]}
    order = sorted(listed, key=lambda metric: [*titles].index(metric.removesuffix("_by_score")))
    cells = [
        [listed[metric], *(_cell(values, metric, limits=False) for values in columns.values())] for metric in order
    ]
    return [["", *map(references.title, columns)], *(row for row in cells if {*row[1:]} != {"-"})]


def _intervals(
    titles: Mapping[str, str], candidate: Mapping[str, Any], differences: Mapping[str, Any]
) -> list[list[str]]:
    """A table of the candidate and its differences to the other models, with intervals."""
    columns = {**candidate, **differences}
    cells = [
        [title, *(_cell(values, metric, "+" * (name in differences)) for name, values in columns.items())]
        for metric, title in titles.items()
    ]
    return [["95 % intervals", *(name.replace("_minus_", " - ") for name in columns)], *cells]


def _notes(candidate: Mapping[str, Any], kinds: bool) -> tuple[list[str], list[str]]:
    """What to know of these images, and what the figures of a comparison are, as paragraphs."""
    notes = [metrics.more_images(candidate)]
    if without := candidate["without_boxes"]:
        notes.append(f"{without} anomalous images have no boxes; they are left out of IoU and box F1.")
    if not candidate["normal"]:
        notes.append(metrics.NO_NORMAL_IMAGE)
    explanations = [
        f"{candidate['images']} images. In brackets 95 % intervals, paired for differences: confidence limits of rates"
        " and means over images, exact for rates; by the bootstrap for AUROC, box F1 and calibration errors. Images of"
        " one part count as one. comparison.csv has the intervals of every model."
        " By score: each decided by its score, at a threshold fitted on the validation split."
        " The first lines count the letters as written; those at the threshold the decisions made from the calibrated"
        " probability, with all regions of a flagged image for its boxes."
    ]
    if kinds:
        explanations.append(
            "Kind right: the share of the defective images of one known kind that are answered A with this kind, "
            "letters as written; plots/kinds.csv says which were taken for which."
        )
    return [note for note in notes if note], explanations


def _cell(values: Mapping[str, Any], metric: str, sign: str = "", limits: bool = True) -> str:
    value, low, high = (values.get(metric + end) for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    text = f"{value:{sign}.3f}"
    return f"{text} [{low:{sign}.3f}, {high:{sign}.3f}]" if limits and low is not None and high is not None else text


def _tables(rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown tables that are also aligned as plain text, as many as it takes to fit a terminal.

    Each has the first column, and rows in which another has a value. A column that is too wide has a table of its own.
    """
    first, *columns = zip(*rows, strict=True)
    groups: list[list[Sequence[str]]] = [[]]
    for column in columns:
        if groups[-1] and len(_lines([first, *groups[-1], column])[0]) > _TERMINAL:
            groups.append([])
        groups[-1].append(column)
    tables = []
    for group in groups:
        kept = [cells for cells in zip(first, *group, strict=True) if {*cells[1:]} != {"-"}]
        head, *body = _lines([*zip(*kept, strict=True)])
        rule = re.sub(r"[^|]", "-", head)
        tables.append("\n".join([head, rule, *body]))
    return tables


def _lines(columns: Sequence[Sequence[str]]) -> list[str]:
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return [f"| {' | '.join(cells)} |" for cells in zip(*padded, strict=True)]


def _folded(text: str) -> str:
    """Markdown for a terminal: paragraphs in lines that fit it, with tables and commands left as they are."""

    def fold(paragraph: str) -> str:
        whole = re.sub(r"`[^`]*`", lambda command: command[0].replace(" ", "\u00a0"), paragraph)
        return textwrap.fill(whole, _TERMINAL, break_long_words=False, break_on_hyphens=False).replace("\u00a0", " ")

    paragraphs = text.split("\n\n")
    return "\n\n".join(part if part.startswith(("|", "#")) else fold(part) for part in paragraphs)


def _log(folder: Path, candidate: str) -> None:
    import mlflow

    every = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    flat = {
        f"{name}/{metric}": value
        for name, values in every.items()
        if name not in references.BLIND  # the same for every model; they are in metrics.json
        for metric, value in values.items()
        if name == candidate or metric not in _OF_ALL
    }
    if (file := folder / crossvalidation.FILE).is_file():
        crossed = json.loads(file.read_text(encoding="utf-8"))["metrics"]
        flat |= {f"cross-validation/{metric}": values["value"] for metric, values in crossed.items()}
    mlflow.log_metrics({key: float(value) for key, value in flat.items() if value is not None})
    for path in sorted(folder.iterdir()):
        if path.name != "metrics":  # for `dvc metrics show`: a part of metrics.json
            mlflow.log_artifact(str(path), "evaluation")


def _write_csv(header: Sequence[str], rows: Iterable[Sequence[Any]], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
