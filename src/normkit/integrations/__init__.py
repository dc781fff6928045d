"""Callbacks and writers for other training programs, one module per package."""
