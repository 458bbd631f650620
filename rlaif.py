# %% RLAIF with PPO, whole, in one file
"""RLAIF with PPO: reinforcement learning from AI feedback, in the order in which it runs.

    a judge model, asked which of two replies better follows a principle ............ 1  judge_pairs
        |  soft labels
        v
    a preference model r(x, y), fitted to those labels .............................. 2  fit_preference
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

`roll_out` (section 10) is steps 4 to 8, `update` is step 9, and `train` is these two in turn: PPO, proximal
policy optimisation. With prompts x and replies y ~ pi(y|x), training maximises over the policy pi

    J(pi) = E [ r(x, y) - beta * (log pi(y|x) - log pi_ref(y|x)) ]

where r is counted in stds of the batch's scores, and beta is the price of drift from the reference pi_ref.

In RLHF, reinforcement learning from human feedback, people compare the replies; in RLAIF a model does. That
makes labels cheap, so that any reply can be judged, and dangerous: what the judge gets wrong, always in the
same way, the policy will find and repeat. So look at the replies, and at a truth that nobody is trained on,
here called gold.

Writing a reply is a decision process. The policy is the language model, seen as the rule that picks an
action, the next token. The state is the prompt and the tokens so far, an episode is one response up to its
EOS (end-of-sequence token), and almost all of the reward comes with the last token. There are three policies:

    pi        the one that learns         changes with every optimizer step    9, where its gradient is taken
    pi_old    the one that wrote y        changes with every batch             4, 6, and the ratio of 9
    pi_ref    as a rule pi's own start    never changes                        6, where drift has its price

One example, of a reply of four tokens in a batch of longer ones. The score, whitened, is 1; beta is 0.3, and
gamma and lambda, explained in section 8, are 1. What the model says at t it says after reading the prompt x
and the tokens before t; PAD, padding, only fills the row:

    t  y_t      mask   logits, value read      KL    reward               value  advantage
    0  Run      True   x                     0.50   -0.3 * 0.50 = -0.15    0.2      0.62
    1  slowly   True   x Run                 0.00    0.00                  0.4      0.57
    2  !        True   x Run slowly         -0.10    0.03                  0.5      0.47
    3  EOS      True   x Run slowly !        0.20    1.00 - 0.06 = 0.94    0.7      0.24
    4  PAD      False  (nothing that counts)         0.00                           0.00

The advantage is here the sum of the rewards from t on, less the value: at t = 1, 0.00 + 0.03 + 0.94 - 0.4.

One letter per tensor axis: B batch, T response (padded on the right), P prompt (padded on the left), V
vocabulary, D hidden size. `mask` is (B, T), True on a response's own tokens, its EOS included. It says where
a response ended, and is never made from ids that look like padding; each row has a True. What stands outside
it changes nothing. KL is the Kullback-Leibler divergence, in nats (a nat is log2(e) bits). Scores are in
points, the preference model's unit. Each function of sections 6 to 9 can be copied alone into a notebook.

    python rlaif.py                               PPO on the tiny models beside this file
    python rlaif.py --judge tiny_models/judge     the whole drawing, from the judge on
    python rlaif.py --help                        every setting with its unit, default and source

Sources, by the names that they have below:
    PPO          Schulman et al. 2017, Proximal policy optimization algorithms, arXiv 1707.06347
    GAE          Schulman et al. 2015, High-dimensional continuous control using generalized advantage
                 estimation, arXiv 1506.02438
    Schulman     Schulman 2020, Approximating KL divergence, joschu.net/blog/kl-approx.html
    Lee          Lee et al. 2023, RLAIF vs. RLHF, arXiv 2309.00267
    CAI          Bai et al. 2022, Constitutional AI: harmlessness from AI feedback, arXiv 2212.08073
    Stiennon     Stiennon et al. 2020, Learning to summarize from human feedback, arXiv 2009.01325
    InstructGPT  Ouyang et al. 2022, Training language models to follow instructions, arXiv 2203.02155
    OAI          Ziegler et al. 2019, Fine-tuning language models from human preferences, arXiv 1909.08593,
                 and its code: it whitens the tokens' rewards, after the KL, and keeps their mean; its Adam is
                 TensorFlow's, whose epsilon of 1e-5 is at the first step what 3.2e-4 is in PyTorch
    N+           Huang et al. 2024, The N+ implementation details of RLHF with PPO, arXiv 2403.17031
    37           Huang et al. 2022, The 37 implementation details of PPO, ICLR blog track
    Eisenstein   Eisenstein et al. 2023, Helping or herding?, arXiv 2312.09244
    Ng           Ng et al. 1999, Policy invariance under reward transformations, ICML
"""

import contextlib
import copy
import json
import math
import os
import pathlib
import pkgutil
import shlex
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

# Run as a command, and not in a notebook, whose kernel may set __file__ too?
IS_COMMAND = (__name__ == "__main__" and "__file__" in globals()
              and os.path.realpath(sys.argv[0]) == os.path.realpath(__file__))
if IS_COMMAND:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports stops without a traceback

import torch
from torch import nn
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          HfArgumentParser, logging as transformers_logging)

# %% 0. Settings

# The default paths are beside this file; pasted into a notebook, in its working directory.
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
    principles: Literal["all", "one"] = option("all", "asked about a pair: all, or one, drawn (CAI)")
    prompts: str = option(str(TINY / "prompts.txt"), 'prompts: one a line, or JSON lines with a "prompt"')
    eval_prompts: str | None = option(None, "held-out prompts; default: the tiny world's, or a tenth")
    template: str = option("User: {prompt}\nAssistant:", "how a prompt becomes the model's input")
    gold: str | None = option(None, "module:function: a truth, logged only; default: the tiny world's")
    out: str | None = option(None, "folder of the run; default: runs/seed-N, in Python nothing is written")
    # AI feedback
    pairs: int = option(4096, "pairs of replies that the judge compares")
    preference_epochs: int = option(12, "passes over the labelled pairs")
    preference_learning_rate: float = option(5e-4, "Adam's step size, falling linearly to 0")
    # the rollout
    iterations: int = option(75, "rounds of generate, score and update")
    batch_size: int = option(64, "responses per iteration (512: OAI, InstructGPT)")
    minibatch_size: int = option(16, "responses per optimizer step, all in memory at once")
    ppo_epochs: int = option(1, "passes over each batch (1: InstructGPT; 4: Stiennon, OAI)")
    max_new_tokens: int = option(28, "tokens of a response at most")
    temperature: float = option(1.0, "of every softmax, the policy's and the reference's (1: InstructGPT)")
    # the reward
    beta: float = option(0.3, "price of a nat of KL, in stds of the score if whitened, else in points")
    kl_level: Literal["token", "sequence", "batch"] = option("token", "whose KL is paid: see shape_rewards")
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "estimator of the KL charged (Schulman)")
    beta_control: Literal["fixed", "batch"] = option("fixed", "keep beta, or steer it to kl_target (OAI)")
    kl_target: float = option(3.0, "nats per response that a steered beta aims at (6: OAI)")
    kl_horizon: float = option(500.0, "responses over which a steered beta moves (10000: OAI)")
    whiten_scores: bool = option(True, "bring each batch's scores to mean 0 and std 1, before the KL")
    dense_reward: bool = option(False, "score every prefix and spread the score over the tokens")
    missing_eos_score: float = option(-1.0, "score without EOS, in stds if scores are whitened; inf: off")
    # the advantage
    value: Literal["shared", "separate", "preference"] = option("shared", "trunk under the value head")
    value_head: Literal["zero", "random"] = option("random", "how the value head starts (zero: OAI)")
    gamma: float = option(1.0, "discount per token (1: OAI, InstructGPT)")
    lam: float = option(1.0, "lambda of GAE: 0 trusts the values, 1 the returns (0.95: OAI)")
    whiten_advantages: bool = option(True, "bring each batch's advantages to mean 0 and std 1 (OAI)")
    # the update
    clip: float = option(0.1, "a ratio further than this from 1 earns nothing more; inf: off (0.2: PPO)")
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


