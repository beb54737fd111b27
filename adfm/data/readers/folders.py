"""Labels by folder: images sorted into good ones and defects, with masks or without any.

good/*.jpg, crack/*.jpg                               and, with masks, mask/crack/*.png
<category>/train/good/*.png, <category>/test/crack/*.png
OK/*.jpg, NG/*.jpg                                    or NG/scratch/*.jpg
MT_Free/Imgs/*.jpg, MT_Crack/Imgs/*.jpg               and masks of the same names beside: MT_Crack/Imgs/*.png
images/*.jpg, masks/*.png                             the mask alone says what is normal
"""

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from adfm.data import contents
from adfm.data.manifest import MANIFEST
from adfm.data.readers import btad, dagm, files, kolektor, loco, mvtec, verdicts, visa
from adfm.data.readers.annotations import by_stem, nfc
from adfm.data.readers.files import SPLIT_NAMES, DataSet, walk
from adfm.data.readers.verdicts import class_name, core
from adfm.records import Sample, Split

FORM = (
    "good/*.jpg, <defect>/*.jpg, and, if there are masks, mask/<defect>/*.png; OK/*.jpg, NG/*.jpg; images/*.jpg,"
    " masks/*.png"
)
# Names of folders, as `verdicts.core` has them.
_NORMAL = verdicts.NORMAL | {"free"}
_ANOMALOUS = verdicts.ANOMALOUS | {"def"}
_MASKS = frozenset(("mask", "masks", "groundtruth", "gt"))
# Beside a normal folder, these would be taken for the name of a defect.
_UNCLEAR = frozenset(
    ("0", "1", "positive", "negative", "pos", "neg", "yes", "no", "true", "false", "unknown", "unlabeled", "unlabelled")
).union(("unsorted", "label", "labels", "annotation", "annotations", "seg", "segmentation", "segmentations"))
_UNCLEAR_WORDS = _NORMAL | _MASKS | {"truth"}
_NEGATIONS = frozenset(("no", "non", "not", "without"))
_MASK_ENDING = re.compile(r"[-_](?:mask|gt|label)$", re.IGNORECASE)
_NUMBER = re.compile(r"[a-z]?\d+(?:[-_.]\d+)*", re.IGNORECASE)  # of a part, a day or a batch

_Names = tuple[str, ...]


class _Place(NamedTuple):
    """A folder that holds images, and what the folders on the way to it say."""

    folder: Path
    names: _Names  # without folders that stand for a split, for images or for masks
    split: Split | None
    masks: bool  # whether the images are masks


class _Kind(NamedTuple):
    category: str
    defect: str | None  # `None`: they are normal


def matches(raw: Path) -> bool:
    """Whether a folder is called good or alike, or images have masks, and no annotation file says more."""
    return _annotation(raw) is None and _says_enough(raw)


def hindrance(raw: Path) -> Path | None:
    """Return the annotation file that alone keeps a data set from this layout."""
    file = _annotation(raw)
    return file if file and _says_enough(raw) else None


def _says_enough(raw: Path) -> bool:
    if any(layout.matches(raw) for layout in (btad, dagm, kolektor, loco, mvtec, visa)):
        return False
    places = [_place(raw, folder) for folder in walk(raw) if files.images(folder)]
    masks = {place.names for place in places if place.masks}
    if _Levels(places).normal:
        return True
    for place in (place for place in places if not place.masks):
        stems = {nfc(image.stem) for image in files.images(place.folder)}
        beside = {_MASK_ENDING.sub("", stem) for stem in stems if _MASK_ENDING.search(stem)}
        if place.names in masks or beside & stems:
            return True
    return False


