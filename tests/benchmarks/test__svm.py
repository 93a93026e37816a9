"""The SVM solver against LIBLINEAR run to convergence, and each of its parts against the slow definition."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from simclr.benchmarks import _svm
from simclr.benchmarks.voc07_svm import Config

COSTS = Config().costs


def liblinear(cost):
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, tol=1e-10, max_iter=1_000_000)


def fit(cost, rows, signs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at cost 100 LIBLINEAR's own stopping rule can be out of reach
        return liblinear(cost).fit(rows, signs)


def unit(rows):
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)


def problem(kind, seed=0):
    """Return images `(n, D)` and the signs `(n, P)` of three problems."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(40, 8)) + 0.5
    if kind == "wide":
        rows = random.normal(size=(30, 70))
    elif kind == "rank deficient":
        rows = random.normal(size=(40, 3)) @ random.normal(size=(3, 20))
    elif kind == "duplicate rows":
        rows = np.tile(random.normal(size=(13, 8)), (3, 1))
    elif kind == "zero rows":
        rows[::3] = 0
    signs = np.where(random.random((len(rows), 3)) < 0.3, 1, -1)
    signs[:2] = [[1], [-1]]
    if kind == "one positive":
        signs[1:] = -1
    return unit(rows), signs


def hard(duplicates):
    """Return nearly parallel images `(120, D)` of decaying spectrum, with labels at random, 20 % positive."""
    random = np.random.default_rng(0)
    width = 40 if duplicates else 120
    latent = 0.05 * random.normal(size=(120, width)) * np.exp(-5 * np.arange(width) / width)
    rows = np.maximum(1 + latent @ random.normal(size=(width, width)), 0)
    if duplicates:
        rows[-20:] = rows[:20]
    return unit(rows), np.where(random.random((120, 8)) < 0.2, 1, -1)


def kernel_of(rows):
    images = torch.from_numpy(rows)
    return _svm.gram(images, images)


def problems_of(rows, signs):
    """Return the problems `signs` `(n, P)` of one group of images `(n, D)`."""
    kernel = kernel_of(rows)
    return _svm.Problems(kernel[None], signs.T[None], _svm.leading(kernel))


