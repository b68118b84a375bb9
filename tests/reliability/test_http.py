"""Test an HTTP teacher that is slow, wrong or disconnects, and a token that must never be printed."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_data
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from dfzsl import train
from dfzsl.trainers.recovery import remote_oracle
from dfzsl.trainers.recovery.oracle import Oracle
from dfzsl.trainers.recovery.recover import recover
from dfzsl.trainers.recovery.remote_oracle import HTTPTeacher
from dfzsl.trainers.recovery.teacher import Teacher
from dfzsl.utils.errors import TOKEN, UserError

NAMES, DIM = ["ant", "bee", "cat"], 8
SECRET = "s3cr3t-t0ken"
Handler = http.server.BaseHTTPRequestHandler


def reply(
    handler: Handler, body: bytes, status: int = 200, length: int | None = None, **headers: str
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


class World:
    """A server and what it has seen. `faults` are played one a POST, `about` one a GET; then it is honest."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(len(NAMES), DIM, generator=generator)
        self.teacher = Teacher(rows - rows.mean(0), NAMES)
        self.faults: list[Callable[[Handler, dict], None]] = []
        self.about: list[bytes] = []
        self.keys: list[str] = []  # Idempotency-Key of each POST
        self.billed: set[str] = set()  # those that were answered
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []

    def answers(self, question: dict) -> dict:
        x = torch.tensor(question["features"])
        logits = self.teacher.logits(x.double())
        level = question["level"]
        made = {"logits": logits, "probabilities": logits.softmax(1), "labels": logits.argmax(1)}[level]
        return {level: made.tolist()}


