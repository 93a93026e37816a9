"""Linear SVMs on frozen features: every class, fold and draw of one layer solved together.

The problem is LIBLINEAR's squared-hinge SVM with a regularised intercept (scikit-learn's `LinearSVC`):

    P(w) = ‖w‖² / 2 + Σᵢ cᵢ max(0, 1 − yᵢ w·xᵢ)²,   x = (features, 1),   cᵢ = cost · class weight.

All problems of a layer share their images, so they share one Gram matrix and its eigendecomposition. In
the eigenbasis the Hessian is nearly diagonal, and Newton's method needs a handful of matrix products for
all problems at once. With an exact line search every step lowers P, so no set of active images comes
back, and on the right set Newton's step is the solution (Keerthi and DeCoste, JMLR 6, 2005). Steps are
computed from the gradient, and the line search from the step, so their rounding errors vanish with them.

P is 1-strongly convex: its duality gap is half the squared norm of its gradient, and no score is further
from the exact one than that norm times ‖x‖. That certifies every solution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simclr import BadInput

POSITIVE_WEIGHT = 2.0  # class weights 2 and 1: MMSelfSup v0.11.0, svm_voc07/tools/train_svm_kfold.py
TOLERANCE = 1e-8  # of the gradient's norm, relative to ‖w‖: a relative duality gap of at most 1e-16
MAX_STEPS = 100  # of Newton's method; about ten are needed


class Solution(NamedTuple):
    """The P problems at one cost, for n images."""

    cost: float
    coefficients: Tensor  # (n, P): the score of x is Σᵢ coefficientᵢ (x·xᵢ)
    scores: Tensor  # (n, P): of all n images, also of those that a problem was not trained on
    gap: Tensor  # (P,): duality gap, as a share of the objective


def device() -> torch.device:
    """Return the first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scaled(features: np.ndarray) -> Tensor:
    """Return `features` `(N, D)` in float64 as x / (‖x‖ + 1e-5): MMSelfSup v0.11.0, svm_helper.py."""
    features = torch.from_numpy(np.array(features, dtype=np.float64)).to(device())
    return features / (features.norm(dim=1, keepdim=True) + 1e-5)


