"""The stages from raw files to vectors: what each is made from, its tasks, and what is recorded of it."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from retrodb.pipelines import stages
from retrodb.pipelines.block_duplicates import find_block_duplicates, mend_block_duplicates
from retrodb.pipelines.builder import Builder, StageWork, add_counts, shards_by_table
from retrodb.pipelines.chunk import VALIDATION_CHUNKS, BlockSettings, ChunkSettings, chunk_pipeline, chunk_tasks
from retrodb.pipelines.corpus import corpus_pipeline, read_tasks, scan_pipeline, scan_tasks
from retrodb.pipelines.dedup_stage import dedup_parts
from retrodb.pipelines.embed import NULL_NUMBER, EmbedSettings, embed_pipeline, embed_tasks
from retrodb.pipelines.integrity import recorded_scans
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.vocabulary import is_stored, settle_tokenizer

from retrodb.chunking import OWN_TOKENIZER
from retrodb.chunking.blocks import Room
from retrodb.chunking.sentences import splitter_identity
from retrodb.config import BuildConfig
from retrodb.corpus import (
    TRAIN,
    VALIDATION,
    FieldNames,
    FractionSplit,
    Plan,
    ScannedFile,
    Split,
    SplitOf,
    all_train,
    plan,
    read_split,
)
from retrodb.encoding import choose_device, count_cards
from retrodb.errors import InputError
from retrodb.manifest import TRAINED_TOKENIZER, WORK_FOLDER, Shard, documents_fingerprint, fingerprint
from retrodb.sizes import count_of

_SMALL_SCAN_BYTES: Final = 64 << 20
_SMALL_READ_BYTES: Final = 16 << 20
_SMALL_TEXT_BYTES: Final = 1 << 20
_SMALL_EMBED_CHUNKS: Final = 200
_SMALL_EMBED_BYTES: Final = 64 << 10
"""Of text: more chunks than that, of any usual size."""


def build_corpus(builder: Builder) -> None:
    """documents and quarantine."""
    config = builder.config
    scans = scan_inputs(builder)
    layout = plan(scans, config.shard_bytes, builder.first_shard)
    parts = stages.corpus_parts(scans, config, layout.shard_bytes)
    fields = FieldNames(config.text_field, config.id_field, config.title_field)
    split_of = FractionSplit(config.validation_fraction, config.seed) if config.validation_fraction else all_train
    again = is_read_again(builder, parts)
    fresh = not builder.is_current("corpus", parts) and (builder.manifest.tables or config.has_validation)
    if builder.joins is None and (again or fresh):
        refuse_useless(layout, fields, split_of, config)
    if again:
        reasons = stages.why_rebuilt(builder.manifest, "dedup", dedup_parts(builder))
        builder.progress.note(f"corpus: read again for other near-duplicates ({'; '.join(reasons)})")
        builder.undo(stages.downstream("corpus"))
    current = builder.is_current("corpus", parts)
    if not current and sum(shard.bytes for split in layout.splits for shard in split.shards) >= _SMALL_EMBED_BYTES:
        builder.runner.expect()
    damaged = damaged_documents(builder) if current else set()
    finished = current and builder.manifest.has_finished_documents
    folder = f"{builder.read_folder}/" if finished else ""
    receipts = builder.run_stage(
        StageWork(
            stage="corpus",
            parts=parts,
            tasks=read_tasks(layout.splits),
            damaged=damaged,
            pipeline=lambda pipeline, book, tasks: corpus_pipeline(pipeline, book, tasks, fields, split_of, folder),
            unit="bytes",
            small=_SMALL_READ_BYTES,
            rewritten_later=("documents",) if finished else (),
        )
    )
    builder.damage.setdefault("chunks", set()).update(damaged)
    if receipts is None:
        return
    counts = add_counts(receipts)
    refuse_empty(builder, receipts, counts)
    tables = shards_by_table(receipts, "documents", "quarantine")
    details = {"documents": documents_fingerprint(tables["documents"])}
    builder.record("corpus", parts, tables, counts, details, inputs=[scan.as_json() for scan in scans])
    builder.progress.end(describe_counts(counts))
    if config.validation_fraction and not counts["validation"]:
        fraction = config.validation_fraction
        builder.progress.note(
            f"corpus: none of {count_of(counts['kept'], 'document')} fell to --validation-fraction {fraction}"
        )


def is_read_again(builder: Builder, parts: Mapping[str, Any]) -> bool:
    """Whether other near-duplicates are wanted than those that finished documents went through: they are found in the
    documents as they were read."""
    return (
        builder.is_current("corpus", parts)
        and builder.manifest.has_finished_documents
        and not builder.is_current("dedup", dedup_parts(builder))
    )


def refuse_useless(layout: Plan, fields: FieldNames, split_of: SplitOf, config: BuildConfig) -> None:
    """Before the tables of an existing database give way: do the new inputs make one?

    Reads until that is known: mostly one training document, and one validation document where there are to be any; the
    whole validation corpus, where its first documents are training documents too.

    Raises:
        InputError: there would be no document to retrieve, or none of the validation inputs can be kept.
    """
    held_out = [split for split in layout.splits if split.shards[0].split == VALIDATION]
    training = [split for split in layout.splits if split.shards[0].split == TRAIN]
    validation: set[bytes] = set()
    if held_out:
        validation = set(
            _hashes(held_out, fields, split_of, VALIDATION, "validation document: no record of --validation")
        )
    repeated = validation if config.decontaminate else set()
    for content_hash in _hashes(training, fields, split_of, TRAIN, "document to build from: no record of these inputs"):
        if content_hash not in repeated:
            return
    raise InputError(
        "no document to retrieve from: every training document is a validation document as well. "
        "The database was left as it was. Look at the inputs, or give --no-decontaminate."
    )


def _hashes(splits: list[Split], fields: FieldNames, split_of: SplitOf, wanted: str, what: str) -> Iterator[bytes]:
    """The content hashes of the documents of one kind; at least one."""
    reasons: list[str] = []
    others = found = 0
    for split in splits:
        for output in read_split(split, fields, split_of=split_of):
            own = pc.equal(output.documents["split"], wanted)
            hashes = output.documents["content_hash"].filter(own).to_pylist()
            found += len(hashes)
            others += output.documents.num_rows - len(hashes)
            reasons += _reasons(output.quarantine)
            yield from hashes
    if not found and others:
        raise InputError(
            f"no training document: every one of {count_of(others, 'document')} fell to --validation-fraction. The "
            "database was left as it was. Give a smaller fraction."
        )
    if not found:
        raise InputError(f"no {what} can be kept. The database was left as it was." + "".join(reasons[:3]))


def _reasons(quarantine: pa.Table) -> list[str]:
    rows = quarantine.slice(0, 3).to_pylist()
    return [f"\n  {row['source']} at {row['position']}: {row['reason']}" for row in rows]


def describe_counts(counts: Mapping[str, int]) -> str:
    """``2,657 documents of 2,846, 187 empty, 2 quarantined``."""
    text = f"{count_of(counts['kept'], 'document')} of {counts['in']:,}"
    if counts.get("validation"):
        text += f", {counts['validation']:,} of them for validation"
    for name, number in counts.items():
        if name.startswith("dropped.") and number:
            text += f", {number:,} {name.removeprefix('dropped.')}"
    return text + (f", {counts['quarantined']:,} quarantined" if counts.get("quarantined") else "")


def scan_inputs(builder: Builder) -> list[ScannedFile]:
    """The inputs' checksums and sizes: those of the manifest where a file has not been touched since."""
    known = recorded_scans(builder.manifest)
    scans = {file.url: known[file.url] for file in builder.inputs if file.url in known and known[file.url].is_of(file)}
    fresh = [file for file in builder.inputs if file.url not in scans]
    if fresh:
        book = ReceiptBook(builder.storage, "scan", fingerprint([[f.url, f.size, f.stamp] for f in fresh]))
        receipts = builder.executor.complete(
            book,
            scan_tasks(fresh),
            lambda pipeline, tasks: scan_pipeline(pipeline, book, tasks),
            unit="bytes",
            small=_SMALL_SCAN_BYTES,
            driver_may=True,
        )
        scans |= {file.url: ScannedFile.from_json(receipts[n].details) for n, file in enumerate(fresh)}
    return [replace(scans[file.url], split=file.split) for file in builder.inputs]


