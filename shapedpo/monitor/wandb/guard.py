"""Keeps Weights & Biases from stopping a training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


logger = logging.getLogger(__name__)


class Guard:
    """Catches what goes wrong in W&B, and says it once.

    W&B's library hands everything to a process of its own, which keeps it on disk and does the uploading: a lost network does not reach
    the training. What does is a run that was finished, a full disk, or the death of that process, and each raises in every call.

    Args:
        advice: What follows from a failure, for the end of the warning.
    """

    def __init__(self, advice: str) -> None:
        self.failures = 0
        """Failures since somebody set this to zero."""
        self._advice = advice
        self._warned = False

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Around a call: catches any `Exception`.

        Args:
            what: What is being done, as in "logging the tables".
        """
        try:
            yield
        except Exception as error:
            self.failures += 1
            logger.debug("Weights & Biases: %s failed.", what, exc_info=True)
            if not self._warned:
                self._warned = True
                reason = f"{type(error).__name__}: {error}"
                logger.warning("Weights & Biases: %s failed (%s). Training goes on. %s", what, reason, self._advice)