@pytest.fixture
def world() -> Iterator[Any]:
    world: Any = World()

    class Handled(Handler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            world.headers.append(dict(self.headers))
            honest = json.dumps({"classnames": NAMES, "dim": DIM}).encode()
            reply(self, world.about.pop(0) if world.about else honest)

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            world.headers.append(dict(self.headers))
            world.keys.append(self.headers["Idempotency-Key"])
            world.times.append(time.monotonic())
            with contextlib.suppress(OSError):
                if world.faults:
                    world.faults.pop(0)(self, question)
                    return
                world.billed.add(self.headers["Idempotency-Key"])
                reply(self, json.dumps(world.answers(question)).encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handled)
    server.daemon_threads = True
    server.block_on_close = False
    world.url = f"http://127.0.0.1:{server.server_port}/teacher"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield world
    server.shutdown()
    server.server_close()


def oracle(world: Any, level: str = "logits", journal: Path | None = None, **settings: Any) -> Oracle:
    settings = {"timeout": 0.5, "backoff": 0.01, "batch_size": 16, "retries": 2, **settings}
    return HTTPTeacher(world.url, **settings).oracle(level, journal)


def questions(n: int = 40) -> torch.Tensor:
    return F.normalize(torch.randn(n, DIM, generator=torch.Generator().manual_seed(1)), dim=1)


# ---------------------------------------------------------------- answers that no teacher gives


def body(**content: Any) -> Callable[[Handler, dict], None]:
    return lambda handler, _: reply(handler, json.dumps(content).encode())


def raw(content: bytes, **headers: str) -> Callable[[Handler, dict], None]:
    return lambda handler, _: reply(handler, content, **headers)


def redirect(place: str) -> Callable[[Handler, dict], None]:
    return lambda handler, _: reply(handler, b"", 302, Location=place)


LIES: dict[str, tuple[str, Callable[[Handler, dict], None], str]] = {
    "a row too few": ("logits", body(logits=[[0.0] * 3] * 15), "of shape"),
    "a class too many": ("logits", body(logits=[[0.0] * 4] * 16), "of shape"),
    "ragged rows": ("logits", body(logits=[[0.0] * 3] * 15 + [[0.0]]), "no array"),
    "one number": ("logits", body(logits=1), "of shape"),
    "text": ("logits", body(logits=[["a"] * 3] * 16), "no array"),
    "null": ("logits", body(logits=[[None] * 3] * 16), "no array"),
    "NaN": ("logits", raw(b'{"logits": [' + b",".join([b"[NaN, 0, 0]"] * 16) + b"]}"), "not finite"),
    "infinity": ("logits", raw(b'{"logits": [' + b",".join([b"[1e999, 0, 0]"] * 16) + b"]}"), "not finite"),
    "400 digits": ("logits", body(logits=[[10**400, 0, 0]] * 16), "no array"),
    "no distribution": ("probabilities", body(probabilities=[[0.5, 0.5, 0.5]] * 16), "sum to 1"),
    "negative": ("probabilities", body(probabilities=[[1.5, -0.5, 0.0]] * 16), "at least 0"),
    "label out of range": ("labels", body(labels=[3] * 16), "from 0 to 2"),
    "label below": ("labels", body(labels=[-1] * 16), "from 0 to 2"),
    "half a label": ("labels", body(labels=[1.7] * 16), "of integers"),
    "true": ("labels", body(labels=[True] * 16), "of integers"),
    "huge label": ("labels", body(labels=[2**70] * 16), "no array"),
    "another level": ("labels", body(logits=[[0.0] * 3] * 16), "no array"),
    "HTML": ("logits", raw(b"<html>login</html>", Content_Type="text/html"), "JSON object"),
    "nothing": ("logits", raw(b""), "JSON object"),
    "a list": ("logits", raw(b"[1, 2]"), "JSON object"),
    "brackets": ("logits", raw(b"[" * 60000), "JSON object"),
    "gzip": ("logits", raw(gzip.compress(bytes(1 << 24)), Content_Encoding="gzip"), "JSON object"),
    "a huge body": ("logits", raw(b" " * (1 << 20)), "longer than any valid one"),
    "redirect to a file": ("logits", redirect("file:///etc/passwd"), "status 302"),
    "redirect elsewhere": ("logits", redirect("http://127.0.0.1:9/"), "status 302"),
    "refusal": ("logits", lambda handler, _: reply(handler, b"", 403), "status 403"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_told_at_once_and_not_asked_again(world, lie, tried):
    level, fault, said = LIES[lie]
    asked = oracle(world, level)
    world.faults[:] = [fault] * 9
    with pytest.raises(UserError, match=said) as error:
        asked(questions())
    assert str(error.value).isprintable()
    assert len(world.keys) == 1
    tried("HTTP teacher", "wrong and lying answers", 1, "one line, asked once")


ABOUT = {
    "no names": b'{"dim": 8}',
    "names that are none": b'{"classnames": [1, 2], "dim": 8}',
    "escapes": json.dumps({"classnames": ["ant", "\x1b[2J"], "dim": 8}).encode(),
    "no dimension": b'{"classnames": ["a"], "dim": "8"}',
    "true for a number": b'{"classnames": ["a"], "dim": true}',
    "a word for false": b'{"classnames": ["a"], "dim": 8, "normalized": "false"}',
    "a list": b"[]",
    "brackets": b'{"a":' * 10**5,
}


@pytest.mark.parametrize("about", ABOUT)
def test_descriptions_that_lie(world, about, tried):
    world.about = [ABOUT[about]]
    with pytest.raises(UserError) as error:
        oracle(world)
    assert str(error.value).isprintable()
    tried("HTTP teacher", "descriptions that lie", 1, "one line")


def test_a_description_without_end_is_cut_off(world, monkeypatch):
    monkeypatch.setattr(remote_oracle, "MAX_DESCRIPTION_BYTES", 1000)
    world.about = [b" " * 2000]
    with pytest.raises(UserError, match="longer than any valid one"):
        oracle(world)


def test_other_names_or_another_width_than_the_clients(world):
    world.about = [json.dumps({"classnames": ["ant", "bee", "dog"], "dim": DIM}).encode()]
    text = F.normalize(torch.randn(3, DIM), dim=1)
    with pytest.raises(UserError, match="differ in cat, dog"):
        recover(oracle(world), text, NAMES)
    world.about = [json.dumps({"classnames": NAMES, "dim": 10**12}).encode()]
    with pytest.raises(UserError, match="expected"):
        recover(oracle(world), text, NAMES)
    assert not world.keys


# ---------------------------------------------------------------- answers that do not come


def drip(piece: bytes, **headers: str) -> Callable[[Handler, dict], None]:
    """A piece at a time behind the headers, if any: never silent for long, for ever."""

    def answer(handler: Handler, _: dict) -> None:
        if headers:
            handler.send_response(200)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
        for _ in range(200):
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(0.05)

    return answer


def half_closed(handler: Handler, _: dict) -> None:
    handler.connection.shutdown(1)
    handler.close_connection = True


def silent(handler: Handler, _: dict) -> None:
    time.sleep(5)


def cut(handler: Handler, question: dict) -> None:
    reply(handler, b'{"logits": [[', length=1000)
    handler.connection.close()


def cut_chunk(handler: Handler, question: dict) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"ff\r\n{")
    handler.connection.close()


def status(code: int, **headers: str) -> Callable[[Handler, dict], None]:
    return lambda handler, _: reply(handler, SECRET.encode(), code, **headers)


PAUSES = {
    "drip": drip(b" ", Content_Length="100000"),
    "dripped headers": drip(b"H"),
    "endless chunks": drip(b"1\r\n \r\n", Transfer_Encoding="chunked"),
    "half closed": half_closed,
    "silent": silent,
    "cut off": cut,
    "cut off in a chunk": cut_chunk,
    "status 429": status(429),
    "status 500": status(500),
    "status 503": status(503, Retry_After="0"),
    "nonsense in Retry-After": status(429, Retry_After="soon"),
}


@pytest.mark.parametrize("pause", PAUSES)
def test_a_pause_is_waited_out_and_paid_once(world, pause, tried):
    asked = oracle(world, timeout=0.3)
    world.faults[:] = [PAUSES[pause]]
    x = questions()
    assert torch.allclose(asked(x), world.teacher.logits(x.double()))
    assert len(world.keys) == 4 and len(set(world.keys)) == len(world.billed) == 3
    tried("HTTP teacher", "slow, cut off, busy, broken for a while", 1, "asked again, paid once")


@pytest.mark.parametrize("pause", ["drip", "dripped headers", "endless chunks", "silent"])
def test_a_reply_ends_by_the_deadline_however_it_trickles(world, pause):
    asked = oracle(world, timeout=0.3, retries=0)
    world.faults[:] = [PAUSES[pause]]
    started = time.monotonic()
    with pytest.raises(UserError, match=r"0\.3 seconds"):
        asked(questions())
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("pause", ["half closed", "status 429", "status 500", "cut off"])
def test_no_storm_of_questions(world, tmp_path, pause, tried):
    """However long it fails: few questions, each later than the one before."""
    asked = oracle(world, journal=tmp_path / "journal", retries=3, backoff=0.05)
    asked(questions()[:16])
    world.faults[:] = [PAUSES[pause]] * 1000
    world.times.clear()
    with pytest.raises(UserError, match=r"stopped responding after \d+ queries .* run again"):
        asked(questions())
    gaps = [b - a for a, b in zip(world.times, world.times[1:], strict=False)]
    assert len(world.times) == 4
    assert all(gap >= least for gap, least in zip(gaps, (0.05, 0.1, 0.2), strict=True))
    # The same command goes on, and pays for nothing twice.
    world.faults.clear()
    again = oracle(world, journal=tmp_path / "journal")
    again(questions())
    assert (again.replayed, len(world.billed)) == (16, 3)
    tried("HTTP teacher", "down for good", 1, "few questions, each later; resumed without paying twice")


def test_the_server_may_say_when(world, monkeypatch, tried):
    slept: list[float] = []
    monkeypatch.setattr(remote_oracle, "time", SimpleNamespace(sleep=slept.append, time=time.time))
    world.faults[:] = [
        status(429, Retry_After="7"),
        status(503, Retry_After=formatdate(time.time() + 30, usegmt=True)),
    ]
    asked = oracle(world)
    asked(questions()[:16])
    assert slept[0] == 7 and 25 < slept[1] <= 30
    for said in ("86400", "9" * 30):
        slept.clear()
        world.keys.clear()
        world.faults[:] = [status(429, Retry_After=said)] * 9
        with pytest.raises(UserError, match="it accepts no request for"):
            asked(questions()[16:32])
        assert not slept and len(world.keys) == 1
    tried("HTTP teacher", "Retry-After: seconds, dates, days", 4, "obeyed; beyond two minutes the run ends")


def test_a_server_that_restarts_in_the_middle(world, tmp_path):
    """Every third answer is lost after it was made: the retry has the same key, so it is billed once."""
    lost = []

    def loses(handler: Handler, question: dict) -> None:
        world.billed.add(world.keys[-1])
        lost.append(1)
        handler.connection.close()

    text = F.normalize(torch.randn(3, DIM, generator=torch.Generator().manual_seed(2)), dim=1)
    asked = oracle(world, "labels", tmp_path / "journal")
    original = world.answers
    world.answers = lambda question: (
        (world.faults.append(loses) if len(world.keys) % 3 == 0 else None) or original(question)
    )
    found = recover(asked, text, NAMES, rays=1.5, bisections=6, generator=torch.Generator().manual_seed(0))
    assert lost
    assert len(world.billed) == len(set(world.keys)) < len(world.keys)
    world.answers, world.faults = original, []
    honest = recover(
        oracle(world, "labels"),
        text,
        NAMES,
        rays=1.5,
        bisections=6,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(found.weight, honest.weight)


def test_a_journal_of_other_classes_is_not_believed(world, tmp_path):
    first = oracle(world, "labels", tmp_path / "journal")(questions())
    order = [2, 0, 1]
    names = [NAMES[place] for place in order]
    world.about = [json.dumps({"classnames": names, "dim": DIM}).encode()]
    world.teacher = Teacher(world.teacher.weight[order], names)
    again = oracle(world, "labels", tmp_path / "journal")
    assert [names[label] for label in again(questions())] == [NAMES[label] for label in first]
    assert again.replayed == 0


def test_a_damaged_journal_is_named(world, tmp_path):
    asked = oracle(world, journal=tmp_path / "journal")
    asked(questions())
    for path in (tmp_path / "journal").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"not a answers file"):
        oracle(world, journal=tmp_path / "journal")(questions())


# ---------------------------------------------------------------- refusals


def refuse(code: int, content: bytes | dict, **headers: str) -> Callable[[Handler, dict], None]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda handler, _: reply(handler, body, code, **headers)


@pytest.mark.parametrize("key", ["error", "detail"])
def test_a_refusal_quotes_the_servers_explanation_without_the_token(world, monkeypatch, key):
    monkeypatch.setenv(TOKEN, SECRET)
    asked = oracle(world)
    world.faults[:] = [refuse(403, {key: f"no access\n\x1b[2J with {SECRET} " + "x" * 1000})]
    with pytest.raises(UserError, match=r"status 403: no access \\x1b\[2J with \[token\] x") as error:
        asked(questions())
    assert SECRET not in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "content", [b"", b"<html>no</html>", b'"no"', b"[" * 60000, {"error": ["no"]}, {"error": " "}, b"\xff{"]
)
def test_a_refusal_without_explanation_names_the_status(world, content):
    asked = oracle(world)
    world.faults[:] = [refuse(404, content)]
    with pytest.raises(UserError, match=r"status 404$"):
        asked(questions())


@pytest.mark.parametrize("token", ["", SECRET])
def test_a_refused_token_is_named_by_its_variable(world, monkeypatch, token):
    monkeypatch.setenv(TOKEN, token)
    asked = oracle(world)
    world.faults[:] = [refuse(401, {"error": "who are you?"})]
    with pytest.raises(
        UserError, match=f"status 401: who are you.*{TOKEN}.* {'accepted' if token else 'set'}"
    ):
        asked(questions())
    assert len(world.keys) == 1


def test_a_spent_budget_is_explained_by_the_server(world):
    asked = oracle(world)
    world.faults[:] = [refuse(429, {"error": "3 queries left"}, Retry_After="86400")]
    with pytest.raises(UserError, match=r"3 queries left.*86,400"):
        asked(questions())


def test_the_proxy_of_the_environment_is_used(world, monkeypatch):
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", world.url.removesuffix("/teacher"))
    world.url = "http://teacher.invalid/teacher"
    assert torch.allclose(oracle(world)(questions()), world.teacher.logits(questions().double()))
    assert {seen["Host"] for seen in world.headers} == {"teacher.invalid"}


# ---------------------------------------------------------------- secrets

ADDRESSES = [
    f"http://user:{SECRET}@127.0.0.1:9/",
    f"https://{SECRET}@host/",
    f"https://host/teacher?token={SECRET}",
    f"https://host/teacher#{SECRET}",
    f"http://host:{SECRET}/",
    f"HTTPS://u:{SECRET}@host",
    f"http://user:{SECRET}@",
    f"http://host/ {SECRET}",
    f"http://[{SECRET}/",
    f"http://xn--/{SECRET} ",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_secret_in_the_address_is_refused_before_anything_is_written(address, tmp_path, capfd, tried):
    data = fake_data.make("Features", tmp_path / "data")
    words = ["--trainer", "DFZSL", "--dataset-config-file", str(ROOT / "configs/datasets/features.yaml")]
    words += ["--root", str(data), "--output-dir", str(tmp_path / "out"), "TEACHER.FILE", address]
    with pytest.raises(SystemExit) as stopped:
        train.run_program(lambda: train.main(words))
    assert stopped.value.code == 2
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err and SECRET.upper() not in said.err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError) as error:
        HTTPTeacher(address)
    assert SECRET not in str(error.value)
    tried("HTTP teacher", "secrets in the address", 1, "refused, not shown, nothing written")


def serve_base_classes(world: Any, descriptions: int) -> None:
    """A teacher of `run_client`'s data set, which describes itself so often."""
    names = list(fake_data.NAMES[:3])
    world.teacher = Teacher(torch.randn(3, fake_data.DIM, generator=torch.Generator().manual_seed(0)), names)
    world.about = [json.dumps({"classnames": names, "dim": fake_data.DIM}).encode()] * descriptions


def run_client(world: Any, folder: Path) -> None:
    data = fake_data.make("Features", folder / "data")
    words = ["--trainer", "DFZSL", "--dataset-config-file", str(ROOT / "configs/datasets/features.yaml")]
    words += ["--root", str(data), "--output-dir", str(folder / "out"), "--seed", "1"]
    words += ["--config-file", str(ROOT / "configs/trainers/DFZSL/dfzsl.yaml"), "TEACHER.FILE", world.url]
    words += ["DATASET.SUBSAMPLE_CLASSES", "base", "RECOVERY.NUM_PER_CLASS", "8", "MODEL.BACKBONE.NAME", ""]
    train.main(words)


def test_the_token_is_sent_and_kept_nowhere(world, tmp_path, monkeypatch, capfd, caplog, tried):
    caplog.set_level(logging.WARNING)  # below that httpx logs the status lines of a server
    monkeypatch.setenv(TOKEN, SECRET)
    serve_base_classes(world, descriptions=2)
    # First it fails in a way that repeats the token: the message must not.
    monkeypatch.setattr(remote_oracle, "time", SimpleNamespace(sleep=lambda _: None))
    echo = lambda handler, _: handler.send_error(500, SECRET, SECRET)  # noqa: E731
    world.faults[:] = [echo] * 5
    with pytest.raises(UserError, match="status 500") as error:
        run_client(world, tmp_path)
    assert SECRET not in str(error.value)
    run_client(world, tmp_path)
    assert world.headers and all(seen["Authorization"] == f"Bearer {SECRET}" for seen in world.headers)
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err + caplog.text
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"results.json", "log.txt", "config.yaml", "classifier.safetensors"} <= {
        path.name for path in files
    }
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    tried(
        "HTTP teacher",
        "token from the environment, searched in all output files",
        len(files),
        "in none of them",
    )


