"""``retrodb build``: the whole way, or the rest of it, or nothing."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from retrodb.cli.echo import echo_json
from retrodb.cli.running import Wait
from retrodb.sizes import count_of

Text = Optional[str]
Number = Optional[str]
"""Read as a number by `retrodb.config`, which names the value that is none."""


def build(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, folders, globs, any fsspec URL.")],
    out: Annotated[str, typer.Option("--out", metavar="DB", help="The database: a folder, or any fsspec URL.")],
    config: Annotated[
        Optional[Path], typer.Option("--config", metavar="FILE", help="TOML settings; flags win.")
    ] = None,
    unit: Annotated[
        Text, typer.Option(help="chunk (RETRO), or block: whole sentences with their title (REALM). [chunk]")
    ] = None,
    text_field: Annotated[Text, typer.Option(help="Field with the text. [guessed: text, content, body, ...]")] = None,
    id_field: Annotated[Text, typer.Option(help="Field with the record's id. [guessed: id, _id, key, ...]")] = None,
    title_field: Annotated[Text, typer.Option(help="Field with the title. [guessed: title, headline, name]")] = None,
    validation: Annotated[
        Optional[list[str]],
        typer.Option(help="Validation documents: queries, never neighbours; may be given again. [none]"),
    ] = None,
    validation_fraction: Annotated[
        Number, typer.Option(metavar="<float>", help="Share of INPUT's documents set apart for validation. [0]")
    ] = None,
    dedup: Annotated[
        Text, typer.Option(help="Near-duplicate documents: keep (told by cluster_id), drop all but one, off. [keep]")
    ] = None,
    decontaminate: Annotated[
        Optional[bool],
        typer.Option(help="Remove training documents that are near-duplicates of validation ones. [yes]"),
    ] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="Do not keep the documents' text.")] = False,
    encoder: Annotated[Text, typer.Option(help="Embedded default, folder, or hub name. [all-MiniLM-L6-v2]")] = None,
    tokenizer: Annotated[
        Text,
        typer.Option(
            help="gpt2, tokenizer.json, SentencePiece .model, train:VOCAB, encoder, hub name. [gpt2; blocks: encoder]"
        ),
    ] = None,
    chunk_tokens: Annotated[
        Number,
        typer.Option(metavar="<int>", help="Tokens in a chunk, m. [64] Of a block with its title: at most. [288]"),
    ] = None,
    sequence_tokens: Annotated[
        Number, typer.Option(metavar="<int>", help="Tokens in a training sequence, n. [2048]")
    ] = None,
    neighbours: Annotated[Number, typer.Option(metavar="<int>", help="Neighbours kept per chunk. [20]")] = None,
    training_neighbours: Annotated[
        Number, typer.Option(metavar="<int>", help="Neighbours joined into sequences, k. [2]")
    ] = None,
    metric: Annotated[Text, typer.Option(help="l2 or ip (inner product). [l2]")] = None,
    exclude: Annotated[
        Text, typer.Option(help="What is never a neighbour: document, cluster, none. [document]")
    ] = None,
    rerank: Annotated[
        Text, typer.Option(help="Keep the neighbours with most tokens in common: none, overlap, bm25. [none]")
    ] = None,
    rerank_candidates: Annotated[
        Number, typer.Option(metavar="<int>", help="Nearest chunks that re-ranking chooses from. [10 a neighbour]")
    ] = None,
    min_recall: Annotated[
        Number, typer.Option(metavar="<float>", help="Recall@10 the index must reach. [0.95]")
    ] = None,
    index_key: Annotated[Text, typer.Option(help="faiss index key. [autofaiss' choice; exact below 65,536]")] = None,
    memory: Annotated[Text, typer.Option(help="Memory for the searched index, as 8GB. [16GB]")] = None,
    precision: Annotated[Text, typer.Option(help="auto, fp32, bf16, fp16. [auto]")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda. [auto]")] = None,
    workers: Annotated[Number, typer.Option(metavar="<int>", help="Worker processes. [the cores]")] = None,
    runner: Annotated[
        Text, typer.Option(help="local, flink, dataflow, portable (any Beam job server). [local]")
    ] = None,
    runner_option: Annotated[
        Optional[list[str]],
        typer.Option(metavar="KEY=VALUE", help="What the runner takes besides; STAGE.KEY=VALUE for one stage. [none]"),
    ] = None,
    seed: Annotated[Number, typer.Option(metavar="<int>", help="Seed of every random choice. [0]")] = None,
    until: Annotated[
        Text, typer.Option(help="Last stage: corpus, dedup, chunk, embed, index, neighbours, training, report.")
    ] = None,
    shard_bytes: Annotated[Text, typer.Option(help="Text per shard, as 64MB. [from the corpus' size]")] = None,
    wait: Wait = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Last line of stdout is one JSON object.")] = False,
) -> None:
    """Build a retrieval database from INPUT, or bring it up to date: run again, it resumes, or does nothing."""
    from retrodb.config import make_config, read_config_file  # noqa: PLC0415 - only a real run pays for imports
    from retrodb.storage import Storage  # noqa: PLC0415

    flags: dict[str, Any] = {
        "unit": unit,
        "text_field": text_field,
        "id_field": id_field,
        "title_field": title_field,
        "validation": validation or None,
        "validation_fraction": validation_fraction,
        "dedup": dedup,
        "decontaminate": decontaminate,
        "no_text": no_text or None,
        "encoder": encoder,
        "tokenizer": tokenizer,
        "chunk_tokens": chunk_tokens,
        "sequence_tokens": sequence_tokens,
        "neighbours": neighbours,
        "training_neighbours": training_neighbours,
        "metric": metric,
        "exclude": exclude,
        "rerank": rerank,
        "rerank_candidates": rerank_candidates,
        "min_recall": min_recall,
        "index_key": index_key,
        "memory": memory,
        "precision": precision,
        "device": device,
        "workers": workers,
        "runner": runner,
        "runner_option": runner_option or None,
        "seed": seed,
        "until": until,
        "shard_bytes": shard_bytes,
        "wait": wait,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    settings, run = make_config(read_config_file(config) if config else {}, given)
    if run.runner != "local":
        _check_runner(inputs, out, run, dry_run)
    storage = Storage(out)
    listing = _list_inputs(inputs, settings.validation, storage)
    if dry_run:
        _dry_run(listing, storage, settings, run, as_json)
        return
    _build(listing, storage, settings, run, as_json)


def _check_runner(inputs: Sequence[str], out: str, run: Any, dry_run: bool) -> None:
    """What a runner elsewhere lacks is said before an input is listed: on an object store that is a call already."""
    from retrodb.pipelines.runners import make_runner  # noqa: PLC0415

    runner = make_runner(run)
    try:
        runner.check_options()
        if not dry_run:
            runner.check([out, *inputs])
    finally:
        runner.close()


def _list_inputs(inputs: list[str], validation: Sequence[str], storage: Any) -> Any:
    """The input files; those of the database itself, where it lies inside an input folder, are none."""
    from retrodb.corpus import Listing, expand_inputs, outside, with_validation  # noqa: PLC0415

    listing = with_validation(expand_inputs(inputs), validation)
    return Listing(outside(listing.files, storage.url), listing.skipped)


def _build(listing: Any, storage: Any, settings: Any, run: Any, as_json: bool) -> None:
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.cli.render import closing, summary  # noqa: PLC0415
    from retrodb.pipelines.driver import build as run_build  # noqa: PLC0415

    progress = make_progress()
    if listing.skipped:
        progress.note(f"{count_of(listing.skipped, 'file of another kind was', 'files of other kinds were')} skipped")
    try:
        outcome = run_build(listing.files, storage, settings, run, progress)
    finally:
        progress.close()
    closing(storage, outcome, as_json)
    if as_json:
        seconds = {stage: round(value, 3) for stage, value in outcome.seconds.items()}
        jobs = [{**asdict(job), "seconds": round(job.seconds, 3)} for job in outcome.jobs]
        facts = {**summary(storage, outcome.manifest), "done": list(outcome.done), "seconds": seconds, "jobs": jobs}
        echo_json(facts)


def _dry_run(listing: Any, storage: Any, settings: Any, run: Any, as_json: bool) -> None:
    from retrodb.cli.render import print_plan  # noqa: PLC0415
    from retrodb.pipelines.plan import dry_run  # noqa: PLC0415

    plan = dry_run(listing.files, storage, settings, run)
    if as_json:
        echo_json(plan)
    else:
        print_plan(plan)
