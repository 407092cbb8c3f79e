"""A vision data set, of which TRL makes tokens in the collator only: it is read and shaped, and what looks at prepared tokens is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from trl import DPOTrainer

from shapedpo import Concept, Direction, Regex, ShapedDPOTrainer, Steer
from tests.helpers import HIDDEN, arguments, assert_same, build, folder, tokenizer, train, vector


image = pytest.importorskip("PIL.Image")


@functools.cache
def processor() -> Any:
    """The tiny model's tokenizer, and images of four patches."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer()._tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size)
    fields = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(image_processor=images, tokenizer=words, image_token="<image>", **fields)


@functools.cache
def path() -> str:
    words = processor().tokenizer
    torch.manual_seed(0)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=len(words), hidden_size=HIDDEN, intermediate_size=48, **shared)
    eyes = CLIPVisionConfig(hidden_size=16, intermediate_size=16, image_size=28, patch_size=14, **shared)
    token = words.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=eyes, text_config=text, image_token_id=token))
    model.save_pretrained(folder("vision"))
    return str(folder("vision"))


def built(cls: type, *concepts: Concept, **fields: Any) -> Any:
    """A trainer on ten pairs, of which no batch is a divisor."""
    rows = [
        {"prompt": "<image> <bos> the", "chosen": " apple" * (1 + i % 3), "rejected": " dog goblin"} for i in range(10)
    ]
    data = Dataset.from_list(
        [{**row, "image": image.new("RGB", (28, 28), (25 * i, 0, 0))} for i, row in enumerate(rows)]
    )
    fields |= {"concepts": list(concepts)} if concepts else {}
    model = LlavaForConditionalGeneration.from_pretrained(path(), dtype=torch.float32)
    args = arguments(bool(concepts), max_length=None, **fields)
    return build(cls, args, model, train_dataset=data, processing_class=processor())


def test_watching_changes_nothing():
    concepts = Concept("goblin", Regex("goblin")), Concept("way", Direction(vector(), layer=1))
    run = train(built(ShapedDPOTrainer, *concepts))
    assert_same(train(built(DPOTrainer)), run)
    spread = (0.25 * 20 / 19) ** 0.5  # of ten zeros and ten ones
    assert run.metric("concepts/goblin/delta")[0] == pytest.approx(-1 / spread)


def test_what_looks_at_prepared_tokens():
    way = Direction(vector(), layer=1)
    with pytest.raises(ValueError, match=r"`probe_steps=2` samples answers.*vision data set"):
        built(ShapedDPOTrainer, Concept("way", way), probe_steps=2)
    with pytest.raises(ValueError, match=r"Methods 'steer'.*vision data set"):
        built(ShapedDPOTrainer, Concept("way", way, "suppress", Steer(), 1.0))
