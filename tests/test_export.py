"""Exports: another program's own reader gets what the database holds, and nothing is lost or let through unsaid."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from exporting import K, Known, M, N, S, build_small, known
from huggingface_hub import DatasetCard
from hypothesis import given, settings
from hypothesis import strategies as st
from support import build_here, manifest_of, retrodb, save_manifest, sha256, table_of, write_jsonl

from retrodb import export as formats
from retrodb import open as open_database
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.errors import InputError, MismatchError
from retrodb.export.megatron.sequences import in_sight, without_own_documents
from retrodb.export.retro_pytorch import Layout, document_rows
from retrodb.export.rows import ChunkRows, RowNumbers

EXPORTS = {
    "retro-pytorch": formats.export_retro_pytorch,
    "megatron": formats.export_megatron,
    "huggingface": formats.export_huggingface,
}
END = 50_256


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    return build_small(tmp_path_factory.mktemp("export"), tiny_encoder)


@pytest.fixture(scope="module")
def rows(small: Path) -> Known:
    return known(small)


def padded(tokens: list[int], size: int, padding: int) -> list[int]:
    return tokens + [padding] * (size - len(tokens))


# -- RETRO-pytorch ---------------------------------------------------------------------------------------------------


def retro_dataset(folder: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    from retro_pytorch.data import RETRODataset

    monkeypatch.chdir(folder)
    return RETRODataset(**json.loads((folder / f"{split}.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("keep_ids", [False, True])
def test_retro_pytorchs_own_dataset_reads_every_document_with_its_neighbours_and_their_continuations(
    keep_ids, small, rows, tmp_path, monkeypatch
):
    made = formats.export_retro_pytorch(open_database(str(small)), str(tmp_path / "out"), keep_ids=keep_ids)
    shift = 0 if keep_ids else 1
    end = END + shift

    def chunk(tokens: list[int]) -> list[int]:
        """A chunk as it is read: shifted; a last one that is not full tells the document's end."""
        written = [token + shift for token in tokens]
        return padded(written + [end] * (0 < len(written) < M), M, 0)

    for split in ("train", "validation"):
        dataset = retro_dataset(tmp_path / "out", split, monkeypatch)
        sequences = [ids[i : i + S] for ids in rows.documents[split] for i in range(0, len(ids), S)]
        assert len(dataset) == len(sequences) == made.counts[f"{split}_sequences"]
        for number, ids in enumerate(sequences):
            text, retrieved = (tensor.tolist() for tensor in dataset[number])
            tokens = [token + shift for one in ids for token in rows.tokens[one]]
            following = rows.continuation(ids[-1])
            tokens.append(following[0] + shift if following else end)
            assert text == padded(tokens, N + 1, 0)
            for slot, one in enumerate(ids):
                expected = [chunk(rows.tokens[n]) + chunk(rows.continuation(n)) for n in rows.neighbours[one][:2]]
                assert retrieved[slot] == expected + [[0] * 2 * M] * (2 - len(expected))
    zeros = sum(tokens.count(0) for tokens in rows.tokens.values())
    assert zeros >= 2
    assert list(made.left_out.values()) == ([zeros] if keep_ids else [])


def test_a_reader_of_the_training_documents_maps_no_row_of_a_validation_document(small, rows, tmp_path):
    formats.export_retro_pytorch(open_database(str(small)), str(tmp_path / "out"))
    train, validation = (json.loads((tmp_path / "out" / f"{split}.json").read_text()) for split in rows.documents)
    chunks = np.fromfile(tmp_path / "out" / "chunks.dat", np.int32).reshape(-1, M + 1)
    neighbours = np.fromfile(tmp_path / "out" / "chunks.knn.dat", np.int32).reshape(-1, 2)
    assert len(chunks) == len(neighbours) == validation["num_chunks"] + S
    mapped = train["num_chunks"] + S
    held_out = {tuple(t + 1 for t in rows.tokens[one]) for ids in rows.documents["validation"] for one in ids}
    full = {tokens for tokens in held_out if len(tokens) == M}
    assert full <= {tuple(row[:M]) for row in chunks[mapped:].tolist()}
    assert not full & {tuple(row[:M]) for row in chunks[:mapped].tolist()}
    assert neighbours.max() < train["num_chunks"]
    assert (neighbours[train["num_chunks"] : mapped] == -1).all()
    assert (chunks[train["num_chunks"] : mapped] == 0).all()


