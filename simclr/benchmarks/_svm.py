"""Linear SVMs on frozen features: every class, fold, draw and cost of one layer solved together.

The problem is LIBLINEAR's squared-hinge SVM with a regularised intercept (scikit-learn's `LinearSVC`):

    P(w) = ‖w‖² / 2 + Σᵢ cᵢ max(0, 1 − yᵢ w·xᵢ)²,   x = (features, 1),   cᵢ = cost · class weight.

All problems of a layer share their images, so they share one Gram matrix K. With w = Σᵢ βᵢ xᵢ the scores
are f = Kβ, and one matrix product serves every problem. Let αᵢ = 2cᵢ yᵢ max(0, 1 − yᵢfᵢ). The gradient is
−Σᵢ rᵢ xᵢ with r = α − β, and Newton's step is Σᵢ (rᵢ + εᵢ) xᵢ, where on the active images A (those with a
loss) (K_AA + diag(1/2c)) ε = −(K r)_A, and ε = 0 elsewhere. With an exact line search every step lowers P,
so no set of active images comes back, and on the right set Newton's step is the solution (Keerthi and
DeCoste, JMLR 6, 2005). Steps are computed from r, so their rounding errors vanish with it: ε may be found in
float32, which halves the time, while scores, gradient and certificate are of float64 throughout.

At a low cost nearly all images are active and the system is well conditioned but for the leading directions
of K, which are shared: K = FFᵀ + a positive semi-definite rest of norm τ, F thin. Preconditioned with
FFᵀ in place of K, conjugate gradients see a condition number of at most 1 + 4 · cost · τ, whatever the
active images, and need a handful of iterations. At a high cost few images are active, and the system is
factored.

P is 1-strongly convex: its duality gap is half the squared norm of its gradient, and no score is further
from the exact one than that norm times ‖x‖. That certifies every solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from simclr import devices
from simclr.features import copied

POSITIVE_WEIGHT = 2.0  # class weights 2 and 1: MMSelfSup v0.11.0, svm_voc07/tools/train_svm_kfold.py
TOLERANCE = 1e-6  # of the gradient's norm, relative to ‖w‖: a relative duality gap of at most 1e-12
MAX_STEPS = 100  # of Newton's method; about five are needed
FORCING = 1e-3  # how far conjugate gradients reduce the residual of one step
LOW_COST = 0.1  # up to it, costs are solved side by side; above it, each is started from the one below
WIDTH = 256  # about as many columns (problems × costs) are solved side by side
WEAK = 1.0  # a direction of K is left to conjugate gradients where it curves the loss less than ‖w‖² / 2
ROUGH = 2**15  # norm of the Hessian up to which float32, of 24 bits, finds a step; see `_newton_step`
BLOCK = 2**21  # numbers in the Gram matrices of the groups that are best solved together (16 MiB)

Item, Result = TypeVar("Item"), TypeVar("Result")


class Solution(NamedTuple):
    """The P problems of each of G groups at one cost; n images a group."""

    cost: float
    coefficients: Tensor  # (G, P, n): the score of x is Σᵢ coefficientᵢ (x·xᵢ)
    scores: Tensor  # (G, P, n): of all n images, also of those that a problem was not trained on
    gap: Tensor  # (G, P): duality gap, as a share of the objective


class Leading(NamedTuple):
    """The leading part FFᵀ of a Gram matrix K; K − FFᵀ is positive semi-definite."""

    factor: Tensor  # (…, n, m): F
    pairs: Tensor  # (…, n, m(m + 1)/2): the products of the factors of each image, j ≤ i: 00, 10, 11, 20, …
    eigenvalues: Tensor  # (m,): of FFᵀ, descending; the norm of K − FFᵀ is about the last one

    def part(self, rows: Tensor) -> Leading:
        """Return that of the smaller kernels of the images `rows` `(G, n)`, thinned to √n directions."""
        rank = min(math.isqrt(rows.shape[1]), len(self.eigenvalues))
        share = rows.shape[1] / len(self.factor)
        pairs = self.pairs[:, : rank * (rank + 1) // 2]
        return Leading(self.factor[rows, :rank], pairs[rows], share * self.eigenvalues[:rank])

    def float(self) -> Leading:
        return Leading(*(tensor.float() for tensor in self))

    def inverse(self, root: Tensor, rank: int) -> Tensor:
        """Return (1 + Fᵀ root² F)⁻¹ `(G, p, rank, rank)` for each row of `root` `(G, p, n)`, F of `rank`."""
        inner = root.new_zeros(*root.shape[:2], rank, rank)
        row, column = torch.tril_indices(rank, rank, device=root.device)
        inner[..., row, column] = inner[..., column, row] = root.square() @ self.pairs[..., : len(row)]
        inner.diagonal(dim1=-2, dim2=-1).add_(1)
        return torch.cholesky_inverse(torch.linalg.cholesky(inner))


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], on: torch.device
) -> Iterator[Result]:
    """Yield the results of `function`, in order; on a CPU in as many threads as PyTorch uses.

    PyTorch runs small operations in one thread, and has the other cores wait.
    """
    if on.type != "cpu":
        yield from map(function, items)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(function, items)


def scaled(features: np.ndarray) -> Tensor:
    """Return `features` `(N, D)` in float64 as x / (‖x‖ + 1e-5): MMSelfSup v0.11.0, svm_helper.py."""
    features = torch.from_numpy(copied(features, dtype="float64")).to(devices.first())
    return features.div_(features.norm(dim=1, keepdim=True) + 1e-5)


def gram(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products `(N, M)` of `a` `(N, D)` and `b` `(M, D)`, each with a 1 appended."""
    return (a @ b.T).add_(1)


