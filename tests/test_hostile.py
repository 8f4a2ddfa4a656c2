"""Hostile databases: nothing outside the folder is followed, overwritten or deleted, and nothing moves the cursor."""

import hashlib
import os
import pickle
import re
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import build_here, manifest_of, retrodb, save_manifest, stamps, write_jsonl

from retrodb.chunking.tokenizer import load_tokenizer
from retrodb.cli.echo import printable
from retrodb.cli.render import heading
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.database import Database
from retrodb.encoding import identify, resolve_encoder
from retrodb.errors import DamagedError, InputError, MismatchError
from retrodb.manifest import STAGES, Manifest
from retrodb.storage import Storage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    lines = [line for line in quickstart_lines() if len(line) < 3_000][:6]
    return write_jsonl(tmp_path_factory.mktemp("hostile") / "in.jsonl", lines)


def again(source: Path, out: Path, encoder: Path):
    return build_here([source], out, encoder=str(encoder), shard_bytes="4KiB", precision="fp32").done


@pytest.fixture(scope="module")
def whole(source, tiny_encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "db"
    again(source, out, tiny_encoder)
    return out


@pytest.fixture
def database(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "db"))


def contents(folder: Path) -> dict[str, str]:
    return {name: digest for name, (_, digest) in stamps(folder).items()}


def test_a_lock_that_is_a_link_is_refused_and_what_it_names_is_left_alone(source, tiny_encoder, database, tmp_path):
    (tmp_path / "victim").write_text("precious")
    (database / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="is a link"):
        again(source, database, tiny_encoder)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("folder", ["chunks", "embeddings", "reports"])
def test_a_folder_that_is_a_link_is_refused_and_nothing_behind_it_is_touched(
    source, tiny_encoder, database, tmp_path, folder
):
    outside = Path(shutil.move(database / folder, tmp_path / "outside"))
    (outside / "00099.parquet").write_text("someone else's")
    (database / folder).symlink_to(outside)
    before = stamps(outside)
    with pytest.raises(DamagedError, match="is a link"):
        again(source, database, tiny_encoder)
    ran = retrodb("verify", database)
    assert (ran.code, "is a link" in ran.err) == (4, True)
    assert stamps(outside) == before


def test_a_shard_that_is_a_link_is_no_shard_and_is_made_again(source, whole, tiny_encoder, database, tmp_path):
    shard = database / "chunks" / "00000.parquet"
    outside = Path(shutil.move(shard, tmp_path / "outside.parquet"))
    shard.symlink_to(outside)
    before = outside.read_bytes()
    ran = retrodb("verify", database)
    assert (ran.code, "chunks/00000.parquet" in ran.err) == (4, True)
    assert retrodb("show", database, 0).code == 4
    again(source, database, tiny_encoder)
    assert not shard.is_symlink()
    assert outside.read_bytes() == before
    assert contents(database) == contents(whole)


def test_a_work_folder_that_is_a_link_costs_nothing_behind_it(source, tiny_encoder, database, tmp_path):
    (tmp_path / "outside" / "scan-x").mkdir(parents=True)
    (tmp_path / "outside" / "scan-x" / "precious").write_text("precious")
    (database / ".build").symlink_to(tmp_path / "outside")
    with pytest.raises(DamagedError, match="is a link"):
        again(source, database, tiny_encoder)
    assert (tmp_path / "outside" / "scan-x" / "precious").exists()


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_not_waited_for(database):
    (database / "manifest.json").unlink()
    os.mkfifo(database / "manifest.json")
    ran = retrodb("info", database, timeout=60)
    assert (ran.code, "Traceback" in ran.err) == (4, False)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "null", "[]", "\x00"])
def test_a_manifest_of_any_depth_is_refused_in_words(database, text):
    (database / "manifest.json").write_text(text)
    for command in ("info", "verify"):
        ran = retrodb(command, database)
        assert ran.code in (3, 4)
        assert "Traceback" not in ran.err


@pytest.mark.parametrize("hint", ["not json", '{"paths": 5}', "[" * 100_000, "5"])
def test_a_hint_of_damage_that_cannot_be_read_stops_no_build(source, tiny_encoder, database, hint):
    (database / "reports" / "damage.json").write_text(hint)
    again(source, database, tiny_encoder)
    assert not (database / "reports" / "damage.json").exists()


def test_a_histogram_of_no_length_gives_no_traceback(database):
    manifest = manifest_of(database)
    manifest["stages"]["report"]["details"]["histograms"]["train"] = [1]
    save_manifest(database, manifest)
    with pytest.raises(DamagedError, match="malformed"):
        Database.open(str(database)).summary()