def test_a_last_chunk_that_is_full_is_followed_by_a_row_that_ends_the_document():
    tokens = np.array([[5, 6], [7, 0], [8, 9], [3, 4], [1, 2]], np.uint16)
    is_last = np.array([False, True, True, False, True])
    zeros = np.zeros(5, np.int64)
    chunks = ChunkRows(
        zeros, zeros, np.array([0, 1, 0, 0, 1]), tokens, np.array([2, 1, 2, 2, 2]), is_last, is_last & False
    )
    made = document_rows(chunks, Layout(chunk_tokens=2, per_sequence=2, neighbours=1, end=99, shift=1), first=10)
    assert made.tokens.tolist() == [[6, 7, 8], [8, 99, 0], [9, 10, 99], [99, 0, 0], [4, 5, 2], [2, 3, 99], [99, 0, 0]]
    assert made.rows.tolist() == [10, 11, 12, 14, 15]
    assert made.begins.tolist() == [10, 12, 14]


def test_more_rows_than_int32_counts_and_an_end_that_stands_in_a_text_are_refused(small, rows, tmp_path, monkeypatch):
    database = open_database(str(small))
    inside = rows.tokens[rows.documents["train"][5][0]][3]
    for write in (formats.export_retro_pytorch, formats.export_megatron):
        with pytest.raises(InputError, match=f"holds token {inside}.*--eos-id"):
            write(database, str(tmp_path / "out"), eos_id=inside)
    with pytest.raises(InputError, match="keeps 6 neighbours"):
        formats.export_retro_pytorch(database, str(tmp_path / "out"), neighbours=7)
    with pytest.raises(InputError, match="--eos-id 0"):
        formats.export_retro_pytorch(database, str(tmp_path / "out"), eos_id=0, keep_ids=True)
    monkeypatch.setattr("retrodb.export.retro_pytorch.MOST_ROWS", 90)
    with pytest.raises(InputError, match="int32"):
        formats.export_retro_pytorch(database, str(tmp_path / "out"), eos_id=60)
    assert list(tmp_path.iterdir()) == []


# -- Megatron-LM -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_megatrons_own_retro_dataset_reads_the_text_in_its_order_with_neighbours_of_no_document_in_sight(
    small, rows, tmp_path, monkeypatch
):
    pytest.importorskip("megatron.core", reason="megatron-core is for Linux")
    monkeypatch.setattr("retrodb.export.megatron.project.BLOCK_ROWS", 56)  # several files, the last one not full
    project = tmp_path / "project"
    made = formats.export_megatron(open_database(str(small)), str(project), batch_size=2)
    reader = Path(__file__).with_name("megatron_reader.py")
    command = [sys.executable, reader, project, tmp_path / "cache", tmp_path / "read.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    read = np.load(tmp_path / "read.npz")
    removed = 0
    for split, name in (("train", "train"), ("validation", "valid")):
        slots: list[int | None] = []
        for ids in rows.documents[split]:
            slots += [*ids, *([None] if len(rows.tokens[ids[-1]]) == M else [])]
        slots += [None] * (-len(slots) % S)
        stream = [padded(rows.tokens[one] if one is not None else [], M, END) for one in slots]
        documents = [rows.document[one] if one is not None else None for one in slots]
        text = {}
        for first in range(0, len(slots), S):
            after = stream[first + S][0] if first + S < len(slots) else END
            own = set(documents[first : first + S + 1]) - {None}
            retrieved = []
            for one in slots[first : first + S]:
                every = rows.neighbours[one] if one is not None else []
                kept = [n for n in every if rows.document[n] not in own]
                removed += len(every) - len(kept)
                pairs = [padded(rows.tokens[n], M, END) + padded(rows.continuation(n), M, END) for n in kept[:2]]
                retrieved.append(pairs + [[END] * 2 * M] * (2 - len(pairs)))
            text[(*itertools.chain(*stream[first : first + S]), after)] = retrieved
        samples = (read[f"{name}_text"].tolist(), read[f"{name}_neighbours"].tolist())
        found = {tuple(row): near for row, near in zip(*samples, strict=True)}
        left = made.left_out.get("validation sequences beyond whole batches", 0) if split == "validation" else 0
        assert len(found) == len(text) - left == made.counts[f"{split}_samples"]
        assert all(text[row] == near for row, near in found.items())
    assert made.left_out["neighbours whose document is in the same sequence"] == removed > 0


def test_the_files_of_a_retro_project_have_the_fields_that_megatron_lm_defines(small, rows, tmp_path):
    import h5py

    formats.export_megatron(open_database(str(small)), str(tmp_path / "project"))
    config = json.loads((tmp_path / "project" / "config.json").read_text())
    assert config["retro_gpt_train_samples"] * S == sum(
        int(path.stem.split("-")[1]) - int(path.stem.split("-")[0])
        for path in (tmp_path / "project" / "query" / "train").iterdir()
    )
    about = json.loads((tmp_path / "project" / "db" / "indexed_dataset_infos.json").read_text())[0]
    for name, split in (("train", "train"), ("valid", "validation")):
        chunk_count = sum(map(len, rows.documents[split]))
        with h5py.File(tmp_path / "project" / "db" / "merged" / f"{name}.hdf5") as file:
            chunks = file["chunks"][:]
            assert chunks.dtype == np.uint32
            assert file["n_written"].dtype == np.uint64
            assert len(chunks) == file["n_written"][0] == 1 + chunk_count + len(rows.documents[split])
            if split == "train":
                ends = file["doc_offsets"][:]
                assert ends.dtype == np.uint64
                assert ends.shape == (about["n_docs_train"], 3)
                assert ends[-1].tolist() == [0, about["n_docs_train"] - 1, about["n_chunks_train"]]
        # What -1 and a last chunk's continuation lead to: rows without tokens.
        assert (chunks[[0, -1], 2] == chunks[[0, -1], 3]).all()
        behind = np.flatnonzero(np.diff(chunks[:, 1])) if split == "train" else [len(chunks) - 1]
        assert (chunks[behind, 2] == chunks[behind, 3]).all()
    for path in (tmp_path / "project" / "query").glob("*/*.hdf5"):
        with h5py.File(path) as file:
            assert file["neighbors"].dtype == np.int64
            assert file["neighbors"].shape[1] == K


@settings(deadline=None)
@given(
    sequence=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    neighbours=st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), min_size=3, max_size=3),
)
def test_neighbours_out_of_a_sequences_documents_leave_and_the_others_move_up(sequence, neighbours):
    documents = np.array([sequence])
    near = np.array([neighbours])
    ids = np.where(near == -1, -1, near * 10 + np.arange(3))
    kept, removed = without_own_documents(documents, ids, near)
    for slot in range(3):
        stay = [i for i, d in zip(ids[0, slot], near[0, slot], strict=True) if i != -1 and d not in sequence]
        assert kept[0, slot].tolist() == padded(stay, 3, -1)
    assert removed == (ids != -1).sum() - (kept != -1).sum()


