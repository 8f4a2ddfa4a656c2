"""The stream and the table: each sequence once over ranks and workers, any position can be resumed at."""

import contextlib
import itertools
import json
import pickle
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from retrodb import schemas
from retrodb.errors import DamagedError, InputError, MismatchError
from retrodb.manifest import Manifest, Shard, StageState
from retrodb.storage import Storage
from retrodb.training import order
from retrodb.training.columns import as_lists
from retrodb.training.dataset import TrainingDataset, neighbour_mask, token_mask
from retrodb.training.join import MISSING, ChunkArrays, answer, assemble, requests
from retrodb.training.sequences import pack
from retrodb.training.shards import TRAINING_ROW_GROUP, TrainingShard, write_training
from retrodb.training.table import TrainingTable

M, SLOTS, K, STORED = 4, 2, 2, 3
SIZES = [(130, 70), (0, 5), (3, 0), (0, 0), (65, 64)]
"""(training, validation) sequences of each shard: more than a row group, none, few, and exactly one row group."""


def make_shard(number: int, training: int, validation: int, rng: np.random.Generator) -> tuple[ChunkArrays, np.ndarray]:
    """Chunks that fill so many sequences, the last of each split with one slot empty; documents of one to five."""
    sizes = [max(0, rows * SLOTS - 1) for rows in (training, validation)]
    flags = np.repeat([False, True], sizes)
    count = len(flags)
    breaks = rng.random(count) < 0.4
    breaks[[i for i in (0, sizes[0]) if i < count]] = True
    documents = np.cumsum(breaks).astype(np.int64)
    lengths = np.where(np.append(breaks[1:], True)[:count], rng.integers(1, M + 1, count), M).astype(np.int16)
    tokens = rng.integers(1, 60_000, (count, M)).astype(np.uint16)
    tokens[np.arange(M) >= lengths[:, None]] = 0
    ids = np.arange(count, dtype=np.int64) | (number << 32)
    return ChunkArrays(ids, documents | (number << 32), tokens, lengths), flags


def build(storage: Storage, sizes: list[tuple[int, int]], write=write_training) -> Manifest:
    """A small database: chunks, neighbours and training, by the functions that a build uses."""
    rng = np.random.default_rng(1)
    made = [make_shard(number, *size, rng) for number, size in enumerate(sizes)]
    everything = np.concatenate([chunks.chunk_ids for chunks, _ in made])
    wanted = []
    for chunks, _ in made:
        ids = rng.choice(everything, (len(chunks), STORED)) if len(everything) else np.zeros((0, STORED), np.int64)
        ids[np.arange(STORED) >= rng.integers(0, STORED + 1, len(chunks))[:, None]] = MISSING
        wanted.append(ids)
    tables: dict[str, list[Shard]] = {"chunks": [], "neighbours": [], "training": []}
    for number, (chunks, flags) in enumerate(made):
        packed = pack(chunks.chunk_ids, chunks.document_ids, chunks.n_tokens, flags, SLOTS)
        cut = np.ascontiguousarray(wanted[number][:, :K])
        answers = [answer(request, made[shard][0]) for shard, request in requests(cut, number).items()]
        training = assemble(packed, chunks, cut, answers, number)
        kinds = schemas.chunks(M, "uint16"), schemas.neighbours(STORED)
        columns = {"chunk_id": pa.array(chunks.chunk_ids), "document_id": chunks.document_ids}
        columns |= {"tokens": as_lists(chunks.tokens, kinds[0].field("tokens")), "n_tokens": chunks.n_tokens}
        ids = as_lists(wanted[number], kinds[1].field("neighbour_ids"), wanted[number] < 0)
        near = pa.table({"chunk_id": columns["chunk_id"], "neighbour_ids": ids})
        for name, table in (("chunks", pa.table(columns)), ("neighbours", near)):
            committed = storage.commit_table(f"{name}/{number:05d}.parquet", table, 64)
            tables[name].append(Shard.of(committed, number, table.num_rows))
        committed = write(storage, f"training/{number:05d}.parquet", training)
        tables["training"].append(Shard.of(committed, number, training.num_rows))
    return Manifest(tables={name: tuple(shards) for name, shards in tables.items()})


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return Storage(str(tmp_path_factory.mktemp("db")))


@pytest.fixture(scope="module")
def manifest(storage):
    return build(storage, SIZES)


def ids(samples) -> list[int]:
    return [int(i) for sample in samples for i in torch.atleast_1d(sample["sequence_id"])]