def read(raw: Path) -> Iterator[Sample]:
    """Yield the images, folder by folder.

    A folder called good, ok, normal, pass, passed, free, defect_free, no_defect or non_defective holds normal images,
    and any folder beside it those with a defect of its name; words that all of them share (MT_Free, MT_Crack) do not
    count. Within ng, bad, defect and alike, folders name the defects. train, val, valid, validation and test, where a
    folder has one of these names, are the split; folders above are the category. Without a normal folder anywhere every
    image is anomalous, of a defect with the name of its folder.

    A mask has the name of its image, with or without `_mask`, `_gt` or `_label`. It lies in a folder called mask,
    masks, ground_truth or gt (`mask/crack`, `crack/mask`, `ground_truth` for all defects), or beside the image, where
    it is a PNG if the image is a JPEG of the same name. Where a kind of defect has no masks at all, the label is all
    that is known of its images. Images with a mask that lie in no folder of a kind are normal if it shows nothing.
    Images above the folders of the kinds are left out.
    """
    data = DataSet(raw, "folders")
    places = [_place(raw, folder) for folder in walk(raw) if files.images(folder)]
    levels = _Levels(places)
    groups: dict[tuple[_Names, bool], list[_Place]] = defaultdict(list)
    for place in places:
        if not levels.is_above(place):
            groups[levels.of(place.names), place.masks].append(place)
    for names in dict.fromkeys(names for names, _ in groups):
        masks = _Masks(data, groups[names, True])
        yield from _samples(data, groups[names, False], masks, levels)
        data.problems += masks.unused()
    data.finish()


def _samples(data: DataSet, places: list[_Place], masks: "_Masks", levels: "_Levels") -> Iterator[Sample]:
    kinds: dict[tuple[_Kind | None, _Names, Split | None], list[_Place]] = defaultdict(list)
    for place in places:
        with data.at(place.folder):
            kind = levels.kind(data, place)
            kinds[kind, () if kind and not levels.are_plain else place.names, place.split].append(place)
    # Defects first: a folder may have the masks of all kinds, and a normal image gets those that no defect has.
    last = sorted(kinds, key=lambda key: bool(key[0] and not key[0].defect))
    paired: Iterable[tuple[Any, list[tuple[Path, Path | None]]]]
    paired = ((key, [pair for place in kinds[key] for pair in masks.pairs(place, key[0])]) for key in last)
    by_mask = False
    if levels.are_plain:  # where masks say what is normal, the name of a folder need not be that of a defect
        paired = list(paired)
        by_mask = any(mask for _, pairs in paired for _, mask in pairs)
    for (of_folder, names, split), pairs in paired:
        kind = None if by_mask else of_folder
        masked = any(mask for _, mask in pairs)
        if kind is None and not masked:
            what = "no folder says whether its images are normal, and they have no masks"
            remedy = "put normal images into a folder called good, the others beside it into one called as the defect"
            for place in kinds[of_folder, names, split]:
                data.add(place.folder, f"{what}; {remedy}")
            continue
        category = kind.category if kind else "/".join(levels.inner(names)) or data.name
        all_anomalous = kind is not None and not levels.normal
        notes = ("no folder is called good or alike, so that every image is anomalous",) if all_anomalous else ()
        for image, mask in pairs:
            if not mask and kind is None:
                what = "has no mask, and no folder that says whether it is normal"
                data.add(image, f"{what}; add the mask, or put normal images into a folder called good")
            elif not mask and kind and kind.defect and masked:
                what = "has no mask, but other images of this kind have one"
                data.add(image, f"{what}; add it, or remove all of them to train on the labels alone")
            defect = kind.defect if kind else "defect"
            one = data.sample(category, image, defect, split=split, notes=notes, unmarked_is_normal=kind is None)
            # What the folder says holds for an image whose mask shows nothing, too.
            yield replace(one, masks=(mask,) if mask else (), located=kind is None)


