"""The server of `shapedpo view`: what it answers, and to whom."""

from __future__ import annotations

import dataclasses
import http.client
import json
import resource
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shapedpo.audit.page.rows import RowStore, hypothesis_subject
from shapedpo.audit.page.server import ViewServer
from shapedpo.audit.page.source import Audit
from shapedpo.cli import main
from shapedpo.scripts.view import server


@pytest.fixture(scope="module")
def folder(finished: Audit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("view") / "audit"
    shutil.copytree(finished.folder, path)
    return path


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Any]:
    running = server(str(folder), progress=False)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def ask(served: Any, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", served.server_port, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def test_only_this_machine_and_its_own_page_are_answered(served: Any) -> None:
    assert served.socket.getsockname()[0] == "127.0.0.1"
    status, body, headers = ask(served, "/")
    assert status == 200
    assert b"What this data teaches" in body
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    port = served.server_port
    assert ask(served, "/", Host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "", f"127.0.0.1:{port}.evil.example"):
        status, body, _ = ask(served, "/api/rows?hypothesis=0", Host=host)
        assert status == 421, host
        assert b"prompt" not in body
    assert ask(served, "/api/rows?hypothesis=0", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(served, "/api/rows?hypothesis=0", Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_only_get_is_answered(served: Any, method: str) -> None:
    assert ask(served, "/", method)[0] == 501


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/labels.json", "/labels.json", "/view.sqlite", "/api", "/api/rows/../x"]
)
def test_no_file_is_served(served: Any, path: str) -> None:
    assert ask(served, path)[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/api/rows",
        "/api/rows?hypothesis=-1",
        "/api/rows?hypothesis=x",
        "/api/rows?lesson=999",
        "/api/numbers",
        "/api/numbers?numbers=99999999999999999999",
        "/api/teaches?row=a",
        "/api/search",
    ],
)
def test_bad_questions_are_refused(served: Any, path: str) -> None:
    assert ask(served, path)[0] == 400


def test_rows_search_and_what_a_row_teaches(served: Any, finished: Audit) -> None:
    best = finished.analysis.hypotheses[0]
    rows = json.loads(ask(served, "/api/rows?hypothesis=0&start=3&count=5")[1])["rows"]
    assert [row["row"] for row in rows] == best.rows[3:8].tolist()
    assert rows[0]["value"] == pytest.approx(best.contributions[3], rel=1e-3)
    text = finished.harvest.texts(best.rows[3:4])[0]
    assert {span: rows[0][span] for span in text} == text
    found = json.loads(ask(served, "/api/search?text=wonder+FORCE")[1])  # beginnings of words, in any case
    assert found["total"] == sum("wonderful" in t["chosen"] for t in finished.harvest.texts(finished.harvest.rows))
    assert json.loads(ask(served, "/api/search?text=%22%29%20OR%20NEAR%28")[1])["total"] == 0
    assert json.loads(ask(served, "/api/search?text=%21%21")[1]) == {"total": 0, "rows": []}
    row = int(best.named[0])
    assert 0 in json.loads(ask(served, f"/api/teaches?row={row}")[1])["hypotheses"]
    assert json.loads(ask(served, "/api/numbers?numbers=99999,0")[1])["rows"][0]["row"] == 0


def test_the_rows_are_copied_once_and_anew_for_another_analysis(folder: Path, served: Any) -> None:
    path = folder / "view.sqlite"
    first = path.stat().st_mtime_ns
    server(str(folder), progress=False).server_close()
    assert path.stat().st_mtime_ns == first
    path.write_bytes(path.read_bytes()[:5000])  # cut off
    server(str(folder), progress=False).server_close()
    assert path.stat().st_size > 5000


def test_other_hypotheses_of_the_same_clusters_have_marks_of_their_own(finished: Audit, tmp_path: Path) -> None:
    best, *others = finished.analysis.hypotheses
    other = next(h for h in others if h.response_cluster != best.response_cluster)
    subject, marked = hypothesis_subject(best), []
    for hypotheses in ([other], [best, other]):
        analysis = dataclasses.replace(finished.analysis, hypotheses=hypotheses, attributions=[])
        audit = dataclasses.replace(finished, folder=tmp_path, analysis=analysis, maps={})
        rows = RowStore.open(audit, progress=False).rows(subject.rows[:10].tolist(), subject.clusters)
        marked.append(sum(bool(row["marks"]) for row in rows))
    assert marked == [0, 10]


def test_command_says_where_and_ends_with_an_interrupt(
    folder: Path, served: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)

    def interrupted(server: ViewServer) -> None:
        raise KeyboardInterrupt  # what Ctrl-C does to it

    monkeypatch.setattr(ViewServer, "serve_forever", interrupted)
    assert main(["view", str(folder), "--no-browser"]) == 0
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")
    assert opened == []
    assert main(["view", str(folder)]) == 0
    assert capsys.readouterr().out.split()[0] == opened[0]


def test_a_browser_that_leaves_prints_nothing(served: Any, capfd: pytest.CaptureFixture[str]) -> None:
    address = ("127.0.0.1", served.server_port)
    for _ in range(5):
        with socket.create_connection(address) as left:
            left.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{served.server_port}\r\n\r\n".encode())
            left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not ended
    assert ask(served, "/")[0] == 200
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_said(finished: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished.folder, tmp_path / "audit", ignore=shutil.ignore_patterns("*.sqlite"))
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        status = main(["view", str(tmp_path / "audit"), "--no-browser"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    assert status == 2
    assert "The rows cannot be copied into" in capsys.readouterr().err


def test_what_cannot_be_viewed_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(tmp_path / "nothing"), "--no-browser"]) == 2
    assert "shapedpo audit --out" in capsys.readouterr().err
    assert main(["view", str(tmp_path), "--no-browser"]) == 2
    assert "holds no analysis" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["view", str(folder), "--no-browser", "--port", str(port)]) == 2
    assert f"--port {port} cannot be had (Address already in use). Leave out --port" in capsys.readouterr().err
    assert main(["view", str(folder), "--no-browser", "--port", "99999"]) == 2
