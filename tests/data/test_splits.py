import hashlib
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adfm.data import splits
from adfm.params import Params
from adfm.records import SPLITS, Sample


def _samples(*parts: tuple[str, str | None, str | None, int]) -> list[Sample]:
    """`count` samples of each (category, defect, official split)."""
    samples = []
    for category, defect, split, count in parts:
        for number in range(count):
            source = f"{category}/{split}/{defect or 'good'}/{number:03d}.png"
            label = "anomalous" if defect else "normal"
            samples.append(Sample(Path(source), source, "set", category, label, defect, split=split))
    return samples


def _assign(
    samples: list[Sample], digests: list[str], params: Params, pairs: list[tuple[int, int]] | None = None
) -> list[str]:
    table = _table(samples, digests)
    assigned = splits.assign(table, np.array(pairs or [], np.int64).reshape(-1, 2), params)
    return [SPLITS[code] for code in assigned]


def _table(samples: list[Sample], digests: list[str], **columns: list[int | None]) -> pa.Table:
    rows = [
        {name: getattr(sample, name, None) for name in splits.COLUMNS} | {"sha256": digest}
        for sample, digest in zip(samples, digests, strict=True)
    ]
    for name, numbers in columns.items():
        rows = [row | {name: _text(number)} for row, number in zip(rows, numbers, strict=True)]
    return pa.Table.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in splits.COLUMNS]))


def _text(number: int | None) -> str | None:
    return None if number is None else f"{number}"


def _digests(samples: list[Sample]) -> list[str]:
    return [sample.source for sample in samples]


def _params(validation: float = 0.1, test: float = 0.4, seed: int = 0) -> Params:
    return Params.model_validate({"seed": seed, "split": {"validation": validation, "test": test}})


counts = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from([None, "dent", "hole", "spot"]), st.integers(0, 40)),
    max_size=8,
    unique_by=lambda part: part[:2],
)
fractions = st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: sum(pair) < 10)


@settings(deadline=None)
@given(parts=counts, tenths=fractions, seed=st.integers(0, 5))
def test_fractions_hold_in_every_category_and_labels_are_everywhere(
    parts: list[tuple[str, str | None, int]], tenths: tuple[int, int], seed: int
) -> None:
    samples = _samples(*((category, defect, None, count) for category, defect, count in parts))
    params = _params(tenths[0] / 10, tenths[1] / 10, seed)
    assigned = _assign(samples, _digests(samples), params)
    shares = dict(zip(SPLITS, (1 - sum(tenths) / 10, tenths[0] / 10, tenths[1] / 10), strict=True))
    wanted = [split for split in SPLITS if shares[split] > 1e-9]
    of_category, of_label, of_defect = (defaultdict[object, Counter[str]](Counter) for _ in range(3))
    for sample, split in zip(samples, assigned, strict=True):
        of_category[sample.category][split] += 1
        of_label[sample.category, sample.label][split] += 1
        of_defect[sample.category, sample.defect][split] += 1
    for (_, _), found in of_label.items():
        assert set(found) <= set(wanted)
        if found.total() >= len(wanted):
            assert set(found) == set(wanted)
    for strata, slack in ((of_category, 1.0), (of_defect, 2.0)):
        for found in strata.values():
            for split in SPLITS:
                # At most two images a label are moved so that every split has the label.
                assert abs(found[split] - shares[split] * found.total()) < slack + 4


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.4), (0.2, 0.2), (0.15, 0.35), (1 / 3, 1 / 3)])
def test_fractions_hold_to_an_image_in_every_category_and_to_two_in_every_defect(
    validation: float, test: float
) -> None:
    samples = _samples(("a", None, None, 61), ("a", "dent", None, 23), ("a", "hole", None, 17), ("a", "spot", None, 40))
    assigned = _assign(samples, _digests(samples), _params(validation, test))
    shares = dict(zip(SPLITS, (1 - validation - test, validation, test), strict=True))
    for defect in (None, "dent", "hole", "spot"):
        found = Counter(split for sample, split in zip(samples, assigned, strict=True) if sample.defect == defect)
        assert all(abs(found[split] - shares[split] * found.total()) < 2 for split in SPLITS)
    assert all(abs(Counter(assigned)[split] - shares[split] * len(samples)) <= 1 for split in SPLITS)


