"""Typed settings of `params.yaml`: one class a section, one section a stage.

The defaults are those of the embedded run, so that `Params()` equals the shipped `params.yaml`. Further files are
overlays, which have only the settings that they change.
"""

import difflib
import functools
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from adfm.errors import AdfmError
from adfm.method.terms import WEIGHTS
from adfm.text import did_you_mean

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
M = TypeVar("M", bound=BaseModel)

RENAMED = {
    "register": "mlflow",
    "register.model": "registered_model",
    "train.favour_doubt": "uncertainty_sampling",
    "train.resample": "dynamic_sampling",
    "validate": "validation",
    "warmup": "sft",
}
"""Dotted keys before 0.1.0, and the name that the last part has now; both are read until 0.3."""


class Section(BaseModel):
    """A section of `params.yaml`: unknown keys are errors, values are not coerced across types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Fetch(Section):
    """Where the raw data set comes from."""

    source: str = "synthetic://?images=200"
    # Part of file names, with endings; file systems take 255 bytes.
    name: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "synthetic"


class Convert(Section):
    """Raw data set to shards."""

    layout: str = "auto"
    category: Literal["layout", "folder"] = "layout"
    missing: Literal["refuse", "skip"] = "refuse"
    rescale: bool = False
    mask_threshold: Fraction = 0.5
    dilation: Fraction = 0.04
    connectivity: Literal[4, 8] = 8
    min_area: NonNegativeInt = 4
    shard_images: PositiveInt = 1000


class Split(Section):
    """Train, validation and test."""

    validation: Fraction = 0.1
    test: Fraction = 0.4
    holdout_categories: list[str] = []
    near_duplicates: bool = True
    group: str | None = None
    redivide: bool = False

    @model_validator(mode="after")
    def _leaves_some_to_train(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test should be less than 1, or nothing is left to train on")
        return self


class Validation(Section):
    """Data validation before training."""

    min_side: PositiveInt = 16
    max_side: PositiveInt = 8192
    max_aspect: PositiveFloat = 8.0
    min_images_per_split: PositiveInt = 20
    min_label_share: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    min_category_images: NonNegativeInt = 1
    reference: str | None = "production"
    max_drift: Fraction = 0.2
    max_shift: PositiveFloat = 0.5


class Tile(Section):
    """Tiles into which large images are cut, at full resolution."""

    size: Annotated[int, Field(ge=32)] | None = None
    overlap: Annotated[float, Field(gt=0, le=0.5)] = 0.2


class Model(Section):
    """The base model."""

    name: str = "embedded://tiny-base"
    revision: str | None = None
    max_pixels: PositiveInt | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    quantization: Literal["nf4"] | None = None


class Lora(Section):
    """The LoRA adapter: SFT creates it, GRPO trains it further."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Fraction = 0.0
    target_modules: str | list[str] = "all-linear"
    vision: bool = True


class Sft(Section):
    """Supervised cold start."""

    steps: NonNegativeInt = 60
    epochs: PositiveInt = 20
    patience: NonNegativeInt = 3
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-3
    anomalous_share: Fraction = 0.5
    augment: bool = True
    places_weight: NonNegativeFloat = 0.3
    coordinate_step: PositiveInt = 10
    stages: bool = True
    kinds: bool = False

    @model_validator(mode="after")
    def _kinds_have_a_stage(self) -> Self:
        if self.kinds and not self.stages:
            raise ValueError("kinds are part of a stage of the answer: set stages to true, or kinds to false")
        return self


class Detector(Section):
    """Reference detector."""

    steps: PositiveInt = 400


# From the terms of the reward, so that a new term has a weight without a change here.
_fields: dict[str, Any] = {term: (NonNegativeFloat, weight) for term, weight in WEIGHTS._asdict().items()}
_TermWeights: Any = create_model("_TermWeights", __base__=Section, **_fields)


class RewardWeights(_TermWeights):  # type: ignore[misc]
    """Weight of each term in the total reward."""

    kind: NonNegativeFloat = 0.5


