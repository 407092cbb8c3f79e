"""The harvest of real human pairs with a real model; see `test_hh.py` for where they are looked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata

from benchmarks.folders import REPOSITORY
from benchmarks.stories import MODEL
from shapedpo.audit import HarvestSettings, harvest
from shapedpo.audit.harvesting.pairs import Pairs, load_pairs
from shapedpo.audit.harvesting.shards import SPANS


PAIRS = Path(os.environ.get("SHAPEDPO_HH") or REPOSITORY.parent / "shared" / "data" / "hh-harmless-test.jsonl.gz")
pytestmark = [
    pytest.mark.skipif(not PAIRS.is_file(), reason=f"the human pairs are not at {PAIRS} (SHAPEDPO_HH)"),
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"the model is not at {MODEL} (SHAPEDPO_STORIES)"),
]


def test_real_dialogues_are_harvested_with_little_padding(tmp_path):
    from transformers import AutoTokenizer

    metadata = SAEMetadata(hook_name="blocks.2.hook_resid_post", model_name="stories260k")
    torch.manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=64, d_sae=256, dtype="float32", device="cpu", metadata=metadata))
    with torch.no_grad():
        sae.W_enc.normal_(std=0.1)
        sae.threshold.fill_(0.5)
    sae.save_model(tmp_path / "sae")
    settings = HarvestSettings(limit=600, sample=40, max_length=512)
    found = harvest(str(MODEL), str(tmp_path / "sae"), str(PAIRS), tmp_path / "out", settings)
    assert 20 < found.n_rows < 40  # prompts that fill the model's context are dropped, as in training
    (shard,) = found.shards()
    for span in SPANS:
        part = getattr(shard, span)
        assert np.isfinite(part.max.data).all()
        assert part.max.data.min() > 0
        assert 0 < part.freq.data.min() <= part.freq.data.max() <= 1
        assert part.tokens.max() < 512
    assert any("Assistant:" in text["prompt"] for text in found.texts(found.rows))

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    pairs = Pairs(load_pairs(str(PAIRS)), tokenizer, max_length=512, truncation_mode="keep_start", limit=700)
    computed = sum(
        len(batch) * pairs.lengths[batch].max()
        for first in range(0, len(pairs), settings.shard_rows)
        for batch in pairs.batches(np.arange(len(pairs))[first:][: settings.shard_rows], settings.batch_tokens)
    )
    assert 1 - pairs.lengths.sum() / computed < 0.1
