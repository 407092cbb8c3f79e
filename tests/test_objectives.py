"""Every method, for every loss type it supports, against its objective written out in float64.

The reference has no batching and no hooks: each completion is run alone, its log-probability is summed from the full logits, its
scores are read from `output_hidden_states` or the decoded text, and the losses are written here in their papers' terms.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shapedpo import Concept, Direction, Gate, Mask, Project, Regex, ShapedDPOConfig, ShapedDPOTrainer


WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "big",
    "red",
    "sun",
    "moon",
    "a",
    "goblin",
    "in",
    "rain",
    "then",
]
BETA, STRENGTH, LAYER = 0.3, 1.5, 1
PAIRWISE = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]
UNPAIRED = ["nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"]
SORTING = ["aot", "aot_unpaired"]
SMOOTHING = 0.1


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(tokenizer, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).double()


@pytest.fixture(scope="module")
def policy(tokenizer):
    return make_model(tokenizer, 0)


@pytest.fixture(scope="module")
def reference(tokenizer):
    return make_model(tokenizer, 1)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)

    def words(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator))

    return [
        {
            "prompt": words(2, 5),
            "chosen": " " + words(2, 9) + (" goblin" if index % 3 == 0 else ""),
            "rejected": " " + words(2, 9),
            "weight": 0.25 * (index % 4),
            "creative": index % 2 == 0,
        }
        for index in range(8)
    ]


@pytest.fixture(scope="module")
def vector():
    return F.normalize(torch.randn(16, generator=torch.Generator().manual_seed(3)), dim=0)


@pytest.fixture(scope="module")
def concepts(vector):
    """The two readouts of the tests: of the stream after a layer, and of the text."""
    return {"direction": Direction(vector, layer=LAYER, pooling="mean"), "text": Regex("goblin")}


@pytest.fixture
def build(tokenizer, policy, reference, rows, tmp_path):
    def build(concepts, loss_type, columns=("prompt", "chosen", "rejected", "creative"), **kwargs):
        dataset = Dataset.from_list([{name: row[name] for name in columns} for row in rows])
        args = ShapedDPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(rows),
            loss_type=loss_type,
            beta=BETA,
            label_smoothing=SMOOTHING if {"exo_pair", "robust"} & {*loss_type} else 0.0,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=kwargs.pop("gradient_checkpointing", False),
            concepts=concepts,
            **kwargs,
        )
        return ShapedDPOTrainer(
            model=copy.deepcopy(policy),
            ref_model=copy.deepcopy(reference),
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
        )

    return build


def gradient(trainer):
    """Loss and parameter gradients of one training step on the whole data set, in its order."""
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, batch)
    return loss, {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


def assert_gradients(trainer, policy, objective):
    """The trainer's gradient equals that of `objective`, to float32's precision (in which scores are kept)."""
    loss, found = gradient(trainer)
    expected = dict(
        zip(
            (name for name, _ in policy.named_parameters()),
            torch.autograd.grad(objective, list(policy.parameters())),
            strict=True,
        )
    )
    scale = max(float(g.abs().max()) for g in expected.values())
    assert 1e-5 < scale < 1e4, f"the largest gradient is {scale}: the test says nothing"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * scale)
    return loss


# ------------------------------------------------------------------------------------------------- the slow reference


class Naive:
    """Log-probabilities and scores, one completion at a time."""

    def __init__(self, tokenizer, policy, reference, rows, vector):
        self.rows = rows
        self.logps, self.ref, self.lengths, raw_direction, raw_text = [], [], [], [], []
        for side in ("chosen", "rejected"):
            for row in rows:
                prompt = tokenizer(row["prompt"])["input_ids"]
                ids = tokenizer(row["prompt"] + row[side] + "</s>")["input_ids"]
                completion = range(len(prompt), len(ids))
                tokens = torch.tensor([ids])
                self.logps.append(self.log_prob(policy(tokens).logits[0], ids, completion))
                with torch.no_grad():
                    out = reference(tokens, output_hidden_states=True)
                self.ref.append(self.log_prob(out.logits[0], ids, completion))
                self.lengths.append(len(completion))
                stream = out.hidden_states[LAYER + 1][0]
                raw_direction.append(sum(float(stream[t] @ vector.double()) for t in completion) / len(completion))
                raw_text.append(float("goblin" in tokenizer.decode([ids[t] for t in completion])))
        self.scores = {"direction": standardise(raw_direction), "text": standardise(raw_text)}

    @staticmethod
    def log_prob(logits, ids, completion):
        return sum(torch.log_softmax(logits[t - 1], dim=-1)[ids[t]] for t in completion)

    def sides(self, values):
        values = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])
        return values[: len(self.rows)], values[len(self.rows) :]

    def delta(self, readout):
        chosen, rejected = self.sides(self.scores[readout])
        return chosen - rejected

    def losses(self, loss_type, tilt=0.0):
        """Each pair's loss, `(B,)`, against a reference tilted by `tilt` (`(2B,)` nats, subtracted)."""
        pc, pr = self.sides(self.logps)
        rc, rr = self.sides(torch.stack(self.ref) - tilt)
        nc, nr = self.sides(self.lengths)
        lc, lr = pc - rc, pr - rr
        m = BETA * (lc - lr)
        if loss_type == "sigmoid":
            return -F.logsigmoid(m)
        if loss_type == "hinge":
            return torch.clamp(1 - m, min=0)
        if loss_type == "ipo":
            return (lc / nc - lr / nr - 1 / (2 * BETA)) ** 2
        if loss_type == "exo_pair":  # KL(softmax of rewards || smoothed labels)
            p = torch.sigmoid(m)
            return p * torch.log(p / (1 - SMOOTHING)) + (1 - p) * torch.log((1 - p) / SMOOTHING)
        if loss_type == "robust":
            return (-(1 - SMOOTHING) * F.logsigmoid(m) + SMOOTHING * F.logsigmoid(-m)) / (1 - 2 * SMOOTHING)
        if loss_type == "discopop":
            blend = torch.sigmoid(m / 0.05)
            return (1 - blend) * -F.logsigmoid(m) + blend * torch.exp(-m)
        if loss_type == "sigmoid_norm":
            return -F.logsigmoid(BETA * (lc / nc - lr / nr))
        if loss_type == "nca_pair":
            return -F.logsigmoid(BETA * lc) - 0.5 * F.logsigmoid(-BETA * lc) - 0.5 * F.logsigmoid(-BETA * lr)
        if loss_type == "bco_pair":
            return -F.logsigmoid(BETA * lc) - F.logsigmoid(-BETA * lr)
        if loss_type == "sppo_hard":
            return (lc - 1 / (2 * BETA)) ** 2 + (lr + 1 / (2 * BETA)) ** 2
        if loss_type == "apo_zero":
            return 1 - torch.sigmoid(BETA * lc) + torch.sigmoid(BETA * lr)
        if loss_type == "apo_down":
            return torch.sigmoid(BETA * lc) + 1 - torch.sigmoid(BETA * (lc - lr))
        if loss_type == "aot":
            return -F.logsigmoid(BETA * ((pc - pr).sort()[0] - (rc - rr).sort()[0]))
        if loss_type == "aot_unpaired":
            return -F.logsigmoid(BETA * (lc.sort()[0] - lr.sort()[0]))
        raise AssertionError(loss_type)


