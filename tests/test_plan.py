"""``retrodb plan``: what it says of a size is what builds of that size show; and nonsense is refused."""

import multiprocessing
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import build_here, corpus, manifest_of, retrodb, shards_of, write_jsonl
from worker_memory import peaks_of_a_build

from retrodb.corpus.quickstart import quickstart_lines
from retrodb.errors import InputError, UsageError
from retrodb.planning import Assumed, encoder_size, parse_tokens, plan_build, scale_table

DOCS = Path(__file__).parents[1] / "docs" / "scale.md"
WITHIN = 0.2


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1e9", 10**9),
        ("100B", 100 * 10**9),
        ("1.75T", 1_750 * 10**9),
        ("2 trillion", 2 * 10**12),
        ("1,000,000", 10**6),
        ("3_000k", 3 * 10**6),
        (" 5 Million ", 5 * 10**6),
        ("1", 1),
    ],
)
def test_sizes_are_read_as_people_write_them(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text",
    ["", "many", "-1", "0", "1e99", "1.7.5T", "5 GB", "nan", "inf", "1e-3", "0x10", "½T", "1,5e9", "1,00", "1__0"],
)
def test_what_names_no_size_is_refused(text):
    with pytest.raises(UsageError, match="--tokens"):
        parse_tokens(text)


def test_every_figure_has_a_source_and_grows_with_the_corpus():
    encoder = encoder_size("all-MiniLM-L6-v2")
    small, large = (plan_build(Assumed(tokens, encoder)) for tokens in (10**8, 10**11))
    for section, figures in small.sections.items():
        for name, figure in figures.items():
            assert figure.source, (section, name)
    for section, name in (
        ("disk", "all"),
        ("shuffle", "training"),
        ("time", "search"),
        ("requests", "other shards read"),
    ):
        assert large.value(section, name) > 100 * small.value(section, name)


def test_more_neighbours_wider_vectors_and_shorter_chunks_cost_what_they_should():
    encoder, tokens = encoder_size("all-MiniLM-L6-v2"), 10**9
    base = plan_build(Assumed(tokens, encoder))
    wide = plan_build(Assumed(tokens, encoder_size("bert-large-uncased")))
    short = plan_build(Assumed(tokens, encoder, chunk_tokens=32))
    more = plan_build(Assumed(tokens, encoder, neighbours=40, training_neighbours=4))
    assert wide.value("disk", "embeddings") == pytest.approx(base.value("disk", "embeddings") * 1024 / 384, rel=0.01)
    assert wide.value("time", "embedding, A100-hours") > 20 * base.value("time", "embedding, A100-hours")
    assert short.value("corpus", "chunks") == pytest.approx(2 * base.value("corpus", "chunks"), rel=0.05)
    assert more.value("disk", "neighbours") == pytest.approx(2 * base.value("disk", "neighbours"), rel=0.01)
    assert more.value("shuffle", "training") == 2 * base.value("shuffle", "training")


def test_bert_large_at_retros_size_takes_what_instructretro_measured():
    plan = plan_build(Assumed(10**12, encoder_size("bert-large-uncased"), document_tokens=10**6))
    assert plan.value("time", "embedding, A100-hours") == pytest.approx(10**12 / 64 / 6.22e6, rel=0.001)


def test_the_largest_size_is_planned_at_once_and_what_ids_cannot_number_is_refused():
    encoder = encoder_size("all-MiniLM-L6-v2")
    largest = plan_build(Assumed(parse_tokens("1e17"), encoder))
    assert largest.value("index", "index shards") > 10**7
    with pytest.raises(InputError, match="shards are more than the 2,147,483,648 that ids can number.*--shard-bytes"):
        plan_build(Assumed(parse_tokens("1e17"), encoder, shard_bytes=64_000))


@pytest.mark.parametrize(("document_tokens", "chunks"), [(10, 1.0), (64, 1.58), (100, 2.1), (1_000, 16.1)])
def test_a_document_shorter_than_a_chunk_is_a_chunk(document_tokens, chunks):
    assumed = Assumed(10**9, encoder_size("all-MiniLM-L6-v2"), document_tokens=document_tokens)
    assert assumed.chunks / assumed.documents == pytest.approx(chunks, rel=0.01)


