"""A runner that loses a worker starts a job over, with all of its tasks: what has a receipt is not done again."""

import join_under_limit
import numpy as np
import pytest
from retrodb.pipelines import training
from retrodb.pipelines.join import NeighbourSource, join_tasks
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.runners import run_local
from retrodb.pipelines.tasks import DoTasks, Task

from retrodb.manifest import Shard
from retrodb.storage import Storage


@pytest.fixture
def book(tmp_path):
    return ReceiptBook(Storage(str(tmp_path)), "training", "f" * 64)


def test_a_task_that_gives_several_shards_makes_those_that_are_missing(book):
    done = []

    def work(task):
        done.append((task.number, task.receipts))
        for number in task.receipts:
            shard = Shard.of(book.storage.commit_bytes(f"chunks/{number:05d}.parquet", b"abc"), number, 1)
            yield Receipt(number, {"chunks": shard})

    do = DoTasks(book, work)
    tasks = [Task(0, None, (0, 1, 2)), Task(3, None)]
    assert [number for task in tasks for number in do.process(task)] == [0, 1, 2, 3]
    book.storage.delete(book.path(1))
    book.storage.commit_bytes("chunks/00003.parquet", b"abd")
    assert [number for task in tasks for number in do.process(task)] == [1, 3]
    assert done == [(0, (0, 1, 2)), (3, (3,)), (0, (1,)), (3, (3,))]


@pytest.mark.parametrize("looked_up", [True, False])
def test_a_join_makes_the_shards_that_are_missing_and_reads_nothing_for_the_others(book, monkeypatch, looked_up):
    monkeypatch.setattr(join_under_limit, "SHARD", 40)
    rng, storage = np.random.default_rng(0), book.storage
    made = [join_under_limit.make_shard(storage, rng, number, 3) for number in range(3)]
    source = NeighbourSource({shard.number: shard for shard, _ in made}, 2, looked_up)
    tasks = join_tasks({shard.number: files for shard, files in made}, [shard for shard, _ in made])
    assembled, wanted = [], []
    make, want = training.Assemble.make, training.Assemble._wanted

    def assemble(self, task, wanted, answers):
        assembled.append(task.number)
        return make(self, task, wanted, answers)

    def counted(self, item):
        wanted.append(item)
        return want(self, item)

    monkeypatch.setattr(training.Assemble, "make", assemble)
    monkeypatch.setattr("retrodb.pipelines.join._NeighboursDoFn._wanted", counted)
    for missing, expected in (((), [0, 1, 2]), ((1,), [1]), ((), [])):
        assembled.clear()
        wanted.clear()
        for number in missing:
            storage.delete(book.path(number))
        run_local(lambda pipeline: training.training_pipeline(pipeline, book, tasks, source, 4), processes=1)
        assert sorted(assembled) == expected
        assert len(wanted) == len(expected) * (1 if looked_up else 2), "by a shuffle once to ask, once to assemble"
    assert sorted(book.seen()) == [0, 1, 2]
