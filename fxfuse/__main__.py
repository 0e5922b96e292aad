"""``python -m fxfuse`` is the ``fxfuse`` command."""

import sys

from fxfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
