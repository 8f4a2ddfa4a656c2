"""Which index a database gets: autofaiss' choice for its size and memory, within rules that keep it buildable.

An index key is faiss' factory string. Two kinds are used, because both take ids of our own, can be cut into shards
and merged: ``Flat`` (exact) and ``[OPQ..,]IVF<lists>[_HNSW<m>],<code>``. HNSW itself, refining and fast-scan
indexes cannot (measured on faiss 1.15).
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from retrodb.errors import InputError
from retrodb.index.engine import EXACT_KEY, Metric, empty_index, faiss_metric, ivf_of
from retrodb.sizes import count_of

EXACT_BELOW: Final = 65_536
"""At or below this many vectors the index is exact: a search reads them all in a fraction of a millisecond."""

POINTS_PER_LIST: Final = 39
"""k-means wants at least this many training vectors a centroid (faiss ``min_points_per_centroid``)."""

BEST_POINTS_PER_LIST: Final = 100
"""What autofaiss trains a list with; faiss' k-means would read at most 256."""

DIMENSIONS_PER_PQ_BYTE: Final = 12
"""A product quantiser coarser than one byte for 12 dimensions is refused: its candidates are too poor to re-score."""

TRAINING_SECONDS_PER_VECTOR: Final = 0.002
"""Core-seconds of rotation (OPQ) training allowed for each vector, about a fifth of what embedding it costs."""

_OPQ_SECONDS: Final = 52 / 8 / 12_800
"""Core-seconds of OPQ training per sub-quantiser and training vector (measured: OPQ8, 12,800 vectors, 52 s)."""
_OPQ_POINTS: Final = 65_536
_FLAT_QUANTISER_LISTS: Final = 16_384
"""Above this many lists a fallback finds its lists by HNSW instead of comparing with every centroid."""
_MAXIMUM_LISTS: Final = 1 << 22

_KEY: Final = re.compile(
    r"(?:OPQ(?P<opq>[1-9]\d{0,3})(?:_(?P<out>[1-9]\d{0,4}))?,)?"
    r"IVF(?P<lists>\d{1,9})(?:_HNSW\d{1,3})?,"
    r"(?P<code>Flat|SQ4|SQ6|SQ8|SQfp16|SQbf16|RaBitQ|PQ(?P<pq>\d{1,5})(?:x(?P<bits>[4-9]|1[0-2]))?)"
)


