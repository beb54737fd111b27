"""Audit: verify the whole history, the files of the versions in use, and the aliases against it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from adfm.errors import AdfmError, Unusable
from adfm.registry import reconcile
from adfm.registry.history import BrokenHistory, Forbidden, registered_model
from adfm.registry.reconcile import ANCHOR, PREVIOUS, PRODUCTION, Registry
from adfm.registry.submission import fetch, version_uri
from adfm.text import printable


class AuditFailed(Unusable):
    """Something is not as the signed history says."""


def audit(name: str) -> str:
    """Verify history, signatures and aliases of a registered model; changes nothing.

    Returns:
        What was checked, on one screen.

    Raises:
        AuditFailed: Something is wrong; all of it is listed.
        AdfmError: MLflow cannot be reached.
    """
    with reconcile.client() as store:
        try:
            registry = reconcile.read(store, name)
        except (BrokenHistory, Forbidden) as error:
            raise AuditFailed(f"The audit of {name} failed:\n  - {error}") from error
        history = registry.history
        lines = [f"history: {len(history.counting)} signed steps, each naming the one before"]
        if void := len(history.steps) - len(history.counting):
            lines.append(f"history: {void} void steps, which came second to another")
        problems = [
            f"{name}-history, version {number}: {printable(reason)}; it counts for nothing"
            for number, reason in history.ignored.items()
        ]
        due = reconcile.due_aliases(history)
        for alias, number in due.items():
            fine, line = _check_version(registry, alias, number)
            (lines if fine else problems).append(line)
        here = reconcile.aliases(registered_model(store, name))
        problems += [
            f"the alias {alias} is on {here.get(alias, 'no version')}, and the history says {due.get(alias, 'none')}"
            for alias in (PRODUCTION, PREVIOUS, ANCHOR)
            if here.get(alias) != due.get(alias) and due.get(alias) in (None, *registry.versions)
        ]
        if unfinished := [s.number for s in history.counting if s.action in ("promote", "rollback") and not s.finished]:
            problems.append(f"step {unfinished[-1]} is unfinished: the next promotion, or the service, completes it")
    if problems:
        in_order = [f"in order: {line}" for line in lines]
        raise AuditFailed("\n  - ".join([f"The audit of {name} failed:", *problems, *in_order]))
    return "\n".join([f"{name}: everything is as the signed history says", *(f"  - {line}" for line in lines)])


def _check_version(registry: Registry, alias: str, number: str) -> tuple[bool, str]:
    """Return whether a version's files are in order, and what was verified, or is wrong."""
    place = f"{alias}: version {number}"
    if number not in registry.versions:
        return alias == PREVIOUS, f"{place} was deleted"
    steps = (s for s in reversed(registry.history.counting) if s.manifest and s.version == number)
    step = next((s for s in steps if s.action in ("promote", "rollback", "restore")), None)
    with TemporaryDirectory() as folder:
        try:
            files = fetch(version_uri(registry.versions[number]), registry.keys, Path(folder))
        except AdfmError as error:
            return False, f"{place}: {printable(str(error))}"
        if step is None or files.manifest != step.manifest:
            return False, f"{place}: its files are not those with which it came into production"
        return True, f"{place}, every file as {files.signer} signed it and as of step {step.number}"
