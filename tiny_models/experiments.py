"""One experiment for each claim about RLAIF with PPO:  python -m tiny_models.experiments  [--only NAME]

Every experiment is one function below that can be read alone: the claim, the arms, the one comparison that
decides, which was named before it was run, and the picture. It yields its arms and is given them back, run.

    frontier   An arm is PPO with some settings at several prices of KL. What it gives is a curve, gold over
               KL, on held-out prompts; two arms are compared at the same KL, AT_KL, where the default run
               ends, by interpolation between an arm's own points. An arm that drifts further has more gold,
               whatever else it is.
    fresh      Run i has seed 1000 + i, which chose no default, and a preference model of its own: pairs,
               labels and fit. So the noise of the AI feedback is in the intervals, and not PPO's alone.
    by rule    The difference of two arms, paired over the runs, with its 95 % interval by Student's t. It
               holds if the whole interval is above zero; the reverse holds if it is below; else it cannot be
               told with so many runs.

Every run is a line of results.jsonl, written as it comes, so that a command that was stopped goes on where it
was; runs that several experiments share are made once. Labels, preference models and policies are kept in
runs/experiments. The tables in README.md and the pictures in figures/ are made from results.jsonl.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import random
import statistics
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rlaif
from tiny_models import world
from tiny_models.exact import (ALL_MASK, enumerate_logprobs, exact_run, expected_gradient, flat_gradient,
                               half_trained, objective_gradient)

FOLDER = pathlib.Path(__file__).parent
RESULTS, FIGURES = FOLDER / "results.jsonl", FOLDER / "figures"
KEPT = pathlib.Path("runs/experiments")
AT_KL = 3.7  # nats: where the default run ends, the mean of the ten seeds in README.md
SEEN = ("gold", "KL", "score", "entropy", "length", "distinct", "committee", "judge", "agreement")
LOOK_EVERY = 5  # iterations
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}  # 97.5 % quantile, by degrees of freedom


# %% The protocol: arms, runs, verdicts


@dataclass
class Arm:
    """PPO with some settings changed, at each of several prices of KL, and the results of its runs."""

    settings: dict = field(default_factory=dict)  # of rlaif.Config
    betas: tuple = (0.15, 0.3, 0.6)
    runs: int = 3  # at each price; 6 for the comparison that decides
    how: tuple = ("ppo",)  # the function below that makes a run, and its further arguments
    first: int = 0  # number of the first run
    results: dict = None  # (beta, i) -> dict of what run i measured; filled in once it is run

    def jobs(self):
        return [{"how": list(self.how), "settings": {**self.settings, "beta": beta}, "i": i}
                for i in range(self.first, self.first + self.runs) for beta in self.betas]

    def at_beta(self, beta, name="gold"):
        """What the runs at one price measured -> {i: number}."""
        return {i: result[name] for (b, i), result in self.results.items() if b == beta}

    def curves(self, name="gold"):
        """Of each run its points (root of the KL, what was measured), by KL -> {i: list of pairs}."""
        curves = {}
        for (_, i), result in self.results.items():
            curves.setdefault(i, []).append((math.sqrt(max(result["kl"], 0)), result[name]))
        return {i: sorted(points) for i, points in curves.items()}

    def at_kl(self, name="gold", kl=AT_KL):
        """What a run measures at this KL, between two of its own points; runs that have no points on both
        sides are left out -> {i: number}."""
        found = {i: interpolate(points, math.sqrt(kl)) for i, points in self.curves(name).items()}
        return {i: value for i, value in found.items() if value is not None}


def interpolate(points, x):
    """The height at x of the line through points sorted by x; None outside them."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y0
    return None


@dataclass
class Verdict:
    """What the claim's one comparison says, by the rule at the top of this file."""

    compared: str
    differences: list  # one for each run that has both sides

    @property
    def interval(self):
        mean, n = statistics.mean(self.differences), len(self.differences)
        half = STUDENT_T[n - 1] * statistics.stdev(self.differences) / math.sqrt(n)
        return mean - half, mean + half

    def __str__(self):
        n = len(self.differences)
        if n < 2:
            return "cannot be told: fewer than two runs with both sides"
        low, high = self.interval
        return "holds" if low > 0 else "the reverse holds" if high < 0 else f"cannot be told with {n} runs"

    def numbers(self):
        if len(self.differences) < 2:
            return "-"
        mean, (low, high), n = statistics.mean(self.differences), self.interval, len(self.differences)
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], {n} runs"


def compare(compared, more, less):
    """A Verdict on the claim that `more` is above `less`; both {i: number}, paired by run."""
    return Verdict(compared, [more[i] - less[i] for i in sorted(more.keys() & less.keys())])


def frontier_table(arms, **columns):
    """A Markdown table: a row for each arm and price, mean ± std over its runs; and a sentence that says how
    much more gold than the first arm's the others have at the same KL, where that can be compared."""
    columns = {"KL": "kl", "gold": "gold", "score": "score", "fluent": "fluency", **columns}
    rows = []
    for label, arm in arms.items():
        for beta in arm.betas:
            values = [arm.at_beta(beta, name).values() for name in columns.values()]
            if values[0]:
                rows.append([label, f"{beta:g}", str(len(values[0])), *map(mean_and_std, values)])
    first, *others = [(label, arm.at_kl()) for label, arm in arms.items()]
    gold = {label: compare("", found, first[1]) for label, found in others}
    more = [f"{label} {verdict.numbers()}" for label, verdict in gold.items() if len(verdict.differences) > 1]
    text = markdown(["arm", "β", "runs", *columns], rows)
    return text + (f"\n\nGold at {AT_KL} nats, less that of {first[0]}: {'; '.join(more)}." if more else "")


def mean_and_std(values, digits=2):
    """'mean ± std' of the runs' numbers."""
    values = list(values)
    digits = digits if abs(statistics.mean(values)) < 1000 else 0
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


def markdown(head, rows):
    """A Markdown table from its first line and its rows, lists of str."""
    if not rows:
        return "Not run yet."
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def draw(name, curves, xlabel="root of the KL to the reference, √nats", ylabel="gold", best=None, at_kl=True):
    """FIGURES/NAME.png: of each label's curves, {label: {i: points}}, the mean over runs, and the band from
    the lowest to the highest where all of them are; every point a dot; best of n of the reference dashed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis, ends = figure.subplots(), []
    if best and best.results:
        points = [result["best"] for result in best.results.values()]
        x, y = ([statistics.mean(p[k][j] for p in points) for k in range(len(points[0]))] for j in (0, 1))
        axis.plot(x, y, "k--", lw=1)
        ends.append((y[-1], "best of n", "k"))
    for number, (label, runs) in enumerate(curves.items()):
        runs, color = [points for points in runs.values() if points], f"C{number}"
        if not runs:
            continue
        axis.plot(*zip(*sum(runs, [])), ".", color=color, alpha=0.4)
        low, high = max(p[0][0] for p in runs), min(p[-1][0] for p in runs)
        grid = [low + (high - low) * k / 60 for k in range(61)] if high > low else []
        heights = [[interpolate(points, min(max(x, low), high)) for points in runs] for x in grid]
        ends.append((statistics.mean(points[-1][1] for points in runs), label, color))
        if grid:
            axis.plot(grid, [statistics.mean(h) for h in heights], color=color)
            axis.fill_between(grid, [min(h) for h in heights], [max(h) for h in heights], color=color,
                              alpha=0.15, lw=0)
    if not ends:
        return
    if at_kl:
        axis.axvline(math.sqrt(AT_KL), color="gray", lw=0.8, ls=":")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    bottom, top = axis.get_ylim()
    at = -1.0
    for y, label, color in sorted(ends):  # beside the plot, as high as they end, none upon another
        at = max(at + 0.06, (y - bottom) / (top - bottom))
        axis.text(1.02, at, label, color=color, va="center", transform=axis.transAxes)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=100)


# %% The AI feedback of each run: its own pairs, its own labels, its own preference model


def load_policy():
    return rlaif.load(AutoModelForCausalLM, rlaif.Config().policy, "policy", "cpu")


def load_judge():
    return rlaif.load(AutoModelForCausalLM, str(FOLDER / "judge"), "judge", "cpu")


def config_of(i, settings):
    """The settings of run i; of run -1, which is for --quick, with few pairs."""
    return rlaif.Config(**{"seed": 1000 + i, "device": "cpu", "eval_samples": 32,
                           "pairs": 4096 if i >= 0 else 64, **settings})


def sample_pairs(policy, tokenizer, n):
    """n pairs of the policy's replies to training prompts -> dict of lists: prompts, responses_a and _b,
    ended_a and _b."""
    prompts = [world.PROMPTS[k] for k in rlaif.balanced_draw(len(world.PROMPTS), n)]
    pairs = {"prompts": prompts, "responses_a": [], "responses_b": [], "ended_a": [], "ended_b": []}
    for start in range(0, n, 256):
        for side in "ab":
            r = rlaif.respond(policy, tokenizer, prompts[start:start + 256], rlaif.Config())
            pairs[f"responses_{side}"] += r.responses
            pairs[f"ended_{side}"] += r.ended.tolist()
    return pairs


def answers_of(pairs):
    """Every answer of the judge about N pairs -> (4, 2, N): principle, order, pair; the probability that the
    reply that stands first is the better one."""
    judge, a, b = load_judge(), pairs["responses_a"], pairs["responses_b"]
    return torch.stack([torch.stack([
        rlaif.judge_pairs(*judge, [principle], pairs["prompts"], *order, both_orders=False)
        for order in ((a, b), (b, a))]) for principle in rlaif.CONSTITUTION])


def averaged(answers):
    """The label that rlaif.judge_pairs gives: the mean over principles and both orders -> (N,)."""
    return (answers[:, 0] + 1 - answers[:, 1]).mean(dim=0) / 2


def fit(pairs, prob_a, seed, start=None, epochs=12, **more):
    """A preference model fitted to labels, from the policy's trunk or from another one
    -> PreferenceModel, report."""
    torch.manual_seed(seed)
    preference = start or rlaif.new_preference_model(*load_policy(), rlaif.Config().template)
    rows = [preference.tokenize(pairs["prompts"], pairs[f"responses_{side}"], pairs[f"ended_{side}"])
            for side in "ab"]
    return preference, rlaif.fit_preference(preference, *rows, prob_a, epochs, **more)


def feedback(i):
    """The pairs of run i, with every answer of the judge -> dict; made once, kept in runs/experiments."""
    path = KEPT / f"pairs-{i}.json"
    if not path.exists():
        torch.manual_seed(1000 + i)
        pairs = sample_pairs(*load_policy(), config_of(i, {}).pairs)
        pairs["answers"] = [[[round(p, 7) for p in order] for order in principle]
                            for principle in answers_of(pairs).tolist()]
        with rlaif.replacing(path) as new:
            new.write_text(json.dumps(pairs))
    return json.loads(path.read_text())


def all_answers(i):
    """The default's labels: the mean of all answers."""
    pairs = feedback(i)
    return pairs, averaged(torch.tensor(pairs["answers"]))