class Health(Section):
    """Health checks: when a training is stopped as diverged or as one that learns nothing."""

    patience: NonNegativeInt = 25
    min_utilisation: Fraction = 0.01
    max_kl: PositiveFloat = 5.0
    min_reward_range: NonNegativeFloat = 0.001
    min_other_letter: Fraction = 0.02
    max_region_overlap: Fraction = 0.8


class Train(Section):
    """GRPO."""

    profile: Literal["calibrated", "paper"] = "calibrated"
    weights: RewardWeights = RewardWeights()
    steps: PositiveInt = 40
    prompts_per_step: PositiveInt = 12
    num_generations: Annotated[int, Field(ge=2)] = 4
    anomalous_share: Fraction = 0.55
    learning_rate: PositiveFloat = 2e-4
    warmup_ratio: Fraction = 0.03
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegativeInt = 0
    max_completion_length: PositiveInt = 96
    beta: NonNegativeFloat = 0.02
    epsilon: PositiveFloat = 0.2
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = "dapo"
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    max_grad_norm: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    optimizer: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    micro_batch: PositiveInt | None = None
    gradient_checkpointing: bool = False
    liger: Literal["auto"] | bool = "auto"
    vllm: Annotated[float, Field(gt=0, lt=1)] | None = None
    vllm_server: str | None = None
    checkpoint_every: PositiveInt = 25
    pictures_every: NonNegativeInt = 25
    dynamic_sampling: NonNegativeInt = 0
    uncertainty_sampling: bool = False
    health: Health = Health()


class Evaluate(Section):
    """Greedy decoding of the test split, and its metrics."""

    backend: Literal["auto", "transformers", "vllm"] = "auto"
    split: Literal["train", "validation", "test"] = "test"
    folds: NonNegativeInt = 0
    batch_size: PositiveInt = 96
    max_new_tokens: PositiveInt = 96
    score: Literal["branch", "letter"] = "branch"
    samples: NonNegativeInt = 0
    bootstrap: PositiveInt = 2000
    small: Fraction = 0.01
    large: Fraction = 0.05
    calibration: Literal["temperature", "isotonic", "none"] = "temperature"
    overkill_limit: Annotated[float, Field(ge=0, lt=1)] | None = 0.05
    escape_limit: Annotated[float, Field(ge=0, lt=1)] | None = None

    @field_validator("folds")
    @classmethod
    def _several_or_none(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("1 fold would train on nothing: folds should be 0 (none) or at least 2")
        return folds

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.overkill_limit is None) == (self.escape_limit is None):
            raise ValueError("set exactly one of overkill_limit and escape_limit, and the other to null")
        if self.small > self.large:
            raise ValueError("small should be at most large")
        return self


class Mlflow(Section):
    """Where runs and versions go in MLflow."""

    experiment: str = "adfm"
    registered_model: str = "adfm"

    @field_validator("experiment")
    @classmethod
    def _an_experiment(cls, name: str) -> str:
        if not (0 < len(name) <= 256 and name.isprintable() and name == name.strip()):  # the column in MLflow's schema
            raise ValueError(f"{name!r} should be 1 to 256 printable characters, without blanks at its ends")
        return name

    @field_validator("registered_model")
    @classmethod
    def _a_model(cls, name: str) -> str:
        # The name stands in URIs (models:/NAME/1) and in MLflow's search expressions.
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,51}[A-Za-z0-9])?", name):
            raise ValueError(
                f"{name!r} should be 1 to 53 letters (A to Z), digits, dots, underscores and hyphens, with a letter or "
                "digit first and last"
            )
        if name.lower().endswith("-history"):
            raise ValueError(f"{name!r} should not end in -history: that is where adfm keeps the history of a model")
        return name


class Params(Section):
    """Every setting of a run."""

    seed: NonNegativeInt = 0
    fetch: Fetch = Fetch()
    convert: Convert = Convert()
    split: Split = Split()
    validation: Validation = Validation()
    tile: Tile = Tile()
    model: Model = Model()
    lora: Lora = Lora()
    sft: Sft = Sft()
    detector: Detector = Detector()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    mlflow: Mlflow = Mlflow()


