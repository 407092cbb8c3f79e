"""Bad input: an error at construction that names the concept, what was found and what is expected; or a run that stops in time."""

from __future__ import annotations

import copy
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from shapedpo import (
    Concept,
    Direction,
    Gate,
    Mask,
    Project,
    Regex,
    SAEFeatures,
    ShapedDPOTrainer,
    TextFunction,
    load_concepts,
)
from tests.helpers import (
    HIDDEN,
    LAYERS,
    arguments,
    build,
    load_model,
    pairs,
    sae_path,
    save_sae,
    shaped,
    tokenizer,
    train,
    vector,
    watching,
)


def refused(text: str, make: Any, kind: type[Exception] = ValueError) -> str:
    """Check that `make` raises, with all of these parts (between `...`) in the text, in this order."""
    with pytest.raises(kind) as error:
        make()
    pattern = ".*".join(re.escape(part) for part in text.split("..."))
    assert re.search(pattern, str(error.value), re.DOTALL), f"expected {text!r}, got: {error.value}"
    return str(error.value)


def features(sae: Path | None = None, indices: Any = (3,), **fields: Any) -> Concept:
    return Concept("goblin", SAEFeatures(str(sae or sae_path()), indices, **fields))


def goblin(*args: Any, **fields: Any) -> Concept:
    return Concept("goblin", Regex("goblin"), *args, **fields)


class TestReadouts:
    @pytest.mark.parametrize("index", [48, 100_000])
    def test_feature_outside_the_sae(self, index):
        refused(
            f"Concept 'goblin': ...Feature {index} is outside the SAE...48 features (0 to 47)",
            lambda: shaped(features(indices=[3, index])),
        )

    @pytest.mark.parametrize("indices", [[], [-1], [1.5], [True], [3, 3], "every", 7, None])
    def test_no_feature_indices(self, indices):
        data = {"name": "goblin", "readout": {"type": "sae_features", "sae": "x", "features": indices}}
        refused("Concept 'goblin': ", lambda: shaped(data))

    def test_width_of_the_sae(self):
        refused(
            f"Concept 'goblin': ...16 wide...'blocks.1.hook_resid_post' of LlamaForCausalLM is {HIDDEN} wide",
            lambda: shaped(features(save_sae("narrow", d_in=16))),
        )

    def test_width_of_a_direction(self):
        way = Concept("way", Direction(torch.ones(HIDDEN + 1), layer=0))
        refused(f"Concept 'way': ...{HIDDEN + 1} wide...is {HIDDEN} wide", lambda: shaped(way))

    @pytest.mark.parametrize("peft", [False, True])
    def test_a_layer_that_the_model_lacks(self, peft):
        from peft import LoraConfig

        options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])} if peft else {}
        way = Concept("way", Direction(vector(), layer=LAYERS))
        refused(
            f"Concept 'way': ...layer {LAYERS}...{LAYERS} layers (0 to {LAYERS - 1})",
            lambda: shaped(way, trainer=options),
        )

    @pytest.mark.parametrize("hook", ["model.layers.1.mpl", "blocks.1.hook_nonsense", "encoder.layer.1"])
    def test_a_hook_that_the_model_lacks(self, hook):
        text = refused(f"Concept 'goblin': ...{hook!r}", lambda: shaped(features(hook_name=hook)))
        assert "model.layers" in text or "hook_resid_post" in text  # what there is instead

    def test_another_family(self, caplog):
        """Only names say so: a warning, and the run goes on."""
        with caplog.at_level(logging.WARNING, logger="shapedpo"):
            shaped(features(save_sae("gemma", model_name="gemma-2-2b"))).train()
        (text,) = [record.getMessage() for record in caplog.records if "gemma" in record.getMessage()]
        for part in ("Concept 'goblin'", "'gemma-2-2b'", "gemma 2", "llama"):
            assert part in text
        caplog.clear()
        shaped(features())
        assert not [record for record in caplog.records if "family" in record.getMessage()]

    def test_missing_files(self, tmp_path):
        refused("Concept 'goblin': ...no SAE folder", lambda: shaped(features(tmp_path / "nowhere")))
        refused("Concept 'goblin': ...lacks", lambda: shaped(features(tmp_path)))
        way = Concept("way", Direction(path=str(tmp_path / "none.safetensors"), layer=0))
        refused("Concept 'way': ...There is no file", lambda: shaped(way))

    def test_pickles_are_not_loaded(self, tmp_path):
        path = tmp_path / "way.pt"
        torch.save({"direction": vector()}, path)
        refused(
            "Concept 'way': ...not a safetensors file",
            lambda: shaped(Concept("way", Direction(path=str(path), layer=0))),
        )

    def test_pooling(self):
        for readout in (
            {"type": "direction", "path": "x", "pooling": "median"},
            {"type": "sae_features", "sae": "x", "features": [1], "pooling": "median"},
        ):
            data = {"name": "goblin", "readout": readout}
            refused("Concept 'goblin': ...'median'...max, mean, freq", lambda data=data: shaped(data))

    @pytest.mark.parametrize(
        ("readout", "text"),
        [
            (
                {"type": "probe"},
                "'probe'...attention_probe, direction, function, lab, linear_probe, regex, sae_features",
            ),
            ({"pattern": "x"}, "None...direction"),
            ({"type": "regex"}, "'pattern'"),
            ({"type": "regex", "pattern": "x", "mode": 1}, "'mode'...pattern, flags"),
            ({"type": "regex", "pattern": "("}, "'('...not valid"),
            ({"type": "regex", "pattern": 7}, "7"),
            ({"type": "regex", "pattern": "x", "flags": 2}, "`flags` must be a text...got 2"),
            ({"type": "function", "function": "no.such:thing"}, "no.such:thing"),
            ({"type": "function", "function": "thing"}, "'thing'"),
            ("goblin", "'goblin'"),
        ],
    )
    def test_descriptions(self, readout, text):
        refused(f"Concept 'odd': ...{text}", lambda: shaped({"name": "odd", "readout": readout}))

    def test_no_readout(self):
        refused("Concept 'goblin': `readout` is missing", lambda: shaped({"name": "goblin"}))
        refused("Concept 'goblin': ...`readout`...3", lambda: Concept("goblin", 3))  # type: ignore[arg-type]

    def test_a_function_that_gives_no_number(self):
        trainer = shaped(Concept("odd", TextFunction(lambda text: "0.5", name="half")))  # type: ignore[arg-type,return-value]
        refused("half must return a number, got '0.5'", trainer.train)


