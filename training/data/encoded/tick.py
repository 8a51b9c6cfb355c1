"""How an encoder tells how far it is."""

from collections.abc import Callable

Tick = Callable[[int], None]
"""Told of samples that are done."""
