"""Training on real human pairs: whole dialogues, long ones, truncated ones, and sides that share all but their end.

Skips where the pairs (`SHAPEDPO_HH`) or the model (`SHAPEDPO_STORIES`) are not at hand; see `benchmarks/stories/` for the defaults.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from benchmarks.folders import REPOSITORY
from benchmarks.stories import MODEL
from shapedpo import Concept, Direction, Regex, SAEFeatures, ShapedDPOConfig, ShapedDPOTrainer


PAIRS = Path(os.environ.get("SHAPEDPO_HH") or REPOSITORY.parent / "shared" / "data" / "hh-harmless-test.jsonl.gz")
CONTEXT = 512  # the model's
REFUSAL = r"(?i)\b(sorry|can.t|cannot|won.t|shouldn.t|not (?:able|comfortable))\b"

pytestmark = [
    pytest.mark.skipif(not PAIRS.is_file(), reason=f"the human pairs are not at {PAIRS} (SHAPEDPO_HH)"),
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"the model is not at {MODEL} (SHAPEDPO_STORIES)"),
]


def shared_prefix(chosen: str, rejected: str) -> int:
    """How many characters two dialogues have in common."""
    return next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """32 pairs: the shortest, middling ones, the longest, and those whose sides differ only at the end."""
    with gzip.open(PAIRS, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:800]
    by_length = sorted(rows, key=lambda row: len(row["chosen"]) + len(row["rejected"]))
    by_difference = sorted(rows, key=lambda row: len(row["chosen"]) - shared_prefix(row["chosen"], row["rejected"]))
    picked = by_length[:8] + by_length[400:408] + by_length[-60:-52] + by_length[-4:] + by_difference[:4]
    return Dataset.from_list([{"chosen": row["chosen"], "rejected": row["rejected"]} for row in picked])


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> list[Concept]:
    """One concept of each readout, each with another method."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    refusals = [("Assistant:", f" I'm sorry, I can't {verb} that.") for verb in ("do", "say", "tell you")]
    answers = [("Assistant:", f" Sure, here is how you {verb} it.") for verb in ("do", "say", "tell")]
    direction = Direction.from_contrast(model, tokenizer, refusals, answers, layer=3)
    torch.manual_seed(0)
    metadata = SAEMetadata(model_name="stories260k", hook_name="blocks.2.hook_resid_post")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=64, d_sae=128, dtype="float32", device="cpu", metadata=metadata))
    sae.threshold.data.fill_(0.05)
    folder = tmp_path_factory.mktemp("sae")
    sae.save_model(folder)
    return [
        Concept("refusal", Regex(REFUSAL), action="suppress", strength=1.0),
        Concept("tone", direction, action="suppress", method="project"),
        Concept("some", SAEFeatures(str(folder), [3, 14, 15]), action="amplify", method="reweight", strength=0.5),
        Concept("watched", SAEFeatures(str(folder), "all", pooling="freq")),
    ]


def train(trainer_class: type, pairs: Dataset, output: Path, collator: Any = None, **fields: Any) -> Any:
    concepts = fields.pop("concepts", None)
    fields = {"max_length": CONTEXT, "max_steps": 4, "per_device_train_batch_size": 8} | fields
    trainer = trainer_class(
        model=str(MODEL),
        args=ShapedDPOConfig(
            output_dir=str(output),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **fields,
        ),
        train_dataset=pairs,
        data_collator=collator,
        **({"concepts": concepts} if concepts is not None else {}),
    )
    trainer.train()
    return trainer


def steps(trainer: Any) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_real_pairs_train_with_every_readout(
    pairs: Dataset, concepts: list[Concept], tmp_path: Path, truncation: str
) -> None:
    trainer = train(ShapedDPOTrainer, pairs, tmp_path, concepts=concepts, truncation_mode=truncation)

    rows = trainer.train_dataset
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    assert max(lengths) > CONTEXT > 8 * min(lengths)  # some are cut, some short
    logged = steps(trainer)
    assert len(logged) == 4
    for log in logged:
        assert all(math.isfinite(value) for value in log.values())
        for concept in concepts:
            assert {f"concepts/{concept.name}/{name}" for name in ("amplification", "pressure", "delta")} <= log.keys()
    assert any(log["concepts/refusal/delta"] != 0 for log in logged)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_precomputed_and_live_reading_agree(pairs: Dataset, concepts: list[Concept], tmp_path: Path) -> None:
    # Calibrated on all pairs both times, so that the scores are the same up to the batches' padding.
    size = {"calibration_size": 10_000}
    live = train(ShapedDPOTrainer, pairs, tmp_path / "live", concepts=concepts, **size)
    cached = train(
        ShapedDPOTrainer, pairs, tmp_path / "cached", concepts=concepts, precompute_ref_log_probs=True, **size
    )
    for a, b in zip(steps(live), steps(cached), strict=True):
        assert a["concepts/some/delta"] == pytest.approx(b["concepts/some/delta"], abs=1e-3)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_watching_real_pairs_changes_nothing(pairs: Dataset, concepts: list[Concept], tmp_path: Path) -> None:
    watched = [Concept(concept.name, concept.readout) for concept in concepts]
    plain = train(DPOTrainer, pairs, tmp_path / "plain")
    shaped = train(ShapedDPOTrainer, pairs, tmp_path / "shaped", concepts=watched)
    for a, b in zip(steps(plain), steps(shaped), strict=True):
        assert a == {name: value for name, value in b.items() if not name.startswith("concepts/")}
    for a, b in zip(plain.model.parameters(), shaped.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pairs_truncated_to_their_prompt_are_counted(pairs: Dataset, concepts: list[Concept], tmp_path: Path) -> None:
    # TRL drops such pairs when it truncates by itself, but a collator of the user's may cut more.
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    short = 96
    collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=short)
    trainer = train(ShapedDPOTrainer, pairs, tmp_path, collator, concepts=concepts, max_length=None)
    logged = steps(trainer)
    empty = sum(len(row["prompt_ids"]) >= short for row in trainer.train_dataset)
    assert 6 < empty < len(pairs)  # 4 steps of 8 are one epoch of the 32
    assert logged[-1]["concepts/empty_pairs"] == empty
    assert all(math.isfinite(value) for log in logged for value in log.values())