def test_official_train_images_stay_and_the_official_test_part_is_divided() -> None:
    samples = _samples(("a", None, "train", 30), ("a", None, "test", 20), ("a", "dent", "test", 20))
    assigned = _assign(samples, _digests(samples), _params())
    assert set(assigned[:30]) == {"train"}
    assert Counter(assigned[30:]) == {"train": 20, "validation": 4, "test": 16}


def test_what_is_all_test_stays_so_unless_the_official_split_is_set_aside() -> None:
    samples = _samples(("a", None, "test", 50), ("a", "dent", "test", 50), ("b", "hole", "test", 20))
    fifth = Params.model_validate({"split": {"validation": 0.0, "test": 0.8}})
    assert set(_assign(samples, _digests(samples), fifth)) == {"test"}
    fifth = Params.model_validate({"split": {"validation": 0.0, "test": 0.8, "redivide": True}})
    assigned = _assign(samples, _digests(samples), fifth)
    assert [Counter(assigned[first : first + 50])["train"] for first in (0, 50)] == [10, 10]
    assert Counter(assigned[100:]) == {"train": 4, "test": 16}


def test_without_the_official_split_a_train_part_is_divided_too() -> None:
    samples = _samples(("a", None, "train", 40), ("a", None, "test", 20), ("a", "dent", "test", 40))
    params = Params.model_validate({"split": {"validation": 0.0, "test": 0.5, "redivide": True}})
    assigned = _assign(samples, _digests(samples), params)
    assert Counter(assigned[:40])["test"] > 10
    assert Counter(assigned) == {"train": 50, "test": 50}


def test_a_split_that_the_data_set_fixes_is_kept() -> None:
    samples = _samples(*(("a", defect, split, 3) for defect in (None, "dent") for split in SPLITS))
    assert _assign(samples, _digests(samples), _params()) == [sample.split for sample in samples]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), rounds=st.integers(0, 3))
def test_neither_order_nor_names_of_files_matter_but_the_seed_does(seed: int, rounds: int) -> None:
    samples = _samples(("a", None, None, 25), ("a", "dent", None, 25), ("b", None, None, 9))
    digests = _digests(samples)
    assigned = dict(zip(digests, _assign(samples, digests, _params(seed=seed)), strict=True))
    order = list(range(len(samples)))
    random.Random(rounds).shuffle(order)
    renamed = [replace(samples[i], source=f"{n}.png") for n, i in enumerate(order)]
    shuffled = [digests[i] for i in order]
    assert dict(zip(shuffled, _assign(renamed, shuffled, _params(seed=seed)), strict=True)) == assigned
    other = dict(zip(digests, _assign(samples, digests, _params(seed=seed + 1)), strict=True))
    assert other != assigned


@settings(deadline=None)
@given(copies=st.lists(st.integers(0, 20), min_size=40, max_size=40), seed=st.integers(0, 3))
def test_identical_images_are_never_in_two_splits(copies: list[int], seed: int) -> None:
    samples = _samples(("a", None, "train", 10), ("a", None, "test", 10), ("b", "dent", "test", 20))
    digests = [f"{copy}" for copy in copies]
    of = defaultdict(set)
    for sample, digest, split in zip(samples, digests, _assign(samples, digests, _params(seed=seed)), strict=True):
        of[digest].add(split)
        if {s.split for s, d in zip(samples, digests, strict=True) if d == digest} == {"train"}:
            assert split == "train", sample
    assert all(len(found) == 1 for found in of.values())


def test_a_train_image_that_is_also_a_test_image_is_divided_with_the_test_part() -> None:
    samples = _samples(("a", None, "train", 3), ("a", None, "test", 3))
    digests = ["1", "2", "same", "3", "same", "4"]
    assigned = _assign(samples, digests, _params(validation=0.0, test=0.99))
    assert assigned[:2] == ["train", "train"]
    assert assigned[2] == assigned[4]
    counts = Counter(dict(zip(digests, assigned, strict=True)).values())
    assert counts == {"train": 3, "test": 2}  # of the three that are divided, one is for train