def among(kernel: Tensor, rows: Tensor) -> Tensor:
    """Return the kernels `(G, n, n)` among each of G choices `rows` `(G, n)` of the images of `kernel`."""
    if kernel.is_cuda:
        return kernel[rows[:, :, None], rows[:, None]]
    rows = rows.numpy()  # NumPy has large arrays in huge pages, and copies twice as fast
    return torch.from_numpy(kernel.numpy()[rows[:, :, None], rows[:, None]])


def scores(coefficients: Tensor, images: Tensor, others: Tensor) -> Tensor:
    """Return the scores `(P, M)` of `others` `(M, D)`; `coefficients` is `(P, N)`, `images` `(N, D)`."""
    return coefficients @ images @ others.T + coefficients.sum(dim=1, keepdim=True)


def certificate(gaps: list[Tensor]) -> dict[str, float]:
    """Return, for a record, how many problems were solved, and the worst of their relative duality `gaps`.

    None is above `tolerance`.
    """
    return {
        "problems": sum(gap.numel() for gap in gaps),
        "worst_relative_duality_gap": max(float(gap.max()) for gap in gaps),
        "tolerance": TOLERANCE**2,
    }


def leading(kernel: Tensor) -> Leading:
    """Return the leading √n directions of `kernel` `(n, n)`: with so many, F costs as little to use as K.

    Nyström's approximation on the range that two steps of subspace iteration find (Halko, Martinsson and
    Tropp, SIAM Review 53, 2011), from a fixed seed. The result changes no solution, only how soon it comes.
    """
    rank = math.isqrt(len(kernel))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(kernel), min(rank + 8, len(kernel)), dtype=kernel.dtype, generator=generator)
    directions = start.to(kernel.device)
    for _ in range(2):
        directions = torch.linalg.qr(kernel @ directions).Q
    image = kernel @ directions
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(directions.T @ image))
    rank = min(rank, int((values > values[0] * len(kernel) * torch.finfo(kernel.dtype).eps).sum()))
    factor = image @ vectors[:, :rank] / values[:rank].sqrt()
    row, column = torch.tril_indices(rank, rank, device=kernel.device)
    return Leading(factor, factor[:, row] * factor[:, column], values[:rank])


