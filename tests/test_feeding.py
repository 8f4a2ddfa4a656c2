"""Keeping a card busy: the same vectors, made in slabs from tokens that threads make ahead; one card a worker.

No card is needed: what a card does, a CPU does here, in the same portions.
"""

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from retrodb.pipelines import embed, plan, text_stages
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.runners import local
from retrodb.pipelines.tasks import DoTasksAhead, Task, TaskFailedError
from support import build_here, digests

from retrodb.config import make_config
from retrodb.encoding import cards, feeding, resolve_encoder
from retrodb.encoding.encoder import Encoder
from retrodb.encoding.feeding import Batch, Place
from retrodb.errors import InputError, MismatchError, WorkerError
from retrodb.storage import Storage


@pytest.fixture(scope="module")
def tiny(tiny_encoder):
    return Encoder.load(resolve_encoder(str(tiny_encoder)))


@pytest.fixture
def texts():
    words = ["copper", "tin", "river", "of", "the", "a", "monument"]
    return [" ".join(words[(i * j) % 7] for j in range(1 + i % 40)) for i in range(300)]


@pytest.fixture
def in_slabs(monkeypatch):
    monkeypatch.setattr(feeding, "_PIECE_TEXTS", 16)
    return Place("cpu", 256, 48)


# -- slabs ------------------------------------------------------------------------------------------------------------


def test_vectors_made_in_slabs_are_those_made_at_once(tiny, texts, in_slabs):
    found = replace(tiny, place=in_slabs).embed(texts)
    np.testing.assert_allclose(found, tiny.embed(texts), atol=2e-3)
    np.testing.assert_array_equal(found, replace(tiny, place=in_slabs).embed(texts))


def test_a_slab_is_sorted_by_itself_and_never_larger_than_asked(tiny, texts, in_slabs):
    slabs = list(replace(tiny, place=in_slabs).featurise(texts).slabs)
    assert [len(slab) for slab in slabs] == [48] * 6 + [12]
    assert [row.tolist() for slab in slabs for row in slab] == tiny.featuriser.tokenize(texts)


def test_rows_of_the_encoders_own_tokens_come_in_slabs_too(tiny, texts, in_slabs):
    chunks = [row[1:-1] for row in tiny.featuriser.tokenize(texts)]
    own = replace(tiny, place=in_slabs)
    np.testing.assert_array_equal(own.embed_own_tokens(chunks), own.embed(texts))
    assert [len(slab) for slab in own.featurise_own_tokens(chunks).slabs] == [48] * 6 + [12]


@pytest.mark.parametrize("place", [Place("cpu"), Place("cpu", 256, 48)])
def test_no_texts_have_no_vectors(tiny, place):
    assert replace(tiny, place=place).embed([]).shape == (0, tiny.identity.dimension)


def test_tokens_are_made_ahead_at_once_and_never_further_than_asked(texts):
    made, gate = [], threading.Event()

    def work(item):
        gate.wait(10)
        made.append(item)
        return item * 10

    with ThreadPoolExecutor(3) as pool:
        results = feeding._ahead(work, range(20), pool, most=4)
        gate.set()
        pool.submit(lambda: None).result()
        assert len(made) <= 4
        assert next(results) == 0
        assert list(results) == [item * 10 for item in range(1, 20)]


def test_an_error_of_a_tokenizing_thread_is_raised_where_the_rows_are_used(tiny, texts, in_slabs):
    def fails(some):
        raise ValueError("no such token")

    broken = replace(tiny, place=in_slabs, featuriser=replace(tiny.featuriser, tokenizer=fails))
    rows = broken.featurise(texts)
    with pytest.raises(ValueError, match="no such token"):
        broken.vectors(rows)