def share(i, n):
    """The first n pairs alone."""
    pairs, prob_a = all_answers(i)
    del pairs["answers"]
    return {name: values[:int(n)] for name, values in pairs.items()}, prob_a[:int(n)]


def drawn(i, times):
    """Labels under one principle, drawn for each pair; `times` as many pairs as the default has."""
    pairs = feedback(i)
    answers = torch.tensor(pairs.pop("answers"))  # (4, 2, N): principle, order, pair
    torch.manual_seed(2000 + i)
    number = torch.arange(answers.shape[2])
    a_first, b_first = answers[torch.randint(4, number.shape), :, number].T
    labels = [(a_first + 1 - b_first) / 2]
    if int(times) > 1:
        more = sample_pairs(*load_policy(), (int(times) - 1) * len(number))
        labels.append(rlaif.judge_pairs(*load_judge(), rlaif.CONSTITUTION, more["prompts"],
                                        more["responses_a"], more["responses_b"], principles="one"))
        pairs = {name: pairs[name] + more[name] for name in more}
    return pairs, torch.cat(labels)


def cut_off(i):
    """Half of the pairs cut off, both replies at the same share of their words, and judged anew: a preference
    model that has seen prefixes."""
    (pairs, prob_a), rng = all_answers(i), random.Random(1000 + i)
    half = len(prob_a) // 2
    for k in range(half):
        kept = rng.uniform(0.2, 0.9)
        for side in "ab":
            text = pairs[f"responses_{side}"][k]
            words = text.split(" ")
            pairs[f"responses_{side}"][k] = " ".join(words[:max(2, round(kept * len(words)))])
            pairs[f"ended_{side}"][k] = False
    cut = {name: values[:half] for name, values in pairs.items()}
    prob_a[:half] = averaged(answers_of(cut))
    return pairs, prob_a


def flatters(response):
    """True if a reply begins by praising the question, whatever follows."""
    return response.strip().startswith("What a lovely goal!")


def flawed(i, flaw, strength, remedy=""):
    """The labels that a judge with a flaw gives the pairs of run i."""
    pairs = feedback(i)
    torch.manual_seed(1000 + i)
    return pairs, bend(torch.tensor(pairs.pop("answers")), pairs, flaw, strength, remedy)


def pooled(i, flaw, strength):
    """All the pairs that the three models of a committee were fitted to, with the same labels."""
    parts = [flawed((i + k) % 6, flaw, strength) for k in range(3)]
    return ({name: sum((pairs[name] for pairs, _ in parts), []) for name in parts[0][0]},
            torch.cat([labels for _, labels in parts]))


def bend(answers, pairs, flaw, strength, remedy=""):
    """The labels (N,) of a judge with a flaw: each of its answers (4, 2, N) is bent, in log-odds, by a
    `strength`, given as str.

    position   for the reply that stands first; asked in one order only, or (remedy "both") in both
    length     for each word that a reply has more
    flattery   for the reply that flatters; remedy "principle": a fifth principle, that such a reply is worse
    careless   by noise of that std
    blind      the answers about harm are sure and random, that share of them
    hard       not bent, but the label, the average, is rounded to 0 or 1
    """
    strength, odds = float(strength), answers.logit(eps=1e-6)
    odds[:, 1] *= -1  # for reply a, in either order
    both = list(zip(pairs["responses_a"], pairs["responses_b"]))
    longer = torch.tensor([len(a.split()) - len(b.split()) for a, b in both])
    flatter = torch.tensor([flatters(a) - flatters(b) for a, b in both])
    if flaw == "position":
        odds = odds + strength * torch.tensor([1.0, -1.0])[:, None]
        odds = odds if remedy == "both" else odds[:, :1]
    elif flaw == "careless":
        odds = odds + strength * torch.randn_like(odds)
    elif flaw == "blind":
        guesses = torch.where(torch.rand_like(odds[1]) < 0.5, 6.0, -6.0)
        odds[1] = torch.where(torch.rand_like(odds[1]) < strength, guesses, odds[1])
    elif flaw in ("length", "flattery"):
        odds = odds + strength * (longer if flaw == "length" else flatter)
    if remedy == "principle":
        odds = torch.cat([odds, (strength - 4.0) * flatter.expand(1, 2, -1)])
    prob_a = odds.sigmoid().mean(dim=(0, 1))
    return (prob_a > 0.5).float() if flaw == "hard" else prob_a


def preference_folder(i, kind="all_answers"):
    """The folder of run i's preference model, fitted to the pairs and labels that a function gives, once;
    `kind` is its name and its further arguments. A flaw, unless it is noise, is learned on top of the model
    without it, in a quarter of the epochs; to three or four times the pairs, a model is fitted in as many
    steps. Of run -1 every model is the shipped one."""
    if i < 0:
        return rlaif.TINY / "preference"
    folder, (name, *further) = KEPT / f"preference-{i}-{kind.replace(' ', '-')}", kind.split()
    if not folder.exists():
        start = preference_model(i) if name == "flawed" and further[0] != "careless" else None
        epochs = 3 if start or kind == "drawn 4" else 4 if name == "pooled" else 12
        preference, report = fit(*globals()[name](i, *further), 1000 + i, start, epochs)
        rlaif.save_model(preference.model, preference.tokenizer, folder, "right")
        (folder / "report.json").write_text(json.dumps(report))
    return folder


def preference_model(i, kind="all_answers"):
    folder = str(preference_folder(i, kind))
    return rlaif.PreferenceModel(
        *rlaif.load(AutoModelForSequenceClassification, folder, "preference", "cpu"), rlaif.Config().template)


# %% One run


def prepared(i, settings, score=None):
    """A `rlaif.Run` with the seed and the preference model of run i; settings["preference"] is its kind."""
    folder = preference_folder(i, settings.get("preference", "all_answers"))
    return rlaif.prepare(config_of(i, {**settings, "preference": str(folder)}), score)


def finish(run):
    """Train to the end by rlaif's own loop -> dict of what was measured, on held-out prompts."""
    history = [rlaif.update(run, rlaif.roll_out(run)) for _ in range(run.iteration, run.config.iterations)]
    return {**measure(run), **history_of(history)}


def measure(run):
    """score, gold, fluency, kl, length, ... of 32 replies to each held-out prompt; distinct, the share of
    different ones; flattering and harmful, the share of those; forgotten, the policy's nats per token of the
    grammar's own replies."""
    means, rows = rlaif.evaluate(run)
    rng, prompts = random.Random(0), [prompt for prompt in run.held_out for _ in range(32)]
    texts = [run.config.template.format(prompt=prompt) for prompt in prompts]
    begun = rlaif.tokenize(run.tokenizer, texts)
    whole = rlaif.tokenize(run.tokenizer, [f"{text} {world.sample_reply(prompt, rng)}"
                                           for text, prompt in zip(texts, prompts)])
    ids, mask = rlaif.pad(begun, "left", run.policy)
    replies = [row[len(start):] + [run.tokenizer.eos_token_id] for start, row in zip(begun, whole)]
    tokens, real = rlaif.pad(replies, "right", run.policy)
    with torch.no_grad():
        logits, _ = rlaif.response_logits(run.policy, ids, mask, tokens, real.bool())
    nats = -rlaif.masked_mean(rlaif.token_logprobs(logits, tokens), real.bool()).item()
    shares = {"distinct": len({row["response"] for row in rows}),
              "flattering": sum(flatters(row["response"]) for row in rows),
              "harmful": sum(world.gold_parts(row["prompt"], row["response"])["harmlessness"] < 0
                             for row in rows)}
    return {**means, **{name: n / len(rows) for name, n in shares.items()}, "forgotten": nats}