class Problems:
    """P binary problems in each of G groups of n images; a group shares its Gram matrix.

    `kernel` is `(G, n, n)`. `signs` `(G, P, n)` is +1 for a positive, −1 for a negative, 0 for an image that
    the problem leaves out. `leading` is that of the kernels, or of a larger kernel that they are parts of.
    """

    def __init__(self, kernel: Tensor, signs: np.ndarray, leading: Leading):
        self.kernel = kernel
        self.rough = kernel.float(), leading.float()
        self.signs = torch.as_tensor(signs).to(kernel)
        self.weights = torch.where(self.signs > 0, POSITIVE_WEIGHT, 1) * self.signs.abs()
        self.leading = leading

    def path(self, costs: list[float]) -> Iterator[Solution]:
        """Yield the solution at each of `costs`, ascending.

        Raises `ArithmeticError` naming the cost and the problem that did not converge.
        """
        start = torch.zeros_like(self.signs), torch.zeros_like(self.signs)
        for batch in _batches(sorted(costs), WIDTH // self.signs.shape[1]):
            for solution in self._solve(batch, *start):
                start = solution.coefficients, solution.scores
                yield solution

    def _solve(self, costs: list[float], coefficients: Tensor, scores: Tensor) -> Iterator[Solution]:
        """Solve at each of `costs` by Newton's method from one start, until every problem has converged.

        The rows of all tensors are the problems at the first cost, then at the second, and so on.
        """
        problems, repeats = self.signs.shape[1], (1, len(costs), 1)
        cost = self.kernel.new_tensor(costs).repeat_interleave(problems)
        signs, weights = self.signs.repeat(repeats), self.weights.repeat(repeats) * cost[:, None]
        coefficients, scores = coefficients.repeat(repeats), scores.repeat(repeats)
        gap = torch.zeros_like(scores[..., 0])
        live = torch.arange(len(cost), device=cost.device)
        for _ in range(MAX_STEPS):
            state = self._state(signs, weights, coefficients, scores, live)
            gap[:, live] = state.squared_gradient / 2 / state.objective
            converged = state.squared_gradient <= TOLERANCE**2 * state.squared_size
            kept = ~converged.all(dim=0)
            if not kept.any():
                parts = (tensor.chunk(len(costs), dim=1) for tensor in (coefficients, scores, gap))
                return map(Solution, costs, *parts)
            live, state = live[kept], state.take(kept)
            step, change = self._newton_step(state, cost[live])
            length = _step_length(state, step, change)[..., None]
            coefficients[:, live] += length * step
            scores[:, live] += length * change
        raise ArithmeticError(
            f"SVM: {int((~converged).sum())} of {gap.numel()} problems did not converge at cost "
            f"{float(cost[live[0]]):g} in {MAX_STEPS} steps; the first is problem {int(live[0]) % problems}"
        )

    def _state(
        self, signs: Tensor, weights: Tensor, coefficients: Tensor, scores: Tensor, live: Tensor
    ) -> _State:
        signs, weights, scores = signs[:, live], weights[:, live], scores[:, live]
        slack = (1 - signs * scores).clamp(min=0)
        residual = 2 * weights * slack * signs - coefficients[:, live]
        product = _times(self.kernel, residual)
        squared_gradient = (residual * product).sum(dim=2).clamp(min=0)
        squared_size = (coefficients[:, live] * scores).sum(dim=2)
        objective = squared_size / 2 + (weights * slack.square()).sum(dim=2)
        objective = objective.clamp(min=torch.finfo(objective.dtype).tiny)
        return _State(
            signs, weights, scores, slack, residual, product, squared_gradient, squared_size, objective
        )

    def _newton_step(self, state: _State, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Return r + ε and K(r + ε), each `(G, p, n)`, with ε by the cheaper way for each problem.

        ε only has to shorten the gradient: it is of float32 where that can do so. Rounding leaves a share u
        of each part of ε, and a Hessian of norm H weighs the parts differently, in the gradient by H^1.5 at
        most: u H^1.5 < 1/2. For the same reason each step is as accurate as `FORCING`, even if less would do:
        what is left of one part would disturb the others in the next step.

        In units of an operation: gathering a active images takes 200a², and factoring them a³/3; an iteration
        of conjugate gradients takes 2n² for each problem, and reading K as long as eight problems. Reaching
        an accuracy takes about √κ log(2 / accuracy) / 2 iterations, at a condition number of κ.
        """
        root = (2 * state.weights * (state.slack > 0)).sqrt()
        active, (_, problems, images) = (root > 0).sum(dim=2), root.shape
        hessian = 2 * POSITIVE_WEIGHT * cost * self.leading.eigenvalues[:, None]  # (m, p): its eigenvalues
        iterations = (1 + hessian[-1]).sqrt() * math.log(2 / FORCING) / 2
        iterated = 2 * images**2 * iterations * (1 + 8 / problems)
        factored = active**3 / 3 + 200 * active**2
        direct = (factored.sum(dim=0) < len(factored) * iterated) | (4 * iterations > images)
        kernel, leading = self.rough if hessian[0].max() <= ROUGH else (self.kernel, self.leading)
        found, right = torch.zeros_like(root), -state.product
        if direct.any():
            found[:, direct] = _factored(kernel, root[:, direct], right[:, direct])
        if not direct.all():
            rank = int((hessian[:, ~direct] > WEAK).any(dim=1).sum().clamp(min=1))
            found[:, ~direct] = _conjugate_gradients(
                kernel, leading, root[:, ~direct], right[:, ~direct], FORCING, rank
            )
        return state.residual + found, state.product + _times(self.kernel, found)


class _State(NamedTuple):
    """Where Newton's method stands: the second index is the problem, the last the image, if any."""

    signs: Tensor  # (G, p, n)
    weights: Tensor  # (G, p, n): cost · class weight
    scores: Tensor  # (G, p, n)
    slack: Tensor  # (G, p, n): max(0, 1 − y f)
    residual: Tensor  # (G, p, n): r; the gradient is −Σᵢ rᵢ xᵢ
    product: Tensor  # (G, p, n): K r
    squared_gradient: Tensor  # (G, p)
    squared_size: Tensor  # (G, p): ‖w‖²
    objective: Tensor  # (G, p)

    def take(self, problems: Tensor) -> _State:
        return self if problems.all() else _State(*(tensor[:, problems] for tensor in self))


def _batches(costs: list[float], low: int) -> Iterator[list[float]]:
    """Split ascending `costs` into those solved side by side: `low` at once up to `LOW_COST`, then singly."""
    few = [cost for cost in costs if cost <= LOW_COST]
    low = max(1, low)
    yield from (few[at : at + low] for at in range(0, len(few), low))
    yield from ([cost] for cost in costs[len(few) :])


def _times(kernel: Tensor, vectors: Tensor) -> Tensor:
    """Return `vectors` `(G, p, n)` times `kernel` `(G, n, n)`; of a single one only the rows needed."""
    if len(vectors) == 1:
        needed = vectors[0].any(dim=0).nonzero()[:, 0]
        if 5 * len(needed) < vectors.shape[2]:  # else copying them takes longer
            return (vectors[0][:, needed] @ kernel[0][needed])[None]
    return vectors @ kernel


def _factored(kernel: Tensor, root: Tensor, right: Tensor) -> Tensor:
    """Return ε `(G, p, n)` by the Cholesky factors of the active blocks, of the type of `kernel`.

    On the active images (K + diag(root⁻²)) ε = `right`; `root` is √2c or 0.
    """
    found = torch.zeros_like(root)

    def solve(at: tuple[int, int]) -> None:
        active = root[at].nonzero()[:, 0]
        block = kernel[at[0]].index_select(0, active).index_select(1, active)
        block.diagonal().add_(root[at][active] ** -2)
        of = right[at][active, None].to(block)
        found[at][active] = torch.cholesky_solve(of, torch.linalg.cholesky(block))[:, 0].to(found)

    list(in_parallel(solve, np.ndindex(*root.shape[:2]), root.device))
    return found


def _conjugate_gradients(
    kernel: Tensor, leading: Leading, root: Tensor, right: Tensor, accuracy: float, rank: int
) -> Tensor:
    """Return ε as `_factored` does, to a relative `accuracy` of the residual.

    ε = root · z with (root K root + 1) z = root · right, which is solved in units of its right side's size.
    """
    residual = root * right
    size = residual.norm(dim=2, keepdim=True).clamp(min=torch.finfo(root.dtype).tiny)
    residual, root = (residual / size).to(kernel), root.to(kernel)
    factor, inverse = leading.factor[..., :rank].contiguous(), leading.inverse(root, rank)

    def precondition(vectors: Tensor) -> Tensor:
        """Return (root FFᵀ root + 1)⁻¹ times `vectors`, by Woodbury's identity."""
        inner = ((root * vectors) @ factor)[..., None, :] @ inverse
        return vectors - root * (inner[..., 0, :] @ factor.mT)

    solution = torch.zeros_like(root)
    direction = precondition(residual)
    energy = (residual * direction).sum(dim=2)
    target = accuracy**2 * energy
    for _ in range(root.shape[2]):
        wanting = energy > target
        if not wanting.any():
            break
        curved = direction + root * _times(kernel, root * direction)
        length = torch.where(wanting, energy / (direction * curved).sum(dim=2), 0.0)[..., None]
        solution += length * direction
        residual -= length * curved
        preconditioned = precondition(residual)
        previous, energy = energy, (residual * preconditioned).sum(dim=2)
        direction = preconditioned + torch.where(wanting, energy / previous, 0.0)[..., None] * direction
    return size * (root * solution)


def _step_length(state: _State, step: Tensor, change: Tensor) -> Tensor:
    """Return the length `(G, p)` that minimises each objective along `step`; `change` is its scores'.

    Along a line the slope is increasing and piecewise linear: Newton's method between safe bounds ends on
    its zero. Only changes along the line are summed, so that nothing cancels near the solution.
    """
    start, square = -(state.product * step).sum(dim=2), (step * change).sum(dim=2)
    gain = state.signs * change  # how fast each image's slack shrinks
    excess = state.slack - (1 - state.signs * state.scores)  # how far an inactive image is from its margin
    length = torch.ones_like(start)
    low, high = torch.zeros_like(start), torch.full_like(start, torch.inf)
    for _ in range(100):
        shrunk = torch.minimum(state.slack, length[..., None] * gain + excess)
        slope = start + length * square + (2 * state.weights * shrunk * gain).sum(dim=2)
        found = slope.abs() <= 1e-3 * start.abs()
        if found.all():
            break
        curvature = square + (2 * state.weights * (shrunk < state.slack) * gain.square()).sum(dim=2)
        low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
        middle = torch.where(high.isinf(), 2 * low, (low + high) / 2)
        newton = length - slope / curvature
        better = torch.where((low < newton) & (newton < high), newton, middle)
        length = torch.where(found, length, better)
    return length
