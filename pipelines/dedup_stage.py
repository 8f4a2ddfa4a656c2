"""The dedup stage: near-duplicate clusters, and which documents the database goes without."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from retrodb.pipelines import dedup, sketches, stages
from retrodb.pipelines.builder import Builder, add_counts, shards_by_table
from retrodb.pipelines.dedup import Assignments, CompareSettings, PairSettings
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import as_read
from retrodb.schemas import ID_SHIFT

from retrodb.corpus import VALIDATION
from retrodb.corpus.near_duplicates import (
    DEDUP_RULES,
    NEAR_DUPLICATE,
    THRESHOLD,
    VALIDATION_DUPLICATE,
    clusters,
    removals,
    unique_pairs,
)
from retrodb.corpus.shingles import NGRAM
from retrodb.corpus.sketches import sketcher
from retrodb.errors import InputError
from retrodb.manifest import (
    DEDUP_REPORT,
    REPORT_PATH,
    REPORT_SHA256,
    STAGE_REPORTS,
    WORK_FOLDER,
    Manifest,
    Shard,
    StageState,
    fingerprint,
)
from retrodb.sizes import count_of

CUT: Final = "not_compared_with_all"
"""Key of the stage's details: documents that share most of their text with too many others."""
_SMALL_SKETCH_BYTES: Final = 8 << 20
_SMALL_NARROW_DOCUMENTS: Final = 200_000
_SMALL_PAIR_RECORDS: Final = 10_000_000
_SMALL_COMPARE_BYTES: Final = 8 << 20
_SMALL_DUPLICATES: Final = 100_000
_LARGEST: Final = 20
_SHOWN_KEYS: Final = 5


def dedup_parts(builder: Builder) -> dict[str, Any]:
    """What the dedup stage would be made from now: of documents that join others, from those as well."""
    corpus = builder.manifest.stages.get("corpus")
    parts = stages.dedup_parts(corpus.fingerprint if corpus else "", builder.config)
    if builder.joins is None or builder.config.dedup == "off":
        return parts
    there = [[shard.path, shard.sha256] for shard in comparable(builder.joins) + builder.joins.shards("deleted")]
    return {**parts, "there": fingerprint({"shards": there})}


def comparable(manifest: Manifest) -> tuple[Shard, ...]:
    """The document shards of a database that others can be compared with: none where its text is not kept."""
    return manifest.shards("documents") if manifest.config.get("text", True) else ()


def build_dedup(builder: Builder) -> None:
    """duplicates: clusters of the documents as they were read, and what is removed of them."""
    parts = dedup_parts(builder)
    current = builder.is_current("dedup", parts)
    if current and not builder.damage.get("duplicates"):
        if builder.config.dedup != "off":
            builder.mend_report("dedup", lambda state: write_report(builder, state))
        return
    builder.begin("dedup", parts)
    book = builder.book("dedup", parts)
    if current:
        builder.progress.note("dedup: duplicates are damaged and are found again")
        builder.storage.delete_folder(book.folder)
    found, cut = (None, 0) if builder.config.dedup == "off" else settle_clusters(builder, book)
    refuse_no_training(builder, 0 if found is None else int(np.count_nonzero(found.rules)))
    written = write_duplicates(builder, book, found)
    builder.prove_read("dedup")
    if current:
        builder.record_repair("dedup", written)
        builder.storage.delete_folder(book.folder)
        builder.mend_report("dedup", lambda state: write_report(builder, state))
        return
    counts = {**dict.fromkeys([f"dropped.{rule}" for rule in DEDUP_RULES], 0), "clustered": 0, **add_counts(written)}
    counts["clusters"] = 0 if found is None else len(np.unique(found.clusters))
    if cut:
        builder.progress.note(
            f"dedup: {count_of(cut, 'document shares', 'documents share')} most text with so many others that not all "
            "pairs were compared: near-duplicates among them may be missed"
        )
    builder.record(
        "dedup",
        parts,
        shards_by_table(written, "duplicates"),
        counts,
        {CUT: cut},
        report=None if found is None else lambda state: write_report(builder, state),
    )
    builder.progress.end("near-duplicates were not looked for" if found is None else describe(counts))


def settle_clusters(builder: Builder, book: ReceiptBook) -> tuple[Assignments, int]:
    """The clusters of all documents, and how many were not compared with all that share a band with them."""
    pairs, cut = near_duplicate_pairs(builder, book)
    return assigned(builder, pairs), cut


