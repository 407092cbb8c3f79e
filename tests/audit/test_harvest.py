"""The harvest against slow references in float64, against the trainer, and through kills and several processes."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from shapedpo import SAEFeatures, lab
from shapedpo.audit import Harvest, HarvestSettings, harvest
from shapedpo.audit.harvesting import run as harvesting
from shapedpo.audit.harvesting import shards
from shapedpo.audit.harvesting.layout import Tokens, best_layout, run, separate, shared
from shapedpo.audit.harvesting.pairs import Pairs, load_pairs
from shapedpo.audit.harvesting.pooling import place_in_slot, pool
from shapedpo.audit.harvesting.shards import SPANS
from shapedpo.cli import main
from shapedpo.errors import UserError
from tests import helpers


ROOT = Path(__file__).parents[2]
HOOK = helpers.SAE_HOOK
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' ' + message['role'] + ' ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def harvested(folder, data=None, sae=None, model=None, tokenizer=None, **settings):
    """A harvest of the tiny model on a little data, in small pieces."""
    settings = HarvestSettings(**{"shard_rows": 10, "batch_tokens": 100, **settings})
    return harvest(
        model or str(helpers.model_path()),
        sae or str(helpers.sae_path()),
        helpers.pairs() if data is None else data,
        folder,
        settings,
        tokenizer=tokenizer,
    )


def trainer_of(data, tokenizer=None, **fields):
    """TRL's own trainer on that data."""
    from trl import DPOTrainer

    options = {"train_dataset": data, **({"processing_class": tokenizer} if tokenizer else {})}
    return helpers.build(DPOTrainer, helpers.arguments(ours=False, **fields), **options)


def sequences_of_training(trainer, bos=1):
    """What training reads of each row, from its batch: per span the sequence up to the span's end, and the places that are read."""
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    n = len(batch["input_ids"]) // 2
    rows = []
    for pair in range(n):
        row = {}
        for span, place in (("prompt", pair), ("chosen", pair), ("rejected", n + pair)):
            ids = [
                int(t) for t, on in zip(batch["input_ids"][place], batch["attention_mask"][place], strict=True) if on
            ]
            inside = [bool(batch["completion_mask"][place][t]) == (span != "prompt") for t in range(len(ids))]
            row[span] = ids, [t for t in range(1, len(ids)) if inside[t] and ids[t] != bos]
        rows.append(row)
    return rows


def ids_of_span(row, span):
    """The tokens of a span that are read."""
    tokens, places = row[span]
    return [tokens[t] for t in places]


@torch.no_grad()
def slow_reference(rows):
    """Of each row's spans: maximum, number of active tokens and place of the maximum of each feature, one sequence at a time, in float64."""
    from sae_lens import SAE

    model = helpers.load_model().double()
    sae = SAE.load_from_disk(helpers.sae_path(), dtype="float64")
    for row in rows:
        result = {}
        for span, (ids, places) in row.items():
            states = []
            layer = model.model.layers[1]
            handle = layer.register_forward_hook(lambda module, args, output, states=states: states.append(output))
            model(input_ids=torch.tensor([ids]))
            handle.remove()
            before = (states[0][0] - sae.b_dec) @ sae.W_enc + sae.b_enc
            activations = torch.where(before > sae.threshold, before.clamp(min=0), 0.0)[places].numpy()
            near = ((before - sae.threshold.clamp(min=0)).abs() < 1e-4)[places].any(dim=0).numpy()  # may go either way
            none = np.zeros(activations.shape[1])
            result[span] = (
                activations.max(axis=0) if places else none,
                (activations > 0).sum(axis=0),
                activations.argmax(axis=0) + 1 if places else none,
                near,
            )
        yield result


