"""A world so small that nothing has to be sampled: optimum and gradient are numbers.

Its policy is a GPT-2 over four tokens, a, b, c and EOS, that answers in one to three of them. That makes 40
responses to a prompt, all listed in SEQUENCES, so an expectation over them is a sum. What rlaif.py computes
from samples can be held against what the equations say:

    exact_run            how close `train` comes to the policy that is best of all, for one price of KL
    expected_gradient    what rewards, advantages and policy loss give as the policy's gradient, on average
    objective_gradient   the true gradient of the objective, by autograd

The tests use it to prove the loop, the experiments to draw it.
"""

import itertools
import math
import pathlib
import tempfile
import types
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import rlaif

EOS = 3
TEMPERATURE = 0.7
PROMPTS = {"ab": [0, 1], "c": [2]}  # of two lengths, with their token ids
SEQUENCES = [[*word, EOS] for n in range(3) for word in itertools.product(range(3), repeat=n)]
SEQUENCES += [list(word) for word in itertools.product(range(3), repeat=3)]  # cut off before an EOS
TEXTS = ["".join("abc"[token] for token in sequence if token != EOS) for sequence in SEQUENCES]
ALL_TOKENS = torch.tensor([sequence + [EOS] * (3 - len(sequence)) for sequence in SEQUENCES])  # (40, 3)
ALL_MASK = torch.tensor([[t < len(sequence) for t in range(3)] for sequence in SEQUENCES])  # (40, 3)
STATES = {}  # what may have been written before a token: the state in which the policy chooses it
PREFIXES = torch.tensor([[STATES.setdefault(tuple(row[:t]), len(STATES)) for t in range(3)]
                         for row in ALL_TOKENS.tolist()])  # (40, 3), of every token the number of its state


def letters(words="abc", **special):
    """A tokenizer with one token for each letter, or word of a list, and after them an EOS."""
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate([*words, "<eos>"])}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **special)


def gpt2(vocabulary=4, seed=0, kind=GPT2LMHeadModel, context=16, **settings):
    """A GPT-2 of two layers with random weights, large enough that it prefers some responses by far."""
    torch.manual_seed(seed)
    config = GPT2Config(**{
        "vocab_size": vocabulary, "n_positions": context, "n_embd": 32, "n_layer": 2, "n_head": 2,
        "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "initializer_range": 0.2,
        "activation_function": "gelu_pytorch_tanh", "bos_token_id": None, "eos_token_id": vocabulary - 1,
        **settings})
    return kind(config).eval()


def toy_config(folder, **settings):
    """The settings of a short run in this world, all that matter by name; its prompts go to `folder`."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return rlaif.Config(**{
        "prompts": str(folder / "prompts.txt"), "template": "{prompt}", "max_new_tokens": 3,
        "temperature": TEMPERATURE, "iterations": 3, "batch_size": 8, "minibatch_size": 4, "ppo_epochs": 4,
        "beta": 0.2, "kl_level": "token", "kl_estimator": "k1", "beta_control": "fixed",
        "whiten_scores": True, "missing_eos_score": -1.0, "value": "shared", "value_head": "zero",
        "gamma": 1.0, "lam": 0.95, "whiten_advantages": True, "clip": 0.2, "value_clip": 0.2,
        "value_coef": 0.1, "entropy_coef": 0.0, "stop_kl": math.inf, "learning_rate": 1e-2,
        "adam_epsilon": 1e-5, "max_grad_norm": 0.5, "device": "cpu", **settings})


def enumerate_logprobs(model, prompt_ids, temperature=TEMPERATURE):
    """log pi of every response to one prompt, token by token -> (40, 3) in float64, 0 outside ALL_MASK.

    It takes nothing from rlaif, which is held against it. The prompt has no padding, and what stands after
    an EOS moves nothing before it.
    """
    ids = torch.cat([torch.tensor([prompt_ids] * len(SEQUENCES)), ALL_TOKENS], dim=1)  # (40, P + 3)
    logits = model(ids).logits[:, len(prompt_ids) - 1:-1] / temperature  # (40, 3, V)
    logprobs = logits.log_softmax(dim=-1).gather(-1, ALL_TOKENS[..., None]).squeeze(-1)  # (40, 3)
    return torch.where(ALL_MASK, logprobs, 0.0).double()


# The optimum


@dataclass
class Outcome:
    """What a policy is worth, exactly: means over all responses and over the prompts."""

    reward: float  # points
    kl: float  # nats per response, to the reference
    objective: float  # reward - beta * kl


@dataclass
class ExactRun:
    """A run of `train` in this world, beside the best that any policy can do."""

    start: Outcome  # of the reference
    end: Outcome  # of the trained policy
    best: Outcome  # of pi* = pi_ref exp(r / beta) / Z

    @property
    def gap_closed(self):
        """The share of the way from the reference's objective to the optimum that training went."""
        return (self.end.objective - self.start.objective) / (self.best.objective - self.start.objective)


def outcome(logprobs, ref_logprobs, rewards, beta):
    """log pi, log pi_ref and rewards of all N responses to each of K prompts, (K, N) each -> Outcome."""
    prob = logprobs.exp()
    reward = (prob * rewards).sum(dim=1).mean().item()
    kl = (prob * (logprobs - ref_logprobs)).sum(dim=1).mean().item()
    return Outcome(reward, kl, reward - beta * kl)


def optimum(ref_logprobs, rewards, beta):
    """The Outcome of the policy that maximises reward - beta * KL: pi_ref exp(r / beta), normalised."""
    return outcome((ref_logprobs + rewards / beta).log_softmax(dim=1), ref_logprobs, rewards, beta)


