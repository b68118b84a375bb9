"""What a teacher gives away, and what its owner can do about it, on real features.

    python benchmarks/privacy.py FOLDER

FOLDER holds .npz files of CLIP features (x_val, y_val, x_test, y_test, text, classnames). The teacher is
fitted on x_val of the base classes (the first half); x_test of those classes are the images it has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from recovery import RealSet, asked_for, cosine
from tabulate import tabulate
from torch import Tensor

from dfzsl.trainers.recovery.open_oracle import open_oracle
from dfzsl.trainers.recovery.teacher import Teacher, fit_teacher
from dfzsl.utils.errors import UserError

SHOTS = (1, 4, 16, 0)  # 0: all images
STRENGTHS = (10.0, 0.316, 0.01)  # C of the teacher's logistic regression
EPSILONS = (8.0, 1.0)
DELTA = 1e-5


def rounded(decimals: int) -> Callable[[Tensor], Tensor]:
    return lambda answers: answers.round(decimals=decimals)


def noisy(deviation: float) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda answers: answers + deviation * torch.randn(answers.shape, generator=generator)


# What the owner answers, and what is done to it first.
ANSWERS: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
    ("logits", "as they are", lambda answers: answers),
    ("logits", "2 decimals", rounded(2)),
    ("logits", "noise of deviation 0.1", noisy(0.1)),
    ("logits", "noise of deviation 1", noisy(1.0)),
    ("probabilities", "as they are", lambda answers: answers),
    ("probabilities", "4 decimals", rounded(4)),
    ("probabilities", "3 decimals", rounded(3)),
    ("probabilities", "2 decimals", rounded(2)),
]


def directions(n: int, d: int) -> Tensor:
    """n random unit queries."""
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)), dim=1)


def by_least_squares(teacher: Teacher, level: str, change: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """Centred rows (C, d) from n answers that the owner has changed."""
    x = directions(n, teacher.weight.shape[1])
    answers = change(open_oracle(teacher, level)(x).double())
    if level == "probabilities":
        answers = answers.clamp(min=1e-5).log()
    answers = answers - answers.mean(1, keepdim=True)
    return torch.linalg.lstsq(x.double(), answers).solution.T.float()


def by_imitation(teacher: Teacher, n: int) -> Tensor:
    """Rows (C, d) of a logistic regression on the labels of n random queries."""
    x = directions(n, teacher.weight.shape[1])
    labels = open_oracle(teacher, "labels")(x)
    weight = torch.zeros(teacher.weight.shape, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T, labels) + 1e-6 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach() - weight.detach().mean(0)


def copy_table(data: RealSet) -> str:
    """How near a copy comes to the teacher, by what it answers and how often."""
    rows = F.normalize(data.teacher.weight, dim=1)
    features, labels = data.test
    table = []

    def compare(level: str, change: str, queries: int, copied: Tensor) -> None:
        top = (features @ copied.T).argmax(1)
        agree = (top == (features @ rows.T).argmax(1)).float().mean()
        near = cosine(copied, rows - rows.mean(0)).mean()
        right = (top == labels).float().mean()
        table.append((level, change, queries, float(near), 100 * agree, 100 * right))

    d = rows.shape[1]
    for level, change, apply in ANSWERS:
        for n in (d, 4 * d, 32 * d):
            compare(level, change, n, by_least_squares(data.teacher, level, apply, n))
    for n in (1000, 5000, 20000, 80000):
        compare("labels", "random questions", n, by_imitation(data.teacher, n))
    headers = ("answers", "changed by", "queries", "mean cosine", "same answer %", "accuracy %")
    return tabulate(table, headers, tablefmt="github", floatfmt=("", "", "", ".3f", ".1f", ".1f"), intfmt=",")


def auc(members: Tensor, others: Tensor) -> float:
    """The chance that a member scores higher than a stranger."""
    ranks = torch.cat([members, others]).double().argsort().argsort().double() + 1
    n, m = len(members), len(others)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def draw(labels: Tensor, shots: int) -> Tensor:
    """Indices of `shots` images a class; all if 0."""
    generator = torch.Generator().manual_seed(0)
    of_class = [(labels == c).nonzero().flatten() for c in labels.unique()]
    return torch.cat(
        [rows[torch.randperm(len(rows), generator=generator)][: shots or None] for rows in of_class]
    )


def nearest(features: Tensor, labels: Tensor, rows: Tensor) -> float:
    """Cosine of a class's row to its nearest feature, averaged over classes."""
    near = F.normalize(features, dim=1) @ rows.T
    return float(torch.stack([near[labels == c, c].max() for c in range(len(rows))]).mean())