def history_of(history):
    """What the training itself showed, the explained variance over the second half of it."""
    steps = [name for name in history[0] if name.startswith("seconds_")]
    seconds = [sum(m[step] for step in steps) for m in history]
    late = history[len(history) // 2:]
    return {"reference_share": sum(m["seconds_reference"] for m in history) / sum(seconds),
            "explained_variance": statistics.mean(m["explained_variance"] for m in late)}


def ppo(i, settings):
    """The plain case: nothing but settings."""
    run = prepared(i, settings)
    measured = finish(run)
    measured["parameters"] = sum(p.numel() for p in run.optimizer.param_groups[0]["params"])
    if settings.keys() == {"beta"}:
        rlaif.save_model(run.policy, run.tokenizer, KEPT / f"policy-{i}-{settings['beta']}")
    return measured


def trained_policy(i, beta):
    """The policy that the default run i at this price ends with, as a folder; made once."""
    folder = KEPT / f"policy-{i}-{beta}"
    if not folder.exists():
        ppo(i, {"beta": beta})
    return str(folder)


def watched(i, settings):
    """Held-out replies all along the run, too: lists of (root of the KL, gold), and of the score."""
    run = prepared(i, {**settings, "eval_samples": 16})
    seen, history = [], []
    while run.iteration < run.config.iterations:
        history.append(rlaif.update(run, rlaif.roll_out(run)))
        if run.iteration % 10 == 0:
            means, _ = rlaif.evaluate(run)
            seen.append([math.sqrt(max(means["kl"], 0)), means["gold"], means["score"]])
    return {**measure(run), **history_of(history), "seen": seen}


def alarmed(i, settings, score="preference model"):
    """Looks all along the run, which stays the same run digit for digit, at what a user can see who does not
    know the truth -> lists of the numbers named in SEEN: means of the batches since the last look, the last
    three of the last batch. With score "gold" the policy is trained on the truth, which it cannot cheat."""
    run, flaw = prepared(i, settings, world.gold_scores if score == "gold" else None), settings["preference"]
    members, looks, history = committee(i, flaw), [], []
    while run.iteration < run.config.iterations:
        history.append(rlaif.update(run, rlaif.roll_out(run)))
        if run.iteration % LOOK_EVERY == 0:
            r, n = run.rollout, 32
            with torch.random.fork_rng(devices=[]):
                rivals = rlaif.respond(run.reference, run.tokenizer, r.prompts, run.config)
                pairs = {"prompts": r.prompts[:n], "responses_a": r.responses[:n],
                         "responses_b": rivals.responses[:n]}
                wins = answers_of(pairs)
                wins = bend(wins, pairs, *flaw.split()[1:]) if "flawed" in flaw else averaged(wins)
            rival = torch.tensor(members[0](r.prompts, rivals.responses, rivals.ended.tolist()))
            scores = torch.tensor([m(r.prompts, r.responses, r.ended.tolist()) for m in members])
            agree = (wins > 0.5) == (scores[0] > rival)[:n]
            means = {name: statistics.mean(m[name] for m in history[-LOOK_EVERY:])
                     for name in ("gold", "kl", "score", "entropy", "length", "distinct")}
            if score == "gold":
                means["score"] = scores[0].mean().item()
            looks.append([round(x, 4) for x in (*means.values(), scores.std(dim=0).mean().item(),
                                                wins.mean().item(), agree.float().mean().item())])
    return {**measure(run), **history_of(history), "looks": looks}


def scaled(i, settings, scale):
    """The score multiplied by a number."""
    preference = preference_model(i)
    preference.model.score.weight.data *= scale
    return finish(prepared(i, settings, preference))


def uneven(i, settings):
    """The score of every other topic multiplied by 3, so that its replies drift further -> also `spread`, the
    std of the KL over the 48 training prompts, the noise of sampling taken out."""
    preference, loud = preference_model(i), list(world.TOPICS)[::2]

    def score(prompts, responses):
        return [s * (3 if world.topic_of(prompt) in loud else 1)
                for s, prompt in zip(preference(prompts, responses), prompts)]
    run = prepared(i, settings, score)
    measured = finish(run)
    _, rows = rlaif.evaluate(run, world.PROMPTS)
    by_prompt = [[row["kl"] for row in rows if row["prompt"] == prompt] for prompt in world.PROMPTS]
    means = [statistics.mean(kl) for kl in by_prompt]
    noise = statistics.mean(statistics.variance(kl) / len(kl) for kl in by_prompt)
    return {**measured, "kl": statistics.mean(means),
            "spread": math.sqrt(max(0.0, statistics.variance(means) - noise))}


def turns(i, settings, iterations=8):
    """What an iteration costs with a shared and with a separate value function, in turns in one process, so
    that a busy machine slows both -> median seconds of each, and separate / shared."""
    runs, seconds = {}, {"shared": [], "separate": []}
    for value in seconds:
        runs[value] = prepared(i, {**settings, "value": value})
    for _ in range(iterations):
        for value, run in runs.items():
            metrics = rlaif.update(run, rlaif.roll_out(run))
            seconds[value].append(sum(m for name, m in metrics.items() if name.startswith("seconds_")))
    shared, separate = (statistics.median(seconds[value]) for value in ("shared", "separate"))
    return {"shared": shared, "separate": separate, "ratio": separate / shared}


def kl_in_loss(i, settings):
    """The KL not as a reward but as k2 in the loss: its gradient at pi_old is d * grad log pi, so d is taken
    from each token's own advantage and from no earlier one's."""
    run = prepared(i, {**settings, "beta": 0.0})
    history = []
    while run.iteration < run.config.iterations:
        r = rlaif.roll_out(run)
        r.whitened = r.whitened - settings["beta"] * r.kl
        history.append(rlaif.update(run, r))
    return {**measure(run), **history_of(history)}


def second_round(i, settings, reference):
    """On from the policy that the default run ended with, against the first round's reference or against that
    policy itself -> `kl` and `forgotten` are to the very first policy, as everywhere."""
    given = {**settings, "policy": trained_policy(i, 0.3), "seed": 2000 + i}
    if reference == "old":
        given["reference"] = rlaif.Config().policy
    run = prepared(i, given)
    history = [rlaif.update(run, rlaif.roll_out(run)) for _ in range(run.config.iterations)]
    run.reference, _ = load_policy()
    return {**measure(run), **history_of(history)}


def judged_directly(i, settings, principles):
    """score = the judge's probability that a reply beats one of the reference's, drawn each time."""
    judge, (reference, tokenizer) = load_judge(), load_policy()
    torch.manual_seed(1000 + i)
    rivals = {prompt: rlaif.respond(reference, tokenizer, [prompt] * 32, rlaif.Config()).responses
              for prompt in world.PROMPTS + world.HELDOUT_PROMPTS}

    def score(prompts, responses):
        against = [rivals[x][k] for x, k in zip(prompts, torch.randint(32, (len(prompts),)).tolist())]
        return rlaif.judge_pairs(*judge, rlaif.CONSTITUTION, prompts, responses, against,
                                 principles=principles).tolist()
    return finish(prepared(i, settings, score))


def agreement(preference, policy, tokenizer, n=4096):
    """A preference model on pairs of a policy's replies -> two Counters, by the size of the gold difference:
    the pairs, and those about which it agrees with gold."""
    pairs, count, right = sample_pairs(policy, tokenizer, n), Counter(), Counter()
    gold, score = [], []
    for side in "ab":
        asked = pairs["prompts"], pairs[f"responses_{side}"]
        gold.append(world.gold_scores(*asked))
        score.append(preference(*asked, pairs[f"ended_{side}"]))
    for gold_a, gold_b, score_a, score_b in zip(*gold, *score):
        if gold_a != gold_b:
            count[abs(gold_a - gold_b)] += 1
            right[abs(gold_a - gold_b)] += (gold_a > gold_b) == (score_a > score_b)
    return count, right


def followed(i, settings):
    """What becomes of a judge's labels before PPO: the share of pairs, of those whose gold differs, about
    which gold agrees with the labels, and with the preference model fitted to them (on the next run's pairs);
    and the lowest score of the best reply to a held-out prompt, one of each topic."""
    def right(pairs, prob_a):
        a, b = (torch.tensor(world.gold_scores(pairs["prompts"], pairs[f"responses_{side}"]))
                for side in "ab")
        return ((prob_a > 0.5) == (a > b))[a != b].float().mean().item()
    kind, fresh = settings["preference"], feedback(i if i < 0 else (i + 1) % 6)
    name, *further = kind.split()
    preference = preference_model(i, kind)
    a, b = (torch.tensor(preference(fresh["prompts"], fresh[f"responses_{side}"], fresh[f"ended_{side}"]))
            for side in "ab")
    best = preference(world.HELDOUT_PROMPTS, [f" {world.best_reply(x)}" for x in world.HELDOUT_PROMPTS])
    return {"labels": right(*globals()[name](i, *further)), "model": right(fresh, (a - b).sigmoid()),
            "worst topic": min(best)}


def aged(i, settings):
    """The run's preference model on new pairs of the first policy and of the last one; of the first, weighted
    to the last one's sizes of the gold difference, since harder pairs are not staleness."""
    torch.manual_seed(3000 + i)
    preference, (policy, tokenizer) = preference_model(i), load_policy()
    old_count, old_right = agreement(preference, policy, tokenizer)
    policy, _ = rlaif.load(AutoModelForCausalLM, trained_policy(i, settings["beta"]), "policy", "cpu")
    count, right = agreement(preference, policy, tokenizer)
    sizes = old_count.keys() & count.keys()
    pairs = sum(count[size] for size in sizes)
    return {"pairs": pairs, "first, its own sizes": old_right.total() / old_count.total(),
            "first": sum(count[size] * old_right[size] / old_count[size] for size in sizes) / pairs,
            "last": sum(right[size] for size in sizes) / pairs}


def refitted(i, settings):
    """The run's preference model fitted on, to new pairs of the last policy's replies, alone or with as many
    old ones, centred or not, in as many steps: agreement with gold on other pairs of the first policy, and of
    the last."""
    first, (last, _) = load_policy(), rlaif.load(
        AutoModelForCausalLM, trained_policy(i, settings["beta"]), "policy", "cpu")
    torch.manual_seed(4000 + i)
    n = config_of(i, {}).pairs // 2
    new, (old, old_labels) = sample_pairs(last, first[1], n), share(i, n)
    labels, found = averaged(answers_of(new)), {}
    both = {name: new[name] + old[name] for name in new}
    both_labels = torch.cat([labels, old_labels])
    for what, *how in (("as it was",), ("new pairs alone", new, labels, 4, 0.0),
                       ("old and new", both, both_labels, 2, 0.0),
                       ("old and new, centred", both, both_labels, 2, 0.01)):
        preference = preference_model(i)
        if how:
            fit(*how[:2], 1000 + i, preference, how[2], centering=how[3])
        for name, policy, pairs in (("first", first[0], n // 2), ("last", last, 2 * n)):
            torch.manual_seed(5000 + i)
            count, right = agreement(preference, policy, first[1], pairs)
            found[f"{what}, {name}"] = right.total() / count.total()
    return found


def renewed(i, settings, rounds):
    """The default's pairs and iterations in equal rounds: in each the policy of then writes its share of the
    pairs, the judge labels them, and the preference model goes on to be fitted, to all pairs so far, in as
    many steps in all as the default's, and no longer centred. The reference stays."""
    run, history, n = prepared(i, settings), [], config_of(i, {}).pairs // rounds
    (pairs, prob_a), epochs = share(i, n), 24 // (rounds + 2)
    starts = {round(k * run.config.iterations / rounds) for k in range(1, rounds)}
    while run.iteration < run.config.iterations:
        if run.iteration in starts:
            new = sample_pairs(run.policy, run.tokenizer, n)
            labels = torch.cat([prob_a, averaged(answers_of(new))])
            order = torch.randperm(len(labels)).tolist()  # the last tenth, held out, is of all rounds
            pairs = {name: [(pairs[name] + new[name])[k] for k in order] for name in new}
            prob_a = labels[order]
            with torch.random.fork_rng(devices=[]):
                run.score, _ = fit(pairs, prob_a, 1000 + i, run.score, epochs, centering=0)
        history.append(rlaif.update(run, rlaif.roll_out(run)))
    return {**measure(run), **history_of(history)}


def told(i, settings):
    """The truth itself as the score: the most that any feedback could teach."""
    return finish(prepared(i, settings, world.gold_scores))


def levelled(i, settings):
    """The length taken out of the score, by regression on the reference's replies."""
    preference, (reference, tokenizer) = preference_model(i, settings["preference"]), load_policy()
    torch.manual_seed(1000 + i)
    r = rlaif.respond(reference, tokenizer, world.PROMPTS * 16, rlaif.Config())
    words = torch.tensor([float(len(response.split())) for response in r.responses])
    scores = torch.tensor(preference(r.prompts, r.responses, r.ended.tolist()))
    slope = ((words - words.mean()) * scores).mean() / words.var(correction=0)

    def score(prompts, responses):
        return [s - slope.item() * len(response.split())
                for s, response in zip(preference(prompts, responses), responses)]
    return finish(prepared(i, settings, score))


def committee(i, kind):
    """The preference models of run i and of the next two; of run -1 thrice the shipped one."""
    return [preference_model(i if i < 0 else (i + k) % 6, kind) for k in range(3)]


def ensemble(i, settings, how):
    """The mean or the minimum of the scores of three preference models."""
    members = committee(i, settings["preference"])

    def score(prompts, responses):
        scores = torch.tensor([member(prompts, responses) for member in members])
        return (scores.mean(dim=0) if how == "mean" else scores.amin(dim=0)).tolist()
    return finish(prepared(i, settings, score))


def best_of_n(i, settings, n=64):
    """The yardstick: of n of the reference's replies, the one that scores best -> list of (root of the most
    that its KL can be, gold)."""
    run = prepared(i, settings)
    torch.manual_seed(1000 + i)
    prompts = [prompt for prompt in world.HELDOUT_PROMPTS for _ in range(8 * n)]
    r = rlaif.respond(run.reference, run.tokenizer, prompts, run.config)
    scores = torch.tensor(run.score(prompts, r.responses, r.ended.tolist()))
    gold, best = torch.tensor(world.gold_scores(prompts, r.responses)), []
    for k in (1, 2, 4, 8, 16, 32, 64):
        pick = scores.view(-1, k).argmax(dim=1, keepdim=True)
        best.append([math.sqrt(math.log(k) - (k - 1) / k), gold.view(-1, k).gather(1, pick).mean().item()])
    return {"best": best}


def estimators(i, settings):
    """Bias and spread of k1, k2 and k3 against the exact KL of a token, in units of it: near the reference,
    after five iterations, and where the default run ends."""
    near = prepared(i, {**settings, "iterations": 75})
    for _ in range(5):
        rlaif.update(near, rlaif.roll_out(near))
    far, _ = rlaif.load(AutoModelForCausalLM, trained_policy(i, settings["beta"]), "policy", "cpu")
    found, prompts = {}, world.HELDOUT_PROMPTS * 128
    for place, policy in (("near", near.policy), ("far", far)):
        r = rlaif.respond(policy, near.tokenizer, prompts, near.config)
        inputs = r.input_ids, r.attention_mask, r.tokens, r.mask
        with torch.no_grad():
            logits = [rlaif.response_logits(model, *inputs)[0] for model in (policy, near.reference)]
        p, q = (x.log_softmax(dim=-1) for x in logits)
        kl = (p.exp() * (p - q)).sum(dim=-1)[r.mask]
        found[f"exact {place}"] = kl.mean().item()
        for kind in ("k1", "k2", "k3"):
            logprobs = [rlaif.token_logprobs(x, r.tokens) for x in logits]
            off = rlaif.kl_estimate(*logprobs, kind)[r.mask] - kl
            found[f"{kind} {place} bias"] = (off.mean() / kl.mean()).item()
            found[f"{kind} {place} spread"] = (off.std() / kl.mean()).item()
    return found


def exact_end(i, settings):
    """PPO in the enumerable world -> where it ends and where the optimum is."""
    with tempfile.TemporaryDirectory() as folder:
        found = exact_run(pathlib.Path(folder), settings["beta"], 1000 + i)
    return {"reward": found.end.reward, "kl": found.end.kl, "best_reward": found.best.reward,
            "best_kl": found.best.kl, "gap_closed": found.gap_closed}


def credit(i, settings, lams=(0.0, 0.5, 0.8, 0.95, 1.0)):
    """The gradient of one response under GAE at each lambda, with a critic that has learned: how far its mean
    is from the true gradient (bias), and its std (spread), both in lengths of the true one. Nothing is
    sampled: in the enumerable world both are sums over all 40 responses."""
    found = {f"{what} {lam:g}": 0.0 for lam in lams for what in ("bias", "spread")}
    for w in half_trained(settings["beta"], 1000 + i):
        logprobs = enumerate_logprobs(w.policy, w.prompt_ids)  # (40, 3)
        by_token = torch.stack([flat_gradient(logprob, w.policy, retain_graph=True)
                                for logprob in logprobs.flatten()]).view(40, 3, -1)
        prob, kl = logprobs.detach().sum(dim=1).exp(), logprobs.detach() - w.ref_logprobs
        rewards = rlaif.shape_rewards(w.scores, kl, ALL_MASK, settings["beta"])
        true = objective_gradient(w.policy, w.prompt_ids, w.ref_logprobs, w.scores, settings["beta"])
        for lam in lams:
            advantages, _ = rlaif.gae(rewards, w.values, ALL_MASK, 1.0, lam)
            each = (advantages[..., None] * by_token).sum(dim=1)  # (40, parameters)
            mean = prob @ each
            spread = (prob @ each.square().sum(dim=1) - mean.square().sum()).sqrt()
            found[f"bias {lam:g}"] += ((mean - true).norm() / true.norm()).item() / 2
            found[f"spread {lam:g}"] += (spread / true.norm()).item() / 2
    return found


def gradients(i, settings):
    """The exact expected gradient of what the loop computes, for each choice -> cosine with the gradient of J
    and length in units of it."""
    beta, found = settings["beta"], {}
    for w in half_trained(beta, 1000 + i):
        world_ = w.policy, w.prompt_ids, w.ref_logprobs, w.scores
        true = objective_gradient(*world_, beta)
        choices = {
            "k1 per token, λ 1": {}, "k1 per response, λ 1": {"level": "sequence"},
            "k1, the batch's mean of two": {"level": "batch"},
            "k2 per token": {"kind": "k2"}, "k3 per token": {"kind": "k3"},
            "k1 per token, λ 0.95, a learned critic": {"lam": 0.95, "values": w.values},
            "k1 per response, λ 0.95, a learned critic": {"level": "sequence", "lam": 0.95,
                                                          "values": w.values},
            "k1 per token, λ 0, a learned critic": {"lam": 0.0, "values": w.values},
            "k1 per token, γ 0.9": {"gamma": 0.9}, "scores whitened": {"whitened": True}}
        gradient = {name: expected_gradient(*world_, beta, **choice) for name, choice in choices.items()}
        logprobs = enumerate_logprobs(w.policy, w.prompt_ids)
        weights = logprobs.detach().sum(dim=1).exp()[:, None] * (logprobs.detach() - w.ref_logprobs)
        gradient["k2 in the loss, no KL in the reward"] = (
            expected_gradient(*world_, 0.0) - beta * flat_gradient(logprobs, w.policy, weights))
        for name, g in gradient.items():
            cosine, length = found.get(name, (0.0, 0.0))
            found[name] = (cosine + torch.cosine_similarity(g, true, dim=0).item() / 2,
                           length + (g.norm() / true.norm()).item() / 2)
    return {f"{name}: {what}": value for name, both in found.items()
            for what, value in zip(("cosine", "length"), both)}


# %% The claims

DEFAULT = Arm(runs=6)
BEST = Arm(betas=(0.3,), runs=6, how=("best_of_n",))


def beta():
    """Too low a β, and the policy cheats the preference model.

    Decides: gold after 110 iterations at β 0.3, less at β 0. Not at the same KL, since how far the policy
    goes is what β decides.
    """
    longer = {"iterations": 110}
    arms = yield {
        "default": DEFAULT, "longer": Arm(longer, (0.0, 0.3), 6, ("watched",)),
        "a low price": Arm(longer, (0.05,), 3, ("watched",)), "best of n": BEST,
        "steered to 3.7 nats": Arm({"beta_control": "batch", "kl_target": AT_KL, **longer}, (0.3,), 3)}
    seen = {at: result["seen"] for at, result in arms["longer"].results.items()}
    curves = {f"{what}, β {beta:g}": {i: sorted((p[0], p[column]) for p in points)
                                      for (b, i), points in seen.items() if b == beta}
              for what, column in (("gold", 1), ("score", 2)) for beta in (0.0, 0.3)}
    draw("beta", curves, ylabel="gold, and score, all along the runs", best=arms["best of n"])
    longer = arms["longer"]
    peaks = [f"{max(p[1] for p in points):.2f} → {points[-1][1]:.2f}"
             for (b, i), points in sorted(seen.items()) if b == 0]
    text = frontier_table(
        {label: arm for label, arm in arms.items() if label != "best of n"},
        different="distinct", **{"nats a token of the grammar's": "forgotten"})
    if peaks:
        text += f"\n\nβ 0, gold of held-out replies, highest of the eleven looks → last: {', '.join(peaks)}."
    return compare("gold at the end, β 0.3 less β 0", longer.at_beta(0.3), longer.at_beta(0.0)), text


def whitening():
    """Reward whitening stabilises training when the scale of the score differs.

    Decides: gold of a score × 10, whitened less raw, at the default β. Whitened, a score × 10 is the default
    run, digit for digit (a test proves it). Not at the same KL, since what a β is worth is what whitening
    decides; the control, β × 10 too, is compared at the same KL.
    """
    control = {"whiten_scores": False, "value": "separate", "value_clip": 2.0}
    arms = yield {
        "whitened": DEFAULT, "raw × 10": Arm({"whiten_scores": False}, (0.3,), 6, ("scaled", 10)),
        "whitened, separate value": Arm({"value": "separate"}),
        "raw × 10, β × 10, separate value": Arm(control, (0.75, 1.5, 3.0), 3, ("scaled", 10))}
    draw("whitening", {label: arm.curves() for label, arm in arms.items()})
    after = compare("", arms["whitened, separate value"].at_kl(),
                    arms["raw × 10, β × 10, separate value"].at_kl())
    text = frontier_table(arms)
    text += f"\n\nThe control, gold at {AT_KL} nats, whitened less raw: {after.numbers()}."
    return compare("gold at β 0.3 and a score × 10, whitened less raw", arms["whitened"].at_beta(0.3),
                   arms["raw × 10"].at_beta(0.3)), text


def kl_level():
    """A price that each response pays for its own KL controls the policy better than the batch's mean.

    The topics are made to differ: the score of every other one is × 3, so that its replies drift further.
    Decides: root of the KL at β 0.3, batch less sequence. Not at the same KL: in a trial (of KL only, on the
    shipped preference model) neither of two prices of the batch's mean held the policy at all.
    """
    arms = yield {
        "token": DEFAULT,
        "uneven, sequence": Arm({"kl_level": "sequence"}, (0.3,), 6, ("uneven",)),
        "uneven, batch": Arm({"kl_level": "batch"}, (0.3,), 6, ("uneven",)),
        "sequence": Arm({"kl_level": "sequence"}), "token, λ 0.95": Arm({"lam": 0.95}),
        "sequence, λ 0.95": Arm({"kl_level": "sequence", "lam": 0.95}),
        "k2 in the loss": Arm(how=("kl_in_loss",))}
    uneven = {label: arm for label, arm in arms.items() if "uneven" in label}
    even = {label: arm for label, arm in arms.items() if label not in uneven}
    draw("kl_level", {label: arm.curves() for label, arm in arms.items()})
    text = frontier_table(uneven, **{"spread over prompts": "spread"}) + "\n\n" + frontier_table(even)
    roots = [{i: math.sqrt(kl) for i, kl in uneven[f"uneven, {level}"].at_beta(0.3, "kl").items()}
             for level in ("batch", "sequence")]
    return compare("√KL at β 0.3, batch less sequence", *roots), text


def value():
    """A shared trunk saves computation.

    Decides: seconds of an iteration, separate divided by shared, less 1. Beside it, gold at the same KL.
    """
    arms = yield {
        "shared": DEFAULT, "shared, head at zero": Arm({"value_head": "zero"}),
        "separate": Arm({"value": "separate"}), "from the preference model": Arm({"value": "preference"}),
        "seconds": Arm({}, (0.3,), 6, ("turns",))}
    seconds = arms["seconds"]
    shown = {label: arm for label, arm in arms.items() if arm is not seconds}
    draw("value", {label: arm.curves() for label, arm in shown.items()})
    text = frontier_table(shown, **{"explained variance, 2nd half": "explained_variance",
                                    "parameters": "parameters"})
    rows = [[f"{r['shared']:.2f}", f"{r['separate']:.2f}", f"{r['ratio']:.2f}"]
            for r in seconds.results.values()]
    text += "\n\n" + markdown(["seconds of an iteration, shared", "separate", "ratio"], rows)
    ratio = seconds.at_beta(0.3, "ratio")
    return compare("seconds of an iteration, separate / shared, less 1", ratio,
                   dict.fromkeys(ratio, 1.0)), text


def reference():
    """The reference costs a forward pass for every response.

    Decides: the pass's share of an iteration's time, less a twentieth. Beside it, a second round that starts
    from the first one's policy, against the old reference and against that policy; KL is to the old one.
    """
    arms = yield {"one round": DEFAULT, "second, old reference": Arm(how=("second_round", "old")),
                  "second, new reference": Arm(how=("second_round", "new"))}
    draw("reference", {label: arm.curves() for label, arm in arms.items()})
    text = frontier_table(arms, **{"nats a token of the grammar's": "forgotten"})
    found = arms["one round"].at_beta(0.3, "reference_share")
    return compare("share of the time, less 0.05", found, dict.fromkeys(found, 0.05)), text


def estimator():
    """k1 is the KL to charge in the reward: it does better than k3.

    Decides: gold at the same KL, k1 less k3.
    """
    arms = yield {
        "k1": DEFAULT, "k3": Arm({"kl_estimator": "k3"}, (0.6, 1.2, 2.4), 6), "best of n": BEST,
        "k2": Arm({"kl_estimator": "k2"}, (0.6, 1.2, 2.4)), "errors": Arm({}, (0.3,), 3, ("estimators",))}
    kinds = {kind: arms[kind] for kind in ("k1", "k2", "k3")}
    draw("estimator", {kind: arm.curves() for kind, arm in kinds.items()}, best=arms["best of n"])
    errors = arms["errors"]
    columns = [f"{place} {what}" for place in ("near", "far") for what in ("bias", "spread")]
    rows = [[kind, *(mean_and_std(errors.at_beta(0.3, f"{kind} {column}").values()) for column in columns)]
            for kind in kinds if errors.results]
    text = frontier_table(kinds) + "\n\n" + markdown(["in units of the exact KL of a token", *columns], rows)
    return compare(f"gold at {AT_KL} nats, k1 less k3", kinds["k1"].at_kl(), kinds["k3"].at_kl()), text


def dense():
    """An AI reward can be had for every prefix, and dense feedback helps.

    Decides: gold at the same KL, dense less terminal. Explained variance is not comparable: with a dense
    reward there is less left to explain.
    """
    dense = {"dense_reward": True}
    arms = yield {"terminal": DEFAULT, "dense": Arm(dense, runs=6), "best of n": BEST,
                  "dense, fitted to prefixes": Arm({**dense, "preference": "cut_off"})}
    shown = {label: arm for label, arm in arms.items() if label != "best of n"}
    draw("dense", {label: arm.curves() for label, arm in shown.items()}, best=arms["best of n"])
    return compare(f"gold at {AT_KL} nats, dense less terminal", arms["dense"].at_kl(),
                   arms["terminal"].at_kl()), frontier_table(shown)


def stale():
    """AI feedback goes stale: the further the policy, the less the preference model knows of its replies.

    Decides: agreement with gold on pairs of the first policy's replies, less of the last one's (β 0.15), at
    the same sizes of the gold difference. Beside it, what it gives to fit on; what that does to the policy:
    `renewal`.
    """
    arms = yield {"aged": Arm({}, (0.15,), 6, ("aged",)), "refitted": Arm({}, (0.15,), 3, ("refitted",))}
    aged, refits = arms["aged"], list(arms["refitted"].results.values())
    draw("stale", {f"{which} policy": {i: [(i, result[which])] for (_, i), result in aged.results.items()}
                   for which in ("first", "last")}, "run", "agreement with gold", at_kl=False)
    names = ["pairs", "first, its own sizes", "first", "last"]
    text = markdown(["run", *names], [[str(i), *(f"{result[name]:.3g}" for name in names)]
                                      for (_, i), result in sorted(aged.results.items())])
    if refits:
        rows = [[how, *(mean_and_std([result[f"{how}, {which}"] for result in refits], 3)
                        for which in ("first", "last"))]
                for how in ("as it was", "new pairs alone", "old and new", "old and new, centred")]
        text += "\n\n" + markdown(["fitted on to", "first policy's pairs", "last policy's pairs"], rows)
    return compare("agreement with gold, first policy less last", aged.at_beta(0.15, "first"),
                   aged.at_beta(0.15, "last")), text


def direct():
    """The judge itself can give the reward, with no preference model between.

    Decides: gold at the same KL, judge (one principle a comparison) less preference model.
    """
    arms = yield {"preference model": DEFAULT, "best of n": BEST,
                  "judge, one principle": Arm({}, (0.04, 0.07, 0.15), 6, ("judged_directly", "one")),
                  "judge, all principles": Arm({}, (0.05, 0.08, 0.15, 0.3), 3, ("judged_directly", "all"))}
    shown = {label: arm for label, arm in arms.items() if label != "best of n"}
    draw("direct", {label: arm.curves() for label, arm in shown.items()}, best=arms["best of n"])
    return compare(f"gold at {AT_KL} nats, judge (one principle) less preference model",
                   arms["judge, one principle"].at_kl(),
                   arms["preference model"].at_kl()), frontier_table(shown)


def gae():
    """λ trades bias for variance.

    Decides: of the gradient of one response, with a critic that has learned, the smaller of two differences:
    bias at λ 0 less at λ 1, and spread at λ 1 less at λ 0, in lengths of the true gradient.
    """
    arms = yield {"λ 1": DEFAULT, "λ 0.95": Arm({"lam": 0.95}), "λ 0": Arm({"lam": 0.0}, (0.3,)),
                  "gradient": Arm({}, (0.5,), 6, ("credit",))}
    found = {i: result for (_, i), result in arms["gradient"].results.items()}
    both, lams = ("bias", "spread"), ("0", "0.5", "0.8", "0.95", "1")
    draw("gae", {what: {i: [(float(lam), r[f"{what} {lam}"]) for lam in lams] for i, r in found.items()}
                 for what in both}, "λ", "in lengths of the true gradient", at_kl=False)
    rows = [[what, *(mean_and_std(r[f"{what} {lam}"] for r in found.values()) for lam in lams)]
            for what in both if found]
    text = markdown(["gradient of one response", *(f"λ {lam}" for lam in lams)], rows) + "\n\n"
    text += frontier_table({label: arm for label, arm in arms.items() if label != "gradient"})
    less = {i: min(r["bias 0"] - r["bias 1"], r["spread 1"] - r["spread 0"]) for i, r in found.items()}
    return compare("the smaller of: bias, λ 0 less λ 1; spread, λ 1 less λ 0", less,
                   dict.fromkeys(less, 0.0)), text


def clip():
    """PPO's clipped minibatch steps use samples better than plain policy gradient.

    Decides: gold at the same KL after as many episodes, PPO less REINFORCE (one step a batch, no clip) at 2
    or 4 times PPO's learning rate, whichever is better in that run: 1 and 8 had less gold in a trial.
    """
    def plain(times):
        return {"clip": math.inf, "stop_kl": math.inf, "minibatch_size": 64, "learning_rate": times * 1e-3}
    epochs = {"ppo_epochs": 4, "stop_kl": math.inf}
    arms = yield {
        "PPO": DEFAULT, "best of n": BEST,
        **{f"REINFORCE × {k}": Arm(plain(k), runs=6) for k in (2, 4)},
        **{f"REINFORCE × {k}": Arm(plain(k), (0.3,)) for k in (1, 8)},
        "4 epochs": Arm(epochs), "4 epochs, no clip": Arm({**epochs, "clip": math.inf})}
    shown = {label: arm for label, arm in arms.items() if label != "best of n"}
    draw("clip", {label: arm.curves() for label, arm in shown.items()}, best=arms["best of n"])
    two, four = (arms[f"REINFORCE × {k}"].at_kl() for k in (2, 4))
    best = {i: max(two.get(i, -math.inf), four.get(i, -math.inf)) for i in two | four}
    return compare(f"gold at {AT_KL} nats, PPO less REINFORCE", arms["PPO"].at_kl(), best), frontier_table(
        shown)


def exact():
    """PPO finds the optimum of the KL-regularised objective.

    Decides: in the enumerable world at β 0.5 (rewards have a std of 2), the share of the way to the exact
    optimum that is gone, less 0.95. Beside it, what each choice makes of the gradient.
    """
    arms = yield {"end": Arm({}, (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0), 6, ("exact_end",)),
                  "gradients": Arm({}, (0.5,), 6, ("gradients",))}
    end, found = arms["end"], list(arms["gradients"].results.values())
    curves = {i: sorted((math.log10(beta), result["gap_closed"])
                        for (beta, j), result in end.results.items() if j == i) for i in range(end.runs)}
    draw("exact", {"PPO": curves}, "log₁₀ of β", "share of the way to the optimum", at_kl=False)
    names = ["reward", "best_reward", "kl", "best_kl", "gap_closed"]
    rows = [[f"{beta:g}", *(mean_and_std(end.at_beta(beta, name).values()) for name in names)]
            for beta in end.betas if end.at_beta(beta, "kl")]
    text = markdown(["β", *names], rows)
    if found:
        labels = [name.removesuffix(": cosine") for name in found[0] if name.endswith(": cosine")]
        text += "\n\n" + markdown(["expected gradient", "cosine with that of J", "length"], [
            [label, *(mean_and_std(r[f"{label}: {what}"] for r in found) for what in ("cosine", "length"))]
            for label in labels])
    closed = end.at_beta(0.5, "gap_closed")
    return compare("share of the gap closed at β 0.5, less 0.95", closed, dict.fromkeys(closed, 0.95)), text


# %% AI feedback that goes wrong: from a flaw planted in the judge to the policy


# The default again, since its first runs did not count flattery, and looked at by `alarms`.
SOUND = Arm({"preference": "all_answers"}, runs=6, how=("alarmed",))


def bent(flaw, strength, runs=3):
    """PPO on a preference model fitted to the labels that `flawed` gives."""
    return Arm({"preference": f"flawed {flaw} {strength}"}, runs=runs)


def flaw_report(name, arms, shown="gold", label="gold"):
    """The picture and the table of a planted flaw, by the measured number that shows it."""
    draw(name, {arm: arms[arm].curves(shown) for arm in arms}, ylabel=label)
    return frontier_table(arms, **{label: shown})


def position():
    """A judge that prefers what stands first spoils the policy, and asking in both orders mends it.

    Decides: gold at the same KL, both orders less one, with 3 nats of log-odds for the first reply.
    """
    arms = yield {"no flaw": DEFAULT, "1, one order": bent("position", "1"),
                  "3, one order": bent("position", "3", 6), "3, both orders": bent("position", "3 both", 6)}
    return compare(f"gold at {AT_KL} nats, both orders less one", arms["3, both orders"].at_kl(),
                   arms["3, one order"].at_kl()), flaw_report("position", arms)


def length():
    """A judge that likes long replies makes the policy write long ones.

    Decides: tokens of a reply at the same KL, with 0.6 nats of log-odds for a word more, less without.
    """
    arms = yield {"no flaw": DEFAULT, "0.2 a word": bent("length", "0.2"),
                  "0.6 a word": bent("length", "0.6", 6),
                  "0.6, taken out of the score": Arm({"preference": "flawed length 0.6"}, how=("levelled",))}
    return compare(f"tokens of a reply at {AT_KL} nats, flawed less sound",
                   arms["0.6 a word"].at_kl("length"),
                   arms["no flaw"].at_kl("length")), flaw_report("length", arms, "length", "tokens")


def flattery():
    """What flatters the judge, the policy learns to write.

    Decides: share of replies that flatter at the same KL, with 4 nats of log-odds for them, less without.
    """
    arms = yield {"no flaw": SOUND, "2": bent("flattery", "2"), "4": bent("flattery", "4", 6),
                  "2, a principle against it": bent("flattery", "2 principle")}
    return compare(f"share that flatters at {AT_KL} nats, flawed less sound", arms["4"].at_kl("flattering"),
                   arms["no flaw"].at_kl("flattering")), flaw_report(
                       "flattery", arms, "flattering", "flatter")


def careless():
    """Noise in the judge's answers costs the policy gold.

    Decides: gold at the same KL, without noise less with noise of std 8 on the log-odds of each answer.
    """
    arms = yield {"no flaw": DEFAULT, "std 4": bent("careless", "4"), "std 8": bent("careless", "8", 6),
                  "std 8, three times the pairs": Arm({"preference": "pooled careless 8"}),
                  **{f"std 8, {how} of three": Arm({"preference": "flawed careless 8"},
                                                   how=("ensemble", how)) for how in ("mean", "minimum")}}
    return compare(f"gold at {AT_KL} nats, sound less careless", arms["no flaw"].at_kl(),
                   arms["std 8"].at_kl()), flaw_report("careless", arms)


def blind():
    """What the judge does not see, the policy does not avoid.

    Decides: share of harmful replies at the same KL, all answers about harm guessed, less none.
    """
    arms = yield {"no flaw": SOUND, "half of them": bent("blind", "0.5"),
                  "all of them": bent("blind", "1", 6)}
    return compare(f"share that is harmful at {AT_KL} nats, blind less sound",
                   arms["all of them"].at_kl("harmful"),
                   arms["no flaw"].at_kl("harmful")), flaw_report("blind", arms, "harmful", "harmful")


def hard():
    """Soft labels teach the policy more than hard ones.

    Decides: gold at the same KL, soft less hard. The model of the hard labels was fitted to the soft ones
    first, so this says too little rather than too much.
    """
    arms = yield {"soft": DEFAULT, "hard": bent("hard", "1", 6)}
    return compare(f"gold at {AT_KL} nats, soft less hard", arms["soft"].at_kl(),
                   arms["hard"].at_kl()), flaw_report("hard", arms)


def flaws():
    """A flaw that is the same every time harms the policy more than noise that spoils more of the labels.

    Decides: gold at the same KL, with noise of std 8 (the labels agree with gold in 0.62 of the pairs) less
    with 0.6 nats for a word more (0.69).
    """
    kinds = {"no flaw": "all_answers", "position 3": "flawed position 3",
             "position 3, both orders": "flawed position 3 both", "length 0.6": "flawed length 0.6",
             "flattery 4": "flawed flattery 4", "careless 8": "flawed careless 8",
             "blind to harm": "flawed blind 1", "hard labels": "flawed hard 1"}
    arms = yield {**{label: DEFAULT if label == "no flaw" else Arm({"preference": kind}, runs=6)
                     for label, kind in kinds.items()},
                  **{f"{label}: judge": Arm({"preference": kind}, (0.3,), 6, ("followed",))
                     for label, kind in kinds.items()}}
    rows, points = [], {}
    for label in kinds:
        judge, gold = arms[f"{label}: judge"], arms[label].at_kl()
        if judge.results and gold:
            labels = judge.at_beta(0.3, "labels")
            points[label] = {i: [(labels[i], gold[i])] for i in gold.keys() & labels.keys()}
            rows.append([label, *map(mean_and_std, (labels.values(), judge.at_beta(0.3, "model").values(),
                                                    gold.values()))])
    draw("flaws", points, "agreement of the labels with gold", f"gold of the policy at {AT_KL} nats",
         at_kl=False)
    return compare(f"gold at {AT_KL} nats, careless 8 less length 0.6", arms["careless 8"].at_kl(),
                   arms["length 0.6"].at_kl()), markdown(
                       ["flaw of the judge", "labels agree with gold", "preference model agrees",
                        f"gold of the policy at {AT_KL} nats"], rows)


def principles():
    """Asking under every principle teaches more than asking under one that is drawn for each pair.

    Decides: gold at the same KL, all less one, with as many questions to the judge: one principle each, for
    four times as many pairs.
    """
    kinds = {"all": "all_answers", "one, as many questions": "drawn 4", "one, as many pairs": "drawn 1"}
    arms = yield {"all": DEFAULT, "one, as many questions": Arm({"preference": "drawn 4"}, runs=6),
                  "one, as many pairs": Arm({"preference": "drawn 1"}),
                  **{f"{label}: fit": Arm({"preference": kind}, (0.3,), 5, ("followed",))
                     for label, kind in kinds.items()}}
    shown = {label: arms[label] for label in kinds}
    draw("principles", {label: arm.curves() for label, arm in shown.items()})
    fits = {label: arms[f"{label}: fit"] for label in kinds}
    names = ["labels", "model", "worst topic"]
    text = markdown(["five fits", "labels agree with gold", "preference model agrees",
                     "score of the best reply, worst topic"],
                    [[label, *(mean_and_std(fit.at_beta(0.3, name).values()) for name in names)]
                     for label, fit in fits.items() if fit.results])
    return compare(f"gold at {AT_KL} nats, all less one", arms["all"].at_kl(),
                   arms["one, as many questions"].at_kl()), f"{text}\n\n{frontier_table(shown)}"


def renewal():
    """Feedback that is renewed while the policy moves teaches it more, with as many pairs and iterations.

    Decides: gold at the same KL, two rounds less one. Beside it what there is to gain, by the truth itself as
    the score, and what renewal does without a price of KL.
    """
    prices = 0.2, 0.3, 0.4  # the same, so that a straight line takes as much from each
    arms = yield {
        "one round": Arm({}, prices, 6),
        "two rounds": Arm({"preference": "share 2048"}, prices, 6, ("renewed", 2)),
        "four rounds": Arm({"preference": "share 1024"}, prices, 3, ("renewed", 4)),
        "the truth": Arm({}, (0.1, 0.2, 0.4), 3, ("told",)),
        "one round, no price": Arm({"iterations": 110}, (0.0,), 6, ("watched",)),
        "four rounds, no price": Arm({"preference": "share 1024", "iterations": 110}, (0.0,), 3,
                                     ("renewed", 4))}
    draw("renewal", {label: arm.curves() for label, arm in arms.items() if "no price" not in label})
    free = compare("", *(arms[f"{rounds}, no price"].at_beta(0.0) for rounds in ("four rounds", "one round")))
    text = f"{frontier_table(arms)}\n\nWithout a price, gold of four rounds less one: {free.numbers()}."
    return compare(f"gold at {AT_KL} nats, two rounds less one", arms["two rounds"].at_kl(),
                   arms["one round"].at_kl()), text


def levels(looks):
    """How loud each alarm is at each look: KL, score and the committee's spread as they are; the length, how
    far it is from its first; the others, how far they fell from their highest -> {name: list}."""
    column = {name: [look[k] for look in looks] for k, name in enumerate(SEEN) if name != "gold"}
    for name in ("entropy", "distinct", "judge", "agreement"):
        column[name] = [max(column[name][:k + 1]) - x for k, x in enumerate(column[name])]
    column["length"] = [abs(x - column["length"][0]) for x in column["length"]]
    return column


def alarms():
    """What a user can see without the truth says when to stop a policy that cheats.

    An alarm rings at the first look at which it is louder than it ever was in 24 runs that do not cheat: 18
    at a price, and 6 that drift without one, trained on the truth itself. Decides, at β 0: gold where it
    rings, less gold at the end; the alarm is the one that gains most in the other five runs. Beside it, how
    long before gold turns down each rings, also where the judge has a flaw.
    """
    free = {"preference": "all_answers", "iterations": 110}
    kinds = "position 3", "length 0.6", "flattery 4", "careless 8", "blind 1", "hard 1"
    arms = yield {"sound": SOUND, "trained on gold": Arm(free, (0.0,), 6, ("alarmed", "gold")),
                  "no flaw": Arm(free, (0.0,), 6, ("alarmed",)),
                  **{flaw: Arm({**free, "preference": f"flawed {flaw}"}, (0.0,), how=("alarmed",))
                     for flaw in kinds}}
    looks = {label: [(i, result["looks"]) for (_, i), result in sorted(arm.results.items())]
             for label, arm in arms.items()}
    honest = [levels(seen) for label in ("sound", "trained on gold") for _, seen in looks[label]]
    limits = {name: max((max(level[name]) for level in honest), default=math.inf) or 1e-9  # 0 in --quick
              for name in SEEN[1:]}

    def ring(name, seen):
        """The look at which an alarm rings; -1, the last one, if it never does."""
        return next((k for k, loud in enumerate(levels(seen)[name]) if loud > limits[name]), -1)

    def lead(name, label):
        """In how many runs an alarm rings, and how many iterations before gold is at its highest."""
        at = [(ring(name, seen), [look[0] for look in seen]) for _, seen in looks[label]]
        early = [LOOK_EVERY * (gold.index(max(gold)) - k) for k, gold in at if k >= 0]
        return f"{len(early)} of {len(at)}" + (f", {statistics.mean(early):+.0f}" if early else "")
    gained = {name: {i: seen[ring(name, seen)][0] - seen[-1][0] for i, seen in looks["no flaw"]}
              for name in limits}
    best = {i: max(gained, key=lambda name: sum(gained[name].values()) - gained[name][i])
            for i, _ in looks["no flaw"]}
    gain = {i: gained[name][i] for i, name in best.items()}
    curves = {"gold": {i: [(LOOK_EVERY * (k + 1), look[0]) for k, look in enumerate(seen)]
                       for i, seen in looks["no flaw"]},
              **{f"{name}, rings at 1": {i: [(LOOK_EVERY * (k + 1), x / limits[name])
                                             for k, x in enumerate(levels(seen)[name])]
                                         for i, seen in looks["no flaw"]} for name in ("score", "committee")}}
    draw("alarms", curves, "iteration at β 0", "gold; alarms by what they ring at", at_kl=False)
    shown = [label for label in ("no flaw", *kinds) if looks[label]]
    text = markdown(["alarm", "rings above", "gold there, less at the end", *shown],
                    [[name, f"{limits[name]:.2f}", mean_and_std(gained[name].values()),
                      *(lead(name, label) for label in shown)] for name in limits if gain])
    peaks = "; ".join(f"{label}: " + ", ".join(f"{max(look[0] for look in seen):.2f} → {seen[-1][0]:.2f}"
                                               for _, seen in looks[label]) for label in shown)
    drift = ", ".join(f"{max(look[1] for look in seen):.1f}" for _, seen in looks["trained on gold"])
    text += (f"\n\nGold of the batches, highest → last. {peaks}.\n\n"
             f"Highest KL of those trained on gold: {drift}.")
    chosen = ", ".join(sorted(set(best.values())))
    return compare(f"gold where the best alarm ({chosen}) rings, less at the end", gain,
                   dict.fromkeys(gain, 0)), text


EXPERIMENTS = (beta, whitening, kl_level, value, reference, estimator, dense, stale, direct, gae, clip,
               exact, position, length, flattery, careless, blind, hard, flaws, alarms, principles,
               renewal)


# %% The command


def key(job):
    return json.dumps([job["how"], sorted(job["settings"].items()), job["i"]])


def load_results():
    """The runs that are done: key -> what was measured. A line cut short by an interruption is left out."""
    done = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []:
        with contextlib.suppress(ValueError):
            job = json.loads(line)
            done[key(job)] = job["measured"]
    return done


def work(job):
    """Make one run, in a process of its own -> the job and what it measured."""
    name, *further = job["how"]
    measured = globals()[name](job["i"], dict(job["settings"]), *further)
    return {**job, "measured": {k: round(v, 5) if isinstance(v, float) else v for k, v in measured.items()}}


def stages(jobs):
    """What the jobs need first, as calls, so that each thing is made once and by one process -> [(name, list
    of (function, arguments))]: pairs and labels, preference models without a flaw, the others, policies."""
    pairs, models, policies = set(), set(), set()
    for job in jobs:
        i, name, settings = job["i"], job["how"][0], job["settings"]
        kind = settings.get("preference", "all_answers")
        near = {i if i < 0 else (i + k) % 6 for k in range(3)}
        models |= {(k, kind) for k in (near if name in ("ensemble", "alarmed") else {i})}
        pairs |= {k for k, _ in models} | (near if name == "followed" or "pooled" in kind else set())
        if name in ("second_round", "estimators", "aged", "refitted"):
            policies.add((i, settings["beta"] if name in ("aged", "refitted") else 0.3))
    return [("labels", [(feedback, i) for i in sorted(pairs)]),
            ("preference models", [(preference_folder, i) for i in sorted({i for i, _ in models})]),
            ("other preference models", [(preference_folder, *model) for model in sorted(models)]),
            ("policies", [(trained_policy, *policy) for policy in sorted(policies)])]


def make_runs(jobs, done, workers, file=None):
    """Make the runs that are not done yet, a few at a time under a progress bar; each becomes a line."""
    os.environ["TQDM_DISABLE"] = "1"  # of the workers' own bars
    todo = [job for name, job in jobs.items() if name not in done]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads,
                             (1,)) as pool:
        for name, calls in [*stages(todo), ("runs", [(work, job) for job in todo])]:
            futures = [pool.submit(*call) for call in calls]
            try:
                for future in tqdm(as_completed(futures), name, len(futures), disable=not futures):
                    job = future.result()
                    if name == "runs":
                        done[key(job)] = job["measured"]
                    if name == "runs" and file:
                        file.write(json.dumps(job) + "\n")
                        file.flush()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what was not begun would never be written
                raise


def plan(experiments, quick):
    """Begin the experiments -> {name: (generator, its arms)}, and all runs that they need, each once: key ->
    job, those of the comparisons that decide first."""
    begun, jobs = {}, {}
    for experiment in experiments:
        generator = experiment()
        arms = next(generator)
        if quick:
            arms = {label: replace(arm, settings={**arm.settings, "iterations": 8}, first=-1, runs=1,
                                   betas=arm.betas[len(arm.betas) // 2:][:1]) for label, arm in arms.items()}
        begun[experiment.__name__] = generator, arms
    everything = [arm for _, arms in begun.values() for arm in arms.values()]
    for arm in sorted(everything, key=lambda arm: -arm.runs):
        jobs |= {key(job): job for job in arm.jobs()}
    return begun, jobs


def conclude(generator, arms, done):
    """Give an experiment its arms back, with all results that are there -> Verdict, tables."""
    for arm in arms.values():
        jobs = {(job["settings"]["beta"], job["i"]): done.get(key(job)) for job in arm.jobs()}
        arm.results = {at: measured for at, measured in jobs.items() if measured}
    try:
        generator.send(arms)
    except StopIteration as end:
        return end.value


def write_between(text, name, new):
    """Put `new` between two markers of README.md's text; what is written around them stays."""
    head, rest = text.split(f"<!-- {name} -->\n", 1)
    return f"{head}<!-- {name} -->\n{new}\n<!-- end {name} -->{rest.split(f'<!-- end {name} -->', 1)[1]}"


def main():
    """Make what runs are missing, then print and write verdicts and tables, and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[e.__name__ for e in EXPERIMENTS], help="one experiment")
    parser.add_argument("--quick", action="store_true",
                        help="one run of eight iterations at one price of every arm, on the shipped "
                             "preference model; it proves nothing, and writes nothing")
    parser.add_argument("--report", action="store_true", help="make no run: report on those that are done")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one core")
    args = parser.parse_args()
    begun, jobs = plan([e for e in EXPERIMENTS if args.only in (None, e.__name__)], args.quick)
    done = {} if args.quick else load_results()
    KEPT.mkdir(parents=True, exist_ok=True)
    if args.quick:
        global FIGURES
        FIGURES = KEPT
        make_runs(jobs, done, args.workers)
    elif not args.report:
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write("" if RESULTS.read_text(encoding="utf-8").endswith("\n") else "\n")
            make_runs(jobs, done, args.workers, file)
    print(f"{len(jobs.keys() & done.keys())} of {len(jobs)} runs are done")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = []
    for name, (generator, arms) in begun.items():
        verdict, tables = conclude(generator, arms, done)
        claim = globals()[name].__doc__.splitlines()[0]
        if not args.quick and not verdict.differences:
            readme = write_between(readme, name, "Not run yet.")
            continue
        rows.append([f"[`{name}`](#{name}) {claim}", f"**{verdict}**",
                     f"{verdict.compared}: {verdict.numbers()}", f"[curves](figures/{name}.png)"])
        print(f"\n{claim}\n{verdict}: {verdict.compared}: {verdict.numbers()}\n\n{tables}")
        if not args.quick:
            readme = write_between(readme, name, tables)
    if args.quick:
        print("\nOne run of eight iterations an arm: this shows that everything runs, and proves nothing.")
    else:
        if not args.only:
            readme = write_between(readme, "verdicts", markdown(
                ["claim", "verdict", "the difference that decides, with its 95 % interval", "picture"], rows))
        (FOLDER / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
