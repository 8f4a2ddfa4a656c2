"""``retrodb spans``: the one stage that a database has on request, beside those of its build.

It is made from the finished documents and chunks alone, with receipts as every stage. A build leaves it as it is, and
undoes it where the chunks are made again.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from retrodb.pipelines import stages
from retrodb.pipelines.builder import Builder, StageWork, add_counts, shards_by_table
from retrodb.pipelines.driver import BuildOutcome
from retrodb.pipelines.holding import held, lay_out
from retrodb.pipelines.ingredients import Ingredients
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.receipts import ReceiptBook
from retrodb.pipelines.runners import make_runner
from retrodb.pipelines.spans import SpanWork, span_pipeline, span_tasks, write_pieces

from retrodb.chunking.sentences import splitter_identity
from retrodb.config import BuildConfig, RunSettings
from retrodb.corpus import ScannedFile
from retrodb.errors import DamagedError, InputError
from retrodb.manifest import (
    DAMAGE_REPORT,
    FIRST_VERSION,
    MANIFEST_NAME,
    SPANS_STAGE,
    WORK_FOLDER,
    Manifest,
    Version,
    taken_from,
    version_folder,
)
from retrodb.sizes import count_of
from retrodb.spans import SpanSettings
from retrodb.spans.imports import assigned_rows, import_identity, scan_imports
from retrodb.spans.taggers import DATES, IMPORT, NER, resolve_taggers
from retrodb.spans.wordpieces import load_wordpieces
from retrodb.storage import Storage
from retrodb.versions import VersionStorage, next_version, now, publish

_SMALL_TAG_DOCUMENTS: Final = 50
_MADE_OF: Final = ("documents", "chunks")
_TABLES: Final = stages.STAGE_TABLES[SPANS_STAGE]


def build_spans(
    out: Storage, settings: SpanSettings, run: RunSettings, progress: Progress, encoder: str | None = None
) -> BuildOutcome:
    """Find the salient spans of a database and draw masked queries, or bring them up to date.

    Args:
        out: the database, whose chunk stage is done.
        settings: how; other ones than the database has make its tables anew.
        run: how it is carried out.
        progress: is told what happens.
        encoder: where the database's encoder is now, whose tokenizer queries are made with; None: where it was.

    Raises:
        InputError: there is no such database, its documents have no text, or a tagger or tokenizer is missing.
        DamagedError: what it would be made from is damaged.
        LockedError: a build holds the database.
        WorkerError: a worker failed; what was finished is kept.
    """
    taggers, imports = resolve_taggers(settings.taggers if settings.mask == "salient" else ())
    files = scan_imports(imports)
    runner = make_runner(run)
    runner.check([out.url, *(file.url for file in files)])
    with contextlib.closing(runner), held(out, progress, run.wait) as current:
        place = _place(out, current, progress)
        builder = _builder(place, run, progress, runner)
        _refuse_unfit(builder)
        where = encoder or _encoder(builder)
        wordpieces = load_wordpieces(where)
        identities = [tagger.identity for tagger in taggers]
        work = SpanWork(
            replace(settings, taggers=tuple(spec for spec in settings.taggers if not spec.startswith("import:"))),
            where,
            wordpieces.fingerprint,
            tuple(map(repr, identities)),
        )
        known = [*identities, import_identity(files)] if files else identities
        chunk = builder.manifest.stages["chunk"].fingerprint
        _run(builder, stages.spans_parts(chunk, settings, known, wordpieces.fingerprint), work, files)
        if isinstance(place, VersionStorage):
            _publish(out, current, place, builder)
        return BuildOutcome(
            builder.manifest, tuple(builder.done), builder.executor.seconds, tuple(builder.executor.jobs)
        )


@dataclass(frozen=True)
class QueriesOfNew:
    """The queries of documents that are new to a database, drawn as those that are there were.

    Spans that were imported are of the documents that they were imported for: in new ones none are looked for.
    """

    current: Manifest
    settings: SpanSettings
    taggers: tuple[Mapping[str, Any], ...]
    """Their identities, in order; imports are none of them."""

    @staticmethod
    def of(current: Manifest, url: str) -> "QueriesOfNew | None":
        """None where the database has no queries.

        Raises:
            InputError: a tagger is not installed, or is another one by now.
        """
        state = current.stages.get(SPANS_STAGE)
        if state is None:
            return None
        parts = state.made_from
        recorded = [tagger for tagger in parts["taggers"] if tagger["name"] != IMPORT]
        specs = tuple(DATES if tagger["name"] == DATES else f"{NER}:{tagger['name']}" for tagger in recorded)
        taggers, _ = resolve_taggers(specs)
        found = [tagger.identity for tagger in taggers]
        if found != recorded or parts["sentences"] != splitter_identity():
            raise InputError(
                f"{url} has masked queries that were drawn by {_named(recorded)}, {parts['sentences']}; here are "
                f"{_named(found)}, {splitter_identity()}. Install what drew them, or draw all anew with retrodb spans."
            )
        settings = SpanSettings(specs, parts["mask"], parts["seed"], parts["max_tokens"], parts["max_masked"])
        return QueriesOfNew(current, settings, tuple(found))

    def _work(self, builder: Builder, wordpieces: str) -> SpanWork:
        return SpanWork(self.settings, _encoder(builder), wordpieces, tuple(map(repr, self.taggers)))

    def draw_all(self, builder: Builder) -> None:
        """Record queries of all documents, none of which was there: those of another corpus."""
        imported = len(self.taggers) < len(self.current.stages[SPANS_STAGE].made_from["taggers"])
        if imported:
            builder.progress.note(
                "spans: those that were imported are of the corpus before; import those of this one by `retrodb spans`"
            )
        if imported and not self.taggers:
            return
        wordpieces = load_wordpieces(_encoder(builder)).fingerprint
        chunk = builder.manifest.stages["chunk"].fingerprint
        parts = stages.spans_parts(chunk, self.settings, self.taggers, wordpieces)
        _run(builder, parts, self._work(builder, wordpieces), ())

    def draw(self, builder: Builder) -> None:
        """Record the queries that were there and those of the further shards of documents."""
        state = self.current.stages[SPANS_STAGE]
        parts = {**state.made_from, "chunks": builder.manifest.stages["chunk"].fingerprint}
        if builder.is_current(SPANS_STAGE, parts):
            return
        book = builder.book(SPANS_STAGE, parts)
        builder.begin(SPANS_STAGE, parts)
        work = self._work(builder, parts["wordpieces"])
        there = {shard.number for shard in self.current.shards("documents")}
        receipts = builder.executor.complete(
            book,
            [task for task in span_tasks(builder.manifest, {}) if task.number not in there],
            lambda pipeline, tasks: span_pipeline(pipeline, book, tasks, work),
            unit="documents",
            small=_SMALL_TAG_DOCUMENTS,
        )
        drawn = add_counts(receipts)
        counts = {name: state.counts.get(name, 0) + drawn.get(name, 0) for name in state.counts | drawn}
        made = shards_by_table(receipts, *_TABLES)
        tables = {table: [*self.current.shards(table), *made.get(table, ())] for table in _TABLES}
        tables = {table: shards for table, shards in tables.items() if shards or table in self.current.tables}
        builder.record(SPANS_STAGE, parts, tables, counts, state.details)
        builder.progress.end(describe_counts(drawn))


def _named(taggers: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(f"{tagger['name']} {tagger['version']}" for tagger in taggers) or "none"


def _place(out: Storage, current: Manifest, progress: Progress) -> Storage:
    """Where the tables go: into the database itself, or, where it has versions, into the next one."""
    if not current.versions:
        return out
    view = VersionStorage(out.url, next_version(current))
    version = Version(view.version, current.version.id, "spans", current.version.step)
    start = replace(current, version=version, versions=())
    lay_out(view, start, lambda left: _but_spans(left) == _but_spans(start), progress)
    return view


def _but_spans(manifest: Manifest) -> Manifest:
    """All that the stage leaves as it is."""
    return replace(manifest.without([SPANS_STAGE], _TABLES), fingerprints={})


def _publish(out: Storage, current: Manifest, view: VersionStorage, builder: Builder) -> None:
    if builder.done:
        version = replace(builder.manifest.version, created=now())
        publish(out, current, replace(builder.manifest, version=version), builder.manifest)
    else:
        view.delete_folder(version_folder(view.version))


def _builder(out: Storage, run: RunSettings, progress: Progress, runner: Any) -> Builder:
    """A builder that needs no inputs: the settings of the database are those it has."""
    builder = Builder((), out, BuildConfig(), run, progress, Ingredients(None, "", None), runner, _TABLES)
    with taken_from(out.describe(MANIFEST_NAME)):
        builder.config = BuildConfig(**builder.manifest.config)
    return builder


def _encoder(builder: Builder) -> str:
    """The encoder that made the vectors, or that will."""
    recorded = builder.manifest.fingerprints.get("encoder") if "embed" in builder.manifest.stages else None
    return str(recorded["name"] if recorded else builder.config.encoder)


def _refuse_unfit(builder: Builder) -> None:
    manifest, url = builder.manifest, builder.storage.url
    if "chunk" not in manifest.stages:
        raise InputError(f"{url} has no chunks yet: run the build, at least --until chunk.")
    if not manifest.stages["chunk"].made_from.get("text", True):
        raise InputError(f"{url} was built with --no-text: spans are found in the documents' text. Build it with text.")
    damaged = [table for table in _MADE_OF if builder.damage.get(table)]
    if damaged:
        raise DamagedError(f"{url}: {' and '.join(damaged)} are damaged. Run the build again: it repairs them.")


def _run(builder: Builder, parts: dict[str, Any], work: SpanWork, files: Sequence[ScannedFile]) -> None:
    book = builder.book(SPANS_STAGE, parts)
    tables = stages.STAGE_TABLES[SPANS_STAGE]
    damaged = set().union(*(builder.damage.get(table, set()) for table in tables))
    if builder.is_current(SPANS_STAGE, parts) and not damaged:
        return
    if damaged and files and builder.manifest.version.id != FIRST_VERSION:
        builder.progress.note("spans: made again, for documents may have joined or left since spans were imported")
        builder.undo([SPANS_STAGE])  # an imported row may belong to another shard by now, and is counted there
    builder.begin(SPANS_STAGE, parts)
    imported = _assign(builder, book, files) if files else {}
    receipts = builder.run_stage(
        StageWork(
            stage=SPANS_STAGE,
            parts=parts,
            tasks=span_tasks(builder.manifest, imported),
            damaged=damaged,
            pipeline=lambda pipeline, book, tasks: span_pipeline(pipeline, book, tasks, work),
            unit="documents",
            small=_SMALL_TAG_DOCUMENTS,
        )
    )
    _forget_damage(builder)
    if receipts is None:
        return
    counts = add_counts(receipts)
    wordpieces = load_wordpieces(work.encoder)
    details = {"mask_id": wordpieces.mask_id, "token_type": wordpieces.token_type, "encoder": work.encoder}
    builder.record(SPANS_STAGE, parts, shards_by_table(receipts, *tables), counts, details)
    if not builder.storage.list_folders(WORK_FOLDER):
        builder.storage.delete_folder(WORK_FOLDER)
    builder.progress.end(describe_counts(counts))


def _assign(builder: Builder, book: ReceiptBook, files: Sequence[ScannedFile]) -> dict[int, tuple[str, ...]]:
    """Bring imported spans to the shards of their documents: the same pieces each time, for a run that goes on."""
    paths: dict[int, list[str]] = {}
    first = builder.manifest.shards("documents")[0].number

    def resolve(wanted: set[str | int]) -> dict[str | int, list[int]]:
        found: dict[str | int, list[int]] = {}
        for shard in builder.manifest.shards("documents"):
            table = builder.storage.read_table(shard, ["document_id", "key"])
            for document_id, key in zip(table["document_id"].to_pylist(), table["key"].to_pylist(), strict=True):
                for name in (key, document_id):
                    if name in wanted:
                        found.setdefault(name, []).append(document_id)
        return found

    for batch, tables in enumerate(assigned_rows(files, resolve, first)):
        for shard, path in write_pieces(book, batch, tables).items():
            paths.setdefault(shard, []).append(path)
    return {shard: tuple(own) for shard, own in paths.items()}


def _forget_damage(builder: Builder) -> None:
    """What a verification found of these tables is repaired; of others the next build has to know."""
    try:
        report = builder.storage.read_json(DAMAGE_REPORT)
        left = [path for path in report["paths"] if path.partition("/")[0] not in stages.STAGE_TABLES[SPANS_STAGE]]
    except (DamagedError, LookupError, TypeError, AttributeError):
        return  # there is none, or none that can be read
    if left:
        builder.storage.commit_json(DAMAGE_REPORT, {"paths": left})
    else:
        builder.storage.delete(DAMAGE_REPORT)


def describe_counts(counts: Mapping[str, int]) -> str:
    """``5,210 spans in 3,400 sentences, 2,900 queries; 12 too_late``."""
    left_out = [f"{number:,} {name.partition('.')[2]}" for name, number in counts.items() if "." in name and number]
    left_out += [f"{counts['quarantined']:,} quarantined"] if counts.get("quarantined") else []
    found = f"{count_of(counts['spans'], 'span')} in {count_of(counts['sentences'], 'sentence')}"
    text = f"{found}, {count_of(counts['queries'], 'query', 'queries')}"
    return text + (f"; {', '.join(left_out)}" if left_out else "")
