"""A plugin without manners: heavy, private, and rebinding what belongs to others."""

from __future__ import annotations