def stored_ids(split: str | None = "train", sizes: list[tuple[int, int]] = SIZES) -> list[int]:
    found = []
    for number, (training, validation) in enumerate(sizes):
        rows = range(training + validation)
        kept = {"train": rows[:training], "validation": rows[training:], None: rows}[split]
        found += [(number << 32) + row for row in kept]
    return found


@pytest.mark.parametrize("split", ["train", "validation", None])
def test_a_split_is_streamed_whole_in_order_and_nothing_of_the_other(storage, manifest, split):
    stream = TrainingDataset(storage, manifest, split)
    assert ids(stream) == stored_ids(split)
    assert len(stream) == len(stored_ids(split))


def test_samples_hold_exactly_what_the_columns_hold(storage, manifest):
    samples = iter(TrainingDataset(storage, manifest, None))
    for shard in manifest.shards("training"):
        for row in storage.read_table(shard.path).to_pylist():
            sample = next(samples)
            assert set(sample) == set(row) - {"split"}
            for name, values in row.items():
                if name != "split":
                    expected = [-1 if v is None else v for v in values] if isinstance(values, list) else values
                    assert sample[name].flatten().tolist() == (expected if isinstance(expected, list) else [expected])
                    assert sample[name].dtype == torch.int64
            assert sample["neighbour_tokens"].shape == (SLOTS, K, 2, M)
            assert sample["neighbour_lengths"].shape == (SLOTS, K, 2)
            assert sample["neighbour_ids"].shape == (SLOTS, K)
            assert (neighbour_mask(sample).sum(1) == sample["n_valid"]).all()
            assert int(token_mask(sample).sum()) == row["n_tokens"]
            assert not sample["tokens"][~token_mask(sample)].any()


def test_fewer_neighbours_are_the_first_ones_and_are_counted_anew(storage, manifest):
    for whole, cut in zip(
        TrainingDataset(storage, manifest), TrainingDataset(storage, manifest, neighbours=1), strict=True
    ):
        for name in ("neighbour_ids", "neighbour_tokens", "neighbour_lengths"):
            assert torch.equal(cut[name], whole[name][:, :1])
        assert torch.equal(cut["n_valid"], whole["n_valid"].clamp(max=1))
        assert torch.equal(cut["tokens"], whole["tokens"])


@settings(deadline=None, max_examples=25)
@given(
    world=st.integers(1, 9),
    workers=st.integers(1, 5),
    shuffle=st.booleans(),
    split=st.sampled_from(["train", "validation", None]),
)
def test_every_row_is_streamed_once_over_ranks_and_workers(storage, manifest, *, world, workers, shuffle, split):
    streams = [TrainingDataset(storage, manifest, split, r, world, shuffle=shuffle) for r in range(world)]
    seen = []
    for stream in streams:
        parts = [as_worker(stream, workers, w) for w in range(workers)]
        assert sum(map(len, parts)) == len(stream)
        assert len(stream) - stream.shortest in (0, 1)
        seen += itertools.chain(*parts)
    assert sorted(seen) == stored_ids(split)


def as_worker(stream: TrainingDataset, workers: int, worker: int) -> list[int]:
    """What a loader worker streams, without the process."""
    with posing_as(workers, worker):
        return ids(stream)


def posing_as(workers: int, worker: int):
    info = SimpleNamespace(num_workers=workers, id=worker)
    return mock.patch("retrodb.training.dataset.get_worker_info", return_value=info)


def test_more_ranks_than_rows_lose_and_double_nothing(tmp_path):
    small = Storage(str(tmp_path))
    made = build(small, [(2, 0), (1, 0)])
    seen = itertools.chain(*(ids(TrainingDataset(small, made, rank=r, world_size=7)) for r in range(7)))
    assert sorted(seen) == stored_ids("train", [(2, 0), (1, 0)])


def test_a_database_without_rows_streams_none(tmp_path):
    empty = Storage(str(tmp_path))
    assert ids(TrainingDataset(empty, build(empty, [(0, 0)]), shuffle=True)) == []


def test_shuffling_is_a_permutation_that_mixes_shards_and_changes_with_epoch_and_seed(storage, manifest):
    stream = TrainingDataset(storage, manifest, shuffle=True, seed=5)
    first, again = ids(stream), ids(stream)
    stream.set_epoch(1)
    second = ids(stream)
    assert first == again
    assert len({tuple(first), tuple(second), tuple(stored_ids())}) == 3
    assert sorted(first) == sorted(second) == stored_ids()
    assert ids(TrainingDataset(storage, manifest, shuffle=True, seed=6)) != first
    assert ids(TrainingDataset(storage, manifest, shuffle=True, seed=5, epoch=1)) == second
    assert len({i >> 32 for i in first[:40]}) > 1


