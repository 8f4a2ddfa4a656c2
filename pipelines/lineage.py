"""What a version that is made from another one records of the stages up to the encoder, and of its index.

Documents that joined or left change what a stage was made from, and with it the fingerprint of every stage behind it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from retrodb.pipelines import stages
from retrodb.pipelines.chunk import VALIDATION_CHUNKS

from retrodb.index import KeyChoice
from retrodb.manifest import (
    MANIFEST_NAME,
    TEMPLATE_NUMBER,
    TEXT_STAGES,
    Manifest,
    Shard,
    StageState,
    Version,
    fingerprint,
    taken_from,
)

CHOICE_FIELDS: Final = ("key", "reason", "exact", "training_vectors", "n_lists")
FIRST_SHARDS: Final = "first_shards"
"""Key of the index stage's details: the number of the first chunk shard of each index shard."""


def chained(
    current: Manifest,
    inputs: Mapping[str, Any],
    counts: Mapping[str, Mapping[str, int]],
    validation_chunks: Mapping[str, int],
) -> dict[str, StageState]:
    """The stages up to the encoder, each made from the one before it.

    Args:
        current: the version that another is made from.
        inputs: parts of the corpus stage that are others now.
        counts: what each of the stages counts now.
        validation_chunks: by shard, as text, where there are any.
    """
    states: dict[str, StageState] = {}
    for stage in (*TEXT_STAGES, "embed"):
        before = current.stages[stage]
        changes: Mapping[str, Any] = inputs
        if stage == "dedup":
            changes = {"corpus": states["corpus"].fingerprint}
        elif stage == "chunk":
            changes = {"documents": states["dedup"].fingerprint}
        elif stage == "embed":
            changes = {"chunks": fingerprint(stages.chunks_of(states["chunk"].made_from))}
        made_from = {**before.made_from, **changes}
        details = dict(before.details)
        if stage == "chunk":
            details.pop(VALIDATION_CHUNKS, None)
            details |= {VALIDATION_CHUNKS: dict(validation_chunks)} if validation_chunks else {}
        states[stage] = StageState(fingerprint(made_from), made_from, dict(counts[stage]), details)
    return states


def beginning(
    current: Manifest, states: Mapping[str, StageState], tables: Mapping[str, tuple[Shard, ...]], version: Version
) -> Manifest:
    """The manifest of a new version that is done up to the encoder."""
    return replace(
        current,
        stages=dict(states),
        tables=dict(tables),
        fingerprints={
            **current.fingerprints,
            "stages": {name: state.fingerprint for name, state in states.items()},
        },
        version=version,
        versions=(),
    )


def is_beginning(left: Manifest, version: Version) -> bool:
    """Whether what a killed run has left is a beginning of this version."""
    found = left.version
    return (found.id, found.parent, found.made_by) == (version.id, version.parent, version.made_by)


def goes_on(left: Manifest | None, start: Manifest) -> bool:
    """Whether what a killed run has left is what came of just this beginning.

    Since the kill another version may have become current, an input mended, spans drawn, the encoder moved: what is
    left must name the same parent and settings, and have all that the beginning has.
    """
    if left is None or not is_beginning(left, start.version):
        return False
    tables = (*start.tables, "deleted")  # none where nothing is deleted
    return (
        left.config == start.config
        and left.inputs == start.inputs
        and left.fingerprints.get("encoder") == start.fingerprints.get("encoder")
        and all(left.shards(table) == start.shards(table) for table in tables)
        and all(
            name in left.stages and left.stages[name].fingerprint == state.fingerprint
            for name, state in start.stages.items()
        )
    )


def choice_of(current: Manifest) -> KeyChoice:
    """The index key that a version has."""
    details = current.stages["index"].details
    return KeyChoice(**{name: details[name] for name in CHOICE_FIELDS}, estimated_bytes=0)


def first_shards(current: Manifest) -> list[int]:
    """`FIRST_SHARDS` of a version. Raises DamagedError: it does not say."""
    with taken_from(MANIFEST_NAME):
        return list(current.stages["index"].details[FIRST_SHARDS])


def index_groups(current: Manifest) -> dict[int, list[int]]:
    """The numbers of the chunk shards that each index shard holds, by its number."""
    firsts = first_shards(current)
    numbers = [shard.number for shard in current.shards("chunks")]
    ends = [*firsts[1:], numbers[-1] + 1] if numbers else []
    index = [shard.number for shard in current.shards("index") if shard.number != TEMPLATE_NUMBER]
    return {
        number: [n for n in numbers if first <= n < end]
        for number, first, end in zip(sorted(index), firsts, ends, strict=True)
    }
