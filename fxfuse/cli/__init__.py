"""The ``fxfuse`` command: one file a subcommand.

Comes in: a command line. Goes out: text or JSON on stdout, one line on stderr where something is wrong, an exit code (``codes``). Importing
this package needs nothing but what fxfuse itself needs; what else a command needs, it names. Nothing here imports torch before a command
runs: help and completion are shown at once, and Ctrl-C ends also the seconds of that import in one line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from . import codes
from .packages import sentence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: ``sys.argv``) and return its exit code; never raises."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        lacking = sentence("the fxfuse command", "click")
        if lacking:
            print(f"fxfuse: {lacking}", file=sys.stderr)
            if "--json" in words:
                print(json.dumps({"ok": False, "error": f"fxfuse: {lacking}", "exit_code": codes.PACKAGE}, indent=2))
            return codes.PACKAGE
        from .run import run

        return run(words)
    except KeyboardInterrupt:
        print("fxfuse: interrupted; nothing was written", file=sys.stderr)
        return codes.INTERRUPTED
