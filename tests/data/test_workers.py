"""tables.py: the worker processes that draw pictures end when the first process does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT

# A command that draws slowly, in two worker processes.
DRAW = """
import sys, time
from types import SimpleNamespace
import torch
from mini_dalle2.data import tables
from mini_dalle2.runtime.commands import run_command

class Slow:
    def __len__(self):
        return 100_000
    def __getitem__(self, i):
        if i > 40:
            open(MARK, "w").close()
        time.sleep(0.01)
        return {"image": torch.zeros(3, 1, 1), "text": ""}

def work(args, device):
    tables.load_table(Slow())

if __name__ == "__main__":
    tables.available_cores = lambda: 2
    sys.exit(run_command("draw", lambda argv: SimpleNamespace(device="cpu"), work))
"""


def is_alive(process):
    """Whether a process runs. One that has ended, and waits for its parent, does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def children(process):
    """List the processes that a process has started."""
    return [int(one) for task in Path(f"/proc/{process}/task").iterdir()
            for one in (task / "children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_no_worker_is_left_behind(tmp_path, number):
    mark = tmp_path / "mark"
    script = tmp_path / "draw.py"
    script.write_text(DRAW.replace("MARK", repr(str(mark))))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)},
                               preexec_fn=lambda: signal.signal(signal.SIGINT,
                                                                signal.default_int_handler))
    deadline = time.time() + 120
    while not mark.exists() and time.time() < deadline:
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert "Traceback" not in said
    deadline = time.time() + 20
    while any(map(is_alive, workers)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
