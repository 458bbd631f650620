"""What tiny_models computes of its runs: verdicts, chords, flaws, the order of the work, alarms."""

import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlaif
from rlaif import preference_loss
from tiny_models import build, world
from tiny_models.experiments import (alarms, feedback, feedback_claims, forest, measurements, protocol, runs,
                                     second_look)

settings.register_profile("few", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("few")


def close(a, b, why, atol=1e-10):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert torch.allclose(a, b, rtol=1e-10, atol=atol), f"{why}: off by {(a - b).abs().max().item():.3g}"


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**31))
def test_the_account_of_a_preference_loss_adds_up(K, N, seed):
    generator = torch.Generator().manual_seed(seed)
    answers = torch.rand(K, N, generator=generator, dtype=torch.float64)
    scores = torch.randn(2, N, generator=generator, dtype=torch.float64)
    label, model = (torch.distributions.Bernoulli(p)
                    for p in (answers.mean(dim=0), torch.sigmoid(scores[0] - scores[1])))
    loss = preference_loss(*scores, label.probs).item()
    doubt, disagreement, misfit = build.loss_account(answers, loss)
    close(doubt + disagreement + misfit, loss, "the three parts are not the loss")
    close(misfit, torch.distributions.kl_divergence(label, model).mean().item(), "misfit is a mean KL")
    assert doubt >= 0 and disagreement > -1e-12 and (K > 1 or abs(disagreement) < 1e-12)
    each = [preference_loss(*scores, answer).item() for answer in answers]
    close(sum(each) / K, loss, "one principle drawn for a pair costs the same model the same, on average")


@pytest.mark.parametrize("differences,low,high,says", [
    ([1.0, 2.0, 3.0], -0.484, 4.484, "cannot be told with 3 runs"),  # 2 -+ 4.303 / sqrt(3), by hand
    ([1.8, 2.0, 2.2], 1.503, 2.497, "holds"), ([-1.8, -2.0, -2.2], -2.497, -1.503, "the reverse holds")])
def test_a_verdict_is_students_interval_over_paired_runs(differences, low, high, says):
    less = {i: 10.0 * i for i in range(5)}  # runs without a partner are left out
    verdict = protocol.compare("", {i: less[i] + d for i, d in enumerate(differences)}, less)
    close(torch.tensor(verdict.interval), torch.tensor([low, high]), "another interval", atol=2e-3)
    assert str(verdict) == says


def test_arms_are_compared_at_the_same_kl_between_their_own_points():
    kl, gold = (0.25, 4.0, 1.0), (0.5, 2.0, 1.0)  # gold is the root of the KL: a straight line
    arm = protocol.Arm(betas=(3.0, 0.1, 1.0), runs=1)
    arm.results = {(beta, 0): {"kl": k, "gold": g} for beta, k, g in zip(arm.betas, kl, gold)}
    for at in (0.25, 0.7, 3.7, 4.0):
        close(arm.at_kl(kl=at)[0], at ** 0.5, f"gold at {at} nats")
    assert arm.at_kl(kl=4.1) == arm.at_kl(kl=0.2) == {}, "outside its points an arm says nothing"
    assert arm.at_beta(0.1) == {0: 2.0}


