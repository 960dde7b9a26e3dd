"""Errors that end a training run with one sentence."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why, and what was kept."""


class Interrupted(RuntimeError):
    """A signal stopped the run after a checkpoint; the message says how to resume.

    Args:
        signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
