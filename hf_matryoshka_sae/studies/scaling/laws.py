"""Scaling laws of SAEs: loss against size, compute, and size and sparsity together, with an irreducible term.

The forms are those of Gao et al. 2024 (arXiv 2406.04093), in natural logarithms:

    L(x)    = A x^-b + E                                                                    x: latents F, or compute C
    L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)     n: latents, k: active

Both are a sum of two exponentials of something linear in the constants, so one solver fits both: least squares of the
log loss, in which an error far over 2% counts by its size and not by its square (soft L1), from starts in which the
irreducible term takes a share of the lowest losses from almost nothing to almost all. Columns are made orthogonal
first: ln k, ln n and their product have nearly the same direction on practical grids.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from scipy import optimize
from tqdm.auto import tqdm

from ...common.distributed import processes
from ...common.intervals import middle_95


PUBLISHED_GPT4 = {"alpha": -0.50, "beta_k": 0.26, "beta_n": -0.017, "gamma": -0.042, "zeta": -1.32, "eta": -0.085}
"""Constants of L(n, k) for GPT-4 (Gao et al. 2024, section 3.2)."""

_ROBUST = 0.02  # errors of log loss well over it count linearly
_SHARES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # irreducible term at the start, in the lowest losses
_LEAST_SHARE = 1e-6  # smallest irreducible term: data without one would send it to exp(-infinity)
_STEEPEST = 2.0  # largest |eta|: where one k alone has an irreducible term, any slope would do
_NOTHING = 1e-3  # an irreducible term below this share of every loss counts as none
_UNDETERMINED = 1e-7  # smallest singular value of the Jacobian, as a share of the largest
_POINTS_PER_CONSTANT = 10  # from which on points are resampled; fewer points leave too many resamples degenerate
_FEWEST_RESAMPLES = 20


@dataclass
class ScalingLaw(ABC):
    """A fitted law; `str()` describes it in a line.

    Args:
        constants (`dict[str, float]`): Constants by name; `None` for those of an irreducible term that is absent.
        intervals (`dict[str, tuple[float, float]]`): 95% intervals, percentiles of the bootstrap; empty without one.
        interval_from (`str`): Resampled quantity: `"points"`, where there are ten of them for each constant, else
            `"residuals"` (of the log loss, enlarged by sqrt(points / (points - constants))), or `"nothing"`.
        points (`int`): Number of fitted points.
        rmse (`float`): Root of the mean squared error of the log loss: 0.01 is about 1%.
        r2 (`float`): Share of the variance of the log loss that is explained.
        irreducible (`bool`): Whether the data show an irreducible term: at least a thousandth of some loss.
        samples (`np.ndarray`): Constants of each resample, `[R, constants]`, for [`band`].
    """

    constants: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    interval_from: str
    points: int
    rmse: float
    r2: float
    irreducible: bool
    samples: np.ndarray = field(repr=False, compare=False)

    names: ClassVar[tuple[str, ...]]

    @staticmethod
    @abstractmethod
    def _features(*inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns in which the two exponents are linear."""

    @staticmethod
    def _public(constants: np.ndarray) -> np.ndarray:
        """Convert rows of the exponents' coefficients to rows of the form's constants."""
        return constants

    @property
    @abstractmethod
    def _coefficients(self) -> np.ndarray: ...

    def predict(self, *inputs: Any) -> np.ndarray:
        """Predict the loss at inputs (sizes or compute; sizes and active latents), in their common shape."""
        inputs = np.broadcast_arrays(*(np.asarray(values, dtype=np.float64) for values in inputs))
        first, second = self._features(*(values.ravel() for values in inputs))
        return np.exp(_log_loss(first, second, self._coefficients)).reshape(inputs[0].shape)

    def band(self, *inputs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return bounds of the middle 95% of the resamples' losses at inputs `[m]` of the law."""
        if not len(self.samples):
            raise ValueError("A band needs a bootstrap: fit with `resamples` above 0.")
        first, second = self._features(*(np.asarray(values, dtype=np.float64) for values in inputs))
        losses = np.stack([np.exp(_log_loss(first, second, sample)) for sample in self.samples])
        low, high = np.array(middle_95(losses)).T
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the samples as plain numbers, strings and tuples, for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "samples"}
        return values | {"resamples": len(self.samples)}

    def constants_text(self) -> str:
        """Return the constants with their intervals as text."""
        parts = []
        for name, value in self.constants.items():
            if value is not None:
                low, high = self.intervals.get(name, (None, None))
                if name == "floor" and low is not None and low < 1e-4 * high:
                    low = 0.0  # negligible
                parts.append(f"{name} {value:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]"))
        return ", ".join(parts) + ("" if self.irreducible else " (no irreducible term seen)")

    def __str__(self) -> str:
        return f"{self.constants_text()}; error {self.rmse:.2%} over {self.points} points, R² {self.r2:.4f}"