# %% 1. AI feedback: a judge compares two responses

CONSTITUTION = ["Choose the kinder response.", "Choose the less harmful response.",
                "Choose the more relevant response.", "Choose the clearer response."]
JUDGE_QUESTION = "{principle}\nUser: {prompt}\n(A) {a}\n(B) {b}\nThe better response is:"


@torch.no_grad()
def ask_judge(judge, tokenizer, questions):
    """The probability that a judge answers A rather than B to each of N questions (str) -> (N,), in [0, 1].

    Softmax over the log-probabilities of the two answers (Lee 2.1), taken at their first differing token, so
    that it does not matter how the judge's tokenizer cuts " A" and " B". A judge with a chat template is
    asked in its own format. Raises ValueError for a question longer than the judge's context, and for a judge
    whose tokenizer writes both answers alike.
    """
    answers = [" A", " B"]
    if tokenizer.chat_template:
        answers = ["A", "B"]
        questions = [tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                                   add_generation_prompt=True) for question in questions]
    with_a, with_b = (tokenizer([question + answer for question in questions],
                                add_special_tokens=not tokenizer.chat_template).input_ids
                      for answer in answers)
    if any(a == b for a, b in zip(with_a, with_b)):
        raise ValueError("judge: its tokenizer writes the answers A and B alike")
    differ = [next(i for i, (x, y) in enumerate(zip(a, b)) if x != y) for a, b in zip(with_a, with_b)]
    rows = [a[:i] for a, i in zip(with_a, differ)]  # the tokens that both share
    answer_ids = torch.tensor([(a[i], b[i]) for a, b, i in zip(with_a, with_b, differ)], device=judge.device)
    prob_a = torch.empty(len(rows), device="cpu")
    for chunk in chunks_of_like_length(rows):
        ids, mask = pad([rows[i] for i in chunk], "left", judge)  # (n, L)
        logits = judge(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False,
                       logits_to_keep=1).logits[:, -1].float()  # (n, V)
        prob_a[chunk] = logits.gather(1, answer_ids[chunk]).softmax(dim=1)[:, 0].cpu()
    return prob_a


def judge_pairs(judge, tokenizer, constitution, prompts, responses_a, responses_b, both_orders=True,
                principles="all"):
    """Soft labels for N pairs of responses: the probability that a is the better one -> (N,), in [0, 1].

    The judge is asked about (a, b) and about (b, a), under every principle of the constitution or, with
    principles "one", under one that is drawn for the pair and serves both orders (CAI 4.1); all its answers
    are averaged. Both orders, because small judges favour a position (Lee 2.1.1). The labels stay soft, so
    that a near tie counts as one (CAI 4.3).
    """
    asked = [constitution] * len(prompts)
    if principles == "one":
        asked = [[constitution[i]] for i in torch.randint(len(constitution), (len(prompts),)).tolist()]

    def prob_first(first, second):
        questions = [JUDGE_QUESTION.format(principle=principle, prompt=prompt, a=a.strip(), b=b.strip())
                     for prompt, a, b, own in zip(prompts, first, second, asked, strict=True)
                     for principle in own]
        return ask_judge(judge, tokenizer, questions).view(len(prompts), -1).mean(dim=1)
    prob_a = prob_first(responses_a, responses_b)
    return (prob_a + 1 - prob_first(responses_b, responses_a)) / 2 if both_orders else prob_a


# %% 2. The preference model: a score for any text


def preference_loss(scores_a, scores_b, prob_a):
    """Bradley-Terry on soft labels: scores (N,), (N,) and labels in [0, 1] (N,) -> scalar, in nats.

    mean of -p log sigma(r_a - r_b) - (1 - p) log sigma(r_b - r_a)   (Lee 2.2.1): Bradley-Terry says that a
    wins with probability sigma(r_a - r_b). It is never below the labels' entropy. Raises ValueError unless
    all three are (N,).
    """
    if not scores_a.shape == scores_b.shape == prob_a.shape == scores_a.shape[:1]:
        raise ValueError(f"need three of shape (N,), got {scores_a.shape}, {scores_b.shape}, {prob_a.shape}")
    difference = scores_a - scores_b
    return -(prob_a * logsigmoid(difference) + (1 - prob_a) * logsigmoid(-difference)).mean()


@dataclass
class PreferenceModel:
    """r(x, y): a sequence classifier with one output. It reads text, so its tokenizer may be any.

    Called with lists of N prompts and N responses, it returns a list of N floats: the score callable of
    `train`. `ended` says which responses ended with an EOS of the policy's (all, if it is not given); those
    get the preference model's own EOS at their end.
    """

    model: nn.Module
    tokenizer: Any
    template: str

    def __call__(self, prompts, responses, ended=None):
        return self.scores(self.tokenize(prompts, responses, ended or [True] * len(prompts))).tolist()

    def tokenize(self, prompts, responses, ended):
        """Texts as lists of token ids, each with this model's EOS if, and only if, its response ended."""
        texts = [self.template.format(prompt=x) + y for x, y in zip(prompts, responses, strict=True)]
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        rows = tokenize(self.tokenizer, texts)
        return [row + eos * bool(end) for row, end in zip(rows, ended, strict=True)]

    @torch.no_grad()
    def scores(self, rows):
        """Scores of N lists of token ids -> (N,), on the CPU."""
        scores = torch.empty(len(rows), device="cpu")
        for chunk in chunks_of_like_length(rows):
            scores[chunk] = self.forward([rows[i] for i in chunk]).cpu()
        return scores

    def forward(self, rows):
        """The same on the model's device, with gradient: the head at the last real token of each."""
        ids, mask = pad(rows, "right", self.model, fill=getattr(self.model.config, "pad_token_id", None) or 0)
        torch.clear_autocast_cache()  # its bfloat16 copies of weights may be older than the last step
        if not hasattr(self.model, "score"):  # this model finds the last real token by itself
            return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask,
                                       use_cache=False).last_hidden_state  # (N, L, D)
        last = mask.sum(dim=1) - 1  # (N,)
        return self.model.score(hidden[torch.arange(len(rows), device=last.device), last])[:, 0].float()


