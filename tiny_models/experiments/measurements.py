"""What is measured of policies and preference models that are there, and in the world of 40 responses.

Called as the functions of runs.py are: number of the run, settings -> dict. Of the settings these take the
price of KL, beta, and the labels of the preference model, and no other.
"""

import math
import pathlib
import tempfile
from collections import Counter

import torch
from transformers import AutoModelForCausalLM

import rlaif
from tiny_models import world
from tiny_models.exact import (ALL_MASK, enumerate_logprobs, exact_run, expected_gradient, flat_gradient,
                               half_trained, objective_gradient)
from tiny_models.experiments.feedback import (answers_of, averaged, config_of, fit, judged_pairs, load_policy,
                                              neighbours, preference_model, sample_pairs, share)
from tiny_models.experiments.runs import finish, prepared, trained_policy

# %% Preference models


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


def taught(i, settings):
    """PPO to its end, and of the pairs of the first policy whose gold differs, the share about which the
    run's preference model agrees with gold."""
    torch.manual_seed(7000 + i)
    count, right = agreement(preference_model(i, settings["preference"]), *load_policy(), 2048)
    return {**finish(prepared(i, settings)), "agrees": right.total() / count.total()}


def followed(i, settings):
    """What becomes of a judge's labels before PPO: the share of pairs, of those whose gold differs, about
    which gold agrees with the labels, and with the preference model fitted to them (on the next run's pairs);
    and the lowest score of the best reply to a held-out prompt, one of each topic."""
    def right(pairs, prob_a):
        a, b = (torch.tensor(world.gold_scores(pairs["prompts"], pairs[f"responses_{side}"]))
                for side in "ab")
        return ((prob_a > 0.5) == (a > b))[a != b].float().mean().item()
    labels, fresh = settings["preference"], judged_pairs(neighbours(i)[1])
    preference = preference_model(i, labels)
    a, b = (torch.tensor(preference(fresh["prompts"], fresh[f"responses_{side}"], fresh[f"ended_{side}"]))
            for side in "ab")
    best = preference(world.HELDOUT_PROMPTS, [f" {world.best_reply(x)}" for x in world.HELDOUT_PROMPTS])
    return {"labels": right(*labels(i)), "model": right(fresh, (a - b).sigmoid()), "worst topic": min(best)}


def spoiled(i, settings):
    """PPO to its end on a judge's labels, and what became of these before."""
    return {**followed(i, settings), **finish(prepared(i, settings))}


def last_policy(i, settings):
    """The policy that the default run i at the settings' price ends with."""
    policy, _ = rlaif.load(AutoModelForCausalLM, trained_policy(i, settings["beta"]), "policy", "cpu")
    return policy


def aged(i, settings):
    """The run's preference model on new pairs of the first policy and of the last one; of the first, weighted
    to the last one's sizes of the gold difference, since harder pairs are not staleness."""
    torch.manual_seed(3000 + i)
    preference, (policy, tokenizer) = preference_model(i), load_policy()
    old_count, old_right = agreement(preference, policy, tokenizer)
    count, right = agreement(preference, last_policy(i, settings), tokenizer)
    sizes = old_count.keys() & count.keys()
    pairs = sum(count[size] for size in sizes)
    return {"pairs": pairs, "first, its own sizes": old_right.total() / old_count.total(),
            "first": sum(count[size] * old_right[size] / old_count[size] for size in sizes) / pairs,
            "last": sum(right[size] for size in sizes) / pairs}


def refitted(i, settings):
    """The run's preference model fitted on, to new pairs of the last policy's replies, alone or with as many
    old ones, centred or not, in as many steps: agreement with gold on other pairs of the first policy, and of
    the last."""
    first, last = load_policy(), last_policy(i, settings)
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


# %% Policies


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
    found, prompts = {}, world.HELDOUT_PROMPTS * 128
    for place, policy in (("near", near.policy), ("far", last_policy(i, settings))):
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


# %% The enumerable world, exactly


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


def kl_gradients(i, settings):
    """The exact expected gradient of each way to charge the KL, alone, at a policy on its way -> cosine with
    the gradient of KL(pi || pi_ref) and length in units of it. In the reward an estimate is a number that the
    reply is paid; in the loss it is differentiated as it stands, over replies that were sampled before."""
    found = {}
    for w in half_trained(settings["beta"], 1000 + i):
        logprobs = enumerate_logprobs(w.policy, w.prompt_ids)  # (40, 3)
        d, prob = logprobs - w.ref_logprobs, logprobs.sum(dim=1).exp()
        k = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}
        charges = {f"{kind} in the reward": (prob * each.sum(dim=1).detach()).sum()
                   for kind, each in k.items()}
        charges["k2 in the loss, of the reply"] = (prob.detach() * d.sum(dim=1)**2 / 2).sum()
        charges |= {f"{kind} in the loss, per token": (prob.detach() * k[kind].sum(dim=1)).sum()
                    for kind in ("k2", "k3", "k1")}
        true = flat_gradient((prob * d.sum(dim=1)).sum(), w.policy, retain_graph=True)
        for name, charge in charges.items():
            g = flat_gradient(charge, w.policy, retain_graph=True)
            cosine, length = found.get(name, (0.0, 0.0))
            found[name] = (cosine + torch.cosine_similarity(g, true, dim=0).item() / 2,
                           length + (g.norm() / true.norm()).item() / 2)
    return {f"{name}: {what}": value for name, both in found.items()
            for what, value in zip(("cosine", "length"), both)}
