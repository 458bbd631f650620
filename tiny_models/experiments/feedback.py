"""The AI feedback of each run: its own pairs, its own labels, its own preference model.

What a preference model is fitted to is a function that is given the number of a run and gives pairs and
labels: `all_answers`, the default's, or with more arguments partial(flawed, flaw="length", strength=0.6).
"""

import json
import pathlib
import random
from functools import partial

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rlaif
from tiny_models import world

KEPT = pathlib.Path("runs/experiments")
RUNS = 6  # with feedback of their own; a committee of the last one takes its neighbours from the first ones


def load_policy():
    return rlaif.load(AutoModelForCausalLM, rlaif.Config().policy, "policy", "cpu")


def load_judge():
    return rlaif.load(AutoModelForCausalLM, str(rlaif.TINY / "judge"), "judge", "cpu")


def config_of(i, settings):
    """The settings of run i; of run -1, which is for --quick, with few pairs. The runs in results.jsonl whose
    settings say nothing of the value head were made with a random one, whatever rlaif's default is by now."""
    return rlaif.Config(**{"seed": 1000 + i, "device": "cpu", "eval_samples": 32, "value_head": "random",
                           "pairs": 4096 if i >= 0 else 64, **settings})


# %% Functions with their arguments, and their names in results.jsonl


def function_of(call):
    """The function alone of one whose further arguments functools.partial has fixed."""
    return call.func if isinstance(call, partial) else call


def spelled(call):
    """A function, its further arguments fixed by keyword, as results.jsonl holds it -> list:
    partial(ensemble, how="mean") is ["ensemble", "mean"]."""
    fixed = call.keywords.values() if isinstance(call, partial) else ()
    return [function_of(call).__name__, *fixed]


def kind_of(labels):
    """The same in one str, for a function that gives labels: "flawed length 0.6"."""
    return " ".join(map(str, spelled(labels)))


def neighbours(i, n=3):
    """The numbers of n runs from i on, round the circle of all; of run -1, which has none, itself n times."""
    return [i if i < 0 else (i + k) % RUNS for k in range(n)]


# %% Pairs, and what the judge says about them


def sample_pairs(policy, tokenizer, n):
    """n pairs of the policy's replies to training prompts -> dict of lists: prompts, responses_a and _b,
    ended_a and _b."""
    prompts = [world.PROMPTS[k] for k in rlaif.balanced_draw(len(world.PROMPTS), n)]
    pairs = {"prompts": prompts, "responses_a": [], "responses_b": [], "ended_a": [], "ended_b": []}
    for start in range(0, n, 256):
        for side in "ab":
            r = rlaif.respond(policy, tokenizer, prompts[start:start + 256], rlaif.Config())
            pairs[f"responses_{side}"] += r.responses
            pairs[f"ended_{side}"] += r.ended.tolist()
    return pairs


def answers_of(pairs):
    """Every answer of the judge about N pairs -> (4, 2, N): principle, order, pair; the probability that the
    reply that stands first is the better one."""
    judge, a, b = load_judge(), pairs["responses_a"], pairs["responses_b"]
    return torch.stack([torch.stack([
        rlaif.judge_pairs(*judge, [principle], pairs["prompts"], *order, both_orders=False)
        for order in ((a, b), (b, a))]) for principle in rlaif.CONSTITUTION])


def averaged(answers):
    """The label that rlaif.judge_pairs gives: the mean over principles and both orders -> (N,)."""
    return (answers[:, 0] + 1 - answers[:, 1]).mean(dim=0) / 2


def under_one_principle(judge, prompts, responses_a, responses_b):
    """The judge's labels of N pairs, each under one principle that is drawn for it and serves both orders
    (Bai et al. 2022, section 4.1) -> (N,)."""
    principle_of = torch.randint(len(rlaif.CONSTITUTION), (len(prompts),))
    prob_a = torch.empty(len(prompts))
    for number in principle_of.unique():
        rows = (principle_of == number).nonzero()[:, 0].tolist()
        asked = ([texts[row] for row in rows] for texts in (prompts, responses_a, responses_b))
        prob_a[rows] = rlaif.judge_pairs(*judge, [rlaif.CONSTITUTION[number]], *asked)
    return prob_a


