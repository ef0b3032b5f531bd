"""Learned prices: gradient-boosted trees on the roofline's error, with an uncertainty; they abstain where it is large.

Trees predict ln(time / roofline estimate), so that what is learned is how far a kernel stays from the machine's limit, and a
device of other peaks is not a wholly different world. Boosting: Friedman, Greedy function approximation, Annals of Statistics
2001. Uncertainty: the spread of an ensemble of which each member saw a bootstrap sample of the *models* (Breiman's bagging by
groups), scaled by its out-of-bag errors as in conformal prediction (Papadopoulos et al., ECML 2002).

A model is JSON: lists of numbers that this module walks without numpy. Training needs scikit-learn (the `research` extra).
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.base import SelectionContext
from ..errors import ModelError, TooFewError
from ..measure import measurable
from ..plan_io import write_whole
from ..types import Candidate, Cost, Rejection, Target
from . import Priced
from .features import Features, features, roofline_ns
from .roofline import Roofline, assumed_error, traffic_ns

VERSION = 1
SHIPPED = Path(__file__).with_name("learned.json")
THRESHOLD = math.log(3.0)  # abstain where the 90 % interval reaches beyond a third or three times the estimate
COVERAGE = 0.9
MEMBERS, TREES, DEPTH, RATE = 8, 60, 4, 0.12
MARGIN = 1.0  # how far outside its training range a size may be: a factor of two


@dataclass(frozen=True, slots=True)
class Row:
    """One training example. `group`: rows of one group are drawn together; `log_ratio`: ln(measured ns / roofline ns)."""

    features: Mapping[str, float]
    log_ratio: float
    group: str


@dataclass(frozen=True, slots=True)
class Tree:
    """Binary, as parallel lists by node: x[feature] <= threshold goes left; a leaf has feature -1."""

    feature: Sequence[int]
    threshold: Sequence[float]
    left: Sequence[int]
    right: Sequence[int]
    value: Sequence[float]

    def predict(self, x: Sequence[float]) -> float:
        node = 0
        while self.feature[node] >= 0:
            node = self.left[node] if x[self.feature[node]] <= self.threshold[node] else self.right[node]
        return self.value[node]


@dataclass(frozen=True, slots=True)
class Forest:
    """A trained model. `ranges`: least and largest value of each feature in training. `widths`: (a, b, q) with the half-width of
    the interval of `COVERAGE` being q sqrt(a + b s^2) for an ensemble of standard deviation s."""

    names: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    members: tuple[tuple[float, tuple[Tree, ...]], ...]  # initial value, trees (the learning rate is in their values)
    widths: tuple[float, float, float]
    trained_on: str

    def vector(self, found: Features) -> list[float]:
        """In the order of `names`, in float32, as scikit-learn's trees compare them."""
        values = (found.get(name, 0.0) for name in self.names)
        return [float(struct.unpack("f", struct.pack("f", v))[0]) for v in values]

    def predict(self, found: Features) -> tuple[float, float]:
        """(ln ratio, half-width of its interval)."""
        x = self.vector(found)
        each = [start + math.fsum(tree.predict(x) for tree in trees) for start, trees in self.members]
        mean = math.fsum(each) / len(each)
        variance = math.fsum((e - mean) ** 2 for e in each) / len(each)
        a, b, q = self.widths
        return mean, q * math.sqrt(a + b * variance)

    def novelty(self, found: Features) -> str | None:
        """What of a kernel the training has not seen, or None."""
        known = dict(zip(self.names, self.ranges, strict=True))
        strange = next((name for name in found if "=" in name and name not in known), None)
        if strange is not None:
            return f"no kernel with {strange} was in the training data"
        for name, value in found.items():
            low, high = known.get(name, (0.0, 0.0))
            if not low - MARGIN <= value <= high + MARGIN:
                return f"{name} is 2^{value:.1f}, the training data has 2^{low:.1f} to 2^{high:.1f}"
        return None

    def save(self, path: Path) -> None:
        members = [[start, [[t.feature, t.threshold, t.left, t.right, t.value] for t in trees]] for start, trees in self.members]
        data = {
            "layerzero_learned": VERSION, "trained_on": self.trained_on, "names": self.names, "ranges": self.ranges, "widths": self.widths,
            "members": members,
        }  # fmt: skip
        write_whole(path, json.dumps(data, separators=(",", ":")).encode())