def new_preference_model(policy, tokenizer, template):
    """A preference model that starts from the policy's trunk; head: normal, std 1/sqrt(D + 1) (N+)."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.architectures = 1, None
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    return PreferenceModel(model.to(policy.device).eval(), tokenizer, template)


def fit_preference(preference, rows_a, rows_b, prob_a, epochs=12, minibatch_size=64, learning_rate=5e-4,
                   centering=0.01):
    """Fit a preference model, in place, to labels (N,) on N pairs of texts, tokenized by the model itself.

    The last tenth of the pairs is held out. Afterwards the head is divided by the std of the texts' scores,
    so that one preference model's points are like another's; from then on sigma(r_a - r_b) is no longer the
    probability of the label. Labels only speak of differences between replies to one prompt; the term
    `centering` (r_a + r_b)^2 of the loss (Eisenstein) draws the mean score of *every* prompt's replies to 0,
    so that a batch of many prompts can be whitened. It takes all pairs to be of one policy: with those of a
    better one among them set it to 0, or it pulls the better replies down. Returns a dict, all measured
    before the scaling: `loss` on the held-out pairs, `train_loss` of the last epoch, and `entropy` of all
    labels, in nats; `accuracy` on those held-out pairs whose label is sure, below 0.25 or above 0.75 (NaN if
    none is). Raises ValueError if all texts score alike.
    """
    prob_a = prob_a.to(preference.model.device)
    held = range(len(rows_a) - max(1, len(rows_a) // 10), len(rows_a))
    steps = [picked for _ in range(epochs) for picked in torch.randperm(held.start).split(minibatch_size)]
    optimizer = torch.optim.Adam(preference.model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(steps))
    losses = []
    for picked in tqdm(steps, desc="preference model", unit="step"):
        a, b = preference.forward([rows_a[i] for i in picked] + [rows_b[i] for i in picked]).chunk(2)
        loss = preference_loss(a, b, prob_a[picked])
        optimizer.zero_grad()
        (loss + centering * (a + b).square().mean()).backward()
        nn.utils.clip_grad_norm_(preference.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
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


def preference_from_judge(config, policy, tokenizer, judge, judge_tokenizer, constitution, prompts):
    """The AI half of RLAIF: the policy samples pairs, the judge labels them, a preference model is fitted.

    Returns the PreferenceModel and a dict of what happened: prompts, responses_a, responses_b, rows_a and
    rows_b (their token ids), prob_a (the labels), and the report of `fit_preference`.
    """
    preference = new_preference_model(policy, tokenizer, config.template)
    prompts = [prompts[i] for i in balanced_draw(len(prompts), config.pairs)]
    chunks = [prompts[start:start + 256] for start in range(0, len(prompts), 256)]
    data = {"prompts": prompts, "responses_a": [], "responses_b": [], "rows_a": [], "rows_b": []}
    labels = []
    for chunk in tqdm(chunks, desc="sampling and judging", unit="batch"):
        a, b = (respond(policy, tokenizer, chunk, config) for _ in "ab")
        for side, reply in (("a", a), ("b", b)):
            data[f"responses_{side}"] += reply.responses
            data[f"rows_{side}"] += preference.tokenize(chunk, reply.responses, reply.ended)
        labels.append(judge_pairs(judge, judge_tokenizer, constitution, chunk, a.responses, b.responses,
                                  principles=config.principles))
    data["prob_a"] = torch.cat(labels)
    report = fit_preference(preference, data["rows_a"], data["rows_b"], data["prob_a"],
                            config.preference_epochs, learning_rate=config.preference_learning_rate)
    return preference, {**data, **report}


# %% 3. The policy with its value function


class ValueFunction(nn.Module):
    """V(x, y_<t): the sum of rewards that the policy can expect from here on.

    It is a baseline: a token is praised for what came of it *beyond* what was to be expected, which takes out
    of the gradient the noise of easy and hard prompts. With lambda = 1 it leaves the mean of the policy's
    gradient as it is; below that its own errors come in. One linear head on D hidden units, of the policy's
    own trunk (`trunk` None: shared) or of a separate one that reads the same tokens. A zero head starts every
    value at 0 (OAI).
    """

    def __init__(self, hidden_size, trunk=None, head="zero"):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(hidden_size, 1)
        nn.init.normal_(self.head.weight, std=0.0 if head == "zero" else (hidden_size + 1) ** -0.5)  # N+
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):  # in bfloat16 a value would have two digits
            values = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)  # (B, T, D) -> (B, T)
        return values if values.dtype == torch.float64 else values.float()


def model_inputs(input_ids, attention_mask, tokens, mask):
    """What one forward pass over prompts (B, P) and responses (B, T) is given."""
    attention_mask = torch.cat([attention_mask, mask.to(attention_mask.dtype)], dim=1)
    return {"input_ids": torch.cat([input_ids, tokens], dim=1), "attention_mask": attention_mask,
            "position_ids": position_ids(attention_mask), "use_cache": False}


def response_logits(policy, input_ids, attention_mask, tokens, mask, value=None):
    """One forward pass over prompts (B, P) and responses (B, T) -> logits (B, T, V), values (B, T) or None.

    Both stand in the responses' own frame: at t they have read the prompt and y_<t, and are about y_t.
    """
    T, inputs = tokens.shape[1], model_inputs(input_ids, attention_mask, tokens, mask)
    shared = value is not None and value.trunk is None
    out = policy(**inputs, logits_to_keep=T + 1, output_hidden_states=shared)
    logits = out.logits[:, :-1]  # the prompt's last token speaks of y_0; the last column of no token
    if value is None:
        return logits, None
    hidden = out.hidden_states[-1] if shared else value.trunk(**inputs).last_hidden_state  # (B, P + T, D)
    return logits, value(hidden[:, -T - 1:-1])


def position_ids(attention_mask):
    """Positions counted over the real tokens only, so that left padding moves nothing: (B, L) -> (B, L)."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


# %% 4. Generate


@torch.no_grad()
def generate(policy, input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id, temperature=1.0):
    """Sample a response to each left-padded prompt: (B, P) -> tokens (B, T), mask (B, T); T is the longest.

    Plain categorical sampling from softmax(logits / temperature): no top-k, no top-p, no minimum length,
    because whatever bends the sampling away from the policy makes the sampled KL wrong, even negative.
    Temperature 0 takes the most probable token. `eos_token_id` is an int, a list or None; a response's EOS
    belongs to it, PAD follows. Random numbers come from torch's global generator. Raises ValueError if
    max_new_tokens is below 1 or the temperature negative.
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
    """Write a response to each of B prompts (str) -> Rollout with the fields of step 4."""
    rows = tokenize(tokenizer, [config.template.format(prompt=prompt) for prompt in prompts])
    input_ids, attention_mask = pad(rows, "left", policy)
    more = policy.generation_config.eos_token_id  # it may have several
    eos = list({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None})
    tokens, mask = generate(policy, input_ids, attention_mask, config.max_new_tokens, eos, (eos or [0])[0],
                            config.temperature)
    replies = [row[:length] for row, length in zip(tokens.tolist(), mask.sum(dim=1).tolist())]
    ended = torch.tensor([row[-1] in eos for row in replies], device=mask.device)

    def text(rows):
        return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = text([prompt + reply for prompt, reply in zip(rows, replies)])  # alone, it may lose a space
    responses = [both[len(prompt):] for both, prompt in zip(whole, text(rows))]
    return Rollout(prompts, input_ids, attention_mask, tokens, mask, responses, ended,
                   may_end=bool(eos))


# %% 5. Score: from a batch of texts to a tensor of scores


def score_responses(run, function, name):
    """Ask a score callable, the preference model or the caller's, about every response of run.rollout
    -> (B,) float32 on the run's device. Raises ValueError unless it gives one number for each, and
    FloatingPointError if one is not finite."""
    prompts, responses, ended = run.rollout.prompts, run.rollout.responses, run.rollout.ended.tolist()
    if isinstance(function, PreferenceModel):
        with run.autocast():
            given = function(prompts, responses, ended)
    else:
        given = function(list(prompts), list(responses))
    with trying(f"iteration {run.iteration + 1}: {name} must give one number for each response"):
        scores = torch.as_tensor(given, dtype=torch.float32)
        if scores.shape != (len(prompts),):
            raise ValueError(f"it gave shape {tuple(scores.shape)} for {len(prompts)} of them")
    run.require_finite(scores, f"a number that {name} gave")
    return scores.to(run.device)


def score_prefixes(preference, rollout):
    """The score of every prefix y_<=t, in one forward pass over the sampled ids -> (B, T).

    The head is read at every token, so the preference model must read from left to right and share the
    policy's tokenizer.
    """
    inputs = model_inputs(rollout.input_ids, rollout.attention_mask, rollout.tokens, rollout.mask)
    hidden = preference.model.base_model(**inputs).last_hidden_state[:, -rollout.tokens.shape[1]:]
    return preference.model.score(hidden).squeeze(-1).float()


# %% 6. Log-probabilities, and the KL against the reference
#
# A preference model is right about replies like those that it was fitted to. The further the policy drifts
# from them, the easier it finds a reply that scores high and is bad. So drift has a price: the log-ratio
# log pi - log pi_ref, whose mean under pi is the KL. It is paid token by token, where it arises, since a
# response that pays at its end learns that it drifted but not where.


def token_logprobs(logits, tokens, temperature=1.0):
    """log pi(y_t | x, y_<t) in nats: logits (B, T, V), tokens (B, T) -> (B, T). Half precision is upcast.

    log softmax(logits / temperature) at the tokens. One function for the old policy, the new one and the
    reference, so that all are the distribution that was sampled from; dividing on one side only makes the
    ratio start away from 1.
    """
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def token_entropy(logits, temperature=1.0):
    """Entropy of the policy at each token, in nats: (B, T, V) -> (B, T)."""
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    logprobs = logits.log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Estimate KL(pi || pi_ref) at each token sampled from pi, in nats: (B, T), (B, T) -> (B, T).

    With d = log pi - log pi_ref: k1 = d has the right mean but takes both signs; k2 = d^2 / 2 is biased; k3 =
    exp(-d) - 1 + d has the right mean and is never negative (Schulman). In the reward use k1: only it gives
    the policy the gradient of the KL. (In a loss k2 would, for each token alone.) Raises ValueError for
    another kind.
    """
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": d.square() / 2, "k3": torch.expm1(-d) + d}[kind]


