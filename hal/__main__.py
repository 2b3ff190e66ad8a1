"""Run the command line: `python -m hal` does what `hal` does."""

from __future__ import annotations

import sys

from hal.cli import main

if __name__ == "__main__":
    sys.exit(main())
