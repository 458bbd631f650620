# %% RLAIF with PPO, whole, in one file
"""RLAIF with PPO: reinforcement learning from AI feedback, in the order in which it runs.

    a judge model, asked which of two replies better follows a principle ............ 1  judge_pairs
        |  soft labels
        v
    a preference model s(x, y), fitted to those labels .............................. 2  fit_preference
        |
        v
    +-> the policy writes a response y to each prompt x of a batch .................. 4  generate
    |       v
    |   the preference model scores every response .................................. 5  score_responses
    |       v
    |   log pi(y_t) - log pi_ref(y_t) for every token: how far it has drifted ....... 6  kl_estimate
    |       v
    |   reward of each token = -beta * KL, and the whitened score on the last ....... 7  shape_rewards
    |       v
    |   advantage of each token: how much better it went than the value expected .... 8  gae, whiten
    |       v
    +-- epochs of clipped updates of the policy and its value function .............. 9  policy_loss

`roll_out` is steps 4 to 8, `update` is step 9, and `train` is these two in turn: PPO, proximal policy
optimisation. They stand first, after the settings, as a table of contents that runs; the steps follow in
order. With prompts x and replies y ~ pi(y|x), training maximises over the policy pi

    J(pi) = E [ s(x, y) - beta * (log pi(y|x) - log pi_ref(y|x)) ]

where beta is the price of drift from the reference pi_ref, and s is the score, here whitened: shifted and
scaled to mean 0 and std 1 over the batch, so that beta counts stds of the score.

In RLHF, reinforcement learning from human feedback, people compare the replies; in RLAIF a model does. That
is cheap: any reply can be judged, at any time. And it is dangerous: the judge errs the same way each time,
and the policy finds out how. So look at the replies, and at a truth that nobody is trained on, called gold.

Writing a reply is a decision process. The policy is the language model, seen as the rule that picks an
action, the next token. The state is the prompt and the tokens so far, an episode is one response up to its
EOS (end-of-sequence token), and almost all of the reward comes with the last token. There are three policies:

    pi        the one that learns         changes with every optimizer step    9, where its gradient is taken
    pi_old    the one that wrote y        changes with every batch             4, 6, and the ratio of 9
    pi_ref    by default pi's own start   never changes                        6, where drift has its price

One example, of a reply of four tokens in a batch of longer ones. The score, whitened, is 1; beta is 0.3. The
value v is a forecast of the rewards from t on. At t the model has read only the prompt x and the tokens
before t; PAD, padding, only fills the row:

    t  y_t      mask   it has read so far      KL    reward               value  advantage
    0  Run      True   x                     0.50   -0.3 * 0.50 = -0.15    0.2      0.62
    1  slowly   True   x Run                 0.00    0.00                  0.4      0.57
    2  !        True   x Run slowly         -0.10    0.03                  0.5      0.47
    3  EOS      True   x Run slowly !        0.20    1.00 - 0.06 = 0.94    0.7      0.24
    4  PAD      False  (nothing that counts)         0.00                           0.00

The advantage (with gamma = lambda = 1, see section 8) is the sum of the rewards from t on, less the value: at
t = 1, 0.00 + 0.03 + 0.94 - 0.4. One token's KL may be below 0; its mean over replies is not.

One letter per tensor axis: B batch, T response (padded on the right), P prompt (padded on the left), V
vocabulary, D hidden size. Logits, before their softmax, are a model's scores for each next token. `mask` is
(B, T), True on a response's own tokens, its EOS included. It is made from lengths, never from ids that look
like padding, so PAD may be the EOS itself. Every response has at least one token. What stands outside the
mask, NaN included, changes nothing. KL is the Kullback-Leibler divergence, in nats (a nat is log2(e) bits).
Scores are in points, the preference model's unit. A model's trunk is all of it but its head, the last linear
layer. BOS is the token that begins a text for some models. std is a standard deviation. Each function of
sections 6 to 9 can be copied alone into a notebook. They take float64 too, in which the tests prove them:
`pytest -k NAME` is the proof of one.

    python rlaif.py                               PPO on the tiny models beside this file
    python rlaif.py --judge tiny_models/judge     the whole drawing, from the judge on
    python rlaif.py --help                        every setting with its unit, default and source

Sources, by the names that they have below; a number is arXiv's:
    PPO          Schulman 2017, Proximal policy optimization algorithms, 1707.06347
    GAE          Schulman 2015, Continuous control using generalized advantage estimation, 1506.02438
    Schulman     Schulman 2020, Approximating KL divergence, joschu.net/blog/kl-approx.html
    Lee          Lee 2023, RLAIF vs. RLHF, 2309.00267
    CAI          Bai 2022, Constitutional AI: harmlessness from AI feedback, 2212.08073
    Stiennon     Stiennon 2020, Learning to summarize from human feedback, 2009.01325
    InstructGPT  Ouyang 2022, Training language models to follow instructions, 2203.02155
    OAI          Ziegler 2019, Fine-tuning language models from human preferences, 1909.08593, and its code:
                 it whitens the tokens' rewards, after the KL, and keeps their mean; its Adam is TensorFlow's,
                 whose epsilon of 1e-5 is at the first step what 3.2e-4 is in PyTorch
    N+           Huang 2024, The N+ implementation details of RLHF with PPO, 2403.17031
    37           Huang 2022, The 37 implementation details of PPO, ICLR blog track
    Eisenstein   Eisenstein 2023, Helping or herding?, 2312.09244
    Ng           Ng 1999, Policy invariance under reward transformations, ICML
"""

import contextlib
import copy
import json
import math
import os
import pathlib
import pkgutil
import re
import shlex
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import nn
from torch.nn.functional import linear, logsigmoid
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          HfArgumentParser, logging as transformers_logging)

# %% 0. Settings

# Whether this runs as a command. (A notebook's kernel may set __file__ too.) The default paths are beside
# this file; pasted into a notebook, in its working directory.
IS_COMMAND = (__name__ == "__main__" and "__file__" in globals()
              and os.path.realpath(sys.argv[0]) == os.path.realpath(__file__))
HERE = pathlib.Path.cwd() if __name__ == "__main__" and not IS_COMMAND else pathlib.Path(__file__).parent
TINY = HERE.resolve() / "tiny_models"


def option(default, help):
    """A field of Config whose help text the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run. A name in brackets is a value's source; rlaif.py begins with a list of them."""

    # the models and the data
    policy: str = option(str(TINY / "policy"), "causal language model to train: a folder or a hub name")
    reference: str | None = option(None, "pi_ref, frozen: a folder or hub name; default: the policy's start")
    preference: str = option(str(TINY / "preference"), "one-output sequence classifier that gives the score")
    judge: str | None = option(None, "causal language model whose labels a new preference model is fitted to")
    constitution: str | None = option(None, "file of principles, one a line; default: CONSTITUTION")
    prompts: str = option(str(TINY / "prompts.txt"), 'one a line, or JSON with "prompt" or "messages"')
    eval_prompts: str | None = option(None, "held-out prompts; default: the tiny world's, or a tenth")
    template: str | None = option(None, "what a prompt is put into; default: chat template, or PLAIN")
    gold: str | None = option(None, "module:function: a truth, logged only; default: the tiny world's")
    out: str | None = option(None, "folder of the run; default: runs/seed-N, in Python nothing is written")
    # AI feedback
    pairs: int = option(4096, "pairs of replies that the judge compares")
    preference_epochs: int = option(12, "passes over the labelled pairs")
    preference_learning_rate: float = option(5e-4, "Adam's step size, falling linearly to 0")
    # the rollout
    iterations: int = option(75, "rounds of generate, score and update")
    batch_size: int = option(64, "responses per iteration (512: OAI, InstructGPT)")
    minibatch_size: int = option(16, "responses per optimizer step")
    micro_batch_size: int = option(64, "responses that go through a model at once: what memory grows with")
    ppo_epochs: int = option(1, "passes over each batch (1: InstructGPT; 4: Stiennon, OAI)")
    max_new_tokens: int = option(28, "tokens of a response at most")
    temperature: float = option(1.0, "of every softmax, the policy's and the reference's (1: InstructGPT)")
    # the reward
    beta: float = option(0.3, "price of a nat of KL, in stds of the score if whitened, else in points")
    kl_level: Literal["token", "sequence", "batch"] = option("token", "whose KL is paid: see shape_rewards")
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "estimator of the KL charged (Schulman)")
    beta_control: Literal["fixed", "batch"] = option("fixed", "keep beta, or steer it to kl_target (OAI)")
    kl_target: float = option(3.0, "nats per response that a steered beta aims at (6: OAI)")
    kl_horizon: float = option(500.0, "responses in which a steered beta moves by a fifth (10000: OAI)")
    whiten_scores: bool = option(True, "bring each batch's scores to mean 0 and std 1, before the KL")
    dense_reward: bool = option(False, "score every prefix and spread the score over the tokens")
    missing_eos_score: float = option(-1.0, "score of a reply that did not end, stds or points; inf: its own")
    # the advantage
    value: Literal["shared", "separate", "preference"] = option("shared", "trunk under the value head")
    value_head: Literal["zero", "random"] = option("zero", "how the value head starts (zero: OAI)")
    gamma: float = option(1.0, "discount per token (1: OAI, InstructGPT)")
    lam: float = option(1.0, "lambda of GAE: 0 trusts the values, 1 the returns (0.95: OAI)")
    whiten_advantages: bool = option(True, "bring each batch's advantages to mean 0 and std 1 (OAI)")
    # the update
    clip: float = option(0.1, "a ratio that gains earns nothing past 1 +- this; inf: off (0.2: PPO)")
    value_clip: float = option(0.2, "the same for a value, from its old one; inf: off (0.2: OAI)")
    value_coef: float = option(0.1, "weight of the value loss (OAI)")
    entropy_coef: float = option(0.0, "weight of the entropy bonus, per nat (0: OAI; PPO eq. 9)")
    stop_kl: float = option(0.05, "stop a batch's updates once KL(pi_old || pi) per token is above; inf: off")
    learning_rate: float = option(1e-3, "Adam's step size, falling linearly to 0 (N+, 1e9 weights: 3e-6)")
    adam_epsilon: float = option(3e-4, "gradients well below this get small steps (OAI: see its note)")
    max_grad_norm: float = option(0.5, "length to which a longer gradient is cut; inf: off")
    # the run
    seed: int = option(0, "seed of every random number")
    device: str = option("auto", "cpu, cuda, mps, or auto: the accelerator that is there, else cpu")
    dtype: Literal["float32", "bfloat16"] = option("float32", "inside the models; losses are float32 anyway")
    eval_samples: int = option(16, "replies to each held-out prompt in the before/after summary")
    save_every: int = option(10, "iterations between checkpoints")
    resume: str | None = option(None, "folder of a run to go on with, bit for bit")


