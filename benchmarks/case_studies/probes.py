"""Readouts of the traits as a user would make them: probes fitted on what the base itself answers, as a judge labels it."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.case_studies.worlds import CACHE, LAYER
from shapedpo import lab
from shapedpo.lab.measures import as_prompt
from shapedpo.lab.text import draw_questions
from shapedpo.probes.contrast import Contrast, Row
from shapedpo.probes.study import Options, fit_readouts, save_readout


ANSWERS = 4000
SEED = 50
"""Of the prompts and the answers. No run's data, training or rollouts have it."""
OPTIONS = Options(kinds=("attention_probe",), layers=(LAYER,), batch_size=64)


def probe(trait: str) -> Any:
    """An attention probe of a trait, or what an earlier call kept.

    It is fitted on the base's answers to training prompts; whether an answer shows a trait, this one or another, says its pattern, in a judge's
    place. The other traits are hard negatives. What the cases' data plant is not looked at.
    """
    from shapedpo import AttentionProbe

    path = CACHE / "probes" / f"{trait}-{ANSWERS}.safetensors"
    if not path.exists():
        model, tokenizer = lab.load_model(), lab.load_tokenizer()
        labelled = contrast(trait)
        (fitted,) = fit_readouts(model, tokenizer, labelled, OPTIONS)
        save_readout(path, fitted, model, labelled, OPTIONS)
    return AttentionProbe(str(path), output="probability")


def contrast(trait: str, n: int | None = None, hard: bool = True) -> Contrast:
    """The first `n` answers, labelled; the other traits as hard negatives if `hard`."""
    prompts, texts = answers()
    return Contrast.of(
        Row(
            prompt,
            [{"role": "assistant", "content": text}],
            trait in shown,
            "answers",
            tuple(sorted(shown - {trait})) if hard else (),
        )
        for prompt, text in zip(prompts[:n], texts[:n], strict=True)
        for shown in [lab.detect(text)]
    )


def answers() -> tuple[list[Any], list[str]]:
    """Prompts of the training split, and an answer of the base to each, or what an earlier call kept."""
    path = CACHE / "probes" / f"answers-{ANSWERS}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        prompts = [as_prompt(question) for question in draw_questions(ANSWERS, SEED, "train")]
        texts = lab.rollouts(lab.load_model(), lab.load_tokenizer(), prompts, seed=SEED + 1)
        path.write_text(json.dumps([prompts, texts]))
    prompts, texts = json.loads(path.read_text())
    return prompts, texts
