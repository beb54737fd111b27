"""Submit the training pipeline for an event of GitHub: `python -m pipelines.trigger`, in .github/workflows/train.yaml.

New data is a push that changes `dvc.lock`, or a `repository_dispatch` that a bucket's event notification sends with
`{"source": …, "revision": …}`. A schedule trains on what the settings name; by hand, settings can be given. Options for
every event, such as `--num-gpus 2 --namespace team`, are in the variable `ADFM_SUBMIT_OPTIONS`.
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from adfm.errors import AdfmError
from pipelines import training
from pipelines.command import main


def arguments(event: str, payload: dict[str, Any], repository: str, commit: str, lock: Path) -> list[str]:
    """The options of `submit` for an event.

    Args:
        event: Its name.
        payload: Its content.
        repository: Address of the Git repository.
        commit: That the event is about.
        lock: `dvc.lock` at that commit.

    Raises:
        AdfmError: The event lacks something, or is of another kind.
    """
    if event == "push":
        try:
            out = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]["fetch"]["outs"][0]
            path, md5 = out["path"], out["md5"]
            if not md5:  # of a stage that was interrupted
                raise LookupError("md5")
        except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
            raise AdfmError(
                f"{lock} does not have the output of the stage fetch; run `dvc repro` and commit it."
            ) from error
        return ["--data-revision", str(md5), "--set", f"fetch.source=dvc://{repository}@{commit}:{path}"]
    if event == "repository_dispatch":
        sent = payload.get("client_payload") or {}
        if not (sent.get("source") and sent.get("revision")):
            raise AdfmError("the event has to carry client_payload.source and client_payload.revision.")
        return ["--data-revision", str(sent["revision"]), "--set", f"fetch.source={sent['source']}"]
    if event == "workflow_dispatch":
        return split((payload.get("inputs") or {}).get("arguments") or "", "the input `arguments`")
    if event == "schedule":
        return []
    raise AdfmError(f"nothing is trained for the event {event!r}.")


def split(text: str, source: str) -> list[str]:
    """Options as a shell splits them.

    Raises:
        AdfmError: A quotation mark is not closed; the message names the source of the text.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise AdfmError(f"{source}: {error} in {text!r}.") from error


if __name__ == "__main__":
    try:
        if "GITHUB_EVENT_PATH" not in os.environ:
            raise AdfmError("no event of GitHub Actions here (GITHUB_EVENT_PATH); use `python -m pipelines.training`.")
        options = split(os.environ.get("ADFM_SUBMIT_OPTIONS", ""), "ADFM_SUBMIT_OPTIONS")
        options += arguments(  # later options win
            os.environ["GITHUB_EVENT_NAME"],
            json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8")),
            f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}",
            os.environ["GITHUB_SHA"],
            Path("dvc.lock"),
        )
    except AdfmError as error:
        raise SystemExit(f"trigger: error: {error}") from error
    except KeyError as error:
        raise SystemExit(f"trigger: error: {error} is not set; this runs in a workflow of GitHub.") from error
    raise SystemExit(
        main(training.PIPELINES, training.options, training.arguments, ["submit", *options, *sys.argv[1:]])
    )