class TestConcepts:
    @pytest.mark.parametrize("name", ["", " x", "a/b", "-", "x\n", None, 3])
    def test_name(self, name):
        refused(f"name...{name!r}", lambda: Concept(name, Regex("x")))

    def test_action(self):
        refused(
            "Concept 'goblin': ...'supress'. Did you mean 'suppress'?...watch, suppress, amplify",
            lambda: goblin("supress", strength=1.0),
        )

    def test_method(self):
        refused(
            "Concept 'goblin': ...'rewards'...mask, project, residual, reward, reweight...'reward'",
            lambda: goblin("suppress", "rewards", strength=1.0),
        )
        refused(
            "Concept 'goblin': ...'mask'...'share'...fraction, threshold",
            lambda: goblin("suppress", {"name": "mask", "share": 1}),
        )
        refused(
            "Concept 'goblin': ...'reward'...'x'...none", lambda: goblin("suppress", {"name": "reward", "x": 1}, 1.0)
        )
        refused("Concept 'goblin': ...None", lambda: goblin("suppress", {"fraction": 1}))
        refused("Concept 'goblin': ...5", lambda: goblin("suppress", 5))
        refused("Concept 'goblin': ...'mask' is given as a class...Mask(...)", lambda: goblin("suppress", Mask))
        refused("Concept 'goblin': ...'project' cannot amplify...suppress", lambda: goblin("amplify", "project"))

    @pytest.mark.parametrize("method", ["reward", "reweight"])
    @pytest.mark.parametrize("action", ["suppress", "amplify"])
    def test_strength(self, method, action):
        refused(f"Concept 'goblin': ...{method!r} needs a `strength`", lambda: goblin(action, method))
        for bad in (0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, True, False, "2", [1.0], 1j):
            refused(
                f"Concept 'goblin': ...`strength` must be a number above 0 and finite, got {bad!r}",
                lambda bad=bad: goblin(action, method, bad),
            )

    def test_hold(self):
        refused(
            "Concept 'goblin': `strength` is given...'hold' finds it by itself, got 1.0...Leave it out",
            lambda: goblin("hold", strength=1.0),
        )
        for method in ("reweight", {"name": "mask", "fraction": 0.1}, "project"):
            name = method if isinstance(method, str) else method["name"]
            refused(
                f"Concept 'goblin': method {name!r} cannot hold. It can suppress", lambda m=method: goblin("hold", m)
            )
        for bad in (math.nan, math.inf, "high", None, True):
            refused(
                f"Concept 'goblin': ...`target` must be a number finite, in standard deviations of the score, got {bad!r}",
                lambda bad=bad: goblin("hold", target=bad),
            )

    @pytest.mark.parametrize(("action", "strength"), [("watch", None), ("suppress", 1.0), ("amplify", 1.0)])
    def test_target_without_hold(self, action, strength):
        refused(
            f"Concept 'goblin': `target` is given...{action!r}...Set action='hold'",
            lambda: goblin(action, strength=strength, target=0.5),
        )

    @pytest.mark.parametrize("method", [{"name": "mask", "fraction": 0.1}, "project"])
    def test_strength_where_none_is_taken(self, method):
        name = method if isinstance(method, str) else method["name"]
        refused(f"Concept 'goblin': ...{name!r} takes no `strength`, got 1.0", lambda: goblin("suppress", method, 1.0))

    def test_watching_shapes_nothing(self):
        refused("Concept 'goblin': `strength` is given...'watch'", lambda: goblin(strength=1.0))
        refused("Concept 'goblin': `gate` is given...'watch'", lambda: goblin(gate=Gate(column="creative")))

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({}, "`fraction` or `threshold`...None...None"),
            ({"fraction": 0.1, "threshold": 1.0}, "`fraction` or `threshold`...0.1...1.0"),
            ({"fraction": 0}, "`fraction` must be a number above 0 and below 1, got 0"),
            ({"fraction": 1.0}, "`fraction`...1.0"),
            ({"fraction": 5}, "`fraction`...5"),
            ({"fraction": math.nan}, "`fraction`...nan"),
            ({"threshold": -1.0}, "`threshold`...above 0 and finite, got -1.0"),
            ({"threshold": "high"}, "`threshold`...'high'"),
        ],
    )
    def test_mask(self, options, text):
        refused(f"Concept 'goblin': ...{text}", lambda: goblin("suppress", {"name": "mask", **options}))

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"space": "weights"}, "`space`...'weights'"),
            ({"layers": [1]}, "`layers`...'residual'"),
            ({"space": "residual", "layers": []}, "`layers`...[]"),
            ({"space": "residual", "layers": [-1]}, "`layers`...[-1]"),
            ({"space": "residual", "layers": 1}, "`layers`...1"),
        ],
    )
    def test_project(self, options, text):
        refused(f"Concept 'goblin': ...{text}", lambda: goblin("suppress", {"name": "project", **options}))

    @pytest.mark.parametrize(
        ("gate", "text"),
        [
            ({}, "`column`...`concept`"),
            ({"column": "a", "concept": "b"}, "`column`...`concept`...'a'...'b'"),
            ({"concept": "b", "threshold": math.inf}, "`threshold`...finite, got inf"),
            ({"concept": "b", "threshold": math.nan}, "`threshold`...finite, got nan"),
            ({"column": "a", "above": 1}, "'above'...column, concept, threshold"),
        ],
    )
    def test_gate(self, gate, text):
        refused(f"Concept 'goblin': ...{text}", lambda: goblin("suppress", strength=1.0, gate=gate))

    @pytest.mark.parametrize("gate", ["creative", 3, True])
    def test_a_gate_of_another_kind(self, gate):
        refused("Concept 'goblin': ...gate", lambda: goblin("suppress", strength=1.0, gate=gate))

    def test_unknown_fields(self):
        data = {"name": "goblin", "readout": {"type": "regex", "pattern": "x"}, "stength": 2.0}
        refused("Concept 'goblin'...'stength'. Did you mean 'strength'?...target", lambda: shaped(data))
        refused(
            "unknown field 'nam'. Did you mean 'name'?", lambda: shaped({"nam": "goblin", "readout": data["readout"]})
        )
        refused("needs a `name`", lambda: shaped({"readout": data["readout"]}))

    def test_two_of_one_name(self):
        refused("Concept 'goblin' is there 2 times", lambda: shaped(goblin(), Concept("other", Regex("x")), goblin()))

    def test_a_single_one_or_none(self):
        for concepts in (goblin(), goblin().to_dict()):
            refused("must be a list", lambda concepts=concepts: build(ShapedDPOTrainer, concepts=concepts))
        refused("A concept must be a mapping...'goblin'", lambda: build(ShapedDPOTrainer, concepts=["goblin"]))

    def test_given_twice(self):
        args = arguments(concepts=[goblin()])
        refused(
            "both as `concepts=` and in `args.concepts`", lambda: build(ShapedDPOTrainer, args, concepts=[goblin()])
        )


