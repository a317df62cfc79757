"""Ascend NPUs for xLLM. Importing this loads nothing."""
