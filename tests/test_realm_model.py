"""The reference REALM model: what its parts compute, against sums written out and against transformers."""

import copy
import gc
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from retrodb.encoding import DEFAULT_ENCODER, resolve_encoder
from retrodb.encoding.encoder import Encoder, load_cached, try_out
from retrodb.errors import InputError
from retrodb.model.realm import Realm, Texts, marginalise, pack
from retrodb.model.realm.cloze import cloze_accuracy, cloze_loss
from retrodb.model.realm.realm import MaskedQueries
from retrodb.model.realm.span_reader import LONGEST_ANSWER, SpanReader, answer_nats, matches


@pytest.fixture(scope="module")
def realm(tiny_encoder: Path) -> Realm:
    return Realm.start(str(tiny_encoder), dimension=16, seed=3).eval()


def texts(*lengths: int, seed: int = 0) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    return Texts.of([torch.randint(1000, 5000, (length,), generator=generator).tolist() for length in lengths])


def masked(realm: Realm, slots: int = 3, seed: int = 0) -> MaskedQueries:
    """Two queries, one with two masked tokens, and their candidates: the null document and others of any length."""
    queries = texts(9, 6, seed=seed)
    positions = torch.tensor([[2, 3], [5, 0]])
    wanted = torch.tensor([[True, True], [True, False]])
    ids = queries.ids.clone()
    targets = ids.gather(1, positions)
    rows, columns = wanted.nonzero(as_tuple=True)
    ids[rows, positions[rows, columns]] = realm.config.mask
    titles = texts(*([0, 2, 3] * 2)[: 2 * slots], seed=seed + 1)
    bodies = texts(*([0, 12, 7] * 2)[: 2 * slots], seed=seed + 2)
    return MaskedQueries(
        Texts(ids, queries.lengths), positions, targets, wanted, titles, bodies, torch.ones(2, slots, dtype=torch.bool)
    )


def test_a_retriever_starts_with_what_its_encoder_knows() -> None:
    """all-MiniLM-L6-v2 takes the mean of all positions; its projection onto as many dimensions keeps every angle."""
    files = resolve_encoder(DEFAULT_ENCODER)
    sentences = ["how are names bound", "the scope of a variable", "a recipe for bread", "names and bindings"]
    tokenizer = Tokenizer.from_file(str(files.transformer / "tokenizer.json"))
    tokenizer.no_padding()
    realm = Realm.start(DEFAULT_ENCODER, dimension=384)
    assert realm.config.pooling == "mean"
    with torch.no_grad():
        found = realm.retriever.queries(
            Texts.of([tokenizer.encode(text, add_special_tokens=False).ids for text in sentences])
        )
    expected = Encoder.load(files).embed(sentences).astype(np.float32)
    angles = torch.nn.functional.normalize(found, dim=1)
    np.testing.assert_allclose((angles @ angles.T).numpy(), expected @ expected.T, atol=5e-3)
    assert Realm.start(DEFAULT_ENCODER, dimension=16).retriever.projection.weight.shape == (16, 384)


# -- what a BERT reads -------------------------------------------------------------------------------------------------


def test_two_texts_are_put_together_as_the_encoders_own_tokenizer_does(tiny_encoder: Path, realm: Realm) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_encoder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    pairs = [("a title", "some body of text"), ("", "no title"), ("only", ""), ("", "")]
    first = Texts.of([tokenizer.encode(a, add_special_tokens=False).ids for a, _ in pairs])
    second = Texts.of([tokenizer.encode(b, add_special_tokens=False).ids for _, b in pairs])
    packed = pack(first, second, realm.config.cls, realm.config.sep)
    for row, (a, b) in enumerate(pairs):
        expected = tokenizer.encode(a, b)
        size = int(packed.mask[row].sum())
        assert packed.ids[row, :size].tolist() == expected.ids
        assert packed.types[row, :size].tolist() == expected.type_ids
        assert (
            packed.ids[row, int(packed.second[row]) :][: int(second.lengths[row])].tolist()
            == expected.ids[len(first.ids[row][: int(first.lengths[row])]) + 2 : -1]
        )
        single = pack(Texts.of([expected.ids]), None, 1, 2)
        assert single.ids[0].tolist() == [1, *expected.ids, 2]


