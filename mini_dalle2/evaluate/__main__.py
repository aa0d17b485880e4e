"""python -m mini_dalle2.evaluate: the command of command.py.

Read next: command.py.
"""

import sys

from .command import main

sys.exit(main())
