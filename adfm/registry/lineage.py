"""What ties data, run and version together: everything that is needed to make a version again, or to tell it apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from adfm import tracking
from adfm.data import shards as shards_
from adfm.files import digest
from adfm.models import loading
from adfm.params import Params

if TYPE_CHECKING:
    from mlflow.entities import Run


def lineage(model: Path, shards: Path, params: Params, run: Run | None) -> dict[str, Any]:
    """The lineage of a trained model, as JSON values.

    Args:
        model: Folder that training wrote.
        shards: Folder of the shards that it is judged on.
        params: Settings of the registration; those of the training come from the model folder.
        run: The training's run, whose commit and library versions count; without it, those of the moment do.

    Returns:
        `artifact_digest`; `base` (`name`, `revision`); `data` with `trained_on` and `judged_on` (fingerprints of all
        shards), `test` (fingerprint of the split that the evaluation looked at) and `dvc_md5` (of the shards trained
        on, if they are still those in `shards`); `git_commit`, `git_dirty`; `libraries`; `trained_with`, `judged_with`
        (settings); `training_run`. What is not known is `None`.
    """
    description = loading.describe(model) or {}
    trained_on, judged_on = description.get("data_fingerprint"), shards_.fingerprint(shards)
    recorded = run.data.tags if run else tracking.code_version() | tracking.libraries()
    return {
        "artifact_digest": digest(model),
        "base": description.get("base"),
        "data": {
            "trained_on": trained_on,
            "judged_on": judged_on,
            "test": shards_.fingerprint(shards, params.evaluate.split),
            "dvc_md5": dvc_md5(shards) if trained_on == judged_on else None,
        },
        "git_commit": recorded.get("git_commit"),
        "git_dirty": recorded.get("git_dirty"),
        "libraries": {
            key.removeprefix("library."): value for key, value in recorded.items() if key.startswith("library.")
        },
        "trained_with": description.get("params"),
        "judged_with": params.model_dump(mode="json", by_alias=True),
        "training_run": description.get("mlflow_run_id"),
    }


def dvc_md5(folder: Path) -> str | None:
    """The hash under which DVC keeps `folder`, from the `dvc.lock` that lists it; `None` if no such file does.

    An entry whose size or number of files are not the folder's is of an earlier state, and counts for nothing.
    """
    folder = folder.resolve()
    files = [path for path in folder.rglob("*") if path.is_file()]
    now = (len(files), sum(path.stat().st_size for path in files))
    for parent in folder.parents:
        lock = parent / "dvc.lock"
        if not lock.is_file():
            continue
        stages = yaml.safe_load(lock.read_text(encoding="utf-8")) or {}
        for stage in stages.get("stages", {}).values():
            for out in stage.get("outs", []):
                if (parent / out["path"]).resolve() == folder and (out.get("nfiles"), out.get("size")) == now:
                    return str(out["md5"])
    return None
