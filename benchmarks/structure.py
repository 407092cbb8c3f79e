"""Structure among concepts: what suppressing bold does to the rest of the formatting, with and without `given`.

    python -m benchmarks.structure [--quick] [--seed 0]

The lab teaches five formats at once, each in 30 % of the pairs independently, so that a pair that teaches bold teaches each other one as often
as any pair. Bold is suppressed by reward shaping, read by its own SAE feature, or by features of bold, table and em-dash together (someone looked
for formatting), with and without what it is `given`. Recovery is 100 % x (DPO - shaped) / (DPO - before), of bold on target, of the others off
target. Finished runs are kept in `benchmarks/results/runs/structure.jsonl`.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from typing import Any

from benchmarks.folders import RESULTS
from benchmarks.record import key_of, record_of


FORMATS = ("bold", "emoji", "table", "horizontal_rule", "em_dash")
TARGET, OTHERS = FORMATS[0], FORMATS[1:]


def runs() -> dict[str, list[Any]]:
    """The concepts of each run, by its name."""
    from shapedpo import Concept, SAEFeatures, lab
    from shapedpo.lab.features import shipped_features

    features = shipped_features()
    mixed = [features[name][0] for name in ("bold", "table", "em_dash")]
    others = [lab.concept(name) for name in OTHERS]
    found: dict[str, list[Any]] = {"plain DPO": []}
    for name, chosen in (("its own feature", features[TARGET]), ("features of three formats", mixed)):
        readout = SAEFeatures(str(lab.sae_path()), chosen)
        for strength, given in ((2.0, ()), (2.0, OTHERS), *([(4.0, OTHERS)] if chosen is mixed else [])):
            concept = Concept(TARGET, readout, "suppress", strength=strength, given=given)
            found[f"{name}, strength {strength:g}{', given the others' if given else ''}"] = [concept, *others]
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
        ShapedDPOTrainer(model=model, args=args, train_dataset=data, processing_class=lab.load_tokenizer()).train()
    return model


def result(name: str, concepts: list[Any] | None, size: tuple[int, int, int], quick: bool) -> dict[str, float]:
    """What [`measure`] finds after a run, or of the model before training; or what an earlier call found.

    Args:
        size: Pairs, rollouts and seed.
    """
    from shapedpo import lab

    pairs, rollouts, seed = size

    def make() -> dict[str, float]:
        return measure(lab.load_model() if concepts is None else train(concepts, pairs, seed), rollouts, seed)

    return record_of("structure", quick).made(key_of([name, *size]), make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a seventh of the pairs, no table")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = (150, 64, args.seed) if args.quick else (1000, 600, args.seed)
    rows: list[dict[str, Any]] = [{"run": "before", "rollouts": size[1], **result("before", None, size, args.quick)}]
    for name, concepts in runs().items():
        rows.append({"run": name, "rollouts": size[1], **result(name, concepts, size, args.quick)})
        before, plain, found = rows[0], rows[1], rows[-1]
        for trait in FORMATS if concepts else ():
            gap = plain[trait] - before[trait]
            found[f"recovery of {trait}"] = 100 * (plain[trait] - found[trait]) / gap if gap else float("nan")
        print({key: value if isinstance(value, str) else round(value, 1) for key, value in found.items()}, flush=True)
    if args.quick:
        return
    with (RESULTS / "structure.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else round(v, 1) for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