def test_identical_images_in_fixed_splits_go_to_the_most_held_out_one() -> None:
    samples = _samples(*(("a", "dent", split, 3) for split in SPLITS))
    digests = ["x", "y", "1", "y", "2", "3", "x", "4", "5"]
    train, validation, test = SPLITS
    assert _assign(samples, digests, _params()) == [test, validation, train, *[validation] * 3, *[test] * 3]


def test_a_validation_part_of_normal_images_alone_is_divided_with_the_test_part() -> None:
    samples = _samples(*(("a", None, split, 20) for split in SPLITS), ("a", "dent", "test", 20))
    assigned = _assign(samples, _digests(samples), _params())
    assert set(assigned[:20]) == {"train"}
    assert Counter(assigned[20:]) == {"train": 30, "validation": 6, "test": 24}


@pytest.mark.parametrize(
    ("fixed", "lacking", "share"),
    [(("train", "test"), "validation", 0.1), (("train", "validation"), "test", 0.4)],
)
def test_a_part_that_the_data_set_lacks_is_drawn_from_a_train_part_with_defects(
    fixed: tuple[str, str], lacking: str, share: float
) -> None:
    samples = _samples(*(("a", defect, split, 50) for split in fixed for defect in (None, "dent")))
    assigned = _assign(samples, _digests(samples), _params())
    assert assigned[100:] == [fixed[1]] * 100
    assert Counter(assigned[:50]) == Counter(assigned[50:100]) == {"train": 50 * (1 - share), lacking: 50 * share}


def test_a_set_that_is_all_test_stays_so() -> None:
    samples = _samples(*(("a", defect, "test", 20) for defect in (None, "dent")))
    assert set(_assign(samples, _digests(samples), _params())) == {"test"}


def test_what_has_no_split_beside_parts_that_are_fixed_is_for_training() -> None:
    samples = _samples(*(("a", "dent", split, 3) for split in SPLITS), ("a", "dent", None, 3))
    assert _assign(samples, _digests(samples), _params())[-3:] == ["train"] * 3


@pytest.mark.parametrize("official", [None, "train"])
def test_a_held_out_category_is_wholly_test_and_so_are_copies_of_it(official: str | None) -> None:
    samples = _samples(*((category, defect, official, 30) for category in "ab" for defect in (None, "dent")))
    digests = _digests(samples)
    digests[3] = digests[70]
    params = Params.model_validate({"split": {"holdout_categories": ["b"]}})
    assigned = _assign(samples, digests, params, [(75, 9), (9, 11)])
    assert set(assigned[60:]) == {"test"}
    assert assigned[3] == assigned[9] == assigned[11] == "test"
    assert set(assigned[:60]) == set(SPLITS)


@settings(deadline=None)
@given(
    groups=st.lists(st.none() | st.integers(0, 12), min_size=60, max_size=60),
    copies=st.lists(st.integers(0, 80), min_size=60, max_size=60),
    pairs=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=8),
    official=st.sampled_from([None, "train"]),
)
def test_what_hangs_together_is_in_one_split(
    groups: list[int | None], copies: list[int], pairs: list[tuple[int, int]], official: str | None
) -> None:
    samples = _samples(("a", None, official, 20), ("a", "dent", "test", 20), ("b", "dent", None, 20))
    samples = [
        replace(sample, group=None if group is None else f"{group}")
        for sample, group in zip(samples, groups, strict=True)
    ]
    assigned = _assign(samples, [f"{copy}" for copy in copies], _params(), pairs)
    for one in range(60):
        for other in range(one):
            same_group = groups[one] is not None and groups[one] == groups[other]
            if (
                copies[one] == copies[other]
                or (same_group and samples[one].category == samples[other].category)
                or (one, other) in pairs
                or (other, one) in pairs
            ):
                assert assigned[one] == assigned[other]


