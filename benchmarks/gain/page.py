"""docs/experiments.md from the figures: what was done, what came of it, nothing that is not in them."""

from collections.abc import Iterable
from typing import Any

from gain.figures import Bucket, Series, bucket, seeds_done
from gain.plan import BASE, FITTED, LARGER, LONGER, MIDDLE, MODELS, OFF, RETRO, SMALLER
from retrodb.evaluation.intervals import Estimate

ALPHAS = ("0.125", "0.25", "0.5", "0.75", "1")
_NAMES = {
    BASE: "base",
    RETRO: "RETRO from scratch",
    FITTED: "RETROfit of the base",
    MIDDLE: "base, as many tokens as base and RETROfit",
    LONGER: "base, as much compute as RETRO",
}

HEADER = """# What a database is worth to a model

`python benchmarks/retro_gain.py --corpora FOLDER` made this part, from figures that it measured and keeps in
`benchmarks/results/retro_gain.json`; `--report-only` makes it from them again. Nothing here is written by hand.

"""

METHOD = """Bits per byte of the validation documents, lower is better ([model.md](model.md) says what is counted).
Brackets are 95% intervals over documents and seeds (a bootstrap over both; differences are paired). A *gain* is how
many bits per byte less. "Gains" and "loses" are said where the whole interval is on one side of zero; else "no
difference".

Five models a seed. **Equal tokens**: RETRO against the base, which took the same steps over the same rows; RETROfit
against a base that saw as many tokens as RETROfit and the base it started from. **Equal compute**: both against a base
trained for as many floating point operations as RETRO (counted by torch over a step); base and RETROfit together cost
the same. The **control** has random chunks of other documents in place of the neighbours. Few seeds say little about
how much seeds differ: a small difference between two models may be theirs, not so one between two conditions of one.
"""


def page(results: dict[str, Any]) -> str:
    """The page. ``results`` may be of an experiment that is under way: seeds that lack a model are left out."""
    experiment = results["experiment"]
    lines = [HEADER + METHOD, "## The experiment", "", *_experiment(results), ""]
    sections = []
    for setting in experiment["settings"]:
        seeds = seeds_done(results["parts"], setting["name"], MODELS)
        if seeds:
            sections.append(_Section(results, setting, seeds))
    if sections:
        lines += ["## What came out", "", *(line for one in sections for line in one.summary()), ""]
    for one in sections:
        lines += one.lines()
    return "\n".join(lines).rstrip() + "\n"


def _experiment(results: dict[str, Any]) -> list[str]:
    e, machine = results["experiment"], results["machine"]
    seeds = ", ".join(str(seed) for seed in sorted({part["seed"] for part in results["parts"]}))
    most = max(part["training"]["tokens"] for part in results["parts"])
    return [
        f"The `{e['name']}` configuration on {machine['cpu']}, one thread, fp32, torch {machine['torch']}. Decoders of"
        f" {e['layers']} layers, width {e['width']}, {e['heads']} heads; byte-level BPE of {e['vocabulary']:,} tokens"
        f" learnt from the training corpus; m = {e['chunk_tokens']}, n = {e['sequence_tokens']}; {e['kept_neighbours']}"
        f" neighbours kept, k' = {e['training_neighbours']} in training; encoder {e['encoder'] or 'all-MiniLM-L6-v2'};"
        f" batches of {e['batch']} rows, highest learning rate {e['learning_rate']:g}; seeds {seeds}. Of each"
        f" validation set {e['rows']} rows, evenly spaced, are predicted.",
        "",
        f"These models are tiny, and have seen at most {most:,} tokens. The paper's smallest has 172 million parameters"
        " and saw 419 billion tokens; on open text it took databases of billions of tokens to gain.",
    ]