# %% The loop: what a step makes, and one iteration from top to bottom


@dataclass
class Rollout:
    """A batch of B responses and every tensor of an iteration, in the order in which the steps fill it in.
    Outside the mask the entries of a (B, T) tensor mean nothing."""

    prompts: list  # 4. B prompts
    input_ids: torch.Tensor  # (B, P) the prompts, padded on the left
    attention_mask: torch.Tensor  # (B, P) 1 on their real tokens
    tokens: torch.Tensor  # (B, T) the responses, PAD after their EOS
    mask: torch.Tensor  # (B, T) True on their real tokens, the EOS included
    responses: list  # B str
    ended: torch.Tensor  # (B,) bool, whether a response has its EOS
    may_end: bool  # whether there is an EOS at all
    raw_scores: torch.Tensor = None  # 5. (B,) in points, as the score gave them
    gold_scores: torch.Tensor = None  # (B,) in points, or None
    prefix_scores: torch.Tensor = None  # (B, T) with dense_reward, in points
    logprobs: torch.Tensor = None  # 6. (B, T) log pi, nats, of the policy that sampled: the "old" one
    values: torch.Tensor = None  # (B, T) v(x, y_<t)
    entropy: torch.Tensor = None  # (B, T) nats
    ref_logprobs: torch.Tensor = None  # (B, T) log pi_ref, nats
    kl: torch.Tensor = None  # (B, T) the estimate that is charged, nats
    score_mean: float = 0.0  # 7. mean and std that whiten the scores, in points
    score_std: float = 1.0
    scores: torch.Tensor = None  # (B,) as used: whitened, missing EOS priced
    rewards: torch.Tensor = None  # (B, T)
    advantages: torch.Tensor = None  # 8. (B, T)
    returns: torch.Tensor = None  # (B, T) what the values are to learn
    whitened: torch.Tensor = None  # (B, T) the advantages as used by the policy loss

    def totals(self):
        """Of each response: score, gold (points), kl (k1), entropy (nats), length (tokens), eos_fraction."""
        tokens = {"kl": self.logprobs - self.ref_logprobs, "entropy": self.entropy,
                  "length": torch.ones_like(self.logprobs)}
        sums = {name: torch.where(self.mask, x, 0.0).sum(dim=1) for name, x in tokens.items()}
        gold = {} if self.gold_scores is None else {"gold": self.gold_scores}
        return {"score": self.raw_scores, **gold, **sums, "eos_fraction": self.ended.float()}


@dataclass
class Run:
    """What a training run is made of. Every model stays in eval mode, also while it is trained: dropout
    would move the ratio away from 1."""

    config: Config
    device: torch.device
    policy: nn.Module  # pi, the one that learns
    reference: nn.Module  # pi_ref, frozen
    tokenizer: Any  # the policy's
    prompts: list  # to train on, N prompts, each a str or a list of turns
    held_out: list  # to measure on
    score: Any  # PreferenceModel, or the caller's function from (prompts, responses) to floats
    gold: Any  # a function like it that gives the truth, or None
    passed: list  # which of score, gold, policy and tokenizer were passed in by the caller
    beta: float  # price of a nat of KL in the next iteration
    value: nn.Module = None  # v(x, y_<t), a ValueFunction
    optimizer: torch.optim.Optimizer = None  # of policy and value function
    iteration: int = 0  # the last one done
    rollout: "Rollout" = None  # the last one made
    poor_values: int = 0  # iterations in a row whose values were worse than none
    random: Any = None  # the state of the run's random numbers, on the CPU and on its device

    def autocast(self):
        """A context in which models compute in config.dtype; new for each use, since reuse leaves it on."""
        return torch.autocast(self.device.type, torch.bfloat16, self.config.dtype == "bfloat16")

    @contextlib.contextmanager
    def own_random(self):
        """A context in which torch's random numbers are the run's. After it the caller's go on as before."""
        cpu = self.device.type == "cpu"
        generators = [torch] if cpu else [torch, torch.get_device_module(self.device)]
        with torch.random.fork_rng([] if cpu else [self.device.index or 0], device_type=self.device.type):
            torch.manual_seed(self.config.seed)
            for generator, state in zip(generators, self.random or []):
                generator.set_rng_state(state)
            yield
            self.random = [generator.get_rng_state() for generator in generators]

    def require_finite(self, x, what):
        """Raise FloatingPointError, naming the iteration and the last good checkpoint, if x is not finite."""
        if not torch.isfinite(x).all():
            kept = f"; the last checkpoint is in {self.config.out}" if self.config.out else ""
            raise FloatingPointError(f"iteration {self.iteration + 1}: {what} is not finite{kept}")


def train(config, score=None, gold=None, policy=None, tokenizer=None):
    """Train a policy with PPO against AI feedback: an iterator that yields one dict of metrics per iteration.

        for metrics in train(Config(iterations=20)):
            print(metrics["iteration"], metrics["score"], metrics["kl"])

    `prepare` (section 11) loads and checks, runs steps 1 and 2 if there is a judge, and makes what step 3
    needs; `iterate` is the loop. `score` takes the preference model's place and `gold` is a ground truth,
    logged and never trained on: callables from (list of prompts, list of responses) to a list of floats.
    `policy`, a causal language model in float32, is trained in place; `tokenizer` is its tokenizer. They
    replace config.preference and config.judge, config.gold, and config.policy. Raises ValueError for a
    setting or a file that cannot be used, and FloatingPointError when scores, losses or gradients stop being
    finite.
    """
    yield from iterate(prepare(config, score, gold, policy, tokenizer))


def iterate(run):
    """The iterations that a run has left: each is rolled out, learned from and recorded -> its metrics."""
    while run.iteration < run.config.iterations:
        metrics = update(run, roll_out(run))
        record(run, metrics)
        yield metrics


def forward(run, model, rollout, rows, value=None, with_entropy=False):
    """One pass of a model over n rows of a rollout -> logprobs, values or None, entropy or None; (n, T) each.
    Only one pass's logits, by far the largest tensor, exist at a time."""
    r, tokens, temperature = rollout, rollout.tokens[rows], run.config.temperature
    with run.autocast():
        logits, values = response_logits(
            model, r.input_ids[rows], r.attention_mask[rows], tokens, r.mask[rows], value)
        logprobs = token_logprobs(logits, tokens, temperature)
        return logprobs, values, token_entropy(logits, temperature) if with_entropy else None


@torch.no_grad()
def roll_out(run, prompts=None):
    """Steps 4 to 8 on one batch of B prompts, drawn unless given -> Rollout, kept as run.rollout."""
    config = run.config

    # 4. Generate a response to each of B prompts.
    with run.own_random(), run.autocast():
        prompts = prompts or [run.prompts[i] for i in balanced_draw(len(run.prompts), config.batch_size)]
        r = run.rollout = respond(run.policy, run.tokenizer, prompts, config)

    # 5. Score them.
    r.raw_scores = score_responses(run, run.score, "score")  # (B,)
    if run.gold:
        r.gold_scores = score_responses(run, run.gold, "gold")
    if config.dense_reward:
        with run.autocast():
            r.prefix_scores = run.score.prefix_scores(r)  # (B, T)

    # 6. Per-token KL against the reference, of the policy that sampled: the "old" one of the update. Both
    # take as many rows at once as `update` does: in bfloat16 a row's numbers depend on its batch's shape, and
    # the first KL is to be 0, the first ratio 1.
    dtype = torch.promote_types(run.policy.dtype, torch.float32)
    shape, at_once = (4, *r.mask.shape), min(config.micro_batch_size, config.minibatch_size)
    r.logprobs, r.values, r.entropy, r.ref_logprobs = torch.zeros(shape, dtype=dtype, device=run.device)
    for rows in torch.arange(len(r.mask), device=run.device).split(at_once):
        r.logprobs[rows], r.values[rows], r.entropy[rows] = forward(run, run.policy, r, rows, run.value, True)
        r.ref_logprobs[rows], _, _ = forward(run, run.reference, r, rows)
    r.kl = kl_estimate(r.logprobs, r.ref_logprobs, config.kl_estimator)

    # 7. Rewards. The finished responses' scores are whitened, as `whiten` does it, the others get one score
    # for all, and then comes the price of KL.
    finished = r.ended | (not r.may_end or config.missing_eos_score == math.inf)  # (B,)
    if config.whiten_scores and finished.any():
        r.score_mean = r.raw_scores[finished].mean().item()
        r.score_std = math.sqrt(r.raw_scores[finished].var(correction=0).item() + 1e-8)
    r.scores = torch.where(finished, (r.raw_scores - r.score_mean) / r.score_std, config.missing_eos_score)
    dense = torch.zeros_like(r.kl)  # (B, T), the part of the score that is paid before the end
    if config.dense_reward:
        dense = dense_scores((r.prefix_scores - r.score_mean) / r.score_std, r.mask)
    at_end = r.scores - dense.sum(dim=1)  # (B,)
    r.rewards = shape_rewards(at_end, r.kl, r.mask, run.beta, config.kl_level) + dense  # (B, T)

    # 8. Advantages, whitened over the batch's real tokens.
    r.advantages, r.returns = gae(r.rewards, r.values, r.mask, config.gamma, config.lam)  # (B, T), (B, T)
    r.whitened = whiten(r.advantages, r.mask) if config.whiten_advantages else r.advantages
    return r


