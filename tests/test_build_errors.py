"""What a user can do wrong: one clear message, the right exit code, no traceback, nothing created or harmed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import Ran, build_here, retrodb, stamps, write_jsonl

import retrodb as retrodb_package
from retrodb import cli
from retrodb.errors import InputError

pytestmark = pytest.mark.slow

GOOD = {"id": "a", "text": "A text long enough to be cut into a chunk or two. " * 8}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "good.jsonl", [GOOD])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_encoder) -> Path:
    """A small database; never to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    source = write_jsonl(folder / "in.jsonl", [{**GOOD, "id": str(i), "text": GOOD["text"] + str(i)} for i in range(5)])
    build_here([source], folder / "db", encoder=str(tiny_encoder))
    return folder / "db"


def assert_refused(ran: Ran, code: int, *says: object) -> None:
    """The exit code, and one message on stderr that tells what it is about."""
    assert ran.code == code, f"exit {ran.code}\n{ran.out}\n{ran.err}"
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert len(re.findall(r"^error: |^Error: ", ran.err, flags=re.MULTILINE)) == 1, ran.err
    flat = re.sub(r"\s+", " ", ran.err)
    for text in says:
        assert str(text) in flat, f"{text!r} is not in: {flat}"


def refused_build(tmp_path: Path, code: int, arguments: list[object], *says: object) -> None:
    """`build` refuses, and neither the database nor anything else has come to be or changed."""
    out = tmp_path / "new" / "db"
    before = stamps(tmp_path)
    assert_refused(retrodb("build", *arguments, "--out", out, HF_HUB_OFFLINE="1"), code, *says)
    assert stamps(tmp_path) == before
    assert not out.exists()
    assert not out.parent.exists(), "the parent folder of --out was created and left behind"


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_a_missing_input_is_named(tmp_path):
    refused_build(tmp_path, 3, [tmp_path / "nowhere.jsonl"], "nowhere.jsonl")


def test_a_missing_input_beside_a_good_one_is_refused_too(tmp_path, good):
    refused_build(tmp_path, 3, [good, tmp_path / "nowhere.jsonl"], "nowhere.jsonl")


def test_a_glob_that_matches_nothing_is_refused(tmp_path):
    refused_build(tmp_path, 3, [tmp_path / "*.jsonl"], "*.jsonl")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    refused_build(tmp_path, 3, [tmp_path / "empty.jsonl"], "empty.jsonl", "empty")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    refused_build(tmp_path, 3, [tmp_path / "folder"], "folder")


def test_a_folder_without_a_readable_kind_of_file_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "picture.png").write_bytes(b"\x89PNG")
    refused_build(tmp_path, 3, [tmp_path / "folder"], "folder", ".jsonl")


def test_a_file_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "sheet.xlsx").write_bytes(b"PK")
    refused_build(tmp_path, 3, [tmp_path / "sheet.xlsx"], "sheet.xlsx", ".parquet")


