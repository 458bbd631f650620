"""RLAIF with PPO, whole, in one file: reinforcement learning from AI feedback, in the order in which it runs.

    a judge model, asked which of two replies better follows a principle ............ 1  judge_pairs
        |  soft labels
        v
    a preference model r(x, y), fitted to those labels (Bradley-Terry) .............. 2  fit_preference
        |
        v
    +-> the policy writes a response y to each prompt x of a batch .................. 4  generate
    |       |
    |       v
    |   the preference model scores every response .................................. 5  PreferenceModel
    |       |
    |       v
    |   log pi(y_t) - log pi_ref(y_t) for every token: how far it has drifted ....... 6  kl_estimate
    |       |
    |       v
    |   reward of each token = -beta * KL, and the whitened score on the last ....... 7  shape_rewards
    |       |
    |       v
    |   advantage of each token: how much better it went than the value expected .... 8  gae, whiten
    |       |
    |       v
    +-- epochs of clipped updates of the policy and its value function ........... 9  policy_loss, value_loss

`ppo` (section 10) is the lower half of this drawing, line by line. What it maximises over the policy pi is

    J(pi) = E_{x, y ~ pi} [ r(x, y) - beta * (log pi(y|x) - log pi_ref(y|x)) ]

with r in units of its std over the batch, unless `whiten_scores` is off.

One letter per tensor axis, everywhere: B batch, T response (padded on the right), P prompt (padded on the
left), V vocabulary, D hidden size. `mask` is (B, T), True on a response's own tokens, its EOS included. It is
made from lengths: whether a token is padding is never read off its id. Each function of sections 6 to 9 can
be copied alone into a notebook; that is why each that takes a mask checks it itself.

    python rlaif.py                               PPO on the tiny models beside this file, in a minute
    python rlaif.py --judge tiny_models/judge     the whole drawing, from the judge on
    python rlaif.py --help                        every setting with its unit, default and source
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import time
import types
import typing
import warnings
import zlib
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.utils.benchmark
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          HfArgumentParser)
from transformers.utils import logging as transformers_logging

# ------------------------------------------------------------------------------------------------------------
# 0. Settings
# ------------------------------------------------------------------------------------------------------------


def option(default, help):
    """A field of Config whose help text the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run. Sources: Lee = arXiv 2309.00267 (RLAIF), CAI = 2212.08073, Stiennon =
    2009.01325, InstructGPT = 2203.02155, OAI = openai/lm-human-preferences, N+ = 2403.17031, PPO =
    1707.06347, GAE = 1506.02438."""

    # the models and the data
    policy: str = option("tiny_models/policy", "causal language model to train: a folder or a hub name")
    reference: str | None = option(None, "pi_ref, frozen: a folder or hub name; default: the policy itself")
    preference: str = option("tiny_models/preference", "one-output sequence classifier that gives the score")
    judge: str | None = option(None, "causal language model whose labels a new preference model is fitted to")
    constitution: str | None = option(None, "file of principles, one a line; default: CONSTITUTION")
    prompts: str = option("tiny_models/prompts.txt", 'prompts: one a line, or JSON lines with a "prompt"')
    eval_prompts: str | None = option(None, "held-out prompts; default: the tiny world's, or a tenth")
    template: str = option("User: {prompt}\nAssistant:", "how a prompt becomes the model's input")
    gold: str | None = option(None, "module:function: a truth, logged only; default: the tiny world's")
    out: str | None = option(None, "folder of the run; default: runs/seed-N, in Python nothing is written")
    # AI feedback
    pairs: int = option(16384, "pairs of replies that the judge compares")
    preference_epochs: int = option(3, "passes over the labelled pairs")
    preference_learning_rate: float = option(5e-4, "Adam's step size, falling linearly to 0")
    # the rollout
    iterations: int = option(80, "rounds of generate, score and update")
    batch_size: int = option(128, "responses per iteration (512: OAI, InstructGPT)")
    minibatch_size: int = option(32, "responses per optimizer step, all in memory at once")
    ppo_epochs: int = option(2, "passes over each batch (4: Stiennon, OAI; 1: InstructGPT)")
    max_new_tokens: int = option(28, "tokens of a response at most")
    temperature: float = option(1.0, "of every softmax, the policy's and the reference's (1: InstructGPT)")
    # the reward
    beta: float = option(0.3, "price of a nat of KL, in stds of the score if whitened, else in points")
    kl_level: Literal["token", "sequence", "batch"] = option(
        "token", "each token pays its own KL, each last token its response's, or each the batch's mean")
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "estimator of the KL charged (Schulman 2020)")
    beta_control: Literal["fixed", "batch", "prompt"] = option(
        "fixed", "keep beta, steer one towards kl_target (OAI), or steer one for each prompt")
    kl_target: float = option(3.0, "nats per response that a steered beta aims at (6: OAI)")
    kl_horizon: float | None = option(
        None, "responses over which beta moves (10000: OAI); default: 500, or 20 for a prompt's own")
    whiten_scores: bool = option(True, "bring each batch's scores to mean 0 and std 1, before the KL")
    dense_reward: bool = option(False, "score every prefix and spread the score over the tokens")
    missing_eos_score: float = option(-1.0, "score of a response that did not end; inf: off (-1: N+)")
    # the advantage
    value: Literal["shared", "separate", "preference"] = option(
        "shared", "trunk of the value head: the policy's, a copy of it, or of the preference model's (N+)")
    value_head: Literal["zero", "random"] = option("zero", "how the value head starts (zero: OAI)")
    gamma: float = option(1.0, "discount per token (1: OAI, InstructGPT)")
    lam: float = option(0.95, "lambda of GAE: 0 trusts the values, 1 the returns (0.95: OAI)")
    whiten_advantages: bool = option(True, "bring each batch's advantages to mean 0 and std 1 (OAI)")
    # the update
    clip: float = option(0.1, "how far the ratio may leave 1 with gain; inf: off (0.2: PPO)")
    value_clip: float = option(0.2, "how far a value may move in one iteration with gain; inf: off (OAI)")
    value_coef: float = option(0.1, "weight of the value loss (OAI)")
    entropy_coef: float = option(0.0, "weight of the entropy bonus, per nat (0: OAI; PPO eq. 9)")
    stop_kl: float = option(
        0.05, "nats per token, old to new, that end an iteration's updates (0.015: Spinning Up); inf: off")
    learning_rate: float = option(
        1e-3, "Adam's step size at the start, falling linearly to 0; large models need less (3e-6: N+)")
    adam_epsilon: float = option(3e-4, "lets Adam leave tiny gradients, of rare tokens, tiny (1e-5: OAI)")
    max_grad_norm: float = option(0.5, "length to which a longer gradient is cut; inf: off")
    # the run
    seed: int = option(0, "seed of every random number")
    device: str = option("auto", "cpu, cuda, mps, or auto: the first of cuda, mps, cpu that is there")
    dtype: Literal["float32", "bfloat16"] = option("float32", "inside the models; losses are float32 anyway")
    eval_samples: int = option(16, "replies to each held-out prompt in the before/after summary")
    save_every: int = option(10, "iterations between checkpoints")
    resume: str | None = option(None, "folder of a run to go on with, bit for bit")


# ------------------------------------------------------------------------------------------------------------
# 1. AI feedback: a judge compares two responses
# ------------------------------------------------------------------------------------------------------------

CONSTITUTION = [
    "Choose the kinder response.",
    "Choose the less harmful response.",
    "Choose the more relevant response.",
    "Choose the clearer response.",
]
JUDGE_QUESTION = "{principle}\nUser: {prompt}\n(A) {a}\n(B) {b}\nThe better response is:"


@torch.no_grad()
def ask_judge(judge, tokenizer, questions):
    """The probability that a judge answers A rather than B to each of N questions (str) -> (N,), in [0, 1].

    Softmax over the log-probabilities of the two answers (Lee 2.1), taken at their first differing token, so
    that it does not matter how the judge's tokenizer cuts " A" and " B". A judge with a chat template is
    asked in its own format. Raises ValueError for a question longer than the judge's context, and for a judge
    whose tokenizer writes both answers alike.
    """
    if tokenizer.chat_template:
        questions = [tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                                   add_generation_prompt=True) for question in questions]
    answers = ["A", "B"] if tokenizer.chat_template else [" A", " B"]
    special = not tokenizer.chat_template  # a chat template writes its own BOS
    with_a, with_b = (tokenizer([question + answer for question in questions],
                                add_special_tokens=special).input_ids for answer in answers)
    rows, answer_ids = [], []  # the tokens before the two answers part, and the first of either that differs
    for a, b in zip(with_a, with_b):
        split = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if split is None:
            raise ValueError("judge: its tokenizer writes the answers A and B alike")
        rows.append(a[:split])
        answer_ids.append((a[split], b[split]))
    prob_a = torch.empty(len(rows), device="cpu")
    for chunk in chunks_of_like_length(rows):
        ids, mask = pad([rows[i] for i in chunk], "left", judge.device)  # (n, L)
        require_room(judge, ids, "judge")
        logits = judge(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False,
                       logits_to_keep=1).logits[:, -1].float()  # (n, V)
        a_or_b = torch.tensor([answer_ids[i] for i in chunk], device=judge.device)  # (n, 2)
        prob_a[chunk] = logits.gather(1, a_or_b).softmax(dim=1)[:, 0].cpu()
    return prob_a


def judge_pairs(judge, tokenizer, constitution, prompts, responses_a, responses_b, both_orders=True):
    """Soft labels for N pairs of responses: the probability that a is the better one -> (N,), in [0, 1].

    One principle is drawn per comparison (CAI 4.1) and serves both orders: the judge is asked about (a, b)
    and about (b, a), and the two answers are averaged, because small judges favour a position (Lee 2.1.1).
    The labels stay soft (CAI 4.3).
    """
    principles = [constitution[i] for i in torch.randint(len(constitution), (len(prompts),)).tolist()]

    def prob_first(first, second):
        return ask_judge(judge, tokenizer, [
            JUDGE_QUESTION.format(principle=principle, prompt=prompt, a=a.strip(), b=b.strip())
            for principle, prompt, a, b in zip(principles, prompts, first, second, strict=True)])
    prob_a = prob_first(responses_a, responses_b)
    return (prob_a + 1 - prob_first(responses_b, responses_a)) / 2 if both_orders else prob_a


# ------------------------------------------------------------------------------------------------------------
# 2. The preference model: a score for any text
# ------------------------------------------------------------------------------------------------------------


def preference_loss(scores_a, scores_b, prob_a):
    """Bradley-Terry on soft labels: scores (N,), (N,) and labels in [0, 1] (N,) -> scalar, in nats.

    mean of -p log sigma(r_a - r_b) - (1 - p) log sigma(r_b - r_a)   (Lee 2.2.1). Its floor is the entropy of
    the labels.
    """
    difference = scores_a - scores_b
    return -(prob_a * logsigmoid(difference) + (1 - prob_a) * logsigmoid(-difference)).mean()


class PreferenceModel:
    """r(x, y): a sequence classifier with one output. It reads text, so its tokenizer may be any.

    Called with lists of N prompts and N responses, it returns a list of N floats: the score callable of
    `train`. `ended` says which responses ended with an EOS of the policy's (all, if it is not given); those
    get the preference model's own EOS at their end.
    """

    def __init__(self, model, tokenizer, template):
        self.model, self.tokenizer, self.template = model, tokenizer, template

    def tokenize(self, prompts, responses, ended):
        """Texts as lists of token ids, each with this model's EOS if, and only if, its response ended."""
        texts = [self.template.format(prompt=x) + y for x, y in zip(prompts, responses, strict=True)]
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        rows = tokenize(self.tokenizer, texts)
        return [row + eos * bool(end) for row, end in zip(rows, ended, strict=True)]

    def scores(self, rows):
        """Scores of N lists of token ids -> (N,), with gradient: the head at the last real token of each."""
        fill = getattr(self.model.config, "pad_token_id", None) or 0
        ids, mask = pad(rows, "right", self.model.device, fill)  # (N, L)
        require_room(self.model, ids, "preference")
        torch.clear_autocast_cache()  # its bfloat16 copies of weights may be older than the last step
        if not hasattr(self.model, "score"):  # it pools by itself, and looks at the mask or for PAD
            return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask,
                                       use_cache=False).last_hidden_state  # (N, L, D)
        last = mask.sum(dim=1) - 1  # (N,)
        return self.model.score(hidden[torch.arange(len(rows), device=last.device), last])[:, 0].float()

    @torch.no_grad()
    def __call__(self, prompts, responses, ended=None):
        rows = self.tokenize(prompts, responses, [True] * len(prompts) if ended is None else ended)
        scores = torch.empty(len(rows), device="cpu")
        for chunk in chunks_of_like_length(rows):
            scores[chunk] = self.scores([rows[i] for i in chunk]).cpu()
        return scores.tolist()


