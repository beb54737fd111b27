"""The help texts of the command line: each verb's summary, description, examples and exit codes, grouped by purpose."""

from collections.abc import Mapping
from typing import NamedTuple


class Verb(NamedTuple):
    """Help of one verb."""

    summary: str  # one line, for the list of all verbs
    about: str
    examples: tuple[str, ...]
    exits: Mapping[int, str] = {}  # exit codes beside `_EXITS`, or with another meaning


_EXITS = {
    0: "success",
    1: "an error, explained on stderr",
    2: "wrong usage",
    130: "interrupted (Ctrl-C); stderr says what is kept",
    143: "terminated (SIGTERM)",
}
_STOPPED = {75: "stopped by SIGTERM after a checkpoint; the same command continues"}
_SIGNED = {2: "wrong usage, or a signature, the history or a file of a version is not as it should be"}

GROUPS: dict[str, dict[str, Verb]] = {
    "from images to production, in this order": {
        "check": Verb(
            "check settings, model, MLflow and disk before a run",
            "Checks that the settings are valid, the base model is complete and fits this machine, MLflow answers, and "
            "the disk has space, and lists every problem. Prints what to expect of the model and the next larger one.",
            ("adfm check", "adfm check --params params.yaml --params params/qwen2.5-vl-7b.yaml"),
        ),
        "fetch": Verb(
            "copy a raw data set here and list its files in a manifest",
            "Copies or downloads a data set, unpacks archives safely, and writes manifest.json with size and SHA-256 "
            "of each file. An interrupted download from S3 or DVC resumes.",
            ("adfm fetch synthetic:// data/raw/synthetic", "adfm fetch s3://bucket/my-line data/raw/my-line"),
        ),
        "convert": Verb(
            "convert a raw data set to Parquet shards, with splits",
            "Reads the annotations, derives boxes from masks, divides the images into splits so that copies stay "
            "together, and writes Parquet shards. Bad data are an error that lists every offending file. Large data "
            "sets can be inspected in parts, on several machines (--part), and joined (--parts).",
            (
                "adfm convert data/raw/synthetic data/shards",
                "adfm convert data/raw/my-line data/shards --layout coco",
                "adfm convert data/raw/my-line parts/2 --part 2/8",
            ),
        ),
        "validate": Verb(
            "check shards before training, and write a report",
            "Runs the data validation suite (Great Expectations): image sizes, labels, boxes, duplicates, leaks "
            "between splits, drift from the data in production. Writes a page with pictures of what failed.",
            ("adfm validate data/shards", "adfm validate data/shards reports/validation"),
            {1: "an error, or the shards are not fit to train on: every failure is listed"},
        ),
        "sft": Verb(
            "supervised fine-tuning (cold start) of the base model",
            "Trains a LoRA adapter on the labels and boxes of the training images, so that the model learns the "
            "format of the answer before GRPO. It has no checkpoints: interrupted, it starts over.",
            ("adfm sft data/shards models/sft", "adfm sft data/shards models/sft --set sft.steps=300"),
        ),
        "detector": Verb(
            "train the reference detector, a model without language",
            "Trains a small head on pretrained image features, on the same images. Evaluation compares the language "
            "model with it, to show whether the language model is worth its cost.",
            ("adfm detector data/shards models/detector",),
        ),
        "train": Verb(
            "train by GRPO; resumes from the last checkpoint",
            "Trains the adapter of the cold start by GRPO with the reward of train.profile. The same command resumes "
            "from the last checkpoint, written every train.checkpoint_every steps. Metrics go to MLflow.",
            (
                "adfm train data/shards models/sft models/trained",
                "adfm train data/shards models/sft models/trained --set train.steps=300",
            ),
            _STOPPED,
        ),
        "evaluate": Verb(
            "evaluate and compare models on the test split; resumes",
            "Generates the answers of the candidate and of the models of --compare on the test split, and writes "
            "metrics with 95 % intervals, predictions, calibration, plots and a report page.",
            (
                "adfm evaluate models/trained data/shards evaluation --compare detector=models/detector "
                "--compare sft=models/sft",
                "adfm evaluate models/trained data/shards evaluation --compare production=models:/adfm@production",
            ),
        ),
        "register": Verb(
            "register a version in MLflow, with the gate's decision",
            "Signs the model and its evaluation, registers them as a version, and records whether the version passes "
            "the gate. It does not change what is in production.",
            ("adfm register models/trained data/shards evaluation registration",),
            {2: "wrong usage, a bad signature, or the version was refused or not accepted in time"},
        ),
        "approve": Verb(
            "approve a version that has passed the gate",
            "Sets the approval tags with your login at MLflow, for `adfm promote` or the approvals service.",
            ("adfm approve 3", "adfm approve 3 --reason 'escapes checked on line 2'"),
            _SIGNED,
        ),
        "promote": Verb(
            "move the alias production to an approved version",
            "Verifies signature, gate and approval of the version, and moves the alias `production` to it.",
            ("adfm promote", "adfm promote 3 --by anna"),
            _SIGNED,
        ),
    },
    "models in production": {
        "predict": Verb(
            "inference on unlabelled images, with boxes drawn",
            "Prints label, probability, boxes and reasoning for each image, and writes a copy with the boxes drawn. "
            "Images that do not resemble the training images are reported as `cannot judge`.",
            ("adfm predict photographs/", "adfm predict part.jpg --model models/trained --json"),
            _SIGNED,
        ),
        "serve": Verb(
            "serve a registered version over HTTP until stopped",
            "Verifies the version's signature, loads it, and serves MLflow's scoring protocol at /invocations. A "
            "shadow answers the same images for the log alone.",
            ("adfm serve", "adfm serve models:/adfm/3 --port 8080 --shadow models:/adfm/4"),
            _SIGNED,
        ),
        "served": Verb(
            "count the answers in the logs of served versions",
            "Counts answers, refusals and differences to the shadow in files that ADFM_SERVE_LOG named.",
            ("adfm served serve.jsonl",),
            {2: "wrong usage, or a file is not such a log"},
        ),
        "reject": Verb(
            "reject a version, with your login at MLflow",
            "Sets the tags of a rejection. The reason is kept in the history.",
            ("adfm reject 3 --reason 'misses scratches on the rim'",),
            _SIGNED,
        ),
        "rollback": Verb(
            "move the alias production back to an earlier version",
            "Verifies the earlier version again and moves the alias `production` to it.",
            ("adfm rollback", "adfm rollback --to 2 --why 'too many false alarms'"),
            _SIGNED,
        ),
        "registry log": Verb(
            "print which version was in production, when and why",
            "Verifies the signed history and prints its steps.",
            ("adfm registry log", "adfm registry log --json"),
            _SIGNED,
        ),
        "audit": Verb(
            "verify the history, the aliases and the files",
            "Verifies every signature of the history, that the aliases are where the history put them, and the files "
            "of the versions that they point at. It changes nothing.",
            ("adfm audit",),
            _SIGNED,
        ),
        "policy set": Verb(
            "set the policy of the gate, with your login at MLflow",
            "Proposes a policy for the registered model. The approvals service, or whoever holds the service's key, "
            "registers it.",
            ("adfm policy set", "adfm policy set gate.yaml"),
            {2: "wrong usage, a bad signature, or the policy cannot be used"},
        ),
        "policy show": Verb(
            "print the registered policy of the gate",
            "Prints the policy that judges new versions, as the history has it.",
            ("adfm policy show",),
            _SIGNED,
        ),
        "keys rotate": Verb(
            "confirm with today's key what retired keys have signed",
            "After a new key of the service is in place and the old one is in service/retired, adds a step to the "
            "history that confirms all earlier ones.",
            ("adfm keys rotate", "adfm keys rotate --by anna"),
            _SIGNED,
        ),
        "approvals serve": Verb(
            "service: accept submissions, promote approved versions",
            "Polls MLflow until stopped: makes versions of submissions, registers a policy that a reviewer has set, "
            "and promotes what is approved. It opens no port.",
            ("adfm approvals serve", "adfm approvals serve --poll 30"),
            _SIGNED,
        ),
        "approvals health": Verb(
            "probe: did the approvals service reach MLflow lately?",
            "Reads the age of approvals.heartbeat in this folder, which the service touches after a successful poll.",
            ("adfm approvals health",),
            {1: "the last successful poll is too long ago, or another error"},
        ),
    },
    "data and evaluation": {
        "show": Verb(
            "draw a contact sheet of raw data or shards, with boxes",
            "Draws images with their annotations as a page (HTML) or an image (PNG), and lists unreadable ones.",
            ("adfm show data/raw/my-line", "adfm show data/shards --split test -n 100 --out test.png"),
        ),
        "gate": Verb(
            "apply the gate's policy, or plan the test images",
            "Decides by gate.yaml whether the candidate's predictions pass, alone or against those of the version in "
            "production on the same images. With --plan it prints how many test images the policy needs.",
            ("adfm gate evaluation/predictions.parquet evaluation/production.parquet", "adfm gate --plan data/shards"),
            {0: "passed", 2: "wrong usage or bad input", 3: "failed", 4: "cannot tell: too few images"},
        ),
        "folds": Verb(
            "cross-validation of a small data set; resumes",
            "Trains and evaluates one model for each of evaluate.folds. `adfm evaluate --folds DIR` shows the result "
            "beside the registered model's.",
            ("adfm folds data/shards reports/cross-validation --set evaluate.folds=5",),
            _STOPPED,
        ),
        "production": Verb(
            "write which versions a candidate is compared with",
            "Writes the versions that the aliases production and anchor point at, for `adfm evaluate --production`.",
            ("adfm production reports/production.json --policy reports/policy.json",),
            _SIGNED,
        ),
        "report": Verb(
            "write an evaluation's report page again",
            "Writes report.html and its images from a finished evaluation. `adfm evaluate` writes the page itself.",
            ("adfm report evaluation data/shards report",),
        ),
        "score": Verb(
            "score completions with the reward, term by term",
            "Prints what each completion earns under the reward profile, one JSON object a line.",
            ("adfm score completions.jsonl", "adfm score completions.jsonl --profile paper"),
        ),
    },
    "other": {
        "params": Verb(
            "merge settings files and --set into the first file's text",
            "Prints the first settings file with the values of the others and of --set; its comments stay. OUT may be "
            "the first file itself.",
            (
                "adfm params --params params.yaml --params params/photographs.yaml",
                "adfm params params.yaml --params params.yaml --set train.steps=300",
            ),
        ),
        "env": Verb(
            "print versions, machine and paths, for a bug report",
            "Prints versions of adfm and its libraries, CPUs, memory, GPUs, paths, and the variables ADFM_* that are "
            "set. Values that may be secret are masked, and no server is contacted.",
            ("adfm env", "adfm env --json"),
        ),
        "completion": Verb(
            "print a script by which a shell completes verbs",
            "Prints a completion script for verbs, options and file names. `source <(adfm completion bash)` loads it "
            "into this shell; saved as ~/.local/share/bash-completion/completions/adfm, it serves every new one.",
            ("adfm completion bash", "adfm completion zsh"),
        ),
        "resend": Verb(
            "send MLflow the metrics that a training could not send",
            "Sends what is left in <OUT>.unsent after MLflow was unreachable, and removes it.",
            ("adfm resend models/trained.unsent",),
        ),
    },
}

VERBS = {name: verb for group in GROUPS.values() for name, verb in group.items()}


def epilog(name: str) -> str:
    """Format a verb's examples and exit codes for its `--help`."""
    verb = VERBS[name]
    exits = sorted((_EXITS | dict(verb.exits)).items())
    lines = ["examples:", *(f"  {example}" for example in verb.examples)]
    return "\n".join([*lines, "", "exit codes:", *(f"  {code:<5}{meaning}" for code, meaning in exits)])