def images_table(sets: list[RealSet]) -> str:
    """What the teacher's rows say about single training images.

    Features are taken without their common part, which rows do not show. Membership: is an image one of those
    the teacher was fitted on? Guessed from the cosine to its class's row.
    """
    table = []
    for data in sets:
        x, y = data.train
        strangers, of = data.test
        centre = strangers.mean(0)
        for shots in SHOTS:
            for strength in STRENGTHS if shots == 0 else (0.316,):
                own = draw(y, shots)
                teacher = fit_teacher(x[own], y[own], data.classnames, C=strength)
                rows = F.normalize(teacher.weight, dim=1)

                # As many strangers as members, or the nearest of more would be nearer by chance alone.
                other = draw(of, shots or int(torch.bincount(y).min()))
                members = (x[own] * rows[y[own]]).sum(1)
                others = (strangers * rows[of]).sum(1)
                right = ((strangers @ rows.T).argmax(1) == of).float().mean()
                table.append(
                    (
                        *(data.name, shots or "all", strength),
                        nearest(x[own] - centre, y[own], rows),
                        nearest(strangers[other] - centre, of[other], rows),
                        *(auc(members, others), 100 * right),
                    )
                )
    headers = (
        "set",
        "images a class",
        "C",
        "nearest training image",
        "nearest other",
        "membership AUC",
        "accuracy %",
    )
    return tabulate(table, headers, tablefmt="github", floatfmt=("", "", "g", ".2f", ".2f", ".2f", ".1f"))


def noise_for(epsilon: float, strength: float) -> float:
    """Standard deviation that makes the rows (epsilon, DELTA)-differentially private for one exchanged image.

    The regression minimises |W|^2 / 2 + C sum_i loss_i, whose gradients are at most sqrt(2) long on unit
    features: one image moves the minimum by at most 2 sqrt(2) C (Chaudhuri et al. 2011). Gaussian mechanism
    under zero-concentrated privacy, epsilon = rho + 2 sqrt(rho log(1 / delta)) (Bun and Steinke 2016).
    """
    log = math.log(1 / DELTA)
    root = math.sqrt(log + epsilon) - math.sqrt(log)
    return 2 * math.sqrt(2) * strength / (math.sqrt(2) * root)


def private_table(sets: list[RealSet]) -> str:
    """What differential privacy of the rows costs at this number of images."""
    table = []
    for data in sets:
        x, y = data.train
        features, labels = data.test
        for strength in (0.316, 0.01):
            teacher = fit_teacher(x, y, data.classnames, C=strength)
            for epsilon in (math.inf, *EPSILONS):
                generator = torch.Generator().manual_seed(0)
                scale = 0.0 if epsilon == math.inf else noise_for(epsilon, strength)
                right = [
                    ((features @ (teacher.weight + scale * noise).T).argmax(1) == labels).float().mean()
                    for noise in torch.randn(20, *teacher.weight.shape, generator=generator)
                ]
                table.append((data.name, len(x), strength, epsilon, 100 * float(torch.stack(right).mean())))
    headers = ("set", "images", "C", "epsilon", "accuracy %")
    return tabulate(table, headers, tablefmt="github", floatfmt=("", "", "g", "g", ".1f"))


def main() -> None:
    folder, sets = asked_for(__doc__)
    if not sets:
        raise UserError(f"{folder}: it holds no .npz file")
    for data in sets:
        print(f"\n{data.name}: {len(data.classnames)} base classes, d = {data.text.shape[1]}\n")
        print(copy_table(data), flush=True)
    print("\nImages\n\n" + images_table(sets))
    print("\nDifferential privacy\n\n" + private_table(sets))


if __name__ == "__main__":
    main()
