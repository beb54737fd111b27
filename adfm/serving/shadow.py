"""Shadow mode: a candidate answers the images that production answers, and where they differ is logged.

It answers in a thread whenever no request waits. Where it falls behind, images are dropped and counted; what goes wrong
with it is logged and changes no answer.
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from adfm.evaluation import metrics
from adfm.records import Box
from adfm.serving import servelog

FOLDER = "ADFM_SHADOW"  # names the folder of the candidate's version
_MOST_IMAGES = 64  # that wait for the shadow
_MOST_BYTES = 256_000_000  # of their files
_AT_ONCE = 8  # images: a request that comes in between waits for so many
_LOGGED = ("label", "probability", "boxes", "reason")

Row = dict[str, Any]


class Turns:
    """Let one model compute at a time, as memory is there for one; production goes before its shadow."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._requests = 0  # that wait

    @contextmanager
    def production(self) -> Iterator[None]:
        """Wait until nobody computes."""
        with self._changed:
            self._requests += 1
            self._changed.wait_for(lambda: not self._busy)
            self._requests -= 1
            self._busy = True
        yield from self._computing()

    @contextmanager
    def shadow(self) -> Iterator[None]:
        """Wait until nobody computes and no request waits."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy and not self._requests)
            self._busy = True
        yield from self._computing()

    def _computing(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()


class Shadow:
    """A candidate that answers what production has answered.

    Args:
        answer: Returns the candidate's rows for image files, in their order.
        turns: Those of production.
        version: Production's, for the log.
        name: The candidate's, for the log.
    """

    def __init__(self, answer: Callable[[list[bytes]], list[Row]], turns: Turns, version: str, name: str) -> None:
        self._answer, self._turns, self._version, self._name = answer, turns, version, name
        self._waiting: queue.Queue[tuple[bytes, Row]] = queue.Queue(_MOST_IMAGES)  # files, production's answers
        self._bytes = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="adfm shadow", daemon=True).start()

    def offer(self, contents: Sequence[bytes], rows: Sequence[Row]) -> None:
        """Queue image files, with production's answers, to be compared when there is time; return at once."""
        dropped = sum(not self._put(*pair) for pair in zip(contents, rows, strict=True))
        if dropped:
            self._log(("dropped", {"images": dropped}))

    def wait(self) -> None:
        """Wait until all images that were not dropped are compared."""
        self._waiting.join()

    def _put(self, content: bytes, row: Row) -> bool:
        with self._lock:
            if self._bytes + len(content) > _MOST_BYTES or self._waiting.full():
                return False
            self._waiting.put_nowait((content, row))
            self._bytes += len(content)
            return True

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while len(batch) < _AT_ONCE and not self._waiting.empty():
                batch.append(self._waiting.get())
            try:
                with self._turns.shadow():
                    rows = self._answer([content for content, _ in batch])
                self._compare(batch, rows)
            except Exception as error:  # production's answers do not depend on it
                reason = f"{type(error).__name__}: {error}"
                self._log(("failed", {"images": len(batch), "reason": reason[:1000]}))
            with self._lock:
                self._bytes -= sum(len(content) for content, _ in batch)
            for _ in batch:
                self._waiting.task_done()

    def _compare(self, batch: list[tuple[bytes, Row]], rows: list[Row]) -> None:
        differing = []
        for (content, production), row in zip(batch, rows, strict=True):
            if where := difference(production, row):
                image = hashlib.sha256(content).hexdigest()
                sides = {"production": production, "shadow": row}
                answers = {side: {key: answer[key] for key in _LOGGED} for side, answer in sides.items()}
                differing.append(("differs", {"image": image, "in": where, **answers}))
        self._log(("compared", {"images": len(batch), "differ": len(differing)}), *differing)

    def _log(self, *events: tuple[str, dict[str, Any]]) -> None:
        servelog.write(((event, {"candidate": self._name, **values}) for event, values in events), self._version)


def difference(production: Row, shadow: Row) -> str | None:
    """Return in what two answers to an image differ, if they do: `label`, else `boxes`."""
    if production["label"] != shadow["label"]:
        return "label"
    boxes, others = ([Box(*box) for box in row["boxes"]] for row in (production, shadow))
    if not boxes or not others:
        return "boxes" if boxes or others else None
    width, height = (int(max(box[side] for box in [*boxes, *others])) + 1 for side in (2, 3))
    overlap = metrics.localize(boxes, others, width, height)["iou"]
    return "boxes" if overlap is not None and overlap < metrics.LOCATED else None
