"""How the commands begin and end: in one process or in several, and a mistake is one sentence.

The commands are train.py, sample.py and `python -m mini_dalle2.evaluate`. Their exit codes:
0    all went well
2    a mistake, described in one sentence on standard error
130  Ctrl-C
A traceback always means a bug in mini_dalle2.

Read next: train.py and sample.py at the top level.
"""

import argparse
import os
import sys

from .device import out_of_memory, pick_device
from .processes import left_alone, processes


def run_command(name, parse, work, argv=None, less="", stopped=""):
    """Run work(parse(argv), device) in every process that torchrun started. Return the exit code.

    name:    the command, for messages
    parse:   list of words -> namespace with `device`
    work:    (namespace, device) -> exit code, or None for 0
    less:    what a person can do when memory runs out
    stopped: what to say after Ctrl-C
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
            message = f"process {os.environ.get('RANK')} cannot go on: another process has ended"
        elif out_of_memory(error):
            message = f"there is not enough memory for this: {less}"
        else:
            raise
    except (ValueError, OSError, FloatingPointError) as error:
        message = sentence(error)
        # All processes find the same mistake, and the first one reports it. A fault of the
        # system is different: it may hit one process only.
        everywhere = not isinstance(error, OSError) or isinstance(error, FileNotFoundError)
        if everywhere and not first:
            return 2
    print(f"{name}: {message}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError with one sentence; a command turns it into exit code 2."""

    def error(self, message):
        raise ValueError(message)


def sentence(error):
    """The message of an exception on one line. An OSError says which file it is about, and why."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
