"""The documentation against the code and the files that it points to.

Every command of README and docs goes through its program's own parser here, and every setting and message is looked up
in the code. That the commands of a whole run work is tested in tests/pipelines/test_whole_path.py.
"""

import ast
import importlib.util
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from adfm import cli
from adfm.data.readers import LAYOUTS
from adfm.kubeflow.resources import RESOURCES
from adfm.params import Params, flat, load, loads
from tests.data.readers.exports import EXPORTS
from tests.test_architecture import rooms

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TOOLS = (DOCS / "tools.md").read_text()
OVERLAYS = ("Qwen", "qwen", "published")  # of params/: of models that need a GPU
SYSTEM = {
    *("aws", "cd", "curl", "cut", "export", "git", "kubectl", "mlflow", "openssl", "pip", "podman", "read"),
    *("sha256sum", "umask", "vllm"),
}
"""Programs that are not adfm's, and whose arguments are not checked."""

MARKED = {
    "README.md": {"GPU": 1, "cluster": 1},
    "data.md": {"network": 4},
    "index.md": {"network": 3},
    "kubernetes.md": {"GPU": 1, "cluster": 6, "network": 2},
    "own-images.md": {"network": 1},
    "server.md": {"cluster": 7, "network": 2},
    "signatures.md": {"cluster": 1},
    "training.md": {"GPU": 5, "network": 2},
}
"""How many blocks of each page need what a test does not have."""


class Block(NamedTuple):
    """A block of shell commands.

    Args:
        page: Name of the page.
        line: Line of its fence.
        needs: What it needs beyond a laptop, as the comment before it says: GPU, cluster, network.
        commands: Words of each command, without comments, redirections and variables set before the program.
    """

    page: str
    line: int
    needs: frozenset[str]
    commands: list[list[str]]


def blocks() -> Iterator[Block]:
    fence = (
        r"^(?:[ ]*<!-- needs: (?P<needs>[^>]*) -->\n+)?(?P<indent>[ ]*)```(?:sh|bash)\n(?P<text>.*?)^(?P=indent)```$"
    )
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(fence, text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start("indent")) + 1
            needs = frozenset(re.split(r",\s*", match["needs"])) if match["needs"] else frozenset()
            yield Block(page.name, line, needs, list(_commands(match["text"])))


def _commands(text: str) -> Iterator[list[str]]:
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for token in [*lexer, ";"]:
            if token in {"&&", "||", "|", "&", ";"}:
                yield from _command(words)
                words = []
            else:
                words.append(token)


def _command(words: list[str]) -> Iterator[list[str]]:
    for sign in ("<", ">"):
        words = words[: words.index(sign)] if sign in words else words
    while words and (words[0] == "do" or re.match(r"[A-Z_a-z]+=", words[0])):
        words = words[1:]
    if words and words[0] not in {"for", "done", "."}:
        yield words


BLOCKS = list(blocks())


def _check(command: list[str]) -> None:
    """Read a command as its program would.

    Raises:
        AssertionError: It names a file, module or target that does not exist.
        SystemExit: A parser refused it.
        AdfmError: It names a setting that does not exist, or a wrong value.
    """
    program, *arguments = command
    for word in arguments:
        if word.startswith(("deploy/", "configs/", "params/", "benchmarks/", "scripts/")):
            assert (ROOT / word).exists(), word
    if program == "adfm":
        _settings(cli._parse(arguments))
    elif program == "accelerate":
        assert arguments[0] == "launch"
        at = arguments.index("adfm")
        assert arguments[at - 1] == "-m"
        _settings(cli._parse(arguments[at + 1 :]))
    elif program == "make":
        _make(arguments)
    elif program == "dvc":
        _dvc(arguments)
    elif program == "python":
        _python(arguments)
    elif program.startswith("scripts/"):
        assert (ROOT / program).is_file(), program
    else:
        assert program in SYSTEM, f"{program} is neither checked nor in SYSTEM"


def _settings(args: object) -> None:
    load([ROOT / file for file in getattr(args, "params", None) or ()], getattr(args, "set", ()))


