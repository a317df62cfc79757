"""Python imports this at the start of child processes, whose `PYTHONPATH` begins here."""

from __future__ import annotations

import importlib_metadata
from hiding import seen_distributions

importlib_metadata.distributions = seen_distributions