@torch.enable_grad()
def update(run, rollout, penalty=None):
    """Step 9: epochs of freshly shuffled minibatches, one optimizer step for each, until the new policy is
    further than stop_kl from the old one -> the metrics. A minibatch goes through the model in micro-batches,
    each weighed by its tokens, so that the step is that of the whole.

    `penalty`, a function of the new logprobs (n, T) and of the rows of the rollout that they belong to (n,),
    gives (n, T), whose masked mean is added to the loss.

    Means over the batch, before the update: score and gold (points), kl (to the reference, nats per
    response), entropy (nats per token), length (tokens), eos_fraction; score_std (points); objective, what
    the policy maximises (points); explained_variance of the returns by the values (compare within one
    lambda); distinct, the share of different responses. Means over the minibatches, the one that it stopped
    at too: policy_loss, value_loss, ratio, clip_fraction, approx_kl (old to new, nats per token). Over the
    steps that were taken, `updates` of them: grad_norm (before it is cut).
    """
    config, r = run.config, rollout
    (group,) = run.optimizer.param_groups
    group["lr"] = config.learning_rate * max(0.0, 1 - run.iteration / config.iterations)
    with run.own_random():
        epochs = [torch.randperm(len(r.mask)).to(run.device) for _ in range(config.ppo_epochs)]
    means, grad_norms = [], []
    for minibatch in [rows for order in epochs for rows in order.split(config.minibatch_size)]:
        run.optimizer.zero_grad()
        numbers = {}
        for rows in minibatch.split(config.micro_batch_size):
            mask, old_logprobs = r.mask[rows], r.logprobs[rows]
            share = mask.sum() / r.mask[minibatch].sum()  # of the minibatch's tokens
            logprobs, values, entropy = forward(run, run.policy, r, rows, run.value, config.entropy_coef > 0)
            pg_loss, clip_fraction = policy_loss(logprobs, old_logprobs, r.whitened[rows], mask, config.clip)
            v_loss = value_loss(values, r.values[rows], r.returns[rows], mask, config.value_clip)
            loss = pg_loss + config.value_coef * v_loss
            if config.entropy_coef:
                loss = loss - config.entropy_coef * masked_mean(entropy, mask)
            if penalty:
                loss = loss + masked_mean(penalty(logprobs, rows), mask)
            run.require_finite(loss.detach(), "the loss")
            (share * loss).backward()
            ratio = torch.where(mask, logprobs.detach() - old_logprobs, 0.0).exp()
            approx_kl = masked_mean(kl_estimate(old_logprobs, logprobs.detach(), "k3"), mask)
            for name, x in {"policy_loss": pg_loss, "value_loss": v_loss, "ratio": masked_mean(ratio, mask),
                            "clip_fraction": clip_fraction, "approx_kl": approx_kl}.items():
                numbers[name] = numbers.get(name, 0.0) + share * x.detach()
            if not grad_norms and (ratio - 1).abs().max() > (1e-4 if config.dtype == "float32" else 0.05):
                warnings.warn(f"iteration {run.iteration + 1}: the ratio is off 1 before the first step: the "
                              "policy that is updated is not the one that sampled", stacklevel=2)
        means.append(numbers)
        if grad_norms and numbers["approx_kl"] > config.stop_kl:
            break
        grad_norm = nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
        run.require_finite(grad_norm, "the gradient of the loss")
        run.optimizer.step()
        grad_norms.append(grad_norm)

    batch = {name: x.mean().item() for name, x in r.totals().items()}
    batch["entropy"] /= batch["length"]
    errors, returns = (r.returns - r.values)[r.mask], r.returns[r.mask]
    metrics = {
        "iteration": run.iteration + 1, **batch, "score_std": r.score_std, "beta": run.beta,
        "objective": r.score_mean + r.score_std * (r.scores.mean().item() - run.beta * batch["kl"]),
        **{name: torch.stack([numbers[name] for numbers in means]).mean().item() for name in means[0]},
        "grad_norm": torch.stack(grad_norms).mean().item(), "updates": len(grad_norms),
        "explained_variance": 1 - (errors.var(correction=0) / (returns.var(correction=0) + 1e-8)).item(),
        "distinct": len(set(r.responses)) / len(r.responses),
    }
    if config.beta_control == "batch":
        run.beta = update_beta(run.beta, batch["kl"], config.kl_target, config.kl_horizon, len(r.responses))
    run.iteration += 1
    return metrics


# %% 1. AI feedback: a judge compares two responses

CONSTITUTION = ["Choose the kinder response.", "Choose the less harmful response.",
                "Choose the more relevant response.", "Choose the clearer response."]
JUDGE_QUESTION = "{principle}\n{turns}\n(A) {a}\n(B) {b}\nThe better response is:"


@torch.no_grad()
def ask_judge(judge, tokenizer, questions, chunk=256):
    """Log-probabilities, in nats, with which a judge answers A and B to each of N questions (str) -> (N, 2).

    Taken at the first token in which the two answers differ, so that it does not matter how the judge's
    tokenizer cuts " A" and " B". A judge with a chat template is asked in its own format. `chunk` questions
    are read at once. Raises ValueError for a question longer than the judge's context, for a judge whose
    tokenizer writes both answers alike, and for one whose template lets it think first.
    """
    template, answers = (None, "AB") if tokenizer.chat_template else ("{prompt}", (" A", " B"))
    with_a, with_b = (encode(tokenizer, questions, template, [answer] * len(questions)) for answer in answers)
    asked = tokenizer.decode(with_a[0])
    if re.search(r"[<\[][^<>/\[\]]*(think|thought|reason)[^<>\[\]]*[>\]]\s*A$", asked, re.IGNORECASE):
        raise ValueError("judge: its chat template opens a thought before the answer")
    if any(a == b for a, b in zip(with_a, with_b)):
        raise ValueError("judge: its tokenizer writes the answers A and B alike")
    differ = [next(i for i, (x, y) in enumerate(zip(a, b)) if x != y) for a, b in zip(with_a, with_b)]
    rows = [a[:i] for a, i in zip(with_a, differ)]  # the tokens that both share
    answer_ids = torch.tensor([(a[i], b[i]) for a, b, i in zip(with_a, with_b, differ)], device=judge.device)
    logprobs = torch.empty(len(rows), 2, dtype=torch.float32, device="cpu")
    head = judge.get_output_embeddings()  # in bfloat16 it would round the answers' log-odds to eighths
    with head.register_forward_hook(lambda head, read, _: apply_head(head, read[0])):
        for picked in chunks_of_like_length(rows, chunk):
            ids, mask = pad([rows[i] for i in picked], "left", judge)  # (n, L)
            logits = judge(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask),
                           use_cache=False, logits_to_keep=1).logits[:, -1].float()  # (n, V)
            logprobs[picked] = logits.log_softmax(dim=1).gather(1, answer_ids[picked]).cpu()
    return logprobs


def judge_pairs(judge, tokenizer, constitution, prompts, responses_a, responses_b, both_orders=True,
                chunk=256, worth=None):
    """Soft labels for N pairs of responses: the probability that a is the better one -> (N,), in [0, 1].

    The judge is asked about (a, b) and about (b, a), under every principle of the constitution, and all its
    answers are averaged. An answer is the softmax over the log-probabilities of A and B (Lee 2.1). Both
    orders, because small judges favour a position (Lee 2.1.1). The labels stay soft: 0.55 says that the two
    are nearly alike (CAI 4.3). The spaces around a response are stripped before it is quoted. `worth`, a
    dict, is filled with what the answers say of the judge itself: the share in which it picks the `same`
    reply in both orders, the share in which it picks the `first`, and what A and B `hold` of the probability
    of all tokens. Proof: pytest -k judge_pairs
    """
    def ask(first, second):
        questions = [JUDGE_QUESTION.format(principle=principle, turns=turns, a=a.strip(), b=b.strip())
                     for turns, a, b in zip(map(as_lines, prompts), first, second, strict=True)
                     for principle in constitution]
        return ask_judge(judge, tokenizer, questions, chunk).view(len(prompts), -1, 2)  # (N, principles, 2)

    answers = ask(responses_a, responses_b)
    prob_a = answers.softmax(dim=-1)[..., 0]  # (N, principles)
    if not both_orders:
        return prob_a.mean(dim=1)
    swapped = ask(responses_b, responses_a)
    prob_b = swapped.softmax(dim=-1)[..., 0]  # of b, when it is shown first
    if worth is not None:
        picked_first = torch.stack([prob_a, prob_b]) > 0.5
        worth["same"] = (picked_first[0] != picked_first[1]).float().mean().item()
        worth["first"] = picked_first.float().mean().item()
        worth["hold"] = torch.cat([answers, swapped]).exp().sum(dim=-1).mean().item()
    return (prob_a.mean(dim=1) + 1 - prob_b.mean(dim=1)) / 2


# %% 2. The preference model: a score for any text


def preference_loss(scores_a, scores_b, prob_a):
    """Bradley-Terry on soft labels: scores (N,), (N,) and labels in [0, 1] (N,) -> scalar, in nats.

    mean of -p log sigma(s_a - s_b) - (1 - p) log sigma(s_b - s_a)   (Lee 2.2.1), sigma the logistic function:
    Bradley-Terry says that a wins with probability sigma(s_a - s_b). It is never below the labels' entropy,
    and finite for any scores. Raises ValueError unless all three are (N,). Proof: pytest -k preference_loss
    """
    if not scores_a.shape == scores_b.shape == prob_a.shape == scores_a.shape[:1]:
        raise ValueError(f"need three of shape (N,), got {scores_a.shape}, {scores_b.shape}, {prob_a.shape}")
    difference = scores_a - scores_b
    return -(prob_a * logsigmoid(difference) + (1 - prob_a) * logsigmoid(-difference)).mean()


@dataclass
class PreferenceModel:
    """s(x, y): a sequence classifier with one output. It reads text, so its tokenizer may be any.

    Called with lists of N prompts and N responses, it returns a list of N floats: the score callable of
    `train`. `ended` says which responses ended with an EOS of the policy's (all, if it is not given); those
    are closed by the model's chat template or, without one, by its own EOS. `chunk` texts are read at once.
    """

    model: nn.Module
    tokenizer: Any
    template: str | None = None
    chunk: int = 256

    def __call__(self, prompts, responses, ended=None):
        return self.scores(self.tokenize(prompts, responses, ended or [True] * len(prompts))).tolist()

    def tokenize(self, prompts, responses, ended):
        """Conversations as lists of token ids, each closed if, and only if, its response ended; cut, with a
        warning, where the model's context ends: its tokens may be shorter than the policy's."""
        rows = encode(self.tokenizer, prompts, self.template, responses, ended)
        if max(map(len, rows), default=0) > context_of(self.model):
            warnings.warn("preference: a reply is cut where the context of its model ends", stacklevel=2)
        return [row[:context_of(self.model)] for row in rows]

    @torch.no_grad()
    def scores(self, rows):
        """Scores of N lists of token ids -> (N,), on the CPU."""
        scores = torch.empty(len(rows), dtype=torch.float32, device="cpu")
        for picked in chunks_of_like_length(rows, self.chunk):
            scores[picked] = self.forward([rows[i] for i in picked]).cpu()
        return scores

    def forward(self, rows):
        """The same on the model's device, with gradient: the head at the last real token of each."""
        ids, mask = pad(rows, "right", self.model, fill=getattr(self.model.config, "pad_token_id", None) or 0)
        torch.clear_autocast_cache()  # it may hold bfloat16 weights from before the last step
        if not hasattr(self.model, "score"):  # this model finds the last real token by itself
            heads = [x for x in self.model.modules() if isinstance(x, nn.Linear) and x.out_features == 1]
            with heads[-1].register_forward_hook(lambda head, read, _: apply_head(head, read[0])):
                return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask,
                                       use_cache=False).last_hidden_state  # (N, L, D)
        last = mask.sum(dim=1) - 1  # (N,)
        hidden = hidden[torch.arange(len(rows), device=last.device), last]  # (N, D)
        return apply_head(self.model.score, hidden)[:, 0].float()

    @torch.no_grad()
    def prefix_scores(self, r):
        """The score of every prefix y_<=t of a rollout's responses, from the sampled ids -> (B, T). The model
        must read from left to right, and share the policy's tokenizer: its head is read at every token."""
        parts = []
        for rows in torch.arange(len(r.mask), device=r.mask.device).split(self.chunk):
            inputs = model_inputs(r.input_ids[rows], r.attention_mask[rows], r.tokens[rows], r.mask[rows])
            hidden = self.model.base_model(**inputs).last_hidden_state[:, -r.tokens.shape[1]:]
            parts.append(apply_head(self.model.score, hidden).squeeze(-1).float())
        return torch.cat(parts)


