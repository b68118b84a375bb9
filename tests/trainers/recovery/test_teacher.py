import contextlib
import http.server
import json
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from dfzsl.io.tensors import save_tensors
from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.oracle import LEVELS, Oracle
from dfzsl.trainers.recovery.remote_oracle import HTTPTeacher
from dfzsl.trainers.recovery.teacher import Teacher, fit_teacher
from dfzsl.utils.errors import UserError

NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(torch.tensor([30, 20, 10]))
    means = torch.randn(3, 6, generator=generator)
    return F.normalize(means[labels] + 0.3 * torch.randn(60, 6, generator=generator), dim=1), labels


@pytest.fixture
def teacher(data):
    return fit_teacher(*data, NAMES, "ViT-B-16/openai")


def test_fit_is_the_papers_logistic_regression(data, teacher):
    features, labels = data
    reference = LogisticRegression(C=0.316, tol=1e-9, max_iter=1000, fit_intercept=False)
    reference.fit(features.double().numpy(), labels.numpy())
    assert torch.allclose(teacher.weight, torch.from_numpy(reference.coef_).float(), atol=1e-5)
    assert teacher.weight.sum(0).abs().max() < 1e-4
    linear = Teacher(teacher.weight, NAMES, normalized=False)
    assert np.array_equal(
        linear.logits(features).argmax(1).numpy(), reference.predict(features.double().numpy())
    )
    assert torch.allclose(
        teacher.logits(features), F.cosine_similarity(features[:, None], teacher.weight, dim=2)
    )


def test_few_shots_and_balance(data):
    features, labels = data
    few = fit_teacher(features, labels, NAMES, shots=4, generator=torch.Generator().manual_seed(1))
    again = fit_teacher(features, labels, NAMES, shots=4, generator=torch.Generator().manual_seed(1))
    other = fit_teacher(features, labels, NAMES, shots=4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(few.weight, again.weight)
    assert not torch.equal(few.weight, other.weight)
    balanced = fit_teacher(features, labels, NAMES, balanced=True)
    lengths, fitted = balanced.weight.norm(dim=1), fit_teacher(features, labels, NAMES).weight.norm(dim=1)
    assert lengths[2] / lengths[0] > fitted[2] / fitted[0]


def test_two_classes_get_two_rows(data):
    features, labels = data
    rows = labels < 2
    teacher = fit_teacher(features[rows], labels[rows], NAMES[:2], normalized=False)
    assert teacher.weight.shape == (2, 6)
    assert (teacher.logits(features[rows]).argmax(1) == labels[rows]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classnames": ["ant"]}, "at least two classes"),
        ({"classnames": [*NAMES, "dog"]}, "class 'dog' has 0 features"),
        ({"shots": 16}, "class 'cat' has 10 features, 16 are needed"),
        ({"labels": torch.full((60,), 3)}, "labels must lie in 0 ... 2"),
        ({"labels": torch.zeros(59)}, "shape"),
        ({"features": torch.full((60, 6), torch.nan)}, "not finite"),
    ],
)
def test_bad_training_data_is_named(data, changes, message):
    arguments = {"features": data[0], "labels": data[1], "classnames": NAMES, **changes}
    with pytest.raises(UserError, match=message):
        fit_teacher(**arguments)


def test_saved_and_loaded(teacher, tmp_path):
    teacher.save(tmp_path / "teacher.safetensors")
    loaded = Teacher.load(tmp_path / "teacher.safetensors")
    assert torch.equal(loaded.weight, teacher.weight)
    assert (loaded.classnames, loaded.backbone, loaded.normalized) == (NAMES, "ViT-B-16/openai", True)


