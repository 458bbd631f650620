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
import multiprocessing
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models
from transformers import (AutoModelForCausalLM, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, GPTNeoXConfig,
                          GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification)

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
    with pytest.raises(ValueError, match="^every row of the mask needs at least one True$"):
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
    close(rlaif.token_entropy(logits), torch.distributions.Categorical(logits=logits).entropy(), "without a temperature it is 1")
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
    assert update_beta(torch.ones(2), torch.tensor([1.0, 3.0]), 2.0, 10, 1).dtype == torch.float32, "beta keeps its dtype"


# ---------------------------------------------------------------------------------------------------------------------
# Tiny models made on the spot
# ---------------------------------------------------------------------------------------------------------------------


def letters(words="abc", **special):
    """A tokenizer with one token per letter and an EOS; with a chat template or a pad token where asked."""
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*words, "<eos>"])}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **special)


def gpt2(vocabulary=4, seed=0, kind=GPT2LMHeadModel, context=16, **settings):
    torch.manual_seed(seed)
    return kind(GPT2Config(vocab_size=vocabulary, n_positions=context, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0,
                           attn_pdrop=0, initializer_range=0.2, activation_function="gelu_pytorch_tanh", bos_token_id=None,
                           eos_token_id=vocabulary - 1, **settings)).eval()


def modern(config_class, model_class, seed=0, **settings):
    torch.manual_seed(seed)
    small = {"vocab_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "max_position_embeddings": 16, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": None}
    if config_class is not GPTNeoXConfig:
        small["num_key_value_heads"] = 1
    return model_class(config_class(**small, **settings)).eval()


ARCHITECTURES = {
    "GPT-2": gpt2,
    "Llama": lambda **s: modern(LlamaConfig, LlamaForCausalLM, **s),
    "Qwen2": lambda **s: modern(Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True, **s),
    "GPT-NeoX": lambda **s: modern(GPTNeoXConfig, GPTNeoXForCausalLM, **s),
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

EOS = 3
SEQUENCES = ([[*s, EOS] for n in range(3) for s in itertools.product(range(3), repeat=n)] + [list(s) for s in itertools.product(range(3), repeat=3)])
TEXTS = ["".join("abc"[token] for token in s if token != EOS) for s in SEQUENCES]  # all 40 responses of at most 3 tokens
ALL_TOKENS = torch.tensor([s + [EOS] * (3 - len(s)) for s in SEQUENCES])
ALL_MASK = torch.tensor([[t < len(s) for t in range(3)] for s in SEQUENCES])


def enumerate_logprobs(model, prompt_ids, temperature=0.7, steps=ALL_TOKENS, mask=ALL_MASK):
    """log pi of every response to one prompt -> per token (40, 3), 0 outside the mask, in float64."""
    ids = torch.tensor([prompt_ids] * len(steps))
    logits, _ = rlaif.response_logits(model, ids, torch.ones_like(ids), steps, mask)
    return torch.where(mask, token_logprobs(logits, steps, temperature), 0.0).double()


def toy_config(folder, **settings):
    """A run on the letter models: two prompts of different lengths, responses of 1 to 3 tokens."""
    (folder / "prompts.txt").write_text("ab\nc\n")
    return rlaif.Config(**{"prompts": str(folder / "prompts.txt"), "template": "{prompt}", "max_new_tokens": 3, "temperature": 0.7,
                           "iterations": 3, "batch_size": 8, "minibatch_size": 4, "ppo_epochs": 4, "beta": 0.2, "clip": 0.2,
                           "learning_rate": 1e-2, "adam_epsilon": 1e-5, "stop_kl": math.inf, "device": "cpu", **settings})


def count_a(prompts, responses):
    return [float(response.count("a")) + 0.1 * len(response) for response in responses]


def toy_train(folder, score=count_a, policy=None, **settings):
    """Run `train` on the letter models -> (policy, list of metrics)."""
    policy = policy or gpt2()
    return policy, list(rlaif.train(toy_config(folder, **settings), score=score, policy=policy, tokenizer=letters()))


def same_but_for_timings(a, b):
    def strip(metrics):
        return [{name: value for name, value in m.items() if "second" not in name} for m in metrics]
    return strip(a) == strip(b)


# ---------------------------------------------------------------------------------------------------------------------
# Generation and padding
# ---------------------------------------------------------------------------------------------------------------------


@every_architecture
def test_left_padding_changes_neither_logprobs_nor_values_nor_greedy_replies(architecture, device):
    model = ARCHITECTURES[architecture]().to(device)
    value = rlaif.ValueFunction(32, head="random").to(device)
    separate = rlaif.ValueFunction(32, copy.deepcopy(model.base_model), head="random").to(device)
    prompts = [[0, 1, 2, 1, 0], [2], [1, 0]]
    ids, attention = rlaif.pad(prompts, "left", device)
    tokens, mask = generate(model, ids, attention, 6, EOS, EOS, temperature=0)
    for b, prompt in enumerate(prompts):
        alone, full = rlaif.pad([prompt], "left", device)
        one, one_mask = generate(model, alone, full, 6, EOS, EOS, temperature=0)
        n = one_mask.sum()
        assert n == mask[b].sum() and torch.equal(one[0, :n], tokens[b, :n]), "greedy replies change with left padding: position ids?"
        for head in (value, separate):
            batch_out = rlaif.response_logits(model, ids, attention, tokens, mask, head)
            alone_out = rlaif.response_logits(model, alone, full, one, one_mask, head)
            for in_batch, by_itself in zip(batch_out, alone_out):
                close(in_batch[b, :n], by_itself[0], "left padding moves the logits or values: position ids counted from 0?", atol=1e-4)


def test_a_value_has_read_the_prompt_and_the_tokens_before_its_own():
    policy, value = gpt2(), rlaif.ValueFunction(32, head="random")
    ids, tokens = torch.tensor([[0, 1]]), torch.tensor([[2, 0, EOS]])
    _, values = rlaif.response_logits(policy, ids, torch.ones_like(ids), tokens, tokens >= 0, value)
    for t in range(3):
        before = torch.cat([ids, tokens[:, :t]], dim=1)
        close(values[0, t], value.head(policy.transformer(before).last_hidden_state[0, -1])[0], "values are shifted by one token", atol=1e-5)


def test_the_value_loss_trains_a_shared_trunk_and_leaves_the_policy_alone_with_a_separate_one():
    for trunk in (None, gpt2(seed=1).base_model):
        policy, value = gpt2(), rlaif.ValueFunction(32, trunk, head="random")
        ids, tokens = torch.tensor([[0, 1]]), torch.tensor([[2, 0, EOS]])
        rlaif.response_logits(policy, ids, torch.ones_like(ids), tokens, tokens >= 0, value)[1].sum().backward()
        reached = policy.transformer.wte.weight.grad is not None
        assert reached == (trunk is None), "values on the policy's trunk are learned by it, those on a trunk of their own are not"


@every_architecture
def test_greedy_generation_is_that_of_transformers_and_of_no_cache(architecture):
    for seed in range(3):
        model = ARCHITECTURES[architecture](seed=seed)
        ids, attention = rlaif.pad([[0, 1, 2], [2], [1, 1, 0, 2, 0]], "left", "cpu")
        tokens, mask = generate(model, ids, attention, 8, EOS, 0, temperature=0)
        theirs = model.generate(input_ids=ids, attention_mask=attention, do_sample=False, max_new_tokens=8, eos_token_id=EOS,
                                pad_token_id=0)[:, ids.shape[1]:]
        assert torch.equal(tokens, theirs), "greedy generation differs from transformers' own"
        for b in range(3):
            text = ids[b][attention[b].bool()].tolist()
            for t in range(int(mask[b].sum())):
                assert model(torch.tensor([text])).logits[0, -1].argmax() == tokens[b, t], "the key-value cache changes the result"
                text.append(tokens[b, t].item())


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_sampling_follows_the_policy_at_its_temperature_and_nothing_else(temperature):
    """No top-k, no forgotten temperature: frequencies of all 40 responses against their enumerated probabilities."""
    model, n = gpt2(), 20000
    ids = torch.tensor([[0, 1]] * n)
    torch.manual_seed(1)
    tokens, mask = generate(model, ids, torch.ones_like(ids), 3, EOS, EOS, temperature)
    expected = enumerate_logprobs(model, [0, 1], temperature).sum(1).exp()
    close(expected.sum(), 1.0, "the enumerated responses are all there are", atol=1e-5)
    found = {text: 0 for text in map(tuple, SEQUENCES)}
    for row, length in zip(tokens.tolist(), mask.sum(1).tolist()):
        found[tuple(row[:length])] += 1
    counts = torch.tensor(list(found.values()), dtype=torch.float64)
    chi_square = ((counts - n * expected) ** 2 / (n * expected)).sum().item()
    wide = gpt2(80)
    assert (wide(ids[:1]).logits[0, -1].argsort(descending=True)[50:][:, None] == generate(wide, ids, torch.ones_like(ids), 1, None, 0, 1.5)[0][:, 0]).any(), \
        "nothing beyond the 50 most probable tokens is ever drawn: top-k?"
    assert chi_square < 80, f"sampled frequencies are not the policy's (chi-square {chi_square:.0f} with 39 degrees of freedom)"


@pytest.mark.parametrize("eos", [EOS, [EOS], [EOS, 0], None])
def test_a_response_is_true_up_to_and_with_its_eos_and_pad_follows(eos):
    ids = torch.tensor([[0, 1]] * 64)
    torch.manual_seed(0)
    tokens, mask = generate(gpt2(), ids, torch.ones_like(ids), 6, eos, 2)
    ends = [] if eos is None else torch.tensor(eos).reshape(-1).tolist()
    for row, real in zip(tokens.tolist(), mask.tolist()):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), len(row))
        assert real == [t < length for t in range(len(row))], "the mask must hold the EOS and nothing after it"
        assert all(token == 2 for token in row[length:]), "PAD follows the EOS"
    assert mask[:, -1].any(), "T is the longest response drawn"
    assert generate(gpt2(), ids, torch.ones_like(ids), 1, eos, 2)[0].shape == (64, 1), "a single token is a response"
    with pytest.raises(ValueError):
        generate(gpt2(), ids, torch.ones_like(ids), 0, eos, 2)