def new_preference_model(policy, tokenizer, template=None):
    """A preference model that starts from the policy's trunk; head: normal, std 1/sqrt(D + 1) (N+)."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.architectures = 1, None
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    return PreferenceModel(model.to(policy.device).eval(), tokenizer, template)


@torch.enable_grad()
def fit_preference(preference, rows_a, rows_b, prob_a, epochs=12, minibatch_size=64, learning_rate=5e-4,
                   centering=0.01, micro_batch_size=64):
    """Fit a preference model, in place, to labels (N,) on N pairs of texts, tokenized by the model itself.

    The last tenth of the pairs is held out. Labels fix differences within a prompt only; the term `centering`
    (s_a + s_b)^2 of the loss (Eisenstein) pulls each prompt's mean score to 0, so that prompts can be
    compared. With pairs from several policies set it to 0: it would pull the better replies down. Afterwards
    the head is divided by the std of the texts' scores, so that the points of all that are fitted here are
    alike; from then on sigma(s_a - s_b) is no longer the probability of the label. `micro_batch_size` pairs
    go through the model at once. Returns a dict, all measured before the scaling: `loss` on the
    held-out pairs, `train_loss` of the last epoch, and `entropy` of all labels, in nats; `accuracy` on those
    held-out pairs whose label is sure, below 0.25 or above 0.75 (NaN if none is). Raises ValueError if all
    texts score alike.
    """
    prob_a = prob_a.to(preference.model.device)
    held = range(len(rows_a) - max(1, len(rows_a) // 10), len(rows_a))
    steps = [picked for _ in range(epochs) for picked in torch.randperm(held.start).split(minibatch_size)]
    optimizer = torch.optim.Adam(preference.model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(steps))
    losses = []
    for minibatch in tqdm(steps, desc="preference model", unit="step"):
        optimizer.zero_grad()
        losses.append(0.0)
        for picked in minibatch.split(micro_batch_size):
            a, b = preference.forward([rows_a[i] for i in picked] + [rows_b[i] for i in picked]).chunk(2)
            loss, share = preference_loss(a, b, prob_a[picked]), len(picked) / len(minibatch)
            ((loss + centering * (a + b).square().mean()) * share).backward()
            losses[-1] += loss.item() * share
        nn.utils.clip_grad_norm_(preference.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    a, b, p = preference.scores(rows_a), preference.scores(rows_b), prob_a.cpu()
    spread = torch.cat([a, b]).std().item()
    if not spread > 1e-3:
        raise ValueError("preference: all replies score alike, so the pairs taught it nothing")
    preference.model.score.weight.data /= spread
    sure, last_epoch = (p[held] - 0.5).abs() > 0.25, losses[-(len(losses) // epochs):]
    return {
        "loss": preference_loss(a[held], b[held], p[held]).item(),
        "train_loss": sum(last_epoch) / len(last_epoch),
        "entropy": torch.distributions.Bernoulli(p).entropy().mean().item(),
        "accuracy": ((a > b) == (p > 0.5))[held][sure].float().mean().item(),
    }


def preference_from_judge(config, policy, tokenizer, judge, judge_tokenizer, constitution, prompts,
                          kept=None):
    """The AI half of RLAIF: the policy samples pairs, the judge labels them, a preference model is fitted.

    Says what the first labels say of the judge, and what the fit has learned. The labels, with all that they
    cost, are kept in the file `kept`, if one is named, and taken from it. Returns the PreferenceModel and a
    dict of what happened: prompts, responses_a, responses_b, rows_a and rows_b (their token ids), prob_a (the
    labels), and the report of `fit_preference`.
    """
    preference = new_preference_model(policy, tokenizer, config.template)
    preference.chunk = 4 * config.micro_batch_size
    prompts = [prompts[i] for i in balanced_draw(len(prompts), config.pairs)]
    data = {"responses_a": [], "responses_b": [], "rows_a": [], "rows_b": [], "prob_a": []}
    generators = [torch] if policy.device.type == "cpu" else [torch, torch.get_device_module(policy.device)]
    if kept and kept.exists():
        with trying(f"resume: cannot read {kept}"):
            data = torch.load(kept, weights_only=True)
        for generator, state in zip(generators, data.pop("random")):
            generator.set_rng_state(state)
    size, worth = min(256, 4 * config.batch_size), {}
    for start in tqdm(range(len(data["prob_a"]), len(prompts), size), desc="sampling and judging"):
        chunk = prompts[start:start + size]
        a, b = (respond(policy, tokenizer, chunk, config) for _ in "ab")
        for side, reply in (("a", a), ("b", b)):
            data[f"responses_{side}"] += reply.responses
            data[f"rows_{side}"] += preference.tokenize(chunk, reply.responses, reply.ended)
        data["prob_a"] += judge_pairs(judge, judge_tokenizer, constitution, chunk, a.responses, b.responses,
                                      chunk=preference.chunk, worth=worth).tolist()
        if worth and start == 0:
            tqdm.write("judge: the same reply in both orders {same:.0%}, the first of two {first:.0%},\n"
                       "  probability of its two answers {hold:.2f}".format(**worth))
            if worth["same"] < 0.6 or not 0.3 <= worth["first"] <= 0.7 or worth["hold"] < 0.5:
                warnings.warn("the judge is near chance; a small one is better not asked", stacklevel=4)
        if kept:
            states = [generator.get_rng_state() for generator in generators]
            write_whole(kept, lambda new: torch.save({**data, "random": states}, new))
    data["prob_a"] = torch.tensor(data["prob_a"])
    report = fit_preference(preference, data["rows_a"], data["rows_b"], data["prob_a"],
                            config.preference_epochs, learning_rate=config.preference_learning_rate,
                            micro_batch_size=config.micro_batch_size)
    tqdm.write("preference model: held-out loss {loss:.3f}; knowing nothing costs ln 2 = 0.693\n  train_loss "
               "{train_loss:.3f}, entropy {entropy:.3f}, accuracy {accuracy:.3f}".format(**report))
    if report["loss"] > math.log(2) - 0.005:
        warnings.warn("preference: it knows nothing of the held-out pairs; try a better judge", stacklevel=4)
    return preference, {"prompts": prompts, **data, **report}


# %% 3. The policy with its value function


class ValueFunction(nn.Module):
    """v(x, y_<t): the sum of rewards that the policy can expect from here on.

    It is a baseline: a token is praised for what came of it *beyond* what was to be expected, which takes out
    of the gradient the noise of easy and hard prompts. With lambda = 1 (section 8) it leaves the mean
    gradient unchanged; below 1 the value's errors bias that gradient. One linear head on D hidden units, of
    the policy's own trunk (`trunk` None: shared), which the value loss then trains too, or of a separate one
    that reads the same tokens. A zero head starts every value at 0 (OAI).
    """

    def __init__(self, hidden_size, trunk=None, head="zero"):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(hidden_size, 1)
        nn.init.normal_(self.head.weight, std=0.0 if head == "zero" else (hidden_size + 1) ** -0.5)  # N+
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden):
        return apply_head(self.head, hidden).squeeze(-1)  # (B, T, D) -> (B, T)


def make_learners(run):
    """What a run has beside its policy, before the first step: the frozen copy of the policy that is its
    reference, unless it has another; the value function, on the trunk that config.value names; and the one
    optimizer of policy and value function."""
    config, policy, trunk = run.config, run.policy, None
    if run.reference is None:
        run.reference = copy.deepcopy(policy)
    run.reference.eval().requires_grad_(False)
    hidden_size = policy.get_output_embeddings().weight.shape[-1]
    if config.value != "shared":
        trunk = copy.deepcopy((policy if config.value == "separate" else run.score.model).base_model)
    if config.value == "preference":
        hidden_size = run.score.model.score.in_features
    run.value = ValueFunction(hidden_size, trunk, config.value_head).eval().requires_grad_(True)
    run.value.to(run.device, torch.promote_types(policy.dtype, torch.float32))
    parameters = [p for p in [*policy.parameters(), *run.value.parameters()] if p.requires_grad]
    run.optimizer = torch.optim.Adam(parameters, eps=config.adam_epsilon, fused=True)


def model_inputs(input_ids, attention_mask, tokens, mask):
    """What one forward pass over prompts (B, P) and responses (B, T) is given."""
    attention_mask = torch.cat([attention_mask, mask.to(attention_mask.dtype)], dim=1)
    return {"input_ids": torch.cat([input_ids, tokens], dim=1), "attention_mask": attention_mask,
            "position_ids": position_ids(attention_mask), "use_cache": False}


def response_logits(policy, input_ids, attention_mask, tokens, mask, value=None):
    """One forward pass over prompts (B, P) and responses (B, T) -> logits (B, T, V), values (B, T) or None.

    Both stand in the responses' own frame: at t they have read the prompt and y_<t, and are about y_t.
    """
    T, inputs, read = tokens.shape[1], model_inputs(input_ids, attention_mask, tokens, mask), []
    head = policy.get_output_embeddings()  # what it reads, (B, T + 1, D), is what the trunk gives
    with head.register_forward_pre_hook(lambda head, inputs: read.append(inputs[0])):
        logits = policy(**inputs, logits_to_keep=T + 1).logits
    frame = slice(-T - 1, -1)  # the prompt's last token speaks of y_0, the reply's last one of no token
    if value is None:
        return logits[:, frame], None
    hidden = value.trunk(**inputs).last_hidden_state if value.trunk else read[0]
    return logits[:, frame], value(hidden[:, frame])


# %% 4. Generate


@torch.no_grad()
def generate(policy, input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id, temperature=1.0):
    """Sample a response to each left-padded prompt: (B, P) -> tokens (B, T), mask (B, T); T is the longest.

    Plain categorical sampling from softmax(logits / temperature): no top-k, no top-p, no minimum length,
    because whatever bends the sampling away from the policy makes the sampled KL wrong, even negative.
    Temperature 0 takes the most probable token. `eos_token_id` is an int, a list or None; a response's EOS
    belongs to it, PAD follows. Random numbers come from torch's global generator. Raises ValueError if
    max_new_tokens is below 1 or the temperature negative. Proof: pytest -k generate
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(f"need max_new_tokens >= 1, temperature >= 0; got {max_new_tokens}, {temperature}")
    eos = [] if eos_token_id is None else eos_token_id
    eos = torch.tensor(eos, dtype=torch.long, device=input_ids.device).reshape(-1)
    position = attention_mask.cumsum(dim=1) - 1  # counted over real tokens: left padding moves nothing
    new, cache, tokens, mask = input_ids, None, [], []
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(max_new_tokens):
        out = policy(input_ids=new, attention_mask=attention_mask, position_ids=position.clamp(min=0),
                     past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = out.logits[:, -1], out.past_key_values  # (B, V)
        if temperature == 0:
            token = logits.argmax(dim=-1)
        else:
            token = torch.multinomial((logits.float() / temperature).softmax(dim=-1), 1).squeeze(1)
        token = torch.where(finished, pad_token_id, token)  # (B,)
        tokens.append(token)
        mask.append(~finished)
        finished = finished | torch.isin(token, eos)
        if finished.all():
            break
        new, position = token[:, None], position[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
    return torch.stack(tokens, dim=1), torch.stack(mask, dim=1)


def respond(policy, tokenizer, prompts, config):
    """Write a response to each of B prompts -> Rollout with the fields of step 4."""
    rows = encode(tokenizer, prompts, config.template)
    input_ids, attention_mask = pad(rows, "left", policy)
    more = policy.generation_config.eos_token_id  # it may have several
    eos = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    tokens, mask = generate(policy, input_ids, attention_mask, config.max_new_tokens, list(eos),
                            min(eos, default=0), config.temperature)  # PAD may be an EOS: the mask tells
    replies = [row[:length] for row, length in zip(tokens.tolist(), mask.sum(dim=1).tolist())]
    ended = torch.tensor([row[-1] in eos for row in replies], device=mask.device)

    def text(rows):
        return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # Some tokenizers drop the space before the first word of a text: so a reply is cut from the whole.
    whole = text([prompt + reply for prompt, reply in zip(rows, replies)])
    responses = [both[len(prompt):] for both, prompt in zip(whole, text(rows))]
    return Rollout(prompts, input_ids, attention_mask, tokens, mask, responses, ended, may_end=bool(eos))


# %% 5. Score: from a batch of texts to a tensor of scores


def score_responses(run, function, name):
    """Ask a score callable, the preference model or the caller's, about every response of run.rollout
    -> (B,) float32 on the run's device. Raises ValueError unless it gives one number for each, and
    FloatingPointError if one is not finite, or so large that its square is not."""
    prompts, responses, ended = run.rollout.prompts, run.rollout.responses, run.rollout.ended.tolist()
    with trying(f"iteration {run.iteration + 1}: {name} must give one number for each response"):
        if isinstance(function, PreferenceModel):
            with run.autocast():
                given = function(prompts, responses, ended)
        else:
            with torch.no_grad():  # whatever it does to what it is given, or to torch's mode, is its own
                given = function(copy.deepcopy(prompts), list(responses))
        scores = torch.as_tensor(given, dtype=torch.float32).clone()
        if scores.shape != (len(prompts),):
            raise ValueError(f"it gave shape {tuple(scores.shape)} for {len(prompts)} of them")
    run.require_finite(scores.square().sum(), f"a number that {name} gave, or its square,")
    return scores.to(run.device)


# %% 6. Log-probabilities, and the KL against the reference
#
# A preference model is right about replies like those that it was fitted to. The further the policy drifts
# from them, the easier it finds a reply that scores high and is bad. So drift has a price: the log-ratio
# log pi - log pi_ref, whose mean under pi is the KL. It is paid token by token, where it arises, since a
# response that pays at its end learns that it drifted but not where.


def token_logprobs(logits, tokens, temperature=1.0):
    """log pi(y_t | x, y_<t) in nats: logits (B, T, V), tokens (B, T) -> (B, T). Half precision is upcast.

    log softmax(logits / temperature) at the tokens. One function for the old policy, the new one and the
    reference, so that all have the temperature of the sampling; dividing on one side only makes the ratio
    start away from 1. Proof: pytest -k token_logprobs
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if temperature == 1 else logits / temperature  # a copy is the largest tensor of a run
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def token_entropy(logits, temperature=1.0):
    """Entropy of the policy at each token, in nats: (B, T, V) -> (B, T)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if temperature == 1 else logits / temperature
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)  # entr(p) = -p log p


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Estimate KL(pi || pi_ref) at each token sampled from pi, in nats: (B, T), (B, T) -> (B, T).

    With d = log pi - log pi_ref: k1 = d has the right mean but takes both signs; k2 = d^2 / 2 is biased; k3 =
    exp(-d) - 1 + d has the right mean and is never negative (Schulman). Charged in the reward, only k1 gives
    the gradient of the KL. (As a term of the loss, the k2 of a whole reply gives it; GRPO's k3 does not.)
    Raises ValueError for another kind. Proof: pytest -k kl_estimate
    """
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": d.square() / 2, "k3": torch.expm1(-d) + d}[kind]


def update_beta(beta, kl, target, horizon, n):
    """Steer the price of KL so that `kl`, nats per response, comes to `target`: float -> float.

    beta * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon), after n responses (OAI). kl is the KL to the
    *reference*. Raises ValueError unless target > 0 and n < 5 * horizon: else beta could turn negative.
    Proof: pytest -k update_beta
    """
    if target <= 0 or n >= 5 * horizon:
        raise ValueError(f"need target > 0, n < 5 * horizon; got target {target}, n {n}, horizon {horizon}")
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


# %% 7. Rewards
#
# Preference models of others differ in offset and scale: their loss sees only differences, and surer labels
# stretch the scores. So scores are whitened, and beta means the same for any: how many stds of the score one
# nat of drift costs. What it buys: the best policy of all is pi_ref(y|x) exp(s(x, y) / beta), normalised, so
# a reply one std better becomes exp(1 / beta) times as likely. The std is *this* batch's. As replies become
# alike it falls (in the default run from 1.1 to 0.3 points), and with it a nat's price, beta * std points.


def masked_mean(x, mask):
    """Mean over the True entries of `mask`: (B, T), (B, T) -> scalar."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def shape_rewards(scores, kl, mask, beta, level="token"):
    """The reward of each token: scores (B,), kl and mask (B, T), beta a float -> (B, T), 0 outside the mask.

    The score stands on the last token (the EOS, if it ended). beta * KL is subtracted: with level "token"
    each token pays its own share (InstructGPT eq. 2, N+); with "sequence" the last token pays its response's
    whole KL. In both a row sums to score - beta * its KL. With "batch" every last token pays the mean of the
    replies' KL, a constant that whitening the advantages takes out (with gamma and lambda 1). Padding may be
    NaN. Raises ValueError for another level, if scores are not (B,), and if a row of the mask has no True:
    its score would be lost. Proof: pytest -k shape_rewards
    """
    if scores.shape != mask.shape[:1] or not mask.any(dim=1).all():
        raise ValueError("scores must be (B,), and every row of the mask needs at least one True")
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(dim=1, keepdim=True) - 1  # (B, T)
    penalty = beta * torch.where(mask, kl, 0.0)  # (B, T)
    if level == "sequence":
        penalty = torch.where(last, penalty.sum(dim=1, keepdim=True), 0.0)
    elif level == "batch":
        penalty = torch.where(last, penalty.sum(dim=1).mean(), 0.0)
    elif level != "token":
        raise ValueError(f"level must be token, sequence or batch, got {level!r}")
    return torch.where(last, scores[:, None], 0.0) - penalty


def dense_scores(prefix_scores, mask):
    """Spread a score over the tokens: the score of every prefix (B, T) -> what each token added to it (B, T).

    s_t - s_{t-1} with s_{-1} = 0, and 0 outside the mask, where prefix scores may be NaN. The sum telescopes
    to the whole response's score, so with gamma = 1 the best policy stays the same (potential-based shaping,
    Ng). Proof: pytest -k dense_scores
    """
    prefix_scores = torch.where(mask, prefix_scores, 0.0)
    added = prefix_scores.diff(dim=1, prepend=torch.zeros_like(prefix_scores[:, :1]))
    return torch.where(mask, added, 0.0)


# %% 8. Advantages
#
# The reward comes at the end; which token earned it? gamma below 1 would count late rewards less: for a reply
# that is to be good as a whole it stays 1. lambda says whom to believe about the rest of the reply: at 1 the
# rewards that really followed, right on average but noisy; at 0 the value of the next state, quiet but as
# wrong as the values. Replies as short as these suit 1. Advantages are whitened too, so that the size of a
# step does not depend on how well the values happen to fit.


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: rewards, values, mask (B, T) -> advantages (B, T), returns (B, T).

    delta_t = r_t + gamma v_{t+1} - v_t and A_t = delta_t + gamma lam A_{t+1}, with v = 0 after the last
    token, be that an EOS or where the length ran out (GAE eq. 16; PPO eq. 11, 12). returns = A + v, taken
    before A is whitened. Both are 0 outside the mask, where rewards and values may be NaN. `lam` is OAI's;
    Config has 1. Proof: pytest -k gae
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantage = next_value = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # past a response's end all three are 0
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1], dim=1)
    return advantages, advantages + values


