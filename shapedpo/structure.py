r"""Structure among concepts: what is left of a concept once others are *given*.

Formatting comes together: answers with a table have bold in it, and a readout of tables fires a little on rules. To suppress the table
then suppresses some of the rest. A concept with `given` is read without what it shares with the concepts named there:

\\( s'_c = s_c - \sum_p b_{cp}\, s_p \\),

the standardised score less its best linear prediction from theirs. The coefficients are found once, on the calibration sample: there (on the
pairs of the concept's gate) the delta that is left is uncorrelated with each of theirs.

They are correlations about the mean. Were the mean products \\( \overline{d'_c\, d_p} \\) made to vanish, an offset by \\( d'_c \\) would leave the
pressure on p as it is to first order; but where the data teach both, pairs that teach p alone then get a negative score, a bonus in effect, and p
was learned well beyond plain DPO (`benchmarks/structure.py`).

Source: ours. The paper (arXiv 2606.12360) notes that its methods leak to related attributes and leaves structure open.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .capture import resolve_site
from .concept import Concept
from .readouts import ActivationReader, LoadedReadout
from .shapers import ConceptSignal, Residual, Steer
from .shapers.projection import orthonormal_basis


LITTLE = 0.1
"""Share that is left of what a concept's deltas show, below which a warning is due."""


def given_indices(concepts: Sequence[Concept]) -> dict[int, list[int]]:
    """For each concept with `given`, by its index, the indices of those that are given."""
    names = [concept.name for concept in concepts]
    return {
        index: [names.index(name) for name in concept.given] for index, concept in enumerate(concepts) if concept.given
    }


def without_given(scores: Tensor, coefficients: Tensor, given: dict[int, list[int]]) -> Tensor:
    """Scores of concepts less what others predict of them.

    Args:
        scores: `(..., C)`, each concept's own, standardised.
        coefficients: `(C, C)` of [`fit_given`].
        given: Of [`given_indices`].

    Returns:
        `(..., C)`. Of concepts without `given`, the same bits.
    """
    if not given:
        return scores
    columns = list(scores.unbind(dim=-1))
    for index, others in given.items():
        # Sums, not a matrix product, which an accelerator may round (TF32).
        columns[index] = columns[index] - (scores[..., others] * coefficients[index, others]).sum(dim=-1)
    return torch.stack(columns, dim=-1)


def fit_given(concepts: Sequence[Concept], signals: Sequence[ConceptSignal], valid: Tensor) -> tuple[Tensor, list[str]]:
    """Find the coefficients on a sample, by least squares in float64.

    Args:
        concepts: All concepts.
        signals: Their own scores on the sample's pairs, the same on all processes.
        valid: `(N,)` bool, the pairs that count.

    Returns:
        `(C, C)` float32, 0 where nothing is given; and warnings, one for each concept that has next to nothing of its own.
    """
    deltas = torch.stack([signal.delta for signal in signals], dim=1).double()  # (N, C)
    found, warnings = torch.zeros(len(concepts), len(concepts), dtype=torch.float64, device=deltas.device), []
    for index, others in given_indices(concepts).items():
        weights = signals[index].gate.double()[:, None] * valid[:, None]
        apart = deltas - (weights * deltas).sum(dim=0) / weights.sum().clamp(min=1e-12)
        gated = apart * weights.sqrt()
        moments = gated.T @ gated
        inverse = torch.linalg.pinv(moments[others][:, others], hermitian=True, rtol=1e-9)
        found[index, others] = inverse @ moments[others, index]
        own = (gated[:, index] - gated @ found[index]).square().sum()
        if float(own) < LITTLE * float(moments[index, index]):
            share = float(own / moments[index, index])
            warnings.append(
                f"Concept {concepts[index].name!r}: given {', '.join(concepts[index].given)}, {share:.1%} of its deltas' variance is left "
                "on the calibration sample. Its readout, or the data, tells it apart too little for it to be shaped by itself."
            )
    return found.float(), warnings


def own_directions(
    model: nn.Module, concepts: Sequence[Concept], readers: Sequence[LoadedReadout], index: int
) -> Tensor:
    """What a concept's features write into the activations, orthogonal to all that the given concepts' features write.

    Args:
        model: The model, unwrapped.
        concepts: All concepts.
        readers: Their readers.
        index: Which of them; its reader reads activations.

    Returns:
        `(F, d_in)` float32.

    Raises:
        ValueError: If a readout has no direction, is read elsewhere, or nothing is left of it or by it; the text names the concept.
    """
    concept, reader = concepts[index], readers[index]
    owner = f"Concept {concept.name!r}: method {concept.shaper.name!r}"
    assert isinstance(reader, ActivationReader)  # by steering_readers and check_methods
    rows = _directions(reader, owner)
    if len(rows) >= reader.d_in and not isinstance(concept.shaper, Steer | Residual):
        raise ValueError(
            f"{owner} takes its {len(rows)} directions out of {reader.d_in} dimensions, which would leave nothing. Name fewer features."
        )
    others = given_indices(concepts).get(index, [])
    if not others:
        return rows
    spans = []
    for other in others:
        given, name = readers[other], concepts[other].name
        if not isinstance(given, ActivationReader):
            raise ValueError(
                f"{owner} acts by directions, and {name!r}, which it is given, is read from text. Leave it out of `given`."
            )
        if resolve_site(model, given.hook_name) != resolve_site(model, reader.hook_name):
            raise ValueError(
                f"{owner} acts by directions at {reader.hook_name!r}, and {name!r}, which it is given, is read at {given.hook_name!r}. Read "
                "both at one place."
            )
        spans.append(_directions(given, f"{owner}: {name!r}, which it is given"))
    basis = orthonormal_basis(torch.cat(spans)).double()  # (d_in, k)
    left = rows.double() - rows.double() @ basis @ basis.T
    if bool((left.norm(dim=1) < 1e-3 * rows.double().norm(dim=1)).any()):
        raise ValueError(f"{owner}: nothing is left of its direction, given {', '.join(concept.given)}.")
    return left.float()


def _directions(reader: ActivationReader, owner: str) -> Tensor:
    try:
        return reader.directions()
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error