@pytest.mark.parametrize("dtype,expected", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_a_model_in_half_precision_is_sampled_and_valued_in_float32(dtype, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "multinomial", lambda probs, n, f=torch.multinomial: (seen.append(probs.dtype), f(probs, n))[1])
    policy, value, ids = gpt2().to(dtype), rlaif.ValueFunction(32).to(dtype), torch.tensor([[0, 1]])
    generate(policy, ids, torch.ones_like(ids), 3, EOS, 2)
    assert set(seen) == {expected}, "the probabilities must be float32 at least"
    _, values = rlaif.response_logits(policy, ids, torch.ones_like(ids), ids, ids > -1, value)
    assert values.dtype == expected, "values must be float32 at least"


def test_a_random_head_starts_with_the_std_of_the_source(monkeypatch):
    stds = []
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *args, **more: stds.append(more.get("std")))
    rlaif.ValueFunction(32, head="random")
    rlaif.new_preference_model(gpt2(), letters(), "{prompt}")
    assert stds[0] == stds[-1] == 33**-0.5, "normal, std 1/sqrt(D + 1)"


def test_values_keep_float32_when_the_models_run_in_bfloat16():
    value, hidden = rlaif.ValueFunction(32, head="random"), torch.randn(2, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        values = value(hidden)
    assert torch.equal(values, value(hidden)), "the value head must not run in bfloat16"


def test_a_policy_with_several_eos_ids_ends_at_any_of_them(tmp_path):
    policy = gpt2()
    policy.generation_config.eos_token_id = [1, EOS]
    assert rlaif.eos_ids(policy, letters()) == [EOS, 1]
    torch.manual_seed(0)
    _, _, tokens, mask, texts, ended = rlaif.respond(policy, letters(), ["ab"] * 32, toy_config(tmp_path))
    for row, real, end in zip(tokens.tolist(), mask.tolist(), ended.tolist()):
        response = [token for token, is_real in zip(row, real) if is_real]
        assert end == (response[-1] in (1, EOS)) and not {1, EOS} & set(response[:-1]), "a response ends at the first of its EOS ids"
    assert {1, EOS} <= set(tokens[mask].tolist()), "the example should hold both"
    policy.generation_config.eos_token_id = None
    tokenizer = letters()
    tokenizer.eos_token = None
    (metrics,) = rlaif.train(toy_config(tmp_path, iterations=1, whiten_scores=False, beta=0.0, missing_eos_score=-9.0), score=count_a, policy=policy,
                             tokenizer=tokenizer)
    assert metrics["eos_fraction"] == 0 and metrics["length"] == 3 and metrics["value_loss"] < 9, "without an EOS no response can miss it"


def test_pad_may_be_eos_because_masks_come_from_lengths():
    torch.manual_seed(0)
    ids = torch.tensor([[0, 1]] * 32)
    tokens, mask = generate(gpt2(), ids, torch.ones_like(ids), 6, EOS, EOS)
    ended = (tokens == EOS).any(1)
    first = (tokens == EOS).int().argmax(1)
    assert ended.any() and (mask.sum(1) == torch.where(ended, first + 1, 6)).all(), "pad == eos masks the EOS away"


# ---------------------------------------------------------------------------------------------------------------------
# KL on a real policy, by enumeration
# ---------------------------------------------------------------------------------------------------------------------


def test_per_token_kl_sums_to_the_kl_of_the_sequence_distributions():
    """The chain rule, k1 and k3, at every token of every response of a GPT-2 (in float64)."""
    policy, reference = gpt2(seed=0).double(), gpt2(seed=1).double()
    for prompt in ([0, 1], [2]):
        logprobs, ref_logprobs = enumerate_logprobs(policy, prompt), enumerate_logprobs(reference, prompt)
        p, q = logprobs.sum(1).exp(), ref_logprobs.sum(1).exp()
        close(p.sum(), 1.0, "the enumerated responses are all there are")
        close((p[:, None] * kl_estimate(logprobs, ref_logprobs)).sum(), (p * (p / q).log()).sum(), "the k1 of the tokens do not sum to the KL")
        ids = torch.tensor([prompt] * 40)
        logits, ref_logits = (rlaif.response_logits(model, ids, torch.ones_like(ids), ALL_TOKENS, ALL_MASK)[0] / 0.7 for model in (policy, reference))
        exact = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=ref_logits))
        for kind in ("k1", "k3"):
            everywhere = torch.stack([logits.log_softmax(-1)[..., a].exp() * kl_estimate(
                token_logprobs(logits, torch.full_like(ALL_TOKENS, a)), token_logprobs(ref_logits, torch.full_like(ALL_TOKENS, a)), kind)
                for a in range(4)]).sum(0)
            close(everywhere, exact, f"over the whole vocabulary, the mean of {kind} is not the KL")


