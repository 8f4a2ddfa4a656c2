"""Open-QA fine-tuning: a query encoder and a span reader learn from questions; the database stays as it is."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from retrodb.pipelines.living import delete
from support import Progress, build_here, make_tiny_encoder, retrodb, stamps, write_jsonl
from tokenizers import Tokenizer

import retrodb as package
from retrodb.corpus.selection import Selection
from retrodb.encoding import identify, resolve_encoder
from retrodb.encoding.encoder import Encoder
from retrodb.errors import DamagedError, InputError, MismatchError, UsageError, WorkerError
from retrodb.evaluation.answers import exact_match, squad_form
from retrodb.evaluation.open_qa import Answering
from retrodb.evaluation.questions import QuestionSet
from retrodb.learning.open_qa import FineTuned, OpenQaSettings, OpenQaTrainer
from retrodb.learning.open_qa_batches import Asked, Wordpieces, retrieve
from retrodb.learning.realm import RealmSettings, RealmTrainer
from retrodb.model.realm import Realm, Texts
from retrodb.model.realm.query import QueryEncoder
from retrodb.model.realm.span_reader import LONGEST_ANSWER, matches
from retrodb.storage import Storage

PLACES = ("Ankara", "Bogota", "Cairo", "Dakar", "Evora", "Fez")
OLD = ("Anna Berg", "Boris Kahn", "Clara Diaz", "David Roth", "Emma Lund", "Felix Moor")
NEW = (*OLD[1:], OLD[0])
"""Every place has another mayor, and no mayor a place of before."""
SETTINGS = {"steps": 4, "batch": 2, "blocks": 3, "save_every": 2, "log_every": 1, "seed": 1}


def documents(mayors: tuple[str, ...]):
    """A document a place, which says who its mayor is."""
    for place, mayor in zip(PLACES, mayors, strict=True):
        text = f"{place} is a town by the river. The mayor of {place} is {mayor}, who likes the harbour."
        yield {"id": place, "title": place, "text": text}


def questions():
    for place, old, new in zip(PLACES, OLD, NEW, strict=True):
        yield {"question": f"Who is the mayor of {place}?", "answers_by_version": {"old": old, "new": [new, "nobody"]}}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("questions") / "q.jsonl", questions())


@pytest.fixture(scope="module")
def databases(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The places with their old and their new mayors, blocks by one encoder. Do not change them."""
    folder = tmp_path_factory.mktemp("mayors")
    settings = {"unit": "block", "metric": "ip", "encoder": str(tiny_encoder), "chunk_tokens": 48, "dedup": "off"}
    for name, mayors in (("old", OLD), ("new", NEW)):
        inputs = write_jsonl(folder / f"{name}.jsonl", documents(mayors))
        build_here([inputs], folder / name, **settings)
    return {name: folder / name for name in ("old", "new")}


def trainer(database: Path, asked: Path, out: Path, **settings: object) -> OpenQaTrainer:
    made = OpenQaSettings.make({**SETTINGS, "answers": "answers old", **settings})
    return OpenQaTrainer(package.open(str(database)), QuestionSet(str(asked)), str(out), made, Progress())


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# -- the query side ----------------------------------------------------------------------------------------------------


