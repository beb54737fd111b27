"""Read, decode and process an image once a step, however many completions and passes use it.

TRL 1.16 runs the image processor on the image of every completion, before it generates and again before it computes
log-probabilities; and it reads and decodes them for every backward pass. What is computed here is bitwise the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets


@contextmanager
def processed_once(processor: Any) -> Iterator[None]:
    """Within the block, `processor` processes an image object once, however many rows and calls it appears in.

    What was computed is kept until the end of the block: `pixel_values` of every distinct image, 6 MB for one of
    504 x 504 pixels. Two objects with the same pixels count as two images; `Rows` gives the rows of a group one object.

    Args:
        processor: A multimodal processor of transformers, whose `image_processor` is replaced for the block.
    """
    original = processor.image_processor
    processor.image_processor = _Once(original)
    try:
        yield
    finally:
        processor.image_processor = original


class _Once:
    """An image processor that remembers the images it has seen; all else is the original's."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self._seen: dict[tuple[int, str], tuple[Any, dict[str, Any]]] = {}
        self._last: tuple[Any, dict[str, Any]] = None, {}
        self._alone = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __call__(self, images: Any, *args: Any, return_tensors: Any = None, **kwargs: Any) -> Any:
        from transformers import BatchFeature
        from transformers.image_utils import make_flat_list_of_images

        rows = list(images) if isinstance(images, list | tuple) else [images]
        one_a_row = all(not isinstance(row, list | tuple) or len(row) == 1 for row in rows)
        if self._alone and not args and one_a_row:
            flat: Any = make_flat_list_of_images(rows)
            outputs = [self._of(image, row, kwargs) for image, row in zip(flat, rows, strict=True)]
            key = list(map(id, flat)), kwargs
            if key != self._last[0]:  # pixel values of 300 images are 1.8 GB: not joined again for the second pass
                self._last = key, {name: _joined([output.get(name) for output in outputs]) for name in outputs[0]}
            together = self._last[1]
            if all(value is not None for value in together.values()):
                return BatchFeature(dict(together), tensor_type=return_tensors)
            # A family whose output for an image depends on the others of the batch, such as one that pads to the
            # largest: the rest of the block is processed as without this class.
            self._alone = False
            self._seen.clear()
            self._last = None, {}
        return self._original(images, *args, return_tensors=return_tensors, **kwargs)

    def _of(self, image: Any, row: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The output for one image; the image is kept with it, so that its `id` is not given to another."""
        key = id(image), repr(sorted(kwargs.items()))
        if key not in self._seen:
            self._seen[key] = image, dict(self._original([row], **kwargs))
        return self._seen[key][1]


def _joined(values: list[Any]) -> Any:
    """The outputs of single images as that of their batch; `None` where they cannot be joined row by row.

    Arrays become tensors, as TRL makes of them before it generates, by two copies.
    """
    import torch

    first = values[0]
    if isinstance(first, list):
        items = [item for value in values for item in value]
        return items if len({np.shape(item) for item in items}) == 1 else None
    if not isinstance(first, np.ndarray | torch.Tensor) or first.ndim == 0:
        return None
    if any(value is None or value.shape[1:] != first.shape[1:] for value in values):
        return None
    return torch.cat([torch.as_tensor(value) for value in values])


class Rows:
    """The rows of a data set for a data loader: one that is asked for again is not read and decoded again.

    TRL 1.16 loads all rows of a step, a row a completion, for every backward pass of the step, and uses the first load.
    Kept are the rows of the last load. The same index gives the same objects, which is what `processed_once` goes by.

    Args:
        data: The data set.
    """

    def __init__(self, data: datasets.Dataset) -> None:
        self._data = data
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The rows of some indices, as PyTorch's data loader asks for those of a batch."""
        distinct = dict.fromkeys(indices)
        missing = [index for index in distinct if index not in self._kept]
        known = self._kept
        if missing:
            known = known | dict(zip(missing, self._data.__getitems__(missing), strict=True))
        self._kept = {index: known[index] for index in distinct}
        return [dict(known[index]) for index in indices]
