"""``python -m kmex_utils`` is ``kmex``."""

import sys

from .cli import main

sys.exit(main())
