"""``python -m daemon``: the same as ``fastsd``."""

from __future__ import annotations

import sys

from daemon.cli import main

sys.exit(main())
