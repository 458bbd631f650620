"""How one run is made: PPO with some settings, on the preference model of run i, to its end, and measured.

Every function here is called with the number of the run and its settings, those of `rlaif.Config`; in place
of a folder settings["preference"] is the function of feedback.py that gives the labels. It returns a dict of
what was measured, and its name stands in results.jsonl.
"""

import math
import random
import statistics
import time

import torch

import rlaif
from tiny_models import world
from tiny_models.experiments.feedback import (KEPT, all_answers, answers_of, averaged, bend, committee,
                                              config_of, fit, flatters, function_of, flawed, load_judge,
                                              load_policy, preference_folder, preference_model, sample_pairs,
                                              share, under_one_principle)

SEEN = ("gold", "KL", "score", "entropy", "length", "distinct", "committee", "judge", "agreement")
LOOK_EVERY = 5  # iterations
LATE = 20  # batches at the end, whose KL says where a run was held


# %% What every run has in common


def prepared(i, settings, score=None):
    """A `rlaif.Run` with the seed and the preference model of run i."""
    folder = preference_folder(i, settings.get("preference", all_answers))
    return rlaif.prepare(config_of(i, {**settings, "preference": str(folder)}), score)


def train(run):
    """Train to the end by rlaif's own loop -> the metrics of each iteration."""
    return [rlaif.update(run, rlaif.roll_out(run)) for _ in range(run.iteration, run.config.iterations)]


def finish(run):
    """Train to the end -> dict of what was measured, on held-out prompts."""
    history = train(run)
    return {**measure(run), **history_of(history)}


def measure(run):
    """score, gold, kl, length, ... of 32 replies to each held-out prompt; of these the shares: fluency, what
    the grammar could have written, distinct, different ones, flattering and harmful; forgotten, the policy's
    nats per token of the grammar's own replies."""
    means, rows = rlaif.evaluate(run)
    rng, prompts = random.Random(0), [prompt for prompt in run.held_out for _ in range(32)]
    texts = [rlaif.PLAIN.format(prompt=prompt) for prompt in prompts]
    begun = rlaif.tokenize(run.tokenizer, texts)
    whole = rlaif.tokenize(run.tokenizer, [f"{text} {world.sample_reply(prompt, rng)}"
                                           for text, prompt in zip(texts, prompts)])
    ids, mask = rlaif.pad(begun, "left", run.policy)
    replies = [row[len(start):] + [run.tokenizer.eos_token_id] for start, row in zip(begun, whole)]
    tokens, real = rlaif.pad(replies, "right", run.policy)
    with torch.no_grad():
        logits, _ = rlaif.response_logits(run.policy, ids, mask, tokens, real.bool())
    nats = -rlaif.masked_mean(rlaif.token_logprobs(logits, tokens), real.bool()).item()
    shares = {"fluency": sum(world.is_fluent(row["response"]) for row in rows),
              "distinct": len({row["response"] for row in rows}),
              "flattering": sum(flatters(row["response"]) for row in rows),
              "harmful": sum(world.gold_parts(row["prompt"], row["response"])["harmlessness"] < 0
                             for row in rows)}
    return {**means, **{name: n / len(rows) for name, n in shares.items()}, "forgotten": nats}


def history_of(history):
    """What the training itself showed: the explained variance over the second half of it, and the mean KL and
    the price of its last batches."""
    late = history[len(history) // 2:]
    return {"explained_variance": statistics.mean(m["explained_variance"] for m in late),
            "late_kl": statistics.mean(m["kl"] for m in history[-LATE:]), "last_beta": history[-1]["beta"]}


def seconds_of(model):
    """A list to which each forward pass of the model, from now on, adds the seconds that it took."""
    begun, seconds = [], []
    model.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
    model.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - begun.pop()))
    return seconds


# %% PPO, plain, watched, and alarmed


def ppo(i, settings):
    """The plain case: nothing but settings -> also `parameters`, how many are trained, and `reference_share`,
    the part of the time of training that the reference's forward passes take."""
    run = prepared(i, settings)
    seconds, began = seconds_of(run.reference), time.perf_counter()
    history = train(run)
    share_of_time = sum(seconds) / (time.perf_counter() - began)
    if settings.keys() == {"beta"}:
        rlaif.save_model(run.policy, run.tokenizer, KEPT / f"policy-{i}-{settings['beta']}")
    return {**measure(run), **history_of(history), "reference_share": share_of_time,
            "parameters": sum(p.numel() for p in run.optimizer.param_groups[0]["params"])}


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
    labels = settings["preference"]
    run = prepared(i, settings, world.gold_scores if score == "gold" else None)
    members, looks, history = committee(i, labels), [], []
    while run.iteration < run.config.iterations:
        history.append(rlaif.update(run, rlaif.roll_out(run)))
        if run.iteration % LOOK_EVERY == 0:
            r, n = run.rollout, 32
            with torch.random.fork_rng(devices=[]):
                rivals = rlaif.respond(run.reference, run.tokenizer, r.prompts, run.config)
                pairs = {"prompts": r.prompts[:n], "responses_a": r.responses[:n],
                         "responses_b": rivals.responses[:n]}
                wins = answers_of(pairs)
                is_flawed = function_of(labels) is flawed
                wins = bend(wins, pairs, **labels.keywords) if is_flawed else averaged(wins)
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


# %% Another price, another critic, another reference


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


