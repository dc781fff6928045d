"""The version of normkit, known without the metadata of an installed package."""

__all__ = ["__version__"]

__version__ = "0.1.0"
