"""The reference REALM pre-training (Guu et al. 2020): a database that is refreshed while its retriever learns.

The trainer and the refresher (``retrodb refresh DB --watch EXPORTS``) are two processes that share the database and the
folder of exports; either may die and start again. Each step takes masked queries, asks the newest published version for
candidates by the *live* query vectors, re-scores all of them with live weights, the null document included, and
marginalises.

Logged besides the loss, since the paper's reviewers missed it: the retriever's gradient norm, retrieval utility, and
how often a candidate holds the answer.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import regex
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer

from retrodb.chunking import refuse_other_tokenizer
from retrodb.database import Database
from retrodb.encoding import resolve_encoder
from retrodb.errors import InputError, MismatchError
from retrodb.learning.following import FollowedDatabase
from retrodb.learning.interrupt import Interruptions
from retrodb.learning.optimiser import as_queries, gradient_norm, load_state, refuse_divergence, state_tensors
from retrodb.learning.realm_batches import check_blocks, cloze_batches, holds_answer, masked_batch, texts_of, trimmed
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
from retrodb.model.config import LARGEST_WIDTH
from retrodb.model.realm import Realm, RealmConfig
from retrodb.model.realm.bert import tokenizer_fingerprint
from retrodb.model.realm.cloze import cloze_accuracy, cloze_loss
from retrodb.refreshing import DONE_MARKER, StalenessLimit
from retrodb.remote import absolute_url
from retrodb.sizes import count_of
from retrodb.spans.reader import QueryBatch
from retrodb.storage import Storage

CHECKPOINT: Final = "realm.json"
_FORMAT: Final = "retrodb-realm"
_PROGRAM: Final = "retrodb realm"
_SENTENCE_END: Final = regex.compile(r"\p{Sentence_Terminal}")


class RealmSettings(BaseModel):
    """How a REALM model is pre-trained. Defaults are for a small corpus on a CPU (the paper: 200,000 steps of 512)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: str = "all-MiniLM-L6-v2"
    dimension: int = Field(default=128, ge=1, le=LARGEST_WIDTH)
    steps: int = Field(default=1000, ge=1)
    cloze_steps: int = Field(default=200, ge=0)
    cloze_batch: int = Field(default=16, ge=2, le=LARGEST_BATCH)
    """Blocks of a step of the warm start: a query's own among so many. Smaller ones teach worse than they cost."""
    batch: int = Field(default=8, ge=1, le=LARGEST_BATCH)
    candidates: int = Field(default=8, ge=2, le=LARGEST_BATCH)
    exclude: Literal["self", "document", "neardup"] = "self"
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    warmup: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    export_every: int = Field(default=100, ge=1)
    max_staleness: int | None = Field(default=None, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**31)
    log_every: int = Field(default=10, ge=1)
    train_retriever: bool = True
    """Whether the retriever learns after its warm start; without, the reader alone does (an ablation)."""
    train_reader: bool = True
    """Likewise the reader: without, the retriever learns from a reader that stays as it was begun."""

    @model_validator(mode="after")
    def _consistent(self) -> "RealmSettings":
        if not (self.train_retriever or self.train_reader):
            raise ValueError("neither the retriever nor the reader trains: nothing is left to learn")
        if not self.train_retriever and self.max_staleness is not None:
            raise ValueError("a retriever that does not learn is never stale: leave --max-staleness out")
        reached = min(self.export_every, self.steps) - 1
        if self.max_staleness is not None and self.max_staleness < reached:
            raise ValueError(
                f"--max-staleness {self.max_staleness} with --export-every {self.export_every}: the last step before "
                f"an export is {reached} steps from the one before, so that the trainer would wait for ever for what "
                f"it has not exported. Give --max-staleness {reached} or more, or a smaller --export-every"
            )
        return self

    @staticmethod
    def make(given: dict[str, Any]) -> "RealmSettings":
        """Raises UsageError: a setting is out of range."""
        return from_flags(RealmSettings, given)


@dataclass
class _Run:
    """What a run has done: steps, passes over the queries, batches of this pass, entries of the log."""

    step: int = 0
    epoch: int = 0
    batches: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)


