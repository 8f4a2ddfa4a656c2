"""The stages from vectors to training shards: what each is made from, its tasks, and what is recorded of it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import apache_beam as beam
import numpy as np
from retrodb.pipelines import index as index_stage
from retrodb.pipelines import neighbours as neighbours_stage
from retrodb.pipelines import stages
from retrodb.pipelines.builder import Builder, StageWork, add_counts, shards_by_table
from retrodb.pipelines.chunk import VALIDATION_CHUNKS
from retrodb.pipelines.index import IndexSettings
from retrodb.pipelines.join import Before, NeighbourSource, join_tasks
from retrodb.pipelines.lineage import FIRST_SHARDS, choice_of
from retrodb.pipelines.neighbours import TRUTH_NUMBER, Sample, truth_distances
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.search import forget_search, search_pipeline, search_waves
from retrodb.pipelines.searching import SEARCHED, SearchSettings, search_tasks
from retrodb.pipelines.shards import shard_files
from retrodb.pipelines.tasks import Task
from retrodb.pipelines.training import training_pipeline
from retrodb.schemas import ID_SHIFT

from retrodb.corpus import VALIDATION
from retrodb.deletions import Deletions
from retrodb.errors import RecallError
from retrodb.index import (
    IndexFile,
    KeyChoice,
    bytes_per_vector,
    choose_key,
    group_shards,
    has_exact_codes,
    seeded_sample,
)
from retrodb.manifest import LARGEST_NORM, RECALL_REPORT, TEMPLATE_NUMBER, StageState, shard_of
from retrodb.neighbours import Reranking, from_table
from retrodb.neighbours.sources import VECTOR_CACHE_BYTES
from retrodb.quality.recall import choose_nprobe, nprobe_ladder, recall_at, recall_remedy
from retrodb.sizes import count_of
from retrodb.training.shards import VALIDATION_ROWS

RECALL_QUERIES: Final = 512
TOGETHER_BELOW: Final = 256 << 20
"""An index of so many bytes is read anew for each query shard, sooner than that candidates are shuffled."""
FETCH_ABOVE: Final = VECTOR_CACHE_BYTES
"""Vectors on an object store that a worker cannot keep, in bytes: to look one up, it would read a whole shard."""
SMALL_VECTORS: Final = 30_000
SMALL_QUERIES: Final = 6_000
_SMALL_TUNING_VECTORS: Final = 1 << 22
_SMALL_JOIN_CHUNKS: Final = 20_000
_ALL_ANEW: Final = TRUTH_NUMBER - 1
"""Number of the receipt that says: rows that were there did not reach the gate, and none of them stays."""


# -- index -------------------------------------------------------------------------------------------------------------


def indexed_rows(builder: Builder) -> dict[int, int]:
    """How many chunks of each shard may be neighbours: all but those of validation documents, and deleted ones."""
    held_out = builder.manifest.stages["chunk"].details.get(VALIDATION_CHUNKS, {})
    rows = {s.number: s.rows - held_out.get(str(s.number), 0) for s in builder.manifest.shards("chunks")}
    for number, count in _deleted_rows(builder).items():
        rows[number] -= count
    return rows


def _deleted_rows(builder: Builder) -> dict[int, int]:
    """How many chunks of each shard that are no validation chunks are deleted."""
    gone = Deletions.of(builder.storage, builder.manifest)
    shards = gone.document_ids >> ID_SHIFT
    documents = {shard.number: shard for shard in builder.manifest.shards("documents")}
    counts = {}
    for number in np.unique(shards).tolist():
        table = builder.storage.read_table(documents[number], ["document_id", "split", "n_chunks"])
        own = gone.of_documents(table["document_id"].to_numpy()) & (table["split"].to_numpy() != VALIDATION)
        counts[number] = int(table["n_chunks"].to_numpy()[own].sum())
    return counts


def key_choice(builder: Builder, rows: Mapping[int, int]) -> KeyChoice:
    """The index key for what was embedded."""
    config = builder.config
    dimension = builder.manifest.fingerprints["encoder"]["dimension"]
    return choose_key(sum(rows.values()), dimension, config.memory_bytes, config.metric, config.index_key)


def build_index(builder: Builder) -> None:
    """The trained quantiser, and index shards."""
    rows = indexed_rows(builder)
    choice = key_choice(builder, rows)
    left_out = builder.manifest.shards("deleted")
    known = {shard.path: shard.sha256 for shard in left_out}
    parts = stages.index_parts(builder.manifest.stages["embed"].fingerprint, builder.config, choice, known)
    damaged = builder.damage.get("index", set())
    if builder.is_current("index", parts) and not damaged:
        return
    settings = IndexSettings(
        key=choice.key,
        metric=builder.config.metric,
        dimension=builder.manifest.fingerprints["encoder"]["dimension"],
        seed=builder.config.seed,
        left_out=left_out,
    )
    builder.begin("index", parts)
    template = settle_template(builder, parts, rows, choice, settings)
    trained = template.shards["index"]
    data = builder.storage.read_bytes(trained)
    numbers = sorted(rows)
    vector_bytes = bytes_per_vector(data, settings.dimension, settings.metric)
    groups = group_shards([rows[number] for number in numbers], len(data), vector_bytes, choice.exact)
    files = shard_files(builder.manifest)
    receipts = builder.run_stage(
        StageWork(
            stage="index",
            parts=parts,
            tasks=index_stage.add_tasks(
                [[files[numbers[at]] for at in group] for group in groups],
                [sum(rows[numbers[at]] for at in group) for group in groups],
            ),
            damaged=damaged - {TEMPLATE_NUMBER},
            pipeline=lambda pipeline, book, tasks: index_stage.add_pipeline(pipeline, book, tasks, settings, trained),
            unit="vectors",
            small=SMALL_VECTORS,
        )
    )
    if receipts is None:
        return
    receipts[TEMPLATE_NUMBER] = template
    details = {name: value for name, value in asdict(choice).items() if name != "estimated_bytes"}
    details |= {"metric": settings.metric, "vectors": sum(rows.values()), "shards": len(groups)}
    details[FIRST_SHARDS] = [numbers[group[0]] for group in groups]
    if settings.metric == "ip":
        details[LARGEST_NORM] = max(receipt.details.get(LARGEST_NORM, 0.0) for receipt in receipts.values())
    builder.record("index", parts, shards_by_table(receipts, "index"), add_counts(receipts), details)
    builder.progress.end(f"{choice.key}: {choice.reason}")


def settle_template(
    builder: Builder, parts: dict[str, Any], rows: Mapping[int, int], choice: KeyChoice, settings: IndexSettings
) -> Receipt:
    """The trained quantiser's receipt; trained first where it is missing or damaged."""
    recorded = next((s for s in builder.manifest.shards("index") if s.number == TEMPLATE_NUMBER), None)
    if recorded is not None and TEMPLATE_NUMBER not in builder.damage.get("index", set()):
        return Receipt(TEMPLATE_NUMBER, {"index": recorded})
    book = builder.book("index", parts)
    if choice.training_vectors == 0:
        receipt = book.read(TEMPLATE_NUMBER)
        if receipt is None:
            index_stage.write_untrained(book, settings)
    else:
        files = shard_files(builder.manifest)
        builder.executor.complete(
            book,
            index_stage.sample_tasks(files, dict(rows), choice.training_vectors, builder.config.seed),
            lambda pipeline, tasks: index_stage.template_pipeline(pipeline, book, tasks, settings),
            unit="vectors",
            small=SMALL_VECTORS,
        )
    receipt = book.read(TEMPLATE_NUMBER)
    assert receipt is not None, "the executor has seen it"
    if recorded is not None:
        builder.replace_template(recorded, receipt.shards["index"])
    return receipt


