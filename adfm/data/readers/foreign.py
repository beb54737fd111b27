"""Exports that no reader takes, recognised by words in their files, and what to export instead."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from adfm.data.readers.files import images, listing, relative, walk
from adfm.data.readers.textfiles import mentions

_FILES = 50  # of a kind that are searched; the exports have one file, or many that are alike
_COCO, _TREE = "export as COCO", "export with fo.types.ImageClassificationDirectoryTree"
# Words in a JSON file, of which the first entry that fits counts; what it is; what to do.
_JSON: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    ((b'"assets"', b'"regions"', b'"tags"'), "is VoTT's own JSON", "export as CSV or as Pascal VOC"),
    ((b'"asset"', b'"regions"', b'"boundingBox"'), "is VoTT's own JSON", "export as CSV or as Pascal VOC"),
    ((b'"coordinates"', b'"annotations"', b'"label"'), "is CreateML's JSON", _COCO),
    ((b'"items"', b'"categories"', b'"label_id"'), "is Datumaro's JSON", "export as 'CVAT for images 1.1' or COCO"),
    ((b'"bounding_box"', b'"label"'), "is FiftyOne's own JSON", "export with fo.types.COCODetectionDataset"),
    ((b'"_cls"', b'"filepath"'), "is FiftyOne's own JSON", "export with fo.types.COCODetectionDataset"),
    ((b'"classes"', b'"labels"'), "seems to be FiftyOne's JSON of labels of whole images", _TREE),
    ((b'"image_id"', b'"score"'), "holds results of a detector", "export the annotations"),
    ((b'"images"', b'"file_name"'), "is COCO without annotations or categories", "export these as well"),
    ((b'"data_row"', b'"projects"'), "is Labelbox's own JSON", "convert it to COCO"),
)
_ABOUT = (".json", ".jsonl", ".xml", ".txt", ".csv", ".tsv", ".yaml", ".yml", ".parquet", ".mat")
_SUFFIXES = {
    ".ndjson": ("is Labelbox's own JSON", "convert it to COCO"),
    ".xlsx": ("is a workbook of Excel", "save it as CSV"),
    ".xls": ("is a workbook of Excel", "save it as CSV"),
    ".ods": ("is a workbook of LibreOffice", "save it as CSV"),
    ".tfrecord": ("is a file of TensorFlow", _COCO),
    ".zip": ("is an archive within the data set", "unpack it, or fetch the archive itself with adfm fetch"),
}


def hint(raw: Path) -> str:
    """Say what a data set in no known layout seems to be, and what to do; "" if nothing is known of it."""
    for file in _files(raw, ".json"):
        for words, what, remedy in _JSON:
            if mentions(file, *words):
                return f"{relative(raw, file)} {what}; {remedy}"
    for file in _files(raw, ".csv"):
        if file.name == "_classes.csv":
            remedy = "export as 'Folder Structure', or write a CSV with the columns image and label"
            return f"{relative(raw, file)} is Roboflow's CSV of labels of whole images, a column a class; {remedy}"
    for file in _files(raw, ".txt"):
        if mentions(file, b"imagesource:"):
            return f"{relative(raw, file)} is DOTA's text; convert it to YOLO OBB, or export as COCO"
    for suffix, (what, remedy) in _SUFFIXES.items():
        for file in _files(raw, suffix):
            return f"{relative(raw, file)} {what}; {remedy}"
    folders = list(islice(walk(raw, 3), 1000))
    if any(map(images, folders)) and not any(listing(folder, *_ABOUT) for folder in folders):
        return "it holds images without annotations; export these as well, or sort the images into OK/ and NG/"
    return ""


def _files(raw: Path, suffix: str) -> Iterator[Path]:
    return islice((file for folder in walk(raw, 3) for file in listing(folder, suffix)), _FILES)
