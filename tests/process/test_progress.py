"""Progress bars on a terminal, and in a log."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from adfm.process import progress


def test_on_a_terminal_the_bar_names_what_it_counts_and_when_it_ends() -> None:
    code = (
        "import time; from adfm.process.progress import bar\n"
        "with bar(total=3, desc='write shards', unit='image') as progress:\n"
        "    for _ in range(2):\n"
        "        time.sleep(1.1); progress.update()\n"
    )
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=side, check=True)
    os.close(side)
    with os.fdopen(main, "rb", buffering=0) as terminal:
        text = b""
        try:
            while chunk := terminal.read(4096):
                text += chunk
        except OSError:  # Linux: nobody has the other side open any more
            pass
    last = text.decode().strip().split("\r")[-1]
    assert last.startswith("write shards:  67%|") and "2/3 [00:0" in last and "<00:01" in last and "image" in last


def test_in_a_log_every_state_is_a_line_and_short_work_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    list(progress.bar(range(100), desc="short", unit="step"))
    assert log.getvalue() == ""

    monkeypatch.setattr(progress, "_LINES_EVERY", 0.0)
    for _ in progress.bar(range(3), desc="long", unit="step"):
        pass
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and len(lines) >= 3
    assert all(line.startswith("long: ") for line in lines) and "3/3" in lines[-1]
