"""What the parts of the campaign have in common."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Verdict(NamedTuple):
    """What came of a case.

    Attributes:
      tally: how often what happened.
      failures: one line each, with all that is needed to see it again; empty if all is well.
    """

    tally: Mapping[str, int]
    failures: tuple[str, ...] = ()


class Part(NamedTuple):
    """A part of the campaign: cases that are drawn at random, each from its own number.

    Attributes:
      num_cases: how many a full campaign has.
      num_tested: how many the tests have.
      check: draws a case with a generator of its own, and judges it; the folder is empty and the case's own.
    """

    num_cases: int
    num_tested: int
    check: Callable[[np.random.Generator, Path], Verdict]
