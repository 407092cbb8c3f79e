"""Which readouts tell a concept from what is taught beside it: on the case studies' data, by what they were fitted on.

    python -m benchmarks.readouts [--quick]

Probes are fitted on answers of the base, labelled by patterns in a judge's place (`benchmarks/case_studies/probes.py`), and measured on the completions of
the cases' pairs. Writes `readouts.md` to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.folders import CACHE, add_out, out_folder


CASES = {"traits": ("overconfidence", "cheerfulness"), "formatting": ("horizontal_rule", "em_dash", "emoji")}
COLUMNS = ("AUROC", "against the hardest", "delta with the truth", "delta with another", "share of the pressure")


def figures(scores: np.ndarray, shown: Mapping[str, np.ndarray], trait: str) -> list[str]:
    """What [`COLUMNS`] say.

    Args:
        scores: `(2P,)`, of chosen and rejected completions in turn.
        shown: By trait, `(2P,)` bool, the completions that show it.
        trait: What the scores are of.
    """
    import torch

    from shapedpo.sae.check import auroc
    from shapedpo.sae.find import hard_auroc
    from shapedpo.shapers.pair_statistics import presence, typical_size

    label = shown[trait]
    others = {name: rows & ~label for name, rows in shown.items() if name != trait and (rows & ~label).sum() >= 10}
    hardest = min(zip(hard_auroc(scores, label, list(others.values())), others, strict=True))
    deltas = torch.from_numpy(scores[::2] - scores[1::2]).double()[:, None]
    truth = {name: rows[::2].astype(float) - rows[1::2] for name, rows in shown.items()}
    found = {name: np.corrcoef(deltas[:, 0], moved)[0, 1] for name, moved in truth.items() if moved.any()}
    other = max((name for name in found if name != trait), key=lambda name: abs(found[name]))
    # `hold` counts a pair by the cube of its delta's size, and takes large deltas for all there is
    size = typical_size(deltas)
    pressure = (presence(deltas, size) * (deltas / size).abs() ** 3)[:, 0].numpy()
    share = (pressure * truth[trait]).sum() / np.abs(pressure).sum()
    return [
        f"{auroc(scores, label):.3f}",
        f"{hardest[0]:.3f} ({hardest[1]})",
        f"{found[trait]:.2f}",
        f"{found[other]:+.2f} ({other})",
        f"{share:.0%}",
    ]


def readers(trait: str, few: bool) -> Iterator[tuple[str, Any]]:
    """Readers of a trait, by what to call them; `few`: the SAE's and the case studies' probe."""
    from benchmarks.case_studies import probes
    from shapedpo import AttentionProbe, lab
    from shapedpo.probes.study import fit_readouts
    from shapedpo.readouts import LabTrait
    from shapedpo.readouts.direction import DirectionReader
    from shapedpo.readouts.files import residual
    from shapedpo.readouts.probe import ATTENTION, LINEAR, AttentionProbeReader, LinearProbeReader

    yield "SAE features", LabTrait(trait).load()
    probe = probes.probe(trait)
    yield "attention probe", AttentionProbe(probe.path).load()
    yield "the same, as probability", probe.load()
    if few:
        return
    model, tokenizer, place = lab.load_model(), lab.load_tokenizer(), residual(probes.LAYER)
    for title, kind, n, hard in (
        ("the same, no hard negatives", "attention_probe", probes.ANSWERS, False),
        ("the same, a quarter of the answers", "attention_probe", probes.ANSWERS // 4, True),
        ("linear probe", "linear_probe", probes.ANSWERS, True),
        ("difference of means", "direction", probes.ANSWERS, True),
    ):
        contrast = probes.contrast(trait, n, hard)
        (fitted,) = fit_readouts(model, tokenizer, contrast, probes.OPTIONS._replace(kinds=(kind,)))
        found = fitted.tensors
        if kind == "attention_probe":
            yield title, AttentionProbeReader(*map(found.get, ATTENTION), place, output="probability")
        elif kind == "linear_probe":
            yield title, LinearProbeReader(*map(found.get, LINEAR), "mean", place)
        else:
            yield title, DirectionReader(found["direction"], "mean", place)


def lines(pairs: int) -> Iterator[str]:
    """The page."""
    from benchmarks.case_studies.worlds import WORLDS
    from shapedpo import lab
    from shapedpo.readouts.responses import pair_responses, read_responses, response_text

    yield from INTRODUCTION.splitlines()
    model, tokenizer = lab.load_model(), lab.load_tokenizer()
    for case, traits in CASES.items():
        completions = list(pair_responses(WORLDS[case].dataset(pairs, 0)))
        seen = [lab.detect(response_text(response)) for _, response in completions]
        shown = {name: np.array([name in some for some in seen]) for name in lab.TRAITS}
        for trait in traits:
            yield from ("", f"## {case}: {trait}", "", f"| readout | {' | '.join(COLUMNS)} |")
            yield "| --- |" + " ---: |" * len(COLUMNS)
            for title, reader in readers(trait, few=trait != "overconfidence"):
                raw = read_responses(model, tokenizer, completions, reader, batch_size=64).double().numpy()
                scores = ((raw - raw.mean(axis=0)) / raw.std(axis=0)).mean(axis=1)
                yield f"| {title} | {' | '.join(figures(scores, shown, trait))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs; the figures mean nothing")
    add_out(parser)
    options = parser.parse_args()
    out = out_folder(options, CACHE / "readouts")
    out.mkdir(parents=True, exist_ok=True)
    text = []
    for line in lines(100 if options.quick else 800):
        print(line, flush=True)
        text.append(line)
    (out / "readouts.md").write_text("\n".join(text) + "\n", encoding="utf-8")


INTRODUCTION = """\
# Readouts on the case studies' data

`python -m benchmarks.readouts`. Completions of a case's 800 pairs (seed 0): AUROC of those that show the trait against all others, and against those that show the
trait that is hardest to tell from it; correlation of a pair's delta with the true one (whether chosen and rejected show the trait), and with the
true one of the other trait with which it is largest; share of the pressure that `hold` acts on that is from pairs that differ in the trait."""

if __name__ == "__main__":
    main()
