"""Pagewire: LLM inference from one host."""

from .version import __version__

__all__ = ["__version__"]
