"""Signals that ask a program to end. All of them end the work as Ctrl-C does.

    SIGINT     Ctrl-C
    SIGTERM    a cluster, a container, `timeout` or a shutdown
    SIGHUP     the terminal was closed, or the connection to it was lost

Python turns only the first into KeyboardInterrupt; `ending_as_ctrl_c` adds the others. A signal
that the process ignores, as after nohup, stays ignored. Read next: commands.py.
"""

import contextlib
import signal
import threading

# Windows has no SIGHUP.
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
          if hasattr(signal, name)]


@contextlib.contextmanager
def handler(function):
    """In this context the signals call function(number, frame), unless they are ignored.

    Python allows this in the main thread only. In other threads nothing changes.
    """
    numbers = ENDING if threading.current_thread() is threading.main_thread() else []
    numbers = [one for one in numbers if signal.getsignal(one) not in (signal.SIG_IGN, None)]
    before = {one: signal.signal(one, function) for one in numbers}
    try:
        yield
    finally:
        for one, old in before.items():
            signal.signal(one, old)


def end(number, frame):
    """Raise KeyboardInterrupt. From now on the signals do nothing: they would disturb the end."""
    for one in ENDING:
        # Not SIG_IGN: Python complains when a signal that is on its way finds that.
        signal.signal(one, lambda number, frame: None)
    raise KeyboardInterrupt


def ending_as_ctrl_c():
    """Return a context in which the first of the signals raises KeyboardInterrupt."""
    return handler(end)


@contextlib.contextmanager
def waiting():
    """In this context the signals wait until its end, so that a file is written whole."""
    came = []
    try:
        with handler(lambda number, frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


class Interrupt:
    """In this context the first signal only sets `requested`. A second one interrupts at once.

    A request that came too late for the loop interrupts at the end of the context.
    """

    def __enter__(self):
        self.requested = False
        self.handler = handler(self._request)
        self.handler.__enter__()
        return self

    def _request(self, number, frame):
        if self.requested:
            end(number, frame)
        self.requested = True

    def __exit__(self, kind, *_):
        self.handler.__exit__(None, None, None)
        if self.requested and kind is None:
            raise KeyboardInterrupt