def damaged_documents(builder: Builder) -> set[int]:
    """Document shards to read again from their source.

    A shard that the chunk stage, not yet done, has already finished is no damage; one whose chunks are to be made
    again, but whose text is not kept, has to be read again.
    """
    everything = {shard.number for shard in builder.manifest.shards("documents")}
    if builder.damage.get("duplicates"):
        return everything  # found again, in the documents as they were read
    damaged = builder.damage.get("documents", set()) | builder.damage.get("quarantine", set())
    parts = chunk_stage_parts(builder)
    if builder.is_current("chunk", parts):
        if builder.config.text:
            return damaged
        if not is_stored(builder, builder.book("chunk", parts)):
            return everything
        return damaged | builder.damage.get("chunks", set())
    book = builder.book("chunk", parts)
    if builder.manifest.has_finished_documents and not builder.manifest.config.get("text", True):
        # Their text is gone: read again, all but those that an earlier run has read again.
        again = {shard.number for shard in builder.source_documents() if shard.path.startswith(builder.read_folder)}
        damaged = everything if "chunk" in builder.manifest.stages else everything - again
    return damaged - set(book.read_all(damaged, whole=True))


def refuse_empty(builder: Builder, receipts: Mapping[int, Receipt], counts: Mapping[str, int]) -> None:
    """Refuse to go on without a document, leaving nothing behind.

    Raises:
        InputError: no document was kept; tells why the first ones were not.
    """
    if counts.get("kept", 0):
        return
    reasons: list[str] = []
    for shard in shards_by_table(receipts, "quarantine")["quarantine"]:
        reasons += _reasons(builder.storage.read_table(shard.path, ["source", "position", "reason"]))
    _remove(builder, [shard for receipt in receipts.values() for shard in receipt.shards.values()])
    dropped = ", ".join(
        f"{number:,} {name}" for name, number in counts.items() if number and name not in ("in", "kept")
    )
    raise InputError(
        f"no document to build from: of {count_of(counts.get('in', 0), 'record')} none was kept "
        f"({dropped or 'the files are empty'})."
        + "".join(reasons[:3])
        + ("\n  Is --text-field right?" if reasons else "")
    )


