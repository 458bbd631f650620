"""All arms beside the default run, in one table and one picture.

A steered arm is set beside the steered default; where the feedback is the question, beside the one whose
runs have preference models of their own. Any other arm is taken at its own point nearest AT_KL, and the
default, which has five prices, on its line at that KL: a line between two prices lies below a curve, and
would make an arm without a price near AT_KL look worse than it is.
"""

import math
import statistics

from tiny_models.experiments.protocol import (AT_KL, DEFAULT, OWN_FEEDBACK, STEERED, Verdict, compare,
                                              interpolate)
from tiny_models.experiments.tables import canvas, markdown, mean_and_std, save

ARMS = {  # what an outsider would call it: the claim that it belongs to, its label there
    "the truth itself as the score": ("renewal", "the truth"),
    "k1 per reply, not per token": ("kl_level", "sequence"),
    "k3 in the reward": ("estimator", "k3"),
    "k3 in the loss": ("loss", "k3 in the loss"),
    "k2 in the loss": ("loss", "k2 in the loss"),
    "k2 of the reply in the loss": ("loss", "k2 of the reply in the loss"),
    "k2 of the reply in the loss, centred": ("loss", "k2 of the reply, centred in the loss"),
    "no critic: mean of 4 replies (RLOO)": ("critic", "groups of 4, their mean (RLOO)"),
    "no critic: 4 replies, their std": ("critic", "groups of 4, divided by their std"),
    "no critic: GRPO, k3 in the loss": ("critic", "groups of 4, their std, k3 in the loss (GRPO)"),
    "critic with a trunk of its own": ("value", "separate"),
    "critic from the preference model": ("value", "from the preference model"),
    "critic's head at zero": ("value", "shared, head at zero"),
    "GAE with λ 0.95": ("gae", "λ 0.95"),
    "one plain step a batch, twice the rate": ("clip", "REINFORCE × 2, steered"),
    "four passes over a batch": ("clip", "4 epochs"),
    "2,048 labelled pairs, not 4,096": ("labels", "2,048 pairs"),
    "1,024 labelled pairs": ("labels", "1,024 pairs"),
    "512 labelled pairs": ("labels", "512 pairs"),
    "the judge scores, all principles": ("direct", "judge, all principles"),
    "the judge scores, one principle": ("direct", "judge, one principle"),
    "a score for every prefix": ("dense", "dense, fitted to prefixes"),
    "a score for prefixes never seen": ("dense", "dense"),
    "one principle a pair, as many questions": ("principles", "one, as many questions"),
    "one principle a pair, as many pairs": ("principles", "one, as many pairs"),
    "labels in two rounds": ("renewal", "two rounds, steered"),
    "hard labels": ("flaws", "hard labels"),
    "judge prefers the first, asked once": ("flaws", "prefers the first, 3 nats"),
    "judge prefers the first, asked both ways": ("flaws", "the same, asked in both orders"),
    "judge likes long replies": ("flaws", "likes long replies, 0.6 nats a word"),
    "judge likes long replies, length taken out": ("flaws", "the same, length taken out of the score"),
    "judge likes flattery": ("flaws", "likes flattery, 4 nats"),
    "judge likes flattery less": ("flaws", "likes flattery, 2 nats"),
    "judge likes flattery less, a principle against": ("flaws", "the same, a principle against it"),
    "noisy judge": ("flaws", "noisy, std 8"),
    "noisy judge, three times the pairs": ("flaws", "the same, three times the pairs"),
    "noisy judge, mean of three models": ("flaws", "the same, mean of three models"),
    "noisy judge, minimum of three": ("flaws", "the same, minimum of three"),
    "judge that guesses about harm": ("flaws", "guesses about harm")}

OTHERS = {"no price, stopped at 3.7 nats": ("stop", "no price"), "best of 64 replies": ("best_of_n", "64")}
AT_BEST = math.log(64) - 63 / 64  # nats, at most


def beside_default(arms, default, verdicts):
    """Arms by claim, the default at every price, and the claims' verdicts, of which two are such a comparison
    already -> {name: (KL of each run, Verdict, the same on its line or None)}. `compared` in the Verdict: how
    many runs, and of how many, if some ended where the default has no points."""
    stop, best = verdicts["stop"], verdicts["best_of_n"]
    found = {"no price, stopped at 3.7 nats": ([AT_KL], Verdict("", [-d for d in stop.differences]), None),
             "best of 64 replies": ([AT_BEST], Verdict("", best.differences), None)}
    for name, (claim, label) in ARMS.items():
        arm = arms[claim][label]
        if arm.steered:
            held = STEERED if claim in ("loss", "critic", "clip") else OWN_FEEDBACK
            less = compare("", arm.at_kl(), held.at_kl())
            ends, others = ({i: result["kl"] for (_, i), result in x.results.items()} for x in (arm, held))
            both, used = sorted(ends.keys() & others.keys()), len(less.differences)
            less.compared = f"{used} of {len(both)}" if used < len(both) else ""
            found[name] = [ends[i] for i in both], less, None
            continue
        near = {i: min(points, key=lambda point: abs(point[0] ** 2 - AT_KL))
                for i, points in arm.curves().items()}
        there = {i: interpolate(default.curves()[i], root) for i, (root, _) in near.items()}
        less = compare("", {i: gold for i, (_, gold) in near.items() if there[i] is not None}, there)
        found[name] = ([root ** 2 for root, _ in near.values()], less,
                       compare("", arm.at_kl(), DEFAULT.at_kl()))
    return {name: row for name, row in found.items() if len(row[1].differences) > 1}


def forest_table(found):
    """The table of what `beside_default` gives."""
    return markdown(["gold less the default's", "of", "KL there", "at its own point, or steered",
                     f"on its line at {AT_KL} nats"], [
        [name, "`{}`: {}".format(*ARMS.get(name, OTHERS.get(name))), mean_and_std(kl, 1), less.numbers(),
         by_line.numbers() if by_line else "-"] for name, (kl, less, by_line) in found.items()])


def runs_of(less):
    """How many runs a row has: "6", or "3 of 4" where some cannot be compared."""
    return less.compared or str(len(less.differences))


def draw_forest(found):
    """The picture of it: a row an arm, the best above; filled where the price steered itself."""
    figure, axis = canvas("Flawed feedback and a badly charged KL cost truth;\n"
                          "most choices of the optimizer do not matter", (8.0, 9.0))
    if not figure or not found:
        return
    rows = sorted(found.items(), key=lambda row: statistics.mean(row[1][1].differences))
    left = -1.6
    for y, (_, (_, less, by_line)) in enumerate(rows):
        low, high = less.interval
        color = "C2" if low > 0 else "C3" if high < 0 else "gray"
        axis.plot([max(low, left), high], [y, y], color=color, lw=1.6)
        axis.plot(statistics.mean(less.differences), y, "o", color=color, ms=5,
                  mfc="white" if by_line else color)
    axis.axvline(0, color="k", lw=0.8)
    axis.set_yticks(range(len(rows)), [f"{name} ({runs_of(less)})" for name, (_, less, _) in rows],
                    fontsize=8.5)
    axis.set(xlabel="truth, less the default run's at the same KL (3 points at most)",
             ylim=(-0.8, len(rows) - 0.2), xlim=(left, 0.5))
    axis.grid(axis="y", alpha=0.15)
    save(figure, "forest")
