"""The harvest on disk: what is written comes back, streamed, and nothing half-written is ever seen."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from shapedpo.audit.harvesting import shards
from shapedpo.audit.harvesting.shards import SPANS, Active
from shapedpo.audit.harvesting.store import Harvest
from shapedpo.audit.page.source import Audit


D_SAE, N_ROWS, SHARD_ROWS = 40, 11, 4


def random_span(n, dice):
    """Dense activations of n spans of 0 to 9 tokens, and what is stored of them."""
    tokens = dice.integers(0, 10, size=n)
    dense = [np.maximum(dice.normal(-0.8, 1, (t, D_SAE)), 0).astype(np.float32) for t in tokens]
    active = [np.flatnonzero((a > 0).any(axis=0)) for a in dense]
    join = lambda parts, kind: np.concatenate([np.zeros(0), *parts]).astype(kind)  # noqa: E731
    return dense, Active(
        indptr=np.cumsum([0, *map(len, active)]).astype(np.int32),
        features=join(active, np.int32),
        counts=join([(a > 0).sum(axis=0)[f] for a, f in zip(dense, active, strict=True)], np.int32),
        max=join([a[:, f].max(axis=0) for a, f in zip(dense, active, strict=True) if len(a)], np.float32),
        peak=join([a[:, f].argmax(axis=0) for a, f in zip(dense, active, strict=True) if len(a)], np.int32),
        tokens=tokens.astype(np.int32),
    )


@pytest.fixture
def written(tmp_path):
    """A harvest of random activations in three shards; and those activations."""
    dice = np.random.default_rng(0)
    rows = np.sort(dice.choice(1000, N_ROWS, replace=False))
    shards.write_manifest(
        tmp_path, d_sae=D_SAE, n_rows=N_ROWS, shard_rows=SHARD_ROWS, settings={"model": "m"}, fingerprint={"data": "x"}
    )
    dense = {span: [] for span in SPANS}
    for index in range(shards.n_shards(N_ROWS, SHARD_ROWS)):
        part = rows[index * SHARD_ROWS :][:SHARD_ROWS]
        spans = {}
        for span in SPANS:
            values, spans[span] = random_span(len(part), dice)
            dense[span] += values
        ids = {span: [[7, int(row)] for row in part] for span in SPANS}
        texts = {span: [f"{span} {row} \U0001f47a\n" for row in part] for span in SPANS}
        shards.write_shard(tmp_path, index, part, spans, ids, texts)
    return tmp_path, rows, dense


def test_what_is_written_comes_back(written):
    folder, rows, dense = written
    harvest = Harvest.open(folder)
    assert (harvest.d_sae, harvest.n_rows, harvest.n_shards, harvest.settings) == (D_SAE, N_ROWS, 3, {"model": "m"})
    assert harvest.rows.tolist() == rows.tolist()
    start = 0
    for shard in harvest.shards(["max", "freq", "peak"]):
        n = len(shard.rows)
        assert shard.rows.tolist() == rows[start : start + n].tolist()
        for span in SPANS:
            read = getattr(shard, span)
            for matrix in (read.max, read.freq, read.peak):
                assert matrix.dtype == np.float32
                assert matrix.shape == (n, D_SAE)
                assert matrix.has_canonical_format
            for i, activations in enumerate(dense[span][start : start + n]):
                t = len(activations)
                assert read.tokens[i] == t
                expected = activations.astype(np.float64)
                largest = expected.max(axis=0) if t else np.zeros(D_SAE)
                freq = (expected > 0).mean(axis=0) if t else np.zeros(D_SAE)
                peak = np.where(largest > 0, expected.argmax(axis=0) + 1, 0) if t else np.zeros(D_SAE)
                np.testing.assert_array_equal(read.max[i].toarray()[0], largest)
                np.testing.assert_allclose(read.freq[i].toarray()[0], freq, rtol=1e-6)
                np.testing.assert_array_equal(read.peak[i].toarray()[0], peak)
        start += n
    assert start == N_ROWS


def test_only_what_is_asked_for_is_read(written):
    folder, rows, _ = written
    harvest = Harvest.open(folder)
    (shard,) = harvest.shards(["freq"], spans=["chosen"], indices=[2])
    assert shard.rows.tolist() == rows[8:].tolist()
    assert shard.chosen.freq.nnz > 0
    assert shard.chosen.max is None
    assert shard.rejected.freq is None
    assert len(shard.rejected.tokens) == 3
    assert next(harvest.shards([])).prompt.max is None
    with pytest.raises(ValueError, match=r"Unknown column 'mean'.*max, freq, peak"):
        next(harvest.shards(["mean"]))
    with pytest.raises(ValueError, match="Unknown span 'answer'"):
        next(harvest.shards(spans=["answer"]))


def test_texts_and_tokens_of_rows(written):
    folder, rows, _ = written
    harvest = Harvest.open(folder)
    wanted = [int(rows[10]), int(rows[0]), int(rows[5]), int(rows[0])]
    texts, ids = harvest.texts(wanted), harvest.ids(wanted)
    assert [text["rejected"] for text in texts] == [f"rejected {row} \U0001f47a\n" for row in wanted]
    assert [tokens["prompt"] for tokens in ids] == [[7, row] for row in wanted]
    assert harvest.texts([]) == []
    with pytest.raises(KeyError, match="Row 2000 of the dataset is not in the harvest"):
        harvest.texts([int(rows[0]), 2000])


def test_an_unfinished_harvest_is_refused(written, tmp_path):
    folder, _, _ = written
    shards.shard_path(folder, 1).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards are missing, the first is shard-00001.parquet"):
        Harvest.open(folder)
    with pytest.raises(FileNotFoundError, match=r"There is no harvest in .*no harvest.json"):
        Harvest.open(tmp_path / "elsewhere")
    manifest = json.loads((folder / shards.MANIFEST).read_text())
    (folder / shards.MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version of shapedpo reads 1"):
        Harvest.open(folder)


def test_a_write_that_fails_leaves_nothing(written, monkeypatch):
    folder, _, _ = written
    before = sorted(path.name for path in folder.iterdir())
    content = shards.shard_path(folder, 0).read_bytes()

    def fails(table, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(shards.pq, "write_table", fails)
    _, span = random_span(4, np.random.default_rng(1))
    lists, texts = dict.fromkeys(SPANS, [[1]] * 4), dict.fromkeys(SPANS, [""] * 4)
    with pytest.raises(OSError, match="disk full"):
        shards.write_shard(folder, 0, np.arange(4), dict.fromkeys(SPANS, span), lists, texts)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert shards.shard_path(folder, 0).read_bytes() == content


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("harvest/harvest.json", b"{", r"harvest\.json' is damaged: .*harvest anew"),
        ("harvest/shard-00000.parquet", b"PAR1", r"shard-00000\.parquet' is damaged: .*run the same audit again"),
        (
            "analysis/rows.parquet",
            b"PAR1",
            r"analysis' is damaged \(ArrowInvalid: .*Run the same `shapedpo audit` again",
        ),
        ("analysis/hypotheses.json", b"{}", r"analysis' is damaged \(KeyError: "),
        ("analysis/conditions.safetensors", b"", r"analysis' is damaged \(SafetensorError: "),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else "",
)
def test_a_damaged_file_is_named(finished, tmp_path, name, content, what):
    """Of a folder that was copied in part, for one."""
    shutil.copytree(finished.folder, tmp_path / "audit", ignore=shutil.ignore_patterns("*.sqlite", "*.html"))
    (tmp_path / "audit" / name).write_bytes(content)
    with pytest.raises(ValueError, match=what):
        Audit.open(tmp_path / "audit")