def carded(folder: Path, pooling: str, width: int | None, normalise: bool) -> Path:
    """A tiny encoder with a card: its pooling, a projection, normalisation."""
    from safetensors.torch import save_file

    make_tiny_encoder(folder)
    kind = "sentence_transformers.models"
    names = ["Pooling", *(["Dense"] if width else []), *(["Normalize"] if normalise else [])]
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"}]
    for at, name in enumerate(names, 1):
        modules.append({"idx": at, "name": str(at), "path": f"{at}_{name}", "type": f"{kind}.{name}"})
        (folder / f"{at}_{name}").mkdir()
    card = {"word_embedding_dimension": 32, "pooling_mode_cls_token": pooling == "cls"}
    card["pooling_mode_mean_tokens"] = pooling == "mean"
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(card), encoding="utf-8")
    if width:
        dense = {"in_features": 32, "out_features": width, "bias": False}
        dense["activation_function"] = "torch.nn.modules.linear.Identity"
        (folder / "2_Dense" / "config.json").write_text(json.dumps(dense), encoding="utf-8")
        weight = torch.randn(width, 32, generator=torch.Generator().manual_seed(0))
        save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("pooling", "width", "normalise"), [("mean", None, True), ("cls", None, False), ("cls", 8, False)]
)
def test_a_question_has_the_very_vector_that_the_databases_encoder_gives_it(
    pooling: str, width: int | None, normalise: bool, tmp_path: Path
) -> None:
    files = resolve_encoder(str(carded(tmp_path / "encoder", pooling, width, normalise)))
    query = QueryEncoder.start(files, identify(files, "fp32"))
    wordpieces = Wordpieces((files.transformer / "tokenizer.json").read_bytes(), "here")
    texts = ["Who is it?", "What is a block of program text, and who wrote it?"]
    prompted = Texts.of(wordpieces.ids([query.config.prompt + text for text in texts]))
    with torch.no_grad():
        found = query(prompted).numpy()
    expected = Encoder.load(files).embed_queries(texts).astype(np.float32)
    np.testing.assert_allclose(found, expected, atol=5e-3, rtol=5e-3)
    assert all(parameter.requires_grad for parameter in query.parameters())


def test_an_encoder_that_does_more_than_a_matrix_is_refused_in_words(tmp_path: Path) -> None:
    folder = carded(tmp_path / "encoder", "cls", 8, False)
    files = resolve_encoder(str(folder))
    card = folder / "2_Dense" / "config.json"
    card.write_text(card.read_text("utf-8").replace("linear.Identity", "activation.Tanh"), encoding="utf-8")
    with pytest.raises(InputError, match="has an activation or a bias"):
        QueryEncoder.start(files, identify(files, "fp32"))
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_max_tokens": True}), encoding="utf-8"
    )
    with pytest.raises(InputError, match="with max pooling: fine-tuning takes a BERT with mean or CLS"):
        QueryEncoder.start(files, identify(files, "fp32"))


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_marginal_over_blocks_and_matching_spans_written_out(
    databases: dict[str, Path], asked: Path, tmp_path: Path
) -> None:
    """Each question by itself, each block by itself, each span by itself, with numbers of twice the precision."""
    made = trainer(databases["old"], asked, tmp_path / "out")
    rows = [0, 3]
    given = Asked.of([made.training.questions[row] for row in rows], made.wordpieces, "")
    vectors = made.model.query(given.prompted)
    batch, found = retrieve(made.db, vectors.detach().numpy(), 3)
    wanted = [made.training.answers[row] for row in rows for _ in range(3)]
    nats, answered = made.model.nats(vectors, given.plain, found, matches(found.bodies, wanted))
    stored = {shard.number: made.db.embeddings(shard.number) for shard in made.db.manifest.shards("chunks")}
    config = made.model.reader.config
    for at, row in enumerate(rows):
        ids = [int(one) for one in batch.ids[at, 1:]]
        scores = [
            float(vectors[at].detach().double() @ torch.tensor(stored[i >> 32][i & 0xFFFFFFFF]).double()) for i in ids
        ]
        prior = torch.tensor(scores).double().softmax(0)
        question = made.wordpieces.ids([f"Who is the mayor of {PLACES[row]}?"])[0]
        total = 0.0
        for slot, chunk in enumerate(ids):
            body = list(made.db.chunk(chunk).tokens)
            tokens = [config.cls, *question, config.sep, *body, config.sep]
            types = [0] * (len(question) + 2) + [1] * (len(body) + 1)
            with torch.no_grad():
                hidden = made.model.reader.bert(
                    input_ids=torch.tensor([tokens]), token_type_ids=torch.tensor([types])
                ).last_hidden_state[0]
                spans = [(s, s + j) for s in range(len(body)) for j in range(LONGEST_ANSWER) if s + j < len(body)]
                pairs = [torch.cat([hidden[len(question) + 2 + s], hidden[len(question) + 2 + e]]) for s, e in spans]
                values = made.model.reader.mlp(torch.stack(pairs))[:, 0].double().softmax(0)
            answer = made.wordpieces.ids([OLD[row]])[0]
            total += sum(
                float(prior[slot] * value)
                for (s, e), value in zip(spans, values, strict=True)
                if body[s : e + 1] == answer
            )
        assert bool(answered[at]) == (total > 0)
        if total:
            assert float(nats[at].detach()) == pytest.approx(-math.log(total), abs=1e-4)
    assert answered.any()


