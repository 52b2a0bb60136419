"""Where the program starts: `overpaint`, and `python -m overpaint`."""

from __future__ import annotations

import gc


def main() -> None:
    """Run the command line.

    What a program imports is never garbage, but the garbage collector looks through all of it again and again while it grows, and
    once more at the end: an eighth of the time of a command that computes nothing. So it is off until all is imported, and then
    told to leave what is there alone.
    """
    gc.disable()
    from overpaint.cli import main as commands

    gc.freeze()
    gc.enable()
    commands()


if __name__ == "__main__":
    main()