def test_the_gradient_of_a_minibatch_is_that_of_its_rows_weighted_by_their_tokens():
    policy = gpt2().double()
    torch.manual_seed(3)
    ids = torch.tensor([[0, 1]] * 6)
    tokens, mask = generate(policy, ids, torch.ones_like(ids), 5, EOS, EOS)
    advantages = torch.randn(mask.shape, dtype=torch.float64)

    def gradient(rows):
        logits, _ = rlaif.response_logits(policy, ids[rows], torch.ones_like(ids[rows]), tokens[rows], mask[rows])
        logprobs = token_logprobs(logits, tokens[rows])
        loss, _ = policy_loss(logprobs, logprobs.detach() - 0.1, advantages[rows], mask[rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    weights = mask.sum(1) / mask.sum()
    assert len(set(mask.sum(1).tolist())) > 1
    close(sum(weights[b] * gradient([b]) for b in range(6)), gradient(list(range(6))), "rows are averaged before tokens", atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# The AI side: judge and preference model
# ---------------------------------------------------------------------------------------------------------------------

ALPHABET = sorted(set("".join(rlaif.CONSTITUTION) + rlaif.JUDGE_QUESTION + "AB()abcdefgh\n<|>usertinxX"))


def random_judge(seed=0, **special):
    return gpt2(len(ALPHABET) + 1, seed, context=256), letters(ALPHABET, **special)


def test_averaging_both_orders_makes_the_two_sides_of_a_label_sum_to_one():
    judge, tokenizer = random_judge()
    torch.manual_seed(0)
    a, b = ["aa", "b", "cd"], ["e", "fgh", "ab"]
    both = [rlaif.judge_pairs(judge, tokenizer, rlaif.CONSTITUTION[:1], ["c"] * 3, *pair) for pair in ((a, b), (b, a))]
    close(both[0] + both[1], torch.ones(3), "p(a, b) + p(b, a) is not 1: were both orders given the same label?", atol=1e-6)
    one = [rlaif.judge_pairs(judge, tokenizer, rlaif.CONSTITUTION[:1], ["c"] * 3, *pair, both_orders=False) for pair in ((a, b), (b, a))]
    assert ((one[0] + one[1] - 1).abs() > 1e-3).all(), "a random judge has a position bias: the orders were not really swapped"
    close(both[0], (one[0] + 1 - one[1]) / 2, "not the average of the two orders", atol=1e-6)


def test_a_comparison_keeps_its_principle_in_both_orders(monkeypatch):
    asked = []
    monkeypatch.setattr(rlaif, "ask_judge", lambda judge, tokenizer, questions: (asked.append(questions), torch.full((len(questions),), 0.9))[1])
    torch.manual_seed(0)
    labels = rlaif.judge_pairs(None, None, rlaif.CONSTITUTION, [f"q{i}" for i in range(20)], [f" a{i}" for i in range(20)], [f" b{i}" for i in range(20)])
    close(labels, torch.full((20,), 0.5), "a judge that always says A says nothing", atol=1e-6)
    for i, (one, other) in enumerate(zip(*asked)):
        assert one.splitlines()[0] == other.splitlines()[0], "the two orders of a comparison must share one principle"
        assert f"User: q{i}\n(A) a{i}\n(B) b{i}\n" in one and f"User: q{i}\n(A) b{i}\n(B) a{i}\n" in other, "the second order must swap the responses"
    assert len({one.splitlines()[0] for one in asked[0]}) > 1, "a principle is drawn for each comparison"


@pytest.mark.parametrize("chat", [False, True])
def test_the_judge_is_read_at_the_first_token_in_which_the_answers_differ(chat):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<tutti>{% endif %}" if chat else None
    judge, tokenizer = random_judge(chat_template=template)
    questions = ["cdefgh", "ab", "cde"]
    prompt = [f"<user>{question}<tutti>" if chat else f"{question} " for question in questions]  # " A" and " B" differ after the space
    for question, expected in zip(rlaif.ask_judge(judge, tokenizer, questions), prompt):
        logits = judge(torch.tensor([tokenizer(expected).input_ids])).logits[0, -1]
        pair = logits[tokenizer.convert_tokens_to_ids(["A", "B"])]
        close(question, pair.softmax(0)[0], "not softmax over the two answers after what they share", atol=1e-5)


def test_a_judge_that_cannot_tell_its_answers_apart_or_read_so_far_is_an_error():
    judge, tokenizer = random_judge()
    with pytest.raises(ValueError, match="A and B alike"):
        rlaif.ask_judge(judge, letters([x for x in ALPHABET if x not in "AB"]), ["ab"])
    with pytest.raises(ValueError, match="judge: a text of 301 tokens is longer than the model's context, 256"):
        rlaif.ask_judge(judge, tokenizer, ["a" * 300])


def preference_model(seed=0, kind=GPT2ForSequenceClassification, **special):
    tokenizer = letters("ab cxyUsertin:\nAp", **special)
    return rlaif.PreferenceModel(gpt2(len(tokenizer), seed, kind, context=64, num_labels=1), tokenizer, "User: {prompt}\nA:")


def test_a_score_is_the_head_at_the_last_real_token_whatever_stands_beside_it():
    preference = preference_model(pad_token="<eos>")
    prompts, responses, ended = ["a", "ab", "abc"], [" xyxyxy", " x", ""], [True, False, True]
    scores = preference(prompts, responses, ended)
    for prompt, response, end, score in zip(prompts, responses, ended, scores):
        ids = preference.tokenizer(f"User: {prompt}\nA:{response}").input_ids + [preference.tokenizer.eos_token_id] * end
        hidden = preference.model.transformer(torch.tensor([ids])).last_hidden_state[0, -1]
        close(score, preference.model.score(hidden)[0], "the score is read at padding, or before the EOS", atol=1e-5)
    assert preference(prompts, responses) == preference(prompts, responses, [True] * 3), "a response counts as ended unless said otherwise"
    assert preference(prompts, responses, [True] * 3) != preference(prompts, responses, [False] * 3), "the EOS must be seen"
    preference.tokenizer.eos_token = None
    assert preference(prompts, responses, [True] * 3) == preference(prompts, responses, [False] * 3), "without an EOS none can be seen"
    preference.tokenizer.eos_token = "<eos>"
    with pytest.raises(ValueError, match="preference: a text of 72 tokens is longer than the model's context, 64"):
        preference(["a"], ["x" * 61], [True])


@pytest.mark.parametrize("name", ["Bert", "ModernBertDecoder"])  # the second looks for its PAD to find the last token
def test_a_classifier_without_a_score_head_scores_through_its_own_pooling(name):
    torch.manual_seed(0)
    tokenizer = letters("ab cxyUsertin:\nAp")
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer) + 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                    intermediate_size=16, max_position_embeddings=64, num_labels=1, initializer_range=0.5,
                                                    pad_token_id=len(tokenizer))
    preference = rlaif.PreferenceModel(getattr(transformers, f"{name}ForSequenceClassification")(config).eval(), tokenizer, "{prompt}")
    together = preference(["a", "abc"], ["x", "xyxy"])
    close(together, preference(["a"], ["x"]) + preference(["abc"], ["xyxy"]), "padding reaches the score", atol=1e-5)


def test_a_preference_model_learns_soft_labels_down_to_their_entropy_and_is_calibrated():
    policy, tokenizer = gpt2(seed=7), letters()
    torch.manual_seed(0)
    preference = rlaif.new_preference_model(policy, tokenizer, "{prompt}")
    assert all(torch.equal(a, b) for a, b in zip(preference.model.base_model.parameters(), policy.base_model.parameters())), "starts from the policy's trunk"
    assert not preference.model.training, "dropout is on"
    head = preference.model.score.weight
    assert 0.5 < head.std() * 33**0.5 < 1.5, "the head starts normal with std 1/sqrt(D + 1)"
    n = 600
    a, b = ([TEXTS[i] for i in torch.randint(40, (n,))] for _ in "ab")
    p = torch.sigmoid(torch.tensor(count_a([], a)) - torch.tensor(count_a([], b)))
    report = rlaif.fit_preference(preference, ["c"] * n, (a, [True] * n), (b, [True] * n), p, epochs=12, minibatch_size=32, learning_rate=3e-3)
    assert report["floor"] <= report["train_loss"] < report["floor"] + 0.03, f"soft labels are not learned to their entropy: {report}"
    assert report["accuracy"] > 0.9 and abs(report["loss"] - report["floor"]) < 0.05, f"{report}"
    scores = torch.tensor(preference(["c"] * (2 * n), a + b))
    assert abs(scores.mean()) < 0.3 and abs(scores.std() - 1) < 1e-3, "not calibrated to mean 0 and std 1 on the samples"
    truth = torch.tensor(count_a([], a + b))
    assert torch.corrcoef(torch.stack([scores, truth]))[0, 1] > 0.95, "the scores do not follow what the labels say: sign?"


def test_a_fit_in_bfloat16_sees_the_steps_that_it_has_taken():
    preference, labels = rlaif.new_preference_model(gpt2(seed=7), letters(), "{prompt}"), torch.rand(40)
    with torch.autocast("cpu", torch.bfloat16):
        rlaif.fit_preference(preference, ["c"] * 40, (TEXTS[:40], [True] * 40), (TEXTS[:40][::-1], [True] * 40), labels, minibatch_size=8, learning_rate=1e-2)
        scores = preference(["c"] * 40, TEXTS[:40])
    with torch.autocast("cpu", torch.bfloat16):
        assert scores == preference(["c"] * 40, TEXTS[:40]), "the scores are those of weights that autocast keeps a copy of, from before a step"


def test_bfloat16_ends_where_the_models_end(tmp_path):
    config = toy_config(tmp_path, iterations=1, batch_size=4, minibatch_size=4, dtype="bfloat16", eval_samples=2)
    run = rlaif.prepare(config, rlaif.new_preference_model(gpt2(), letters(), "{prompt}"), None, gpt2(), letters())
    rlaif.evaluate(run)
    assert len(list(rlaif.ppo(run))) == 1
    assert not torch.is_autocast_enabled("cpu"), "autocast is left on in the caller's process"


def test_a_preference_model_is_fitted_to_what_the_judge_said_of_the_policys_own_pairs(tmp_path, monkeypatch):
    def judged(judge, tokenizer, constitution, prompts, a, b):
        return torch.sigmoid(torch.tensor(count_a([], a)) - torch.tensor(count_a([], b)))
    monkeypatch.setattr(rlaif, "judge_pairs", judged)
    torch.manual_seed(0)
    config = toy_config(tmp_path, pairs=300, preference_learning_rate=3e-3)
    preference, report = rlaif.preference_from_judge(config, gpt2(), letters(), None, None, None, ["ab", "c"])
    (a, ended_a), (b, _) = report["samples"]
    close(report["prob_a"], judged(None, None, None, None, a, b), "the labels do not belong to the pairs they were given for", atol=1e-6)
    assert len(a) == 300 and abs(report["prompts"].count("ab") - 150) <= 1 and all(ended_a[i] for i, text in enumerate(a) if len(text) < 3)
    scores = torch.tensor(preference(["c"] * 40, TEXTS))
    assert torch.corrcoef(torch.stack([scores, torch.tensor(count_a([], TEXTS))]))[0, 1] > 0.2, "it prefers what the judge does not: sign?"


def test_the_last_tenth_of_the_pairs_is_held_out_of_the_fit(monkeypatch):
    fitted, rates = [], []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1])
    for label in (0.1, 0.9):
        torch.manual_seed(0)
        preference = rlaif.new_preference_model(gpt2(), letters(), "{prompt}")
        labels = torch.cat([torch.linspace(0, 1, 36), torch.full((4,), label)])
        rlaif.fit_preference(preference, ["c"] * 40, (TEXTS, [True] * 40), (TEXTS[::-1], [True] * 40), labels, epochs=2, minibatch_size=8)
        fitted.append(preference.model.state_dict())
    assert all(torch.equal(fitted[0][name], fitted[1][name]) for name in fitted[0]), "the fit has seen the labels of the held-out pairs"
    close(rates, [5e-4 * (1 - i / 10) for i in range(10)] * 2, "the learning rate falls linearly to 0 over the steps of all epochs")


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_with_learning_rate_zero_nothing_moves_and_the_ratio_is_one(tmp_path, value):
    policy = gpt2()
    before = copy.deepcopy(policy.state_dict())
    _, metrics = toy_train(tmp_path, policy=policy, learning_rate=0.0, value=value, beta=2.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items()), "a parameter moved at learning rate 0"
    for m in metrics:
        assert abs(m["ratio"] - 1) < 1e-5 and abs(m["approx_kl"]) < 1e-6 and m["clip_fraction"] == 0, "old and new policy differ without a step"
        assert abs(m["kl"]) < 1e-6, "the policy is its own reference, yet there is a KL"


def test_the_reference_and_the_preference_model_never_change(tmp_path, monkeypatch):
    kept = []
    original = rlaif.prepare
    monkeypatch.setattr(rlaif, "prepare", lambda *args: kept.append(original(*args)) or kept[0])
    preference = rlaif.PreferenceModel(gpt2(kind=GPT2ForSequenceClassification, num_labels=1), letters(), "{prompt}")
    before = copy.deepcopy(preference.model.state_dict())
    start = copy.deepcopy(gpt2().state_dict())
    policy, _ = toy_train(tmp_path, score=preference, policy=gpt2().train())
    assert all(torch.equal(start[name], tensor) for name, tensor in kept[0].reference.state_dict().items()), "the reference was trained"
    assert all(torch.equal(before[name], tensor) for name, tensor in preference.model.state_dict().items()), "the preference model was trained"
    assert any(not torch.equal(start[name], tensor) for name, tensor in policy.state_dict().items()), "the policy was not trained"
    assert not any(module.training for model in (policy, kept[0].reference, preference.model, kept[0].value) for module in model.modules()), "dropout is on"


