"""The join: every cell as a naive look-up gives it, and an answer that is lost is an error."""

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrodb import schemas
from retrodb.errors import DamagedError, InputError
from retrodb.quality.leakage import leakage_table, with_earlier
from retrodb.training.columns import as_lists, lists
from retrodb.training.join import (
    MISSING,
    ChunkArrays,
    Earlier,
    Joined,
    answer,
    assemble,
    locate,
    neighbour_ids,
    requests,
)
from retrodb.training.messages import Answer, Request
from retrodb.training.sequences import pack

M = 4


def make_shard(number: int, sizes: list[int], token: str, gone: set[int]) -> ChunkArrays:
    """Documents of ``sizes`` chunks; those in ``gone`` were compacted away, the others keep their ids."""
    rng = np.random.default_rng(number)
    documents = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    count = len(documents)
    kept = ~np.isin(documents, list(gone))
    lengths = np.full(count, M, dtype=np.int16)
    last = np.append(documents[1:] != documents[:-1], True)[:count]
    lengths[last] = rng.integers(1, M + 1, last.sum())
    tokens = rng.integers(1, 60_000, (count, M)).astype(token)
    tokens[np.arange(M) >= lengths[:, None]] = 0
    ids = np.arange(count, dtype=np.int64) | (number << 32)
    return ChunkArrays(ids[kept], documents[kept] | (number << 32), tokens[kept], lengths[kept])