def test_the_gradient_reaches_query_encoder_and_reader_and_the_document_side_stays_bit_for_bit(
    databases: dict[str, Path], asked: Path, tmp_path: Path
) -> None:
    before, document_side = stamps(databases["old"]), package.open(str(databases["old"])).embeddings(0).copy()
    made = trainer(databases["old"], asked, tmp_path / "out", learning_rate=1e-2)
    first = weights(made.model)
    made.train()
    after = made.model.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, first[name])}
    assert changed == {"query", "reader"}
    assert not torch.equal(
        first["query.bert.encoder.layer.0.output.dense.weight"], after["query.bert.encoder.layer.0.output.dense.weight"]
    ), "the gradient reaches it through the retrieval scores alone"
    for entry in made.log:
        if entry["answer_in_blocks"]:
            assert entry["gradient_norm"]["query"] > 0 < entry["gradient_norm"]["reader"]
    assert stamps(databases["old"]) == before
    assert np.array_equal(package.open(str(databases["old"])).embeddings(0), document_side)
    assert {value.shape for value in after.values()} == {value.shape for value in first.values()}


def test_questions_without_an_answer_in_reach_teach_nothing_and_break_nothing(
    databases: dict[str, Path], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "Who?", "answers": ["Zacharias"]}])
    made = OpenQaTrainer(
        package.open(str(databases["old"])),
        QuestionSet(str(path)),
        str(tmp_path / "out"),
        OpenQaSettings.make({**SETTINGS, "blocks": 20}),  # more than there are
        Progress(),
    )
    first = weights(made.model)
    made.train()
    assert [entry["loss"] for entry in made.log] == [0.0] * 4
    assert made.progress.lines[-1] == "4 steps, nothing was learnt: no answer stood in the 20 blocks of its question"
    assert all(torch.equal(value, first[name]) for name, value in made.model.state_dict().items())


def test_where_nothing_can_be_retrieved_answers_are_empty(
    databases: dict[str, Path], asked: Path, tmp_path: Path
) -> None:
    trainer(databases["old"], asked, tmp_path / "qa", steps=1).train()
    shutil.copytree(databases["old"], tmp_path / "db")
    delete(Storage(str(tmp_path / "db")), Selection(keys=PLACES), Progress())
    db = package.open(str(tmp_path / "db"))
    under_way = Answering(db, FineTuned(str(tmp_path / "qa")), QuestionSet(str(asked)), Progress())
    for one in under_way.predictions():
        assert (one.answer, one.chunk_id, one.key, one.log_probability) == ("", None, None, None)
        assert not any(one.exact.values())
        assert not any(one.retrieved.values())
    assert under_way.result.exact["answers old"].value == 0.0


# -- what outlives a process -------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    databases: dict[str, Path], asked: Path, tmp_path: Path
) -> None:
    whole = trainer(databases["old"], asked, tmp_path / "whole", learning_rate=1e-3)
    whole.train()
    begun = trainer(databases["old"], asked, tmp_path / "parts", learning_rate=1e-3)
    for _ in range(2):
        begun.take_step()
    begun._save()
    begun.take_step()  # what was not saved is taken again
    resumed = trainer(databases["old"], asked, tmp_path / "parts", learning_rate=1e-3)
    assert resumed.step == 2
    resumed.train()
    for name in ("model.safetensors", "state.safetensors"):
        parts, undisturbed = ((tmp_path / run / "step-00000004" / name).read_bytes() for run in ("parts", "whole"))
        assert parts == undisturbed
    told = [[{k: v for k, v in entry.items() if k != "seconds"} for entry in run.log] for run in (whole, resumed)]
    assert told[0] == told[1]
    other = trainer(databases["old"], asked, tmp_path / "other", learning_rate=1e-3, seed=2)
    other.train()
    assert not torch.equal(other.model.reader.mlp[0].weight, whole.model.reader.mlp[0].weight)


