"""Read, decode and process an image once a step, however many completions and passes use it; bitwise as TRL does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets


@contextmanager
def processed_once(processor: Any) -> Iterator[None]:
    """Let a multimodal processor process an image object once within the block, however often it appears.

    Two objects with the same pixels count as two images; `Rows` gives the rows of a group one object.
    """
    # TRL 1.16 runs the image processor on the image of every completion, before it generates and again before it
    # computes log-probabilities. `pixel_values` of every distinct image are cached: 6 MB for 504 x 504 pixels.
    original = processor.image_processor
    processor.image_processor = _Once(original)
    try:
        yield
    finally:
        processor.image_processor = original


class _Once:
    """An image processor with a cache."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self._outputs: dict[tuple[int, str], tuple[Any, dict[str, Any]]] = {}
        self._last: tuple[Any, dict[str, Any]] = None, {}
        self._one_by_one = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __call__(self, images: Any, *args: Any, return_tensors: Any = None, **kwargs: Any) -> Any:
        from transformers import BatchFeature
        from transformers.image_utils import make_flat_list_of_images

        rows = list(images) if isinstance(images, list | tuple) else [images]
        one_a_row = all(not isinstance(row, list | tuple) or len(row) == 1 for row in rows)
        if self._one_by_one and not args and one_a_row:
            flat: Any = make_flat_list_of_images(rows)
            outputs = [self._of(image, row, kwargs) for image, row in zip(flat, rows, strict=True)]
            key = list(map(id, flat)), kwargs
            if key != self._last[0]:  # pixel values of 300 images are 1.8 GB: not joined again for the second pass
                self._last = key, {name: _joined([output.get(name) for output in outputs]) for name in outputs[0]}
            batch = self._last[1]
            if all(value is not None for value in batch.values()):
                return BatchFeature(dict(batch), tensor_type=return_tensors)
            # A family whose output for an image depends on the others of the batch, such as one that pads to the
            # largest: the rest of the block is processed as without this class.
            self._one_by_one = False
            self._outputs.clear()
            self._last = None, {}
        return self._original(images, *args, return_tensors=return_tensors, **kwargs)

    def _of(self, image: Any, row: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        key = id(image), repr(sorted(kwargs.items()))
        if key not in self._outputs:
            # With the image: Python would give the `id` of one that is gone to another.
            self._outputs[key] = image, dict(self._original([row], **kwargs))
        return self._outputs[key][1]


def _joined(values: list[Any]) -> Any:
    """Return the outputs of single images as that of their batch; `None` where they cannot be joined row by row."""
    import torch

    first = values[0]
    if isinstance(first, list):
        items = [item for value in values for item in value]
        return items if len({np.shape(item) for item in items}) == 1 else None
    if not isinstance(first, np.ndarray | torch.Tensor) or first.ndim == 0:
        return None
    if any(value is None or value.shape[1:] != first.shape[1:] for value in values):
        return None
    # TRL makes tensors of arrays before it generates, by two copies; these need none.
    return torch.cat([torch.as_tensor(value) for value in values])


class Rows:
    """The rows of a data set, of which those of the last load are cached: the same index gives the same objects."""

    # TRL 1.16 loads all rows of a step, a row a completion, for every backward pass of the step, and uses the first.
    def __init__(self, data: "datasets.Dataset") -> None:
        self._data = data
        self._cache: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a batch; PyTorch's data loader calls this."""
        missing = [index for index in dict.fromkeys(indices) if index not in self._cache]
        loaded = self._data.__getitems__(missing) if missing else []
        rows = self._cache | dict(zip(missing, loaded, strict=True))
        self._cache = {index: rows[index] for index in indices}
        return [dict(rows[index]) for index in indices]