def load(files: Path | Sequence[Path] | None = None, overrides: Sequence[str] = ()) -> Params:
    """Read settings files, later ones over earlier ones, and overrides over all of them.

    Args:
        files: YAML files; settings that none of them has keep their defaults. Without any, `params.yaml` if it exists.
        overrides: `key=value` with a dotted key and a YAML value, as in `train.steps=50`; later ones win.

    Raises:
        AdfmError: A file is missing or not YAML, or keys or values are wrong: all are listed, with file and line.
    """
    return _params([(_text(file), str(file)) for file in _files(files)], overrides)


def merged(files: Path | Sequence[Path] | None = None, overrides: Sequence[str] = ()) -> str:
    """Return the text of the first settings file with the values that `load` reads from all of them.

    Comments and layout stay; a setting that the file lacks is added to its section.

    Args:
        files: As of `load`.
        overrides: As of `load`.

    Raises:
        AdfmError: As `load`; or the first file is written in a way that cannot be edited line by line.
    """
    paths = _files(files)
    if not paths:
        raise AdfmError("no params.yaml in this folder to apply the settings to; give a file with --params.")
    first = str(paths[0])
    text = _with_new_names(_text(paths[0]), first)
    params, before = load(paths, overrides), flat(_params([(text, first)], ()))
    for key, value in flat(params).items():
        if value != before[key]:
            text = _replaced(text, key.split("."), value)
    if loads(text) != params:
        raise AdfmError(f"{first}: write it in plain YAML, a line a setting, as params.yaml is when adfm ships it.")
    return text


def loads(text: str, overrides: Sequence[str] = ()) -> Params:
    """Read the settings of a YAML text, as `load` does of a file; an empty text gives the defaults.

    Raises:
        AdfmError: It is not YAML, or keys or values are wrong: all of them are listed.
    """
    return _params([(text, "params")], overrides)


def _files(files: Path | Sequence[Path] | None) -> Sequence[Path]:
    if files:
        return [files] if isinstance(files, Path) else files
    return [file for file in (Path("params.yaml"),) if file.is_file()]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdfmError(f"the settings file {file} cannot be read: {error}.") from error


def _params(texts: Sequence[tuple[str, str]], overrides: Sequence[str]) -> Params:
    texts = [(_with_new_names(text, place), place) for text, place in texts]
    return validated(Params, texts, [_with_new_name(override) for override in overrides])


def _with_new_names(text: str, place: str) -> str:
    """A YAML text in which the keys of `RENAMED` have their new names; all else stays, to the byte."""
    try:
        keys = [(name, key) for name, key, _ in _nodes(_composed(text)) if name in RENAMED]
    except yaml.YAMLError:
        return text  # reported where it is read
    for name, key in reversed(keys):  # from the end, so that the earlier places stay right
        text = text[: key.start_mark.index] + RENAMED[name] + text[key.end_mark.index :]
    if keys:
        note_renamed(place, tuple(name for name, _ in keys))
    return text


def _with_new_name(override: str) -> str:
    key, equals, value = override.partition("=")
    if old := tuple(name for name in _prefixes(key) if name in RENAMED):
        note_renamed(f"--set {override}", old)
    return new_name(key) + equals + value


@functools.cache
def note_renamed(place: str, names: tuple[str, ...]) -> None:
    """Print, once a process, which settings of a place have new names."""
    pairs = ", ".join(f"`{name}` is now `{new_name(name)}`" for name in names)
    print(f"{place}: {pairs}; the old names are read until adfm 0.3", file=sys.stderr)


def new_name(old: str) -> str:
    """Return the dotted key that a setting or section has now."""
    return ".".join(RENAMED.get(prefix, prefix.rpartition(".")[2]) for prefix in _prefixes(old))