def test_padding_changes_nothing(realm: Realm) -> None:
    with torch.no_grad():
        together = realm.retriever.queries(texts(4, 30, 11))
        for row, length in enumerate((4, 30, 11)):
            rows = texts(4, 30, 11)
            alone = Texts(rows.ids[row : row + 1, :length], rows.lengths[row : row + 1])
            torch.testing.assert_close(realm.retriever.queries(alone)[0], together[row], atol=1e-5, rtol=1e-4)


# -- the objective -----------------------------------------------------------------------------------------------------


def test_the_marginal_is_the_sum_over_the_candidates_written_out() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, likelihood = (torch.randn(5, 4, generator=generator) * 3 for _ in range(2))
    valid = torch.rand(5, 4, generator=generator) > 0.3
    found = marginalise(scores, likelihood, valid)
    for row in range(5):
        slots = [slot for slot in range(4) if slot == 0 or valid[row, slot]]
        weights = torch.stack([scores[row, slot] for slot in slots]).double().softmax(0)
        terms = torch.stack([w * likelihood[row, s].double().exp() for w, s in zip(weights, slots, strict=True)])
        assert float(found.nats[row]) == pytest.approx(-float(terms.sum().log()), abs=1e-5)
        posterior = terms / terms.sum()
        for slot in range(4):
            place = slots.index(slot) if slot in slots else None
            assert float(found.prior[row, slot]) == pytest.approx(
                0.0 if place is None else float(weights[place]), abs=1e-6
            )
            assert float(found.posterior[row, slot]) == pytest.approx(
                0.0 if place is None else float(posterior[place]), abs=1e-6
            )


def test_the_gradient_reaches_the_scores_as_prior_minus_posterior_and_a_missing_candidate_has_none() -> None:
    scores = torch.tensor([[0.3, 1.0, -2.0, 9.0]], requires_grad=True)
    likelihood = torch.tensor([[-3.0, -1.0, -9.0, 50.0]], requires_grad=True)
    valid = torch.tensor([[False, True, True, False]])
    found = marginalise(scores, likelihood, valid)
    found.nats.sum().backward()
    assert scores.grad is not None
    assert likelihood.grad is not None
    torch.testing.assert_close(scores.grad, found.prior - found.posterior)
    assert scores.grad[0, 3] == likelihood.grad[0, 3] == 0.0
    assert float(scores.grad[0, 1]) < 0, "the candidate that explains the answer is pulled up"


def test_utility_V2_is_told_by_the_same_forward_pass(realm: Realm) -> None:
    batch = masked(realm)
    with torch.no_grad():
        found = realm(batch)
        for row, slot in itertools.product(range(2), range(3)):
            alone = [
                realm.reader.log_likelihood(
                    Texts(batch.queries.ids[row : row + 1], batch.queries.lengths[row : row + 1]),
                    Texts(batch.bodies.ids[at : at + 1], batch.bodies.lengths[at : at + 1]),
                    batch.positions[row : row + 1],
                    batch.targets[row : row + 1],
                    batch.wanted[row : row + 1],
                )
                for at in (row * 3 + slot, row * 3)
            ]
            assert float(found.utility[row, slot]) == pytest.approx(float(alone[0] - alone[1]), abs=1e-4)
    assert found.utility[:, 0].eq(0).all()