def new_preference_model(policy, tokenizer, template):
    """A preference model that starts from the policy's trunk; head: normal, std 1/sqrt(D + 1) (N+)."""
    config = copy.deepcopy(policy.config)
    config.num_labels, config.architectures = 1, None
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    return PreferenceModel(model.to(policy.device).eval(), tokenizer, template)


def fit_preference(preference, prompts, samples_a, samples_b, prob_a, epochs=3, minibatch_size=64,
                   learning_rate=5e-4):
    """Fit a preference model, in place, to labels (N,) on N pairs of samples, each (responses, ended).

    The last tenth of the pairs is held out. Afterwards the head is scaled so that the samples' scores have
    std 1; their mean is drawn to 0 by a small term in the loss (2312.09244), since the loss itself only sees
    differences. Returns a dict, all measured before the scaling: `loss` on the held-out pairs, `accuracy` on
    those of them whose label is sure, below 0.25 or above 0.75 (NaN if none is), `train_loss` of the last
    epoch, and `floor`, the entropy of all labels; losses in nats.
    """
    rows_a, rows_b = preference.tokenize(prompts, *samples_a), preference.tokenize(prompts, *samples_b)
    prob_a = prob_a.to(preference.model.device)
    held = range(len(prompts) - max(1, len(prompts) // 10), len(prompts))
    steps = [picked for _ in range(epochs) for picked in torch.randperm(held.start).split(minibatch_size)]
    optimizer = torch.optim.Adam(preference.model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(steps))
    losses = []
    for picked in tqdm(steps, desc="preference model", unit="step"):
        scores = preference.scores([rows_a[i] for i in picked] + [rows_b[i] for i in picked])
        a, b = scores.chunk(2)
        loss = preference_loss(a, b, prob_a[picked])
        optimizer.zero_grad()
        (loss + 0.01 * (a + b).square().mean()).backward()
        nn.utils.clip_grad_norm_(preference.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    a, b = (torch.tensor(preference(prompts, *samples)) for samples in (samples_a, samples_b))
    p, last_epoch = prob_a.cpu(), losses[-(len(losses) // epochs):]
    report = {
        "accuracy": ((a > b) == (p > 0.5))[held][(p[held] - 0.5).abs() > 0.25].float().mean().item(),
        "loss": preference_loss(a[held], b[held], p[held]).item(),
        "train_loss": sum(last_epoch) / len(last_epoch),
        "floor": torch.distributions.Bernoulli(p).entropy().mean().item(),
    }
    with torch.no_grad():
        preference.model.score.weight /= torch.cat([a, b]).std().item()
    return report


def preference_from_judge(config, policy, tokenizer, judge, judge_tokenizer, constitution, prompts):
    """The AI half of RLAIF: the policy samples pairs, the judge labels them, a preference model is fitted.

    Returns the PreferenceModel and a dict of what happened: the pairs, their labels and the report of
    `fit_preference`.
    """
    prompts = [prompts[i] for i in balanced_draw(len(prompts), config.pairs)]
    samples = []
    for side in "ab":
        responses, ended = [], []
        for start in tqdm(range(0, len(prompts), 256), desc=f"sampling replies {side}", unit="batch"):
            batch = prompts[start:start + 256]
            *_, texts, ends = respond(policy, tokenizer, batch, config)
            responses, ended = responses + texts, ended + ends.tolist()
        samples.append((responses, ended))
    (a, _), (b, _) = samples
    parts = [slice(start, start + 256) for start in range(0, len(prompts), 256)]
    prob_a = torch.cat([judge_pairs(judge, judge_tokenizer, constitution, prompts[part], a[part], b[part])
                        for part in tqdm(parts, desc="judging pairs", unit="batch")])
    preference = new_preference_model(policy, tokenizer, config.template)
    report = fit_preference(preference, prompts, *samples, prob_a, config.preference_epochs,
                            learning_rate=config.preference_learning_rate)
    return preference, {"prompts": prompts, "samples": samples, "prob_a": prob_a, **report}


# ------------------------------------------------------------------------------------------------------------
# 3. The policy with its value function
# ------------------------------------------------------------------------------------------------------------


class ValueFunction(nn.Module):
    """V(x, y_<t): what the policy can expect from here on.

    One linear head on D hidden units, of the policy's own trunk (`trunk` None: shared) or of a separate one
    that reads the same tokens. A zero head starts every value at 0 (OAI).
    """

    def __init__(self, hidden_size, trunk=None, head="zero"):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.bias)
        if head == "zero":
            nn.init.zeros_(self.head.weight)
        else:
            nn.init.normal_(self.head.weight, std=(hidden_size + 1) ** -0.5)  # N+

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):  # in bfloat16 a value would have two digits
            values = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)  # (B, T, D) -> (B, T)
        return values if values.dtype == torch.float64 else values.float()


def response_logits(policy, input_ids, attention_mask, tokens, mask, value=None):
    """One forward pass over prompts (B, P) and responses (B, T) -> logits (B, T, V), values (B, T) or None.

    Both stand in the responses' own frame: at t they have read the prompt and y_<t, and are about y_t.
    """
    T = tokens.shape[1]
    attention_mask = torch.cat([attention_mask, mask.to(attention_mask.dtype)], dim=1)
    inputs = {"input_ids": torch.cat([input_ids, tokens], dim=1), "attention_mask": attention_mask,
              "position_ids": position_ids(attention_mask), "use_cache": False}
    shared = value is not None and value.trunk is None
    out = policy(**inputs, logits_to_keep=T + 1, output_hidden_states=shared)
    logits = out.logits[:, :-1]  # the last token of a response predicts nothing
    if value is None:
        return logits, None
    hidden = out.hidden_states[-1] if shared else value.trunk(**inputs).last_hidden_state  # (B, P + T, D)
    return logits, value(hidden[:, -T - 1:-1])


def position_ids(attention_mask):
    """Positions counted over the real tokens only, so that left padding moves nothing: (B, L) -> (B, L)."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


# ------------------------------------------------------------------------------------------------------------
# 4. Generate
# ------------------------------------------------------------------------------------------------------------


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
            logits = logits if logits.dtype == torch.float64 else logits.float()
            token = torch.multinomial((logits / temperature).softmax(dim=-1), 1).squeeze(1)
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
    """Responses to B prompts: input_ids, attention_mask (B, P), tokens, mask (B, T), texts, ended (B,)."""
    rows = tokenize(tokenizer, [config.template.format(prompt=prompt) for prompt in prompts])
    input_ids, attention_mask = pad(rows, "left", policy.device)
    eos = eos_ids(policy, tokenizer)
    tokens, mask = generate(policy, input_ids, attention_mask, config.max_new_tokens, eos, (eos or [0])[0],
                            config.temperature)
    lengths = mask.sum(dim=1)
    responses = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
    ended = torch.tensor([row[-1] in eos for row in responses], device=mask.device)
    return input_ids, attention_mask, tokens, mask, decode(tokenizer, rows, responses), ended


def eos_ids(policy, tokenizer):
    """The ids that end a response: the tokenizer's EOS, and those of the policy, which may have several."""
    more = policy.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    return [i for i in dict.fromkeys(ids) if i is not None]


# ------------------------------------------------------------------------------------------------------------
# 5. Score: by PreferenceModel or any callable. Here is what stands between text and tensors.
# ------------------------------------------------------------------------------------------------------------


def tokenize(tokenizer, texts):
    """Texts as lists of token ids, with the BOS that a tokenizer adds but not the EOS: the text goes on."""
    adds_eos = tokenizer("").input_ids[-1:] == [tokenizer.eos_token_id]
    return [row[:-1] if adds_eos and row[-1] == tokenizer.eos_token_id else row
            for row in tokenizer(texts).input_ids]


def decode(tokenizer, prompt_rows, response_rows):
    """The text of each response, cut from prompt + response: alone, some tokenizers drop its first space."""
    def text(rows):
        return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = text([prompt + response for prompt, response in zip(prompt_rows, response_rows)])
    return [both[len(prompt):] for both, prompt in zip(whole, text(prompt_rows))]


def pad(rows, side, device, fill=0):
    """Lists of token ids -> ids and attention mask, (N, L) each, the mask made from the lengths."""
    width = max(len(row) for row in rows)

    def filled(row, filler):
        rest = [filler] * (width - len(row))
        return rest + row if side == "left" else row + rest
    ids, mask = [filled(row, fill) for row in rows], [filled([1] * len(row), 0) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def chunks_of_like_length(rows, size=256):
    """The indices of `rows` in lists of at most `size`, sorted by length, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[i:i + size] for i in range(0, len(order), size)]


def balanced_draw(n, k):
    """k indices below n in random order, each as often as any other up to one -> (k,)."""
    return torch.cat([torch.randperm(n) for _ in range(-(-k // n))])[:k]


def score_prefixes(run, prompts, input_ids, attention_mask, tokens, mask, scores, iteration):
    """The score of every prefix, read as text -> (B, T), and on the last token that of the response (B,).
    `run` is what `prepare` makes."""
    prompt_rows = [ids[real].tolist() for ids, real in zip(input_ids, attention_mask.bool())]
    at = mask.nonzero().tolist()  # (row, t) of every real token
    prefix_rows = [tokens[b, :t + 1].tolist() for b, t in at]
    texts = decode(run.tokenizer, [prompt_rows[b] for b, _ in at], prefix_rows)
    prefixes = torch.zeros(mask.shape, device=mask.device)
    prefixes[mask] = run.score([prompts[b] for b, _ in at], texts, [False] * len(at), iteration)
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(dim=1, keepdim=True) - 1
    return torch.where(last, scores[:, None], prefixes)


# ------------------------------------------------------------------------------------------------------------
# 6. Log-probabilities, and the KL against the reference
# ------------------------------------------------------------------------------------------------------------


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
    exp(-d) - 1 + d has the right mean and is never negative. Charged as a reward, as here, only k1 makes the
    policy gradient that of the KL; the gradient of k2 itself would do so in a loss. (Schulman 2020,
    "Approximating KL divergence") Raises ValueError for another kind.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")


def update_beta(beta, kl, target, horizon, n):
    """Steer the price of KL so that `kl` comes to `target`, nats per response: float or (N,) -> the same.

    beta * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon), after n responses (OAI). kl is the KL to the
    *reference*. Raises ValueError unless n < 5 * horizon, beyond which beta could turn negative.
    """
    if target <= 0 or torch.as_tensor(n >= 5 * horizon).any():
        raise ValueError(f"need target > 0, n < 5 * horizon; got target {target}, n {n}, horizon {horizon}")
    error = (torch.as_tensor(kl, dtype=torch.float64) / target - 1).clamp(-0.2, 0.2)
    change = 1 + error * n / horizon
    return beta * change.to(beta) if isinstance(beta, torch.Tensor) else beta * change.item()


# ------------------------------------------------------------------------------------------------------------
# 7. Rewards
# ------------------------------------------------------------------------------------------------------------


def masked_mean(x, mask):
    """Mean over the True entries of `mask`: (B, T), (B, T) -> scalar. Raises ValueError if a row has none."""
    if not mask.any(dim=-1).all():
        raise ValueError("every row of the mask needs at least one True")
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def shape_rewards(scores, kl, mask, beta, level="token"):
    """The reward of each token: scores (B,), kl and mask (B, T), beta a float or (B,) -> (B, T).

    The score stands on the last token, the EOS itself. From it is taken beta * KL: with level "token" each
    token pays its own share (InstructGPT eq. 2, N+); with "sequence" the last token pays its response's whole
    KL. In both a row sums to score - beta * its KL. With "batch" every last token pays the batch's mean, of
    which only 1/B is its response's own: that hardly holds the policy. Raises ValueError for another level or
    if a row has no True.
    """
    if not mask.any(dim=-1).all():
        raise ValueError("every row of the mask needs at least one True")
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(dim=1, keepdim=True) - 1  # (B, T)
    beta = torch.as_tensor(beta, dtype=kl.dtype, device=kl.device).reshape(-1, 1)
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
    best policy stays the same (potential-based shaping, Ng et al. 1999). Raises ValueError if a row of the
    mask has no True.
    """
    if not mask.any(dim=-1).all():
        raise ValueError("every row of the mask needs at least one True")
    prefix_scores = torch.where(mask, prefix_scores, 0.0)
    before = torch.cat([torch.zeros_like(prefix_scores[:, :1]), prefix_scores[:, :-1]], dim=1)
    return torch.where(mask, prefix_scores - before, 0.0)


# ------------------------------------------------------------------------------------------------------------
# 8. Advantages
# ------------------------------------------------------------------------------------------------------------


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: rewards, values, mask (B, T) -> advantages (B, T), returns (B, T).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, with V = 0 after the last
    token, be that an EOS or where the length ran out (GAE eq. 16; PPO eq. 11, 12). returns = A + V, taken
    before A is whitened. Raises ValueError if a row of the mask has no True.
    """
    if not mask.any(dim=-1).all():
        raise ValueError("every row of the mask needs at least one True")
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


def whiten(x, mask=None, shift_mean=True):
    """(x - mean) / sqrt(var + 1e-8) over the valid entries: (B,) or (B, T) -> the same, 0 outside the mask.

    The variance is the biased one. With shift_mean=False the mean is added back. Raises ValueError if a row
    has no True. (OAI; "The N Implementation Details of RLHF with PPO")
    """
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    if not mask.any(dim=-1).all():
        raise ValueError("every row of the mask needs at least one True")
    x = torch.where(mask, x, 0.0)
    mean = x.sum() / mask.sum()
    centered = torch.where(mask, x - mean, 0.0)
    whitened = centered * torch.rsqrt(centered.square().sum() / mask.sum() + 1e-8)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


# ------------------------------------------------------------------------------------------------------------
# 9. The clipped losses
# ------------------------------------------------------------------------------------------------------------


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate as a loss: all (B, T) -> loss (scalar), clip fraction (scalar).

    With rho = exp(logprobs - old_logprobs): the masked mean of max(-A rho, -A clip(rho, 1 - clip, 1 + clip))
    (PPO eq. 7), and the fraction of tokens where the clipped side was strictly the larger, so that the token
    gives no gradient. The mean is over tokens: a longer response weighs more. clip=inf switches the clipping
    off. Raises ValueError if a row of the mask has no True.
    """
    if not mask.any(dim=-1).all():
        raise ValueError("every row of the mask needs at least one True")
    advantages = torch.where(mask, advantages.detach(), 0.0)
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped).sum() / mask.sum(), (clipped > unclipped).sum() / mask.sum()


def value_loss(values, old_values, returns, mask, clip=0.2):
    """Half the squared error of the values, clipped like the policy's loss: all (B, T) -> scalar.

    The masked mean of max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2 (OAI; of doubtful use,
    says "The 37 Implementation Details of PPO"). clip=None or inf switches the clipping off. Raises
    ValueError if a row has no True.
    """
    if not mask.any(dim=-1).all():
        raise ValueError("every row of the mask needs at least one True")
    values, old_values = torch.where(mask, values, 0.0), torch.where(mask, old_values.detach(), 0.0)
    returns = torch.where(mask, returns.detach(), 0.0)
    off = clip is None or clip == float("inf")
    near = values if off else old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()).sum() / mask.sum() / 2