def test_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    refused_build(tmp_path, 3, [tmp_path / "link.jsonl"], "link.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_the_permission_to_read_it_is_refused(tmp_path, good):
    good.chmod(0)
    refused_build(tmp_path, 3, [good], "good.jsonl", "ermission")


def test_an_unknown_filesystem_is_refused(tmp_path):
    refused_build(tmp_path, 3, ["nosuchfs://bucket/a.jsonl"], "nosuchfs")


def test_a_corpus_without_one_usable_record_is_refused_with_the_reasons(tmp_path):
    source = write_jsonl(tmp_path / "bad.jsonl", ["not json", '{"id": 1}', '{"text": null}', '{"text": "  "}'])
    refused_build(tmp_path, 3, [source], "bad.jsonl", "4 records", "--text-field")


def test_a_corpus_without_one_token_is_refused_and_what_is_left_is_as_it_is_recorded(tmp_path, tiny_encoder):
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": "a", "text": "\u200b"}])
    flags = ("--encoder", tiny_encoder, "--tokenizer", "encoder")
    assert_refused(retrodb("build", source, "--out", tmp_path / "db", *flags), 3, "no token in any document")
    assert retrodb("verify", tmp_path / "db").code == 0


def test_a_file_that_only_pretends_to_be_parquet_is_refused(tmp_path):
    (tmp_path / "fake.parquet").write_bytes(b"this is not a parquet file, but it is long enough to look at")
    refused_build(tmp_path, 3, [tmp_path / "fake.parquet"], "fake.parquet")


def test_a_text_field_that_no_record_has_is_refused_and_named(tmp_path, good):
    refused_build(tmp_path, 3, [good, "--text-field", "prose"], "prose", "good.jsonl")


def test_inputs_that_all_lie_in_the_database_are_refused(tmp_path, finished):
    before = stamps(finished)
    assert_refused(retrodb("build", finished / "documents", "--out", finished), 3, "the database itself")
    assert stamps(finished) == before


# -- settings --------------------------------------------------------------------------------------------------------


def test_an_unknown_encoder_is_refused(tmp_path, good):
    refused_build(tmp_path, 3, [good, "--encoder", "no-such/encoder"], "no-such/encoder", "all-MiniLM-L6-v2")


def test_a_folder_that_is_no_encoder_is_refused(tmp_path, good):
    (tmp_path / "hollow").mkdir()
    refused_build(tmp_path, 3, [good, "--encoder", tmp_path / "hollow"], "hollow", "config.json")


def test_an_unknown_tokenizer_is_refused(tmp_path, good):
    refused_build(tmp_path, 3, [good, "--tokenizer", "no-such/tokenizer"], "no-such/tokenizer")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--chunk-tokens", "many"], "--chunk-tokens many"),
        (["--min-recall", "high"], "--min-recall high"),
        (["--encoder", ""], "--encoder ''"),
        (["--tokenizer", ""], "--tokenizer ''"),
        (["--chunk-tokens", "0"], "--chunk-tokens 0"),
        (["--sequence-tokens", "2000"], "2000"),
        (["--neighbours", "0"], "--neighbours 0"),
        (["--training-neighbours", "30"], "30"),
        (["--metric", "cosine"], "cosine"),
        (["--exclude", "nobody"], "nobody"),
        (["--min-recall", "1.5"], "1.5"),
        (["--memory", "lots"], "lots"),
        (["--shard-bytes", "-1"], "-1"),
        (["--workers", "0"], "--workers 0"),
        (["--runner", "abacus"], "abacus"),
        (["--seed", "-1"], "-1"),
        (["--until", "lunch"], "lunch"),
        (["--precision", "int3"], "int3"),
        (["--device", "abacus"], "abacus"),
        (["--tokenizer", "train:many"], "train:many"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_or_value_is_a_usage_error(tmp_path, good, flags, says):
    refused_build(tmp_path, 2, [good, *flags], says)


def test_a_build_without_inputs_or_without_out_is_a_usage_error(tmp_path, good):
    assert_refused(retrodb("build", "--out", tmp_path / "db"), 2, "INPUT")
    assert_refused(retrodb("build", good), 2, "--out")


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("chunk_tokens = = 64", "not valid TOML"),
        ("chunk_tokns = 64", "chunk_tokns"),
        ('metric = "cosine"', "cosine"),
        ('chunk_tokens = "many"', "many"),
        ("[build]\nchunk_tokens = 64", "build"),
        ('no-text = "no"', "no-text"),
        ("workers = true", "workers"),
        ("chunk-tokens = 64\nchunk_tokens = 32", "twice"),
        ("neighbours = 1", "training-neighbours 2"),
    ],
)
def test_a_config_file_that_cannot_be_meant_is_refused(tmp_path, good, toml, says):
    (tmp_path / "c.toml").write_text(toml)
    refused_build(tmp_path, 3, [good, "--config", tmp_path / "c.toml"], says)


def test_a_config_file_that_is_missing_is_refused(tmp_path, good):
    refused_build(tmp_path, 3, [good, "--config", tmp_path / "none.toml"], "none.toml")


def test_a_flag_wins_over_the_config_file(tmp_path, good):
    (tmp_path / "c.toml").write_text("chunk-tokens = 16\nsequence-tokens = 64\n")
    arguments = ("build", good, "--config", tmp_path / "c.toml", "--out", tmp_path / "db", "--until", "chunk")
    assert retrodb(*arguments, "--chunk-tokens", 8).code == 0
    config = json.loads((tmp_path / "db" / "manifest.json").read_text())["config"]
    assert (config["chunk_tokens"], config["sequence_tokens"]) == (8, 64)