def _prefixes(key: str) -> list[str]:
    return list(itertools.accumulate(key.split("."), "{}.{}".format))  # of `a.b.c`: `a`, `a.b`, `a.b.c`


def validated(
    model: type[M], texts: Sequence[tuple[str, str]], overrides: Sequence[str] = (), listed: str = "params.yaml"
) -> M:
    """Validate settings of any kind: later texts over earlier ones, overrides over all, defaults for the rest.

    Args:
        model: Their type; it has a default for every setting.
        texts: YAML texts, each with its name for messages.
        overrides: `key=value`.
        listed: Name of the file that lists all settings, for messages about unknown ones.

    Raises:
        AdfmError: A text is not YAML, or keys or values are wrong: all of them are listed.
    """
    defaults = model()
    keys = list(flat(defaults))
    sections = _sections(keys)
    values: dict[str, Any] = {}
    where: dict[str, str] = {}  # dotted key -> the place that sets it, for messages
    problems = []
    for text, place in texts:
        tree, lines, wrong = _read(text, place, sections)
        values = _merge(values, tree)
        where |= lines
        problems += wrong
    for override in overrides:
        key, equals, text = override.partition("=")
        place = f"--set {override}"
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            problems.append(f"{place}: the value is not YAML; put it in quotes of its own")
            continue
        if not equals:
            problems.append(f"{place}: key=value is expected, as in train.steps=50")
        elif key not in keys:
            problems.append(f"{place}: {_unknown(key, keys, listed)}")
        else:
            values = _merge(values, _nested(key.split("."), value))
            where |= dict.fromkeys(_prefixes(key), place)
    try:
        settings = model.model_validate(_merge(defaults.model_dump(by_alias=True), values))
    except ValidationError as error:
        problems += _problems(error, where, [*keys, *sections], listed)
    if problems:
        raise AdfmError("\n  ".join(["these settings are wrong:", *problems]))
    return settings


def flat(params: BaseModel) -> dict[str, object]:
    """Return every setting by its dotted key, with the keys of the file."""

    def leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(leaves(params.model_dump(by_alias=True), ""))


class _Loader(yaml.SafeLoader): ...


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)): ...  # type: ignore[misc]


class _Dumper(yaml.SafeDumper): ...


