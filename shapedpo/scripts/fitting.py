"""What `shapedpo fit` and `shapedpo concepts find` do: make readouts from contrast sets."""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from ..errors import UserError, as_user_error
from ..probes.contrast import Contrast
from ..probes.quality import auroc_interval
from ..probes.study import KINDS, Fitted, Options, best, fit_readouts, save_readout
from ..reading import check_reader
from ..readouts.responses import read_responses
from ..readouts.sae_reader import SAEReader
from ..sae.check import auroc
from ..sae.find import best_sets, concept_score, hard_auroc
from .contrasts import check_source, contrast_of
from .setting import Setting


READ_AS = {"direction": {"pooling": "mean"}, "attention_probe": {"output": "probability"}}
"""How a fitted readout is best read, beside its defaults."""


def fit(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Fit readouts to a contrast set, print how good they are and save the best of each kind."""
    if unknown := [kind for kind in args.kinds if kind not in KINDS]:
        raise UserError(f"--kinds: {unknown[0]!r} is none of {', '.join(KINDS)}.")
    check_source(args)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {args.out!r} is a file. Name a folder.")
    setting = Setting.read(args.config, overrides)
    layers = _layers(args.layers, setting.n_layers)
    model, tokenizer = functools.cache(setting.load_model), setting.tokenizer()
    contrast = contrast_of(args, setting, model, tokenizer)
    options = Options(
        kinds=list(dict.fromkeys(args.kinds)),
        layers=layers,
        objective=_objective(args.objective, contrast),
        heldout=args.heldout,
        l2=args.l2,
        heads=args.heads,
        seed=setting.args.seed,
        batch_size=args.batch_size,
        max_length=setting.args.max_length,
    )
    with as_user_error(ValueError):
        fitted = fit_readouts(model(), tokenizer, contrast, options)
    kept = best(fitted)
    _print_fitted(fitted, kept, contrast, options)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "layer", "auroc", "low", "high", "f1", "threshold", "steering_effect", "least_auroc"])
        writer.writerows(
            [one.kind, one.layer, *(f"{value:.6g}" for value in (*one.quality, one.effect, one.least))]
            for one in fitted
        )
    _print_confusions(kept)
    for kind, one in kept.items():
        path = out / f"{kind}.safetensors"
        save_readout(path, one, model(), contrast, options)
        if one.length:
            _print_field("method", {"name": "steer", "direction": str(path)})
            print(f"strength: {one.length:.3g}  # as it was learned")
        else:
            _print_field("readout", {"type": kind, "path": str(path), **READ_AS.get(kind, {})})
        if one.effect <= 0:
            print(
                f"  It reads the concept and does not bring it about (steering {one.effect:+.3f}): not for steer, ablate or residual. "
                "Fit a steering_vector for these."
            )
    return 0


def find(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the features that best tell a contrast set, and the smallest set of them that reaches the target."""
    check_source(args)
    setting = Setting.read(args.config, overrides)
    sae = setting.load_sae(args.sae, args.sae_id)
    name = args.sae or setting.sae[0]
    model, tokenizer = functools.cache(setting.load_model), setting.tokenizer()
    contrast = contrast_of(args, setting, model, tokenizer)
    with as_user_error(ValueError):
        fit, held = contrast.split(args.heldout, setting.args.seed)
        reader = SAEReader(
            sae, None, "max", args.hook_name or sae.cfg.metadata.hf_hook_name or sae.cfg.metadata.hook_name
        )
        if mismatch := check_reader(f"The SAE {name}", reader, model(), model().config.get_text_config()):
            print(f"Warning: {mismatch}")
        sizes: dict[str, Any] = {"batch_size": args.batch_size, "max_length": setting.args.max_length}
        pooled = read_responses(model(), tokenizer, contrast.responses, reader, **sizes, name="features").numpy()
    labels = contrast.labels
    _print_features(pooled, contrast, args.top)

    hard = contrast.hard()
    weights = contrast.take(fit).weights()
    sets = [features for _, features in best_sets(pooled[fit], labels[fit], weights, args.max_features)]
    mean, std = pooled[fit].mean(axis=0), pooled[fit].std(axis=0)
    judged = [(kind, rows[held]) for kind, rows in hard.items() if rows[held].any()]
    table = Table("features", "AUROC [95 %]", "hardest", title="The best set of each size, on held-out responses")
    least = []
    for features in sets:
        scores = concept_score(pooled[held], features, mean, std)
        area = float(auroc(scores, labels[held]))
        areas = hard_auroc(scores, labels[held], [rows for _, rows in judged])
        hardest = min(zip(areas, (kind for kind, _ in judged), strict=True), default=None)
        least.append(min([area, *areas]))
        low, high = auroc_interval(area, int(labels[held].sum()), int((~labels[held]).sum()))
        against = f"{hardest[0]:.3f} ({Path(hardest[1]).name})" if hardest else ""
        table.add_row(", ".join(map(str, features)), f"{area:.3f} [{low:.2f}, {high:.2f}]", against)
    Console().print(table)
    reached = [features for features, area in zip(sets, least, strict=True) if area >= args.target]
    chosen = reached[0] if reached else sets[int(np.argmax(least))]
    if not reached:
        print(f"No set of up to {len(sets)} features reaches {args.target:g}: the best has {max(least):.3f}.")
    readout = {
        "type": "sae_features",
        "sae": str(name),
        "sae_id": args.sae_id or (setting.sae[1] if args.sae is None else None),
    }
    _print_field("readout", {key: value for key, value in readout.items() if value is not None} | {"features": chosen})
    return 0


def _objective(name: str, contrast: Contrast) -> str:
    both = [len(np.unique(contrast.labels[contrast.groups == group])) == 2 for group in np.unique(contrast.groups)]
    if name == "pairs" and not any(both):
        raise UserError("--objective pairs: no prompt has a response of either kind. Use bce.")
    if name != "auto":
        return name
    return "pairs" if all(both) else "bce"


def _layers(words: Sequence[str], there_are: int) -> list[int] | None:
    if list(words) == ["all"]:
        return None
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--layers: expected layer numbers or all, got {' '.join(words)}.")
    layers = list(dict.fromkeys(map(int, words)))
    if outside := [layer for layer in layers if layer >= there_are]:
        raise UserError(f"--layers: there is no layer {outside[0]}; the model has {there_are} (0 to {there_are - 1}).")
    return layers


def _print_fitted(fitted: Sequence[Fitted], kept: dict[str, Fitted], contrast: Contrast, options: Options) -> None:
    shown, n = int(contrast.labels.sum()), len(contrast.labels)
    table = Table(
        "kind",
        "layer",
        "AUROC [95 %]",
        "F1",
        "threshold",
        "steering",
        title=f"{n} responses, {shown} show it; objective {options.objective}",
    )
    for one in fitted:
        quality, effect = one.quality, "" if np.isnan(one.effect) else f"{one.effect:+.3f}"
        area = f"{quality.auroc:.3f} [{quality.low:.2f}, {quality.high:.2f}]"
        style = "bold" if one is kept[one.kind] else None
        table.add_row(
            one.kind, str(one.layer), area, f"{quality.f1:.3f}", f"{quality.threshold:.3g}", effect, style=style
        )
    Console().print(table)


def _print_confusions(kept: dict[str, Fitted]) -> None:
    """What each of the readouts that are kept answers to besides."""
    if not any(one.confusions for one in kept.values()):
        return
    table = Table(
        "kind",
        *(f"{kind}, layer {one.layer}" for kind, one in kept.items()),
        title="Negatives by kind: AUROC against them, loudness",
    )
    found = {kind: {other.name: other for other in one.confusions} for kind, one in kept.items()}
    for name in dict.fromkeys(other.name for one in kept.values() for other in one.confusions):
        row = [others[name] for others in found.values()]
        title = f"{Path(name).name} ({row[0].responses})"
        table.add_row(title, *(f"{other.auroc:.3f}, {other.loudness:.0%}" for other in row))
    Console().print(table)


def _print_features(pooled: np.ndarray, contrast: Contrast, top: int) -> None:
    shows = contrast.labels
    areas = auroc(pooled, shows)
    table = Table(
        "feature",
        "AUROC",
        "active where it shows",
        "elsewhere",
        title=f"{shows.sum()} of {len(shows)} responses show it",
    )
    for feature in (-areas).argsort()[:top]:
        active = pooled[:, feature] > 0
        table.add_row(
            str(feature), f"{areas[feature]:.3f}", f"{active[shows].mean():.1%}", f"{active[~shows].mean():.1%}"
        )
    Console().print(table)


def _print_field(name: str, value: dict[str, Any]) -> None:
    """A field of a concept, as its YAML takes it."""
    print(f"{name}: " + yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip())