class _Section:
    """One setting of the experiment."""

    def __init__(self, results: dict[str, Any], setting: dict[str, Any], seeds: list[int]) -> None:
        self.setting, self.seeds, self.name = setting, seeds, setting["name"]
        self.parts = [p for p in results["parts"] if p["setting"] == self.name and p["seed"] in seeds]
        self.databases, self.costs = results["databases"][self.name], results["costs"][self.name]
        self.k = f"k={results['experiment']['training_neighbours']}"
        self.titles = dict(zip((SMALLER, LARGER), setting["database_names"], strict=True))
        self.whiches = [which for which in (SMALLER, LARGER) if which in self.databases]
        self._buckets = {
            (which, alpha): bucket(self.parts, self.name, which, alpha, seeds)
            for which in self.whiches
            for alpha in ("all", *ALPHAS)
        }

    def bucket(self, which: str, alpha: str = "all") -> Bucket:
        return self._buckets[which, alpha]

    # -- what came out, in a table of words ------------------------------------------------------------------------

    def summary(self) -> list[str]:
        lines = [f"**{self.setting['title']}** ({len(self.seeds)} seeds)", ""]
        lines += ["| " + " | ".join(["", *(f"{self.titles[w]}: {a}" for w in self.whiches for a in _OVER)]) + " |"]
        lines += ["|---" * (1 + 2 * len(self.whiches)) + "|"]
        for title, reference, other in self._questions():
            cells = [_verdict(self.bucket(w, a).gain(reference, other)) for w in self.whiches for a in _OVER.values()]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        return [*lines, ""]

    def _questions(self) -> list[tuple[str, Series, Series]]:
        """(what is asked, the reference, what may gain over it)."""
        found = []
        for model, same_tokens in ((RETRO, BASE), (FITTED, MIDDLE)):
            name, on = _NAMES[model].split()[0], Series(model, self.k)
            found += [
                (f"{name}, at equal tokens", Series(same_tokens), on),
                (f"{name}, at equal compute", Series(LONGER), on),
                (f"{name}, on against off", Series(model), on),
                (f"{name}, real against random neighbours", Series(model, f"{self.k}, random"), on),
                (f"{name}, random neighbours against none", Series(model), Series(model, f"{self.k}, random")),
            ]
        return found

    # -- the tables ------------------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        return [
            f"## {self.setting['title']}",
            "",
            self.setting["about"],
            "",
            *self._databases(),
            *self._models(),
            *self._gains(),
            *self._conditions(),
            *self._by_leakage(),
        ]

    def _databases(self) -> list[str]:
        head = [
            "database",
            "documents",
            "MB",
            "tokens",
            "recall@10",
            "chunks to predict with r <= 12.5%, 25%, 50%, 75%",
        ]
        lines = _table_head(head)
        for which in self.whiches:
            about = self.databases[which]
            total = self.bucket(which).chunks
            shares = ", ".join(f"{self.bucket(which, alpha).chunks / total:.0%}" for alpha in ALPHAS[:-1])
            trained = " (its rows are trained on)" if which == self.setting["trained_on"] else ""
            cells = [self.titles[which] + trained, f"{about['documents']:,}", f"{about['bytes'] / 1e6:.1f}"]
            lines.append(_row([*cells, f"{about['tokens']:,}", f"{about['recall_at_10']:.3f}", shares]))
        about = self.databases[self.setting["trained_on"]]["leakage"]["train"]
        text = (
            f"Both hold the validation documents too, which are never neighbours. Of the chunks trained on,"
            f" {about['above']['0.5']:.0%} have r(C) > 50%, {1 - about['above']['0.125']:.0%} have r(C) <= 12.5%."
        )
        return [*lines, "", text, ""]

    def _models(self) -> list[str]:
        head = ["model", "steps", "tokens", "10^12 operations", "bits per byte, off"]
        lines = _table_head([*head, *(f"{self.k}, {self.titles[w]}" for w in self.whiches)])
        for kind in MODELS:
            own = [p["training"] for p in self.parts if p["model"] == kind]
            tokens = sum(one["tokens"] for one in own) / len(own)
            operations = self._operations(kind) / 1e12
            cells = [_NAMES[kind], f"{own[0]['steps']:,}", f"{tokens:,.0f}", f"{operations:.2f}"]
            cells.append(_shown(self.bucket(self.whiches[-1]).bits(Series(kind))))
            cells += [_shown(self.bucket(w).bits(Series(kind, self.k))) for w in self.whiches]
            lines.append(_row(cells))
        note = "Tokens and operations of RETROfit are those beyond its base's. RETROfit without neighbours is its base."
        return [*lines, "", note, ""]

    def _operations(self, kind: str) -> float:
        a_token = self.costs["flops_per_token"].get(kind, self.costs["flops_per_token"][BASE])
        own = next(p["training"] for p in self.parts if p["model"] == kind)
        return float(own["places"] * a_token)

    def _gains(self) -> list[str]:
        head = ["gain in bits per byte", *(f"{self.titles[w]}" for w in self.whiches)]
        lines = _table_head(head)
        for title, reference, other in self._questions():
            lines.append(_row([title, *(_shown(self.bucket(w).gain(reference, other)) for w in self.whiches)]))
        larger = self._larger()
        return [*lines, "", *larger]

    def _larger(self) -> list[str]:
        """What the larger database gains over the smaller one, with the same model."""
        if len(self.whiches) < 2:
            return []
        small, large = (self.bucket(which) for which in (SMALLER, LARGER))
        lines = []
        for model in (RETRO, FITTED):
            on = Series(model, self.k)
            both = Bucket(large.chunks, large.n_bytes, {Series("a"): small.nats[on], Series("b"): large.nats[on]})
            gain = both.gain(Series("a"), Series("b"))
            lines.append(f"{_NAMES[model]}, the larger database over the smaller one: {_shown(gain)}.")
        return [*lines, ""]

    def _conditions(self) -> list[str]:
        names = next(p["measured"][self.whiches[-1]]["conditions"] for p in self.parts if p["model"] == RETRO)
        found = self.bucket(self.whiches[-1])
        head = [f"{self.titles[self.whiches[-1]]}", "RETRO", "its gain over off", "RETROfit", "its gain over off"]
        lines = _table_head(head)
        for name in names:
            cells = [name]
            for model in (RETRO, FITTED):
                cells.append(_shown(found.bits(Series(model, name))))
                cells.append("" if name == OFF else _shown(found.gain(Series(model), Series(model, name))))
            lines.append(_row(cells))
        return [*lines, ""]

    def _by_leakage(self) -> list[str]:
        lines = []
        for which in self.whiches:
            head = [f"{self.titles[which]}: r(C) <=", "chunks", "base, bits per byte"]
            lines += _table_head([*head, *(title for title, _, _ in self._questions()[:4]), "RETROfit, on against off"])
            for alpha in ALPHAS:
                found = self.bucket(which, alpha)
                cells = [f"{float(alpha):.1%}", f"{found.chunks:,}", _shown(found.bits(Series(BASE)))]
                cells += [_shown(found.gain(reference, other)) for _, reference, other in self._questions()[:4]]
                cells.append(_shown(found.gain(Series(FITTED), Series(FITTED, self.k))))
                lines.append(_row(cells))
            lines.append("")
        return lines


_OVER = {"r <= 12.5%": "0.125", "all chunks": "all"}
"""Where the summary looks."""


def _table_head(cells: Iterable[str]) -> list[str]:
    names = list(cells)
    return [_row(names), "|---" * len(names) + "|"]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.interval is None:
        return f"{estimate.value:.4f}"
    return f"{estimate.value:.4f} [{estimate.interval[0]:.4f}, {estimate.interval[1]:.4f}]"


def _verdict(gain: Estimate | None) -> str:
    """Whether it gains, in a word, with the figure."""
    if gain is None or gain.interval is None:
        return _shown(gain)
    low, high = gain.interval
    word = "gains" if low > 0 else "loses" if high < 0 else "no difference:"
    return f"{word} {_shown(gain)}"
