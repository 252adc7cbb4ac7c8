"""Processes that are held up from outside, as those that share their cores with others, or whose machine is in trouble."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stopped_now_and_then(send: Callable[[signal.Signals], None], stopped_s: float, running_s: float) -> Iterator[None]:
    """send: a signal to whom it is about."""
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            with contextlib.suppress(ProcessLookupError):
                send(signal.SIGSTOP)
                time.sleep(stopped_s)
                send(signal.SIGCONT)
            over.wait(running_s)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
