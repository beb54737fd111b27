"""Settings: the shipped file, the defaults, overrides, and messages that help."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.errors import AdfmError
from adfm.params import Params, _written, flat, load, loads, merged

SHIPPED = Path(__file__).parents[1] / "params.yaml"
DEFAULTS = flat(Params())


def written(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text)
    return file


def problems(file: Path | list[Path] | None, *overrides: str) -> list[str]:
    with pytest.raises(AdfmError) as caught:
        load(file, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_the_shipped_file_is_complete_and_says_the_defaults() -> None:
    def keys(tree: dict[str, object], prefix: str = "") -> set[str]:
        nested = ((f"{prefix}{key}", value) for key, value in tree.items())
        return set().union(*(keys(v, f"{k}.") if isinstance(v, dict) else {k} for k, v in nested))

    assert load(SHIPPED) == Params()
    assert keys(yaml.safe_load(SHIPPED.read_text())) == set(DEFAULTS)


def test_every_key_of_the_shipped_file_has_a_comment() -> None:
    lines = [line for line in SHIPPED.read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if len(line.partition(" # ")[2]) < 5] == []


def test_without_a_file_the_one_in_the_current_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load() == Params()
    (tmp_path / "params.yaml").write_text("seed: 7")
    assert load().seed == 7


def test_what_a_file_or_an_override_leaves_out_keeps_its_own_default(tmp_path: Path) -> None:
    file = written(tmp_path, "train: {weights: {format: 0.25}}\nseed: 3")
    params = load(file, ["train.health.max_kl=0.5"])
    assert flat(params) == DEFAULTS | {"train.weights.format": 0.25, "train.health.max_kl": 0.5, "seed": 3}


def test_a_later_file_wins_key_by_key_and_an_override_over_all(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.yaml", tmp_path / "overlay.yaml"
    base.write_text("seed: 1\ntrain: {steps: 5, weights: {format: 2.0}}\nlora: {r: 4}")
    overlay.write_text("seed: 2\ntrain: {beta: 0.5, weights: {localization: 3.0}}\nlora: {r: 8}")
    expected = {"seed": 2, "train.steps": 5, "train.beta": 0.5, "lora.r": 9}
    expected |= {"train.weights.format": 2.0, "train.weights.localization": 3.0}
    assert flat(load([base, overlay], ["lora.r=9"])) == DEFAULTS | expected
    assert load([overlay, base]).seed == 1


def test_problems_of_several_files_are_listed_each_with_its_file_and_line(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.yaml", tmp_path / "overlay.yaml"
    base.write_text("seed: 1\ntrain: fast\nlora: {q: 4}\nsplit: {test: 0.5}\nevaluate: {small: 2}")
    overlay.write_text("train: {steps: 0}\n\nseed: 2\nsplit:\n  validation: 0.5\nseed: 3")
    assert sorted(problem.partition(": ")[0] for problem in problems([base, overlay])) == [
        *(f"{base} line {line}" for line in (2, 3, 5)),
        *(f"{overlay} line {line}" for line in (1, 4, 6)),
    ]


def test_merged_keeps_every_comment_and_changes_the_named_settings_alone(tmp_path: Path) -> None:
    overlay = written(tmp_path, "lora: {target_modules: [q_proj, v_proj]}\ntrain: {learning_rate: 1e-5, vllm: 0.3}")
    text = merged([SHIPPED, overlay], ["model.name='a folder: of mine, #1'", "model.revision='0123'"])
    before, after = SHIPPED.read_text().splitlines(), text.splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.partition(" # ")[0].strip().partition(":")[0] for _, new in changed] == [
        *("name", "revision", "target_modules", "learning_rate", "vllm")
    ]
    assert all(new.endswith(old[old.index(" # ") :]) for old, new in changed)
    result = tmp_path / "result.yaml"
    result.write_text(text)
    assert load(result) == load([SHIPPED, overlay], ["model.name='a folder: of mine, #1'", "model.revision='0123'"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing yet",
        "seed: 1 # first\n\n# a word\ntrain:\n  health: # of it\n    patience: 4 # steps\n\n  # end\n",
        "train: {health: {}}\nsplit: {}",
        "split:\n  holdout_categories:\n    - x # 1\n    - y\n  # more\n  test: 0.3\nmodel:\n  revision:\nseed: 0",
        "{seed: 3, model: {name: x}}",
        "model: {revision: null}\ntrain:\n    steps: 3\n    # deep\n    health: {patience: 9}",
    ],
)
def test_merged_into_files_as_people_write_them(tmp_path: Path, text: str) -> None:
    base, overlay, result = (tmp_path / f"{name}.yaml" for name in ("base", "overlay", "result"))
    base.write_text(text)
    overlay.write_text(yaml.safe_dump({"seed": 5, "split": {"holdout_categories": ["a", "b: #c"]}}))
    result.write_text(merged([base, overlay], ["model.revision=abc", "train.health.patience=3"]))
    assert load(result) == load([base, overlay], ["model.revision=abc", "train.health.patience=3"])
    assert [line for line in text.splitlines() if line.strip().startswith("#")] == [
        line for line in result.read_text().splitlines() if line.strip().startswith("#")
    ]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_settings_can_be_merged_into_the_shipped_file(data: st.DataObject) -> None:
    values = {
        "fetch.source": st.text(max_size=12),
        "split.holdout_categories": st.lists(st.text(max_size=5), max_size=3),
        "model.revision": st.none() | st.text(max_size=8),
        "train.learning_rate": st.floats(1e-12, 1e6, allow_subnormal=False),
        "train.micro_batch": st.none() | st.integers(1, 99),
        "train.liger": st.booleans(),
    }
    chosen = data.draw(st.fixed_dictionaries({}, optional=values))
    overrides = [f"{key}={_written(value)}" for key, value in chosen.items()]
    assert loads(merged(SHIPPED, overrides)) == load(SHIPPED, overrides)


def test_a_file_that_cannot_be_written_into_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "sft: &steps {steps: 5}\ntrain: *steps")
    assert load(file, ["train.steps=3"]).sft.steps == 5
    with pytest.raises(AdfmError, match=r"settings\.yaml: write it in plain YAML"):
        merged(file, ["train.steps=3"])


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", ".1e-2", "1E-03"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert load(None, [f"train.learning_rate={text}"]).train.learning_rate == 0.001
    assert load(written(tmp_path, f"train: {{learning_rate: {text}}}")).train.learning_rate == 0.001


def test_a_whole_number_is_a_number() -> None:
    assert load(None, ["train.temperature=2"]).train.temperature == 2


def test_later_overrides_win() -> None:
    assert load(None, ["seed=1", "seed=2"]).seed == 2


def test_every_setting_can_be_overridden() -> None:
    assert flat(load(None, [f"{key}={yaml.safe_dump(value)}" for key, value in DEFAULTS.items()])) == DEFAULTS


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(sorted(DEFAULTS)), st.integers(0, 100))
def test_a_key_that_lacks_a_letter_is_named_with_the_right_one(key: str, position: int) -> None:
    position %= len(key)
    typo = key[:position] + key[position + 1 :]
    (problem,) = problems(None, f"{typo}=1")
    as_near = [other for other in DEFAULTS if typo in {other[:i] + other[i + 1 :] for i in range(len(other))}]
    assert problem in [f"--set {typo}=1: unknown setting `{typo}`; did you mean `{other}`?" for other in as_near]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("train:\n  stepz: 3", 2, "unknown setting `train.stepz`; did you mean `train.steps`?"),
        ("trian: {steps: 3}", 1, "unknown setting `trian`; did you mean `train`?"),
        ("train: {foo: 3}", 1, "unknown setting `train.foo`; params.yaml lists all settings"),
        ("train: {health: {foo: 3}}", 1, "unknown setting `train.health.foo`; params.yaml lists all settings"),
        ("train:\n  steps: many", 2, "train.steps should be a valid integer, not 'many'"),
        ("train: {steps: 1.5}", 1, "train.steps should be a valid integer, not 1.5"),
        ("seed: true", 1, "seed should be a valid integer, not True"),
        ("train: {profile: papre}", 1, "train.profile should be 'calibrated' or 'paper', not 'papre'"),
        ("model:\n  revision: 1234567", 2, "model.revision should be a valid string, not 1234567 (put it in quotes)"),
        ("train: {beta: -1}", 1, "train.beta should be greater than or equal to 0, not -1"),
        ("train: {beta: .nan}", 1, "train.beta should be a finite number, not nan"),
        ("train: fast", 1, "train should be a section with keys, not 'fast'"),
        ("lora: {target_modules: 3}", 1, "lora.target_modules should be a valid string, not 3 (put it in quotes); or"),
        ("fetch: {name: ..}", 1, "fetch.name"),
        (f"fetch: {{name: {'a' * 201}}}", 1, "fetch.name"),
        ("\nsplit: {validation: 0.5, test: 0.5}", 2, "validation + test should be less than 1"),
        ("evaluate: {small: 0.2}", 1, "small should be at most large"),
        ("seed: 1\nseed: 2", 2, "seed is set already in line 1; keep one of them"),
    ],
)
def test_a_wrong_setting_is_named_with_its_line_and_what_is_expected(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    file = written(tmp_path, text)
    (problem,) = problems(file)
    assert problem.startswith(f"{file} line {line}: ")
    assert words in problem


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "--set train.steps: key=value is expected"),
        ("=3", "--set =3: unknown setting ``; params.yaml lists all settings"),
        ("train=3", "--set train=3: train is a section; set one of its keys, as in train.profile"),
        ("train.steps.more=3", "unknown setting `train.steps.more`; did you mean `train.steps`?"),
        ("patience=3", "unknown setting `patience`; did you mean `sft.patience` or `train.health.patience`?"),
        ("train.foo=3", "--set train.foo=3: unknown setting `train.foo`; params.yaml lists all settings"),
        ("train.health.foo=3", "unknown setting `train.health.foo`; params.yaml lists all settings"),
        ("wombat=3", "unknown setting `wombat`; params.yaml lists all settings"),
        ("train.steps=[", "--set train.steps=[: the value is not YAML"),
        ("train.steps=", "--set train.steps=: train.steps should be a valid integer, not None"),
        ("split.test=0.95", "--set split.test=0.95: split: validation + test should be less than 1"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_expected(override: str, words: str) -> None:
    (problem,) = problems(None, override)
    assert problem.startswith(words) or words in problem


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    file = written(tmp_path, "train: {steps: 0, beta: low}\nsft: 3\nsede: 1")
    listed = problems(file, "evaluate.small=2", "sft.steps=1", "nonsense")
    assert len(listed) == 6
    for key in ("train.steps", "train.beta", "sft", "sede", "evaluate.small", "nonsense"):
        assert any(key in problem for problem in listed)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"seed: 1\ntrain: [", "line 2 is not YAML"),
        (b"seed: 1\n? [a]\n: 3", "line 2 is not YAML"),
        (b"seed: \xff", "cannot be read"),
        (b"- 1", "sections with keys are expected"),
        (b"1: 2", "Keys should be strings, not 1"),
        (b"null: 2", "Keys should be strings, not None"),
    ],
)
def test_a_file_that_is_no_settings_file(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    with pytest.raises(AdfmError) as caught:
        load(file)
    assert words in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match=r"none\.yaml cannot be read"):
        load(tmp_path / "none.yaml")


def test_an_empty_file_says_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "# nothing\n")) == Params()
