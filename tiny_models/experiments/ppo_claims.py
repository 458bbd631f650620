"""The claims about PPO: how far a policy goes, how the KL is charged, and the optimizer.

Every claim is one function that can be read alone: the claim, what decides, the arms, the picture and the
tables. It yields its arms, is given them back with the results of their runs, and returns Verdict and tables.
"""

import math
from functools import partial

from tiny_models.experiments.feedback import all_answers
from tiny_models.experiments.measurements import credit, estimators, exact_end, gradients, kl_gradients
from tiny_models.experiments.protocol import (AT_KL, BEST, CURVE, DEFAULT, STEERED, Arm, compare,
                                              compare_gold, interpolate, steered, without)
from tiny_models.experiments.runs import (alarmed, critic_free, in_the_loss, kl_in_loss, scaled, second_round,
                                          turns, uneven, watched)
from tiny_models.experiments.tables import curves_of, draw, frontier_table, markdown, mean_and_std

# %% How far


def beta():
    """Too low a β, and the policy cheats the preference model.

    Decides: gold after 110 iterations at β 0.3, less at β 0. Not at the same KL, since how far the policy
    goes is what β decides.
    """
    long = {"iterations": 110}
    arms = yield {
        "default": DEFAULT, "longer": Arm(long, (0.0, 0.3), 6, watched),
        "a low price": Arm(long, (0.05,), 3, watched), "best of n": BEST,
        "steered to 3.7 nats": Arm({"beta_control": "batch", "kl_target": AT_KL, **long}, (0.3,), 3)}
    longer = arms["longer"]
    seen = {at: result["seen"] for at, result in longer.results.items()}
    curves = {f"{what}, β {beta:g}": {i: [(10.0 * k, p[column]) for k, p in enumerate(points, 1)]
                                      for (b, i), points in seen.items() if b == beta}
              for what, column in (("truth", 1), ("score", 2)) for beta in (0.3, 0.0)}
    draw("beta", curves, "Without a price on KL (β 0) the score goes on rising while the truth falls",
         "iteration", "points", at_kl=False)
    text = frontier_table(without(arms, "best of n"), different="distinct",
                          **{"nats a token of the grammar's": "forgotten"})
    peaks = [f"{max(p[1] for p in points):.2f} → {points[-1][1]:.2f}"
             for (b, i), points in sorted(seen.items()) if b == 0]
    if peaks:
        text += f"\n\nβ 0, gold of held-out replies, highest of the eleven looks → last: {', '.join(peaks)}."
    return compare("gold at the end, β 0.3 less β 0", longer.at_beta(0.3), longer.at_beta(0.0)), text


def reference():
    """The reference costs a forward pass for every response.

    Decides: the pass's share of an iteration's time, less a twentieth. Beside it, a second round that starts
    from the first one's policy, against the old reference and against that policy; KL is to the old one.
    """
    arms = yield {"one round": DEFAULT,
                  "second, old reference": Arm(make=partial(second_round, reference="old")),
                  "second, new reference": Arm(make=partial(second_round, reference="new"))}
    draw("reference", curves_of(arms, "forgotten"), "The further from the reference, the more is forgotten: "
         "against a newer one a second round drifts on", ylabel="nats a token of the grammar's own replies")
    text = frontier_table(arms, **{"nats a token of the grammar's": "forgotten"})
    share = arms["one round"].at_beta(0.3, "reference_share")
    return compare("share of the time of training", share, dict.fromkeys(share, 0), shown=True), text


