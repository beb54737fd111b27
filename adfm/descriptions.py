"""Descriptions of the experiment and of the registered model in MLflow: which page shows what.

adfm updates a description until somebody edits it; empty the description to restore adfm's text.
"""

import hashlib
import re
from urllib.parse import quote

from adfm.text import markdown

NOTE = "mlflow.note.content"  # tag that MLflow shows as the description of an experiment

# An HTML comment, which MLflow's pages hide, with the digest of the text above it.
_MARK = "\n\n<!-- adfm updates this description until somebody edits it: {} -->"
_MARKED = re.compile(r"\s*<!-- adfm updates [^>]*: ([0-9a-f]{16}) -->\s*\Z")


def of_experiment(model: str) -> str:
    """Return the description of the experiment whose models are registered as `model`."""
    # The runs' page shows the first line, and the rest once it is expanded.
    return f"""\
Start with the runs evaluate (report) and train (curves) and the model [{markdown(model)}]({model_page(model)}).

- **evaluate**: *Artifacts*, `evaluation/report/report.html`: escapes and false calls on held-out images, with the \
model's own words; `evaluation/comparison.md`: all models side by side.
- **train**: *Model metrics*, section *Overview*: balanced accuracy of the sampled completions, reward and utilisation \
(share of groups whose completions earn different rewards, so that they teach something). *Artifacts*, `completions/`: \
sampled completions with the terms of their reward.
- **register**: makes a version of [{markdown(model)}]({model_page(model)}). Its page has the gate's decision, and how \
to approve it.
- **validate**: *Artifacts*, `validation/index.html`: the checks of the data. **sft**: *Model metrics*: the loss of \
the supervised start."""


def of_model(name: str, experiment_id: str) -> str:
    """Return the description of the registered model `name`, whose runs are in an experiment."""
    return f"""\
A version is a trained adapter with its evaluation and the gate's decision. The alias `production` marks the one in use.

- **Open a version** for the gate's decision, links to report and training curves, and how to approve or reject it.
- `adfm promote` moves the alias to an approved version, `adfm rollback` moves it back. An alias that is moved by hand \
is put back.
- [{markdown(name)}-history]({model_page(f"{name}-history")}) records who was in production, when and why: \
`adfm registry log`.
- The [runs](#/experiments/{experiment_id}/runs?workflowType=machine_learning) have curves, report and sampled \
completions."""


def model_page(name: str) -> str:
    """Return the address of a registered model in MLflow's pages, below the server's own."""
    return f"#/models/{quote(name, safe='')}?workflowType=machine_learning"


def to_write(current: str | None, text: str) -> str | None:
    """Return the replacement of the description `current`; `None` if it is up to date, or somebody has edited it."""
    if current and current.strip():
        mark = _MARKED.search(current)
        if mark is None or mark[1] != _digest(current[: mark.start()]):
            return None
    new = text + _MARK.format(_digest(text))
    return None if current == new else new


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]