@dataclass(frozen=True)
class KeyChoice:
    """The index key of a database, and why.

    Attributes:
        key: faiss factory string; ``Flat`` for an exact index.
        reason: one or two sentences for a person.
        exact: whether a search compares with every vector.
        training_vectors: vectors to draw for training; 0 where nothing is trained.
        n_lists: inverted lists, the largest useful nprobe; 1 where exact.
        estimated_bytes: size of all index shards together, without the template's copies.
        alternatives: keys that were looked at and refused, each with its reason.
    """

    key: str
    reason: str
    exact: bool
    training_vectors: int
    n_lists: int
    estimated_bytes: int
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """A parsed IVF key for a size, a dimension and a memory budget."""

    key: str
    vectors: int
    dimension: int
    memory: int
    metric: Metric

    @cached_property
    def _parts(self) -> re.Match[str]:
        match = _KEY.fullmatch(self.key)
        if match is None:
            raise InputError(
                f"the index key {self.key!r} cannot be used: write Flat or [OPQm_d,]IVFn[_HNSWm],CODE with CODE one of "
                "Flat, SQ8, SQfp16, RaBitQ, PQm; only these take our ids and can be merged. Or leave --index-key out."
            )
        return match

    @property
    def lists(self) -> int:
        return int(self._parts["lists"])

    @property
    def minimum_points(self) -> int:
        """Training vectors that the lists and the codebooks need."""
        bits = int(self._parts["bits"] or 8) if self._parts["pq"] else 0
        return max(POINTS_PER_LIST * self.lists, POINTS_PER_LIST << bits if bits else 1)

    @property
    def training_vectors(self) -> int:
        """As many as autofaiss would read; fewer where memory is short, but enough for k-means."""
        per_list = self.memory // (self.dimension * 6 * self.lists)
        wanted = self.lists * min(max(per_list, POINTS_PER_LIST), BEST_POINTS_PER_LIST)
        codebook = BEST_POINTS_PER_LIST << int(self._parts["bits"] or 8) if self._parts["pq"] else 0
        return min(self.vectors, max(wanted, codebook, self.minimum_points))

    @property
    def training_bytes(self) -> int:
        """Memory to train in: the least sample, a copy of half of it, and the centroids."""
        return self.dimension * 4 * (self.minimum_points * 3 // 2 + self.lists)

    @property
    def index_bytes(self) -> int:
        return self.vectors * (self._code_bytes + 8) + self.lists * self.dimension * 4

    @cached_property
    def _code_bytes(self) -> int:
        rotated = int(self._parts["out"] or self.dimension)
        if self._parts["opq"] and rotated % int(self._parts["opq"]):
            raise InputError(
                f"the index key {self.key!r} is not possible: "
                f"{rotated} dimensions cannot be cut into {self._parts['opq']} equal parts."
            )
        one_list = re.sub(r"IVF\d+", "IVF1", self.key)
        index = empty_index(one_list, self.dimension, self.metric)  # named: its inverted lists live as long as it does
        ivf: Any = ivf_of(index)
        return int(ivf.code_size)

    def refusal(self) -> str | None:
        """Why this key would not do, or None."""
        if self.lists > _MAXIMUM_LISTS or self.lists < 1:
            return f"{self.lists} lists; from 1 to {_MAXIMUM_LISTS} are possible"
        if self.minimum_points > self.vectors:
            return f"training needs {count_of(self.minimum_points, 'vector')} and has {self.vectors:,}"
        try:
            _ = self._code_bytes
        except InputError as error:
            return str(error)
        if self.training_bytes > self.memory:
            return f"training needs {self.training_bytes:,} bytes of memory"
        return None

    def expensive(self) -> str | None:
        """Why this key is a poor bargain, or None. Not asked of a key the user gave."""
        if self._parts["pq"] and int(self._parts["pq"]) * DIMENSIONS_PER_PQ_BYTE < self.dimension:
            return f"{self._parts['pq']}-byte codes are too coarse for {self.dimension} dimensions"
        if self._parts["opq"]:
            points = min(self.training_vectors, _OPQ_POINTS)
            seconds = _OPQ_SECONDS * int(self._parts["opq"]) * points
            if seconds > TRAINING_SECONDS_PER_VECTOR * self.vectors:
                return f"learning its rotation would take about {seconds:,.0f} core-seconds"
        return None

    def choice(self, reason: str, refused: list[str]) -> KeyChoice:
        return KeyChoice(self.key, reason, False, self.training_vectors, self.lists, self.index_bytes, tuple(refused))


def choose_key(
    n_vectors: int, dimension: int, memory_bytes: int, metric: Metric = "l2", requested: str | None = None
) -> KeyChoice:
    """The index key for a database of ``n_vectors`` float16 vectors.

    Exact at or below `EXACT_BELOW`. Above, the first of autofaiss' memory-mappable choices whose training needs can
    be met; if there is none, ``IVF,SQ8``, and if that does not fit either ``IVF,RaBitQ`` (one bit a dimension), with
    as many lists as vectors and memory allow. Never fails for lack of training vectors: the key becomes smaller
    instead, and the reason says so. Depends on its arguments alone, not on this machine.

    Args:
        n_vectors: vectors that will be added, 0 or more.
        dimension: of the vectors.
        memory_bytes: budget for the searched index and for training.
        metric: ``l2`` or ``ip``.
        requested: a key the user asks for (``--index-key``).

    Raises:
        InputError: a key, dimension, budget or metric that is not possible.
    """
    faiss_metric(metric)
    if dimension < 1 or memory_bytes < 1 or n_vectors < 0:
        raise InputError(
            f"no index is possible for {count_of(n_vectors, 'vector')} of {dimension} dimensions in {memory_bytes} "
            "bytes of memory."
        )
    if requested is not None:
        return _requested(requested, n_vectors, dimension, memory_bytes, metric)
    if n_vectors <= EXACT_BELOW:
        return _exact(
            f"{count_of(n_vectors, 'vector')}: at or below {EXACT_BELOW:,} search is exact.", n_vectors, dimension
        )
    return _automatic(n_vectors, dimension, memory_bytes, metric)


def _exact(reason: str, n_vectors: int, dimension: int, refused: tuple[str, ...] = ()) -> KeyChoice:
    return KeyChoice(EXACT_KEY, reason, True, 0, 1, n_vectors * (2 * dimension + 8), refused)


def _automatic(n_vectors: int, dimension: int, memory: int, metric: Metric) -> KeyChoice:
    refused: list[str] = []
    costly = False
    for key in dict.fromkeys(_autofaiss_keys(n_vectors, dimension, memory)):
        plan = _Plan(key, n_vectors, dimension, memory, metric)
        impossible = plan.refusal()
        bargain = None if impossible else plan.expensive()
        if impossible or bargain:
            costly |= bargain is not None
            refused.append(f"{key}: {impossible or bargain}")
            continue
        if costly and (smaller := _fallback("SQ8", n_vectors, dimension, memory, metric)).index_bytes <= memory:
            return smaller.choice("8 bits a dimension fit the memory, and better codes would train too long.", refused)
        return plan.choice(
            f"autofaiss' choice for {count_of(n_vectors, 'vector')} in {memory:,} bytes of memory.", refused
        )
    for code in ("SQ8", "RaBitQ"):
        plan = _fallback(code, n_vectors, dimension, memory, metric)
        if plan.index_bytes <= memory:
            return plan.choice(f"none of autofaiss' choices will do; {code} codes fit {memory:,} bytes.", refused)
        refused.append(f"{plan.key}: {plan.index_bytes:,} bytes, more than the memory")
    return plan.choice(
        f"no index of {count_of(n_vectors, 'vector')} fits {memory:,} bytes of memory; these are the smallest codes, "
        "and index shards are searched one group at a time.",
        refused[:-1],
    )


def _autofaiss_keys(n_vectors: int, dimension: int, memory: int) -> list[str]:
    """autofaiss' choices, best first; unquantised lists wherever they fit, since a quantiser only loses recall."""
    from autofaiss.external.optimize import get_optimal_index_keys_v2  # noqa: PLC0415 - half a second to import

    keys = get_optimal_index_keys_v2(
        n_vectors, dimension, f"{memory}B", should_be_memory_mappable=True, ivf_flat_threshold=n_vectors + 1
    )
    return [str(key) for key in keys]


def _fallback(code: str, n_vectors: int, dimension: int, memory: int, metric: Metric) -> _Plan:
    """An IVF plan with ``code`` and the most lists that can be trained; one list can always be."""
    from autofaiss.external.optimize import get_optimal_nb_clusters  # noqa: PLC0415

    lists = int(get_optimal_nb_clusters(n_vectors)[0])
    while True:
        quantiser = f"IVF{lists}_HNSW32" if lists > _FLAT_QUANTISER_LISTS else f"IVF{lists}"
        plan = _Plan(f"{quantiser},{code}", n_vectors, dimension, memory, metric)
        if lists == 1 or plan.refusal() is None:
            return plan
        lists //= 2


def _requested(key: str, n_vectors: int, dimension: int, memory: int, metric: Metric) -> KeyChoice:
    """The user's key, made smaller where there are too few vectors to train it."""
    if key == EXACT_KEY:
        return _exact("asked for with --index-key.", n_vectors, dimension)
    plan = _Plan(key, n_vectors, dimension, memory, metric)
    if not 1 <= plan.lists <= _MAXIMUM_LISTS:
        raise InputError(
            f"the index key {key!r} has {count_of(plan.lists, 'list')}; from 1 to {_MAXIMUM_LISTS:,} are possible."
        )
    size = plan.index_bytes  # also proves that faiss can make it
    if plan.minimum_points <= n_vectors:
        beyond = f", though {size:,} bytes exceed the memory of {memory:,}" if size > memory else ""
        return plan.choice(f"asked for with --index-key{beyond}.", [])
    refused = f"{key}: training needs {count_of(plan.minimum_points, 'vector')} and has {n_vectors:,}"
    lists = n_vectors // POINTS_PER_LIST
    if lists >= 1:
        smaller = _Plan(key.replace(f"IVF{plan.lists}", f"IVF{lists}", 1), n_vectors, dimension, memory, metric)
        if smaller.minimum_points <= n_vectors:
            return smaller.choice(
                f"{key} was asked for, but {count_of(n_vectors, 'vector trains', 'vectors train')} "
                f"{count_of(lists, 'list')}.",
                [refused],
            )
    few = count_of(n_vectors, "vector is", "vectors are")
    reason = f"{key} was asked for, but {few} too few to train it; search is exact instead."
    return _exact(reason, n_vectors, dimension, (refused,))