# -- the database ----------------------------------------------------------------------------------------------------


def test_an_out_that_is_a_file_is_refused(tmp_path, good):
    (tmp_path / "file").write_text("mine")
    before = stamps(tmp_path)
    assert_refused(retrodb("build", good, "--out", tmp_path / "file"), 3, "file")
    assert stamps(tmp_path) == before


def test_an_out_below_a_file_is_refused(tmp_path, good):
    (tmp_path / "file").write_text("mine")
    before = stamps(tmp_path)
    assert_refused(retrodb("build", good, "--out", tmp_path / "file" / "db"), 3, "file")
    assert stamps(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.tex", "documents/letter.txt", ".hidden", "reports/manifest.json"])
def test_an_out_folder_with_other_things_is_refused_and_left_alone(tmp_path, good, name):
    mine = tmp_path / "home" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    before = stamps(tmp_path)
    assert_refused(retrodb("build", good, "--out", tmp_path / "home"), 3, "home")
    assert stamps(tmp_path) == before


def test_an_out_folder_whose_manifest_is_of_another_program_is_refused(tmp_path, good):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "manifest.json").write_text('{"name": "my web app"}')
    before = stamps(tmp_path)
    assert_refused(retrodb("build", good, "--out", tmp_path / "home"), 3, "manifest.json")
    assert stamps(tmp_path) == before


def test_an_out_that_cannot_be_written_is_refused(tmp_path, good):
    assert_refused(retrodb("build", good, "--out", "/proc/retrodb/db"), 3, "/proc/retrodb/db")


@pytest.mark.parametrize("arguments", [("info",), ("verify",), ("query", "words"), ("show", "0")], ids=lambda a: a[0])
def test_a_folder_that_is_no_database_is_refused_by_every_reader(tmp_path, arguments):
    name, *rest = arguments
    assert_refused(retrodb(name, tmp_path, *rest), 3, tmp_path, "not a retrodb database")
    assert_refused(retrodb(name, tmp_path / "nowhere", *rest), 3, "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("info",), ("query", "words"), ("show", "0"), ("build",)], ids=lambda a: a[0])
def test_a_database_of_a_later_schema_is_refused_and_left_alone(tmp_path, good, finished, arguments):
    database = tmp_path / "db"
    shutil.copytree(finished, database)
    manifest = json.loads((database / "manifest.json").read_text())
    manifest["format"]["schema_version"] = 99
    (database / "manifest.json").write_text(json.dumps(manifest))
    before = stamps(database)
    name, *rest = arguments
    ran = retrodb("build", good, "--out", database) if name == "build" else retrodb(name, database, *rest)
    assert_refused(ran, 3, "99")
    assert stamps(database) == before


def test_a_manifest_that_is_torn_is_damage(tmp_path, finished):
    database = tmp_path / "db"
    shutil.copytree(finished, database)
    text = (database / "manifest.json").read_text()
    (database / "manifest.json").write_text(text[: len(text) // 2])
    assert_refused(retrodb("info", database), 4, "manifest.json")


def test_a_manifest_that_names_a_path_outside_is_refused(tmp_path, finished):
    database = tmp_path / "db"
    shutil.copytree(finished, database)
    text = (database / "manifest.json").read_text()
    (database / "manifest.json").write_text(text.replace("chunks/00000.parquet", "../00000.parquet"))
    assert_refused(retrodb("show", database, 0), 4, "../00000.parquet")


def test_input_without_a_usable_record_leaves_an_existing_database_as_it_was(tmp_path, finished):
    """Refused means before anything is changed, also where the folder is a database already."""
    database = tmp_path / "db"
    shutil.copytree(finished, database)
    before = stamps(database)
    source = write_jsonl(tmp_path / "bad.jsonl", ["not json"])
    assert_refused(retrodb("build", source, "--out", database), 3, "bad.jsonl")
    assert stamps(database) == before


def test_an_unknown_encoder_leaves_an_existing_database_as_it_was(tmp_path, good, finished):
    database = tmp_path / "db"
    shutil.copytree(finished, database)
    before = stamps(database)
    ran = retrodb("build", good, "--out", database, "--encoder", "no-such/encoder", HF_HUB_OFFLINE="1")
    assert_refused(ran, 3, "no-such/encoder")
    assert stamps(database) == before


def broken_copy(encoder: Path, folder: Path) -> Path:
    """An encoder whose weights are whole by their header, but do not fit its config."""
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7, "hidden_act": "no such"}))
    return folder


