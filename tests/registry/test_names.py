"""Names in `register.*`: what the settings accept, MLflow's registry, URIs, webhooks and database accept too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.store.artifact.utils.models import _parse_model_uri
from mlflow.utils.validation import _validate_experiment_name, _validate_model_name, _validate_webhook_name

from adfm import tracking
from adfm.models import versions
from adfm.params import Mlflow, Params
from adfm.registry.promotion import history, promote

ACCEPTED = ["a", "0", "12", "x" * 53, "Steel-plates_2.v3", "a..b", "latest", "models", "Production", "m-0f" + "0" * 30]


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_name_that_is_accepted_is_registered_promoted_and_found(store, add, tmp_path: Path, name: str) -> None:
    params = Params.model_validate({"mlflow": {"registered_model": name}})
    assert add(28, model=name) == "1"
    promote("1", params.mlflow.registered_model, "Ada")
    for uri in (f"models:/{name}/1", f"models:/{name}@production"):
        (tmp_path / "fetched").mkdir(exist_ok=True)
        folder, version = versions.fetch(uri, tmp_path / "fetched")
        assert version == f"models:/{name}/1"
        assert (Path(folder) / "adapter_model.safetensors").is_file()
    assert [step.version for step in history(params.mlflow.registered_model).counting if step.action == "promote"] == [
        "1"
    ]


REFUSED = [
    *(
        "",
        " ",
        "a/b",
        "a@b",
        "a:b",
        "a b",
        " a",
        "a ",
        "a\n",
        ".",
        "..",
        ".a",
        "a.",
        "-a",
        "a-",
        "../a",
        "a%20b",
        "a?b",
    ),
    *("a#b", "a'b", "Prüfung", "検査", "a\0b", "x" * 54, "adfm-history", "adfm-HISTORY"),
]


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_name_of_a_model_is_refused_with_what_is_accepted(name: str) -> None:
    with pytest.raises(ValueError, match="letters|-history"):
        Mlflow(registered_model=name)


@given(
    st.text(max_size=70) | st.from_regex(r"[\w. @:/%'-]{1,60}", fullmatch=True) | st.from_regex(r"[A-z0-9._-]{1,60}")
)
def test_what_is_accepted_mlflow_accepts_and_reads_back(name: str) -> None:
    try:
        Mlflow(registered_model=name)
    except ValueError:
        return
    _validate_model_name(name)
    _validate_model_name(f"{name}-history")
    _validate_webhook_name(f"{name}-approvals")
    for version, alias in (("1", None), (None, "production")):
        uri = f"models:/{name}/{version}" if version else f"models:/{name}@{alias}"
        parsed = _parse_model_uri(uri)
        assert (parsed.name, parsed.version, parsed.alias) == (name, version, alias)
        assert versions._URI.fullmatch(uri)["name"] == name


@pytest.mark.parametrize("name", ["adfm", "a/b", "/Users/ada/lines", "Prüfung 3", "100 %", 'it\'s "here"', "x" * 256])
def test_an_experiment_that_is_accepted_takes_runs(store, name: str) -> None:
    params = Params.model_validate({"mlflow": {"experiment": name}})
    _validate_experiment_name(name)
    with tracking.start_run("train", params) as run:
        pass
    experiment = tracking.client().get_experiment_by_name(name)
    assert tracking.client().get_run(run.info.run_id).info.experiment_id == experiment.experiment_id


@pytest.mark.parametrize("name", ["", " ", " a", "a ", "a\nb", "a\0b", "x" * 257, "\ud800"])
def test_any_other_name_of_an_experiment_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="mlflow.experiment|printable"):
        Mlflow(experiment=name)
