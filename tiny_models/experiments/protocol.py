"""How a claim is tested: arms of runs, the runs that are made of them, and the verdict on their difference.

    frontier   An arm is PPO with some settings at several prices of KL. What it gives is a curve, gold over
               KL, on held-out prompts; two arms are compared at the same KL, AT_KL, where the default run
               ends, by interpolation between an arm's own points. An arm that drifts further has more gold,
               whatever else it is.
    steered    Or the price steers itself towards AT_KL, and an arm is one run in place of three. Where its
               held-out KL then is, is read off; along the default's mean curve its gold is moved to AT_KL,
               and compared with that of STEERED, the default steered the same way. A run that ends where the
               default has no points cannot be compared.
    fresh      Run i has seed 1000 + i, which chose no default, and a preference model of its own: pairs,
               labels and fit. So the noise of the AI feedback is in the intervals, and not PPO's alone. (The
               steered arms that compare optimizers all take the shipped preference model; those that ask
               about the feedback have OWN_FEEDBACK in STEERED's place.)
    by rule    The difference of two arms, paired over the runs, with its 95 % interval by Student's t. It
               holds if the whole interval is above zero; the reverse holds if it is below; if neither, but
               all of it is nearer to zero than ENOUGH points of gold, there is no difference that matters;
               else it cannot be told with so many runs. What is so by construction is shown, not tested.
"""

import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from tiny_models.experiments.feedback import (all_answers, few, function_of, judged_pairs, kind_of,
                                              neighbours, pooled, preference_folder, shipped, spelled)
from tiny_models.experiments.measurements import (aged, best_of_n, credit, estimators, exact_end, followed,
                                                  gradients, kl_gradients, refitted, spoiled)
from tiny_models.experiments.runs import alarmed, ensemble, ppo, second_round, trained_policy

RESULTS = pathlib.Path(__file__).parent / "results.jsonl"
AT_KL = 3.7  # nats: where the default run ends, the mean of the ten seeds in tiny_models/README.md
ENOUGH = 0.1  # points of gold
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}  # 97.5 % quantile, by degrees of freedom


# %% Arms


@dataclass
class Arm:
    """PPO with some settings changed, at each of several prices of KL, and the results of its runs."""

    settings: dict = field(default_factory=dict)  # of rlaif.Config; "preference" is the function of labels
    betas: tuple = (0.15, 0.3, 0.6)
    runs: int = 3  # at each price; 6 for the comparison that decides
    make: Callable = ppo  # makes a run of its number and settings; further arguments fixed by keyword
    first: int = 0  # number of the first run
    results: dict = None  # (beta, i) -> dict of what run i measured; filled in once it is run

    @property
    def steered(self):
        """Whether the price steers itself to AT_KL."""
        return self.settings.get("beta_control") == "batch" and "kl_horizon" in self.settings

    def jobs(self):
        return [Job(self.make, {**self.settings, "beta": beta}, i)
                for i in range(self.first, self.first + self.runs) for beta in self.betas]

    def read(self, done):
        """Fill in the results of its runs, of those that are done."""
        jobs = {(job.settings["beta"], job.i): done.get(job.key) for job in self.jobs()}
        self.results = {at: measured for at, measured in jobs.items() if measured}

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
        sides are left out. Of a steered run, which ends near it, what it measures, and gold moved to this KL
        along the default's curve -> {i: number}."""
        if self.steered:
            up = {i: climb(result["kl"], kl) if name == "gold" else 0.0
                  for (_, i), result in self.results.items()}
            return {i: result[name] + up[i] for (_, i), result in self.results.items() if up[i] is not None}
        found = {i: interpolate(points, math.sqrt(kl)) for i, points in self.curves(name).items()}
        return {i: value for i, value in found.items() if value is not None}