def gram(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products `(N, M)` of `a` `(N, D)` and `b` `(M, D)`, each with a 1 appended."""
    return a @ b.T + 1


class Problems:
    """P binary problems over n images that share the Gram matrix `kernel` `(n, n)`.

    `signs` `(n, P)` is +1 for a positive, −1 for a negative, 0 for an image that the problem leaves out.
    """

    def __init__(self, kernel: Tensor, signs: np.ndarray):
        self.kernel = kernel
        self.signs = torch.from_numpy(np.asarray(signs, dtype=np.float64)).to(kernel.device)
        self.weights = torch.where(self.signs > 0, POSITIVE_WEIGHT, 1) * self.signs.abs()
        self.basis, self.eigenvalues = eigenbasis(kernel)

    def path(self, costs: list[float]) -> Iterator[Solution]:
        """Yield the solutions at each of `costs` in ascending order, each started from the one before.

        Raises `ArithmeticError` naming the cost and the problem that did not converge.
        """
        problems = self.signs.shape[1]
        w = self.kernel.new_zeros(self.basis.shape[1], problems)
        iterations = self.kernel.new_ones(problems)  # that conjugate gradients took last for each problem
        for cost in sorted(costs):
            yield self._solve(cost, w, iterations)

    def _solve(self, cost: float, w: Tensor, iterations: Tensor) -> Solution:
        """Improve `w` `(r, P)` in place by Newton's method until every problem has converged."""
        live = torch.arange(w.shape[1], device=w.device)
        tolerance = self._tolerance(cost)
        for _ in range(MAX_STEPS):
            state = self._state(cost, w, live)
            converged = state.gradient.norm(dim=0) <= tolerance * state.w.norm(dim=0)
            live = live[~converged]
            if not len(live):
                return self._solution(cost, w)
            state = state.take(~converged)
            step, iterations[live] = self._newton_step(state, iterations[live], tolerance)
            w[:, live] += _step_length(state, step, self.basis @ step) * step
        raise ArithmeticError(
            f"SVM: {len(live)} of {w.shape[1]} problems did not converge at cost {cost:g} in {MAX_STEPS} "
            f"steps; the first is problem {int(live[0])}"
        )

    def _tolerance(self, cost: float) -> float:
        """Return `TOLERANCE`, or what rounding leaves attainable: ε times a bound of the Hessian.

        It is above `TOLERANCE` only where the cost times the number of images exceeds about a million.
        """
        hessian = 1 + 2 * cost * POSITIVE_WEIGHT * float(self.eigenvalues[-1])
        return max(TOLERANCE, 4 * torch.finfo(self.eigenvalues.dtype).eps * hessian)

    def _state(self, cost: float, w: Tensor, live: Tensor) -> _State:
        w, signs, weights = w[:, live], self.signs[:, live], cost * self.weights[:, live]
        scores = self.basis @ w
        slack = (1 - signs * scores).clamp(min=0)
        gradient = w - self.basis.T @ (2 * weights * slack * signs)
        return _State(w, signs, weights, scores, slack, gradient)

    def _solution(self, cost: float, w: Tensor) -> Solution:
        state = self._state(cost, w, torch.arange(w.shape[1], device=w.device))
        objective = state.w.square().sum(0) / 2 + (state.weights * state.slack.square()).sum(0)
        gap = state.gradient.square().sum(0) / 2 / objective.clamp(min=torch.finfo(w.dtype).tiny)
        return Solution(cost, 2 * state.weights * state.slack * state.signs, state.scores, gap)

    def _newton_step(self, state: _State, iterations: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Return the step `(r, p)` and the conjugate-gradient iterations `(p,)` to expect next time.

        At a high cost few images are active and conjugate gradients are slow: where factoring the active
        block of the Gram matrix (a³/3 operations) is cheaper than the iterations that the problem took
        last (4nr operations each), it is factored instead.
        """
        active = state.curvature > 0
        direct = active.sum(0) ** 3 / 3 < 4 * self.basis.numel() * iterations
        step, iterations = torch.zeros_like(state.w), iterations.clone()
        for column in direct.nonzero().flatten().tolist():
            step[:, column] = self._factored_step(state, column, active[:, column].nonzero().flatten())
        if not direct.all():
            step[:, ~direct], iterations[~direct] = self._conjugate_gradients(state.take(~direct), tolerance)
        return step, iterations

    def _factored_step(self, state: _State, column: int, active: Tensor) -> Tensor:
        """Return the exact step `(r,)` of one problem, by the Cholesky factor of its active block.

        With B the rows and D the curvatures of the active images, and g the gradient (Woodbury):
        −(1 + BᵀDB)⁻¹ g = Bᵀ(BBᵀ + D⁻¹)⁻¹ Bg − g.
        """
        rows, gradient = self.basis[active], state.gradient[:, column]
        block = self.kernel[active[:, None], active]
        block.diagonal().add_(1 / state.curvature[active, column])
        factor = torch.linalg.cholesky(block)
        return torch.cholesky_solve((rows @ gradient)[:, None], factor)[:, 0] @ rows - gradient

    def _conjugate_gradients(self, state: _State, tolerance: float) -> tuple[Tensor, Tensor]:
        """Return steps `(r, p)` that solve Newton's equation the better the nearer the solution is."""
        norm, size = state.gradient.norm(dim=0), state.w.norm(dim=0)
        target = torch.maximum(norm * (norm / size).clamp(max=0.1), tolerance / 4 * size)
        # In the eigenbasis, Σ over all images of x xᵀ is diag(eigenvalues); over the active ones, nearly so.
        diagonal = 1 + self.eigenvalues[:, None] * state.curvature.mean(0)
        step, residual = torch.zeros_like(state.w), -state.gradient
        direction = residual / diagonal
        energy = (residual * direction).sum(0)
        iterations = torch.zeros_like(norm)
        for _ in range(10 * len(step)):
            wanting = residual.norm(dim=0) > target
            if not wanting.any():
                break
            iterations += wanting
            product = direction + self.basis.T @ (state.curvature * (self.basis @ direction))
            length = torch.where(wanting, energy / (direction * product).sum(0), 0.0)
            step += length * direction
            residual -= length * product
            preconditioned = residual / diagonal
            previous, energy = energy, (residual * preconditioned).sum(0)
            direction = preconditioned + torch.where(wanting, energy / previous, 0.0) * direction
        return step, iterations


class _State(NamedTuple):
    """Where Newton's method stands: columns are problems, rows basis vectors (r) or images (n)."""

    w: Tensor  # (r, p)
    signs: Tensor  # (n, p)
    weights: Tensor  # (n, p): cost · class weight
    scores: Tensor  # (n, p)
    slack: Tensor  # (n, p): max(0, 1 − y w·x)
    gradient: Tensor  # (r, p)

    @property
    def curvature(self) -> Tensor:
        """Second derivative of each image's loss: 2c where the image is active, else 0."""
        return 2 * self.weights * (self.slack > 0)

    def take(self, columns: Tensor) -> _State:
        return _State(*(tensor[:, columns] for tensor in self))


def eigenbasis(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(n, r)` coordinates of the n images whose inner products are `kernel`, and r eigenvalues.

    Directions without variance are left out; r is the rank. Raises `BadInput` when `kernel` is not finite.
    """
    if not torch.isfinite(kernel).all():
        row = int((~torch.isfinite(kernel)).any(dim=1).nonzero()[0])
        raise BadInput(f"row {row} of the features holds NaN or infinity; extract the features again")
    eigenvalues, vectors = torch.linalg.eigh(kernel)
    kept = eigenvalues > eigenvalues[-1] * len(kernel) * torch.finfo(kernel.dtype).eps
    return vectors[:, kept] * eigenvalues[kept].sqrt(), eigenvalues[kept]


def _step_length(state: _State, step: Tensor, change: Tensor) -> Tensor:
    """Return the length `(p,)` that minimises each objective along `step`; `change` `(n, p)` is its scores'.

    Along a line the slope is increasing and piecewise linear: Newton's method between safe bounds ends on
    its zero. Only changes along the line are summed, so that nothing cancels near the solution.
    """
    start, square = (state.gradient * step).sum(0), step.square().sum(0)
    gain = state.signs * change  # how fast each image's slack shrinks
    excess = state.slack - (1 - state.signs * state.scores)  # how far an inactive image is from its margin
    length = torch.ones_like(start)
    low, high = torch.zeros_like(start), torch.full_like(start, torch.inf)
    for _ in range(100):
        shrunk = torch.minimum(state.slack, length * gain + excess)
        slope = start + length * square + (2 * state.weights * shrunk * gain).sum(0)
        if (slope.abs() <= 1e-6 * start.abs()).all():
            break
        curvature = square + (2 * state.weights * (shrunk < state.slack) * gain.square()).sum(0)
        low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
        middle = torch.where(high.isinf(), 2 * low, (low + high) / 2)
        newton = length - slope / curvature
        length = torch.where((low < newton) & (newton < high), newton, middle)
    return length