def stop():
    """A price on KL does more than an early stop.

    Decides: gold of the default run at 3.7 nats, less gold at β 0 where its batches pass 3.7 nats. Named
    after a look at the same runs. Beside it, of runs that were watched on held-out prompts, the first look
    near 3.7 nats, where a run at a price has not yet ended either.
    """
    arms = yield {"default": CURVE, "watched": Arm({"iterations": 110}, (0.0, 0.3), 6, watched),
                  "no price": Arm({"preference": all_answers, "iterations": 110}, (0.0,), 6, alarmed)}
    default, paths = arms["default"], {
        i: [(math.sqrt(look[1]), look[0]) for look in result["looks"]]
        for (_, i), result in arms["no price"].results.items()}
    draw("stop", {"at a price": default.curves(),
                  "no price, on the way": {i: early(points, math.sqrt(10)) for i, points in paths.items()}},
         "At the same KL a run that pays for it has more of the truth")
    rows, passed = [], {}
    for nats in (2.0, AT_KL, 5.0):
        found = {i: interpolate(points, math.sqrt(nats)) for i, points in paths.items()}
        passed[nats] = {i: gold for i, gold in found.items() if gold is not None}
        priced = default.at_kl(kl=nats)
        if passed[nats] and priced:
            rows.append([f"{nats:g}", mean_and_std(priced.values()), mean_and_std(passed[nats].values()),
                         compare("", priced, passed[nats]).numbers()])
    verdict = compare(f"gold at {AT_KL} nats, at a price less on the way without one", default.at_kl(),
                      passed[AT_KL])
    text = markdown(["nats", "gold at a price", "gold on the way at β 0", "difference"], rows)
    for beta in (0.0, 0.3):
        looks = [[(gold, 10 * k) for k, (root, gold, _) in enumerate(result["seen"], 1)
                  if 3.3 < root**2 < 4.1]
                 for (b, _), result in arms["watched"].results.items() if b == beta]
        first = [near[0] for near in looks if near]
        if first:
            text += (f"\n\nβ {beta:g}, held-out prompts, the first look between 3.3 and 4.1 nats: gold "
                     f"{mean_and_std(gold for gold, _ in first)}, {len(first)} of {len(looks)} runs, "
                     f"iterations {min(k for _, k in first)} to {max(k for _, k in first)}.")
    return verdict, text


def early(points, root):
    """A path up to where it first passes a root of the KL."""
    return points[:next((k for k, (x, _) in enumerate(points) if x > root), len(points))]


def best_of_n():
    """Best of n gets as much of the truth out of a preference model as PPO does at the same KL.

    Decides: gold of the best of 64 replies of the reference, less PPO's at the KL that best of 64 has at
    most, log 64 - 63/64 nats. Named after a look at the same runs.
    """
    arms = yield {"PPO": CURVE, "best of n": BEST}
    ppo, rows, less = arms["PPO"], [], {}
    for k, n in enumerate((1, 2, 4, 8, 16, 32, 64)):
        best = {i: result["best"][k] for (_, i), result in arms["best of n"].results.items()}
        if best:
            nats = max(root for root, _ in best.values()) ** 2
            less[n] = compare(f"gold of best of {n}, less PPO's at {nats:.1f} nats",
                              {i: gold for i, (_, gold) in best.items()}, ppo.at_kl(kl=nats))
            rows.append([str(n), f"{nats:.2f}", mean_and_std(gold for _, gold in best.values()),
                         less[n].numbers()])
    text = markdown(["n", "KL at most", "gold", "less PPO's at this KL"], rows)
    text += "\n\n" + frontier_table({"PPO": ppo}, different="distinct")
    return less.get(64, compare("", {}, {})), text


# %% How the KL is charged