def test_transformers_tokenizers_which_threads_cannot_share_get_one_thread(tiny, in_slabs, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    shared = replace(tiny, place=in_slabs, featuriser=replace(tiny.featuriser, concurrent=True))
    assert shared._tokenizers()._max_workers == 8
    alone = replace(tiny, place=in_slabs, featuriser=replace(tiny.featuriser, concurrent=False))
    assert alone._tokenizers()._max_workers == 1
    assert tiny._tokenizers() is None


def test_a_batch_says_whether_anything_is_padded():
    assert Batch.padded([[1, 2], [3, 4]], 0).full
    ragged = Batch.padded([[1, 2], [3]], 9)
    assert not ragged.full
    assert ragged.ids.tolist() == [[1, 2], [3, 9]]
    assert ragged.mask.tolist() == [[1, 1], [1, 0]]


def test_vectors_of_another_width_than_the_card_says_are_refused(tiny, texts):
    wrong = replace(tiny, identity=replace(tiny.identity, dimension=7))
    with pytest.raises(MismatchError, match="its card says 7"):
        wrong.embed(texts)


def test_a_card_whose_memory_others_hold_is_told_with_what_to_do(tiny, texts, monkeypatch):
    import torch

    def full(batch):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 20, 80 << 30))
    with pytest.raises(WorkerError, match="3 MiB of 81,920 free.*CUDA_VISIBLE_DEVICES"):
        replace(tiny, network=full).embed(texts)


@pytest.mark.parametrize(
    ("memory", "dimension", "element_bytes", "tokens"),
    [(80 << 30, 1024, 2, 65536), (24 << 30, 1024, 2, 65536), (8 << 30, 1024, 4, 13107), (1 << 30, 1024, 4, 2048)],
)
def test_batches_are_as_large_as_the_card_holds(monkeypatch, memory, dimension, element_bytes, tokens):
    import torch

    card = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert Place.of("cuda:0", dimension, element_bytes).batch_tokens == tokens
    assert Place.of("cpu", dimension, element_bytes) == Place("cpu")


# -- the next shard is read while the one before it is computed ----


@pytest.fixture
def book(tmp_path):
    return ReceiptBook(Storage(str(tmp_path)), "stage", "f" * 64)


def test_the_next_task_is_read_before_the_one_before_it_is_worked_on(book):
    read, worked, begun = [], [], threading.Event()

    def reads(task):
        read.append(task.number)
        if task.number == 1:
            begun.set()
        return task.number * 10

    def works(task, rows):
        if task.number == 0:
            assert begun.wait(10), "task 1 is read meanwhile"
        worked.append((task.number, rows))
        yield Receipt(task.number)

    do = DoTasksAhead(book, reads, works)
    do.start_bundle()
    assert list(do.process(Task(0, None))) == []
    assert list(do.process(Task(1, None))) == [0]
    assert [value.value for value in do.finish_bundle()] == [1]
    assert worked == [(0, 0), (1, 10)]
    assert sorted(book.seen()) == [0, 1]


def test_a_task_that_cannot_be_read_is_named_and_the_one_before_it_kept(book):
    def reads(task):
        if task.number == 3:
            raise WorkerError("shard 3 is torn")

    do = DoTasksAhead(book, reads, lambda task, rows: [Receipt(task.number)])
    do.start_bundle()
    list(do.process(Task(2, None)))
    assert list(do.process(Task(3, None))) == [2]
    with pytest.raises(TaskFailedError, match="shard 3 is torn"):
        list(do.finish_bundle())
    assert book.seen() == [2]


def test_what_an_earlier_run_finished_is_not_read_again(book):
    book.write(Receipt(0))
    read = []
    do = DoTasksAhead(book, lambda task: read.append(task.number), lambda task, rows: [Receipt(task.number)])
    do.start_bundle()
    assert list(do.process(Task(0, None))) == []
    assert list(do.process(Task(1, None))) == []
    assert [value.value for value in do.finish_bundle()] == [1]
    assert read == [1]