# ------------------------------------------------------------------------------------------------------------
# 10. The loop
# ------------------------------------------------------------------------------------------------------------


PHASES = ("generate", "score", "reference", "update")  # steps 4, 5, 6 and 7 to 9


def train(config, score=None, gold=None, policy=None, tokenizer=None):
    """Train a policy with PPO against AI feedback: an iterator that yields one dict of metrics per iteration.

        for metrics in train(Config(iterations=20)):
            print(metrics["iteration"], metrics["score"], metrics["kl"])

    `score` takes the preference model's place and `gold` is a ground truth, logged and never trained on:
    callables from (list of prompts, list of responses) to a list of floats. `policy`, a causal language
    model, is trained in place; `tokenizer` is its tokenizer. They replace config.preference and config.judge,
    config.gold, and config.policy. Raises ValueError for a setting or a file that cannot be used, and
    FloatingPointError when scores, losses or gradients stop being finite.
    """
    run = prepare(resumed(config) if config.resume else config, score, gold, policy, tokenizer)
    restore(run)
    yield from ppo(run)


def ppo(run):
    """The loop: from `run`, what `prepare` has made ready, to one dict of metrics per iteration.

    Of the batch, before the update: means of score, gold (both in points), kl (to the reference, in nats per
    response), entropy (nats per token) and length (tokens); objective = score - beta * std * kl, in points;
    explained_variance of the returns by the values; distinct, the share of different responses. Of the
    update: updates, the number of its steps, and means over its minibatches, among them approx_kl (old to
    new, in nats per token) and grad_norm (before it is cut).

    Every model stays in eval mode, also while it is trained: dropout would move the ratio away from 1.
    """
    config, policy, value, optimizer = run.config, run.policy, run.value, run.optimizer
    for iteration in range(run.iteration + 1, config.iterations + 1):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - (iteration - 1) / config.iterations)
        clock = [time.perf_counter()]

        # 4. Generate a response to each of B prompts.
        index = balanced_draw(len(run.prompts), config.batch_size)  # (B,)
        prompts = [run.prompts[i] for i in index]
        with run.autocast():
            input_ids, attention_mask, tokens, mask, responses, ended = respond(
                policy, run.tokenizer, prompts, config)  # (B, P), (B, P), (B, T), (B, T), B texts, (B,)
        clock.append(time.perf_counter())

        # 5. Score them. A response that did not end gets a score of its own.
        raw_scores = run.score(prompts, responses, ended, iteration)  # (B,)
        scores = raw_scores
        if not run.ignore_missing_eos:
            scores = torch.where(ended, raw_scores, config.missing_eos_score)
        gold_scores = run.gold and run.gold(prompts, responses, ended, iteration)
        if config.dense_reward:
            prefix_scores = score_prefixes(
                run, prompts, input_ids, attention_mask, tokens, mask, scores, iteration)  # (B, T)
        clock.append(time.perf_counter())

        # 6. Per-token KL against the reference, of the policy that sampled: the "old" one of the update.
        with torch.no_grad(), run.autocast():
            logits, values = response_logits(policy, input_ids, attention_mask, tokens, mask, value)
            old_logprobs = token_logprobs(logits, tokens, config.temperature)  # (B, T)
            entropy = masked_mean(token_entropy(logits, config.temperature), mask)
            logits, _ = response_logits(run.reference, input_ids, attention_mask, tokens, mask)
            ref_logprobs = token_logprobs(logits, tokens, config.temperature)  # (B, T)
        kl = kl_estimate(old_logprobs, ref_logprobs, config.kl_estimator)  # (B, T)
        sequence_kl = torch.where(mask, old_logprobs - ref_logprobs, 0.0).sum(dim=1).cpu()  # (B,), nats
        clock.append(time.perf_counter())

        # 7. Rewards: the whitened score on the last token, or spread over all, less beta * KL.
        beta = run.beta[index]  # (B,), all alike unless each prompt has its own
        mean, std = 0.0, 1.0
        if config.whiten_scores:
            mean, std = scores.mean(), (scores.var(correction=0) + 1e-8).sqrt()
        if config.dense_reward:
            rewards = shape_rewards(torch.zeros_like(scores), kl, mask, beta, config.kl_level)
            rewards = rewards + dense_scores((prefix_scores - mean) / std, mask)
        else:
            rewards = shape_rewards((scores - mean) / std, kl, mask, beta, config.kl_level)  # (B, T)

        # 8. Advantages, whitened over the batch's real tokens.
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)  # (B, T), (B, T)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)

        # 9. Update: epochs of freshly shuffled minibatches, one optimizer step for each.
        updates, approx_kls = [], []
        minibatches = [rows for _ in range(config.ppo_epochs)
                       for rows in torch.randperm(len(mask)).split(config.minibatch_size)]
        for rows in minibatches:
            m, old = mask[rows], old_logprobs[rows]
            with run.autocast():
                logits, new_values = response_logits(
                    policy, input_ids[rows], attention_mask[rows], tokens[rows], m, value)
            logprobs = token_logprobs(logits, tokens[rows], config.temperature)
            pg_loss, clip_fraction = policy_loss(logprobs, old, advantages[rows], m, config.clip)
            v_loss = value_loss(new_values, values[rows], returns[rows], m, config.value_clip)
            loss = pg_loss + config.value_coef * v_loss
            if config.entropy_coef:
                loss = loss - config.entropy_coef * masked_mean(token_entropy(logits, config.temperature), m)
            ratio = torch.where(m, logprobs.detach() - old, 0.0).exp()
            if not updates:
                warn_unless_one(ratio, iteration, run)
            approx_kl = masked_mean(kl_estimate(old, logprobs.detach(), "k3"), m).item()  # per token
            approx_kls.append(approx_kl)
            if updates and approx_kl > config.stop_kl:
                break
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(run.parameters, config.max_grad_norm)
            require_finite(loss.detach() + grad_norm, "the loss or its gradient", iteration, run)
            optimizer.step()
            updates.append({"policy_loss": pg_loss.item(), "value_loss": v_loss.item(),
                            "ratio": masked_mean(ratio, m).item(), "clip_fraction": clip_fraction.item(),
                            "grad_norm": grad_norm.item()})
        clock.append(time.perf_counter())

        seconds = [end - start for start, end in zip(clock, clock[1:])]
        metrics = {
            "iteration": iteration,
            "score": raw_scores.mean().item(),
            **({"gold": gold_scores.mean().item()} if run.gold else {}),
            "kl": sequence_kl.mean().item(),
            "objective": raw_scores.mean().item() - (beta * sequence_kl).mean().item() * float(std),
            "beta": beta.mean().item(),
            "entropy": entropy.item(),
            **{name: sum(update[name] for update in updates) / len(updates) for name in updates[0]},
            "approx_kl": sum(approx_kls) / len(approx_kls),
            "updates": len(updates),
            "explained_variance": 1 - ((returns - values)[mask].var(correction=0)
                                       / (returns[mask].var(correction=0) + 1e-8)).item(),
            "length": mask.sum(dim=1).float().mean().item(),
            "eos_fraction": ended.float().mean().item(),
            "distinct": len(set(responses)) / len(responses),
            **{f"seconds_{phase}": spent for phase, spent in zip(PHASES, seconds)},
            "episodes_per_second": len(mask) / sum(seconds),
        }
        run.beta = steer_beta(run, index, sequence_kl)  # the price of KL for the next iteration
        record(run, metrics)
        yield metrics