def test_the_loop_computes_what_the_equations_say(tmp_path, monkeypatch):
    """One iteration, taken apart: every tensor that reaches GAE and the losses is computed here again from the models."""
    for chosen in ({}, {"kl_level": "sequence", "kl_estimator": "k3"}, {"kl_level": "batch", "whiten_scores": False}, {"whiten_advantages": False},
                     {"dense_reward": True}, {"missing_eos_score": math.inf}, {"gamma": 0.9, "lam": 0.5, "kl_estimator": "k2"}):
        seen = {"gae": [], "policy_loss": [], "value_loss": []}
        with monkeypatch.context() as patch:
            for name, calls in seen.items():
                patch.setattr(rlaif, name, lambda *args, calls=calls, f=getattr(rlaif, name): (calls.append(args), f(*args))[1])
            generated, asked = [], []
            patch.setattr(rlaif, "respond", lambda *args, f=rlaif.respond: (asked.append(args[2]), generated.append(f(*args)), generated[-1])[2])

            def prepare(*args, f=rlaif.prepare):
                run = f(*args)
                generated.clear(), asked.clear()  # it has tried the policy out
                run.beta *= torch.tensor([1.0, 0.5])  # each of the two prompts pays a price of its own
                assert not run.reference.training, "dropout is on in the reference"
                return run
            patch.setattr(rlaif, "prepare", prepare)
            policy, reference = gpt2(seed=0), gpt2(seed=1)
            reference.save_pretrained(tmp_path / "reference")
            letters().save_pretrained(tmp_path / "reference")
            config = toy_config(tmp_path, iterations=1, ppo_epochs=1, beta=0.7, reference=str(tmp_path / "reference"), learning_rate=0.0, **chosen)
            (metrics,) = rlaif.train(config, score=count_a, gold=lambda p, r: [-x for x in count_a(p, r)], policy=policy, tokenizer=letters())
        input_ids, attention, tokens, mask, texts, ended = generated[0]
        assert 0 < ended.sum() < 8, "the example should hold responses with and without an EOS"
        assert ended.tolist() == [EOS in row for row in torch.where(mask, tokens, -1).tolist()], "a response has ended if it holds an EOS"
        assert not (mask & (tokens == EOS))[:, :-1][mask[:, 1:]].any(), "a response ends at its first EOS"
        logprobs, ref, entropies = torch.zeros(mask.shape), torch.zeros(mask.shape), []
        for b, t in mask.nonzero().tolist():
            ids = torch.cat([input_ids[b][attention[b].bool()], tokens[b, :t]])[None]
            dist, ref_dist = (torch.distributions.Categorical(logits=model(ids).logits[0, -1] / 0.7) for model in (policy, reference))
            logprobs[b, t], ref[b, t] = dist.log_prob(tokens[b, t]), ref_dist.log_prob(tokens[b, t])
            entropies.append(dist.entropy())
        d = (logprobs - ref).detach()
        beta = torch.tensor([0.7 if prompt == "ab" else 0.35 for prompt in asked[0]])
        raw = torch.tensor(count_a([], texts))
        scores = raw.where(ended, torch.tensor(-1.0)) if config.missing_eos_score == -1 else raw
        mean, std = (scores.mean(), scores.std(correction=0)) if config.whiten_scores else (0.0, 1.0)
        kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[config.kl_estimator] * mask
        expected, last = torch.zeros(mask.shape), mask.sum(1) - 1
        for b in range(8):
            for t in range(int(last[b]) + 1):
                if config.dense_reward:
                    prefix = [(count_a([], ["".join("abc?"[i] for i in tokens[b, :k + 1] if i < 3)])[0] - mean) / std for k in range(t + 1)]
                    prefix[t] = (scores[b] - mean) / std if t == last[b] else prefix[t]
                    expected[b, t] += prefix[t] - (prefix[t - 1] if t else 0.0)
                elif t == last[b]:
                    expected[b, t] += (scores[b] - mean) / std
                if config.kl_level == "token":
                    expected[b, t] -= beta[b] * kl[b, t]
                elif t == last[b]:
                    expected[b, t] -= beta[b] * kl[b].sum() if config.kl_level == "sequence" else (beta * kl.sum(1)).mean()
        rewards, values, its_mask, gamma, lam = seen["gae"][0]
        close(rewards, expected, f"{chosen}: the rewards are not score and KL as set", atol=1e-4)
        assert torch.equal(its_mask, mask) and (values == 0).all() and (gamma, lam) == (config.gamma, config.lam)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        used = whiten(advantages, mask) if config.whiten_advantages else advantages
        close(sorted(x for call in seen["policy_loss"] for x in torch.where(call[3], call[1], 0.0).sum(1).tolist()),
              sorted(logprobs.sum(1).tolist()), "the ratio is to the policy that sampled", atol=1e-4)
        close(sorted(row.sum().item() for call in seen["policy_loss"] for row in call[2]), sorted(row.sum().item() for row in used),
              f"{chosen}: the policy loss sees other advantages", atol=1e-5)
        close(sorted(row.sum().item() for call in seen["value_loss"] for row in call[2]), sorted(row.sum().item() for row in returns),
              "the value loss must see the returns as they were before whitening", atol=1e-5)
        close(metrics["beta"], beta.mean(), "beta is the mean price that this batch paid", atol=1e-6)
        close(metrics["score"], raw.mean(), "score is the mean of the raw scores", atol=1e-5)
        close(metrics["gold"], -raw.mean(), "gold is the mean of the gold callable", atol=1e-5)
        close(metrics["kl"], (d * mask).sum() / 8, "kl is the mean over responses of the summed k1", atol=1e-4)
        close(metrics["objective"], raw.mean() - std * (beta * (d * mask).sum(1)).mean(), "objective is score - beta sigma kl", atol=1e-4)
        close(metrics["entropy"], sum(entropies) / len(entropies), "entropy is the mean over real tokens", atol=1e-4)
        close(metrics["length"], mask.sum() / 8, "length counts real tokens", atol=1e-6)
        close(metrics["eos_fraction"], ended.float().mean(), "eos_fraction", atol=1e-6)
        real = returns[mask]
        close(metrics["explained_variance"], 1 - real.var() / (real.var() + 1e-8), "explained variance of zero values is 0", atol=1e-5)


def test_a_policy_that_always_says_the_same_is_not_distinct(tmp_path):
    policy = gpt2()
    with torch.no_grad():
        policy.transformer.ln_f.weight.zero_()
        policy.transformer.ln_f.bias.copy_(50 * policy.lm_head.weight[EOS])  # EOS at once, whatever the prompt
    _, metrics = toy_train(tmp_path, policy=policy, iterations=1)
    assert metrics[0]["distinct"] == 1 / 8 and metrics[0]["length"] == 1, "distinct is the share of different responses"
    assert all(math.isfinite(value) for value in metrics[0].values())


def test_one_optimizer_step_for_each_minibatch_from_fresh_gradients(tmp_path, monkeypatch):
    steps, zeroed, rates = [], [], []
    original = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (steps.append(self.param_groups[0]["lr"]), original(self))[1])
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, f=torch.optim.Optimizer.zero_grad: (zeroed.append(1), f(self))[1])
    toy_train(tmp_path, batch_size=10, minibatch_size=4, ppo_epochs=3, iterations=2)
    assert len(steps) == len(zeroed) == 2 * 3 * 3, "one optimizer step, and fresh gradients, per minibatch"
    rates = [steps[0], steps[-1]]
    assert rates == [1e-2, 0.5e-2], "the learning rate falls linearly to 0"


def test_every_epoch_passes_over_the_whole_batch_in_a_new_order(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(rlaif, "policy_loss", lambda *args, f=rlaif.policy_loss: (seen.append(round(args[2].sum().item(), 4)), f(*args))[1])
    toy_train(tmp_path, batch_size=32, minibatch_size=1, ppo_epochs=3, iterations=1, learning_rate=0.0)
    epochs = [seen[i:i + 32] for i in (0, 32, 64)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]), "an epoch must see every response once"
    assert epochs[0] != epochs[1] != epochs[2], "the minibatches must be shuffled anew for each epoch"


def test_without_value_coef_the_values_do_not_learn(tmp_path):
    _, metrics = toy_train(tmp_path, value_coef=0.0, value="separate")
    assert all(m["explained_variance"] < 1e-3 for m in metrics) and metrics[0]["value_loss"] > 0, "value_coef weighs the value loss"


def test_gradients_are_cut_to_max_grad_norm(tmp_path, monkeypatch):
    norms = []
    original = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]
                                                                                    if p.grad is not None]).norm().item()), original(self))[1])
    toy_train(tmp_path, max_grad_norm=0.01)
    assert max(norms) <= 0.0101, "the gradient is longer than max_grad_norm"
    _, metrics = toy_train(tmp_path, max_grad_norm=0.01, iterations=1)
    assert metrics[0]["grad_norm"] > 0.011, "grad_norm is logged before clipping"


def test_stop_kl_ends_an_iterations_updates(tmp_path, monkeypatch):
    steps = []
    original = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (steps.append(1), original(self))[1])
    _, metrics = toy_train(tmp_path, stop_kl=1e-6, iterations=2, ppo_epochs=4, batch_size=16)
    assert len(steps) == sum(m["updates"] for m in metrics) == 2, "the first step moves the policy beyond a tiny stop_kl, so the second must not come"
    assert all(m["approx_kl"] > 1e-6 for m in metrics), "the KL that ended the updates must show in the metrics"
    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(rlaif, "kl_estimate", lambda new, old, kind="k1", f=rlaif.kl_estimate: (
            f(new, old, kind) if kind == "k1" else (seen.append(1), torch.full_like(new, float(len(seen) == 2)))[1]))
        _, metrics = toy_train(tmp_path, stop_kl=0.5, iterations=1, ppo_epochs=4, batch_size=16)
    assert metrics[0]["updates"] == 1, "stop_kl ends the iteration's updates: it does not only skip one minibatch"
    steps.clear()
    toy_train(tmp_path, stop_kl=1e6, iterations=2, ppo_epochs=4, batch_size=16)
    assert len(steps) == 2 * 4 * 4