@st.composite
def databases(draw):
    """(chunk shards, neighbour ids of each, validation flags of each, slots)."""
    token = draw(st.sampled_from(["uint16", "uint32"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shards = []
    for number in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))  # one-chunk documents among them
        gone = draw(st.sets(st.integers(0, len(sizes) - 1), max_size=2))
        shards.append(make_shard(number, sizes, token, gone))
    everything = np.concatenate([shard.chunk_ids for shard in shards])
    k = draw(st.integers(1, 3))
    wanted, validation = [], []
    for shard in shards:
        ids = rng.choice(everything, (len(shard), k)) if len(everything) else np.zeros((0, k), dtype=np.int64)
        ids[rng.random(ids.shape) < 0.3] = MISSING
        wanted.append(ids)
        flags = rng.random(8) < 0.3
        validation.append(flags[shard.document_ids & 7])
    return shards, wanted, validation, draw(st.integers(1, 5))


def join(shards, wanted, validation, slots, order: random.Random | None = None) -> list[pa.Table]:
    """The whole shuffle, messages as bytes; answers in any order."""
    messages: dict[int, list[bytes]] = {number: [] for number in range(len(shards))}
    for number, ids in enumerate(wanted):
        for shard, request in requests(ids, number).items():
            received = Request.from_bytes(request.to_bytes())
            messages[number].append(answer(received, shards[shard]).to_bytes())
    tables = []
    for number, chunks in enumerate(shards):
        if order is not None:
            order.shuffle(messages[number])
        packed = pack(chunks.chunk_ids, chunks.document_ids, chunks.n_tokens, validation[number], slots)
        answers = map(Answer.from_bytes, messages[number])
        tables.append(assemble(packed, chunks, wanted[number], answers, number))
    return tables


def answers_to(ids: np.ndarray, number: int, shards: list[ChunkArrays]) -> list[Answer]:
    return [answer(request, shards[shard]) for shard, request in requests(ids, number).items()]


def pieces(table: pa.Table, k: int, rows: int) -> list[Joined]:
    """A training shard, some rows at a time."""
    parts = []
    for first in range(0, table.num_rows, rows):
        part = table.slice(first, rows)
        ids = lists(part, "chunk_ids", MISSING).reshape(-1)
        tokens = lists(part, "neighbour_tokens").reshape(len(ids), k, 2, M)
        lengths = lists(part, "neighbour_lengths").reshape(len(ids), k, 2)
        parts.append(Joined(ids[ids >= 0], tokens[ids >= 0], lengths[ids >= 0]))
    return parts


def by_hand(shards, wanted, number: int, chunk_id: int | None) -> list[tuple]:
    """(neighbour id, N's tokens, F's tokens) of each cell of a chunk, by look-up in a dict."""
    rows = {int(c): (s, r) for s, shard in enumerate(shards) for r, c in enumerate(shard.chunk_ids)}

    def text(s: int, r: int) -> list[int]:
        return shards[s].tokens[r, : shards[s].n_tokens[r]].tolist()

    k = wanted[0].shape[1]
    if chunk_id is None:
        return [(None, [], [])] * k
    cells = []
    for neighbour in wanted[number][rows[chunk_id][1]].tolist():
        if neighbour < 0:
            cells.append((None, [], []))
            continue
        s, r = rows[neighbour]
        following = rows.get(neighbour + 1)
        same = following is not None and shards[s].document_ids[r] == shards[s].document_ids[following[1]]
        cells.append((neighbour, text(s, r), text(*following) if same else []))
    return cells


@given(databases())
def test_every_cell_of_every_training_row_is_what_a_look_up_by_hand_gives(database):
    shards, wanted, _, slots = database
    k = wanted[0].shape[1]
    for number, table in enumerate(join(*database)):
        assert table.schema.equals(schemas.training(slots * M, M, k, shards[0].tokens.dtype.name), check_metadata=True)
        table.validate(full=True)
        text = {
            int(c): shards[number].tokens[r, : shards[number].n_tokens[r]].tolist()
            for r, c in enumerate(shards[number].chunk_ids)
        }
        document = dict(zip(shards[number].chunk_ids.tolist(), shards[number].document_ids.tolist(), strict=True))
        seen = []
        for position, row in enumerate(table.to_pylist()):
            assert row["sequence_id"] == (number << 32) + position
            assert row["n_tokens"] == sum(row["chunk_lengths"])
            assert not any(value is None for name in ("tokens", "neighbour_tokens") for value in row[name])
            tokens = np.array(row["tokens"]).reshape(slots, M)
            wide = np.array(row["neighbour_tokens"]).reshape(slots, k, 2, M)
            lengths = np.array(row["neighbour_lengths"]).reshape(slots, k, 2)
            for slot, chunk_id in enumerate(row["chunk_ids"]):
                length = row["chunk_lengths"][slot]
                assert tokens[slot, :length].tolist() == text.get(chunk_id, [])
                assert not tokens[slot, length:].any()
                assert row["document_ids"][slot] == document.get(chunk_id)
                expected = by_hand(shards, wanted, number, chunk_id)
                assert row["n_valid"][slot] == sum(cell[0] is not None for cell in expected)
                assert row["neighbour_ids"][slot * k : slot * k + k] == [cell[0] for cell in expected]
                for cell, (_, near, after) in enumerate(expected):
                    for part, words in enumerate((near, after)):
                        assert lengths[slot, cell, part] == len(words)
                        assert wide[slot, cell, part].tolist() == words + [0] * (M - len(words))
                seen.append(chunk_id)
        assert sorted(c for c in seen if c is not None) == shards[number].chunk_ids.tolist()


@given(databases(), st.randoms(use_true_random=False))
def test_the_order_of_answers_changes_nothing(database, order):
    assert all(a.equals(b) for a, b in zip(join(*database), join(*database, order=order), strict=True))


@given(databases())
def test_requests_name_each_valid_cell_once_in_order_of_row_and_no_missing_one(database):
    _, wanted, _, _ = database
    for number, ids in enumerate(wanted):
        asked = requests(ids, number)
        assert list(asked) == sorted(asked)
        for shard, request in asked.items():
            assert (request.query_shard, request.neighbour_shard) == (number, shard)
            assert (np.diff(request.rows) >= 0).all()
            assert (ids.reshape(-1)[request.cells] == request.rows | (shard << 32)).all()
        cells = np.concatenate([request.cells for request in asked.values()] or [np.zeros(0, dtype=np.int64)])
        assert sorted(cells.tolist()) == np.flatnonzero(ids.reshape(-1) >= 0).tolist()


def test_a_continuation_never_crosses_into_the_next_document():
    chunks = make_shard(0, [2, 1, 1], "uint16", set())
    reply = answer(Request(0, 0, np.arange(4), np.arange(4)), chunks)
    assert (reply.lengths[:, 1] > 0).tolist() == [True, False, False, False]
    assert reply.tokens[0, 1].tolist() == chunks.tokens[1].tolist()
    assert not reply.tokens[1:, 1].any()


def test_what_compaction_left_is_found_by_id_and_its_continuations_with_it():
    whole, compacted = make_shard(2, [2, 3, 1, 2], "uint16", set()), make_shard(2, [2, 3, 1, 2], "uint16", {0, 2})
    rows = np.array([2, 3, 4, 6, 7])
    request = Request(0, 2, np.arange(5), rows)
    a, b = answer(request, whole), answer(request, compacted)
    assert (a.tokens == b.tokens).all()
    assert (a.lengths == b.lengths).all()


@pytest.mark.parametrize("gone", [set(), {0}])
def test_a_neighbour_that_does_not_exist_is_an_error_that_names_it(gone):
    chunks = make_shard(5, [2, 2], "uint16", gone)
    with pytest.raises(DamagedError, match=rf"shard 1: .*chunk {(5 << 32) + 9} \(row 9 of chunk shard 5\)"):
        answer(Request(1, 5, np.arange(2), np.array([2, 9])), chunks)


def test_no_chunk_is_found_in_an_empty_shard():
    with pytest.raises(DamagedError, match="not exist"):
        locate(np.zeros(0, dtype=np.int64), np.array([3]))


@pytest.fixture
def small():
    """(packed, chunks, neighbour ids, answers) of one shard that asks two."""
    shards = [make_shard(0, [2, 2], "uint16", set()), make_shard(1, [3], "uint16", set())]
    ids = np.array([[2, 1 << 32], [3, MISSING], [(1 << 32) + 2, 0], [1, MISSING]])
    chunks = shards[0]
    packed = pack(chunks.chunk_ids, chunks.document_ids, chunks.n_tokens, np.zeros(4, dtype=bool), 3)
    answers = [answer(request, shards[shard]) for shard, request in requests(ids, 0).items()]
    assemble(packed, chunks, ids, answers, 0)
    return packed, chunks, ids, answers


def test_an_answer_that_never_came_is_an_error_and_not_zeros(small):
    packed, chunks, ids, answers = small
    with pytest.raises(DamagedError, match=r"2 of its neighbours were not answered, of chunk shards \[1\]"):
        assemble(packed, chunks, ids, answers[:1], 0)


def test_an_answer_that_came_twice_is_an_error(small):
    packed, chunks, ids, answers = small
    with pytest.raises(DamagedError, match="second time"):
        assemble(packed, chunks, ids, [*answers, answers[0]], 0)


def test_an_answer_nobody_asked_for_is_an_error(small):
    packed, chunks, ids, answers = small
    for cells in ([3, 7], [0, 0], [0, 99], [2, 5]):  # missing cells, one twice, out of range, of the other shard
        wrong = replace(answers[1], cells=np.array(cells))
        with pytest.raises(DamagedError):
            assemble(packed, chunks, ids, [answers[0], wrong], 0)


def test_an_answer_for_another_shard_or_of_other_tokens_is_an_error(small):
    packed, chunks, ids, answers = small
    for wrong in (
        replace(answers[0], query_shard=4),
        replace(answers[0], tokens=answers[0].tokens.astype(np.uint32)),
        replace(answers[0], tokens=answers[0].tokens[:, :, :3]),
        replace(answers[0], lengths=np.zeros_like(answers[0].lengths)),
    ):
        with pytest.raises(DamagedError):
            assemble(packed, chunks, ids, [wrong, answers[1]], 0)


@given(databases(), st.data())
def test_a_message_cut_short_or_of_another_kind_is_an_error(database, data):
    shards, wanted, _, _ = database
    for shard, request in requests(wanted[0], 0).items():
        for message, kind in ((request.to_bytes(), Request), (answer(request, shards[shard]).to_bytes(), Answer)):
            cut = data.draw(st.integers(0, len(message) - 1))
            with pytest.raises(DamagedError):
                kind.from_bytes(message[:cut])
            with pytest.raises(DamagedError):
                (Answer if kind is Request else Request).from_bytes(message)


def chunk_table(chunks: ChunkArrays) -> pa.Table:
    kind = schemas.chunks(M, chunks.tokens.dtype.name).field("tokens")
    return pa.table(
        {
            "chunk_id": chunks.chunk_ids,
            "document_id": chunks.document_ids,
            "tokens": as_lists(chunks.tokens, kind),
            "n_tokens": chunks.n_tokens,
        }
    )


def test_chunks_are_read_from_sliced_and_from_chunked_tables():
    chunks = make_shard(0, [3, 4, 2], "uint32", set())
    table = chunk_table(chunks)
    middle = ChunkArrays.from_table(table.slice(2, 5))
    assert (middle.tokens == chunks.tokens[2:7]).all()
    assert (middle.chunk_ids == chunks.chunk_ids[2:7]).all()
    pieces = pa.concat_tables([table.slice(0, 2), table.slice(2, 3), table.slice(5)])
    assert (ChunkArrays.from_table(pieces).tokens == chunks.tokens).all()
    assert len(ChunkArrays.from_table(table.slice(0, 0))) == 0


def test_a_null_list_or_ids_out_of_order_are_damage():
    kind = pa.list_(pa.int64(), 2)
    with pytest.raises(DamagedError, match="1 null list;"):
        lists(pa.table({"x": pa.array([[1, 2], None], kind)}), "x", missing=-1)
    with pytest.raises(DamagedError, match="1 null where"):
        lists(pa.table({"x": pa.array([[1, None]], kind)}), "x")
    table = chunk_table(make_shard(0, [3], "uint16", set()))
    with pytest.raises(DamagedError, match="out of order"):
        ChunkArrays.from_table(table.take([1, 0, 2]))


def test_neighbours_are_cut_to_the_first_k_and_must_be_those_of_the_chunks():
    table = pa.table(
        {"chunk_id": [4, 5], "neighbour_ids": pa.array([[7, 8, None], [9, None, None]], pa.list_(pa.int64(), 3))}
    )
    assert neighbour_ids(table, np.array([4, 5]), 2).tolist() == [[7, 8], [9, MISSING]]
    with pytest.raises(DamagedError, match="their chunk ids differ"):
        neighbour_ids(table, np.array([4, 6]), 2)
    for k in (0, 4):
        with pytest.raises(InputError, match=f"cannot join {k} neighbours a chunk: the database keeps 3"):
            neighbour_ids(table, np.array([4, 5]), k)


def test_the_join_does_not_import_torch_or_beam():
    code = (
        "import sys, retrodb.training.join, retrodb.training.shards; print({'torch', 'apache_beam'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- what was joined before ------------------------------------------------------------------------------------------


@st.composite
def changed_databases(draw):
    """A database, as `databases` gives it, and as it is once documents were deleted and chunks got other neighbours:
    (before, now, which chunks have other neighbours than before, by shard)."""
    shards, wanted, validation, slots = before = draw(databases())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    gone = [rng.random(8) < draw(st.sampled_from([0, 0.3, 1])) for _ in shards]
    stays = [~out[shard.document_ids & 7] for shard, out in zip(shards, gone, strict=True)]
    left = [
        ChunkArrays(shard.chunk_ids[own], shard.document_ids[own], shard.tokens[own], shard.n_tokens[own])
        for shard, own in zip(shards, stays, strict=True)
    ]
    everything = np.concatenate([shard.chunk_ids for shard in left])
    ids, fresh = [], []
    for were, own in zip(wanted, stays, strict=True):
        now = were[own].copy()
        other = rng.random(now.shape) < draw(st.sampled_from([0, 0.2]))
        now[other] = rng.choice(everything, other.sum()) if len(everything) else MISSING
        now[~np.isin(now, everything)] = MISSING
        ids.append(now)
        fresh.append((now != were[own]).any(axis=1))
    flags = [flags[own] for flags, own in zip(validation, stays, strict=True)]
    return before, (left, ids, flags, slots), fresh


@given(changed_databases(), st.integers(1, 3))
def test_what_was_joined_before_and_what_is_asked_for_are_what_a_join_of_all_gives(databases, rows):
    before, (shards, wanted, validation, slots), fresh = databases
    k = wanted[0].shape[1]
    expected = join(shards, wanted, validation, slots)
    for number, (table, chunks, ids, own) in enumerate(zip(join(*before), shards, wanted, fresh, strict=True)):
        answers = answers_to(np.where(own[:, None], ids, MISSING), number, shards)
        packed = pack(chunks.chunk_ids, chunks.document_ids, chunks.n_tokens, validation[number], slots)
        made = assemble(packed, chunks, ids, answers, number, Earlier(own, pieces(table, k, rows)))
        assert made.equals(expected[number])


@given(changed_databases())
def test_what_leaked_before_and_what_is_compared_are_what_comparing_all_gives(databases):
    (old, were, _, _), (shards, wanted, _, _), fresh = databases
    for number, (chunks, ids, own) in enumerate(zip(shards, wanted, fresh, strict=True)):
        before = leakage_table(old[number], were[number], answers_to(were[number], number, old), number)
        expected = leakage_table(chunks, ids, answers_to(ids, number, shards), number)
        asked = np.where(own[:, None], ids, MISSING)
        some = leakage_table(chunks, asked, answers_to(asked, number, shards), number)
        assert with_earlier(some, before, own).equals(expected)


def test_an_earlier_shard_that_lacks_a_chunk_is_an_error(small):
    packed, chunks, ids, answers = small
    table = assemble(packed, chunks, ids, answers, 0)
    parts = pieces(table, ids.shape[1], 1)
    unchanged = Earlier(np.zeros(len(chunks), dtype=bool), parts)
    assert assemble(packed, chunks, ids, [], 0, unchanged).equals(table)
    with pytest.raises(DamagedError, match="training shard 0 of the version before lacks 1 chunk, such as 3"):
        assemble(packed, chunks, ids, [], 0, replace(unchanged, parts=parts[:-1]))
