r"""A vector that brings a concept about, for methods that steer.

What reads a concept need not be what brings it about: a direction that tells the responses may do nothing to what a model says. This one is learned
by what it does. Added to the hidden states, it is to make the responses that show the concept likelier than the others, and subtracted, less likely: with
\\( A_d(y) = \log \pi(y \mid h + d v) - \log \pi(y \mid h) \\) and \\( d = \pm 1 \\) drawn anew each step, the mean of

\\[ -\log \sigma\left( d \beta \left[ A_d(y_+) - A_d(y_-) \right] \right) \\]

is minimised by Adam. Source: Cao et al., "Personalized Steering of Large Language Models: Versatile Steering Vectors Through Bi-directional Preference
Optimization" (arXiv 2406.00045). The bound on the vector's length is ours: far from where states lie, a model says nothing sensible.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..capture import resolve_site
from ..readouts.responses import pad_examples, tokenize_response
from ..steering import Steering, make_edit
from .contrast import Contrast
from .quality import response_logps


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BETA = 0.1
STEPS = 100
PAIRS = 16
"""Of responses in a step."""
LONGEST = 0.6
"""The vector's length at most, as a share of the responses' mean states': of the lab, a quarter of a token's state. At twice that, at layer 0, it
parted the responses best, by making all of them unlikely, and explained nothing away."""
STEP = 0.02
"""Adam's step, as a share of the same."""


def fit_steering_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: Contrast,
    hook_name: str,
    size: float,
    *,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Tensor:
    """Learn a vector that brings a concept about.

    Args:
        model: The model, on its device. Its parameters get no gradient.
        tokenizer: Its tokenizer.
        contrast: Responses that show the concept and others; to one prompt, where there are any such.
        hook_name: Where it is added, on every token.
        size: Usual length of a response's mean state there.
        seed: Of what is drawn.
        batch_size: Responses in a forward pass.
        max_length: Where prompt and response together are cut off, in tokens.

    Returns:
        `(d,)` float32 on the CPU, in the units of the hidden states.
    """
    examples = [tokenize_response(tokenizer, *response) for response in contrast.responses]
    examples = [(ids[:max_length], start) for ids, start in examples]
    draw = np.random.default_rng(seed)
    pairs = contrast.pairs()
    if not len(pairs):  # any two will do
        kinds = [np.flatnonzero(contrast.labels == kind) for kind in (True, False)]
        pairs = np.stack([draw.choice(kind, max(map(len, kinds))) for kind in kinds], axis=1)
    width = resolve_site(model, hook_name).width
    edit = make_edit(model, hook_name, torch.ones(1, width), None, ablate=False)
    vector = torch.zeros(width, device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([vector], lr=STEP * size)
    with _frozen(model):
        for _ in tqdm(range(STEPS), desc="Learning what brings it about"):
            rows = pairs[draw.permutation(len(pairs))[:PAIRS]]
            sign = float(draw.choice((-1.0, 1.0)))
            for some in np.array_split(rows, -(-2 * len(rows) // batch_size)):
                ids, attention, mask = pad_examples([examples[row] for row in some.T.ravel()], model.device)
                with torch.no_grad():
                    before = response_logps(model, ids, attention, mask)
                with Steering({0: edit._replace(basis=vector[:, None])}) as steering:
                    steering.aim({0: torch.full((len(ids),), sign, device=ids.device)}, attention.bool())
                    shows, lacks = (response_logps(model, ids, attention, mask) - before).chunk(2)
                (-F.logsigmoid(sign * BETA * (shows - lacks)).sum() / len(rows)).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                vector *= (LONGEST * size / vector.norm()).clamp(max=1)
    return vector.detach().float().cpu()


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """In evaluation mode and without gradients of its parameters, and as it was afterwards."""
    was_training, learned = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval()
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
        model.train(was_training)