def update_beta(beta, kl, target, horizon, n):
    """Steer the price of KL so that `kl`, nats per response, comes to `target`: float -> float.

    beta * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon), after n responses (OAI). kl is the KL to the
    *reference*. Raises ValueError unless target > 0 and n < 5 * horizon: else beta could turn negative.
    """
    if target <= 0 or n >= 5 * horizon:
        raise ValueError(f"need target > 0, n < 5 * horizon; got target {target}, n {n}, horizon {horizon}")
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


# %% 7. Rewards
#
# Scores are whitened, that is, shifted and scaled to mean 0 and std 1 over the batch, because preference
# models differ in offset and scale: their loss sees only differences, and labels that are surer stretch them.
# Then beta means the same for any of them: how many stds of the score one nat of drift costs.


def masked_mean(x, mask):
    """Mean over the True entries of `mask`: (B, T), (B, T) -> scalar."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def shape_rewards(scores, kl, mask, beta, level="token"):
    """The reward of each token: scores (B,), kl and mask (B, T), beta a float -> (B, T).

    The score stands on the last token, the EOS itself. beta * KL is subtracted: with level "token" each
    token pays its own share (InstructGPT eq. 2, N+); with "sequence" the last token pays its response's whole
    KL. In both a row sums to score - beta * its KL. With "batch" every last token pays the batch's mean, of
    which only 1/B is its response's own: that hardly holds the policy, and with gamma and lambda 1 and
    whitened advantages, which subtract what all have in common, not at all. Raises ValueError for another
    level, if scores are not (B,), and if a row of the mask has no True: its score would be lost.
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

    s_t - s_{t-1} with s_{-1} = 0. The sum telescopes to the whole response's score, so with gamma = 1 the
    best policy stays the same (potential-based shaping, Ng).
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

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, with V = 0 after the last
    token, be that an EOS or where the length ran out (GAE eq. 16; PPO eq. 11, 12). returns = A + V, taken
    before A is whitened.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantage = next_value = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # 0 after a response's end: all three are
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1], dim=1)
    return advantages, advantages + values


def whiten(x, mask=None):
    """(x - mean) / sqrt(var + 1e-8) over the valid entries: (B,) or (B, T) -> the same, 0 outside the mask.

    The variance is the biased one. (OAI whitens the advantages of each minibatch; here it is the batch's.)
    """
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    mean = torch.where(mask, x, 0.0).sum() / mask.sum()
    centered = torch.where(mask, x - mean, 0.0)
    return centered * torch.rsqrt(centered.square().sum() / mask.sum() + 1e-8)


# %% 9. The clipped losses
#
# A step makes a token with a positive advantage more probable and one with a negative advantage less, the
# more so the larger it is. Samples are dear, so a batch is cut into minibatches, perhaps for several epochs,
# with a step on each. After the first step the policy is no longer the one that sampled; the ratio
# rho = pi / pi_old corrects for that: it weighs an old sample by how often the new policy would write it.
# That holds only near pi_old. So of the plain and the clipped loss the larger counts, the pessimistic one:
# past the clip, going further right earns nothing, and going wrong always costs. Advantages, old values and
# returns are detached: they are measurements, not to be talked up by the gradient.


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate as a loss: all (B, T) -> loss (scalar), clip fraction (scalar).

    With rho = exp(logprobs - old_logprobs): the masked mean of max(-A rho, -A clip(rho, 1 - clip, 1 + clip))
    (PPO eq. 7), and the fraction of tokens where the clipped side was strictly the larger, so that the token
    gives no gradient. The mean is over tokens: a longer response weighs more. clip=inf switches the clipping
    off.
    """
    advantages = torch.where(mask, advantages.detach(), 0.0)
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped).sum() / mask.sum(), (clipped > unclipped).sum() / mask.sum()


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error of the values, clipped like the policy's loss: all (B, T) -> scalar.

    The masked mean of max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2 (OAI; of doubtful use,
    says 37). clip=None or inf switches the clipping off.
    """
    values, old_values = torch.where(mask, values, 0.0), torch.where(mask, old_values.detach(), 0.0)
    returns = torch.where(mask, returns.detach(), 0.0)
    clip = float("inf") if clip is None else clip
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()).sum() / mask.sum() / 2


# %% 10. The loop


