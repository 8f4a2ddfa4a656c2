"""Open-QA fine-tuning (Guu et al. 2020, section 3.4): the query encoder and a span reader learn from questions.

The document side is frozen: the blocks' vectors are those that the database holds, and its index is asked as it is with
the live query vectors. So a fine-tuned model answers from any database of the same encoder, whatever its text.
"""

import json
import time
from typing import Any, Final

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from retrodb.chunking import refuse_other_tokenizer
from retrodb.database import Database
from retrodb.encoding import EncoderFiles, resolve_encoder
from retrodb.errors import InputError, MismatchError
from retrodb.evaluation.questions import QuestionSet
from retrodb.learning.interrupt import Interruptions
from retrodb.learning.open_qa_batches import Asked, TrainingQuestions, Wordpieces, check_answerable, order_of, retrieve
from retrodb.learning.optimiser import as_queries, gradient_norm, load_state, refuse_divergence, state_tensors
from retrodb.learning.realm import load_realm, realm_tokenizer
from retrodb.learning.run import LOG, Progress
from retrodb.learning.schedule import learning_rate
from retrodb.learning.settings import LARGEST_BATCH, from_flags
from retrodb.lock import TRAIN, writer_lock
from retrodb.model.checkpoint import (
    STATE,
    WEIGHTS,
    check_free,
    check_weights,
    files_json,
    forget_other_steps,
    load_weights,
    parse_files,
    read_document,
    read_file,
    read_tensors,
    tensor_bytes,
    well_formed,
    write_step,
)
from retrodb.model.realm import RealmConfig
from retrodb.model.realm.bert import bert_card, load_bert, special_tokens, tokenizer_fingerprint
from retrodb.model.realm.open_qa import OpenQa, OpenQaConfig
from retrodb.model.realm.query import QueryEncoder
from retrodb.model.realm.span_reader import matches
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.versions import facts_of

CHECKPOINT: Final = "open-qa.json"
TOKENIZER: Final = "tokenizer.json"
_FORMAT: Final = "retrodb-open-qa"
_PROGRAM: Final = "retrodb finetune-qa"


class OpenQaSettings(BaseModel):
    """How a model is fine-tuned. Rate and blocks are the paper's (section 4.3 and the released code: 1e-5, five)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: str | None = None
    """A checkpoint of `retrodb realm`, or a BERT, that the reader begins as; None: the database's encoder."""
    answers: str | None = None
    """Which kind of answers to learn, where questions have several (``answers 2016``)."""
    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=4, ge=1, le=LARGEST_BATCH)
    blocks: int = Field(default=5, ge=1, le=LARGEST_BATCH)
    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    warmup: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    save_every: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    log_every: int = Field(default=10, ge=1)

    @staticmethod
    def make(given: dict[str, Any]) -> "OpenQaSettings":
        """Raises UsageError: a setting is out of range."""
        return from_flags(OpenQaSettings, given)

    @property
    def identity(self) -> dict[str, Any]:
        """All that the weights depend on."""
        return self.model_dump(mode="json", exclude={"log_every", "save_every"})