def test_an_encoder_that_cannot_be_loaded_leaves_an_existing_database_as_it_was(tmp_path, finished, tiny_encoder):
    """Known only once it is loaded: before the vectors of the old encoder give way."""
    out = tmp_path / "db"
    shutil.copytree(finished, out)
    before = stamps(out)
    broken = broken_copy(tiny_encoder, tmp_path / "broken")
    ran = retrodb("build", finished.parent / "in.jsonl", "--out", out, "--encoder", broken)
    assert_refused(ran, 3, "broken")
    assert stamps(out) == before


def test_weights_cut_short_are_refused_before_anything_is_made(tmp_path, good, tiny_encoder):
    shutil.copytree(tiny_encoder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    refused_build(tmp_path, 3, [good, "--encoder", tmp_path / "cut"], "model.safetensors")


@pytest.mark.parametrize("more", [(), ("--precision", "fp32"), ("--precision", "fp32", "--dry-run")], ids=len)
def test_a_missing_cuda_device_that_was_asked_for_is_refused_first(tmp_path, good, more):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused_build(tmp_path, 3, [good, "--device", "cuda", *more], "--device cuda", "--device cpu")


def test_a_blank_out_is_refused(tmp_path, good):
    assert_refused(retrodb("build", good, "--out", ""), 3, "blank")
    assert_refused(retrodb("info", ""), 3, "blank")


def test_a_database_built_with_relative_paths_is_read_from_anywhere(tmp_path, tiny_encoder):
    write_jsonl(tmp_path / "in.jsonl", [GOOD, {**GOOD, "id": "b"}])
    shutil.copytree(tiny_encoder, tmp_path / "tiny")
    given = ("in.jsonl", "--out", "db", "--encoder", "tiny", "--tokenizer", "encoder", "--no-text")
    for done in (["corpus", "dedup", "chunk", "embed", "index", "neighbours", "training", "report"], []):
        command = [sys.executable, "-m", "retrodb", "build", *given, "--json"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert json.loads(ran.stdout.splitlines()[-1])["done"] == done
    assert retrodb("verify", tmp_path / "db", "--sample", 1).code == 0
    assert retrodb("query", tmp_path / "db", "a text").code == 0
    (tmp_path / "tiny").rename(tmp_path / "moved")
    assert_refused(retrodb("query", tmp_path / "db", "a text", HF_HUB_OFFLINE="1"), 3, tmp_path / "db", "--encoder")
    assert retrodb("verify", tmp_path / "db", "--encoder", tmp_path / "moved").code == 0


# -- looking ---------------------------------------------------------------------------------------------------------


def test_a_query_with_another_metric_or_encoder_is_refused(finished):
    assert_refused(retrodb("query", finished, "words", "--metric", "ip"), 3, "ip", "l2")
    assert_refused(retrodb("query", finished, "words", "--encoder", "all-MiniLM-L6-v2"), 3, "all-MiniLM-L6-v2")


def test_a_query_of_blank_text_or_of_no_neighbours_is_a_usage_error(finished):
    assert_refused(retrodb("query", finished, "  "), 2, "TEXT")
    assert_refused(retrodb("query", finished, "words", "-k", 0), 2, "-k")


@pytest.mark.parametrize("chunk_id", [10**6, 7 << 32, 2**62, 2**70])
def test_showing_a_chunk_that_does_not_exist_is_refused(finished, chunk_id):
    assert_refused(retrodb("show", finished, chunk_id), 3, chunk_id)


def test_a_query_that_is_not_unicode_is_refused(finished):
    assert_refused(retrodb("query", finished, b"\xff\xfe".decode(errors="surrogateescape")), 3, "UTF-8")


@pytest.mark.parametrize(("query", "k", "says"), [("words", 0, "k is 0"), (None, 1, "no"), ("\udcff", 1, "UTF-8")])
def test_a_search_in_python_names_what_is_wrong_with_it(finished, query, k, says):
    with pytest.raises(InputError, match=says):
        retrodb_package.open(str(finished)).search(query, k)


def test_showing_a_negative_chunk_id_is_refused(finished):
    assert_refused(retrodb("show", finished, "--", -1), 3, -1)


@pytest.mark.parametrize("until", ["corpus", "chunk", "embed"])
def test_an_unfinished_database_cannot_be_queried_but_says_what_it_has(tmp_path, good, tiny_encoder, until):
    build_here([good], tmp_path / "db", until=until, encoder=str(tiny_encoder))
    assert_refused(retrodb("query", tmp_path / "db", "words"), 3, "build")
    info = retrodb("info", tmp_path / "db", "--json").json
    assert info["complete"] is False
    assert info["stages"][-1] == until
    assert info["neighbours"] is None
    assert retrodb("info", tmp_path / "db").code == 0
    if until == "corpus":
        assert_refused(retrodb("show", tmp_path / "db", 0), 3, "build")


def test_errors_are_one_json_object_where_json_was_asked_for(tmp_path):
    ran = retrodb("info", tmp_path, "--json")
    assert ran.code == 3
    assert ran.json["exit_code"] == 3
    assert "not a retrodb database" in ran.json["error"]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(28, "No space left on device", "chunks"), 1, "Free some space"),
        (SystemExit(130), 130, "interrupted"),
        (SystemExit(2), 2, "--help"),
    ],
)
def test_a_full_disk_an_interruption_and_a_wrong_flag_are_json_too(monkeypatch, capsys, error, code, says):
    def fail(**_):
        raise error

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli, "_leave", leave)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["retrodb", "build", "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (end.value.code, told["exit_code"], says in told["error"]) == (code, code, True)


def test_a_recall_below_the_gate_ends_with_its_own_exit_code(tmp_path, tiny_encoder):
    """One bit a dimension, however many lists are looked at, cannot find the ten true neighbours of every chunk."""
    records = [{"id": str(i), "text": f"{i * 7919} {i} words {i * i}. " * 30} for i in range(40)]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    arguments = ("build", source, "--out", tmp_path / "db", "--encoder", tiny_encoder, "--chunk-tokens", 8)
    ran = retrodb(
        *arguments, "--sequence-tokens", 64, "--neighbours", 10, "--index-key", "IVF4,RaBitQ", "--min-recall", 1.0
    )
    assert_refused(ran, 5, "--min-recall", "IVF4,RaBitQ")
    assert retrodb("info", tmp_path / "db", "--json").json["stages"][-1] == "index"


@pytest.mark.parametrize("key", ["nonsense", "PQ1x4", "IVF0,Flat", "IVF4,PQ7"])
def test_an_index_key_that_cannot_be_used_is_refused_before_any_work(tmp_path, good, key):
    """Megatron's defaults failed after all the work was done: 384 is no multiple of 7, and that is known beforehand."""
    out = tmp_path / "db"
    ran = retrodb("build", good, "--out", out, "--index-key", key)
    assert ran.code in (2, 3)
    assert key in ran.err
    assert not out.exists()


def test_a_parquet_file_without_a_text_column_is_refused_naming_its_columns(tmp_path):
    pq.write_table(pa.table({"number": [1, 2], "colour": ["red", "blue"]}), tmp_path / "t.parquet")
    refused_build(tmp_path, 3, [tmp_path / "t.parquet"], "colour", "--text-field")


# -- help ------------------------------------------------------------------------------------------------------------


def test_build_help_names_every_flag_of_the_contract():
    ran = retrodb("build", "--help", COLUMNS="200")
    assert ran.code == 0
    flags = (
        "--out --config --encoder --tokenizer --chunk-tokens --sequence-tokens --neighbours --training-neighbours "
        "--metric --exclude --min-recall --memory --workers --runner --seed --until --dry-run --json --text-field "
        "--id-field --title-field --no-text"
    )
    for flag in flags.split():
        assert re.search(rf"{flag}\b", ran.out), flag


def test_help_imports_nothing_heavy_and_answers_at_once():
    def help_once() -> tuple[float, str]:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "retrodb", "--help"], capture_output=True, text=True, check=True
        )
        return time.perf_counter() - started, done.stderr

    attempts = [help_once() for _ in range(3)]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in attempts[0][1].splitlines()}
    assert not imported & {
        "torch",
        "apache_beam",
        "faiss",
        "transformers",
        "autofaiss",
        "pyarrow",
        "sentence_transformers",
    }
    assert min(seconds for seconds, _ in attempts) < 0.5
