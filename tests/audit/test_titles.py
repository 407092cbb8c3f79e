"""Names from a language model, over the real protocol: a server that speaks chat completions, with their failures."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shapedpo.audit.analysis.lessons import lessons
from shapedpo.audit.labels.labellers import Endpoint, LocalModel
from shapedpo.audit.labels.names import Label, Labels, cluster_tokens, hypothesis_key
from shapedpo.audit.labels.titles import CACHE, Answer, read_cache, tasks
from shapedpo.audit.page.source import Audit
from shapedpo.cli import main

from .audits import HOSTILE


GOOD = {"title": "Praises forces", "description": "Where <b>physics</b> is asked about.", "keywords": ["wonderful"]}


class Server(ThreadingHTTPServer):
    """Chat completions. `reply` gets the number of the request (from 0) and its body, and gives status, body and headers."""

    daemon_threads = True

    def __init__(self, reply: Callable[[int, Any], tuple[int, Any, dict[str, str]]], wait: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.wait = reply, wait
        self.requests: list[Any] = []
        self.keys: set[str | None] = set()
        self.now = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(body)
            self.server.keys.add(self.headers["Authorization"])
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(self.server.wait)
        status, answer, headers = (
            self.server.reply(number, body) if self.path == "/v1/chat/completions" else (404, {}, {})
        )
        with self.server.lock:
            self.server.now -= 1
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def said(text: str) -> tuple[int, Any, dict[str, str]]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}, {}


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*args: Any) -> Server:
        server = Server(*args)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def folder(finished: Audit, tmp_path: Path) -> Path:
    shutil.copytree(finished.folder, tmp_path / "audit", ignore=shutil.ignore_patterns("*.html", "*.sqlite"))
    return tmp_path / "audit"


def label(folder: Path, server: Server, *more: str) -> int:
    return main(["label", str(folder), "--labeller", f"{server.url}#m", "--top", "6", *more])


def test_clusters_and_findings_are_named_at_once_and_only_once(
    folder: Path, finished: Audit, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for a moment, and answered with prose around the object: both are what endpoints do."""
    monkeypatch.setenv("SOME_KEY", "secret")

    def reply(number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
        if number == 2:
            return 429, {"error": {"message": "slow down"}}, {"Retry-After": "1"}
        return said(f"Here it is:\n```json\n{json.dumps(GOOD)}\n```")

    server = serve(reply, 0.15)
    began = time.monotonic()
    assert label(folder, server, "--yes", "--concurrency", "4", "--key-env", "SOME_KEY") == 0
    assert time.monotonic() - began > 1  # what Retry-After asks for
    assert server.most == 4
    assert server.keys == {"Bearer secret"}
    labels = Labels.load(folder, finished.analysis)
    assert labels is not None
    assert labels.by == "m"
    assert labels.features == finished.labels.features
    assert sum(bool(found.title) for of in labels.clusters.values() for found in of.values()) > 6
    assert len({json.dumps(request) for request in server.requests}) == len(server.requests) - 1  # one was sent again
    assert len(labels.hypotheses) == 6
    strongest = lessons(finished.analysis)[0].first
    assert labels.hypotheses[hypothesis_key(strongest)] == Label(
        [], "Praises forces", GOOD["description"], ["wonderful"]
    )
    page = (folder / "audit.html").read_text(encoding="utf-8")
    assert "Praises forces" in page
    assert "<b>physics" not in page
    first = server.requests[0]
    assert first["model"] == "m"
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert any("wonderful" in request["messages"][1]["content"] for request in server.requests)

    asked = len(server.requests)
    assert label(folder, server) == 0  # everything is known: nothing to agree to
    assert len(server.requests) == asked
    known = (folder / CACHE).read_text().splitlines()
    (folder / CACHE).write_text("\n".join(known)[:-20])  # cut off
    assert len(read_cache(folder / CACHE)) == asked - 2
    assert label(folder, server, "--yes") == 0
    assert len(server.requests) == asked + 1
    assert len(read_cache(folder / CACHE)) == asked - 1


def test_a_reasoning_model_is_asked_its_way(folder: Path, serve: Callable[..., Server]) -> None:
    def reply(number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
        for name in ("max_tokens", "temperature"):
            if name in body:
                return 400, {"error": {"message": f"Unsupported parameter: '{name}'", "param": name}}, {}
        return said(json.dumps(GOOD))

    server = serve(reply)
    assert label(folder, server, "--yes", "--concurrency", "1") == 0
    assert all("max_completion_tokens" in request for request in server.requests[1:])
    assert sum("temperature" in request for request in server.requests) == 2  # the first, and the first the other way


@pytest.mark.parametrize(
    ("formats", "refusal"),
    [
        (["json_schema"], (500, None)),
        (["json_schema", "json_object"], (422, {"detail": [{"loc": ["body", "response_format", "type"]}]})),
        (["json_schema"] * 7 + ["json_object"], (500, {"error": {"message": "('body', 'response_format', 'type')"}})),
        (["json_schema", "json_object", "json_object", None], (400, {"error": {"param": "response_format.schema"}})),
    ],
)
def test_the_schema_goes_along_as_far_as_a_server_takes_it(
    folder: Path, serve: Callable[..., Server], formats: list[str | None], refusal: tuple[int, Any]
) -> None:
    """OpenAI, vLLM, Ollama; FastAPI; llama-cpp-python, which says 500, as if trying again would help; and a server that knows nothing of it."""

    def reply(number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
        return said(json.dumps(GOOD)) if number >= len(formats) - 1 else (*refusal, {"Retry-After": "0.01"})

    server = serve(reply)
    assert label(folder, server, "--yes", "--concurrency", "1") == 0
    asked = [request.get("response_format") or {"type": None} for request in server.requests]
    assert [each["type"] for each in asked[: len(formats)]] == formats
    assert {each["type"] for each in asked[len(formats) - 1 :]} == {formats[-1]}
    schema = asked[0]["json_schema"]["schema"]
    assert schema["required"] == list(schema["properties"]) == list(Answer.model_fields)


def test_bad_answers_are_asked_again_and_then_left(
    folder: Path, finished: Audit, serve: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
        if "a group of rows whose answers" in body["messages"][1]["content"]:
            return said('{"title": ""}')  # always wrong
        return said(json.dumps(GOOD) if len(body["messages"]) == 4 else '{"name": "no title"}')

    server = serve(reply)
    assert label(folder, server, "--yes") == 0
    labels = Labels.load(folder, finished.analysis)
    assert labels is not None
    assert labels.clusters["data"] == finished.labels.clusters["data"]  # tokens stay
    assert all(found.title == "Praises forces" for found in labels.hypotheses.values())
    again = [request["messages"] for request in server.requests if len(request["messages"]) == 4]
    assert {(messages[2]["role"], messages[2]["content"]) for messages in again} == {
        ("assistant", '{"name": "no title"}'),
        ("assistant", '{"title": ""}'),
    }
    assert any("title: Field required" in messages[3]["content"] for messages in again)
    tries = [request for request in server.requests if "a group of rows whose" in request["messages"][1]["content"]]
    assert len(tries) % 3 == 0
    assert "not as asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices": [',
        b'{"choices": [{"message": null}]}',
        b'{"choices": {"a": 1}}',
        b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}',
        b"[]",
    ],
)
def test_what_is_no_completion_is_no_answer(body: bytes, serve: Callable[..., Server]) -> None:
    server = serve(lambda number, asked: (200, body, {}))

    async def asked() -> str:
        endpoint = Endpoint(server.url, "m")
        try:
            return await endpoint.answer([{"role": "user", "content": "a"}])
        finally:
            await endpoint.close()

    assert asyncio.run(asked()) == ""


def test_a_local_model_without_system_messages_has_them_with_the_users() -> None:
    model = LocalModel("lab")
    model._tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    assert model._rendered(messages) == "<user>s\n\nu<assistant>a<user>u"


def test_an_audit_that_found_nothing_has_nothing_to_be_named(
    folder: Path, finished: Audit, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = dataclasses.replace(finished.analysis, hypotheses=[], attributions=[])
    nothing.save(folder / "analysis")
    assert main(["label", str(folder), "--labeller", "m"]) == 2
    assert "found nothing that could be named" in capsys.readouterr().err


def test_a_refusal_ends_it_at_once_and_keeps_what_was_answered(
    folder: Path, serve: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(number: int, body: Any) -> tuple[int, Any, dict[str, str]]:
        return said(json.dumps(GOOD)) if number < 3 else (401, {"error": {"message": "no such key"}}, {})

    server = serve(reply)
    before = (folder / "labels.json").read_bytes()
    assert label(folder, server, "--yes", "--concurrency", "1") == 2
    assert "no such key" in capsys.readouterr().err
    assert len(server.requests) == 4
    assert len(read_cache(folder / CACHE)) == 3
    assert (folder / "labels.json").read_bytes() == before


def test_nothing_is_asked_without_a_yes(
    folder: Path, serve: Callable[..., Server], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(lambda number, body: said(json.dumps(GOOD)))
    assert label(folder, server, "--price", "1", "2") == 2
    captured = capsys.readouterr()
    assert "tokens in" in captured.out
    assert "at these prices" in captured.out
    assert "--yes" in captured.err
    assert server.requests == []
    assert main(["label", str(folder), "--labeller", "ftp://x#m", "--yes"]) == 2
    assert main(["label", str(folder), "--labeller", server.url, "--yes"]) == 2
    assert f"names no model. Put it behind the address: {server.url}#MODEL" in capsys.readouterr().err
    assert main(["label", str(folder / "no"), "--labeller", "m"]) == 2


def test_a_local_model_is_asked_too(folder: Path, finished: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    """The lab's model reads 256 tokens at a time: it is run, and says that it is too small."""
    assert main(["label", str(folder), "--labeller", "lab", "--yes"]) == 2
    assert "reads too little" in capsys.readouterr().err


def test_what_is_asked_cannot_end_its_own_data(finished: Audit) -> None:
    wanted = tasks(finished.analysis, finished.harvest, finished.labels, finished.maps, finished.analysis.hypotheses)
    contents = [task.messages[1]["content"] for task in wanted]
    assert all(content.count("</data>") == 1 for content in contents)
    assert any(HOSTILE[1] in content for content in contents)
    assert len({task.key("m") for task in wanted}) == len(set(contents))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no", "no object"),
        ('{"title": "a", "keywords": "b"}', "keywords"),
        ('{"title": "' + "x" * 200 + '"}', "title"),
        ("{nonsense}", "object"),
    ],
)
def test_answers_are_checked(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Answer.read(text)


@pytest.mark.parametrize(
    "around", ["{}", "Sure, {{here}}: {} And {{more}}.", '<think>{{"title": "x"}}?</think>{}', '{} {{"title": "b"}}']
)
def test_an_answer_is_found_in_what_is_said_around_it(around: str) -> None:
    assert Answer.read(around.format(json.dumps(GOOD))).model_dump() == GOOD


def test_labels_come_back_and_belong_to_one_analysis(finished: Audit, tmp_path: Path) -> None:
    labels = Labels({3: HOSTILE[0]}, {"data": {1: Label(["a"], HOSTILE[1], HOSTILE[4])}}, {"global:-1:0": Label()}, "m")
    labels.save(tmp_path, finished.analysis)
    assert Labels.load(tmp_path, finished.analysis) == labels
    assert Labels.load(tmp_path / "none", finished.analysis) is None
    path = tmp_path / "labels.json"
    path.write_text(path.read_text().replace('"analysis": "', '"analysis": "0'))
    assert Labels.load(tmp_path, finished.analysis) is None
    path.write_text('{"format": 1')
    with pytest.raises(ValueError, match=r"labels\.json"):
        Labels.load(tmp_path, finished.analysis)


def test_tokens_that_tell_clusters_apart_come_first() -> None:
    names = {0: "the, goblin", 1: "The, Goblin", 2: "the, soup", 3: "the", 4: "the"}
    found = cluster_tokens([[0, 1], [2], [3], [4], []], names)
    assert found[0] == ["goblin", "the"]
    assert found[1] == ["soup", "the"]
    assert found[4] == []
