"""What a reviewer reads on a version's page in MLflow: its description, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adfm.evaluation import metrics
from adfm.evaluation.calibration import Calibration
from adfm.registry import gate

if TYPE_CHECKING:
    from mlflow.entities import Run

LONGEST = 5000
"""Characters of a description: the width of its column in MLflow's SQL schema."""

_MOST_REASONS = 15


def text(
    decided: dict[str, Any],
    origin: dict[str, Any],
    measured: dict[str, Any],
    calibration: Calibration,
    version: str,
    evaluated_by: Run | None,
    policy_difference: Sequence[str] = (),
) -> str:
    """What a reviewer reads on the version's page, in Markdown."""
    rival = decided["production_version"]
    against = f"version {rival} in production ({decided['production_predictions']})" if rival else "the floors alone"
    reasons = [f"- {reason}" for reason in decided["reasons"]]
    if len(reasons) > _MOST_REASONS:
        reasons[_MOST_REASONS:] = [f"- … and {len(reasons) - _MOST_REASONS} more, in gate.json"]
    names = [*metrics.HEADLINE, *(f"{name}_at_threshold" for name in metrics.AT_THRESHOLD), "ece_of_score", "ece"]
    every = [
        [name, measured[name], measured[f"{name}_low"], measured[f"{name}_high"]] for name in names if name in measured
    ]
    data, code = origin["data"], origin["git_commit"]
    dirty = ", with changes that are not committed" if origin["git_dirty"] == "true" else ""
    if decided["verdict"] == "passed":
        next_step = (
            f"**To approve it**, set the tag `approval` to `approved`; then `adfm promote {version}` puts it into "
            "production. To turn it down, set the tag to `rejected`, and say why in a tag `approval_reason`."
        )
    else:
        next_step = "**It cannot be promoted.** Mend what the reasons name, train, and register again."
    parts = [
        f"**Gate: {decided['verdict']}** on {decided['decided_at']}, judged on "
        f"{sum(decided['images'].values())} images of the {decided['split']} split against {against}.",
        "\n".join(reasons),
        calibration.summary,
        *(["The submitter's policy differs: " + "; ".join(policy_difference)] if policy_difference else []),
        next_step,
        *_report_link(evaluated_by),
        _table(*gate.table(decided)),
        _table(["metric", "value", "95 % from", "to"], *every),
        f"Base model {origin['base']['name']} (revision {origin['base']['revision'] or 'none'}). Trained on data "
        f"`{data['trained_on']}` (DVC {data['dvc_md5'] or 'unknown'}), with code {code or 'unknown'}{dirty}.",
    ]
    return "\n\n".join(parts)[:LONGEST]


def _report_link(run: Run | None) -> list[str]:
    """Where MLflow's own pages show the report that evaluation logged; nowhere, if its run is in another store."""
    if run is None:
        return []
    place = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}/artifacts/evaluation/report/report.html"
    return [f"[The report]({place}) shows images with true and predicted boxes beside the model's own words."]


def _table(header: list[str], *rows: list[Any]) -> str:
    cells = [["-" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *cells])
