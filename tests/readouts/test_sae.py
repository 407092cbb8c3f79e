"""SAE readouts against sae-lens itself, from files that sae-lens wrote."""

from __future__ import annotations

import json
import pickle
import re

import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from shapedpo.capture import CapturePass, resolve_site
from shapedpo.readouts import POOLINGS, SAEFeatures, readout_from_dict, sae_reader
from shapedpo.readouts.sae import load_sae


D_IN, D_SAE = 24, 40
FEATURES = [5, 0, 39, 17]  # not in order
HOOK = "blocks.1.hook_resid_post"
NORMS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening"]
KINDS = ["standard", "jumprelu", "gated", "topk", "topk-rescaled", "matching_pursuit"]


def make_sae(kind: str, d_in: int = D_IN, d_sae: int = D_SAE, **fields):
    torch.manual_seed(0)
    architecture, _, rescaled = kind.partition("-")
    if architecture == "topk":
        fields = {"k": 6, "rescale_acts_by_decoder_norm": bool(rescaled), **fields}
    if "transcoder" in kind:
        fields = {"d_out": 16, "apply_b_dec_to_input": False, **fields}
    metadata = {"hook_name": HOOK, "model_name": "llama", **fields.pop("metadata", {})}
    config = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "metadata": metadata, **fields}
    sae = sae_lens.SAE.from_dict(config)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            # Some thresholds are negative, which JumpReLU allows: ReLU then decides.
            parameter.copy_(torch.randn_like(parameter) * (0.2 if name.startswith("W") else 0.5))
    return sae.requires_grad_(False)