def standardise(raw):
    raw = torch.tensor(raw, dtype=torch.float64)
    return (raw - raw.mean()) / raw.std()


@pytest.fixture
def naive(tokenizer, policy, reference, rows, vector):
    return Naive(tokenizer, policy, reference, rows, vector)


# -------------------------------------------------------------------------------------------------------------- deltas


def test_deltas_equal_those_of_completions_run_one_at_a_time(build, naive, concepts):
    trainer = build([Concept(name, readout) for name, readout in concepts.items()], ["sigmoid"])
    gradient(trainer)
    pc, pr = naive.sides(naive.logps)
    rc, rr = naive.sides(naive.ref)
    apart = (pc - rc) - (pr - rr)
    for name in concepts:
        d = naive.delta(name)
        logged = {
            key: trainer._metrics["train"][f"concepts/{name}/{key}"] for key in ("delta", "amplification", "pressure")
        }
        assert logged["delta"] == [pytest.approx(float(d.mean()), abs=1e-5)]
        assert logged["amplification"] == [pytest.approx(float((apart * d).mean().detach() / 4), rel=1e-5, abs=1e-5)]
        assert logged["pressure"] == [
            pytest.approx(float((torch.sigmoid(-BETA * apart) * d).mean().detach()), abs=1e-5)
        ]


