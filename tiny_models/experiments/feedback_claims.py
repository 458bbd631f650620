"""The claims about AI feedback: how to ask, and what a flaw of the judge does to the policy.

Every claim is one function that can be read alone: the claim, what decides, the arms, the picture and the
tables. It yields its arms, is given them back with the results of their runs, and returns Verdict and tables.
"""

import statistics
from functools import partial

from tiny_models import world
from tiny_models.experiments.feedback import all_answers, cut_off, drawn, few, planted, pooled, share
from tiny_models.experiments.measurements import aged, followed, refitted, spoiled, taught
from tiny_models.experiments.protocol import (AT_KL, DEFAULT, OWN_FEEDBACK, Arm, compare, compare_gold,
                                              steered)
from tiny_models.experiments.runs import ensemble, judged_directly, levelled, renewed, told, watched
from tiny_models.experiments.tables import draw, frontier_table, markdown, mean_and_std

# %% How to ask


def dense():
    """An AI reward can be had for every prefix, and dense feedback helps.

    Decides: gold at the same KL, dense less terminal, the dense one of a preference model fitted to prefixes
    too, both steered. Until a first look it was a model that had never seen a prefix, and until a second one
    on the lines between prices. At λ 1 a dense score can change the variance alone, so both are there at λ
    0.95 too, with the model fitted to prefixes.
    """
    every_prefix = {"dense_reward": True}
    arms = yield {"terminal": OWN_FEEDBACK,
                  "dense": steered(runs=3, preference=all_answers, **every_prefix),
                  "dense, fitted to prefixes": steered(preference=cut_off, **every_prefix),
                  "terminal, λ 0.95": steered(runs=3, preference=cut_off, lam=0.95),
                  "dense, λ 0.95": steered(runs=3, preference=cut_off, lam=0.95, **every_prefix)}
    at_95 = compare("", arms["dense, λ 0.95"].at_kl(), arms["terminal, λ 0.95"].at_kl())
    text = f"{frontier_table(arms)}\n\nAt λ 0.95, on one model, dense less terminal: {at_95.numbers()}."
    return compare_gold("dense, fitted to prefixes, less terminal", arms["dense, fitted to prefixes"],
                        arms["terminal"]), text


def direct():
    """The judge itself can give the reward, with no preference model between.

    Decides: gold at the same KL, judge (asked under every principle) less preference model, both steered.
    Until a first look it was the judge under one principle, drawn for each comparison: a noisier number; and
    until a second one on the lines between prices.
    """
    under_one, under_all = (partial(judged_directly, principles=n) for n in ("one", "all"))
    arms = yield {"preference model": OWN_FEEDBACK,
                  "judge, one principle": steered(under_one, 0.07),
                  "judge, all principles": steered(under_all, 0.1)}
    return compare_gold("judge (all principles) less preference model", arms["judge, all principles"],
                        arms["preference model"]), frontier_table(arms)


def principles():
    """Asking under every principle teaches more than asking under one that is drawn for each pair.

    Decides: gold at the same KL, all less one, with as many questions to the judge: one principle each, for
    four times as many pairs.
    """
    as_many_questions, as_many_pairs = partial(drawn, times=4), partial(drawn, times=1)
    shown = {"all": DEFAULT,
             "one, as many questions": Arm({"preference": as_many_questions}, runs=6),
             "one, as many pairs": Arm({"preference": as_many_pairs})}
    fits = {f"{label}: fit": Arm({"preference": labels}, (0.3,), 5, followed)
            for label, labels in zip(shown, (all_answers, as_many_questions, as_many_pairs))}
    arms = yield {**shown, **fits}
    shown = {label: arms[label] for label in shown}
    rows = [[label, *(mean_and_std(arms[f"{label}: fit"].at_beta(0.3, name).values())
                      for name in ("labels", "model", "worst topic"))]
            for label in shown if arms[f"{label}: fit"].results]
    text = markdown(["five fits", "labels agree with gold", "preference model agrees",
                     "score of the best reply, worst topic"], rows)
    return compare_gold("all less one", arms["all"], arms["one, as many questions"]), (
        f"{text}\n\n{frontier_table(shown)}")