@settings(deadline=None)
@given(
    parts=st.lists(st.none() | st.integers(0, 12), min_size=60, max_size=60),
    photographs=st.lists(st.none() | st.integers(0, 30), min_size=60, max_size=60),
    groups=st.lists(st.none() | st.integers(0, 30), min_size=60, max_size=60),
    official=st.sampled_from([None, "train"]),
    redivide=st.booleans(),
)
def test_no_part_straddles_the_splits_even_in_several_categories(
    parts: list[int | None],
    photographs: list[int | None],
    groups: list[int | None],
    official: str | None,
    redivide: bool,
) -> None:
    samples = _samples(("a", None, official, 20), ("a", "dent", "test", 20), ("b", "dent", "validation", 20))
    samples = [replace(sample, group=_text(group)) for sample, group in zip(samples, groups, strict=True)]
    table = _table(samples, _digests(samples), part=parts, photograph=photographs)
    params = Params.model_validate({"split": {"redivide": redivide}})
    assigned = splits.assign(table, np.empty((0, 2), np.int64), params)
    for numbers in (parts, photographs):
        of = defaultdict(set)
        for number, split in zip(numbers, assigned, strict=True):
            of[number].add(split)
        assert all(len(its) == 1 for number, its in of.items() if number is not None)
    together = defaultdict(set)
    for sample, split in zip(samples, assigned, strict=True):
        together[sample.category, sample.group].add(split)
    assert all(len(its) == 1 for (_, group), its in together.items() if group is not None)


@settings(deadline=None)
@given(
    copies=st.lists(st.integers(0, 40), min_size=60, max_size=60),
    parts=st.lists(st.none() | st.integers(0, 20), min_size=60, max_size=60),
    pairs=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=8),
    keeps=st.booleans(),
    held=st.sampled_from([[], ["b"]]),
)
def test_images_that_are_moved_are_counted_once(
    copies: list[int], parts: list[int | None], pairs: list[tuple[int, int]], keeps: bool, held: list[str]
) -> None:
    defect = "dent" if keeps else None
    samples = _samples(
        ("a", defect, "train", 15), ("a", None, "validation", 15), ("b", None, None, 15), ("b", "dent", "test", 15)
    )
    table = _table(samples, [f"{copy}" for copy in copies], part=parts)
    params = Params.model_validate({"split": {"holdout_categories": held}})
    near = np.array(pairs, np.int64).reshape(-1, 2)
    assigned = splits.assign(table, near, params)
    rows = splits.moved(table, near, assigned, params.split)
    expected = Counter(
        (sample.split, SPLITS[code])
        for sample, code in zip(samples, assigned, strict=True)
        if sample.split in (SPLITS if keeps else ("train",))
        and sample.split != SPLITS[code]
        and sample.category not in held
    )
    assert all(row["images"] > 0 for row in rows)
    counts = Counter[tuple[str, str]]()
    for row in rows:
        counts[row["from"], row["to"]] += row["images"]
    assert counts == expected
    without = splits.moved(table, near[:0], splits.assign(table, near[:0], params), params.split)
    assert {row["because"] for row in without} <= {"copies", "part"}


def test_images_are_moved_because_of_the_first_reason_that_explains_it() -> None:
    samples = _samples(("a", "dent", "train", 5), ("a", "dent", "validation", 5), ("a", "dent", "test", 5))
    digests = _digests(samples)
    digests[0] = digests[10]
    parts = [None] * 15
    parts[1] = parts[11] = parts[0] = 1
    table = _table(samples, digests, part=parts)
    near = np.array([(2, 12), (3, 5)], np.int64)
    assigned = splits.assign(table, near, _params())
    assert splits.moved(table, near, assigned, _params().split) == [
        {"because": "copies", "from": "train", "to": "test", "images": 1},
        {"because": "part", "from": "train", "to": "test", "images": 1},
        {"because": "near-duplicates", "from": "train", "to": "validation", "images": 1},
        {"because": "near-duplicates", "from": "train", "to": "test", "images": 1},
    ]


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 9), min_size=12, max_size=40), seed=st.integers(0, 5))
def test_fractions_hold_to_about_a_group(sizes: list[int], seed: int) -> None:
    samples = _samples(("a", None, None, sum(sizes)))
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    samples = [replace(sample, group=f"{number}") for sample, number in zip(samples, numbers, strict=True)]
    found = Counter(_assign(samples, _digests(samples), _params(0.2, 0.3, seed)))
    for split, share in zip(SPLITS, (0.5, 0.2, 0.3), strict=True):
        # Up to one further group is moved to a split that would have none.
        assert abs(found[split] - share * len(samples)) <= 2 * max(sizes)
        assert found[split]


