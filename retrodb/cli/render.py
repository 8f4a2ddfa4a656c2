"""What the commands print for people."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrodb.cli.echo import echo
from retrodb.database import Database
from retrodb.quality.leakage import in_words
from retrodb.quality.summary import summarise
from retrodb.sizes import count_of
from retrodb.storage import Storage

_INDENT = "    "
_FIRST = {
    "chunk": "next(iter(retrodb.open('{where}').training()))['tokens']",
    "block": "retrodb.open('{where}').candidates(['your question']).ids",
}
"""What to type first in Python."""
_LONGEST_HEADING = 200
_EXAMPLES = 3
_EXAMPLE_ROWS = 4000
_EXAMPLE_CANDIDATES = 400
_EXAMPLE_WORDS = 15
_EXAMPLE_OVERLAP = 0.6


def _width() -> int:
    return min(110, shutil.get_terminal_size((100, 24)).columns)


def size_text(n_bytes: float) -> str:
    """``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n_bytes) < 1000 or unit == "TB":
            return f"{n_bytes:,.0f} B" if unit == "B" else f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")


def quoted(text: str, lines: int = 4) -> str:
    """A text as an indented paragraph of a few lines."""
    flat = " ".join(text.split())
    wrapped = textwrap.wrap(flat, _width() - len(_INDENT))
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: _width() - len(_INDENT) - 4] + " ..."]
    return textwrap.indent("\n".join(wrapped), _INDENT)


def heading(row: Mapping[str, Any]) -> str:
    """A document's title, else its key, on one line of bounded length: it must not pass for lines of ours."""
    flat = " ".join(str(row["title"] or row["key"])[: 10 * _LONGEST_HEADING].split())
    return flat if len(flat) <= _LONGEST_HEADING else f"{flat[: _LONGEST_HEADING - 4]} ..."


def summary(storage: Storage, manifest: Any) -> dict[str, Any]:
    """What ``build --json`` and ``info --json`` share."""
    return summarise(manifest, storage.url)


def closing(storage: Storage, outcome: Any, as_json: bool) -> None:
    """The end of a build: where it is, counts, recall, neighbour pairs worth reading, what to type next."""
    facts = summary(storage, outcome.manifest)
    if not outcome.done:
        echo(f"{storage.url} is up to date: nothing to do.", err=as_json)
        return
    _print_counts(facts, as_json)
    if facts["complete"] and not as_json:
        pairs = example_pairs(Database(storage, outcome.manifest))
        if pairs:
            echo("\nNeighbours worth reading (each from another document):")
        for chunk, neighbour in pairs:
            echo(f"\n  {chunk['title']}  [chunk {chunk['chunk_id']}]\n{quoted(chunk['text'])}")
            echo(f"  ~ {neighbour['title']}  [distance {neighbour['distance']:.3f}]\n{quoted(neighbour['text'])}")
        first = pairs[0][0]["chunk_id"] if pairs else 0
        retrodb, python, where = _program("retrodb"), _program("python"), _short_path(storage.url)
        echo(
            f"\nNext:\n  {retrodb} query {where} 'your question'\n  {retrodb} show {where} {first}\n"
            f"  {retrodb} info {where}\n  {retrodb} verify {where}\n"
            f'  {python} -c "import retrodb; print({_FIRST[facts["unit"]].format(where=where)})"'
        )