class RealmTrainer:
    """Pre-training into a folder, beside a refresher.

    Args:
        database: URL of a database of blocks with inner products and masked queries (``retrodb spans``).
        out: the checkpoint's folder.
        exports: the folder that the refresher watches.
        settings: of the run.
        progress: is told how it gets on.

    Raises:
        InputError: the database is none of blocks, or has no masked queries; the start is no BERT, or reads too few
            tokens for a query beside a block; the exports' folder is a file or a URL, lies in the database, or is
            ``out``; or ``out`` holds other things than a checkpoint.
        MismatchError: ``out`` or ``exports`` holds another run; the database does not compare by inner products; or the
            start has another tokenizer than the blocks.
    """

    def __init__(self, database: str, out: str, exports: str, settings: RealmSettings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.storage = Storage(out)
        self._encoder = resolve_encoder(settings.start)
        self._followed = FollowedDatabase(database, exports, StalenessLimit(settings.max_staleness), progress)
        self.exports = self._followed.exports
        first = self._followed.database
        first.storage.refuse_inside(self.storage.url)
        first.storage.refuse_inside(exports, "exports")
        if absolute_url(exports) == self.storage.url:
            raise InputError(f"--exports and --out are both {self.storage.url}: either has folders of steps. Name two.")
        next(iter(first.queries(batch=1)), None)  # refuses a database without masked queries
        first.candidates(np.zeros((0, first.encoder_identity.dimension), np.float32))  # and one of chunks
        self._tokenizer = tokenizer_fingerprint(self._encoder)
        refuse_other_tokenizer(
            first.manifest.fingerprints["tokenizer"],
            self._tokenizer,
            f"--start {settings.start!r}",
            f"Start from a BERT of that tokenizer, or build another database with --encoder {settings.start}.",
        )
        self.run = _Run()
        self._queries: Iterator[QueryBatch] | None = None
        self.model = Realm.start(settings.start, settings.dimension, settings.seed)
        check_blocks(first, self.model.reader.bert)
        self._optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._saved: int | None = None
        """The step of the checkpoint that there is."""
        self._go_on()

    # -- the run -------------------------------------------------------------------------------------------------------

    def train(self) -> _Run:
        """All steps that are left. Ends with the `DONE_MARKER`, so that the refresher ends too.

        Raises:
            KeyboardInterrupt: after a checkpoint was written.
            WorkerError: the loss, a gradient or a query vector is not finite.
            LockedError: another run trains into the folder.
        """
        self.storage.make_root()
        with writer_lock(self.storage, TRAIN), Interruptions() as interruptions:
            self._go_on()
            if self._saved is None:
                self._warm_up(interruptions)
                self._save()
            if self.run.step < self.settings.steps:
                (self.exports / DONE_MARKER).unlink(missing_ok=True)  # it would end the refresher before the run
            self._export()  # each checkpoint has one: where it was killed between the two, it had not come to it
            self.progress.begin("train", self.settings.steps, self.run.step, "steps")
            while self.run.step < self.settings.steps:
                if (db := self._followed.newest(self.run.step, interruptions)) is not None:
                    self._step(db)
                    self.progress.advance(self.run.step)
                finished = self.run.step == self.settings.steps
                if self.run.step % self.settings.export_every == 0 or finished or interruptions.asked:
                    self._save()
                    self._export()
                if interruptions.asked and not finished:
                    raise KeyboardInterrupt
            (self.exports / DONE_MARKER).touch()
            self.progress.end(count_of(self.run.step, "step"))
        return self.run

    def _warm_up(self, interruptions: Interruptions) -> None:
        """The Inverse Cloze Task: a retriever that knows nothing gets no gradient worth having (section 3.4)."""
        settings = self.settings
        ends = sentence_ends(str(self._encoder.transformer / "tokenizer.json"))
        batches = cloze_batches(self._followed.database, settings.cloze_batch, settings.seed, ends)
        self.progress.begin("cloze", settings.cloze_steps, 0, "steps")
        accuracy = 0.0
        for step in range(settings.cloze_steps):
            queries, titles, bodies = next(batches)
            self._set_rate(step, settings.cloze_steps)
            self._optimiser.zero_grad(set_to_none=True)
            asked, blocks = self.model.retriever.queries(queries), self.model.retriever.blocks(titles, bodies)
            loss = cloze_loss(asked, blocks)
            loss.backward()
            norms = {"retriever": gradient_norm(self.model.retriever)}
            refuse_divergence(f"warm start, step {step + 1}", float(loss.detach()), norms, settings.learning_rate)
            torch.nn.utils.clip_grad_norm_(self.model.retriever.parameters(), settings.clip)
            self._optimiser.step()
            found = cloze_accuracy(asked.detach(), blocks.detach())
            accuracy = found if step == 0 else 0.9 * accuracy + 0.1 * found
            self.progress.advance(step + 1)
            if interruptions.asked:
                raise KeyboardInterrupt  # a warm start of minutes is begun anew
        self.progress.end(
            f"{count_of(settings.cloze_steps, 'step')}, the own block first in {accuracy:.0%} of the last"
        )
        self._optimiser.state.clear()

    def _step(self, db: Database) -> None:
        settings, model = self.settings, self.model
        begun = time.monotonic()
        queries = self._next_queries(db)
        rate, what = self._set_rate(self.run.step, settings.steps), f"step {self.run.step + 1}"
        with torch.no_grad():
            vectors = model.retriever.queries(trimmed(texts_of(queries.tokens, queries.n_tokens)))
        found = db.candidates(
            as_queries(what, vectors, settings.learning_rate),
            settings.candidates,
            own_chunks=queries.chunk_ids,
            own_documents=queries.document_ids,
            exclude=settings.exclude,
            tokens=True,
        )
        self._optimiser.zero_grad(set_to_none=True)
        marginal = model(masked_batch(queries, found))
        loss = marginal.nats.mean()
        loss.backward()
        parts = {"retriever": model.retriever, "reader": model.reader}
        for name, trains in (("retriever", settings.train_retriever), ("reader", settings.train_reader)):
            if not trains:
                for parameter in parts[name].parameters():
                    parameter.grad = None
        norms = {name: gradient_norm(part) for name, part in parts.items()}
        refuse_divergence(what, float(loss.detach()), norms, settings.learning_rate)
        for part in parts.values():  # each by itself: a reader that begins has a gradient some 10,000 times as large
            torch.nn.utils.clip_grad_norm_(part.parameters(), settings.clip)
        self._optimiser.step()
        self.run.step += 1
        if self.run.step % settings.log_every == 0 or self.run.step == settings.steps:
            holds = holds_answer(queries, found)[:, 1:]
            utility = marginal.utility[:, 1:]
            there = ~utility.isnan()
            best = utility.masked_fill(~there, -math.inf).max(-1).values[there.any(-1)]
            entry = {
                "step": self.run.step,
                "version": db.version,
                "staleness": self._followed.staleness(self.run.step).as_json(),
                "loss": float(loss.detach()),
                "learning_rate": rate,
                "gradient_norm": norms,
                "null_prior": float(marginal.prior[:, 0].mean()),
                "utility": _mean(utility[there]),
                "best_utility": _mean(best),
                "answer_in_candidates": float(holds.any(-1).mean()),
                "candidates": float(found.n_valid.mean()),
                "seconds": round(time.monotonic() - begun, 4),
            }
            self.run.log.append(entry)

    def _next_queries(self, db: Database) -> QueryBatch:
        """The next batch of this pass; the place is counted, so that a resumed run takes the very next one.

        A pass is over the queries of the version that it began with: their text does not change with the encoder.
        """
        while True:
            if self._queries is None:
                # Mixed, not added: else a seed's second pass would be the next seed's first.
                mixed = np.random.SeedSequence([self.settings.seed, self.run.epoch]).generate_state(1)
                self._queries = db.queries(batch=self.settings.batch, shuffle=int(mixed[0]))
                for _ in range(self.run.batches):
                    next(self._queries, None)
            batch = next(self._queries, None)
            if batch is not None:
                self.run.batches += 1
                return batch
            if self.run.batches == 0:
                raise InputError(f"{db.storage.url} has no masked queries: the taggers found no span.")
            self._queries = None
            self.run.epoch, self.run.batches = self.run.epoch + 1, 0

    def _set_rate(self, step: int, steps: int) -> float:
        warmup = min(self.settings.warmup, steps // 10)
        rate = learning_rate(step, steps=steps, warmup=warmup, peak=self.settings.learning_rate, final_share=0.1)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        return rate

    # -- what outlives a process ---------------------------------------------------------------------------------------

    def _export(self) -> None:
        """Give the refresher the retriever as it is. An export that is there already stays."""
        folder = self.exports / f"step-{self.run.step:06d}"
        self.exports.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            self.model.export(folder, self._encoder)

    def _save(self) -> None:
        """Weights and optimiser into a folder of their step, then the file that names it."""
        if self._saved == self.run.step:
            return
        contents = {
            WEIGHTS: tensor_bytes(dict(self.model.state_dict())),
            STATE: tensor_bytes(state_tensors(self.model, self._optimiser)),
            LOG: b"".join(json.dumps(entry).encode() + b"\n" for entry in self.run.log),
        }
        told = {
            "format": _FORMAT,
            "settings": self.settings.model_dump(mode="json"),
            "model": self.model.config.model_dump(mode="json"),
            "tokenizer": self._tokenizer,
            "files": files_json(write_step(self.storage, self.run.step, contents)),
            "step": self.run.step,
            "epoch": self.run.epoch,
            "batches": self.run.batches,
        }
        self.storage.commit_json(CHECKPOINT, told)
        forget_other_steps(self.storage, self.run.step)
        self._saved = self.run.step

    def _go_on(self) -> None:
        """Take over the checkpoint that there is, unless it is what this process has.

        Asked twice: so that what does not fit is refused before anything is computed, and again once the lock is ours,
        for until then another process may have gone on with this run, or ended it.

        Raises:
            InputError, MismatchError, DamagedError: as `RealmTrainer` does.
        """
        found = read_document(self.storage, CHECKPOINT, _FORMAT, _PROGRAM)
        if found is None:
            check_free(self.storage, CHECKPOINT)
        elif self._saved is None or found.get("step") != self._saved:
            self._take_over(found)
        self._followed.refuse_exports_of_others(self._saved, self.model)

    def _take_over(self, found: dict[str, Any]) -> None:
        own = self.settings.model_dump(mode="json")
        with well_formed(self.storage, CHECKPOINT):
            differs = sorted(key for key in own if found["settings"].get(key) != own[key] and key != "log_every")
        if differs:
            raise MismatchError(
                f"{self.storage.url} holds another run: its {differs[0].replace('_', '-')} is "
                f"{found['settings'].get(differs[0])!r}, now it is {own[differs[0]]!r}. Name another --out."
            )
        with well_formed(self.storage, CHECKPOINT):
            files = parse_files(found["files"])
            load_weights(self.model, read_tensors(self.storage, files, WEIGHTS), self.storage.url)
            load_state(self.model, self._optimiser, read_tensors(self.storage, files, STATE))
            log = [json.loads(line) for line in read_file(self.storage, files, LOG).splitlines()]
            self.run = _Run(int(found["step"]), int(found["epoch"]), int(found["batches"]), log)
            if not 0 <= self.run.step <= self.settings.steps or min(self.run.epoch, self.run.batches) < 0:
                raise ValueError(f"step {self.run.step} of {self.settings.steps}, batch {self.run.batches}")
        self._saved = self.run.step
        self.progress.note(f"going on from step {self.run.step:,} of {self.storage.url}")


def _mean(values: torch.Tensor) -> float | None:
    """None of nothing: JSON has no NaN."""
    return float(values.mean()) if len(values) else None


def realm_tokenizer(url: str) -> str | None:
    """The fingerprint of the tokenizer that a checkpoint's model reads; None where there is no checkpoint.

    Raises:
        InputError: it is another program's.
        DamagedError: it does not say.
    """
    storage = Storage(url)
    found = read_document(storage, CHECKPOINT, _FORMAT, _PROGRAM)
    if found is None:
        return None
    with well_formed(storage, CHECKPOINT):
        return str(found["tokenizer"])


def load_realm(url: str) -> Realm:
    """The model of a checkpoint, ready to evaluate.

    Raises:
        InputError: there is none.
        DamagedError: a file of it is missing, or is not what was saved.
    """
    storage = Storage(url)
    found = read_document(storage, CHECKPOINT, _FORMAT, _PROGRAM)
    if found is None:
        raise InputError(f"{storage.url} is no checkpoint of retrodb realm: it has no {CHECKPOINT}.")
    with well_formed(storage, CHECKPOINT):
        config, weights = RealmConfig(**found["model"]), read_tensors(storage, parse_files(found["files"]), WEIGHTS)
        with torch.device("meta"):  # sizes that are not those of the weights must not take the memory they ask for
            check_weights(Realm.blank(config), weights, storage.url)
        model = Realm.blank(config)
        load_weights(model, weights, storage.url)
    return model.eval()


def sentence_ends(tokenizer_json: str) -> tuple[int, ...]:
    """The ids of a tokenizer's marks that end a sentence, of any script, ascending."""
    vocabulary = Tokenizer.from_file(tokenizer_json).get_vocab()
    return tuple(sorted(number for token, number in vocabulary.items() if _SENTENCE_END.fullmatch(token)))
