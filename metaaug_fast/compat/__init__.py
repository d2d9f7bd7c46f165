"""Learners in the shapes that other libraries' users know: one file a library."""

from . import easyfsl

__all__ = ["easyfsl"]
