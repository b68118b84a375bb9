import numpy as np
import pytest
import torch
from dassl.config import get_cfg_default
from dassl.evaluation import EVALUATOR_REGISTRY, EvaluatorBase, build_evaluator

# Logits' argmax by true class, as (true, predicted, count).
PAIRS = [(0, 0, 5), (0, 1, 1), (1, 1, 2), (1, 3, 4), (2, 2, 6)]
TRUE = np.repeat([p[0] for p in PAIRS], [p[2] for p in PAIRS])
PRED = np.repeat([p[1] for p in PAIRS], [p[2] for p in PAIRS])


def evaluate(cfg, true=TRUE, pred=PRED, **kwargs):
    evaluator = build_evaluator(cfg, **kwargs)
    for part in np.array_split(np.arange(len(true)), 3):
        logits = torch.nn.functional.one_hot(torch.as_tensor(pred[part]), 5).float()
        evaluator.process(logits, torch.as_tensor(true[part]))
    return evaluator.evaluate()


def test_results_and_text(capsys):
    cfg = get_cfg_default()
    cfg.TEST.PER_CLASS_RESULT = True
    names = {0: "abyssinian", 1: "boxer", 2: "pug", 3: "beagle", 4: "none"}
    results = evaluate(cfg, lab2cname=names)
    # Classes 0, 1, 2 occur in the labels: F1 = 10/11, 4/9, 1.
    f1 = 100 * (10 / 11 + 4 / 9 + 1) / 3
    assert list(results) == ["accuracy", "error_rate", "macro_f1", "perclass_accuracy"]
    assert results["accuracy"] == 100 * 13 / 18 and isinstance(results["accuracy"], float)
    assert results["error_rate"] == pytest.approx(100 * 5 / 18)
    assert results["macro_f1"] == pytest.approx(f1)
    assert results["perclass_accuracy"] == pytest.approx(100 * (5 / 6 + 1 / 3 + 1) / 3)
    assert capsys.readouterr().out == (
        "Loading evaluator: Classification\n"
        "=> result\n* total: 18\n* correct: 13\n* accuracy: 72.2%\n* error: 27.8%\n* macro_f1: 78.5%\n"
        "=> per-class result\n"
        "* class: 0 (abyssinian)\ttotal: 6\tcorrect: 5\tacc: 83.3%\n"
        "* class: 1 (boxer)\ttotal: 6\tcorrect: 2\tacc: 33.3%\n"
        "* class: 2 (pug)\ttotal: 6\tcorrect: 6\tacc: 100.0%\n"
        "* average: 72.2%\n"
    )


def test_thousands_are_separated(capsys):
    evaluate(get_cfg_default(), np.zeros(1200, dtype=int), np.zeros(1200, dtype=int))
    assert "* total: 1,200\n* correct: 1,200\n* accuracy: 100.0%" in capsys.readouterr().out


def test_macro_f1_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.RandomState(0)
    for _ in range(10):
        true, pred = generator.randint(0, 4, 30), generator.randint(0, 5, 30)
        expected = 100 * metrics.f1_score(true, pred, average="macro", labels=np.unique(true))
        assert evaluate(get_cfg_default(), true, pred)["macro_f1"] == pytest.approx(expected)


def test_confusion_matrix(tmp_path, capsys):
    cfg = get_cfg_default()
    cfg.TEST.COMPUTE_CMAT = True
    cfg.OUTPUT_DIR = str(tmp_path)
    evaluate(cfg)
    matrix = torch.load(tmp_path / "cmat.pt", weights_only=False)
    expected = [[5 / 6, 1 / 6, 0, 0], [0, 1 / 3, 0, 2 / 3], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert isinstance(matrix, np.ndarray) and matrix == pytest.approx(np.array(expected))
    assert f"Confusion matrix is saved to {tmp_path}/cmat.pt" in capsys.readouterr().out


def test_reset_and_errors():
    evaluator = build_evaluator(get_cfg_default())
    evaluator.process(torch.eye(2), torch.tensor([0, 1]))
    evaluator.reset()
    with pytest.raises(ValueError, match="evaluate"):
        evaluator.evaluate()
    cfg = get_cfg_default()
    cfg.TEST.PER_CLASS_RESULT = True
    with pytest.raises(ValueError, match="class names"):
        build_evaluator(cfg)
    cfg.TEST.EVALUATOR = "Clasification"
    with pytest.raises(ValueError, match="Classification"):
        build_evaluator(cfg)


def test_own_evaluator():
    class Counting(EvaluatorBase):
        pass

    EVALUATOR_REGISTRY.register(Counting)
    cfg = get_cfg_default()
    cfg.TEST.EVALUATOR = "Counting"
    evaluator = build_evaluator(cfg)
    for call in (evaluator.reset, evaluator.evaluate, lambda: evaluator.process(None, None)):
        with pytest.raises(NotImplementedError):
            call()
