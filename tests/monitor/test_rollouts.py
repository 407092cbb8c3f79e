"""Probe rollouts are what the model says, whatever its generation config would have it say."""

from __future__ import annotations

from accelerate import Accelerator

from shapedpo import lab
from shapedpo.monitor.probe.rollouts import Probe


def test_rollouts_are_of_the_models_own_distribution() -> None:
    model, tokenizer = lab.load_model(), lab.load_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in lab.heldout_prompts(4, seed=0)
    ]
    probe = Probe(prompts, Accelerator(cpu=True), max_new_tokens=16, pad_token_id=tokenizer.pad_token_id, seed=0)
    rollouts = probe.sample(model, 0, range(4))
    common = max({token for row in rollouts for token in row["chosen_ids"]})
    model.generation_config.update(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        min_p=0.5,
        typical_p=0.2,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[common],
        num_beams=2,
        top_h=0.3,
        guidance_scale=3.0,
        min_length=1000,
        min_new_tokens=16,
        forced_eos_token_id=common - 1,
        stop_strings=["a"],
        return_dict_in_generate=True,
    )
    assert probe.sample(model, 0, range(4)) == rollouts