@given(st.integers(0, 2**31))
def test_a_planted_flaw_bends_the_labels_its_own_way(seed):
    answers = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1
    pairs = {"responses_a": ["one two three", "What a lovely goal! Go"],
             "responses_b": ["one", "a b c d e f"], "answers": answers.tolist()}
    swapped = {"responses_a": pairs["responses_b"], "responses_b": pairs["responses_a"],
               "answers": answers.flip(1).tolist()}
    sound = feedback.averaged(answers)

    def labels(how, *arguments, of=pairs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feedback, "judged_pairs", lambda i: dict(of))
            return how(0, *arguments)[1]
    for flaw in ("length", "flattery", "careless", "blind"):
        close(labels(feedback.flawed, flaw, 0), sound, f"{flaw} of no strength", atol=1e-5)
    for how in (("length", 1), ("flattery", 1), ("position", 2, "both")):
        both = labels(feedback.flawed, *how) + labels(feedback.flawed, *how, of=swapped)
        close(both, torch.ones(2), f"{how} does not depend on which reply is a", atol=1e-5)
    longer, flatters = (labels(feedback.flawed, flaw, 1) - sound for flaw in ("length", "flattery"))
    assert longer[0] > 0 > longer[1] and flatters[1] > 0 and abs(flatters[0]) < 1e-6
    against = labels(feedback.flawed, "flattery", 1, "principle")
    assert against[1] < labels(feedback.flawed, "flattery", 1)[1]
    one_order = labels(feedback.flawed, "position", 2)
    assert (one_order > answers[:, 0].mean(dim=0)).all(), "the reply that stands first gains"
    assert (labels(feedback.flawed, "hard", 1) == (sound > 0.5)).all()
    own = (answers[:, 0] + 1 - answers[:, 1]) / 2  # (4, 2): each principle's own label
    assert ((own - labels(feedback.drawn, 1)).abs() < 1e-6).any(dim=0).all()


def test_a_judge_with_a_flaw_teaches_a_preference_model_from_nothing(monkeypatch, tmp_path):
    fitted, model = [], rlaif.PreferenceModel(*[torch.nn.Linear(1, 1)] * 2)
    monkeypatch.setattr(feedback, "KEPT", tmp_path)
    monkeypatch.setattr(feedback, "preference_model", lambda i: "the model without the flaw")
    monkeypatch.setattr(feedback, "flawed", lambda i, *how: ({"prompts": [f"of {i}"]}, torch.ones(4096)))
    monkeypatch.setattr(feedback, "fit", lambda *given: fitted.append(given) or (model, {}))
    monkeypatch.setattr(rlaif, "save_model", lambda model, tokenizer, folder, side: folder.mkdir())
    for how in (feedback.planted, feedback.pooled):
        feedback.preference_folder(3, partial(how, flaw="length", strength=0.6))
    (_, labels, seed, start, epochs), (pairs, more, _, none, fewer) = fitted
    assert (len(labels), seed, start, epochs) == (4096, 1003, None, 12)
    assert (pairs["prompts"], len(more), none, fewer) == (["of 3", "of 4", "of 5"], 3 * 4096, None, 4)
    for label, arm in feedback_claims.JUDGES.items():
        assert arm.steered and protocol.function_of(arm.settings["preference"]) is not feedback.flawed, label


@given(st.sampled_from(world.PROMPTS + world.HELDOUT_PROMPTS), st.integers(0, 2**31))
def test_the_grammar_writes_fluent_replies_and_none_beats_the_best(prompt, seed):
    reply, best = world.sample_reply(prompt, random.Random(seed)), world.best_reply(prompt)
    assert world.is_fluent(reply) and world.is_fluent(best)
    assert not world.is_fluent("") and not world.is_fluent(reply + " take")
    babble = reply + " " + " ".join(["take"] * 9)
    worst, middle, top = world.gold_scores([prompt] * 3, [babble, reply, best])
    assert worst < middle <= top == 3, "babble must cost something"


