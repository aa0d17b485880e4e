"""One process at a time writes into a run folder: a second one is told so, and ends.

The lock is the system's (flock) on the file .lock in the folder. It goes with its process, however
that ends, and does not outlive a restart of the machine. Read next: files.py.
"""

import contextlib
import os
from pathlib import Path

from .files import remove_leftovers
from .processes import agreed, is_main

try:
    import fcntl
except ImportError:
    # Windows has no flock, and no lock here.
    fcntl = None

FILE = ".lock"
TRIES = 100


@contextlib.contextmanager
def alone_in(folder):
    """In this context no other process has the lock of a folder, which is made if it is not there.

    If nothing was written into a new folder, it goes again. Of several processes of torchrun the
    first takes the lock. Raises ValueError if another process has it, or if this is no folder.
    """
    folder = Path(folder)
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    file = None
    problem = None
    if is_main():
        try:
            file = take(folder)
        except ValueError as error:
            problem = str(error)
    # All processes must come to the same decision.
    problem = agreed(problem)
    if problem:
        raise ValueError(problem)
    try:
        if is_main():
            remove_leftovers(folder)
        yield
    finally:
        if file:
            give_back(file, folder, new)


def take(folder):
    """Lock a folder: the open file that holds the lock. Raises ValueError."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    # The process that had the lock before may remove this file at any moment, and its folder.
    for _ in range(TRIES):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / FILE, "a+")
            lock(file, folder)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / FILE)):
                # For the message of a second process.
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
                return file
            file.close()
    raise ValueError(f"{folder} cannot be locked: it is a link to nowhere, or other processes use "
                     f"it again and again")


def lock(file, folder):
    """Lock an open file of a folder. Raises ValueError if another process has done so."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        other = file.read(20).strip()
        file.close()
        raise ValueError(f"{folder} is in use by another process, number {other}: wait until it "
                         f"ends, or choose another folder") from None
    except OSError:
        # Some network disks know no locks.
        pass


def give_back(file, folder, new):
    """Free the lock. Remove the folders of `new`, which this process made, if they are empty."""
    with contextlib.suppress(OSError):
        (folder / FILE).unlink()
        for one in new:
            one.rmdir()
    file.close()