def test_a_set_without_rare_kinds_is_divided_as_by_earlier_versions() -> None:
    samples = _samples(("a", None, None, 90), *(("a", defect, None, 40) for defect in ("dent", "hole", "spot")))
    assigned = _assign(samples, _digests(samples), _params())
    assert hashlib.sha256(" ".join(assigned).encode()).hexdigest()[:16] == "cde0b659935bf629"


rare = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(deadline=None)
@given(kinds=rare, normal=st.integers(10, 60), seed=st.integers(0, 9), size=st.integers(1, 3))
def test_rare_kinds_of_defect_are_in_all_splits(kinds: list[int], normal: int, seed: int, size: int) -> None:
    """Each kind has so many parts with `size` images each."""
    samples = _samples(
        ("a", None, None, normal), *(("a", f"kind {n}", None, parts * size) for n, parts in enumerate(kinds))
    )
    samples = [
        sample
        if sample.defect is None
        else replace(sample, group=f"{sample.defect} {int(sample.source[-7:-4]) // size}")
        for sample in samples
    ]
    assigned = _assign(samples, _digests(samples), _params(0.1, 0.4, seed))
    where, of_group = defaultdict[str | None, set[str]](set), defaultdict[str | None, set[str]](set)
    for sample, split in zip(samples, assigned, strict=True):
        where[sample.defect].add(split)
        of_group[sample.group or sample.source].add(split)
    assert all(len(its) == 1 for its in of_group.values())
    for number, parts in enumerate(kinds):
        if parts >= 3:
            assert where[f"kind {number}"] == set(SPLITS)
        elif max(kinds) >= 3:  # else the label needs some of them elsewhere: it has to be in every split
            assert where[f"kind {number}"] == ({"train", "test"} if parts == 2 else {"train"})
    counts = Counter(assigned)
    # With one image a part the sizes are exact unless there are more kinds than a split has room for.
    crowded = len(kinds) > 0.5 * sum(kinds) - 1 or max(1, sum(parts >= 3 for parts in kinds)) > 0.1 * sum(kinds) - 1
    for split, share in zip(SPLITS, (0.5, 0.1, 0.4), strict=True):
        assert abs(counts[split] - share * len(samples)) <= size * (1 + len(kinds) * (crowded or size > 1))


@settings(deadline=None)
@given(
    images=st.lists(st.sets(st.sampled_from("xyz"), min_size=1).map(sorted), min_size=9, max_size=40),
    seed=st.integers(0, 9),
)
def test_an_image_of_several_kinds_counts_for_each(images: list[list[str]], seed: int) -> None:
    normal = _samples(("a", None, None, 30))
    several = [
        replace(sample, defect="+".join(kinds))
        for sample, kinds in zip(_samples(("a", "some", None, len(images))), images, strict=True)
    ]
    assigned = _assign([*normal, *several], _digests([*normal, *several]), _params(seed=seed))[30:]
    for kind in "xyz":
        if sum(kinds == [kind] for kinds in images) >= 3:
            assert {split for split, kinds in zip(assigned, images, strict=True) if kind in kinds} == set(SPLITS)


def test_a_kind_of_four_images_beside_frequent_ones_changes_places() -> None:
    for seed in range(20):
        samples = _samples(("a", None, None, 100), ("a", "dent", None, 96), ("a", "crack", None, 4))
        assigned = _assign(samples, _digests(samples), _params(seed=seed))
        assert set(assigned[-4:]) == set(SPLITS)
        assert Counter(assigned) == {"train": 100, "validation": 20, "test": 80}
        assert Counter(assigned[:100])["validation"] == 10


