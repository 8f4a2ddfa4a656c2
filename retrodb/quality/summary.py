"""What a database is, in one JSON object: the answer of ``retrodb info --json``."""

from dataclasses import asdict
from typing import Any

from retrodb.corpus.near_duplicates import DEDUP_RULES, NEAR_DUPLICATE, VALIDATION_DUPLICATE
from retrodb.manifest import SPANS_STAGE, STAGES, Manifest
from retrodb.quality.leakage import distribution
from retrodb.schemas import SCHEMA_VERSION
from retrodb.units import is_complete, unit_of


def summarise(manifest: Manifest, url: str) -> dict[str, Any]:
    """Counts per stage, recall, fingerprints, sizes. A stage that has not run gives null, never a zero."""
    stages = manifest.stages
    return {
        "database": url,
        "schema_version": SCHEMA_VERSION,
        "unit": unit_of(manifest.config),
        "complete": is_complete(manifest),
        "stages": [stage for stage in STAGES if stage in stages],
        "inputs": [{"url": entry["url"], "bytes": entry["size"]} for entry in manifest.inputs],
        "documents": _documents(manifest),
        "chunks": stages["chunk"].counts["chunks"] if "chunk" in stages else None,
        "tokens": stages["chunk"].counts["tokens"] if "chunk" in stages else None,
        "blocks": _blocks(manifest),
        "embeddings": _embeddings(manifest),
        "index": stages["index"].details if "index" in stages else None,
        "neighbours": _neighbours(manifest),
        "training": _training(manifest),
        "leakage": _leakage(manifest),
        "spans": _spans(manifest),
        "fingerprints": manifest.fingerprints,
        "config": manifest.config,
        "tables": {
            name: {
                "shards": len(shards),
                "rows": sum(shard.rows for shard in shards),
                "bytes": sum(shard.bytes for shard in shards),
            }
            for name, shards in manifest.tables.items()
        },
        "version": asdict(manifest.version),
        "versions": [asdict(kept.version) for kept in manifest.versions] or [asdict(manifest.version)],
        "software": manifest.software,
    }


def _documents(manifest: Manifest) -> dict[str, Any] | None:
    if "corpus" not in manifest.stages:
        return None
    counts = dict(manifest.stages["corpus"].counts)
    if "chunk" in manifest.stages:  # by then, what the dedup stage removes is gone
        dedup = manifest.stages["dedup"]
        applied = {NEAR_DUPLICATE: dedup.made_from["dedup"] == "drop"}
        applied[VALIDATION_DUPLICATE] = dedup.made_from.get("decontaminate", False)
        for name in [f"dropped.{rule}" for rule in DEDUP_RULES if applied[rule]]:
            counts[name] = dedup.counts[name]
            counts["kept"] -= counts[name]
    return {
        "in": counts.get("in", 0),
        "kept": counts.get("kept", 0),
        "dropped": {
            name.removeprefix("dropped."): number for name, number in counts.items() if name.startswith("dropped.")
        },
        "quarantined": counts.get("quarantined", 0),
        "validation": counts.get("validation", 0),
        "deleted": manifest.rows("deleted"),
        "near_duplicates": _near_duplicates(manifest),
    }


def _near_duplicates(manifest: Manifest) -> dict[str, Any] | None:
    state = manifest.stages.get("dedup")
    if state is None or state.made_from["dedup"] == "off":
        return None
    return {"dedup": state.made_from["dedup"], "clusters": state.counts["clusters"], "in": state.counts["clustered"]}


def _blocks(manifest: Manifest) -> dict[str, Any] | None:
    """What is particular to blocks; None for chunks."""
    if "chunk" not in manifest.stages or unit_of(manifest.config) != "block":
        return None
    counts = dict(manifest.stages["chunk"].counts)
    return {
        "budget": manifest.stages["chunk"].made_from["chunk_tokens"],
        "splitter": manifest.stages["chunk"].made_from["splitter"],
        "with_a_split_sentence": counts["split_sentence_blocks"],
        "with_a_truncated_title": counts["truncated_title_blocks"],
        "repeated_uids": counts["repeated_uids"],
        "duplicates": counts["duplicate_blocks"],
    }


def _embeddings(manifest: Manifest) -> dict[str, Any] | None:
    if "embed" not in manifest.stages:
        return None
    encoder = manifest.fingerprints["encoder"]
    return {
        "rows": manifest.rows("embeddings"),
        "dimension": encoder["dimension"],
        "encoder": encoder["name"],
        "precision": encoder["precision"],
    }


def _neighbours(manifest: Manifest) -> dict[str, Any] | None:
    if "neighbours" not in manifest.stages:
        return None
    state = manifest.stages["neighbours"]
    made = state.made_from
    reranked: dict[str, Any] = {name: made[name] for name in ("rerank", "rerank_candidates") if name in made}
    return {"k": made["neighbours"], "exclude": made["exclude"], **reranked, **state.facts, **state.counts}


def _training(manifest: Manifest) -> dict[str, Any] | None:
    if "training" not in manifest.stages:
        return None
    state = manifest.stages["training"]
    return {
        "sequences": manifest.rows("training"),
        "sequence_tokens": state.made_from["sequence_tokens"],
        "neighbours": state.made_from["training_neighbours"],
        **state.counts,
    }


def _spans(manifest: Manifest) -> dict[str, Any] | None:
    if SPANS_STAGE not in manifest.stages:
        return None
    state = manifest.stages[SPANS_STAGE]
    made = {name: state.made_from[name] for name in ("mask", "seed", "taggers")}
    counts = {name: state.counts[name] for name in ("sentences", "spans", "queries", "imported", "quarantined")}
    left_out = {
        kind: {name.partition(".")[2]: number for name, number in state.counts.items() if name.startswith(f"{kind}.")}
        for kind in ("dropped", "rejected")
    }
    return {**made, **counts, **left_out}


def _leakage(manifest: Manifest) -> dict[str, Any] | None:
    if "report" not in manifest.stages:
        return None
    state = manifest.stages["report"]
    details = state.details
    return {
        "neighbours": details["neighbours"],
        "splits": {split: distribution(counts) for split, counts in details["histograms"].items()},
        "report": state.report("report"),
    }
