"""Train, validation and test: which image goes where, such that none is in two."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import cast

from adfm.params import Params
from adfm.records import SPLITS, Sample
from adfm.records import Split as SplitName


def assign(samples: Sequence[Sample], digests: Sequence[str], params: Params) -> list[SplitName]:
    """Gives every sample its split.

    A data set that fixes train, validation and test keeps them. Otherwise what it fixes as train stays there, and
    everything else is divided by `params.split`. That suits the habit of MVTec AD and its kin, which have normal images
    alone to train on: their official test part is what is divided, so the held-out images are always held-out images of
    the official split, and train gets anomalous images too.

    The division keeps the fractions in every category, and as nearly as whole images allow in every label and defect of
    it. A label with three images or more is in every split. Images are drawn by a hash of the seed and their content,
    so neither the order nor the names of files matter.

    Byte-identical images go to one split: the most held-out one to which the data set assigns any of them.

    Args:
        samples: The data set.
        digests: SHA-256 of every sample's image file.
        params: Its `seed` and `split` are used.

    Returns:
        One split a sample, in the order of `samples`.
    """
    copies: dict[str, list[Sample]] = defaultdict(list)
    for sample, digest in zip(samples, digests, strict=True):
        copies[digest].append(sample)
    complete = {sample.split for sample in samples} == set(SPLITS)

    splits: dict[str, SplitName] = {}
    pools: dict[tuple[str, str], list[tuple[str, str, str, str]]] = defaultdict(list)
    for digest, same in copies.items():
        fixed = {sample.split for sample in same}
        if complete:
            splits[digest] = max((cast(SplitName, split) for split in fixed), key=SPLITS.index)
        elif fixed == {"train"}:
            splits[digest] = "train"
        else:
            one = min(same, key=lambda sample: sample.source)
            draw = hashlib.sha256(f"{params.seed} {digest}".encode()).hexdigest()
            pools[one.dataset, one.category].append((one.label, one.defect or "", draw, digest))

    for pool in pools.values():
        splits.update(_divide(pool, _fractions(params)))
    return [splits[digest] for digest in digests]


def _fractions(params: Params) -> dict[SplitName, float]:
    validation, test = params.split.validation, params.split.test
    return {"train": 1 - validation - test, "validation": validation, "test": test}


def _divide(pool: list[tuple[str, str, str, str]], fractions: dict[SplitName, float]) -> dict[str, SplitName]:
    """Divides one category's (label, defect, draw, digest).

    Each next image, label by label and defect by defect, goes to the split that is furthest behind its fraction, so
    fractions hold at the end of every stratum to about one image.
    """
    splits: dict[str, SplitName] = {}
    counts: Counter[SplitName] = Counter()
    for seen, (*_, digest) in enumerate(sorted(pool), start=1):
        split = max(SPLITS, key=lambda name: fractions[name] * seen - counts[name])
        splits[digest] = split
        counts[split] += 1

    wanted = [split for split in SPLITS if fractions[split] > 1e-9]
    for label in {label for label, *_ in pool}:
        members = [digest for its, _, _, digest in sorted(pool, key=lambda item: item[2]) if its == label]
        for split in wanted if len(members) >= len(wanted) else ():
            here = Counter(splits[digest] for digest in members)
            if not here[split]:
                largest = max(SPLITS, key=lambda name: here[name])
                splits[next(digest for digest in members if splits[digest] == largest)] = split
    return splits
