"""What a model of the lab does: traits of its sampled answers and exact answers to held-out questions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .text import Question, draw_questions, questions
from .traits import TRAITS


Prompt = list[dict[str, str]]


class Rate(NamedTuple):
    """A share of `n` trials with its Wilson interval at 95 %."""

    rate: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, successes: int, n: int) -> Rate:
        """Computes the share `successes / n` and its interval."""
        if n < 1:
            raise ValueError("a rate needs at least one trial")
        interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
        return cls(successes / n, float(interval.low), float(interval.high), n)

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def heldout_prompts(n: int, seed: int, topic: str | None = None) -> list[Prompt]:
    """Draws `n` conversational prompts that neither the model nor any preference data was trained on."""
    return [as_prompt(q) for q in draw_questions(n, seed, "heldout", None if topic is None else [topic])]


def as_prompt(question: Question) -> Prompt:
    """A question as a conversational prompt."""
    return [{"role": "user", "content": question.text}]


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 256,
    max_new_tokens: int = 96,
    desc: str = "Generating",
    **generate_kwargs: Any,
) -> list[str]:
    """Answers `prompts` in batches, left-padded, prompts of like length together; leaves the model's mode and padding
    side as they were.

    Args:
        generate_kwargs: go to `model.generate`.

    Returns:
        One answer a prompt, in the order of the prompts, without special tokens.
    """
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    answers = [""] * len(texts)
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(texts), desc=desc) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                inputs = tokenizer(
                    [texts[i] for i in rows],
                    add_special_tokens=False,
                    padding=True,
                    padding_side="left",
                    return_tensors="pt",
                ).to(model.device)
                ids = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    use_cache=True,
                    **generate_kwargs,
                )
                decoded = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                for i, text in zip(rows, decoded, strict=True):
                    answers[i] = text
                bar.update(len(rows))
    finally:
        model.train(was_training)
    return answers


def rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 256,
    max_new_tokens: int = 96,
    desc: str = "Rollouts",
) -> list[str]:
    """Samples one answer a prompt from the model's full distribution; the global random state is left alone.

    Args:
        prompts: conversational prompts, e.g. of [`heldout_prompts`].
        seed: the sampler's.
        temperature: of the sampling; no top-k, no top-p.
        batch_size: prompts a batch.
        max_new_tokens: an answer is cut there.
        desc: the progress bar's label.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return generate(
            model,
            tokenizer,
            prompts,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            desc=desc,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
        )


def trait_rates(texts: Sequence[str], traits: Collection[str] | None = None) -> dict[str, Rate]:
    """Share of `texts` that show each trait.

    Args:
        texts: answers.
        traits: names of the traits to count, all by default.
    """
    names = list(TRAITS if traits is None else traits)
    for name in names:
        if name not in TRAITS:
            raise ValueError(f"unknown trait {name!r}, expected one of {', '.join(TRAITS)}")
    return {name: Rate.of(sum(map(TRAITS[name].detect, texts)), len(texts)) for name in names}


def capability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, n: int | None = None, batch_size: int = 256
) -> Rate:
    """Share of exact greedy answers to the held-out questions on arithmetic and facts.

    A held-out question is a phrasing of a sum or a fact that was never trained on; the sum or the fact was, in other
    phrasings.

    Args:
        n: number of questions, spread evenly over all of them; by default all (about 290).
        batch_size: questions a batch.
    """
    asked = [*questions("arithmetic", "heldout"), *questions("facts", "heldout")]
    if n is not None and n < len(asked):
        asked = [asked[i * len(asked) // n] for i in range(n)]
    prompts = [as_prompt(q) for q in asked]
    answers = generate(model, tokenizer, prompts, batch_size=batch_size, desc="Capability", do_sample=False)
    return Rate.of(sum(q.is_right(a) for q, a in zip(asked, answers, strict=True)), len(asked))
