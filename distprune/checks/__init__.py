"""The values and combinations that no run can have: a table of keys, words and conditions.

What depends on the data (whole batches, times in steps against times in epochs) waits until they are known.
"""

from distprune.checks.check import Check
from distprune.checks.deepspeed import DEEPSPEED
from distprune.checks.sections import SECTIONS

__all__ = ["CHECKS", "Check"]

CHECKS: tuple[Check, ...] = (*SECTIONS, *DEEPSPEED)