class TestFiles:
    def write(self, tmp_path: Path, text: str) -> Path:
        path = tmp_path / "concepts.yaml"
        path.write_text(text)
        return path

    @pytest.mark.parametrize(
        "text", ["", "concepts:\n", "concepts: []\n", "[]\n", "other: 1\n", "concepts: goblin\n", "goblin\n", "3"]
    )
    def test_no_concepts(self, tmp_path, text):
        path = self.write(tmp_path, text)
        refused(f"{path}...at least one concept under `concepts:`", lambda: load_concepts(path))
        refused(f"{path}", lambda: build(ShapedDPOTrainer, concepts=str(path)))

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("concepts:\n  - name: a\n    readout: {type: regex, pattern: 'x}\n", 3),
            ("concepts:\n  - name: a\n   readout: x\n", 3),
            ("concepts:\n  - name: a\n\treadout: x\n", 3),
            ("concepts: [1, 2\nother: 3", 2),
        ],
    )
    def test_malformed(self, tmp_path, text, line):
        path = self.write(tmp_path, text)
        message = refused(f"{path}...not valid YAML", lambda: load_concepts(path))
        (found,) = re.findall(r"line (\d+)", message)
        assert int(found) in (line, line + 1)  # YAML notices some mistakes a line late

    def test_not_text(self, tmp_path):
        path = tmp_path / "concepts.yaml"
        path.write_bytes(b"\xff\xfe\x00concepts")
        refused(f"{path}...not valid YAML", lambda: load_concepts(path))

    def test_missing(self, tmp_path):
        refused(
            "no file of concepts...nowhere.yaml", lambda: load_concepts(tmp_path / "nowhere.yaml"), FileNotFoundError
        )
        refused("nowhere.yaml", lambda: arguments(concepts=str(tmp_path / "nowhere.yaml")), FileNotFoundError)

    def test_a_concept_that_does_not_fit(self, tmp_path):
        text = "concepts:\n  - name: goblin\n    readout: {type: regex, pattern: x}\n    action: hide\n"
        path = self.write(tmp_path, text)
        refused(f"{path}: Concept 'goblin': ...'hide'", lambda: load_concepts(path))
        path = self.write(tmp_path, "- goblin\n")
        refused(f"{path}: ...'goblin'", lambda: load_concepts(path))