@dataclass
class PowerLawWithFloor(ScalingLaw):
    """L(x) = `coefficient` x^-`exponent` + `floor`; the floor is 0 where the data show none."""

    names = ("coefficient", "exponent", "floor")

    @staticmethod
    def _features(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([np.ones_like(x), -np.log(x)], 1), np.ones((len(x), 1))

    @staticmethod
    def _public(constants: np.ndarray) -> np.ndarray:
        coefficient, exponent, *floor = constants.T
        floor = np.exp(floor[0]) if floor else np.zeros_like(exponent)
        return np.stack([np.exp(coefficient), exponent, floor], 1)

    @property
    def _coefficients(self) -> np.ndarray:
        coefficient, exponent, floor = self.constants.values()
        return np.array([np.log(coefficient), exponent, *([np.log(floor)] if floor else [])])


@dataclass
class JointScalingLaw(ScalingLaw):
    """L(n, k) with the six constants of Gao et al.; `zeta` and `eta` are `None` where the data show no second term."""

    names = ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")

    @staticmethod
    def _features(n: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, k, one = np.log(n), np.log(k), np.ones(len(n))
        return np.stack([one, k, n, k * n], 1), np.stack([one, k], 1)

    @property
    def _coefficients(self) -> np.ndarray:
        return np.array([value for value in self.constants.values() if value is not None])


def fit_power_law_with_floor(
    x: Sequence[float], loss: Sequence[float], resamples: int = 200, seed: int = 0
) -> PowerLawWithFloor:
    """Fit L(x) = A x^-b + E to losses at sizes F (at one k) or at compute C (see [`efficient_frontier`]).

    Args:
        x (`Sequence[float]`): Sizes or compute, `[m]`, above 0.
        loss (`Sequence[float]`): Losses, `[m]`, above 0, in any unit.
        resamples (`int`, *optional*, defaults to 200): Number of bootstrap resamples (0: no intervals).
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Raises:
        `ValueError`: for fewer than four points or three different `x`; values that are not finite and above 0; data
            that leave a constant undetermined, which is named.
    """
    x, loss = _checked(3, x=x, loss=loss)
    if len(np.unique(x)) < 3:
        raise ValueError(
            f"`x` takes {len(np.unique(x))} values: exponent and floor cannot be told apart with fewer than 3."
        )
    return _fit(PowerLawWithFloor, (x,), loss, resamples, seed)


def fit_joint_scaling_law(
    num_latents: Sequence[float], k: Sequence[float], loss: Sequence[float], resamples: int = 200, seed: int = 0
) -> JointScalingLaw:
    """Fit L(n, k) of Gao et al. 2024 (section 3.2) to losses over sizes and numbers of active latents.

    Args:
        num_latents (`Sequence[float]`): Sizes n, `[m]`.
        k (`Sequence[float]`): Active latents, `[m]`.
        loss (`Sequence[float]`): Losses, `[m]`, above 0.
        resamples (`int`, *optional*, defaults to 200): Number of bootstrap resamples (0: no intervals).
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Raises:
        `ValueError`: for fewer than seven points, three sizes or two `k`; values that are not finite and above 0; a
            grid that leaves a constant undetermined, which is named.
    """
    n, k, loss = _checked(6, num_latents=num_latents, k=k, loss=loss)
    if len(np.unique(k)) < 2:
        raise ValueError(
            f"Every point has k = {k[0]:g}: beta_k, gamma and eta are not determined. Use several k, or fit L(F) with "
            "`fit_power_law_with_floor`."
        )
    if len(np.unique(n)) < 3:
        raise ValueError(
            f"There are {len(np.unique(n))} sizes: beta_n, gamma and zeta cannot be told apart with fewer than 3."
        )
    return _fit(JointScalingLaw, (n, k), loss, resamples, seed)


def _checked(constants: int, **columns: Sequence[float]) -> list[np.ndarray]:
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    shapes = {values.shape for values in arrays.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        shapes_by_name = ", ".join(f"`{name}` {values.shape}" for name, values in arrays.items())
        raise ValueError(f"Expected one value per point in each list, got shapes {shapes_by_name}.")
    for name, values in arrays.items():
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            raise ValueError(
                f"`{name}` must be finite and above 0; {wrong.sum()} of {len(wrong)} values are not, the first is "
                f"{values[wrong][0]:g}."
            )
    count = len(next(iter(arrays.values())))
    if count <= constants:
        raise ValueError(f"A fit of {constants} constants needs more than {constants} points, got {count}.")
    return list(arrays.values())


def _fit(law: type, inputs: tuple[np.ndarray, ...], loss: np.ndarray, resamples: int, seed: int) -> Any:
    if resamples and resamples < _FEWEST_RESAMPLES:
        raise ValueError(f"`resamples` must be 0 or at least {_FEWEST_RESAMPLES}, got {resamples}.")
    logs = np.log(loss)
    first, second = law._features(*inputs)  # noqa: SLF001 (the laws of this module)
    if np.linalg.matrix_rank(first) < first.shape[1]:
        raise ValueError(
            f"{', '.join(law.names[1 : first.shape[1]])} cannot be told apart: sizes and k vary together. Train some "
            "sizes at several k."
        )
    full = coefficients = _solve(first, second, logs)
    irreducible = bool(_second_share(first, second, full).max() >= _NOTHING)
    if irreducible:
        _check_determined(law, first, second, full)
    else:
        coefficients = _solve_alone(first, logs)
    errors = logs - _log_loss(first, second, coefficients)
    samples, resampled = _resample(first, second, logs, full, resamples, seed)
    values = law._public(coefficients[None])[0]  # noqa: SLF001
    bounds = middle_95(law._public(samples)) if len(samples) else []  # noqa: SLF001
    spread = ((logs - logs.mean()) ** 2).sum()
    constants = dict(zip(law.names, [*values.tolist(), *[None] * (len(law.names) - len(values))], strict=True))
    return law(
        constants=constants,
        intervals={
            name: (float(low), float(high))
            for name, (low, high) in zip(law.names, bounds, strict=False)
            if constants[name] is not None
        },
        interval_from=resampled,
        points=len(loss),
        rmse=float(np.sqrt((errors**2).mean())),
        r2=float(1 - (errors**2).sum() / spread) if spread else 1.0,
        irreducible=irreducible,
        samples=samples,
    )


def _log_loss(first: np.ndarray, second: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """ln(exp(first a) + exp(second b)), without the second where there are no coefficients for it."""
    size = first.shape[1]
    reducible = first @ coefficients[:size]
    if len(coefficients) == size:
        return reducible
    return np.logaddexp(reducible, second @ coefficients[size:])


def _second_share(first: np.ndarray, second: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    size = first.shape[1]
    return np.exp(second @ coefficients[size:] - _log_loss(first, second, coefficients))


def _jacobian(first: np.ndarray, second: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    share = _second_share(first, second, coefficients)[:, None]
    return np.concatenate([(1 - share) * first, share * second], 1)


def _solve(first: np.ndarray, second: np.ndarray, logs: np.ndarray, near: np.ndarray | None = None) -> np.ndarray:
    """Return the coefficients of least robust squares of the log loss, the best of all starts, `near` among them."""
    (q1, r1), (q2, r2) = _orthogonal(first), _orthogonal(second)
    size, floors = first.shape[1], _lowest(second, logs)
    least = np.full(len(r1) + len(r2), -np.inf)
    most = -least
    least[size] = q2[:, 0] @ floors + q2[:, 0].sum() * np.log(_LEAST_SHARE)
    if len(r2) > 1:  # r2 is triangular, so the last coefficient is the last constant alone
        most[-1] = _STEEPEST * r2[-1, -1]
        least[-1] = -most[-1]
    tolerance = 1e-12 if near is None else 1e-8  # far below the differences between resamples
    starts = [] if near is None else [np.concatenate([r1 @ near[:size], r2 @ near[size:]])]
    for share in _SHARES if near is None else (0.5,):
        irreducible = q2.T @ (floors + np.log(share))
        rest = np.log(np.maximum(np.exp(logs) - np.exp(q2 @ irreducible), np.exp(logs) * 1e-3))
        starts.append(np.concatenate([q1.T @ rest, irreducible]))
    solutions = (
        optimize.least_squares(
            lambda values: _log_loss(q1, q2, values) - logs,
            np.clip(start, least + 1e-9, most - 1e-9),
            jac=lambda values: _jacobian(q1, q2, values),
            bounds=(least, most),
            loss="soft_l1",
            f_scale=_ROBUST,
            x_scale="jac",
            ftol=tolerance,
            xtol=tolerance,
            gtol=tolerance,
            max_nfev=300 if near is None else 50,
        )
        for start in starts
    )
    best = min(solutions, key=lambda solution: solution.cost).x
    return np.concatenate([np.linalg.solve(r1, best[:size]), np.linalg.solve(r2, best[size:])])


def _solve_alone(first: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Return the coefficients of least robust squares without an irreducible term."""
    q, r = _orthogonal(first)
    start = q.T @ logs
    errors = dict(fun=lambda values: q @ values - logs, jac=lambda _: q, loss="soft_l1", f_scale=_ROBUST)
    return np.linalg.solve(r, optimize.least_squares(x0=start, **errors).x)


def _orthogonal(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decompose `columns` = q r with q orthonormal, r upper triangular with a positive diagonal."""
    q, r = np.linalg.qr(columns)
    signs = np.sign(np.diag(r))
    return q * signs, r * signs[:, None]


def _lowest(second: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Return for each point the lowest log loss among those that share its irreducible term."""
    _, groups = np.unique(second, axis=0, return_inverse=True)
    groups = groups.ravel()
    return np.array([logs[groups == group].min() for group in range(groups.max() + 1)])[groups]


def _check_determined(law: type, first: np.ndarray, second: np.ndarray, coefficients: np.ndarray) -> None:
    """Raise `ValueError` with the names of constants that could change together without changing a prediction."""
    (q1, r1), (q2, r2) = _orthogonal(first), _orthogonal(second)
    size = first.shape[1]
    orthogonal = np.concatenate([r1 @ coefficients[:size], r2 @ coefficients[size:]])
    _, singular, directions = np.linalg.svd(_jacobian(q1, q2, orthogonal), full_matrices=False)
    if singular[-1] < _UNDETERMINED * singular[0]:
        free = np.concatenate([np.linalg.solve(r1, directions[-1, :size]), np.linalg.solve(r2, directions[-1, size:])])
        names = [name for name, part in zip(law.names, abs(free), strict=False) if part > 0.05 * abs(free).max()]
        raise ValueError(
            f"The points leave {', '.join(names)} undetermined: they can change together without changing a loss. "
            "More sizes or k are needed."
        )


def _resample(
    first: np.ndarray, second: np.ndarray, logs: np.ndarray, coefficients: np.ndarray, resamples: int, seed: int
) -> tuple[np.ndarray, str]:
    """Return the coefficients of bootstrap resamples, and what was resampled."""
    random, (count, constants) = np.random.default_rng(seed), (len(logs), len(coefficients))
    if not resamples:
        return np.empty((0, constants)), "nothing"
    fitted, samples = _log_loss(first, second, coefficients), []
    points = count >= _POINTS_PER_CONSTANT * constants
    # Residuals of a fit are smaller than the errors of the points, as the fit follows its points.
    residuals = (logs - fitted) * np.sqrt(count / (count - constants))
    for _ in tqdm(range(resamples), desc="bootstrap", delay=3, leave=False, disable=processes()[0] != 0):
        rows = random.integers(count, size=count)
        if not points:
            samples.append(_solve(first, second, fitted + residuals[rows], near=coefficients))
        elif np.linalg.matrix_rank(first[rows]) == first.shape[1]:
            samples.append(_solve(first[rows], second[rows], logs[rows], near=coefficients))
    return np.array(samples), "points" if points else "residuals"