def _program(name: str) -> str:
    """How to call a program of this environment from here: by name where the shell would find just that one."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    return name if found and Path(found) == own else _short_path(str(own))


def _short_path(path: str) -> str:
    """A local path relative to here, where that is shorter."""
    if "://" in path:
        return path
    relative = os.path.relpath(path)
    return relative if len(relative) < len(path) else path


def _print_counts(facts: Mapping[str, Any], to_stderr: bool) -> None:
    total = sum(table["bytes"] for table in facts["tables"].values())
    echo(f"\n{facts['database']}  ({size_text(total)})", err=to_stderr)
    for line in _count_lines(facts):
        echo(f"  {line}", err=to_stderr)


def _count_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = []
    documents = facts["documents"]
    if documents:
        dropped = "".join(f", {number:,} dropped: {rule}" for rule, number in documents["dropped"].items() if number)
        lines.append(
            f"documents   {documents['kept']:,} of {documents['in']:,}{dropped}, "
            f"{documents['quarantined']:,} quarantined"
            + (f"; {documents['validation']:,} for validation" if documents["validation"] else "")
        )
        if documents["deleted"]:
            lines.append(f"deleted     {count_of(documents['deleted'], 'document')}, which every reader passes over")
        near = documents["near_duplicates"]
        if near and near["clusters"]:
            lines.append(
                f"duplicates  {count_of(near['in'], 'document')} in "
                f"{count_of(near['clusters'], 'near-duplicate cluster')}"
            )
    if facts["chunks"] is not None:
        config = facts["config"]
        lines.append(
            f"{facts['unit'] + 's':<12}{facts['chunks']:,} of {config['chunk_tokens']} tokens "
            f"({count_of(facts['tokens'], 'token')}, {config['tokenizer']})"
        )
    if facts["blocks"]:
        blocks = facts["blocks"]
        lines.append(
            f"            {blocks['with_a_split_sentence']:,} with a split sentence, "
            f"{blocks['with_a_truncated_title']:,} with a truncated title; {blocks['duplicates']:,} repeat another "
            f"({blocks['splitter']})"
        )
    if facts["embeddings"]:
        embeddings = facts["embeddings"]
        lines.append(
            f"embeddings  {embeddings['rows']:,} of {embeddings['dimension']} float16 "
            f"({embeddings['encoder']}, computed in {embeddings['precision']})"
        )
    if facts["index"]:
        lines.append(f"index       {facts['index']['key']}: {facts['index']['reason']}")
    if facts["neighbours"]:
        neighbours = facts["neighbours"]
        recall = neighbours["recall_at_10"]
        measured = (
            "not measurable"
            if recall is None
            else f"{recall:.4f} on {count_of(neighbours['recall_queries'], 'query', 'queries')}"
        )
        of = f", by {neighbours['rerank']} of {neighbours['rerank_candidates']}" if "rerank" in neighbours else ""
        lines.append(f"neighbours  {neighbours['k']} a {facts['unit']}{of}, recall@10 {measured}")
    if facts["unit"] == "block" and facts["complete"]:
        lines.append("training    none: training rows and the leakage report belong to chunks")
    if facts["training"]:
        training = facts["training"]
        lines.append(
            f"training    {count_of(training['sequences'], 'sequence')} of {training['sequence_tokens']:,} tokens "
            f"with {count_of(training['neighbours'], 'neighbour')} a chunk"
        )
    if facts["leakage"]:
        lines.append(f"leakage     {in_words(facts['leakage']['splits'])}")
    if facts["spans"]:
        spans = facts["spans"]
        names = ", ".join(f"{tagger['name']} {tagger['version']}" for tagger in spans["taggers"])
        lines.append(
            f"spans       {spans['spans']:,} in {count_of(spans['sentences'], 'sentence')}, "
            f"{count_of(spans['queries'], 'masked query', 'masked queries')} "
            f"({spans['mask']}{f'; {names}' if names else ''})"
        )
    return lines


def example_pairs(db: Database) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The nearest neighbours that share a subject but not their words: copies teach a reader nothing."""
    best_first = sorted(_first_neighbours(db), reverse=db.manifest.config["metric"] == "ip")
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    seen: set[int] = set()
    for distance, chunk_id, neighbour_id in best_first[:_EXAMPLE_CANDIDATES]:
        chunk, neighbour = db.chunk(chunk_id), db.chunk(neighbour_id)
        if {chunk.document_id, neighbour.document_id} & seen or not _worth_reading(chunk.text, neighbour.text):
            continue
        seen |= {chunk.document_id, neighbour.document_id}
        pairs.append((_titled(db, chunk, distance), _titled(db, neighbour, distance)))
        if len(pairs) == _EXAMPLES:
            break
    return pairs


def _first_neighbours(db: Database) -> list[tuple[float, int, int]]:
    """Distance, chunk and nearest neighbour of the chunks of the first shards."""
    found: list[tuple[float, int, int]] = []
    for table in db.tables("neighbours", ["chunk_id", "neighbour_ids", "distances", "n_valid"]):
        rows = table.slice(0, _EXAMPLE_ROWS).to_pylist()
        found += [(r["distances"][0], r["chunk_id"], r["neighbour_ids"][0]) for r in rows if r["n_valid"]]
        if len(found) >= _EXAMPLE_ROWS:
            break
    return found


def _worth_reading(text: str, other: str) -> bool:
    words, others = (set(re.findall(r"[^\W\d_]{3,}", part.lower())) for part in (text, other))
    if min(len(words), len(others)) < _EXAMPLE_WORDS:
        return False
    return len(words & others) <= _EXAMPLE_OVERLAP * min(len(words), len(others))


def _titled(db: Database, chunk: Any, distance: float) -> dict[str, Any]:
    document = db.document(chunk.document_id)
    return {
        "chunk_id": chunk.chunk_id,
        "title": heading({"title": document.title, "key": document.key}),
        "text": chunk.text,
        "distance": distance,
    }


