"""Linear probe, the other form: logistic regression at its optimum, by L-BFGS.

As DINOv2 and CLIP do: softmax cross-entropy with an L2 penalty, solved in float64, its
strength chosen on a held-out part of the training split. There is no learning rate and
no order of images; it costs a pass over the features for each evaluation of the loss.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float

from vit22b_transfer import UserError
from vit22b_transfer.experiments import heads
from vit22b_transfer.experiments.labelled import (
    Labelled,
    Sets,
    check_alike,
    held_out,
    share_and_loss,
)
from vit22b_transfer.experiments.outcomes import Outcome

# Largest slope of the mean loss at which L-BFGS stops.
_TOLERANCE = 1e-6


def spaced_strengths(least: float, most: float, count: int) -> tuple[float, ...]:
    """`count` strengths from the least to the most, each the same times the one before.

    Raises:
      UserError: unless 0 < least < most and count is at least 2.
    """
    if not 0 < least < most or count < 2:
        raise UserError(
            f"{count} strengths from {least} to {most}: 0 < least < most is needed, "
            "and at least two."
        )
    return tuple(float(value) for value in np.geomspace(least, most, count))


@dataclasses.dataclass(frozen=True)
class LogisticProbe:
    """Protocol of the probe by logistic regression.

    features: sets of the tower's vectors to choose from; a set's vectors are joined
      (`vectors.VECTORS`).
    strengths: inverse penalties C to choose from: the loss is C times the sum of the
      cross-entropies plus half the squared weights (scikit-learn's form).
    held_out: share of the training split that C is chosen on; the fit that is judged is
      then of the whole split. max_iterations: of L-BFGS, for each C.
    """

    features: Sequence[Sequence[str]]
    strengths: Sequence[float]
    held_out: float
    max_iterations: int
    seed: int = 0

    def __post_init__(self):
        if not self.strengths or min(self.strengths) <= 0 or self.max_iterations < 1:
            raise UserError(
                f"strengths={tuple(self.strengths)} with max_iterations="
                f"{self.max_iterations}: at least one strength is needed, and all are "
                "positive."
            )

    def run(self, train: Sets, test: Sets) -> list[Outcome]:
        """One result, that of the chosen set and strength."""
        for name, data in train.items():
            check_alike(data, test[name])
        head = self.learned(train)
        data = test[head.features]
        return [head.outcome(head.logits(data.features, data.what), data.labels)]

    def learned(self, train: Sets) -> heads.Head:
        """The fit of the chosen set and strength.

        Of equally accurate ones that of the least cross-entropy on what is held out.
        Fits that stop at max_iterations are counted.
        """
        tried, stopped, best = {}, 0, (-1.0, 0.0, (), 0.0)
        for name, data in train.items():
            data.constant()  # which says if nothing can be told
            fit, of_set = None, {}
            part, rest = (
                Labelled(data.features[rows], data.labels[rows], data.num_classes)
                for rows in held_out(data.labels, self.held_out, self.seed, data.what)
            )
            # From the strongest penalty on, each from the one before.
            for strength in sorted(self.strengths):
                fit = fit_logistic(part, strength, self.max_iterations, start=fit)
                stopped += not fit.converged
                found, loss = share_and_loss(fit.logits(rest), rest.labels)
                of_set[f"{strength:g}"] = found
                if (found, -loss) > best[:2]:
                    best = (found, -loss, name, strength)
            tried["+".join(name)] = of_set
        value, _, name, strength = best
        data = train[name]
        fit = fit_logistic(data, strength, self.max_iterations)
        stopped += not fit.converged
        settings = {"strength": strength, "held_out_accuracy": value, "tried": tried}
        notes: dict[str, Any] = {"fits_not_converged": stopped} if stopped else {}
        return heads.linear(data, name, fit.weights, fit.bias, settings, notes)


@dataclasses.dataclass(frozen=True)
class Logistic:
    """A fit. loss: mean cross-entropy + squared weights / (2 C images), at its end."""

    weights: Float[np.ndarray, "width classes"]
    bias: Float[np.ndarray, " classes"]
    loss: float
    converged: bool

    def logits(self, data: Labelled) -> Float[np.ndarray, "images classes"]:
        """Of each image and class."""
        found = [data.block(rows) @ self.weights + self.bias for rows in data.blocks()]
        return np.concatenate(found)


def fit_logistic(
    data: Labelled,
    strength: float,
    max_iterations: int,
    *,
    start: Logistic | None = None,
) -> Logistic:
    """Weights and biases (not penalised) of the least loss, in float64.

    start: where L-BFGS begins, by default at zero; where it ends does not depend on it.
    """
    shape = (data.width + 1, data.num_classes)
    penalty = 1.0 / (strength * len(data))

    def loss_and_slope(flat):
        weights = flat.reshape(shape)
        loss, slope = 0.0, np.zeros(shape)
        for rows in data.blocks():
            x, y = data.block(rows), data.labels[rows]
            scores = x @ weights[:-1] + weights[-1]
            log_shares = scores - scipy.special.logsumexp(scores, axis=1, keepdims=True)
            own = (np.arange(len(y)), y)
            loss -= log_shares[own].sum()
            error = np.exp(log_shares)
            error[own] -= 1.0
            slope[:-1] += x.T @ error
            slope[-1] += error.sum(axis=0)
        kernel = weights[:-1]
        slope /= len(data)
        slope[:-1] += penalty * kernel
        return loss / len(data) + 0.5 * penalty * np.sum(kernel**2), slope.ravel()

    first = np.zeros(shape)
    if start is not None:
        first = np.concatenate([start.weights, start.bias[None]])
    found = scipy.optimize.minimize(
        loss_and_slope,
        first.ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "gtol": _TOLERANCE, "ftol": 0.0},
    )
    weights = found.x.reshape(shape)
    return Logistic(weights[:-1], weights[-1], float(found.fun), bool(found.success))
