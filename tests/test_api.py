"""The public Python API: its examples run, one after the other, and it is imported when it is used."""

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import adfm
from adfm import api

FUNCTIONS = [
    function for _, function in inspect.getmembers(api, inspect.isfunction) if function.__module__ == api.__name__
]


def test_all_names_what_the_module_has() -> None:
    assert set(adfm.__all__) == {function.__name__ for function in FUNCTIONS} | {"AdfmError", "Params"}
    assert all(getattr(adfm, name).__doc__ for name in adfm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        adfm.tain  # noqa: B018


def test_importing_the_package_imports_no_library() -> None:
    code = "import adfm, sys; print({'numpy', 'pydantic', 'torch', 'mlflow', 'kfp'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_docstrings_are_complete(function: object) -> None:
    text = inspect.getdoc(function) or ""
    assert "Raises:\n" in text and "Example:\n" in text
    for name in inspect.signature(function).parameters:  # type: ignore[arg-type]
        assert f"    {name}: " in text


class Checker(doctest.OutputChecker):
    """An example that states no output may print: stages say what they do."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def test_the_examples_run(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(Checker())
    names: dict[str, object] = {}
    for function in sorted(FUNCTIONS, key=lambda function: function.__code__.co_firstlineno):
        for test in finder.find(function, function.__name__, globs=names):
            test.globs = names
            runner.run(test, clear_globs=False)
    assert runner.summarize().failed == 0, capsys.readouterr().out
    assert runner.tries > len(FUNCTIONS)