# -------------------------------------------------------------------------------------------------------------- reward


# The action is a sign, and a gate a factor, of what enters the loss: whichever that is.
def every(losses, usual, other):
    """Each loss type with the usual, and one of them with the other."""
    return [*((loss, usual) for loss in losses), ("sigmoid", other)]


@pytest.mark.parametrize(("loss_type", "action"), every([*PAIRWISE, *UNPAIRED, *SORTING], "suppress", "amplify"))
def test_reward(build, naive, policy, concepts, loss_type, action):
    trainer = build([Concept("x", concepts["direction"], action=action, strength=STRENGTH)], [loss_type])
    sign = 1 if action == "suppress" else -1
    objective = naive.losses(loss_type, sign * STRENGTH / BETA * naive.scores["direction"]).mean()
    loss = assert_gradients(trainer, policy, objective)
    assert float(loss) == pytest.approx(float(objective), rel=1e-5)


def test_reward_of_the_sigmoid_loss_is_the_papers_offset_of_the_margin(naive):
    pc, pr = naive.sides(naive.logps)
    rc, rr = naive.sides(naive.ref)
    margin = BETA * ((pc - rc) - (pr - rr)) + STRENGTH * naive.delta("text")
    tilted = naive.losses("sigmoid", STRENGTH / BETA * naive.scores["text"])
    torch.testing.assert_close(tilted, -F.logsigmoid(margin))


def test_reward_gated_by_a_column(build, naive, policy, concepts, rows):
    gate = torch.tensor([float(row["creative"]) for row in rows], dtype=torch.float64)
    concept = Concept("x", concepts["text"], action="suppress", strength=STRENGTH, gate=Gate(column="creative"))
    tilt = STRENGTH / BETA * gate.repeat(2) * naive.scores["text"]
    assert_gradients(build([concept], ["sigmoid"]), policy, naive.losses("sigmoid", tilt).mean())


def test_reward_gated_by_a_concept_on_the_prompt(build, naive, policy, concepts, rows, reference, tokenizer, vector):
    raw = []
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        with torch.no_grad():
            stream = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
        # Not the first token: its activations are outliers.
        raw.append(sum(float(stream[t] @ vector.double()) for t in range(1, len(ids))) / (len(ids) - 1))
    gate = (standardise(raw) > 0.2).double()
    assert 0 < gate.sum() < len(rows)
    shaped = Concept("x", concepts["text"], action="suppress", strength=STRENGTH, gate=Gate(concept="y", threshold=0.2))
    tilt = STRENGTH / BETA * gate.repeat(2) * naive.scores["text"]
    trainer = build([shaped, Concept("y", concepts["direction"])], ["sigmoid"])
    assert_gradients(trainer, policy, naive.losses("sigmoid", tilt).mean())


def test_several_losses_with_sft(build, naive, policy, concepts):
    trainer = build([Concept("x", concepts["text"], action="suppress", strength=STRENGTH)], ["sigmoid", "sft"])
    tilt = STRENGTH / BETA * naive.scores["text"]
    chosen, _ = naive.sides(naive.logps)
    lengths, _ = naive.sides(naive.lengths)
    assert_gradients(trainer, policy, naive.losses("sigmoid", tilt).mean() - chosen.sum() / lengths.sum())