def test_entropy_is_that_of_the_distribution_that_is_sampled(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(rlaif, "token_entropy", lambda logits, temperature=1.0, f=rlaif.token_entropy: (seen.append(temperature), f(logits, temperature))[1])
    toy_train(tmp_path, entropy_coef=0.1, iterations=1)
    assert len(seen) == 1 + 4 * 2 and set(seen) == {0.7}, "the entropy, logged or rewarded, needs the temperature of the sampling"


def test_the_entropy_bonus_raises_the_entropy(tmp_path):
    without, with_bonus = (toy_train(tmp_path, entropy_coef=coef, iterations=12, beta=0.0)[1][-1]["entropy"] for coef in (0.0, 1.0))
    assert with_bonus > without + 0.1, "the entropy bonus has the wrong sign or no effect"


def test_the_value_function_learns_the_returns_and_leaves_the_policy_alone_when_separate(tmp_path):
    for value in ("separate", "shared"):
        policy = gpt2()
        before = copy.deepcopy(policy.state_dict())
        _, metrics = toy_train(tmp_path, score=lambda p, r: [2.0] * len(r), policy=policy, value=value, beta=0.0, lam=1.0, whiten_scores=False,
                               missing_eos_score=math.inf, iterations=1, ppo_epochs=1, batch_size=64, minibatch_size=64, value_coef=1.0)
        moved = any(not torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
        # every return is 2, so every whitened advantage is 0: only the value loss has a gradient. A zero head passes none on at first.
        assert not moved, f"{value}: with constant returns and a zero head the policy must stay"
        _, metrics = toy_train(tmp_path, score=lambda p, r: [2.0] * len(r), value=value, beta=0.0, lam=1.0, whiten_scores=False,
                               missing_eos_score=math.inf, iterations=8, batch_size=16, minibatch_size=8, value_clip=math.inf, value_coef=1.0)
        assert metrics[-1]["value_loss"] < 0.1 * metrics[0]["value_loss"], f"{value}: the values do not learn the returns"
    policy = gpt2()
    preference = rlaif.PreferenceModel(gpt2(seed=5, kind=GPT2ForSequenceClassification, num_labels=1), letters(), "{prompt}")
    run = rlaif.prepare(toy_config(tmp_path, value="preference", value_head="random"), preference, None, policy, letters())
    assert all(torch.equal(a, b) for a, b in zip(run.value.trunk.parameters(), preference.model.base_model.parameters())), "starts from the preference model"
    assert run.value.trunk is not preference.model.base_model
    assert 0.5 < run.value.head.weight.std() * 33**0.5 < 1.5, "a random head starts normal with std 1/sqrt(D + 1)"
    run = rlaif.prepare(toy_config(tmp_path, value="separate", adam_epsilon=0.25), count_a, None, policy, letters())
    assert not {id(p) for p in run.value.parameters()} & {id(p) for p in policy.parameters()}, "a separate trunk is a copy"
    assert run.optimizer.param_groups[0]["eps"] == 0.25
    with pytest.raises(ValueError, match="tokenizer"):
        rlaif.prepare(toy_config(tmp_path, value="preference"), count_a, None, policy, letters())


def test_a_policy_that_is_not_the_one_that_sampled_is_loudly_reported(tmp_path, monkeypatch):
    policy = gpt2()
    monkeypatch.setattr(rlaif, "try_out", lambda run: None)
    policy.transformer.h[0].mlp.dropout = torch.nn.Dropout(0.5)
    policy.transformer.h[0].mlp.dropout.eval = lambda: None
    policy.transformer.h[0].mlp.dropout.train = lambda mode=True: policy.transformer.h[0].mlp.dropout  # eval mode does not reach it
    with pytest.warns(UserWarning, match="the ratio is off 1"):
        toy_train(tmp_path, policy=policy, iterations=1)


@pytest.mark.parametrize("control", ["fixed", "batch", "prompt"])
def test_beta_is_kept_or_steered_for_the_batch_or_for_each_prompt(tmp_path, monkeypatch, control):
    run = rlaif.prepare(toy_config(tmp_path, beta=0.5, beta_control=control, kl_target=1e-3, kl_horizon=100.0, iterations=4),
                        count_a, None, gpt2(), letters())
    monkeypatch.setattr(rlaif, "prepare", lambda *args: run)
    expected, fed = 0.5, []
    monkeypatch.setattr(rlaif, "steer_beta", lambda *args, f=rlaif.steer_beta: (fed.append(args[2].mean().item()), f(*args))[1])
    for metrics in rlaif.train(run.config):
        close(fed[-1], metrics["kl"], "a controller is fed the KL of whole responses", atol=1e-6)
        if control == "batch":
            close(metrics["beta"], expected, "the beta of an iteration was set by the one before", atol=1e-6)
            expected = update_beta(expected, metrics["kl"], 1e-3, 100.0, 8)
        if control != "prompt":
            close(run.beta, [expected] * 2, f"{control}: every prompt has the same beta")
    if control == "prompt":  # 4 responses to each prompt an iteration; the first has no KL, the others far too much
        close(run.beta, [0.5 * (1 - 0.2 * 4 / 100) * (1 + 0.2 * 4 / 100) ** 3] * 2, "each prompt's beta moves by its own responses")


def test_steering_takes_the_mean_of_the_batch_or_of_each_prompts_own_responses():
    index, kl = torch.tensor([0, 0, 2, 0]), torch.tensor([1.0, 3.0, 2.1, 2.3])
    beta = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)

    def steered(control):
        return rlaif.steer_beta(types.SimpleNamespace(beta=beta, config=rlaif.Config(beta_control=control, kl_target=2.0, kl_horizon=50.0)), index, kl)
    assert torch.equal(steered("fixed"), beta)
    close(steered("batch"), beta * (1 + (8.4 / 4 / 2 - 1) * 4 / 50), "one beta for the batch follows the mean KL of its responses", atol=1e-6)
    close(steered("prompt"), [0.1 * (1 + (6.3 / 3 / 2 - 1) * 3 / 50), 0.2, 0.4 * (1 + (2.1 / 2 - 1) / 50)], "a prompt's beta follows its own mean KL", atol=1e-6)


def test_the_metrics_of_an_update_are_means_over_its_minibatches(tmp_path, monkeypatch):
    losses, gaes, fits = [], [], []
    monkeypatch.setattr(rlaif, "policy_loss", lambda *args, f=rlaif.policy_loss: (losses.append((args, f(*args))), losses[-1][1])[1])
    monkeypatch.setattr(rlaif, "gae", lambda *args, f=rlaif.gae: (gaes.append((args, f(*args))), gaes[-1][1])[1])
    monkeypatch.setattr(rlaif, "value_loss", lambda *args, f=rlaif.value_loss: (fits.append(args), f(*args))[1])
    steered = []
    monkeypatch.setattr(rlaif, "steer_beta", lambda *args, f=rlaif.steer_beta: (steered.append(args), f(*args))[1])

    def prepare(*args, f=rlaif.prepare):
        run = f(*args)
        run.beta *= torch.tensor([1.0, 0.5])  # each of the two prompts pays a price of its own
        return run
    monkeypatch.setattr(rlaif, "prepare", prepare)
    _, (metrics,) = toy_train(tmp_path, iterations=1, batch_size=15, value_head="random", learning_rate=3e-2, clip=0.1, value_clip=0.3, beta=2.0)
    (_, index, _), = steered
    close(metrics["beta"], (2.0 - index.double()).mean(), "beta is the mean price that the batch's responses paid", atol=1e-6)
    assert {args[4] for args, _ in losses} == {0.1} and {args[4] for args in fits} == {0.3}, "each loss has a clip of its own"
    new, old, _, mask, _ = fits[0]
    close(new[mask], old[mask], "before the first step the values are the old ones: are these of other rows?", atol=1e-5)
    log_ratios = [(new - old)[mask].detach() for (new, old, _, mask, _), _ in losses]
    close(metrics["approx_kl"], sum((d.exp() - 1 - d).mean() for d in log_ratios) / 16, "approx_kl is the mean of rho - 1 - log rho", atol=1e-5)
    close(metrics["ratio"], sum(d.exp().mean() for d in log_ratios) / 16, "ratio is the mean of rho", atol=1e-5)
    close(metrics["policy_loss"], sum(loss for _, (loss, _) in losses) / 16, "policy_loss is the mean over the minibatches", atol=1e-5)
    close(metrics["clip_fraction"], sum(cut for _, (_, cut) in losses) / 16, "clip_fraction is the mean over the minibatches", atol=1e-5)
    (_, values, mask, *_), (_, returns) = gaes[0]
    explained = 1 - (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0)
    close(metrics["explained_variance"], explained, "explained variance is 1 - var(R - V) / var(R)", atol=1e-4)
    assert metrics["clip_fraction"] > 0 and abs(explained) > 0.01, "the example should show something"


def test_the_same_seed_gives_the_same_metrics_and_another_seed_does_not(tmp_path):
    a, b, c = (toy_train(tmp_path, seed=seed)[1] for seed in (1, 1, 2))
    assert same_but_for_timings(a, b), "a run is not reproducible"
    assert not same_but_for_timings(a, c), "the seed changes nothing"


@pytest.mark.parametrize("settings", [{}, {"beta_control": "prompt", "value": "separate"}, {"beta_control": "batch", "value_head": "random"}])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, settings):
    whole_policy, whole = toy_train(tmp_path, iterations=6, save_every=2, out=str(tmp_path / "whole"), **settings)
    start = gpt2()
    config = toy_config(tmp_path, iterations=6, save_every=2, out=str(tmp_path / "cut"), **settings)
    for metrics in rlaif.train(config, score=count_a, policy=start, tokenizer=letters()):
        if metrics["iteration"] == 5:
            break  # iteration 5 came after the checkpoint of iteration 4, and is done again
    policy = gpt2(seed=9)  # any weights: the checkpoint's go in
    rest = list(rlaif.train(rlaif.Config(resume=str(tmp_path / "cut")), score=count_a, policy=policy, tokenizer=letters()))
    assert [m["iteration"] for m in rest] == [5, 6]
    written = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert same_but_for_timings(written, whole) and same_but_for_timings(rest, whole[4:]), "resuming is not bit for bit"
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), whole_policy.parameters()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "policy")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), policy.parameters())), "the saved folder is not the trained policy"


def test_a_run_goes_on_in_another_folder_and_stays_whole_there(tmp_path, monkeypatch):
    whole_policy, whole = toy_train(tmp_path, iterations=4, save_every=2, out=str(tmp_path / "whole"))
    first = toy_config(tmp_path, iterations=4, save_every=2, out=str(tmp_path / "first"))
    for metrics in rlaif.train(first, score=count_a, policy=gpt2(), tokenizer=letters()):
        if metrics["iteration"] == 3:
            break

    def go_on(resume, out):
        policy = gpt2(seed=9)
        rest = list(rlaif.train(rlaif.Config(resume=str(tmp_path / resume), out=str(tmp_path / out)), score=count_a, policy=policy, tokenizer=letters()))
        written = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        assert same_but_for_timings(written, whole), "resumed in another folder it is another run: was the reference left behind?"
        for model in (policy, AutoModelForCausalLM.from_pretrained(tmp_path / out / "policy")):
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole_policy.parameters()))
        return [m["iteration"] for m in rest]
    assert go_on("first", "second") == [3, 4]
    assert go_on("second", "third") == [], "a run that is over has no iteration left, but its policy is there"
    with pytest.raises(ValueError, match="second already holds a run"):
        go_on("first", "second")


def test_a_run_that_goes_on_in_another_folder_may_be_stopped_there_at_once(tmp_path):
    _, whole = toy_train(tmp_path, iterations=4, save_every=2, out=str(tmp_path / "whole"))
    models = {"score": count_a, "policy": gpt2(), "tokenizer": letters()}
    for metrics in rlaif.train(toy_config(tmp_path, iterations=4, save_every=2, out=str(tmp_path / "first")), **models):
        if metrics["iteration"] == 3:
            break
    rlaif.prepare(rlaif.resumed(rlaif.Config(resume=str(tmp_path / "first"), out=str(tmp_path / "second"))), **models)
    rest = list(rlaif.train(rlaif.Config(resume=str(tmp_path / "second")), **models))
    assert [m["iteration"] for m in rest] == [3, 4] and same_but_for_timings(rest, whole[2:]), "the checkpoint stayed in the first folder"


def test_a_run_that_starts_again_starts_from_the_policy_it_first_had_though_that_has_been_trained(tmp_path):
    models = {"score": count_a, "policy": gpt2(), "tokenizer": letters()}
    for first in rlaif.train(toy_config(tmp_path, out=str(tmp_path / "run")), **models):
        break  # before any checkpoint; the notebook's policy has taken its steps
    again = list(rlaif.train(rlaif.Config(resume=str(tmp_path / "run")), **models))
    assert same_but_for_timings(again[:1], [first])


def test_a_run_does_not_go_on_with_other_prompts(tmp_path):
    models = {"score": count_a, "policy": gpt2(), "tokenizer": letters()}
    list(rlaif.train(toy_config(tmp_path, iterations=1, out=str(tmp_path / "run")), **models))
    (tmp_path / "prompts.txt").write_text("c\nab\n")
    with pytest.raises(ValueError, match="prompts.txt is not what it was"):
        list(rlaif.train(rlaif.Config(resume=str(tmp_path / "run")), **models))