def _remove(builder: Builder, shards: list[Shard]) -> None:
    builder.storage.delete(*(shard.path for shard in shards))
    builder.storage.delete_folder(WORK_FOLDER)
    for table in ("documents", "quarantine"):
        if not builder.storage.list_files(table):
            builder.storage.delete_folder(table)


def chunk_stage_parts(builder: Builder) -> dict[str, Any]:
    """What the chunk stage would be made from now."""
    dedup = builder.manifest.stages.get("dedup")
    tokenizer = builder.ingredients.tokenizer
    name = tokenizer.fingerprint if tokenizer else builder.config.tokenizer
    return stages.chunk_parts(dedup.fingerprint if dedup else "", builder.config, name, builder.ingredients.pairs)


def chunk_settings(builder: Builder, fingerprint: str) -> ChunkSettings:
    """How workers cut documents; ``fingerprint`` is the tokenizer's."""
    ingredients = builder.ingredients
    return ChunkSettings(
        tokenizer=ingredients.tokenizer_spec if ingredients.tokenizer is not None else TRAINED_TOKENIZER,
        stored=fingerprint if ingredients.stored else "",
        chunk_tokens=builder.config.chunk_tokens,
        keep_text=builder.config.text,
        blocks=BlockSettings(Room(builder.config.chunk_tokens, pairs.special_tokens), splitter_identity())
        if (pairs := builder.ingredients.pairs) is not None
        else None,
    )


def _refuse_no_chunk(tokenizer: str, receipts: Mapping[int, Receipt]) -> None:
    """Raises InputError: there is nothing to embed."""
    if not add_counts(receipts).get("chunks"):
        raise InputError(f"the tokenizer {tokenizer!r} found no token in any document.")