def in_the_loss(i, settings, kind):
    """No price in the reward; in place of it `update`'s penalty, with a gradient of its own: the price times
    k2 or k3 of each token, or "k2 of the reply", half the square of its whole log-ratio, on its last token;
    "centred", the batch's mean is taken from the log-ratio first, a baseline, as the advantages have one."""
    run, history = prepared(i, settings), []
    while run.iteration < run.config.iterations:
        price, run.beta = run.beta, 0.0
        r, run.beta = rlaif.roll_out(run), price

        def penalty(logprobs, rows):
            if kind in ("k2", "k3"):
                return price * rlaif.kl_estimate(logprobs, r.ref_logprobs[rows], kind)
            mask = r.mask[rows]
            d = torch.where(mask, logprobs - r.ref_logprobs[rows], 0.0).sum(dim=1, keepdim=True)
            if kind == "k2 of the reply, centred":
                d = d - torch.where(r.mask, r.kl, 0.0).sum(dim=1).mean()
            last = torch.arange(mask.shape[1]) == mask.sum(dim=1, keepdim=True) - 1
            return torch.where(last, price * d.square() / 2, 0.0)
        history.append(rlaif.update(run, r, penalty))
    return {**measure(run), **history_of(history)}


def critic_free(i, settings, how, k=4):
    """No critic: what is expected of a reply is what the k replies to its prompt got, as many replies a batch
    as ever. "mean": less the others' mean (RLOO), whitened as PPO's advantages are; "std": less the group's
    mean, by its std; "grpo": so too, but the scores alone, and k3 of each token in the loss."""
    run, history = prepared(i, {**settings, "value_coef": 0.0}), []
    while run.iteration < run.config.iterations:
        with run.own_random():
            drawn = rlaif.balanced_draw(len(run.prompts), run.config.batch_size // k)
        r = rlaif.roll_out(run, [run.prompts[j] for j in drawn for _ in range(k)])
        total, price = r.scores if how == "grpo" else r.rewards.sum(dim=1), run.beta  # (B,)
        group = total.view(-1, k)
        advantage = group - group.mean(dim=1, keepdim=True)
        if how == "mean":  # less the others' mean it is k / (k - 1) times this, and whitened the same
            r.whitened = rlaif.whiten(advantage.view(-1, 1).expand(r.mask.shape), r.mask)
        else:
            advantage = advantage / (group.std(dim=1, keepdim=True) + 1e-4)
            r.whitened = advantage.view(-1, 1).expand(r.mask.shape)

        def penalty(logprobs, rows):
            return price * rlaif.kl_estimate(logprobs, r.ref_logprobs[rows], "k3")
        history.append(rlaif.update(run, r, penalty if how == "grpo" else None))
    return {**measure(run), **history_of(history)}


def turns(i, settings, iterations=8):
    """What an iteration costs with a shared and with a separate value function, in turns in one process, so
    that a busy machine slows both -> median seconds of each, and separate / shared."""
    runs, seconds = {}, {"shared": [], "separate": []}
    for value in seconds:
        runs[value] = prepared(i, {**settings, "value": value})
    for _ in range(iterations):
        for value, run in runs.items():
            began = time.perf_counter()
            rlaif.update(run, rlaif.roll_out(run))
            seconds[value].append(time.perf_counter() - began)
    shared, separate = (statistics.median(seconds[value]) for value in ("shared", "separate"))
    return {"shared": shared, "separate": separate, "ratio": separate / shared}


def second_round(i, settings, reference):
    """On from the policy that the default run ended with, against the first round's reference or against that
    policy itself -> `kl` and `forgotten` are to the very first policy, as everywhere."""
    given = {**settings, "policy": trained_policy(i, 0.3), "seed": 2000 + i}
    if reference == "old":
        given["reference"] = rlaif.Config().policy
    run = prepared(i, given)
    history = train(run)
    run.reference, _ = load_policy()
    return {**measure(run), **history_of(history)}


# %% Another score


def told(i, settings):
    """The truth itself as the score: the most that any feedback could teach."""
    return finish(prepared(i, settings, world.gold_scores))


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


def ensemble(i, settings, how):
    """The mean or the minimum of the scores of three preference models."""
    members = committee(i, settings["preference"])

    def score(prompts, responses):
        scores = torch.tensor([member(prompts, responses) for member in members])
        return (scores.mean(dim=0) if how == "mean" else scores.amin(dim=0)).tolist()
    return finish(prepared(i, settings, score))


def judged_directly(i, settings, principles):
    """score = the judge's probability that a reply beats one of the reference's, drawn each time; under "all"
    principles, or under "one" that is drawn."""
    judge, (reference, tokenizer) = load_judge(), load_policy()
    torch.manual_seed(1000 + i)
    rivals = {prompt: rlaif.respond(reference, tokenizer, [prompt] * 32, rlaif.Config()).responses
              for prompt in world.PROMPTS + world.HELDOUT_PROMPTS}

    def score(prompts, responses):
        against = [rivals[x][k] for x, k in zip(prompts, torch.randint(32, (len(prompts),)).tolist())]
        if principles == "one":
            return under_one_principle(judge, prompts, responses, against).tolist()
        return rlaif.judge_pairs(*judge, rlaif.CONSTITUTION, prompts, responses, against).tolist()
    return finish(prepared(i, settings, score))


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
