import math
import warnings

import pytest
import torch
from dassl.config import get_cfg_default
from dassl.optim import RAdam, build_lr_scheduler, build_optimizer
from torch import nn

OPTIMIZERS = ["adam", "amsgrad", "sgd", "rmsprop", "radam", "adamw"]


def optim_cfg(**settings):
    cfg = get_cfg_default().OPTIM
    for key, value in settings.items():
        cfg[key] = value
    return cfg


def make(cfg):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([parameter], cfg)
    return parameter, optimizer, build_lr_scheduler(optimizer, cfg)


def learning_rates(cfg, epochs=8):
    parameter, optimizer, scheduler = make(cfg)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    return rates


COSINE = dict(NAME="sgd", LR=0.1, LR_SCHEDULER="cosine", MAX_EPOCH=8)
# Published with the original.
SEQUENCES = [
    (
        dict(WARMUP_EPOCH=2, WARMUP_TYPE="constant"),
        [1e-5, 1e-5, 0.1, 0.096194, 0.085355, 0.069134, 0.05, 0.030866],
    ),
    (
        dict(WARMUP_EPOCH=2, WARMUP_TYPE="constant", WARMUP_RECOUNT=False),
        [1e-5, 1e-5, 0.1, 0.080996, 0.058579, 0.036162, 0.017157, 0.004459],
    ),
    (
        dict(WARMUP_EPOCH=2, WARMUP_TYPE="linear"),
        [1e-5, 0.05, 0.1, 0.096194, 0.085355, 0.069134, 0.05, 0.030866],
    ),
    ({}, [0.05 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]),
]


@pytest.mark.parametrize("settings, expected", SEQUENCES)
def test_cosine_sequences(settings, expected):
    assert learning_rates(optim_cfg(**COSINE, **settings)) == pytest.approx(expected, abs=5e-7)


def test_step_sequences():
    base = dict(NAME="sgd", LR=1.0, MAX_EPOCH=4)
    single = optim_cfg(**base, LR_SCHEDULER="single_step", STEPSIZE=(2,))
    assert learning_rates(single, 5) == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    whole = optim_cfg(**base, LR_SCHEDULER="single_step", STEPSIZE=(-1,))
    assert learning_rates(whole, 5) == pytest.approx([1, 1, 1, 1, 0.1])
    multi = optim_cfg(**base, LR_SCHEDULER="multi_step", STEPSIZE=(1, 3))
    assert learning_rates(multi, 5) == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
    # After a warmup of 1 the schedule counts from its own 0, or from 1.
    warm = dict(WARMUP_EPOCH=1, WARMUP_TYPE="constant", WARMUP_CONS_LR=0.5)
    multi = optim_cfg(**base, LR_SCHEDULER="multi_step", STEPSIZE=(1, 3), **warm)
    assert learning_rates(multi, 5) == pytest.approx([0.5, 1, 0.1, 0.1, 0.01])
    multi.WARMUP_RECOUNT = False
    assert learning_rates(multi, 5) == pytest.approx([0.5, 1, 1, 0.1, 0.1])


@pytest.mark.parametrize("scheduler", ["single_step", "multi_step", "cosine"])
@pytest.mark.parametrize("warmup", [None, "constant", "linear"])
@pytest.mark.parametrize("recount", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_schedule_goes_on_the_same(scheduler, warmup, recount, stop, tmp_path):
    cfg = optim_cfg(
        NAME="sgd", LR=0.1, LR_SCHEDULER=scheduler, STEPSIZE=(2, 4), MAX_EPOCH=7, WARMUP_RECOUNT=recount
    )
    if warmup:
        cfg.WARMUP_EPOCH, cfg.WARMUP_TYPE = 2, warmup
    expected = learning_rates(cfg, 7)
    parameter, optimizer, schedule = make(cfg)
    rates = []
    for epoch in range(7):
        if epoch == stop:
            torch.save((optimizer.state_dict(), schedule.state_dict()), tmp_path / "state")
            parameter, optimizer, schedule = make(cfg)
            states = torch.load(tmp_path / "state", weights_only=True)
            optimizer.load_state_dict(states[0])
            schedule.load_state_dict(states[1])
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    assert rates == expected


def test_warmup_with_several_groups():
    cfg = optim_cfg(**COSINE, WARMUP_EPOCH=2, WARMUP_TYPE="linear")
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.2, 0.4)]
    optimizer = build_optimizer(None, cfg, param_groups=groups)
    scheduler = build_lr_scheduler(optimizer, cfg)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.2])
    assert scheduler.get_last_lr() == pytest.approx([0.1, 0.2])