def build_chunks(builder: Builder) -> None:
    """chunks, and the documents' last columns."""
    parts = chunk_stage_parts(builder)
    tokenizer = settle_tokenizer(builder, builder.book("chunk", parts))
    settings = chunk_settings(builder, tokenizer.fingerprint)
    receipts = builder.run_stage(
        StageWork(
            stage="chunk",
            parts=parts,
            tasks=chunk_tasks(
                builder.source_documents(),
                builder.manifest.shards("duplicates"),
                sketched=builder.config.text and builder.config.dedup != "off",
            ),
            damaged=builder.damage.get("chunks", set()),
            pipeline=lambda pipeline, book, tasks: chunk_pipeline(pipeline, book, tasks, settings),
            unit="bytes",
            small=_SMALL_TEXT_BYTES,
            refuse=functools.partial(_refuse_no_chunk, builder.config.tokenizer),
        )
    )
    if receipts is None:
        mend_block_duplicates(builder)
        builder.storage.delete_folder(builder.book("chunk", parts).folder)  # a tokenizer learnt again leaves one
        builder.storage.delete_folder(builder.read_folder)
        return
    counts = add_counts(receipts)
    fingerprints = {**builder.manifest.fingerprints, "tokenizer": tokenizer.as_json()}
    tables = shards_by_table(receipts, "chunks", "documents")
    held_out = {
        str(n): found for n, receipt in sorted(receipts.items()) if (found := receipt.details[VALIDATION_CHUNKS])
    }
    details = {VALIDATION_CHUNKS: held_out} if held_out else {}
    if builder.config.unit == "block" and "block_duplicates" in builder.tables:
        tables["block_duplicates"], of_duplicates = find_block_duplicates(builder, tables["chunks"])
        counts |= of_duplicates
    builder.record("chunk", parts, tables, counts, details, fingerprints=fingerprints)
    builder.storage.delete_folder(builder.read_folder)
    builder.progress.end(f"{count_of(counts['chunks'], builder.config.unit)}, {count_of(counts['tokens'], 'token')}")


def build_embeddings(builder: Builder) -> None:
    """One vector a chunk."""
    encoder = builder.ingredients.settled_encoder(builder.manifest)
    parts = stages.embed_parts(builder.manifest.stages["chunk"].made_from, encoder)
    blocks = builder.config.unit == "block"
    null = blocks and "null" in builder.tables
    settings = EmbedSettings(
        encoder=builder.config.encoder,
        files_sha256=encoder.files_sha256,
        precision=encoder.precision,
        device=builder.run.device,
        own_tokens=builder.config.tokenizer == OWN_TOKENIZER,
        blocks=blocks,
        chunking=chunk_settings(builder, builder.manifest.fingerprints["tokenizer"]["fingerprint"]),
    )
    hints = builder.executor.runner.hints("embed")
    receipts = builder.run_stage(
        StageWork(
            stage="embed",
            parts=parts,
            tasks=embed_tasks(builder.manifest.shards("chunks"), builder.manifest.shards("documents"), null),
            damaged=builder.damage.get("embeddings", set()) | ({NULL_NUMBER} if builder.damage.get("null") else set()),
            pipeline=lambda pipeline, book, tasks: embed_pipeline(pipeline, book, tasks, settings, hints),
            unit=f"{builder.config.unit}s",
            small=_SMALL_EMBED_CHUNKS,
            most=count_cards() if builder.runner.is_local and choose_device(settings.device) == "cuda" else None,
        )
    )
    if receipts is None:
        return
    fingerprints = {**builder.manifest.fingerprints, "encoder": encoder.as_json()}
    counts = add_counts(receipts)
    tables = shards_by_table(receipts, "embeddings", *(["null"] if null else []))
    builder.record("embed", parts, tables, counts, {}, fingerprints=fingerprints)
    builder.progress.end(
        f"{count_of(counts['vectors'], 'vector')} of {encoder.dimension}, {encoder.name}, {encoder.precision}"
    )