# -------------------------------------------------------------------------------------------------------- pair weights


@pytest.mark.parametrize("loss_type", [*PAIRWISE, *UNPAIRED])
def test_weight_column(build, naive, policy, rows, loss_type):
    trainer = build(None, [loss_type], columns=("prompt", "chosen", "rejected", "weight"))
    weights = torch.tensor([row["weight"] for row in rows], dtype=torch.float64)
    objective = (weights * naive.losses(loss_type)).mean()
    loss = assert_gradients(trainer, policy, objective)
    assert float(loss) == pytest.approx(float(objective), rel=1e-5)


@pytest.mark.parametrize(("loss_type", "action"), every([*PAIRWISE, *UNPAIRED], "suppress", "amplify"))
def test_reweight(build, naive, policy, concepts, loss_type, action):
    concept = Concept("x", concepts["direction"], action=action, method="reweight", strength=STRENGTH)
    sign = 1 if action == "suppress" else -1
    weights = torch.sigmoid(-sign * STRENGTH * naive.delta("direction"))
    weights = weights / weights.mean()
    objective = (weights * naive.losses(loss_type)).mean()
    loss = assert_gradients(build([concept], [loss_type]), policy, objective)
    assert float(loss) == pytest.approx(float(objective), rel=1e-5)


@pytest.mark.parametrize("loss_type", [*PAIRWISE, *UNPAIRED])
def test_mask_by_threshold(build, naive, policy, concepts, loss_type):
    concept = Concept("x", concepts["direction"], action="suppress", method=Mask(threshold=0.5))
    keep = (naive.delta("direction") < 0.5).double()
    assert 0 < keep.sum() < len(keep)
    assert_gradients(build([concept], [loss_type]), policy, (keep * naive.losses(loss_type)).mean())


@pytest.mark.parametrize("action", ["suppress", "amplify"])
def test_mask_by_fraction(build, naive, policy, concepts, action):
    concept = Concept("x", concepts["direction"], action=action, method={"name": "mask", "fraction": 0.25})
    delta = naive.delta("direction") * (1 if action == "suppress" else -1)
    keep = torch.ones(len(delta), dtype=torch.float64)
    keep[delta.topk(2).indices] = 0
    assert (delta.topk(2).values > 0).all()
    assert_gradients(build([concept], ["sigmoid"]), policy, (keep * naive.losses("sigmoid")).mean())


def test_weights_multiply_with_each_other_and_with_wpo(build, naive, policy, concepts, rows, tokenizer):
    trainer = build(
        [
            Concept("x", concepts["direction"], action="suppress", method="reweight", strength=STRENGTH),
            Concept("y", concepts["text"], action="suppress", method=Mask(threshold=0.5)),
            Concept("z", concepts["text"], action="amplify", strength=STRENGTH),
        ],
        ["sigmoid"],
        columns=("prompt", "chosen", "rejected", "weight"),
        use_weighting=True,
    )
    weights = torch.sigmoid(-STRENGTH * naive.delta("direction"))
    weights = weights / weights.mean() * (naive.delta("text") < 0.5)
    weights = weights * torch.tensor([row["weight"] for row in rows], dtype=torch.float64)
    wpo = []  # exp of the mean over tokens of log p(token) - log sum_v p_v^2
    for side in ("chosen", "rejected"):
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = tokenizer(row["prompt"] + row[side] + "</s>")["input_ids"]
            with torch.no_grad():
                log_p = torch.log_softmax(policy(torch.tensor([ids])).logits[0], dim=-1)
            aligned = [
                log_p[t - 1][ids[t]] - torch.logsumexp(2 * log_p[t - 1], 0) for t in range(len(prompt), len(ids))
            ]
            wpo.append(torch.exp(sum(aligned) / len(aligned)))
    chosen, rejected = naive.sides(wpo)
    losses = naive.losses("sigmoid", -STRENGTH / BETA * naive.scores["text"])
    assert_gradients(trainer, policy, (weights * chosen * rejected * losses).mean())


# ---------------------------------------------------------------------------------------------------------- projection


