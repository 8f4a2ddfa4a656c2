"""The last stage: how much of each chunk its neighbours give away, as a table and as a report to read."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from retrodb.pipelines import stages
from retrodb.pipelines.builder import Builder, StageWork, add_counts, shards_by_table
from retrodb.pipelines.join import Before, join_tasks
from retrodb.pipelines.leakage import WORST_PAIRS, leakage_pipeline
from retrodb.pipelines.retrieval_stages import neighbour_source
from retrodb.pipelines.shards import shard_files

from retrodb.database import Database, Document
from retrodb.manifest import LEAKAGE_REPORT
from retrodb.quality.leakage import DEFINITION, distribution, in_words, merged_histograms, shared_run

_SMALL_COMPARE_CHUNKS: Final = 20_000


def build_report(builder: Builder, before: Mapping[int, Before] | None = None) -> None:
    """The leakage table, and ``reports/leakage.json``; ``before`` as in `join_tasks`."""
    parts = stages.report_parts(builder.manifest.stages["neighbours"].fingerprint, builder.config)
    neighbours = parts["neighbours"]
    source, tokens = neighbour_source(builder, neighbours), builder.config.chunk_tokens
    receipts = builder.run_stage(
        StageWork(
            stage="report",
            parts=parts,
            tasks=join_tasks(shard_files(builder.manifest), builder.manifest.shards("chunks"), before),
            damaged=builder.damage.get("leakage", set()),
            pipeline=lambda pipeline, book, tasks: leakage_pipeline(pipeline, book, tasks, source, tokens),
            unit="chunks",
            small=_SMALL_COMPARE_CHUNKS,
        )
    )
    if receipts is None:
        builder.mend_report("report", lambda state: write_report(builder, state.details))
        return
    found = [receipt.details for _, receipt in sorted(receipts.items())]
    worst = sorted((-overlap, chunk, other) for part in found for overlap, chunk, other in part["worst"])
    details: dict[str, Any] = {
        "neighbours": neighbours,
        "histograms": merged_histograms(part["histograms"] for part in found),
        "worst": [[chunk, other, -negative] for negative, chunk, other in worst[:WORST_PAIRS]],
    }
    tables = shards_by_table(receipts, "leakage")
    builder.record(
        "report",
        parts,
        tables,
        add_counts(receipts),
        details,
        report=lambda state: write_report(builder, state.details),
    )
    builder.progress.end(in_words({split: distribution(counts) for split, counts in details["histograms"].items()}))


def write_report(builder: Builder, details: dict[str, Any]) -> str:
    """Commit ``reports/leakage.json``; its sha256.

    It follows from the stage's ``details`` and from the documents, chunks and neighbours alone. All text in it is
    decoded from tokens, so that it is the same whether the documents' text is kept or not.
    """
    m = builder.config.chunk_tokens
    # What is deleted is in the tables still, and told like the rest.
    reader = Database(builder.storage, builder.manifest.without((), ("deleted",)))
    report = {
        "neighbours": details["neighbours"],
        "chunk_tokens": m,
        "definition": DEFINITION.format(neighbours=details["neighbours"], chunk_tokens=m),
        "splits": {
            split: {**distribution(counts), "histogram": counts} for split, counts in details["histograms"].items()
        },
        "worst": [described_pair(reader, chunk, other, overlap, m) for chunk, other, overlap in details["worst"]],
    }
    return builder.storage.commit_json(LEAKAGE_REPORT, report).sha256


def described_pair(reader: Database, chunk_id: int, neighbour_id: int, overlap: int, m: int) -> dict[str, Any]:
    """A chunk and the neighbour that it shares ``overlap`` tokens with, to read side by side."""
    chunk, neighbour = reader.chunk(chunk_id), reader.chunk(neighbour_id)
    following = reader.continuation(neighbour_id)
    document = reader.document(chunk.document_id)
    shared = shared_run(chunk.tokens, neighbour.tokens + (following.tokens if following else ()), overlap)
    distances = {found.chunk_id: found.distance for found in reader.neighbours(chunk_id)}
    return {
        "chunk_id": chunk_id,
        "neighbour_id": neighbour_id,
        "overlap": overlap,
        "leakage": overlap / m,
        "split": document.split,
        "distance": distances[neighbour_id],
        "document": _origin(document),
        "neighbour_document": _origin(reader.document(neighbour.document_id)),
        "shared_text": _decoded(reader, shared),
        "text": _decoded(reader, chunk.tokens),
        "neighbour_text": _decoded(reader, neighbour.tokens),
        "continuation_text": _decoded(reader, following.tokens) if following else None,
    }


def _origin(document: Document) -> dict[str, str | None]:
    return {"key": document.key, "title": document.title, "source": document.source}


def _decoded(reader: Database, tokens: Sequence[int]) -> str:
    return reader.tokenizer.decode(tokens).decode(errors="replace")
