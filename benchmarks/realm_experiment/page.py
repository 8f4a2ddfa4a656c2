"""REALM's part of docs/experiments.md: made of the figures alone."""

from collections.abc import Iterable
from typing import Any

from realm_experiment.figures import (
    Part,
    compare,
    last_recall,
    of_condition,
    over_seeds,
    recall_at,
    seeds_of,
    third,
)
from retrodb.evaluation.intervals import Estimate

_LOGGED = (
    ("loss", "loss, nats"),
    ("answer_in_candidates", "masked words in the candidates"),
    ("utility", "mean RU"),
    ("best_utility", "best RU"),
    ("null_prior", "p(null)"),
    ("retriever_gradient", "gradient norm, retriever"),
    ("reader_gradient", "reader"),
)


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    done = {part["condition"] for part in results["runs"]}
    plan = results["experiment"]
    plan = {**plan, "conditions": [one for one in plan["conditions"] if one["name"] in done]}
    seeds = seeds_of(results["runs"]) if results["runs"] else []
    runs = [part for part in results["runs"] if part["seed"] in seeds]
    lines = [
        "# REALM's pre-training, measured",
        "",
        "Made by `python benchmarks/realm_gain.py` from `benchmarks/results/realm_gain.json`; do not edit it.",
        "",
        *_setup(results, seeds),
    ]
    if runs:
        lines += [*_what_came_out(plan, runs), *_during(plan, runs), *_conditions(plan, runs), *_versions(plan, runs)]
    if results["swap"]:
        lines += _swap(plan, results)
    if results["zero_shot"]:
        lines += _zero_shot(plan, results)
    return "\n".join(lines).rstrip() + "\n"


def _setup(results: dict[str, Any], seeds: list[int]) -> list[str]:
    plan, machine = results["experiment"], results["machine"]
    database = results["databases"]["pretraining"]
    return [
        f"The `{plan['name']}` plan, seeds {', '.join(map(str, seeds))}, on {machine['cpu']}, torch "
        f"{machine['torch']}. Both parts start from {_start(plan)}; vectors of {plan['dimension']} dimensions, raw "
        f"inner product. {database['documents']:,} paragraphs of SQuAD in {database['blocks']:,} blocks of at most "
        f"{plan['chunk_tokens']} wordpieces. {plan['cloze_steps']} steps of the Inverse Cloze Task with "
        f"{plan['cloze_batch']} blocks each, then {plan['steps']} steps of {plan['batch']} masked queries with "
        f"{plan['candidates'] - 1} candidates and the null document, refreshed every {plan['refresh_every']} steps. "
        "Intervals are 95%: over seeds by Student's t, with differences paired by seed; over questions by Wilson.",
        "",
        f"The paper takes 200,000 steps of 512 queries and BERT-base; here it is {plan['steps']} of {plan['batch']}. "
        "These figures say what the machinery does and how the quantities move in so short a run. They are no claim "
        "about REALM.",
        "",
    ]


def _start(plan: dict[str, Any]) -> str:
    layers = "first layer" if plan["layers"] == 1 else f"first {plan['layers']} layers"
    return "a given BERT" if plan["encoder"] else f"the {layers} of all-MiniLM-L6-v2"


def _what_came_out(plan: dict[str, Any], runs: list[Part]) -> list[str]:
    """Each question with its answer in words, from intervals alone."""
    first = plan["conditions"][0]["name"]
    k = plan["ks"][0]
    learnt = [
        last - start
        for last, start in zip(
            of_condition(runs, first, last_recall(k)),
            of_condition(runs, first, lambda part: recall_at(_at_step_0(part), k)),
            strict=True,
        )
    ]
    lines = [
        "## What came out",
        "",
        f"* recall@{k} on questions, the last step against step 0, refreshed: {_verdict(over_seeds(learnt))}",
    ]
    for name, title in (("loss", "loss"), ("answer_in_candidates", "masked words in the candidates")):
        values = of_condition(runs, first, lambda part, n=name: third(n, 2)(part) - third(n, 0)(part))
        lines.append(
            f"* {title}, the last third of the steps against the first, refreshed: {_verdict(over_seeds(values))}"
        )
    for condition in plan["conditions"][1:]:
        found = compare(runs, condition["name"], first, last_recall(k))
        lines.append(f"* {condition['title']}, recall@{k} at the end against refreshed: {_verdict(found)}")
    return [*lines, ""]


def _at_step_0(part: Part) -> dict[str, Any]:
    return next(look for look in part["versions"] if look["step"] == 0)


def _during(plan: dict[str, Any], runs: list[Part]) -> list[str]:
    """How the quantities move in the reference condition."""
    first = plan["conditions"][0]
    lines = [
        f"## During pre-training: {first['title']}",
        "",
        "Means over a third of the steps. *Masked words in the candidates*: the share of queries of which a candidate "
        "holds the very wordpieces that are masked, that is recall at "
        f"{plan['candidates'] - 1} during pre-training. RU(z|x) = log p(y|z,x) - log p(y|null,x).",
        "",
        *_head(["steps", *(title for _, title in _LOGGED)]),
    ]
    for at, name in enumerate(("first third", "second", "last")):
        cells = [_shown(over_seeds(of_condition(runs, first["name"], third(key, at)))) for key, _ in _LOGGED]
        lines.append(_row([name, *cells]))
    return [*lines, ""]