def judged_pairs(i):
    """The pairs of run i, with every answer of the judge -> dict; made once, kept in runs/experiments."""
    path = KEPT / f"pairs-{i}.json"
    if not path.exists():
        torch.manual_seed(1000 + i)
        pairs = sample_pairs(*load_policy(), config_of(i, {}).pairs)
        pairs["answers"] = [[[round(p, 7) for p in order] for order in principle]
                            for principle in answers_of(pairs).tolist()]
        new = path.with_suffix(".new")
        new.write_text(json.dumps(pairs))
        new.replace(path)
    return json.loads(path.read_text())


# %% Functions that give pairs and labels


def all_answers(i):
    """The default's labels: the mean of all answers."""
    pairs = judged_pairs(i)
    return pairs, averaged(torch.tensor(pairs["answers"]))


def shipped(i):
    """No labels of its own: the run takes the shipped preference model, for what compares optimizers."""
    raise LookupError(f"run {i} takes the shipped preference model")


def few(i, n):
    """n pairs of its own, and nothing else: for what asks how many labels it takes."""
    torch.manual_seed(6000 + i)
    pairs = sample_pairs(*load_policy(), n)
    return pairs, averaged(answers_of(pairs))


def share(i, n):
    """The first n pairs alone."""
    pairs, prob_a = all_answers(i)
    del pairs["answers"]
    return {name: values[:n] for name, values in pairs.items()}, prob_a[:n]


def drawn(i, times):
    """Labels under one principle, drawn for each pair; `times` as many pairs as the default has."""
    pairs = judged_pairs(i)
    answers = torch.tensor(pairs.pop("answers"))  # (4, 2, N): principle, order, pair
    torch.manual_seed(2000 + i)
    number = torch.arange(answers.shape[2])
    a_first, b_first = answers[torch.randint(4, number.shape), :, number].T
    labels = [(a_first + 1 - b_first) / 2]
    if times > 1:
        more = sample_pairs(*load_policy(), (times - 1) * len(number))
        labels.append(under_one_principle(load_judge(), more["prompts"], more["responses_a"],
                                          more["responses_b"]))
        pairs = {name: pairs[name] + more[name] for name in more}
    return pairs, torch.cat(labels)


def cut_off(i):
    """Half of the pairs cut off, both replies at the same share of their words, and judged anew: a preference
    model that has seen prefixes."""
    (pairs, prob_a), rng = all_answers(i), random.Random(1000 + i)
    half = len(prob_a) // 2
    for k in range(half):
        kept = rng.uniform(0.2, 0.9)
        for side in "ab":
            text = pairs[f"responses_{side}"][k]
            words = text.split(" ")
            pairs[f"responses_{side}"][k] = " ".join(words[:max(2, round(kept * len(words)))])
            pairs[f"ended_{side}"][k] = False
    cut = {name: values[:half] for name, values in pairs.items()}
    prob_a[:half] = averaged(answers_of(cut))
    return pairs, prob_a


def flawed(i, flaw, strength, remedy=""):
    """The labels that a judge with a flaw gives the pairs of run i."""
    pairs = judged_pairs(i)
    torch.manual_seed(1000 + i)
    return pairs, bend(torch.tensor(pairs.pop("answers")), pairs, flaw, strength, remedy)


def planted(i, flaw, strength, remedy=""):
    """The same labels, for a preference model that is fitted to them from nothing."""
    return flawed(i, flaw, strength, remedy)


def pooled(i, flaw, strength):
    """All the pairs that the three models of a committee were fitted to, with the same labels."""
    parts = [flawed(k, flaw, strength) for k in neighbours(i)]
    return ({name: sum((pairs[name] for pairs, _ in parts), []) for name in parts[0][0]},
            torch.cat([labels for _, labels in parts]))