def load(path: Path = SHIPPED) -> Forest:
    """ModelError for a file that is not a model, is damaged, or is of another version."""
    try:
        data = json.loads(path.read_text())
        if data["layerzero_learned"] != VERSION:
            raise ModelError(
                f"{path} is a learned model of version {data['layerzero_learned']!r}; this LayerZero reads {VERSION}. Train again."
            )
        members = tuple((float(start), tuple(Tree(*t) for t in trees)) for start, trees in data["members"])
        forest = Forest(tuple(data["names"]), tuple(map(tuple, data["ranges"])), members, tuple(data["widths"]), str(data["trained_on"]))
        for _, trees in members:
            for tree in trees:
                _check(tree, len(forest.names))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"cannot read the learned model {path} ({type(error).__name__}: {error}). Train it again: lz ablate --train."
        ) from error
    return forest


def _check(tree: Tree, features: int) -> None:
    """Children come after their parent, so that walking down ends."""
    sizes = {len(part) for part in (tree.feature, tree.threshold, tree.left, tree.right, tree.value)}
    assert_ok = len(sizes) == 1 and sizes != {0}
    for node, (f, left, right) in enumerate(zip(tree.feature, tree.left, tree.right, strict=True)):
        inside = node < left < len(tree.feature) and node < right < len(tree.feature)
        assert_ok = assert_ok and f < features and (f < 0 or inside)
    if not assert_ok:
        raise ValueError("a tree is not one")


def fit(rows: Sequence[Row], seed: int = 0, members: int = MEMBERS, trees: int = TREES, trained_on: str = "") -> Forest:
    """Train an ensemble: each member on a bootstrap sample of the groups, the interval from the groups it did not see.

    ModelError without scikit-learn, or with fewer than two groups of rows.
    """
    try:
        import numpy as np
        from sklearn.ensemble import GradientBoostingRegressor
    except ImportError as error:
        raise ModelError("training a cost model needs scikit-learn: pip install 'lz-compiler[research]'.") from error
    groups = sorted({row.group for row in rows})
    if len(groups) < 2:
        raise TooFewError(
            f"training needs measurements of two models or more, these are of {len(groups)}. Collect more: benchmarks/corpus.py."
        )
    names = tuple(sorted({name for row in rows for name in row.features}))
    x = np.array([[row.features.get(name, 0.0) for name in names] for row in rows], dtype=np.float32)
    y = np.array([row.log_ratio for row in rows])
    draw = random.Random(seed)
    fitted: list[tuple[float, tuple[Tree, ...]]] = []
    outside = np.full((len(rows), members), np.nan)
    for m in range(members):
        drawn = draw.choices(groups, k=len(groups))
        while len(set(drawn)) == len(groups):  # somebody must stay outside
            drawn = draw.choices(groups, k=len(groups))
        weight = np.array([float(drawn.count(row.group)) for row in rows])
        inside = weight > 0
        model = GradientBoostingRegressor(loss="huber", n_estimators=trees, max_depth=DEPTH, learning_rate=RATE, subsample=0.7,
                                          max_features=0.5, random_state=seed * 1000 + m)  # fmt: skip
        model.fit(x[inside], y[inside], sample_weight=weight[inside])
        fitted.append((float(model.init_.predict(x[:1])[0]), tuple(_tree(e.tree_) for e in model.estimators_[:, 0])))
        outside[~inside, m] = model.predict(x[~inside])
    ranges = tuple((round(float(low), 4), round(float(high), 4)) for low, high in zip(x.min(0), x.max(0), strict=True))
    return Forest(names, ranges, tuple(fitted), _widths(outside, y), trained_on)


