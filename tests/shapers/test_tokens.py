"""Token filtering, against an objective that sums the tokens that stay, in float64."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from trl.trainer.dpo_trainer import DataCollatorForPreference

from shapedpo import Concept, Direction, Gate, Regex, SAEFeatures, TextFunction, Tokens
from shapedpo.calibration import load_calibration
from shapedpo.marks import MATCHED, WORDS, TokenMarks
from shapedpo.reading import ConceptReader
from shapedpo.shapers import ConceptSignal
from shapedpo.thresholds import best_f1
from shapedpo.tokens import TokenFilter
from tests.helpers import pairs, sae_path, shaped, tokenizer, train, vector
from tests.slow import BETA, CHECKPOINTING, SOME_FORWARDS, Slow, standardise, trainer_of


LAYER = 1


def way(method, action="suppress", **fields):
    return Concept("way", Direction(vector(), layer=LAYER), action, method, **fields)


def kept_loss(slow, keep, objective=None):
    """DPO's loss of the tokens that stay."""
    sums = [
        torch.stack([tokens[stay].sum() for tokens, stay in zip(slow.token_logps(run), keep, strict=True)])
        for run in (slow.policy, slow.reference)
    ]
    return (objective or slow.loss)(*sums)


def standardised(slow):
    """For each completion its tokens' scores, in the units of the completions' scores."""
    raw = slow.token_scores(vector(), LAYER)
    pooled = torch.tensor([float(tokens.max()) for tokens in raw], dtype=torch.float64)
    return [(tokens - pooled.mean()) / pooled.std() for tokens in raw]


def on_sides(slow, keep, sides):
    """Only the completions of these sides lose tokens."""
    pairs = len(slow.rows)
    on = [sides[0]] * pairs + [sides[1]] * pairs
    return [stay if hit else torch.ones_like(stay) for stay, hit in zip(keep, on, strict=True)]


@pytest.mark.parametrize(("peft", "checkpointing"), SOME_FORWARDS)
def test_threshold(peft, checkpointing):
    slow = Slow(trainer_of(way(Tokens("both", threshold=-1.0)), peft=peft, **CHECKPOINTING[checkpointing]))
    keep = [scores <= -1.0 for scores in standardised(slow)]
    assert 10 < sum(int((~stay).sum()) for stay in keep) < sum(len(stay) for stay in keep) - 10
    slow.assert_step(kept_loss(slow, keep))
    share = slow.trainer._metrics["train"]["concepts/way/tokens"]
    assert share == [pytest.approx(1 - torch.cat(keep).double().mean().item())]