def _conditions(plan: dict[str, Any], runs: list[Part]) -> list[str]:
    first = plan["conditions"][0]["name"]
    lines = [
        "## Refresh, masks, ablations",
        "",
        "The last third of the steps, and the questions asked of the last version, by the paragraph they were written "
        "on. A loss compares only where the masks are the same. After the last step every condition is published once, "
        "so that its retriever is asked and not its staleness.",
        "",
        *_head(
            [
                "",
                "staleness, steps",
                *(title for _, title in _LOGGED),
                *(f"recall@{k}" for k in plan["ks"]),
                f"recall@{plan['ks'][0]} more than refreshed",
            ]
        ),
    ]
    for condition in plan["conditions"]:
        name = condition["name"]
        cells = [f"{over_seeds(of_condition(runs, name, third('staleness', 2))).value:.1f}"]
        cells += [_shown(over_seeds(of_condition(runs, name, third(key, 2)))) for key, _ in _LOGGED]
        cells += [_shown(over_seeds(of_condition(runs, name, last_recall(k)))) for k in plan["ks"]]
        cells.append("" if name == first else _shown(compare(runs, name, first, last_recall(plan["ks"][0]))))
        lines.append(_row([condition["title"], *cells]))
    return [*lines, ""]


def _versions(plan: dict[str, Any], runs: list[Part]) -> list[str]:
    """Recall over the steps, exact and approximate."""
    asked = runs[0]["versions"][0]["asked"]
    lines = [
        "## Recall@k over the steps",
        "",
        f"{asked:,} questions of SQuAD that the model never saw, asked of published versions without any fine-tuning: "
        "the paragraph (documents) and the answer's words (answers). *Before*: the encoder that all start from, mean "
        "pooling, before the projection was there. The database is small enough for an exact index; the index is asked "
        "all the same.",
        "",
        *_head(
            ["condition", "step", *(f"{c}@{k}" for c in ("documents", "answers") for k in plan["ks"]), "by the index"]
        ),
    ]
    for condition in plan["conditions"]:
        own = [part for part in runs if part["condition"] == condition["name"]]
        for look in own[0]["versions"]:
            looks = [next((o for o in part["versions"] if o["step"] == look["step"]), None) for part in own]
            found = [one for one in looks if one is not None]
            cells = [
                _shown(over_seeds([recall_at(one, k, criterion) for one in found]))
                for criterion in ("documents", "answers")
                for k in plan["ks"]
            ]
            index = over_seeds([recall_at(one, plan["ks"][0], side="index") for one in found])
            step = "before" if look["step"] is None else f"{look['step']:,}"
            lines.append(_row([condition["title"], step, *cells, f"documents@{plan['ks'][0]} {index.value:.3f}"]))
    return [*lines, ""]


def _swap(plan: dict[str, Any], results: dict[str, Any]) -> list[str]:
    swap, parts = plan["swap"], results["swap"]
    lines = [
        "## Another corpus at test time",
        "",
        f"Questions whose answers changed from 2016 to 2020. A query encoder (all-MiniLM-L6-v2) and a reader "
        f"({_start(plan)}) are fine-tuned on half of them with the Factbook of 2016 and its answers ({swap['steps']} "
        f"steps of {swap['batch']}, {swap['blocks']} blocks a question), and asked the other half, with that database "
        f"and with the one of 2020: no training in between. Seeds {', '.join(str(part['seed']) for part in parts)}.",
        "",
        *_head(["database", "answers of", "questions", "exact match", "answer in the blocks read"]),
    ]
    for which, title in (("old", "2016"), ("new", "2020")):
        for criterion in parts[0]["asked"][which]:
            name = criterion["criterion"]
            own = [next(one for one in part["asked"][which] if one["criterion"] == name) for part in parts]
            exact, there = (
                over_seeds([one[key]["value"] for one in own]) for key in ("exact_match", "answer_in_blocks")
            )
            lines.append(_row([title, name, f"{criterion['questions']:,}", _shown(exact), _shown(there)]))
    return [*lines, ""]


def _zero_shot(plan: dict[str, Any], results: dict[str, Any]) -> list[str]:
    lines = [
        "## Zero-shot recall, exact and approximate",
        "",
        "`retrodb evaluate-retrieval` with all-MiniLM-L6-v2, blocks of as many wordpieces as it reads (256), inner "
        "product. *Answers*: a gold answer stands in one of the k blocks; *documents*: one of them is of a document "
        "that the question names. So few vectors would have an exact index; the approximate one reads as many of its "
        "lists as give the blocks' own neighbours a recall@10 of 0.95.",
        "",
        *_head(["corpus", "blocks", "questions", "k", "exact search", "approximate", "index"]),
    ]
    by_name = {one["name"]: one for one in plan["zero_shot"]}
    for name, found in results["zero_shot"].items():
        for criterion in found["criteria"]:
            for k in plan["zero_shot_ks"]:
                exact, near = (_of_json(criterion["recall"][side][str(k)]) for side in ("exact", "index"))
                title = f"{by_name[name]['title']}: {criterion['criterion']}"
                counts = [f"{found['chunks']:,}", f"{criterion['questions']:,}", str(k)]
                lines.append(_row([title, *counts, _shown(exact), _shown(near), f"`{found['index']}`"]))
    return [*lines, ""]


def _of_json(found: dict[str, Any]) -> Estimate:
    interval = found["interval"]
    return Estimate(found["value"], tuple(interval) if interval else None)


def _verdict(difference: Estimate) -> str:
    """In a word, with the figure: more or less only where the interval leaves 0 out."""
    if difference.interval is None:
        return f"{difference.value:+.4f} (one seed)"
    low, high = difference.interval
    if low == high:
        return f"{difference.value:+.4f} in every seed, which leaves nothing to tell chance by"
    word = "more" if low > 0 else "less" if high < 0 else "no difference that the seeds show"
    return f"{word}, {difference.value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _shown(estimate: Estimate) -> str:
    if estimate.interval is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.interval[0]:.3f}, {estimate.interval[1]:.3f}]"


def _head(cells: Iterable[str]) -> list[str]:
    names = list(cells)
    return [_row(names), "|---" * len(names) + "|"]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
