"""``barlow`` is ``python -m barlow``: the command line, and Ctrl-C while what it needs is still being imported."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Runs the command line and exits; a Ctrl-C that comes too early for it to say so itself is 130, too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where nohup or a shell script ignores it
        signal.signal(signal.SIGINT, _interrupted)
    while (
        spare := os.open(os.devnull, os.O_RDWR)
    ) <= 2:  # a stream that is closed (``2>&-``) is nobody's: else the next
        pass  # file opened would have its number, and get what is said
    os.close(spare)
    from barlow.cli import main as command_line

    command_line()


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Until torch is there, nothing has begun that would need an end; and an exception in the middle of its import
    shows as a traceback, or as an abort of its C++."""
    torch = sys.modules.get("torch")
    if torch is not None and not getattr(torch.__spec__, "_initializing", False):
        signal.default_int_handler(number, frame)
    os.write(2, b"barlow: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
