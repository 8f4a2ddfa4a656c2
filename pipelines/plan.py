"""``--dry-run``: what a build would do, and why, without writing anything."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from retrodb.pipelines import stages
from retrodb.pipelines.chunk import VALIDATION_CHUNKS
from retrodb.pipelines.ingredients import Ingredients, located, refuse_foreign, resolve
from retrodb.pipelines.integrity import damaged_reports, damaged_shards, recorded_scans
from retrodb.pipelines.runners import make_runner

from retrodb.config import BuildConfig, RunSettings
from retrodb.corpus import InputFile, Plan, ScannedFile, plan, scan_file
from retrodb.encoding import DEFAULT_ENCODER, EncoderIdentity, choose_device, count_cards
from retrodb.errors import InputError
from retrodb.index import KeyChoice, choose_key
from retrodb.manifest import STAGE_REPORTS, Manifest, fingerprint
from retrodb.planning import Assumed, Effort, encoder_size, plan_build
from retrodb.planning.figures import BERT_LARGE_CHUNKS_PER_GPU_HOUR, BERT_LARGE_PARAMETERS, MINILM_PARAMETERS
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.units import Unit, stages_of

SCAN_BYTES: Final = 2 << 30
"""Inputs up to this size are read to plan exactly; larger ones are planned from their sizes on disk."""

_EXPANSION: Final = {"gzip": 3.0, "zstd": 3.2}
_BYTES_PER_TOKEN: Final = 4.3
_BYTES_PER_STORED_CHUNK: Final = 60 + 30
_BYTES_PER_LEAKAGE_ROW: Final = 10
_CHUNKS_PER_CORE_SECOND: Final = {"fp32": 55.0, "bf16": 200.0, "fp16": 55.0}
"""MiniLM on 64-token chunks: the slowest CPU measured for each precision. An order of magnitude, no promise."""


@dataclass(frozen=True)
class _Vectors:
    """What a build that embeds is planned with besides."""

    encoder: EncoderIdentity
    choice: KeyChoice


def dry_run(inputs: Sequence[InputFile], storage: Storage, config: BuildConfig, run: RunSettings) -> dict[str, Any]:
    """What each stage up to ``run.until`` would do and why, with sizes and a rough time; nothing is created.

    ``index`` is None where the build stops before anything is embedded.

    Raises:
        InputError, DamagedError: as `retrodb.pipelines.driver.build` would.
    """
    refuse_foreign(storage)
    config = located(config)
    manifest = Manifest.recover(storage) or Manifest()
    runner = make_runner(run)
    runner.check_options()
    ingredients = resolve(config, run)
    scans, exact = _scans(inputs, manifest)
    layout = plan(scans, config.shard_bytes)
    n_chunks = _expected_chunks(manifest, scans, config)
    parts = _text_parts(scans, layout, config, ingredients)
    vectors = _vectors(manifest, config, ingredients, n_chunks - _held_out(manifest, parts))
    if vectors is not None:
        parts |= _vector_parts(parts, config, vectors)
    actions = _actions(storage, manifest, parts, layout, run.until, config.unit)
    cost = runner.cost(lambda: _effort(n_chunks, config, vectors, actions))
    words = {"cost": cost.in_words()} if cost else {}
    return {
        "database": storage.url,
        "unit": config.unit,
        "inputs": {"files": len(inputs), "bytes": sum(file.size for file in inputs)},
        "stages": [{**action, "runs": runner.describe(action["stage"])} for action in actions],
        "runner": runner.name,
        "splits": len(layout.splits),
        "shards": layout.shards,
        "index": {"key": vectors.choice.key, "reason": vectors.choice.reason} if vectors else None,
        "estimates": {**_estimates(layout, exact, n_chunks, config, run, vectors, actions), **words},
        "cost": cost.as_json() if cost else None,
    }


def _effort(n_chunks: int, config: BuildConfig, vectors: _Vectors | None, actions: Sequence[dict[str, Any]]) -> Effort:
    """What the stages that are to be made take."""
    size = encoder_size(config.encoder if vectors else DEFAULT_ENCODER)
    assumed = Assumed.of(config, n_chunks * config.chunk_tokens, size)
    made = [action["stage"] for action in actions if action["action"].startswith("make")]
    return Effort.of(plan_build(assumed), made)


def _held_out(manifest: Manifest, parts: Mapping[str, dict[str, Any]]) -> int:
    """Chunks of validation documents, which are not indexed, where the chunks stay as they are."""
    chunk = manifest.stages.get("chunk")
    if chunk is None or chunk.fingerprint != fingerprint(parts["chunk"]):
        return 0
    return sum(chunk.details.get(VALIDATION_CHUNKS, {}).values())


def _vectors(manifest: Manifest, config: BuildConfig, ingredients: Ingredients, n_vectors: int) -> _Vectors | None:
    if ingredients.encoder is None:
        return None
    encoder = ingredients.encoder.settled(manifest)
    choice = choose_key(n_vectors, encoder.dimension, config.memory_bytes, config.metric, config.index_key)
    return _Vectors(encoder, choice)


def _scans(inputs: Sequence[InputFile], manifest: Manifest) -> tuple[list[ScannedFile], bool]:
    known = recorded_scans(manifest)
    fresh = [file for file in inputs if file.url not in known or not known[file.url].is_of(file)]
    exact = sum(file.size for file in fresh) <= SCAN_BYTES
    with ThreadPoolExecutor(4) as pool:
        made = dict(zip((f.url for f in fresh), pool.map(scan_file if exact else _guessed, fresh), strict=True))
    return [replace(made.get(file.url) or known[file.url], split=file.split) for file in inputs], exact


def _guessed(file: InputFile) -> ScannedFile:
    compression: Literal["gzip", "zstd"] | None = None
    if file.url.endswith((".gz", ".zst", ".zstd")):
        compression = "gzip" if file.url.endswith(".gz") else "zstd"
    length = int(file.size * _EXPANSION.get(compression or "", 1.0))
    return ScannedFile(file.url, file.format, compression, file.size, file.stamp, "", length, ())


def _expected_chunks(manifest: Manifest, scans: Sequence[ScannedFile], config: BuildConfig) -> int:
    before = {scan.url: scan.sha256 for scan in recorded_scans(manifest).values()}
    chunk = manifest.stages.get("chunk")
    same = before == {scan.url: scan.sha256 for scan in scans}
    if same and chunk is not None and chunk.made_from.get("chunk_tokens") == config.chunk_tokens:
        return chunk.counts["chunks"]
    return max(1, int(sum(scan.length for scan in scans) / _BYTES_PER_TOKEN / config.chunk_tokens))


def _text_parts(
    scans: Sequence[ScannedFile], layout: Plan, config: BuildConfig, ingredients: Ingredients
) -> dict[str, dict[str, Any]]:
    tokenizer = ingredients.tokenizer.fingerprint if ingredients.tokenizer else config.tokenizer
    parts = {"corpus": stages.corpus_parts(scans, config, layout.shard_bytes)}
    parts["dedup"] = stages.dedup_parts(fingerprint(parts["corpus"]), config)
    parts["chunk"] = stages.chunk_parts(fingerprint(parts["dedup"]), config, tokenizer, ingredients.pairs)
    return parts


def _vector_parts(
    text: Mapping[str, dict[str, Any]], config: BuildConfig, vectors: _Vectors
) -> dict[str, dict[str, Any]]:
    parts = {"embed": stages.embed_parts(text["chunk"], vectors.encoder)}
    parts["index"] = stages.index_parts(fingerprint(parts["embed"]), config, vectors.choice)
    parts["neighbours"] = stages.neighbours_parts(fingerprint(parts["index"]), config, vectors.choice)
    parts["training"] = stages.training_parts(fingerprint(parts["neighbours"]), config)
    parts["report"] = stages.report_parts(fingerprint(parts["neighbours"]), config)
    return {stage: parts[stage] for stage in stages_of(config.unit) if stage in parts}


def _actions(
    storage: Storage,
    manifest: Manifest,
    parts: dict[str, dict[str, Any]],
    layout: Plan,
    until: str | None,
    unit: Unit,
) -> list[dict[str, Any]]:
    damage = damaged_shards(storage, manifest)
    reports = damaged_reports(storage, manifest)
    actions = []
    for stage in stages_of(unit):
        state = manifest.stages.get(stage)
        damaged = sum(len(damage.get(table, ())) for table in stages.STAGE_TABLES[stage])
        if state is not None and state.fingerprint == fingerprint(parts[stage]):
            action, why = ("repair", count_of(damaged, "damaged shard")) if damaged else ("up to date", "")
            if stage == "corpus" and _is_read_again(manifest, parts):
                action, why = "make again", "other near-duplicates are found in the documents as they were read"
            if stage in reports and not damaged:
                action, why = "repair", f"{STAGE_REPORTS[stage]} is missing or damaged"
            if action == "up to date" and (reason := _repaired_along(stage, damage)):
                action, why = "repair", reason
        elif state is not None:
            action, why = "make again", "; ".join(stages.why_rebuilt(manifest, stage, parts[stage]))
        else:
            action, why = "make", count_of(layout.shards, "shard")
        actions.append({"stage": stage, "action": action, "why": why})
        if stage == until:
            break
    return actions


def _repaired_along(stage: str, damage: Mapping[str, set[int]]) -> str:
    """Why an intact stage has to repair shards as well, or "": documents are read, and then finished by chunking."""
    if stage in ("corpus", "chunk") and damage.get("duplicates"):
        return "near-duplicates are found again, in the documents as they were read"
    if stage == "chunk" and (damage.get("documents") or damage.get("quarantine")):
        return "documents that are read again have to be finished"
    return ""


def _is_read_again(manifest: Manifest, parts: dict[str, dict[str, Any]]) -> bool:
    """Whether finished documents give way to those that were read, because the dedup stage is made again."""
    dedup = manifest.stages.get("dedup")
    return "chunk" in manifest.stages and (dedup is None or dedup.fingerprint != fingerprint(parts["dedup"]))


def _estimates(
    layout: Plan,
    exact: bool,
    n_chunks: int,
    config: BuildConfig,
    run: RunSettings,
    vectors: _Vectors | None,
    actions: Sequence[dict[str, Any]],
) -> dict[str, str]:
    size = n_chunks * (_BYTES_PER_STORED_CHUNK + config.chunk_tokens)
    estimates = {
        "splits_and_shards": f"{count_of(len(layout.splits), 'split')}, {count_of(layout.shards, 'shard')}"
        + ("" if exact else " (from sizes on disk; the inputs were not read)"),
        f"{config.unit}s": f"about {n_chunks:,}",
    }
    if vectors is not None:
        size += _bytes_from_vectors(n_chunks, config, vectors)
        embeds = any(action["stage"] == "embed" and action["action"].startswith("make") for action in actions)
        estimates |= {
            "index_key": f"{vectors.choice.key} ({vectors.choice.reason})",
            "time_to_embed": _time_to_embed(n_chunks if embeds else 0, config, run, vectors.encoder.precision),
        }
    return {**estimates, "disk": f"about {size / 1e6:,.0f} MB beside the documents"}


def _time_to_embed(n_chunks: int, config: BuildConfig, run: RunSettings, precision: str) -> str:
    try:
        parameters = encoder_size(config.encoder).parameters * config.chunk_tokens / 64
    except InputError:
        return "not known for an encoder whose card does not say how large it is"
    if run.runner == "local" and choose_device(run.device) == "cuda":
        workers, kind = count_cards(), "cards, if they are like an A100"
        rate = BERT_LARGE_CHUNKS_PER_GPU_HOUR / 3600 * BERT_LARGE_PARAMETERS / parameters
    else:
        workers, kind = run.workers, f"workers (CPU, {precision})"
        rate = _CHUNKS_PER_CORE_SECOND[precision] * MINILM_PARAMETERS / parameters
    return f"very roughly {n_chunks / (rate * workers) / 60:,.1f} min on {workers} {kind}"


def _bytes_from_vectors(n_chunks: int, config: BuildConfig, vectors: _Vectors) -> int:
    """The embeddings and all that is made from them."""
    embeddings = n_chunks * vectors.encoder.dimension * 2
    neighbours = n_chunks * config.neighbours * 14
    if config.unit == "block":
        return embeddings + vectors.choice.estimated_bytes + neighbours
    n_sequences = n_chunks * config.chunk_tokens / config.sequence_tokens
    per_sequence = config.sequence_tokens * 2 * (1 + 2 * config.training_neighbours) * 0.6
    leakage = n_chunks * _BYTES_PER_LEAKAGE_ROW
    return embeddings + vectors.choice.estimated_bytes + neighbours + int(n_sequences * per_sequence) + leakage