@pytest.mark.parametrize(
    ("action", "side", "sides"),
    [
        ("suppress", None, (True, False)),
        ("amplify", None, (False, True)),
        ("suppress", "rejected", (False, True)),
        ("amplify", "both", (True, True)),
    ],
)
def test_side_and_quantile(action, side, sides):
    slow = Slow(trainer_of(way(Tokens(side, quantile=0.8), action)))
    scores = standardised(slow)
    pairs = len(slow.rows)
    counted = torch.cat(scores[:pairs] * sides[0] + scores[pairs:] * sides[1]).sort().values
    threshold = counted[-(-int(0.8 * (len(counted) - 1) * 1e6) // 10**6)]
    keep = on_sides(slow, [values <= threshold + 1e-6 for values in scores], sides)
    assert 0 < sum(int((~stay).sum()) for stay in keep) <= 0.2 * len(counted)
    slow.assert_step(kept_loss(slow, keep))


def test_gate():
    data = pairs(8, creative=[index % 2 == 0 for index in range(8)])
    slow = Slow(trainer_of(way(Tokens("both", threshold=-1.0), gate=Gate(column="creative")), data=data))
    gate = [index % 2 == 0 for index in range(8)] * 2
    keep = [(scores <= -1.0) | (not on) for scores, on in zip(standardised(slow), gate, strict=True)]
    slow.assert_step(kept_loss(slow, keep))


def test_features():
    features = [3, 17, 40]
    concept = Concept("f", SAEFeatures(str(sae_path()), features), "suppress", Tokens("both", quantile=0.7))
    slow = Slow(trainer_of(concept))
    import sae_lens

    sae = sae_lens.SAE.load_from_disk(sae_path())
    tokens = []
    for prompt, completion in zip(slow.prompts, slow.completions, strict=True):
        hidden = slow.reference(prompt + completion).hidden_states[2][0, len(prompt) :]
        tokens.append(sae.encode(hidden.float())[:, features].double())
    pooled = torch.stack([raw.amax(dim=0) for raw in tokens])
    assert (pooled.std(dim=0) > 0).all()
    scores = [((raw - pooled.mean(dim=0)) / pooled.std(dim=0)).mean(dim=1) for raw in tokens]
    threshold = torch.cat(scores).quantile(0.7, interpolation="higher")
    slow.assert_step(kept_loss(slow, [values <= threshold + 1e-6 for values in scores]))


def test_pattern():
    concept = Concept("animal", Regex(r"goblin|fox (a|the)\b"), "suppress", Tokens("both"))
    slow = Slow(trainer_of(concept, data=pairs(12)))
    keep = []
    for completion in slow.completions:
        words = tokenizer().convert_ids_to_tokens(completion)
        pair = [one == "fox" and two in ("a", "the") for one, two in zip(words, [*words[1:], ""], strict=True)]
        gone = [word == "goblin" or pair[k] or (k > 0 and pair[k - 1]) for k, word in enumerate(words)]
        keep.append(~torch.tensor(gone))
    assert sum(int((~stay).sum()) for stay in keep) > 5
    slow.assert_step(kept_loss(slow, keep))


def test_losses_that_divide_by_length():
    """A token that leaves is no part of the length either."""
    slow = Slow(trainer_of(way(Tokens("both", threshold=-1.0)), loss_type=["sigmoid_norm"]))
    keep = [scores <= -1.0 for scores in standardised(slow)]
    lengths = torch.tensor([max(int(stay.sum()), 1) for stay in keep])

    def objective(policy, reference):
        chosen, rejected = ((policy - reference) / lengths).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    slow.assert_step(kept_loss(slow, keep, objective))


def test_sft_and_wpo():
    slow = Slow(trainer_of(way(Tokens(threshold=-1.0)), loss_type=["sft"]))
    keep = on_sides(slow, [scores <= -1.0 for scores in standardised(slow)], (True, False))
    tokens = slow.token_logps(slow.policy)[: len(slow.rows)]
    kept = torch.cat([t[stay] for t, stay in zip(tokens, keep[: len(slow.rows)], strict=True)])
    slow.assert_step(-kept.mean())

    slow = Slow(trainer_of(way(Tokens("both", threshold=-1.0)), use_weighting=True))
    keep = [scores <= -1.0 for scores in standardised(slow)]
    weights = []  # exp of the mean over the tokens that stay of log p(token) - log sum_v p_v^2
    for prompt, completion, stay in zip(slow.prompts, slow.completions, keep, strict=True):
        with torch.no_grad():
            log_p = torch.log_softmax(slow.policy(prompt + completion).logits[0], dim=-1)[len(prompt) - 1 : -1]
        aligned = log_p.gather(1, torch.tensor(completion)[:, None])[:, 0] - torch.logsumexp(2 * log_p, dim=1)
        weights.append(aligned[stay].sum() / max(int(stay.sum()), 1))
    weight = torch.stack(weights).exp().chunk(2)

    def objective(policy, reference):
        chosen, rejected = (policy - reference).chunk(2)
        return (weight[0] * weight[1] * -F.logsigmoid(BETA * (chosen - rejected))).mean()

    slow.assert_step(kept_loss(slow, keep, objective))


def test_with_other_methods():
    """Tokens leave for two concepts, while a third's reward is shaped; what is logged of rewards is of all tokens, unshaped."""
    concepts = [
        way(Tokens("both", threshold=-1.0)),
        Concept("animal", Regex("fox"), "suppress", Tokens("rejected")),
        Concept("other", Direction(vector(1), layer=0), "suppress", strength=1.5),
    ]
    slow = Slow(trainer_of(*concepts))
    fox = tokenizer().convert_tokens_to_ids("fox")
    keep = [scores <= -1.0 for scores in standardised(slow)]
    for row in range(len(slow.rows), 2 * len(slow.rows)):
        keep[row] = keep[row] & (torch.tensor(slow.completions[row]) != fox)
    score = standardise([tokens.max() for tokens in slow.token_scores(vector(1), 0)])
    policy, reference = slow.logps(slow.policy).detach(), slow.logps(slow.reference)
    slow.assert_step(kept_loss(slow, keep, lambda p, r: slow.loss(p, r - 1.5 / BETA * score)))
    logged = slow.trainer._metrics["train"]
    chosen, rejected = policy.chunk(2)
    assert logged["logps/chosen"] == [pytest.approx(float(chosen.mean()))]
    assert logged["logps/rejected"] == [pytest.approx(float(rejected.mean()))]
    rewards = BETA * (policy - reference)
    margins = rewards.chunk(2)[0] - rewards.chunk(2)[1]
    assert logged["rewards/margins"] == [pytest.approx(float(margins.mean()))]


def test_nothing_passes_the_threshold_and_training_is_plain():
    plain = train(shaped())
    run = train(shaped(way(Tokens("both", threshold=100.0))))
    assert run.metric("loss") == pytest.approx(plain.metric("loss"), abs=1e-6)
    assert run.metric("concepts/way/tokens") == [0, 0, 0]


def test_evaluation_is_plain():
    metrics = []
    for concepts in ([], [way(Tokens("both", threshold=-1.0))]):
        metrics.append(shaped(*concepts, trainer={"eval_dataset": pairs(6, seed=1)}).evaluate())
    for name in ("eval_loss", "eval_rewards/margins", "eval_entropy"):
        assert metrics[1][name] == metrics[0][name]


def test_a_run_resumes_with_its_thresholds(tmp_path):
    concept = way(Tokens("both", quantile=0.8))
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    run = train(shaped(concept, **settings))
    trainer = shaped(concept, **settings)
    saved = load_calibration(tmp_path / "checkpoint-2", [concept], trainer._reader.fingerprint, False)
    assert torch.equal(saved.tokens, run.trainer._calibration.tokens)
    again = train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.steps[-1]["loss"] == pytest.approx(run.steps[-1]["loss"], abs=1e-6)


class TestContrast:
    def write(self, path, rows):
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return str(path)

    def rows(self):
        return [
            {"prompt": "<bos> the cat", "response": f" {text}", "label": label}
            for text, label in [
                ("sees goblin", True),
                ("likes the goblin", True),
                ("eats apple", False),
                ("a fox", False),
            ]
        ]

    def test_threshold_by_best_f1(self, tmp_path):
        path = self.write(tmp_path / "contrast.jsonl", self.rows())
        slow = Slow(trainer_of(way(Tokens("both", contrast=path))))
        unit = F.normalize(vector().double(), dim=0)
        best = []
        for row in self.rows():
            prompt = tokenizer()(row["prompt"])["input_ids"]
            ids = tokenizer()(row["prompt"] + row["response"] + "<eos>")["input_ids"]
            best.append(float((slow.reference(ids).hidden_states[LAYER + 1][0, len(prompt) :] @ unit).max()))
        pooled = torch.tensor([float(tokens.max()) for tokens in slow.token_scores(vector(), LAYER)]).double()
        best = (torch.tensor(best).double() - pooled.mean()) / pooled.std()
        labels = torch.tensor([True, True, False, False])
        threshold = best_f1(best, labels)
        keep = [scores <= threshold for scores in standardised(slow)]
        slow.assert_step(kept_loss(slow, keep))
        assert float(slow.trainer._calibration.tokens[0]) == pytest.approx(threshold, abs=1e-5)

    def test_best_f1_is_the_best_of_all_thresholds(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            scores = torch.randint(0, 6, (12,), generator=generator).double()
            labels = torch.rand(12, generator=generator) < 0.4
            labels[0], labels[1] = True, False

            def f1(threshold, scores=scores, labels=labels):
                hit = scores > threshold
                return float(2 * (hit & labels).sum() / (hit.sum() + labels.sum()))

            assert f1(best_f1(scores, labels)) == pytest.approx(max(f1(t / 4 - 1) for t in range(32)))

    @pytest.mark.parametrize(
        ("rows", "text"),
        [
            ([{"prompt": "a", "response": "b"}], "line 1 has no 'label'"),
            ([{"prompt": "a", "response": "b", "label": "yes"}], "line 1 has the label 'yes'"),
            ([{"prompt": "a", "response": "b", "label": True}] * 2, "of the 2 responses"),
        ],
    )
    def test_bad_files(self, tmp_path, rows, text):
        path = self.write(tmp_path / "contrast.jsonl", rows)
        with pytest.raises(ValueError, match=f"Concept 'way': method 'tokens'.*{text}"):
            shaped(way(Tokens(contrast=path)))
        with pytest.raises(ValueError, match="there is no contrast set"):
            shaped(way(Tokens(contrast=str(tmp_path / "none"))))


class TestMarks:
    @pytest.fixture(scope="class")
    def bytes_tokenizer(self):
        """Byte-level BPE whose words are pieces, and whose other characters are single bytes."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<eos>"]}
        bpe.train_from_iterator(["the goblin the gob lin sees"] * 9, trainers.BpeTrainer(vocab_size=266, **options))
        return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")

    def marked(self, tokenizer, text, pattern, prompt="I say"):
        """The tokens that a pattern's matches touch, and each token's word."""
        prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
        sequence = torch.tensor([prompt_ids + ids] * 2)
        mask = torch.tensor([[0] * len(prompt_ids) + [1] * len(ids)] * 2)
        batch = {"input_ids": sequence, "completion_mask": mask}
        added = TokenMarks(tokenizer, [Regex(pattern)], words=True)([], batch)
        assert not added[MATCHED][:, : len(prompt_ids)].any()
        assert not added[WORDS][:, : len(prompt_ids)].any()
        tokens = [tokenizer.backend_tokenizer.decoder.decode([t]) for t in tokenizer.convert_ids_to_tokens(ids)]
        return tokens, added[MATCHED][0, len(prompt_ids) :, 0].tolist(), added[WORDS][0, len(prompt_ids) :].tolist()

    @pytest.mark.parametrize("pattern", ["goblin", "gob", "lin", r"\*\*", "—", "🙂", r" \w+", "é.", "x?", "the.*s"])
    def test_matches_touch_the_tokens_of_their_bytes(self, bytes_tokenizer, pattern):
        """The tokenizer is byte-level, so that a token's place in the text can be counted in bytes."""
        text = " the **goblin** — née 🙂🙂 sees the goblins<eos>"
        _, marks, _ = self.marked(bytes_tokenizer, text, pattern)
        plain = text.removesuffix("<eos>")
        raw = bytes_tokenizer.convert_ids_to_tokens(bytes_tokenizer(text)["input_ids"])
        expected, start = [], 0
        for token in raw:
            end = start + (0 if token == "<eos>" else len(token))  # one sign a byte
            touched = False
            for match in re.finditer(pattern, plain):
                first, last = (len(plain[:at].encode()) for at in match.span())
                touched |= first < last and start < last and first < end
            expected.append(int(touched))
            start = end
        assert start == len(plain.encode())
        assert marks == expected
        assert any(marks) == (pattern != "x?")

    def test_words(self, bytes_tokenizer):
        text = " goblins née. x2y 🙂"
        tokens, _, words = self.marked(bytes_tokenizer, text, "z")
        assert len(tokens) > len(set(words))
        ids = bytes_tokenizer(text)["input_ids"]
        groups = {}
        for number, token in zip(words, ids, strict=True):
            groups.setdefault(number, []).append(token)
        texts = [bytes_tokenizer.decode(group).strip() for group in groups.values()]
        assert [text for text in texts if text] == ["goblins", "née", ".", "x2y", "🙂"]

    def test_whole_words_leave(self, bytes_tokenizer):
        """A match inside a word takes the word along."""
        concept = Concept("gob", Regex("gob"), "suppress", Tokens("both", whole_words=True))
        method = TokenFilter(ConceptReader([concept]))
        texts = {"prompt_ids": "the gob", "chosen_ids": " sees goblins the", "rejected_ids": " the gob lin"}
        rows = [{name: bytes_tokenizer(text)["input_ids"] for name, text in texts.items()}]
        batch = DataCollatorForPreference(pad_token_id=0)(rows)
        marks = method.marks(bytes_tokenizer)(rows, batch)
        signal = ConceptSignal(torch.zeros(2), torch.zeros(1), torch.ones(1))
        completion = batch["completion_mask"].bool()
        (left,) = method.leaving([signal], None, torch.empty(1), marks, completion).values()
        gone = [bytes_tokenizer.decode(row[out]) for row, out in zip(batch["input_ids"], left, strict=True)]
        assert gone == [" goblins", " gob"]


@pytest.mark.parametrize(
    ("concept", "settings", "text"),
    [
        (way("tokens"), {}, "needs one of `threshold`, `quantile` and `contrast`"),
        (
            way(Tokens(quantile=0.9)),
            {"precompute_ref_log_probs": True},
            "`precompute_ref_log_probs=True` keeps only their sums",
        ),
        (Concept("way", TextFunction(len), "suppress", "tokens"), {}, "needs a readout that says where"),
        (Concept("way", Regex("x"), "suppress", Tokens(quantile=0.9)), {}, "takes no `quantile` with a Regex"),
    ],
)
def test_what_does_not_fit(concept, settings, text):
    with pytest.raises(ValueError, match=f"Concept 'way': method 'tokens' .*{text}"):
        shaped(concept, **settings)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"side": "left"}, "`side` must be one of chosen, rejected, both, got 'left'"),
        ({"threshold": 1, "quantile": 0.5}, "takes one of"),
        ({"quantile": 1.0}, "`quantile` must be a number above 0 and below 1"),
        ({"whole_words": "yes"}, "`whole_words` must be true or false"),
        ({"contrast": ["a"]}, "`contrast` must be the path of a file"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=f"Concept 'way': Method 'tokens'.*{text}"):
        way({"name": "tokens", **options})
