"""Evaluation: several models on the same held-out images, side by side.

docs/evaluation.md lists the files that it writes; those of the candidate, the last model, are at the top of the folder.
A registered version has the calibration that it was registered with.
"""

import csv
import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from adfm import tracking
from adfm.data import shards as shards_
from adfm.data import tiles
from adfm.errors import AdfmError
from adfm.evaluation import calibration, crossvalidation, guard, metrics, plots, predictions, references, verdict
from adfm.evaluation import report as page
from adfm.evaluation.calibration import DECIDED, Calibration
from adfm.evaluation.metrics import numbers, with_limits, written
from adfm.evaluation.predictions import KINDS
from adfm.files import atomic_folder, digest, replace_text, write_json
from adfm.models import loading, model_folder, versions
from adfm.params import Evaluate, Params
from adfm.text import markdown

_TERMINAL = 100  # columns
_TITLES = {
    **{metric: plots.TITLES[metric] for metric in (*plots.ESCAPES_FIRST, metrics.KIND)},
    "ece_of_score": "calibration error, score",
    "ece": "calibration error, probability",
    "threshold": "threshold",
    **{f"{metric}_at_threshold": plots.TITLES[f"{metric}_at_threshold"] for metric in metrics.AT_THRESHOLD},
}
_FIGURES = (
    "{} images. In brackets 95 % intervals, paired for differences: confidence limits of rates and means over images, "
    "exact for rates; by the bootstrap for AUROC, box F1 and calibration errors. Images of one part count as one. "
    "comparison.csv has the intervals of every model. By score: each decided by its score, at a threshold fitted on "
    "the validation split. The first lines count the letters as written; those at the threshold the decisions made "
    "from the calibrated probability, with all regions of a flagged image for its boxes."
)
_KIND_RIGHT = (
    "Kind right: the share of the defective images of one known kind that are answered A with this kind, letters as "
    "written; plots/kinds.csv says which were taken for which."
)
_OF_ALL = ("images", "normal", "anomalous", "without_boxes")  # counts of the images, which all models have in common


