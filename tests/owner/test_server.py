"""Test the owner's server: answers, authentication, budgets, limits and logs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import torch.nn.functional as F
import uvicorn
from conftest import write_features
from starlette.testclient import TestClient
from sweeps import planned_jobs

from dfzsl.io.files import read_json
from dfzsl.launch.workers import run
from dfzsl.owner.server import Ledger, access_log, create_app, serve
from dfzsl.owner.server.config import ServerConfig
from dfzsl.owner.server.ledger import Client
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.oracle import LEVELS
from dfzsl.trainers.recovery.recover import recover
from dfzsl.trainers.recovery.remote_oracle import HTTPTeacher
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import TOKEN, UserError

NAMES, DIM = ["ant", "bee", "cat", "dog"], 12


def directions(n: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(directions(4, 5), NAMES, "ViT-B-32 (openai)", bias=torch.tensor([0.1, 0.0, -0.1, 0.2]))


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "teacher.ledger")


def client(teacher: Teacher, ledger: Ledger, **options) -> TestClient:
    return TestClient(create_app(teacher, ledger, ServerConfig(**options)), raise_server_exceptions=False)


def ask(client: TestClient, level: str, x: torch.Tensor, token: str = ""):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return client.post("/", json={"level": level, "features": x.tolist()}, headers=headers)


def test_it_answers_as_the_teacher_does_and_no_more_than_the_owner_allows(teacher, ledger):
    x = directions(30)
    server = client(teacher, ledger, access="probabilities")
    about = server.get("/").json()
    assert (about["classnames"], about["dim"], about["levels"]) == (NAMES, DIM, ["probabilities", "labels"])
    assert "budget" not in about
    told = ask(server, "probabilities", x).json()["probabilities"]
    torch.testing.assert_close(torch.tensor(told), teacher.logits(x).softmax(1))
    assert ask(server, "labels", x).json()["labels"] == teacher.logits(x).argmax(1).tolist()
    refused = ask(server, "logits", x)
    assert refused.status_code == 403 and "probabilities, labels" in refused.json()["error"]
    assert ask(server, "weights", x).status_code == 400


def test_scores_are_rounded_and_cut_to_the_largest(teacher, ledger):
    x = directions(30)
    told = ask(client(teacher, ledger, access="probabilities", decimals=2, top=2), "probabilities", x).json()
    told, whole = torch.tensor(told["probabilities"]), teacher.logits(x).softmax(1)
    kept = whole >= whole.topk(2, dim=1).values[:, -1:]
    torch.testing.assert_close(told, torch.where(kept, whole, 0.0).double().round(decimals=2).float())


@pytest.mark.parametrize("level", ["logits", "probabilities", "labels"])
def test_equal_questions_are_answered_equally_when_noise_is_on(teacher, ledger, level, tmp_path):
    x = directions(200)
    server = client(teacher, ledger, access="logits", noise=0.3)
    first = ask(server, level, x).json()[level]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    again = ask(client(teacher, Ledger(ledger.path), access="logits", noise=0.3), level, x[order]).json()
    assert again[level] == [first[i] for i in order]  # in other company, after a restart
    other = client(teacher, Ledger(tmp_path / "other"), access="logits", noise=0.3)
    assert ask(other, level, x).json()[level] != first  # another server's secret
    if level == "logits":
        noise = torch.tensor(first) - teacher.logits(x)
        assert noise.std() == pytest.approx(0.3, rel=0.1) and abs(noise.mean()) < 0.04
        assert torch.corrcoef(noise.T)[~torch.eye(4, dtype=bool)].abs().max() < 0.25


def test_tokens_are_needed_once_there_is_one_and_only_their_hashes_are_kept(teacher, ledger):
    server, x = client(teacher, ledger), directions(3)
    assert ask(server, "labels", x).status_code == 200
    token = ledger.issue("ada")
    for given in ("", "wrong", token[:-1], token + "x", "\xff"):
        headers = {"Authorization": f"Bearer {given}".encode("latin-1")}
        for refused in (
            server.get("/", headers=headers),
            server.post("/", json={"level": "labels", "features": x.tolist()}, headers=headers),
        ):
            assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
    assert ask(server, "labels", x, token).status_code == 200
    assert token.encode() not in b"".join(p.read_bytes() for p in ledger.path.parent.iterdir())
    assert ledger.path.stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="'ada'"):
        ledger.issue("ada")
    ledger.issue("bob")
    ledger.revoke("ada")
    assert ask(server, "labels", x, token).status_code == 401
    with pytest.raises(UserError, match="'ada'"):
        ledger.revoke("ada")


def test_revoking_the_last_token_does_not_open_the_server(teacher, ledger):
    server, x = client(teacher, ledger), directions(3)
    token = ledger.issue("ada")
    ledger.revoke("ada")
    for opened in (server, client(teacher, Ledger(ledger.path))):  # also after a restart
        for given in ("", "junk", token):
            assert ask(opened, "labels", x, given).status_code == 401
    assert ask(server, "labels", x, ledger.issue("ada")).status_code == 200


@pytest.mark.parametrize("state", ["unused token", "revoked token", "no token"])
def test_a_ledger_of_version_0_2_keeps_its_tokens_and_budgets(teacher, tmp_path, state):
    with contextlib.closing(sqlite3.connect(tmp_path / "teacher.ledger")) as db, db:
        db.execute("CREATE TABLE tokens (hash BLOB PRIMARY KEY, name TEXT UNIQUE NOT NULL, budget INTEGER)")
        db.execute("CREATE TABLE spent (name TEXT PRIMARY KEY, queries INTEGER NOT NULL)")
        db.execute("CREATE TABLE paid (name TEXT, question BLOB, PRIMARY KEY (name, question)) WITHOUT ROWID")
        db.execute("CREATE TABLE secret (noise BLOB)")
        db.execute("INSERT INTO secret VALUES (?)", (b"s" * 32,))
        if state == "unused token":
            db.execute("INSERT INTO tokens VALUES (?, 'ada', 7)", (hashlib.sha256(b"token").digest(),))
        else:
            db.execute("INSERT INTO spent VALUES (?, 5)", ("ada" if state == "revoked token" else "",))
    ledger = Ledger(tmp_path / "teacher.ledger")
    assert ledger.secret == b"s" * 32
    server, x = client(teacher, ledger, budget=20), directions(3)
    assert ask(server, "labels", x).status_code == (200 if state == "no token" else 401)
    if state == "unused token":
        assert server.get("/", headers={"Authorization": "Bearer token"}).json()["budget"] == 7
        ledger.revoke("ada")
        assert ask(server, "labels", x, "token").status_code == 401
    assert ledger.remaining(Client("ada"), budget=20) == {"no token": 12, "revoked token": 15}.get(state, 20)


def test_budgets_of_each_token_and_of_all_together(teacher, ledger):
    server = client(teacher, ledger, budget=100, token_budget=60)
    ada, bob, eve = ledger.issue("ada"), ledger.issue("bob", 30), ledger.issue("eve")
    assert ask(server, "labels", directions(50, 1), ada).status_code == 200
    assert server.get("/", headers={"Authorization": f"Bearer {ada}"}).json()["budget"] == 10
    refused = ask(server, "labels", directions(11, 2), ada)
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 120
    assert re.search(r"\b10\b.*\b11\b", refused.json()["error"])  # remaining and asked
    assert ask(server, "labels", directions(50, 1), ada).status_code == 200  # a retry is not billed
    assert server.get("/", headers={"Authorization": f"Bearer {ada}"}).json()["budget"] == 10
    assert ask(server, "labels", directions(31, 3), bob).status_code == 429
    assert ask(server, "labels", directions(30, 3), bob).status_code == 200
    assert ask(server, "labels", directions(21, 4), eve).status_code == 429  # of 100 there are 20 left
    assert ask(server, "labels", directions(20, 4), eve).status_code == 200
    assert ask(server, "labels", directions(1, 5), ada).status_code == 429


def test_too_fast_is_429_with_a_time_to_come_back(teacher, ledger):
    server = client(teacher, ledger, rate=0.5, batch=10)
    assert ask(server, "labels", directions(10, 1)).status_code == 200
    refused = ask(server, "labels", directions(10, 2))
    assert refused.status_code == 429 and 18 <= int(refused.headers["Retry-After"]) <= 20
    assert ledger.remaining(Client(""), budget=100) == 90  # what was refused is not billed


def test_a_client_that_is_too_fast_is_refused_before_its_request_is_read(teacher, ledger):
    server = client(teacher, ledger, rate=0.1, batch=10)
    assert ask(server, "labels", directions(10)).status_code == 200
    refused = server.post("/", content=b"not JSON")
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 90


def test_a_request_without_a_token_is_refused_before_it_is_read(teacher, ledger):
    ledger.issue("ada")
    assert client(teacher, ledger, body=10).post("/", content=b" " * 100).status_code == 401


@pytest.mark.parametrize("batch", [1, 64])
def test_the_body_of_a_full_batch_fits_and_no_other(teacher, ledger, batch):
    server = client(teacher, ledger, batch=batch)
    longest = [[-1.2345678901234567e-300] * DIM] * batch
    body = json.dumps({"level": "labels", "features": longest}, indent=0).encode()
    assert server.post("/", content=body).status_code == 200
    refused = server.post("/", content=body + b" " * (batch * DIM * 32 + 8192))
    assert refused.status_code == 413 and "bytes" in refused.json()["error"]
    assert client(teacher, ledger, batch=batch, body=100).post("/", content=body).status_code == 413


QUESTIONS: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "no JSON": (b"{", 400),
    "a list": (b"[]", 400),
    "nested lists": (b"[" * 50, 400),
    "brackets": (b"[" * 100_000, 413),
    "empty rows": (b'{"level": "labels", "features": [' + b"[]," * 100_000 + b"[]]}", 413),
    "a long row": (b'{"level": "labels", "features": [[' + b"0," * 300_000 + b"0]]}", 413),
    "objects": (b'{"level": "labels", "features": [' + b"{} " * 100_000 + b"]}", 400),
    "no features": (b'{"level": "labels"}', 400),
    "no rows": (b'{"level": "labels", "features": []}', 400),
    "another level": (b'{"level": "gradients", "features": [[1]]}', 400),
    "a level that is none": (b'{"level": ["labels"], "features": [[1]]}', 400),
    "a short row": (b'{"level": "labels", "features": [[1]]}', 400),
    "text": (json.dumps({"level": "labels", "features": [["1"] * DIM]}).encode(), 400),
    "true": (json.dumps({"level": "labels", "features": [[True] * DIM]}).encode(), 400),
    "NaN": (json.dumps({"level": "labels", "features": [[float("nan")] * DIM]}).encode(), 400),
    "infinity": (json.dumps({"level": "labels", "features": [[1e999] * DIM]}).encode(), 400),
    "400 digits": (json.dumps({"level": "labels", "features": [[10**400] + [0] * (DIM - 1)]}).encode(), 400),
    "too many": (json.dumps({"level": "labels", "features": [[1.0] * DIM] * 9}).encode(), 413),
    "too long": (b" " * 5000, 413),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_no_question_is_refused_in_a_sentence(teacher, ledger, question):
    body, status = QUESTIONS[question]
    server = client(teacher, ledger) if len(body) > 50_000 else client(teacher, ledger, batch=8, body=4096)
    for content in (body, iter([body[:10], body[10:]])):  # with and without Content-Length
        refused = server.post("/", content=content)
        assert refused.status_code == status and refused.json()["error"]
    assert ledger.remaining(Client(""), budget=10) == 10


def test_other_paths_and_methods(teacher, ledger):
    server = client(teacher, ledger)
    assert server.get("/nothing").status_code == 404
    assert server.delete("/").status_code == 405
    for reply in (server.get("/nothing"), server.delete("/")):
        assert set(reply.json()) == {"error"}


def test_the_description_documents_the_protocol(teacher, ledger):
    ledger.issue("ada")
    api = client(teacher, ledger).get("/openapi.json").json()
    post = api["paths"]["/"]["post"]
    question = post["requestBody"]["content"]["application/json"]["schema"]
    assert set(question["properties"]) == set(question["required"]) == {"level", "features"}
    assert {"200", "400", "401", "403", "413", "429"} == set(post["responses"])
    assert "Retry-After" in post["responses"]["429"]["headers"]
    assert api["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert set(api["components"]["schemas"]["QueryResponse"]["properties"]) == set(LEVELS[1:])


def test_the_docs_page_loads_its_files_from_the_server(teacher, ledger):
    server = client(teacher, ledger)
    page = server.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and "http" not in page.text
    links = re.findall('(?:href|src)="([^"]+)"', page.text)
    assert len(links) == 3
    for link in links:
        assert server.get(link).status_code == 200


@pytest.mark.slow
def test_the_docs_page_asks_no_other_host(live, chromium):
    url = live()
    tab, requested = chromium.new_page(), []
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(f"{url}docs")
    tab.get_by_text("Answer queries").click()
    tab.wait_for_load_state("networkidle")
    assert f"{url}openapi.json" in requested
    assert [address for address in requested if not address.startswith((url, "data:"))] == []


def test_the_access_log_has_neither_features_nor_tokens(teacher, ledger, caplog):
    token = ledger.issue("ada")
    server, x = client(teacher, ledger), directions(3)
    with caplog.at_level(logging.INFO, access_log.log.name):
        ask(server, "labels", x, token)
        ask(server, "labels", x, "s3cret-of-another")
        server.get(f"/?token={token}", headers={"Authorization": f"Bearer {token}"})
    records = [record for record in caplog.records if record.name == access_log.log.name]
    lines = [json.loads(record.getMessage()) for record in records]
    assert [line["status"] for line in lines] == [200, 401, 200]
    first = lines[0]
    assert (first["client"], first["level"], first["queries"], first["billed"]) == ("ada", "labels", 3, True)
    assert lines[1]["client"] is None
    for secret in (token, "s3cret", f"{x[0, 0]:.4f}", "features"):
        assert secret not in caplog.text


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"access": "weights"}, "--access.*weights.*labels"),
        ({"decimals": 13}, "--decimals.*13"),
        ({"access": "logits", "top": 2}, "--top.*--access logits"),
        ({"noise": float("inf")}, "--noise.*inf"),
        ({"noise": float("nan")}, "--noise.*nan"),
        ({"budget": -1}, "--budget.*-1"),
        ({"token_budget": -1}, "--token-budget.*-1"),
        ({"body": -1}, "--body.*-1"),
        ({"batch": 0}, "--batch.*0"),
        ({"access": "probabilities", "top": 5}, "--top 5.*4 classes"),
    ],
)
def test_options_out_of_range_are_refused(teacher, ledger, options, fact):
    with pytest.raises(UserError, match=fact):
        client(teacher, ledger, **options)


def test_a_file_that_is_no_ledger(teacher, tmp_path):
    (tmp_path / "ledger").write_text("not a data base, but long enough to be looked at" * 99)
    with pytest.raises(UserError, match="ledger"):
        Ledger(tmp_path / "ledger")


@pytest.fixture
def live(teacher, ledger) -> Iterator:
    """Start servers on ports of their own; yields a function from options to an address."""
    running = []

    def start(**options) -> str:
        config = uvicorn.Config(
            create_app(teacher, ledger, ServerConfig(**options)),
            port=0,
            log_level="warning",
            access_log=False,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread))
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


def test_a_refusal_reaches_a_client_that_is_still_sending(ledger, live):
    url, body = live(rate=0.01, batch=1), b" " * (32 << 20)
    ledger.issue("ada")
    assert httpx.post(url, content=body).status_code == 401
    headers = {"Authorization": f"Bearer {ledger.issue('bob')}"}
    assert httpx.post(url, content=body, headers=headers).status_code == 413
    question = {"level": "labels", "features": directions(1).tolist()}
    assert httpx.post(url, json=question, headers=headers).status_code == 200
    assert httpx.post(url, content=body, headers=headers).status_code == 429


@pytest.mark.parametrize(
    "options",
    [
        {"access": "logits", "decimals": 3},
        {"access": "probabilities", "decimals": 4, "top": 3},
        {"access": "labels"},
        {"access": "logits", "noise": 0.02},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_client_recovers_the_teacher_within_the_servers_budget(teacher, ledger, live, options, monkeypatch):
    monkeypatch.setenv(TOKEN, ledger.issue("ada"))
    url = live(**options, budget=5000)
    virtual = recover(open_oracle(url, options["access"]), directions(4), new_text=directions(2, 3))
    assert 0 < virtual.queries <= 5000 and virtual.error < 0.1
    x = directions(500, 4)
    assert (virtual.logits(x).argmax(1) == teacher.logits(x).argmax(1)).float().mean() > 0.9
    assert ledger.remaining(Client("ada"), budget=5000) == 5000 - virtual.queries


def test_a_run_that_goes_on_plans_with_the_budget_it_began_with(ledger, live, tmp_path):
    url = live(access="labels", budget=2000)
    first = open_oracle(url, "labels", tmp_path / "answers")
    assert first.budget == 2000
    first(directions(100))
    assert open_oracle(url, "labels").budget == 1900
    assert open_oracle(url, "labels", tmp_path / "answers").budget == 2000
    assert open_oracle(url, "labels", tmp_path / "elsewhere", budget=50).budget == 50
    HTTPTeacher(url, batch_size=950).oracle("labels")(directions(1900, 2))
    with pytest.raises(UserError, match="used up"):
        open_oracle(url, "labels")


def test_a_sweep_asks_the_owners_server_and_the_owner_is_left_alone(tmp_path, teacher, ledger, live):
    features = write_features(tmp_path / "animals.npz")
    words = ["base2new", "--methods", "TeacherZeroshot,DFZSL", "--output", str(tmp_path / "output")]
    words += [f"features:{features}", "1", "RECOVERY.NUM_PER_CLASS", "20"]
    jobs = planned_jobs(words)
    run(jobs[1])
    own = Teacher.load(next((tmp_path / "output").rglob("teacher.safetensors")))
    for key in ("weight", "classnames", "backbone", "bias"):
        setattr(teacher, key, getattr(own, key))
    url = live(access="logits")
    words[4] = str(tmp_path / "other")
    jobs = planned_jobs([*words, "TEACHER.FILE", url, "TEACHER.ACCESS", "logits"])
    for job in jobs:
        run(job)
        assert job.finished
    results = [read_json(path) for path in (tmp_path / "other").rglob("DFZSL/*/seed1/results.json")]
    assert results and all(f"FILE: {url}" in str(result["config"]) for result in results)
    owners = [read_json(path) for path in (tmp_path / "other").rglob("TeacherZeroshot/*/seed1/results.json")]
    assert owners and not any(url in str(result["config"]) for result in owners)


@pytest.mark.slow
def test_what_was_spent_survives_a_kill(teacher, tmp_path):
    teacher.save(tmp_path / "t.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "import sys; from dfzsl.owner.server import serve; "
        "serve(sys.argv[1], port=int(sys.argv[2]), budget=500)"
    )

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "t.safetensors"), str(port)]
        )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
                return process
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server does not start")

    left = []
    for seed in range(3):
        process = start()
        oracle = HTTPTeacher(f"http://127.0.0.1:{port}/").oracle("labels")
        left.append(oracle.budget)
        oracle(directions(100, seed))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert left == [500, 400, 300]


def test_an_address_that_is_taken_is_one_line(teacher, tmp_path):
    teacher.save(tmp_path / "t.safetensors")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot listen on"):
            serve(tmp_path / "t.safetensors", port=taken.getsockname()[1])
    assert Path(tmp_path / "t.ledger").exists()