ECHOES: dict[str, Callable[[Handler], None]] = {
    "status line": lambda handler: handler.wfile.write(f"BAD Bearer {SECRET}\r\n\r\n".encode()) and None,
    "version": lambda handler: handler.wfile.write(f"HTTP/{SECRET} 200 OK\r\n\r\n".encode()) and None,
    "reason": lambda handler: handler.wfile.write(f"HTTP/1.0 418 {SECRET}\r\n\r\n".encode()) and None,
    "redirect": lambda handler: reply(handler, b"", 302, Location=f"http://host/{SECRET}"),
    "length": lambda handler: reply(handler, SECRET.encode(), length=999),
    "level": lambda handler: reply(handler, json.dumps({SECRET: [SECRET]}).encode()),
}


@pytest.mark.parametrize("way", ECHOES)
def test_a_server_that_repeats_the_token_is_not_quoted(world, monkeypatch, way, tried):
    monkeypatch.setenv(TOKEN, SECRET)
    asking = oracle(world, retries=0)
    world.faults[:] = [lambda handler, _: ECHOES[way](handler)] * 5
    with pytest.raises(UserError) as error:
        asking(questions())
    shown = "".join(traceback.format_exception(error.value))
    assert SECRET not in str(error.value) + shown
    tried("HTTP teacher", "the token in status lines, headers and bodies of replies", 1, "not quoted")


def test_an_address_in_capitals_is_an_address(world, tmp_path):
    """Its answers are paid for as well: they are kept."""
    serve_base_classes(world, descriptions=1)
    world.url = world.url.replace("http://", "HTTP://")
    run_client(world, tmp_path)
    assert any((tmp_path / "out" / "answers").iterdir())


@pytest.mark.parametrize("token", ["line\nbreak", "ümlaut", "tab\there"])
def test_a_token_that_no_header_holds_is_not_shown(monkeypatch, token):
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(UserError, match=TOKEN) as error:
        HTTPTeacher("https://host/")
    assert token not in str(error.value)


def test_a_redirect_takes_the_token_nowhere(world, monkeypatch):
    monkeypatch.setenv(TOKEN, SECRET)
    asked = oracle(world)
    world.headers.clear()
    world.faults[:] = [redirect(world.url)]
    with pytest.raises(UserError, match="status 302"):
        asked(questions())
    assert len(world.headers) == 1