class _Levels:
    """Where in the tree of folders the kinds, normal and defects, stand beside each other."""

    def __init__(self, places: Iterable[_Place]) -> None:
        self._masked = {place.names for place in places if place.masks}
        inside: dict[_Names, set[str]] = defaultdict(set)
        for place in places:
            for depth, name in enumerate(place.names if not place.masks else ()):
                inside[place.names[:depth]].add(name)
        self._inside = dict(inside)
        self._short = {names: _without_shared_words(its) for names, its in inside.items()}
        cores = {names: set(map(core, short.values())) for names, short in self._short.items()}
        self.normal = {names for names, its in cores.items() if its & _NORMAL}
        self._anomalous = {names for names, its in cores.items() if its & _ANOMALOUS}
        self.are_plain = not self.normal and not self._anomalous  # each folder is the name of a defect
        forks = (names for names, its in inside.items() if len(its) > 1 or names in self.normal)
        self._top = min(map(len, forks), default=0)

    def of(self, names: _Names) -> _Names:
        """Return the folders above the kinds on the way to a place; all of them where there are no kinds."""
        for levels in (self.normal, self._anomalous):
            for depth in range(len(names) + 1):
                if names[:depth] in levels:
                    return names[:depth]
        if not self.are_plain:
            return names
        while len(names) > 1 and _NUMBER.fullmatch(names[-1]):
            names = names[:-1]
        return names[:-1]

    def is_above(self, place: _Place) -> bool:
        """Whether images lie above the folders of the kinds and have no masks: a figure of the whole data set."""
        above = any(level[: len(place.names)] == place.names for level in self.normal | self._anomalous)
        return above and not place.masks and place.names not in self._masked

    def kind(self, data: DataSet, place: _Place) -> _Kind | None:
        """Return what the folders of a place say of it; `None` where they say nothing."""
        level = self.of(place.names)
        if len(level) == len(place.names):
            return None
        name, rest = self._short[level][place.names[len(level)]], place.names[len(level) + 1 :]
        normal, category = core(name) in _NORMAL, self.inner(level)
        _refuse_unclear(name)
        for inner in rest:
            if core(inner) in (_ANOMALOUS if normal else _NORMAL):
                raise ValueError(f"lies in {name}, but is called {inner}; rename one of the two")
        if rest and self._is_in_all(level, rest[0]):  # good/gear, crack/gear: a category, not a defect
            category, rest = (*category, rest[0]), rest[1:]
        if core(name) in _ANOMALOUS and rest and not _NUMBER.fullmatch(rest[0]):
            name = rest[0]
            _refuse_unclear(name)
        return _Kind("/".join(category) or data.name, None if normal else class_name(name))

    def inner(self, names: _Names) -> _Names:
        """Return the folders without those that all images lie in, but for the last."""
        return names[min(self._top, len(names) - 1) :] if names else ()

    def _is_in_all(self, level: _Names, name: str) -> bool:
        """Whether a folder is in normal ones and in others of a level."""
        kinds = [kind for kind in self._inside[level] if name in self._inside.get((*level, kind), ())]
        normal = {core(self._short[level][kind]) in _NORMAL for kind in kinds}
        return len(normal) == 2 and not _NUMBER.fullmatch(name)


