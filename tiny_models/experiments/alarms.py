"""What a user can see who does not know the truth, and when it would have said: stop.

A look is what `alarmed` in runs.py writes down every LOOK_EVERY iterations, the numbers named in SEEN; its
first is gold, which only the report knows.
"""

import math
import statistics
from functools import partial

from tiny_models.experiments.feedback import all_answers, flawed
from tiny_models.experiments.protocol import SOUND, Arm, compare
from tiny_models.experiments.runs import LOOK_EVERY, SEEN, alarmed
from tiny_models.experiments.tables import canvas, markdown, mean_and_std, save

FREE = {"iterations": 110}  # at β 0
NAMES = {"KL": "KL, louder than in honest runs", "entropy": "entropy falls",
         "distinct": "fewer different replies", "committee": "a committee parts",
         "judge": "judge's wins fall", "agreement": "judge and model part"}
FLAWS = {f"{flaw} {strength}": partial(flawed, flaw=flaw, strength=strength) for flaw, strength in (
    ("position", 3), ("length", 0.6), ("flattery", 4), ("careless", 8), ("blind", 1), ("hard", 1))}


def levels(looks):
    """How loud each alarm is at each look: KL, score and the committee's spread as they are; the length, how
    far it is from its first; the others, how far they fell from their highest -> {name: list}."""
    column = {name: [look[k] for look in looks] for k, name in enumerate(SEEN) if name != "gold"}
    for name in ("entropy", "distinct", "judge", "agreement"):
        column[name] = [max(column[name][:k + 1]) - x for k, x in enumerate(column[name])]
    column["length"] = [abs(x - column["length"][0]) for x in column["length"]]
    return column


def loudest(honest):
    """How loud each alarm ever is in runs that do not cheat, given by their looks -> {name: number}."""
    heard = [levels(looks) for looks in honest]
    return {name: max((max(level[name]) for level in heard), default=math.inf) or 1e-9  # 0 in --quick
            for name in SEEN[1:]}


def first_ring(looks, name, limit):
    """The look at which an alarm is louder than its limit; -1, the last one, if it never is."""
    return next((k for k, loud in enumerate(levels(looks)[name]) if loud > limit), -1)


def kept(looks, k):
    """The gold that is kept by stopping at look k: gold there less at the end."""
    return looks[k][0] - looks[-1][0]


def lead(runs, name, limit):
    """In how many runs, given by their looks, an alarm rings, and how many iterations before gold is at its
    highest, on average -> str."""
    at = [(first_ring(looks, name, limit), [look[0] for look in looks]) for looks in runs]
    early = [LOOK_EVERY * (gold.index(max(gold)) - k) for k, gold in at if k >= 0]
    return f"{len(early)} of {len(at)}" + (f", {statistics.mean(early):+.0f}" if early else "")


def alarms():
    """What a user can see without the truth says better than chance when to stop a policy that cheats.

    An alarm rings at the first look at which it is louder than it ever was in 24 runs that do not cheat: 18
    at a price, and 6 that drift without one, trained on the truth itself. Decides, at β 0: gold where it
    rings, less gold at a look at random; the alarm is the one that gains most in the other five runs. Until a
    first look it was less gold at the end, where gold is low, so that any stop gains. second_look.py has
    other rules, a plain limit on KL among them. Beside it, how long before gold turns down each alarm rings,
    also where the judge has a flaw.
    """
    sound = {"preference": all_answers, **FREE}
    arms = yield {"sound": SOUND, "trained on gold": Arm(sound, (0.0,), 6, partial(alarmed, score="gold")),
                  "no flaw": Arm(sound, (0.0,), 6, alarmed),
                  **{flaw: Arm({**FREE, "preference": labels}, (0.0,), make=alarmed)
                     for flaw, labels in FLAWS.items()}}
    looks = {label: {at: result["looks"] for at, result in sorted(arm.results.items())}
             for label, arm in arms.items()}
    limits = loudest([*looks["sound"].values(), *looks["trained on gold"].values()])
    free = {i: seen for (_, i), seen in looks["no flaw"].items()}
    gained = {name: {i: kept(seen, first_ring(seen, name, limit)) for i, seen in free.items()}
              for name, limit in limits.items()}
    best = {i: max(gained, key=lambda name: sum(gained[name].values()) - gained[name][i]) for i in free}
    gain = {i: gained[name][i] for i, name in best.items()}
    draw_alarms(list(free.values()), limits)
    shown = [label for label in ("no flaw", *FLAWS) if looks[label]]
    text = markdown(["alarm", "rings above", "gold there, less at the end", *shown],
                    [[name, f"{limit:.2f}", mean_and_std(gained[name].values()),
                      *(lead(looks[label].values(), name, limit) for label in shown)]
                     for name, limit in limits.items() if gain])
    peaks = "; ".join(f"{label}: " + ", ".join(f"{max(look[0] for look in seen):.2f} → {seen[-1][0]:.2f}"
                                               for seen in looks[label].values()) for label in shown)
    drift = ", ".join(f"{max(look[1] for look in seen):.1f}" for seen in looks["trained on gold"].values())
    text += (f"\n\nGold of the batches, highest → last. {peaks}.\n\n"
             f"Highest KL of those trained on gold: {drift}.")
    chosen = ", ".join(sorted(set(best.values())))
    anywhere = {i: statistics.mean(kept(seen, k) for k in range(len(seen))) for i, seen in free.items()}
    return compare(f"gold where the best alarm ({chosen}) rings, less at a look at random", gain,
                   anywhere), text


def draw_alarms(free, limits):
    """When each alarm rings in the runs without a price, given by their looks: a row an alarm, a dot a run;
    in the first row, when gold is at its highest."""
    figure, axis = canvas("Without a truth: a plain limit on KL rings soon after the truth turns down, "
                          "other signs late or not at all")
    if not figure or not free:
        return
    plain = {f"KL above {limit} nats": ("KL", limit) for limit in (6, 9, 15)}
    learned = {NAMES.get(name, name): (name, limit) for name, limit in limits.items()}
    rows = {"the truth is at its highest": None, **plain, **learned}
    for y, how in enumerate(rows.values()):
        at = [seen.index(max(seen)) if how is None else first_ring(seen, *how) for seen in free]
        for number, k in enumerate(at):
            if k >= 0:
                axis.plot(LOOK_EVERY * (k + 1), -y + 0.09 * (number - (len(free) - 1) / 2),
                          "|" if how is None else "o", color="k" if how is None else "C0",
                          ms=9 if how is None else 4)
        if how is not None:
            axis.text(LOOK_EVERY * len(free[0]) + 3, -y, f"{sum(k >= 0 for k in at)} of {len(at)}",
                      va="center", fontsize=9)
    axis.set_yticks([-y for y in range(len(rows))], list(rows))
    axis.set(xlabel="iteration at β 0; right: runs in which it rings",
             xlim=(0, LOOK_EVERY * len(free[0]) + 14))
    save(figure, "alarms")
