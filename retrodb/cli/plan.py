"""``retrodb plan``: what a build of any size takes, each figure beside its source."""

from typing import Annotated, Optional

import typer

from retrodb.cli.echo import echo, echo_json
from retrodb.cli.look import Json


def plan(
    tokens: Annotated[str, typer.Option("--tokens", help="Size of the corpus: 1e9, 100B, 1.75T, '2 trillion'.")],
    encoder: Annotated[Optional[str], typer.Option(help="As for build. [all-MiniLM-L6-v2]")] = None,
    chunk_tokens: Annotated[Optional[str], typer.Option(metavar="<int>", help="Tokens in a chunk, m. [64]")] = None,
    sequence_tokens: Annotated[
        Optional[str], typer.Option(metavar="<int>", help="Tokens in a training sequence, n. [2048]")
    ] = None,
    neighbours: Annotated[Optional[str], typer.Option(metavar="<int>", help="Neighbours kept per chunk. [20]")] = None,
    training_neighbours: Annotated[
        Optional[str], typer.Option(metavar="<int>", help="Neighbours joined into sequences, k. [2]")
    ] = None,
    metric: Annotated[Optional[str], typer.Option(help="l2 or ip (inner product). [l2]")] = None,
    memory: Annotated[Optional[str], typer.Option(help="Memory for the searched index, as 8GB. [16GB]")] = None,
    index_key: Annotated[Optional[str], typer.Option(help="faiss index key. [autofaiss' choice]")] = None,
    shard_bytes: Annotated[Optional[str], typer.Option(help="Text per shard, as 64MB. [from the size]")] = None,
    document_tokens: Annotated[
        Optional[float], typer.Option(min=1.0, max=1e15, help="Tokens of an average document. [1000]")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a build of so many tokens takes: shards, index, disk, memory, shuffle, requests, hours. Builds nothing."""
    from retrodb.config import make_config  # noqa: PLC0415
    from retrodb.planning import Assumed, encoder_size, parse_tokens, plan_build  # noqa: PLC0415
    from retrodb.planning.figures import DOCUMENT_TOKENS  # noqa: PLC0415
    from retrodb.planning.markdown import shown  # noqa: PLC0415

    flags = {
        "encoder": encoder,
        "chunk_tokens": chunk_tokens,
        "sequence_tokens": sequence_tokens,
        "neighbours": neighbours,
        "training_neighbours": training_neighbours,
        "metric": metric,
        "memory": memory,
        "index_key": index_key,
        "shard_bytes": shard_bytes,
    }
    size = parse_tokens(tokens)
    config, _ = make_config({}, {name: value for name, value in flags.items() if value is not None})
    assumed = Assumed.of(config, size, encoder_size(config.encoder), document_tokens or DOCUMENT_TOKENS)
    scale = plan_build(assumed)
    if as_json:
        echo_json(scale.as_json())
        return
    for section, figures in scale.sections.items():
        echo(f"{section}")
        for name, figure in figures.items():
            echo(f"  {name:<26} {shown(figure):>22}   {figure.source}")