def test_an_encoder_is_sized_by_its_card_or_refused(tmp_path, tiny_encoder):
    size = encoder_size(str(tiny_encoder))
    assert (size.dimension, size.parameters) == (32, 4 * 32 * 32 + 2 * 32 * 64)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError):
        encoder_size(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("news_wikinews", {"neighbours": 20}),
        ("quickstart", {"neighbours": 20, "exclude": "none"}),
        (
            "wiki_large",
            {"neighbours": 12, "index_key": "IVF16,SQ8", "training_neighbours": 3},
        ),
    ],
)
def test_what_it_says_of_a_size_is_what_a_build_of_that_size_shows(
    source, settings, tiny_encoder, tmp_path, monkeypatch
):
    from retrodb.pipelines import retrieval_stages, search
    from retrodb.pipelines.runners import LocalRunner

    from retrodb.training.messages import Answer, Request

    sent: Counter[str] = Counter()

    def counted(kind, name):
        original = kind.to_bytes

        def to_bytes(self):
            data = original(self)
            sent[name] += len(data)
            return data

        monkeypatch.setattr(kind, "to_bytes", to_bytes)

    monkeypatch.setattr(LocalRunner, "is_local", False)  # neighbours' tokens are shuffled, as on a cluster
    counted(Request, "joined")
    counted(Answer, "joined")
    monkeypatch.setattr(retrieval_stages, "TOGETHER_BELOW", 0)  # candidates are shuffled, as those of a large index
    pieces = search.SearchIndexShard._pieces

    def counted_pieces(self, *rest, **more):
        for key, data in pieces(self, *rest, **more):
            sent["candidates"] += len(data)
            yield key, data

    monkeypatch.setattr(search.SearchIndexShard, "_pieces", counted_pieces)
    path = _lines(source, tmp_path / "corpus.jsonl")
    db = tmp_path / "db"
    build_here([path], db, encoder=str(tiny_encoder), shard_bytes="64KB", **settings)
    manifest = manifest_of(db)
    counts = manifest["stages"]["chunk"]["counts"]
    texts = [text for shard in shards_of(db, "documents") for text in pq.read_table(shard)["text"].to_pylist()]
    text_bytes = sum(len(text.encode()) for text in texts)
    plan = plan_build(
        Assumed(
            counts["tokens"],
            encoder_size(str(tiny_encoder)),
            shard_bytes=64_000,
            document_tokens=counts["tokens"] / len(texts),
            bytes_per_token=text_bytes / counts["tokens"],
            record_overhead=path.stat().st_size / text_bytes,
            **settings,
        )
    )
    tables = manifest["tables"]
    files = [file for file in db.rglob("*") if file.is_file()]
    real = {
        ("corpus", "chunks"): counts["chunks"],
        ("corpus", "shards of a table"): len(tables["chunks"]["shards"]),
        ("index", "index shards"): manifest["stages"]["index"]["details"]["shards"],
        ("requests", "files of the database"): len(files),
        ("shuffle", "neighbours, candidates"): sent["candidates"],
    }
    for table in plan.sections["disk"]:
        if table != "all":
            real["disk", table] = sum(shard["bytes"] for shard in tables[table]["shards"])
    found = {where: plan.value(*where) / value for where, value in real.items()}
    joined = plan.value("shuffle", "training") + plan.value("shuffle", "report")
    found["shuffle", "training and report"] = joined / sent["joined"]
    if source == "quickstart":  # documentation, which compresses better than the prose of the calibration
        for table in ("documents", "chunks", "training"):
            del found["disk", table]
    if source == "wiki_large":  # long documents are asked again, and the plan counts what is asked once
        assert found.pop(("shuffle", "neighbours, candidates")) < 1
    assert {where: ratio for where, ratio in found.items() if not 1 - WITHIN < ratio < 1 + WITHIN} == {}


PLANNED_AS = {
    "chunk": "corpus, chunk",
    "embed": "embed",
    "neighbours": "neighbours",
    "training": "training",
    "report": "report",
}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_worker_of_each_stage_holds_what_the_plan_says(quickstart_corpus, tmp_path):
    """The default encoder on real text: the peak of the worker processes of each stage, as the kernel counts it."""
    # In a process of its own, since this one may have other children by now: servers that processes are forked from.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peaks = pool.submit(peaks_of_a_build, quickstart_corpus, tmp_path / "db").result()
    counts = manifest_of(tmp_path / "db")["stages"]["chunk"]["counts"]
    plan = plan_build(Assumed(counts["tokens"], encoder_size("all-MiniLM-L6-v2"), shard_bytes=32_000))
    found = {stage: plan.value("memory per worker", name) / peaks[stage] for stage, name in PLANNED_AS.items()}
    assert 0.9 < found.pop("embed") < 1.6, peaks  # what torch holds differs by processor: the most is planned
    # What an idle worker holds is most of the others, and differs by what of its libraries' pages are touched.
    assert {stage: ratio for stage, ratio in found.items() if not 0.7 < ratio < 1.3} == {}, peaks


def _lines(source: str, path: Path) -> Path:
    if source == "quickstart":
        return write_jsonl(path, quickstart_lines()[:70])
    import gzip
    import itertools

    with gzip.open(corpus(source), "rt", encoding="utf-8") as lines:
        return write_jsonl(
            path, [line.rstrip("\n") for line in itertools.islice(lines, 300 if source == "news_wikinews" else 70)]
        )


@pytest.mark.slow
def test_the_command_prints_the_figures_with_their_sources_and_refuses_nonsense():
    ran = retrodb("plan", "--tokens", "100B", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["disk"]["embeddings"]["value"] > 10**12
    assert all(figure["source"] for figure in ran.json["memory per worker"].values())
    for flags, code in ((("--tokens", "lots"), 2), (("--tokens", "1T", "--neighbours", "0"), 2),
                        (("--tokens", "1T", "--encoder", "/nowhere/at-all"), 3)):  # fmt: skip
        refused = retrodb("plan", *flags)
        assert refused.code == code, refused.err
        assert "Traceback" not in refused.err


def test_what_it_takes_from_the_code_is_what_the_code_has():
    from retrodb.pipelines import search

    from retrodb.neighbours import rounds, sources
    from retrodb.planning import figures, scale
    from retrodb.quality.leakage import NEAREST

    assert scale._BLOCK_QUERIES == search.BLOCK_QUERIES
    assert scale._REPORTED_NEIGHBOURS == NEAREST
    assert figures.SELECT_BYTES == sources.VECTOR_CACHE_BYTES
    assert figures.COMBINE_BYTES == 1_000 * rounds.PIECE_BYTES


def test_the_table_of_the_scale_page_is_made_by_the_plan():
    assert scale_page_table() in DOCS.read_text(encoding="utf-8")


def scale_page_table() -> str:
    encoder = encoder_size("all-MiniLM-L6-v2")
    sizes = ((10**9, 16 << 30), (10**11, 256 << 30), (1_750 * 10**9, 4 << 40))
    return scale_table([plan_build(Assumed(tokens, encoder, memory_bytes=memory)) for tokens, memory in sizes])