class _Masks:
    """The masks of one level of kinds, by their folders and by the names of their images."""

    def __init__(self, data: DataSet, places: Iterable[_Place]) -> None:
        self._data = data
        self._folders: dict[tuple[_Names, Split | None], list[dict[str, list[Path]]]] = defaultdict(list)
        self._used: set[Path] = set()
        for place in places:
            masks: dict[str, list[Path]] = defaultdict(list)  # by the names of their images
            for mask in files.images(place.folder):
                masks[_MASK_ENDING.sub("", nfc(mask.stem))].append(mask)
            self._folders[place.names, place.split].append(masks)

    def pairs(self, place: _Place, kind: _Kind | None) -> Iterator[tuple[Path, Path | None]]:
        """Yield the images of a folder, each with its mask."""
        beside, images = self._beside(place.folder)
        folders = self._near(place)
        for image in images:
            stem = nfc(image.stem)
            masks = [mask for folder in folders for mask in folder.get(stem, ())]
            if kind and not kind.defect:  # images of a defect may have the same names
                masks = [mask for mask in masks if mask not in self._used]
            masks += beside.get(stem, [])
            if len(masks) > 1:
                self._data.add(image, f"has several masks, keep one: {', '.join(map(self._data.relative, masks))}")
            mask = masks[0] if masks else None
            if mask and mask in self._used:
                what = f"may be the mask of {self._data.relative(image)}, and of another image"
                self._data.add(mask, f"{what}; put masks into a folder for each folder of images")
            self._used.update(masks)
            yield image, mask

    def unused(self) -> Iterator[str]:
        """Yield a problem for each folder with masks that are not those of an image."""
        for folder in (folder for folders in self._folders.values() for folder in folders):
            if unused := sorted(mask for masks in folder.values() for mask in masks if mask not in self._used):
                names = ", ".join(mask.name for mask in unused)
                remedy = "add the images, or rename the folder if these are photographs"
                yield f"{self._data.relative(unused[0].parent)}: no image for the mask: {names}; {remedy}"

    def _near(self, place: _Place) -> list[dict[str, list[Path]]]:
        """Return the masks in the folder with the names of the place, or in the nearest above."""
        levels = (place.names[:depth] for depth in range(len(place.names), -1, -1))
        keys = ((names, split) for names in levels for split in (place.split, None))
        return next((self._folders[key] for key in keys if key in self._folders), [])

    def _beside(self, folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
        """Return the masks of a folder that also holds the images, by the names of these, and the images."""
        files_of = {stem: [*map(Path, paths)] for stem, paths in by_stem(files.images(folder)).items()}
        masks: dict[str, list[Path]] = defaultdict(list)
        images = []
        tried = False  # whether one pair of the folder was opened: the others are alike
        for stem, paths in files_of.items():
            base = _MASK_ENDING.sub("", stem)
            if base != stem:
                masks[base] += paths if base in files_of else []
                for path in paths if base not in files_of else ():
                    what = f"is a mask by its name, but the image {base}.* beside it is missing"
                    self._data.add(path, f"{what}; add the image, or give it another name")
                continue
            mask = _twin(paths) if len(paths) == 2 else None
            if len(paths) > 1 and (not mask or not (tried or _is_mask(mask))):
                several = ", ".join(path.name for path in paths[1:])
                self._data.add(paths[0], f"has the same name as {several}, which is not its mask; keep one")
            tried = tried or bool(mask)
            masks[stem] += [mask] if mask else []
            images.append(paths[0] if paths[0] != mask else paths[1])
        return masks, images


def _place(raw: Path, folder: Path) -> _Place:
    names, split, masks = [], None, False
    for name in folder.relative_to(raw).parts:
        plain, words = core(name), _words(name)
        if plain in _MASKS:
            masks = True
        elif len(words) > 1 and (words[0] in _MASKS or words[-1] in _MASKS):
            masks = True
            names.append(re.sub(r"^(?:masks?|gt)[-_. ]+|[-_. ]+(?:masks?|gt)$", "", name, flags=re.IGNORECASE))
        elif plain in SPLIT_NAMES:
            split = SPLIT_NAMES[plain]
        elif plain not in ("images", "image", "imgs", "img"):
            names.append(name)
    return _Place(folder, tuple(names), split, masks)


def _annotation(raw: Path) -> Path | None:
    """Return a file that may say more of the images; that of `adfm fetch` does not."""
    paths = (path for folder in walk(raw) for path in files.listing(folder, ".json", ".jsonl", ".xml", ".csv", ".tsv"))
    return next((path for path in paths if path != raw / MANIFEST), None)


def _refuse_unclear(name: str) -> None:
    plain, words = core(name), _words(name)
    if plain in _NORMAL or plain in _ANOMALOUS:
        return
    if plain in _UNCLEAR or words[0] in _NEGATIONS or _UNCLEAR_WORDS.intersection(words):
        remedy = "rename the folder to good, or to the name of the defect, or to masks if they are"
        raise ValueError(f"it is not clear whether {name!r} is normal; {remedy}")


def _without_shared_words(names: Iterable[str]) -> dict[str, str]:
    """Return the names of folders beside each other, without the words that all of them begin or end with."""
    parts = {name: re.split(r"([-_. ]+)", name) for name in names}
    lists = [[part.lower() for part in its] for its in parts.values()]
    least = min(map(len, lists))
    first = last = 0
    if len(lists) > 1 and lists[0][0] not in _NEGATIONS:
        while first + 2 < least and len({tuple(its[: first + 2]) for its in lists}) == 1:
            first += 2
        while first + last + 2 < least and len({tuple(its[len(its) - last - 2 :]) for its in lists}) == 1:
            last += 2
    return {name: "".join(its[first : len(its) - last]) for name, its in parts.items()}


def _twin(paths: list[Path]) -> Path | None:
    # Of two files of one name, the PNG, or what is not a JPEG, may be the mask of the other.
    for photograph, mask in (paths, paths[::-1]):
        is_jpeg = photograph.suffix.lower() in (".jpg", ".jpeg", ".jfif")
        endings = (".png", ".bmp", ".tif", ".tiff", ".pgm") if is_jpeg else (".png",)
        if mask.suffix.lower() in endings:
            return mask
    return None


def _is_mask(path: Path) -> bool:
    # Two grey values make up most of a mask.
    if not path.is_file():  # a pipe would be waited for
        return True
    try:
        with Image.open(io.BytesIO(contents.read(path))) as image:
            counts = sorted(image.convert("L").histogram(), reverse=True)
    except Exception:  # a damaged file makes Pillow raise nearly anything; conversion says what is wrong with it
        return True
    return sum(counts[:2]) >= 0.6 * sum(counts)


def _words(name: str) -> list[str]:
    return re.split(r"[-_. ]+", name.lower())