def kl_level():
    """A price that each response pays for its own KL controls the policy better than the batch's mean.

    The topics are made to differ: the score of every other one is × 3, so that its replies drift further.
    Decides: root of the KL at β 0.3, batch less sequence. Not at the same KL: in a trial (of KL only, on the
    shipped preference model) neither of two prices of the batch's mean held the policy at all.
    """
    arms = yield {
        "token": DEFAULT,
        "uneven, sequence": Arm({"kl_level": "sequence"}, (0.3,), 6, uneven),
        "uneven, batch": Arm({"kl_level": "batch"}, (0.3,), 6, uneven),
        "sequence": Arm({"kl_level": "sequence"}), "token, λ 0.95": Arm({"lam": 0.95}),
        "sequence, λ 0.95": Arm({"kl_level": "sequence", "lam": 0.95}),
        "k2 from the advantages": Arm(make=kl_in_loss)}
    by_level = {label: arms[label] for label in ("uneven, sequence", "uneven, batch")}
    text = frontier_table(by_level, **{"spread over prompts": "spread"})
    text += "\n\n" + frontier_table(without(arms, *by_level))
    sequence, batch = ({i: math.sqrt(kl) for i, kl in arm.at_beta(0.3, "kl").items()}
                       for arm in by_level.values())
    return compare("√KL at β 0.3, batch less sequence", batch, sequence, shown=True), text


def estimator():
    """k1 is the KL to charge in the reward: it does better than k3.

    Decides: gold at the same KL, k1 less k3, on the lines between their prices: a price that steers itself
    does not hold k3.
    """
    arms = yield {
        "k1": DEFAULT, "k3": Arm({"kl_estimator": "k3"}, (0.6, 1.2, 2.4), 6), "best of n": BEST,
        "k2": Arm({"kl_estimator": "k2"}, (0.6, 1.2, 2.4)), "errors": Arm({}, (0.3,), 3, estimators),
        "k3, steered": steered(beta=1.2, kl_estimator="k3")}
    kinds, errors = {kind: arms[kind] for kind in ("k1", "k2", "k3")}, arms["errors"]
    drawn = {kind: {i: early(points, 3) for i, points in curve.items()}
             for kind, curve in curves_of(without(kinds, "k2")).items()}
    draw("estimator", drawn, "With k3 charged in the reward the same KL has less of the truth",
         best=arms["best of n"])
    columns = [f"{place} {what}" for place in ("near", "far") for what in ("bias", "spread")]
    rows = [[kind, *(mean_and_std(errors.at_beta(0.3, f"{kind} {column}").values()) for column in columns)]
            for kind in kinds if errors.results]
    text = frontier_table({**kinds, "k3, steered": arms["k3, steered"]})
    text += "\n\n" + markdown(["in units of the exact KL of a token", *columns], rows)
    return compare_gold("k1 less k3", kinds["k1"], kinds["k3"]), text


def loss():
    """KL is better charged in the reward, as PPO does it, than in the loss, as GRPO does it.

    Decides: gold at the same KL, k1 in the reward less k3 of each token in the loss (with `update`'s penalty,
    the price in the reward 0), all steered. Beside it, exactly, what each charge's gradient has to do with
    the KL's, at a policy on its way in the enumerable world.
    """
    arms = yield {"k1 in the reward": STEERED,
                  **{f"{kind} in the loss": steered(partial(in_the_loss, kind=kind), runs=runs)
                     for kind, runs in (("k3", 6), ("k2", 6), ("k2 of the reply", 2),
                                        ("k2 of the reply, centred", 6))},
                  "gradients": Arm({}, (0.5,), 6, kl_gradients)}
    found = list(arms["gradients"].results.values())
    shown = without(arms, "gradients")
    text = frontier_table(shown, **{"price at the end": "last_beta"})
    if found:
        labels = [name.removesuffix(": cosine") for name in found[0] if name.endswith(": cosine")]
        text += "\n\n" + markdown(["gradient of the charge alone", "cosine with the KL's", "length"], [
            [label, *(mean_and_std(r[f"{label}: {what}"] for r in found) for what in ("cosine", "length"))]
            for label in labels])
    return compare_gold("k1 in the reward less k3 in the loss", arms["k1 in the reward"],
                        arms["k3 in the loss"]), text


