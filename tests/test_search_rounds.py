"""Queries by index shards, merged: the neighbours of a shuffle in rounds are those of one index, bit for bit."""

import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from support import build_here, digests, write_jsonl

from retrodb.corpus.quickstart import quickstart_lines
from retrodb.errors import DamagedError
from retrodb.index import merge, search_group
from retrodb.neighbours import (
    NO_CLUSTER,
    Exclusion,
    Neighbours,
    SameBlock,
    SameCluster,
    SearchedIndex,
    find_neighbours,
)
from retrodb.neighbours.asking import Ask, first_asks
from retrodb.neighbours.rounds import (
    Candidates,
    Chunks,
    Queries,
    Unfinished,
    ask_bytes,
    candidates_of,
    merged,
    settled,
    wanted_chunks,
)

N, D, K = 600, 8, 10


class Corpus:
    """Chunks in two shards, a third of them exact duplicates, long documents, clusters; an index in four groups."""

    def __init__(self, metric: str, key: str, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.metric, self.raw_is_exact, self.coarse = metric, key in ("Flat", "IVF8,Flat"), key == "IVF8,SQ4"
        self.ids = np.concatenate([np.arange(N // 2), (1 << 32) + np.arange(N // 2)]).astype(np.int64)
        self.vectors = rng.standard_normal((N, D)).astype(np.float16)
        self.vectors[150:350] = self.vectors[150]
        lengths = rng.integers(1, 60, size=N)
        self.documents = np.repeat(np.arange(N), lengths)[:N].astype(np.int64)
        self.documents[N // 2 :] += 1 << 32  # a document never spans shards
        self.clusters = np.where(self.documents % 3 == 0, self.documents % 7, NO_CLUSTER)
        self.uids = np.arange(N, dtype=np.int64)
        self.uids[150:350] = np.arange(200) % 5
        self.largest_norm = float(np.linalg.norm(self.vectors.astype(np.float32), axis=1).max())
        trained = faiss.index_factory(
            D, f"IDMap,{key}" if key == "Flat" else key, faiss.METRIC_L2 if metric == "l2" else 0
        )
        trained.train(self.vectors.astype(np.float32))
        self.n_lists = 1 if key == "Flat" else 8
        self.whole = faiss.clone_index(trained)
        self.groups = [faiss.clone_index(trained) for _ in range(4)]
        for index, rows in [
            (self.whole, np.arange(N)),
            *zip(self.groups, np.array_split(np.arange(N), 4), strict=True),
        ]:
            index.add_with_ids(self.vectors[rows[::-1]].astype(np.float32), self.ids[rows[::-1]])
        self.asked: Counter[tuple[int, int]] = Counter()

    ntotal = N
    nprobe = 2

    def search(self, queries: np.ndarray, candidates: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """One index; or, with codes so coarse that equals are cut off at the last candidate, its shards one by one."""
        indexes = self.groups if self.coarse else [self.whole]
        return merge([search_group(index, queries, candidates, nprobe) for index in indexes], candidates, self.metric)

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ids, ids)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return self.vectors[self._rows(ids)]

    def document_ids(self, ids: np.ndarray) -> np.ndarray:
        return self.documents[self._rows(ids)]

    def cluster_ids(self, ids: np.ndarray) -> np.ndarray:
        return self.clusters[self._rows(ids)]

    def uid_keys(self, ids: np.ndarray) -> np.ndarray:
        return self.uids[self._rows(ids)]

    def exclusion(self, exclude: str, blocks: bool) -> Exclusion:
        found = Exclusion.of_chunks(self.ids, self.documents, exclude)
        found = found.also(SameCluster(self.clusters, self)) if exclude == "cluster" else found
        return found.also(SameBlock(self.uids, np.ones(N, dtype=bool), self)) if blocks else found

    def at_once(self, exclude: str, blocks: bool) -> Neighbours:
        own = self.exclusion(exclude, blocks)
        uids = self if blocks else None
        return find_neighbours(self.ids, self.vectors, own, self, self, self, K, self.metric, uids=uids)

    def in_rounds(self, exclude: str, budget: int, fetched: bool, blocks: bool) -> tuple[Neighbours, int]:
        """The steps of the pipeline by hand; and how many rounds there were."""
        exclusion = self.exclusion(exclude, blocks)
        index = SearchedIndex(N, self.nprobe, self.n_lists, self.raw_is_exact, self.largest_norm)
        clusters = self.clusters if exclude == "cluster" else np.full(N, NO_CLUSTER)
        queries = Queries(self.vectors, exclusion.first, exclusion.last, clusters, self.uids)
        state, rounds = Unfinished.start(N, K, first_asks(exclusion, K, index)), 0
        while not state.is_done:
            rounds += 1
            pieces: dict[int, list[Candidates]] = defaultdict(list)
            for number, group in enumerate(self.groups):
                for piece, ask in enumerate(part for a in state.share(budget, D, fetched) for part in a.cut(37)):
                    own = np.ascontiguousarray(self.vectors[ask.rows], dtype=np.float32)
                    found = search_group(group, own, ask.candidates, ask.nprobe)
                    known = queries.take(ask.rows) if number == 2 else None
                    data = candidates_of(ask, found, known).to_bytes()
                    pieces[piece].append(Candidates.from_bytes(data))
            done = []
            for parts in pieces.values():
                nearest = merged([merged(parts[2:], self.metric), merged(parts[:2], self.metric)], self.metric)
                source = self._fetched(nearest) if fetched else self
                uids = source if blocks else None
                done.append(settled(nearest, index, source, source, source, K, self.metric, uids).to_bytes())
            state = Unfinished.from_bytes(state.updated(map(Unfinished.from_bytes, done)).to_bytes())
        return state.neighbours(self.ids), rounds

    def _fetched(self, found: Candidates) -> Chunks:
        """Only what was asked of each shard: a look-up of anything else is an error."""
        parts = []
        for shard, ids in wanted_chunks(found).items():
            assert (ids >> 32 == shard).all()
            rows = self._rows(ids)
            parts.append(Chunks(ids, self.vectors[rows], self.documents[rows], self.clusters[rows], self.uids[rows]))
        return Chunks.joined(parts[::-1], D)


@pytest.mark.parametrize("exclude", ["document", "cluster", "none", "document, of blocks", "cluster, of blocks"])
@pytest.mark.parametrize("key", ["Flat", "IVF8,Flat", "IVF8,SQ8", "IVF8,SQ4"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_groups_searched_apart_in_rounds_equal_the_whole_index(metric: str, key: str, exclude: str) -> None:
    base = Corpus(metric, key)
    exclude, _, unit = exclude.partition(", of ")
    blocks = unit == "blocks"
    expected = base.at_once(exclude, blocks)
    assert (expected.n_valid == K).all()
    for budget, fetched in ((64 << 20, False), (64 << 20, True), (60_000, True)):
        found, rounds = base.in_rounds(exclude, budget, fetched, blocks)
        assert rounds > 1, "nobody was asked again: the test shows less than it should"
        for name, value in vars(expected).items():
            assert np.array_equal(getattr(found, name), value, equal_nan=name == "distances"), name


def test_a_round_takes_no_more_than_its_budget_but_one_query_at_least() -> None:
    rows = np.arange(100)
    asks = [Ask(rows[:40], 50, 1), Ask(rows[40:60], 50, 4), Ask(rows[60:], 20_000, 1)]
    state = Unfinished.start(100, K, asks)
    for budget in (1, 5_000, 50_000, 10**6, 10**9):
        share = state.share(budget, D, fetched=False)
        size = sum(ask_bytes(ask, D, fetched=False) for ask in share)
        assert size <= budget or sum(map(len, share)) == 1
    assert [(len(a), a.candidates, a.nprobe) for a in share] == [(40, 50, 1), (20, 50, 4), (40, 20_000, 1)]
    assert [len(a) for a in state.share(1, D, fetched=False)] == [1]


def test_what_is_cut_short_or_something_else_is_refused() -> None:
    found = candidates_of(Ask(np.arange(3), 2, 1), (np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int64)), None)
    data = found.to_bytes()
    assert np.array_equal(Candidates.from_bytes(data).ids, found.ids)
    for damaged in (data[:-1], data + b"x", b"", b"[]\n", data.replace(b"Candidates", b"Unfinished", 1)):
        with pytest.raises(DamagedError, match="are no Candidates"):
            Candidates.from_bytes(damaged)
    other = replace(found, rows=found.rows + 1)
    with pytest.raises(DamagedError, match="different queries"):
        merged([found, other], "l2")


def test_a_candidate_whose_shard_did_not_answer_is_an_error_never_a_guess() -> None:
    chunks = Chunks.joined(
        [Chunks(np.array([3, 5]), np.ones((2, D), np.float16), np.arange(2), np.arange(2), np.arange(2))], D
    )
    with pytest.raises(DamagedError, match="chunk 4"):
        chunks.rows(np.array([3, 4]))


# -- in a build --------------------------------------------------------------------------------------------------------


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """Real text, some of it twice, so that clusters and equal distances are met."""
    lines = [line for line in quickstart_lines() if len(line) < 3_000][:30]
    return write_jsonl(tmp_path / "topics.jsonl", lines + lines[:4])


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from retrodb.index import shards

    monkeypatch.setattr(shards, "EXACT_GROUP_BYTES", 8 << 10)
    monkeypatch.setattr(shards, "GROUP_BYTES", 4 << 10)
    monkeypatch.setattr(shards, "TEMPLATE_SHARE", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize(
    "settings",
    [
        {"exclude": "cluster"},
        {"index_key": "IVF8,SQ8", "metric": "ip"},
        {"unit": "block", "chunk_tokens": 48, "metric": "ip", "exclude": "cluster"},
        {"rerank": "bm25", "neighbours": 4, "rerank_candidates": 30},
    ],
    ids=str,
)
def test_a_build_in_small_waves_or_from_an_object_store_finds_the_same(
    settings, topics, tiny_encoder, tmp_path, monkeypatch
):
    """All index shards on one worker, or merged by a shuffle in waves of a few queries, or with vectors fetched."""
    from retrodb.pipelines import retrieval_stages, search

    from retrodb.storage import Storage

    settings = {"encoder": str(tiny_encoder), "shard_bytes": "12KB", "until": "neighbours", **settings}
    opened: Counter[str] = Counter()
    open_index_file = search.open_index_file

    def counted(storage, file, *rest):
        opened[file.path] += 1
        return open_index_file(storage, file, *rest)

    monkeypatch.setattr(search, "open_index_file", counted)
    db = tmp_path / "db"
    build_here([topics], db, **settings)
    expected = digests(db, ("neighbours",))
    assert not opened, "a small index is searched by each query shard's worker alone"

    monkeypatch.setattr(retrieval_stages, "TOGETHER_BELOW", 0)
    rounds = []
    for wave_bytes in (32 << 20, 60_000):
        monkeypatch.setattr(search, "WAVE_BYTES", wave_bytes)
        shutil.rmtree(db / "neighbours")  # to be repaired: nothing else is made again
        build_here([topics], db, **settings)
        assert digests(db, ("neighbours",)) == expected
        assert len(opened) >= 2
        assert len(set(opened.values())) == 1, "every index shard is opened as often as any other: once a round"
        rounds.append(max(opened.values()))
        opened.clear()
    assert rounds[0] <= 8
    assert rounds[1] > rounds[0]

    budgets = set()
    share = Unfinished.share
    monkeypatch.setattr(
        Unfinished, "share", lambda self, budget, *rest: budgets.add(budget) or share(self, budget, *rest)
    )
    on_a_cluster = retrieval_stages.search_settings
    monkeypatch.setattr(
        retrieval_stages, "search_settings", lambda *given: replace(on_a_cluster(*given), in_memory=False)
    )
    shutil.rmtree(db / "neighbours")
    build_here([topics], db, **settings)
    assert digests(db, ("neighbours",)) == expected
    assert budgets == {search.SHARE_BYTES}, "what a runner keeps on its disks is asked for at once"

    monkeypatch.setattr(retrieval_stages, "FETCH_ABOVE", 0)
    monkeypatch.setattr(search, "SettleByLooking", None)  # whoever looks up instead, fails
    url = f"memory://rounds-{settings.get('metric', 'l2')}"
    remote = _build_at(url, topics, settings)
    assert {shard.path: shard.sha256 for shard in remote.shards("neighbours")} == expected
    Storage(url).delete_folder("neighbours")


def _build_at(url: str, source: Path, settings: dict) -> object:
    from retrodb.pipelines.driver import build
    from retrodb.pipelines.progress import Silent

    from retrodb.config import make_config
    from retrodb.corpus import expand_inputs
    from retrodb.storage import Storage

    config, run = make_config({}, {"workers": 1, **settings})
    return build(expand_inputs([str(source)]).files, Storage(url), config, run, Silent()).manifest


@pytest.mark.slow
@pytest.mark.usefixtures("small_groups")
def test_a_build_that_ends_between_two_rounds_goes_on_from_there(topics, tiny_encoder, tmp_path, monkeypatch):
    from retrodb.pipelines import execute, retrieval_stages, search

    settings = {"encoder": str(tiny_encoder), "shard_bytes": "12KB", "until": "neighbours"}
    build_here([topics], tmp_path / "whole", **settings)
    monkeypatch.setattr(retrieval_stages, "TOGETHER_BELOW", 0)

    run_wave, waves = execute.Executor._run_wave, []

    def interrupted(self, book, tasks, *rest):
        if self.progress.lines[-1] == "begin neighbours":
            waves.append(tasks)
            if len(waves) == 3:  # one is the truth, of the search one is done
                raise KeyboardInterrupt
        run_wave(self, book, tasks, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(execute.Executor, "_run_wave", interrupted)
        patch.setattr(search, "WAVE_BYTES", 20_000)  # less than a query shard: each takes several rounds
        with pytest.raises(KeyboardInterrupt):
            build_here([topics], tmp_path / "cut", **settings)
    states = list((tmp_path / "cut").glob(".build/neighbours-*/rounds/*.arrays"))
    assert states, "the interruption came when nothing was unfinished: the test shows less than it should"
    build_here([topics], tmp_path / "cut", **settings)
    assert digests(tmp_path / "cut", ("neighbours",)) == digests(tmp_path / "whole", ("neighbours",))
    assert not list((tmp_path / "cut").glob(".build/neighbours-*"))
