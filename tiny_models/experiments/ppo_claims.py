"""The claims about PPO: how far a policy goes, how the KL is charged, and the optimizer.

Every claim is one function that can be read alone: the claim, what decides, the arms, the picture and the
tables. It yields its arms, is given them back with the results of their runs, and returns Verdict and tables.
"""

import math
from functools import partial

from tiny_models.experiments.measurements import credit, estimators, exact_end, gradients
from tiny_models.experiments.protocol import AT_KL, BEST, DEFAULT, Arm, compare, without
from tiny_models.experiments.runs import kl_in_loss, scaled, second_round, turns, uneven, watched
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
    curves = {f"{what}, β {beta:g}": {i: sorted((p[0], p[column]) for p in points)
                                      for (b, i), points in seen.items() if b == beta}
              for what, column in (("gold", 1), ("score", 2)) for beta in (0.0, 0.3)}
    draw("beta", curves, ylabel="gold, and score, all along the runs", best=arms["best of n"])
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
    draw("reference", curves_of(arms))
    text = frontier_table(arms, **{"nats a token of the grammar's": "forgotten"})
    share = arms["one round"].at_beta(0.3, "reference_share")
    return compare("share of the time, less 0.05", share, dict.fromkeys(share, 0.05)), text


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
        "k2 in the loss": Arm(make=kl_in_loss)}
    draw("kl_level", curves_of(arms))
    by_level = {label: arms[label] for label in ("uneven, sequence", "uneven, batch")}
    text = frontier_table(by_level, **{"spread over prompts": "spread"})
    text += "\n\n" + frontier_table(without(arms, *by_level))
    sequence, batch = ({i: math.sqrt(kl) for i, kl in arm.at_beta(0.3, "kl").items()}
                       for arm in by_level.values())
    return compare("√KL at β 0.3, batch less sequence", batch, sequence), text


def estimator():
    """k1 is the KL to charge in the reward: it does better than k3.

    Decides: gold at the same KL, k1 less k3.
    """
    arms = yield {
        "k1": DEFAULT, "k3": Arm({"kl_estimator": "k3"}, (0.6, 1.2, 2.4), 6), "best of n": BEST,
        "k2": Arm({"kl_estimator": "k2"}, (0.6, 1.2, 2.4)), "errors": Arm({}, (0.3,), 3, estimators)}
    kinds, errors = {kind: arms[kind] for kind in ("k1", "k2", "k3")}, arms["errors"]
    draw("estimator", curves_of(kinds), best=arms["best of n"])
    columns = [f"{place} {what}" for place in ("near", "far") for what in ("bias", "spread")]
    rows = [[kind, *(mean_and_std(errors.at_beta(0.3, f"{kind} {column}").values()) for column in columns)]
            for kind in kinds if errors.results]
    text = frontier_table(kinds) + "\n\n" + markdown(["in units of the exact KL of a token", *columns], rows)
    return compare(f"gold at {AT_KL} nats, k1 less k3", kinds["k1"].at_kl(), kinds["k3"].at_kl()), text


def exact():
    """PPO finds the optimum of the KL-regularised objective.

    Decides: in the enumerable world at β 0.5 (rewards have a std of 2), the share of the way to the exact
    optimum that is gone, less 0.95. Beside it, what each choice makes of the gradient.
    """
    arms = yield {"end": Arm({}, (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0), 6, exact_end),
                  "gradients": Arm({}, (0.5,), 6, gradients)}
    end, found = arms["end"], list(arms["gradients"].results.values())
    curves = {i: sorted((math.log10(beta), result["gap_closed"])
                        for (beta, j), result in end.results.items() if j == i) for i in range(end.runs)}
    draw("exact", {"PPO": curves}, "log₁₀ of β", "share of the way to the optimum", at_kl=False)
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
    return compare("share of the gap closed at β 0.5, less 0.95", closed, dict.fromkeys(closed, 0.95)), text


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
    draw("whitening", curves_of(arms))
    after = compare("", arms["whitened, separate value"].at_kl(),
                    arms["raw × 10, β × 10, separate value"].at_kl())
    text = frontier_table(arms)
    text += f"\n\nThe control, gold at {AT_KL} nats, whitened less raw: {after.numbers()}."
    return compare("gold at β 0.3 and a score × 10, whitened less raw", arms["whitened"].at_beta(0.3),
                   arms["raw × 10"].at_beta(0.3)), text


def value():
    """A shared trunk saves computation.

    Decides: seconds of an iteration, separate divided by shared, less 1. Beside it, gold at the same KL.
    """
    arms = yield {
        "shared": DEFAULT, "shared, head at zero": Arm({"value_head": "zero"}),
        "separate": Arm({"value": "separate"}), "from the preference model": Arm({"value": "preference"}),
        "seconds": Arm({}, (0.3,), 6, turns)}
    shown, seconds = without(arms, "seconds"), arms["seconds"]
    draw("value", curves_of(shown))
    text = frontier_table(shown, **{"explained variance, 2nd half": "explained_variance",
                                    "parameters": "parameters"})
    text += "\n\n" + markdown(["seconds of an iteration, shared", "separate", "ratio"], [
        [f"{r['shared']:.2f}", f"{r['separate']:.2f}", f"{r['ratio']:.2f}"]
        for r in seconds.results.values()])
    ratio = seconds.at_beta(0.3, "ratio")
    return compare("seconds of an iteration, separate / shared, less 1", ratio,
                   dict.fromkeys(ratio, 1.0)), text


def gae():
    """λ trades bias for variance.

    Decides: of the gradient of one response, with a critic that has learned, the smaller of two differences:
    bias at λ 0 less at λ 1, and spread at λ 1 less at λ 0, in lengths of the true gradient.
    """
    arms = yield {"λ 1": DEFAULT, "λ 0.95": Arm({"lam": 0.95}), "λ 0": Arm({"lam": 0.0}, (0.3,)),
                  "gradient": Arm({}, (0.5,), 6, credit)}
    found = {i: result for (_, i), result in arms["gradient"].results.items()}
    both, lams = ("bias", "spread"), ("0", "0.5", "0.8", "0.95", "1")
    draw("gae", {what: {i: [(float(lam), r[f"{what} {lam}"]) for lam in lams] for i, r in found.items()}
                 for what in both}, "λ", "in lengths of the true gradient", at_kl=False)
    text = markdown(["gradient of one response", *(f"λ {lam}" for lam in lams)], [
        [what, *(mean_and_std(r[f"{what} {lam}"] for r in found.values()) for lam in lams)]
        for what in both if found])
    text += "\n\n" + frontier_table(without(arms, "gradient"))
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
    shown = without(arms, "best of n")
    draw("clip", curves_of(shown), best=arms["best of n"])
    two, four = (arms[f"REINFORCE × {k}"].at_kl() for k in (2, 4))
    best = {i: max(two.get(i, -math.inf), four.get(i, -math.inf)) for i in two | four}
    verdict = compare(f"gold at {AT_KL} nats, PPO less REINFORCE", arms["PPO"].at_kl(), best)
    return verdict, frontier_table(shown)
