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
    comparison.md, comparison.csv         the tables that are printed
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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

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
from adfm.files import atomic_folder, digest, write_json
from adfm.models import loading
from adfm.params import Params
from adfm.text import markdown

if TYPE_CHECKING:
    import pandas as pd

_CALIBRATION = {
    "ece_of_score": "calibration error of the score",
    "ece": "calibration error of the probability",
    "threshold": "threshold",
    **{f"{metric}_at_threshold": f"{plots.TITLES.get(metric, metric)} at threshold" for metric in metrics.AT_THRESHOLD},
    "miss_rate_at_threshold": "escape rate at threshold",
}


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
            local[name], shown[name] = loading.fetch(model, Path(downloads) / name)
            if not loading.is_detector(local[name]):
                loading.base_of(local[name], params.model)  # before anything is done
        detectors = [name for name in models if name != candidate and loading.is_detector(local[name])]
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
            if folds and crossed:
                comparison += crossvalidation.add(crossed, folds, partial)
            summary = _summarize(local[candidate], tables, shards, partial, params, calibrations, reference, crossed)
            page.write(partial, shards, partial / "report")
            _log(partial)
        shutil.rmtree(kept, ignore_errors=True)
    print(comparison, *references.lines(summary), sep="\n\n")


def _summarize(
    model: str | Path,
    tables: Mapping[str, pd.DataFrame],
    shards: Path,
    out: Path,
    params: Params,
    calibrations: Mapping[str, Calibration],
    reference: references.Reference | None,
    crossed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The verdict in words: written into `references.json` and above the comparison, and returned.

    Args:
        model: The candidate.
        tables: As of `report`, which has written to `out`.
        shards: The shards.
        out: Folder of the evaluation.
        params: Reads `model` and `tile`.
        calibrations: By model.
        reference: The reference detector, if there is one.
        crossed: The cross-validation, if there was one.
    """
    *_, candidate = tables
    measured, compared = (json.loads((out / name).read_text()) for name in ("metrics.json", references.FILE))
    images = shards_.table(shards).select(["split", "label", "defect"]).to_pandas()
    train = images[images["split"] == "train"]
    counts = tuple(int((train["label"] == label).sum()) for label in ("normal", "anomalous"))
    kind = verdict.kind_of(model, params.model, shards_.fingerprint(shards), (counts[0], counts[1]))
    limit = next(iter(calibrations[candidate].limit.items()), None)
    facts = verdict.Facts(
        kind,
        compared,
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
    summary = verdict.summarize(facts)
    write_json(compared | {"summary": summary}, out / references.FILE)
    file = out / "comparison.md"
    above = "\n\n".join(markdown(line) for line in references.lines(summary))
    file.write_text(f"{above}\n\n{file.read_text(encoding='utf-8')}", encoding="utf-8")
    return summary


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
) -> str:
    """Writes everything that follows from prediction tables; returns the comparison as aligned Markdown tables.

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
        for other in reversed(others)
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
    write_json(overall | blind | differences, out / "metrics.json")
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
    write_json(compared, out / references.FILE)
    return _write_comparison(overall, differences, calibrations, compared, out)


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


def _write_comparison(
    overall: dict[str, Any],
    differences: dict[str, Any],
    calibrations: dict[str, Calibration],
    compared: dict[str, Any],
    out: Path,
) -> str:
    shown = overall | differences
    first = overall[[*overall][-1]]
    titles = {metric: plots.TITLES[metric] for metric in plots.ESCAPES_FIRST}
    if any(metrics.KIND in values for values in overall.values()):
        titles[metrics.KIND] = plots.TITLES[metrics.KIND]
    titles |= {metric: title for metric, title in _CALIBRATION.items() if metric in first}
    header = ["", *overall, *(name.replace("_minus_", " - ") for name in differences)]
    rows = [
        [title, *(_cell(values, metric, "+" * (name in differences)) for name, values in shown.items())]
        for metric, title in titles.items()
    ]
    table = f"{_markdown(references.table(compared))}\n\n{_markdown([header, *rows])}"
    more = f"\n\n{metrics.more_images(first)}".rstrip()
    note = (
        f"{first['images']} images. In brackets 95 % intervals, paired for differences: confidence limits of rates and"
        " means over images, exact for rates; by the bootstrap for AUROC, box F1 and calibration errors. Images of one"
        " part count as one."
    )
    note += (
        " By score: each decided by its score, at a threshold fitted on the validation split."
        " The first lines count the letters as written; those at the threshold the decisions made from the calibrated"
        " probability, with all regions of a flagged image for its boxes."
    )
    left_out = ""
    if without := first["without_boxes"]:
        left_out = f"\n\n{without} anomalous images have no boxes; they are left out of IoU and box F1."
    if not first["normal"]:
        left_out += f"\n\n{metrics.NO_NORMAL_IMAGE}"
    note += left_out
    if metrics.KIND in titles:
        note += (
            "\n\nKind right: the share of the defective images of one known kind that are answered A with this kind, "
            "letters as written; plots/kinds.csv says which were taken for which."
        )
    note += "".join(f"\n\n{markdown(f'{name}: {fitted.summary}')}" for name, fitted in calibrations.items())
    (out / "comparison.md").write_text(f"{table}{more}\n\n{note}\n", encoding="utf-8")
    _write_csv(
        ["metric", "model", "value", "low", "high"],
        (
            [metric, name, *(values.get(metric + end) for end in ("", "_low", "_high"))]
            for metric in titles
            for name, values in shown.items()
            if metric in values
        ),
        out / "comparison.csv",
    )
    return table + more + left_out


def _cell(values: dict[str, Any], metric: str, sign: str = "") -> str:
    found = [values.get(metric + end) for end in ("", "_low", "_high")]
    shown = [format(value, f"{sign}.3f") for value in found if value is not None]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else shown[0] if shown else "-"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also aligned as plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _log(folder: Path) -> None:
    import mlflow

    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    flat = {f"{name}/{metric}": value for name, values in found.items() for metric, value in values.items()}
    if (file := folder / crossvalidation.FILE).is_file():
        crossed = json.loads(file.read_text(encoding="utf-8"))["metrics"]
        flat |= {f"cross-validation/{metric}": values["value"] for metric, values in crossed.items()}
    mlflow.log_metrics({key: float(value) for key, value in flat.items() if value is not None})
    mlflow.log_artifacts(str(folder), "evaluation")


def _write_csv(header: Sequence[str], rows: Iterable[Sequence[Any]], file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