# -- neighbours --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Earlier:
    """Neighbours that are there already, of which most rows can stay.

    Attributes:
        nprobe: what the rows were searched with.
        tasks: one a query shard that has them.
        pipeline: of some of the tasks: writes what stays, and what has to be searched anew with the settings given.
            Receipts say how many chunks that were (`SEARCHED`).
    """

    nprobe: int
    tasks: Sequence[Task]
    pipeline: Callable[[beam.Pipeline, ReceiptBook, Sequence[Task], SearchSettings], object]


def neighbours_parts(builder: Builder) -> dict[str, Any]:
    """What the neighbours are made from now."""
    manifest = builder.manifest
    passed_over = {s.path: s.sha256 for s in manifest.shards("deleted") if s not in manifest.left_out}
    index = manifest.stages["index"].fingerprint
    return stages.neighbours_parts(index, builder.config, choice_of(manifest), passed_over)


def build_neighbours(builder: Builder) -> None:
    """Every chunk's neighbours, and the recall they were found with."""
    renew_neighbours(builder, None)


def renew_neighbours(builder: Builder, earlier: Earlier | None) -> int:
    """Every chunk's neighbours, and the recall they were found with; what can stays as ``earlier`` has it.

    The nprobe that is recorded is the one that all rows were searched with. So it is tuned first, from the one of
    earlier rows on. These stay where it has not risen; else, or where what stayed turns out to be below the gate, all
    are searched with the tuned one, which reaches it: where any nprobe does, this ends well.

    Returns:
        How many chunks were searched; 0 where there was nothing to do.

    Raises:
        RecallError: no nprobe reaches the gate.
    """
    choice = choice_of(builder.manifest)
    parts = neighbours_parts(builder)
    damaged = builder.damage.get("neighbours", set())
    current = builder.is_current("neighbours", parts)
    if current:
        builder.mend_report("neighbours", lambda state: write_recall_report(builder, state))
    if current and not damaged:
        return 0
    builder.begin("neighbours", parts)
    book = builder.book("neighbours", parts)
    settings = search_settings(builder, choice)
    stayed = False
    if current:
        settings = replace(settings, nprobe=builder.manifest.stages["neighbours"].details["nprobe"])
        truth = Receipt(TRUTH_NUMBER)
    else:
        truth = settle_truth(builder, book)
        least = 1 if earlier is None else earlier.nprobe
        settings = replace(settings, nprobe=tuned_nprobe(builder, book, settings, choice.key, least))
        if earlier is not None and earlier.nprobe >= settings.nprobe and book.read(_ALL_ANEW) is None:
            stayed = True
            take = functools.partial(_take_earlier, earlier, book, settings)
            builder.executor.complete(book, earlier.tasks, take, unit="chunks", small=SMALL_QUERIES)
    files, chunks = shard_files(builder.manifest), builder.manifest.shards("chunks")
    receipts = builder.run_stage(
        StageWork(
            stage="neighbours",
            parts=parts,
            tasks=search_tasks(files, chunks),
            damaged=damaged,
            pipeline=lambda pipeline, book, tasks: search_pipeline(pipeline, book, tasks, settings),
            unit="chunks",
            small=SMALL_QUERIES,
            waves=search_waves(book, settings),
        )
    )
    if receipts is None:
        return 0
    if settings.reranking is None:
        details = measured_recall(builder, book, receipts, truth)
    else:
        details = candidates_recall(builder, book, settings)
    if stayed and is_below(details, builder.config.min_recall):
        forget_search(book, receipts)
        book.write(Receipt(_ALL_ANEW))  # behind the rest: with it, what has a receipt was searched by the tuned nprobe
        return renew_neighbours(builder, earlier)
    refuse_low_recall(builder, details, choice.key)
    details |= {"nprobe": settings.nprobe, "metric": settings.metric}
    details |= {"index": choice.key, "gate": builder.config.min_recall}
    builder.record(
        "neighbours",
        parts,
        shards_by_table(receipts, "neighbours"),
        add_counts(receipts),
        details,
        report=lambda state: write_recall_report(builder, state),
    )
    recall = details["recall_at_10"]
    found = "no chunk may have a neighbour" if recall is None else f"recall@10 {recall:.4f}"
    short = add_counts(receipts)["short"]
    builder.progress.end(
        found + (f", {count_of(short, 'chunk has', 'chunks have')} fewer than {settings.kept}" if short else "")
    )
    return sum(int(receipt.details.get(SEARCHED, receipt.counts["queries"])) for receipt in receipts.values())


