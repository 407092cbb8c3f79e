"""transformers' callback for Weights & Biases, kept from stopping a training."""

from __future__ import annotations

import logging
import os
from typing import Any

from transformers.integrations import WandbCallback
from transformers.trainer_callback import CallbackHandler

from .guard import Guard


logger = logging.getLogger(__name__)


class GuardedWandbCallback(WandbCallback):
    """As transformers' own, but a failure of W&B gives one warning where the original ends the training.

    If W&B cannot be reached when the training begins, the run is recorded offline, for `wandb sync` later. A missing login is still
    an error then: it is the user's to mend, and nothing has been trained yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self._guard = Guard("Values may be missing in W&B; those of the concepts are also in concepts.jsonl.")

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        """Start the run, offline if it must be."""
        import wandb

        try:
            super().setup(args, state, model, **kwargs)
        except wandb.errors.CommError as error:
            logger.warning(
                "Weights & Biases cannot be reached (%s). Training goes on, and the run is recorded offline: `wandb sync` uploads it.",
                str(error).splitlines()[0],
            )
            wandb.init(project=os.getenv("WANDB_PROJECT", "huggingface"), name=args.run_name, mode="offline")
            super().setup(args, state, model, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Log scalars."""
        with self._guard("logging"):
            super().on_log(*args, **kwargs)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Log a checkpoint, where `WANDB_LOG_MODEL` asks for it."""
        with self._guard("logging a checkpoint"):
            super().on_save(*args, **kwargs)

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        """Log metrics of a prediction."""
        with self._guard("logging"):
            super().on_predict(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Log the model, where `WANDB_LOG_MODEL` asks for it."""
        with self._guard("logging the model"):
            super().on_train_end(*args, **kwargs)


def guard_wandb(handler: CallbackHandler) -> None:
    """Put a [`GuardedWandbCallback`] in the place of transformers' own, if that is there. A user's subclass is left alone."""
    handler.callbacks = [
        GuardedWandbCallback() if type(callback) is WandbCallback else callback for callback in handler.callbacks
    ]
