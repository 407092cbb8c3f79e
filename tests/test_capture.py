"""Hook points on every supported architecture, from tiny random models."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

from shapedpo.capture import LENS_HOOKS, CapturePass, Site, activation, decoder_layers, resolve_site
from shapedpo.readouts.base import ActivationReader


HIDDEN, LAYERS, VOCAB = 32, 3, 50
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,  # so that the heads together are not as wide as the residual stream
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEOX = {**_COMMON, "max_position_embeddings": 64}
ARCHITECTURES = {
    "llama": ("llama", _COMMON),
    "mistral": ("mistral", _COMMON),
    "gemma": ("gemma", _COMMON),
    "gemma2": ("gemma2", _COMMON),
    "gemma3": ("gemma3_text", _COMMON),
    "gemma3-multimodal": ("gemma3", {}),
    "qwen2": ("qwen2", _COMMON),
    "qwen3": ("qwen3", _COMMON),
    "olmo": ("olmo", _COMMON),
    "olmo2": ("olmo2", _COMMON),
    "olmo3": ("olmo3", _COMMON),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}),
    "neox-parallel": ("gpt_neox", {**_NEOX, "use_parallel_residual": True}),
    "neox-sequential": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
}
HUGGING_FACE_LAYER = {
    "gpt2": "transformer.h",
    "neox-parallel": "gpt_neox.layers",
    "neox-sequential": "gpt_neox.layers",
    "gemma3-multimodal": "model.language_model.layers",
}


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, fields = ARCHITECTURES[name]
    if name == "gemma3-multimodal":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = AutoConfig.for_model(
            "gemma3",
            text_config=_COMMON,
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=1,
            image_token_index=VOCAB - 1,
        )
        model = Gemma3ForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    for parameter in model.parameters():  # initial norms are the identity, which would hide a wrong one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


class Raw(ActivationReader):
    """Gives the activations of the last unmasked token: a reader without weights."""

    pooling = "max"
    fingerprint = "raw"

    def __init__(self, hook_name: str, width: int = HIDDEN) -> None:
        self.hook_name, self.d_in, self.n_features = hook_name, width, width

    def to(self, device):
        return self

    def encode(self, x):
        return x.float()

    def directions(self):
        return torch.eye(self.d_in)


def read_all(model: nn.Module, ids: torch.Tensor, hook_names: list[str]) -> dict[str, torch.Tensor]:
    """Activations at all tokens: a capture pass per token would do, one with a mask per token is shorter."""
    readers = [Raw(name, resolve_site(model, name).width) for name in hook_names for _ in range(ids.shape[1])]
    masks = [torch.arange(ids.shape[1]).eq(t).expand_as(ids) for _ in hook_names for t in range(ids.shape[1])]
    with torch.no_grad(), CapturePass(model, readers, masks) as capture:
        model(input_ids=ids)
    tokens = ids.shape[1]
    return {
        name: torch.stack(capture.scores[i * tokens : (i + 1) * tokens], dim=1) for i, name in enumerate(hook_names)
    }


def assert_no_hooks(model: nn.Module) -> None:
    # Only ours: transformers puts hooks of its own on layers, and leaves them, once hidden states are asked for.
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [hook for hook in hooks if hook.__module__ == "shapedpo.capture"]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB - 1, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ARCHITECTURES)
class TestArchitectures:
    def test_residual_stream_is_hidden_states(self, name, ids):
        model = make_model(name)
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        lens = [f"blocks.{k}.hook_resid_{side}" for k in range(LAYERS) for side in ("pre", "post")]
        path = HUGGING_FACE_LAYER.get(name, "model.layers")
        own = [f"{path}.{k}{side}" for k in range(LAYERS) for side in ("", ".output", ".input")]
        read = read_all(model, ids, lens + own)
        for k in range(LAYERS):
            for hook in (f"blocks.{k}.hook_resid_pre", f"{path}.{k}.input"):
                torch.testing.assert_close(read[hook], hidden[k], atol=1e-5, rtol=1e-5)
        for k in range(LAYERS - 1):  # the last entry of hidden_states is after the final norm
            for hook in (f"blocks.{k}.hook_resid_post", f"{path}.{k}", f"{path}.{k}.output"):
                torch.testing.assert_close(read[hook], hidden[k + 1], atol=1e-5, rtol=1e-5)
        last = f"blocks.{LAYERS - 1}.hook_resid_post"
        assert not torch.allclose(read[last], hidden[-1], atol=1e-3)
        torch.testing.assert_close(read[last], read[f"{path}.{LAYERS - 1}"])
        assert_no_hooks(model)

    def test_the_block_adds_attention_and_mlp(self, name, ids):
        model = make_model(name)
        sequential = name != "neox-parallel"
        hooks = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
        hooks += ["hook_resid_mid"] if sequential else []
        for k in range(LAYERS):
            pre, attention, mlp, post, *mid = read_all(model, ids, [f"blocks.{k}.{h}" for h in hooks]).values()
            torch.testing.assert_close(pre + attention + mlp, post, atol=1e-5, rtol=1e-5)
            if sequential:
                torch.testing.assert_close(pre + attention, mid[0], atol=1e-5, rtol=1e-5)
            assert attention.abs().max() > 1e-3
            assert mlp.abs().max() > 1e-3

    def test_hook_z_is_what_the_output_projection_takes(self, name, ids):
        model = make_model(name)
        site = resolve_site(model, "blocks.1.attn.hook_z")
        assert site.side == "input"
        assert site.width == (HIDDEN if name in ("gpt2", "neox-parallel", "neox-sequential") else 4 * 6)
        z = read_all(model, ids, ["blocks.1.attn.hook_z"])["blocks.1.attn.hook_z"]
        inner = next(
            m for key, m in decoder_layers(model)[1].named_children() if key in ("self_attn", "attn", "attention")
        )
        seen = []
        handle = inner.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        model(input_ids=ids)
        handle.remove()
        torch.testing.assert_close(site.module(z), seen[0], atol=1e-5, rtol=1e-5)

    def test_layers(self, name, ids):
        model = make_model(name)
        assert len(decoder_layers(model)) == LAYERS
        # The backbone alone has the same layers under other names.
        backbone = model.base_model
        assert resolve_site(backbone, "blocks.2.hook_resid_post").module is decoder_layers(model)[2]
        with pytest.raises(ValueError, match=rf"names layer 3, but the model has {LAYERS} layers \(0 to 2\)"):
            resolve_site(model, "blocks.3.hook_resid_post")


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.1",
            "layers.1",
            "base_model.model.model.layers.1",
            "model.language_model.layers.1.output",
            "language_model.model.layers.1",
        ],
    )
    @pytest.mark.parametrize("architecture", ["llama", "gemma3-multimodal"])
    def test_other_wrappers(self, architecture, name):
        model = make_model(architecture)
        assert resolve_site(model, name) == Site(decoder_layers(model)[1], "output", HIDDEN)

    def test_peft(self):
        model = make_model("llama")
        layer, projection = model.model.layers[1], model.model.layers[1].self_attn.o_proj
        wrapped = get_peft_model(model, LoraConfig(target_modules=["o_proj"], r=2))
        for name in ("model.layers.1", "base_model.model.model.layers.1", "blocks.1.hook_resid_post"):
            assert resolve_site(wrapped, name).module is layer
        site = resolve_site(wrapped, "blocks.1.attn.hook_z")
        assert site.module.base_layer is projection
        assert site.width == 24

    def test_widths_of_linear_modules(self):
        llama, gpt2 = make_model("llama"), make_model("gpt2")
        assert resolve_site(llama, "model.layers.0.mlp.down_proj.input").width == 48
        assert resolve_site(llama, "model.layers.0.mlp.down_proj").width == HIDDEN
        assert resolve_site(gpt2, "transformer.h.0.mlp.c_proj.input").width == 4 * HIDDEN
        assert resolve_site(gpt2, "transformer.h.0.mlp.c_fc").width == 4 * HIDDEN

    def test_an_exact_name_wins(self):
        model = make_model("gemma3-multimodal")
        name = next(key for key, _ in model.named_modules() if key.endswith("encoder.layers.0"))
        assert resolve_site(model, name).module is model.get_submodule(name)

    @pytest.mark.parametrize("name", ["model.layers.3", "model.layers.12.mlp.output", "layers.3"])
    def test_layer_outside_the_model(self, name):
        with pytest.raises(ValueError, match="but the model has 3 layers"):
            resolve_site(make_model("llama"), name)

    def test_unknown_names_list_what_there_is(self):
        model = make_model("llama")
        with pytest.raises(ValueError, match=r"no hook point 'model.layers.1.mpl'.*model\.layers\.1\.mlp"):
            resolve_site(model, "model.layers.1.mpl")
        with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_post") as error:
            resolve_site(model, "blocks.1.mlp.hook_post")
        assert all(name in str(error.value) for name in LENS_HOOKS)
        with pytest.raises(ValueError, match="no hook point"):
            resolve_site(model, "")
        with pytest.raises(ValueError, match="no hook point"):
            resolve_site(model, ".output")
        with pytest.raises(ValueError, match="hook_resid_mid"):
            resolve_site(make_model("neox-parallel"), "blocks.1.hook_resid_mid")

    def test_no_decoder_layers(self):
        with pytest.raises(ValueError, match="Cannot find the decoder layers of Linear"):
            decoder_layers(nn.Linear(2, 2))


class TestActivation:
    def test_tensors_and_tuples(self):
        x, y = torch.ones(1), torch.zeros(1)
        assert activation("output", (), {}, x) is x
        assert activation("output", (), {}, (x, y)) is x
        assert activation("input", (x, y), {}) is x
        assert activation("input", (), {"attention_mask": y, "hidden_states": x}) is x
        assert activation("input", (), {"x": x}) is x

    @pytest.mark.parametrize(("side", "output"), [("output", None), ("output", ()), ("input", None)])
    def test_nothing_to_read(self, side, output):
        with pytest.raises(TypeError, match=f"Expected a tensor as the module's {side}"):
            activation(side, (), {}, output)


class TestCapturePass:
    hook = "blocks.1.hook_resid_post"

    def test_ragged_masks_and_empty_rows(self, ids):
        model = make_model("llama")
        mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        with CapturePass(model, [Raw(self.hook), Raw("model.layers.1")], [mask, mask.bool()]) as capture:
            model(input_ids=ids)
        assert not capture.scores[0].requires_grad
        torch.testing.assert_close(capture.scores[0], torch.stack([hidden[0, [1, 3, 4]].amax(0), torch.zeros(HIDDEN)]))
        torch.testing.assert_close(capture.scores[0], capture.scores[1])

    def test_readers_of_one_site_share_a_hook(self, ids):
        model, mask = make_model("llama"), torch.ones_like(torch.zeros(2, 5), dtype=torch.bool)
        readers = [Raw(self.hook), Raw("model.layers.1.output"), Raw("blocks.2.hook_resid_pre")]
        with CapturePass(model, readers, [mask] * 3) as capture:
            assert len(model.model.layers[1]._forward_hooks) == 1
            assert len(model.model.layers[2]._forward_pre_hooks) == 1
            model(input_ids=ids)
        torch.testing.assert_close(capture.scores[0], capture.scores[2])

    def test_leaves_the_model_as_it_was(self, ids):
        model, mask = make_model("llama"), torch.ones(2, 5, dtype=torch.bool)
        plain = model(input_ids=ids).logits
        with CapturePass(model, [Raw(self.hook)], [mask]):
            read = model(input_ids=ids).logits
        assert torch.equal(plain, read)
        read.sum().backward()  # the policy's own graph is whole
        assert all(parameter.grad is not None for parameter in model.model.layers.parameters())

    def test_hooks_go_after_an_exception(self, ids):
        model, mask = make_model("llama"), torch.ones(2, 5, dtype=torch.bool)
        with pytest.raises(KeyError, match="mine"), CapturePass(model, [Raw(self.hook)], [mask]):
            raise KeyError("mine")
        assert_no_hooks(model)
        with pytest.raises(IndexError), CapturePass(model, [Raw(self.hook)], [mask]):
            model(input_ids=ids + VOCAB)
        assert_no_hooks(model)

    def test_a_second_forward_is_an_error(self, ids):
        model, mask = make_model("llama"), torch.ones(2, 5, dtype=torch.bool)
        with CapturePass(model, [Raw(self.hook)], [mask]) as capture:
            model(input_ids=ids)
            with pytest.raises(RuntimeError, match="reached twice"):
                model(input_ids=ids)
        assert_no_hooks(model)
        with capture:  # but a pass can be made again
            model(input_ids=ids)

    def test_gradient_checkpointing(self, ids):
        model, mask = make_model("llama"), torch.ones(2, 5, dtype=torch.bool)
        with CapturePass(model, [Raw(self.hook)], [mask]) as plain:
            model(input_ids=ids)
        for reentrant in (True, False):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
            with CapturePass(model, [Raw(self.hook)], [mask]) as capture:
                loss = model(input_ids=ids, use_cache=False).logits.sum()
            loss.backward()  # runs the layers again, hooks gone
            torch.testing.assert_close(plain.scores[0], capture.scores[0])

    def test_no_forward_is_an_error(self):
        model, mask = make_model("llama"), torch.ones(2, 5, dtype=torch.bool)
        with pytest.raises(RuntimeError, match="Nothing was read at"), CapturePass(model, [Raw(self.hook)], [mask]):
            pass
        assert_no_hooks(model)
        with pytest.raises(RuntimeError, match="Nothing was read"):
            _ = CapturePass(model, [Raw(self.hook)], [mask]).scores

    def test_shapes_that_do_not_fit(self, ids):
        model = make_model("llama")
        for reader, mask in [
            (Raw(self.hook, width=16), torch.ones(2, 5)),
            (Raw(self.hook), torch.ones(2, 6)),
            (Raw(self.hook), torch.ones(3, 5)),
        ]:
            message = r"activations at 'blocks\.1\.hook_resid_post' have shape \(2, 5, 32\)"
            with pytest.raises(ValueError, match=message), CapturePass(model, [reader], [mask.bool()]):
                model(input_ids=ids)
            assert_no_hooks(model)
        with pytest.raises(ValueError, match="Each reader needs a mask"):
            CapturePass(model, [Raw(self.hook)], [])

    def test_virtual_tokens_come_before_the_mask(self, ids):
        model = make_model("llama")
        wrapped = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
        mask = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
        seen = []
        handle = model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
        with torch.no_grad(), CapturePass(wrapped, [Raw(self.hook)], [mask]) as capture:
            wrapped(input_ids=ids, attention_mask=torch.ones_like(ids))
        handle.remove()
        assert seen[0].shape == (2, 9, HIDDEN)
        torch.testing.assert_close(capture.scores[0], torch.stack([seen[0][0, 4], seen[0][1, 8]]))

    def test_adapter_is_read_when_on_and_not_when_off(self, ids):
        model, mask = make_model("llama"), torch.ones(2, 5, dtype=torch.bool)
        with CapturePass(model, [Raw(self.hook)], [mask]) as plain:
            model(input_ids=ids)
        wrapped = get_peft_model(model, LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False)).eval()
        with CapturePass(wrapped, [Raw(self.hook)], [mask]) as on:
            wrapped(input_ids=ids)
        with CapturePass(wrapped, [Raw(self.hook)], [mask]) as off, wrapped.disable_adapter():
            wrapped(input_ids=ids)
        torch.testing.assert_close(off.scores[0], plain.scores[0])
        assert not torch.allclose(on.scores[0], plain.scores[0], atol=1e-3)

    def test_fully_sharded(self, ids, tmp_path):
        model, mask = make_model("llama"), torch.ones(2, 5, dtype=torch.bool)
        hooks = [self.hook, "blocks.1.attn.hook_z", "blocks.2.hook_resid_pre"]
        readers = [Raw(name, resolve_site(model, name).width) for name in hooks]
        with torch.no_grad(), CapturePass(model, readers, [mask] * 3) as plain:
            model(input_ids=ids)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            for layer in model.model.layers:
                torch.distributed.fsdp.fully_shard(layer)
            torch.distributed.fsdp.fully_shard(model)
            with torch.no_grad(), CapturePass(model, readers, [mask] * 3) as sharded:
                model(input_ids=ids)
        finally:
            torch.distributed.destroy_process_group()
        for before, after in zip(plain.scores, sharded.scores, strict=True):
            torch.testing.assert_close(before, after)
