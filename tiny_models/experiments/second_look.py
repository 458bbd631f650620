"""A second look at the same runs. What is compared here was named after the first look, some of it by readers
who doubted a verdict: it corrects what is said of a claim, and changes no verdict.
"""

import math
import statistics

from tiny_models.experiments.alarms import FLAWS, first_ring, kept, loudest
from tiny_models.experiments.protocol import AT_KL, DEFAULT, Arm, compare, interpolate
from tiny_models.experiments.runs import LOOK_EVERY
from tiny_models.experiments.tables import mean_and_std, markdown

EVERY_PRICE = (0.15, 0.2, 0.3, 0.4, 0.6)  # at which the default was run
DOUBTED = {  # arms that a straight line between two prices may wrong
    "value": ("shared, head at zero", "separate", "from the preference model"),
    "kl_level": ("sequence", "k2 in the loss"), "estimator": ("k3",), "clip": ("REINFORCE × 2", "4 epochs"),
    "dense": ("dense", "dense, fitted to prefixes"),
    "direct": ("judge, one principle", "judge, all principles"), "principles": ("one, as many questions",),
    "position": ("3, one order", "3, both orders"), "length": ("0.2 a word", "0.6 a word"),
    "flattery": ("4", "2, a principle against it"), "careless": ("std 8",), "blind": ("all of them",),
    "hard": ("hard",)}


def second_look(verdicts, arms, done):
    """Verdicts and arms by claim, the arms with their results, and all results -> Markdown."""
    default = Arm(betas=EVERY_PRICE, runs=6)
    default.read(done)
    parts = (own_points(arms, default), stops(arms["alarms"]), other_ways(arms, default), several(verdicts))
    return "\n\n".join(parts)


def own_points(arms, default):
    """Gold of an arm's own point nearest AT_KL, less the default's at that KL. The line between two points of
    an arm lies below its curve, the more so the further they are apart; here only the default has a line, and
    its points are near each other."""
    rows = []
    for claim, labels in DOUBTED.items():
        for label in labels:
            near = {i: min(points, key=lambda point: abs(point[0] ** 2 - AT_KL))
                    for i, points in arms[claim][label].curves().items()}
            if not near:
                continue
            there = {i: interpolate(default.curves()[i], root) for i, (root, _) in near.items()}
            less = compare("", {i: gold for i, (_, gold) in near.items() if there[i] is not None}, there)
            by_line = compare("", arms[claim][label].at_kl(), DEFAULT.at_kl())
            rows.append([f"`{claim}`: {label}", mean_and_std([root ** 2 for root, _ in near.values()], 1),
                         less.numbers(), by_line.numbers()])
    return markdown(["gold less the default's", "KL there", "at the arm's own point nearest 3.7 nats",
                     "at 3.7 nats, on its line (as in the tables below)"], rows)


def stops(arms):
    """The gold that is kept by stopping a run at β 0, where nobody knows gold: by a limit on the KL, by the
    best of the alarms, at the iteration that is best in the other five runs, and anywhere."""
    free, sound, on_gold = ([result["looks"] for _, result in sorted(arms[label].results.items())]
                            for label in ("no flaw", "sound", "trained on gold"))
    flawed = [result["looks"] for flaw in FLAWS for result in arms[flaw].results.values()]
    quiet = loudest(sound + on_gold)["committee"]
    limits = {**{f"KL above {limit} nats": ("KL", limit) for limit in (6, 9, 12, 15)},
              f"committee above {quiet:.2f}": ("committee", quiet)}

    def best_of_others(looks):
        others = [run for run in free if run is not looks]
        return max(range(len(looks)), key=lambda k: sum(kept(run, k) for run in others))
    iterations = sorted({LOOK_EVERY * (best_of_others(looks) + 1) for looks in free})
    rules = {"the highest gold, which nobody knows": lambda looks: looks.index(max(looks)),
             **{name: lambda looks, limit=limit: first_ring(looks, *limit) for name, limit in limits.items()},
             f"iteration {', '.join(map(str, iterations))}, best in the other five": best_of_others}
    rows = []
    for name, rule in rules.items():
        row = [name, *(mean_and_std(kept(looks, rule(looks)) for looks in runs) for runs in (free, flawed))]
        for honest in (sound, on_gold):
            rings = [first_ring(looks, *limits[name]) >= 0 for looks in honest if name in limits]
            row.append(f"{sum(rings)} of {len(rings)}" if rings else "-")
        rows.append(row)
    anywhere = [mean_and_std(statistics.mean(look[0] for look in looks) - looks[-1][0] for looks in runs)
                for runs in (free, flawed)]
    return markdown(["stop at β 0 at", "gold kept, no flaw", "with a flaw", "rings at a price",
                     "rings when trained on gold"], [*rows, ["a look at random", *anywhere, "-", "-"]])


def other_ways(arms, default):
    """A price, or no price and an early stop; PPO, or best of n, whose KL is at most what is said; λ 1 or
    0.95; and what is made of a careless judge by three times the questions."""
    free = {i: [(math.sqrt(look[1]), look[0]) for look in result["looks"]]
            for (_, i), result in arms["alarms"]["no flaw"].results.items()}
    stopped = {i: interpolate(points, math.sqrt(AT_KL)) for i, points in free.items()}
    best = {i: result["best"][-1] for (_, i), result in arms["beta"]["best of n"].results.items()}
    nats = max(root for root, _ in best.values()) ** 2
    best_of_64 = {i: gold for i, (_, gold) in best.items()}
    credit = {i: result for (_, i), result in arms["gae"]["gradient"].results.items()}
    bias = {i: result["bias 0.95"] - result["bias 1"] for i, result in credit.items()}
    spread = {i: 100 * (result["spread 1"] / result["spread 0.95"] - 1) for i, result in credit.items()}
    found = {f"gold at β 0 where its batches pass {AT_KL} nats, less at β 0.3": (stopped, DEFAULT.at_kl()),
             f"gold of best of 64, less PPO's at {nats:.1f} nats": (best_of_64, default.at_kl(kl=nats)),
             "bias of the gradient at λ 0.95, less at λ 1": (bias, dict.fromkeys(bias, 0)),
             "spread of the gradient at λ 1, % more than at λ 0.95": (spread, dict.fromkeys(spread, 0))}
    noisy = arms["careless"]["std 8"]
    for label, arm in arms["careless"].items():
        if label.startswith("std 8, "):
            found[f"gold, {label}, less std 8 alone in the same runs"] = arm.at_kl(), noisy.at_kl()
    return markdown(["other ways", "difference, with its 95 % interval"],
                    [[name, compare("", *both).numbers()] for name, both in found.items()])


def several(verdicts):
    """Which verdicts are left if one wrong one among all of them is to have a chance of 5 % (Holm 1979)."""
    p_values = sorted((verdict.p_value, claim) for claim, verdict in verdicts.items()
                      if len(verdict.differences) > 1)
    left = []
    for k, (p_value, claim) in enumerate(p_values):
        if p_value > 0.05 / (len(p_values) - k):
            break
        left.append(f"`{claim}`")
    return (f"Of {len(p_values)} intervals {len(left)} keep clear of zero with Holm's correction for their "
            f"number: {', '.join(left)}.")
