"""The program's entry: `llamacli`, or `python -m llamacli`."""

import gc
import os
import signal
from time import perf_counter
from types import FrameType

STARTED = perf_counter()  # before anything is imported: the timings of --json count from here


def main() -> None:
    # A start makes 40,000 objects and no garbage: to look for it took a fourteenth of the time. See door().
    gc.disable()
    # An exception in the middle of an import would come out as a traceback. Where Ctrl-C is ignored, as for a
    # script's background jobs, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    from llamacli.commands.app import door

    door(STARTED)


def _interrupted(number: int, frame: FrameType | None) -> None:
    os._exit(130)


if __name__ == "__main__":
    main()