class OpenQaTrainer:
    """Fine-tuning into a folder.

    Args:
        db: of blocks with inner products. Nothing of it is written.
        questions: with answers, as `retrodb evaluate-retrieval` reads them.
        out: the checkpoint's folder.
        settings: of the run.
        progress: is told how it gets on.
        encoder: where the database's encoder is now, if not where it was.

    Raises:
        InputError: the database is none of blocks, a part does not start from a BERT, or the questions are malformed
            or without answers; or ``out`` holds other things than a checkpoint.
        MismatchError: ``out`` holds another run; or the reader's start has another tokenizer than the blocks.
        DamagedError: a file of the checkpoint is not what was saved.
    """

    def __init__(
        self,
        db: Database,
        questions: QuestionSet,
        out: str,
        settings: OpenQaSettings,
        progress: Progress,
        encoder: str | None = None,
    ) -> None:
        self.db, self.settings, self.progress = db, settings, progress
        self.storage = Storage(out)
        db.storage.refuse_inside(self.storage.url)
        files = db.encoder_files(encoder)
        self._tokenizer = (files.transformer / TOKENIZER).read_bytes()
        self.wordpieces = Wordpieces(self._tokenizer, str(files.transformer / TOKENIZER))
        self.model = self._start(files)
        check_answerable(db, self.model)
        self.training = TrainingQuestions.read(questions, self.wordpieces, settings.answers)
        self._optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self._saved: int | None = None
        """The step of the checkpoint that there is."""
        self._of = {**settings.identity, "questions": self.training.sha256, "database": facts_of(db.manifest)}
        self._go_on()

    def _start(self, files: EncoderFiles) -> OpenQa:
        """The reader from its start; the query side is the database's own encoder, whatever the start is."""
        start = self.settings.start
        query = QueryEncoder.start(files, self.db.encoder_identity)
        if start is not None and (tokenizer := realm_tokenizer(start)) is not None:
            self._refuse_other_tokenizer(tokenizer)
            realm = load_realm(start)
            own = realm.retriever.projection.weight
            theirs = query.state_dict().get("projection.weight")
            if theirs is None or not torch.equal(own, theirs):
                self.progress.note(
                    f"{self.db.storage.url} was not embedded by the retriever of {start}: the query encoder starts "
                    f"from the database's own. To use that retriever, publish its last export by retrodb refresh."
                )
            return self._joined(query, realm.reader.bert, realm.config)
        own_start = files if start is None else resolve_encoder(start)
        if own_start is not files:
            self._refuse_other_tokenizer(tokenizer_fingerprint(own_start))
        dimension = self.db.encoder_identity.dimension
        special = special_tokens(own_start)
        config = RealmConfig(bert=bert_card(own_start), dimension=dimension, pooling="cls", **special)
        return self._joined(query, load_bert(own_start), config)

    def _refuse_other_tokenizer(self, found: str) -> None:
        refuse_other_tokenizer(
            self.db.manifest.fingerprints["tokenizer"],
            found,
            f"--start {self.settings.start!r}",
            "The reader could not read them: start it from a model of that tokenizer.",
        )

    def _joined(self, query: QueryEncoder, bert: torch.nn.Module, reader: RealmConfig) -> OpenQa:
        told = (reader.cls, reader.sep, int(reader.bert["vocab_size"]))
        own = (query.config.cls, query.config.sep, int(query.config.bert["vocab_size"]))
        if told != own:
            raise MismatchError(
                f"--start {self.settings.start}: its vocabulary of {told[2]:,} wordpieces is not the database's "
                f"({own[2]:,}): the reader could not read its blocks."
            )
        return OpenQa.start(query, bert, reader, self.settings.seed)

    def train(self) -> int:
        """All steps that are left; the number of steps taken in all.

        Raises:
            KeyboardInterrupt: after a checkpoint was written.
            WorkerError: the loss, a gradient or a query vector is not finite.
            LockedError: another run trains into the folder.
        """
        self.storage.make_root()
        if self.training.left_out:
            self.progress.note(
                f"{count_of(self.training.left_out, 'question has', 'questions have')} no answer of 1 to 10 "
                "wordpieces: left out"
            )
        with writer_lock(self.storage, TRAIN), Interruptions() as interruptions:
            self._go_on()
            self.progress.begin("finetune", self.settings.steps, self.step, "steps")
            while self.step < self.settings.steps:
                self.take_step()
                self.progress.advance(self.step)
                finished = self.step == self.settings.steps
                if self.step % self.settings.save_every == 0 or finished or interruptions.asked:
                    self._save()
                if interruptions.asked and not finished:
                    raise KeyboardInterrupt
            self.progress.end(f"{count_of(self.step, 'step')}, {self._came_to}")
        return self.step

    @property
    def _came_to(self) -> str:
        """The last loss there was: a step whose questions have no answer in reach has none, and says 0."""
        if not self._optimiser.state:  # it never made a step
            return (
                f"nothing was learnt: no answer stood in the {count_of(self.settings.blocks, 'block')} of its question"
            )
        last = next((entry["loss"] for entry in reversed(self.log) if entry["answer_in_blocks"]), None)
        return "loss unknown: no logged step had an answer in reach" if last is None else f"loss {last:.3f}"

    def _next(self) -> list[int]:
        """The questions of this step: passes over all of them, each in an order of its own; the step says which."""
        count, batch = len(self.training.questions), self.settings.batch
        places = range(self.step * batch, (self.step + 1) * batch)
        return [int(order_of(count, self.settings.seed, at // count)[at % count]) for at in places]

    def take_step(self) -> None:
        """One step of the optimiser.

        Raises:
            WorkerError: the loss, a gradient or a query vector is not finite.
        """
        settings, begun = self.settings, time.monotonic()
        rows, what = self._next(), f"step {self.step + 1}"
        rate = learning_rate(
            self.step,
            steps=settings.steps,
            warmup=min(settings.warmup, settings.steps // 10),
            peak=settings.learning_rate,
            final_share=0.1,
        )
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        asked = Asked.of(
            [self.training.questions[row] for row in rows], self.wordpieces, self.model.query.config.prompt
        )
        vectors = self.model.query(asked.prompted)
        _, found = retrieve(self.db, as_queries(what, vectors, settings.learning_rate), settings.blocks)
        wanted = [self.training.answers[row] for row in rows for _ in range(settings.blocks)]
        self._optimiser.zero_grad(set_to_none=True)
        nats, answered = self.model.nats(vectors, asked.plain, found, matches(found.bodies, wanted))
        loss = nats.sum() / max(1, int(answered.sum()))
        loss.backward()
        norms = {"query": gradient_norm(self.model.query), "reader": gradient_norm(self.model.reader)}
        refuse_divergence(what, float(loss.detach()), norms, settings.learning_rate)
        if answered.any():  # without an answer in reach there is nothing to learn, and no reason to decay
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
            self._optimiser.step()
        self.step += 1
        if self.step % settings.log_every == 0 or self.step == settings.steps:
            self.log.append(
                {
                    "step": self.step,
                    "loss": float(loss.detach()),
                    "answer_in_blocks": float(answered.float().mean()),
                    "learning_rate": rate,
                    "gradient_norm": norms,
                    "seconds": round(time.monotonic() - begun, 4),
                }
            )

    # -- what outlives a process ---------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Weights and optimiser into a folder of their step, then the file that names it."""
        if self._saved == self.step:
            return
        contents = {
            WEIGHTS: tensor_bytes(dict(self.model.state_dict())),
            STATE: tensor_bytes(state_tensors(self.model, self._optimiser)),
            TOKENIZER: self._tokenizer,
            LOG: b"".join(json.dumps(entry).encode() + b"\n" for entry in self.log),
        }
        told = {
            "format": _FORMAT,
            "run": self._of,
            "model": self.model.config.model_dump(mode="json"),
            "files": files_json(write_step(self.storage, self.step, contents)),
            "step": self.step,
        }
        self.storage.commit_json(CHECKPOINT, told)
        forget_other_steps(self.storage, self.step)
        self._saved = self.step

    def _go_on(self) -> None:
        """Take over the checkpoint that there is, unless it is what this process has.

        Asked twice: so that what does not fit is refused before anything is computed, and again once the lock is ours,
        for until then another process may have gone on with this run, or ended it.

        Raises:
            InputError, MismatchError, DamagedError: as `OpenQaTrainer` does.
        """
        found = read_document(self.storage, CHECKPOINT, _FORMAT, _PROGRAM)
        if found is None:
            check_free(self.storage, CHECKPOINT)
        elif self._saved is None or found.get("step") != self._saved:
            self._take_over(found)

    def _take_over(self, found: dict[str, Any]) -> None:
        own = self._of
        with well_formed(self.storage, CHECKPOINT):
            differs = sorted(key for key in own if found["run"].get(key) != own[key])
        if differs:
            raise MismatchError(
                f"{self.storage.url} holds another run: its {differs[0].replace('_', '-')} is "
                f"{found['run'].get(differs[0])!r}, now it is {own[differs[0]]!r}. Name another --out."
            )
        with well_formed(self.storage, CHECKPOINT):
            files = parse_files(found["files"])
            load_weights(self.model, read_tensors(self.storage, files, WEIGHTS), self.storage.url)
            load_state(self.model, self._optimiser, read_tensors(self.storage, files, STATE))
            self.log = [json.loads(line) for line in read_file(self.storage, files, LOG).splitlines()]
            self.step = self._saved = int(found["step"])
            if not 0 <= self.step <= self.settings.steps:
                raise ValueError(f"step {self.step} of {self.settings.steps}")
        self.progress.note(f"going on from step {self.step:,} of {self.storage.url}")


class FineTuned:
    """A fine-tuned model, ready to answer.

    Attributes:
        model: query encoder and reader.
        wordpieces: what it reads with.
        blocks: of a question, as in training.
        encoder: fingerprint of the encoder whose vectors it asks.

    Raises:
        InputError: there is none.
        DamagedError: a file of it is missing, or is not what was saved.
    """

    def __init__(self, url: str) -> None:
        storage = Storage(url)
        found = read_document(storage, CHECKPOINT, _FORMAT, _PROGRAM)
        if found is None:
            raise InputError(f"{storage.url} is no checkpoint of retrodb finetune-qa: it has no {CHECKPOINT}.")
        with well_formed(storage, CHECKPOINT):
            files = parse_files(found["files"])
            config, weights = OpenQaConfig(**found["model"]), read_tensors(storage, files, WEIGHTS)
            with torch.device("meta"):  # sizes that are not those of the weights must not take the memory they ask for
                check_weights(OpenQa.blank(config), weights, storage.url)
            self.model = OpenQa.blank(config)
            load_weights(self.model, weights, storage.url)
            self.wordpieces = Wordpieces(read_file(storage, files, TOKENIZER), storage.url)
            self.blocks = int(found["run"]["blocks"])
            self.encoder = str(found["run"]["database"]["encoder"])
            self.step = int(found["step"])
        self.url = storage.url

    def check_database(self, db: Database) -> None:
        """Refuse a database that this model cannot ask.

        Raises:
            MismatchError: its vectors are another encoder's.
            InputError: as `check_answerable`.
        """
        own = db.encoder_identity
        if own.fingerprint != self.encoder:
            raise MismatchError(
                f"{db.storage.url} was embedded by {own.name!r} (fingerprint {own.fingerprint[:16]}); {self.url} was "
                f"fine-tuned on the vectors of another encoder ({self.encoder[:16]}). Embed it with that one: retrodb "
                "refresh."
            )
        check_answerable(db, self.model)

    def vectors(self, asked: Asked) -> np.ndarray:
        """float32 [n, d]: what the database is asked with."""
        with torch.no_grad():
            found: np.ndarray = self.model.query(asked.prompted).float().numpy()
        return found