def slowly_pooled(activations: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Token by token, in float64."""
    out = torch.zeros(len(mask), activations.shape[-1], dtype=torch.float64)
    for row in range(len(mask)):
        tokens = [activations[row, t].double() for t in range(mask.shape[1]) if mask[row, t]]
        for f in range(activations.shape[-1]):
            values = [float(token[f]) for token in tokens]
            if values and pooling == "max":
                out[row, f] = max(values)
            elif values and pooling == "mean":
                out[row, f] = sum(values) / len(values)
            elif values:
                out[row, f] = sum(value > 0 for value in values) / len(values)
    return out


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and a ragged mask: with gaps, one token, all tokens, none."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 11, D_IN, generator=generator)
    mask = torch.rand(5, 11, generator=generator) < 0.5
    mask[1], mask[2], mask[3] = False, True, torch.arange(11) == 10
    return x, mask


class TestAgainstSaeLens:
    @pytest.mark.filterwarnings("ignore:The SAE in .* asks for normalize_activations")
    @pytest.mark.parametrize("apply_b_dec", [True, False])
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_encode_and_pooled(self, kind, norm, apply_b_dec, batch, tmp_path):
        sae = make_sae(kind, normalize_activations=norm, apply_b_dec_to_input=apply_b_dec)
        sae.save_model(tmp_path)
        x, mask = batch
        expected = sae.encode(x)
        assert 0.02 < (expected > 0).float().mean() < 0.98
        for features in (FEATURES, "all"):
            columns = expected if features == "all" else expected[..., features]
            for pooling in POOLINGS:
                reader = SAEFeatures(str(tmp_path), features, pooling=pooling).load()
                assert (reader.hook_name, reader.d_in, reader.model_name) == (HOOK, D_IN, "llama")
                assert reader.n_features == columns.shape[-1]
                torch.testing.assert_close(reader.encode(x), columns, atol=1e-5, rtol=0)
                pooled = reader.pooled(x, mask)
                assert pooled.dtype == torch.float32
                torch.testing.assert_close(pooled.double(), slowly_pooled(columns, mask, pooling), atol=1e-5, rtol=0)
                token, feature, value = reader.active(x.flatten(0, 1))
                active = torch.zeros(len(x.flatten(0, 1)), columns.shape[-1])
                active[token, feature] = value
                torch.testing.assert_close(active, columns.flatten(0, 1).clamp(min=0), atol=1e-5, rtol=0)
                assert (value > 0).all()
                rows = sae.W_dec if features == "all" else sae.W_dec[features]
                torch.testing.assert_close(reader.directions(), rows)

    @pytest.mark.parametrize("kind", ["transcoder", "jumprelu_transcoder", "skip_transcoder"])
    def test_transcoders(self, kind, batch, tmp_path):
        sae = make_sae(kind)
        sae.save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES, pooling="mean").load()
        expected = sae.encode(batch[0])[..., FEATURES]
        torch.testing.assert_close(reader.encode(batch[0]), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            reader.pooled(*batch).double(), slowly_pooled(expected, batch[1], "mean"), atol=1e-5, rtol=0
        )
        with pytest.raises(ValueError, match="a transcoder's features write elsewhere"):
            reader.directions()

    def test_batch_topk_loads_as_jumprelu(self, batch, tmp_path):
        config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4)
        sae = sae_lens.BatchTopKTrainingSAE(config)
        sae.topk_threshold.fill_(0.3)
        sae.save_inference_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES, hook_name=HOOK).load()
        reference = sae_lens.SAE.load_from_disk(tmp_path)
        assert isinstance(reference, sae_lens.JumpReLUSAE)
        expected = reference.encode(batch[0])[..., FEATURES]
        torch.testing.assert_close(reader.encode(batch[0]), expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("kind", ["standard", "topk"])
    def test_hook_z_in_a_model(self, kind, tmp_path):
        heads, d_head, hook = 4, 6, "blocks.1.attn.hook_z"
        sae = make_sae(kind, reshape_activations="hook_z", metadata={"hook_name": hook})
        sae.save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES).load()
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                head_dim=6,
            )
        )
        assert resolve_site(model, reader.hook_name).width == reader.d_in
        seen = []
        projection = model.model.layers[1].self_attn.o_proj
        handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        ids, mask = torch.randint(50, (2, 7)), torch.tensor([[0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1, 0]]).bool()
        with torch.no_grad(), CapturePass(model, [reader], [mask]) as capture:
            model(input_ids=ids)
        handle.remove()
        expected = sae.encode(seen[0].unflatten(-1, (heads, d_head)))[..., FEATURES]
        torch.testing.assert_close(reader.encode(seen[0]), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(capture.scores[0].double(), slowly_pooled(expected, mask, "max"), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("limit", [1, 40, 100, 400])
    @pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
    def test_any_chunking_gives_the_same(self, kind, limit, batch, tmp_path, monkeypatch):
        """Chunks that cut features, tokens and rows, all with a rest."""
        sae = make_sae(kind)
        sae.save_model(tmp_path)
        monkeypatch.setattr(sae_reader, "_CHUNK", 7)
        monkeypatch.setattr(sae_reader, "max_elements", lambda device: limit)
        for pooling in POOLINGS:
            pooled = SAEFeatures(str(tmp_path), "all", pooling=pooling).load().pooled(*batch)
            expected = slowly_pooled(sae.encode(batch[0]), batch[1], pooling)
            torch.testing.assert_close(pooled.double(), expected, atol=1e-5, rtol=0)


class TestPrecision:
    @pytest.mark.parametrize("kind", ["jumprelu", "topk"])
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_bfloat16_activations(self, kind, pooling, batch, tmp_path):
        make_sae(kind).save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES, pooling=pooling).load()
        x, mask = batch[0].bfloat16(), batch[1]
        torch.testing.assert_close(reader.pooled(x, mask), reader.pooled(x.float(), mask), atol=0, rtol=0)

    @pytest.mark.parametrize("kind", ["jumprelu", "topk"])
    def test_autocast_does_not_reach_scores(self, kind, batch, tmp_path):
        make_sae(kind).save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES).load()
        with torch.autocast("cpu", torch.bfloat16):
            pooled, encoded = reader.pooled(*batch), reader.encode(batch[0])
        assert torch.equal(pooled, reader.pooled(*batch))
        assert torch.equal(encoded, reader.encode(batch[0]))

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_bfloat16_weights(self, pooling, batch, tmp_path):
        make_sae("jumprelu").save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES, pooling=pooling, dtype="bfloat16").load()
        expected = slowly_pooled(reader.encode(batch[0]), batch[1], pooling)
        pooled = reader.pooled(*batch)
        assert pooled.dtype == torch.float32
        tolerance = 0.15 if pooling == "freq" else 0.03  # one token at the threshold may fall on either side
        torch.testing.assert_close(pooled.double(), expected, atol=tolerance, rtol=0.03)

    @pytest.mark.parametrize("kind", ["jumprelu", "topk"])
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_what_is_outside_the_mask_does_not_count(self, kind, pooling, batch, tmp_path):
        make_sae(kind, normalize_activations="layer_norm").save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES, pooling=pooling).load()
        x, mask = batch
        garbage = torch.where(mask[..., None], x, torch.nan)
        assert torch.equal(reader.pooled(garbage, mask), reader.pooled(x, mask))

    def test_non_finite_activations_show(self, batch, tmp_path):
        make_sae("jumprelu").save_model(tmp_path)
        x, mask = batch
        x[2, 3] = torch.nan
        assert SAEFeatures(str(tmp_path), FEATURES).load().pooled(x, mask)[2].isnan().all()

    def test_no_gradient(self, batch, tmp_path):
        make_sae("standard").save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES).load()
        x = batch[0].requires_grad_()
        assert not reader.pooled(x, batch[1]).requires_grad
        assert not reader.encode(x).requires_grad
        assert not reader.directions().requires_grad


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operation gives, and what an accelerator would have to wait for."""

    waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.waited: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        boolean = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.waits or boolean:
            self.waited.append(name)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


class TestMemory:
    @pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk"])
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_all_features_are_never_there_for_all_tokens(self, kind, pooling, tmp_path):
        n, t, d_sae = 8, 160, 2**14
        make_sae(kind, d_in=8, d_sae=d_sae).save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), "all", pooling=pooling).load()
        x, mask = torch.randn(n, t, 8), torch.ones(n, t, dtype=torch.bool)
        with Watch() as watch:
            reader.pooled(x, mask)
        assert watch.numel <= 2**20 < n * t * d_sae / 16

    @pytest.mark.parametrize("kind", ["jumprelu", "gated"])
    def test_only_watched_columns_stay(self, kind, batch, tmp_path):
        make_sae(kind, d_sae=2**14).save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES).load()
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in reader._sae.parameters()
        }
        assert sum(held.values()) <= 4 * (2 * len(FEATURES) * D_IN + 3 * len(FEATURES) + D_IN)
        with Watch() as watch:
            reader.pooled(*batch)
        assert watch.numel <= batch[0].numel()

    @pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_nothing_waits_for_the_device(self, kind, pooling, batch, tmp_path):
        make_sae(kind).save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES, pooling=pooling).load()
        with Watch() as watch:
            reader.pooled(*batch)
        # One wait, for the longest completion, which an accelerator leaves out (see `gather_tokens`).
        assert watch.waited == ["aten::_local_scalar_dense"]

    def test_to_does_nothing_when_there(self, tmp_path):
        make_sae("jumprelu").save_model(tmp_path)
        reader = SAEFeatures(str(tmp_path), FEATURES).load()
        before = reader._sae.W_enc.data_ptr()
        assert reader.to("cpu") is reader
        assert reader._sae.W_enc.data_ptr() == before
        assert reader.to("meta").directions().device.type == "meta"