class TestData:
    def test_gate_column(self):
        concept = goblin("suppress", strength=1.0, gate=Gate(column="creative"))
        refused("Concept 'goblin': ...gate column 'creative'...prompt, chosen, rejected", lambda: shaped(concept))
        for stream in (False, True):
            data = pairs(creative=["yes", "no"] * 12)
            data = data.to_iterable_dataset() if stream else data
            refused("'creative'...between 0 and 1, got 'yes'", lambda data=data: shaped(concept, data=data))

    def test_gate_values_further_down(self):
        """Not only the first row is looked at: a run would stop hours in."""
        concept = goblin("suppress", strength=1.0, gate=Gate(column="creative"))
        refused("'creative'...got 7.0", lambda: shaped(concept, data=pairs(creative=[1.0] * 23 + [7.0])))

    def test_gate_concept(self):
        concept = goblin("suppress", strength=1.0, gate=Gate(concept="poetic"))
        refused("Concept 'goblin': ...'poetic'...goblin, seen", lambda: shaped(concept, Concept("seen", Regex("x"))))

    @pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
    def test_weights(self, weight):
        data = pairs(weight=[1.0] * 23 + [weight])
        refused(f"'weight'...finite and not negative, got {weight!r}", lambda: shaped(goblin(), data=data))
        stream = data.to_iterable_dataset()
        trainer = shaped(goblin(), data=stream, max_steps=10, calibration_size=4)
        refused("'weight'...finite and not negative", trainer.train)

    def test_weights_that_are_no_numbers(self):
        refused("'weight'...'high'", lambda: shaped(data=pairs(weight=["high"] * 24)))

    def test_weight_column(self):
        refused("no weight column 'trust'...prompt, chosen, rejected", lambda: shaped(weight_column="trust"))

    def test_no_rows(self):
        refused("`train_dataset` has no rows", lambda: shaped(goblin(), data=pairs(2).select([])))
        text = "No row...fills `max_length=2`...keep_end"
        for fields in ({}, {"precompute_ref_log_probs": True}):
            refused(text, lambda fields=fields: shaped(goblin(), max_length=2, **fields))

    def test_a_gate_that_never_opens(self, caplog):
        concept = goblin("suppress", strength=1.0, gate=Gate(column="creative"))
        with caplog.at_level(logging.WARNING, logger="shapedpo"):
            shaped(concept, data=pairs(creative=[False] * 24)).train()
        assert "Concept 'goblin': its gate is 0 on all 24 pairs" in caplog.text

    def test_a_tokenizer_with_more_tokens_than_the_model(self, caplog):
        model = load_model()
        model.resize_token_embeddings(len(tokenizer()) - 1, mean_resizing=False)
        way = Concept("way", Direction(vector(), layer=0))
        with caplog.at_level(logging.WARNING, logger="shapedpo"):
            shaped(way, model=model, trainer={"ref_model": copy.deepcopy(model)})
        assert (
            f"{len(tokenizer())} tokens...embeddings for {len(tokenizer()) - 1}".replace(
                "...", ", and LlamaForCausalLM has "
            )
            in caplog.text
        )

    @pytest.mark.parametrize("data", [None, "pairs", [{"prompt": "x"}]])
    def test_no_data(self, data):
        """TRL says what is wrong with it."""
        errors = []
        for cls, options in ((DPOTrainer, {}), (ShapedDPOTrainer, {"concepts": [goblin()]})):
            with pytest.raises((ValueError, TypeError)) as error:
                build(cls, arguments(False), train_dataset=data, **options)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]