@pytest.mark.parametrize("name", ["policy", "preference", "samples.md"])
def test_a_run_writes_over_nothing_that_it_finds(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("keep me")
    with pytest.raises(ValueError, match=f"mine already holds {name}"):
        list(rlaif.train(toy_config(tmp_path, out=str(tmp_path / "mine")), score=count_a, policy=gpt2(), tokenizer=letters()))
    assert (tmp_path / "mine" / name).read_text() == "keep me"


def test_a_reference_is_read_in_the_type_of_the_policy_and_not_rounded_to_it(tmp_path):
    policy = modern(LlamaConfig, LlamaForCausalLM).bfloat16()
    policy = AutoModelForCausalLM.from_pretrained(save_pair(tmp_path / "policy", policy, letters()), dtype=torch.bfloat16)
    config = toy_config(tmp_path, iterations=1, reference=str(tmp_path / "policy"))
    (metrics,) = rlaif.train(config, score=count_a, policy=policy, tokenizer=letters())
    assert metrics["kl"] == 0, "the reference is the policy: is it rounded where the policy is not, as in its table of angles?"


def test_a_full_disk_is_said_to_be_full(tmp_path, monkeypatch):
    def full(*args, **more):
        raise SafetensorError("I/O error: No space left on device")
    monkeypatch.setattr(rlaif, "save_file", full)
    with pytest.raises(OSError, match="cannot write .*value.safetensors, is the disk full"):
        list(rlaif.train(toy_config(tmp_path, iterations=1, out=str(tmp_path / "run")), score=count_a, policy=gpt2(), tokenizer=letters()))
    assert (tmp_path / "run" / "checkpoint.pt").exists(), "what is needed to go on is written first"


def test_an_eos_of_the_text_itself_is_kept():
    assert rlaif.tokenize(letters(), ["ab<eos>"]) == [[0, 1, EOS]], "a template may end with one"


def test_a_resumed_run_is_given_its_template_as_the_shell_first_gave_it(tmp_path):
    flags = ["--template", "Q: {prompt}\\nA:"]
    config = rlaif.parse(flags)
    assert config.template == "Q: {prompt}\nA:"
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert rlaif.parse([*flags, "--resume", str(tmp_path)]).template == config.template


def test_a_run_from_a_judge_that_stops_before_its_first_checkpoint_starts_again_the_same(tmp_path):
    judge = save_pair(tmp_path / "judge", *random_judge())
    policy = save_pair(tmp_path / "policy", gpt2(), letters())
    settings = {"policy": policy, "judge": judge, "pairs": 20, "preference_epochs": 1, "save_every": 2, "iterations": 2}
    whole = list(rlaif.train(toy_config(tmp_path, **settings)))
    for metrics in rlaif.train(toy_config(tmp_path, out=str(tmp_path / "run"), **settings)):
        break
    rest = list(rlaif.train(rlaif.Config(resume=str(tmp_path / "run"))))
    assert same_but_for_timings(rest, whole), "fitting the preference model moved the random numbers of the run"


# ---------------------------------------------------------------------------------------------------------------------
# The exact optimum
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("success,beta,expected", [(0.1, 0.1, (0.99959, 2.29809, 0.76978)), (0.1, 0.5, (0.45085, 0.40768, 0.24701)),
                                                   (0.1, 1.0, (0.23197, 0.07340, 0.15857)), (0.1, 2.0, (0.15483, 0.01456, 0.12571))])
def test_the_optimum_is_the_reference_tilted_by_the_reward(success, beta, expected):
    ref, reward = torch.tensor([1 - success, success], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    best = (ref.log() + reward / beta).softmax(0)
    kl = (best * (best / ref).log()).sum()
    for found, number in zip((best @ reward, kl, best @ reward - beta * kl), expected):
        assert abs(found - number) < 1e-5
    close(best @ reward - beta * kl, beta * (ref.log() + reward / beta).logsumexp(0), "J* is beta log E_ref exp(r / beta)")


def exact_run(folder, beta, seed, iterations=200):
    """Train a GPT-2 of 4 tokens on a random reward table, every response of which is enumerated.

    -> (reward, KL) of the policy at its start, at its end, and of the exact optimum, means over two prompts."""
    torch.set_num_threads(1)  # so small, a run gains nothing from more
    torch.manual_seed(seed)
    table = {prompt: dict(zip(TEXTS, (2 * torch.randn(40, dtype=torch.float64)).tolist())) for prompt in ("ab", "c")}
    policy, prompt_ids = gpt2(seed=seed), {"ab": [0, 1], "c": [2]}

    def logprobs():
        with torch.no_grad():
            return torch.stack([enumerate_logprobs(policy, ids).sum(1) for ids in prompt_ids.values()])  # (2, 40)

    def reward_and_kl(new):
        return (new.exp() * rewards).sum(1).mean().item(), (new.exp() * (new - ref)).sum(1).mean().item()
    rewards, ref = torch.tensor([list(row.values()) for row in table.values()], dtype=torch.float64), logprobs()
    toy_train(folder, score=lambda prompts, texts: [table[p][t] for p, t in zip(prompts, texts)], policy=policy, beta=beta, seed=seed,
              whiten_scores=False, missing_eos_score=math.inf, iterations=iterations, batch_size=256, minibatch_size=128, ppo_epochs=2,
              learning_rate=1e-3)
    return reward_and_kl(ref), reward_and_kl(logprobs()), reward_and_kl((ref + rewards / beta).log_softmax(1))


EXACT = {0.3: (80, 0.85), 1.0: (200, 0.99), 3.0: (200, 0.99)}  # beta -> iterations, and the share of the gap to J* closed at least


@pytest.fixture(scope="module")
def exact_runs(tmp_path_factory):
    """{(beta, seed): what exact_run gives}, two runs at a time, each in a process of its own."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        runs = {(beta, seed): pool.submit(exact_run, tmp_path_factory.mktemp("exact"), beta, seed, iterations)
                for beta, (iterations, _) in EXACT.items() for seed in range(3)}
        return {key: run.result() for key, run in runs.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", EXACT)
def test_ppo_finds_the_exact_optimum_of_reward_less_beta_kl(exact_runs, beta, seed):
    """The whole loop against a number: J* = beta log E_ref exp(r / beta). It fails for a wrong sign or weight, a temperature
    missing on one side, an EOS left out or a leak of padding anywhere."""
    start, end, best = (reward - beta * kl for reward, kl in exact_runs[beta, seed])
    assert end <= best + 1e-5, "no policy can pass the optimum: the objective or the enumeration is wrong"
    assert end - start >= EXACT[beta][1] * (best - start), f"only {(end - start) / (best - start):.1%} of the gap to the optimum is closed"


def test_the_shipped_policy_gets_better_by_the_score_and_by_the_truth():
    config = rlaif.Config(policy=str(HERE / "tiny_models/policy"), preference=str(HERE / "tiny_models/preference"), device="cpu",
                          prompts=str(HERE / "tiny_models/prompts.txt"), eval_prompts=str(HERE / "tiny_models/heldout_prompts.txt"),
                          iterations=8, eval_samples=8)
    run = rlaif.prepare(config, gold=world.gold_scores)
    assert run.held == world.HELDOUT_PROMPTS
    before, rows = rlaif.evaluate(run)
    assert abs(before["score"]) < 0.3 and before["fluency"] > 0.95 and before["eos_fraction"] > 0.98 and abs(before["kl"]) < 1e-6, before
    assert all(world.gold_score(prompt, response) == gold for prompt, response, _, gold, _ in rows)
    for metrics in rlaif.ppo(run):
        assert abs(metrics["ratio"] - 1) < 0.1 and 0 < metrics["distinct"] <= 1
    after, _ = rlaif.evaluate(run)
    assert after["score"] > before["score"] + 0.4 and after["gold"] > before["gold"] + 0.5, f"{before} -> {after}"


# ---------------------------------------------------------------------------------------------------------------------
# The tiny world
# ---------------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(world.PROMPTS + world.HELDOUT_PROMPTS), st.integers(0, 2**31))
def test_the_grammar_writes_fluent_replies_and_none_beats_the_best(prompt, seed):
    reply = world.sample_reply(prompt, random.Random(seed))
    assert world.is_fluent(reply) and world.is_fluent(world.best_reply(prompt)) and not world.is_fluent("") and not world.is_fluent(reply + " take")
    assert world.gold_score(prompt, reply) <= world.gold_score(prompt, world.best_reply(prompt)) == 3
    assert world.gold_score(prompt, reply + " " + " ".join(["take"] * 9)) < world.gold_score(prompt, reply), "babble must cost something"


@given(st.text(max_size=40))
def test_the_shared_tokenizer_reads_any_text_and_writes_it_back(text):
    tokenizer = rlaif.load_tokenizer(str(HERE / "tiny_models/policy"), "policy")
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer) <= 512


# ---------------------------------------------------------------------------------------------------------------------
# The edge: what users bring, and what goes wrong
# ---------------------------------------------------------------------------------------------------------------------


def save_pair(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_main(capsys, *argv):
    code = rlaif.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


TOY_FLAGS = ["--template", "{prompt}", "--max_new_tokens", 3, "--iterations", 2, "--batch_size", 4, "--minibatch_size", 2,
             "--eval_samples", 1, "--device", "cpu"]


@pytest.mark.filterwarnings("ignore")
@every_architecture
def test_any_policy_with_any_preference_model_and_its_own_tokenizer(architecture, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = save_pair(tmp_path / "policy", ARCHITECTURES[architecture]().bfloat16(), letters())
    torch.manual_seed(1)
    if architecture in ("GPT-2", "Llama"):
        scorer = gpt2(6, kind=GPT2ForSequenceClassification, num_labels=1)
    else:
        scorer = modern(Qwen2Config, Qwen2ForSequenceClassification, num_labels=1).eval()
        scorer.resize_token_embeddings(6)
    preference = save_pair(tmp_path / "preference", scorer, letters("xcbay", pad_token="x"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c", "other": 1}\n')
    code, out, err = run_main(capsys, "--policy", policy, "--preference", preference, "--prompts", "p.jsonl", *TOY_FLAGS)
    assert code == 0, err
    assert "before" in out and "episodes per second" in out and "of the rate of a matrix product" in out
    run = tmp_path / "runs" / "seed-0"
    names = {path.name for path in run.iterdir()}
    assert {"policy", "config.json", "metrics.jsonl", "samples.md", "value.safetensors", "checkpoint.pt"} <= names
    AutoModelForCausalLM.from_pretrained(run / "policy")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    code, _, err = run_main(capsys, "--policy", policy, "--preference", preference, "--prompts", "p.jsonl", *TOY_FLAGS)
    assert code == 2 and "already holds a run" in err


def test_the_whole_pipeline_from_a_judge(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge = save_pair(tmp_path / "judge", *random_judge())
    policy = save_pair(tmp_path / "policy", gpt2(), letters())
    (tmp_path / "p.txt").write_text("ab\nc\n")
    (tmp_path / "constitution.txt").write_text("Choose the kinder response.\n")
    code, out, err = run_main(capsys, "--policy", policy, "--judge", judge, "--prompts", "p.txt", "--constitution", "constitution.txt", "--pairs", 40,
                              "--preference_epochs", 1, *TOY_FLAGS)
    assert code == 0, err
    assert "agrees with the judge" in out
    preference = rlaif.load_preference(rlaif.Config(preference="runs/seed-0/preference"), "cpu")
    assert len(preference(["ab"], ["a"])) == 1
    code, out, err = run_main(capsys, "--resume", "runs/seed-0")
    assert code == 0, err
    assert re.search(r"\| kl \| -?0\.000 \|", out) and not re.search(r"\| kl \| -?0\.000 \| -?0\.000", out), "before is before any training, after is the trained policy"


BAD_FLAGS = {
    ("--beta", -0.1): "beta must be 0 or more",
    ("--beta", "nan"): "beta must be a finite number",
    ("--minibatch_size", 5): "minibatch_size 5 is larger than batch_size 4",
    ("--kl_level", "word"): "kl_level",
    ("--iterations", 0): "iterations must be at least 1",
    ("--temperature", 0): "temperature must be greater than 0",
    ("--gamma", 1.5): "gamma must be from 0 to 1",
    ("--pairs", 1): "pairs must be at least 2",
    ("--batch_size", 1, "--minibatch_size", 1): "batch_size must be at least 2",
    ("--beta", 0, "--beta_control", "batch"): "beta must be greater than 0",
    ("--policy", "custom"): "policy: cannot load a model from custom",
    ("--template", "no place"): "template must hold {prompt} once",
    ("--template", "{prompt} {"): "template must hold {prompt} once",
    ("--prompts", "nowhere.txt"): "prompts nowhere.txt",
    ("--prompts", "empty.txt"): "prompts empty.txt is empty",
    ("--prompts", "blank.txt"): "blank.txt, line 2",
    ("--prompts", "latin.txt"): "latin.txt, line 2: not UTF-8",
    ("--prompts", "long.txt"): "long.txt, line 2: 15 tokens of prompt and 3 of response are longer than the policy's context, 16",
    ("--prompts", "other.txt"): "other.txt, line 1: the policy's tokenizer cannot write",
    ("--prompts", "broken.jsonl"): "broken.jsonl, line 2",
    ("--policy", "./nowhere"): "there is no folder",
    ("--policy", "mamba"): "policy: a MambaForCausalLM cannot be used: ",
    ("--policy", "roberta"): "policy: padding moves its logits",
    ("--policy", "nan"): "policy: its weights are not finite",
    ("--policy", "codegen", "--judge", "judge"): "judge: no preference model can start from a CodeGenForCausalLM",
    ("--preference", "bert", "--value", "preference"): "value: 'preference' needs a preference model that reads from left to right",
    ("--reference", "policy", "--policy", "long"): "reference: its context is shorter",
    ("--seed", 2**63): "seed must be below 2**63",
    ("--gold", "math:pi"): "gold: 'math:pi' is not a function",
    ("--prompts", "surrogate.jsonl"): "surrogate.jsonl, line 1",
    ("--judge", "nan judge"): "judge: its answer is not finite",
    ("--judge", "odd judge"): "judge: cannot be asked: ",
    ("--judge", "policy"): "judge: its tokenizer writes the answers A and B alike",
    ("--preference", "policy"): "preference: ",
    ("--preference", "two"): "has 2 outputs, needs exactly one",
    ("--preference", "truncated"): "preference: cannot load a model from",
    ("--preference", "pickled"): "preference: cannot load a model from",
    ("--preference", "index"): "preference: cannot load a model from index: its index names files other than safetensors",
    ("--policy", "narrow"): "the tokenizer does not fit the model",
    ("--gold", "nowhere:f"): "gold: cannot import",
    ("--gold", "no_colon"): "gold: cannot import",
    ("--device", "abacus"): "device: 'abacus'",
    ("--device", "meta"): "device: 'meta' cannot be used",
    ("--resume", "nowhere"): "resume: ",
    ("--no_such_flag", 1): "no_such_flag",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with good and bad models and files."""
    folder = tmp_path_factory.mktemp("bench")
    save_pair(folder / "policy", gpt2(), letters())
    save_pair(folder / "preference", gpt2(kind=GPT2ForSequenceClassification, num_labels=1), letters())
    save_pair(folder / "two", gpt2(kind=GPT2ForSequenceClassification, num_labels=2), letters())
    save_pair(folder / "narrow", gpt2(), letters("abcdefgh"))
    save_pair(folder / "roberta", transformers.RobertaForCausalLM(transformers.RobertaConfig(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=32, is_decoder=True,
        initializer_range=0.5, pad_token_id=4)), letters())
    save_pair(folder / "codegen", transformers.CodeGenForCausalLM(transformers.CodeGenConfig(
        vocab_size=4, n_embd=16, n_layer=1, n_head=4, rotary_dim=2, n_positions=16, bos_token_id=None, eos_token_id=3)), letters())
    save_pair(folder / "bert", transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=32, num_labels=1)), letters())
    save_pair(folder / "judge", *random_judge())
    save_pair(folder / "odd judge", *random_judge(chat_template="{{ messages[7].content + 1 }}"))
    judge, tokenizer = random_judge()
    torch.nn.init.constant_(judge.transformer.ln_f.bias, math.nan)
    save_pair(folder / "nan judge", judge, tokenizer)
    save_pair(folder / "long", gpt2(context=32), letters())
    broken = gpt2()
    torch.nn.init.constant_(broken.transformer.ln_f.bias, math.nan)
    save_pair(folder / "nan", broken, letters())
    save_pair(folder / "mamba", MambaForCausalLM(MambaConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1)), letters())  # it has no cache of keys
    save_pair(folder / "truncated", gpt2(kind=GPT2ForSequenceClassification, num_labels=1), letters())
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    save_pair(folder / "pickled", gpt2(kind=GPT2ForSequenceClassification, num_labels=1), letters())
    save_pair(folder / "custom", gpt2(), letters())  # a model that asks for code of its own to be run
    config = json.loads((folder / "custom" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "custom" / "config.json").write_text(json.dumps(config))
    (folder / "custom" / "own.py").write_text("raise SystemExit('code of a model folder was run')")
    torch.save({}, folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    save_pair(folder / "index", gpt2(kind=GPT2ForSequenceClassification, num_labels=1), letters())
    weights = load_file(folder / "index" / "model.safetensors")
    torch.save(weights, folder / "index" / "pytorch_model.bin")
    (folder / "index" / "model.safetensors").unlink()
    (folder / "index" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {key: "pytorch_model.bin" for key in weights}}))
    for name, data in {"p.txt": b"ab\nc\n", "empty.txt": b"", "blank.txt": b"ab\n \nc", "latin.txt": "a\né".encode("latin-1"), "other.txt": "ж".encode(),
                       "long.txt": b"ab\n" + b"a" * 15, "broken.jsonl": b'{"prompt": "a"}\n{"prompt": 3}\n',
                       "surrogate.jsonl": b'{"prompt": "\\ud800"}\n'}.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flag", BAD_FLAGS, ids=lambda flag: " ".join(map(str, flag)))
def test_bad_input_ends_with_one_clear_sentence_and_exit_code_two(flag, bench, capsys, monkeypatch):
    monkeypatch.chdir(bench)
    code, out, err = run_main(capsys, "--policy", "policy", "--preference", "preference", "--prompts", "p.txt", *TOY_FLAGS, *flag)
    message = [line for line in err.splitlines() if line.startswith("rlaif: ")]
    assert code == 2 and len(message) == 1 and BAD_FLAGS[flag] in message[0], err
    assert not (bench / "runs").exists(), "nothing may be written before the settings are known to be good"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_or_losses_that_stop_being_finite_stop_the_run_and_name_the_iteration(tmp_path, bad):
    calls = []

    def score(prompts, responses):
        calls.append(1)
        return [bad if len(calls) == 3 else 1.0] * len(responses)
    with pytest.raises(FloatingPointError, match="iteration 3.*score.*checkpoint in .* is good"):
        toy_train(tmp_path, score=score, out=str(tmp_path / "run"), save_every=1)
    policy = gpt2()
    with pytest.raises(FloatingPointError, match="iteration 1: the loss"):
        toy_train(tmp_path, score=lambda p, r: [3e38] * (len(r) - 1) + [-3e38], policy=policy, whiten_scores=False, whiten_advantages=False)
    assert all(torch.isfinite(p).all() for p in policy.parameters()), "a step was taken on a loss that is not finite"
    policy.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(FloatingPointError, match="iteration 1: the loss or its gradient"):
        toy_train(tmp_path, policy=policy)
    assert all(torch.isfinite(p).all() for p in policy.parameters()), "a step was taken along a gradient that is not finite"
    with pytest.raises(ValueError, match="one number for each"):
        toy_train(tmp_path, score=lambda p, r: [1.0])


@given(st.binary(max_size=60), st.sampled_from([".txt", ".jsonl"]))
def test_any_bytes_as_a_prompts_file_give_prompts_or_a_value_error(tmp_path, data, ending):
    path = tmp_path / f"prompts{ending}"
    path.write_bytes(data)
    try:
        prompts = rlaif.read_prompts(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert prompts and all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)


@given(st.sampled_from([f.name for f in dataclasses.fields(rlaif.Config)]), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)))
def test_any_value_of_any_setting_is_accepted_or_a_value_error_that_names_it(name, value):
    try:
        rlaif.check_config(dataclasses.replace(rlaif.Config(), **{name: value}))
    except ValueError as error:
        assert name in str(error)


@given(st.lists(st.text(max_size=8), max_size=3), st.sampled_from([f.name for f in dataclasses.fields(rlaif.Config)]))
def test_any_command_line_parses_or_is_a_value_error(words, name):
    try:
        assert isinstance(rlaif.parse([f"--{name}", *words]), rlaif.Config)
    except ValueError as error:
        assert str(error)
    except SystemExit as stop:
        assert stop.code == 0, "only --help leaves"


def test_resuming_with_other_settings_says_which_changed(tmp_path, capsys):
    toy_train(tmp_path, out=str(tmp_path / "run"), beta=0.5, save_every=1)
    with pytest.raises(ValueError, match=r"beta \(was 0.5, now 0.7\)"):
        next(rlaif.train(rlaif.Config(resume=str(tmp_path / "run"), beta=0.7)))
    code, _, err = run_main(capsys, "--resume", tmp_path / "run", "--beta", rlaif.Config().beta)
    assert code == 2 and "beta (was 0.5" in err, "a default given by hand is a change too"
    given = rlaif.parse(["--resume", str(tmp_path / "run"), "--device", "auto", "--save_every", "10"])
    assert (given.device, given.save_every, given.beta) == ("auto", 10, 0.5), "a default given by hand for what may change is taken"
    assert rlaif.parse(["--resume", str(tmp_path / "run")]).device == "cpu", "what is not given is the run's own"
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match="checkpoint.pt"):
        next(rlaif.train(rlaif.Config(resume=str(tmp_path / "run")), score=count_a, policy=gpt2(), tokenizer=letters()))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    rlaif.write(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        rlaif.write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_every_tenth_prompt_is_held_out_unless_held_out_prompts_are_named(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(["a", "b", "c"] * 7))
    (tmp_path / "e.txt").write_text("cc\n")
    config = rlaif.check_config(rlaif.Config(prompts=str(tmp_path / "p.txt"), max_new_tokens=1, template="{prompt}"))
    assert config.gold is None and config.eval_prompts is None, "the tiny world's truth and prompts go with its own prompts only"
    prompts, held = rlaif.load_prompts(config, gpt2(), letters())
    assert len(prompts) == 19 and held == ["a", "b"]
    prompts, held = rlaif.load_prompts(dataclasses.replace(config, eval_prompts=str(tmp_path / "e.txt")), gpt2(), letters())
    assert len(prompts) == 21 and held == ["cc"]


def test_a_tokenizer_that_adds_bos_and_eos_by_itself(tmp_path):
    from tokenizers.processors import TemplateProcessing
    tokenizer = letters()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="a $A <eos>", special_tokens=[("a", 0), ("<eos>", 3)])
    assert tokenizer("bc").input_ids == [0, 1, 2, 3]
    assert rlaif.tokenize(tokenizer, ["bc", "c"]) == [[0, 1, 2], [0, 2]], "BOS stays, EOS goes: the text goes on"


def test_a_response_is_cut_from_the_whole_text_with_its_first_space():
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "▁b": 1, "<eos>": 2}, []))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    assert tokenizer.decode([1, 1]) == "b b", "this tokenizer drops the first space"
    assert rlaif.decode(tokenizer, [[0]], [[1, 1, 2]]) == [" b b"]
    assert rlaif.decode(letters("a .", clean_up_tokenization_spaces=True), [[0]], [[1, 2, 3]]) == [" ."], "the space before a full stop is the response's own"


def test_a_table_shows_any_text_in_one_cell_and_means_count_every_reply(tmp_path):
    row = ("a|b\nc", " x |\n y", 0.5, None, 0.0)
    assert rlaif.samples_table([row], [row]).splitlines()[2] == "| a\\|b c | x \\| y | 0.50 |  | x \\| y | 0.50 |  |"
    run = rlaif.prepare(toy_config(tmp_path, eval_samples=150), count_a, None, gpt2(), letters())
    run.reference = gpt2(seed=1)
    random_state = torch.get_rng_state()
    means, rows = rlaif.evaluate(run)  # 300 replies, in two batches
    assert torch.equal(random_state, torch.get_rng_state()), "measuring must not move the run's random numbers"
    close(means["score"], sum(count_a([], [row[1] for row in rows])) / 300, "score is the mean over all replies", atol=1e-5)
    exact = [enumerate_logprobs(run.policy, ids) for ids in ([0, 1], [2])]
    ref = [enumerate_logprobs(run.reference, ids) for ids in ([0, 1], [2])]
    kl = {(prompt, text): (p[i] - q[i]).sum().item() for prompt, p, q in zip(("ab", "c"), exact, ref) for i, text in enumerate(TEXTS)}
    close([row[4] for row in rows], [kl[row[:2]] for row in rows], "the KL of a reply is over its own tokens", atol=1e-4)
    entropy, length = (sum((p.sum(1).exp() * x).sum().item() for p, x in zip(exact, y)) / 2
                       for y in ([-p.sum(1) for p in exact], [ALL_MASK.sum(1)] * 2))
    assert abs(means["entropy"] * means["length"] - entropy) < 0.2 and abs(means["length"] - length) < 0.15, "entropy is per token"
    torch.rand(1)
    assert rlaif.evaluate(run)[1] == rows, "the same policy must give the same table"
    run.held = ["c"]
    assert {row[0] for row in rlaif.evaluate(run)[1]} == {"c"}, "what is measured is measured on the held-out prompts"


def test_every_new_tensor_is_made_where_its_inputs_are(tmp_path):
    """The default device here is one that holds no data: a tensor that lands on it by mistake cannot be computed with."""
    policy, value, config = gpt2(), rlaif.ValueFunction(32), toy_config(tmp_path)
    judge, judge_tokenizer = random_judge()
    preference = rlaif.new_preference_model(policy, letters(), "{prompt}")
    run = types.SimpleNamespace(tokenizer=letters(), score=lambda prompts, texts, ended, iteration: torch.zeros(len(texts), device="cpu"))
    scores, prompts = torch.tensor([1.0, 2.0, 0.0]), ["ab", "c", "ba"]
    with torch.device("meta"):
        ids, attention, tokens, mask, _, ended = rlaif.respond(policy, letters(), prompts, config)
        logits, values = rlaif.response_logits(policy, ids, attention, tokens, mask, value)
        prefixes = rlaif.score_prefixes(run, prompts, ids, attention, tokens, mask, scores, 1)
        logprobs = token_logprobs(logits, tokens)
        kl = kl_estimate(logprobs, logprobs)
        rewards = [shape_rewards(scores, kl, mask, beta, level) for beta in (0.1, scores) for level in ("token", "sequence", "batch")]
        advantages, returns = gae(rewards[0], values, mask)
        losses = [policy_loss(logprobs, logprobs, whiten(advantages, mask), mask)[0], value_loss(values, values, returns, mask)]
        labels = rlaif.ask_judge(judge, judge_tokenizer, ["ab", "cdefgh"])
        assert len(preference(prompts, TEXTS[:3])) == 3
    made = [ids, attention, tokens, mask, ended, logits, values, prefixes, dense_scores(prefixes, mask), *rewards, *losses, labels]
    assert all(tensor.device.type == "cpu" for tensor in made)
    close(labels, rlaif.ask_judge(judge, judge_tokenizer, ["ab", "cdefgh"]), "the answers were looked up with indices that hold no data")


def test_a_prefix_is_scored_as_a_response_that_has_not_ended(tmp_path):
    seen = []

    class Recorder(rlaif.PreferenceModel):
        def __call__(self, prompts, responses, ended=None):
            seen.append(ended)
            return [0.0] * len(prompts)
    list(rlaif.train(toy_config(tmp_path, dense_reward=True, iterations=1), score=Recorder(gpt2(), letters(), "{prompt}"), policy=gpt2(),
                     tokenizer=letters()))
    whole, prefixes = seen
    assert any(whole) and not all(whole) and len(prefixes) > len(whole) and not any(prefixes), "only a response that ended gets an EOS"


def test_pasted_into_a_notebook_everything_is_defined_and_nothing_starts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "connection.json"])
    cell = {"__name__": "__main__"}
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    exec(compile((HERE / "rlaif.py").read_text(), "<cell>", "exec"), cell)
    assert cell["Config"]().iterations == rlaif.Config().iterations and callable(cell["train"])


@pytest.mark.parametrize("name", ["token_logprobs", "kl_estimate", "masked_mean", "whiten", "shape_rewards", "dense_scores", "gae", "policy_loss",
                                  "value_loss", "preference_loss", "update_beta", "generate"])
def test_each_public_function_runs_when_copied_alone(name):
    import inspect
    alone = {"torch": torch, "logsigmoid": torch.nn.functional.logsigmoid}
    exec(inspect.getsource(getattr(rlaif, name)), alone)
    one, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    calls = {"token_logprobs": (torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)), "kl_estimate": (one, one), "masked_mean": (one, mask),
             "whiten": (one, mask), "shape_rewards": (one[:, 0], one, mask, 0.1), "dense_scores": (one, mask), "gae": (one, one, mask),
             "policy_loss": (one, one, one, mask), "value_loss": (one, one, one, mask), "preference_loss": (one, one, one),
             "update_beta": (0.1, 1.0, 1.0, 10, 1), "generate": (gpt2(), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.long), 2, None, 0)}
    assert alone[name](*calls[name]) is not None
    assert alone[name].__doc__


def test_a_killed_run_goes_on_as_if_it_had_never_stopped(tmp_path, capsys, monkeypatch):
    """kill -9, or SIGTERM, in the middle of a run of the command line, then --resume."""
    monkeypatch.chdir(tmp_path)
    save_pair(tmp_path / "policy", gpt2(), letters())
    save_pair(tmp_path / "preference", gpt2(kind=GPT2ForSequenceClassification, num_labels=1), letters())
    (tmp_path / "p.txt").write_text("ab\nc\n")
    flags = ["--policy", "policy", "--preference", "preference", "--prompts", "p.txt", *TOY_FLAGS, "--iterations", 50, "--save_every", 3]
    runs = []
    for stop in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, str(HERE / "rlaif.py"), *map(str, flags), "--out", stop.name], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "2"})
        metrics = tmp_path / stop.name / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 5) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (130 if stop == signal.SIGTERM else -stop), err
        assert b"Traceback" not in err and (stop == signal.SIGKILL or b"--resume SIGTERM" in err)
        assert metrics.read_text().count("\n") < 50, "the run was over before it was stopped"
        code, _, err = run_main(capsys, "--resume", stop.name)
        assert code == 0, err
        runs.append([json.loads(line) for line in metrics.read_text().splitlines()])
    assert len(runs[0]) == 50 and same_but_for_timings(*runs), "two runs, stopped at different places and resumed, must agree"