def labels():
    """Fewer labelled pairs teach the policy less.

    Decides: gold at the same KL, 4,096 pairs less 512, all of the run's own and steered. Each preference
    model passes 12 times over its pairs. (Until a second look the 4,096 were the shipped model's.)
    """
    arms = yield {"4,096 pairs": OWN_FEEDBACK,
                  **{f"{n:,} pairs": steered(taught, preference=partial(few, n=n))
                     for n in (512, 1024, 2048)}}
    text, curves = frontier_table(arms), {}
    for doubled, label in enumerate(("512 pairs", "1,024 pairs", "2,048 pairs", "4,096 pairs")):
        for i, gold in arms[label].at_kl().items():
            curves.setdefault(i, []).append((doubled, gold))
    draw("labels", {"each a run": {i: points for i, points in curves.items() if len(points) > 2}},
         "The first thousand labels buy most of the truth", "labelled pairs", f"gold at {AT_KL} nats",
         at_kl=False, ticks={0: "512", 1: "1,024", 2: "2,048", 3: "4,096"})
    text += "\n\n" + markdown(["fitted to", "preference model agrees with gold"], [
        [label, mean_and_std(arm.at_beta(0.3, "model" if label == "4,096 pairs" else "agrees").values(), 3)]
        for label, arm in arms.items() if arm.results])
    return compare_gold("4,096 pairs less 512", arms["4,096 pairs"], arms["512 pairs"]), text


def stale():
    """AI feedback goes stale: the further the policy, the less the preference model knows of its replies.

    Decides: agreement with gold on pairs of the first policy's replies, less of the last one's (β 0.15), at
    the same sizes of the gold difference. Beside it, what it gives to fit on; what that does to the policy:
    `renewal`.
    """
    arms = yield {"aged": Arm({}, (0.15,), 6, aged), "refitted": Arm({}, (0.15,), 3, refitted)}
    models, refits = arms["aged"], list(arms["refitted"].results.values())
    names = ["pairs", "first, its own sizes", "first", "last"]
    text = markdown(["run", *names], [[str(i), *(f"{result[name]:.3g}" for name in names)]
                                      for (_, i), result in sorted(models.results.items())])
    if refits:
        text += "\n\n" + markdown(["fitted on to", "first policy's pairs", "last policy's pairs"], [
            [how, *(mean_and_std([result[f"{how}, {which}"] for result in refits], 3)
                    for which in ("first", "last"))]
            for how in ("as it was", "new pairs alone", "old and new", "old and new, centred")])
    return compare("agreement with gold, first policy less last", models.at_beta(0.15, "first"),
                   models.at_beta(0.15, "last")), text


def renewal():
    """Feedback that is renewed while the policy moves teaches it more, with as many pairs and iterations.

    Decides: gold at the same KL, two rounds less one, both steered; until a second look it was on the lines
    between prices. Beside it what there is to gain, by the truth itself as the score, and what renewal does
    without a price of KL.
    """
    prices = 0.2, 0.3, 0.4  # the same, so that a straight line takes as much from each
    half, quarter = ({"preference": partial(share, n=n)} for n in (2048, 1024))
    twice, four_times = (partial(renewed, rounds=rounds) for rounds in (2, 4))
    arms = yield {
        "one round": Arm({}, prices, 6), "two rounds": Arm(half, prices, 6, twice),
        "four rounds": Arm(quarter, prices, 3, four_times), "the truth": Arm({}, (0.1, 0.2, 0.4), 3, told),
        "one round, no price": Arm({"iterations": 110}, (0.0,), 6, watched),
        "four rounds, no price": Arm({**quarter, "iterations": 110}, (0.0,), 3, four_times),
        "one round, steered": OWN_FEEDBACK, "two rounds, steered": steered(twice, **half)}
    free = "one round, no price", "four rounds, no price"
    one, four = (arms[label].at_beta(0.0) for label in free)
    text = frontier_table(arms)
    text += f"\n\nWithout a price, gold of four rounds less one: {compare('', four, one).numbers()}."
    return compare_gold("two rounds less one", arms["two rounds, steered"], arms["one round, steered"]), text


# %% A judge's flaws: each of its answers is bent in log-odds, see `bend` in feedback.py


def judge_that(flaw, strength, runs=6, make=spoiled, labels=planted, **remedy):
    """PPO on a preference model that was fitted, from nothing, to the labels of a judge with a flaw."""
    return steered(make, runs=runs, preference=partial(labels, flaw=flaw, strength=strength, **remedy))