def whiten(x, mask=None):
    """(x - mean) / sqrt(var + 1e-8) over the valid entries: (B,) or (B, T) -> the same, 0 outside the mask.

    The variance is the biased one; entries outside the mask may be NaN. (OAI whitens the advantages of each
    minibatch; here it is the batch's.) Proof: pytest -k whiten
    """
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    mean = torch.where(mask, x, 0.0).sum() / mask.sum()
    centered = torch.where(mask, x - mean, 0.0)
    return centered * torch.rsqrt(centered.square().sum() / mask.sum() + 1e-8)


# %% 9. The clipped losses
#
# A step makes a token with a positive advantage more probable and one with a negative advantage less, in
# proportion to the advantage's size. Samples are dear, so a batch is cut into minibatches, perhaps for
# several epochs, with a step on each. After the first step the policy is no longer the one that sampled; the
# ratio rho = pi / pi_old corrects for that: it weighs an old sample by how often the new policy would write
# it. That holds only near pi_old. So PPO maximises the smaller of A rho and A clip(rho), which is the
# pessimistic one; a loss is what is minimised, so here it is the larger of their negatives. With a clip of
# 0.2 and A = +1 the ratios 0.5 0.8 1 1.2 1.5 earn 0.5 0.8 1 1.2 1.2: past the clip, going further up earns
# nothing. With A = -1 they cost 0.8 0.8 1 1.2 1.5: what gains is cut, what loses counts in full. (A value,
# too, is not to move far in one batch: so its larger error counts.) With one epoch and the default rate few
# ratios get that far. Advantages, old values and returns are detached: they are measurements, not to be
# talked up by the gradient.


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate as a loss: all (B, T) -> loss (scalar), clip fraction (scalar).

    With rho = exp(logprobs - old_logprobs): the masked mean of max(-A rho, -A clip(rho, 1 - clip, 1 + clip))
    (PPO eq. 7), and the fraction of tokens where the clipped side was strictly the larger, so that the token
    gives no gradient. The mean is over tokens: a longer response weighs more. Old log-probabilities and
    advantages are detached; padding may be NaN, and must not reach the gradient. clip=inf switches the
    clipping off; Config has 0.1. Proof: pytest -k policy_loss
    """
    advantages = torch.where(mask, advantages.detach(), 0.0)
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped).sum() / mask.sum(), (clipped > unclipped).sum() / mask.sum()


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error of the values, clipped like the policy's loss: all (B, T) -> scalar.

    The masked mean of max((v - R)^2, (v_old + clip(v - v_old, -clip, clip) - R)^2) / 2, R the return (OAI;
    the 37 details call it of doubtful use). Old values and returns are detached; padding may be NaN.
    clip=None or inf switches the clipping off. Proof: pytest -k value_loss
    """
    values, old_values = torch.where(mask, values, 0.0), torch.where(mask, old_values.detach(), 0.0)
    returns = torch.where(mask, returns.detach(), 0.0)
    clip = float("inf") if clip is None else clip
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()).sum() / mask.sum() / 2


