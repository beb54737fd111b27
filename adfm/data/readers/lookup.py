"""Lookup of images by the names that annotation files give them."""

import functools
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from adfm.data.readers import files
from adfm.data.readers.annotations import nfc
from adfm.data.readers.files import SPLIT_NAMES, NoImage, folder_names, folders, partners, split_of, walk
from adfm.records import Split

_IMAGES = frozenset(
    ("images", "image", "imgs", "img", "data", "jpegimages", "pictures", "picture", "pics", "pic", "photos", "photo")
)
_GENERAL = _IMAGES.union(SPLIT_NAMES)  # names of folders that do not say which images are in them, but for the split
_ANNOTATIONS = frozenset(
    ("annotations", "annotation", "annots", "annot", "anns", "ann", "labels", "label", "jsons", "json", "labelme")
)
# The second is Label Studio's, for files in a folder of its server; those that were uploaded have a name of their own.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/]*|.*/data/local-files/\?(?:d|filepath)=")
_UPLOAD = re.compile(r"(?:^|/)upload/(?:\d+/)?[^/]+$")


class Images:
    """Lookup of the images of a data set by the names that annotation files give them.

    A name with a folder leads there: from the annotation file, from a folder above it, or from a folder of images that
    belongs to it. Of a path of the machine that wrote it, the longest tail that exists counts. A bare name is searched
    beside the annotation file and in its own folders of images alone: an image that was deleted is missing, even where
    another split or product has one of the same name. Names that differ in Unicode normalisation, or in the case of the
    extension, are the same, unless one is exactly right. The names of files in searched folders are in memory.
    """

    def __init__(self, raw: Path) -> None:
        self._raw = raw
        # Data sets have many annotation files a folder: each folder is listed once for all of them.
        self._inside = functools.cache(folders)
        self._above = functools.cache(lambda folder: [at for at in (folder, *folder.parents) if at.is_relative_to(raw)])
        self._folder = functools.cache(self._find_folder)
        self._files = functools.cache(_file_names)
        self._alike = functools.cache(lambda folder: _grouped(self._files(folder), _alike))
        self._by_stem = functools.cache(self._images_by_stem)
        self._own = functools.cache(self._own_folders)

    def locate(self, name: str, folder: Path, stem: str = "") -> Path:
        """Return the image that an annotation file in a folder means by a name: a path of any system, or a URL.

        `stem` is the name of the file without its extension, where that says which images it is of: `instances_train`.
        `NoImage` is raised where no image fits, `ValueError` where several do.
        """
        groups = self._own(folder, stem)
        for reading in _readings(name):
            if path := self._by_path(reading, name, folder, groups):
                return path
        what = "is missing: it is neither where its path leads nor beside this file nor in its image folders"
        raise NoImage(f"image {name!r} {what}")

    def of_stem(self, stem: str, folder: Path) -> list[Path]:
        """List the images with the name of an annotation file: those beside it, else those in its image folders."""
        for group in self._own(folder, ""):
            if paths := [each / name for each in group for name in self._by_stem(each).get(nfc(stem), ())]:
                return paths
        return []

    def _by_path(self, path: str, name: str, folder: Path, groups: Sequence[Sequence[Path]]) -> Path | None:
        path = re.sub(r"[A-Za-z]:(?=[\\/])", "/", path)  # a drive of Windows
        foreign, above = path.startswith("/"), self._above(folder)  # foreign: of the machine that wrote the file
        if not foreign and ".." in path.split("/"):  # then it leads to one folder only
            path = os.path.normpath("/".join((*folder.relative_to(self._raw).parts, path)))
            foreign, above = path.startswith("../"), above[-1:]
        parts = [part for part in os.path.normpath(path).split("/") if part.strip(".")]
        if not parts:
            return None
        bases = dict.fromkeys((*above, *itertools.chain(*groups))) if len(parts) > 1 else ()
        for start in range(len(parts) - 1):
            places = [place for base in bases if (place := self._folder(base, tuple(parts[start:-1])))]
            for place in places:
                if image := self._in(place, parts[-1], name):
                    return image
            if any(map(self._by_stem, places)):
                return None  # it is missing from the very folder that the path names
        # A folder such as a product's would say which of several images of one name it is.
        general = (part.lower() in _GENERAL or part == files.dataset_name(self._raw) for part in parts[:-1])
        if len(parts) > 1 and not foreign and not all(general):
            return None
        groups = groups if len(parts) == 1 or _UPLOAD.search(path) else groups[:-1]
        return self._by_name(parts[-1], name, groups, split_of(*parts[-2::-1]))

    def _by_name(self, last: str, name: str, groups: Sequence[Sequence[Path]], split: Split | None) -> Path | None:
        for group in groups:
            places = [place for place in group if not self._contradicts(place, split)]
            paths = [path for place in places if (path := self._in(place, last, name))]
            if len(paths) > 1:
                several = ", ".join(path.relative_to(self._raw).as_posix() for path in paths)
                raise ValueError(f"the image {name!r} may be any of {several}; write its folder with it")
            if paths:
                return paths[0]
        return None

    def _in(self, folder: Path, last: str, name: str) -> Path | None:
        if last in self._files(folder):
            return folder / last
        alike = self._alike(folder).get(_alike(last), [])
        if len(alike) > 1:
            raise ValueError(f"the image {name!r} may be any of {', '.join(sorted(alike))}; write its file's name")
        return folder / alike[0] if alike else None

    def _images_by_stem(self, folder: Path) -> dict[str, list[str]]:
        suffixes = [(name, PurePosixPath(name).suffix.lower()) for name in sorted(self._files(folder))]
        images = (name for name, suffix in suffixes if suffix in files.IMAGES and not name.startswith("."))
        return _grouped(images, lambda name: nfc(PurePosixPath(name).stem))

    def _find_folder(self, base: Path, parts: tuple[str, ...]) -> Path | None:
        folder = base.joinpath(*parts)
        if not parts or os.path.isdir(folder):  # noqa: PTH112 - unlike is_dir, false for a name that no folder can have
            return folder
        above = self._folder(base, parts[:-1])
        # The path may be in another normalisation than the disk's, at any depth.
        alike = [each for each in self._inside(above) if nfc(each.name) == nfc(parts[-1])] if above else []
        return alike[0] if len(alike) == 1 else None

    def _contradicts(self, folder: Path, split: Split | None) -> bool:
        return split is not None and split_of(*folder_names(self._raw, folder / "image")) not in (None, split)

    def _own_folders(self, folder: Path, stem: str) -> list[list[Path]]:
        """List the folders that the images of an annotation file may be in, the nearest group first."""
        raw = self._raw
        split = split_of(stem, *folder_names(raw, folder / "image"))
        annotations = [place for place in self._above(folder)[:-1] if place.name.lower() in _ANNOTATIONS][:1]
        bases = [folder, *(place.parent for place in annotations)]
        if folder != raw and (annotations or not self._by_stem(folder)):
            bases.insert(1, folder.parent)
        general = [inside for base in bases for inside in self._inside(base) if inside.name.lower() in _IMAGES]
        inside = [each for base in (*bases, *general) for each in self._inside(base)]
        # Its own folders are those of its name, else of its split.
        own = self._with_images(each for each in inside if _mentions(f"{stem} {folder.name}", each.name))
        own = own or self._with_images(each for each in inside if split and split_of(each.name) == split)
        if annotations:
            general += [place for place in partners(raw, folder, _ANNOTATIONS, _IMAGES) if place.is_dir()]
        # Without any they are those for images, and the only one that has images: it does not count for a path.
        groups = [[folder]]
        for group in (own, []) if own else (general, self._only):
            others = (place for place in dict.fromkeys(group) if place != folder)
            groups.append([place for place in others if not self._contradicts(place, split)])
        return groups

    def _with_images(self, places: Iterable[Path]) -> list[Path]:
        """List those of some folders that have images somewhere in them, each with its folders for images."""
        both: dict[Path, None] = {}
        for place in places:
            both |= dict.fromkeys((place, *(each for each in self._inside(place) if each.name.lower() in _IMAGES)))
        return [place for place in both if any(map(self._by_stem, walk(place)))]

    @functools.cached_property
    def _only(self) -> list[Path]:
        """List the folder that has all images of the data set, if one has."""
        some = list(itertools.islice((folder for folder in walk(self._raw) if self._by_stem(folder)), 2))
        return some if len(some) == 1 else []


def _file_names(folder: Path) -> frozenset[str]:
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries if entry.is_file())


def _readings(name: str) -> list[str]:
    """List the paths that a name may stand for: as it is, with backslashes, as a URL."""
    slashed = name.replace("\\", "/")
    path = _URL.sub("/", slashed, count=1)
    queried = [path.partition(mark)[0] for mark in "?&#"] if path != slashed else []
    decoded = [unquote(each).replace("\\", "/") for each in (path, *queried)]
    return list(dict.fromkeys((name, slashed, path, *decoded)))


def _alike(name: str) -> str:
    """Normalise a name: all names of one image have the result in common."""
    path = PurePosixPath(name)
    return nfc(path.stem + path.suffix.lower()) if path.name else name


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return dict(groups)


def _mentions(text: str, name: str) -> bool:  # as a word
    return re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", text, re.IGNORECASE) is not None
