"""``retrodb verify``: proves that a database is what it says (invariants 1-4 and 9 of the design).

In order, each step trusting only what the ones before have found whole:

    files            every bit of the manifest, and of its copy; what it says in itself; every recorded file's size
                     and sha256; no file besides
    content          schemas and rows; counts from stage to stage; documents, chunks, vectors
    block_content    blocks within their budget; which of them are equal; the vector of the null document
    duplicate_content  clusters as the documents have them; nothing of a validation cluster, nor a repeat, left behind
    index_content    the index holds every chunk that may be a neighbour, once
    neighbour_content  existence, exclusion, order, honest counts
    training_content every chunk once; tokens, neighbours and continuations re-joined
    span_content     spans and masked queries, where there are any: offsets, chunks, wordpieces, masks
    leakage_content  one row a chunk, of its neighbours; some derived again; the report's figures
    recompute        with ``sample``: a random fraction made once more from the source text

One shard of each table is in memory at a time, and bounded caches of the chunks that others name.
"""

from typing import TYPE_CHECKING

from retrodb.errors import MismatchError, RetrodbError
from retrodb.manifest import DAMAGE_REPORT, MANIFEST_NAME, Manifest
from retrodb.quality.block_content import check_blocks
from retrodb.quality.content import check_chunks, check_counts, check_documents, check_embeddings, check_schemas
from retrodb.quality.deletion_content import check_deleted
from retrodb.quality.duplicate_content import check_duplicates
from retrodb.quality.files import check_files, check_manifest, check_saved
from retrodb.quality.findings import Findings, Problem, VerifyReport
from retrodb.quality.index_content import check_index
from retrodb.quality.leakage_content import check_leakage
from retrodb.quality.neighbour_content import check_neighbours
from retrodb.quality.recompute import load_tools, recompute
from retrodb.quality.scene import Facts, Scene
from retrodb.quality.span_content import check_spans
from retrodb.quality.training_content import check_training
from retrodb.storage import Storage
from retrodb.units import stages_of, unit_of

if TYPE_CHECKING:
    from retrodb.database import Database

__all__ = ["DAMAGE_REPORT", "Problem", "VerifyReport", "verify_database"]


def verify_database(db: "Database", sample: float = 0.0, seed: int = 0, encoder: str | None = None) -> VerifyReport:
    """Verify a database, finished or not, as far as it goes.

    A damaged shard is one problem that names it; it is not looked at again, so that what refers to it is not blamed.
    Writes nothing where nothing is wrong; else, if it can, `DAMAGE_REPORT`.

    Args:
        db: the database, opened.
        sample: the share of chunk shards recomputed from the source text; at least one where it is above 0.
        seed: which ones.
        encoder: where the encoder is now, if not where it was.

    Raises:
        InputError: with ``sample``, the tokenizer or the encoder is not on this machine, and nothing else is wrong.
        MismatchError: likewise, what is found under its name is another; or a build changed the database meanwhile.
    """
    findings = Findings()
    scene = None
    check_saved(db.storage, findings)
    with findings.blaming(MANIFEST_NAME):
        check_manifest(db.manifest, findings)
        scene = Scene(db.storage, db.manifest, Facts.of(db.manifest), findings)
        _check_all(scene)
    if scene is not None and sample > 0:
        _recompute(scene, db, sample, seed, encoder)
    if findings.problems:
        _refuse_changed(db)
        _write_damage(db.storage, findings)
    missing = [stage for stage in stages_of(unit_of(db.manifest.config)) if stage not in db.manifest.stages]
    if missing:
        findings.note(f"not complete: {', '.join(missing)} not done; what is done was verified")
    return findings.report(complete=not missing)


def _check_all(scene: Scene) -> None:
    check_files(scene)
    check_schemas(scene)
    check_counts(scene)
    check_documents(scene)
    check_duplicates(scene)
    check_chunks(scene)
    check_blocks(scene)
    check_embeddings(scene)
    check_index(scene)
    check_neighbours(scene)
    check_training(scene)
    check_leakage(scene)
    check_deleted(scene)
    check_spans(scene)


def _recompute(scene: Scene, db: "Database", sample: float, seed: int, encoder: str | None) -> None:
    try:
        tools = load_tools(db, encoder)
    except RetrodbError as error:
        if not scene.findings.problems:
            raise
        scene.findings.note(f"nothing was recomputed: {error}")
        return
    recompute(scene, tools, sample, seed)


def _refuse_changed(db: "Database") -> None:
    """Where a build has gone on meanwhile, what was found may only be that: no damage, and no hint of any.

    Raises:
        MismatchError: the manifest is another whole one by now.
    """
    try:
        now = Manifest.load_whole(db.storage)
    except RetrodbError:
        return  # that is damage
    if now is not None and now.version.id == db.version and now != db.manifest:
        raise MismatchError(
            f"{db.storage.url} was changed while it was verified: a build is at work. Verify it when that is done."
        )


def _write_damage(storage: Storage, findings: Findings) -> None:
    """Tell the next build, where the folder can be written: any failure to is no business of a verification."""
    try:
        storage.commit_json(DAMAGE_REPORT, {"paths": findings.report(complete=True).paths})
    except Exception:
        findings.note(f"{DAMAGE_REPORT} could not be written")