def steer_beta(run, index, sequence_kl):
    """The betas (N,) of the N prompts after an iteration whose B responses were to the prompts `index` (B,)
    and came to `sequence_kl` (B,) nats: one for the batch, or each by its own prompt's responses."""
    target, horizon = run.config.kl_target, run.config.kl_horizon
    if run.config.beta_control == "fixed":
        return run.beta
    if run.config.beta_control == "batch":
        return update_beta(run.beta, sequence_kl.mean().item(), target, horizon, len(index))
    n = torch.bincount(index, minlength=len(run.beta))  # (N,) responses to each prompt
    prompt_kl = torch.bincount(index, sequence_kl.double(), len(run.beta)) / n.clamp(min=1)  # (N,)
    return update_beta(run.beta, prompt_kl, target, horizon, n)


# ------------------------------------------------------------------------------------------------------------
# 11. The edge: checking input, loading models, checkpoints, tables, pictures, the command line
# ------------------------------------------------------------------------------------------------------------

CAN_CHANGE = ("save_every", "device", "out", "resume")  # the settings that a resumed run may change
WRITTEN = ("config.json", "metrics.jsonl", "checkpoint.pt", "reference", "preference", "policy",
           "value.safetensors", "samples.md", "learning_curves.png")  # what a run leaves in its folder
