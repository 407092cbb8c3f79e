"""How far a policy has moved from its reference on what it says itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


@torch.no_grad()
def kl_per_token(
    policy: Any, reference: Any, examples: Sequence[tuple[Sequence[int], int]], batch_size: int = 32
) -> float:
    """KL divergence of the policy's next token from the reference's, mean over the tokens of the policy's own answers, nats.

    Over the whole vocabulary at each place, the end of the answer included where the ids have it.

    Args:
        examples: Ids of prompt and answer, and how many of them are the prompt's.
    """
    policy.eval()
    reference.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        read, said = ids.clone(), torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, (tokens_of, asked) in enumerate(rows):
            ids[row, : len(tokens_of)] = torch.tensor(tokens_of)
            read[row, : len(tokens_of)] = 1
            said[row, asked : len(tokens_of)] = True
        inputs = {"input_ids": ids, "attention_mask": read}
        new, old = (F.log_softmax(model(**inputs).logits[:, :-1].float(), dim=-1) for model in (policy, reference))
        total += float((new.exp() * (new - old)).sum(dim=-1)[said[:, 1:]].sum())
        tokens += int(said[:, 1:].sum())
    return total / tokens
