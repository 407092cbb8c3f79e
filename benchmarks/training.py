"""One training run on the CPU: what the studies on the lab and on the stories share."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any


def train(
    model: Any,
    tokenizer: Any,
    data: Any,
    settings: Mapping[str, Any],
    concepts: Sequence[Any] | None = None,
    seed: int = 0,
    heldout: Any = None,
    callbacks: Sequence[Any] = (),
    **fields: Any,
) -> Any:
    """Trains `model` in place.

    Args:
        settings: Arguments of `DPOConfig` that say how.
        concepts: What to read and shape. Without any the trainer is TRL's own, bit for bit.
        heldout: Prompts for probe rollouts; nothing is evaluated.
        fields: Further arguments of `ShapedDPOConfig`.

    Returns:
        The trainer; its log is `trainer.state.log_history`.
    """
    from transformers import PrinterCallback

    from shapedpo import ShapedDPOConfig, ShapedDPOTrainer

    with tempfile.TemporaryDirectory() as output:
        args = ShapedDPOConfig(
            output_dir=output,
            concepts=list(concepts) if concepts else None,
            seed=seed,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            **fields,
            **settings,
        )
        trainer = ShapedDPOTrainer(
            model=model,
            args=args,
            train_dataset=data,
            eval_dataset=heldout,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer
