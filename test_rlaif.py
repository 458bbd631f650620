"""The mathematics of rlaif.py, as properties. Read the names from top to bottom and you have read the theory.

Oracles are independent of the code under test: O(T^2) sums, enumeration of every response, autograd, float64,
torch.distributions, transformers' own generate. An assert that fails says what is probably wrong.

    pytest                       the fixed set of examples, the same on every run
    RLAIF_SEARCH=2000 pytest     that many random examples per property
"""

import copy
import dataclasses
import itertools
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPTNeoXConfig,
                          GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM, Qwen2ForSequenceClassification)

import rlaif
from rlaif import (dense_scores, gae, generate, kl_estimate, masked_mean, policy_loss, preference_loss, shape_rewards,
                   token_logprobs, update_beta, value_loss, whiten)
from tiny_models import world

torch.set_num_threads(2)
quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("fixed", deadline=None, max_examples=50, derandomize=True, database=None, suppress_health_check=quiet)
settings.register_profile("search", deadline=None, max_examples=int(os.environ.get("RLAIF_SEARCH", "0")) or 1, suppress_health_check=quiet)
settings.load_profile("search" if os.environ.get("RLAIF_SEARCH") else "fixed")

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
HERE = pathlib.Path(__file__).parent


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that is there: nothing passes for a device that did not run it."""
    return request.param


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn: batches of responses of different lengths, in float64
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """B responses of 1 to T tokens, with random tensors to match; the same numbers on every device."""
    lengths: list
    T: int
    seed: int
    device: str = "cpu"

    def __post_init__(self):
        self.random = torch.Generator().manual_seed(self.seed)
        self.B = len(self.lengths)
        self.mask = (torch.arange(self.T) < torch.tensor(self.lengths)[:, None]).to(self.device)

    def on(self, device):
        return Batch(self.lengths, self.T, self.seed, device)

    def draw(self, *shape, scale=1.0):
        return (torch.randn(shape or (self.B, self.T), generator=self.random, dtype=torch.float64) * scale).to(self.device)

    def masked(self, *shape, scale=1.0):
        return torch.where(self.mask, self.draw(*shape, scale=scale), 0.0)


@st.composite
def batches(draw, max_rows=5, max_tokens=8, min_rows=1):
    lengths = draw(st.lists(st.integers(1, max_tokens), min_size=min_rows, max_size=max_rows))
    return Batch(lengths, max(lengths) + draw(st.integers(0, 3)), draw(st.integers(0, 2**31)))


unit = st.floats(0, 1)


def close(a, b, why, atol=1e-10):
    """Assert that two tensors agree to 1e-10, and say why they should."""
    a, b = (torch.as_tensor(x, dtype=torch.float64, device="cpu").detach() for x in (a, b))
    assert torch.allclose(a, b.expand_as(a), rtol=1e-10, atol=atol), f"{why}: off by {(a - b).abs().max().item():.3g}"


# ---------------------------------------------------------------------------------------------------------------------
# GAE
# ---------------------------------------------------------------------------------------------------------------------


@given(batches(), unit)
def test_gae_with_lambda_one_is_return_minus_value(device, batch, gamma):
    batch = batch.on(device)
    rewards, values = batch.draw(), batch.draw()
    advantages, _ = gae(rewards, values, batch.mask, gamma, lam=1.0)
    for b, t in batch.mask.nonzero().tolist():
        future = sum(gamma ** (k - t) * rewards[b, k] for k in range(t, batch.lengths[b]))
        close(advantages[b, t] + values[b, t], future, "A + V is not the discounted return: is a value taken from past the last token?")


@given(batches(), unit)
def test_gae_with_lambda_zero_is_the_temporal_difference(device, batch, gamma):
    batch = batch.on(device)
    rewards, values = batch.draw(), batch.draw()
    advantages, _ = gae(rewards, values, batch.mask, gamma, lam=0.0)
    for b, t in batch.mask.nonzero().tolist():
        following = values[b, t + 1] if t + 1 < batch.lengths[b] else 0.0
        close(advantages[b, t], rewards[b, t] + gamma * following - values[b, t], "A is not delta: are the values shifted by one token?")


@given(batches(), unit, unit)
def test_gae_is_the_discounted_sum_of_temporal_differences(device, batch, gamma, lam):
    batch = batch.on(device)
    rewards, values = batch.draw(), batch.draw()
    advantages, returns = gae(rewards, values, batch.mask, gamma, lam)
    for b, length in enumerate(batch.lengths):
        v = [*values[b, :length].tolist(), 0.0]
        deltas = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            close(advantages[b, t].item(), expected, "A is not the sum of (gamma lam)^k delta_{t+k}")
            after = advantages[b, t + 1].item() if t + 1 < length else 0.0
            close(advantages[b, t].item() - gamma * lam * after, deltas[t], "A_t - gamma lam A_{t+1} is not delta_t")
        close(advantages[b, length - 1], rewards[b, length - 1] - values[b, length - 1], "A of the last token is not r - V: V after it is 0")
    close(returns - torch.where(batch.mask, values, 0.0), advantages, "returns are not A + V: were they taken after whitening?")
    assert (returns[~batch.mask] == 0).all() and (advantages[~batch.mask] == 0).all(), "padding has an advantage or a return"


@given(batches(), unit, unit)
def test_gae_is_zero_when_the_values_are_the_returns(batch, gamma, lam):
    rewards, values = batch.draw(), torch.zeros(batch.B, batch.T, dtype=torch.float64)
    for b, length in enumerate(batch.lengths):
        for t in range(length):
            values[b, t] = sum(gamma ** (k - t) * rewards[b, k] for k in range(t, length))
    advantages, _ = gae(rewards, values, batch.mask, gamma, lam)
    close(advantages, torch.zeros_like(advantages), "a perfect value function leaves no advantage, whatever lambda")


@given(batches(), unit, unit)
def test_gae_is_linear_in_rewards_and_values(batch, gamma, lam):
    r1, v1, r2, v2 = (batch.draw() for _ in range(4))
    both, _ = gae(2 * r1 - 3 * r2, 2 * v1 - 3 * v2, batch.mask, gamma, lam)
    close(both, 2 * gae(r1, v1, batch.mask, gamma, lam)[0] - 3 * gae(r2, v2, batch.mask, gamma, lam)[0], "GAE is not linear")


@given(batches(max_rows=1), unit, unit)
def test_gae_is_causal_and_credits_earlier_tokens_by_gamma_lambda(batch, gamma, lam):
    rewards = batch.draw().requires_grad_()
    advantages, _ = gae(rewards, batch.draw(), batch.mask, gamma, lam)
    for s in range(batch.lengths[0]):
        (row,) = torch.autograd.grad(advantages[0, s], rewards, retain_graph=True)
        for t in range(batch.T):
            expected = (gamma * lam) ** (t - s) if s <= t < batch.lengths[0] else 0.0
            close(row[0, t], expected, f"dA_{s}/dr_{t} is not (gamma lam)^(t-s): an advantage must not see earlier rewards")


def test_gae_by_hand(device):
    rewards, values = (torch.tensor([x], dtype=torch.float64, device=device) for x in ([0.0, 0, 1], [0.2, 0.5, 0.7]))
    for lam, expected in ((0, [0.3, 0.2, 0.3]), (0.5, [0.475, 0.35, 0.3]), (0.95, [0.76075, 0.485, 0.3]), (1, [0.8, 0.5, 0.3])):
        close(gae(rewards, values, torch.ones_like(rewards, dtype=torch.bool), 1.0, lam)[0][0], torch.tensor(expected, dtype=torch.float64),
              f"worked example, lambda {lam}")
    default = gae(rewards, values, torch.ones_like(rewards, dtype=torch.bool))[0][0, 0]
    close(default, 0.76075, "the defaults are gamma 1, lambda 0.95")


# ---------------------------------------------------------------------------------------------------------------------
# Masks and padding
# ---------------------------------------------------------------------------------------------------------------------

MASKED = {  # every public function with a mask: how many (B, T) inputs it takes, the call, whether its rows are independent
    "masked_mean": (1, lambda x, mask, scores: masked_mean(*x, mask), False),
    "whiten": (1, lambda x, mask, scores: whiten(*x, mask), False),
    "whiten keeping the mean": (1, lambda x, mask, scores: whiten(*x, mask, shift_mean=False), False),
    "shape_rewards per token": (1, lambda x, mask, scores: shape_rewards(scores, *x, mask, 0.3), True),
    "shape_rewards per response": (1, lambda x, mask, scores: shape_rewards(scores, *x, mask, 0.3, "sequence"), True),
    "shape_rewards per batch": (1, lambda x, mask, scores: shape_rewards(scores, *x, mask, 0.3, "batch"), False),
    "dense_scores": (1, lambda x, mask, scores: dense_scores(*x, mask), True),
    "gae": (2, lambda x, mask, scores: torch.stack(gae(*x, mask, 0.9, 0.8)), True),
    "policy_loss": (3, lambda x, mask, scores: torch.stack([y.double() for y in policy_loss(*x, mask)]), False),
    "policy_loss without clipping": (3, lambda x, mask, scores: policy_loss(*x, mask, clip=math.inf)[0], False),
    "value_loss": (3, lambda x, mask, scores: value_loss(*x, mask), False),
    "value_loss without clipping": (3, lambda x, mask, scores: value_loss(*x, mask, clip=None), False),
}
each_masked_function = pytest.mark.parametrize("name", MASKED)


@each_masked_function
@given(batches(), st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))
def test_what_stands_outside_the_mask_changes_no_bit(device, name, batch, poison):
    batch = batch.on(device)
    count, function, _ = MASKED[name]
    scores, clean = batch.draw(batch.B), [batch.masked() for _ in range(count)]
    results = []
    for inputs in (clean, [torch.where(batch.mask, x, poison) for x in clean]):
        inputs = [x.clone().requires_grad_() for x in inputs]
        out = function(inputs, batch.mask, scores)
        if out.shape[-2:] == batch.mask.shape:
            assert (out[..., ~batch.mask] == 0).all(), f"{name}: the output is not 0 outside the mask"
        weight = torch.arange(1.0, out.numel() + 1, dtype=out.dtype, device=device).view(out.shape)
        out.mul(weight).sum().backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        assert all((grad[~batch.mask] == 0).all() for grad in grads), f"{name}: padding has a gradient"
        results.append([out.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results)), f"{name}: padding leaks (multiplied by the mask instead of torch.where?)"


@each_masked_function
@given(batches(), st.integers(1, 4))
def test_more_padding_changes_nothing(name, batch, columns):
    count, function, _ = MASKED[name]
    scores, inputs = batch.draw(batch.B), [batch.masked() for _ in range(count)]
    wide = [torch.nn.functional.pad(x, (0, columns), value=7.0) for x in inputs]
    narrow_out, wide_out = function(inputs, batch.mask, scores), function(wide, torch.nn.functional.pad(batch.mask, (0, columns)), scores)
    if narrow_out.dim() > 1:
        wide_out = wide_out[..., :batch.T]
    close(wide_out, narrow_out, f"{name}: the result depends on the number of padding columns", atol=1e-12)


@each_masked_function
@given(batches(min_rows=2))
def test_a_row_alone_is_that_row_in_a_batch(name, batch):
    count, function, rowwise = MASKED[name]
    scores, inputs = batch.draw(batch.B), [batch.masked() for _ in range(count)]
    whole = function(inputs, batch.mask, scores)
    if rowwise:
        for b in range(batch.B):
            alone = function([x[b:b + 1] for x in inputs], batch.mask[b:b + 1], scores[b:b + 1])
            close(alone[..., 0, :], whole[..., b, :], f"{name}: rows of a batch influence one another", atol=1e-12)
    order = torch.randperm(batch.B, generator=batch.random)
    shuffled = function([x[order] for x in inputs], batch.mask[order], scores[order])
    close(shuffled, whole[..., order, :] if whole.shape[-2:] == batch.mask.shape else whole, f"{name}: the order of the rows matters", atol=1e-12)


@each_masked_function
@given(batches(), st.data())
def test_a_response_without_a_token_is_an_error(name, batch, data):
    count, function, _ = MASKED[name]
    mask = batch.mask.clone()
    mask[data.draw(st.integers(0, batch.B - 1))] = False
    with pytest.raises(ValueError, match="at least one True"):
        function([batch.draw() for _ in range(count)], mask, batch.draw(batch.B))


@given(batches())
def test_masked_mean_is_the_mean_of_the_real_entries(device, batch):
    batch = batch.on(device)
    x = batch.draw()
    close(masked_mean(x, batch.mask), sum(x[b, t].item() for b, t in batch.mask.nonzero().tolist()) / sum(batch.lengths),
          "padding is counted in the mean, or each row is averaged first")


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities and KL estimators
# ---------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 9), st.floats(0.2, 3), st.integers(0, 2**31))
def test_token_logprobs_are_those_of_the_categorical_that_was_sampled(device, B, T, V, temperature, seed):
    random = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(B, T, V, generator=random, dtype=torch.float64)).to(device)
    tokens = torch.randint(V, (B, T), generator=random).to(device)
    expected = torch.distributions.Categorical(logits=logits / temperature)
    close(token_logprobs(logits, tokens, temperature), expected.log_prob(tokens), "not log softmax(logits / temperature) at the tokens")
    close(rlaif.token_entropy(logits, temperature), expected.entropy(), "not the entropy of softmax(logits / temperature)")
    assert token_logprobs(logits.bfloat16(), tokens).dtype == torch.float32, "half precision must be upcast"
    assert rlaif.token_entropy(logits.half()).dtype == torch.float32, "half precision must be upcast"
    close(token_logprobs(logits.bfloat16(), tokens), token_logprobs(logits.bfloat16().float(), tokens), "upcast before the softmax, not after")


def random_policies(seed, V):
    """Log-probabilities of two policies over V actions, the first with a gradient."""
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1].log_softmax(-1)


@given(st.integers(0, 2**31), st.integers(2, 8))
def test_k1_and_k3_have_the_kl_as_their_mean_under_the_policy(seed, V):
    logits, ref = random_policies(seed, V)
    logprobs = logits.log_softmax(-1)
    exact = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=ref))
    for kind in ("k1", "k3"):
        close((logprobs.exp() * kl_estimate(logprobs, ref, kind)).sum(), exact, f"E[{kind}] is not KL(pi || ref): is the ratio upside down?")


@given(st.integers(0, 2**31), st.integers(2, 8))
def test_the_gradient_of_k1_has_mean_zero_and_that_of_k2_is_the_gradient_of_the_kl(seed, V):
    logits, ref = random_policies(seed, V)
    logprobs = logits.log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - ref)).sum()
    (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
    mean_gradient = {kind: torch.autograd.grad((logprobs.exp().detach() * kl_estimate(logprobs, ref, kind)).sum(), logits, retain_graph=True)[0]
                     for kind in ("k1", "k2")}
    close(mean_gradient["k1"], torch.zeros(V), "E[grad k1] is not 0")
    close(mean_gradient["k2"], exact, "E[grad k2] is not grad KL")


@given(st.floats(-5, 5))
def test_k3_is_never_negative_and_k2_is_its_second_order(d):
    d = torch.tensor(d, dtype=torch.float64)
    k1, k2, k3 = (kl_estimate(d, torch.zeros(()), kind) for kind in ("k1", "k2", "k3"))
    assert k3 >= 0 and (k3 > 0 or abs(d) < 1e-7), "k3 is exp(-d) - 1 + d: positive, and zero only where the policies agree"
    close(k1, d, "k1 is log pi - log ref")
    close(k2, d * d / 2, "k2 is d^2 / 2")
    small = d / 1000
    assert abs(kl_estimate(small, torch.zeros(()), "k3") - small ** 2 / 2) <= abs(small) ** 3 / 5 + 1e-16, "k3 is d^2/2 to third order"


def test_the_estimators_have_schulmans_bias_and_spread():
    """q = N(0, 1) is sampled, p = N(mu, 1), by quadrature: the table of "Approximating KL divergence"."""
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    weight = torch.distributions.Normal(0.0, 1.0).log_prob(x).exp() * (x[1] - x[0])
    for mu, expected in ((1.0, {"k1": (0, 2), "k2": (0.25, 1.73205), "k3": (0, 1.69503)}), (0.1, {"k1": (0, 20), "k2": (0.0025, 2.01**0.5)})):
        true = mu**2 / 2
        for kind, (bias, spread) in expected.items():
            k = kl_estimate(torch.distributions.Normal(0.0, 1.0).log_prob(x), torch.distributions.Normal(mu, 1.0).log_prob(x), kind)
            mean = (weight * k).sum()
            close((mean - true) / true, bias, f"bias of {kind} at mu {mu}", atol=1e-5)
            close(((weight * k * k).sum() - mean**2).sqrt() / true, spread, f"spread of {kind} at mu {mu}", atol=1e-4)


def test_an_unknown_estimator_or_level_is_an_error():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(one, one, "k4")
    with pytest.raises(ValueError, match="word"):
        shape_rewards(one[0], one, one.bool(), 0.1, "word")


# ---------------------------------------------------------------------------------------------------------------------
# Rewards
# ---------------------------------------------------------------------------------------------------------------------


@given(batches(), st.floats(0, 3), st.booleans())
def test_rewards_of_a_response_sum_to_its_score_less_beta_times_its_kl(device, batch, beta, per_row):
    batch = batch.on(device)
    scores, kl = batch.draw(batch.B), batch.draw()
    beta = beta * torch.arange(1, batch.B + 1, dtype=torch.float64, device=device) if per_row else beta
    total = scores - beta * batch.mask.mul(kl).sum(1)
    for level in ("token", "sequence"):
        close(shape_rewards(scores, kl, batch.mask, beta, level).sum(1), total, f"{level}: a response must get score - beta * KL: "
              "wrong sign, beta applied twice, or padding in the KL?")
    rewards = shape_rewards(scores, kl, batch.mask, beta, "batch")
    close(rewards.sum(), total.sum(), "batch: the batch as a whole must pay for its whole KL")
    close(rewards.sum(1) - scores, (total - scores).mean().expand(batch.B), "batch: every response pays the same")


@given(batches(), st.floats(0, 3))
def test_the_score_stands_on_the_last_token_and_the_kl_on_each(device, batch, beta):
    batch = batch.on(device)
    scores, kl = batch.draw(batch.B), batch.draw()
    score_alone = shape_rewards(scores, kl, batch.mask, beta) + beta * torch.where(batch.mask, kl, 0.0)
    one_hot = torch.zeros_like(kl)
    for b, length in enumerate(batch.lengths):
        one_hot[b, length - 1] = scores[b]
    close(score_alone, one_hot, "the score belongs on the last real token, the EOS itself: not before it, not on padding")
    for level in ("token", "sequence", "batch"):
        assert torch.equal(shape_rewards(scores, kl, batch.mask, 0.0, level), one_hot), f"{level}: beta 0 must leave the score alone"
        assert torch.equal(shape_rewards(scores, torch.zeros_like(kl), batch.mask, 1.0, level), one_hot), f"{level}: no KL, no penalty"
    for level in ("sequence", "batch"):
        rewards = shape_rewards(scores, kl, batch.mask, beta, level)
        assert (rewards[one_hot == 0] == 0).all(), f"{level}: the whole penalty stands on the last token"


@given(batches())
def test_dense_scores_telescope_to_the_score_of_the_whole_response(device, batch):
    batch = batch.on(device)
    prefix_scores = batch.draw()
    spread = dense_scores(prefix_scores, batch.mask)
    for b, length in enumerate(batch.lengths):
        close(spread[b].sum(), prefix_scores[b, length - 1], "the increments must sum to the whole response's score")
        for t in range(length):
            close(spread[b, :t + 1].sum(), prefix_scores[b, t], "the first t increments must sum to the score of that prefix")


# ---------------------------------------------------------------------------------------------------------------------
# Whitening
# ---------------------------------------------------------------------------------------------------------------------


@given(batches(), st.sampled_from([1e-4, 1.0, 1e3]), st.floats(-5, 5))
def test_whitened_entries_have_mean_zero_and_variance_one_up_to_epsilon(device, batch, scale, shift):
    batch = batch.on(device)
    x = batch.draw(scale=scale) + shift
    real, white = x[batch.mask], whiten(x, batch.mask)
    variance = real.var(correction=0)
    close(white[batch.mask].mean(), 0.0, "mean is not 0: is padding in it, or is each row whitened alone?", atol=1e-7)
    close(white[batch.mask].var(correction=0), variance / (variance + 1e-8), "variance is not v / (v + 1e-8)", atol=1e-7)
    close(whiten(x, batch.mask, shift_mean=False)[batch.mask], white[batch.mask] + real.mean(), "shift_mean=False adds the mean back")
    close(whiten(real), white[batch.mask], "the mask must give what the real entries alone give")


@given(batches(), st.floats(0.5, 20), st.floats(-5, 5))
def test_whitening_forgets_scale_and_shift(batch, scale, shift):
    x = batch.draw(scale=10)
    if x[batch.mask].var(correction=0) > 1:
        close(whiten(scale * x + shift, batch.mask), whiten(x, batch.mask), "whiten(a x + b) is not whiten(x)", atol=1e-6)


@given(batches(), st.floats(-1e3, 1e3))
def test_whitening_a_constant_or_a_single_entry_gives_zero(batch, constant):
    x = torch.full((batch.B, batch.T), constant, dtype=torch.float64)
    close(whiten(x, batch.mask), torch.zeros_like(x), "a constant whitens to 0", atol=1e-8)
    close(whiten(x[0, :1]), [0.0], "one entry whitens to 0", atol=1e-8)


def test_whitening_by_hand(device):
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.float64, device=device)
    kept = whiten(x, shift_mean=False).flatten()
    close(kept[[0, -1]], torch.tensor([0.0508, 3.1492]), "worked example: the variance is the biased one", atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


@given(batches())
def test_at_ratio_one_the_policy_loss_is_minus_the_mean_advantage_and_its_gradient_the_policy_gradient(device, batch):
    batch = batch.on(device)
    logprobs, advantages = batch.draw().requires_grad_(), batch.draw()
    loss, fraction = policy_loss(logprobs, logprobs.detach().clone(), advantages, batch.mask)
    close(loss, -advantages[batch.mask].mean(), "at ratio 1 the loss is -mean(A): wrong sign, or padding in the mean?")
    loss.backward()
    close(logprobs.grad, torch.where(batch.mask, -advantages / sum(batch.lengths), 0.0), "at ratio 1 the gradient is -mean(A grad log pi)")
    assert fraction == 0, "nothing is clipped at ratio 1"


@given(batches(), st.floats(0.05, 0.5))
def test_clipping_only_ever_raises_the_loss_and_cuts_the_gradient_outside_its_range(device, batch, clip):
    batch = batch.on(device)
    old, advantages = batch.draw(), batch.draw()
    advantages = torch.where(batch.draw() > 1, 0.0, advantages)
    logprobs = (old + batch.draw(scale=0.3)).requires_grad_()
    loss, fraction = policy_loss(logprobs, old, advantages, batch.mask, clip)
    (grad,) = torch.autograd.grad(loss, logprobs)
    ratio, n, expected, cut = (logprobs - old).exp().detach(), sum(batch.lengths), 0.0, 0
    for b, t in batch.mask.nonzero().tolist():
        rho, A = ratio[b, t].item(), advantages[b, t].item()
        out = (A > 0 and rho > 1 + clip) or (A < 0 and rho < 1 - clip)
        bound = 1 + clip if A > 0 else 1 - clip
        expected -= A * (bound if out else rho)
        cut += out
        if out or A == 0:
            assert grad[b, t] == 0, "a token beyond the clip range, on the side it gains from, must give no gradient"
        else:
            close(grad[b, t], -A * rho / n, "inside the clip range, or on the losing side, the gradient is -A rho: min for max?")
    close(loss, expected / n, "not the mean of max(-A rho, -A clip(rho))")
    close(fraction, cut / n, "clip fraction counts the tokens where the clipped side is the larger", atol=1e-6)
    unclipped = -(advantages * ratio)[batch.mask].mean()
    assert loss >= unclipped - 1e-12, "the clipped loss is never below the unclipped one: min for max?"
    close(policy_loss(logprobs, old, advantages, batch.mask, math.inf)[0], unclipped, "clip=inf is the plain surrogate")
    close(policy_loss(logprobs, old, 3 * advantages, batch.mask, clip)[0], 3 * loss, "the loss is 1-homogeneous in A")


def test_the_surrogate_by_hand():
    ratio = torch.tensor([[0.5, 0.8, 1.0, 1.2, 1.5]], dtype=torch.float64)
    for sign, expected in ((1, [0.5, 0.8, 1, 1.2, 1.2]), (-1, [-0.8, -0.8, -1, -1.2, -1.5])):
        for t in range(5):
            one = torch.ones(1, 1, dtype=torch.float64)
            loss, _ = policy_loss(ratio[:, t:t + 1].log(), 0 * one, sign * one, one.bool())
            close(-loss, expected[t], f"worked example, A = {sign}, ratio {ratio[0, t]}")


@given(batches(), st.floats(0.05, 1))
def test_the_value_loss_is_half_the_larger_of_the_clipped_and_the_plain_squared_error(device, batch, clip):
    batch = batch.on(device)
    old, returns = batch.draw(), batch.draw()
    values = (old + batch.draw(scale=0.5)).requires_grad_()
    n, plain, clipped = sum(batch.lengths), 0.0, 0.0
    for b, t in batch.mask.nonzero().tolist():
        v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
        near = min(max(v, o - clip), o + clip)
        plain += (v - r) ** 2 / 2 / n
        clipped += max((v - r) ** 2, (near - r) ** 2) / 2 / n
    close(value_loss(values, old, returns, batch.mask, clip), clipped, "not half the mean of the larger squared error")
    assert value_loss(values, old, returns, batch.mask, clip) >= plain - 1e-12, "clipping never lowers the value loss"
    for off in (None, math.inf):
        close(value_loss(values, old, returns, batch.mask, off), plain, "switched off, it is half the mean squared error")
    close(value_loss(old + clip * torch.tanh(values), old, returns, batch.mask, clip),
          value_loss(old + clip * torch.tanh(values), old, returns, batch.mask, None), "inside the clip range nothing is clipped")
    (grad,) = torch.autograd.grad(value_loss(values, old, returns, batch.mask, None), values)
    close(grad, torch.where(batch.mask, (values - returns) / n, 0.0), "gradient is (V - R) / n")


@given(batches())
def test_losses_send_no_gradient_into_what_the_rollout_measured(batch):
    logprobs, old, advantages = (batch.draw().requires_grad_() for _ in range(3))
    policy_loss(logprobs, old, advantages, batch.mask)[0].backward()
    assert old.grad is None and advantages.grad is None, "old_logprobs and advantages must be detached"
    values, old_values, returns = (batch.draw().requires_grad_() for _ in range(3))
    value_loss(values, old_values, returns, batch.mask).backward()
    assert old_values.grad is None and returns.grad is None, "old_values and returns must be detached"


@given(st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8), unit), min_size=1, max_size=6), st.floats(-10, 10))
def test_the_preference_loss_is_bradley_terry_on_soft_labels(device, rows, shift):
    a, b, p = torch.tensor(rows, dtype=torch.float64, device=device).T
    a = a.clone().requires_grad_()
    loss = preference_loss(a, b, p)
    win = torch.sigmoid(a - b)
    close(loss, -(p * win.log() + (1 - p) * (1 - win).log()).mean(), "not the cross-entropy of sigma(a - b) with p", atol=1e-8)
    (grad,) = torch.autograd.grad(loss, a)
    close(grad, (win - p) / len(rows), "the gradient by the difference is sigma(d) - p", atol=1e-8)
    close(preference_loss(a + shift, b + shift, p), loss, "only the difference of the scores counts", atol=1e-8)
    close(preference_loss(b, a, 1 - p), loss, "swapping the pair and its label changes nothing")


# ---------------------------------------------------------------------------------------------------------------------
# Adaptive beta
# ---------------------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 5), st.floats(0, 50), st.floats(0.5, 20), st.integers(1, 4000), unit)
def test_beta_moves_towards_its_target_slowly_and_stays_positive(beta, kl, target, horizon, share):
    n = int(share * (5 * horizon - 1))
    new = update_beta(beta, kl, target, horizon, n)
    assert isinstance(new, float) and new > 0, "beta must stay positive"
    assert abs(new / beta - 1) <= 0.2 * n / horizon + 1e-12, "one step changes beta by at most 20 % * n / horizon"
    assert update_beta(beta, target, target, horizon, n) == beta, "on target, beta stays"
    assert update_beta(beta, kl + 1, target, horizon, n) >= new, "more KL, higher price"
    close(new, beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon), "not the controller's formula")
    both = update_beta(torch.tensor([beta, 2 * beta], dtype=torch.float64), torch.tensor([kl, target], dtype=torch.float64), target, horizon, n)
    close(both, torch.tensor([new, 2 * beta], dtype=torch.float64), "on tensors it works element by element")


def test_beta_by_hand_and_at_its_limit():
    for kl, expected in ((7.2, 0.166087), (6.6, 0.157859), (6.0, 0.15), (4.8, 0.135329), (99.0, 0.166087), (0.0, 0.135329)):
        beta = 0.15
        for _ in range(10):
            beta = update_beta(beta, kl, 6.0, 10_000, 512)
        assert abs(beta - expected) < 1e-6, f"ten updates at KL {kl} give {expected}"
    for bad in ({"n": 50, "horizon": 10}, {"n": torch.tensor([1, 50]), "horizon": 10}, {"target": 0.0}):
        with pytest.raises(ValueError):
            update_beta(**{"beta": 0.1, "kl": 1.0, "target": 1.0, "horizon": 10, "n": 1, **bad})
    assert update_beta(0.1, 1.0, 2.0, 10, 49) > 0