def _python(arguments: list[str]) -> None:
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
        load(None, [value for option, value in pairwise(arguments) if option == "--set"])
    elif arguments[1] == "experiments":
        from experiments.__main__ import _parser

        _settings(_parser().parse_args(arguments[2:]))
    elif arguments[1].startswith("pipelines."):
        _pipeline(arguments[1], arguments[2:])
    else:
        assert importlib.util.find_spec(arguments[1]), arguments[1]


def _pipeline(name: str, arguments: list[str]) -> None:
    from pipelines import command, promotion, training

    if name == "pipelines.training":
        _settings(command._parse(training.training, training.options, arguments))
    else:
        _settings(command._parse(promotion.promotion, promotion.options, arguments))


def _make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [word for word in arguments if "=" not in word]
    variables = dict(word.split("=", 1) for word in arguments if "=" in word)
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), arguments
    assert all(re.search(rf"\$\({name}\b|^{name} \?=", makefile, re.MULTILINE) for name in variables), arguments
    for file in shlex.split(variables.get("PARAMS", "")) + shlex.split(variables.get("REQUIREMENTS", "")):
        assert (ROOT / file).is_file(), file
    verb = {"kfp-run": "run", "submit": "submit"}.get(targets[0])
    if verb:
        host = ["--host", variables["HOST"]] if verb == "submit" else []
        _pipeline("pipelines.training", [verb, *host, *shlex.split(variables.get("ARGS", ""))])


def _dvc(arguments: list[str]) -> None:
    from dvc.cli.parser import get_main_parser

    args = get_main_parser().parse_args(arguments)
    if args.cmd == "repro":
        stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
        assert set(args.targets) <= set(stages), args.targets
    for override in getattr(args, "set_param", None) or ():
        load(None, [override])


def _needs(command: list[str]) -> set[str]:
    """What a command needs at least: a GPU, a cluster, the network."""
    text = " ".join(command)
    found = set()
    if command[0] in {"accelerate", "vllm"} or re.search(rf"params/({'|'.join(OVERLAYS)})|--num-gpus [1-9]|-gpu", text):
        found.add("GPU")
    if command[0] == "kubectl" or re.search(r"^make submit|^python -m pipelines\.\w+ submit", text):
        found.add("cluster")
    if command[0] in {"aws", "podman", "pip"} or re.search(
        r"^make (setup|image)|^git (clone|push)|^dvc (push|pull)|^curl .*https://|^adfm fetch (s3|dvc)://", text
    ):
        found.add("network")
    return found


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_every_command_is_one_that_its_program_accepts(block: Block) -> None:
    assert block.commands
    for command in block.commands:
        _check(command)


def test_blocks_that_need_more_than_a_laptop_say_so() -> None:
    unmarked = [
        f"{block.page}:{block.line}: {command}: {missing}"
        for block in BLOCKS
        for command in block.commands
        if (missing := _needs(command) - block.needs)
    ]
    assert unmarked == []
    marked: dict[str, Counter[str]] = defaultdict(Counter)
    for block in BLOCKS:
        marked[block.page].update(block.needs)
    assert {page: needs for page, needs in marked.items() if needs} == MARKED


def test_verbs_within_sentences_exist(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = {verb for page in PAGES for verb in re.findall(r"`adfm ([a-z][a-z-]*)", page.read_text(encoding="utf-8"))}
    assert len(verbs) > 20
    for verb in sorted(verbs):
        with pytest.raises(SystemExit) as stopped:
            cli._parse([verb, "--help"])
        assert stopped.value.code == 0, verb
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files(page: Path) -> None:
    targets = re.findall(r'\]\(([^)#:\s]+)(?:#[^)]*)?\)|<img src="([^":]+)"', page.read_text())
    assert [target for pair in targets for target in pair if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_project_that_a_page_names_exist(page: Path) -> None:
    folders = "adfm|benchmarks|components|configs|deploy|experiments|params|pipelines|scripts|tests"
    files = re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]+\.(?:py|sh|yaml|css))", page.read_text(encoding="utf-8"))
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_every_layout_is_in_the_tables_of_tools() -> None:
    assert LAYOUTS.keys() - set(re.findall(r"`([\w-]+)`", TOOLS)) == set()