def near_duplicate_pairs(builder: Builder, book: ReceiptBook) -> tuple[np.ndarray, int]:
    """The near-duplicates among documents, int64 [p, 2] of ids as they were read, the smaller first; and how many
    documents were not compared with all that share a band with them.

    Of documents that join others: those pairs of which the second one is new. Every step resumes.
    """
    there = comparable(builder.joins) if builder.joins else ()
    documents = [*there, *builder.source_documents()]
    sketched, total = sketched_documents(builder, book, there)
    pairs, compared = replace(book, step="pair"), replace(book, step="compare")
    pairing = PairSettings(sketched, dedup.parts_for(total), builder.first_shard if there else 0)
    receipts = builder.executor.complete(
        pairs,
        dedup.pair_tasks(total),
        lambda pipeline, tasks: dedup.pair_pipeline(pipeline, pairs, tasks, pairing),
        unit="records",
        small=_SMALL_PAIR_RECORDS,
        waves=dedup.one_task_a_wave,
    )
    having: dict[int, list[int]] = {}
    for wave, receipt in sorted(receipts.items()):
        for shard in receipt.details["shards"]:
            having.setdefault(shard, []).append(wave)
    comparing = CompareSettings(
        pairs,
        {shard: tuple(waves) for shard, waves in having.items()},
        {shard.number: as_read(shard) for shard in documents},
    )
    tasks = dedup.compare_tasks(documents, having)
    builder.executor.complete(
        compared,
        tasks,
        lambda pipeline, tasks: dedup.compare_pipeline(pipeline, compared, tasks, comparing),
        unit="bytes",
        small=_SMALL_COMPARE_BYTES,
        waves=dedup.one_task_a_wave,
    )
    parts = [builder.storage.read_array(dedup.near_duplicates_path(compared, task.number)) for task in tasks]
    found = unique_pairs(np.concatenate([np.empty((0, 2), np.int64), *parts]))
    return found, max(receipt.details["cut"] for receipt in receipts.values())


def sketched_documents(builder: Builder, book: ReceiptBook, there: Sequence[Shard]) -> tuple[dict[int, str], int]:
    """The files with the sketches of documents, by their shard; and how many documents that is: all that are new, and
    of those that are ``there`` the ones that may be near-duplicates of one of them.

    What a killed run has sketched with other libraries is sketched again.
    """
    new = builder.source_documents()
    making, narrowing = (replace(book, step=f"{step}-{sketcher() >> 32:08x}") for step in ("sketch", "narrow"))
    builder.executor.complete(
        making,
        sketches.sketch_tasks(new),
        lambda pipeline, tasks: sketches.sketch_pipeline(pipeline, making, tasks),
        unit="bytes",
        small=_SMALL_SKETCH_BYTES,
    )
    paths = {shard.number: sketches.sketch_path(shard) for shard in new if shard.rows}
    total = sum(shard.rows for shard in new)
    if builder.joins is None or not there:
        return paths, total
    settings = sketches.NarrowSettings(tuple(paths.values()), total, builder.joins.shards("deleted"))
    receipts = builder.executor.complete(
        narrowing,
        sketches.narrow_tasks(there),
        lambda pipeline, tasks: sketches.narrow_pipeline(pipeline, narrowing, tasks, settings),
        unit="documents",
        small=_SMALL_NARROW_DOCUMENTS,
    )
    found = {number: receipt.counts[sketches.NARROWED] for number, receipt in sorted(receipts.items())}
    old = {number: sketches.narrowed_path(narrowing, number) for number, count in found.items() if count}
    return {**old, **paths}, total + sum(found.values())


def assigned(builder: Builder, pairs: np.ndarray) -> Assignments:
    """Clusters of near-duplicates int64 [p, 2], with what is removed of them."""
    ids, labels = clusters(pairs)
    validation = of_validation(builder, ids)
    config = builder.config
    repeats, contaminated = removals(labels, validation, config.dedup == "drop", config.decontaminate)
    return Assignments.of(ids, labels, rule_codes(repeats, contaminated))


def rule_codes(repeats: np.ndarray, contaminated: np.ndarray) -> np.ndarray:
    """`Assignments.rules`, int8 [n], of what `removals` says."""
    rules = np.zeros(len(repeats), dtype=np.int8)
    rules[repeats] = 1 + DEDUP_RULES.index(NEAR_DUPLICATE)
    rules[contaminated] = 1 + DEDUP_RULES.index(VALIDATION_DUPLICATE)
    return rules


def of_validation(builder: Builder, ids: np.ndarray) -> np.ndarray:
    """bool [n]: which documents, by their ids as read, are of the validation split."""
    found = np.zeros(len(ids), dtype=bool)
    if not builder.config.has_validation:
        return found
    paths = {shard.number: as_read(shard) for shard in builder.source_documents()}
    shards = ids >> ID_SHIFT
    for shard in np.unique(shards):
        own = shards == shard
        split = builder.storage.read_table(paths[int(shard)], ["split"])["split"].to_numpy()
        found[own] = split[ids[own] & ((1 << ID_SHIFT) - 1)] == VALIDATION
    return found


