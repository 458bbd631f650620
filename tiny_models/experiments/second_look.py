"""A second look at the same runs. What is compared here was named after the first look, some of it by readers
who doubted a verdict: it corrects what is said of a claim, and changes no verdict.
"""

import statistics

from tiny_models.experiments.alarms import FLAWS, first_ring, kept, loudest
from tiny_models.experiments.forest import beside_default, draw_forest, forest_table
from tiny_models.experiments.protocol import CURVE, OWN_FEEDBACK, compare
from tiny_models.experiments.runs import LOOK_EVERY
from tiny_models.experiments.tables import mean_and_std, markdown


def second_look(verdicts, arms):
    """Verdicts and arms by claim, the arms with their results -> Markdown."""
    found = beside_default(arms, CURVE, verdicts)
    draw_forest(found)
    return "\n\n".join((forest_table(found), stops(arms["alarms"]), other_ways(arms), several(verdicts)))


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


def other_ways(arms):
    """λ 1 or 0.95; arms that decided a claim until a first look; and remedies against a judge's flaw."""
    credit = {i: result for (_, i), result in arms["gae"]["gradient"].results.items()}
    bias = {i: result["bias 0.95"] - result["bias 1"] for i, result in credit.items()}
    spread = {i: 100 * (result["spread 1"] / result["spread 0.95"] - 1) for i, result in credit.items()}
    found = {"bias of the gradient at λ 0.95, less at λ 1": (bias, dict.fromkeys(bias, 0)),
             "spread of the gradient at λ 1, % more than at λ 0.95": (spread, dict.fromkeys(spread, 0)),
             "gold, judge under one principle, less preference model": (
                 arms["direct"]["judge, one principle"].at_kl(), OWN_FEEDBACK.at_kl()),
             "gold, dense score of prefixes never seen, less terminal": (
                 arms["dense"]["dense"].at_kl(), OWN_FEEDBACK.at_kl())}
    judges = arms["flaws"]
    for flaw, remedies in {
            "noisy, std 8": ("three times the pairs", "mean of three models", "minimum of three"),
            "likes long replies, 0.6 nats a word": ("length taken out of the score",),
            "likes flattery, 2 nats": ("a principle against it",)}.items():
        found |= {f"gold, judge {flaw}: {remedy}, less without": (
            judges[f"the same, {remedy}"].at_kl(), judges[flaw].at_kl()) for remedy in remedies}
    return markdown(["other ways", "difference, with its 95 % interval"],
                    [[name, compare("", *both).numbers()] for name, both in found.items()])


def several(verdicts):
    """Which verdicts are left if one wrong one among all of them is to have a chance of 5 % (Holm 1979)."""
    p_values = sorted((verdict.p_value, claim) for claim, verdict in verdicts.items()
                      if len(verdict.differences) > 1 and not verdict.shown)
    left = []
    for k, (p_value, claim) in enumerate(p_values):
        if p_value > 0.05 / (len(p_values) - k):
            break
        left.append(f"`{claim}`")
    return (f"Of {len(p_values)} intervals {len(left)} keep clear of zero with Holm's correction for their "
            f"number: {', '.join(left)}.")