class TestFingerprint:
    def test_changes_with_what_changes_a_score(self, tmp_path):
        sae = make_sae("jumprelu")
        sae.save_model(tmp_path / "a")
        base = SAEFeatures(str(tmp_path / "a"), FEATURES)
        same = [base.load().fingerprint, SAEFeatures(str(tmp_path / "a"), tuple(FEATURES)).load().fingerprint]
        sae.cfg.metadata.note = "metadata does not count"
        sae.W_enc.data[:, 1] += 1  # nor do features that are not watched
        sae.save_model(tmp_path / "b")
        same.append(SAEFeatures(str(tmp_path / "b"), FEATURES).load().fingerprint)
        assert len(set(same)) == 1
        sae.threshold.data[FEATURES[0]] += 1
        sae.save_model(tmp_path / "c")
        others = [
            SAEFeatures(str(tmp_path / "c"), FEATURES),
            SAEFeatures(str(tmp_path / "a"), FEATURES[::-1]),
            SAEFeatures(str(tmp_path / "a"), FEATURES, pooling="mean"),
            SAEFeatures(str(tmp_path / "a"), FEATURES, hook_name="model.layers.0"),
            SAEFeatures(str(tmp_path / "a"), FEATURES, dtype="bfloat16"),
            SAEFeatures(str(tmp_path / "a"), "all"),
        ]
        assert len({readout.load().fingerprint for readout in others} | set(same)) == len(others) + 1