def test_what_a_run_needs_is_made_before_it_and_once():
    careless, pooled = (partial(how, flaw="careless", strength=8)
                        for how in (feedback.flawed, feedback.pooled))
    jobs = [protocol.Job(partial(runs.ensemble, how="mean"), {"beta": 0.3, "preference": careless}, 5),
            protocol.Job(measurements.aged, {"beta": 0.15}, 2),
            protocol.Job(runs.ppo, {"beta": 1.0, "preference": pooled}, 2)]
    no_feedback = [protocol.Job(measurements.kl_gradients, {"beta": 0.5}, 4),
                   protocol.Job(runs.ppo, {"beta": 0.3, "preference": feedback.shipped}, 4)]
    assert not any(calls for _, calls in protocol.stages(no_feedback)), "these need no labels"
    assert [job.line() for job in jobs] == [
        {"how": ["ensemble", "mean"], "settings": {"beta": 0.3, "preference": "flawed careless 8"}, "i": 5},
        {"how": ["aged"], "settings": {"beta": 0.15}, "i": 2},
        {"how": ["ppo"], "settings": {"beta": 1.0, "preference": "pooled careless 8"}, "i": 2}]
    labels, plain, others, policies = ([arguments for _, *arguments in calls]
                                       for _, calls in protocol.stages(jobs))
    others = [[i, feedback.kind_of(kind)] for i, kind in others]
    assert labels == [[0], [1], [2], [3], [4], [5]] and plain == [[0], [1], [2], [5]]
    assert policies == [[2, 0.15]]
    assert others == [[0, "flawed careless 8"], [1, "flawed careless 8"], [2, "all_answers"],
                      [2, "pooled careless 8"], [5, "flawed careless 8"]]


def test_an_alarm_is_as_loud_as_what_it_watches_has_moved():
    looks = [[0.0, 1.0, 0.5, 0.4, 15.0, 0.9, 0.1, 0.6, 0.7],
             [1.0, 2.0, 0.8, 0.5, 12.0, 0.8, 0.3, 0.9, 0.6]]
    expected = {"KL": [1, 2], "score": [0.5, 0.8], "entropy": [0, 0], "length": [0, 3], "distinct": [0, 0.1],
                "committee": [0.1, 0.3], "judge": [0, 0], "agreement": [0, 0.1]}
    levels = alarms.levels(looks)
    assert levels.keys() == expected.keys()
    for name, values in expected.items():
        close(torch.tensor(levels[name]), torch.tensor(values, dtype=torch.float32), name, atol=1e-6)


@pytest.mark.parametrize("n,t,p", [(3, 4.303, 0.05), (3, 9.925, 0.01), (4, 3.182, 0.05), (5, 2.776, 0.05),
                                   (6, 2.571, 0.05), (6, 4.032, 0.01), (6, 0.0, 1.0)])
def test_a_p_value_is_the_one_of_the_tables_of_students_t(n, t, p):
    spread = torch.linspace(-1, 1, n, dtype=torch.float64)
    mean = t * spread.std() / n ** 0.5
    close(protocol.Verdict("", (spread + mean).tolist()).p_value, p, f"t {t} of {n} runs", atol=2e-4)


def test_a_verdict_may_be_that_nothing_matters_or_that_it_was_only_shown():
    near, far, apart = [0.01, -0.02, 0.02, 0.0], [0.2, -0.3, 0.1, 0.0], [0.05, 0.06, 0.05, 0.06]
    lower = [-0.25, 0.0, -0.1, -0.1]
    says = [str(protocol.Verdict("", differences, 0.1)) for differences in (near, far, lower, apart)]
    assert says == ["no difference above 0.1", *["cannot be told with 4 runs"] * 2, "holds"]
    assert str(protocol.Verdict("", near)) == "cannot be told with 4 runs"
    assert str(protocol.Verdict("", apart, shown=True)) == "shown, not tested"


def test_holms_correction_asks_most_of_the_smallest_p_value():
    def verdict(t):  # of three runs: t 4.303 has p 0.05, 9.925 has 0.01, 14.09 has 0.005, 99.9 has 0.0001
        return protocol.Verdict("", [t / 3 ** 0.5 + d for d in (-1.0, 0.0, 1.0)])
    three = {"weak": verdict(4.5), "middle": verdict(7.7), "strong": verdict(99.9)}  # 0.046, 0.016, 0.0001
    assert second_look.several(three) == ("Of 3 intervals 3 keep clear of zero with Holm's correction for "
                                          "their number: `strong`, `middle`, `weak`.")
    three["middle"] = verdict(6.0)  # 0.027 is above 0.05 / 2, and what is weaker fails with it
    assert "3 intervals 1 keep" in second_look.several(three)
    three["shown"] = protocol.Verdict("", [1.0, 1.0, 1.1], shown=True)
    assert "Of 3 intervals" in second_look.several(three), "what was only shown is not counted"