def _aligned(counted: str, width: int) -> str:
    """A number and what it counts, so that numbers and words stand below each other."""
    number, _, what = counted.partition(" ")
    plural = what if what.endswith("s") else f"{what} "
    return f"{number:>{width}} {plural}"


def print_info(facts: Mapping[str, Any]) -> None:
    """``retrodb info``."""
    echo(facts["database"])
    for line in _count_lines(facts):
        echo(f"  {line}")
    if not facts["complete"]:
        echo(f"  not complete: {', '.join(facts['stages']) or 'no stage'} done; run the build again to go on")
    if len(facts["versions"]) > 1:
        echo(f"version {facts['version']['id']} of:")
        for version in facts["versions"]:
            step = "" if version["step"] is None else f", step {version['step']:,}"
            echo(f"  {version['id']:<6}{version['made_by']:<10}{version['created'] or ''}{step}")
    echo("tables")
    for name, table in facts["tables"].items():
        rows, shards = count_of(table["rows"], "row"), count_of(table["shards"], "shard")
        echo(f"  {name:<12}{_aligned(rows, 12)}  {_aligned(shards, 6)}  {size_text(table['bytes']):>10}")
    echo("fingerprints")
    for kind in ("encoder", "tokenizer"):
        recorded = facts["fingerprints"].get(kind)
        if recorded:
            echo(f"  {kind:<12}{recorded['fingerprint'][:16]}  {recorded['name']}")
    for stage, value in facts["fingerprints"].get("stages", {}).items():
        echo(f"  {stage:<12}{value[:16]}")
    echo("made with  " + ", ".join(f"{name} {number}" for name, number in facts["software"].items()))


def print_hits(hits: Sequence[Mapping[str, Any]]) -> None:
    """``retrodb query``."""
    if not hits:
        echo("no neighbours: the database has no chunk that may be one.")
    for number, hit in enumerate(hits, 1):
        echo(f"{number}. {heading(hit)}  [distance {hit['distance']:.4f}, chunk {hit['chunk_id']}]")
        echo(f"{_INDENT}{hit['source']}")
        echo(quoted(hit["text"]))


def print_chunk(shown: Mapping[str, Any]) -> None:
    """``retrodb show``."""
    chunk = shown["chunk"]
    echo(
        f"chunk {chunk['chunk_id']}: {heading(chunk)}, position {chunk['position']}, "
        f"bytes {chunk['start']:,}-{chunk['end']:,} of {chunk['source']}"
    )
    echo(quoted(chunk["text"], lines=12))
    half = (_width() - 3) // 2
    for number, row in enumerate(shown["neighbours"], 1):
        echo(
            f"\n{number}. {heading(row)}, position {row['position']}  "
            f"[distance {row['distance']:.4f}, chunk {row['chunk_id']}]"
        )
        left = textwrap.wrap(" ".join(row["text"].split()), half) or [""]
        right = textwrap.wrap(" ".join((row["continuation"] or "(no continuation)").split()), half) or [""]
        for at in range(max(len(left), len(right))):
            cells = [column[at] if at < len(column) else "" for column in (left, right)]
            echo(f"{cells[0]:<{half}} | {cells[1]}".rstrip())


def print_verdict(report: Any) -> None:
    """``retrodb verify``."""
    for name, number in report.checked.items():
        echo(f"  {name}: {number:,}")
    for note in report.notes:
        echo(f"  note: {note}")
    for problem in report.problems:
        echo(f"damaged: {problem.path}: {problem.what}", err=True)
    if report.problems:
        found = f"{count_of(len(report.problems), 'problem')} found, in {count_of(len(report.paths), 'file')}."
        echo(f"{found} Run the build again: it makes exactly the damaged shards anew.", err=True)
    else:
        echo("all of it is as the manifest says.")


def print_plan(plan: Mapping[str, Any]) -> None:
    """``retrodb build --dry-run``."""
    echo(
        f"{plan['database']}: {count_of(plan['inputs']['files'], 'file')}, {size_text(plan['inputs']['bytes'])} of "
        "input"
    )
    for stage in plan["stages"]:
        echo(f"  {stage['stage']:<11} {stage['action']}" + (f": {stage['why']}" if stage["why"] else ""))
        if plan["runner"] != "local":
            echo(f"  {'':<11} {plan['runner']}: " + ", ".join(f"{key} {value}" for key, value in stage["runs"].items()))
    if plan["unit"] == "block":
        echo("  training and report belong to chunks: a database of blocks has neither")
    for name, value in plan["estimates"].items():
        echo(f"  {name.replace('_', ' '):<28} {value}")
