"""What features are called, and what the calibration pass learns of them."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from shapedpo import SAEFeatures
from shapedpo.monitor.features import Exciting, ExcitingReader, load_labels, promoted_tokens
from shapedpo.monitor.sae import FeatureCalibration
from tests.helpers import FEATURES, HIDDEN, load_model, sae_path


ALONE = SimpleNamespace(num_processes=1)


class TestLabels:
    @pytest.mark.parametrize(
        "data",
        [
            {"412": "goblins", "7": "links"},
            [{"index": "412", "description": "goblins"}, {"index": 7, "description": "links"}],
            [{"feature": 412, "label": "goblins"}, {"feature": 7, "label": "links"}],
            {
                "modelId": "m",
                "explanations": [{"index": 412, "description": "goblins"}, {"index": 7, "description": "links"}],
            },
            [
                {"index": 412, "description": "goblins", "explanation": "second"},
                {"index": 412, "description": "a later one"},
                {"index": 7, "description": " links "},
                {"index": 8, "description": None},
            ],
        ],
    )
    @pytest.mark.parametrize("form", ["json", "jsonl", "gz"])
    def test_forms(self, tmp_path, data, form):
        text = json.dumps(data)
        if form != "json" and isinstance(data, list):
            text = "\n".join(map(json.dumps, data))
        path = tmp_path / f"labels.{form}"
        path.write_bytes(gzip.compress(text.encode()) if form == "gz" else text.encode())
        assert load_labels(path) == {412: "goblins", 7: "links"}

    def test_a_folder_of_an_export_s_batches(self, tmp_path):
        for i, (index, label) in enumerate([("412", "goblins"), ("7", "links"), ("7", "of another explainer")]):
            entry = {
                "modelId": "gpt2-small",
                "layer": "8-res-jb",
                "index": index,
                "description": label,
                "embedding": "[0.1]",
            }
            (tmp_path / f"batch-{i}.jsonl.gz").write_bytes(gzip.compress(json.dumps(entry).encode("utf-8-sig")))
        assert load_labels(tmp_path) == {412: "goblins", 7: "links"}

    @pytest.mark.parametrize("text", ["", "[]", "goblins", '{"a": "b"}', "[1, 2]"])
    def test_no_labels(self, tmp_path, text):
        (tmp_path / "labels.json").write_text(text)
        with pytest.raises(ValueError, match=r"labels\.json: (found no label|neither JSON)"):
            load_labels(tmp_path / "labels.json")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load_labels(tmp_path / "nowhere.json")


def reading(n: int = 6, t: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, t, HIDDEN, generator=generator)
    mask = torch.rand(n, t, generator=generator) < 0.5
    mask[0] = False  # a completion without tokens
    ids = torch.randint(0, 1000, (n, t), generator=generator)
    return x, mask, ids


def test_exciting_tokens_against_looking_at_every_token():
    x, mask, ids = reading()
    reader = SAEFeatures(str(sae_path()), "all").load()
    plain = reader.pooled(x, mask)
    looking = ExcitingReader(reader)
    pooled = looking.pooled(x, mask)
    torch.testing.assert_close(pooled, plain)
    tokens = ids.gather(1, looking.positions)
    activations = reader.encode(x)
    for row in range(1, len(x)):
        for feature in range(FEATURES):
            inside = mask[row].nonzero()[:, 0]
            if pooled[row, feature] > 0:
                best = inside[activations[row, inside, feature].argmax()]
                assert tokens[row, feature] == ids[row, best]


def test_statistics_against_one_table():
    calibration = FeatureCalibration(3, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    kept = []
    for _ in range(5):
        features = torch.rand(8, 3, generator=generator) * torch.tensor([1.0, 100.0, 0.0])
        tokens = torch.randint(0, 9, (8, 3), generator=generator)
        keep = torch.tensor([True, True, False, True])
        calibration.add(features, tokens, keep)
        kept.append((features.view(2, 4, 3)[:, keep], tokens.view(2, 4, 3)[:, keep]))
    statistics = calibration.finish(ALONE)
    table = torch.cat([features for features, _ in kept], dim=1).double()  # (2, N, 3)
    rows = table.flatten(0, 1)
    std = torch.where(rows.std(0) > 0, rows.std(0), 1.0)
    torch.testing.assert_close(statistics.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.std.double(), std, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.delta.double(), (table[0] - table[1]).mean(0) / std, rtol=1e-5, atol=1e-6)
    best = rows[:, 1].topk(8)
    torch.testing.assert_close(statistics.exciting.activation[:, 1].double(), best.values)
    all_tokens = torch.cat([tokens for _, tokens in kept], dim=1).flatten(0, 1)
    assert statistics.exciting.token[:, 1].tolist() == all_tokens[best.indices, 1].tolist()
    assert statistics.exciting.tokens(2) == []  # never active: no token excites it
    narrowed = statistics.narrowed(torch.tensor([1, 2]))
    assert narrowed.ids.tolist() == [1, 2]
    assert torch.equal(narrowed.exciting.token, statistics.exciting.token[:, 1:])


def test_exciting_tokens_are_distinct():
    exciting = Exciting(torch.tensor([[3.0], [2.0], [1.0], [0.0]]), torch.tensor([[5], [5], [9], [4]]))
    assert exciting.tokens(0) == [5, 9]


def test_promoted_tokens_are_the_unembedding_s():
    model = load_model()
    directions = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    weight = model.get_output_embeddings().weight.detach().double()
    expected = (directions.double() @ weight.T).argsort(dim=1, descending=True)[:, :4].tolist()
    assert promoted_tokens(directions, model) == expected
    assert promoted_tokens(torch.randn(2, HIDDEN + 1), model) == [
        [],
        [],
    ]  # an SAE of another place than the residual stream


def test_narrowed_reader_reads_the_same():
    x, mask, _ = reading()
    whole = SAEFeatures(str(sae_path()), "all").load()
    expected = whole.pooled(x, mask)[:, [3, 17, 40]]
    part = whole.narrowed([3, 17, 40])
    assert part.n_features == 3
    torch.testing.assert_close(part.pooled(x, mask), expected)
    assert torch.equal(part.writes(torch.tensor([2, 0])), whole.writes()[[40, 3]])
    with pytest.raises(ValueError, match="Only a reader of all features"):
        part.narrowed([0])