class TestMethodsAndLosses:
    @pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sft"])
    @pytest.mark.parametrize(
        "concept",
        [
            goblin("suppress", "reweight", 1.0),
            goblin("suppress", Mask(fraction=0.1)),
            goblin("amplify", Mask(threshold=1.0)),
        ],
        ids=["reweight", "mask", "mask-amplify"],
    )
    def test_weights_have_no_meaning(self, loss, concept):
        refused(
            f"Concept 'goblin': method {concept.shaper.name!r}...{loss!r}", lambda: shaped(concept, loss_type=[loss])
        )
        refused(f"Concept 'goblin': ...{loss!r}", lambda: shaped(concept, loss_type=["sigmoid", loss]))

    @pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sft"])
    def test_nor_has_a_weight_column(self, loss):
        refused(f"weight column 'weight'...{loss!r}", lambda: shaped(data=pairs(weight=[1.0] * 24), loss_type=[loss]))

    @pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
    def test_projection_of_sorted_pairs(self, loss):
        refused(
            f"Concept 'goblin': ...'project'...{loss!r}",
            lambda: shaped(goblin("suppress", "project"), loss_type=[loss]),
        )

    def test_sft_compares_nothing(self):
        refused(
            "Concept 'goblin': ...'reward'...'sft'", lambda: shaped(goblin("suppress", strength=1.0), loss_type=["sft"])
        )
        refused(
            "Concept 'goblin': ...'project'...'sft'", lambda: shaped(goblin("suppress", "project"), loss_type=["sft"])
        )
        shaped(goblin("suppress", strength=1.0), loss_type=["sft", "sigmoid"])

    @pytest.mark.parametrize("losses", [["ipo"], ["sppo_hard"], ["sigmoid", "sigmoid_norm"]])
    def test_hold_weighs_its_pull_against_dpos(self, losses):
        refused(f"Concept 'goblin': action 'hold'...{losses[-1]}", lambda: shaped(goblin("hold"), loss_type=losses))
        shaped(goblin("hold"), loss_type=["sigmoid_norm", "sft"])

    def test_hold_does_not_know_wpos_weights(self):
        refused(
            "Concept 'goblin': action 'hold'...`use_weighting=True`", lambda: shaped(goblin("hold"), use_weighting=True)
        )

    @pytest.mark.parametrize("loss", ["ipo", "sigmoid_norm"])
    def test_losses_that_divide_by_length(self, loss, caplog):
        """They divide what `reward` adds as well, which a user of the usual strengths must know."""
        with caplog.at_level(logging.WARNING, logger="shapedpo"):
            shaped(goblin("suppress", strength=2.0), loss_type=[loss])
        assert f"'reward' shifts a completion's reward before the loss type {loss!r} divides it" in caplog.text
        assert "a strength of 2 counts as 0.01" in caplog.text

    def test_projection_needs_more_pairs_than_concepts(self, caplog):
        concepts = [
            Concept(f"c{i}", Regex(word), "suppress", "project") for i, word in enumerate(("cat", "dog", "fox", "the"))
        ]
        for size, count in ((1, 1), (3, 3), (2, 4)):
            text = f"'project'...{size} pair(s)...`per_device_train_batch_size`"
            make = lambda size=size, count=count: shaped(*concepts[:count], per_device_train_batch_size=size)  # noqa: E731
            message = refused(text, make)
            assert all(repr(concept.name) in message for concept in concepts[:count])
        with caplog.at_level(logging.WARNING, logger="shapedpo"):
            shaped(*concepts[:2], per_device_train_batch_size=4)
        assert "2 of 4 directions" in caplog.text

    def test_residual_projection(self):
        residual = Project(space="residual", layers=[0, LAYERS])
        way = Concept("way", Direction(vector(), layer=0), "suppress", residual)
        refused(f"Concept 'way': ...layer {LAYERS}...{LAYERS}", lambda: shaped(way))
        refused("Concept 'goblin': ...readout of text", lambda: shaped(goblin("suppress", Project(space="residual"))))
        gated = Concept(
            "way", Direction(vector(), layer=0), "suppress", Project("residual"), gate=Gate(column="creative")
        )
        refused("Concept 'way': ...no gate", lambda: shaped(gated, data=pairs(creative=[True] * 24)))

    def test_a_moving_reference(self):
        refused(
            "`sync_ref_model=True`...concepts", lambda: shaped(goblin(), sync_ref_model=True, ref_model_sync_steps=1)
        )
        shaped(sync_ref_model=True, ref_model_sync_steps=1)  # TRL's own business

    def test_no_beta(self):
        refused("Concept 'goblin': ...`beta`", lambda: shaped(goblin("suppress", strength=1.0), beta=0.0))