JUDGES = {
    "sound": OWN_FEEDBACK,
    "prefers the first, 3 nats": judge_that("position", 3),
    "the same, asked in both orders": judge_that("position", 3, remedy="both"),
    "likes long replies, 0.6 nats a word": judge_that("length", 0.6),
    "the same, length taken out of the score": judge_that("length", 0.6, 3, levelled),
    "likes flattery, 4 nats": judge_that("flattery", 4),
    "likes flattery, 2 nats": judge_that("flattery", 2, 3),
    "the same, a principle against it": judge_that("flattery", 2, 3, remedy="principle"),
    "noisy, std 8": judge_that("careless", 8),
    "the same, three times the pairs": judge_that("careless", 8, labels=pooled),
    "the same, mean of three models": judge_that("careless", 8, make=partial(ensemble, how="mean")),
    "the same, minimum of three": judge_that("careless", 8, make=partial(ensemble, how="minimum")),
    "guesses about harm": judge_that("blind", 1),
    "hard labels": judge_that("hard", 1)}


def flaws():
    """A flaw that is the same every time harms the policy more than noise that spoils more of the labels.

    Decides: gold at the same KL, with noise of std 8 on the log-odds of each answer, less with 0.6 nats for
    each word more.
    """
    arms = yield JUDGES
    rows, points, sound, flaw = [], {}, arms["sound"].at_kl(), ""
    for label, arm in arms.items():
        gold, found = arm.at_kl(), list(arm.results.values())
        if not gold:
            continue
        less = compare("", gold, sound).numbers() if label != "sound" else "-"
        seen = [mean_and_std([run[name] for run in found]) if name in found[0] else "-"
                for name in ("labels", "model", "kl", "length", "flattering", "harmful")]
        rows.append([label, *seen[:3], mean_and_std(gold.values()), less, *seen[3:]])
        flaw = flaw if label.startswith("the same") else label.split(",")[0]
        if "labels" in found[0]:
            agree = statistics.mean(run["labels"] for run in found)
            points[label.replace("the same", flaw)] = {0: [(agree, statistics.mean(gold.values()))]}
    draw("flaws", points, "How many labels a flaw spoils says little about what the policy loses",
         "share of the judge's labels that agree with the truth", f"truth of the policy at {AT_KL} nats",
         at_kl=False)
    return compare_gold("noisy less likes long replies", arms["noisy, std 8"],
                        arms["likes long replies, 0.6 nats a word"]), markdown(
        ["judge", "labels agree with gold", "model agrees", "KL", f"gold at {AT_KL} nats",
         "less a sound judge's", "tokens", "flatter", "harmful"], rows)


def position():
    """A judge that prefers what stands first spoils the policy, and asking in both orders mends it.

    Decides: gold at the same KL, both orders less one, with 3 nats of log-odds for the first reply.
    """
    arms = yield JUDGES
    return compare_gold("both orders less one", arms["the same, asked in both orders"],
                        arms["prefers the first, 3 nats"]), ""


def length():
    """A judge that likes long replies makes the policy write long ones.

    Decides: tokens of a reply at the same KL, with 0.6 nats of log-odds for a word more, less without.
    """
    arms = yield JUDGES
    return compare(f"tokens of a reply at {AT_KL} nats, flawed less sound",
                   arms["likes long replies, 0.6 nats a word"].at_kl("length"),
                   arms["sound"].at_kl("length")), ""


def flattery():
    """What flatters the judge, the policy learns to write.

    Decides: share of replies that flatter at the same KL, with 4 nats of log-odds for them, less without.
    """
    arms = yield JUDGES
    return compare(f"share that flatters at {AT_KL} nats, flawed less sound",
                   arms["likes flattery, 4 nats"].at_kl("flattering"), arms["sound"].at_kl("flattering")), ""


def careless():
    """Noise in the judge's answers costs the policy gold.

    Decides: gold at the same KL, without noise less with noise of std 8 on the log-odds of each answer.
    """
    arms = yield JUDGES
    return compare_gold("sound less noisy", arms["sound"], arms["noisy, std 8"]), ""


def blind():
    """What the judge does not see, the policy does not avoid.

    Decides: share of harmful replies at 3.7 nats, all answers about harm guessed, less the grammar's own
    share, which the policy begins with. Until a first look it was less a sound judge's policy.
    """
    arms = yield JUDGES
    guessed = arms["guesses about harm"].at_kl("harmful")
    return compare(f"share that is harmful at {AT_KL} nats, blind judge, less the grammar's", guessed,
                   dict.fromkeys(guessed, world.ADVICE_ODDS["harmful"])), ""


def hard():
    """Soft labels teach the policy more than hard ones.

    Decides: gold at the same KL, soft less hard.
    """
    arms = yield JUDGES
    return compare_gold("soft less hard", arms["sound"], arms["hard labels"]), ""
