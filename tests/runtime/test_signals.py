"""signals.py: every signal that asks for the end ends the work as Ctrl-C does."""

import os
import signal
import threading

import pytest

from mini_dalle2.runtime.files import atomic_open
from mini_dalle2.runtime.signals import ENDING, Interrupt, ending_as_ctrl_c

NAMES = [one.name for one in ENDING]


def send(name):
    """Send a signal to this process. Its handler has run when this returns."""
    signal.raise_signal(getattr(signal, name))


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """A shell starts its background jobs with Ctrl-C ignored, and nohup with SIGHUP ignored."""
    before = {one: signal.getsignal(one) for one in ENDING}
    for one in ENDING:
        signal.signal(one, signal.default_int_handler)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


def test_the_three_are_known():
    assert NAMES == ["SIGINT", "SIGTERM", "SIGHUP"]


@pytest.mark.parametrize("name", NAMES)
def test_each_raises_keyboard_interrupt(name):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt), ending_as_ctrl_c():
        send(name)
    assert signal.getsignal(getattr(signal, name)) == signal.SIG_DFL


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with ending_as_ctrl_c(), Interrupt() as interrupt:
        send("SIGHUP")
        assert not interrupt.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_other_threads_leave_the_signals_alone():
    found = []

    def look():
        with Interrupt():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_request_asks_and_the_second_interrupts(name):
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        send(name)
        assert interrupt.requested
        send(name)
        pytest.fail("the second request was ignored")
    assert signal.getsignal(getattr(signal, name)) is signal.default_int_handler


@pytest.mark.parametrize("name", NAMES)
def test_a_request_that_came_too_late_for_the_loop_is_not_forgotten(name):
    with pytest.raises(KeyboardInterrupt), Interrupt():
        send(name)


def test_an_answered_request_is_raised_once():
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3"), Interrupt() as interrupt:
        send("SIGTERM")
        if interrupt.requested:
            raise KeyboardInterrupt("stopped at step 3")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_written_whole_before_the_end(tmp_path, name):
    path = tmp_path / "a.txt"
    with pytest.raises(KeyboardInterrupt), atomic_open(path) as file:
        file.write(b"half, ")
        send(name)
        send(name)
        file.write(b"whole")
    assert path.read_bytes() == b"half, whole" and os.listdir(tmp_path) == ["a.txt"]


def test_in_a_loop_the_second_request_waits_for_the_file_too(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        send("SIGINT")
        with atomic_open(path) as file:
            send("SIGINT")
            file.write(b"whole")
        pytest.fail("the second request was forgotten")
    assert interrupt.requested and path.read_bytes() == b"whole"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_disturbs_the_end(name):
    """People press Ctrl-C many times. The first one ends the work; the others are not needed."""
    with pytest.raises(KeyboardInterrupt), ending_as_ctrl_c():
        try:
            send(name)
        except KeyboardInterrupt:
            for other in NAMES:
                send(other)
            raise
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