def exact():
    """PPO finds the optimum of the KL-regularised objective.

    Shown: in the enumerable world (rewards have a std of 2), the share of the way to the exact optimum that
    is gone, at β 0.5 and along a curve over β. Beside it, what each choice makes of the gradient.
    """
    arms = yield {"end": Arm({}, (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0), 6, exact_end),
                  "gradients": Arm({}, (0.5,), 6, gradients)}
    end, found = arms["end"], list(arms["gradients"].results.values())
    curves = {i: sorted((math.log10(beta), result["gap_closed"])
                        for (beta, j), result in end.results.items() if j == i) for i in range(end.runs)}
    draw("exact", {"PPO": curves}, "The higher the price, the more nearly PPO finds the exact optimum",
         "β, price of a nat in points (log scale)", "share of the way to the optimum", at_kl=False,
         ticks={math.log10(beta): f"{beta:g}" for beta in end.betas})
    names = ["reward", "best_reward", "kl", "best_kl", "gap_closed"]
    text = markdown(["β", *names], [
        [f"{beta:g}", *(mean_and_std(end.at_beta(beta, name).values()) for name in names)]
        for beta in end.betas if end.at_beta(beta, "kl")])
    if found:
        labels = [name.removesuffix(": cosine") for name in found[0] if name.endswith(": cosine")]
        text += "\n\n" + markdown(["expected gradient", "cosine with that of J", "length"], [
            [label, *(mean_and_std(r[f"{label}: {what}"] for r in found) for what in ("cosine", "length"))]
            for label in labels])
    closed = end.at_beta(0.5, "gap_closed")
    return compare("share of the way at β 0.5", closed, dict.fromkeys(closed, 0), shown=True), text


# %% The optimizer


def whitening():
    """Reward whitening stabilises training when the scale of the score differs.

    Decides: gold of a score × 10, whitened less raw, at the default β. Whitened, a score × 10 is the default
    run, digit for digit (a test proves it). Not at the same KL, since what a β is worth is what whitening
    decides; the control, β × 10 too, is compared at the same KL.
    """
    times_10 = partial(scaled, scale=10)
    control = {"whiten_scores": False, "value": "separate", "value_clip": 2.0}
    arms = yield {
        "whitened": DEFAULT, "raw × 10": Arm({"whiten_scores": False}, (0.3,), 6, times_10),
        "whitened, separate value": Arm({"value": "separate"}),
        "raw × 10, β × 10, separate value": Arm(control, (0.75, 1.5, 3.0), 3, times_10)}
    drawn = {"whitened": curves_of(arms)["whitened"], "raw score × 10, the same β": arms["raw × 10"].curves(),
             "raw score × 10, β × 10": arms["raw × 10, β × 10, separate value"].curves()}
    draw("whitening", drawn, "A raw score ten times as large drowns the same β; with β × 10 nothing is lost")
    after = compare("", arms["whitened, separate value"].at_kl(),
                    arms["raw × 10, β × 10, separate value"].at_kl())
    text = frontier_table(arms)
    text += f"\n\nThe control, gold at {AT_KL} nats, whitened less raw: {after.numbers()}."
    return compare("gold at β 0.3 and a score × 10, whitened less raw", arms["whitened"].at_beta(0.3),
                   arms["raw × 10"].at_beta(0.3)), text


def value():
    """A shared trunk saves computation.

    Shown: seconds of an iteration, separate divided by shared. Beside it, gold at the same KL.
    """
    arms = yield {
        "shared": DEFAULT, "shared, head at zero": Arm({"value_head": "zero"}),
        "separate": Arm({"value": "separate"}), "from the preference model": Arm({"value": "preference"}),
        "seconds": Arm({}, (0.3,), 6, turns)}
    shown, seconds = without(arms, "seconds"), arms["seconds"]
    text = frontier_table(shown, **{"explained variance, 2nd half": "explained_variance",
                                    "parameters": "parameters"})
    text += "\n\n" + markdown(["seconds of an iteration, shared", "separate", "ratio"], [
        [f"{r['shared']:.2f}", f"{r['separate']:.2f}", f"{r['ratio']:.2f}"]
        for r in seconds.results.values()])
    draw("value", {f"{name} trunk": {i: [(i, r[name])] for (_, i), r in seconds.results.items()}
                   for name in ("shared", "separate")},
         "A value function with a trunk of its own makes an iteration 1.4 times as long", "run",
         "seconds of an iteration", at_kl=False, ticks={i: str(i) for i in range(6)}, bottom=0)
    ratio = seconds.at_beta(0.3, "ratio")
    return compare("seconds of an iteration, separate / shared, less 1", ratio, dict.fromkeys(ratio, 1.0),
                   shown=True), text


