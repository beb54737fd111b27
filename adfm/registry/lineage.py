"""Lineage: the data, code, libraries and settings that a version was made from."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from adfm import tracking
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.files import digest
from adfm.models import model_folder
from adfm.params import Params

if TYPE_CHECKING:
    from mlflow.entities import Run

_CONFLICT = re.compile(r"^(<{7}|\|{7}|={7}|>{7})( |$)", re.MULTILINE)  # Git's conflict markers


def lineage(model: Path, shards: Path, params: Params, run: "Run | None") -> dict[str, Any]:
    """Return the lineage of a model that is judged on these shards, as JSON values.

    The training's settings are those of the model folder; `params` are those of the registration. Commit and library
    versions are those of the training's run; without it, those of this process.

    Returns:
        `artifact_digest`; `base` (`name`, `revision`); `data` with `trained_on` and `judged_on` (fingerprints of all
        shards), `test` (fingerprint of the evaluated split) and `dvc_md5` (of the shards trained on, if they are still
        those in `shards`); `git_commit`, `git_dirty`; `libraries`; `trained_with`, `judged_with` (settings);
        `training_run`. What is not known is `None`.
    """
    description = model_folder.describe(model) or {}
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
    """Return DVC's hash of a folder, from the `dvc.lock` that lists it as it is; `None`, with a note, if none does.

    Raises:
        AdfmError: The file is not what DVC writes: it was cut off, or has a conflict that nobody has resolved.
    """
    folder = folder.resolve()
    files = [path for path in folder.rglob("*") if path.is_file()]
    now = (len(files), sum(path.stat().st_size for path in files))
    locks = [lock for parent in folder.parents if (lock := parent / "dvc.lock").is_file()]
    for lock in locks:
        for out in _outs(lock):
            # An entry with another size or number of files is of an earlier state of the folder.
            if (lock.parent / out["path"]).resolve() == folder and (out.get("nfiles"), out.get("size")) == now:
                return str(out["md5"])
    if locks:
        lacks = f"{locks[0]} does not list {folder} as it is now, and the version lacks DVC's hash of its data"
        print(f"note: {lacks}; `dvc repro` or `dvc commit` records it")
    return None


def _outs(lock: Path) -> Iterator[dict[str, Any]]:
    stages = _read(lock).get("stages")
    for stage in stages.values() if isinstance(stages, dict) else ():
        outs = stage.get("outs") if isinstance(stage, dict) else None
        for out in outs if isinstance(outs, list) else ():
            # DVC commits a stage when it has ended: an interrupted one has no entry, or one without a hash.
            if isinstance(out, dict) and isinstance(out.get("path"), str) and out.get("md5"):
                yield out


def _read(lock: Path) -> dict[str, Any]:
    remedy = "Nothing was registered, and nothing is lost: repair the file, then register again."
    try:
        text = lock.read_text(encoding="utf-8")
        if conflict := _CONFLICT.search(text):
            line = text.count("\n", 0, conflict.start()) + 1
            raise AdfmError(
                f"{lock}: line {line}: has Git's conflict markers, so that it does not say which data is meant. Take"
                f" one side (`git checkout --ours dvc.lock` or `--theirs`), run `dvc repro`, and commit it. {remedy}"
            )
        content = yaml.safe_load(text) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        again = "Get it back (`git checkout dvc.lock`) or let DVC write it again (`dvc repro`)."
        raise AdfmError(f"{lock}: cannot be read ({' '.join(str(error).split())}). {again} {remedy}") from error
    if not isinstance(content, dict):
        raise AdfmError(f"{lock}: has no stages, as DVC writes them; get it back (`git checkout dvc.lock`). {remedy}")
    return content
