"""`adfm serve`: MLflow's scoring server on a registered version, started once the version is verified."""

import os
import socket
import sys
import traceback
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adfm.errors import AdfmError
from adfm.process import cpus
from adfm.serving import shadow, verified


def serve(model: str, host: str, port: int, workers: int, candidate: str | None = None) -> None:
    """Serve a registered version, as `mlflow models serve` does, until stopped (SIGTERM, SIGINT).

    Args:
        model: As of `adfm.serving.verified.fetch`.
        host: Address to listen on.
        port: Port; 0: a free one, which is printed.
        workers: Processes, each with a model of its own.
        candidate: A version that answers the same images in the shadow of `model`, verified as it is.

    Raises:
        Unverified: The version's files are not those that were signed; nothing of them was run.
        NotInProduction: The alias was moved by hand.
        AdfmError: There is no such version, the address cannot be listened on, or the model cannot be loaded.
    """
    if workers < 1:
        raise AdfmError(f"--workers {workers}: there must be at least one.")
    with _bind(host, port) as listener, TemporaryDirectory(prefix="adfm-serve-") as private:  # mode 0700
        # First of all: MLflow runs the loader and the code that the version's `MLmodel` names.
        folder, name = verified.fetch(model, Path(private))
        about = f"{name} is verified"
        os.environ.pop(shadow.FOLDER, None)  # a folder that nobody has verified
        if candidate:
            beside, name = verified.fetch(candidate, Path(private))
            os.environ[shadow.FOLDER] = str(beside)
            about += f", and in its shadow {name}"
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(f"adfm: {about}; loading it to serve on {address}", file=sys.stderr, flush=True)
        _run(folder, listener, workers)


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket with the address, on which nothing listens before the model is loaded."""
    if not 0 <= port < 65536:
        raise AdfmError(f"--port {port}: a port is a number from 0 to 65535.")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # A server that is started again need not wait until the last one's connections are forgotten.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise AdfmError(f"{host}:{port} cannot be listened on: {error}. Set others with --host and --port.") from error
    return listener


def _run(folder: Path, listener: socket.socket, workers: int) -> None:
    import uvicorn
    from mlflow.pyfunc import scoring_server
    from uvicorn.config import STARTUP_FAILURE
    from uvicorn.supervisors import Multiprocess

    _, environment = scoring_server.get_cmd(str(folder))  # by which MLflow's app, also in a worker, knows its model
    os.environ.update(environment)
    if workers > 1:
        os.environ["OMP_NUM_THREADS"] = str(cpus.threads(workers))
        supervisor = Multiprocess(uvicorn.Config(f"{__name__}:worker", factory=True, workers=workers), [listener])
        supervisor.run()
        if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
            raise AdfmError("A worker could not load the model; see above.")
        return
    server = uvicorn.Server(uvicorn.Config(f"{__name__}:application", factory=True))
    try:
        server.run([listener])
    except KeyboardInterrupt:  # uvicorn ends well at a signal, and then raises it once more
        if not server.started:
            raise


def application() -> Any:
    """Return MLflow's scoring server with the model of `_run`; for uvicorn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's, of its own type hints
        from mlflow.pyfunc.scoring_server.app import app
    return app


def worker() -> Any:
    """Return the same in one of several processes."""
    from uvicorn.config import STARTUP_FAILURE

    try:
        return application()
    except Exception:  # a worker that cannot load the model ends all; uvicorn would try for ever
        traceback.print_exc()
        sys.exit(STARTUP_FAILURE)