@pytest.mark.parametrize(("loss_type", "gated"), every([*PAIRWISE, *UNPAIRED], False, True))
def test_project_in_pair_space(build, naive, policy, concepts, rows, loss_type, gated):
    gate = Gate(column="creative") if gated else None
    trainer = build(
        [
            Concept("x", concepts["direction"], action="suppress", method="project", gate=gate),
            Concept("y", concepts["text"], action="suppress", method="project"),
        ],
        [loss_type],
    )
    plain = naive.losses(loss_type).mean()
    by_completion = torch.autograd.grad(plain, naive.logps, retain_graph=True)
    to_chosen, to_rejected = naive.sides(by_completion)
    coefficients = (to_rejected - to_chosen) / 2
    mask = torch.tensor([float(row["creative"]) for row in rows], dtype=torch.float64) if gated else 1.0
    deltas = torch.stack([naive.delta("direction") * mask, naive.delta("text")], dim=1)
    excess = deltas @ torch.linalg.lstsq(deltas, coefficients[:, None]).solution[:, 0]
    assert (deltas.T @ (coefficients - excess)).abs().max() < 1e-12
    # The objective whose gradient has the projected coefficients.
    chosen, rejected = naive.sides(naive.logps)
    objective = plain + (excess * (chosen - rejected)).sum()
    loss = assert_gradients(trainer, policy, objective)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_project_in_the_residual_stream(build, naive, policy, concepts, vector, loss_type, checkpointing):
    concept = Concept("x", concepts["direction"], action="suppress", method=Project("residual", layers=[0, 2]))
    kwargs = {}
    if checkpointing is not None:
        kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    trainer = build([concept], [loss_type], **kwargs)
    q = vector.double()

    # A forward pass written with the projection as part of it: h stays h, its gradient loses what lies along q.
    def hook(module, args, output):
        along = (output @ q)[..., None] * q
        return output - along + along.detach()

    handles = [policy.model.layers[index].register_forward_hook(hook) for index in (0, 2)]
    try:
        naive.logps = Naive(trainer.processing_class, policy, trainer.ref_model, naive.rows, vector).logps
        objective = naive.losses(loss_type).mean()
        assert_gradients(trainer, policy, objective)
    finally:
        for handle in handles:
            handle.remove()


def test_project_with_ld_alpha(build, naive, policy, concepts, tokenizer, rows):
    """LD-DPO counts a completion's tokens beyond the shorter one's length by alpha: the projection must too."""
    alpha = 0.4
    trainer = build(
        [Concept("x", concepts["direction"], action="suppress", method="project")], ["sigmoid"], ld_alpha=alpha
    )
    chosen_lengths, rejected_lengths = naive.sides(naive.lengths)
    shared = torch.minimum(chosen_lengths, rejected_lengths).repeat(2).tolist()

    def discounted(model):
        logps = []
        for index in range(2 * len(rows)):
            row, side = rows[index % len(rows)], "chosen" if index < len(rows) else "rejected"
            start = len(tokenizer(row["prompt"])["input_ids"])
            ids = tokenizer(row["prompt"] + row[side] + "</s>")["input_ids"]
            log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
            weights = [1.0 if t - start < shared[index] else alpha for t in range(start, len(ids))]
            logps.append(sum(w * log_p[t - 1][ids[t]] for w, t in zip(weights, range(start, len(ids)), strict=True)))
        return logps

    naive.logps = discounted(policy)
    naive.ref = [logp.detach() for logp in discounted(trainer.ref_model)]
    plain = naive.losses("sigmoid").mean()
    to_chosen, to_rejected = naive.sides(torch.autograd.grad(plain, naive.logps, retain_graph=True))
    coefficients, delta = (to_rejected - to_chosen) / 2, naive.delta("direction")
    excess = delta * (delta @ coefficients) / (delta @ delta)
    chosen, rejected = naive.sides(naive.logps)
    assert_gradients(trainer, policy, plain + (excess * (chosen - rejected)).sum())
