"""Draws the pictures of docs/tools.md, what adfm reads of each tool's export: `python scripts/draw-exports.py`."""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adfm.data import inspection, pictures  # noqa: E402
from adfm.data.readers import LAYOUTS, files  # noqa: E402
from adfm.params import Params  # noqa: E402
from tests.data.readers.exports import EXPORTS, parts  # noqa: E402

SIDE = 180
SETTINGS = Params().convert


def main() -> None:
    folder = ROOT / "docs" / "images" / "tools"
    folder.mkdir(parents=True, exist_ok=True)
    for name, export in EXPORTS.items():
        with tempfile.TemporaryDirectory() as place:
            raw = Path(place) / "line"
            export.write(raw, parts(8))
            samples = sorted(LAYOUTS[export.layout].read(raw), key=lambda sample: sample.source)
            kinds = {sample.defect: sample for sample in samples[::-1] if sample.label == "anomalous"}
            tiles = []
            for sample in [*kinds.values(), *samples[1::3]][:2]:
                row = inspection.inspect(sample, SETTINGS)
                assert not row["problems"], row["problems"]
                marks = {
                    "image": {"bytes": files.content(sample.image)},
                    "mask": row["mask"] and {"bytes": row["mask"]},
                }
                tiles.append(np.asarray(pictures.drawn(pictures.of_row(row | marks, SIDE), SIDE)))
            gap = np.full((tiles[0].shape[0], 4, 3), 255, np.uint8)
            Image.fromarray(np.hstack([tiles[0], gap, tiles[1]])).save(folder / f"{name}.jpg", quality=88)
            print(folder / f"{name}.jpg")


if __name__ == "__main__":
    main()
