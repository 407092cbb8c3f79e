"""Builds the lab's model, tokenizer, SAE and feature sets from nothing: `python -m shapedpo.lab.build [--out DIR]
[--seed N]`.

Without `--out` the result replaces the assets in the package. It takes about half an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .traits import ASSETS


@dataclass(frozen=True)
class BuildConfig:
    """Sizes of a build; the defaults are those of what is shipped.

    Args:
        vocab_size: of the tokenizer, at most.
        hidden_size: of the model.
        num_layers: of the model.
        n_dialogues: dialogues that the model is trained on, once each.
        batch_size: dialogues a step.
        learning_rate: the peak, one cycle.
        sae_layer: the decoder layer whose output the SAE reads.
        d_sae: features of the SAE.
        k: active features a token, on average.
        sae_tokens: tokens that the SAE is trained on.
        n_feature_dialogues: dialogues for finding the feature sets, and as many for measuring them.
    """

    vocab_size: int = 1536
    hidden_size: int = 128
    num_layers: int = 4
    n_dialogues: int = 200_000
    batch_size: int = 64
    learning_rate: float = 3e-3
    sae_layer: int = 2
    d_sae: int = 1024
    k: int = 12
    sae_tokens: int = 3_000_000
    n_feature_dialogues: int = 6_000


TINY = BuildConfig(
    vocab_size=768,
    hidden_size=32,
    num_layers=2,
    n_dialogues=400,
    sae_layer=0,
    d_sae=64,
    k=4,
    sae_tokens=8_000,
    n_feature_dialogues=200,
)


def build(out: Path = ASSETS, config: BuildConfig = BuildConfig(), seed: int = 0) -> dict[str, Any]:
    """Builds everything into `out`: `model/`, `sae/`, `features.json` and `build.json`.

    Args:
        out: folder, made if missing; files of an earlier build in it are replaced.
        config: the sizes.
        seed: decides text, initialisation and order. Bit-identical results need the same machine and thread count.

    Returns:
        What `build.json` says: the config, sizes, times in seconds, and measures of the result.
    """
    from sae_lens import SAE

    from .features import build_features
    from .measures import capability
    from .model import encode_dialogues, new_model, train_model, train_tokenizer
    from .sae import train_lab_sae

    model_path, sae_path = out / "model", out / "sae"
    start = time.perf_counter()
    tokenizer = train_tokenizer(min(20_000, config.n_dialogues), config.vocab_size, seed)
    model = new_model(tokenizer, config.hidden_size, config.num_layers, seed)
    examples = encode_dialogues(tokenizer, config.n_dialogues, seed)
    loss = train_model(model, examples, batch_size=config.batch_size, learning_rate=config.learning_rate, seed=seed)
    model_path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(model_path)
    tokenizer.save_pretrained(model_path)
    trained = time.perf_counter()

    train_lab_sae(
        model_path,
        tokenizer,
        sae_path,
        layer=config.sae_layer,
        d_sae=config.d_sae,
        k=config.k,
        training_tokens=config.sae_tokens,
        seed=seed + 1,
    )
    sae_trained = time.perf_counter()

    features = build_features(model, tokenizer, SAE.load_from_disk(str(sae_path)), config.n_feature_dialogues, seed + 2)
    (out / "features.json").write_text(json.dumps(features, indent=2) + "\n")
    report = {
        "config": asdict(config),
        "seed": seed,
        "parameters": model.num_parameters(),
        "train_tokens": sum(len(ids) for ids, _ in examples),
        "train_loss": round(loss, 4),
        "capability": round(capability(model, tokenizer).rate, 4),
        "variance_explained": features["variance_explained"],
        "seconds": {
            "model": round(trained - start),
            "sae": round(sae_trained - trained),
            "features": round(time.perf_counter() - sae_trained),
        },
    }
    (out / "build.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(
        prog="python -m shapedpo.lab.build", description="Build the lab's model, tokenizer, SAE and feature sets."
    )
    parser.add_argument(
        "--out", type=Path, default=ASSETS, help="folder to write to (default: the package's own assets)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides text, initialisation and order (default: 0)")
    parser.add_argument(
        "--tiny", action="store_true", help="a build of a minute that is good for nothing but trying the command"
    )
    args = parser.parse_args()
    report = build(args.out, TINY if args.tiny else BuildConfig(), args.seed)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