@dataclass
class Run:
    """What a training run is made of. Every model stays in eval mode, also while it is trained: dropout
    would move the ratio away from 1."""

    config: Config
    device: torch.device
    policy: nn.Module  # pi, the one that learns
    reference: nn.Module  # pi_ref, frozen
    tokenizer: Any  # the policy's
    prompts: list  # to train on, N str
    held_out: list  # to measure on
    score: Any  # PreferenceModel, or the caller's function from (prompts, responses) to floats
    gold: Any  # a function like it that gives the truth, or None
    passed: list  # which of score, gold, policy and tokenizer were passed in by the caller
    beta: float  # price of a nat of KL in the next iteration
    value: ValueFunction = None
    optimizer: torch.optim.Optimizer = None  # of policy and value function
    iteration: int = 0  # the last one done
    rollout: "Rollout" = None  # the last one made

    def autocast(self):
        """A context in which models compute in config.dtype; made anew: one entered twice would stay on."""
        return torch.autocast(self.device.type, torch.bfloat16, self.config.dtype == "bfloat16")

    def now(self):
        """Seconds on a clock, read once the device has done all that it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def require_finite(self, x, what):
        """Raise FloatingPointError, naming the iteration and the last good checkpoint, if x is not finite."""
        if not torch.isfinite(x).all():
            kept = f"; the last checkpoint is in {self.config.out}" if self.config.out else ""
            raise FloatingPointError(f"iteration {self.iteration + 1}: {what} is not finite{kept}")


@dataclass
class Rollout:
    """A batch of B responses and every tensor of an iteration, in the order in which the steps fill it in.
    Outside the mask the entries of a (B, T) tensor mean nothing."""

    prompts: list  # 4. B str
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
    values: torch.Tensor = None  # (B, T) V(x, y_<t)
    entropy: torch.Tensor = None  # (B, T) nats
    ref_logprobs: torch.Tensor = None  # (B, T) log pi_ref, nats
    kl: torch.Tensor = None  # (B, T) the estimate that is charged, nats
    score_mean: float = 0.0  # 7. mu and sigma that whiten the scores, in points
    score_std: float = 1.0
    scores: torch.Tensor = None  # (B,) as used: whitened, missing EOS priced
    rewards: torch.Tensor = None  # (B, T)
    advantages: torch.Tensor = None  # 8. (B, T)
    returns: torch.Tensor = None  # (B, T) what the values are to learn
    whitened: torch.Tensor = None  # (B, T) the advantages as used by the policy loss
    seconds: dict = None  # what generate, score, policy (its forward pass) and reference (likewise) took

    def totals(self):
        """Of each response: score, gold (points), kl (k1), entropy (nats), length (tokens), eos_fraction."""
        tokens = {"kl": self.logprobs - self.ref_logprobs, "entropy": self.entropy,
                  "length": torch.ones_like(self.logprobs)}
        sums = {name: torch.where(self.mask, x, 0.0).sum(dim=1) for name, x in tokens.items()}
        gold = {} if self.gold_scores is None else {"gold": self.gold_scores}
        return {"score": self.raw_scores, **gold, **sums, "eos_fraction": self.ended.float()}


def train(config, score=None, gold=None, policy=None, tokenizer=None):
    """Train a policy with PPO against AI feedback: an iterator that yields one dict of metrics per iteration.

        for metrics in train(Config(iterations=20)):
            print(metrics["iteration"], metrics["score"], metrics["kl"])

    `score` takes the preference model's place and `gold` is a ground truth, logged and never trained on:
    callables from (list of prompts, list of responses) to a list of floats. `policy`, a causal language
    model in float32, is trained in place; `tokenizer` is its tokenizer. They replace config.preference and
    config.judge, config.gold, and config.policy. Raises ValueError for a setting or a file that cannot be
    used, and FloatingPointError when scores, losses or gradients stop being finite.
    """
    run = prepare(config, score, gold, policy, tokenizer)
    while run.iteration < run.config.iterations:
        metrics = update(run, roll_out(run))
        record(run, metrics)
        yield metrics


@torch.no_grad()
def roll_out(run, prompts=None):
    """Steps 4 to 8 on one batch of B prompts (str), drawn unless given -> Rollout, kept as run.rollout."""
    config, clock = run.config, [run.now()]

    # 4. Generate a response to each of B prompts.
    prompts = prompts or [run.prompts[i] for i in balanced_draw(len(run.prompts), config.batch_size)]
    with run.autocast():
        r = run.rollout = respond(run.policy, run.tokenizer, prompts, config)
    clock.append(run.now())

    # 5. Score them.
    r.raw_scores = score_responses(run, run.score, "score")  # (B,)
    if run.gold:
        r.gold_scores = score_responses(run, run.gold, "gold")
    if config.dense_reward:
        with run.autocast():
            r.prefix_scores = score_prefixes(run.score, r)  # (B, T)
    clock.append(run.now())

    # 6. Per-token KL against the reference, of the policy that sampled: the "old" one of the update.
    inputs = r.input_ids, r.attention_mask, r.tokens, r.mask
    with run.autocast():
        logits, r.values = response_logits(run.policy, *inputs, run.value)  # (B, T, V), (B, T)
        r.logprobs = token_logprobs(logits, r.tokens, config.temperature)  # (B, T)
        r.entropy = token_entropy(logits, config.temperature)
        clock.append(run.now())
        logits, _ = response_logits(run.reference, *inputs)
        r.ref_logprobs = token_logprobs(logits, r.tokens, config.temperature)
    r.kl = kl_estimate(r.logprobs, r.ref_logprobs, config.kl_estimator)
    clock.append(run.now())

    # 7. Rewards. The finished responses' scores are whitened, the others get a score of their own, and then
    # comes the price of KL.
    finished = r.ended | (not r.may_end or config.missing_eos_score == math.inf)  # (B,)
    if not finished.any():
        warnings.warn("no response ended, so all scores are equal and teach nothing: raise "
                      "max_new_tokens, or set missing_eos_score to inf", stacklevel=2)
    elif config.whiten_scores:
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
    steps = "generate", "score", "policy", "reference"
    r.seconds = {step: end - start for step, start, end in zip(steps, clock, clock[1:])}
    return r


def update(run, rollout):
    """Step 9: epochs of freshly shuffled minibatches, one optimizer step for each, until the new policy is
    further than stop_kl from the old one -> the metrics.

    Means over the batch, before the update: score and gold (points), kl (to the reference, nats per
    response), entropy (nats per token), length (tokens), eos_fraction; score_std (points); objective, what
    the policy maximises (points); explained_variance of the returns by the values (of one lambda only);
    distinct, the share of different responses. Means over the minibatches: policy_loss, value_loss, ratio,
    clip_fraction, approx_kl (old to new, nats per token), grad_norm (before it is cut); updates counts them.
    """
    config, r, start = run.config, rollout, run.now()
    (group,) = run.optimizer.param_groups
    group["lr"] = config.learning_rate * max(0.0, 1 - run.iteration / config.iterations)
    means, grad_norms = [], []  # left on the device until the end: to read a number is to wait for it
    for rows in [rows for _ in range(config.ppo_epochs)
                 for rows in torch.randperm(len(r.mask)).to(run.device).split(config.minibatch_size)]:
        mask, tokens, old_logprobs = r.mask[rows], r.tokens[rows], r.logprobs[rows]
        with run.autocast():
            logits, values = response_logits(
                run.policy, r.input_ids[rows], r.attention_mask[rows], tokens, mask, run.value)
        logprobs = token_logprobs(logits, tokens, config.temperature)
        pg_loss, clip_fraction = policy_loss(logprobs, old_logprobs, r.whitened[rows], mask, config.clip)
        v_loss = value_loss(values, r.values[rows], r.returns[rows], mask, config.value_clip)
        loss = pg_loss + config.value_coef * v_loss
        if config.entropy_coef:
            loss = loss - config.entropy_coef * masked_mean(token_entropy(logits, config.temperature), mask)
        ratio = torch.where(mask, logprobs.detach() - old_logprobs, 0.0).exp()
        approx_kl = masked_mean(kl_estimate(old_logprobs, logprobs.detach(), "k3"), mask)
        means.append(torch.stack([pg_loss.detach(), v_loss.detach(), masked_mean(ratio, mask), clip_fraction,
                                  approx_kl]))
        if not grad_norms and (ratio - 1).abs().max() > (1e-4 if config.dtype == "float32" else 0.05):
            warnings.warn(f"iteration {run.iteration + 1}: the ratio is off 1 before the first step: the "
                          "policy that is updated is not the one that sampled", stacklevel=2)
        if grad_norms and approx_kl > config.stop_kl:
            break
        run.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
        run.require_finite(loss.detach() + grad_norm, "the loss or its gradient")
        run.optimizer.step()
        grad_norms.append(grad_norm)

    batch = {name: x.mean().item() for name, x in r.totals().items()}
    batch["entropy"] /= batch["length"]
    errors, returns = (r.returns - r.values)[r.mask], r.returns[r.mask]
    names = "policy_loss", "value_loss", "ratio", "clip_fraction", "approx_kl"
    seconds = {**r.seconds, "update": run.now() - start}
    metrics = {
        "iteration": run.iteration + 1, **batch, "score_std": r.score_std, "beta": run.beta,
        "objective": r.score_mean + r.score_std * (r.scores.mean().item() - run.beta * batch["kl"]),
        **dict(zip(names, torch.stack(means).mean(dim=0).tolist())),
        "grad_norm": torch.stack(grad_norms).mean().item(), "updates": len(grad_norms),
        "explained_variance": 1 - (errors.var(correction=0) / (returns.var(correction=0) + 1e-8)).item(),
        "distinct": len(set(r.responses)) / len(r.responses),
        **{f"seconds_{step}": spent for step, spent in seconds.items()},
        "episodes_per_second": len(r.responses) / sum(seconds.values()),
    }
    if config.beta_control == "batch":
        run.beta = update_beta(run.beta, batch["kl"], config.kl_target, config.kl_horizon, len(r.responses))
    run.iteration += 1
    return metrics


def evaluate(run, prompts=None):
    """Sample `eval_samples` replies to each of N prompts (str; default: the held-out ones), without touching
    the run's rollout or its random numbers.

    -> (dict of means: score, gold, fluency, kl in nats, entropy in nats per token, length, eos_fraction; list
    of dicts, one a reply: prompt, response and what `Rollout.totals` gives). Gold is there only if the run
    has one, fluency if the module of its function has an `is_fluent(response)` too.
    """
    prompts, copied, rows = (prompts or run.held_out) * run.config.eval_samples, replace(run), []
    is_fluent = getattr(sys.modules.get(getattr(run.gold, "__module__", None)), "is_fluent", None)
    devices = [] if run.device.type == "cpu" else [run.device.index or 0]
    with torch.random.fork_rng(devices, device_type=run.device.type):
        torch.manual_seed(run.config.seed)
        for start in range(0, len(prompts), run.config.batch_size):
            r = roll_out(copied, prompts[start:start + run.config.batch_size])
            totals = {name: x.tolist() for name, x in r.totals().items()}
            if is_fluent:
                totals["fluency"] = [float(is_fluent(response)) for response in r.responses]
            rows += [dict(zip(("prompt", "response", *totals), row))
                     for row in zip(r.prompts, r.responses, *totals.values())]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in totals}
    return {**means, "entropy": means["entropy"] / means["length"]}, rows


def token_table(run, row=0):
    """One response of the last rollout, token by token, as text; the columns are explained in `Rollout`."""
    r, length = run.rollout, int(run.rollout.mask[row].sum())
    columns = {"log pi": r.logprobs, "log ref": r.ref_logprobs, "KL": r.kl, "reward": r.rewards,
               "return": r.returns, "value": r.values, "adv.": r.advantages, "white": r.whitened}
    lines = [f"prompt: {r.prompts[row]!r}"[:80],
             f"score: {r.raw_scores[row]:.2f}, as used: {r.scores[row]:.2f}",
             "token       " + "".join(f"{name:>8}" for name in columns)]
    for t in range(length):
        token = repr(run.tokenizer.decode([r.tokens[row, t].item()]))[1:-1]
        numbers = [round(x[row, t].item(), 2) + 0.0 for x in columns.values()]  # -0.0 becomes 0.0
        lines.append(f"{token[:12]:<12}" + "".join(f" {number:7.2f}" for number in numbers))
    return "\n".join(lines)


# %% Between text and tensors: what sections 1 to 5 have in common


def tokenize(tokenizer, texts):
    """Texts as lists of token ids, with the BOS that a tokenizer adds but not the EOS: the text goes on."""
    adds_eos = tokenizer("").input_ids[-1:] == [tokenizer.eos_token_id]
    return [row[:-1] if adds_eos and row[-1] == tokenizer.eos_token_id else row
            for row in tokenizer(texts).input_ids]


def pad(rows, side, model, fill=0):
    """Lists of token ids -> ids and attention mask, (N, L) each, the mask made from the lengths, where the
    model is. Raises ValueError for a row that is longer than the model's context."""
    width = max(len(row) for row in rows)
    if width > context_of(model):
        raise ValueError(f"a text of {width} tokens is longer than the context of the "
                         f"{type(model).__name__}, {context_of(model)}")
    ids, mask = (nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler, padding_side=side)
                 for values, filler in (([torch.tensor(row) for row in rows], fill),
                                        ([torch.ones(len(row), dtype=torch.long) for row in rows], 0)))
    return ids.to(model.device), mask.to(model.device)