# -- cards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_cards(monkeypatch, tmp_path):
    """A machine with two cards, as far as claiming one goes."""
    import torch

    monkeypatch.setattr(cards, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    monkeypatch.setattr(cards.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cards, "_held", [])
    yield
    import os

    for lock in cards._held:
        os.close(lock)
    cards._own_card.cache_clear()


def another_process():
    """What a further worker finds: locks are held by open files, so one process can play several."""
    cards._own_card.cache_clear()
    return cards.own_device("auto")


def test_each_worker_has_a_card_of_its_own(two_cards):
    assert another_process() == "cuda:0"
    assert another_process() == "cuda:1"
    assert cards.own_device("cuda") == "cuda:1", "and keeps it"


def test_a_worker_beyond_the_number_of_cards_shares_one(two_cards):
    assert {another_process(), another_process()} == {"cuda:0", "cuda:1"}
    assert another_process() in ("cuda:0", "cuda:1")


def test_a_card_is_free_again_when_its_worker_has_ended(two_cards):
    import os

    assert another_process() == "cuda:0"
    os.close(cards._held.pop())
    assert another_process() == "cuda:0"


def test_without_a_driver_torch_is_not_asked(monkeypatch):
    monkeypatch.setattr(cards, "_has_driver", lambda: False)
    assert cards.own_device("auto") == "cpu"
    assert cards.count_cards() == 0


def test_a_card_that_is_asked_for_and_missing_is_never_replaced_by_the_cpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="sees no CUDA device here"):
        cards.choose_device("cuda")


@pytest.mark.slow
def test_a_machine_embeds_with_as_many_processes_as_it_has_cards(
    quickstart_corpus, tiny_encoder, tmp_path, monkeypatch
):
    """One card here, whose part the CPU plays: the stage runs in one process, whatever --workers says."""
    settings = {"encoder": str(tiny_encoder), "shard_bytes": "16KiB", "until": "embed", "precision": "fp32"}
    build_here([quickstart_corpus], tmp_path / "plain", workers=1, **settings)
    monkeypatch.setattr(text_stages, "choose_device", lambda device: "cuda")
    monkeypatch.setattr(text_stages, "count_cards", lambda: 1)
    monkeypatch.setattr(text_stages, "_SMALL_EMBED_CHUNKS", 0)
    monkeypatch.setattr(embed, "own_device", lambda device: "cpu")
    processes = {}
    original = local.LocalRunner.run

    def run(self, job, tick):
        processes[job.stage] = 1 if job.light else min(self._workers, job.width)
        return original(self, job, tick)

    monkeypatch.setattr(local.LocalRunner, "run", run)
    build_here([quickstart_corpus], tmp_path / "cards", workers=2, **settings)
    assert processes["embed"] == 1
    assert digests(tmp_path / "cards", ["embeddings"]) == digests(tmp_path / "plain", ["embeddings"])


def test_a_dry_run_tells_the_time_on_the_cards_and_not_on_the_workers(monkeypatch):
    """InstructRetro's 6.22 million chunks an hour with BERT-large are 177 million with MiniLM, by multiplications."""
    config, run = make_config({}, {"workers": 4})
    on_cpu = plan._time_to_embed(1_000_000, config, run, "fp32")
    monkeypatch.setattr(plan, "choose_device", lambda device: "cuda")
    monkeypatch.setattr(plan, "count_cards", lambda: 2)
    on_cards = plan._time_to_embed(1_000_000, config, run, "fp16")
    assert on_cpu == "very roughly 75.9 min on 4 workers (CPU, fp32)"
    assert on_cards == "very roughly 0.2 min on 2 cards, if they are like an A100"


@pytest.mark.slow
def test_the_benchmark_of_a_card_runs_on_a_cpu_and_says_so():
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    arguments = ["--chunks", "60", "--encoders", "minilm", "--device", "cpu"]
    ran = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert "measures the CPU, and no MFU" in ran.stdout
    assert "x the bare forward pass" in ran.stdout
    assert re.search(r"recall@10 .*: (0\.9[89]|1)", ran.stdout), ran.stdout
