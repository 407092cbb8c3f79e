"""Contrast sets: forms of files, splits, judges, and answers under instructions."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from shapedpo import lab
from shapedpo.probes.contrast import Contrast, Row, check_labels, read_contrast
from shapedpo.probes.instructed import instructed_rows
from shapedpo.probes.judge import judge_from
from shapedpo.readouts.responses import tokenize_response
from tests.helpers import load_model, tokenizer


LABELLED = [
    {"prompt": "p", "completion": "yes", "label": True, "more": 1},
    {"prompt": "q", "completion": "no", "label": False},
]
PAIRED = [{"prompt": "p", "chosen": "yes", "rejected": "no"}]


def write(path, rows):
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_forms(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", LABELLED)
    assert read_contrast([path]) == [Row("p", "yes", True, path), Row("q", "no", False, path)]
    other = write(tmp_path / f"b{suffix}", PAIRED)
    assert read_contrast([other], chat=True) == [
        Row([{"role": "user", "content": "p"}], [{"role": "assistant", "content": answer}], answer == "yes", other)
        for answer in ("yes", "no")
    ]
    assert [row[2] for row in read_contrast([path], label=False)] == [False, False]


def test_messages(tmp_path):
    prompt, answer = [{"role": "user", "content": "p"}], [{"role": "assistant", "content": "a"}]
    for suffix in (".jsonl", ".parquet"):
        path = write(tmp_path / f"m{suffix}", [{"prompt": prompt, "response": answer, "label": 1}])
        assert read_contrast([path], chat=True) == [Row(prompt, answer, True, path)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_several_concepts_of_one_file(tmp_path, suffix):
    """Rows that say which concepts they show serve for each of them, and the others are hard negatives."""
    told = [["praise"], ["cheer", "praise"], [], ["cheer"], ["praise"], []]
    rows = [{"prompt": f"p{i}", "response": "r", "shows": shows} for i, shows in enumerate(told)]
    if suffix == ".csv":
        rows = [row | {"shows": ", ".join(row["shows"])} for row in rows]
    path = write(tmp_path / f"a{suffix}", rows)
    contrast = Contrast.of(read_contrast([path], concept="cheer"))
    assert contrast.labels.tolist() == ["cheer" in shows for shows in told]
    assert {name: rows.tolist() for name, rows in contrast.hard().items()} == {
        "praise": [True, False, False, False, True, False]
    }
    assert [row.others for row in read_contrast([path], label=False, concept="praise")] == [
        tuple(name for name in shows if name != "praise") for shows in told
    ]
    with pytest.raises(ValueError, match="1 names the concepts that it shows"):
        read_contrast([path])


def test_kinds_of_negatives_weigh_alike():
    """Those of each source where there are several, and those that show another concept; of what is left a kind of its own has as much."""
    rows = [Row(str(i), "", i < 4, "a" if i < 10 else "b", ("praise",) if i in (0, 4, 5) else ()) for i in range(12)]
    contrast = Contrast.of(rows)
    kinds = contrast.hard()
    assert {name: np.flatnonzero(rows).tolist() for name, rows in kinds.items()} == {
        "praise": [4, 5], "a": [4, 5, 6, 7, 8, 9], "b": [10, 11]
    }  # fmt: skip
    weights = contrast.weights()
    assert weights[:4].sum() == pytest.approx(6)
    one = {
        4: 4 / 8 + 1 / 2 + 1 / 6,
        6: 4 / 8 + 1 / 6,
        10: 4 / 8 + 1 / 2,
    }  # all negatives, praise and a; all and a; all and b
    for row, weight in one.items():
        assert weights[row] == pytest.approx(weight * 6 / 7)
    np.testing.assert_array_equal(contrast.take(np.arange(2, 8)).hard()["praise"], [0, 0, 1, 1, 0, 0])
    assert not Contrast.of(rows[:4] + [row._replace(others=()) for row in rows[4:10]]).hard()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"response": "a", "label": 1}, "line 1 has no 'prompt'"),
        ({"prompt": "a", "response": "a"}, "line 1 has no 'label'"),
        ({"prompt": "a", "response": "a", "label": "perhaps"}, "the label 'perhaps'. Expected true or false"),
        ({"prompt": "a", "response": "a", "label": [1]}, "the label [1]. Expected true or false"),
        ({"prompt": "a", "chosen": "a"}, "line 1 has no 'response'"),
        ({"prompt": None, "response": "a", "label": 1}, "line 1: the prompt must be a string or a list of messages"),
        ({"prompt": "a", "response": 5, "label": 1}, "line 1: the response must be a string or a list of messages"),
        ({"prompt": ["a"], "response": ["b"], "label": 1}, "with `role` and `content`, got ['a']"),
        (
            {"prompt": "a", "response": [{"role": "assistant", "content": "b"}], "label": 1},
            "must both be strings, or both lists of messages",
        ),
        ({"prompt": "a", "response": " ", "label": 1}, "line 1: the response is empty"),
        ([1], "line 1 is no object"),
    ],
)
def test_bad_rows(tmp_path, row, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        read_contrast([write(tmp_path / "a.jsonl", [row])])


@pytest.mark.parametrize(
    ("suffix", "content"), [(".jsonl", b'"\xe9"'), (".csv", b"\xe9"), (".csv", b""), (".parquet", b"x")]
)
def test_files_that_are_none(tmp_path, suffix, content):
    path = tmp_path / f"contrast{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}'.*(is not UTF-8|as {suffix[1:]}: )"):
        read_contrast([str(path)])


def test_line_ends_in_strings_and_a_mark_at_the_start(tmp_path):
    path = Path(write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b", "label": True}]))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b'"b"', '"b\u2028c"'.encode()))
    assert [row.response for row in read_contrast([str(path)])] == ["b\u2028c"]


def test_messages_that_the_chat_template_refuses():
    """A message without text, for one."""
    prompt = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=r"chat template refuses .*'role': 'assistant'}\]"):
        tokenize_response(lab.load_tokenizer(), prompt, [{"role": "assistant"}])


def test_a_response_of_both_kinds():
    rows = [Row("a", "b", True, ""), Row("a", "c", False, ""), Row("b", "b", False, "")]
    check_labels(rows)
    with pytest.raises(ValueError, match="the response 'c' to 'a' is there twice"):
        check_labels([*rows, Row("a", "c", True, "")])


def test_split_keeps_prompts_together():
    rows = [(f"p{i // 3}", f"r{i}", i % 3 == 0, "") for i in range(60)]
    contrast = Contrast.of(rows)
    fit, held = contrast.split(0.25, seed=1)
    assert sorted([*fit, *held]) == list(range(60))
    assert not set(contrast.groups[fit]) & set(contrast.groups[held])
    assert len(held) == 15
    assert not np.array_equal(held, contrast.split(0.25, seed=2)[1])
    pairs = contrast.take(fit).pairs()
    assert len(pairs) == 30  # one that shows it and two that do not, of 15 prompts
    with pytest.raises(ValueError, match="responses to one prompt stay together"):
        Contrast.of([("p", str(i), i < 2, "") for i in range(4)]).split(0.5, 0)
    with pytest.raises(ValueError, match="1 show the concept: at least 2"):
        Contrast.of(rows[:3])


def test_answers_under_instructions():
    """Read without the instruction, the same for a seed, and only those that the judge sees do as told."""
    model, prompts = load_model(), ["<bos> the cat", "<bos> a red fox sees", "<bos> the heron"]
    options = {"seed": 3, "batch_size": 2, "max_new_tokens": 6}
    state = torch.get_rng_state()
    rows = instructed_rows(model, tokenizer(), prompts, ("likes the goblin", "eats"), **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert rows == instructed_rows(model, tokenizer(), prompts, ("likes the goblin", "eats"), **options)
    assert rows != instructed_rows(model, tokenizer(), prompts, ("likes the goblin", "eats"), **{**options, "seed": 4})
    assert {row[0] for row in rows} == set(prompts)  # an empty answer is left out
    assert len({(row[0], row[2]) for row in rows}) == len(rows) >= 5
    word = rows[0][1].split()[0]
    kept = instructed_rows(
        model, tokenizer(), prompts, ("likes the goblin", "eats"), judge=judge_from(f"regex:{word}", ""), **options
    )
    assert kept == [row for row in rows if (word in row[1]) == row[2]]
    assert 0 < len(kept) < len(rows)


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server that says yes to what mentions a goblin."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            if self.path.startswith("/nowhere"):
                self.send_error(404)
                return
            said = "Yes." if "goblin" in body["messages"][0]["content"].split("<response>")[1] else "No"
            said = "maybe" if "unsure" in body["messages"][0]["content"] else said
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()


def test_judges(endpoint):
    address, asked = endpoint
    judge = judge_from(f"{address}#small", "mentions goblins")
    assert judge([("goblin?", "a goblin"), ("goblin?", "none")]) == [True, False]
    assert asked[0][0] == "/v1/chat/completions"
    assert asked[0][1]["model"] == "small"
    assert "mentions goblins" in asked[0][1]["messages"][0]["content"]
    with pytest.raises(ValueError, match="said 'maybe'"):
        judge([("unsure", "")])
    with pytest.raises(ValueError, match="names no model"):
        judge_from(address, "x")
    with pytest.raises(ValueError, match="nowhere/v1, model m: "):
        judge_from(f"{address.replace('/v1', '')}/nowhere/v1#m", "x", retries=0)([("a", "b")])
    assert judge_from("builtins:bool", "x")([("a", "b"), ("a", "")]) == [True, False]
