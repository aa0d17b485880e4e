"""How train.py, sample.py and evaluate.py begin and end: by one process or several, and a mistake
is one sentence.

Exit code 0: all went well; 2: a mistake, said on standard error; 130: Ctrl-C. A traceback is a
fault of ours, and only of ours.
Read next: train.py, sample.py, evaluate.py.
"""

import argparse
import os
import sys

from .device import out_of_memory, pick_device
from .processes import left_alone, processes


def run_command(name, parse, work, argv=None, less="", stopped=""):
    """Runs work(parse(argv), device) in each process that torchrun started, or in this one;
    returns the exit code, or the one that it returned.

    parse: list of words -> namespace with `device`; less: what to do when memory ran out; stopped:
    what to say after a Ctrl-C.
    """
    first = os.environ.get("RANK", "0") == "0"
    try:
        args = parse(argv)
        with processes(pick_device(args.device)) as device:
            return work(args, device) or 0
    except KeyboardInterrupt:
        if stopped and first:
            print(f"\n{stopped}", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if left_alone(error):
            message = f"process {os.environ.get('RANK')} cannot go on, since another one has ended"
        elif out_of_memory(error):
            message = f"there is not enough memory for this: {less}"
        else:
            raise
    except (ValueError, OSError, FloatingPointError) as error:
        message = sentence(error)
        if (not isinstance(error, OSError) or isinstance(error, FileNotFoundError)) and not first:
            return 2                                                       # all processes have found the same; the first one says it
    print(f"{name}: {message}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ValueError with one sentence, which the commands turn into exit
    code 2."""

    def error(self, message):
        raise ValueError(message)


def sentence(error):
    """What an exception says, on one line; of the system's own ones, which file it is about and
    why."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
