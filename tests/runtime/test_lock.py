"""lock.py: one process at a time writes into a run folder, and a crash leaves no lock behind."""

import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT
from mini_dalle2.runtime import lock
from mini_dalle2.runtime.lock import alone_in

# Takes the lock of a folder, says so, and waits for its end.
HOLD = """
import sys
from mini_dalle2.runtime.lock import alone_in
with alone_in(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def holder(folder):
    """Start a process that has the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_process_is_told_so(tmp_path):
    folder = tmp_path / "run"
    first = holder(folder)
    with pytest.raises(ValueError, match=f"in use by another process, number {first.pid}: wait"):
        with alone_in(folder):
            pytest.fail("two processes have the lock")
    assert os.listdir(folder) == [lock.FILE]
    first.communicate("")
    # The first one made the folder, and wrote nothing into it.
    assert not folder.exists()
    with alone_in(folder):
        pass


def test_a_killed_process_leaves_no_lock_and_no_temporary_file(tmp_path):
    first = holder(tmp_path)
    (tmp_path / ".mini_dalle2-0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / ".theirs.tmp").write_bytes(b"kept")
    first.send_signal(signal.SIGKILL)
    first.wait()
    with alone_in(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [lock.FILE, ".theirs.tmp"]
    assert os.listdir(tmp_path) == [".theirs.tmp"]


def test_what_is_written_stays_and_what_is_empty_goes(tmp_path):
    with alone_in(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "config.json").write_text("{}")
    assert os.listdir(tmp_path / "runs" / "a") == ["config.json"]
    with alone_in(tmp_path / "runs" / "b"):
        pass
    with pytest.raises(KeyboardInterrupt), alone_in(tmp_path / "c" / "d" / "e"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["runs"] and os.listdir(tmp_path / "runs") == ["a"]


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="a is a file: name a folder"), alone_in(tmp_path / "a"):
        pass


def test_a_disk_without_locks_and_a_system_without_flock(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with alone_in(tmp_path):
        pass
    monkeypatch.setattr(lock, "fcntl", None)
    with alone_in(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_two_processes_by_turns(tmp_path):
    """Many short holders of a folder that goes with each: never two at a time."""
    folder = tmp_path / "run"
    script = ("import sys, time\nfrom pathlib import Path\n"
              "from mini_dalle2.runtime.lock import alone_in\n"
              "taken = 0\nwhile taken < 50:\n    try:\n        with alone_in(sys.argv[1]):\n"
              "            mark = Path(sys.argv[2])\n            mark.open('x').close()\n"
              "            time.sleep(0.001)\n            mark.unlink()\n            taken += 1\n"
              "    except ValueError as error:\n        assert 'in use' in str(error), error\n")
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "mark")]
    both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    # The empty folder may stay: one made it, and the other had it last.
    assert not folder.exists() or os.listdir(folder) == []