class TestTrl:
    """A TRL without one of the openings, an older or a later one; taking one away is the only way to have it here."""

    @pytest.mark.parametrize("name", ["_compute_loss", "compute_ref_log_probs", "_precompute_ref_logps"])
    def test_without_an_opening(self, monkeypatch, name):
        monkeypatch.delattr(DPOTrainer, name)
        text = refused(f"DPOTrainer.{name}...pip install 'trl>=1.", lambda: shaped(goblin()), ImportError)
        assert "trl 1." in text  # what is installed

    def test_with_another_signature(self, monkeypatch):
        monkeypatch.setattr(DPOTrainer, "_compute_loss", lambda self, model, inputs: None)
        refused("DPOTrainer._compute_loss...return_outputs", lambda: shaped(goblin()), ImportError)

    def test_without_fused_log_probabilities(self, monkeypatch):
        from trl.trainer import utils

        monkeypatch.delattr(utils, "FusedCausalLMOutput")
        refused("FusedCausalLMOutput.log_probs", lambda: shaped(goblin()), ImportError)


class Break(TrainerCallback):
    """Does something to the trainer before a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


class TestAtRunTime:
    def one_sided(self, empties: int = 3) -> Dataset:
        """Some rows with a rejected completion that has no token to predict: without a prompt, <eos> comes first."""
        empty = {"prompt": "", "chosen": "apple goblin", "rejected": ""}
        return Dataset.from_list([empty if index < empties else row for index, row in enumerate(pairs(24))])

    @pytest.mark.parametrize("precompute", [False, True])
    def test_pairs_without_completion_tokens(self, precompute):
        concepts = [Concept("goblin", Regex("goblin")), Concept("way", Direction(vector(), layer=0))]
        run = train(
            shaped(
                *concepts, data=self.one_sided(), per_device_train_batch_size=24, precompute_ref_log_probs=precompute
            )
        )
        assert run.metric("concepts/empty_pairs") == [3, 6, 9]
        # Their delta is 0: the rest of the data alone has the same sum, and the same statistics.
        rest = self.one_sided().select(range(3, 24))
        alone = train(shaped(*concepts, data=rest, per_device_train_batch_size=21, precompute_ref_log_probs=precompute))
        for concept in concepts:
            name = f"concepts/{concept.name}/delta"
            assert run.metric(name)[0] == pytest.approx(alone.metric(name)[0] * 21 / 24, abs=1e-6)

    @pytest.mark.parametrize("method", ["reward", "reweight", {"name": "mask", "fraction": 0.3}, "project"])
    def test_they_are_not_shaped(self, method):
        """Nor do they upset a method, in a batch of nothing else."""
        strength = 1.0 if method in ("reward", "reweight") else None
        concept = goblin("suppress", method, strength)
        run = train(shaped(concept, data=self.one_sided(20), per_device_train_batch_size=6, max_steps=4))
        assert all(math.isfinite(value) for entry in run.history for value in entry.values())
        assert run.metric("concepts/empty_pairs")[-1] == 20
        assert all(torch.isfinite(tensor).all() for tensor in run.parameters.values())

    def test_truncation(self):
        """A collator that cuts off at fewer tokens than TRL was told: both completions go."""
        collator = DataCollatorForPreference(pad_token_id=0, max_length=5)
        trainer = shaped(*watching(), trainer={"data_collator": collator}, per_device_train_batch_size=24)
        gone = sum(len(row["prompt_ids"]) >= 5 for row in trainer.train_dataset)
        assert 0 < gone < 20
        assert train(trainer).metric("concepts/empty_pairs") == [gone, 2 * gone, 3 * gone]

    def test_too_few_left_to_calibrate(self):
        collator = DataCollatorForPreference(pad_token_id=0, max_length=1)
        trainer = shaped(goblin(), trainer={"data_collator": collator})
        refused("Of the 24 pairs...0 have completion tokens...`max_length`", trainer.train)

    def test_a_score_that_never_varies(self, caplog):
        with caplog.at_level(logging.WARNING, logger="shapedpo"):
            run = train(shaped(Concept("unicorn", Regex("unicorn"), "suppress", strength=1.0)))
        (text,) = [record.getMessage() for record in caplog.records if "unicorn" in record.getMessage()]
        assert "never vary" in text
        assert "calibration_size" in text
        assert run.metric("concepts/unicorn/delta") == [0.0] * 3


def is_nan_on(word: str) -> TextFunction:
    return TextFunction(lambda text: math.nan if word in text else 1.0 * len(text), name="odd")


class TestNonFiniteScores:
    def test_in_the_calibration(self):
        trainer = shaped(Concept("fine", Regex("a")), Concept("odd", is_nan_on("goblin")))
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        refused("Concept 'odd': ...the calibration sample...not finite", trainer.train, FloatingPointError)
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())

    @pytest.mark.parametrize("value", [math.inf, -math.inf])
    def test_infinities(self, value):
        trainer = shaped(Concept("odd", TextFunction(lambda text: value if "goblin" in text else 0.0)))
        refused("Concept 'odd'", trainer.train, FloatingPointError)

    def test_in_the_cache(self):
        make = lambda: shaped(Concept("odd", is_nan_on("goblin")), precompute_ref_log_probs=True)  # noqa: E731
        refused("Concept 'odd'", make, FloatingPointError)

    def test_prompts_that_gate(self):
        """A gate that cannot be read must not pass for one that is shut."""
        concepts = [
            Concept("odd", TextFunction(lambda text: math.nan if text == "red red red" else float(len(text)))),
            goblin("suppress", strength=1.0, gate=Gate(concept="odd")),
        ]
        rows = [{**row, "prompt": "<bos> red red red"} if index % 5 == 0 else row for index, row in enumerate(pairs())]
        refused("Concept 'odd'", shaped(*concepts, data=Dataset.from_list(rows)).train, FloatingPointError)

    @pytest.mark.parametrize("readout", ["direction", "features", "text"])
    def test_later_with_a_checkpoint_saved(self, tmp_path, readout):
        """The reference's weights go bad at step 3. The run stops before its update; what was saved at step 2 is whole."""
        broken: list[bool] = []
        readouts = {
            "direction": Direction(vector(), layer=1),
            "features": SAEFeatures(str(sae_path()), [3, 17]),
            "text": TextFunction(lambda text: math.nan if broken else float(len(text))),
        }
        concepts = [Concept("fine", Regex("goblin")), Concept("odd", readouts[readout], "suppress", strength=1.0)]
        trainer = shaped(*concepts, output_dir=str(tmp_path), save_strategy="steps", save_steps=2, max_steps=6)

        def break_it() -> None:
            broken.append(True)
            if readout != "text":
                trainer.ref_model.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan

        trainer.add_callback(Break(2, break_it))
        after_two: dict[str, Any] = {}
        trainer.add_callback(Break(2, lambda: after_two.update(copied(trainer.model))))
        # The collator may have scored a batch ahead of its step.
        message = refused("Concept 'odd': ...of step ...not finite", trainer.train, FloatingPointError)
        assert re.search(r"step 2\b" if readout != "text" else r"step [234]\b", message)
        if "step 2" in message:
            assert all(torch.equal(tensor, after_two[name]) for name, tensor in trainer.model.state_dict().items())

        model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
        assert all(torch.equal(tensor, after_two[name]) for name, tensor in model.state_dict().items())
        assert all(
            torch.isfinite(t).all() for t in load_file(tmp_path / "checkpoint-2" / "concepts.safetensors").values()
        )
        broken.clear()
        again = shaped(*concepts, output_dir=str(tmp_path), save_strategy="no", max_steps=4)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert again.state.global_step == 4

    def test_in_evaluation(self):
        silent = Dataset.from_list([{"prompt": "the", "chosen": "", "rejected": " cat"}] * 2)
        concept = Concept("odd", TextFunction(lambda text: float(len(text)) if text else math.nan))
        trainer = shaped(concept, trainer={"eval_dataset": silent})
        refused("Concept 'odd'", trainer.evaluate, FloatingPointError)


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class TestDamagedCheckpoint:
    def test_a_file_that_is_no_calibration(self, tmp_path):
        """Something else of that name, or half a file, is said to be so."""
        fields = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        train(shaped(goblin(), **fields))
        path = tmp_path / "checkpoint-1" / "concepts.safetensors"
        whole = path.read_bytes()
        for damage in (lambda: path.write_bytes(whole[: len(whole) // 2]), lambda: save_file({"x": vector()}, path)):
            damage()
            trainer = shaped(goblin(), **{**fields, "max_steps": 2})
            refused("concepts.safetensors", lambda t=trainer: t.train(resume_from_checkpoint=True))