def test_the_shuffled_order_is_this_one_on_every_machine():
    assert order.permutation(8, seed=3, epoch=1, stream=2).tolist() == [0, 6, 2, 7, 3, 4, 1, 5]


@given(st.integers(0, 200), st.integers(0, 2**64), st.integers(0, 5))
def test_permutations_are_permutations(size, seed, epoch):
    assert sorted(order.permutation(size, seed, epoch, 0).tolist()) == list(range(size))


@pytest.mark.parametrize("shuffle", [False, True])
def test_resuming_at_any_position_goes_on_exactly_and_the_next_pass_is_whole(storage, manifest, shuffle):
    make = {"shuffle": shuffle, "rank": 1, "world_size": 2, "shuffle_row_groups": 2}
    whole = ids(TrainingDataset(storage, manifest, **make))
    stream = TrainingDataset(storage, manifest, **make)
    running = iter(stream)
    for position in range(len(whole) + 1):
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = TrainingDataset(storage, manifest, **make)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        if position % 5 == 0 or position > len(whole) - 3:
            assert ids(resumed) == whole[position:]
            assert ids(resumed) == whole
        else:
            assert ids([next(iter(resumed))]) == [whole[position]]
        next(running, None)


def test_a_position_carries_its_epoch_and_a_new_epoch_starts_at_its_beginning(storage, manifest):
    stream = TrainingDataset(storage, manifest, shuffle=True, epoch=3)
    whole = ids(stream)
    running = iter(stream)
    for _ in range(20):
        next(running)
    resumed = TrainingDataset(storage, manifest, shuffle=True)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.epoch == 3
    assert ids(resumed) == whole[20:]
    resumed.load_state_dict(stream.state_dict())
    resumed.set_epoch(4)
    assert len(ids(resumed)) == len(whole)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"split": None}, {"rank": 1}, {"world_size": 3}, {"shuffle_row_groups": 3}]
)
def test_a_position_of_another_stream_is_refused(storage, manifest, other):
    arguments = {"shuffle": True, "world_size": 2}
    state = TrainingDataset(storage, manifest, **arguments).state_dict()
    with pytest.raises(MismatchError, match="Make the dataset with the arguments it had then"):
        TrainingDataset(storage, manifest, **(arguments | other)).load_state_dict(state)
    with pytest.raises(MismatchError, match="no position"):
        TrainingDataset(storage, manifest).load_state_dict({"step": 3})


def loaded(dataset: TrainingDataset, workers: int, batch: int, **options) -> list[list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer cores than workers
        return [ids([b]) for b in DataLoader(dataset, batch_size=batch, num_workers=workers, **options)]


@pytest.mark.slow
def test_a_loader_with_workers_streams_each_row_once_and_persistent_ones_see_the_epoch(storage, manifest):
    stream = TrainingDataset(storage, manifest, shuffle=True)
    loader = DataLoader(stream, batch_size=8, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        epochs.append(ids(loader))
    assert [sorted(e) for e in epochs] == [stored_ids(), stored_ids()]
    assert epochs[0] != epochs[1]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "batch", "drop_last"), [(0, 7, False), (2, 16, False), (3, 16, True)])
def test_a_plain_loader_goes_on_with_the_very_next_batch(storage, manifest, workers, batch, drop_last):
    arguments = {"split": "validation", "shuffle": True}
    whole = loaded(TrainingDataset(storage, manifest, **arguments), workers, batch, drop_last=drop_last)
    for done in {0, 1, 2, 4, len(whole) - 1, len(whole)}:
        dataset = TrainingDataset(storage, manifest, **arguments)
        state = dataset.state_after(done, batch, workers, drop_last=drop_last)
        dataset.load_state_dict(state)
        assert loaded(dataset, workers, batch, drop_last=drop_last) == whole[done:]
        if done == 1:
            assert loaded(dataset, workers, batch, drop_last=drop_last) == whole
    with pytest.raises(InputError, match=f"has {len(whole)} batches"):
        TrainingDataset(storage, manifest, **arguments).state_after(len(whole) + 1, batch, workers, drop_last=drop_last)


