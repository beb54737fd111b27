"""Latency and throughput of `mlflow models serve` against one `generate` an image in process, same model, one run.

python benchmarks/serve.py

The embedded model on the embedded data set, over HTTP on this machine, images as base64. Prints the latency of a
request of one image, images per second by images a request and by clients, and ratios to `generate` without a server.
Ends with status 1 if requests of many images are not 2 times as fast as one by one, or an answer differs.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evaluate import ALONE, MODEL, one_by_one
from transformers.utils import logging

import adfm
from adfm import tracking
from adfm.data import shards as shards_
from adfm.data import synthetic
from adfm.data.conversion import convert
from adfm.method import response
from adfm.models import loading
from adfm.params import Params
from adfm.registry import pyfunc

LEAST = 2.0
REQUESTS = 100
SIZES = (1, 8, 32, 96)
CLIENTS = 4


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """The port of MLflow's server for a version in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    here = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(adfm.__file__).parents[1]),
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local"]
    log = folder.with_name("log")
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--timeout", "600"],
            env=os.environ | here, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                connection.request("GET", "/ping")
                connection.getresponse().read()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(log.read_text()) from None
                time.sleep(0.2)
            finally:
                connection.close()
        yield port
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def post(port: int, images: list[str]) -> list[dict[str, Any]]:
    """The answers of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        body = json.dumps({"dataframe_records": [{"image": image} for image in images]})
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise SystemExit(content.decode())
        found: list[dict[str, Any]] = json.loads(content)["predictions"]
        return found
    finally:
        connection.close()


def main(folder: Path) -> int:
    """Measures both and prints what was found."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    params = Params()
    synthetic.generate(folder / "raw")
    convert(folder / "raw", folder / "shards", params)
    pyfunc.write(folder / "version")
    shutil.copytree(loading.EMBEDDED[MODEL], folder / "version" / "model")
    (folder / "version" / "params.yaml").write_text(tracking.settings(params))
    images = {r.id: base64.b64encode(r.image).decode() for r in shards_.read(folder / "shards", "test")}
    ids = list(images)[: max(SIZES)]

    alone, direct = one_by_one(MODEL, folder / "shards", params)
    print(f"generate, one by one: {direct:6.1f} images/s ({len(alone)} images)")
    with served(folder / "version") as port:
        for image in ids[:3]:
            post(port, [images[image]])
        taken, answers = [], {}
        for number in range(REQUESTS):
            image = ids[number % ALONE]
            start = time.perf_counter()
            [answers[image]] = post(port, [images[image]])
            taken.append(time.perf_counter() - start)
        p50, p95 = statistics.median(taken), statistics.quantiles(taken, n=20)[-1]
        print(f"one client, one image: p50 {1000 * p50:.0f} ms, p95 {1000 * p95:.0f} ms ({REQUESTS} requests)")
        print(f"                       p50 is {p50 * direct:.2f} times what generate takes")
        rates = {}
        for size in SIZES:
            sent = max(2, ALONE // size)
            start = time.perf_counter()
            for _ in range(sent):
                post(port, [images[image] for image in ids[:size]])
            rates[size] = sent * size / (time.perf_counter() - start)
            print(f"{size:3} images a request: {rates[size]:6.1f} images/s, {rates[size] / direct:.2f} times generate")
        start = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(lambda image: post(port, [images[image]]), ids[:ALONE]))
        rate = ALONE / (time.perf_counter() - start)
        print(f"{CLIENTS} clients, one image: {rate:6.1f} images/s, {rate / direct:.2f} times generate")
    differing = [name for name in answers if name in alone and not _same(answers[name], alone[name])]
    print(f"answers that differ: {len(differing)} of {len(answers)}")
    return 0 if max(rates.values()) >= LEAST * direct and not differing else 1


def _same(answer: dict[str, Any], completion: str) -> bool:
    read = response.parse(completion)
    return answer["label"] == read.predicted_label and (read.think or "").strip() in answer["reasoning"]


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        raise SystemExit(main(Path(temporary)))
