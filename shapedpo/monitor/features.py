"""What to call the features of an SAE: labels from a file, else the tokens that excite them and the tokens they promote."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..readouts.base import WrappedReader, gather_tokens
from ..readouts.sae_reader import SAEReader, max_elements, tiles


N_EXCITING = 8
"""How many completions are kept of each feature, each with the token that excites it most."""
GATHERED = 1024
"""How many features' tables are gathered at a time: those of a whole SAE would take gigabytes on hundreds of processes."""

TOKENS = 8192
"""How many tokens' rows of the unembedding are brought to float32 at a time."""

_INDEX_KEYS = ("index", "feature", "feature_index", "latent")
_LABEL_KEYS = ("description", "label", "explanation", "title")


def load_labels(path: str | os.PathLike[str]) -> dict[int, str]:
    """Read labels of features from a file, JSON or JSON Lines, plain or gzipped, or from all such files of a folder.

    Taken are a mapping from index to label; a list of objects with an index (`index`, `feature`) and a label (`description`,
    `label`, `explanation`), one a line or in one list, as Neuronpedia exports them (`batch-0.jsonl.gz` and on, of an SAE); and an
    object that holds such a list under `explanations`. Of several labels of a feature the first counts.

    Raises:
        FileNotFoundError: If there is no such file, or none in the folder.
        ValueError: If there are no labels in it; the text says what was found.
    """
    path = Path(path)
    files = sorted(path.glob("*.json*")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(f"There is no file of feature labels at {str(path)!r}.")
    labels: dict[int, str] = {}
    for file in files:
        for index, label in _entries(file):
            if str(index).isdecimal() and isinstance(label, str) and label.strip():
                labels.setdefault(int(index), label.strip())
    if not labels:
        raise ValueError(
            f"{path}: found no label. Expected {{'412': 'goblins'}}, or objects such as "
            "{'index': 412, 'description': 'goblins'}, in a list or one a line."
        )
    return labels


def _entries(path: Path) -> Iterator[tuple[Any, Any]]:
    """Index and label of each entry of a file, whatever they are."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
        try:
            data = json.loads(text)
        except ValueError:
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: neither JSON nor JSON Lines ({error}).") from error
    if isinstance(data, Mapping) and isinstance(data.get("explanations"), list):
        data = data["explanations"]
    if isinstance(data, Mapping) and not any(key in data for key in _INDEX_KEYS):
        yield from data.items()
        return
    for entry in data if isinstance(data, list) else [data]:
        if isinstance(entry, Mapping):
            yield _first(entry, _INDEX_KEYS), _first(entry, _LABEL_KEYS)


def _first(entry: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


class Exciting(NamedTuple):
    """The completions that excite each feature most.

    Attributes:
        activation: `(k, F)` float32, best first; 0 where there are fewer.
        token: `(k, F)` int64, the token on which it is that large.
    """

    activation: Tensor
    token: Tensor

    @classmethod
    def none(cls, n_features: int, device: torch.device) -> Exciting:
        zeros = torch.zeros(N_EXCITING, n_features, device=device)
        return cls(zeros, torch.zeros_like(zeros, dtype=torch.int64))

    def merged(self, activation: Tensor, token: Tensor) -> Exciting:
        """The best of these and others, `(n, F)` each."""
        activation = torch.cat([self.activation, activation])
        best = activation.topk(N_EXCITING, dim=0)
        return Exciting(best.values, torch.cat([self.token, token]).gather(0, best.indices))

    def over_processes(self, accelerator: Accelerator) -> Exciting:
        """The best of all processes'."""
        parts = []
        for some in zip(*(tensor.split(GATHERED, dim=1) for tensor in self), strict=True):
            everyone = [accelerator.gather(tensor[None].contiguous()).flatten(0, 1) for tensor in some]
            parts.append(Exciting.none(some[0].shape[1], some[0].device).merged(*everyone))
        return Exciting(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))

    def tokens(self, feature: int, n: int = 4) -> list[int]:
        """The first few distinct tokens of a feature."""
        pairs = zip(self.activation[:, feature].tolist(), self.token[:, feature].tolist(), strict=True)
        return list(dict.fromkeys(token for activation, token in pairs if activation > 0))[:n]


class ExcitingReader(WrappedReader):
    """Reads all features of an SAE, and at which token each is largest. For the calibration pass, not for training steps.

    Args:
        reader: The features; max-pooled.
    """

    def __init__(self, reader: SAEReader) -> None:
        super().__init__(reader)
        self.pooling = "max"
        self.positions = torch.empty(0)
        """`(N, F)` int64, after a pass: where the largest activation is, as a position of the mask."""

    @torch.no_grad()
    def pooled(self, x: Tensor, mask: Tensor) -> Tensor:
        order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # as `gather_tokens` has them
        x, inside = gather_tokens(x.detach(), mask)
        order = torch.where(inside, order[:, : inside.shape[1]], order[:, :1])
        best = torch.zeros(len(x), self.n_features, device=x.device)
        self.positions = torch.zeros_like(best, dtype=torch.int64)
        for rows, tokens in tiles(inside, max(1, max_elements(x.device) // self.n_features)):
            part, where = self.encode(x[rows, tokens]).max(dim=1)  # (n, F)
            larger = part > best[rows]
            best[rows] = torch.where(larger, part, best[rows])
            where = order[rows].gather(1, where + tokens.start)
            self.positions[rows] = torch.where(larger, where, self.positions[rows])
        return torch.where(mask.any(dim=1)[:, None], best, 0.0)


@torch.no_grad()
def promoted_tokens(directions: Tensor, model: nn.Module, k: int = 4) -> list[list[int]]:
    """The tokens whose logits each direction raises most, straight through the unembedding (the logit lens).

    The final norm's weights are left out, as they would need each architecture's own handling.

    Args:
        directions: `(F, d_model)`, decoder directions.
        model: A causal language model, unwrapped. If it is sharded, all processes must call this together.
        k: How many tokens of each.

    Returns:
        For each direction its tokens, the most promoted first; none where the widths differ.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return [[] for _ in directions]
    with gathered(head.weight) as weight:
        if weight.shape[1] != directions.shape[1]:
            return [[] for _ in directions]
        directions = directions.to(weight.device, torch.float32)
        # Part by part: in float32 the unembedding of a large model would take gigabytes.
        logits = torch.cat([directions @ part.float().T for part in weight.split(TOKENS)], dim=1)
        return logits.topk(k, dim=1).indices.tolist()


@contextmanager
def gathered(parameter: Tensor) -> Iterator[Tensor]:
    """A parameter, whole, also where ZeRO-3 or FSDP2 has cut it up."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    elif hasattr(parameter, "full_tensor"):
        yield parameter.full_tensor()
    else:
        yield parameter