def test_the_reader_is_berts_own_masked_language_model(realm: Realm, tiny_encoder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    card = BertConfig.from_pretrained(tiny_encoder)
    reference = BertForMaskedLM(card).eval()
    reference.bert.load_state_dict(realm.reader.bert.state_dict(), strict=False)
    head = reference.cls.predictions
    head.transform.dense.load_state_dict(realm.reader.transform.state_dict())
    head.transform.LayerNorm.load_state_dict(realm.reader.norm.state_dict())
    head.decoder.weight = reference.bert.embeddings.word_embeddings.weight
    head.decoder.bias = realm.reader.bias
    batch = masked(realm)
    bodies = Texts(batch.bodies.ids[1::3], batch.bodies.lengths[1::3])
    packed = pack(batch.queries, bodies, realm.config.cls, realm.config.sep)
    with torch.no_grad():
        logits = reference(
            input_ids=packed.ids, token_type_ids=packed.types, attention_mask=packed.mask
        ).logits.log_softmax(-1)
        found = realm.reader.log_likelihood(batch.queries, bodies, batch.positions, batch.targets, batch.wanted)
    for row in range(2):
        places = zip(batch.positions[row], batch.targets[row], batch.wanted[row], strict=True)
        expected = sum(float(logits[row, 1 + int(at), int(target)]) for at, target, counts in places if counts)
        assert float(found[row]) == pytest.approx(expected, abs=1e-4)


def test_candidates_have_no_order(realm: Realm) -> None:
    batch = masked(realm)
    turned = torch.tensor([0, 2, 1, 3, 5, 4])
    other = MaskedQueries(
        batch.queries,
        batch.positions,
        batch.targets,
        batch.wanted,
        Texts(batch.titles.ids[turned], batch.titles.lengths[turned]),
        Texts(batch.bodies.ids[turned], batch.bodies.lengths[turned]),
        batch.valid,
    )
    with torch.no_grad():
        torch.testing.assert_close(realm(batch).nats, realm(other).nats, atol=1e-5, rtol=1e-4)


def test_the_gradient_reaches_both_sides_of_the_retriever_and_the_reader(realm: Realm) -> None:
    model = copy.deepcopy(realm).train()
    model(masked(model)).nats.sum().backward()
    for part in (model.retriever.projection, model.retriever.bert, model.reader.bert, model.reader.transform):
        assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in part.parameters())


