"""Machines that are not here, by the fakes of the platforms' tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "platforms"))
