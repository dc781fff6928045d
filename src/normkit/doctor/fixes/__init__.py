"""Fixes: apply them, confirm them on a copy, train a copy for a few steps."""