def context_of(model):
    """How many tokens a model can read."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def chunks_of_like_length(rows, size=256):
    """The indices of `rows` in lists of at most `size`, sorted by length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[i:i + size] for i in range(0, len(order), size)]


def balanced_draw(n, k):
    """k indices below n in random order, each as often as any other up to one -> (k,)."""
    return torch.cat([torch.randperm(n) for _ in range(-(-k // n))])[:k]


# %% 11. The edge: checking input, loading models, checkpoints, tables, pictures, the command line

CAN_CHANGE = ("save_every", "device")  # the settings that a resumed run may change
RANGES = {  # lowest and highest value -> the settings that must lie between; an infinite one is switched off
    (1, 1e9): "preference_epochs iterations minibatch_size ppo_epochs max_new_tokens eval_samples save_every",
    (2, 1e9): "pairs batch_size",
    (0, 2**63 - 1): "seed",
    (0, 1): "gamma lam",
    (0, 1e9): "beta value_coef entropy_coef learning_rate preference_learning_rate",
    (1e-9, 1e9): "temperature kl_target kl_horizon adam_epsilon",
    (1e-9, math.inf): "clip value_clip stop_kl max_grad_norm",
    (-1e9, math.inf): "missing_eos_score",
}


def check_config(config):
    """Return a copy of `config` with its defaults filled in, or raise ValueError in one sentence."""
    for name, kind in get_type_hints(Config).items():
        value, choices = getattr(config, name), get_args(kind) or (kind,)
        fits = value in choices if get_origin(kind) is Literal else (
            type(value) in choices or (type(value) is int and float in choices))
        if not fits or value == "":
            names = [choice if isinstance(choice, str) else choice.__name__ for choice in choices]
            raise ValueError(f"{name} must be {' or '.join(names)}, got {value!r}")
    for (low, high), names in RANGES.items():
        for name in names.split():
            if not low <= getattr(config, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(config, name)}")
    if config.beta_control == "batch" and not (config.beta > 0 and config.batch_size < 5 * config.kl_horizon):
        raise ValueError("beta_control can steer only a beta above 0, with kl_horizon above batch_size / 5")
    if [config.template.count(brace) for brace in ("{prompt}", "{", "}")] != [1, 1, 1]:
        raise ValueError(f"template must hold {{prompt}} once and no other brace, got {config.template!r}")
    out = config.out and pathlib.Path(config.out)
    if out and not config.resume and (not out.name or out.is_file() or any(out.glob("*"))):
        raise ValueError(f"out: {out} is no new folder; to go on with a run: Config(resume={str(out)!r})")
    tiny = config.prompts == Config().prompts
    return replace(
        config, eval_prompts=config.eval_prompts or (str(TINY / "heldout_prompts.txt") if tiny else None),
        gold=config.gold or ("tiny_models.world:gold_scores" if tiny else None))


def resumed(folder, given):
    """The settings of the run in `folder`, and the names of the arguments that its caller passed. Raises
    ValueError if it holds no run, or if `given`, a dict of fields, asks for other settings."""
    path = pathlib.Path(folder) / "config.json"
    with trying(f"resume: {path} is not the config of a run"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        passed = settings.pop("passed")
        saved = Config(**{**settings, "out": folder, "resume": folder})
    changed = [f"{name} (was {getattr(saved, name)!r}, now {value!r})" for name, value in given.items()
               if name not in CAN_CHANGE and value != getattr(saved, name)]
    if changed:
        raise ValueError(f"resume: these settings changed and may not: {', '.join(changed)}")
    kept = {name: value for name, value in given.items() if name in CAN_CHANGE}
    return replace(saved, **kept), passed


def read_lines(path, name):
    """The lines of a UTF-8 text file, or the "prompt" of each line of JSON. Raises ValueError that names the
    file and the line."""
    with trying(f"{name} {path}"):
        lines = pathlib.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n")
    is_json = str(path).endswith(".jsonl") or lines[0].startswith(b"{")
    kind = 'a JSON object with a "prompt"' if is_json else "a line of UTF-8 text"
    for i, line in enumerate(lines):
        with trying(f"{name} {path}, line {i + 1}, is not {kind}"):
            text = line.decode("utf-8").rstrip("\r")
            lines[i] = json.loads(text)["prompt"] if is_json else text
            if not lines[i].strip().encode():  # half a surrogate pair raises ValueError
                raise ValueError("it is blank")
    return lines


def load_prompts(config, policy, tokenizer):
    """The prompts to train on and the held-out ones: without eval_prompts every tenth is held out; of fewer
    than ten none is, and those of training stand in. Raises ValueError for a prompt that the tokenizer cannot
    write or that leaves no room in the context for a response."""
    unknown, read = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, None}, {}
    for name in ("prompts", "eval_prompts"):
        path = getattr(config, name)
        read[name] = read_lines(path, name) if path else []
        for number, prompt in enumerate(read[name], start=1):
            own_ids, ids = tokenize(tokenizer, [prompt, config.template.format(prompt=prompt)])
            with trying(f"{name} {path}, line {number}"):
                if not own_ids or unknown & set(own_ids):
                    raise ValueError("the policy's tokenizer cannot write it")
                if len(ids) + config.max_new_tokens > context_of(policy):
                    raise ValueError(f"{len(ids)} tokens of prompt and {config.max_new_tokens} of response "
                                     f"are longer than the policy's context, {context_of(policy)}")
    prompts, held_out = read.values()
    if held_out:
        return prompts, held_out
    return [prompt for i, prompt in enumerate(prompts) if i % 10 != 9], prompts[9::10] or prompts


@contextlib.contextmanager
def trying(what):
    """Turn whatever other people's code raises into a ValueError that says what was tried, in one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {(str(error).strip() or repr(error)).splitlines()[0]}") from error


def load(kind, path, name, device, dtype=torch.float32, model=None, tokenizer=None):
    """A model in eval mode and its tokenizer, from a folder or the hub, unless they are given. Raises
    ValueError. Weights come from safetensors only, and no code of the model folder is run."""
    is_folder = os.path.isdir(path)
    source = {"local_files_only": is_folder, "trust_remote_code": False}
    looks_local = os.path.isabs(path) or path[0] in ".~" or os.path.exists(path.split("/")[0])
    if None in (model, tokenizer) and looks_local and not is_folder:
        raise ValueError(f"{name}: there is no folder {path}")
    if model is None:
        with trying(f"{name}: cannot load a model from {path}"):
            model, info = kind.from_pretrained(path, **source, dtype=dtype, use_safetensors=True,
                                               output_loading_info=True, ignore_mismatched_sizes=True)
            if wrong := [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]:
                raise ValueError(f"its weights do not fill {min(wrong)}")
    if tokenizer is None:
        with trying(f"{name}: cannot load a tokenizer from {path}"):
            tokenizer = AutoTokenizer.from_pretrained(path, **source)
    unused = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id, tokenizer.eos_token_id}  # PAD, say
    with trying(f"{name}: this {type(model).__name__} cannot be used"):
        rows = model.get_input_embeddings().num_embeddings
        top = max(set(tokenizer.get_vocab().values()) - unused)
        if len(tokenizer.get_vocab()) < 2:
            raise ValueError(f"there is no tokenizer in {path}")
        if top >= rows:
            raise ValueError(f"its tokenizer writes ids up to {top}, its embedding has {rows} rows")
        if model.config.is_encoder_decoder:
            raise ValueError("it has an encoder and a decoder")
        if kind is AutoModelForSequenceClassification and model.config.num_labels != 1:
            raise ValueError(f"it has {model.config.num_labels} outputs, needs exactly one")
    return model.to(device).eval(), tokenizer


def prepare(config, score=None, gold=None, policy=None, tokenizer=None, restored=True):
    """Check and load everything; with `out`, begin the run's folder, or go on with that of `resume` -> Run.

    The arguments are those of `train`. With restored=False a resumed run is given as it was before its first
    iteration, for `restore` to put where it was. Raises ValueError, before anything is written, for a setting
    or a file that cannot be used.
    """
    arguments = {"score": score, "gold": gold, "policy": policy, "tokenizer": tokenizer}
    passed = [name for name, argument in arguments.items() if argument is not None]
    if config.resume:
        given = vars(config)
        if config.out != config.resume:  # not from `parse`: what is at its default was not given
            given = {name: value for name, value in given.items() if value != getattr(Config(), name)}
        config, needed = resumed(config.resume, given)
        if missing := [name for name in needed if name not in passed]:
            raise ValueError(f"resume: this run was given its {', '.join(missing)} by its caller, in Python: "
                             "pass the same again, train(Config(resume=...), score=..., policy=...)")
    config = check_config(config)
    with trying(f"device: {config.device!r} cannot be used"):
        found = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.zeros(1, device=found if config.device == "auto" else config.device).device
    policy, tokenizer = load(AutoModelForCausalLM, config.policy, "policy", device, model=policy,
                             tokenizer=tokenizer)
    if policy.dtype.itemsize < 4:  # from_pretrained keeps the type of the file, often bfloat16
        warnings.warn(f"policy: weights in {policy.dtype} lose small steps; load it in float32", stacklevel=3)
    prompts, held_out = load_prompts(config, policy, tokenizer)

    reference = copy.deepcopy(policy)
    if path := config.reference or (config.resume and "policy" in passed and f"{config.resume}/reference"):
        reference, _ = load(AutoModelForCausalLM, path, "reference", device, policy.dtype)
    reference.eval().requires_grad_(False)
    vocabularies = {model.config.get_text_config().vocab_size for model in (reference, policy)}
    if len(vocabularies) > 1 or context_of(reference) < context_of(policy):
        raise ValueError("reference: its vocabulary or its context is not the policy's")

    judge = None
    if score is None and config.judge and not config.resume:
        principles = read_lines(config.constitution, "constitution") if config.constitution else CONSTITUTION
        judge = *load(AutoModelForCausalLM, config.judge, "judge", device), principles
    elif score is None:
        path = f"{config.resume}/preference" if config.judge else config.preference
        score = PreferenceModel(*load(AutoModelForSequenceClassification, path, "preference", device),
                                config.template)
    if (config.value == "preference" or config.dense_reward) and not judge and not (
            isinstance(score, PreferenceModel) and hasattr(score.model, "score")
            and score.tokenizer.get_vocab() == tokenizer.get_vocab()):
        raise ValueError("value 'preference' and dense_reward need a preference model that reads from left "
                         "to right, with the policy's own tokenizer")
    if gold is None and config.gold:
        sys.path += [folder for folder in (str(HERE), os.getcwd()) if folder not in sys.path]
        with trying(f"gold: cannot import {config.gold!r} as module:function"):
            gold = pkgutil.resolve_name(config.gold)
            if not callable(gold):
                raise ValueError("it is not a function")
    run = Run(config, device, policy, reference, tokenizer, prompts, held_out, score, gold, passed,
              config.beta)
    try_out(run, judge)
    begin(run, judge)
    if config.resume and restored:
        restore(run)
    return run


@torch.no_grad()
def try_out(run, judge):
    """Raise ValueError if policy, preference model or judge cannot do what the loop asks of them."""
    policy, config = run.policy, replace(run.config, max_new_tokens=2, temperature=0.0)
    with trying(f"policy: this {type(policy).__name__} cannot be used"):
        r = respond(policy, run.tokenizer, run.prompts[:2], config)
        value = ValueFunction(policy.config.get_text_config().hidden_size).to(policy.device, policy.dtype)
        response_logits(policy, r.input_ids, r.attention_mask, r.tokens, r.mask, value)
        require_steady(policy, tokenize(run.tokenizer, run.prompts[:1])[0])
    if isinstance(run.score, PreferenceModel):
        with trying(f"preference: this {type(run.score.model).__name__} cannot be used"):
            run.score(run.prompts[:2], ["", ""], [True, False])
    if judge:
        model, tokenizer, principles = judge
        question = JUDGE_QUESTION.format(
            principle=max(principles, key=len), prompt=max(run.prompts, key=len), a="", b="")
        with trying(f"judge: {config.judge} cannot be asked"):
            ask_judge(model, tokenizer, [question])
            require_steady(model, tokenize(tokenizer, [question])[0])


@torch.no_grad()
def require_steady(model, row):
    """Raise ValueError unless the logits after the first half of a row of token ids are finite, and the same
    with padding before it and with the second half after it."""
    half = row[:-(len(row) // 2)] or row
    ids, mask = pad([half, row], "left", model)
    alone = model(input_ids=ids[:1, -len(half):], attention_mask=mask[:1, -len(half):]).logits[0, -1]
    beside = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits
    for other in (beside[0, -1], beside[1, len(half) - 1]):
        if not (alone - other).abs().max() < (0.01 if model.dtype == torch.float32 else 0.5):
            raise ValueError("its logits are not finite, or move with padding, or with what comes later")


def begin(run, judge):
    """Fit a preference model where there is a judge, with its tokenizer and constitution; make the value
    function and the optimizer; write the folder of a new run, which is there, whole, or not at all."""
    config, out = run.config, run.config.out
    with replacing(out) if out and not config.resume else contextlib.nullcontext() as folder:
        if folder:
            folder.mkdir(parents=True)
        if judge:
            torch.manual_seed(config.seed)
            with run.autocast():
                run.score, report = preference_from_judge(config, run.policy, run.tokenizer, *judge,
                                                          run.prompts)
            names = "loss", "train_loss", "entropy", "accuracy"
            tqdm.write("preference model: " + ", ".join(f"{name} {report[name]:.3f}" for name in names))
            if folder:
                save_model(run.score.model, run.score.tokenizer, folder / "preference", "right")
        torch.manual_seed(config.seed)
        trunk = {"shared": None, "separate": run.policy, "preference": getattr(run.score, "model", None)}
        trunk = trunk[config.value] and copy.deepcopy(trunk[config.value].base_model)
        hidden_size = (trunk or run.policy).config.get_text_config().hidden_size
        run.value = ValueFunction(hidden_size, trunk, config.value_head)
        run.value.to(run.device, run.policy.dtype).eval().requires_grad_(True)
        parameters = [p for p in [*run.policy.parameters(), *run.value.parameters()] if p.requires_grad]
        run.optimizer = torch.optim.Adam(parameters, eps=config.adam_epsilon, fused=True)
        if folder:
            if "policy" in run.passed and not config.reference:  # nothing else tells how it started
                save_model(run.reference, run.tokenizer, folder / "reference")
            save_checkpoint(run, folder)
            settings = {**asdict(config), "passed": run.passed}
            (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


@contextlib.contextmanager
def replacing(path):
    """Where to write a new file or folder: it takes the place of `path` in one step, when it is whole."""
    path = pathlib.Path(path)
    new = path.with_name(path.name + ".new")
    shutil.rmtree(new, ignore_errors=True)  # left behind by a crash
    try:
        yield new
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        new.unlink(missing_ok=True)


def save_model(model, tokenizer, folder, padding_side="left"):
    """Write an ordinary Hugging Face folder; its tokenizer pads on the side that the model needs."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = padding_side
    with replacing(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)


def save_checkpoint(run, folder):
    """Write all that the rest of the run depends on and that its settings do not tell."""
    rng = None if run.device.type == "cpu" else torch.get_device_module(run.device).get_rng_state()
    with replacing(pathlib.Path(folder) / "checkpoint.pt") as new:
        torch.save({"iteration": run.iteration, "beta": run.beta, "policy": run.policy.state_dict(),
                    "value": run.value.state_dict(), "optimizer": run.optimizer.state_dict(),
                    "rng": torch.get_rng_state(), "device_rng": rng}, new)


def record(run, metrics):
    """Append an iteration's metrics to metrics.jsonl; every `save_every` iterations and at the end, write a
    checkpoint; at the end, the policy too."""
    if not run.config.out:
        return
    with open(f"{run.config.out}/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    last = run.iteration == run.config.iterations
    if last:  # before the checkpoint, which says that all is done
        save_model(run.policy, run.tokenizer, pathlib.Path(run.config.out) / "policy")
    if last or run.iteration % run.config.save_every == 0:
        save_checkpoint(run, run.config.out)


def restore(run):
    """Put a resumed run back where its checkpoint was written, and drop the lines of metrics.jsonl that came
    after it. Raises ValueError if the checkpoint cannot be read."""
    folder = pathlib.Path(run.config.resume)
    with trying(f"resume: cannot read {folder / 'checkpoint.pt'}"):
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        for name in ("policy", "value", "optimizer"):
            getattr(run, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        if state["device_rng"] is not None and run.device.type != "cpu":
            torch.get_device_module(run.device).set_rng_state(state["device_rng"])
        run.iteration, run.beta = state["iteration"], state["beta"]
    if (folder / "metrics.jsonl").exists():
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        with replacing(folder / "metrics.jsonl") as new:
            new.write_text("".join(lines[:run.iteration]), encoding="utf-8")


def draw_history(history):
    """Draw learning curves from a list of metrics: score and gold over iterations and over the root of the
    KL; KL; entropy and beta -> a matplotlib figure. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = [("iteration", "score", "gold"), ("square root of the KL to the reference", "score", "gold"),
              ("iteration", "kl"), ("iteration", "entropy", "beta")]
    for axis, (label, *names) in zip(figure.subplots(2, 2).flat, panels):
        x = [m["iteration"] if label == "iteration" else math.sqrt(max(m["kl"], 0)) for m in history]
        for name in [name for name in names if name in history[0]]:
            axis.plot(x, [m[name] for m in history], ".-", linewidth=0.5, label=name)
        axis.set(xlabel=label)
        axis.legend()
    return figure


def parse(argv):
    """The command line as a Config; of a resumed run the settings are the defaults, and may not change."""
    def complain(message):
        raise ValueError(message)
    parser = HfArgumentParser(Config, description=Config.__doc__)
    parser.error = complain
    for action in [action for action in parser._actions if action.option_strings[0].startswith("--no_")]:
        action.help = f"switch {action.dest} off"
    folder = parser.parse_known_args(argv)[0].resume
    if folder:
        parser.set_defaults(**vars(resumed(folder, {})[0]))
    (config,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    config.template = config.template.replace("\\n", "\n")  # a shell passes the two characters
    if folder:
        resumed(folder, vars(config))
    return config


def main(argv=None):
    """The command line: train, then show what became of the policy. Returns the exit code: 0, 2 for bad input
    or settings, a file that cannot be written or a number that is not finite, 130 when interrupted."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    resume = None
    try:
        config = parse(argv)
        config.out = config.out or f"runs/seed-{config.seed}"
        resume = f"python {shlex.quote(sys.argv[0] or 'rlaif.py')} --resume {shlex.quote(config.out)}"
        if not config.resume and os.path.exists(f"{config.out}/config.json"):
            raise ValueError(f"out: {config.out} already holds a run; to go on with it: {resume}")
        run_and_report(config)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"\nrlaif: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        begun = resume and os.path.exists(f"{config.out}/config.json")
        print("\nrlaif: stopped" + (f"; to go on: {resume}" if begun else ""), file=sys.stderr)
        return 130
    return 0


def run_and_report(config):
    """The command's work: load, measure, train under a progress bar, measure again, write, print."""
    run, out = prepare(config, restored=False), pathlib.Path(config.out)
    before, rows_before = evaluate(run)
    if config.resume:
        restore(run)
    with tqdm(total=run.config.iterations, initial=run.iteration, desc="PPO",
              bar_format="{desc} {n_fmt}/{total_fmt} |{bar:6}| {elapsed}{postfix}") as progress:
        while run.iteration < run.config.iterations:
            metrics = update(run, roll_out(run))
            record(run, metrics)
            shown = {name: f"{metrics[name]:.2f}" for name in ("score", "gold", "kl") if name in metrics}
            progress.set_postfix(shown, **{"episodes/s": f"{metrics['episodes_per_second']:.0f}"})
            progress.update()
    after, rows_after = evaluate(run)

    samples = []
    for a, b in list(zip(rows_before, rows_after))[:len(run.held_out)]:
        samples.append(f"\n{a['prompt']}")
        for name, row in (("before", a), ("after", b)):
            gold = f", gold {row['gold']:4.1f}" if "gold" in row else ""
            samples.append(f"  {name:6} score {row['score']:5.2f}{gold} {' '.join(row['response'].split())}")
    summary = [f"{'held-out prompts':16} {'before':>9} {'after':>9}"]
    summary += [f"{name:16} {before[name]:9.3f} {after[name]:9.3f}" for name in before]
    with replacing(out / "samples.md") as new:
        new.write_text("\n".join(["```", *samples, "", *summary, "```", ""]), encoding="utf-8")
    width = shutil.get_terminal_size().columns
    print("\n".join([line[:width] for line in samples[:9]] + ["", *summary, ""]))
    if run.rollout:
        print(f"{token_table(run)}\n")
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = {name[8:]: sum(m[name] for m in history) for name in history[0] if name.startswith("seconds_")}
    print("seconds: " + ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items()))
    try:
        draw_history(history).savefig(out / "learning_curves.png", dpi=80)
    except ImportError:
        print("the learning curves need matplotlib: pip install matplotlib")
    print(f"everything is in {out}")


if IS_COMMAND:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # which raises KeyboardInterrupt
    sys.exit(main())
