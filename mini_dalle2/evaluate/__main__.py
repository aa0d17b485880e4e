"""python -m mini_dalle2.evaluate: see command.py."""

import sys

from .command import main

sys.exit(main())