class TestData:
    def test_round_trips(self, tmp_path):
        readout = SAEFeatures(tmp_path, np.array([3, 1]), sae_id="x", pooling="freq", hook_name="model.layers.1")
        assert readout.features == (3, 1)
        assert readout.to_dict() == {
            "type": "sae_features",
            "sae": str(tmp_path),
            "features": [3, 1],
            "sae_id": "x",
            "pooling": "freq",
            "hook_name": "model.layers.1",
        }
        assert readout_from_dict(json.loads(json.dumps(readout.to_dict()))) == readout
        assert pickle.loads(pickle.dumps(readout)) == readout
        assert len({readout, readout_from_dict(readout.to_dict())}) == 1
        everything = SAEFeatures("release", "all")
        assert everything.to_dict() == {"type": "sae_features", "sae": "release", "features": "all"}
        assert readout_from_dict(everything.to_dict()) == everything

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"features": []}, "`features` is empty"),
            ({"features": "some"}, "must be a list of indices or 'all', got 'some'"),
            ({"features": 7}, "must be a list of indices or 'all', got 7"),
            ({"features": [1, 2, 1]}, "Feature 1 is listed more than once"),
            ({"features": [-1]}, "whole number from 0 up, got -1"),
            ({"features": [True]}, "whole number from 0 up, got True"),
            ({"features": [1.0]}, "whole number from 0 up, got 1.0"),
            ({"features": [1], "pooling": "sum"}, "Unknown pooling 'sum'. Choose one of max, mean, freq"),
            ({"features": [1], "dtype": "int8"}, "Unknown dtype 'int8'"),
        ],
    )
    def test_bad_values(self, kwargs, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            SAEFeatures("sae", **kwargs)


class TestLoading:
    def test_feature_outside(self, tmp_path):
        make_sae("standard").save_model(tmp_path)
        with pytest.raises(ValueError, match=r"Feature 40 is outside the SAE .* has 40 features \(0 to 39\)"):
            SAEFeatures(str(tmp_path), [3, 40]).load()

    def test_hook_name(self, tmp_path):
        make_sae("standard", metadata={"hf_hook_name": "model.layers.1.output"}).save_model(tmp_path / "both")
        assert SAEFeatures(str(tmp_path / "both"), [1]).load().hook_name == "model.layers.1.output"
        assert SAEFeatures(str(tmp_path / "both"), [1], hook_name="mine").load().hook_name == "mine"
        make_sae("standard", metadata={"hook_name": None}).save_model(tmp_path / "none")
        with pytest.raises(ValueError, match="names no hook point"):
            SAEFeatures(str(tmp_path / "none"), [1]).load()

    def test_an_sae_in_a_folder_of_saes(self, tmp_path):
        make_sae("standard").save_model(tmp_path / "layer_1" / "wide")
        assert SAEFeatures(str(tmp_path), [1], sae_id="layer_1/wide").load().d_in == D_IN

    def test_folders_that_are_none(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"no SAE folder 'missing'"):
            SAEFeatures("./missing", [1]).load()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "model.safetensors").touch()
        with pytest.raises(ValueError, match=r"lacks cfg.json and sae_weights.safetensors.*holds model.safetensors"):
            SAEFeatures("other", [1]).load()
        make_sae("standard").save_model("damaged")
        (tmp_path / "damaged" / "sae_weights.safetensors").write_bytes(b"no weights")
        with pytest.raises(ValueError, match="Cannot load the SAE in 'damaged'"):
            SAEFeatures("damaged", [1]).load()

    def test_unfolded_scaling_warns(self, tmp_path):
        make_sae("standard", normalize_activations="expected_average_only_in").save_model(tmp_path)
        with pytest.warns(UserWarning, match="read unscaled"):
            SAEFeatures(str(tmp_path), [1]).load()

    def test_unknown_release_and_sae_id(self):
        with pytest.raises(ValueError, match=r"Near matches: .*gemma-scope-2b-pt-res-canonical"):
            SAEFeatures("gemma-scope-2b-pt-res-canonicl", [1], sae_id="x").load()
        with pytest.raises(
            ValueError, match=r"no SAE with sae_id 'layer_20/width_16k/canon'.*layer_20/width_16k/canonical"
        ):
            SAEFeatures("gemma-scope-2b-pt-res-canonical", [1], sae_id="layer_20/width_16k/canon").load()
        with pytest.raises(ValueError, match="no SAE with sae_id None"):
            SAEFeatures("gemma-scope-2b-pt-res-canonical", [1]).load()
        with pytest.raises(ValueError, match="pass the SAE's folder in it as `sae_id=`"):
            SAEFeatures("someone/repository", [1]).load()

    def test_pickled_weights_are_refused(self):
        directory = get_pretrained_saes_directory()
        release = next(name for name, entry in directory.items() if entry.conversion_func == "goodfire")
        with pytest.raises(ValueError, match="keeps its weights as pickles"):
            SAEFeatures(release, [1], sae_id=next(iter(directory[release].saes_map))).load()

    def test_no_network(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ValueError, match=r"Cannot download the SAE .* pass its folder"):
            load_sae("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")

    def test_temporal(self, tmp_path):
        make_sae("temporal", n_heads=2, bottleneck_factor=1).save_model(tmp_path)
        with pytest.raises(ValueError, match="Temporal SAEs read a token together with its context"):
            SAEFeatures(str(tmp_path), [1]).load()