def test_another_run_another_database_and_a_damaged_checkpoint_are_refused_in_words(
    databases: dict[str, Path], asked: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    trainer(databases["old"], asked, out).train()
    with pytest.raises(MismatchError, match="its batch is 2, now it is 3"):
        trainer(databases["old"], asked, out, batch=3)
    with pytest.raises(MismatchError, match="its database is"):
        trainer(databases["new"], asked, out)
    weight = out / "step-00000004" / "model.safetensors"
    weight.write_bytes(weight.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match="model.safetensors is missing, or not what was saved"):
        FineTuned(str(out))
    (out / "open-qa.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="no checkpoint of retrodb finetune-qa"):
        FineTuned(str(out))
    with pytest.raises(InputError, match="it has no open-qa.json"):
        FineTuned(str(tmp_path))


def test_one_who_waited_for_the_lock_goes_on_from_what_the_other_left(
    databases: dict[str, Path], asked: Path, tmp_path: Path
) -> None:
    """Two processes were started with the same command; the first one ended before the second had the lock."""
    one, other = (trainer(databases["old"], asked, tmp_path / "out", learning_rate=1e-3) for _ in range(2))
    one.train()
    left = stamps(tmp_path / "out")
    assert other.train() == 4
    assert stamps(tmp_path / "out") == left
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_a_folder_that_holds_another_programs_checkpoint_is_refused_and_loses_nothing(
    databases: dict[str, Path], asked: Path, tmp_path: Path
) -> None:
    """``--out`` and ``--start`` may be mistaken for each other: both have folders of steps."""
    weights = tmp_path / "realm" / "step-00000100" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (tmp_path / "realm" / "realm.json").touch()
    with pytest.raises(InputError, match=r"has no open-qa.json and holds other things \(realm.json\): name another"):
        trainer(databases["old"], asked, tmp_path / "realm")
    assert weights.exists()


def test_a_run_that_diverges_ends_in_words_and_keeps_nothing_that_is_no_number(
    databases: dict[str, Path], asked: Path, tmp_path: Path
) -> None:
    made = trainer(databases["old"], asked, tmp_path / "out")
    made.model.reader.mlp[0].weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(made.model)
    with pytest.raises(WorkerError, match=r"step [1-4]: the loss is .*(nan|inf) of the reader. Nothing"):
        made.train()
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    made = trainer(databases["old"], asked, tmp_path / "out", learning_rate=1e30)
    with pytest.raises(WorkerError, match=r"the loss is|the largest number of the query vectors"):
        made.train()
    assert not list((tmp_path / "out").glob("step-*/*"))


# -- what is learnt ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(databases: dict[str, Path], asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned on the old mayors until they are known."""
    out = tmp_path_factory.mktemp("learnt") / "qa"
    settings = {"steps": 50, "batch": 6, "blocks": 6, "learning_rate": 3e-3, "save_every": 50}
    trainer(databases["old"], asked, out, **settings).train()
    return out


@pytest.mark.slow
def test_a_handful_of_questions_is_learnt_and_another_corpus_at_test_time_gives_its_own_answers(
    databases: dict[str, Path], asked: Path, learnt: Path
) -> None:
    """A question has the answer of the text it is asked of: the model learnt where to read it (section 4.5)."""
    found = {}
    for name, database in databases.items():
        under_way = Answering(package.open(str(database)), FineTuned(str(learnt)), QuestionSet(str(asked)), Progress())
        found[name] = (list(under_way.predictions()), under_way.result)
    predictions, result = found["old"]
    assert [one.answer for one in predictions] == list(OLD)
    assert [one.key for one in predictions] == list(PLACES)
    assert result.exact["answers old"].value == 1.0
    assert result.exact["answers new"].value == 0.0
    swapped, result = found["new"]
    assert [one.answer for one in swapped] == list(NEW)
    assert result.exact["answers old"].value == 0.0
    assert result.exact["answers new"].value == 1.0
    assert result.retrieved["answers new"].value == 1.0
    assert result.questions == {"answers old": 6, "answers new": 6}


@pytest.mark.slow
def test_the_commands_finetune_and_answer_with_either_database(
    databases: dict[str, Path], asked: Path, learnt: Path, tmp_path: Path
) -> None:
    settings = ["--answers", "answers old", "--steps", 2, "--batch", 2, "--threads", 1]
    ran = retrodb("finetune-qa", databases["old"], asked, "--out", tmp_path / "qa", *settings, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["step"] == 2
    out = tmp_path / "predictions.jsonl"
    ran = retrodb("answer", databases["new"], asked, "--model", tmp_path / "qa", "--predictions", out, "--json")
    assert ran.code == 0, ran.err
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["question"] for line in lines] == [one["question"] for one in questions()]
    for one in ran.json["criteria"]:
        hits = sum(line["exact"][one["criterion"]] for line in lines)
        assert one["exact_match"]["value"] == hits / 6
        low, high = one["exact_match"]["interval"]
        assert low <= hits / 6 <= high
    ran = retrodb("answer", databases["old"], asked, "--model", learnt)
    assert "exact match           1.0000" in ran.out
    before = (databases["old"] / "manifest.json").read_bytes()
    for wrong, code, said in (
        (databases["old"] / "manifest.json", 3, "lies inside the database"),
        (tmp_path, 2, "is a folder: name the file in it"),
        (asked / "predictions.jsonl", 3, "cannot make the folder"),
    ):
        ran = retrodb("answer", databases["old"], asked, "--model", learnt, "--predictions", wrong)
        assert (ran.code, said in ran.err, "answer  " in ran.err) == (code, True, False), ran.err
    assert (databases["old"] / "manifest.json").read_bytes() == before


def test_the_reader_begins_as_a_realm_checkpoints_and_the_query_encoder_as_the_databases(
    databases: dict[str, Path], asked: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    realm = Realm.start(str(tiny_encoder), dimension=16, seed=5)
    with torch.no_grad():
        realm.reader.bert.embeddings.word_embeddings.weight += 0.5
    realm.export(tmp_path / "step-000000", resolve_encoder(str(tiny_encoder)))
    inputs = write_jsonl(tmp_path / "docs.jsonl", documents(OLD))
    settings = {"unit": "block", "metric": "ip", "encoder": str(tmp_path / "step-000000"), "chunk_tokens": 48}
    build_here([inputs], tmp_path / "db", dedup="off", **settings)
    assert retrodb("spans", tmp_path / "db", "--mask", "random-span", "--workers", 1).code == 0
    pretraining = RealmTrainer(
        str(tmp_path / "db"),
        str(tmp_path / "realm"),
        str(tmp_path / "exports"),
        RealmSettings.make({"start": str(tiny_encoder), "dimension": 16, "seed": 5}),
        Progress(),
    )
    pretraining.model.load_state_dict(realm.state_dict())
    pretraining._save()
    made = trainer(tmp_path / "db", asked, tmp_path / "qa", start=str(tmp_path / "realm"))
    assert made.progress.lines == []
    for name, value in realm.reader.bert.state_dict().items():
        assert torch.equal(made.model.reader.bert.state_dict()[name], value)
    assert torch.equal(made.model.query.projection.weight, realm.retriever.projection.weight)
    other = trainer(databases["old"], asked, tmp_path / "other", start=str(tmp_path / "realm"))
    assert "was not embedded by the retriever of" in other.progress.lines[0]


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_learnt_from_is_refused_in_words(
    databases: dict[str, Path], tiny_encoder: Path, asked: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="kinds of answers are 'answers new', 'answers old'. Name one by --answers"):
        trainer(databases["old"], asked, out, answers=None)
    with pytest.raises(InputError, match="has no 'answers 1900'"):
        trainer(databases["old"], asked, out, answers="answers 1900")
    broken = write_jsonl(tmp_path / "broken.jsonl", [{"question": "who?", "answers": ["x"]}, '{"question": "who?"'])
    with pytest.raises(InputError, match="broken.jsonl, line 2 is not JSON"):
        trainer(databases["old"], broken, out)
    long = write_jsonl(tmp_path / "long.jsonl", [{"question": "who?", "answers": ["one of many " * 9]}])
    with pytest.raises(InputError, match="none with an answer of 1 to 10 wordpieces"):
        trainer(databases["old"], long, out, answers=None)
    chunks = {"encoder": str(tiny_encoder), "until": "index", "dedup": "off"}
    build_here([write_jsonl(tmp_path / "docs.jsonl", documents(OLD))], tmp_path / "chunks", **chunks)
    with pytest.raises(InputError, match="is a database of chunks"):
        trainer(tmp_path / "chunks", asked, out)
    with pytest.raises(InputError, match="lies inside the database"):
        trainer(databases["old"], asked, databases["old"] / "qa")
    foreign = make_tiny_encoder(tmp_path / "foreign")
    tokenizer = foreign / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text("utf-8").replace("##ing", "##gni"), encoding="utf-8")
    with pytest.raises(MismatchError, match=r"--start .*foreign' has another .*The reader could not read them"):
        trainer(databases["old"], asked, out, start=str(foreign))
    write_jsonl(tmp_path / "ckpt" / "realm.json", [{"format": "retrodb-realm", "tokenizer": "0" * 64}])
    with pytest.raises(MismatchError, match=r"--start .*ckpt' has another \(0000000000000000\)"):
        trainer(databases["old"], asked, out, start=str(tmp_path / "ckpt"))
    with pytest.raises(UsageError, match="--clip inf"):
        OpenQaSettings.make({"clip": math.inf})
    with pytest.raises(UsageError, match="--blocks 0"):
        OpenQaSettings.make({"blocks": 0})
    assert not out.exists()


def test_a_database_of_another_encoder_is_refused_in_words(learnt: Path, asked: Path, tmp_path: Path) -> None:
    other = make_tiny_encoder(tmp_path / "encoder", seed=3)
    inputs = write_jsonl(tmp_path / "docs.jsonl", documents(OLD))
    settings = {"unit": "block", "metric": "ip", "encoder": str(other), "chunk_tokens": 48, "until": "index"}
    build_here([inputs], tmp_path / "db", dedup="off", **settings)
    with pytest.raises(MismatchError, match="was fine-tuned on the vectors of another encoder"):
        Answering(package.open(str(tmp_path / "db")), FineTuned(str(learnt)), QuestionSet(str(asked)), Progress())


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The  Walt-Disney Company.", "waltdisney company"),
        ("42,972,878", "42972878"),
        ("a theory of an Athens", "theory of athens"),
        ("...", ""),
    ],
)
def test_answers_are_compared_as_squad_does(text: str, form: str) -> None:
    assert squad_form(text) == form
    assert exact_match(text, ["other", form.upper()])
    assert not exact_match(text, ["other"])


def test_an_answer_has_the_characters_of_the_text(tiny_encoder: Path) -> None:
    wordpieces = Wordpieces((tiny_encoder / "tokenizer.json").read_bytes(), "here")
    body = "GDP: $42,972,878 (2016 est.)"
    ids = wordpieces.ids([body])[0]
    first = len(wordpieces.ids(["GDP: $"])[0])
    size = len(wordpieces.ids(["42,972,878"])[0])
    assert wordpieces.span(body, first, size, ids[first : first + size]) == "42,972,878"
    assert wordpieces.span("something else", first, size, ids[first : first + size]) == "42, 972, 878"
    cut = Tokenizer.from_file(str(tiny_encoder / "tokenizer.json"))
    cut.no_padding()
    cut.encode_special_tokens = True  # as blocks are cut
    ids = cut.encode("it says [SEP] there", add_special_tokens=False).ids
    assert wordpieces.span("it says [SEP] there", 2, len(ids) - 3, ids[2:-1]) == "[SEP]"
    with pytest.raises(DamagedError, match="here is no tokenizer.json"):
        Wordpieces(b"{}", "here")