def test_bad_schedules():
    optimizer = build_optimizer([nn.Parameter(torch.ones(1))], optim_cfg(NAME="sgd"))
    for settings, error in (
        (dict(LR_SCHEDULER="step"), ValueError),
        (dict(LR_SCHEDULER="cosine", WARMUP_EPOCH=1, WARMUP_TYPE="none"), ValueError),
        (dict(LR_SCHEDULER="single_step", STEPSIZE=(0.5,)), TypeError),
        (dict(LR_SCHEDULER="multi_step", STEPSIZE=3), TypeError),
    ):
        with pytest.raises(error):
            build_lr_scheduler(optimizer, optim_cfg(**settings))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("staged", [False, True])
def test_optimizers_learn(name, staged):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    cfg = optim_cfg(NAME=name, LR=0.05, MOMENTUM=0.5, STAGED_LR=staged, NEW_LAYERS=("2",))
    optimizer = build_optimizer(model, cfg)
    rates = [g["lr"] for g in optimizer.param_groups]
    assert rates == pytest.approx([0.005, 0.05] if staged else [0.05])
    x = torch.randn(32, 4)
    y = x.sum(dim=1, keepdim=True)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_settings_reach_the_optimizer():
    parameters = [nn.Parameter(torch.ones(1))]
    sgd = build_optimizer(
        parameters, optim_cfg(NAME="sgd", SGD_DAMPNING=0.0, SGD_NESTEROV=True, MOMENTUM=0.8)
    )
    assert sgd.defaults["nesterov"] and sgd.defaults["momentum"] == 0.8
    assert sgd.defaults["weight_decay"] == 5e-4
    assert build_optimizer(parameters, optim_cfg(NAME="amsgrad")).defaults["amsgrad"]
    adamw = build_optimizer(iter(parameters), optim_cfg(NAME="adamw", ADAM_BETA1=0.5))
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["betas"] == (0.5, 0.999)
    assert build_optimizer(parameters, optim_cfg(NAME="rmsprop", RMSPROP_ALPHA=0.7)).defaults["alpha"] == 0.7


def test_bad_optimizers():
    with pytest.raises(ValueError, match="optim"):
        build_optimizer([], optim_cfg(NAME="lion"))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        build_optimizer([nn.Parameter(torch.ones(1))], optim_cfg(STAGED_LR=True))
    with pytest.warns(UserWarning, match="staged_lr"):
        build_optimizer(None, optim_cfg(STAGED_LR=True), param_groups=[nn.Parameter(torch.ones(1))])
    with pytest.warns(UserWarning, match="new_layers"):
        build_optimizer(nn.Sequential(nn.Linear(1, 1)), optim_cfg(STAGED_LR=True))
    for bad in (dict(lr=-1.0), dict(eps=-1.0), dict(betas=(1.0, 0.9))):
        with pytest.raises(ValueError, match="Invalid"):
            RAdam([nn.Parameter(torch.ones(1))], **bad)


@pytest.mark.parametrize("degenerated", [True, False])
def test_radam_is_the_papers(degenerated):
    """Against the paper's algorithm on plain floats: below rho = 5 a step of momentum, or none."""
    lr, (b1, b2), eps, decay = 0.1, (0.9, 0.99), 1e-8, 0.2
    parameter = nn.Parameter(torch.tensor([0.7], dtype=torch.float32))
    optimizer = RAdam([parameter], lr, (b1, b2), eps, decay, degenerated_to_sgd=degenerated)
    theta, m, v = 0.7, 0.0, 0.0
    rho_inf = 2 / (1 - b2) - 1
    seen = set()
    for t in range(1, 12):
        g = math.sin(t) + theta
        parameter.grad = torch.sin(torch.tensor([float(t)])) + parameter.detach()
        optimizer.step()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat = m / (1 - b1**t)
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        seen.add(rho >= 5)
        if rho >= 5:
            r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            theta = (1 - lr * decay) * theta - lr * r * m_hat * math.sqrt(1 - b2**t) / (math.sqrt(v) + eps)
        elif degenerated:
            theta = (1 - lr * decay) * theta - lr * m_hat
        assert parameter.item() == pytest.approx(theta, rel=2e-5)
    assert seen == {True, False}


def test_radam_closure_and_half_precision():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = RAdam([parameter, nn.Parameter(torch.ones(1))], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.float().pow(2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert parameter.dtype == torch.float16 and (parameter < 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