def interpolate(points, x):
    """The height at x of the line through points sorted by x; None outside them."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y0
    return None


# What several claims are held against: the default run, the same watched by alarms (its first runs did not
# count flattery), and best of n of the reference.
DEFAULT = Arm(runs=6)
EVERY_PRICE = 0.15, 0.2, 0.3, 0.4, 0.6  # at which the default was run
CURVE = Arm({}, EVERY_PRICE, 6)
STEER = {"beta_control": "batch", "kl_target": AT_KL, "kl_horizon": 200.0}  # found on seed 42, in no arm
STEERED = Arm({**STEER, "preference": shipped}, (0.3,), 6)
OWN_FEEDBACK = Arm({**STEER, "preference": all_answers}, (0.3,), 6, spoiled)  # the same, each run on its own
SOUND = Arm({"preference": all_answers}, runs=6, make=alarmed)
BEST = Arm(betas=(0.3,), runs=6, make=best_of_n)


def climb(kl, to):
    """How much more gold the default run has at one KL than at another, by its mean points at EVERY_PRICE;
    None outside them."""
    at = [[(result["kl"], result["gold"]) for (b, _), result in CURVE.results.items() if b == beta]
          for beta in EVERY_PRICE]
    points = sorted((math.sqrt(statistics.mean(kl for kl, _ in runs)), statistics.mean(g for _, g in runs))
                    for runs in at if runs)
    there, here = interpolate(points, math.sqrt(to)), interpolate(points, math.sqrt(max(kl, 0)))
    return None if there is None or here is None else there - here


def steered(make=ppo, beta=0.3, runs=6, **settings):
    """An arm whose price steers itself, from beta on."""
    return Arm({**STEER, "preference": shipped, **settings}, (beta,), runs, make)


def without(arms, *labels):
    """The arms but for some."""
    return {label: arm for label, arm in arms.items() if label not in labels}


# %% Verdicts


@dataclass
class Verdict:
    """What the claim's one comparison says, by the rule at the top of this file."""

    compared: str
    differences: list  # one for each run that has both sides
    enough: float = 0.0  # a difference smaller than this does not matter
    shown: bool = False  # so by construction, or a number without a claim

    @property
    def interval(self):
        mean, n = statistics.mean(self.differences), len(self.differences)
        half = STUDENT_T[n - 1] * statistics.stdev(self.differences) / math.sqrt(n)
        return mean - half, mean + half

    @property
    def p_value(self):
        """The chance of a mean as far from 0 as this, by Student's t (Abramowitz & Stegun 26.7.3 and 4)."""
        n = len(self.differences) - 1  # degrees of freedom
        t = statistics.mean(self.differences) / (statistics.stdev(self.differences) / math.sqrt(n + 1))
        sine, cosine = abs(t) / math.hypot(t, math.sqrt(n)), math.sqrt(n) / math.hypot(t, math.sqrt(n))
        term = total = cosine if n % 2 else 1.0
        for k in range(2 + n % 2, n - 1, 2):
            term *= (k - 1) / k * cosine ** 2
            total += term
        if n % 2:
            return 1 - 2 / math.pi * (math.asin(sine) + (sine * total if n > 1 else 0))
        return 1 - sine * total

    def __str__(self):
        n = len(self.differences)
        if n < 2:
            return "cannot be told: fewer than two runs with both sides"
        if self.shown:
            return "shown, not tested"
        low, high = self.interval
        if low <= 0 <= high and -self.enough < low and high < self.enough:
            return f"no difference above {self.enough:g}"
        return "holds" if low > 0 else "the reverse holds" if high < 0 else f"cannot be told with {n} runs"

    def numbers(self, digits=2):
        if len(self.differences) < 2:
            return "-"
        numbers = (f"{x:+.{digits}f}" for x in (statistics.mean(self.differences), *self.interval))
        return "{} [{}, {}], {} runs".format(*numbers, len(self.differences))


def compare(compared, more, less, enough=0.0, shown=False):
    """A Verdict on the claim that `more` is above `less`; both {i: number}, paired by run."""
    differences = [more[i] - less[i] for i in sorted(more.keys() & less.keys())]
    return Verdict(compared, differences, enough, shown)


def compare_gold(what, more, less):
    """The same of two arms' gold at the same KL."""
    return compare(f"gold at {AT_KL} nats, {what}", more.at_kl(), less.at_kl(), ENOUGH)


# %% Runs, each a line of results.jsonl


@dataclass
class Job:
    """A run that is to be made: the function, and what it is called with."""

    make: Callable
    settings: dict
    i: int

    def line(self):
        """How results.jsonl names it, its functions by their names -> dict."""
        settings = dict(self.settings)
        if "preference" in settings:
            settings["preference"] = kind_of(settings["preference"])
        return {"how": spelled(self.make), "settings": settings, "i": self.i}

    @property
    def key(self):
        return key(self.line())


def key(line):
    """What tells a run from every other, of its line in results.jsonl -> str."""
    return json.dumps([line["how"], sorted(line["settings"].items()), line["i"]])


def load_results():
    """The runs that are done: key -> what was measured. A line cut short by an interruption is left out."""
    done = {}
    for text in RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            done[key(line)] = line["measured"]
    return done


def work(job):
    """Make one run, in a process of its own -> its line in results.jsonl."""
    measured = job.make(job.i, dict(job.settings))
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in measured.items()}
    return {**job.line(), "measured": rounded}


def stages(jobs):
    """What the jobs need first, as calls, so that each thing is made once and by one process -> [(name, list
    of (function, arguments))]: pairs and labels, preference models without a flaw, the others, policies."""
    pairs, models, alone, policies = set(), {}, {}, set()  # models: (i, name of labels) -> function of labels
    for job in jobs:
        i, made, labels = job.i, function_of(job.make), job.settings.get("preference", all_answers)
        if labels is shipped or made in (exact_end, credit, gradients, kl_gradients):  # need no feedback
            continue
        if function_of(labels) is few:
            alone[i, kind_of(labels)] = labels
            continue
        members = neighbours(i) if made in (ensemble, alarmed) else [i]
        models |= {(k, kind_of(labels)): labels for k in members}
        pairs |= set(members)
        if made in (followed, spoiled) or function_of(labels) is pooled:
            pairs |= set(neighbours(i))
        if made in (second_round, estimators):
            policies.add((i, 0.3))
        if made in (aged, refitted):
            policies.add((i, job.settings["beta"]))
    return [("labels", [(judged_pairs, i) for i in sorted(pairs)]),
            ("preference models", [(preference_folder, i) for i in sorted({i for i, _ in models})]),
            ("other preference models", [(preference_folder, i, models[i, kind])
                                         for models in (models, alone) for i, kind in sorted(models)]),
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
                    line = future.result()
                    if name == "runs":
                        done[key(line)] = line["measured"]
                    if name == "runs" and file:
                        file.write(json.dumps(line) + "\n")
                        file.flush()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what was not begun would never be written
                raise
