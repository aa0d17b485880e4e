"""evaluate: the paper's experiments on a finished run, and a report of what they show.

Read next: command.py.
"""

from .command import known, main
from .report import split_readme, verdict

__all__ = ["known", "main", "split_readme", "verdict"]
