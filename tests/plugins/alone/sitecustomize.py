"""Python imports this at the start of child processes, whose `PYTHONPATH` begins here."""

from __future__ import annotations

import importlib_metadata
from hiding import hide_installed

importlib_metadata.entry_points = hide_installed
