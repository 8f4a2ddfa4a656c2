"""The stages are pipelines that any runner can take: pickled, with no shared state, and counted by Beam."""

import json
import time
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.portable_runner import PortableRunner
from failing_work import fail
from retrodb.pipelines.corpus import corpus_pipeline, read_tasks
from retrodb.pipelines.driver import build
from retrodb.pipelines.progress import Silent
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.runners import run_local
from retrodb.pipelines.tasks import DealOut, DoTasks, Task, original_error

from retrodb.config import BuildConfig, RunSettings
from retrodb.corpus import FieldNames, expand_inputs, plan, scan_file
from retrodb.errors import InputError, WorkerError
from retrodb.storage import Storage


@pytest.fixture
def corpus_files(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"id": n, "text": f"document {n} " * 40} for n in range(40)] + [{"id": "x", "text": " "}, {"id": "y"}]
    path.write_text("\n".join(map(json.dumps, records)))
    return expand_inputs([str(path)]).files


def corpus_stage(tmp_path, files):
    layout = plan([scan_file(file) for file in files], 4096)
    book = ReceiptBook(Storage(str(tmp_path / "db")), "corpus", "f" * 64)
    return book, read_tasks(layout.splits), layout.shards


def documents_of(book, shards):
    return [book.storage.read_table(book.read(n).shards["documents"].path).to_pylist() for n in range(shards)]


@pytest.mark.slow
def test_beam_counters_carry_the_numbers_of_the_receipts(tmp_path, corpus_files):
    book, tasks, shards = corpus_stage(tmp_path, corpus_files)
    counters = run_local(lambda pipeline: corpus_pipeline(pipeline, book, tasks, FieldNames()), processes=2)
    receipts = book.read_all(range(shards)).values()
    for name in ("in", "kept", "quarantined", "dropped.empty"):
        assert counters[name] == sum(receipt.counts[name] for receipt in receipts)
    assert (counters["in"], counters["kept"], counters["quarantined"], counters["dropped.empty"]) == (42, 40, 1, 1)
    assert counters["documents.rows"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_workers_error_reaches_the_driver_as_it_was_raised(tmp_path, importable, processes):
    book = ReceiptBook(Storage(str(tmp_path)), "stage", "f" * 64)
    tasks = [Task(0, None), Task(2, None)]
    with pytest.raises(InputError) as caught:
        run_local(lambda p: p | DealOut(tasks) | beam.ParDo(DoTasks(book, fail)), processes)
    assert str(caught.value).startswith("shard 2: what, where; the remedy.\nA second line with 'quotes' and \"more\" —")


@pytest.mark.slow
def test_a_full_disk_is_told_with_the_shard_and_the_remedy(tmp_path, importable):
    book = ReceiptBook(Storage(str(tmp_path)), "stage", "f" * 64)
    with pytest.raises(WorkerError, match="no space left.*shard 3.*free some space"):
        run_local(lambda p: p | DealOut([Task(3, None)]) | beam.ParDo(DoTasks(book, fail)), processes=2)


@pytest.mark.slow
def test_workers_that_are_told_to_end_one_after_the_other_are_not_taken_for_dead(tmp_path, corpus_files, monkeypatch):
    """On a busy machine the last one takes seconds longer than the first."""
    from apache_beam.runners.portability.fn_api_runner.worker_handlers import GrpcWorkerHandler
    from retrodb.pipelines.runners import local

    def slowly(self, close=GrpcWorkerHandler.close):
        close(self)
        time.sleep(2.5)

    monkeypatch.setattr(GrpcWorkerHandler, "close", slowly)
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.5)
    book, tasks, _ = corpus_stage(tmp_path, corpus_files)
    assert run_local(lambda pipeline: corpus_pipeline(pipeline, book, tasks, FieldNames()), processes=2)["in"] == 42


@pytest.mark.parametrize(
    ("runner", "processes", "dealt"), [(FnApiRunner, 1, False), (FnApiRunner, 2, True), (PortableRunner, 1, True)]
)
def test_tasks_are_dealt_out_by_a_shuffle_unless_one_process_does_them_all(runner, processes, dealt):
    pipeline = beam.Pipeline(runner=runner(), options=PipelineOptions([f"--direct_num_workers={processes}"]))
    _ = pipeline | DealOut([Task(0, None), Task(1, None)])
    kinds = [transform.spec.urn for transform in pipeline.to_runner_api().components.transforms.values()]
    assert kinds.count(common_urns.primitives.GROUP_BY_KEY.urn) == dealt


def test_text_without_an_error_of_ours_gives_none():
    assert original_error("RuntimeError: something else") is None


def test_a_receipt_whose_shard_is_gone_is_none(tmp_path):
    storage = Storage(str(tmp_path))
    book = ReceiptBook(storage, "stage", "f" * 64)
    from retrodb.manifest import Shard

    shard = Shard.of(storage.commit_bytes("chunks/00000.parquet", b"abc"), 0, 1)
    book.write(Receipt(0, {"chunks": shard}, {"n": 1}))
    assert book.read(0) == Receipt(0, {"chunks": shard}, {"n": 1})
    storage.commit_bytes("chunks/00000.parquet", b"other")
    assert book.read(0) is None
    assert book.read(1) is None


@pytest.mark.slow
@pytest.mark.parametrize("url", ["memory://retrodb-test/db"])
def test_a_database_may_lie_on_an_object_store(url, corpus_files):
    """No renames, no folders, no memory maps: one process, since this store lives in its memory."""
    import retrodb

    out = Storage(url)
    run = RunSettings(workers=1)
    config = BuildConfig(chunk_tokens=16, sequence_tokens=64, neighbours=3)
    first = build(corpus_files, out, config, run, Silent())
    assert set(first.done) == {"corpus", "dedup", "chunk", "embed", "index", "neighbours", "training", "report"}
    assert build(corpus_files, out, config, run, Silent()).done == ()
    db = retrodb.open(url)
    assert db.search("document 7", k=2)[0].distance < 1.0
    assert sum(1 for _ in db.training()) == db.manifest.rows("training")


def test_only_pipelines_import_beam():
    root = Path(__file__).parents[1]
    for path in (root / "retrodb").rglob("*.py"):
        assert "apache_beam" not in path.read_text(encoding="utf-8"), path