@pytest.mark.parametrize(
    "settings", [{}, {"max_length": 9}, {"max_length": 7, "truncation_mode": "keep_end"}], ids=["whole", "start", "end"]
)
def test_every_span_equals_a_slow_reference(tmp_path, settings):
    data = helpers.pairs(30, seed=1)
    trainer = trainer_of(data, **settings)
    rows = sequences_of_training(trainer)
    found = harvested(tmp_path, data, **settings)
    assert found.n_rows == len(trainer.train_dataset) == len(rows)
    if settings.get("truncation_mode") == "keep_end":
        assert any(not row["prompt"][1] for row in rows)  # nothing is left of some prompts
    checked, references = 0, slow_reference(rows)
    for shard in found.shards(["max", "freq", "peak"]):
        ids = found.ids(shard.rows)
        for i in range(len(shard.rows)):
            row = rows[checked]
            expected = next(references)
            for span in SPANS:
                tokens, places = row[span]
                part = getattr(shard, span)
                assert part.tokens[i] == len(places)
                assert ids[i][span] == [tokens[t] for t in places]
                largest, counts, peak, near = expected[span]
                np.testing.assert_allclose(part.max[i].toarray()[0][~near], largest[~near], atol=1e-4)
                freq = counts / max(len(places), 1)
                np.testing.assert_allclose(part.freq[i].toarray()[0][~near], freq[~near], atol=1e-6)
                sure = ~near & (largest > 1e-3)
                np.testing.assert_array_equal(part.peak[i].toarray()[0][sure], peak[sure])
                assert near.mean() < 0.2
            checked += 1
    assert checked == len(rows) > 0


def test_scores_are_those_that_training_reads(tmp_path):
    """The trainer's own pass of the reference, with every feature as a concept."""
    from shapedpo import Concept
    from shapedpo.collator import split_batch

    sae = str(helpers.sae_path())
    trainer = helpers.shaped(
        *(Concept(pooling, SAEFeatures(sae, "all", pooling=pooling)) for pooling in ("max", "freq")), max_length=14
    )
    trainer._prepare_reading()
    found = harvested(tmp_path, max_length=14)
    shards = list(found.shards())
    assert len(shards) == 3
    rows = [dict(row) for row in trainer.train_dataset]
    for number, shard in enumerate(shards):
        extras, inputs = split_batch(trainer._prepare_inputs(trainer.data_collator(rows[10 * number :][:10])))
        _, raw = trainer._reference_pass(trainer._reference(), inputs, extras)
        largest, freq = raw.completion.split(found.d_sae, dim=1)
        for part, side in ((shard.chosen, 0), (shard.rejected, 1)):
            torch.testing.assert_close(torch.from_numpy(part.max.toarray()), largest.chunk(2)[side], atol=1e-5, rtol=0)
            torch.testing.assert_close(torch.from_numpy(part.freq.toarray()), freq.chunk(2)[side], atol=1e-6, rtol=0)
            mask = inputs["completion_mask"].chunk(2)[side]
            assert part.tokens.tolist() == mask.sum(dim=1).tolist()


# --- the layouts ---------------------------------------------------------------------------------------------------------


def tiny(kind):
    """A random model of another family, with its hook point."""
    torch.manual_seed(0)
    common = {"vocab_size": len(helpers.tokenizer()), "hidden_size": 32}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    if kind == "gpt2":
        config = GPT2Config(vocab_size=common["vocab_size"], n_embd=32, n_layer=3, n_head=4, n_positions=64)
        return GPT2LMHeadModel(config).eval(), "transformer.h.1"
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(**common, n_layer=3, n_head=4)).eval(), "transformer.h.1"
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**common, **heads, sliding_window=5)).eval(), "model.layers.2.mlp.input"
    if kind == "gemma2":
        return (
            Gemma2ForCausalLM(Gemma2Config(**common, **heads, head_dim=8, sliding_window=5)).eval(),
            "blocks.2.hook_resid_post",
        )
    return helpers.load_model().eval(), "blocks.1.attn.hook_z"