KINDS = ["tall", "wide", "rank deficient", "duplicate rows", "zero rows", "one positive"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_highest_cost_allowed_converges(kind):
    (found,) = problems_of(*problem(kind)).path([1e3])
    assert found.gap.max() <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_solver_equals_liblinear(kind):
    rows, signs = problem(kind)
    solutions = {solution.cost: solution for solution in problems_of(rows, signs).path(COSTS)}
    assert sorted(solutions) == sorted(COSTS)
    for cost in COSTS:
        for column in range(3):
            expected = fit(cost, rows, signs[:, column]).decision_function(rows)
            found, scale = solutions[cost], np.abs(expected).max()
            np.testing.assert_allclose(found.scores[0, column], expected, rtol=0, atol=1e-5 * scale)
            on_kernel = kernel_of(rows) @ found.coefficients[0, column]
            np.testing.assert_allclose(on_kernel, found.scores[0, column], rtol=0, atol=1e-9 * scale)
            assert found.gap[0, column] <= 1e-12


@pytest.mark.parametrize("seed", range(12))
def test_random_problems_equal_liblinear(seed, monkeypatch):
    """Groups of any size, width, rank and share of positives, with images left out and images repeated."""
    monkeypatch.setattr(_svm, "TOLERANCE", 1e-9)
    random = np.random.default_rng(seed)
    images, width, rank = random.integers([10, 2, 1], [90, 120, 60])
    rows = random.normal(size=(3, images, rank)) @ random.normal(size=(rank, width)) + random.normal()
    rows[:, -images // 5 :] = rows[:, : images // 5 + (images % 5 > 0)]
    rows = np.stack([unit(of) for of in rows])
    signs = np.where(random.random((3, 2, images)) < random.uniform(0.1, 0.5), 1, -1)
    signs[random.random(signs.shape) < 0.2] = 0
    signs[..., :2] = [1, -1]
    kernels = torch.stack([kernel_of(of) for of in rows])
    leading = _svm.Leading(*(torch.zeros(3, images, 1, dtype=torch.float64),) * 2, torch.ones(1))
    for found in _svm.Problems(kernels, signs, leading).path([2e-6, 0.01, 0.05, 1, 20]):
        for at in np.ndindex(3, 2):
            kept = signs[at] != 0
            expected = fit(found.cost, rows[at[0]][kept], signs[at][kept]).decision_function(rows[at[0]])
            np.testing.assert_allclose(found.scores[at], expected, rtol=0, atol=1e-7 * np.abs(expected).max())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_solves_as_the_cpu_does(kind):
    rows, signs = problem(kind)
    kernel = kernel_of(rows).cuda()
    on_gpu = _svm.Problems(kernel[None], signs.T[None], _svm.leading(kernel)).path(COSTS)
    for found, expected in zip(on_gpu, problems_of(rows, signs).path(COSTS), strict=True):
        scale = float(expected.scores.abs().max())
        np.testing.assert_allclose(found.scores.cpu(), expected.scores, rtol=0, atol=1e-5 * scale)
        assert found.gap.max() <= 1e-12


def test_groups_are_solved_as_if_alone():
    rows, signs = problem("wide")
    kernel = kernel_of(rows)
    subsets = np.stack([np.arange(20), np.arange(10, 30)])
    leading = _svm.leading(kernel).part(torch.from_numpy(subsets))
    kernels = torch.stack([kernel[of][:, of] for of in subsets])
    together = list(_svm.Problems(kernels, signs[subsets].transpose(0, 2, 1), leading).path(COSTS))
    for group, of in enumerate(subsets):
        for one, all_groups in zip(problems_of(rows[of], signs[of]).path(COSTS), together, strict=True):
            expected = one.scores[0]
            scale = float(expected.abs().max())
            np.testing.assert_allclose(all_groups.scores[group], expected, rtol=0, atol=1e-5 * scale)


def test_images_left_out_do_not_count_and_are_scored():
    rows, signs = problem("tall")
    signs[::4] = 0
    (found,) = problems_of(rows, signs).path([1.0])
    for column in range(3):
        kept = signs[:, column] != 0
        expected = fit(1.0, rows[kept], signs[kept, column]).decision_function(rows)
        np.testing.assert_allclose(found.scores[0, column], expected, atol=1e-5)


def test_a_problem_without_images_has_the_solution_zero():
    rows, signs = problem("tall")
    signs[:, 1] = 0
    for found in problems_of(rows, signs).path(COSTS):
        assert not found.scores[0, 1].any()
        assert found.gap[0, 1] == 0
        assert found.scores[0, 0].any()


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize(("cost", "tolerance"), [(100.0, 1e-8), (100.0, 1e-10), (1e4, 1e-8), (1e5, 1e-8)])
def test_hard_features_converge_with_room_to_spare(duplicates, cost, tolerance, monkeypatch):
    """Steps whose rounding errors do not shrink with the gradient stall before these tolerances."""
    rows, signs = hard(duplicates)
    monkeypatch.setattr(_svm, "TOLERANCE", tolerance)
    monkeypatch.setattr(_svm, "MAX_STEPS", 30)
    (found,) = problems_of(rows, signs).path([cost])
    assert found.gap.max() < (1e-16 if cost < 1e5 else 1e-13)
    if cost == 100:
        expected = fit(cost, rows, signs[:, 0])
        np.testing.assert_allclose(found.scores[0, 0], expected.decision_function(rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cost", [3.0, 10.0, 20.0])
def test_steps_of_float32_never_stall(cost, monkeypatch):
    """Non-negative features of decaying spectrum, labels at random, and costs up to where float32 may go."""
    monkeypatch.setattr(_svm, "MAX_STEPS", 10)
    random = np.random.default_rng(0)
    latent = random.normal(size=(1200, 512)) * np.arange(1, 513) ** -0.5
    rows = latent @ random.normal(size=(512, 512)) + 0.3 * random.normal(size=(1200, 512))
    kernel = kernel_of(unit(np.maximum(rows, 0)))
    drawn = torch.from_numpy(np.stack([random.permutation(1200)[:160] for _ in range(60)]))
    signs = np.where(random.random((60, 1, 160)) < 0.2, 1, -1)
    leading = _svm.leading(kernel).part(drawn)
    assert 4 * cost * leading.eigenvalues[0] < _svm.ROUGH
    (found,) = _svm.Problems(_svm.among(kernel, drawn), signs, leading).path([cost])
    assert found.gap.max() <= 1e-12


def test_a_problem_that_does_not_converge_is_an_error(monkeypatch):
    rows, signs = problem("tall")
    monkeypatch.setattr(_svm, "MAX_STEPS", 1)
    with pytest.raises(ArithmeticError, match="3 of 3 problems did not converge at cost 10 in 1 steps"):
        list(problems_of(rows, signs).path([10.0]))


# ---------------------------------------------------------------- parts


def state_of(rows, signs, cost, seed=1):
    """Return the problems, and their state at a random point with active and inactive images."""
    problems = problems_of(rows, signs)
    random = np.random.default_rng(seed)
    coefficients = 0.1 * torch.from_numpy(random.normal(size=problems.signs.shape)) * problems.signs.abs()
    scores = coefficients @ problems.kernel
    every = torch.arange(signs.shape[1])
    return problems, problems._state(problems.signs, cost * problems.weights, coefficients, scores, every)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_is_that_of_primal_and_dual(kind):
    """The duality gap from its two definitions, at a point that is not the solution."""
    rows, signs = problem(kind)
    _, state = state_of(rows, signs, 0.7)
    weights, slack = 0.7 * np.where(signs > 0, 2, 1), state.slack[0].numpy().T
    primal = state.squared_size[0].numpy() / 2 + (weights * slack**2).sum(0)
    np.testing.assert_allclose(state.objective[0], primal)
    alpha = 2 * weights * slack
    dual_w = np.concatenate([rows, np.ones((len(rows), 1))], axis=1).T @ (alpha * signs)
    dual = alpha.sum(0) - (dual_w**2).sum(0) / 2 - (alpha**2 / (4 * weights)).sum(0)
    np.testing.assert_allclose(state.squared_gradient[0] / 2, primal - dual, rtol=1e-8)


def test_the_gap_of_a_solution_is_that_of_its_coefficients(monkeypatch):
    """From primal and dual; stopped early, so that it is not lost in rounding."""
    monkeypatch.setattr(_svm, "TOLERANCE", 0.1)
    rows, signs = problem("tall")
    (found,) = problems_of(rows, signs).path([0.7])
    weights, scores = 0.7 * np.where(signs > 0, 2, 1), found.scores[0].numpy().T
    slack = np.maximum(0, 1 - signs * scores)
    alpha, size = 2 * weights * slack, (found.coefficients[0] * found.scores[0]).sum(dim=1).numpy()
    primal = size / 2 + (weights * slack**2).sum(0)
    dual = alpha.sum(0) - ((kernel_of(rows).numpy() @ (alpha * signs)) * alpha * signs).sum(0) / 2
    dual -= (alpha**2 / (4 * weights)).sum(0)
    assert found.gap.max() > 1e-9
    np.testing.assert_allclose(found.gap[0], (primal - dual) / primal, rtol=1e-4, atol=1e-13)


@pytest.mark.parametrize("kind", [*KINDS, "hard"])
def test_every_solution_is_within_its_certificate(kind):
    """w and its duality gap from the returned coefficients and the images alone, in extended precision."""
    rows, signs = hard(duplicates=True) if kind == "hard" else problem(kind)
    signs[5::7, 0] = 0
    images = np.concatenate([rows, np.ones((len(rows), 1))], axis=1).astype(np.longdouble)
    for found in problems_of(rows, signs).path([*COSTS, 1e3]):  # the highest that a config may have
        for column, (labels, coefficients) in enumerate(zip(signs.T, found.coefficients[0], strict=True)):
            kept, w = labels != 0, images.T @ coefficients.numpy().astype(np.longdouble)
            x, y, cost = images[kept], labels[kept], found.cost * np.where(labels[kept] > 0, 2, 1)
            slack = np.maximum(0, 1 - y * (x @ w))
            alpha = 2 * cost * slack
            primal = w @ w / 2 + cost @ slack**2
            dual = alpha.sum() - ((alpha * y) @ x @ x.T @ (alpha * y)) / 2 - (alpha**2 / (4 * cost)).sum()
            assert -1e-15 * primal <= primal - dual <= 1.01e-12 * primal
            assert float((primal - dual) / primal) == pytest.approx(float(found.gap[0, column]), abs=1e-14)
            assert not coefficients[~kept].any()


@pytest.mark.parametrize("cost", [1e-3, 0.3, 100])
@pytest.mark.parametrize("way", ["factored", "conjugate gradients"])
@pytest.mark.parametrize("precision", ["double", "single"])
def test_both_ways_solve_newtons_equation(way, cost, precision):
    """(1 + Σ 2c x xᵀ over the active) step = −gradient, with every matrix written out."""
    rows, signs = hard(duplicates=False)
    problems, state = state_of(rows, signs, cost)
    root = (2 * state.weights * (state.slack > 0)).sqrt()
    kernel, leading = (problems.kernel, problems.leading) if precision == "double" else problems.rough
    if way == "factored":
        found = _svm._factored(kernel, root, -state.product)
    else:
        accuracy = 1e-12 if precision == "double" else 1e-6
        found = _svm._conjugate_gradients(kernel, leading, root, -state.product, accuracy, rank=5)
    assert found.dtype == torch.float64
    images = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    for column in range(8):
        residual, of = state.residual[0, column].numpy(), root[0, column].numpy()
        hessian = np.eye(images.shape[1]) + (images.T * of**2) @ images
        step = images.T @ (residual + found[0, column].numpy())
        expected = np.linalg.solve(hessian, images.T @ residual)
        error, norm = step - expected, np.linalg.eigvalsh(hessian)[-1]
        bound = 1e-6 if precision == "double" else norm / 2**23
        assert np.sqrt(error @ hessian @ error) <= bound * np.sqrt(residual @ images @ images.T @ residual)


@pytest.mark.parametrize("scale", [1e-30, 1, 1e30])
def test_steps_of_float32_are_of_any_size(scale):
    """Near the solution the right sides are below what float32 can square."""
    problems, state = state_of(*hard(duplicates=False), 0.3)
    root = (2 * state.weights * (state.slack > 0)).sqrt()
    one, scaled = (
        _svm._conjugate_gradients(*problems.rough, root, right, 1e-4, rank=5)
        for right in (state.product, scale * state.product)
    )
    np.testing.assert_allclose(scaled, scale * one, rtol=1e-5, atol=1e-7 * scale * float(one.abs().max()))


@pytest.mark.parametrize("rough", [0, 2**15, 2**20])
def test_the_precision_of_the_steps_changes_no_solution(rough, monkeypatch):
    rows, signs = hard(duplicates=True)
    monkeypatch.setattr(_svm, "ROUGH", 0)
    expected = [found.scores for found in problems_of(rows, signs).path(COSTS)]
    monkeypatch.setattr(_svm, "ROUGH", rough)
    for scores, found in zip(expected, problems_of(rows, signs).path(COSTS), strict=True):
        assert found.gap.max() <= 1e-12
        np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-5 * float(scores.abs().max()))


@pytest.mark.parametrize("kind", [*KINDS, "hard"])
def test_the_leading_part_leaves_a_small_positive_rest(kind):
    kernel = kernel_of(hard(duplicates=True)[0] if kind == "hard" else problem(kind)[0])
    found = _svm.leading(kernel)
    rest = np.linalg.eigvalsh((kernel - found.factor @ found.factor.T).numpy())
    exact = np.linalg.eigvalsh(kernel.numpy())[::-1]
    assert rest[0] > -1e-10 * exact[0]
    assert rest[-1] < 2 * exact[found.factor.shape[1]] + 1e-10 * exact[0]
    np.testing.assert_allclose(found.eigenvalues[:2], exact[:2], rtol=0.05)


def test_the_inverse_of_the_leading_part():
    found = _svm.leading(kernel_of(hard(duplicates=False)[0]))
    subset = found.part(torch.arange(60).reshape(2, 30))
    root = torch.from_numpy(np.random.default_rng(0).random((2, 3, 30)))
    factor = subset.factor[..., :4].numpy()
    assert subset.factor.shape == (2, 30, 5)
    exact = np.linalg.eigvalsh(kernel_of(hard(duplicates=False)[0][:30]).numpy())[-1]
    assert float(subset.eigenvalues[0]) == pytest.approx(exact, rel=0.1)
    for group, row in np.ndindex(2, 3):
        expected = np.linalg.inv(
            np.eye(4) + (factor[group].T * root[group, row].numpy() ** 2) @ factor[group]
        )
        np.testing.assert_allclose(subset.inverse(root, 4)[group, row], expected, atol=1e-12)


def test_the_step_length_is_the_minimum_along_the_line():
    """Against bisection of the slope, from a point with active and inactive images, for steps of any size."""
    problems, state = state_of(*hard(duplicates=False), 100.0)
    size = torch.logspace(-9, 3, 8, dtype=torch.float64) / state.squared_gradient[0].sqrt()
    step = state.residual * size[:, None]
    found = _svm._step_length(state, step, step @ problems.kernel)
    coefficients = 2 * state.weights * state.slack * state.signs - state.residual

    def slope(length):
        at = coefficients + length[..., None] * step
        moved = problems._state(
            problems.signs, state.weights, at, at @ problems.kernel, torch.arange(step.shape[1])
        )
        return -(moved.product * step).sum(dim=2)

    low, high = torch.zeros(1, 8, dtype=torch.float64), torch.full((1, 8), 1e12, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        below = slope(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    np.testing.assert_allclose(found, low, rtol=1e-3)


def test_only_the_rows_that_are_needed_are_read():
    """The product with the kernel is the same whether few or many coefficients are not zero."""
    problems = problems_of(*problem("tall"))
    for many in (0, 1, 5, 40):
        vectors = torch.zeros(1, 3, 40, dtype=torch.float64)
        vectors[..., :many] = torch.from_numpy(np.random.default_rng(0).normal(size=(3, many)))
        np.testing.assert_allclose(
            _svm._times(problems.kernel, vectors), vectors @ problems.kernel, atol=1e-13
        )


def test_low_costs_are_solved_side_by_side_and_high_ones_singly():
    assert list(_svm._batches([0.01, 0.02, 0.05, 1, 10], 2)) == [[0.01, 0.02], [0.05], [1], [10]]
    assert list(_svm._batches([0.01, 0.02], 0)) == [[0.01], [0.02]]


def test_parallel_results_keep_their_order_and_errors_are_raised():
    on = torch.device("cpu")
    assert list(_svm.in_parallel(lambda item: item**2, range(50), on)) == [item**2 for item in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(_svm.in_parallel(lambda item: 1 / item, range(2), on))


def test_features_are_scaled_to_almost_unit_length():
    found = _svm.scaled(np.array([[3, 4], [0, 0], [3e-5, 4e-5]], dtype=np.float32))
    np.testing.assert_allclose(found, [[3 / 5.00001, 4 / 5.00001], [0, 0], [0.5, 2 / 3]], rtol=1e-6)


def test_scores_of_other_images():
    random = np.random.default_rng(0)
    coefficients, images, others = (torch.from_numpy(random.normal(size=s)) for s in ((2, 5), (5, 3), (4, 3)))
    expected = coefficients @ _svm.gram(images, others)
    np.testing.assert_allclose(_svm.scores(coefficients, images, others), expected, atol=1e-12)


def test_a_kernel_among_chosen_images():
    rows, _ = problem("tall")
    chosen = np.array([[3, 0, 17], [5, 5, 39]])
    found = _svm.among(kernel_of(rows), torch.from_numpy(chosen))
    np.testing.assert_allclose(found, torch.stack([kernel_of(rows[of]) for of in chosen]), atol=1e-14)


def test_the_certificate_counts_the_problems_and_names_the_worst():
    gaps = [torch.tensor(of, dtype=torch.float64) for of in ([[1e-13, 3e-13]], [[2e-13]])]
    assert _svm.certificate(gaps) == {
        "problems": 3,
        "worst_relative_duality_gap": pytest.approx(3e-13, rel=1e-6, abs=0),
        "tolerance": 1e-12,
    }