def test_a_sequence_has_in_sight_its_own_documents_and_the_one_that_its_last_target_is_from():
    assert in_sight(np.array([4, 4, 5, 6, 7]), 2).tolist() == [[4, 4, 5], [5, 6, 7]]


def test_a_batch_larger_than_a_split_and_a_missing_h5py_are_told(small, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"less than a batch of 1,000.*--batch-size"):
        formats.export_megatron(open_database(str(small)), str(tmp_path / "out"), batch_size=1_000)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"pip install 'retrodb\[megatron\]'"):
        formats.export_megatron(open_database(str(small)), str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# -- Hugging Face ----------------------------------------------------------------------------------------------------


def has_datasets_dtype(kind: pa.DataType) -> bool:
    """Whether ``datasets`` has a feature for an Arrow type (``_arrow_to_datasets_dtype`` in its ``features.py``)."""
    if pa.types.is_fixed_size_list(kind):
        return has_datasets_dtype(kind.value_type)
    named = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(test(kind) for test in named) or kind in (pa.string(), pa.large_string(), pa.binary())


def test_the_card_names_every_file_and_the_files_hold_every_row_by_split(small, rows, tmp_path):
    out = tmp_path / "my-set"
    made = formats.export_huggingface(open_database(str(small)), str(out), licence="cc-by-sa-4.0")
    card = DatasetCard.load(out / "README.md")
    assert card.data.pretty_name == "my-set"
    assert card.data.license == "cc-by-sa-4.0"
    files = {path for path in out.rglob("*") if path.is_file() and path.name != "README.md"}
    named: list[Path] = []
    validation = {rows.document[ids[0]] for ids in rows.documents["validation"]}
    for config in card.data.configs:
        table = config["config_name"]
        split_of = {row["document_id"]: row["split"] for row in table_of(small, "documents").to_pylist()}
        whole = table_of(small, table)
        assert config.get("default", False) == (table == "training")
        for data in config["data_files"]:
            found = sorted(out.glob(data["path"]))
            assert [path.name for path in found] == [
                f"{data['split']}-{i:05d}-of-{len(found):05d}.parquet" for i in range(len(found))
            ]
            named += found
            got = pa.concat_tables([pq.read_table(path) for path in found])
            if "split" in whole.column_names:
                split = whole["split"].to_pylist()
            else:
                ids = whole["chunk_id"].to_pylist()
                split = ["validation" if rows.document[one] in validation else "train" for one in ids]
            assert all(has_datasets_dtype(field.type) for field in got.schema)
            exported = whole.drop_columns([name for name in ("sketch",) if name in whole.column_names])
            assert got.to_pylist() == exported.filter(pa.array([one == data["split"] for one in split])).to_pylist()
            assert made.counts[f"{table}_{data['split']}"] == len(got)
        assert len(split_of) == len(rows.documents["train"]) + len(validation)
    assert sorted(named) == sorted(files)


def test_a_dataset_goes_to_an_object_store_whole_or_not_at_all(small, tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    made = formats.export_huggingface(open_database(str(small)), "memory://bucket/set")
    assert store.exists("/bucket/set/README.md")
    assert made.bytes == sum(entry["size"] for entry in store.find("/bucket/set", detail=True).values())

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        formats.export_huggingface(open_database(str(small)), "memory://bucket/other", advance=stop)
    assert store.find("/bucket/other") == []
    with pytest.raises(InputError, match="not an empty folder"):
        formats.export_huggingface(open_database(str(small)), "memory://bucket/set")


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", EXPORTS)
def test_an_export_appears_whole_or_not_at_all_and_twice_the_same(form, small, tmp_path):
    seen = 0

    def stop(rows: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EXPORTS[form](open_database(str(small)), str(tmp_path / "deep" / "out"), advance=stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a" / "out").mkdir(parents=True)  # an empty folder will do
    made = [EXPORTS[form](open_database(str(small)), str(tmp_path / place / "out")) for place in "ab"]
    contents = [
        {str(path.relative_to(one.path)): sha256(path) for path in Path(one.path).rglob("*") if path.is_file()}
        for one in made
    ]
    assert contents[0] == contents[1]
    assert not [name for name in contents[0] if "tmp" in name or name.endswith(".lengths")]
    assert made[0].bytes == sum(path.stat().st_size for path in Path(made[0].path).rglob("*") if path.is_file())


@pytest.mark.parametrize("form", EXPORTS)
def test_a_database_that_is_rebuilt_meanwhile_is_noticed(form, small, tmp_path):
    shutil.copytree(small, tmp_path / "db")

    def rebuild(rows: int) -> None:
        manifest = manifest_of(tmp_path / "db")
        for shard in manifest["tables"]["neighbours"]["shards"]:
            shard["sha256"] = "0" * 64
        save_manifest(tmp_path / "db", manifest)

    with pytest.raises(MismatchError, match="Open the database again"):
        EXPORTS[form](open_database(str(tmp_path / "db")), str(tmp_path / "out"), advance=rebuild)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", EXPORTS)
def test_nothing_is_written_over_nor_into_the_database(form, small, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for place in (tmp_path / "full", tmp_path / "full" / "mine"):
        with pytest.raises(InputError, match="not an empty folder"):
            EXPORTS[form](open_database(str(small)), str(place))
    with pytest.raises(InputError, match="inside the database"):
        EXPORTS[form](open_database(str(small)), str(small / "out"))
    if form != "huggingface":
        with pytest.raises(InputError, match="local folder"):
            EXPORTS[form](open_database(str(small)), "memory://bucket/out")


@pytest.mark.parametrize("form", ["retro-pytorch", "megatron"])
def test_blocks_are_no_sequences_of_consecutive_chunks(form, tiny_encoder, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", quickstart_lines()[:2])
    out = tmp_path / "db"
    build_here([source], out, unit="block", chunk_tokens=64, encoder=str(tiny_encoder), until="chunk")
    with pytest.raises(InputError, match="is a database of blocks .*--unit chunk"):
        EXPORTS[form](open_database(str(out)), str(tmp_path / "out"))


def test_rows_are_found_by_id_also_where_a_shard_was_compacted(tmp_path):
    numbers = RowNumbers(tmp_path / "rows")
    numbers.append(0, np.array([0, 3, 4]), np.array([7, 8, -1]))
    numbers.append(5, (5 << 32) + np.array([1]), np.array([9]))
    assert numbers.of(np.array([[3, -1], [(5 << 32) + 1, 0]])).tolist() == [[8, -1], [9, 7]]
    for gone in (1, 4, 5, 2 << 32, (5 << 32) + 2, 9 << 32):
        with pytest.raises(Exception, match=f"chunk {gone}"):
            numbers.of(np.array([3, gone]))
    numbers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_line_tells_what_it_did_and_what_a_format_does_not_take(small, rows, tmp_path):
    done = retrodb("export", small, "--to", "retro-pytorch", "--out", tmp_path / "out", "--keep-ids", "--json")
    assert done.code == 0, done.err
    assert done.json["counts"]["train_sequences"] > 0
    zeros = sum(tokens.count(0) for tokens in rows.tokens.values())
    assert done.json["left_out"] == {"tokens of id 0, which a reader takes for padding": zeros}
    wrong = retrodb("export", small, "--to", "huggingface", "--out", tmp_path / "no", "--batch-size", 4)
    assert (wrong.code, "--batch-size says nothing" in wrong.err) == (2, True)
    assert retrodb("export", small, "--to", "megatron", "--out", tmp_path / "out").code == 3