MAY_BE_OFF = ("missing_eos_score", "clip", "value_clip", "stop_kl", "max_grad_norm")  # inf
LIMITS = {  # what a setting must be -> the settings that must be it
    "at least 1": (lambda x: x >= 1, """preference_epochs iterations batch_size minibatch_size ppo_epochs
                                        max_new_tokens eval_samples save_every"""),
    "at least 2": (lambda x: x >= 2, "pairs"),
    "greater than 0": (lambda x: x > 0, """temperature kl_target kl_horizon clip value_clip stop_kl
                                           max_grad_norm adam_epsilon"""),
    "0 or more": (lambda x: x >= 0, """beta value_coef entropy_coef learning_rate preference_learning_rate
                                       seed"""),
    "below 2**63": (lambda x: x < 2**63, "seed"),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "gamma lam"),
}


def check_config(config):
    """Return a copy of `config` with its defaults filled in, or raise ValueError in one sentence."""
    for name, kind in typing.get_type_hints(Config).items():
        value, choices = getattr(config, name), typing.get_args(kind) or (kind,)
        if typing.get_origin(kind) is Literal:
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        elif type(value) not in choices and not (type(value) is int and float in choices):
            raise ValueError(f"{name} must be {' or '.join(one.__name__ for one in choices)}, got {value!r}")
        elif isinstance(value, float) and not (math.isfinite(value) or (name in MAY_BE_OFF and value > 0)):
            raise ValueError(f"{name} must be a finite number, got {value}")
    for need, (holds, names) in LIMITS.items():
        for name in names.split():
            if getattr(config, name) is not None and not holds(getattr(config, name)):
                raise ValueError(f"{name} must be {need}, got {getattr(config, name)}")
    if config.minibatch_size > config.batch_size:
        raise ValueError(f"minibatch_size {config.minibatch_size} is larger than batch_size "
                         f"{config.batch_size}")
    if config.batch_size == 1 and config.whiten_scores:
        raise ValueError("batch_size must be at least 2 to whiten scores")
    if config.beta == 0 and config.beta_control != "fixed":
        raise ValueError("beta must be greater than 0 if beta_control is to steer it")
    if config.template.count("{prompt}") != 1 or re.search("[{}]", config.template.replace("{prompt}", "")):
        raise ValueError(f"template must hold {{prompt}} once and no other brace, got {config.template!r}")
    held = [name for name in WRITTEN if config.out and os.path.exists(f"{config.out}/{name}")]
    if held and not same_folder(config.out, config.resume):
        raise ValueError(f"out: name another folder, for {config.out} already holds " + (
            f"a run; to go on with it: --resume {config.out}" if "config.json" in held else held[0]))
    tiny = config.prompts == Config().prompts
    return dataclasses.replace(
        config,
        eval_prompts=config.eval_prompts or ("tiny_models/heldout_prompts.txt" if tiny else None),
        gold=config.gold or ("tiny_models.world:gold_scores" if tiny else None),
        kl_horizon=config.kl_horizon or (20.0 if config.beta_control == "prompt" else 500.0),
    )


def fingerprint(prompts):
    """A number that changes with the prompts."""
    return zlib.crc32("\n".join(prompts).encode())


def same_folder(a, b):
    """Whether two paths, each of which may be None, name the same folder."""
    return None not in (a, b) and pathlib.Path(a).resolve() == pathlib.Path(b).resolve()


def read_lines(path, name):
    """The lines of a UTF-8 text file. Raises ValueError that names the file, and a line that is blank."""
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {path}: {error.strerror}") from error
    try:
        lines = [line.rstrip("\r") for line in data.decode("utf-8-sig").rstrip("\r\n").split("\n")]
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise ValueError(f"{name} {path}, line {line}: not UTF-8 text") from error
    if lines == [""]:
        raise ValueError(f"{name} {path} is empty")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(f"{name} {path}, line {number} is blank")
    return lines


def read_prompts(path, name="prompts"):
    """Prompts of a file: one a line, or JSON lines with a "prompt". Raises ValueError that names the file and
    the line."""
    lines = read_lines(path, name)
    if not (str(path).endswith(".jsonl") or lines[0].startswith("{")):
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(json.loads(line)["prompt"])
            blank = not prompts[-1].strip().encode()  # half a surrogate pair raises ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            blank = True
        if blank:
            raise ValueError(f'{name} {path}, line {number}: not a JSON object with a "prompt" that is text')
    return prompts


def load_tokenizer(path, name):
    """The tokenizer in a folder or on the hub. Raises ValueError in one sentence."""
    first = path.split("/")[0]
    if not os.path.isdir(path) and (os.path.exists(first or "/") or first in (".", "..", "~")):
        raise ValueError(f"{name}: there is no folder {path}")
    with trying(f"{name}: cannot load a tokenizer from {path}"):
        return AutoTokenizer.from_pretrained(path, local_files_only=os.path.isdir(path),
                                             trust_remote_code=False)