def test_an_arm_stands_beside_the_default_at_its_own_kl(monkeypatch):
    def arm(gold_of, *kls, **more):
        made = protocol.Arm(betas=tuple(range(len(kls))), runs=3, **more)
        made.results = {(k, i): {"kl": kl, "gold": gold_of(kl) + i} for k, kl in enumerate(kls)
                        for i in range(3)}
        return made
    default = arm(lambda kl: kl ** 0.5, 1.0, 3.0, 4.0, 6.0)  # a straight line over the root of the KL
    better = arm(lambda kl: kl ** 0.5 + 0.2, 1.0, 4.0)
    monkeypatch.setattr(forest, "DEFAULT", default)
    monkeypatch.setattr(forest, "ARMS", {"better": ("claim", "label")})
    one = protocol.Verdict("", [1.0, 1.0, 1.2])
    found = forest.beside_default({"claim": {"label": better}}, default, {"stop": one, "best_of_n": one})
    kl, less, by_line = found["better"]
    assert kl == [4.0] * 3
    close(less.differences, [0.2] * 3, "gold less the default's at 4 nats")
    close(by_line.differences, [0.2] * 3, "on a straight line it is the same")
    close(found["no price, stopped at 3.7 nats"][1].differences, [-1.0, -1.0, -1.2], "the other way round")


def test_a_steered_runs_gold_is_moved_along_the_defaults_curve(monkeypatch):
    curve = protocol.Arm({}, protocol.EVERY_PRICE, 2)
    curve.results = {(beta, i): {"kl": kl, "gold": 2 * kl ** 0.5 + i}
                     for beta, kl in zip(protocol.EVERY_PRICE, (6.0, 5.0, 3.7, 3.0, 1.0)) for i in range(2)}
    monkeypatch.setattr(protocol, "CURVE", curve)
    arm = protocol.steered(runs=2)
    assert arm.steered and not protocol.DEFAULT.steered
    arm.results = {(0.3, i): {"kl": 3.0, "gold": 1.0 + i, "length": 17.0} for i in range(2)}
    up = 2 * (3.7 ** 0.5 - 3 ** 0.5)
    close(list(arm.at_kl().values()), [1 + up, 2 + up], "moved")
    assert arm.at_kl("length") == {0: 17.0, 1: 17.0}, "only gold is moved"


def test_stopping_by_a_rule_keeps_the_gold_of_that_look():
    falls = [[2.0, 5.0, 1.0, 0.5, 15.0, 0.9, 0.1, 0.6, 0.7], [1.0, 10.0, 1.2, 0.5, 15.0, 0.9, 0.5, 0.6, 0.7],
             [0.0, 20.0, 1.4, 0.5, 15.0, 0.9, 0.9, 0.6, 0.7]]
    honest = [[1.0, 3.0, 1.0, 0.5, 15.0, 0.9, 0.2, 0.6, 0.7]] * 2

    def arm(looks):
        made = protocol.Arm()
        made.results = {(0.0, i): {"looks": looks} for i in range(2)}
        return made
    arms_ = {"no flaw": arm(falls), "sound": arm(honest), "trained on gold": arm(honest),
             **{flaw: arm(falls) for flaw in alarms.FLAWS}}
    table = [row.strip("| ").split(" | ") for row in second_look.stops(arms_).splitlines()]
    rows = {name: row for name, *row in table}
    assert rows["the highest gold, which nobody knows"][0] == "2.00 ± 0.00"
    assert rows["KL above 9 nats"][0] == "1.00 ± 0.00" and rows["KL above 9 nats"][2] == "0 of 2"
    assert rows["a look at random"][0] == "1.00 ± 0.00"