@pytest.mark.parametrize("normalized", [True, False])
def test_an_intercept_decides_and_is_kept(teacher, data, normalized, tmp_path):
    bias = torch.tensor([0.0, 9.0, -1.0])
    biased = Teacher(teacher.weight, NAMES, normalized=normalized, bias=bias)
    plain = Teacher(teacher.weight, NAMES, normalized=normalized)
    assert torch.allclose(biased.logits(data[0]), plain.logits(data[0]) + bias)
    assert (biased.logits(data[0]).argmax(1) == 1).all() and (plain.logits(data[0]).argmax(1) != 1).any()
    biased.save(tmp_path / "teacher.safetensors")
    assert torch.equal(Teacher.load(tmp_path / "teacher.safetensors").bias, bias)
    rows, intercepts = biased.cosine_scale_weights()
    assert rows.norm(dim=1).mean() == pytest.approx(1)
    ratio = biased.logits(data[0]) / (data[0] @ rows.T + intercepts)
    assert torch.allclose(ratio, ratio[0, 0].expand(60, 3), rtol=1e-3)
    for wrong, message in (
        (torch.ones(2), "one intercept per class"),
        (torch.full((3,), torch.nan), "finite"),
    ):
        with pytest.raises(UserError, match=message):
            Teacher(teacher.weight, NAMES, bias=wrong)


def test_files_that_are_no_teacher_are_refused(teacher, tmp_path):
    path = tmp_path / "teacher.safetensors"
    with pytest.raises(UserError, match="no such teacher file"):
        Teacher.load(path)
    save_tensors(path, {"weight": teacher.weight}, {"kind": "teacher", "classnames": NAMES})
    with pytest.raises(UserError, match="incomplete"):
        Teacher.load(path)
    about = {"kind": "teacher", "classnames": NAMES[:2], "normalized": True}
    save_tensors(path, {"weight": teacher.weight}, about)
    with pytest.raises(UserError, match=r"\(3, 6\) and 2 names"):
        Teacher.load(path)
    with pytest.raises(UserError, match="'bee'"):
        Teacher(teacher.weight, ["ant", "bee", "bee"])
    with pytest.raises(UserError, match=r"'ant'.*zero"):
        Teacher(torch.zeros(3, 6), NAMES)
    with pytest.raises(UserError, match=r"\(3, 0\)"):
        Teacher(torch.zeros(3, 0), NAMES)


@pytest.mark.parametrize("normalized", (True, False))
def test_access_levels_disclose_less_and_less(data, teacher, normalized, tmp_path):
    features, _ = data
    teacher.normalized = normalized
    teacher.save(tmp_path / "t.safetensors")
    oracles = {level: open_oracle(tmp_path / "t.safetensors", level) for level in LEVELS}
    logits = oracles["logits"](features)
    assert torch.allclose(logits, teacher.logits(features))
    assert torch.equal(oracles["weights"].weight, teacher.weight)
    assert torch.allclose(oracles["probabilities"](features).float(), logits.softmax(1))
    assert torch.equal(oracles["labels"](features), logits.argmax(1))
    assert [oracles[level].queries for level in LEVELS] == [0, 60, 60, 60]
    assert all(oracles[level].weight is None for level in LEVELS[1:])
    with pytest.raises(UserError, match="unknown access level"):
        open_oracle(teacher, "logit")


@pytest.mark.parametrize(
    ("level", "answer", "message"),
    [
        ("logits", lambda x: torch.zeros(len(x), 4), r"of shape \(5, 3\), it returned \(5, 4\)"),
        ("logits", lambda x: torch.full((len(x), 3), torch.nan), "not finite"),
        ("logits", lambda x: [[0, 0, 0]] * len(x), "it returned list"),
        ("probabilities", lambda x: torch.ones(len(x), 3), "sum to 1"),
        ("labels", lambda x: torch.full((len(x),), 3), "labels from 0 to 2"),
        ("labels", lambda x: torch.zeros(len(x)), "as integers"),
    ],
)
def test_faulty_answers_are_named(level, answer, message):
    with pytest.raises(UserError, match=message):
        Oracle(answer, level, NAMES, 6)(torch.zeros(5, 6))
    with pytest.raises(UserError, match=r"features of shape \(n, 6\)"):
        Oracle(answer, level, NAMES, 6)(torch.zeros(5, 7))