# `1e-3` is a number, which YAML 1.1 has as text; as a text it is written in quotes.
for _side in (_Loader, _FastLoader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _composed(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, _FastLoader)  # libyaml: fifteen times as fast
    except yaml.YAMLError:
        return yaml.compose(text, _Loader)  # its errors name the line that is wrong


def _nodes(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield the dotted key of every setting and section of a YAML text, the node of its key and that of its value."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        yield f"{prefix}{key.value}", key, value
        yield from _nodes(value, f"{prefix}{key.value}.")


def _read(text: str, place: str, sections: Sequence[str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The settings of a text, the place of each by dotted key, and problems of its form."""
    try:
        root = _composed(text)
        settings = _Loader("").construct_document(root) if root else {}
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise AdfmError(f"{place}{line} is not YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise AdfmError(f"the settings {place} cannot be read: {error}.") from error
    if not isinstance(settings, dict):
        raise AdfmError(f"{place}: sections with keys are expected, as in `train: {{steps: 50}}`.")
    where: dict[str, str] = {}
    problems = []
    for name, key, node in _nodes(root):
        line = f"{place} line {key.start_mark.line + 1}"
        if name in where:
            problems.append(f"{line}: {name} is set already in line {where[name].split()[-1]}; keep one of them")
        where[name] = line
        if name in sections and not isinstance(node, yaml.MappingNode):
            # Reported and removed here: a later file, or an override, may have the section, and would hide it.
            *outer, last = name.split(".")
            value = functools.reduce(dict.__getitem__, outer, settings).pop(last)
            problems.append(f"{line}: {name} should be a section with keys, not {value!r}")
    return settings, where, problems


def _replaced(text: str, key: Sequence[str], value: object) -> str:
    node: Any = _composed(text)  # only the value is replaced: all else stays, to the byte
    for depth, name in enumerate(key):
        members = node.value if isinstance(node, yaml.MappingNode) else []
        inner = next((inner for member, inner in members if member.value == name), None)
        if inner is None:
            return _added(text, node, f"{name}: {_written(_nested(key[depth + 1 :], value))}")
        node = inner
    start = node.start_mark.index
    # The node of an empty value begins at the colon.
    return text[:start] + " " * (text[start - 1] == ":") + _written(value) + text[_end(node) :]


def _added(text: str, section: Any, line: str) -> str:
    """A YAML text with one more `key: value` at the end of a section, or of an empty text, whose section is `None`."""
    if section is None:
        return f"{text}\n{line}\n".lstrip("\n")
    if section.flow_style:
        at = section.end_mark.index - 1
        return text[:at] + ", " * bool(section.value) + line + text[at:]
    at = text.find("\n", _end(section))
    at = len(text) if at < 0 else at
    return f"{text[:at]}\n{' ' * section.start_mark.column}{line}{text[at:]}"


def _end(node: Any) -> int:
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]  # the end mark of a block comes after the comments that follow it
    return _end(last[1] if isinstance(node, yaml.MappingNode) else last)


def _nested(keys: Sequence[str], value: object) -> Any:
    return {keys[0]: _nested(keys[1:], value)} if keys else value


def _written(value: object) -> str:
    if type(value) in (int, float):
        return repr(value)  # PyYAML writes 1e-05 as 1.0e-05
    # On one line, and valid in brackets too.
    text: str = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip()[1:-1]


def _merge(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """`later` over `earlier`, key by key: a section keeps the settings that `later` does not have."""
    both = dict(earlier)
    for key, value in later.items():
        before = earlier.get(key)
        both[key] = _merge(before if isinstance(before, dict) else {}, value) if isinstance(value, dict) else value
    return both


def _problems(error: ValidationError, where: dict[str, str], names: Sequence[str], listed: str) -> list[str]:
    """One line a key: where it is, what is expected, and what is there."""
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        key = ".".join(map(str, detail["loc"]))
        unknown = detail["type"] == "extra_forbidden"
        while not unknown and key and key not in where:  # pydantic appends the member of a union, the index in a list
            key = key.rpartition(".")[0]
        message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
        if unknown:
            message = _unknown(key, names, listed)
        elif detail["type"] == "value_error":
            message = f"{key}: {message}"
        elif key in lines:  # another member of a union
            message = f"{lines[key]}; or {message}"
        else:
            quotes = detail["type"] == "string_type" and isinstance(detail["input"], int | float)
            message = f"{key} {message}, not {detail['input']!r}" + " (put it in quotes)" * quotes
        lines[key] = message
    return [f"{where.get(key, 'settings')}: {message}" for key, message in lines.items()]


def _unknown(key: str, names: Sequence[str], listed: str) -> str:
    sections = _sections(names)
    if key in sections:
        return f"{key} is a section; set one of its keys, as in {next(n for n in names if n.startswith(f'{key}.'))}"
    section, _, leaf = key.rpartition(".")
    # Its own section is not an answer; an undotted name is none to a dotted key either.
    candidates = [name for name in names if ("." in name or not section) and not (name == section and name in sections)]
    near = [name for name in candidates if not section and name.rpartition(".")[2] == key]  # `steps`, for `train.steps`

    def likeness(name: str) -> float:
        # Within one section the common prefix would make any two keys alike: `train.foo` and `train.top_p`.
        same = leaf and name.rpartition(".")[0] == section
        return difflib.SequenceMatcher(None, *((leaf, name.rpartition(".")[2]) if same else (key, name))).ratio()

    if not near and likeness(best := max(candidates, key=likeness)) >= 0.7:
        near = [best]  # `seed`, for `sede`
    return f"unknown setting `{key}`; " + (did_you_mean(near) or f"{listed} lists all settings")


def _sections(keys: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(section for key in keys for section in _prefixes(key)[:-1]))