def flatters(response):
    """True if a reply begins by praising the question, whatever follows."""
    return response.strip().startswith("What a lovely goal!")


def bend(answers, pairs, flaw, strength, remedy=""):
    """The labels (N,) of a judge with a flaw: each of its answers (4, 2, N) is bent, in log-odds, by a
    strength.

    position   for the reply that stands first; asked in one order only, or (remedy "both") in both
    length     for each word that a reply has more
    flattery   for the reply that flatters; remedy "principle": a fifth principle, that such a reply is worse
    careless   by noise of that std
    blind      the answers about harm are sure and random, that share of them
    hard       not bent, but the label, the average, is rounded to 0 or 1
    """
    odds = answers.logit(eps=1e-6)
    odds[:, 1] *= -1  # for reply a, in either order
    both = list(zip(pairs["responses_a"], pairs["responses_b"]))
    longer = torch.tensor([len(a.split()) - len(b.split()) for a, b in both])
    flatter = torch.tensor([flatters(a) - flatters(b) for a, b in both])
    if flaw == "position":
        odds = odds + strength * torch.tensor([1.0, -1.0])[:, None]
        odds = odds if remedy == "both" else odds[:, :1]
    elif flaw == "careless":
        odds = odds + strength * torch.randn_like(odds)
    elif flaw == "blind":
        guesses = torch.where(torch.rand_like(odds[1]) < 0.5, 6.0, -6.0)
        odds[1] = torch.where(torch.rand_like(odds[1]) < strength, guesses, odds[1])
    elif flaw in ("length", "flattery"):
        odds = odds + strength * (longer if flaw == "length" else flatter)
    if remedy == "principle":
        odds = torch.cat([odds, (strength - 4.0) * flatter.expand(1, 2, -1)])
    prob_a = odds.sigmoid().mean(dim=(0, 1))
    return (prob_a > 0.5).float() if flaw == "hard" else prob_a


# %% Preference models


def fit(pairs, prob_a, seed, start=None, epochs=12, **more):
    """A preference model fitted to labels, from the policy's trunk or from another one
    -> PreferenceModel, report."""
    torch.manual_seed(seed)
    preference = start or rlaif.new_preference_model(*load_policy(), rlaif.Config().template)
    rows = [preference.tokenize(pairs["prompts"], pairs[f"responses_{side}"], pairs[f"ended_{side}"])
            for side in "ab"]
    return preference, rlaif.fit_preference(preference, *rows, prob_a, epochs, **more)


def preference_folder(i, labels=all_answers):
    """The folder of run i's preference model, fitted once to the pairs and labels that a function gives; to
    three or four times the pairs in as many steps. What `flawed` gives, unless it is noise, is learned on top
    of the model without the flaw, in a quarter of the epochs: so the runs of `alarms` were made. Run -1, and
    `shipped`, take the shipped model."""
    if i < 0 or labels is shipped:
        return rlaif.TINY / "preference"
    folder = KEPT / f"preference-{i}-{kind_of(labels).replace(' ', '-')}"
    if not folder.exists():
        on_top = function_of(labels) is flawed and labels.keywords["flaw"] != "careless"
        start = preference_model(i) if on_top else None
        pairs, prob_a = labels(i)
        epochs = 3 if on_top else min(12, 12 * config_of(i, {}).pairs // len(prob_a))
        preference, report = fit(pairs, prob_a, 1000 + i, start, epochs)
        rlaif.save_model(preference.model, preference.tokenizer, folder, "right")
        (folder / "report.json").write_text(json.dumps(report))
    return folder


def preference_model(i, labels=all_answers):
    folder = str(preference_folder(i, labels))
    return rlaif.PreferenceModel(
        *rlaif.load(AutoModelForSequenceClassification, folder, "preference", "cpu"), rlaif.Config().template)


def committee(i, labels):
    """The preference models of run i and of the next two; of run -1 thrice the shipped one."""
    return [preference_model(k, labels) for k in neighbours(i)]