def test_every_export_has_its_picture_in_tools_and_no_other_is_kept() -> None:
    pictures = {path.stem for path in (DOCS / "images" / "tools").iterdir()}
    assert pictures == set(EXPORTS) == set(re.findall(r"images/tools/([\w-]+)\.jpg", TOOLS))


def test_settings_exist() -> None:
    """Of every page: `section.key` in a sentence, `--set`, and blocks of YAML."""
    sections, keys = Params.model_fields, flat(Params())
    names = {*keys, *(key[: dot.start()] for key in keys for dot in re.finditer(r"\.", key))}
    others = {
        "adfm",
        "csv",
        "db",
        "json",
        "language_model",
        "layers",
        "prompt",
        "pyfunc",
        "sig",
        "yaml",
    }  # mlflow.db, model.sig, train.csv
    wrong, read = [], 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(rf"(?:`|--set |-S )['\"]?((?:{'|'.join(sections)})\.[a-z_.0-9]+)", text):
            read += 1
            if (setting := name.rstrip(".")) not in names and setting.split(".")[1] not in others:
                wrong.append(f"{page.name}: {name}")
        for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if (yaml.safe_load(block) or {}).keys() & sections.keys():
                read += 1
                loads(block)
    assert wrong == []
    assert read > 150


@cache
def _texts() -> list[str]:
    """Every literal text of the code, f-strings piece by piece."""
    folders = ("adfm", "components", "pipelines", "scripts")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [*texts, (ROOT / "Makefile").read_text()]


def test_every_message_of_troubleshooting_is_one_of_the_code() -> None:
    """A message is quoted with `…` for what changes; each piece between is in one text of the code."""
    cells = re.findall(r"^\| (`.*?) \| ", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(cells) > 60
    messages = [
        message for cell in cells for message in re.findall(r"`([^`]+)`", cell) if not message.startswith("adfm ")
    ]
    pieces = [(piece.strip(), message) for message in messages for piece in message.split("…")]
    assert [message for piece, message in pieces if not any(piece in text for text in _texts())] == []


def test_the_rows_of_the_front_page_are_those_of_start() -> None:
    rows = re.findall(r"^\| [\w ]+ \| 0\..*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows and set(rows) <= set((DOCS / "index.md").read_text().splitlines())


def test_the_tables_of_design_have_every_package_and_stage() -> None:
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    inside, beside = text.split("| in `adfm/` |")[1].split("| beside it |")
    packages = re.findall(r"`([\w/.]+)`", " ".join(re.findall(r"^\| (`.*?) \|", inside, re.MULTILINE)))
    assert [path for path in packages if not (ROOT / "adfm" / path).exists()] == []
    names = {path.rstrip("/").removesuffix(".py") for path in packages} | {"components", "pipelines"}
    assert names == {room.removeprefix("adfm.") for room in rooms()} - {"adfm", "__main__"}
    folders = " ".join(re.findall(r"^\| (`.*?) \|", beside.partition("## ")[0], re.MULTILINE))
    assert [path for path in re.findall(r"`([\w/.]+)`", folders) if not (ROOT / path).exists()] == []
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert re.findall(r"^\| `([a-z]+)` \| ", text, re.MULTILINE) == list(stages)


def test_the_table_of_tasks_is_that_of_the_resources() -> None:
    row = r"^\| `([a-z-]+)` \| (cpu|gpu) \| (\d+) \| (\d+) GiB \| (yes|no) \| (on|off) \|"
    rows = {task: cells for task, *cells in re.findall(row, (DOCS / "kubernetes.md").read_text(), re.MULTILINE)}
    assert rows == {
        task: [
            "gpu" if entry.gpu else "cpu",
            entry.cpu,
            entry.memory.removesuffix("Gi"),
            "yes" if entry.gpu else "no",
            "on" if entry.cached else "off",
        ]
        for task, entry in RESOURCES.items()
    }
