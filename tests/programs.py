"""Programs that tests start and that pip does not bring."""

import os
from typing import NoReturn

import pytest

WITHOUT = "RAYDISTILL_WITHOUT"


def missing(program: str, how: str) -> NoReturn:
    """Fail the test for want of a program, unless the user has said that it is to be done without."""
    if program in os.environ.get(WITHOUT, "").split(","):
        pytest.skip(f"{WITHOUT} names {program}")
    pytest.fail(f"no {program}: {how}, or leave its tests out with {WITHOUT}={program}")