def _take_earlier(
    earlier: Earlier, book: ReceiptBook, settings: SearchSettings, pipeline: beam.Pipeline, tasks: Sequence[Task]
) -> object:
    return earlier.pipeline(pipeline, book, tasks, settings)


def write_recall_report(builder: Builder, state: StageState) -> str:
    """Commit ``reports/recall.json``, which is what is recorded of the stage; its sha256."""
    return builder.storage.commit_json(RECALL_REPORT, state.facts).sha256


def search_settings(builder: Builder, choice: KeyChoice) -> SearchSettings:
    """Where everything is that a search needs."""
    manifest, config = builder.manifest, builder.config
    fetched = not builder.storage.is_local and sum(s.bytes for s in manifest.shards("embeddings")) > FETCH_ABOVE
    return SearchSettings(
        index=tuple(IndexFile(s, s.rows) for s in manifest.shards("index") if s.number != TEMPLATE_NUMBER),
        documents={shard.number: shard for shard in manifest.shards("documents")},
        chunks={shard.number: shard for shard in manifest.shards("chunks")},
        embeddings={shard.number: shard for shard in manifest.shards("embeddings")},
        dimension=manifest.fingerprints["encoder"]["dimension"],
        metric=config.metric,
        k=config.searched_neighbours,
        exclude=config.exclude,
        raw_is_exact=has_exact_codes(choice.key),
        n_lists=choice.n_lists,
        nprobe=1,
        together=not fetched and sum(s.bytes for s in manifest.shards("index")) < TOGETHER_BELOW,
        fetched=fetched,
        in_memory=builder.runner.is_local,
        blocks=config.unit == "block",
        largest_norm=manifest.stages["index"].details.get(LARGEST_NORM),
        reranking=None if config.rerank == "none" else Reranking(config.rerank, config.neighbours),
        deleted=manifest.shards("deleted"),
    )