def _tree(tree: Any) -> Tree:
    """scikit-learn's arrays, with the learning rate in the values. Leaves have feature -2 there."""
    feature = [max(int(f), -1) for f in tree.feature]
    value = [float(v) * RATE if f < 0 else 0.0 for v, f in zip(tree.value[:, 0, 0], feature, strict=True)]
    threshold = [float(t) if f >= 0 else 0.0 for t, f in zip(tree.threshold, feature, strict=True)]
    return Tree(feature, threshold, tree.children_left.tolist(), tree.children_right.tolist(), value)


def _widths(outside: Any, y: Any) -> tuple[float, float, float]:
    """a + b s^2 fitted to the squared out-of-bag errors (outliers cut), and the quantile that makes the interval cover."""
    import numpy as np

    seen = (~np.isnan(outside)).sum(1) >= 2
    mean, var = np.nanmean(outside[seen], 1), np.nanvar(outside[seen], 1)
    squared = (y[seen] - mean) ** 2
    cut = np.minimum(squared, np.quantile(squared, 0.95))
    slope = max(0.0, float(((var - var.mean()) * (cut - cut.mean())).sum() / max(((var - var.mean()) ** 2).sum(), 1e-12)))
    base = max(float(cut.mean() - slope * var.mean()), 0.1 * float(cut.mean()), 1e-6)
    return base, slope, float(np.quantile(np.sqrt(squared / (base + slope * var)), COVERAGE))


@dataclass(frozen=True, slots=True)
class Estimate:
    """ns of the kernel alone, and the interval; `why` it is none, where the model abstains (then ns is the roofline's)."""

    ns: float
    low: float
    high: float
    why: str | None = None


class Learned:
    """Prices from a trained model. Where it abstains a kernel is no candidate; the graph as it stands has the roofline's price."""

    def __init__(self, target: Target, forest: Forest | None = None, threshold: float = THRESHOLD, abstains: bool = True) -> None:
        self.target, self.forest, self.threshold, self.abstains = target, forest or load(), threshold, abstains
        self.roofline = Roofline(target)

    def estimate(self, ctx: SelectionContext, candidate: Candidate) -> Estimate:
        limit = roofline_ns(ctx, candidate, self.roofline)
        found = features(ctx, candidate, self.target)
        why = self.forest.novelty(found) if self.abstains else None
        mean, width = (0.0, math.inf) if why else self.forest.predict(found)
        if why is None and self.abstains and width > self.threshold:
            why = f"the model is sure within a factor of {math.exp(width):.1f} only"
        if why:
            return Estimate(limit, limit, math.inf, why)
        ns = limit * math.exp(mean)
        ns, low, high = (max(x, self.target.least_ns) for x in (ns, ns * math.exp(-width), ns * math.exp(width)))
        return Estimate(ns, low, high)

    def traffic(self, candidate: Candidate) -> int:
        """ns of memory traffic that using the kernel costs elsewhere."""
        return traffic_ns(self.target, candidate.param("traffic", 0))

    def price(self, ctx: SelectionContext, candidates: Sequence[Candidate]) -> list[Priced]:
        if not measurable(ctx):
            return self.roofline.price(ctx, candidates)
        return [self._priced(ctx, candidate) for candidate in candidates]

    def _priced(self, ctx: SelectionContext, candidate: Candidate) -> Priced:
        guess = self.estimate(ctx, candidate)
        if guess.why and not candidate.as_is:
            return Rejection(candidate.kernel, "uncertain", guess.why)
        extra = self.traffic(candidate)
        spread = 0 if guess.why else round(guess.high - guess.low)
        return assumed_error(candidate, ctx), Cost(max(1, round(guess.ns)) + extra, "roofline" if guess.why else "learned", spread)


def rows_of(priced: Iterable[tuple[SelectionContext, Candidate, Target, int, str]]) -> list[Row]:
    """Training rows from (region, kernel, device, measured ns, group)."""
    found = []
    for ctx, candidate, target, ns, group in priced:
        limit = roofline_ns(ctx, candidate, Roofline(target))
        found.append(Row(features(ctx, candidate, target), math.log(ns / limit), group))
    return found