def test_a_teacher_that_stops_is_resumed_without_paying_twice(teacher, tmp_path):
    asked = []

    def answer(x, limit):
        if len(asked) >= limit:
            raise OSError("line busy")
        asked.append(x)
        return teacher.logits(x)

    def oracle(limit):
        return Oracle(
            lambda x: answer(x, limit), "logits", NAMES, 6, batch_size=4, journal=tmp_path / "journal"
        )

    x = F.normalize(torch.randn(18, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    first = oracle(limit=2)
    with pytest.raises(UserError, match=r"8 queries \(line busy\).*run again"):
        first(x)
    second = oracle(limit=99)
    assert torch.equal(second(x), torch.cat([teacher.logits(part) for part in x.split(4)]))
    assert (second.queries, second.replayed) == (18, 8)
    assert torch.equal(torch.cat(asked), x)  # every row asked once, in all


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `teacher`, but fails in the ways of `script` first: a status, "slow", "drop" or "garbage"."""

    teacher: Teacher
    script: list
    keys: list

    def log_message(self, *args):
        pass

    def do_GET(self):
        teacher = self.teacher
        about = {
            "classnames": teacher.classnames,
            "dim": teacher.weight.shape[1],
            "normalized": teacher.normalized,
            "backbone": teacher.backbone,
        }
        self._reply(json.dumps(about).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.append(self.headers["Idempotency-Key"])
        fault = self.script.pop(0) if self.script else None
        if isinstance(fault, int):
            self.send_response(fault)
            self.end_headers()
            return
        if fault == "slow":
            time.sleep(0.6)
        if fault == "drop":
            self.connection.close()
            return
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"logits"')
            self.connection.close()
            return
        question = json.loads(body)
        answers = open_oracle(self.teacher, question["level"])(torch.tensor(question["features"]))
        reply = json.dumps({question["level"]: answers.tolist()}).encode()
        self._reply(b"<html>" if fault == "garbage" else b'{"scores": []}' if fault == "other" else reply)

    def _reply(self, content):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)


@pytest.fixture
def server(teacher):
    handler = type("Handler", (Server,), {"teacher": teacher, "script": [], "keys": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url, server.handler = f"http://127.0.0.1:{server.server_port}/", handler
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def client(server, **settings):
    return HTTPTeacher(server.url, **{"timeout": 0.3, "backoff": 0.01, "batch_size": 25, **settings})


@pytest.mark.parametrize("level", LEVELS[1:])
def test_a_server_answers_as_the_teacher_does(server, teacher, data, level):
    oracle = client(server).oracle(level)
    assert (oracle.classnames, oracle.dim, oracle.backbone) == (NAMES, 6, "ViT-B-16/openai")
    assert torch.allclose(oracle(data[0]).double(), open_oracle(teacher, level)(data[0]).double(), atol=1e-6)
    assert (oracle.queries, len(server.handler.keys)) == (60, 3)
    assert open_oracle(server.url, level).classnames == NAMES


def test_a_server_that_fails_for_a_while_is_asked_again(server, teacher, data):
    server.handler.script[:] = [503, "slow", "drop", "cut", 429]
    oracle = client(server, retries=5).oracle("logits")
    assert torch.allclose(oracle(data[0]).float(), teacher.logits(data[0]), atol=1e-6)
    assert oracle.queries == 60
    assert len(server.handler.keys) == 3 + 5 and len(set(server.handler.keys)) == 3


def test_a_server_that_stays_down_ends_with_one_line_and_is_resumed(server, data, tmp_path):
    oracle = client(server, retries=1).oracle("labels", tmp_path / "journal")
    oracle(data[0][:25])
    server.handler.script[:] = [500, 500]
    with pytest.raises(UserError, match=r"stopped responding after 25 queries .*500.*run again"):
        oracle(data[0][25:50])
    server.handler.keys.clear()
    again = client(server).oracle("labels", tmp_path / "journal")
    again(data[0])
    assert (again.queries, again.replayed, len(server.handler.keys)) == (60, 25, 2)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(404, "refused with status 404"), ("garbage", "JSON object"), ("other", "no array 'logits'")],
)
def test_replies_that_no_retry_mends_are_reported_at_once(server, data, fault, message):
    server.handler.script[:] = [fault]
    with pytest.raises(UserError, match=message):
        client(server).oracle("logits")(data[0])
    assert len(server.handler.keys) == 1


def test_addresses_that_cannot_be(server):
    with pytest.raises(UserError, match="http:// or https://"):
        HTTPTeacher("file:///etc/passwd")
    with pytest.raises(UserError, match="description of the teacher"):
        HTTPTeacher("http://127.0.0.1:1/", retries=0).oracle("logits")
    with pytest.raises(UserError, match=r"set TEACHER\.ACCESS to logits"):
        client(server).oracle("weights")