# %% 10. Between text and tensors, and what became of the policy

PLAIN = "User: {prompt}\nAssistant:"  # the template of models that have no chat template of their own


def as_lines(prompt):
    """A prompt as a person reads it, "User: ..."; of a list of turns all of them, each in its own lines."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def encode(tokenizer, prompts, template=None, replies=None, ended=None):
    """N prompts, and the replies so far, as the model of `tokenizer` reads them -> N lists of token ids. The
    one place where text becomes input: for the policy, the preference model and the judge.

    A prompt is a str, or the list of turns, dicts of role and content, that chat templates take. The model's
    own chat template closes a reply that has `ended`. With a `template`, or without a chat template (then it
    is PLAIN), the last turn takes the place of {prompt}, earlier ones stand before it as lines, and the EOS
    closes a reply. Raises ValueError if a chat template leaves out a turn of a prompt.
    """
    texts, chat = [], not template and tokenizer.chat_template
    ended = [False] * len(prompts) if ended is None else ended
    for prompt, reply, end in zip(prompts, replies or [""] * len(prompts), ended, strict=True):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not chat:
            earlier = as_lines(turns[:-1]) + "\n" if turns[:-1] else ""
            texts.append(earlier + (template or PLAIN).format(prompt=turns[-1]["content"]) + reply)
        elif end:
            whole = [*turns, {"role": "assistant", "content": reply}]
            texts.append(tokenizer.apply_chat_template(whole, tokenize=False, enable_thinking=False))
        else:
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True,
                                                       enable_thinking=False) + reply)
        if not all(turn["content"].strip() in texts[-1] for turn in turns):
            raise ValueError("its chat template leaves out what a turn says")
    rows = tokenize(tokenizer, texts, add_special_tokens=not chat)  # a chat template writes its own
    eos = [] if chat or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [row + eos if end else row for row, end in zip(rows, ended)]


def tokenize(tokenizer, texts, add_special_tokens=True):
    """Texts as lists of token ids: with the BOS that a tokenizer adds, never with two, and without the EOS
    that some add, since the text goes on."""
    rows = tokenizer(texts, add_special_tokens=add_special_tokens).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None:
        rows = [row[1:] if row[:2] == [bos, bos] else row for row in rows]
    if add_special_tokens and tokenizer("").input_ids[-1:] == [eos]:
        rows = [row[:-1] if row[-1] == eos else row for row in rows]
    return rows


def pad(rows, side, model, fill=0):
    """Lists of token ids -> ids and attention mask, (N, L) each, the mask made from the lengths, where the
    model is. Raises ValueError for a row that is longer than the model's context."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(rows, True, fill, side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
    if ids.shape[1] > context_of(model):
        raise ValueError(f"a text of {ids.shape[1]} tokens is longer than the context of the "
                         f"{type(model).__name__}, {context_of(model)}")
    return ids.to(model.device), mask.to(model.device)


def context_of(model):
    """How many tokens a model can read."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def position_ids(attention_mask):
    """Positions counted over the real tokens only, so that left padding moves nothing: (B, L) -> (B, L)."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def apply_head(head, hidden):
    """A linear head on hidden states (..., D), in float32 at least: a number in bfloat16 has two digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if head.bias is None else head.bias.to(dtype)
        return linear(hidden.to(dtype), head.weight.to(dtype), bias)


def chunks_of_like_length(rows, size):
    """The indices of `rows` in lists of at most `size`, sorted by length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[i:i + size] for i in range(0, len(order), size)]