def test_the_retriever_learns_which_candidate_explains_the_answer(realm: Realm) -> None:
    """With a reader that does not learn, p(z | x) goes to the candidate of the largest likelihood."""
    model = copy.deepcopy(realm)
    batch = masked(model)
    likelihood = torch.tensor([[-5.0, -0.1, -5.0], [-5.0, -5.0, -0.1]])
    optimiser = torch.optim.AdamW(model.retriever.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        found = marginalise(model.scores(batch), likelihood, batch.valid)
        found.nats.sum().backward()
        optimiser.step()
    assert found.prior[0].argmax() == 1
    assert found.prior[1].argmax() == 2
    assert float(found.prior.max(-1).values.min()) > 0.9


# -- the warm start, answers -------------------------------------------------------------------------------------------


def test_the_inverse_cloze_task_is_learnt(realm: Realm) -> None:
    model = copy.deepcopy(realm.retriever)
    queries, titles, bodies = texts(8, 8, 8, 8), texts(2, 2, 2, 2, seed=4), texts(20, 20, 20, 20, seed=5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for _ in range(60):
        optimiser.zero_grad()
        asked, blocks = model.queries(queries), model.blocks(titles, bodies)
        loss = cloze_loss(asked, blocks)
        first = first or float(loss.detach())
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1 < (first or 0)
    assert cloze_accuracy(asked, blocks) == 1.0


def test_spans_that_match_an_answer_are_found_token_for_token() -> None:
    bodies = Texts.of([[7, 8, 9, 8, 9], [8, 9]])
    found = matches(bodies, [[[8, 9], [7]], [[9, 8]]])
    assert found.nonzero().tolist() == [[0, 0, 0], [0, 1, 1], [0, 3, 1]]
    assert not matches(bodies, [[[]], [[8] * (LONGEST_ANSWER + 1)]]).any()


def test_the_answers_likelihood_is_the_sum_over_matching_spans_written_out() -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(2, 3, 4, LONGEST_ANSWER, generator=generator)
    inside = torch.rand(scores.shape, generator=generator) > 0.3
    scores = scores.masked_fill(~inside, -torch.inf).requires_grad_()
    correct = inside & (torch.rand(scores.shape, generator=generator) > 0.8)
    correct[1] = False
    retrieval = torch.randn(2, 3, generator=generator)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    nats, answered = answer_nats(retrieval, scores, correct, valid)
    prior = retrieval[0, :2].softmax(0)
    spans = scores[0].flatten(1).softmax(-1)
    total = sum(prior[c] * spans[c][correct[0, c].flatten()].sum() for c in range(2))
    assert float(nats[0]) == pytest.approx(-float(torch.log(total)), abs=1e-5)
    assert answered.tolist() == [True, False]
    assert float(nats[1]) == 0.0
    nats.sum().backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[1].eq(0).all()


def test_the_span_readers_gradient_is_the_same_bit_for_bit_with_several_threads(realm: Realm) -> None:
    """What resuming a run needs: a sum over the spans of a token must not depend on which thread came first."""
    reader = SpanReader(realm.reader.bert, realm.config)
    questions, bodies = texts(*[20] * 12), texts(*range(31, 79, 4), seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = []
        for _ in range(20):
            reader.zero_grad()
            scores, inside = reader.spans(questions, bodies)
            scores.masked_select(inside).square().mean().backward()
            found.append(torch.cat([p.grad.flatten() for p in reader.parameters() if p.grad is not None]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_the_span_reader_learns_where_the_answer_stands(realm: Realm, tiny_encoder: Path) -> None:
    model = SpanReader(copy.deepcopy(realm.reader.bert), realm.config)
    questions, bodies = texts(5, 5), texts(12, 9, seed=9)
    correct = matches(bodies, [[bodies.ids[0, 3:5].tolist()], [bodies.ids[1, 7:8].tolist()]])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimiser.zero_grad()
        scores, inside = model.spans(questions, bodies)
        assert not (correct & ~inside).any()
        nats, answered = answer_nats(torch.zeros(2, 1), scores[:, None], correct[:, None], torch.ones(2, 1).bool())
        nats.sum().backward()
        optimiser.step()
    assert answered.all()
    assert float(nats.max()) < 0.2
    best = [np.unravel_index(int(row.flatten().argmax()), row.shape) for row in scores.detach()]
    assert best == [(3, 1), (7, 0)]


# -- the encoder that a database takes ---------------------------------------------------------------------------------


def test_an_export_is_an_encoder_that_gives_the_retrievers_own_vectors(
    realm: Realm, tiny_encoder: Path, tmp_path: Path
) -> None:
    realm.export(tmp_path / "step-000010", resolve_encoder(str(tiny_encoder)))
    encoder = Encoder.load(resolve_encoder(str(tmp_path / "step-000010")))
    assert encoder.identity.dimension == 16
    assert not encoder.identity.normalise
    sentences = ["Names refer to objects.", "A block is a piece of program text."]
    tokenizer = Tokenizer.from_file(str(tiny_encoder / "tokenizer.json"))
    rows = Texts.of([tokenizer.encode(sentence, add_special_tokens=False).ids for sentence in sentences])
    with torch.no_grad():
        expected = realm.retriever.queries(rows).numpy()
    np.testing.assert_allclose(encoder.embed(sentences).astype(np.float32), expected, atol=2e-2, rtol=2e-2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


def test_a_start_is_the_encoders_own_weights_and_the_seed_decides_the_rest(tiny_encoder: Path) -> None:
    first, again, other = (Realm.start(str(tiny_encoder), 8, seed) for seed in (1, 1, 2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.retriever.projection.weight, other.retriever.projection.weight)
    assert torch.equal(
        first.retriever.bert.get_input_embeddings().weight, other.reader.bert.get_input_embeddings().weight
    )


def test_what_is_no_bert_is_refused_in_words(tiny_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for path in tiny_encoder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**card, "model_type": "roberta"}), encoding="utf-8")
    with pytest.raises(InputError, match="is a 'roberta': REALM starts from a BERT"):
        Realm.start(str(folder))
    for content in (json.dumps({**card, "num_hidden_layers": "a"}), "[]"):
        (folder / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="has no readable config.json: "):
            Realm.start(str(folder))
    with pytest.raises(InputError):
        Realm.start(str(tmp_path / "missing"))


def test_of_encoders_loaded_one_after_the_other_a_process_holds_one(
    realm: Realm, tiny_encoder: Path, tmp_path: Path
) -> None:
    """A refresher follows a trainer for days; what Python's collector comes to look at late, it must not gather."""
    from sentence_transformers import SentenceTransformer

    def held() -> int:
        return sum(type(found) is SentenceTransformer for found in gc.get_objects())

    for step in range(3):
        realm.export(tmp_path / f"step-{step:06d}", resolve_encoder(str(tiny_encoder)))
    gc.collect()
    before = held()
    gc.disable()
    try:
        for step in range(3):
            files = resolve_encoder(str(tmp_path / f"step-{step:06d}"))
            try_out(files, "fp32", "cpu")
            load_cached(files, "fp32", "cpu").embed(["text"])
            assert held() <= before + 1
            assert load_cached(files, "fp32", "cpu") is load_cached(files, "fp32", "cpu")
    finally:
        gc.enable()