def settle_truth(builder: Builder, book: ReceiptBook) -> Receipt:
    """The exact nearest neighbours of a seeded sample of chunks."""
    chunks, files = builder.manifest.shards("chunks"), shard_files(builder.manifest)
    path = neighbours_stage.sample_path(book)
    blocks = {shard.number: shard for shard in chunks} if builder.config.unit == "block" else {}
    if builder.storage.size(path) is None:
        drawn = seeded_sample([shard.rows for shard in chunks], RECALL_QUERIES, builder.config.seed + 1)
        rows = {shard.number: some for shard, some in zip(chunks, drawn, strict=True)}
        sample = neighbours_stage.draw_sample(builder.storage, files, rows, builder.config.exclude, bool(blocks))
        builder.storage.commit_bytes(path, sample.to_bytes())
    receipts = builder.executor.complete(
        book,
        neighbours_stage.truth_tasks(files, chunks),
        lambda pipeline, tasks: neighbours_stage.truth_pipeline(
            pipeline, book, tasks, builder.config.metric, blocks, builder.manifest.shards("deleted")
        ),
        unit="chunks",
        small=SMALL_VECTORS * 2,
    )
    return receipts[TRUTH_NUMBER]


def tuned_nprobe(builder: Builder, book: ReceiptBook, settings: SearchSettings, key: str, least: int) -> int:
    """The cheapest nprobe, of ``least`` or more, whose recall on the sample reaches the gate.

    Raises:
        RecallError: none does.
    """
    if settings.n_lists == 1:
        return 1
    ladder = [nprobe for nprobe in nprobe_ladder(settings.n_lists) if nprobe >= least]
    recalls: dict[int, float | None] = {}
    # One task runs in this process: the sample is small, and a worker takes longer to start, but for a large index.
    step = 1 if builder.manifest.rows("embeddings") <= _SMALL_TUNING_VECTORS else builder.run.workers
    for start in range(0, len(ladder), step):
        receipts = builder.executor.complete(
            book,
            neighbours_stage.nprobe_tasks(ladder[start : start + step], RECALL_QUERIES),
            lambda pipeline, tasks: neighbours_stage.tuning_pipeline(pipeline, book, tasks, settings),
            unit="queries",
            small=0,
        )
        recalls |= {receipt.details["nprobe"]: receipt.details["recall"] for receipt in receipts.values()}
        if any(recall is None or recall >= builder.config.min_recall for recall in recalls.values()):
            break
    requested, made_by = builder.config.index_key is not None, builder.manifest.version.made_by
    return choose_nprobe(recalls, builder.config.min_recall, key, requested, made_by)


