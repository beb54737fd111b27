"""How fast `adfm convert` is, against Pillow alone and against reading the same data set the usual way, in turn.

    python benchmarks/convert.py                                      # the steps of anomalib, written out below
    python benchmarks/convert.py --who adfm pillow --side 2500        # photographs of a camera's size
    python benchmarks/convert.py --python /path/to/venv/bin/python    # anomalib itself, from an environment that has it

Ours is all of `adfm convert`: every image proved decodable, hashed, compared with all others, boxes, splits, shards
written. Pillow alone is `Image.open(path).load()` of the same images and masks in two threads, and nothing else: the
limit for whoever decodes every image. The CPU time is comparable even when the machine has other work.

The peer is anomalib's MVTec AD data set, item by item: image and mask decoded to tensors; and the boxes of the mask's
components by torchvision's `masks_to_boxes`. The data set is drawn: RGB, textured, a third of the images with defects.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
SIDES = {"PNG": 1024, "JPEG": 900}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="of each format")
    parser.add_argument("--formats", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--side", type=int, help="of the images, in pixels, instead of 1024 (PNG) and 900 (JPEG)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--who", nargs="+", choices=("adfm", "pillow", "peer"), default=["adfm", "pillow", "peer"])
    parser.add_argument("--python", default=sys.executable, help="interpreter for the peer")
    parser.add_argument("--time", nargs=2, metavar=("WHO", "RAW"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time:
        print(json.dumps(_timed(args.time[0], Path(args.time[1]))))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.formats:
            raw, side = Path(folder) / kind, args.side or SIDES[kind]
            _draw(raw, args.images, kind, side)
            runs: dict[str, list[dict[str, Any]]] = {who: [] for who in args.who}
            for _ in range(args.rounds):
                for who, done in runs.items():
                    done.append(_run(args.python if who == "peer" else sys.executable, who, raw))
            megabytes = sum(path.stat().st_size for path in raw.glob("*/t*/*/*")) / 2**20
            print(f"{kind}, {side} pixels a side, {megabytes / args.images:.2f} MiB an image:")
            rates, cpu = {}, {}
            for who, done in runs.items():
                rates[who] = statistics.median(run["images"] / run["seconds"] for run in done)
                cpu[who] = statistics.median(run["cpu"] for run in done)
                peak = max(run["peak"] for run in done)
                print(
                    f"  {done[0]['who']}: {rates[who]:.1f} images/s, {cpu[who]:.2f} ms of CPU an image, {peak:.0f} MiB"
                )
            for who in rates.keys() - {"adfm"} if "adfm" in rates else ():
                ratios = f"{rates['adfm'] / rates[who]:.2f}; of CPU {cpu[who] / cpu['adfm']:.2f}"
                print(f"  ratio to {runs[who][0]['who']}: {ratios}")


def _run(python: str, who: str, raw: Path) -> dict[str, Any]:
    command = [python, __file__, "--time", who, str(raw)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _timed(who: str, raw: Path) -> dict[str, Any]:
    """Seconds without the imports."""
    who, work = {"adfm": _adfm, "pillow": _pillow, "peer": _peer}[who]()
    start, cpu = time.perf_counter(), time.process_time()
    images = work(raw)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"who": who, "images": images, "seconds": seconds, "cpu": 1000 * cpu / images, "peak": peak}


def _adfm() -> tuple[str, Callable[[Path], int]]:
    import pandas  # noqa: F401  # by pyarrow
    import scipy.ndimage
    import scipy.sparse.csgraph
    import scipy.spatial  # noqa: F401

    from adfm.data import conversion
    from adfm.params import Params

    def work(raw: Path) -> int:
        with tempfile.TemporaryDirectory(dir=raw.parent) as folder:
            out = Path(folder) / "shards"
            conversion.convert(raw, out, Params())
            return int(json.loads((out / "conversion.json").read_text())["images"])

    return "adfm convert", work


def _pillow() -> tuple[str, Callable[[Path], int]]:
    def decode(path: Path) -> bool:
        with Image.open(path) as file:
            file.load()
        return "ground_truth" not in path.parts

    def work(raw: Path) -> int:
        with ThreadPoolExecutor(2) as pool:
            return sum(pool.map(decode, sorted(raw.rglob("*.png"))))

    return "Pillow alone, two threads", work


def _peer() -> tuple[str, Callable[[Path], int]]:
    import torch
    from scipy import ndimage

    try:
        items, boxes, who = _anomalib()
    except ImportError as error:
        print(f"anomalib is not installed here ({error}); its steps are written out", file=sys.stderr)
        items, boxes, who = _written_out, _masks_to_boxes, "anomalib's steps"

    def work(raw: Path) -> int:
        images = 0
        for _, mask in items(raw):
            labels, count = ndimage.label(mask.numpy())
            if count:
                boxes(torch.from_numpy(labels == np.arange(1, count + 1)[:, None, None]))
            images += 1
        return images

    return who, work


def _anomalib() -> tuple[Callable[[Path], Iterator[tuple[Any, Any]]], Callable[[Any], Any], str]:
    import torch

    try:
        import torchvision
    except (
        RuntimeError
    ):  # a torchvision for GPUs beside a torch without: its compiled operators, unused here, are amiss
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules["_library"] = library  # type: ignore[assignment]  # it must outlive this function
        import torchvision
    import anomalib
    from anomalib.data.datasets.image.mvtecad import MVTecADDataset
    from torchvision.ops import masks_to_boxes

    def items(raw: Path) -> Iterator[tuple[Any, Any]]:
        for split in ("train", "test"):
            data = MVTecADDataset(root=raw, category="part", split=split)
            for index in range(len(data)):
                item = data[index]
                yield item.image, item.gt_mask

    return items, masks_to_boxes, f"anomalib {anomalib.__version__}, torchvision {torchvision.__version__}"


def _written_out(raw: Path) -> Iterator[tuple[Any, Any]]:
    """What anomalib 2.7 does for an item: `read_image`, `read_mask`, to tensors, the image to floats in [0, 1]."""
    import torch

    folder = raw / "part"
    for path in sorted([*folder.glob("train/*/*"), *folder.glob("test/*/*")]):
        with Image.open(path) as file:
            pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).contiguous()
        image = pixels.to(torch.float32) / 255
        if path.parent.name == "good":
            mask = torch.zeros(image.shape[-2:]).to(torch.uint8)
        else:
            with Image.open(folder / "ground_truth" / path.parent.name / f"{path.stem}_mask.png") as file:
                mask = (torch.from_numpy(np.array(file.convert("L"))) > 0).to(torch.uint8)
        yield image, mask


def _masks_to_boxes(masks: Any) -> Any:
    """As in torchvision.ops."""
    import torch

    boxes = torch.zeros((masks.shape[0], 4))
    for index, mask in enumerate(masks):
        y, x = torch.where(mask != 0)
        boxes[index] = torch.stack([x.min(), y.min(), x.max(), y.max()])
    return boxes


def _draw(raw: Path, images: int, format_: str, size: int) -> None:
    """Files are named `.png`, JPEGs too: anomalib looks for no others."""
    rng = np.random.default_rng(0)
    grounds = [_ground(rng, size) for _ in range(6)]
    for number in range(images):
        pixels = np.roll(grounds[number % 6], rng.integers(0, size, 2), axis=(0, 1))
        kind = "train/good" if number % 3 == 0 else "test/good" if number % 3 == 1 else "test/hole"
        if kind == "test/hole":
            mask = np.zeros((size, size), np.uint8)
            y, x = np.mgrid[:size, :size]
            for cy, cx, radius in rng.uniform((0, 0, 0.01), (1, 1, 0.05), (int(rng.integers(1, 4)), 3)) * size:
                mask[np.hypot(y - cy, x - cx) < radius] = 255
            pixels = np.where(mask[..., None] > 0, pixels // 2, pixels)
            _save(Image.fromarray(mask), raw / "part" / "ground_truth" / "hole" / f"{number:05d}_mask.png", "PNG")
        _save(Image.fromarray(pixels), raw / "part" / kind / f"{number:05d}.png", format_)


def _ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """Structure of all sizes and the noise of a sensor."""
    ground = np.full((size, size, 3), 120.0)
    for cells, strength in ((4, 40), (16, 20), (64, 12), (256, 8)):
        coarse = rng.normal(size=(cells, cells, 1)) + 0.4 * rng.normal(size=(cells, cells, 3))
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel].astype(np.float32))
            ground[..., channel] += strength * np.asarray(layer.resize((size, size), Image.Resampling.BICUBIC))
    return (ground + rng.normal(0, 2.5, ground.shape)).clip(0, 255).astype(np.uint8)


def _save(image: Image.Image, path: Path, format_: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format_, quality=92)


if __name__ == "__main__":
    main()