def load(kind, path, name, device, dtype=torch.float32):
    """A model in eval mode and its tokenizer, from a folder or the hub. Raises ValueError.

    Weights come from safetensors only, nothing pickled is read, and no code of the model folder is run.
    """
    tokenizer = load_tokenizer(path, name)
    index = pathlib.Path(path, "model.safetensors.index.json")
    with trying(f"{name}: cannot load a model from {path}"):
        parts = json.loads(index.read_text())["weight_map"].values() if index.exists() else []
        if not all(part.endswith(".safetensors") for part in parts):  # transformers would read a pickle
            raise ValueError("its index names files other than safetensors")
        model, info = kind.from_pretrained(path, local_files_only=os.path.isdir(path), dtype=dtype,
                                           trust_remote_code=False, use_safetensors=True,
                                           output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{name}: the weights in {path} lack {min(info['missing_keys'])}")
    check_fit(model, tokenizer, f"{name} {path}")
    return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def trying(what):
    """Turn whatever other people's code raises into a ValueError that says what was tried."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {first_line(error)}") from error


def first_line(error):
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), repr(error))


def check_fit(model, tokenizer, name):
    """Raise ValueError if the tokenizer can write an id for which the model has no embedding."""
    unused = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id, tokenizer.eos_token_id}  # PAD, say
    used = set(tokenizer.get_vocab().values()) - unused
    with trying(f"{name}: a {type(model).__name__} cannot be used"):
        rows, top = model.get_input_embeddings().num_embeddings, max(used)
    if top >= rows:
        raise ValueError(f"{name}: the tokenizer does not fit the model: it writes ids up to {top}, the "
                         f"embedding has {rows} rows")


def context_of(model):
    """How many tokens a model can read."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1
    return limit if limit > 0 else math.inf


def require_room(model, ids, name):
    """Raise ValueError if ids (N, L) are longer than the model's context."""
    if ids.shape[1] > context_of(model):
        raise ValueError(f"{name}: a text of {ids.shape[1]} tokens is longer than the model's context, "
                         f"{context_of(model)}")


def load_preference(config, device):
    """The preference model that config.preference names. Raises ValueError if it has more than one output."""
    model, tokenizer = load(AutoModelForSequenceClassification, config.preference, "preference", device)
    if model.config.num_labels != 1:
        raise ValueError(f"preference: {config.preference} has {model.config.num_labels} outputs, "
                         "needs exactly one")
    return PreferenceModel(model, tokenizer, config.template)


def load_judge(config, run):
    """The judge that config.judge names, its tokenizer and the constitution. Raises ValueError if it cannot
    be asked."""
    model, tokenizer = load(AutoModelForCausalLM, config.judge, "judge", run.device)
    principles = read_lines(config.constitution, "constitution") if config.constitution else CONSTITUTION
    question = JUDGE_QUESTION.format(
        principle=max(principles, key=len), prompt=max(run.prompts, key=len), a="", b="")
    with trying("judge: cannot be asked"):
        finite = ask_judge(model, tokenizer, [question]).isfinite()
        same = same_when_padded(model, tokenize(tokenizer, [question])[0])
    if not finite or not same:
        raise ValueError(f"judge: {'padding moves its logits' if finite else 'its answer is not finite'}")
    return model, tokenizer, principles


def load_function(path, name):
    """The function that "module:function" names. Raises ValueError if it cannot be imported."""
    sys.path.insert(0, os.getcwd())
    try:
        with trying(f"{name}: cannot import {path!r} as module:function"):
            module, function = path.split(":")
            found = getattr(importlib.import_module(module), function)
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ValueError(f"{name}: {path!r} is not a function")
    return found


def pick_device(name):
    """The torch device of that name; "auto" is the first of cuda, mps and cpu that is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with trying(f"device: {name!r} cannot be used"):
        there = torch.zeros(1, device=name)
        there.cpu()  # "meta" is a device from which nothing comes back
        return there.device


def warn_unless_one(ratio, iteration, run):
    """Warn, loudly, if the ratio (B, T) is not 1 before an iteration's first step."""
    worst = (ratio - 1).abs().max()
    if worst > (1e-4 if run.config.dtype == "float32" else 0.05):
        warnings.warn(f"iteration {iteration}: the ratio is off 1 by {worst:.5f} before the first step: the "
                      "policy that is updated is not the one that sampled", stacklevel=3)


def require_finite(x, what, iteration, run):
    """Raise FloatingPointError, naming iteration and last good checkpoint, if x is not finite."""
    if not torch.isfinite(x).all():
        kept = f"the checkpoint in {run.out} is good" if run.saved else "there is no checkpoint yet"
        raise FloatingPointError(f"iteration {iteration}: {what} is not finite; {kept}")


def scorer(function, name, run):
    """Wrap a callable from (prompts, responses) to floats: -> (B,) float32 on the run's device, checked."""
    def call(prompts, responses, ended, iteration):
        if isinstance(function, PreferenceModel):
            with run.autocast():
                given = function(prompts, responses, ended)
        else:
            given = function(list(prompts), list(responses))
        try:
            scores = torch.as_tensor(given, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):  # no numbers at all
            scores = torch.empty(0)
        if scores.shape != (len(prompts),):
            raise ValueError(f"iteration {iteration}: {name} must give one number for each of {len(prompts)} "
                             f"responses, gave shape {tuple(scores.shape)}")
        require_finite(scores, f"a number that {name} gave", iteration, run)
        return scores.to(run.device)
    return call


def prepare(config, score=None, gold=None, policy=None, tokenizer=None):
    """Check and load everything, then, with `out`, begin the run's folder -> what the loop needs:

    config, device, autocast, out (a path or None); policy, reference, tokenizer, value (ValueFunction);
    prompts (N str), held (the held-out ones); score, gold (or None), called with (prompts, responses, ended,
    iteration), and fluent (or None); ignore_missing_eos; beta (N,), float64 on the CPU; parameters and
    optimizer; iteration, the last one done, and saved, whether there is a checkpoint. Raises ValueError,
    before anything is written, for a setting or a file that cannot be used.
    """
    config = check_config(config)
    run = types.SimpleNamespace(config=config, device=pick_device(config.device), iteration=0, saved=False,
                                out=pathlib.Path(config.out) if config.out else None)
    half = config.dtype == "bfloat16"
    run.autocast = lambda: torch.autocast(run.device.type, torch.bfloat16, half)  # one entered twice stays on
    passed = policy is not None
    if passed:
        policy, tokenizer = policy.to(run.device).eval(), tokenizer or load_tokenizer(config.policy, "policy")
        check_fit(policy, tokenizer, "policy")
    else:
        policy, tokenizer = load(AutoModelForCausalLM, config.policy, "policy", run.device)
    run.policy, run.tokenizer = policy, tokenizer
    run.prompts, run.held = load_prompts(config, policy, tokenizer)
    try_out(run)
    run.ignore_missing_eos = math.isinf(config.missing_eos_score) or not eos_ids(policy, tokenizer)

    def kept(name):  # a folder that an earlier part of this run has left
        path = f"{config.resume}/{name}"
        return path if config.resume and os.path.isdir(path) else None
    if reference := config.reference or kept("reference"):
        run.reference = load(AutoModelForCausalLM, reference, "reference", run.device, policy.dtype)[0]
        if passed and kept("reference"):  # a policy passed again may have been trained since
            policy.load_state_dict(run.reference.state_dict())
    else:
        run.reference = copy.deepcopy(policy).eval()
    of_reference, of_policy = (model.config.get_text_config() for model in (run.reference, policy))
    if of_reference.vocab_size != of_policy.vocab_size:
        raise ValueError("reference: its vocabulary is not the policy's")
    if context_of(run.reference) < context_of(policy):
        raise ValueError("reference: its context is shorter than the policy's")
    run.reference.requires_grad_(False)

    judge = None
    if score is None and config.judge and not kept("preference"):
        judge = load_judge(config, run)
        with trying(f"judge: no preference model can start from a {type(policy).__name__}"):
            new_preference_model(policy, tokenizer, config.template)
    elif score is None:
        ready = kept("preference") if config.judge else config.preference
        score = load_preference(dataclasses.replace(config, preference=ready), run.device)
    if config.value == "preference" and not judge and not (
            isinstance(score, PreferenceModel) and hasattr(score.model, "score")
            and score.tokenizer.get_vocab() == tokenizer.get_vocab()):
        raise ValueError("value: 'preference' needs a preference model that reads from left to right, with "
                         "the policy's own tokenizer")
    gold = gold or (config.gold and load_function(config.gold, "gold"))
    run.gold = scorer(gold, "gold", run) if gold else None
    run.fluent = getattr(sys.modules.get(getattr(gold, "__module__", None)), "is_fluent", None)
    run.beta = torch.full((len(run.prompts),), float(config.beta), dtype=torch.float64)
    if config.beta_control != "fixed":  # raises ValueError now if an update could turn beta negative later
        n = config.batch_size if config.beta_control == "batch" else -(-config.batch_size // len(run.prompts))
        update_beta(config.beta, 0.0, config.kl_target, config.kl_horizon, n)

    if run.out:
        run.out.mkdir(parents=True, exist_ok=True)
        if config.resume and not same_folder(run.out, config.resume):
            for name in filter(kept, ("reference", "preference")):
                shutil.copytree(kept(name), run.out / name)
            for name in ("checkpoint.pt", "metrics.jsonl"):
                if os.path.exists(f"{config.resume}/{name}"):
                    shutil.copy(f"{config.resume}/{name}", run.out / name)
        write(run.out / "config.json", json.dumps(dataclasses.asdict(config), indent=2))
        if passed and not config.resume and not config.reference:  # nothing else tells how it started
            save_model(run.reference, tokenizer, run.out / "reference")
    if judge:
        torch.manual_seed(config.seed)
        with run.autocast():
            score, report = preference_from_judge(config, policy, tokenizer, *judge, run.prompts)
        tqdm.write(f"preference model: on held-out pairs it agrees with the judge, where that is sure, in "
                   f"{report['accuracy']:.1%}; loss {report['loss']:.3f}, in training "
                   f"{report['train_loss']:.3f}, entropy of the labels {report['floor']:.3f}")
        if run.out:
            save_model(score.model, score.tokenizer, run.out / "preference")

    torch.manual_seed(config.seed)
    trunk = {"shared": None, "separate": policy, "preference": getattr(score, "model", None)}[config.value]
    trunk = trunk and copy.deepcopy(trunk.base_model)
    run.value = ValueFunction((trunk or policy).config.get_text_config().hidden_size, trunk,
                              config.value_head)
    run.value.to(run.device, policy.dtype).eval().requires_grad_(True)
    run.score = scorer(score, "score", run)
    run.parameters = [p for p in [*policy.parameters(), *run.value.parameters()] if p.requires_grad]
    run.optimizer = torch.optim.Adam(run.parameters, lr=config.learning_rate, eps=config.adam_epsilon,
                                     fused=True)
    return run


@torch.no_grad()
def try_out(run):
    """Raise ValueError if the policy's architecture cannot do what the loop asks of it."""
    policy, config = run.policy, dataclasses.replace(run.config, max_new_tokens=2, temperature=0.0)
    trunk = policy.base_model if config.value == "separate" else None
    with trying(f"policy: a {type(policy).__name__} cannot be used"):
        value = ValueFunction(policy.config.get_text_config().hidden_size, trunk)
        *inputs, _, _ = respond(policy, run.tokenizer, run.prompts[:2], config)
        logits, values = response_logits(policy, *inputs, value.to(policy.device, policy.dtype))
        finite = (values + token_logprobs(logits, inputs[2])).isfinite().all()
        same = same_when_padded(policy, tokenize(run.tokenizer, run.prompts[:1])[0])
    if not finite or not same:
        raise ValueError(f"policy: {'padding moves its logits' if finite else 'its weights are not finite'}")


@torch.no_grad()
def same_when_padded(model, row):
    """Whether the logits after the first half of a row of token ids stay what they are beside the whole."""
    half = row[:-(len(row) // 2)] or row
    ids, mask = pad([half, row], "left", model.device)
    alone = model(input_ids=ids[:1, -len(half):], attention_mask=mask[:1, -len(half):]).logits[0, -1]
    beside = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[0, -1]
    return (alone - beside).abs().max() < (0.01 if model.dtype == torch.float32 else 0.5)


def load_prompts(config, policy, tokenizer):
    """The prompts to train on and the held-out ones: without eval_prompts every tenth is held out; of fewer
    than ten none is, and those of training stand in.

    Raises ValueError if a prompt cannot be written by the tokenizer or leaves no room in the context for a
    response.
    """
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, None}
    read = {}
    for name in ("prompts", "eval_prompts"):
        if path := getattr(config, name):
            read[name] = read_prompts(path, name)
            texts = [config.template.format(prompt=prompt) for prompt in read[name]]
            for number, ids in enumerate(tokenize(tokenizer, texts), start=1):
                if not ids or unknown & set(ids):
                    raise ValueError(f"{name} {path}, line {number}: the policy's tokenizer cannot write it")
                if len(ids) + config.max_new_tokens > context_of(policy):
                    raise ValueError(f"{name} {path}, line {number}: {len(ids)} tokens of prompt and "
                                     f"{config.max_new_tokens} of response are longer than the policy's "
                                     f"context, {context_of(policy)}")
    prompts = read["prompts"]
    if "eval_prompts" in read:
        return prompts, read["eval_prompts"]
    return [prompt for i, prompt in enumerate(prompts) if i % 10 != 9], prompts[9::10] or prompts


def save_model(model, tokenizer, folder):
    """Write an ordinary Hugging Face folder: beside its place, then renamed, so it is whole or absent."""
    beside = folder.with_name(folder.name + ".new")
    with writing(folder):
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(beside, folder)


@contextlib.contextmanager
def writing(path):
    """Turn what torch and safetensors raise on a full disk into an OSError that names the path."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"cannot write {path}, is the disk full? {first_line(error)}") from error


def write(path, content):
    """Write a file beside its place and rename it, so that a crash leaves the old one: text, or an object for
    torch.save."""
    beside = path.with_name(path.name + ".new")
    try:
        with writing(path):
            if isinstance(content, str):
                beside.write_text(content, encoding="utf-8")
            else:
                torch.save(content, beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def record(run, metrics):
    """Append an iteration's metrics to metrics.jsonl; every `save_every` iterations and at the end, write a
    checkpoint; at the end, the policy too."""
    run.iteration = metrics["iteration"]
    if not run.out:
        return
    with open(run.out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")
    if run.iteration % run.config.save_every == 0 or run.iteration == run.config.iterations:
        on_cpu = run.device.type == "cpu"
        write(run.out / "checkpoint.pt", {
            "iteration": run.iteration, "policy": run.policy.state_dict(), "value": run.value.state_dict(),
            "optimizer": run.optimizer.state_dict(), "beta": run.beta,
            "prompts": fingerprint(run.prompts), "rng": torch.get_rng_state(),
            "device_rng": None if on_cpu else torch.get_device_module(run.device).get_rng_state(),
        })
        run.saved = True
    if run.iteration == run.config.iterations:
        export(run)


def export(run):
    """Write the trained policy as an ordinary Hugging Face folder, and the value function beside it."""
    save_model(run.policy, run.tokenizer, run.out / "policy")
    with writing(run.out / "value.safetensors"):
        save_file(run.value.state_dict(), run.out / "value.safetensors")


def resumed(config, given=None):
    """The settings of the run in config.resume. Raises ValueError if it holds none, or if other settings are
    `given`, a dict of fields (default: those of `config` that are not at their defaults)."""
    path = pathlib.Path(config.resume) / "config.json"
    try:
        saved = Config(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"resume: {path} is not the config of a run: {error}") from error
    if given is None:
        given = {name: value for name, value in vars(config).items() if value != getattr(Config(), name)}
    changed = [f"{name} (was {getattr(saved, name)!r}, now {value!r})" for name, value in given.items()
               if name not in CAN_CHANGE and value != getattr(saved, name)]
    if changed:
        raise ValueError(f"resume: these settings changed and may not: {', '.join(changed)}")
    kept = {name: value for name, value in given.items() if name in CAN_CHANGE}
    return dataclasses.replace(saved, **{"out": config.resume, **kept})


def restore(run):
    """Put a resumed run back where its checkpoint was written, or at its start if there is none yet, and drop
    the lines of metrics.jsonl that came after it. Raises ValueError if the checkpoint cannot be read."""
    if not run.config.resume:
        return
    source, lines = pathlib.Path(run.config.resume), []
    checkpoint = source / "checkpoint.pt"
    if checkpoint.exists():
        with trying(f"resume: cannot read {checkpoint}"):
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            run.policy.load_state_dict(state["policy"])
            run.value.load_state_dict(state["value"])
            run.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            if state["device_rng"] is not None and run.device.type != "cpu":
                torch.get_device_module(run.device).set_rng_state(state["device_rng"])
            run.iteration, run.beta = state["iteration"], state["beta"]
            same = state["prompts"] == fingerprint(run.prompts)
        if not same:
            raise ValueError(f"resume: {run.config.prompts} is not what it was")
        run.saved = True
        lines = (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    write(run.out / "metrics.jsonl", "".join(lines[:run.iteration]))
    if run.iteration == run.config.iterations:
        export(run)


@torch.no_grad()
def evaluate(run, prompts=None):
    """Sample `eval_samples` replies to each of N prompts (default: the held-out ones), without touching the
    run's random numbers.

    -> (dict of means: score, gold, fluency, kl in nats, entropy in nats per token, length, eos_fraction; list
    of rows, one a reply: prompt, response, score, gold, kl). Gold is there only if the run has one, fluency
    if the module of its function has an `is_fluent(response)` too.
    """
    prompts = (prompts or run.held) * run.config.eval_samples
    devices = [] if run.device.type == "cpu" else [run.device.index or 0]
    sums, rows = {}, []
    with torch.random.fork_rng(devices, device_type=run.device.type), run.autocast():
        torch.manual_seed(run.config.seed)
        for start in range(0, len(prompts), 256):
            batch = prompts[start:start + 256]
            *inputs, responses, ended = respond(run.policy, run.tokenizer, batch, run.config)
            tokens, mask = inputs[2:]
            logits, ref_logits = (response_logits(model, *inputs)[0] for model in (run.policy, run.reference))
            logprobs, ref_logprobs = (token_logprobs(each, tokens, run.config.temperature)
                                      for each in (logits, ref_logits))
            found = {"score": run.score(batch, responses, ended, run.iteration)}
            if run.gold:
                found["gold"] = run.gold(batch, responses, ended, run.iteration)
            if run.fluent:
                found["fluency"] = torch.tensor([float(run.fluent(response)) for response in responses])
            found["kl"] = torch.where(mask, logprobs - ref_logprobs, 0.0).sum(dim=1)
            entropy = token_entropy(logits, run.config.temperature)
            found["entropy"] = torch.where(mask, entropy, 0.0).sum(dim=1)
            found["length"], found["eos_fraction"] = mask.sum(dim=1), ended.float()
            sums = {name: sums.get(name, 0.0) + x.sum().item() for name, x in found.items()}
            columns = [found[name].tolist() if name in found else [None] * len(batch)
                       for name in ("score", "gold", "kl")]
            rows += zip(batch, responses, *columns)
    means = {name: total / len(prompts) for name, total in sums.items()}
    return {**means, "entropy": sums["entropy"] / sums["length"]}, rows


def samples_table(before, after):
    """A Markdown table with the first reply to each held-out prompt before and after training, and their
    scores."""
    def text(words):
        return " ".join(words.split()).replace("|", "\\|")

    def cells(row):
        return f"{text(row[1])} | {row[2]:.2f} | {'' if row[3] is None else f'{row[3]:g}'}"
    lines = ["| prompt | before | score | gold | after | score | gold |", "|---|---|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {text(a[0])} | {cells(a)} | {cells(b)} |" for a, b in zip(before, after)])


def draw_history(history, path=None):
    """Draw learning curves from a list of metrics: score and gold over iterations and over the root of the
    KL; KL; entropy and beta. Returns the matplotlib figure, saved to `path` if there is one. Raises
    ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the learning curves need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    steps, root_kl = [m["iteration"] for m in history], [math.sqrt(max(m["kl"], 0)) for m in history]
    panels = [("iteration", steps, ("score", "gold")),
              ("square root of the KL to the reference", root_kl, ("score", "gold")),
              ("iteration", steps, ("kl",)),
              ("iteration", steps, ("entropy", "beta"))]
    looks = {"score": ("proxy: the preference model's score", "tab:blue"),
             "gold": ("gold: the truth", "tab:orange"), "beta": ("beta", "tab:purple"),
             "kl": ("KL to the reference, nats per response", "tab:green"),
             "entropy": ("entropy, nats per token", "tab:red")}
    for axis, (label, x, names) in zip(figure.subplots(2, 2).flat, panels):
        for name in [name for name in names if name in history[0]]:
            axis.plot(x, [m[name] for m in history], "." if x is root_kl else "-", label=looks[name][0],
                      color=looks[name][1])
        axis.set(xlabel=label)
        axis.legend()
        axis.grid(alpha=0.3)
    if path:
        figure.savefig(path, dpi=80)
    return figure


def where_the_time_went(run, history):
    """One line: the seconds of each phase, episodes per second, and how near the updates came to the rate of
    a large matrix product. A training pass counts as three forward ones."""
    config = run.config
    spent = {phase: sum(metrics[f"seconds_{phase}"] for metrics in history) for phase in PHASES}
    total = sum(spent.values())
    square = torch.randn(1024, 1024, device=run.device, dtype=getattr(torch, config.dtype))
    product = torch.utils.benchmark.Timer("square @ square", globals={"square": square},
                                          num_threads=torch.get_num_threads()).blocked_autorange()
    prompts = [run.prompts[i] for i in balanced_draw(len(run.prompts), config.batch_size)]
    inputs = respond(run.policy, run.tokenizer, prompts, config)[:4]
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        response_logits(run.policy, *inputs, run.value)
    epochs = sum(metrics["updates"] for metrics in history) * config.minibatch_size / config.batch_size
    rate = 3 * epochs * forward.get_total_flops() / spent["update"]
    return ("where the time went: "
            + ", ".join(f"{phase} {spent[phase]:.1f} s ({spent[phase] / total:.0%})" for phase in PHASES)
            + f"; {config.batch_size * len(history) / total:.0f} episodes per second; updates at "
            f"{rate * product.median / (2 * 1024 ** 3):.0%} of the rate of a matrix product")


def parse(argv):
    """The command line as a Config, with the settings of the resumed run where one is named."""
    def complain(message):
        raise ValueError(message)
    parser = HfArgumentParser(Config, description=Config.__doc__)
    parser.error = complain
    config = parser.parse_args_into_dataclasses(argv)[0]
    config.template = config.template.replace("\\n", "\n")  # a shell passes the two characters
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # parsed again, this leaves what was really given
    given = {name: getattr(config, name) for name in vars(parser.parse_args(argv))}
    return resumed(config, given) if config.resume else config


def main(argv=None):
    """The command line: train, then show what became of the policy. Returns the exit code: 0, 2 for bad input
    or settings, a file that cannot be written or a number that is not finite, 130 after Ctrl-C or SIGTERM."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: KeyboardInterrupt
    config = Config()
    try:
        config = parse(argv)
        config.out = config.out or f"runs/seed-{config.seed}"
        run_and_report(config)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        kept = isinstance(error, OSError) and os.path.exists(f"{config.out}/checkpoint.pt")
        print(f"\nrlaif: {first_line(error)}" + f"; the last checkpoint is in {config.out}" * kept,
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        begun = os.path.exists(f"{config.out}/config.json")
        print("\nrlaif: stopped" + f"; go on with: python rlaif.py --resume {config.out}" * begun,
              file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def run_and_report(config):
    """What the command line does: load, measure, train under a progress bar, measure again, write and print
    the report."""
    run = prepare(config)
    before, rows_before = evaluate(run)
    restore(run)
    history = []
    with tqdm(total=config.iterations, initial=run.iteration, desc="PPO", unit="iteration") as progress:
        for metrics in ppo(run):
            history.append(metrics)
            shown = {name: f"{metrics[name]:.2f}" for name in ("score", "gold", "kl") if name in metrics}
            progress.set_postfix(shown, **{"episodes/s": f"{metrics['episodes_per_second']:.0f}"})
            progress.update()
    after, rows_after = evaluate(run)

    summary = "\n".join(["| held-out prompts | before | after |", "|---|---|---|"]
                        + [f"| {name} | {before[name]:.3f} | {after[name]:.3f} |" for name in before])
    samples = samples_table(rows_before[:len(run.held)], rows_after[:len(run.held)])
    write(run.out / "samples.md", f"{samples}\n\n{summary}\n")
    print(f"\n{samples}\n\n{summary}\n")
    if history:
        print(where_the_time_went(run, history))
    history = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    try:
        draw_history(history, run.out / "learning_curves.png")
    except ImportError as error:
        print(error)
    print(f"everything is in {run.out}: " + ", ".join(sorted(path.name for path in run.out.iterdir())))


if __name__ == "__main__" and "__file__" in globals():  # pasted into a notebook cell, it starts nothing
    sys.exit(main())
