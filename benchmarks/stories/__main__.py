"""Does shaping keep a planted preference out of a real model, and the rest in?

    python -m benchmarks.stories [--quick] [--trait dialogue mom] [--only hold "reward 2"] [--seed 0]

Dialogue and `mom` are unwanted in turn. Each run starts from the same model and sees the same pairs ([`benchmarks.stories`]); the table gives
the share of held-out rollouts that show each trait. Finished runs are kept in `benchmarks/results/runs/stories.jsonl`, those of `hold` while the
controller does what it did.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.controller import fingerprint
from benchmarks.divergence import kl_per_token
from benchmarks.folders import CACHE, add_out, out_folder
from benchmarks.record import key_of, record_of
from benchmarks.stories import (
    QUICK,
    REWARDS,
    SHOWN,
    Recipe,
    World,
    cached_world,
    choose_features,
    concept,
    heldout_rates,
    heldout_rollouts,
    load,
    rates,
    repeated,
    train,
)


STEER = 3.0
"""How far to steer; the hidden states of the layer have a norm of about 10."""
INSTRUCTIONS = {"dialogue": "People talk in this one.", "mom": "Mom is in this one."}
"""What `inoculate` adds to the prompt."""


def runs(world: World, features: Sequence[int], trait: str = "dialogue") -> dict[str, list[Any]]:
    """The runs of the table, by name, with their concepts."""
    from shapedpo import Filter, Inoculate, Mask, Project, Residual, Tokens

    def suppress(**fields: Any) -> list[Any]:
        return concept(world, features, trait, action="suppress", **fields)

    return {
        "plain": [],
        "hold": concept(world, features, trait, action="hold"),
        "reward 0.5": suppress(strength=0.5),
        "reward 1": suppress(strength=1.0),
        "reward 2": suppress(strength=2.0),
        "reweight 0.5": suppress(method="reweight", strength=0.5),
        "reweight 1": suppress(method="reweight", strength=1.0),
        "mask, top 15 %": suppress(method=Mask(fraction=0.15)),
        "mask, top 30 %": suppress(method=Mask(fraction=0.3)),
        "filter, top 15 %": suppress(method=Filter(fraction=0.15)),
        "filter, top 30 %": suppress(method=Filter(fraction=0.3)),
        "its rows out": suppress(method=Filter(expression=f"{SHOWN}.str.contains('{trait}')")),
        "tokens, top 5 %": suppress(method=Tokens(quantile=0.95)),
        "steer 3": suppress(method="steer", strength=STEER),
        "ablate": suppress(method="ablate"),
        "inoculate": suppress(method=Inoculate(instruction=INSTRUCTIONS.get(trait, f"This one has {trait} in it."))),
        "residual 0.1": suppress(method=Residual(steer=STEER), strength=0.1),
        "project, pairs": suppress(method="project"),
        "project, residual stream": suppress(method=Project(space="residual")),
        "project, parameters": suppress(method=Project(space="parameters")),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stories", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the sizes of the test")
    parser.add_argument("--trait", nargs="+", choices=list(REWARDS), default=["dialogue", "mom"], help="unwanted ones")
    parser.add_argument("--only", nargs="+", help="names of runs, beside plain DPO")
    parser.add_argument("--fresh", action="store_true", help="make runs anew that are in the cache")
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser)
    options = parser.parse_args(arguments)
    out = out_folder(options, CACHE / "quick")
    recipe = Recipe(**(asdict(QUICK if options.quick else Recipe()) | {"seed": options.seed}))
    world, record = cached_world(recipe), record_of("stories", options.quick)
    rows = [{"unwanted": "", "run": "before DPO", **heldout_rates(world, load()[0]), "kl": 0.0}]
    for trait in options.trait:
        features, auroc = choose_features(world, trait=trait)
        print(f"{trait}: features {features}, AUROC {[round(area, 3) for area in auroc]}")
        for name, concepts in runs(world, features, trait).items():
            if name in [row["run"] for row in rows if not row["unwanted"]]:
                continue  # plain DPO, whatever is unwanted
            if options.only is None or name in (*options.only, "plain"):
                of = trait if concepts else ""
                key = key_of([asdict(recipe), of, name, fingerprint() if name == "hold" else ""])
                found = record.made(key, functools.partial(measured, world, concepts), options.fresh)
                rows.append({"unwanted": of, "run": name, **found})
                print(rows[-1], flush=True)
                write(rows, world, out)


def measured(world: World, concepts: list[Any]) -> dict[str, float]:
    """The rates after a run, and the divergence from the model before it (nats a token, on a quarter of the rollouts)."""
    model, _ = train(world, concepts)
    texts = heldout_rollouts(world, model)
    reference, tokenizer = load()
    every = list(zip(repeated(world), texts, strict=True))[:: world.recipe.rollouts]
    examples = [(tokenizer(prompt + text)["input_ids"], len(tokenizer(prompt)["input_ids"])) for prompt, text in every]
    return {**rates(texts), "kl": kl_per_token(model, reference, examples)}


def write(rows: Sequence[dict[str, Any]], world: World, out: Path) -> None:
    """The table, as CSV and Markdown."""
    recipe = world.recipe
    out.mkdir(parents=True, exist_ok=True)
    with (out / "stories.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    n = recipe.heldout_prompts * recipe.rollouts
    lines = [
        f"Share of {n} held-out rollouts that show each trait, the unwanted one in bold; {len(world.pairs)} pairs, seed {recipe.seed}. *Recovery*",
        "is 100 % x (plain - this)/(plain - before) of the unwanted trait, *off target* the mean of the same over the others that plain DPO moves by 5",
        "points or more; *KL* to the model before DPO, nats a token. `its rows out`: without the pairs where only the chosen text shows the trait.",
        "",
        "| unwanted | run | " + " | ".join(REWARDS) + " | recovery, % | off target, % | KL |",
        "| --- | --- |" + " ---: |" * (len(REWARDS) + 3),
    ]
    before, plain = rows[0], next((row for row in rows if row["run"] == "plain"), rows[0])
    for row in rows:
        trait = row["unwanted"]
        cells = [f"**{row[name]:.3f}**" if name == trait else f"{row[name]:.3f}" for name in REWARDS]
        recovered = {
            name: 100 * (plain[name] - row[name]) / (plain[name] - before[name])
            for name in REWARDS
            if name == trait or abs(plain[name] - before[name]) >= 0.05
        }
        others = [value for name, value in recovered.items() if name != trait]
        cells += [f"{recovered[trait]:.0f}", f"{statistics.fmean(others):.0f}"] if trait else ["", ""]
        lines.append(f"| {trait} | {row['run']} | {' | '.join(cells)} | {row['kl']:.3f} |")
    (out / "stories.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