def toy_run(folder, beta, seed, **settings):
    """A `Run` in this world, before its first iteration, on a random table of rewards, one number for each
    response to each prompt -> Run, rewards (2, 40)."""
    torch.set_num_threads(1)  # a model this small gains nothing from more
    torch.manual_seed(seed)
    rewards = 2 * torch.randn(len(PROMPTS), len(TEXTS), dtype=torch.float64)  # (2, 40)
    table = {prompt: dict(zip(TEXTS, row)) for prompt, row in zip(PROMPTS, rewards.tolist())}

    def score(prompts, responses):
        return [table[prompt][response] for prompt, response in zip(prompts, responses)]
    config = toy_config(folder, beta=beta, seed=seed, whiten_scores=False, missing_eos_score=math.inf,
                        **{"batch_size": 256, "minibatch_size": 128, "ppo_epochs": 2, "learning_rate": 1e-3,
                           **settings})
    return rlaif.prepare(config, score, policy=gpt2(seed=seed), tokenizer=letters()), rewards


def exact_run(folder, beta, seed, iterations=200, **settings):
    """Train a policy on a random table of rewards -> ExactRun."""
    run, rewards = toy_run(folder, beta, seed, iterations=iterations, **settings)

    @torch.no_grad()
    def logprobs():
        return torch.stack([enumerate_logprobs(run.policy, ids).sum(dim=1) for ids in PROMPTS.values()])
    ref = logprobs()  # (2, 40)
    while run.iteration < iterations:
        rlaif.update(run, rlaif.roll_out(run))
    return ExactRun(outcome(ref, ref, rewards, beta), outcome(logprobs(), ref, rewards, beta),
                    optimum(ref, rewards, beta))


def half_trained(beta, seed, iterations=40):
    """A run on its way: of each of the two prompts the policy and, in float64, prompt_ids, ref_logprobs
    (40, 3), scores (40,) and values (40, 3), those of a critic that has learned for as long."""
    with tempfile.TemporaryDirectory() as folder:
        run, rewards = toy_run(pathlib.Path(folder), beta, seed, iterations=200)
        while run.iteration < iterations:
            rlaif.update(run, rlaif.roll_out(run))
    run.policy.double(), run.value.double(), run.reference.double()
    for ids, scores in zip(PROMPTS.values(), rewards):
        with torch.no_grad():
            prompts = torch.tensor([ids] * len(SEQUENCES))
            _, values = rlaif.response_logits(run.policy, prompts, torch.ones_like(prompts), ALL_TOKENS,
                                              ALL_MASK, run.value)
            ref_logprobs = enumerate_logprobs(run.reference, ids)
        yield types.SimpleNamespace(policy=run.policy, prompt_ids=ids, ref_logprobs=ref_logprobs,
                                    scores=scores, values=values)


# The gradient


def flat_gradient(output, policy, weights=None, retain_graph=None):
    """The gradient by all parameters of the policy, in one vector."""
    parts = torch.autograd.grad(output, list(policy.parameters()), weights, retain_graph)
    return torch.cat([part.flatten() for part in parts])


def objective_gradient(policy, prompt_ids, ref_logprobs, scores, beta, kind="k1"):
    """The gradient of J = sum over y of pi(y) (score(y) - beta * sum over t of k(y_t)), by autograd.

    With k1 the second part is beta * KL(pi || pi_ref), and J the objective. k2 and k3 are charged as a reward
    is: a number that was measured, with no gradient of its own. What comes out is not the gradient of a KL.
    """
    logprobs = enumerate_logprobs(policy, prompt_ids)  # (40, 3)
    d = logprobs - ref_logprobs
    k = {"k1": d, "k2": (d**2 / 2).detach(), "k3": ((-d).exp() - 1 + d).detach()}[kind]
    return flat_gradient((logprobs.sum(dim=1).exp() * (scores - beta * k.sum(dim=1))).sum(), policy)


def expected_gradient(policy, prompt_ids, ref_logprobs, scores, beta, level="token", kind="k1", gamma=1.0,
                      lam=1.0, values=None, whitened=False):
    """The gradient that shape_rewards, gae and policy_loss give before the first step, on average.

    Each of the 40 responses is a batch of its own, weighted by its probability; for level "batch" each of
    the 1,600 pairs of independent responses is. A loss is a mean over tokens, so it is multiplied by the
    tokens per response. `whitened` first brings the scores to mean 0 and std 1 under the policy. Scores are
    (40,), ref_logprobs and values (40, 3). It points uphill, as the gradient of J does.
    """
    logprobs = enumerate_logprobs(policy, prompt_ids)  # (40, 3)
    new = logprobs.detach().requires_grad_()
    old = logprobs.detach()
    prob = old.sum(dim=1).exp()  # (40,)
    kl = rlaif.kl_estimate(old, ref_logprobs, kind)
    values = torch.zeros_like(old) if values is None else values
    if whitened:
        scores = scores - prob @ scores
        scores = scores / (prob @ scores**2).sqrt()
    uphill = torch.zeros_like(old)  # (40, 3), the gradient by the log-probabilities
    for batch in itertools.product(range(len(SEQUENCES)), repeat=2 if level == "batch" else 1):
        rows = list(batch)
        mask = ALL_MASK[rows]
        rewards = rlaif.shape_rewards(scores[rows], kl[rows], mask, beta, level)
        advantages, _ = rlaif.gae(rewards, values[rows], mask, gamma, lam)
        loss, _ = rlaif.policy_loss(new[rows], old[rows], advantages, mask, clip=math.inf)
        (downhill,) = torch.autograd.grad(loss, new)
        uphill -= prob[rows].prod() * mask.sum() / len(rows) * downhill
    return flat_gradient(logprobs, policy, uphill)
