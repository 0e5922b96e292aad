"""Where the ``fxfuse`` command begins.

Outside of the package, because importing that imports torch, which takes seconds: Ctrl-C in these ends in one line as well.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line in ``sys.argv`` and return its exit code; ``fxfuse --help`` lists them."""
    try:
        from fxfuse.cli import main as command

        return command()
    except KeyboardInterrupt:
        print("fxfuse: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
