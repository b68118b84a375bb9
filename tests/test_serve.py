"""The owner's server: what it answers, to whom, how often, and what it writes down."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import uvicorn
from conftest import write_features
from starlette.testclient import TestClient
from sweeps import planned_jobs

from dfzsl.io.files import read_json
from dfzsl.launch.workers import run
from dfzsl.owner.server.app import Ledger, Terms, application, serve
from dfzsl.trainers.recovery.oracle import TOKEN, HTTPTeacher, open_oracle
from dfzsl.trainers.recovery.recover import recover
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import UserError

NAMES, DIM = ["ant", "bee", "cat", "dog"], 12


def directions(n: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(directions(4, 5), NAMES, "ViT-B-32 (openai)", bias=torch.tensor([0.1, 0.0, -0.1, 0.2]))


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "teacher.ledger")


def client(teacher: Teacher, ledger: Ledger, **terms) -> TestClient:
    return TestClient(application(teacher, ledger, Terms(**terms)), raise_server_exceptions=False)


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
    assert refused.status_code == 403 and "answers probabilities, labels" in refused.json()["error"]
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
    with pytest.raises(UserError, match="'ada' has a token already"):
        ledger.issue("ada")
    ledger.issue("bob")
    ledger.revoke("ada")
    assert ask(server, "labels", x, token).status_code == 401
    with pytest.raises(UserError, match="'ada' has no token"):
        ledger.revoke("ada")


def test_budgets_of_each_token_and_of_all_together(teacher, ledger):
    server = client(teacher, ledger, budget=100, token_budget=60)
    ada, bob, eve = ledger.issue("ada"), ledger.issue("bob", 30), ledger.issue("eve")
    assert ask(server, "labels", directions(50, 1), ada).status_code == 200
    assert server.get("/", headers={"Authorization": f"Bearer {ada}"}).json()["budget"] == 10
    refused = ask(server, "labels", directions(11, 2), ada)
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 120
    assert "10 queries left, 11 were asked" in refused.json()["error"]
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
    refused = ask(server, "labels", directions(5, 2))
    assert refused.status_code == 429 and 8 <= int(refused.headers["Retry-After"]) <= 10
    assert ledger.left("", None, Terms(budget=100)) == 90  # what was refused is not billed


QUESTIONS: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "no JSON": (b"{", 400),
    "a list": (b"[]", 400),
    "brackets": (b"[" * 100_000, 400),
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
    server = client(teacher, ledger, batch=8, body=4096)
    if question == "brackets":
        server = client(teacher, ledger)
    for content in (body, iter([body[:10], body[10:]])):  # with and without Content-Length
        refused = server.post("/", content=content)
        assert refused.status_code == status and refused.json()["error"]
    assert ledger.left("", None, Terms(budget=10)) == 10


def test_other_paths_and_methods(teacher, ledger):
    server = client(teacher, ledger)
    assert server.get("/nothing").status_code == 404
    assert server.delete("/").status_code == 405
    described = server.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    reply = described["paths"]["/"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert set(reply["properties"]) == {"labels"}
    page = server.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and "Retry-After" not in page.text
    assert "<script" not in page.text and "http" not in page.text  # nothing from elsewhere


def test_the_access_log_has_neither_features_nor_tokens(teacher, ledger, caplog):
    token = ledger.issue("ada")
    server, x = client(teacher, ledger), directions(3)
    with caplog.at_level(logging.INFO, "dfzsl.owner.server.app"):
        ask(server, "labels", x, token)
        ask(server, "labels", x, "s3cret-of-another")
        server.get(f"/?token={token}", headers={"Authorization": f"Bearer {token}"})
    lines = [
        json.loads(record.getMessage())
        for record in caplog.records
        if record.name == "dfzsl.owner.server.app"
    ]
    assert [line["status"] for line in lines] == [200, 401, 200]
    first = lines[0]
    assert (first["client"], first["level"], first["queries"], first["billed"]) == ("ada", "labels", 3, True)
    assert lines[1]["client"] is None
    for secret in (token, "s3cret", f"{x[0, 0]:.4f}", "features"):
        assert secret not in caplog.text


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"access": "weights"}, "unknown access level of a server"),
        ({"decimals": 13}, "--decimals must be 0 to 12"),
        ({"access": "logits", "top": 2}, "would tell them all"),
        ({"noise": float("inf")}, "--noise"),
        ({"budget": -1}, "--budget must be at least 0"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"access": "probabilities", "top": 5}, "more than the teacher's 4 classes"),
    ],
)
def test_terms_that_cannot_be(teacher, ledger, terms, said):
    with pytest.raises(UserError, match=said):
        client(teacher, ledger, **terms)


def test_a_file_that_is_no_ledger(teacher, tmp_path):
    (tmp_path / "ledger").write_text("not a data base, but long enough to be looked at" * 99)
    with pytest.raises(UserError, match="no ledger"):
        Ledger(tmp_path / "ledger")


@pytest.fixture
def live(teacher, ledger) -> Iterator:
    """Start servers on ports of their own; yields a function from terms to an address."""
    running = []

    def start(**terms) -> str:
        config = uvicorn.Config(
            application(teacher, ledger, Terms(**terms)), port=0, log_level="warning", access_log=False
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


@pytest.mark.parametrize(
    "terms",
    [
        {"access": "logits", "decimals": 3},
        {"access": "probabilities", "decimals": 4, "top": 3},
        {"access": "labels"},
        {"access": "logits", "noise": 0.02},
    ],
    ids=lambda terms: "-".join(map(str, terms.values())),
)
def test_a_client_recovers_the_teacher_within_the_servers_budget(teacher, ledger, live, terms, monkeypatch):
    monkeypatch.setenv(TOKEN, ledger.issue("ada"))
    url = live(**terms, budget=5000)
    virtual = recover(open_oracle(url, terms["access"]), directions(4), new_text=directions(2, 3))
    assert 0 < virtual.queries <= 5000 and virtual.error < 0.1
    x = directions(500, 4)
    assert (virtual.logits(x).argmax(1) == teacher.logits(x).argmax(1)).float().mean() > 0.9
    assert ledger.left("ada", None, Terms(budget=5000)) == 5000 - virtual.queries


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
        "import sys; from dfzsl.owner.server.app import serve; "
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
        with pytest.raises(UserError, match="cannot be served from"):
            serve(tmp_path / "t.safetensors", port=taken.getsockname()[1])
    assert Path(tmp_path / "t.ledger").exists()
