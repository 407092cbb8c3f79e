"""An SAE that several concepts and the monitor read is loaded once, and held whole once where it is held whole."""

from __future__ import annotations

import pytest
import torch

from shapedpo import Concept, SAEFeatures
from shapedpo.monitor.settings import monitor_settings
from shapedpo.reading import ConceptReader
from shapedpo.readouts import sae as sae_module
from tests.helpers import FEATURES, HIDDEN, arguments, folder, sae_path, save_sae


@pytest.fixture
def loads(monkeypatch) -> list[tuple]:
    """What is read from disk."""
    seen = []
    real = sae_module.load_sae

    def load_sae(*source):
        seen.append(source)
        return real(*source)

    monkeypatch.setattr(sae_module, "load_sae", load_sae)
    return seen


def topk_path() -> str:
    """An SAE whose features depend on each other, so that it is held whole whatever is watched."""
    if not folder("topk").is_dir():
        import sae_lens

        metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": "llama-tiny"}
        config = {"architecture": "topk", "d_in": HIDDEN, "d_sae": FEATURES, "k": 5, "metadata": metadata}
        sae = sae_lens.SAE.from_dict(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        sae.save_model(folder("topk"))
    return str(folder("topk"))


def storages(reader: ConceptReader) -> set[int]:
    """Where the whole encoders that are held begin."""
    readers = [*reader.readers, *([reader.monitored] if reader.monitored is not None else [])]
    weights = [r._sae.W_enc for r in readers]
    return {weight.untyped_storage().data_ptr() for weight in weights if weight.shape[1] == FEATURES}


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_once(loads, kind):
    path = str(sae_path()) if kind == "jumprelu" else topk_path()
    readouts = [SAEFeatures(path, [3, 17]), SAEFeatures(path, [40], pooling="mean"), SAEFeatures(path, "all")]
    together = ConceptReader(
        [Concept(f"c{i}", readout) for i, readout in enumerate(readouts)], SAEFeatures(path, "all")
    )
    assert loads == [(path, None, "float32")]
    assert len(storages(together)) == 1
    x, mask = torch.randn(4, 6, HIDDEN), torch.ones(4, 6, dtype=torch.bool)
    for reader, readout in zip(together.readers, readouts, strict=True):
        alone = readout.load()
        assert torch.equal(reader.pooled(x, mask), alone.pooled(x, mask))
        assert torch.equal(reader.directions(), alone.directions())
        assert reader.fingerprint == alone.fingerprint
    # Narrowing the monitor's leaves the others as they are.
    narrow = together.monitored.narrowed([1, 2])
    assert torch.equal(narrow.pooled(x, mask), SAEFeatures(path, [1, 2]).load().pooled(x, mask))
    assert torch.equal(together.readers[2].pooled(x, mask), SAEFeatures(path, "all").load().pooled(x, mask))


def test_few_features_keep_their_columns_only(loads):
    path = str(sae_path())
    reader = ConceptReader([Concept("a", SAEFeatures(path, [3, 17])), Concept("b", SAEFeatures(path, [40]))])
    assert len(loads) == 1
    assert not storages(reader)
    assert [r._sae.W_enc.untyped_storage().nbytes() for r in reader.readers] == [2 * HIDDEN * 4, HIDDEN * 4]


def test_another_type_or_folder_is_another(loads):
    path, other = str(sae_path()), str(save_sae("other"))
    readouts = [SAEFeatures(path, [1]), SAEFeatures(path, [1], dtype="bfloat16"), SAEFeatures(other, [1])]
    reader = ConceptReader([Concept(f"c{i}", readout) for i, readout in enumerate(readouts)])
    assert len(loads) == 3
    assert [r._sae.W_enc.dtype for r in reader.readers] == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("asked", "concept", "expected"),
    [(None, None, "float32"), (None, "bfloat16", "bfloat16"), ("float16", "bfloat16", "float16")],
)
def test_type_of_the_monitored_sae(asked, concept, expected):
    """That of the concepts that read the same one, unless another is asked for."""
    path = str(sae_path())
    concepts = [] if concept is None else [Concept("c", SAEFeatures(path, [1], dtype=concept))]
    args = arguments(monitor="all", monitor_sae=path, monitor_sae_dtype=asked)
    assert monitor_settings(args, concepts, True)[1] == SAEFeatures(path, "all", dtype=expected)