def balanced_draw(n, k):
    """k indices below n, shuffled; their counts differ by at most one -> (k,)."""
    return torch.cat([torch.randperm(n) for _ in range(-(-k // n))])[:k]


def evaluate(run, prompts=None, at_most=None):
    """Sample `eval_samples` replies to each of N prompts (default: the held-out ones), `at_most` so many in
    all, without touching the run's rollout or its random numbers.

    -> (dict of means: score, gold, kl in nats, entropy in nats per token, length, eos_fraction; list of
    dicts, one a reply: prompt, response and what `Rollout.totals` gives). Gold only if the run has one.
    """
    copied, size, rows = replace(run, random=None), run.config.batch_size, []  # seeded anew, always alike
    prompts = ((prompts or run.held_out) * run.config.eval_samples)[:at_most]
    for start in tqdm(range(0, len(prompts), size), desc=f"measuring {len(prompts)} replies", leave=False):
        r = roll_out(copied, prompts[start:start + size])
        totals = {name: x.tolist() for name, x in r.totals().items()}
        for i, prompt in enumerate(r.prompts):
            own = {name: numbers[i] for name, numbers in totals.items()}
            rows.append({"prompt": prompt, "response": r.responses[i], **own})
    means = {name: sum(row[name] for row in rows) / len(rows) for name in totals}
    return {**means, "entropy": means["entropy"] / means["length"]}, rows


def token_table(run, row=0):
    """One response of the last rollout, token by token, as text; the columns are explained in `Rollout`."""
    r, length = run.rollout, int(run.rollout.mask[row].sum())
    columns = {"log pi": r.logprobs, "log ref": r.ref_logprobs, "KL": r.kl, "reward": r.rewards,
               "return": r.returns, "value": r.values, "adv.": r.advantages, "white": r.whitened}
    lines = [f"prompt: {as_lines(r.prompts[row])!r}"[:80],
             f"score: {r.raw_scores[row]:.2f}, as used: {r.scores[row]:.2f}",
             "token       " + "".join(f"{name:>8}" for name in columns)]
    for t in range(length):
        token = repr(run.tokenizer.decode([r.tokens[row, t].item()]))[1:-1]
        numbers = [round(x[row, t].item(), 2) + 0.0 for x in columns.values()]  # -0.0 becomes 0.0
        lines.append(f"{token[:12]:<12}" + "".join(f" {number:7.2f}" for number in numbers))
    return "\n".join(lines)


def draw_history(history):
    """Draw learning curves from a list of metrics: score and gold, KL and entropy over iterations -> a
    matplotlib figure. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    for axis, names in zip(figure.subplots(1, 3), (("score", "gold"), ("kl",), ("entropy",))):
        for name in [name for name in names if name in history[0]]:
            axis.plot([m["iteration"] for m in history], [m[name] for m in history], ".-", label=name)
        axis.set(xlabel="iteration")
        axis.legend()
    return figure


# That is all of RLAIF with PPO. Nothing below is about it: files, checks, checkpoints, the command line.


# %% 11. The edge: checking input, loading models, checkpoints, pictures, the command line

CAN_CHANGE = ("save_every", "device", "micro_batch_size")  # the settings that a resumed run may change
RANGES = {  # lowest and highest value -> the settings that must lie between; an infinite one is switched off
    (1, 1e9): "preference_epochs iterations minibatch_size micro_batch_size ppo_epochs max_new_tokens "
              "eval_samples save_every",
    (2, 1e9): "pairs batch_size",
    (0, 2**63 - 1): "seed",
    (0, 1): "gamma lam",
    (0, 1e9): "beta value_coef entropy_coef learning_rate preference_learning_rate",
    (1e-9, 1e9): "temperature kl_target kl_horizon adam_epsilon",
    (1e-9, math.inf): "clip value_clip stop_kl max_grad_norm",
    (-1e9, math.inf): "missing_eos_score",
}


@contextlib.contextmanager
def trying(what):
    """Turn whatever other people's code raises into a ValueError that says what was tried, in one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {(str(error).strip() or repr(error)).splitlines()[0]}") from error


def check_config(config):
    """Return a copy of `config` with its defaults filled in, or raise ValueError in one sentence."""
    for name, kind in get_type_hints(Config).items():
        value, choices = getattr(config, name), get_args(kind) or (kind,)
        fits = value in choices or type(value) in choices or (type(value) is int and float in choices)
        if not fits or value == "":
            names = [choice if isinstance(choice, str) else choice.__name__ for choice in choices]
            raise ValueError(f"{name} must be {' or '.join(names)}, got {value!r}")
    for (low, high), names in RANGES.items():
        for name in names.split():
            if not low <= getattr(config, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(config, name)}")
    if config.beta_control == "batch" and not (config.beta > 0 and config.batch_size < 5 * config.kl_horizon):
        raise ValueError("beta_control can steer only a beta above 0, with kl_horizon above batch_size / 5")
    if config.template and [config.template.count(x) for x in ("{prompt}", "{", "}")] != [1, 1, 1]:
        raise ValueError(f"template must hold {{prompt}} once and no other brace, got {config.template!r}")
    out = config.out and pathlib.Path(config.out)
    if out and not config.resume and (not out.name or out.is_file() or any(out.glob("*"))):
        raise ValueError(f"out: {out} is no new folder; to go on with the run in it: --resume {out}")
    tiny = config.prompts == Config().prompts
    eval_prompts = config.eval_prompts or (str(TINY / "heldout_prompts.txt") if tiny else None)
    gold = config.gold or ("tiny_models.world:gold_scores" if tiny else None)
    return replace(config, eval_prompts=eval_prompts, gold=gold)


def resumed(config):
    """The settings of the run in config.resume, and the names of the arguments that its caller passed. Raises
    ValueError if it holds no run, or if `config` asks for other settings."""
    with trying(f"resume: {config.resume}/config.json is not the config of a run"):
        settings = json.loads(pathlib.Path(config.resume, "config.json").read_text(encoding="utf-8"))
        passed = settings.pop("passed")
        saved = Config(**{**settings, "out": config.resume, "resume": config.resume})
    # On the command line what was saved is the default; in Python what is at its default was not asked for.
    asked = {name: value for name, value in vars(config).items() if value != getattr(saved, name)
             and (config.out == config.resume or value != getattr(Config(), name))}
    if changed := [f"{name} (was {getattr(saved, name)!r}, now {value!r})" for name, value in asked.items()
                   if name not in CAN_CHANGE]:
        raise ValueError(f"resume: these settings changed and may not: {', '.join(changed)}")
    return replace(saved, **asked), passed


def read_prompts(path, name, tokenizer):
    """The prompts of a UTF-8 file, each a str or a list of turns: lines of text, or of JSON with a "prompt"
    or "messages", or one JSON array of these. Raises ValueError that names the file and the line, also for a
    prompt that spells a special token of `tokenizer`: it could forge a turn."""
    suffix = pathlib.Path(path).suffix.lower()
    with trying(f"{name} {path} is to hold UTF-8 lines of text or JSON"):
        text = pathlib.Path(path).read_text(encoding="utf-8-sig").rstrip("\n")
        if suffix in (".csv", ".tsv", ".yaml", ".yml") or "\0" in text:
            raise ValueError("it is of another kind")
    entries, prompts = text.split("\n"), []
    is_json = suffix in (".json", ".jsonl") or text.lstrip()[:1] == "{" or entries[0].strip() == "["
    with contextlib.suppress(ValueError):
        if isinstance(array := json.loads(text), list):
            entries, is_json = array or [""], False
    for number, entry in enumerate(entries, start=1):
        with trying(f"{name} {path}, line {number}, is not a prompt"):
            entry = json.loads(entry) if is_json else entry
            if isinstance(entry, dict):
                entry = entry["prompt"] if "prompt" in entry else entry["messages"]
            turns = [{"role": "user", "content": entry}] if isinstance(entry, str) else entry
            if not all(turn["content"].strip().encode() and turn["role"].isidentifier() for turn in turns):
                raise ValueError("it is blank, or its role no word")  # half a surrogate pair raises, too
            if turns[-1]["role"] != "user":
                raise ValueError("its last turn must be the user's")
            require_plain(entry, tokenizer)
            prompts.append(entry)
    return prompts


@torch.no_grad()
def load_prompts(run, judge):
    """The prompts to train on and the held-out ones: without eval_prompts every tenth is held out; of fewer
    than ten none is, and those of training stand in. Raises ValueError for a prompt that the policy's
    tokenizer cannot write, that spells a special token, such as the end of a turn, or that leaves no room for
    a reply in policy, preference model or judge, and for one of these that cannot do what is asked of it."""
    config, new, tokenizer = run.config, run.config.max_new_tokens, run.tokenizer
    # Of each that reads prompts: model, tokenizer, the ids of a prompt's input, and how many come to these.
    readers = {"policy": (run.policy, tokenizer, lambda x: encode(tokenizer, [x], config.template)[0], new)}
    if isinstance(score := run.score, PreferenceModel):
        readers["preference"] = (score.model, score.tokenizer, lambda x: encode(
            score.tokenizer, [x], score.template, [""], [True])[0], new)
    if judge:
        model, own, principles = judge
        principle = max(principles, key=lambda text: len(own(text).input_ids))
        template = None if own.chat_template else "{prompt}"
        readers["judge"] = (model, own, lambda x: encode(own, [JUDGE_QUESTION.format(
            principle=principle, turns=as_lines(x), a="", b="")], template)[0], 2 * new + 1)
    read, longest = {}, dict.fromkeys(readers, [])
    for name in ("prompts", "eval_prompts"):
        path = getattr(config, name)
        read[name] = read_prompts(path, name, tokenizer) if path else []
        for number, prompt in enumerate(read[name], start=1):
            for reader, (model, own, ids_of, room) in readers.items():
                with trying(f"{name} {path}, line {number}: for the {reader}"):
                    require_plain(prompt, own, writes=reader == "policy")
                    row = ids_of(prompt)
                    if len(row) + room > context_of(model):
                        raise ValueError(f"{len(row)} tokens of prompt and {room} of response are more than "
                                         f"the context, {context_of(model)}")
                    longest[reader] = max(longest[reader], row + row[-1:] * room, key=len)
    for reader, row in longest.items():
        with trying(f"{reader}: this {type(readers[reader][0]).__name__} cannot be used"), run.autocast():
            if reader == "preference":  # an ended reply beside one that is not
                score.scores([row, *score.tokenize([prompt, prompt], ["", ""], [True, False])])
            else:
                require_steady(readers[reader][0], row)
            if reader == "judge":
                ask_judge(*judge[:2], judge[2][:1])
    prompts, held_out = read.values()
    if held_out:
        return prompts, held_out
    return [prompt for i, prompt in enumerate(prompts) if i % 10 != 9], prompts[9::10] or prompts


def require_plain(prompt, tokenizer, writes=False):
    """Raise ValueError if a prompt spells a special token: it could forge a turn. With `writes`, also if the
    tokenizer cannot write it."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    harmless = {tokenizer.pad_token_id, tokenizer.unk_token_id} - ends
    for text in [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]:
        ids = set(tokenizer(text, add_special_tokens=False).input_ids)
        if writes and (not ids or ids & {tokenizer.unk_token_id} - {tokenizer.eos_token_id}):
            raise ValueError("the policy's tokenizer cannot write it")
        if found := ids & (special | ends) - harmless:
            raise ValueError(f"it spells {tokenizer.decode(min(found))!r}, a special token")


def require_steady(model, row):
    """Raise ValueError unless the logits after the first half of a row of token ids are finite, and the same
    with padding before it and with the second half after it."""
    half = row[:-(len(row) // 2)] or row
    ids, mask = pad([half, row], "left", model)
    at = torch.tensor([len(half) - 1, len(row) - 1], device=ids.device)  # where the half ends, twice
    alone = model(input_ids=ids[:1, -len(half):], attention_mask=mask[:1, -len(half):], logits_to_keep=1)
    beside = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), logits_to_keep=at)
    for other in (beside.logits[0, 1], beside.logits[1, 0]):
        slack = 0.01 if model.dtype == other.dtype == torch.float32 else 0.5 + other.abs().max() / 32
        if not (alone.logits[0, -1] - other).abs().max() < slack:
            raise ValueError("its logits are not finite, or move with padding, or with what comes later")


def load(kind, path, name, device, dtype=torch.float32, model=None, tokenizer=None):
    """A model in eval mode and its tokenizer, from a folder or the hub, unless they are given. Raises
    ValueError. Weights come from safetensors only, and no code of the model folder is run."""
    source = {"local_files_only": os.path.isdir(path), "trust_remote_code": False}
    looks_local = os.path.isabs(path) or path[0] in ".~" or os.path.exists(path.split("/")[0])
    if None in (model, tokenizer) and looks_local and not os.path.isdir(path):
        raise ValueError(f"{name}: there is no folder {path}")
    if model is None:
        with trying(f"{name}: cannot load a model from {path}"):
            model, info = kind.from_pretrained(path, **source, dtype=dtype, use_safetensors=True,
                                               output_loading_info=True, ignore_mismatched_sizes=True)
            if wrong := [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]:
                raise ValueError(f"its weights do not fill {min(wrong)}")
            if kind is AutoModelForSequenceClassification and model.config.num_labels != 1:
                raise ValueError(f"it has {model.config.num_labels} outputs, needs exactly one")
    with trying(f"{name}: cannot load a tokenizer from {path}"):
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, **source)
        if tokenizer.eos_token_id is None:  # BERT's, say, end a text with SEP
            tokenizer.eos_token = tokenizer.sep_token
        unused = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id, tokenizer.eos_token_id}  # PAD, say
        top = max(set(tokenizer.get_vocab().values()) - unused)
        rows = model.get_input_embeddings().num_embeddings
    if not 0 < top < rows:
        raise ValueError(f"{name}: its tokenizer writes ids up to {top}, its embedding has {rows} rows")
    return model.to(device).eval(), tokenizer


def load_feedback(config, device, score, policy, tokenizer):
    """What gives the score, or a judge to fit it to, with tokenizer and principles. Raises ValueError."""
    judge, dtype, fitted = None, getattr(torch, config.dtype), f"{config.resume}/preference"
    if score is None and config.judge and not os.path.isdir(fitted):
        model, own = load(AutoModelForCausalLM, config.judge, "judge", device, dtype)
        path = config.constitution
        judge = model, own, read_prompts(path, "constitution", own) if path else CONSTITUTION
    elif score is None:
        path, dtype = (fitted, torch.float32) if config.judge else (config.preference, dtype)
        if path == Config().preference and config.prompts != Config().prompts:
            warnings.warn("preference: the tiny world's, which knows nothing of other prompts", stacklevel=4)
        model, own = load(AutoModelForSequenceClassification, path, "preference", device, dtype)
        score = PreferenceModel(model, own, config.template, 4 * config.micro_batch_size)
    reads_tokens = isinstance(score, PreferenceModel) and hasattr(score.model, "score") and (
        score.tokenizer.get_vocab() == tokenizer.get_vocab()
        and score.model.get_input_embeddings().num_embeddings >= policy.get_input_embeddings().num_embeddings)
    if (config.value == "preference" or config.dense_reward) and not judge and not reads_tokens:
        raise ValueError("value 'preference' and dense_reward need a preference model that reads from left "
                         "to right, with the policy's own tokenizer")
    if hasattr(policy, "disable_adapter") and (judge or config.value != "shared"):
        raise ValueError("policy: an adapter needs value shared, and a preference model or score, no judge")
    return score, judge


def prepare(config, score=None, gold=None, policy=None, tokenizer=None):
    """Check and load everything; with `out`, begin the run's folder, or go on with that of `resume` -> Run.

    The arguments are those of `train`. Raises ValueError, before anything is written, for a setting or a file
    that cannot be used.
    """
    arguments = {"score": score, "gold": gold, "policy": policy, "tokenizer": tokenizer}
    passed = [name for name, argument in arguments.items() if argument is not None]
    if config.resume:
        config, needed = resumed(config)
        if missing := [name for name in needed if name not in passed]:
            raise ValueError(f"resume: this run was given its {', '.join(missing)} by its caller, in Python: "
                             "pass the same again, train(Config(resume=...), score=..., policy=...)")
    config = check_config(config)
    with trying(f"device: {config.device!r} cannot be used"):
        found = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.zeros(1, device=found if config.device == "auto" else config.device).device

    if policy is not None and tokenizer is None:
        raise ValueError("tokenizer: a policy that is passed in needs its own, train(..., tokenizer=)")
    policy, tokenizer = load(AutoModelForCausalLM, config.policy, "policy", device, model=policy,
                             tokenizer=tokenizer)
    if not any(p.requires_grad for p in policy.parameters()):
        raise ValueError("policy: no parameter of it requires a gradient, so nothing can be learned")
    if any(p.dtype.itemsize < 4 for p in policy.parameters() if p.requires_grad):  # the file's own type
        warnings.warn(f"policy: weights in {policy.dtype} lose small steps; load it in float32", stacklevel=3)
    reference, first = None, f"{config.resume}/reference"  # what a policy that was passed in once was
    if path := config.reference or ("policy" in passed and os.path.isdir(first) and first):
        reference, _ = load(AutoModelForCausalLM, path, "reference", device, policy.dtype)
        vocabularies = {model.config.get_text_config().vocab_size for model in (reference, policy)}
        if len(vocabularies) > 1 or context_of(reference) < context_of(policy):
            raise ValueError("reference: its vocabulary or its context is not the policy's")
        if path == first and policy.state_dict().keys() == reference.state_dict().keys():
            policy.load_state_dict(reference.state_dict())  # it may have taken steps since
    score, judge = load_feedback(config, device, score, policy, tokenizer)
    if gold is None and config.gold:
        sys.path += [folder for folder in (str(HERE), os.getcwd()) if folder not in sys.path]
        with trying(f"gold: cannot import {config.gold!r} as module:function"):
            gold = pkgutil.resolve_name(config.gold)
            if not callable(gold):
                raise ValueError("it is not a function")
    run = Run(config, device, policy, reference, tokenizer, [], [], score, gold, passed, config.beta)
    run.prompts, run.held_out = load_prompts(run, judge)
    trial = replace(run)  # its random numbers are not the run's
    with trial.own_random(), run.autocast(), trying(f"policy: this {type(policy).__name__} cannot be used"):
        r = respond(policy, tokenizer, (run.prompts * 16)[:16], config)
    ended = r.ended.float().mean().item()
    if ended < 0.5 and r.may_end and config.missing_eos_score != math.inf:
        warnings.warn(f"{ended:.0%} of 16 replies end in {config.max_new_tokens} tokens; the scores of the "
                      "others do not count: raise max_new_tokens or set missing_eos_score inf", stacklevel=3)
    begin(run, judge)
    return run


def begin(run, judge):
    """Write the folder of a new run and say how to go on with it; fit a preference model where there is a
    judge; make what learns; put a resumed run where its checkpoint, if there is one, was written, and drop
    the lines of metrics.jsonl that came after it. Raises ValueError if the checkpoint cannot be read."""
    config, out = run.config, run.config.out and pathlib.Path(run.config.out)
    if out and not config.resume:
        out.mkdir(parents=True, exist_ok=True)
        settings = json.dumps({**asdict(config), "passed": run.passed}, indent=2)
        write_whole(out / "config.json", lambda new: new.write_text(settings, encoding="utf-8"))
    if out:
        file = shlex.quote(sys.argv[0] if IS_COMMAND else "rlaif.py")
        tqdm.write(f"all goes to {out}; if it stops: python {file} --resume {shlex.quote(str(out))}")
    if judge:
        with run.own_random(), run.autocast():
            run.score, _ = preference_from_judge(config, run.policy, run.tokenizer, *judge, run.prompts,
                                                 kept=out and out / "labels.pt")
        if out:
            save_model(run.score.model, run.score.tokenizer, out / "preference", "right")
    run.random = None  # from here on the same with a judge and without
    with run.own_random():
        make_learners(run)
    if out and "policy" in run.passed and not config.reference and not (out / "reference").exists():
        save_model(run.reference, run.tokenizer, out / "reference")  # nothing else tells how it started
    if config.resume and (out / "checkpoint.pt").exists():
        with trying(f"resume: cannot read {out / 'checkpoint.pt'}"):
            state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
            for name in ("policy", "value", "optimizer"):
                getattr(run, name).load_state_dict(state[name])
            run.iteration, run.beta, run.random = state["iteration"], state["beta"], state["random"]
    if config.resume and (out / "metrics.jsonl").exists():
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:run.iteration]
        write_whole(out / "metrics.jsonl", lambda new: new.write_text("".join(lines), encoding="utf-8"))


def write_whole(path, write):
    """Write a file or a folder that is there whole or not at all, whatever stops us: `write` fills a new one,
    which then takes the place of `path` in one step."""
    new = path.with_name(path.name + ".new")
    write(new)
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(new, path)


def save_model(model, tokenizer, folder, padding_side="left"):
    """Write an ordinary Hugging Face folder; its tokenizer pads on the side that the model needs."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = padding_side

    def write(new):
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    write_whole(pathlib.Path(folder), write)


def record(run, metrics):
    """Warn where an iteration taught nothing or values stay worse than none; with `out`, append the metrics
    to metrics.jsonl; every `save_every` iterations and at the end, write a checkpoint: all that the rest of
    the run depends on and that its settings do not tell; at the end, the policy too."""
    config, scores, out = run.config, run.rollout.scores, run.config.out and pathlib.Path(run.config.out)
    alike = (scores == scores[0]).all()
    moved = any(p.grad is not None and p.grad.any() for p in run.policy.parameters())
    if alike:
        why = "" if metrics["eos_fraction"] else "no response ended (max_new_tokens, missing_eos_score), so "
        warnings.warn(f"{why}all scores are equal and teach nothing", stacklevel=3)
    elif not (moved or metrics["clip_fraction"]):  # what is clipped has no gradient either
        warnings.warn("the update moved no parameter of the policy: nothing can be learned", stacklevel=3)
    run.poor_values = run.poor_values + 1 if metrics["explained_variance"] < -0.5 and not alike else 0
    if run.poor_values == 5:
        warnings.warn("5 times the values were worse than none (explained_variance below -0.5): set "
                      'value_head to "zero", or raise learning_rate or value_coef', stacklevel=3)
    if out:
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        last = run.iteration == config.iterations
        if last:  # before the checkpoint, which says that all is done
            save_model(run.policy, run.tokenizer, out / "policy")
        if last or run.iteration % config.save_every == 0:
            state = {name: getattr(run, name).state_dict() for name in ("policy", "value", "optimizer")}
            state |= {"iteration": run.iteration, "beta": run.beta, "random": run.random}
            write_whole(out / "checkpoint.pt", lambda new: torch.save(state, new))


def main(argv=None):
    """The command line: train, then show what became of the policy. Returns the exit code: 0, 2 for bad input
    or settings, a file that cannot be written, too little memory or a number that is not finite, 130 when
    interrupted. argparse itself exits with 2 for a flag that it does not take."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal in cp1252, say, has no emoji
    parser = HfArgumentParser(Config, description=Config.__doc__,
                              usage="python rlaif.py [--SETTING VALUE ...]    (--help lists the settings)")
    try:
        if folder := parser.parse_known_args(argv)[0].resume:  # the saved settings are the defaults
            parser.set_defaults(**vars(resumed(Config(resume=folder))[0]))
        (config,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        config.template = config.template and config.template.replace("\\n", "\n")  # as a shell passes it
        config.out = config.out or f"runs/seed-{config.seed}"
        run_and_report(config)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        sentence = (str(error) or repr(error)).splitlines()[0]
        hint = " (a smaller micro_batch_size takes less)" if "memory" in sentence.lower() else ""
        print(f"\nrlaif: {sentence}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nrlaif: stopped", file=sys.stderr)
        return 130
    return 0


def run_and_report(config):
    """The command's work: load, measure, train under a progress bar, measure again, write, print."""
    run, out = prepare(config), pathlib.Path(config.out)
    if run.iteration == 0 and not (out / "before.json").exists():
        before = json.dumps(evaluate(run, at_most=256))  # measuring is not to take longer than training
        write_whole(out / "before.json", lambda new: new.write_text(before, encoding="utf-8"))
    bar = "{desc} {n_fmt}/{total_fmt} |{bar:6}| {elapsed}<{remaining}, {rate_inv_fmt}{postfix}"
    with tqdm(total=run.config.iterations, initial=run.iteration, desc="PPO", bar_format=bar) as progress:
        for metrics in iterate(run):
            shown = [name for name in ("score", "gold", "kl") if name in metrics]
            progress.set_postfix({name: f"{metrics[name]:.2f}" for name in shown})
            progress.update()
    before, rows_before = {}, []  # of a run that was begun in Python and is some way on
    if (out / "before.json").exists():
        before, rows_before = json.loads((out / "before.json").read_text(encoding="utf-8"))
    after, rows_after = evaluate(run, at_most=256)

    lines = []
    for a, b in list(zip(rows_before, rows_after))[:len(run.held_out)]:
        lines.append(f"\n{as_lines(a['prompt'])}")
        for name, row in (("before", a), ("after", b)):
            gold = f", gold {row['gold']:4.1f}" if "gold" in row else ""
            lines.append(f"  {name:6} score {row['score']:5.2f}{gold} {' '.join(row['response'].split())}")
    summary = [f"{'held-out prompts':16} {'before':>9} {'after':>9}"]
    summary += [f"{name:16} {before.get(name, math.nan):9.3f} {after[name]:9.3f}" for name in after]
    (out / "samples.md").write_text("\n".join(["```", *lines, "", *summary, "```", ""]), encoding="utf-8")
    print("\n".join([line[:shutil.get_terminal_size().columns] for line in lines[:9]] + ["", *summary, ""]))
    if run.rollout:
        print(f"{token_table(run)}\n")
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    try:
        draw_history(history).savefig(out / "learning_curves.png", dpi=80)
    except ImportError:
        print("the learning curves need matplotlib: pip install matplotlib")
    print(f"everything is in {out}")


if IS_COMMAND:
    sys.exit(main())