def write_duplicates(builder: Builder, book: ReceiptBook, found: Assignments | None) -> dict[int, Receipt]:
    """The shards of the ``duplicates`` table."""
    shards = []
    for shard, own in found.by_shard() if found is not None else ():
        builder.storage.commit_bytes(dedup.assignment_path(book, shard), own.to_bytes())
        shards.append(shard)
    return builder.executor.complete(
        book,
        dedup.write_tasks(builder.source_documents(), shards),
        lambda pipeline, tasks: dedup.write_pipeline(pipeline, book, tasks),
        unit="documents",
        small=_SMALL_DUPLICATES,
    )


def refuse_no_training(builder: Builder, removed: int) -> None:
    """Refuse a database in which nothing can be a neighbour, and leave nothing of it.

    Raises:
        InputError: every document is a validation document, or was removed for repeating one.
    """
    read = builder.manifest.stages["corpus"].counts
    training = read["kept"] - read.get("validation", 0)
    if training > removed:
        return
    why = (
        f"every training document ({training:,}) is a near-duplicate of a validation document; look at the inputs, or "
        "give --no-decontaminate"
        if training
        else f"every document ({read['kept']:,}) is a validation document; give a smaller --validation-fraction"
    )
    builder.undo(stages.downstream("corpus"))
    builder.storage.delete_folder(WORK_FOLDER)
    raise InputError(f"nothing is left to retrieve from: {why}.")


def report_anew(builder: Builder) -> None:
    """The report of a version whose near-duplicates are not those of the version before: it names documents."""
    state = builder.manifest.stages["dedup"]
    if REPORT_SHA256 not in state.details:
        return
    where = builder.storage.placed(STAGE_REPORTS["dedup"])
    details = {**state.details, REPORT_PATH: where, REPORT_SHA256: write_report(builder, state)}
    builder.save(builder.manifest.with_stage("dedup", replace(state, details=details), {}))


def write_report(builder: Builder, state: StageState) -> str:
    """Commit ``reports/dedup.json``: what was found and removed, and the largest clusters; its sha256.

    It follows from the ``duplicates`` table and from what is recorded of the stage.
    """
    shards = builder.manifest.shards("duplicates")
    read = [builder.storage.read_table(shard, ["cluster_id"])["cluster_id"].to_numpy() for shard in shards]
    names, sizes = np.unique(np.concatenate([np.empty(0, np.int64), *read]), return_counts=True)
    by_size, numbers = np.unique(sizes, return_counts=True)
    largest = np.lexsort((names, -sizes))[:_LARGEST]
    keys = _keys(builder, names[largest])
    report = {
        "definition": f"sets of {NGRAM}-grams of words with a Jaccard similarity of at least {THRESHOLD}, connected",
        "dedup": state.made_from["dedup"],
        "documents": builder.manifest.stages["corpus"].counts["kept"],
        "clusters": state.counts["clusters"],
        "clustered": state.counts["clustered"],
        "removed": {rule: state.counts[f"dropped.{rule}"] for rule in DEDUP_RULES},
        CUT: state.details[CUT],
        "clusters_by_size": dict(zip(map(str, by_size.tolist()), numbers.tolist(), strict=True)),
        "largest": [
            {"cluster_id": int(names[at]), "documents": int(sizes[at]), "keys": keys[int(names[at])]} for at in largest
        ],
    }
    return builder.storage.commit_json(DEDUP_REPORT, report).sha256


def _keys(builder: Builder, names: np.ndarray) -> dict[int, list[str]]:
    """The first few keys of some clusters."""
    found: dict[int, list[str]] = {int(name): [] for name in names}
    for shard in builder.manifest.shards("duplicates"):
        table = builder.storage.read_table(shard, ["cluster_id", "key"])
        own = np.flatnonzero(np.isin(table["cluster_id"].to_numpy(), names))
        for row in table.take(pa.array(own)).to_pylist():
            keys = found[row["cluster_id"]]
            if len(keys) < _SHOWN_KEYS:
                keys.append(row["key"])
    return found


def describe(counts: Mapping[str, int]) -> str:
    """``589 documents in 278 near-duplicate clusters, 311 removed``."""
    removed = sum(counts[f"dropped.{rule}"] for rule in DEDUP_RULES)
    text = f"{count_of(counts['clustered'], 'document')} in {count_of(counts['clusters'], 'near-duplicate cluster')}"
    return text + (f", {removed:,} removed" if removed else "")
