"""Generation: the same predictions as reading the finished text, neighbours of complete chunks alone."""

import pytest
import torch
from support import Progress, retrodb

import retrodb as package
from retrodb.errors import InputError, UsageError
from retrodb.generation import Continuation, Retriever, Sampling, generate
from retrodb.learning import make_settings
from retrodb.learning.device import Device
from retrodb.learning.run import train
from retrodb.model.checkpoint import load_model

PROMPT = "Note 7. The otter of Bergen eats trout every Monday and sleeps"
CPU = Device("cpu", "fp32")


@pytest.fixture(scope="module")
def database(topics_db):
    return package.open(str(topics_db))


@pytest.fixture(scope="module")
def checkpoint(database, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("generation") / "ckpt")
    sizes = {"preset": "tiny", "width": 32, "layers": 2, "heads": 2, "steps": 30, "precision": "fp32"}
    train(database, out, make_settings({}, sizes), Progress(), "cpu")
    return out


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)[0]


@pytest.mark.slow
def test_generation_equals_teacher_forcing(database, model):
    """What each step predicted is what one pass over the finished text predicts at that place."""
    start = next(iter(database.tokenizer.tokenize([PROMPT]))).ids.tolist()
    grown = Continuation(model, start, Retriever(database, 2), 2, CPU)
    generator, steps = torch.Generator().manual_seed(0), []
    while len(grown.tokens) < 60:
        steps.append(grown.next_logits())
        grown.tokens.append(Sampling(temperature=1.0).draw(steps[-1], generator))
    with torch.no_grad():
        whole = model.logits(model(grown.batch()))[0]
        off = model.logits(model(grown.batch().with_neighbours(0)))[0]
    assert len(grown.found) == 60 // 16
    for at, logits in enumerate(steps, start=len(start) - 1):
        assert torch.allclose(logits, whole[at], atol=1e-4)
    assert not torch.allclose(off[30:60], whole[30:60], atol=1e-3)


@pytest.mark.slow
def test_a_model_in_bf16_retrieves_what_one_in_fp32_does(database, model):
    start = next(iter(database.tokenizer.tokenize([PROMPT]))).ids.tolist() * 3
    found = []
    for precision in ("fp32", "bf16"):
        grown = Continuation(model, start, Retriever(database, 2), 2, Device("cpu", precision))
        assert grown.next_logits().isfinite().all()
        found.append([(one.ids, list(one.distances)) for one in grown.found])
    assert found[0] == found[1] != []


@pytest.mark.slow
def test_neighbours_are_those_that_the_database_finds_for_the_chunk_s_text(database):
    chunk = next(row for row in database.chunks()).to_pylist()[0]
    tokens = chunk["tokens"][: chunk["n_tokens"]]
    found = Retriever(database, 3).find(0, tokens)
    hits = database.search(database.chunk(chunk["chunk_id"]).text, 3)
    assert found.ids == [hit.chunk_id for hit in hits]
    assert found.distances[0] == pytest.approx(0, abs=1e-2)  # a chunk of the database finds itself
    for place, hit in enumerate(hits):
        here, following = database.chunk(hit.chunk_id), database.continuation(hit.chunk_id)
        assert found.tokens[place, 0, : len(here.tokens)].tolist() == list(here.tokens)
        assert found.lengths[place].tolist() == [len(here.tokens), len(following.tokens) if following else 0]


@pytest.mark.slow
def test_the_seed_decides_and_temperature_zero_needs_none(database, model):
    def made(**sampling):
        return generate(database, model, PROMPT, tokens=12, sampling=Sampling(**sampling), device=CPU).tokens

    assert made(seed=1) == made(seed=1)
    assert made(temperature=2.0, seed=1, top_k=None) != made(temperature=2.0, seed=2, top_k=None)
    assert made(temperature=0, seed=1) == made(temperature=0, seed=2) == made(top_k=1) == made(top_p=1e-9)


@pytest.mark.slow
def test_bytes_that_are_no_text_are_embedded_too(database):
    euro = "€".encode()[:1]
    odd = next(t for t in range(400) if database.tokenizer.decode([t]) == euro)
    assert len(Retriever(database, 2).find(0, [odd] * 16).ids) == 2


@pytest.mark.slow
def test_what_cannot_be_continued_is_refused(database, model):
    def attempt(prompt, tokens=5, **options):
        return generate(database, model, prompt, tokens=tokens, sampling=Sampling(), device=CPU, **options)

    with pytest.raises(UsageError, match="the prompt is empty"):
        attempt("")
    with pytest.raises(UsageError, match=r"longer than the 64 of a sequence.*Ask for at most"):
        attempt(PROMPT, tokens=64)
    with pytest.raises(UsageError, match="Shorten the prompt"):
        attempt(PROMPT * 9)
    assert attempt(PROMPT, k=0).found == []
    model_without = type(model)(model.config.model_copy(update={"retrieval": None}))
    with pytest.raises(InputError, match="-k 2: the model has no retrieval"):
        generate(database, model_without, PROMPT, tokens=5, sampling=Sampling(), k=2)


@pytest.mark.slow
def test_generate_from_the_command_line(topics_db, checkpoint):
    ran = retrodb("generate", topics_db, PROMPT, "--checkpoint", checkpoint, "--tokens", 8, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["prompt"] == PROMPT
    assert ran.json["text"]
    assert [one["chunk"] for one in ran.json["retrieved"]] == list(range(len(ran.json["tokens"][:-1]) // 16))
    for flags in (["-k", 10**9], ["--seed", 2**70], ["--top-p", "nan"]):
        assert retrodb("generate", topics_db, PROMPT, "--checkpoint", checkpoint, *flags).code == 2


@pytest.mark.parametrize("temperature", [0, 1e-45, 1e-7])
def test_what_is_colder_than_logits_can_tell_is_the_likeliest(temperature):
    logits = torch.tensor([0.0, 3.0, 3.0 - 1e-6, -200.0])
    assert Sampling(temperature=temperature).draw(logits, torch.Generator()) == 1


def test_top_p_keeps_the_likeliest_alone():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    drawn = {Sampling(1.0, None, 0.7).draw(logits, torch.Generator().manual_seed(s)) for s in range(100)}
    assert drawn == {1, 3}
    assert Sampling(1.0, None, 0.0).draw(logits, torch.Generator().manual_seed(0)) == 1, "one of them at least"
    drawn = {Sampling(1.0, 3, 1.0).draw(logits, torch.Generator().manual_seed(s)) for s in range(200)}
    assert drawn == {1, 2, 3}
