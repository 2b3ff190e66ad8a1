"""Run the command line in this process, as a shell would see it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from hal.cli import main


@dataclass(frozen=True)
class Answer:
    """Exit status and both outputs of one command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Hal = Callable[..., Answer]


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    """Leave the logger of hal as it was: the command line gives it a handler."""
    logger = logging.getLogger("hal")
    kept = (logger.handlers[:], logger.level)
    yield
    logger.handlers[:], logger.level = kept


@pytest.fixture
def hal(capsys: pytest.CaptureFixture[str]) -> Hal:
    """Return a function that runs `hal ARGUMENTS`."""

    def run(*arguments: str) -> Answer:
        capsys.readouterr()
        status = main(arguments)
        out, err = capsys.readouterr()
        return Answer(status, out, err)

    return run
