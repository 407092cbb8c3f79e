"""Structure among concepts: what suppressing bold does to the rest of the formatting, with and without `given`.

    python -m benchmarks.structure [--quick] [--seed 0]

The lab teaches five formats at once, each in 30 % of the pairs independently, so that a pair that teaches bold teaches each other one as often
as any pair. Bold is suppressed by reward shaping, read by the lab's SAE features or by a coarse direction (difference of means of answers with bold
or two other formats and answers with none), with and without what it is `given`. Recovery is 100 % x (DPO - shaped) / (DPO - before), of bold on
target, of the others off target.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
FORMATS = ("bold", "emoji", "table", "horizontal_rule", "em_dash")
TARGET, OTHERS = FORMATS[0], FORMATS[1:]


def coarse(seed: int) -> Any:
    """A readout of formatting at large: what a user gets who asks for bold with examples that have other formats too."""
    from shapedpo import Direction, lab
    from shapedpo.lab.text import dialogues

    sides: dict[bool, list[Any]] = {True: [], False: []}
    for question, answer, traits in dialogues(1500, seed + 5, "train"):
        shown = traits & set(FORMATS)
        if not shown or TARGET in shown or len(shown) > 1:
            response = [{"role": "user", "content": question.text}], [{"role": "assistant", "content": answer}]
            sides[bool(shown)].append(response)
    model, tokenizer = lab.load_model(), lab.load_tokenizer()
    return Direction.from_contrast(model, tokenizer, sides[True], sides[False], layer=2, batch_size=64)


def runs(strengths: list[float], seed: int) -> dict[str, list[Any]]:
    """The concepts of each run, by its name."""
    from shapedpo import Concept, lab

    others = [lab.concept(name) for name in OTHERS]
    found: dict[str, list[Any]] = {"plain DPO": []}
    for kind, readout in (("SAE features", lab.concept(TARGET).readout), ("coarse direction", coarse(seed))):
        for strength in strengths:
            for given in ((), OTHERS):
                concept = Concept(TARGET, readout, "suppress", strength=strength, given=given)
                found[f"{kind}, strength {strength:g}{', given the others' if given else ''}"] = [concept, *others]
    return found


def measure(model: Any, n: int, seed: int) -> dict[str, float]:
    """Per cent of held-out rollouts with each format, and of right answers."""
    from shapedpo import lab

    tokenizer = lab.load_tokenizer()
    answers = lab.rollouts(model, tokenizer, lab.heldout_prompts(n, seed + 1), seed=seed + 2)
    rates = {name: 100 * rate.rate for name, rate in lab.trait_rates(answers, FORMATS).items()}
    return rates | {"capability": 100 * lab.capability(model, tokenizer).rate}


def train(concepts: list[Any], pairs: int, seed: int) -> Any:
    """The lab's model after a run."""
    from shapedpo import ShapedDPOConfig, ShapedDPOTrainer, lab

    data = lab.preference_data([lab.Lesson(name, rate=0.3) for name in FORMATS], pairs, seed)
    model = lab.load_model()
    with tempfile.TemporaryDirectory() as folder:
        args = ShapedDPOConfig(
            output_dir=folder,
            concepts=concepts or None,
            seed=seed,
            report_to="none",
            logging_steps=20,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            **lab.goblin_world().dpo,
        )
        trainer = ShapedDPOTrainer(model=model, args=args, train_dataset=data, processing_class=lab.load_tokenizer())
        trainer.train()
        if trainer._calibration is not None and concepts[0].given:
            print("coefficients", trainer._calibration.statistics.given[0].tolist(), flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a seventh of the pairs, results not kept")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pairs, rollouts, strengths = (150, 64, [2.0]) if args.quick else (1000, 600, [2.0])
    from shapedpo import lab

    rows: list[dict[str, Any]] = [{"run": "before", **measure(lab.load_model(), rollouts, args.seed)}]
    for name, concepts in runs(strengths, args.seed).items():
        rows.append({"run": name, **measure(train(concepts, pairs, args.seed), rollouts, args.seed)})
        before, plain, found = rows[0], rows[1], rows[-1]
        if found is not plain:
            for trait in FORMATS:
                gap = plain[trait] - before[trait]
                found[f"recovery of {trait}"] = 100 * (plain[trait] - found[trait]) / gap if gap else float("nan")
        print(
            {key: value if isinstance(value, str) else round(value, 1) for key, value in rows[-1].items()}, flush=True
        )
    if args.quick:
        return
    with (RESULTS / "structure.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else round(v, 1) for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