def evaluate(models: dict[str, str | Path], shards: Path, out: Path, params: Params, folds: Path | None = None) -> None:
    """Evaluate models on the split `params.evaluate.split`, write all results to `out` and print the comparison.

    An interrupted evaluation resumes when it is started again with the same models, data and settings.

    Args:
        models: Base model names, model folders, folders of detectors, or registered versions
            (`models:/adfm@production`) by the name to show, in the order to show; the last is the candidate.
        shards: Folder of shards.
        out: Folder to write.
        params: All settings.
        folds: Folder of a cross-validation of the same shards, by `adfm folds`, to show beside.

    Raises:
        AdfmError: A model or the shards cannot be read, MLflow cannot be reached, or `out` cannot be written.
    """
    if not models:
        raise AdfmError("No model to evaluate; name at least one.")
    for name in models:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in ("predictions", *references.BLIND):
            taken = ", ".join(("predictions", *references.BLIND))
            raise AdfmError(f"{name!r} cannot name a model: letters, digits, - and _ only, and none of {taken}.")
    crossed = crossvalidation.read(folds, shards) if folds else None
    if params.evaluate.folds and folds is None:
        print(
            f"evaluate.folds={params.evaluate.folds} is not used here: `adfm folds` cross-validates, --folds shows it"
        )
    *_, candidate = models
    kept = out.with_name(f"{out.name}.answers.partial")  # for an evaluation that is interrupted
    split, tokens = params.evaluate.split, params.evaluate.max_new_tokens
    fingerprint = shards_.fingerprint(shards, split)
    # Where validation itself is evaluated, a threshold chosen on it would flatter.
    with_validation = split != "validation" and any(shards.glob("validation-*.parquet"))
    splits = [split, "validation"] if with_validation else [split]
    with TemporaryDirectory() as downloads:
        local, resolved = {}, {}
        for name, model in models.items():
            (Path(downloads) / name).mkdir()
            local[name], resolved[name] = versions.fetch(model, Path(downloads) / name)
            if not model_folder.is_detector(local[name]):
                loading.base_of(local[name], params.model)  # fails before anything is done
        detectors = [name for name in models if name != candidate and model_folder.is_detector(local[name])]
        reference = references.Reference(detectors[0], resolved[detectors[0]]) if detectors else None
        digests = {name: digest(Path(model)) if Path(model).is_dir() else None for name, model in local.items()}
        about = {
            "candidate": candidate,
            "candidate_digest": digests[candidate],
            "models": resolved,
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
            calibrations = _calibrate(resolved, local, digests, validation, shards, params.evaluate)
            tables = {name: calibrations[name].apply(of[split]) for name, of in answers.items()}
            write_json(about | {"mlflow_run_id": run.info.run_id}, partial / "evaluation.json")
            write_json(guard.fit(shards, split).model_dump(), partial / guard.FILE)
            for name, table in tables.items():
                # Travels with the file, so that the gate can refuse to compare what was not made in the same way.
                table.attrs = {"split": split, "fingerprint": fingerprint, "max_new_tokens": tokens}
                table.attrs["threshold"] = calibrations[name].threshold
                _write_table(table, partial / f"{'predictions' if name == candidate else name}.parquet")
                file = partial / (calibration.FILE if name == candidate else f"calibration/{name}.json")
                file.parent.mkdir(exist_ok=True)
                write_json(calibrations[name].model_dump(), file)
            for name, table in validation.items():
                _write_table(calibrations[name].apply(table), partial / "validation" / f"{name}.parquet")
            comparison = report(tables, shards, partial, params, calibrations, validation, reference)
            section = []
            if folds and crossed:
                for copied in (crossvalidation.FILE, crossvalidation.PREDICTIONS):
                    shutil.copy2(folds / copied, partial)
                section = [crossvalidation.section(crossed)]
            summary = _summarize(local[candidate], tables, shards, comparison, params, calibrations, reference, crossed)
            write_json(comparison.compared | {"summary": summary}, partial / references.FILE)
            sentences = references.lines(summary)
            paragraphs = [*map(markdown, sentences), *comparison.written, *section]
            replace_text("\n\n".join(paragraphs) + "\n", partial / "comparison.md")
            page.write(partial, shards, partial / "report")
            _log(partial, candidate)
        shutil.rmtree(kept, ignore_errors=True)
    rest = f"Differences to the other models, and what the figures are: {out / 'comparison.md'}"
    print(_folded("\n\n".join([*comparison.printed, *section, rest, *sentences])))


class Comparison(NamedTuple):
    """What follows from prediction tables: figures, and paragraphs of Markdown."""

    measured: dict[str, Any]  # the contents of `metrics.json`
    compared: dict[str, Any]  # those of `references.json`, without the summary
    printed: list[str]  # for the terminal: all models, and the candidate beside production, or the model before it
    written: list[str]  # for `comparison.md`: beside every model, and what the figures are


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
    """Return the verdict in words on the candidate `model`, for `references.json` and above the comparison."""
    *_, candidate = tables
    measured = comparison.measured
    images = shards_.table(shards).select(["split", "label", "defect"]).to_pandas()
    train = images[images["split"] == "train"]
    normal, anomalous = (int((train["label"] == label).sum()) for label in ("normal", "anomalous"))
    kind = verdict.kind_of(model, params.model, shards_.fingerprint(shards), (normal, anomalous))
    limit = next(iter(calibrations[candidate].limit.items()), None)
    facts = verdict.Facts(
        kind,
        comparison.compared,
        measured[candidate],
        difference=measured.get(f"{candidate}_minus_{reference.name}", {}) if reference else {},
        detector=reference.folder if reference else "" if kind.base else str(model),
        train=(normal, anomalous),
        images=len(images),
        kinds=verdict.parts(tables[candidate], train),
        tiles=tiles.propose(tiles.defects_of(shards), kind.pixels, params.tile.size, params.tile.overlap),
        limit=(f"evaluate.{limit[0].removesuffix('s')}_limit", limit[1]) if limit else None,
        crossed=crossed,
        shards=str(shards),
    )
    return verdict.summarize(facts)


def models_to_compare(about: Mapping[str, Any], candidate: str | Path) -> dict[str, str]:
    """Production and anchor, of `in_production`, as `models:/<name>/<version>` by alias, without the candidate."""
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
    """Read the file of `adfm production`.

    Raises:
        AdfmError: It cannot be read, or is another one.
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
    settings: Evaluate,
) -> dict[str, Calibration]:
    """Return the calibration of each model: a version's own, else one fitted on the validation split."""
    fingerprint = shards_.fingerprint(shards, "validation") if validation else None
    calibrations = {}
    for name, model in models.items():
        if model.startswith("models:"):
            folder = Path(local[name])  # that of the model, within the version's
            calibrations[name] = calibration.of_version(folder.parent, digest(folder))
        elif name in validation:
            calibrations[name] = calibration.fit(validation[name], settings, digests[name], fingerprint)
        else:
            why = "is evaluated itself" if settings.split == "validation" else "is not there"
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
    """Write what follows from prediction tables, but for the verdict in words and what is shown beside it.

    `tables` are prediction tables of the same images by model, with decisions; the last is the candidate. `validation`
    has those of the validation split, `calibrations` what the decisions were made with. `out` is an existing folder.
    """
    *others, candidate = tables
    settings, repeat = params.evaluate, (params.evaluate.bootstrap, params.seed)
    details = {name: metrics.summarize(each, *repeat, settings.small, settings.large) for name, each in tables.items()}
    overall = {name: parts.pop("overall") for name, parts in details.items()}
    differences = {
        f"{candidate}_minus_{other}": metrics.difference(tables[candidate], tables[other], *repeat)
        for other in sorted(others, key="production".__eq__)[::-1]  # what it would replace comes first
    }
    at = {name: fitted.threshold for name, fitted in calibrations.items()}
    if any(threshold is not None for threshold in at.values()) and not metrics.without_normal(tables[candidate]):
        for name, table in tables.items():
            overall[name] |= metrics.operating_point(table, at[name], *repeat)
        for other in others:
            both = tables[candidate], at[candidate], tables[other], at[other]
            differences[f"{candidate}_minus_{other}"] |= metrics.operating_difference(*both, *repeat)
    blind_tables = references.blind_tables(tables[candidate])
    everyone = overall | {name: metrics.overall(table, *repeat) for name, table in blind_tables.items()}
    write_json(everyone | differences, out / "metrics.json")
    write_json(details, out / "details.json")
    (out / "metrics").mkdir()
    for name, values in everyone.items():
        headline = [metric for metric in (*metrics.HEADLINE, metrics.KIND) if metric in values]
        write_json({metric: values[metric] for metric in headline}, out / "metrics" / f"{name}.json")

    folder = out / "plots"
    folder.mkdir()
    sizes = {name: parts["sizes"] for name, parts in details.items()}
    _write_plot_data(tables[candidate], sizes, folder)
    plots.confusion(tables, folder / "confusion.png")
    plots.reliability(tables, folder / "reliability.png")
    plots.iou_by_size(sizes, settings.small, settings.large, folder / "iou_by_size.png")
    plots.comparison(overall, differences, folder / "comparison.png")
    chosen = plots.choose(tables[candidate])
    ids = set(chosen["id"])
    images = {record.id: record.image for record in shards_.read(shards, settings.split) if record.id in ids}
    plots.examples(chosen, images, folder / "examples.png")

    compared = references.compare(tables, everyone, validation or {}, reference, *repeat)
    kinds = any(metrics.KIND in values for values in overall.values())
    listed = {*plots.ESCAPES_FIRST, *overall[candidate]} | ({metrics.KIND} if kinds else set())
    titles = {metric: title for metric, title in _TITLES.items() if metric in listed}
    rows = (
        [metric, name, *with_limits(values, metric)]
        for metric in titles
        for name, values in (overall | differences).items()
        if metric in values
    )
    _write_csv(["metric", "model", "value", "low", "high"], rows, out / "comparison.csv")
    all_models = _tables(_values(titles, overall, compared["rows"]))
    differing = _tables(_intervals(titles, {candidate: overall[candidate]}, differences))
    own = overall[candidate]
    notes = [metrics.more_images(own)] if metrics.rates(own) else []
    if without := own["without_boxes"]:
        notes.append(f"{without} anomalous images have no boxes; they are left out of IoU and box F1.")
    if not own["normal"]:
        notes.append(metrics.NO_NORMAL_IMAGE)
    explanations = [_FIGURES.format(own["images"])]
    if kinds:
        explanations.append(_KIND_RIGHT)
    decided = [markdown(f"{name}: {fitted.summary}") for name, fitted in calibrations.items()]
    paragraphs = [*all_models, *differing, *notes, *explanations, *decided]
    return Comparison(everyone | differences, compared, [*all_models, *differing[:1], *notes], paragraphs)


def _write_plot_data(candidate: pd.DataFrame, sizes: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write what DVC's own templates draw: a row an answer, curves of the candidate, and IoU with a column a model."""
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

    points = metrics.reliability(numbers(candidate, "probability"), anomalous)
    _write_csv(["probability", "defective", "images"], points, folder / "reliability.csv")

    measured = [size for size in metrics.SIZES if size in sizes[[*sizes][-1]]]
    rows = ([size, *(of[size]["iou"] for of in sizes.values())] for size in measured)
    _write_csv(["size", *sizes], rows, folder / "iou_by_size.csv")


def _values(titles: Mapping[str, str], overall: Mapping[str, Any], rows: Mapping[str, Any]) -> list[list[str]]:
    """Return a table of all models and, from the `rows` of `references.json`, the blind answers; without intervals."""
    beside = {name: {metric: values[0] for metric, values in row.items()} for name, row in rows.items()}
    columns = {name: {**row, **overall.get(name, {})} for name, row in beside.items()}
    listed = {**titles, references.BY_SCORE: references.METRICS[references.BY_SCORE]}
    order = sorted(listed, key=lambda metric: [*titles].index(metric.removesuffix("_by_score")))
    cells = [[listed[metric], *(written(values.get(metric)) for values in columns.values())] for metric in order]
    return [["", *map(references.title, columns)], *(row for row in cells if {*row[1:]} != {"-"})]


def _intervals(titles: Mapping[str, str], candidate: dict[str, Any], differences: dict[str, Any]) -> list[list[str]]:
    columns = candidate | differences
    signs = {name: "+" if name in differences else "" for name in columns}
    cells = [
        [title, *(written(*with_limits(values, metric), signs[name]) for name, values in columns.items())]
        for metric, title in titles.items()
    ]
    return [["95 % intervals", *(name.replace("_minus_", " - ") for name in columns)], *cells]


def _tables(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write Markdown tables, aligned as plain text too, as many as it takes to fit a terminal; each has column one."""
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
    """Fold the paragraphs of a Markdown text for a terminal, with tables and commands left as they are."""

    def fold(paragraph: str) -> str:
        whole = re.sub(r"`[^`]*`", lambda command: command[0].replace(" ", "\u00a0"), paragraph)
        return textwrap.fill(whole, _TERMINAL, break_long_words=False, break_on_hyphens=False).replace("\u00a0", " ")

    return "\n\n".join(part if part.startswith(("|", "#")) else fold(part) for part in text.split("\n\n"))


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