@pytest.mark.parametrize("stage", ["chunk", "index", "neighbours", "report"])
def test_a_manifest_that_says_nonsense_of_a_stage_gives_no_traceback(database, stage):
    import json

    manifest = manifest_of(database)
    manifest["stages"][stage]["counts"] = [1]
    manifest["stages"][stage]["details"] = "x"
    (database / "manifest.json").write_text(json.dumps(manifest))
    ran = retrodb("info", database)
    assert ran.code in (0, 4)
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    "change",
    [
        lambda stages, prints: stages["index"]["details"].pop("metric"),
        lambda stages, prints: stages["index"]["details"].update(n_lists=None, key=[]),
        lambda stages, prints: stages["neighbours"].update(details={}),
        lambda stages, prints: prints["encoder"].pop("dimension"),
    ],
)
def test_a_search_by_a_manifest_that_does_not_say_how_is_refused_in_words(database, change):
    manifest = manifest_of(database)
    change(manifest["stages"], manifest["fingerprints"])
    save_manifest(database, manifest)
    with pytest.raises(DamagedError, match="malformed"):
        Database.open(str(database)).search(np.zeros(32))


@pytest.mark.parametrize("length", [1 << 70, -1])
def test_a_manifest_that_calls_an_input_endless_is_not_believed(source, tiny_encoder, database, length):
    """Pieces of a shard's size would be planned without end. The file is read instead, and found to be as it was."""
    manifest = manifest_of(database)
    manifest["inputs"][0]["length"] = length
    save_manifest(database, manifest)
    flags = ("--encoder", tiny_encoder, "--shard-bytes", "4KiB", "--precision", "fp32")
    done = retrodb("build", source, "--out", database, *flags, "--dry-run", timeout=120)
    assert done.code == 0, done.err
    assert done.out.count("up to date") == len(STAGES)


def test_an_encoder_that_asks_for_code_of_its_own_is_refused(tiny_encoder, tmp_path):
    """A database names its encoder, which may be a folder inside it."""
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "db" / "encoder"))
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "db.encoder.evil.Module"}]')
    with pytest.raises(InputError, match="asks for the code"):
        identify(resolve_encoder(str(folder)), "fp32")


def test_a_tokenizer_that_never_ends_is_refused(tmp_path):
    """A database without text names the tokenizer that its readers load."""
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(1 << 40)
    for endless in ("/dev/zero", tmp_path / "pipe.json", tmp_path / "huge.json"):
        with pytest.raises(InputError, match="no regular file"):
            load_tokenizer(str(endless))


def test_no_title_passes_for_lines_of_ours():
    forged = {"title": "Dogs\n2. Cats  [distance 0.0000, chunk 7]", "key": "k"}
    assert heading(forged) == "Dogs 2. Cats [distance 0.0000, chunk 7]"
    assert len(heading({"title": None, "key": "k" * 1_000_000})) <= 200


def test_no_text_of_a_document_moves_the_cursor(tiny_encoder, tmp_path):
    evil = "\x1b]0;pwned\x07 \x1b[2J \x9b31m \u202e reversed"
    records = [{"id": f"k\x1b[31m{n}", "title": evil, "text": f"{evil} number {n} of some words"} for n in range(3)]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    again(source, tmp_path / "db", tiny_encoder)
    unsafe = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
    for command in (["info"], ["show", 0], ["query", "words"], ["query", "words", "--json"], ["show", 0, "--json"]):
        ran = retrodb(command[0], tmp_path / "db", *command[1:])
        assert ran.code == 0, ran.err
        assert not unsafe.search(ran.out), command
    (tmp_path / "db" / "chunks" / "\x1b[2Jx").write_text("stray")
    ran = retrodb("verify", tmp_path / "db")
    assert (ran.code, unsafe.search(ran.out + ran.err)) == (4, None)


def test_what_is_printable_stays():
    assert printable("Größe\t中文 🙂\n") == "Größe\t中文 🙂\n"
    assert printable("\x1b[2J\x9b\u202e") == "\\x1b[2J\\u009b\\u202e"


# -- a reader and a build ----------------------------------------------------------------------------------------------


def test_a_database_that_is_rebuilt_under_its_reader_never_gives_a_mix(source, tiny_encoder, database):
    """What was opened is read on; what has changed since is refused in words; what has not is read."""
    db, stream = Database.open(str(database)), Database.open(str(database)).training()
    before = db.chunk(0)
    vectors = np.array(db.embeddings(0))
    mapped = db.embeddings(0)
    build_here([source], database, encoder=str(tiny_encoder), shard_bytes="4KiB", precision="fp32", chunk_tokens=32)
    assert (mapped == vectors).all()
    assert db.chunk(0) == before
    assert db.document(1).key
    for reading in (
        lambda: db.embeddings(0),
        lambda: db.chunk(1 << 32),
        lambda: db.search("words"),
        lambda: list(stream),
    ):
        with pytest.raises(MismatchError, match=r"Open the database again"):
            reading()
    assert Database.open(str(database)).chunk(0).tokens[:32] == before.tokens[:32]


def test_a_reader_in_another_process_keeps_its_picture(database):
    db = pickle.loads(pickle.dumps(Database.open(str(database)).storage))
    manifest = Manifest.load(Storage(str(database)))
    assert manifest is not None
    manifest.without(["training"], ["training"]).save(Storage(str(database)), manifest)
    with pytest.raises(MismatchError, match=r"training/00000.parquet is no longer"):
        db.read_table("training/00000.parquet")
    assert db.read_table("chunks/00000.parquet").num_rows