def test_a_worker_goes_on_from_the_position_it_gave_itself(storage, manifest):
    """As torchdata's StatefulDataLoader does: state_dict and load_state_dict in the worker."""
    states, rest = [], []
    for worker in range(3):
        with posing_as(3, worker):
            stream = TrainingDataset(storage, manifest)
            running = iter(stream)
            for _ in range(worker + 1):
                next(running)
            states.append(stream.state_dict())
            rest.append(ids(running))
    for worker in range(3):
        with posing_as(3, worker):
            stream = TrainingDataset(storage, manifest)
            stream.load_state_dict(states[worker])
            assert ids(stream) == rest[worker]
            stream.load_state_dict(states[(worker + 1) % 3])
            with pytest.raises(MismatchError, match="as many workers"):
                iter(stream)
    assert sum(map(len, rest)) + 6 == len(stored_ids())


def test_a_dataset_travels_to_a_spawned_worker(storage, manifest):
    assert ids(pickle.loads(pickle.dumps(TrainingDataset(storage, manifest)))) == stored_ids()


def test_the_manifest_may_say_how_many_rows_are_validation_and_no_split_is_read(storage, manifest, monkeypatch):
    counts = {str(number): validation for number, (_, validation) in enumerate(SIZES) if validation}
    known = manifest.with_stage("training", StageState("f", details={"validation_rows": counts}), {})
    monkeypatch.setattr(Storage, "read_table", None)
    assert ids(TrainingDataset(storage, known)) == stored_ids()
    assert ids(TrainingDataset(storage, known, "validation")) == stored_ids("validation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split is 'test'"),
        ({"rank": 2, "world_size": 2}, "rank is 2 and world_size 2"),
        ({"neighbours": 3}, "cannot join 3 neighbours a chunk: the database keeps 2"),
        ({"neighbours": 0}, "cannot join 0 neighbours"),
        ({"shuffle_row_groups": 0}, "shuffle_row_groups is 0"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(storage, manifest, arguments, message):
    with pytest.raises(InputError, match=message):
        TrainingDataset(storage, manifest, **arguments)


def test_a_database_without_training_shards_says_what_to_do(storage):
    with pytest.raises(InputError, match=r"has no training shards\. Finish it: retrodb build"):
        TrainingDataset(storage, Manifest())


# -- shards on disk ----------------------------------------------------------------------------------------------------


def with_codec(compression: str, group: int, **options):
    """A writer of training shards as another program might write them."""

    def write(storage: Storage, relative: str, table: pa.Table):
        def dump(sink) -> None:
            pq.write_table(table, sink, compression=compression, row_group_size=group, **options)

        return storage.commit(relative, dump)

    return write


@pytest.mark.parametrize(
    "write",
    [
        with_codec("zstd", 64, use_dictionary=False),
        with_codec("none", 64, use_dictionary=False),
        with_codec("snappy", 50),  # with dictionaries, and other row groups than ours
        with_codec("gzip", 1000, use_dictionary=False),
        with_codec("lz4", 7, use_dictionary=False, data_page_size=64, write_batch_size=8),
        with_codec("none", 64, use_dictionary=False, data_page_version="2.0"),
    ],
    ids=["zstd", "plain", "dictionary", "gzip", "pages", "v2"],
)
def test_any_parquet_encoding_and_row_groups_give_the_same_samples(storage, manifest, tmp_path, write):
    other = Storage(str(tmp_path))
    rewritten = build(other, SIZES, write)
    for shuffle in (False, True):
        ours, theirs = (TrainingDataset(s, m, shuffle=shuffle) for s, m in ((storage, manifest), (other, rewritten)))
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_our_own_shards_are_decoded_without_arrow_and_hold_one_row_group_at_most(storage, manifest):
    shard = TrainingShard(storage, manifest.shards("training")[0])
    for name in ("tokens", "neighbour_tokens"):
        direct = shard._direct(0, name, TRAINING_ROW_GROUP)
        assert direct is not None
        expected = storage.read_table(manifest.shards("training")[0].path)[name].slice(0, TRAINING_ROW_GROUP)
        assert direct.tolist() == expected.combine_chunks().flatten().tolist()
    groups = storage.open_parquet(manifest.shards("training")[0].path).metadata
    assert {groups.row_group(i).num_rows for i in range(groups.num_row_groups - 1)} == {TRAINING_ROW_GROUP}


def test_wide_tokens_survive(tmp_path):
    table = storage_table = schemas.training(SLOTS * M, M, K, "uint32")
    rng = np.random.default_rng(0)
    rows, columns = 3, {}
    for field in storage_table:
        if pa.types.is_fixed_size_list(field.type):
            high = 2**32 - 1 if field.type.value_type == pa.uint32() else 100
            values = rng.integers(0, high, (rows, field.type.list_size), endpoint=True)
            columns[field.name] = as_lists(values.astype(field.type.value_type.to_pandas_dtype()), field)
        else:
            columns[field.name] = pa.array(["train"] * rows if field.name == "split" else [5] * rows, field.type)
    folder = Storage(str(tmp_path))
    data = pa.table(columns, schema=table)
    shard = Shard.of(write_training(folder, "training/00000.parquet", data), 0, rows)
    opened = TrainingShard(folder, shard)
    assert opened._direct(0, "tokens", rows) is not None
    assert opened.read(0, rows)["tokens"].tolist() == data["tokens"].to_pylist()


def test_the_same_rows_give_the_same_bytes(storage, manifest, tmp_path):
    assert build(Storage(str(tmp_path)), SIZES).tables == manifest.tables


@pytest.mark.parametrize("harm", ["gone", "cut", "rows", "mixed splits", "other table"])
def test_a_damaged_shard_is_named(tmp_path, harm):
    folder = Storage(str(tmp_path))
    made = build(folder, [(70, 3), (70, 3)])
    path = tmp_path / "training" / "00001.parquet"
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif harm == "rows":
        pq.write_table(pq.read_table(path).slice(3), path)
    elif harm == "mixed splits":
        table = pq.read_table(path)
        pq.write_table(table.take(np.roll(np.arange(len(table)), 1)), path)
    else:
        path.write_bytes((tmp_path / "chunks" / "00001.parquet").read_bytes())
    with pytest.raises(DamagedError, match=r"training/00001\.parquet"):
        ids(TrainingDataset(folder, made))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_flipped_bytes_give_damage_or_other_numbers_and_never_another_error(tmp_path_factory, data):
    folder = Storage(str(tmp_path_factory.getbasetemp() / "flips"))
    shard = build(folder, [(9, 0)]).shards("training")[0]
    path = folder.path(shard.path)
    with open(path, "rb") as file:
        content = bytearray(file.read())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    folder.commit_bytes(shard.path, bytes(content))
    with contextlib.suppress(DamagedError):
        TrainingShard(folder, shard).read(0, 9)


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", None])
def test_a_table_with_the_k_of_the_build_equals_the_stream(storage, manifest, tmp_path, split):
    table = TrainingTable(storage, manifest, str(tmp_path), neighbours=K, split=split)
    stream = list(TrainingDataset(storage, manifest, split))
    assert len(table) == len(stream)
    for batch in (table.__getitems__(list(range(len(table)))), [table[i] for i in range(0, len(table))]):
        for a, b in zip(batch, stream, strict=True):
            assert set(a) == set(b)
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_table_joins_any_k_up_to_what_is_stored(storage, manifest, tmp_path):
    cut, whole = (TrainingTable(storage, manifest, str(tmp_path), neighbours=k, split=None) for k in (1, STORED))
    near = {}
    for shard in manifest.shards("neighbours"):
        rows = storage.read_table(shard.path).to_pylist()
        near |= {row["chunk_id"]: [-1 if i is None else i for i in row["neighbour_ids"]] for row in rows}
    for i in range(0, len(whole), 7):
        few, all_of_them = cut[i], whole[i]
        assert torch.equal(few["neighbour_tokens"], all_of_them["neighbour_tokens"][:, :1])
        for slot, chunk in enumerate(all_of_them["chunk_ids"].tolist()):
            assert all_of_them["neighbour_ids"][slot].tolist() == near.get(chunk, [-1] * STORED)
    with pytest.raises(InputError, match=f"cannot join {STORED + 1} neighbours"):
        TrainingTable(storage, manifest, str(tmp_path), neighbours=STORED + 1)


def test_a_cache_is_made_once_and_never_used_for_other_data(storage, manifest, tmp_path):
    cache = str(tmp_path / "cache")
    TrainingTable(storage, manifest, cache)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    TrainingTable(storage, manifest, cache)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    other = Storage(str(tmp_path / "other"))
    table = TrainingTable(other, build(other, [(4, 0)]), cache)
    assert len(table) == 4
    with pytest.raises(IndexError):
        table[4]


def test_a_loader_batches_a_table(storage, manifest, tmp_path):
    table = TrainingTable(storage, manifest, str(tmp_path))
    batches = list(DataLoader(table, batch_size=50))
    assert ids(batches) == stored_ids()
    assert batches[0]["neighbour_tokens"].shape == (50, SLOTS, K, 2, M)
    assert neighbour_mask(batches[0]).shape == (50, SLOTS, K)
    assert token_mask(batches[0]).shape == (50, SLOTS * M)