def measured_recall(
    builder: Builder, book: ReceiptBook, receipts: Mapping[int, Receipt], truth: Receipt
) -> dict[str, Any]:
    """Recall@10 of the rows that are there, for the sampled queries.

    A row from before a deletion may name what was deleted. Readers pass over that, and the row says no more than what
    the nearest are that it has left: of so many it is measured.
    """
    gone = Deletions.of(builder.storage, builder.manifest)
    sample = Sample.from_bytes(builder.storage.read_bytes(neighbours_stage.sample_path(book)))
    shards = np.array([shard_of(int(chunk_id)) for chunk_id in sample.chunk_ids])
    found = np.full((len(shards), builder.config.neighbours), np.nan, dtype=np.float32)
    exact = truth_distances(truth)
    for number in np.unique(shards):
        stored = from_table(builder.storage.read_table(receipts[int(number)].shards["neighbours"]))
        own = np.flatnonzero(shards == number)
        rows = stored.take(np.searchsorted(stored.chunk_ids, sample.chunk_ids[own]))
        out = gone.of_chunks(rows.neighbour_ids)
        distances = np.where(out, np.float32(np.nan), rows.distances)
        found[own] = np.take_along_axis(distances, np.argsort(out, axis=1, kind="stable"), axis=1)
        left = np.where(out.any(axis=1), rows.n_valid - out.sum(axis=1), exact.shape[1])
        exact[own] = np.where(np.arange(exact.shape[1]) < left[:, None], exact[own], np.float32(np.nan))
    at = min(10, builder.config.neighbours)
    recall = recall_at(found, exact, builder.config.metric, at)
    return {"recall_at_10": recall, "recall_at": at, "recall_queries": len(shards)}


def candidates_recall(builder: Builder, book: ReceiptBook, settings: SearchSettings) -> dict[str, Any]:
    """Recall@10 of the sampled queries' candidates, searched as all were: rows that were re-ranked do not tell it."""
    receipts = builder.executor.complete(
        book,
        neighbours_stage.nprobe_tasks([settings.nprobe], RECALL_QUERIES),
        lambda pipeline, tasks: neighbours_stage.tuning_pipeline(pipeline, book, tasks, settings),
        unit="queries",
        small=0,
    )
    sample = Sample.from_bytes(builder.storage.read_bytes(neighbours_stage.sample_path(book)))
    recall = next(iter(receipts.values())).details["recall"]
    return {"recall_at_10": recall, "recall_at": min(10, settings.k), "recall_queries": len(sample.chunk_ids)}


def is_below(details: Mapping[str, Any], gate: float) -> bool:
    """Whether a measured recall does not reach the gate; it does where there was nothing to find."""
    recall = details["recall_at_10"]
    return recall is not None and recall < gate


def refuse_low_recall(builder: Builder, details: Mapping[str, Any], key: str) -> None:
    """The gate on what was really written.

    Raises:
        RecallError: it is below.
    """
    config = builder.config
    if is_below(details, config.min_recall):
        remedy = recall_remedy(key, config.index_key is not None, builder.manifest.version.made_by)
        raise RecallError(
            f"recall@10 of the neighbours is {details['recall_at_10']:.4f}, below the gate of {config.min_recall} "
            f"(index {key}). {remedy}"
        )


# -- training ----------------------------------------------------------------------------------------------------------


def neighbour_source(builder: Builder, neighbours: int) -> NeighbourSource:
    """Where the tokens of each chunk's nearest neighbours come from."""
    chunks = {shard.number: shard for shard in builder.manifest.shards("chunks")}
    return NeighbourSource(chunks, neighbours, looked_up=builder.runner.is_local)


def build_training(builder: Builder, before: Mapping[int, Before] | None = None) -> None:
    """Sequences joined with their neighbours' tokens; ``before`` as in `join_tasks`."""
    config = builder.config
    parts = stages.training_parts(builder.manifest.stages["neighbours"].fingerprint, config)
    source = neighbour_source(builder, config.training_neighbours)
    slots = config.sequence_tokens // config.chunk_tokens
    receipts = builder.run_stage(
        StageWork(
            stage="training",
            parts=parts,
            tasks=join_tasks(shard_files(builder.manifest), builder.manifest.shards("chunks"), before),
            damaged=builder.damage.get("training", set()),
            pipeline=lambda pipeline, book, tasks: training_pipeline(pipeline, book, tasks, source, slots),
            unit="chunks",
            small=_SMALL_JOIN_CHUNKS,
        )
    )
    if receipts is None:
        return
    counts = add_counts(receipts)
    validation = {str(number): receipt.details[VALIDATION_ROWS] for number, receipt in sorted(receipts.items())}
    builder.record("training", parts, shards_by_table(receipts, "training"), counts, {VALIDATION_ROWS: validation})
    builder.progress.end(
        f"{count_of(builder.manifest.rows('training'), 'sequence')}, {count_of(counts['joined'], 'neighbour')} joined"
    )