# -- what swells or leads out as it is read ----------------------------------------------------------------------------


def sealed(database: Path, table: str, number: int) -> None:
    """Make the manifest say that a changed shard is what was built."""
    manifest = manifest_of(database)
    for shard in manifest["tables"][table]["shards"]:
        if shard["path"].split("/")[-1].startswith(f"{number:05d}"):
            data = (database / shard["path"]).read_bytes()
            shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    save_manifest(database, manifest)


@pytest.mark.parametrize("key", ["Flat", "IVF2,Flat"])
def test_an_index_whose_lists_lie_in_another_file_is_refused_before_that_is_opened(
    source, tiny_encoder, database, tmp_path, key
):
    if key != "Flat":
        again_with = {"shard_bytes": "4KiB", "precision": "fp32", "index_key": key}
        build_here([source], database, encoder=str(tiny_encoder), **again_with)
    vectors = np.load(database / "embeddings" / "00000.npy").astype(np.float32)
    index = faiss.index_factory(vectors.shape[1], "IVF2,Flat")
    index.train(vectors)
    lists = faiss.OnDiskInvertedLists(2, index.code_size, str(tmp_path / "elsewhere"))
    index.replace_invlists(lists)
    index.add_with_ids(vectors, np.arange(len(vectors)))
    faiss.write_index(index, str(database / "index" / "00000.faiss"))
    (tmp_path / "elsewhere").unlink()
    os.mkfifo(tmp_path / "elsewhere")  # opening it would wait for ever
    sealed(database, "index", 0)
    for command in (["query", database, "words"], ["verify", database]):
        ran = retrodb(*command, timeout=120)
        assert (ran.code, "no index that retrodb writes" in ran.err) == (4, True), ran.err


def test_an_index_that_says_it_is_endless_allocates_nothing(database):
    path = database / "index" / "00000.faiss"
    data = bytearray(path.read_bytes())
    at = data.index(b"IxSQ")
    vectors = np.load(database / "embeddings" / "00000.npy")
    codes = data.index(vectors[0].tobytes(), at)
    data[codes - 8 : codes] = (1 << 38).to_bytes(8, "little")
    path.write_bytes(bytes(data))
    sealed(database, "index", 0)
    ran = retrodb("query", database, "words")
    assert (ran.code, "Traceback" in ran.err) == (4, False), ran.err


@pytest.mark.parametrize("bomb", ["a dictionary", "many rows"])
def test_a_parquet_shard_that_swells_as_it_is_read_is_refused(database, bomb):
    path = database / "documents" / "00000.parquet"
    table = pq.read_table(path)
    if bomb == "a dictionary":
        text = pa.DictionaryArray.from_arrays(np.zeros(30_000, np.int32), pa.array(["a" * 50_000], pa.large_string()))
        rows = pa.concat_tables([table.slice(0, 1)] * 30_000).set_column(
            table.schema.get_field_index("text"), "text", text
        )
        pq.write_table(rows, path, use_dictionary=["text"])
    else:
        rows = pa.concat_tables([table.slice(0, 1)] * 200_000).combine_chunks()
        pq.write_table(rows, path, use_dictionary=False, compression="zstd", row_group_size=200_000)
    sealed(database, "documents", 0)
    for command in (["show", database, 0], ["verify", database]):
        ran = retrodb(*command)
        assert (ran.code, "was not written by retrodb" in ran.err) == (4, True), ran.err


def test_an_extra_shard_is_named_and_removed_and_someones_own_file_is_named_and_left(source, tiny_encoder, database):
    for name in ("chunks/extra.parquet", "chunks/deep/00000.parquet", "index/copy of 00000.faiss"):
        (database / name).parent.mkdir(exist_ok=True)
        shutil.copy(database / "chunks" / "00000.parquet", database / name)
    (database / "chunks" / "notes.txt").write_text("someone's own")
    ran = retrodb("verify", database)
    assert ran.code == 4
    for name in ("chunks/extra.parquet", "chunks/deep/00000.parquet", "index/copy of 00000.faiss", "chunks/notes.txt"):
        assert name in ran.err
    again(source, database, tiny_encoder)
    ran = retrodb("verify", database)
    assert (ran.code, "extra.parquet" in ran.err, "notes.txt" in ran.err, "remove it" in ran.err) == (4, False, 1, 1)
    (database / "chunks" / "notes.txt").unlink()
    assert retrodb("verify", database).code == 0


def test_a_file_committed_again_with_the_same_bytes_is_left_as_it_was(tmp_path):
    storage = Storage(str(tmp_path))
    storage.commit_bytes("a/b", b"same")
    before = stamps(tmp_path)
    storage.commit_bytes("a/b", b"same")
    assert stamps(tmp_path) == before
    storage.commit_bytes("a/b", b"else")
    assert (tmp_path / "a" / "b").read_bytes() == b"else"
