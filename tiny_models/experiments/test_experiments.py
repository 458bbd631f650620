"""What tiny_models computes of its runs: verdicts, chords, flaws, the order of the work, alarms."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif import preference_loss
from tiny_models import build
from tiny_models.experiments import alarms, feedback, measurements, protocol, runs

settings.register_profile("few", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("few")


def close(a, b, why, atol=1e-10):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert torch.allclose(a, b, rtol=1e-10, atol=atol), f"{why}: off by {(a - b).abs().max().item():.3g}"


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**31))
def test_the_account_of_a_preference_loss_adds_up(K, N, seed):
    random = torch.Generator().manual_seed(seed)
    answers = torch.rand(K, N, generator=random, dtype=torch.float64)
    scores = torch.randn(2, N, generator=random, dtype=torch.float64)
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


def test_what_a_run_needs_is_made_before_it_and_once():
    careless, pooled = (partial(how, flaw="careless", strength=8)
                        for how in (feedback.flawed, feedback.pooled))
    jobs = [protocol.Job(partial(runs.ensemble, how="mean"), {"beta": 0.3, "preference": careless}, 5),
            protocol.Job(measurements.aged, {"beta": 0.15}, 2),
            protocol.Job(runs.ppo, {"beta": 1.0, "preference": pooled}, 2)]
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
