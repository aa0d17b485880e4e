"""How the commands begin and end: in one process or in several, and a mistake is one sentence.

The commands are train.py, sample.py and `python -m mini_dalle2.evaluate`. Their exit codes:
0    all went well
2    a mistake, described in one sentence on standard error
130  Ctrl-C, or another signal that asks for the end (signals.py)
A traceback always means a bug in mini_dalle2. What cannot be printed never ends the work.

Read next: train.py and sample.py at the top level.
"""

import argparse
import contextlib
import difflib
import os
import shlex
import sys
from pathlib import Path

from .device import out_of_memory, pick_device
from .lock import alone_in
from .processes import left_alone, processes
from .signals import ending_as_ctrl_c


def run_command(name, parse, work, argv=None, less="", stopped="", owns=None):
    """Run work(parse(argv), device) in every process that torchrun started. Return the exit code.

    name:    the command, for messages
    parse:   list of words -> namespace with `device`
    work:    (namespace, device) -> exit code, or None for 0
    less:    what a person can do when memory runs out
    stopped: what to say after Ctrl-C
    owns:    namespace -> the folder that no other process may write into at the same time
    """
    first = os.environ.get("RANK", "0") == "0"
    with patient_output(), ending_as_ctrl_c():
        try:
            args = parse(argv)
            with processes(pick_device(args.device)) as device, contextlib.ExitStack() as lock:
                if owns:
                    lock.enter_context(alone_in(owns(args)))
                return work(args, device) or 0
        except KeyboardInterrupt:
            if stopped and first:
                print(f"\n{stopped}", file=sys.stderr)
            return 130
        except (RuntimeError, MemoryError) as error:
            if left_alone(error):
                rank = os.environ.get("RANK")
                message = f"process {rank} cannot go on: another process has ended"
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


class Patient:
    """A text stream that never fails: what it cannot write is written otherwise, or dropped.

    A terminal may be gone, a disk full, and an encoding may lack the letters of a caption.
    """

    def __init__(self, stream):
        """stream: a text stream, or None where Python found none."""
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        """Return whether this is a terminal that is still there."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self.stream.isatty()
        return False

    def write(self, text):
        """Write a text as well as it can be written. Return its length."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            try:
                self.stream.write(text)
            except UnicodeEncodeError as error:
                letters = text.encode(error.encoding, "backslashreplace")
                self.stream.write(letters.decode(error.encoding))
        return len(text)

    def flush(self):
        """Hand what was written to the system, if it takes it."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()


@contextlib.contextmanager
def patient_output():
    """In this context, standard output and standard error are Patient."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It is closed. The next file that is opened would get its number, and what libraries
            # print.
            os.open(os.devnull, os.O_RDWR)
    streams = [sys.stdout, sys.stderr]
    sys.stdout, sys.stderr = map(Patient, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            try:
                stream.flush()
            except (OSError, ValueError):
                # Python flushes once more at its end, and would complain.
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except AttributeError:
                pass


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError with one sentence; a command turns it into exit code 2."""

    def error(self, message):
        raise ValueError(message)

    def parse_args(self, args=None, namespace=None):
        """Read the command line. Names the closest option for a misspelled one."""
        found, left = self.parse_known_args(args, namespace)
        flags = [word.partition("=")[0] for word in left if word.startswith("-")]
        if flags:
            options = self.options_of(found)
            closest = difflib.get_close_matches(flags[0], options, n=1, cutoff=0.5)
            hint = f"the closest is {closest[0]}" if closest else "--help shows all options"
            self.error(f"there is no option {flags[0]}; {hint}")
        if left:
            self.error(f'"{left[0]}" is one word too many: words that belong together stand in '
                       'quotes, as in "two cyan rings"')
        return found

    def options_of(self, found):
        """List the options of a command line, which are those of its verb if it has one."""
        parser = self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parser = action.choices[getattr(found, action.dest)]
        return [name for action in parser._actions for name in action.option_strings]


def sentence(error):
    """The message of an exception on one line. An OSError says which file it is about, and why."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def how_to_begin(run):
    """Say what to do where a run folder is expected and there is none."""
    if Path(run).exists():
        return "this is a file, so name the folder of a run"
    return f"train one with {train_command(run)}"


def how_to_finish(run):
    """Say how a run folder gets a file that it lacks."""
    if is_run(run):
        return f"go on with {train_command(run, resume=True)}"
    return "copy this file once more from where the others are from"


def how_to_train_again(run, *stages):
    """Say what to do about stages whose files cannot be used."""
    if not is_run(run):
        return "copy this file once more from where the others are from"
    return f"{how_to_delete(run, stages)}, and go on with {train_command(run, resume=True)}"


def how_to_delete(run, stages):
    """Say which files of these stages are in the way."""
    files = [f"{stage}{end}" for stage in stages for end in (".pt", ".resume.pt")]
    return f"delete {', '.join(files)} in {run}"


def is_run(run):
    """Whether train.py can go on with this folder."""
    return (Path(run) / "config.json").is_file()


def train_command(run, *words, resume=False):
    """Write a command of train.py for a run folder, for messages."""
    end = ["--resume"] if resume else []
    return f"`python train.py {' '.join([*map(shlex.quote, words), '--out', word(run), *end])}`"


def word(path):
    """Write a path as one word of a command line, which is not taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