# ------------------------------------------------------------------------------------------------- cross-validation


@settings(deadline=None)
@given(
    kinds=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    normal=st.integers(8, 50),
    count=st.integers(2, 6),
    seed=st.integers(0, 9),
)
@example(kinds=[2, 1], normal=8, count=2, seed=0)
@example(kinds=[2, 2, 2], normal=8, count=2, seed=0)
def test_folds_judge_every_image_once_by_a_model_that_knows_its_kind(
    kinds: list[int], normal: int, count: int, seed: int
) -> None:
    parts = [("a", None, None, normal), *(("a", f"kind {n}", None, images) for n, images in enumerate(kinds))]
    samples = _samples(*parts)
    table = _table(samples, _digests(samples))
    fold = splits.folds(table, np.empty((0, 2), np.int64), count, 1 / 6, seed)
    train, _, test = range(3)
    assert fold.shape == (count, len(samples))
    assert ((fold == test).sum(axis=0) == 1).all()
    sizes = (fold == test).sum(axis=1)
    assert sizes.max() - sizes.min() <= 1
    for number, images in enumerate(kinds):
        of_kind = np.array([sample.defect == f"kind {number}" for sample in samples])
        judged = (fold[:, of_kind] == test).any(axis=1)
        assert judged.sum() == min(images, count)
        if images >= 2:
            assert (fold[:, of_kind][judged] == train).any(axis=1).all()
    for label in ("normal", "anomalous"):
        of_label = np.array([sample.label == label for sample in samples])
        if of_label.sum() >= count:
            assert (fold[:, of_label] == test).any(axis=1).all()


@settings(deadline=None)
@given(
    groups=st.lists(st.none() | st.integers(0, 12), min_size=40, max_size=40),
    copies=st.lists(st.integers(0, 60), min_size=40, max_size=40),
    pairs=st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=6),
    count=st.integers(2, 5),
)
def test_what_hangs_together_is_judged_in_one_fold(
    groups: list[int | None], copies: list[int], pairs: list[tuple[int, int]], count: int
) -> None:
    samples = _samples(("a", None, "train", 20), ("b", "dent", "test", 20))
    table = _table(samples, [f"{copy}" for copy in copies], part=groups)
    fold = splits.folds(table, np.array(pairs, np.int64).reshape(-1, 2), count, 0.2, 0)
    for one in range(40):
        for other in range(one):
            together = groups[one] is not None and groups[one] == groups[other]
            if together or copies[one] == copies[other] or (one, other) in pairs or (other, one) in pairs:
                assert (fold[:, one] == fold[:, other]).all()


def test_folds_depend_on_content_and_seed_alone() -> None:
    samples = _samples(("a", None, None, 30), ("a", "dent", None, 20))
    digests = _digests(samples)
    order = np.random.default_rng(0).permutation(len(samples))
    pairs = np.empty((0, 2), np.int64)
    fold = splits.folds(_table(samples, digests), pairs, 4, 0.2, 0)
    shuffled = _table([replace(samples[i], source=f"{i}") for i in order], [digests[i] for i in order])
    assert (splits.folds(shuffled, pairs, 4, 0.2, 0) == fold[:, order]).all()
    assert (splits.folds(_table(samples, digests), pairs, 4, 0.2, 1) != fold).any()


def test_official_splits_with_defects_to_learn_from_are_kept() -> None:
    with_defects = _samples(("a", "dent", "train", 2), ("a", "dent", "test", 2))
    of_normals = _samples(("a", None, "train", 2), ("a", "dent", "test", 2))
    for samples, kept in ((with_defects, True), (of_normals, False)):
        table = _table(samples, _digests(samples))
        assert splits.official_kept(table, _params().split) is kept
        redivided = Params.model_validate({"split": {"redivide": True}})
        assert not splits.official_kept(table, redivided.split)