def ragged_batch(keep_end=False):
    """Pairs as the collator makes them: different lengths, an empty completion on either side, a prompt of one token."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    dice = np.random.default_rng(0)
    sizes = [(6, 9, 3), (1, 4, 8), (12, 0, 5), (3, 7, 0), (8, 20, 20)]
    draw = lambda n: dice.integers(4, 30, n).tolist()  # noqa: E731
    rows = [{"prompt_ids": [1, *draw(p)], "chosen_ids": draw(c), "rejected_ids": draw(r)} for p, c, r in sizes]
    options = {"max_length": 10, "truncation_mode": "keep_end"} if keep_end else {}
    return DataCollatorForPreference(pad_token_id=0, **options)(rows)


@pytest.mark.parametrize("keep_end", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2"])
def test_a_shared_prompt_changes_nothing(kind, keep_end):
    model, hook = tiny(kind)
    tokens, inputs = Tokens(1, 2, 0), ragged_batch(keep_end)
    config = model.config.get_text_config()
    one, other = (run(model, hook, layout(inputs, config, tokens)) for layout in (separate, shared))
    order, their_order = one[1].argsort(stable=True), other[1].argsort(stable=True)
    assert torch.equal(one[1][order], other[1][their_order])
    torch.testing.assert_close(one[0][order], other[0][their_order], atol=1e-4, rtol=1e-4)
    assert best_layout(model, hook, inputs, config, tokens) is shared
    if not keep_end:
        batches = [layout(inputs, config, tokens) for layout in (separate, shared)]
        prompts = (inputs["attention_mask"] & (1 - inputs["completion_mask"]))[:5].sum()
        assert batches[0].n_tokens - batches[1].n_tokens == prompts


def test_models_that_cannot_share_read_each_completion_by_itself(tmp_path):
    model, hook = tiny("bloom")  # its positions come from the mask
    assert best_layout(model, hook, ragged_batch(), model.config, Tokens(1, 2, 0)) is separate
    sae = SAEFeatures(str(helpers.sae_path()), "all", hook_name=hook)
    found = harvested(tmp_path, sae=sae, model=model, tokenizer=helpers.tokenizer())
    assert found.n_rows == 24
    assert next(found.shards()).chosen.max.nnz > 0


def test_the_forward_stops_at_the_hook():
    model = helpers.load_model().eval()
    reached = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: reached.append(module))
    x, slot = run(model, HOOK, shared(ragged_batch(), model.config, Tokens(1, 2, 0)))
    assert reached == list(model.model.layers[:2])
    assert x.shape == (len(slot), helpers.HIDDEN)
    assert len(model.model.layers[1]._forward_hooks) == 1  # the test's own


def test_pooling_by_slot_with_ties():
    class Reader:
        n_features = 7

        def active(self, x):
            token, feature = (x > 0).nonzero(as_tuple=True)
            order = torch.randperm(len(token))
            return token[order], feature[order], x[token, feature][order]

    x = torch.randint(0, 3, (40, 7), generator=torch.Generator().manual_seed(0)).float()
    slot = torch.tensor([4] * 10 + [0] * 5 + [9] * 25)
    found = pool(Reader(), x, slot)
    expected = [
        (s, f, int((values > 0).sum()), float(values.max()), int(values.argmax()))
        for s in (0, 4, 9)
        for f in range(7)
        if (values := x[slot == s, f]).max() > 0
    ]
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected
    assert place_in_slot(torch.tensor([2, 2, 0, 2, 0])).tolist() == [0, 1, 0, 2, 1]


# --- data ----------------------------------------------------------------------------------------------------------------


def conversational(n=12):
    data = helpers.pairs(n, seed=2)
    speak = lambda role, text: {"role": role, "content": text.strip()}  # noqa: E731
    return Dataset.from_list(
        [
            {
                "prompt": [speak("user", "the cat"), speak("assistant", "sees"), speak("user", row["prompt"][6:])],
                "chosen": [speak("assistant", row["chosen"])],
                "rejected": [speak("assistant", row["rejected"])],
            }
            for row in data
        ]
    )


def implicit(n=12):
    return Dataset.from_list(
        [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in helpers.pairs(n, seed=2)]
    )


@pytest.mark.parametrize("form", ["standard", "implicit", "conversational", "json lines", "parquet", "stream"])
def test_every_form_of_data_is_read_as_training_reads_it(form, tmp_path):
    tokenizer = helpers.tokenizer()
    data = {"implicit": implicit, "conversational": conversational}.get(form, lambda: helpers.pairs(12, seed=2))()
    given = data
    if form == "conversational":
        tokenizer.chat_template = TEMPLATE
    elif form == "json lines":
        data.to_json(tmp_path / "data.jsonl")
        given = str(tmp_path / "data.jsonl")
    elif form == "parquet":
        data.to_parquet(tmp_path / "data.parquet")
        given = str(tmp_path / "data.parquet")
    elif form == "stream":
        data.to_json(tmp_path / "data.jsonl")
        given = load_dataset("json", data_files=str(tmp_path / "data.jsonl"), split="train", streaming=True)
        assert isinstance(given, IterableDataset)
    try:
        rows = sequences_of_training(trainer_of(data, tokenizer))
        found = harvested(tmp_path / "out", given, tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = None
    assert found.rows.tolist() == list(range(12))
    for row, ids in zip(rows, found.ids(found.rows), strict=True):
        for span in SPANS:
            assert ids[span] == ids_of_span(row, span)
    text = found.texts([3])[0]
    for span in SPANS:
        assert text[span].split() == tokenizer.decode(ids_of_span(rows[3], span), skip_special_tokens=True).split()
    if form == "conversational":
        assert "the cat" in text["prompt"]  # all turns


def test_a_text_as_prompt_of_messages_without_it_is_refused(tmp_path):
    message = [{"role": "assistant", "content": "the cat"}]
    Dataset.from_list([{"prompt": "the", "chosen": message, "rejected": message}]).to_json(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match="Make the prompt messages too"):
        load_pairs(str(tmp_path / "pairs.jsonl"))


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        ([], "Row 1 of the dataset has no message in `rejected`"),
        ([{"role": "assistant", "content": None}], r"chat template refuses a row: .*needs `role` and `content`"),
        ([{"role": "system", "content": "a"}], r"chat template refuses a row: System role not supported\."),
    ],
    ids=["no message", "null", "role"],
)
def test_messages_that_cannot_be_rendered_are_refused(rejected, message):
    tokenizer = lab.load_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m.content + '' }}{% endfor %}"
    )
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}]}
    data = Dataset.from_list([{**row, "rejected": row["chosen"]}, {**row, "rejected": rejected}])
    with pytest.raises(ValueError, match=message):
        Pairs(data, tokenizer, max_length=None, truncation_mode="keep_start")


def test_repeats_and_pairs_of_one_completion_are_counted(tmp_path, caplog):
    rows = [
        {"prompt": "", "chosen": f" {chosen}", "rejected": f" {rejected}"}
        for chosen, rejected in (("the cat", "dog"), ("the", "cat dog"), ("the cat", "dog"), ("dog", "dog"))
    ]
    data = Dataset.from_list(rows)  # no prompt has a token
    pairs = Pairs(data, helpers.tokenizer(), max_length=64, truncation_mode="keep_start")
    assert (len(pairs), pairs.repeated, pairs.same) == (4, 1, 1)
    assert not harvested(tmp_path, data).texts([0])[0]["prompt"]
    assert "1 of the 4 pairs repeat others" in caplog.text
    assert "1 of the 4 pairs have the same completion" in caplog.text


def test_limit_sample_and_dropped_rows(tmp_path):
    data = helpers.pairs(60, seed=3)
    stream = data.to_iterable_dataset()
    tokenizer = helpers.tokenizer()
    every = {"max_length": None, "truncation_mode": "keep_start"}
    assert Pairs(stream, tokenizer, limit=20, **every).rows.tolist() == list(range(20))
    sample = Pairs(data, tokenizer, limit=50, sample=15, seed=4, **every)
    again = Pairs(stream, tokenizer, limit=50, sample=15, seed=4, **every)
    assert len(sample) == len(set(sample.rows.tolist())) == 15
    assert sample.rows.tolist() == sorted(sample.rows) == again.rows.tolist()
    assert sample.rows.max() < 50
    assert sample.fingerprint == again.fingerprint
    assert Pairs(data, tokenizer, sample=15, seed=5, **every).rows.tolist() != sample.rows.tolist()
    longest = max(len(row["prompt"].split()) for row in data)
    short = Pairs(data, tokenizer, max_length=longest, truncation_mode="keep_start")
    gone = {i for i, row in enumerate(data) if len(row["prompt"].split()) == longest}
    assert short.dropped == len(gone) > 0
    assert set(short.rows.tolist()) == set(range(60)) - gone


def test_lengths_are_those_of_the_rows_that_are_computed():
    data, config = helpers.pairs(30, seed=5), helpers.load_model().config
    for settings in ({"max_length": None}, {"max_length": 9}, {"max_length": 9, "truncation_mode": "keep_end"}):
        pairs = Pairs(data, helpers.tokenizer(), **{"truncation_mode": "keep_start", **settings})
        for place in range(len(pairs)):
            batch = shared(pairs.collated([place]), config, pairs.tokens)
            assert batch.n_tokens <= pairs.lengths[place]
            if settings.get("truncation_mode") != "keep_end":
                assert batch.n_tokens == pairs.lengths[place]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})},
            r"columns `chosen` and `rejected`.*prompt, completion",
        ),
        ({"data": Dataset.from_dict({"chosen": [], "rejected": []})}, "has no rows"),
        (
            {"data": Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["c", None], "rejected": ["d", "e"]})},
            "Row 1 of the dataset has no `chosen`",
        ),
        ({"data": Dataset.from_dict({"chosen": ["a"], "rejected": ["b"], "image": ["c"]})}, "has images"),
        ({"max_length": 1}, r"None of the 24 pairs is left: each prompt alone fills max_length=1"),
        ({"shard_rows": 0}, "`shard_rows` must be 1 or more, got 0"),
        ({"truncation_mode": "middle"}, "Unknown truncation_mode 'middle'. Choose one of keep_start, keep_end"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'"),
        ({"seed": -1}, "`seed` must be 0 or more, got -1"),
        ({"min_freq": 1.0}, "`min_freq` must be at least 0 and less than 1"),
        ({"sae": "features"}, "pass features='all', not"),
        ({"sae": "narrow"}, r"The SAE: its readout is 16 wide, but .* is 32 wide"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_says_what_is_wrong(tmp_path, change, message):
    saes = {
        "features": lambda: SAEFeatures(str(helpers.sae_path()), [1, 2]),
        "narrow": lambda: str(helpers.save_sae("narrow", d_in=16)),
    }
    if "sae" in change:
        change = {"sae": saes[change["sae"]]()}
    with pytest.raises(ValueError, match=message):
        harvested(tmp_path, **change)
    assert harvested(tmp_path).n_rows == 24  # nothing stays that would be in the way


def test_a_loaded_model_is_named_by_where_it_came_from(tmp_path):
    model = helpers.load_model()
    assert (
        harvested(tmp_path / "named", model=model).settings["model"] == model.name_or_path == str(helpers.model_path())
    )
    model.name_or_path = ""
    with pytest.raises(ValueError, match="pass its `tokenizer`"):
        harvested(tmp_path / "unnamed", model=model)
    assert harvested(tmp_path / "unnamed", model=model, tokenizer=helpers.tokenizer()).settings["model"] is None


@pytest.mark.parametrize(("text", "message"), [("", "is empty"), ('{"prompt": "a"', r"cannot load .*JSON parse error")])
def test_a_file_that_holds_no_pairs_is_named(tmp_path, text, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_pairs(str(path))


def test_min_freq_forgets_what_is_rare(tmp_path):
    whole, floored = harvested(tmp_path / "a"), harvested(tmp_path / "b", min_freq=0.3)
    for one, other in zip(whole.shards(), floored.shards(), strict=True):
        dense = one.chosen.freq.toarray()
        assert ((dense > 0) & (dense < 0.29)).any()
        keep = dense >= 0.3 - 1e-6
        np.testing.assert_allclose(other.chosen.freq.toarray(), dense * keep)
        np.testing.assert_allclose(other.chosen.max.toarray(), one.chosen.max.toarray() * keep, atol=1e-5)


def test_a_bfloat16_model_reads_nearly_the_same(tmp_path):
    exact, rounded = harvested(tmp_path / "a"), harvested(tmp_path / "b", dtype="bfloat16")
    for one, other in zip(exact.shards(["max"]), rounded.shards(["max"]), strict=True):
        assert other.chosen.max.dtype == np.float32
        error = abs(one.chosen.max - other.chosen.max).sum() / one.chosen.max.sum()
        assert 0 < error < 0.05


# --- the cache, kills, processes ---------------------------------------------------------------------------------------


def test_what_is_there_is_used_and_what_differs_is_refused(tmp_path, monkeypatch):
    harvested(tmp_path)
    content = [shards.shard_path(tmp_path, index).read_bytes() for index in range(3)]

    def never(*args, **options):
        raise AssertionError("the model was loaded for a harvest that is there")

    monkeypatch.setattr(harvesting, "_loaded", never)
    harvested(tmp_path)
    harvested(tmp_path, batch_tokens=50)
    assert [shards.shard_path(tmp_path, index).read_bytes() for index in range(3)] == content
    other_model = helpers.load_model()
    other_model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    other_model.save_pretrained(helpers.folder("other-model"))
    helpers.tokenizer().save_pretrained(helpers.folder("other-model"))
    for change, name in (
        ({"data": helpers.pairs(seed=1)}, r"data differ \(dataset is None as before, with other content\)"),
        ({"sample": 20, "seed": 3}, r"data differ \(sample was None, now 20, seed was 0, now 3\)"),
        ({"max_length": 20}, r"max_length differ \(max_length was 1024, now 20\)"),
        ({"sae": str(helpers.save_sae("other-sae", d_sae=40))}, "SAE"),
        ({"sae": SAEFeatures(str(helpers.sae_path()), "all", hook_name="blocks.0.hook_resid_post")}, "SAE"),
        ({"model": str(helpers.folder("other-model"))}, "model"),
    ):
        with pytest.raises(ValueError, match=f"holds a harvest of something else: {name}"):
            harvested(tmp_path, **change)


def _stuck_harvest(folder):
    """Harvest, and stop for good in the middle of writing the second file."""
    write = shards.pq.write_table

    def half(table, path, **options):
        if "shard-00001" in str(path):
            path.write_bytes(b"half of it")
            time.sleep(600)
        write(table, path, **options)

    shards.pq.write_table = half
    harvested(folder)


def test_a_killed_harvest_goes_on_where_it_was(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    harvested(whole)
    process = multiprocessing.get_context("fork").Process(target=_stuck_harvest, args=(killed,), daemon=True)
    process.start()
    deadline = time.monotonic() + 120
    while not list(killed.glob(".shard-00001*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    names = sorted(path.name.split(".parquet")[0] for path in killed.iterdir())
    assert names == [".shard-00001", "harvest.json", "shard-00000"]
    with pytest.raises(FileNotFoundError, match="2 of 3 shards are missing"):
        Harvest.open(killed)
    finished = shards.shard_path(killed, 0).stat()
    harvested(killed)
    assert shards.shard_path(killed, 0).stat().st_mtime_ns == finished.st_mtime_ns
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.glob("*.parquet"):
        assert (killed / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "./nowhere"}, r"--model: there is no folder './nowhere'"),
        ({"--sae": "./nowhere"}, r"There is no SAE folder 'nowhere'"),
        ({"--dataset": "./nowhere.jsonl"}, r"There is no file or folder './nowhere.jsonl'"),
        ({"--split": "test"}, r"has no split 'test'; it has train"),
        ({"--answers": "-1"}, r"--answers must be 0 or more, got -1"),
        ({"--answers": "4", "--pilot": "lab", "--pilot-share": "30"}, r"`pilot_share` must be a share of the run"),
        ({"--answers": "4", "--pilot": "./nowhere"}, r"there is no folder './nowhere'"),
        ({"--batch-tokens": "0"}, r"`batch_tokens` must be 1 or more, got 0"),
        ({"--hook-name": "blocks.7.hook_resid_post"}, r"The SAE: .*names layer 7, but the model has 3 layers"),
    ],
    ids=lambda value: list(value)[-1] if isinstance(value, dict) else "",
)
def test_the_command_says_what_is_wrong(tmp_path, capsys, change, message):
    helpers.pairs(4).to_json(tmp_path / "data.jsonl")
    arguments = {
        "--model": str(helpers.model_path()),
        "--sae": str(helpers.sae_path()),
        "--dataset": str(tmp_path / "data.jsonl"),
        "--out": str(tmp_path / "out"),
        "--max-length": "none",
        **change,
    }
    assert main(["audit", *(word for pair in arguments.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert "shapedpo: error: " in error
    assert re.search(message, error), error
    if "--answers" in change:
        assert not (tmp_path / "out").exists()  # said before the pass