def critic():
    """A learned critic does better than the mean of other replies to the same prompt.

    Decides: gold at the same KL, with as many replies, PPO with its value head less RLOO with groups of 4.
    Beside it, the group's std in place of whitening, and GRPO whole: the std, and k3 in the loss.
    """
    groups = {"groups of 4, their mean (RLOO)": "mean", "groups of 4, divided by their std": "std",
              "groups of 4, their std, k3 in the loss (GRPO)": "grpo"}
    arms = yield {"a critic": STEERED, **{
        label: steered(partial(critic_free, how=how)) for label, how in groups.items()}}
    text = frontier_table(arms, **{"price at the end": "last_beta"})
    return compare_gold("critic less mean of the group", arms["a critic"], arms[list(groups)[0]]), text


def gae():
    """λ trades bias for variance.

    Decides: of the gradient of one response, with a critic that has learned, the smaller of two differences:
    bias at λ 0.95 less at λ 1, and spread at λ 1 less at λ 0.95, in lengths of the true gradient. Until a
    first look it was λ 0 in place of 0.95.
    """
    arms = yield {"λ 1": DEFAULT, "λ 0.95": Arm({"lam": 0.95}), "λ 0": Arm({"lam": 0.0}, (0.3,)),
                  "gradient": Arm({}, (0.5,), 6, credit)}
    found = {i: result for (_, i), result in arms["gradient"].results.items()}
    both, lams = ("bias", "spread"), ("0", "0.5", "0.8", "0.95", "1")
    text = markdown(["gradient of one response", *(f"λ {lam}" for lam in lams)], [
        [what, *(mean_and_std(r[f"{what} {lam}"] for r in found.values()) for lam in lams)]
        for what in both if found])
    text += "\n\n" + frontier_table(without(arms, "gradient"))
    less = {i: min(r["bias 0.95"] - r["bias 1"], r["spread 1"] - r["spread 0.95"]) for i, r in found.items()}
    return compare("the smaller of: bias, λ 0.95 less λ 1; spread, λ 1 less λ 0.95", less,
                   dict.fromkeys(less, 0.0)), text


def clip():
    """PPO's clipped minibatch steps use samples better than plain policy gradient.

    Decides: gold at the same KL after as many episodes, PPO less REINFORCE (one step a batch, no clip) at 2
    times PPO's learning rate, both steered: 1 and 8 times had less gold in a trial. Until a referee's look it
    was at 2 or 4 times, whichever is better in that run, on the lines between prices.
    """
    def plain(times):
        return {"clip": math.inf, "stop_kl": math.inf, "minibatch_size": 64, "learning_rate": times * 1e-3}
    epochs = {"ppo_epochs": 4, "stop_kl": math.inf}
    arms = yield {
        "PPO": DEFAULT, "best of n": BEST,
        **{f"REINFORCE × {k}": Arm(plain(k), runs=6) for k in (2, 4)},
        **{f"REINFORCE × {k}": Arm(plain(k), (0.3,)) for k in (1, 8)},
        "4 epochs": Arm(epochs), "4 epochs, no clip": Arm({**epochs, "clip": math.inf}),
        "PPO, steered": STEERED, "REINFORCE × 2, steered": steered(**plain(2))}
    shown = without(arms, "best of n")
    return compare_gold("PPO less REINFORCE", arms["PPO, steered"], arms["REINFORCE × 2, steered"]), (
        frontier_table(shown))
