"""``retrodb evaluate-retrieval``: zero-shot recall@k of a database on a question set."""

import contextlib
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from retrodb.cli.echo import echo, echo_json
from retrodb.cli.look import Database, Json, OfVersion
from retrodb.sizes import count_of

if TYPE_CHECKING:
    from retrodb.evaluation.intervals import Estimate
    from retrodb.evaluation.retrieval import RetrievalResult


def evaluate_retrieval(
    database: Database,
    questions: Annotated[
        str, typer.Argument(metavar="QUESTIONS", help="JSONL (.gz, .zst), any fsspec URL; fields are found by name.")
    ],
    k: Annotated[str, typer.Option("--k", metavar="<int>,..", help="Chunks looked at.")] = "5,20,100",
    encoder: Annotated[
        Optional[str], typer.Option(help="Where the encoder is now, if not where it was. Refused if it is another.")
    ] = None,
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Zero-shot recall@k: does an answer, or a relevant document, stand among the first k? By exact search and by the
    index."""
    ks = _numbers(k)
    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.errors import RetrodbError  # noqa: PLC0415
    from retrodb.evaluation.questions import QuestionSet  # noqa: PLC0415
    from retrodb.evaluation.retrieval import evaluate_retrieval as run  # noqa: PLC0415 - imports faiss

    db = open_database(database, version=version)
    with contextlib.closing(make_progress()) as progress:
        result = run(db, QuestionSet(questions), ks, progress=progress, encoder=encoder)
    try:
        db.storage.commit_json(result.report_path, result.as_json())
        kept: str | None = result.report_path
    except (OSError, RetrodbError) as error:  # a database that can only be read is worth its figures, too
        kept = None
        result.notes.append(f"{result.report_path} could not be written: {error}")
    if as_json:
        echo_json({**result.as_json(), "report": kept})
        return
    _print(result)


def _numbers(text: str) -> tuple[int, ...]:
    from retrodb.errors import UsageError  # noqa: PLC0415

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 100_000 for part in parts):
        raise UsageError(f"--k {text}: write whole numbers from 1 to 100000, as 5,20,100.")
    return tuple(int(part) for part in parts)


def _print(result: "RetrievalResult") -> None:
    about = result.about
    asked = about["questions"]
    without = f", {asked['without_gold']:,} without a gold answer" if asked["without_gold"] else ""
    echo(f"{asked['file']}: {asked['asked']:,} of {count_of(asked['read'], 'question')} asked{without}")
    echo(
        f"{about['database']}, version {about['version']}: {count_of(about['chunks'], 'chunk')}, "
        f"{about['encoder']['name']}, {about['metric']}, index {about['index']['key']}"
    )
    for criterion in result.criteria:
        tables = [(f"{criterion.name} ({criterion.questions:,})", "recall", criterion.hits)]
        if criterion.found is not None:
            tables.append(("  of several documents", "found", criterion.found))
        for title, name, estimates in tables:
            echo(f"{title:<26}{'exact search':<26}the index")
            for k in result.ks:
                cells = [_cell(estimates[side][k]) for side in estimates]
                echo(f"  {f'{name}@{k}':<24}{cells[0]:<26}{cells[1]}".rstrip())
    agreed = ", ".join(f"{share:.4f} at {k}" for k, share in result.agreement.items())
    echo(f"the index gave of exact search's chunks {agreed}")
    for note in result.notes:
        echo(f"note: {note}")
    echo(f"intervals are 95%; the figures are kept in {result.report_path}")


def _cell(estimate: "Estimate") -> str:
    interval = estimate.interval
    return f"{estimate.value:.4f}" + (f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
