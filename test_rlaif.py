"""The mathematics of rlaif.py, as properties. Read the names from top to bottom and you have read the theory.

The order is the module's, section by section, so that code and proof can be read side by side. Oracles are
independent of the code under test: sums in O(T^2), enumeration of every response, autograd, float64,
torch.distributions, transformers' own generate. An assert that fails says what is probably wrong; one that
allows a difference says how large a mistake it lets through.

    pytest                       the fixed set of examples, the same on every run
    pytest -k gae                what proves one function, alone: empty its body, write it again, run this
    RLAIF_SEARCH=2000 pytest     that many random examples per property
"""

import builtins
import collections
import contextlib
import copy
import dataclasses
import dis
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import runpy
import shlex
import shutil
import signal
import statistics
import string
import subprocess
import sys
import types
import warnings

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          PreTrainedTokenizerFast, FalconConfig, FalconForCausalLM,
                          GPT2ForSequenceClassification, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig,
                          LlamaForCausalLM, MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM)

import rlaif
from rlaif import (dense_scores, gae, generate, kl_estimate, masked_mean, policy_loss, preference_loss,
                   shape_rewards, token_logprobs, update_beta, value_loss, whiten)
from tiny_models import world
from tiny_models.exact import (ALL_MASK, EOS, PREFIXES, PROMPTS, SEQUENCES, STATES, TEXTS,
                               enumerate_logprobs, exact_run, expected_gradient, flat_gradient, gpt2, letters,
                               objective_gradient, optimum, toy_config)

torch.set_num_threads(1)  # models this small gain nothing from more
quiet = {"deadline": None, "suppress_health_check": [
    HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]}
settings.register_profile("fixed", max_examples=50, derandomize=True, database=None, **quiet,
                          phases=set(Phase) - {Phase.explain})  # a failure is shown at once, without a search
settings.register_profile("search", max_examples=int(os.environ.get("RLAIF_SEARCH", "0")) or 1, **quiet)
settings.load_profile("search" if os.environ.get("RLAIF_SEARCH") else "fixed")

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
HERE = pathlib.Path(rlaif.__file__).parent


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device that is there: nothing passes for a device that did not run it."""
    return request.param


# What is drawn: batches of responses of different lengths, in float64 ---------------------------------------


@dataclasses.dataclass
class Batch:
    """B responses of up to T tokens, with random tensors to match, which are poisoned outside the mask."""
    lengths: list
    T: int
    seed: int
    device: str
    poison: float

    def __post_init__(self):
        self.random = torch.Generator().manual_seed(self.seed)
        self.B, self.n = len(self.lengths), sum(self.lengths)
        self.mask = (torch.arange(self.T) < torch.tensor(self.lengths)[:, None]).to(self.device)
        self.real = [(b, t) for b, length in enumerate(self.lengths) for t in range(length)]

    def draw(self, *shape, scale=1.0):
        x = scale * torch.randn(shape or (self.B, self.T), generator=self.random, dtype=torch.float64)
        return x.to(self.device) if shape else torch.where(self.mask, x.to(self.device), self.poison)

    def table(self, of):
        """The tensor with of(b, t) at the real tokens, and 0 elsewhere."""
        x = torch.zeros(self.B, self.T, dtype=torch.float64)
        for b, t in self.real:
            x[b, t] = of(b, t)
        return x


@st.composite
def batches(draw, shortest=0):
    lengths = draw(st.lists(st.integers(shortest, 8), min_size=1, max_size=5).filter(any))
    poison = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))
    return Batch(lengths, max(lengths) + draw(st.integers(0, 3)), draw(seeds), draw(devices), poison)


unit, seeds, devices = st.floats(0, 1), st.integers(0, 2**31), st.sampled_from(DEVICES)


def close(a, b, why, atol=1e-10):
    """Assert that two tensors agree, to the rounding of float64 unless `atol` allows more, and say why."""
    a, b = (torch.as_tensor(x, dtype=torch.float64, device="cpu").detach() for x in (a, b))
    agree = torch.allclose(a, b.expand_as(a), rtol=1e-10, atol=atol)
    assert agree, f"{why}: off by {(a - b).abs().max().item():.3g}"


FLOAT32 = 1e-4  # the rounding of a model's pass; what random models say of two tokens differs by 0.1 and more


@contextlib.contextmanager
def nowhere():
    """The default device holds no data: a tensor that is not made where its inputs are cannot be used."""
    def pad_on_the_cpu(*args, pad=rlaif.pad, **more):  # it moves what it makes to the model
        with torch.device("cpu"):
            return pad(*args, **more)
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(rlaif, "pad", pad_on_the_cpu)
        yield


# Tiny models made on the spot (`gpt2` and `letters` come from tiny_models/exact.py) -------------------------


def modern(config_class, model_class, seed=0, **settings):
    """A model of another architecture, as small as `gpt2` is."""
    torch.manual_seed(seed)
    small = {"vocab_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 16, "initializer_range": 0.2,
             "bos_token_id": None, "eos_token_id": 3, "pad_token_id": None}
    if config_class in (LlamaConfig, Qwen2Config):
        small["num_key_value_heads"] = 1
    return model_class(config_class(**{**small, **settings})).eval()


def opt(**settings):
    return modern(OPTConfig, OPTForCausalLM, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2, dropout=0.0,
                  **settings)


ARCHITECTURES = {
    "GPT-2": gpt2,
    "Llama": lambda **s: modern(LlamaConfig, LlamaForCausalLM, **s),
    "Qwen2": lambda **s: modern(Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True, **s),
    "GPT-NeoX": lambda **s: modern(GPTNeoXConfig, GPTNeoXForCausalLM, **s),
    # Without an attention mask these two see padding; the others guess it from the position ids.
    "OPT": opt,
    "Falcon": lambda **s: modern(FalconConfig, FalconForCausalLM, alibi=True, new_decoder_architecture=False,
                                 hidden_dropout=0.0, attention_dropout=0.0, **s),
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def bpe(words, adds="$A", normalizer=None, **special):
    """A tokenizer with these words, merged letter by letter; `adds` says what it puts around a text."""
    ids = {word: i for i, word in enumerate(words)}
    merges = [(word[:-1], word[-1]) for word in words if len(word) > 1 and word[0] != "<"]
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.decoder = decoders.Fuse()
    if normalizer:
        tokenizer.normalizer = normalizer
    ends = [(word, i) for word, i in ids.items() if word[0] == "<" and len(word) > 1]
    tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=ends)
    others = [word for word, _ in ends if word not in special.values()]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=others, **special)


POLICY_WORDS = ["<pad>", "!", "a", "b", "c", "q", ":", " ", "ab", "abc", " c", "<bos>", "<eos>"]
SCORED_WORDS = ["<end>", "A", "B", "C", "Q", "!", ":", " ", "\n", "c", "b", "a", "q", "ba", "a ", "<start>"]


def uneven_world(folder=None, own_tokens=False, **settings):
    """A world in which no two things are equal that the code must keep apart -> a namespace.

    tokenizers  The policy's lower-cases, drops line ends, adds a BOS and has tokens of several letters: a
                text goes back to other ids than those sampled, and is shorter than its template. The
                preference model's has other ids, keeps case, and adds a BOS and an EOS, whose id is 0 (with
                own_tokens it is the policy's, as `dense_reward` and value "preference" need).
    ends        A reply ends with the tokenizer's <eos> or, by the generation config, with "!", which is text.
                The preference model's PAD is "c", with which replies may end.
    models      Policy, reference and preference model differ in weights, width and context; none is tied.
    data        Prompts are of different lengths and unlike their two templates; the held-out ones are others.
    settings    None is a default or equals another that it could be taken for; the minibatch does not divide
                the batch, nor the micro-batch the minibatch, nor save_every the iterations.

    `prepare(**changes)`, which needs a folder, gives a Run whose price has moved since its start.
    """
    w = types.SimpleNamespace(prompts=["Ab", "c a", "bcab C"], held_out=["Ba", "aa c b"])
    w.read = [["<bos>", *words.split("|")] for words in (  # by the policy; the template's \n is dropped
        "q|:| |ab|a|:", "q|:| c| |a|a|:", "q|:| |b|c|ab| c|a|:")]
    lower = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("\n", "")])
    w.tokenizer = bpe(POLICY_WORDS, "<bos> $A", lower, eos_token="<eos>", pad_token="<pad>")
    w.policy = gpt2(13, seed=14, context=48, tie_word_embeddings=False)
    w.policy.generation_config.eos_token_id = POLICY_WORDS.index("!")
    w.reference = gpt2(13, seed=2, context=64, n_embd=24, tie_word_embeddings=False)
    own = bpe(SCORED_WORDS, "<start> $A <end>", eos_token="<end>")
    scorer = gpt2(16, seed=3, kind=GPT2ForSequenceClassification, context=80, n_embd=40, num_labels=1,
                  pad_token_id=SCORED_WORDS.index("c"))
    w.preference = rlaif.PreferenceModel(scorer, w.tokenizer if own_tokens else own, "B{prompt}: ")
    if folder:
        settings.setdefault("reference", save_pair(folder / "reference", w.reference, w.tokenizer))
        for name, lines in (("prompts", w.prompts), ("eval_prompts", w.held_out)):
            (folder / f"{name}.txt").write_text("\n".join(lines))
            settings.setdefault(name, str(folder / f"{name}.txt"))
    w.config = rlaif.Config(**{
        "template": "Q: {prompt}\nA:", "pairs": 34, "preference_epochs": 2, "preference_learning_rate": 4e-3,
        "iterations": 5, "batch_size": 8, "minibatch_size": 3, "micro_batch_size": 2, "ppo_epochs": 2,
        "max_new_tokens": 6, "temperature": 0.8, "beta": 0.37, "kl_target": 0.9, "kl_horizon": 71.0,
        "missing_eos_score": -1.7, "value": "separate", "value_head": "random", "gamma": 0.93, "lam": 0.81,
        "clip": 0.13, "value_clip": 0.29, "value_coef": 0.17, "entropy_coef": 0.019, "stop_kl": 9.0,
        "learning_rate": 3e-3, "adam_epsilon": 2e-5, "max_grad_norm": 0.6, "seed": 3, "device": "cpu",
        "eval_samples": 3, "save_every": 2, **settings})
    w.policy.to(w.config.device), scorer.to(w.config.device)

    def prepare(**changes):
        config = dataclasses.replace(w.config, **changes)
        run = rlaif.prepare(config, w.preference, count_a, w.policy, w.tokenizer)
        run.beta *= 1.4
        return run
    w.prepare = prepare
    return w


def save_pair(folder, model, tokenizer):
    """Write an ordinary model folder -> its path."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ALPHABET = sorted(set("".join(rlaif.CONSTITUTION) + rlaif.JUDGE_QUESTION + "AB()abcdefgh\n<|>usertinxX"))


def count_a(prompts, responses):
    """A score that a test can work out in its head."""
    return [float(response.count("a")) + 0.1 * len(response) for response in responses]


# 1. AI feedback ---------------------------------------------------------------------------------------------

CHAT = ("<bos>{% for m in messages %}|{{ m.role }}|{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}|tutti|{% endif %}")
# A question, what a judge has read when it answers, token by token, and the first tokens in which its answers
# differ. Its tokenizer merges ": " and " A", but not " B".
ASKED = {"ab:": (["a", "b", ": "], "A", "B"), "cdefgh": ([*"cdefgh"], " A", " "), "cd": ([*"cd"], " A", " ")}
CHATTED = {question: ([*f"|user|{question}|tutti|"], "A", "B") for question in ASKED}
WORDS = [*ALPHABET, ": ", " A", "<bos>", "<eos>"]


@pytest.mark.parametrize("make,cases,template", [
    (lambda: gpt2(len(WORDS), context=64), ASKED, None),
    (lambda: opt(vocab_size=len(WORDS), max_position_embeddings=64), CHATTED, CHAT)])
def test_a_judge_answers_at_the_first_token_in_which_its_answers_differ(make, cases, template):
    judge, words, expected, held = make(), WORDS, [], []
    tokenizer = bpe(words, "<bos> $A <eos>", eos_token="<eos>", chat_template=template)
    for shared, a, b in cases.values():
        logits = judge(torch.tensor([[words.index(word) for word in ["<bos>", *shared]]])).logits[0, -1]
        held.append(logits.softmax(0)[[words.index(a), words.index(b)]].sum().item())
        expected.append(logits[[words.index(a), words.index(b)]].softmax(0)[0].item())
    with nowhere():
        logprobs = rlaif.ask_judge(judge, tokenizer, [*cases] * 100)  # more than one pass takes
    answers = logprobs.softmax(dim=1)[:, 0]
    assert not answers.requires_grad, "the judge's graph is kept"
    assert not judge.get_output_embeddings()._forward_hooks, "a hook is left on the judge"
    # Any two of these questions differ by 0.008 and more in their answers.
    close(answers.view(100, 3), [expected] * 100, "not the softmax over both answers, after what they share: "
          "BOS once, no EOS, padding unseen, in the order asked?", atol=1e-5)
    close(logprobs.exp().sum(dim=1).view(100, 3), [held] * 100, "not the probability of both", atol=1e-5)
    half = rlaif.ask_judge(judge.bfloat16(), tokenizer, [*cases]).softmax(dim=1)[:, 0]
    # bfloat16 moves these by up to 0.005; with the softmax in it too, nothing is left to round.
    close(half, expected, "a judge in half precision says something else", atol=0.02)
    assert (half != half.bfloat16()).any(), "in half precision the softmax must be taken in float32"
    for tokens, question in ((letters([x for x in ALPHABET if x not in "AB"]), "ab"), (tokenizer, "a" * 65)):
        with pytest.raises(ValueError):  # it writes both answers alike; it cannot read so far
            rlaif.ask_judge(judge, tokens, ["ab", question])


def test_judge_pairs_asks_every_principle_once_in_each_order_and_averages_all_answers(monkeypatch):
    """Against a judge that answers every question by two numbers drawn for it."""
    asked, answers, principles, draw = [], {}, ["kinder", "safer", "clearer"], random.Random(0)

    def ask_judge(judge, tokenizer, questions, *more, **even_more):
        assert (judge, tokenizer) == ("judge", "its tokenizer")
        asked.extend(questions)
        p, hold = torch.tensor([answers.setdefault(x, (draw.random(), draw.random())) for x in questions]).T
        return (torch.stack([p, 1 - p], dim=1) * hold[:, None]).log()
    monkeypatch.setattr(rlaif, "ask_judge", ask_judge)
    prompts, a, b = ([f"{side}{i} {{a}} " for i in range(5)] for side in ("q", " a", "b"))

    def labels(a, b, **more):
        return rlaif.judge_pairs("judge", "its tokenizer", principles, prompts, a, b, **more)

    def questions(first, second):
        return [f"{principle}\nUser: {x}\n(A) {one.strip()}\n(B) {other.strip()}\nThe better response is:"
                for x, one, other in zip(prompts, first, second) for principle in principles]
    worth = {}
    both = labels(a, b, worth=worth)
    assert sorted(asked) == sorted(questions(a, b) + questions(b, a)), (
        "each pair must be asked about once under each principle and in each order, without outer spaces")
    ab, ba = (f64(*(answers[text] for text in questions(*pair))).view(5, 3, 2) for pair in ((a, b), (b, a)))
    once, swapped = ab[..., 0], ba[..., 0]
    close(both, (once + 1 - swapped).mean(dim=1) / 2, "not the mean of the answers about its own pair, 1 - p "
          "in the second order", atol=1e-6)
    close(both + labels(b, a), torch.ones(5), "p(a, b) + p(b, a) is not 1", atol=1e-6)
    close(labels(a, b, both_orders=False), once.mean(dim=1), "one order is the first", atol=1e-6)
    first, hold = torch.stack([once, swapped]) > 0.5, torch.stack([ab, ba])[..., 1]
    close([worth["same"], worth["first"], worth["hold"]],
          [(first[0] != first[1]).double().mean(), first.double().mean(), hold.mean()], "other shares", 1e-6)


# 2. The preference model ------------------------------------------------------------------------------------

bce = torch.nn.functional.binary_cross_entropy_with_logits


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), unit), min_size=1, max_size=6),
       st.booleans(), devices)
def test_preference_loss_is_bradley_terry_on_soft_labels(rows, are_close, device):
    """From which follow: it is never below the labels' entropy, a shift of both scores changes nothing, nor
    does another order of the pair, with 1 - p."""
    a, b, p = torch.tensor(rows, dtype=torch.float64, device=device).T
    a, b = (x * (0.01 if are_close else 1.0) for x in (a, b))
    loss = preference_loss(a.requires_grad_(), b, p)
    close(loss, bce(a - b, p), "not the mean cross-entropy of sigma(a - b) with p: upside down, or lost far "
          "from 0, where log(sigmoid(x)) is?", atol=1e-8)
    (grad,) = torch.autograd.grad(loss, a)
    close(grad, (torch.sigmoid(a - b) - p) / len(rows), "the gradient is sigma(a - b) - p", atol=1e-8)
    for wide in ([0], [1], [2], [0, 1, 2]):  # a column, as transformers returns it, would be spread to (N, N)
        with pytest.raises(ValueError):
            preference_loss(*(x[:, None] if i in wide else x for i, x in enumerate((a, b, p))))


@pytest.mark.parametrize("kind", ["GPT2", "Bert", "ModernBertDecoder"])
def test_a_score_is_the_head_at_the_end_of_the_models_own_tokens_whatever_stands_beside_them(kind):
    w = uneven_world()
    prompts, responses, ended = w.prompts + ["A"], ["ab!", " c", "", "a c"], [True, False, True, False]
    if kind != "GPT2":  # no score head, but a pooling of their own; the last finds the end by its PAD
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=17, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=80, num_labels=1, initializer_range=0.5, pad_token_id=16)
        w.preference.model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    model, alone = w.preference.model, []
    for prompt, response, end in zip(prompts, responses, ended):
        ids = w.preference.tokenizer(f"B{prompt}: {response}", add_special_tokens=False).input_ids
        ids = [SCORED_WORDS.index("<start>"), *ids] + [SCORED_WORDS.index("<end>")] * end
        assert w.preference.tokenize([prompt], [response], [end]) == [ids], "template, BOS or EOS is wrong"
        alone.append((model.score(model.transformer(torch.tensor([ids])).last_hidden_state[:, -1])
                      if kind == "GPT2" else model(torch.tensor([ids])).logits).item())
    with nowhere():
        scores = w.preference(prompts * 80, responses * 80, ended * 80)  # more than one pass takes
    # Any two of these four scores lie 0.01 and more apart.
    close(scores, alone * 80, "read at padding, before the end, or of another text", atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.tensor(w.preference(prompts, responses, ended))
    assert (half != half.bfloat16()).any(), "the head must not run in bfloat16"
    assert w.preference.forward([ids]).requires_grad, "`forward` is what the fit learns through"
    assert not w.preference.scores([ids]).requires_grad, "`scores` only measures"
    all_ended, none_ended = (w.preference(prompts, responses, [end] * 4) for end in (True, False))
    assert w.preference(prompts, responses) == all_ended != none_ended, "it ended unless said otherwise"
    w.preference.tokenizer = bpe(SCORED_WORDS, "<start> $A")
    assert w.preference(prompts, responses) == none_ended, "without an EOS none can be seen"
    for bad in ((["A", "B"], ["a", "b"], [True]), (["A", "B"], ["a"], [True])):
        with pytest.raises(ValueError):  # not one of each
            w.preference(*bad)
    with pytest.warns(UserWarning, match="reply is cut") as once:
        assert w.preference(["A"], ["c" * 90]) == w.preference(["A"], ["c" * 75]), "it ends with the context"
    assert len(once) == 1, "what fits is not cut"


def test_a_text_keeps_the_bos_that_its_tokenizer_adds_loses_the_eos_and_may_fill_the_context():
    for adds, before in (("<bos> $A <eos>", [2]), ("$A <eos>", []), ("<bos> $A", [2]), ("$A", [])):
        tokenizer = bpe(["a", "b", "<bos>", "<eos>"], adds, eos_token="<eos>")
        assert rlaif.tokenize(tokenizer, ["ab", "b", "a<eos>"]) == [
            before + [0, 1], before + [1], before + [0, 3]], "an EOS of the text's own stays"
    ids, mask = rlaif.pad([[2] * 16, [1]], "left", gpt2(context=16))
    assert ids.tolist() == [[2] * 16, [0] * 15 + [1]] and mask.tolist() == [[1] * 16, [0] * 15 + [1]]
    with pytest.raises(ValueError):
        rlaif.pad([[2] * 17], "left", gpt2(context=16))
    bert = bpe(["a", "b", "<cls>", "<sep>"], "<cls> $A <sep>", sep_token="<sep>")  # SEP is its end
    assert rlaif.tokenize(rlaif.load(None, "-", "", "cpu", None, gpt2(), bert)[1], ["ab"]) == [[2, 0, 1]]


def test_a_new_preference_model_is_the_policys_trunk_under_a_random_head():
    w = uneven_world()
    w.policy.config.dtype = torch.bfloat16  # of the file that it came from
    preference = rlaif.new_preference_model(w.policy, w.tokenizer, "{prompt}.")
    trunks = zip(preference.model.base_model.parameters(), w.policy.base_model.parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in trunks), "it starts from a copy of the trunk"
    assert not preference.model.training and preference.tokenizer is w.tokenizer
    assert preference.template == "{prompt}." and w.policy.config.num_labels != 1
    narrow = gpt2(n_embd=2, n_head=1)
    torch.manual_seed(0)
    for head in (lambda: rlaif.new_preference_model(narrow, w.tokenizer, "{prompt}").model.score,
                 lambda: rlaif.ValueFunction(2, head="random").head):
        std = torch.cat([head().weight for _ in range(60)]).std()
        # 120 numbers know it to 6 %, and so does this; 1/sqrt(D) would be 22 % more.
        assert abs(std * 3**0.5 - 1) < 0.12, "a random head starts normal, with std 1/sqrt(D + 1)"


def test_a_fit_goes_down_the_loss_of_its_own_pairs_and_reports_on_those_that_it_never_saw():
    """Every step: which pairs it reads, its gradient, cut to length 1, its rate. Then scale and report."""
    preference = rlaif.new_preference_model(gpt2(seed=7), letters(), "{prompt}")
    texts = TEXTS[1:] + ["abca", "cabb", "bccc", "aaaa"]  # the last four of 43 are held out, and longer
    a, b = (preference.tokenize([prompt] * 43, texts, [True] * 43) for prompt in "ab")
    b = b[5:] + b[:5]
    index = {tuple(row): i for rows in (a, b) for i, row in enumerate(rows)}  # all rows are different
    torch.manual_seed(0)
    p = torch.cat([torch.rand(39), torch.tensor([0.02, 0.97, 0.75, 0.9])])
    model, forward, read, steps, heads = preference.model, preference.forward, [], [], []

    def noted(rows):
        picked, half = [index[tuple(row)] for row in rows], len(rows) // 2
        if torch.is_grad_enabled():
            assert picked[:half] == picked[half:], "the two sides of a minibatch are not of the same pairs"
            assert half <= 7, "more than micro_batch_size pairs at once"
            read.extend(picked[:half])
        return forward(rows)

    def before_step(optimizer, args, given):
        with torch.enable_grad():
            r_a, r_b = forward([a[i] for i in read]), forward([b[i] for i in read])
            loss = bce(r_a - r_b, p[read])
            expected = flat_gradient(loss + 0.4 * (r_a + r_b).square().mean(), model)
        found = torch.cat([x.grad.flatten() for x in model.parameters()])
        # Gradients have a length of 1 at most: of a mistake a thousandth would show.
        close(found, expected / max(1.0, expected.norm()), "a step follows another loss", atol=1e-4)
        assert type(optimizer) is torch.optim.Adam and optimizer.defaults["weight_decay"] == 0
        steps.append(([*read], loss.item(), optimizer.param_groups[0]["lr"]))
        read.clear()
    preference.forward = noted
    hooks = [register_optimizer_step_pre_hook(before_step),
             register_optimizer_step_post_hook(lambda *_: heads.append(model.score.weight.mean().item()))]
    report = rlaif.fit_preference(preference, a, b, p, 3, 16, 2e-2, centering=0.4, micro_batch_size=7)
    preference.forward = forward
    for hook in hooks:
        hook.remove()
    picked, losses, rates = zip(*steps)
    epochs = [sum(picked[i:i + 3], []) for i in (0, 3, 6)]
    assert [len(rows) for rows in picked] == [16, 16, 7] * 3 and epochs[0] != epochs[1] and all(
        sorted(rows) == [*range(39)] for rows in epochs), "an epoch is all pairs but the last tenth, shuffled"
    close(rates, [2e-2 * (1 - i / 9) for i in range(9)], "the rate falls linearly to 0 over all steps")
    d = preference.scores(a) - preference.scores(b)
    # Over n or n - 1 is no matter: 0.6 %. Over the training pairs alone it would be off by STD %.
    close(preference.scores(a + b).std(), 1.0, "scores are not of std 1 over all texts", atol=0.01)
    before = d * heads[-1] / model.score.weight.mean().item()  # of the scores that the report is of
    for name, expected in {
            "loss": bce(before[-4:], p[-4:]), "train_loss": statistics.fmean(losses[6:]),
            "entropy": torch.distributions.Bernoulli(p).entropy().mean(),
            "accuracy": ((d > 0) == (p > 0.5))[[39, 40, 42]].float().mean()}.items():
        close(report[name], expected, f"{name}: of other pairs or epochs, or after the scaling?", atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        report = rlaif.fit_preference(preference, a[:2], b[:2], p[-2:], epochs=1, learning_rate=0.1)
        scores = preference.scores(a)
    assert report["accuracy"] in (0, 1) and {*map(type, report.values())} == {float}, "of two one is held out"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores, preference.scores(a)), "autocast has kept weights from before a step"
        assert forward(a).dtype == torch.float32, "the loss is float32 at least"
    with pytest.raises(ValueError):  # it cannot tell any text from another
        rlaif.fit_preference(preference, a[:1] * 40, a[:1] * 40, torch.full((40,), 0.5), epochs=1)
    defaults, config = inspect.signature(rlaif.fit_preference).parameters, rlaif.Config()
    named = "epochs", "learning_rate", "centering", "minibatch_size", "micro_batch_size"
    assert [defaults[name].default for name in named] == [
        config.preference_epochs, config.preference_learning_rate, 0.01, 64, config.micro_batch_size]


def test_a_preference_model_is_fitted_to_what_the_judge_said_of_its_pairs(monkeypatch, capsys, recwarn):
    w = uneven_world(pairs=302, preference_epochs=6, micro_batch_size=5)
    drawn, asked, rates, respond = [], [], [], rlaif.respond
    read, loss = [], rlaif.preference_loss

    def judged(judge, tokenizer, constitution, prompts, a, b, *more, **even_more):
        assert (judge, tokenizer, constitution) == ("judge", "its tokenizer", ["a principle"])
        assert even_more.get("both_orders", True), "a label needs both orders"
        assert even_more["chunk"] == 20, "what the judge reads at once grows with micro_batch_size"
        even_more.get("worth", {}).update(same=0.9, first=0.5, hold=0.9)
        asked.extend(zip(prompts, a, b))
        return torch.sigmoid(2 * torch.tensor(count_a([], a)) - 2 * torch.tensor(count_a([], b)))
    monkeypatch.setattr(rlaif, "judge_pairs", judged)
    monkeypatch.setattr(rlaif, "respond", lambda *given: drawn.append(respond(*given)) or drawn[-1])
    monkeypatch.setattr(rlaif, "preference_loss", lambda a, *more: read.append(len(a)) or loss(a, *more))
    hook = register_optimizer_step_pre_hook(lambda adam, *_: rates.append(adam.param_groups[0]["lr"]))
    torch.manual_seed(0)
    preference, report = rlaif.preference_from_judge(
        w.config, w.policy, w.tokenizer, "judge", "its tokenizer", ["a principle"], w.prompts)
    hook.remove()
    prompts, a, b = (report[name] for name in ("prompts", "responses_a", "responses_b"))
    assert asked == list(zip(prompts, a, b)) and len(asked) == 302 and a != b, "asked about others"
    close(report["prob_a"], judged("judge", "its tokenizer", ["a principle"], prompts, a, b, chunk=20),
          "the labels do not belong to the pairs they were given for", atol=1e-6)
    assert capsys.readouterr().out.count("judge: the same") == 1, "the judge is described once"
    assert sorted(map(prompts.count, w.prompts)) == [100, 101, 101], "each prompt is used as often as another"
    assert len({tuple(prompts[i:i + 3]) for i in range(0, 300, 3)}) == 6, "prompts are drawn, not in turn"
    for side, rollouts in (("a", drawn[::2]), ("b", drawn[1::2])):
        said = [(x, y, end) for r in rollouts for x, y, end in zip(r.prompts, r.responses, r.ended.tolist())]
        assert [(x, y) for x, y, _ in said] == list(zip(prompts, report[f"responses_{side}"])), "not as drawn"
        rows = [w.tokenizer(f"Q: {x}\nA:{y}").input_ids + [POLICY_WORDS.index("<eos>")] * end
                for x, y, end in said]
        assert report[f"rows_{side}"] == rows, "what is fitted is not what was judged, in its template"
        assert 0 < sum(end for *_, end in said) < 302, "some should have ended, others not"
    assert preference.template == w.config.template and preference.tokenizer is w.tokenizer
    assert preference.chunk == 20 and max(read[:-1]) == 5, "what it reads at once grows with micro_batch_size"
    assert len(drawn[0].prompts) == 4 * 8, "what is written at once grows with the batch"
    assert len(rates) == 6 * 5 and rates[0] == 4e-3, "preference_epochs or its learning rate is another"
    scores = preference.scores(report["rows_a"] + report["rows_b"])
    agreement = torch.corrcoef(torch.stack([scores, torch.tensor(count_a([], a + b))]))[0, 1]
    # 0.91 is reached; a wrong sign turns it round, labels of other pairs leave some 0.
    assert agreement > 0.8, f"it does not prefer what the judge does: sign? (correlation {agreement:.2f})"
    assert not recwarn.list, "a fit that learns is no reason to warn"


# 3. The policy with its value function ----------------------------------------------------------------------


@every_architecture
def test_logits_and_values_have_read_the_prompt_and_the_tokens_before_their_own(architecture, device):
    """Padded rows of different lengths, against a pass of its own over every prefix, unpadded."""
    policy, trunk = ARCHITECTURES[architecture]().to(device), gpt2(seed=1, n_embd=24).base_model.to(device)
    prompts, replies = [[0, 1, 2, 1, 0], [2], [1, 0]], [[1, EOS], [0, 2, 2, 1], [EOS]]
    (ids, attention), (tokens, mask) = rlaif.pad(prompts, "left", policy), rlaif.pad(replies, "right", policy)
    inputs, kept = (ids, attention, tokens, mask.bool()), []
    with policy.register_forward_hook(lambda _, __, out: kept.append(out.logits.shape[1])):
        assert rlaif.response_logits(policy, *inputs)[1] is None and kept == [5], "needless logits"
    for value in (rlaif.ValueFunction(32, head="random"), rlaif.ValueFunction(24, trunk, "random")):
        with nowhere():
            logits, values = rlaif.response_logits(policy, *inputs, value.to(device))
        for b, t in mask.nonzero().tolist():
            prefix = torch.tensor([prompts[b] + replies[b][:t]], device=device)
            close(logits[b, t], policy(prefix).logits[0, -1], "position ids, mask, or shifted?", FLOAT32)
            hidden = (value.trunk or policy.base_model)(prefix).last_hidden_state[0, -1]
            close(values[b, t], value.head(hidden)[0], "a value is not of its prefix or trunk", FLOAT32)
        policy.zero_grad(), values.sum().backward()
        assert (value.trunk is None) == (policy.get_input_embeddings().weight.grad is not None), (
            "values are learned by the policy's trunk if, and only if, they share it")
    assert trunk.wte.weight.grad is not None, "a separate trunk must learn"


def test_a_value_starts_at_zero_and_is_float32_at_least():
    hidden, value = torch.randn(2, 3, 32), rlaif.ValueFunction(32, head="random")
    assert (rlaif.ValueFunction(32)(hidden) == 0).all() and (value(0 * hidden) == 0).all(), "head, bias: 0"
    with torch.autocast("cpu", torch.bfloat16):
        values = value(hidden)
    assert torch.equal(values, value(hidden)), "the value head must not run in bfloat16"
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        policy, ids = gpt2().to(dtype), torch.tensor([[0, 1]])
        _, values = rlaif.response_logits(policy, ids, torch.ones_like(ids), ids, ids > -1, value.to(dtype))
        assert values.dtype == expected, "values must be float32 at least"


# 4. Generate ------------------------------------------------------------------------------------------------


@every_architecture
def test_generate_greedily_gives_what_transformers_gives_and_what_no_cache_gives(architecture):
    model, rows = ARCHITECTURES[architecture](), [[0, 1, 2], [2], [1, 1, 0, 2, 0]]
    ids, attention = rlaif.pad(rows, "left", model)
    tokens, mask = generate(model, ids, attention, 8, EOS, 0, temperature=0)
    theirs = model.generate(input_ids=ids, attention_mask=attention, do_sample=False, max_new_tokens=8,
                            eos_token_id=EOS, pad_token_id=0)[:, ids.shape[1]:]
    assert torch.equal(tokens, theirs), "the mask must grow with the tokens, positions count real tokens only"
    for text, row, real in zip(rows, tokens.tolist(), mask.tolist()):
        for token in row[:sum(real)]:
            likeliest = model(torch.tensor([text])).logits[0, -1].argmax()
            assert likeliest == token, "left padding or the key-value cache changes the result"
            text = [*text, token]


def test_generate_samples_from_the_policy_at_its_temperature_and_nothing_else():
    """Frequencies of all 40 responses against their enumerated probabilities."""
    model, n = gpt2(), 20000
    ids = torch.tensor([[0, 1]] * n)
    torch.manual_seed(1)
    tokens, mask = generate(model, ids, torch.ones_like(ids), 3, EOS, EOS, 0.7)
    with torch.no_grad():
        expected = n * enumerate_logprobs(model, [0, 1], 0.7).sum(dim=1).exp()
    found = {tuple(sequence): 0 for sequence in SEQUENCES}
    for row, length in zip(tokens.tolist(), mask.sum(dim=1).tolist()):
        assert tuple(row[:length]) in found, f"{row[:length]} goes on after its EOS, or the mask lost the EOS"
        found[tuple(row[:length])] += 1
    counts = torch.tensor(list(found.values()), dtype=torch.float64)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # 39 on average, 80 once in 10,000 times, and 80 on average where the temperature is off by 8 %.
    assert chi_square < 80, f"chi-square {chi_square:.0f} with 39 degrees of freedom: temperature forgotten?"


def test_generate_draws_from_all_tokens_in_float32_with_torchs_own_random_numbers(monkeypatch):
    model, ids, dtypes, wasted = gpt2(80), torch.tensor([[0, 1]] * 5000), [], []
    rarest, multinomial = model(ids[:1]).logits[0, -1].argsort()[:3], torch.multinomial  # 0.5 % of draws
    model.register_forward_hook(lambda *given: wasted.append(
        torch.is_grad_enabled() or given[-1].logits.shape[1] > 1))
    monkeypatch.setattr(torch, "multinomial", lambda x, *more, **named: (
        dtypes.append(x.dtype), multinomial(x, *more, **named))[1])

    def draw(*temperature):
        torch.manual_seed(1)
        return generate(model, ids, torch.ones_like(ids), 1, None, 0, *temperature)[0][:, 0]
    assert torch.isin(draw(1.5), rarest).any(), "the three rarest of 80 tokens are never drawn: top-k, top-p?"
    assert torch.equal(draw(), draw(1.0)), "the same seed gives the same tokens, by default at temperature 1"
    model.bfloat16(), draw()
    assert {*dtypes} == {torch.float32}, "probabilities in half precision are too coarse"
    assert not any(wasted), "sampling needs no graph, nor the prompt's logits"


@pytest.mark.parametrize("eos,pad", [(0, 2), ([EOS], EOS), ([EOS, 1], 2), ([0, 1, 2, EOS], 1), (None, 2)])
def test_generate_masks_a_response_up_to_and_with_its_eos_whatever_pad_is(eos, pad):
    policy, ids, ends = gpt2(), torch.tensor([[0, 1]] * 64), [0] if eos == 0 else eos or []
    torch.manual_seed(0)
    with nowhere():
        tokens, mask = generate(policy, ids, torch.ones_like(ids), 6, eos, pad, 2.0)
    for row, real in zip(tokens.tolist(), mask.tolist()):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), len(row))
        assert real == [t < length for t in range(len(row))], (
            "the mask must hold the EOS and nothing after it, also where PAD is the EOS")
        assert all(token == pad for token in row[length:]), "PAD follows the EOS"
    assert {*ends} <= {*tokens[mask].tolist()}, "the example should hold every EOS"
    assert mask.dtype == torch.bool and mask[:, -1].any(), "T is the longest response drawn"
    assert generate(policy, ids, torch.ones_like(ids), 1, eos, pad)[0].shape == (64, 1), "one token will do"
    for length, temperature in ((0, 1.0), (3, -1.0)):
        with pytest.raises(ValueError):
            generate(policy, ids, torch.ones_like(ids), length, eos, pad, temperature)


def test_respond_reads_the_template_ends_at_any_eos_and_gives_the_text_of_its_own_tokens():
    w, eos = uneven_world(), [POLICY_WORDS.index(word) for word in ("!", "<eos>")]
    torch.manual_seed(0)
    with nowhere():
        r = rlaif.respond(w.policy, w.tokenizer, w.prompts * 16, w.config)
    assert r.prompts == w.prompts * 16 and r.may_end
    for ids, real, words in zip(r.input_ids, r.attention_mask, w.read * 16):
        assert [POLICY_WORDS[i] for i in ids[-sum(real):]] == words and (real.diff() >= 0).all(), (
            "the policy must read each prompt in its template, with its BOS, padded on the left")
    torch.manual_seed(0)
    tokens, mask = generate(w.policy, r.input_ids, r.attention_mask, 6, eos, 0, 0.8)
    assert torch.equal(r.mask, mask) and torch.equal(r.tokens[mask], tokens[mask]), (
        "not drawn with the configured length and temperature, or one of the two EOS is forgotten")
    own = [row[real].tolist() for row, real in zip(tokens, mask)]
    assert r.ended.tolist() == [row[-1] in eos for row in own], "it ended if the last token is an EOS"
    texts = ["".join(POLICY_WORDS[i] for i in row if POLICY_WORDS[i][0] != "<") for row in own]
    assert r.responses == texts, "a text is that of its own tokens: no prompt, no padding, nothing special"
    assert {row[-1] for row in own} > {*eos}, "the example should hold both EOS, and replies without"
    w.tokenizer.eos_token = None
    for ends in (None, eos[:1]):  # none at all, or one, which is ordinary text, from a list
        w.policy.generation_config.eos_token_id = ends
        r = rlaif.respond(w.policy, w.tokenizer, w.prompts * 16, w.config)
        assert r.may_end == r.ended.any() == bool(ends) != r.mask.all(), "it must end there, or nowhere"


def test_respond_cuts_a_response_from_the_whole_text_with_its_own_spaces():
    drops_the_first, cleans_up = letters("a ."), letters("a .", clean_up_tokenization_spaces=True)
    drops_the_first._tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    cleans_up.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert drops_the_first.decode([1, 0]) == "a" and cleans_up.decode([0, 1, 2]) == "a."
    for tokenizer in (drops_the_first, cleans_up):
        torch.manual_seed(0)
        r = rlaif.respond(gpt2(), tokenizer, ["a"] * 64, rlaif.Config(template="{prompt}", max_new_tokens=3))
        written = ["".join("a ."[token] for token in row if token < 3) for row in r.tokens.tolist()]
        assert {" ", "."} <= {text[:1] for text in written} and any(" ." in text for text in written)
        assert r.responses == written, "the text is not what was written, space for space"


# 5. Score ---------------------------------------------------------------------------------------------------


def test_a_score_is_one_finite_number_for_each_bare_prompt_and_response(tmp_path):
    run, seen = uneven_world(tmp_path).prepare(), []
    run.rollout = r = rlaif.respond(run.policy, run.tokenizer, run.prompts * 2, run.config)
    r.prompts = [[{"role": "user", "content": x}] for x in r.prompts]
    kept, run.iteration, shared = (copy.deepcopy(r.prompts), list(r.responses)), 3, torch.zeros(6)

    def score(prompts, responses):
        seen.append(copy.deepcopy((prompts, responses)))
        for turns in prompts:  # what a careless caller does to them, or to torch, is its own affair
            turns.append({"role": "assistant", "content": "yes"})
        prompts.clear(), responses.clear(), torch.set_grad_enabled(True)
        return shared.copy_(torch.tensor(count_a(*seen[0])))
    with torch.no_grad():
        scores, _ = rlaif.score_responses(run, score, "score"), shared.zero_()
        assert not torch.is_grad_enabled(), "torch's mode is the caller's"
    assert seen == [kept] == [(r.prompts, r.responses)], "a score gets copies of bare prompts and responses"
    assert scores.dtype == rlaif.score_responses(run, lambda *_: [1] * 6, "score").dtype == torch.float32
    close(scores, torch.tensor(count_a(*kept)), "scores are not in the order of the responses", atol=1e-6)
    wrong = [[1.0], [[1.0]] * 6, None, ["x"] * 6, 3.0, [1.0] * 7]
    for given in wrong + [[1.0] * 5 + [bad] for bad in (math.nan, math.inf, -math.inf)]:
        error = ValueError if given in wrong else FloatingPointError
        with pytest.raises(error, match=r"\b4\b.*the judge"):  # it names the iteration and what was asked
            rlaif.score_responses(run, lambda *_: given, "the judge")


# Sections 6 to 9 by hand ------------------------------------------------------------------------------------


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def one_token(loss, *numbers):
    found = loss(*(f64([x]) for x in numbers), torch.tensor([[True]]))
    return found[0] if isinstance(found, tuple) else found


R, V, M = f64([0, 0, 1]), f64([0.2, 0.5, 0.7]), torch.tensor([[True] * 3])
RATIOS = [math.log(ratio) for ratio in (0.5, 0.8, 1, 1.2, 1.5)]
BY_HAND = {  # worked out on paper or published; what is left out is at its default
    "token_logprobs of huge logits":
        (lambda: token_logprobs(f64([1e3, 0, -1e3]).expand(1, 3, 3), torch.arange(3)[None]), [0, -1e3, -2e3]),
    "kl_estimate": (lambda: [kl_estimate(f64(math.log(2)), f64(0), *kind) for kind in ([], ["k2"], ["k3"])],
                    [0.693147, 0.240227, 0.193147]),
    "update_beta": (lambda: [update_beta(0.15, kl, 6.0, 10_000, 512) for kl in (7.2, 6.6, 6.0, 99, 0)],
                    [0.151536, 0.150768, 0.15, 0.151536, 0.148464]),
    "dense_scores": (lambda: dense_scores(f64([2, 5, 4]), M), [2, 3, -1]),
    "gae": (lambda: torch.cat([gae(R, V, M, *more)[0] for more in ((), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0))]),
            [0.76075, 0.485, 0.3, 0.3, 0.2, 0.3, 0.475, 0.35, 0.3, 0.8, 0.5, 0.3]),
    "whiten": (lambda: whiten(f64([1, 2, 3], [4, 5, 9])),
               [-1.161895, -0.774597, -0.387298, 0, 0.387298, 1.936492]),
    "policy_loss": (lambda: [one_token(policy_loss, d, 0, sign) for sign in (1, -1) for d in RATIOS],
                    [-0.5, -0.8, -1, -1.2, -1.2, 0.8, 0.8, 1, 1.2, 1.5]),  # clip 0.2
    "value_loss": (lambda: [one_token(value_loss, new, 0, 1) for new in (0.5, 0.1, -1)], [0.32, 0.405, 2]),
    "the optimum (reward, KL, J) where one response in ten succeeds": (lambda: [
        [*vars(optimum(f64([0.9, 0.1]).log(), f64([0, 1]), beta)).values()] for beta in (0.1, 0.5)],
                    [0.999592, 2.298092, 0.769782, 0.450853, 0.407677, 0.247014]),
    "preference_loss": (lambda: preference_loss(f64(1, 0), f64(0, 2), f64(1, 0.5)), [0.720095]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_worked_example_of(name):
    call, expected = BY_HAND[name]
    found = torch.as_tensor(call()).flatten()
    close(found, expected, f"{name}: a default, a sign, min for max, or a ratio upside down?", atol=5e-7)


def test_the_worked_example_of_the_module_docstring_is_right():
    """Its numbers are read out of it; a column of padding holds what must not matter."""
    lines = re.findall(r"^ +\d  \S+ +(?:True|False) .*$", rlaif.__doc__, re.MULTILINE)
    *rows, padding = [[float(x) for x in re.findall(r"-?\d+\.\d+", line)] for line in lines]
    kl, values, rewards, advantages = (f64([row[i] for row in rows] + [9.9]) for i in (0, -2, -3, -1))
    mask = f64([1, 1, 1, 1, 0]).bool()
    assert padding == [0, 0], "padding has a reward and an advantage of 0"
    found = shape_rewards(f64(1), kl, mask, beta=0.3)
    close(found[mask], rewards[mask], "rewards: -beta * KL on each token, the score on the last", atol=1e-9)
    found, _ = gae(found, values, mask, gamma=1.0, lam=1.0)
    close(found[mask], advantages[mask], "advantages: the rewards to come, less the value", atol=1e-9)


# 6. Log-probabilities, and the KL against the reference -----------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 9), st.floats(0.2, 3), seeds, devices)
def test_token_logprobs_and_token_entropy_are_those_of_the_categorical_that_was_sampled(
        B, T, V, temperature, seed, device):
    random = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(B, T, V, generator=random, dtype=torch.float64)).to(device)
    tokens, half = torch.randint(V, (B, T), generator=random).to(device), logits.bfloat16()
    for given, sampled in (((temperature,), logits / temperature), ((), logits)):
        expected = torch.distributions.Categorical(logits=sampled)
        close(token_logprobs(logits, tokens, *given), expected.log_prob(tokens), "temperature forgotten?")
        close(rlaif.token_entropy(logits, *given), expected.entropy(), "not the entropy at this temperature")
        for function, what in ((token_logprobs, (tokens, *given)), (rlaif.token_entropy, given)):
            assert function(half, *what).dtype == torch.float32, "half precision must be upcast to float32"
            close(function(half, *what), function(half.float(), *what), "upcast first, not at the end")


@given(seeds, st.integers(2, 8))
def test_kl_estimate_k1_and_k3_have_the_kl_as_their_mean_and_k2_has_its_gradient(seed, V):
    """Over all V^2 responses of two tokens, of which the KL is the sum of that of their tokens."""
    logits = torch.randn(2, V + 1, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logprobs, ref = logits.requires_grad_().log_softmax(-1)
    each, each_ref = (torch.stack([x[:1].T.expand(V, V), x[1:]], -1) for x in (logprobs, ref))  # (V, V, 2)
    prob, kl = each.sum(-1).exp(), (each.sum(-1).exp() * (each - each_ref).sum(-1)).sum()

    def gradient(x):
        return torch.autograd.grad(x.sum(), logits, retain_graph=True)[0][0]
    d, first, first_ref = each - each_ref, logprobs[0], ref[0]
    k1, k2, k3 = (kl_estimate(each, each_ref, kind) for kind in ("k1", "k2", "k3"))
    for name, mean in (("k1", (prob * k1.sum(-1)).sum()), ("k3", (prob * k3.sum(-1)).sum())):
        close(mean, kl, f"E[{name}] is not KL(pi || ref): is the ratio upside down?")
    assert (k3 >= 0).all(), "k3 is never negative"
    close(torch.stack([k1, k2, k3]), torch.stack([d, d**2 / 2, (-d).exp() - 1 + d]), "not the formula")
    close(gradient(prob.detach() * k1.sum(-1)), torch.zeros(V + 1, V), "E[grad k1] is not 0")
    close(gradient(first.exp().detach() * kl_estimate(first, first_ref, "k2")),  # for each token alone
          gradient(first.exp() * (first - first_ref)), "E[grad k2] is not grad KL")
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(first, first_ref, "k4")


@given(st.floats(0.01, 5), st.floats(0, 50), st.floats(0.5, 20), st.integers(1, 4000), unit)
def test_update_beta_moves_towards_its_target_slowly_and_stays_positive(beta, kl, target, horizon, share):
    n = int(share * (5 * horizon - 1))
    new, error = update_beta(beta, kl, target, horizon, n), min(max(kl / target - 1, -0.2), 0.2)
    close(new, beta * (1 + error * n / horizon), "at most 20 % * n / horizon, and up above the target")
    assert isinstance(new, float) and new > 0, "beta must stay positive"
    for bad in ((0.0, n), (-target, n), (target, 5 * horizon)):
        with pytest.raises(ValueError):
            update_beta(beta, kl, bad[0], horizon, bad[1])


# 7. Rewards. Whatever takes a mask is given poison outside it, from here on ---------------------------------


@given(batches())
def test_masked_mean_is_the_mean_of_the_real_entries(batch):
    x = batch.draw().requires_grad_()
    mean = masked_mean(x, batch.mask)
    mean.backward()
    close(mean, statistics.fmean(x[b, t].item() for b, t in batch.real), "padding counts, or rows come first")
    close(x.grad, batch.table(lambda b, t: 1 / batch.n), "a real entry counts 1 / n, padding nothing")


@given(batches(shortest=1), st.floats(0, 3))
def test_shape_rewards_puts_the_score_on_the_last_token_and_the_price_of_kl_where_the_level_says(batch, beta):
    scores, kl = batch.draw(batch.B), batch.draw()
    last = batch.table(lambda b, t: t == batch.lengths[b] - 1)
    own = f64(*([kl[b, :n].sum().item()] for b, n in enumerate(batch.lengths)))  # (B, 1)
    price = {"token": batch.table(lambda b, t: kl[b, t]), "sequence": last * own, "batch": last * own.mean()}
    for level in price:
        with nowhere():
            found = shape_rewards(scores, kl, batch.mask, beta, level)
        expected = last * scores.cpu()[:, None] - beta * price[level]
        close(found, expected, f"{level}: the score belongs on the last real token. Of -beta * KL each token "
              "has its own; or the last one the response's sum, or these sums' mean. Sign, or padding?")
        close(found.sum(), scores.sum() - beta * own.sum(), f"{level}: all get score - beta * KL together")
    close(shape_rewards(scores, kl, batch.mask, beta).sum(dim=1), scores.cpu() - beta * own[:, 0],
          "by default each token pays, and a response gets score - beta * KL")
    full, empty = f64([1, 1], [1, 1]).bool(), f64([1, 1], [0, 0]).bool()
    for shape, mask, level in (([2, 1], full, "token"), ([1], full, "token"), ([], full, "token"),
                               ([1, 1], full[:1], "token"), ([2], empty, "token"), ([2], full, "word")):
        with pytest.raises(ValueError):  # a column of scores, an empty row, an unknown level
            shape_rewards(torch.ones(shape), torch.ones(mask.shape), mask, 0.1, level)


@given(batches())
def test_dense_scores_telescope_to_the_score_of_every_prefix(batch):
    prefix_scores = batch.draw()
    with nowhere():
        spread = dense_scores(prefix_scores, batch.mask)
    summed = torch.where(batch.mask, spread.cumsum(dim=1), spread)
    close(summed, batch.table(lambda b, t: prefix_scores[b, t]), "the first t do not sum to a prefix's score")


# 8. Advantages ----------------------------------------------------------------------------------------------


@given(batches(), unit, unit)
def test_gae_is_the_discounted_sum_of_temporal_differences_or_with_lambda_one_of_rewards(batch, gamma, lam):
    """From which follow: with lambda 0 it is the temporal difference; a reward moves no advantage after it;
    values that are the returns leave none; rewards and values enter linearly; a row minds no other."""
    rewards, values = batch.draw(), batch.draw()
    with nowhere():
        advantages, returns = gae(rewards, values, batch.mask, gamma, lam)

    def delta(b, t):
        following = values[b, t + 1].item() if t + 1 < batch.lengths[b] else 0.0
        return rewards[b, t].item() + gamma * following - values[b, t].item()

    def discounted(of, rate):
        return batch.table(lambda b, t: sum(rate ** (k - t) * of(b, k) for k in range(t, batch.lengths[b])))
    close(advantages, discounted(delta, gamma * lam), "A is not the sum of (gamma lam)^k delta_{t+k}: is a "
          "value read past the last token, or padding multiplied by 0?")
    close(returns, advantages + batch.table(lambda b, t: values[b, t]), "returns are not A + V")
    _, returns = gae(rewards, values, batch.mask, gamma, 1.0)
    expected = discounted(lambda b, t: rewards[b, t].item(), gamma)
    close(returns, expected, "with lambda 1 A + V is not the discounted return")


@given(batches(), st.sampled_from([1e-4, 1.0, 1e3]), st.floats(-5, 5))
def test_whiten_gives_mean_zero_and_variance_one_up_to_epsilon(batch, scale, shift):
    """From which follows: scale and shift are forgotten, and a constant or a single entry becomes 0."""
    for x in (batch.draw(scale=scale) + shift, batch.draw(scale=0.0) + shift):
        real = [x[b, t].item() for b, t in batch.real]
        mean, std = statistics.fmean(real), math.sqrt(statistics.pvariance(real) + 1e-8)
        with nowhere():
            white, alone = whiten(x, batch.mask), whiten(x[batch.mask])
        close(white[batch.mask].mean(), 0.0, "the mean is not 0: is padding in it, or multiplied by 0?", 1e-7)
        expected = batch.table(lambda b, t: (x[b, t].item() - mean) / std)
        close(white, expected, "not (x - mean) / sqrt(biased variance + 1e-8), and 0 outside", atol=1e-7)
        close(alone, white[batch.mask], "without a mask all entries are real", atol=1e-7)


# 9. The clipped losses --------------------------------------------------------------------------------------


@given(batches(), st.floats(0.05, 0.5), st.booleans())
def test_policy_loss_clipping_only_raises_it_and_cuts_the_gradient_outside_its_range(batch, clip, is_first):
    old, noise = batch.draw(), batch.draw(scale=0.0 if is_first else 0.3)
    advantages = torch.where(batch.draw() > 1, 0.0, batch.draw())
    logprobs, old, advantages = (x.clone().requires_grad_() for x in (old + noise, old, advantages))
    with nowhere():
        loss, fraction = policy_loss(logprobs, old, advantages, batch.mask, clip)
    loss.backward()
    assert old.grad is None and advantages.grad is None, "what the rollout measured must be detached"
    plain, clipped, cut, gradient = 0.0, 0.0, 0, torch.zeros(batch.mask.shape, dtype=torch.float64)
    for b, t in batch.real:
        rho, A = (logprobs - old).exp()[b, t].item(), advantages[b, t].item()
        out = (A > 0 and rho > 1 + clip) or (A < 0 and rho < 1 - clip)
        bound = 1 + clip if A > 0 else 1 - clip
        plain, clipped, cut = plain - A * rho, clipped - A * (bound if out else rho), cut + out
        gradient[b, t] = 0.0 if out else -A * rho / batch.n
    close(loss, clipped / batch.n, "not the mean of max(-A rho, -A clip(rho)) over the real tokens: sign, "
          "min for max, ratio upside down, rows averaged first, or padding multiplied by 0?")
    close(logprobs.grad, gradient, "the gradient is -A rho / n, and 0 at padding or past the clip that gains")
    close(fraction, cut / batch.n, "it counts the tokens whose clipped side is the larger", atol=1e-6)
    unclipped, none_cut = policy_loss(logprobs, old, advantages, batch.mask, math.inf)
    close(unclipped, plain / batch.n, "clip=inf is the plain surrogate")
    assert none_cut == 0, "clip=inf clips nothing"


@given(batches(), st.floats(0.05, 1))
def test_value_loss_is_half_the_larger_of_the_clipped_and_the_plain_squared_error(batch, clip):
    old, returns = batch.draw(), batch.draw()
    values, old, returns = (x.clone().requires_grad_() for x in (old + batch.draw(scale=0.5), old, returns))
    with nowhere():
        loss = value_loss(values, old, returns, batch.mask, clip)
    loss.backward()
    assert old.grad is None and returns.grad is None, "what the rollout measured must be detached"
    plain, larger, gradient = 0.0, 0.0, torch.zeros(batch.mask.shape, dtype=torch.float64)
    for b, t in batch.real:
        v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
        error, near = (v - r) ** 2 / 2, (min(max(v, o - clip), o + clip) - r) ** 2 / 2
        plain, larger = plain + error, larger + max(error, near)
        gradient[b, t] = (v - r) / batch.n if error >= near else 0.0
    close(loss, larger / batch.n, "not half the mean of the larger squared error over the real tokens: min "
          "for max, the half forgotten, clipped around something else, or padding multiplied by 0?")
    close(values.grad, gradient, "the gradient is (V - R) / n where the plain error is the larger, else 0")
    for off in (None, math.inf):
        close(value_loss(values, old, returns, batch.mask, off), plain / batch.n, "clip off: the plain error")


# Sections 7 to 9 together, against calculus: the enumerable world of tiny_models/exact.py -------------------

BETA = 0.7


@pytest.fixture(scope="module")
def small_world():
    """A policy in float64, one prompt, and (40,) and (40, 3) tensors that belong to its 40 responses."""
    policy, reference, prompt_ids = gpt2(seed=4).double(), gpt2(seed=1).double(), PROMPTS["ab"]
    with torch.no_grad():
        logprobs, ref_logprobs = (enumerate_logprobs(model, prompt_ids) for model in (policy, reference))
    torch.manual_seed(0)
    scores, values = (torch.randn(n, dtype=torch.float64) for n in (40, len(STATES)))  # any, but one a state
    prob = logprobs.sum(dim=1).exp()
    std = (prob @ (scores - prob @ scores) ** 2).sqrt()
    model, values = (policy, prompt_ids, ref_logprobs), values[PREFIXES]
    return types.SimpleNamespace(model=model, kl=logprobs - ref_logprobs, prob=prob, scores=scores, std=std,
                                 values=values, exact=objective_gradient(*model, scores, BETA))


@pytest.mark.parametrize("how", ["token", "sequence", "batch", "k2", "k3", "scaled"])
def test_the_expected_gradient_is_what_calculus_says_whatever_the_values(small_world, how):
    """Paid by the token or at the end, KL leaves that of E[score] - beta * KL. In a batch of two a response
    pays for half of its own KL and for nothing else; a k2 or k3 in the reward is not the KL; with scores of
    std 1 beta is in stds of the score."""
    w = small_world
    given, price, kind, divisor = {
        "batch": ({"level": "batch"}, BETA / 2, "k1", 1), "k2": ({"kind": "k2"}, BETA, "k2", 1),
        "k3": ({"kind": "k3"}, BETA, "k3", 1), "scaled": ({"whitened": True}, BETA * w.std, "k1", w.std),
    }.get(how, ({"level": how}, BETA, "k1", 1))
    for values in (w.values, None):
        found = expected_gradient(*w.model, w.scores, BETA, values=values, **given)
        close(found, objective_gradient(*w.model, w.scores, price, kind) / divisor, f"{how}: not so", 1e-6)
    if how in ("token", "sequence"):
        optimal = BETA * w.kl.sum(dim=1)  # for which the policy is the best of all, pi_ref exp(r / beta)
        found = expected_gradient(*w.model, optimal, BETA, how, values=w.values)
        close(found, torch.zeros_like(found), f"{how}: there is a way up from the optimum", atol=1e-6)
    else:
        assert (found - w.exact).norm() > 0.1 * w.exact.norm(), f"{how}: not to be that of the objective"


def test_below_lambda_one_the_values_lend_their_errors_and_true_values_lend_none(small_world):
    w = small_world
    rewards = torch.where(ALL_MASK, -BETA * w.kl, 0.0)
    rewards[torch.arange(40), ALL_MASK.sum(dim=1) - 1] += w.scores
    to_go = rewards.flip(1).cumsum(dim=1).flip(1)  # what each response still gets from each of its tokens on
    true_values = torch.zeros(40, 3, dtype=torch.float64)
    for t in range(3):
        for state in PREFIXES[:, t].unique():
            same = PREFIXES[:, t] == state
            true_values[same, t] = (w.prob[same] * to_go[same, t]).sum() / w.prob[same].sum()
    for lam in (0.0, 0.6):
        right = expected_gradient(*w.model, w.scores, BETA, lam=lam, values=true_values)
        close(right, w.exact, f"lambda {lam}: true values must leave the gradient unbiased", atol=1e-6)
        wrong = expected_gradient(*w.model, w.scores, BETA, lam=lam, values=w.values)
        assert (wrong - w.exact).norm() > 0.1 * w.exact.norm(), f"lambda {lam}: wrong values must show"


# The exact optimum ------------------------------------------------------------------------------------------

LONG_ENOUGH = {"iterations": 125, "minibatch_size": 128, "ppo_epochs": 1, "learning_rate": 1.5e-3,
               "whiten_advantages": False, "value_clip": math.inf, "lam": 0.95}


# At 1.2 seeds 0 to 9 close .996 .991 .984 .989 .988 .982 .973 .984 .993 .985 of the gap, std .006; at
# 2.0 .996 .986 .981 .979 .990 .973 .981 .975 .991 .990, of .008; a wrong sign of KL at most .29, beta taken
# twice .88, a temperature forgotten in scoring .956, and on seed 0 .947.
@pytest.mark.parametrize("beta", [1.2, 2.0])
def test_ppo_finds_the_exact_optimum_of_reward_less_beta_kl(tmp_path, beta):
    """The whole loop against a number, J* = beta log E_ref exp(r / beta)."""
    run = exact_run(tmp_path, beta, seed=0, **LONG_ENOUGH)
    assert run.end.objective <= run.best.objective + 1e-5, "no policy can pass the optimum: is the sum wrong?"
    assert run.gap_closed >= 0.97, f"only {run.gap_closed:.1%} of the gap to the optimum is closed"


# 10. The loop -----------------------------------------------------------------------------------------------


def random_judge(seed=0, **special):
    return gpt2(len(ALPHABET) + 1, seed, context=256), letters(ALPHABET, **special)


def toy_run(folder, score=count_a, gold=None, policy=None, tokenizer=None, **settings):
    """`prepare` on the letter models -> Run."""
    config = toy_config(folder, **settings)
    return rlaif.prepare(config, score, gold, policy or gpt2(), tokenizer or letters())


def toy_train(*args, **settings):
    """The same, trained -> list of metrics."""
    return list(rlaif.iterate(toy_run(*args, **settings)))


def scorer(seed=0, outputs=1, **settings):
    return gpt2(seed=seed, kind=GPT2ForSequenceClassification, num_labels=outputs, **settings)


def tensors_of(rollout):
    return {name: x for name, x in vars(rollout).items() if isinstance(x, torch.Tensor)}


def weights_of(*models):
    return [x.detach().cpu().clone() for model in models for x in model.state_dict().values()]


def all_equal(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def rollout_by_hand(w, run, rollout):
    """What the equations say of a rollout, from its prompts, its tokens and the models alone: in float64, one
    response at a time, without padding -> a dict of numbers, lists of B, and tensors (B,) or (B, T)."""
    config, (B, T) = run.config, rollout.tokens.shape
    policy, reference, value, scorer = (copy.deepcopy(model).cpu().double() for model in (
        run.policy, run.reference, run.value, run.score.model))
    ends, eos = [POLICY_WORDS.index(word) for word in ("!", "<eos>")], w.tokenizer.eos_token_id
    x, ended, texts, raw = collections.defaultdict(list), [], [], []
    # 4 to 6. What was written, and what the models say of it.
    for prompt, row in zip(rollout.prompts, rollout.tokens.tolist()):
        read = [POLICY_WORDS.index(word) for word in w.read[w.prompts.index(prompt)]]
        own = row[:next((t + 1 for t, token in enumerate(row) if token in ends), T)]
        ended.append(own[-1] in ends)
        texts.append("".join(POLICY_WORDS[i] for i in own if POLICY_WORDS[i][0] != "<"))
        scored = w.tokenizer(f"B{prompt}: {texts[-1]}").input_ids + [eos] * ended[-1]
        ids, tokens, before = torch.tensor([read + own]), torch.tensor(own), slice(len(read) - 1, -1)
        with torch.no_grad():
            raw.append(scorer.score(scorer.transformer(torch.tensor([scored]))[0][0, -1]).item())
            pi, ref = (torch.distributions.Categorical(logits=logits[0, before] / config.temperature)
                       for logits in (policy(ids).logits, reference(ids).logits))
            hidden = (value.trunk or policy.base_model)(ids).last_hidden_state[0, before]
            x["values"].append(value.head(hidden)[:, 0])
            x["prefix_scores"].append(scorer.score(scorer.transformer(ids)[0][0, len(read):])[:, 0])
        x["logprobs"].append(pi.log_prob(tokens))
        x["ref_logprobs"].append(ref.log_prob(tokens))
        x["entropy"].append(pi.entropy())
        d = x["logprobs"][-1] - x["ref_logprobs"][-1]
        x["kl"].append({"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[config.kl_estimator])
    # 7. Scores, whitened over the finished responses, and rewards: what each token adds to the score so far,
    # less its price.
    finished, mean, std = [end or config.missing_eos_score == math.inf for end in ended], 0.0, 1.0
    if config.whiten_scores:
        mean, std = (of([score for score, is_finished in zip(raw, finished) if is_finished])
                     for of in (statistics.fmean, statistics.pstdev))
    scores = [(raw[b] - mean) / std if finished[b] else config.missing_eos_score for b in range(B)]
    row_kl = torch.stack([kl.sum() for kl in x["kl"]])
    for b, kl in enumerate(x["kl"]):
        so_far = (x["prefix_scores"][b][:-1] - mean) / std if config.dense_reward else 0 * kl[1:]
        added = torch.cat([f64(0.0), so_far, f64(scores[b])]).diff()
        at_end = f64(*[0.0] * (len(kl) - 1), 1.0)
        price = {"token": kl, "sequence": at_end * row_kl[b], "batch": at_end * row_kl.mean()}
        x["rewards"].append(added - run.beta * price[config.kl_level])
    # 8. Advantages.
    for rewards, values in zip(x["rewards"], x["values"]):
        errors = rewards + config.gamma * torch.cat([values[1:], f64(0.0)]) - values
        x["advantages"].append(torch.stack([sum(
            (config.gamma * config.lam)**k * error for k, error in enumerate(errors[t:]))
            for t in range(len(errors))]))
        x["returns"].append(x["advantages"][-1] + values)
    real = torch.cat(x["advantages"])
    shift, scale = (real.mean(), real.std(correction=0)) if config.whiten_advantages else (0.0, 1.0)
    x["whitened"] = [(advantages - shift) / scale for advantages in x["advantages"]]
    x["mask"] = [torch.ones_like(advantages) for advantages in x["advantages"]]
    rows = {name: torch.nn.utils.rnn.pad_sequence(tensors, True) for name, tensors in x.items()}
    return {**rows, "responses": texts, "ended": ended, "may_end": True, "raw_scores": raw,
            "gold_scores": count_a([], texts), "score_mean": mean, "score_std": std, "scores": scores}


@pytest.mark.parametrize("settings", [
    {"value": "shared"}, {"kl_level": "sequence", "kl_estimator": "k3", "micro_batch_size": 64},
    {"kl_level": "batch", "kl_estimator": "k2", "missing_eos_score": math.inf, "whiten_advantages": False},
    {"dense_reward": True, "value": "preference"},
    {"dense_reward": True, "whiten_scores": False, "kl_level": "sequence", "value": "shared"}])
def test_a_rollout_and_its_metrics_are_what_the_equations_say(tmp_path, device, settings):
    """To 1e-4: numbers of size 1 in float32 are good to 1e-6, so only rounding gets through."""
    w = uneven_world(tmp_path, own_tokens=True, learning_rate=0.0, device=device, **settings)
    run = w.prepare()
    r = rlaif.roll_out(run)
    hand = rollout_by_hand(w, run, r)
    assert r is run.rollout, "the last rollout is kept"
    assert 2 <= sum(hand["ended"]) < 8, "the example should hold responses with and without an EOS"
    read_back = [w.tokenizer(text, add_special_tokens=False).input_ids for text in r.responses]
    assert read_back != [row[own].tolist() for row, own in zip(r.tokens, r.mask)], "tokens are letters here"
    if not run.config.dense_reward:
        assert r.prefix_scores is None is not hand.pop("prefix_scores")
    assert not [name for name, x in tensors_of(r).items() if x.requires_grad], "a graph is kept"
    assert {field.name for field in dataclasses.fields(r)} - {*hand} <= {
        "prompts", "input_ids", "attention_mask", "tokens", "prefix_scores"}, "nothing says what it should be"
    for name, expected in hand.items():
        found = getattr(r, name)
        if name in ("responses", "may_end"):
            assert found == expected, f"{name} is not what the tokens say"
            continue
        expected = torch.as_tensor(expected, dtype=torch.float64)
        if expected.dim() == 2:
            assert found.shape == r.tokens.shape == expected.shape, f"{name} has another shape"
            found = torch.where(r.mask, found, 0)
        close(found, expected, f"{name} is not what the equations say", atol=1e-4)
    metrics, real = rlaif.update(run, r), hand["mask"].sum()
    kl = (hand["logprobs"] - hand["ref_logprobs"]).sum() / 8
    used = hand["score_mean"] + hand["score_std"] * statistics.fmean(hand["scores"])
    errors, returns = (hand[name][hand["mask"] > 0] for name in ("advantages", "returns"))
    for name, expected in {
        "score": statistics.fmean(hand["raw_scores"]), "gold": statistics.fmean(hand["gold_scores"]),
        "score_std": hand["score_std"], "kl": kl, "objective": used - 0.518 * hand["score_std"] * kl,
        "beta": 0.518, "entropy": hand["entropy"].sum() / real, "length": real / 8,
        "eos_fraction": sum(hand["ended"]) / 8, "distinct": len(set(hand["responses"])) / 8,
        "explained_variance": 1 - errors.var() / returns.var(),
        "ratio": 1.0, "approx_kl": 0.0, "clip_fraction": 0.0, "iteration": 1, "updates": 6,
    }.items():
        close(metrics[name], expected, f"the metric {name} is not what the equations say", atol=1e-4)


def minibatch_by_hand(run, rollout, rows, weight):
    """The loss of a minibatch, one response at a time -> (loss, what the metrics are to say of it)."""
    config, sums = run.config, collections.defaultdict(float)
    for b in rows:
        length, prompt = rollout.mask[b].sum(), rollout.input_ids[b][rollout.attention_mask[b].bool()]
        tokens, ids = rollout.tokens[b, :length], torch.cat([prompt, rollout.tokens[b, :length]])[None]
        old, advantages, old_values, returns = (
            x[b, :length] for x in (rollout.logprobs, rollout.whitened, rollout.values, rollout.returns))
        before = slice(len(prompt) - 1, -1)
        pi = torch.distributions.Categorical(logits=run.policy(ids).logits[0, before] / config.temperature)
        trunk = run.value.trunk or run.policy.base_model
        values = run.value.head(trunk(ids).last_hidden_state[0, before])[:, 0]
        d, ratio = pi.log_prob(tokens) - old, (pi.log_prob(tokens) - old).exp()
        plain, cut = advantages * ratio, advantages * ratio.clamp(1 - config.clip, 1 + config.clip)
        near = old_values + (values - old_values).clamp(-config.value_clip, config.value_clip)
        errors = torch.stack([(values - returns)**2, (near - returns)**2]).amax(dim=0)
        for name, x in {"policy_loss": -torch.minimum(plain, cut), "value_loss": errors / 2, "ratio": ratio,
                        "clip_fraction": (cut < plain).float(), "approx_kl": ratio - 1 - d,
                        "entropy": pi.entropy(),
                        "penalty": weight * tokens * pi.log_prob(tokens).square()}.items():
            sums[name] = sums[name] + x.sum() / rollout.mask[rows].sum()
    loss = (sums["policy_loss"] + config.value_coef * sums["value_loss"]
            - config.entropy_coef * sums.pop("entropy") + sums.pop("penalty"))
    return loss, {name: x.item() for name, x in sums.items()}


def updated(run, weight):
    """One rollout and its update, with a loss of one's own that tells which rows are read and differs between
    them -> metrics, and a list of its minibatches: their rows, the gradient of their loss by hand, their
    numbers, and, where a step was taken, its rate and gradient."""
    r, read, minibatches, (group,) = rlaif.roll_out(run), [], [], run.optimizer.param_groups
    assert {*map(id, group["params"])} == {*map(id, [*run.policy.parameters(), *run.value.parameters()])}, (
        "the optimizer has all of the policy and of the value function, its trunk too")

    def penalty(logprobs, rows):
        read.extend(rows.tolist())
        return weight * r.tokens[rows] * logprobs.square()

    def expect(**step):
        loss, numbers = minibatch_by_hand(run, r, read, weight)
        gradient = torch.autograd.grad(loss, group["params"], allow_unused=True)
        minibatches.append({"rows": [*read], "expected": gradient, "numbers": numbers, **step})
        read.clear()
    hook = run.optimizer.register_step_pre_hook(
        lambda *_: expect(rate=group["lr"], gradient=[p.grad.clone() for p in group["params"]]))
    metrics = rlaif.update(run, r, penalty)
    hook.remove()
    if read:
        expect()  # of a minibatch without a step
    return metrics, minibatches


def norm(gradient):
    return torch.cat([g.flatten() for g in gradient if g is not None]).norm().item()


@pytest.mark.parametrize("settings", [
    {"max_grad_norm": 0.05, "value": "shared"},
    {"entropy_coef": 0.3, "whiten_advantages": False, "micro_batch_size": 64, "adam_epsilon": 3e-3},
    {"value_coef": 1.0, "clip": 0.02, "value_clip": 0.03, "batch_size": 7},
    {"stop_kl": 1e-3, "value": "preference"},
    {"stop_kl": 2.3, "micro_batch_size": 1},  # as a row of the second minibatch has, but not the whole
])
def test_every_step_follows_the_gradient_of_its_own_minibatch_and_nothing_else(tmp_path, device, settings):
    """No gradient of an abandoned or an earlier minibatch, no padding, no row's tensor beside another row; to
    a ten-thousandth of the gradient's length."""
    run = uneven_world(tmp_path, own_tokens=True, device=device, **{
        "learning_rate": 1e-2, "max_grad_norm": math.inf, "stop_kl": math.inf, **settings}).prepare()
    adam = run.optimizer.defaults
    assert type(run.optimizer) is torch.optim.Adam and adam["eps"] == run.config.adam_epsilon
    assert adam["betas"] == (0.9, 0.999) and adam["weight_decay"] == 0
    for iteration in range(2):
        metrics, own = updated(run, weight=0.01 * ("clip" in settings))
        steps = [minibatch for minibatch in own if "gradient" in minibatch]
        for minibatch in steps:
            length = norm(minibatch["expected"])
            cut = min(1.0, run.config.max_grad_norm / length)
            for found, expected in zip(minibatch["gradient"], minibatch["expected"]):
                close(found, torch.zeros(()) if expected is None else cut * expected,
                      "a step does not follow the gradient of its own minibatch", 1e-4 * max(1, length) * cut)
        for name in own[0]["numbers"]:
            close(metrics[name], statistics.fmean(minibatch["numbers"][name] for minibatch in own),
                  f"{name} is not the mean over the minibatches", 1e-4)
        norms = [norm(minibatch["expected"]) for minibatch in steps]
        close(metrics["grad_norm"], statistics.fmean(norms), "not the mean, before it is cut", 1e-3)
        assert metrics["updates"] == len(steps)
        rate = 1e-2 * (1 - iteration / 5)
        assert all(step["rate"] == rate for step in steps), "the learning rate falls linearly to 0"
        over = [minibatch["numbers"]["approx_kl"] > run.config.stop_kl for minibatch in own]
        assert not any(over[:-1]) and over[-1] == ("gradient" not in own[-1]) and (
            over[-1] or len(own) == 6), "the first one past stop_kl must end the updates, and take no step"
        if not over[-1]:
            epochs = [sum((minibatch["rows"] for minibatch in half), []) for half in (own[:3], own[3:])]
            assert [len(minibatch["rows"]) for minibatch in own[:2]] == [3, 3]
            assert all(sorted(epoch) == [*range(run.config.batch_size)] for epoch in epochs), (
                "an epoch must see every response once")
            assert epochs[0] != epochs[1], "the minibatches must be shuffled anew for each epoch"
        assert over[-1] or "stop_kl" not in settings or iteration > 0, "the example should stop"
    if "clip" in settings:
        assert metrics["clip_fraction"] > 0, "the example should clip something"
    if "max_grad_norm" in settings:
        assert metrics["grad_norm"] > 0.06, "the example should cut something"


class Peak(TorchDispatchMode):
    """Watches the tensors that are made while it is on: `most` is how many bytes of them, the weights of
    `models` apart, were alive at once."""

    def __init__(self, *models):
        super().__init__()
        self.alive, self.most = {}, 0
        self.weights = {x.untyped_storage().data_ptr() for model in models for x in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.weights:
                storage = x.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {at: (ref, size) for at, (ref, size) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def test_memory_grows_with_the_micro_batch_and_not_with_the_batch(tmp_path, monkeypatch):
    """A large vocabulary, replies of 8: the logits of one row are 1.8 MB, of a micro-batch of two 3.5."""
    policy = modern(LlamaConfig, LlamaForCausalLM, vocab_size=49152, hidden_size=64)
    most = {}
    for batch_size in (4, 12):
        run = toy_run(tmp_path, policy=policy, max_new_tokens=8, batch_size=batch_size, ppo_epochs=1,
                      minibatch_size=batch_size, micro_batch_size=2, missing_eos_score=math.inf)
        ready = rlaif.roll_out(run)
        monkeypatch.setattr(rlaif, "respond", lambda *args: ready)  # generating takes the whole batch at once
        with Peak(policy, run.reference) as rolled_out:
            rlaif.roll_out(run)
        monkeypatch.setattr(run.optimizer, "step", lambda: None)  # Adam's state would hide the passes
        with Peak(policy) as learned:
            rlaif.update(run, ready)
        monkeypatch.undo()
        most[batch_size] = rolled_out.most, learned.most
    judge = modern(LlamaConfig, LlamaForCausalLM, vocab_size=49152, hidden_size=64)
    with Peak(judge) as asked:
        rlaif.ask_judge(judge, random_judge()[1], ["abcdefgh"] * 16, chunk=8)
    logits = 2 * 9 * 49152 * 4
    for few, many in zip(most[4], most[12]):
        assert many <= 1.2 * few, f"{many / few:.2f} times as much memory for thrice the batch"
    assert most[12][0] <= 6 * logits, "more than a few copies of one pass's logits"
    assert asked.most <= 2 * most[12][1], "the judge takes more than twice the update"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", ["shared", "separate", "preference"])
def test_with_learning_rate_zero_the_ratio_is_exactly_one_and_the_kl_exactly_zero(tmp_path, recwarn, dtype,
                                                                                  value):
    """In bfloat16 a row of another batch has other digits: only passes of equal shapes agree, and only a
    reference that is run as the policy is costs nothing."""
    w = uneven_world(tmp_path, own_tokens=True, learning_rate=0.0, value=value, dtype=dtype, batch_size=12,
                     ppo_epochs=1, micro_batch_size=64, dense_reward=value == "preference")
    run = w.prepare()
    run.reference, shapes = copy.deepcopy(run.policy), []
    before = weights_of(run.policy, run.value)
    run.policy.register_forward_pre_hook(lambda policy, args, given: shapes.append(
        tuple(given["input_ids"].shape)), with_kwargs=True)
    for _ in range(3):
        r = rlaif.roll_out(run)
        metrics = rlaif.update(run, r)
        read = [shape for shape in shapes if shape[0] != 12]  # not to generate
        assert len(read) == 8 and len(set(read)) == 1, "rollout and update do not have equal shapes"
        shapes.clear()
        assert (r.kl[r.mask] == 0).all(), "the policy is its own reference, yet there is a KL"
        assert metrics["ratio"] == 1 and metrics["approx_kl"] == 0, "old and new policy differ without a step"
        assert (r.logprobs[r.mask] < 0).all() and all(math.isfinite(x) for x in metrics.values())
        assert not [name for name, x in tensors_of(r).items() if x.dtype == torch.bfloat16], "too few digits"
        given = r.prompts, r.responses, r.ended.tolist()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            assert r.raw_scores.tolist() == run.score(*given), "dtype is the preference model's too"
            if run.config.dense_reward:
                assert torch.equal(r.prefix_scores, run.score.prefix_scores(r)), "also of the prefixes"
    assert not recwarn.list and all_equal(before, weights_of(run.policy, run.value)), "a parameter moved"
    assert not torch.is_autocast_enabled("cpu"), "autocast is left on in the caller's process"


def test_in_bfloat16_scores_and_labels_keep_the_digits_that_float32_gives_their_heads():
    """A bfloat16 of size 1 moves in steps of 1/128: 64 texts would share scores and log-odds."""
    texts = ["".join(text) for text in itertools.product("abcd", repeat=3)]  # 64
    score, truth = rlaif.PreferenceModel(gpt2(5, kind=GPT2ForSequenceClassification, num_labels=1),
                                         letters("abcd"), "{prompt}"), {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            a, b = rlaif.ask_judge(*random_judge(), texts).T
            scores = torch.tensor(score(["ab"] * 64, texts))
        assert len(set(scores.tolist())) == len(set((a - b).tolist())) == 64, "they move in steps"
        truth[dtype] = scores, torch.sigmoid(a - b), a - b
    (scores, labels, odds), (half_scores, half_labels, half_odds) = truth.values()
    assert (scores - half_scores).abs().max() < 0.1 * scores.std(), "a score is off by a tenth of its std"
    assert (labels - half_labels).abs().max() < 0.02, "a label is off by 0.02"
    assert ((odds > 0) == (half_odds > 0))[odds.abs() > 0.2].all(), "a plain answer has changed sides"
    far = gpt2(300, n_embd=256, initializer_range=0.05, context=48).requires_grad_(False)
    far.transformer.wte.weight[:, 0], far.transformer.ln_f.bias[0] = 1.0, -100.0  # logits in steps of a half
    torch.autocast("cpu", torch.bfloat16)(rlaif.require_steady)(far, list(range(40)))


@pytest.mark.parametrize("value", ["shared", "separate", "preference"])
def test_only_policy_and_value_function_change_from_where_they_start_and_without_dropout(tmp_path, value):
    w = uneven_world(tmp_path, own_tokens=True, value=value)
    w.policy.train(), w.preference.model.train().requires_grad_(False)
    run = w.prepare()
    assert not any(module.training for model in (run.policy, run.value, run.reference)
                   for module in model.modules()), "dropout is on"
    assert not any(x.requires_grad for x in run.reference.parameters()), "the reference would keep a graph"
    assert all_equal(weights_of(run.reference), weights_of(w.reference)), "the reference is another"
    assert run.value.head.weight.any(), "value_head random"
    models = run.policy, run.value, run.reference, w.preference.model
    if run.value.trunk:
        source = {"separate": run.policy, "preference": w.preference.model}[value].base_model
        assert all_equal(weights_of(run.value.trunk), weights_of(source)), "it starts on another trunk"
        assert not {*map(id, run.value.parameters())} & {*map(id, source.parameters())}, "it must be a copy"
        models += (run.value.trunk,)
    before = [weights_of(model) for model in models]
    rlaif.update(run, rlaif.roll_out(run))
    moved = [not all_equal(old, weights_of(model)) for old, model in zip(before, models)]
    assert moved == [True, True, False, False, True][:len(models)], "policy and value function alone learn"


def test_train_is_the_two_halves_of_the_loop_and_the_random_numbers_are_the_runs_own(tmp_path):
    """Whatever a score, a gold or a notebook seeds or draws, and what it measures, changes nothing."""
    def seeding(prompts, responses):
        torch.manual_seed(42)
        return count_a(prompts, responses)
    settings = {"learning_rate": 1e-3, "ppo_epochs": 1, "value_head": "random", "eval_samples": 2}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    policy = gpt2()
    torch.manual_seed(7)
    history = list(rlaif.train(toy_config(tmp_path, **settings), count_a, count_a, policy, letters()))
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers do not go on as before"
    run, by_hand = toy_run(tmp_path, seeding, seeding, **settings), []
    for number in range(3):
        rollout = rlaif.roll_out(run)
        torch.manual_seed(number)
        by_hand.append(rlaif.update(run, rollout))
        rlaif.evaluate(run)
        torch.rand(number)
    assert by_hand == history, "train is roll_out and update in turn"
    assert all_equal(weights_of(policy), weights_of(run.policy)), "a policy that is passed in is trained"
    other = list(rlaif.train(toy_config(tmp_path, seed=1, **settings), count_a, count_a, gpt2(), letters()))
    assert other != history, "the seed changes nothing"
    before = weights_of(run.policy)
    for _ in range(2):
        rlaif.update(run, rlaif.roll_out(run))
    assert all_equal(before, weights_of(run.policy)), "after the last iteration the rate is 0, not negative"


def with_eos_bias(bias):
    """A policy that ends at once (1e4) or never (-1e4)."""
    policy = gpt2()
    policy.lm_head = torch.nn.Linear(32, 4)
    policy.lm_head.bias.data = bias * (torch.arange(4) == EOS)
    return policy


@pytest.mark.parametrize("setting", [{"value": "preference"}, {"dense_reward": True}])
@pytest.mark.parametrize("score", [count_a, rlaif.PreferenceModel(scorer(7), letters("cbaxyz"), "{prompt}")])
def test_a_score_that_cannot_be_read_token_by_token_is_refused_where_that_is_needed(tmp_path, setting, score):
    with pytest.raises(ValueError, match="left to right"):
        toy_run(tmp_path, score, **setting)


@pytest.mark.parametrize("off,dtype", [(0.01, "float32"), (-0.01, "float32"), (-0.08, "bfloat16")])
def test_a_policy_that_is_not_the_one_that_sampled_is_loudly_reported(tmp_path, off, dtype):
    run = toy_run(tmp_path, iterations=1, stop_kl=1e-9, dtype=dtype)
    rollout = rlaif.roll_out(run)
    rollout.logprobs += off  # then all ratios are on one side of 1
    with pytest.warns(UserWarning, match="iteration 1: the ratio is off 1"):
        assert rlaif.update(run, rollout)["updates"] == 1, "the first minibatch of a batch takes its step"


@pytest.mark.parametrize("control", ["fixed", "batch"])
def test_beta_is_kept_or_steered_by_the_kl_of_whole_responses_once_the_batch_is_over(tmp_path, control):
    w = uneven_world(tmp_path, beta_control=control, kl_target=3.0, kl_horizon=100.0, kl_estimator="k3",
                     learning_rate=1e-2)
    run, kls, drawn = w.prepare(), [], set()
    far, run.reference = run.reference, copy.deepcopy(run.policy)
    for prompts, n in ((None, 8), (None, 8), (run.prompts * 4, 12)):
        expected = run.beta
        r = rlaif.roll_out(run, prompts)
        assert prompts or sorted(map(r.prompts.count, w.prompts)) == [2, 3, 3], (
            "every prompt is drawn as often as any other, up to one")
        drawn.add(tuple(r.prompts))
        metrics = rlaif.update(run, r)
        assert metrics["beta"] == expected, "the beta of an iteration is set by the one before"
        row_kl = torch.where(r.mask, r.logprobs - r.ref_logprobs, 0.0).sum(dim=1).mean().item()
        if control == "batch":
            expected *= 1 + min(max(row_kl / 3 - 1, -0.2), 0.2) * n / 100
        close(run.beta, expected, "beta is not steered by the mean KL of this batch's responses", 1e-6)
        kls.append((row_kl, row_kl / r.mask.sum(dim=1).float().mean().item()))
        run.reference = far  # from now on there is a KL
    assert len(drawn) == 3, "prompts are drawn, not taken in the order of their file"
    assert kls[0][0] < 3 < kls[1][0] and max(per_token for _, per_token in kls) < 3, (
        "the KL should lie on both sides of the target, and per token on one")


def test_a_policy_that_rarely_ends_is_warned_of_before_training_and_again_where_nothing_is_learned(tmp_path):
    never = with_eos_bias(-1e4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        toy_train(tmp_path, policy=copy.deepcopy(never), missing_eos_score=math.inf, iterations=1)
        assert not said, "where a missing EOS has no price, there is nothing to warn of"
        history = toy_train(tmp_path, policy=never, iterations=2, ppo_epochs=1)
    texts = [str(warning.message) for warning in said]
    assert all(m["eos_fraction"] == 0 and m["score_std"] == 1 for m in history)
    assert len(texts) == 2 and "0%" in texts[0] and "no response ended" in texts[1], f"each once: {texts}"
    assert all("max_new_tokens" in text and "missing_eos_score" in text for text in texts), "both ways out"
    (tmp_path / "many.txt").write_text("ab\nc\n" * 8)
    with pytest.warns(UserWarning, match="^[1-9].?%.*max_new_tokens.*missing_eos_score"):
        toy_run(tmp_path, policy=with_eos_bias(-1.0), prompts=str(tmp_path / "many.txt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy_train(tmp_path, policy=with_eos_bias(1.0), iterations=1, ppo_epochs=1)


def test_where_there_is_no_eos_every_response_counts_as_finished(tmp_path, recwarn):
    policy, tokenizer = gpt2(), letters()
    policy.generation_config.eos_token_id, tokenizer.eos_token = None, None
    run = toy_run(tmp_path, policy=policy, tokenizer=tokenizer, missing_eos_score=-9.0, whiten_scores=False)
    rollout = rlaif.roll_out(run)
    close(rollout.scores, count_a([], rollout.responses), "a response that cannot end pays for its EOS", 1e-6)
    with torch.no_grad():  # a caller's own
        metrics = rlaif.update(run, rollout)
    assert metrics["eos_fraction"] == 0 and metrics["length"] == 3 and not recwarn.list


def test_what_cannot_learn_is_an_error_or_a_warning(tmp_path):
    with pytest.raises(ValueError, match="policy.*nothing can be learned"):
        toy_run(tmp_path, policy=gpt2().requires_grad_(False))
    policy = gpt2().requires_grad_(False)
    policy.unused = torch.nn.Parameter(torch.zeros(1))
    with pytest.warns(UserWarning, match="moved no parameter"):
        toy_train(tmp_path, policy=policy, iterations=1, missing_eos_score=math.inf)


@pytest.mark.filterwarnings("ignore")
def test_values_worse_than_none_for_five_iterations_are_warned_of_by_name(tmp_path):
    run, warned = toy_run(tmp_path), []
    scores = rlaif.roll_out(run).scores
    for explained, alike in [(-0.6, 0)] * 4 + [(-0.4, 0)] + [(-0.6, 0)] * 7 + [(-0.6, 1)] + [(-0.6, 0)] * 4:
        run.rollout.scores = torch.ones(4) if alike else scores
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rlaif.record(run, {"eos_fraction": 1.0, "clip_fraction": 0.0, "explained_variance": explained})
        warned.append(any("value_head" in str(warning.message) for warning in said))
    assert (warned, run.poor_values) == ([False] * 9 + [True] + [False] * 7, 4), "once, after five in a row"


def test_the_loop_makes_every_new_tensor_where_its_inputs_are(tmp_path, monkeypatch):
    """The default device here holds no data: nothing can be computed from a tensor that lands on it."""
    def on_cpu(function):
        def called(*args, **more):
            with torch.device("cpu"):
                return function(*args, **more)
        return called
    for module, name in ((rlaif, "pad"), (rlaif, "score_responses"), (torch, "randperm")):
        monkeypatch.setattr(module, name, on_cpu(getattr(module, name)))  # what they make is moved afterwards
    run = uneven_world(tmp_path, own_tokens=True, dense_reward=True).prepare()
    with torch.device("meta"):
        metrics = rlaif.update(run, rlaif.roll_out(run))
    assert all(x.device.type == "cpu" for x in tensors_of(run.rollout).values())
    assert all(math.isfinite(value) for value in metrics.values())


def test_what_stops_being_finite_stops_the_run_and_names_the_iteration(tmp_path):
    calls, out = [], str(tmp_path / "run")

    def score(prompts, responses):
        calls.append(1)
        return [math.nan if len(calls) == 3 else 1.0 + i for i in range(len(responses))]
    with pytest.raises(FloatingPointError, match="iteration 3: .*score.*checkpoint is in .*run"):
        toy_train(tmp_path, score=score, out=out, save_every=1, missing_eos_score=math.inf, ppo_epochs=1)
    with pytest.raises(FloatingPointError, match="iteration 1: .*score"):  # the squares' sum is infinite
        toy_train(tmp_path, score=lambda p, r: [1.5e19, -1.5e19] + [1.0] * (len(r) - 2))
    policy = gpt2()
    policy.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(FloatingPointError, match="iteration 1: the gradient"):
        toy_train(tmp_path, policy=policy, missing_eos_score=math.inf)
    run = toy_run(tmp_path, policy=policy)
    with pytest.raises(FloatingPointError, match="iteration 1: the loss"):
        rlaif.update(run, rlaif.roll_out(run), lambda logprobs, rows: logprobs * math.nan)
    assert all(torch.isfinite(p).all() for p in policy.parameters()), "a step was taken"


def test_evaluation_measures_the_policy_and_moves_nothing_of_the_run(tmp_path):
    run = toy_run(tmp_path, gold=lambda prompts, responses: [-x for x in count_a(prompts, responses)],
                  eval_samples=150, batch_size=64, missing_eos_score=math.inf)
    run.reference, run.held_out = gpt2(seed=1), ["c", "ab"]
    rollout = rlaif.roll_out(run)
    kept, random_state = copy.deepcopy(tensors_of(rollout)), [x for x in run.random if x is not None]
    means, replies = rlaif.evaluate(run)  # 300 replies, in five batches, the last of them smaller
    assert all_equal(random_state, [x for x in run.random if x is not None]), "it moved the random numbers"
    assert run.rollout is rollout and run.iteration == 0 and run.beta == run.config.beta
    assert all(torch.equal(x, kept[name]) for name, x in tensors_of(rollout).items())
    assert [row["prompt"] for row in replies] == ["c", "ab"] * 150, "it is measured on the held-out prompts"
    torch.rand(1)
    rlaif.roll_out(run)  # the run's own numbers are others now
    assert rlaif.evaluate(run)[1] == replies, "the same policy must give the same replies"
    assert rlaif.evaluate(run, ["ba"], at_most=7)[1] == rlaif.evaluate(run, ["ba"] * 7, at_most=7)[1]
    assert rlaif.evaluate(run, at_most=101)[1][100]["prompt"] == "c"
    lengths = [row["length"] for row in replies]
    assert len(set(lengths)) > 1, "replies of one length would not tell a mean from a mean of means"
    for name in ("score", "gold", "kl", "length", "eos_fraction"):
        close(means[name], statistics.fmean(row[name] for row in replies), f"{name} is not the mean", 1e-5)
    close(means["entropy"], sum(row["entropy"] for row in replies) / sum(lengths), "not per token", 1e-5)
    logprobs, ref = ([enumerate_logprobs(model, ids) for ids in ([2], [0, 1])]
                     for model in (run.policy, run.reference))
    kl = {(prompt, text): (p[i] - q[i]).sum().item()
          for prompt, p, q in zip(("c", "ab"), logprobs, ref) for i, text in enumerate(TEXTS)}
    close([row["kl"] for row in replies], [kl[row["prompt"], row["response"]] for row in replies],
          "the KL of a reply is over its own tokens", 1e-4)


def test_a_token_table_has_the_numbers_of_its_row_and_fits_a_terminal(tmp_path):
    (tmp_path / "odd.jsonl").write_text(json.dumps({"prompt": 50 * "a\n"}) + '\n{"prompt": "a"}')
    run = toy_run(tmp_path, policy=gpt2(context=128), tokenizer=letters("a\n\t"), value_head="random",
                  prompts=str(tmp_path / "odd.jsonl"))
    run.reference = gpt2(seed=1, context=128)
    r = rlaif.roll_out(run)
    columns = torch.stack([r.logprobs, r.ref_logprobs, r.kl, r.rewards, r.returns, r.values, r.advantages,
                           r.whitened], dim=2)
    assert {1, 2} & {*r.tokens[r.mask].tolist()}, "the example should hold a line end or a tab"
    for row in range(8):
        prompt, score, names, *lines = rlaif.token_table(run, row).splitlines()
        assert ("'User: a'" in prompt) == (r.prompts[row] == "a"), "the prompt of another row"
        assert max(map(len, (prompt, score, names, *lines))) <= 80 and len(names.split("  ")) >= 8
        assert re.findall(r"-?\d+\.\d+", score) == [f"{x[row]:.2f}" for x in (r.raw_scores, r.scores)]
        tokens, *numbers = zip(*(line.split() for line in lines))
        own = r.mask[row]
        assert [*tokens] == [["a", "\\n", "\\t", "<eos>"][i] for i in r.tokens[row, own]], "a line for each"
        close(torch.tensor([[float(x) for x in column] for column in numbers]).T, columns[row, own],
              "a number of another token or row", atol=0.00501)


def test_no_setting_is_ignored():
    for field in dataclasses.fields(rlaif.Config):
        assert re.search(rf"\bconfig\.{field.name}\b", SOURCE), f"nothing reads {field.name}"


# 11. The edge: what users bring, and what goes wrong --------------------------------------------------------


def spoilt(model):
    torch.nn.init.constant_(model.transformer.ln_f.bias, math.nan)
    return model


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with models and files, good and bad."""
    folder = tmp_path_factory.mktemp("bench")
    judge, judge_tokenizer = random_judge()
    small = {"vocab_size": 5, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16, "max_position_embeddings": 32, "initializer_range": 0.5}
    for name, model in {
        "policy": gpt2(), "other": gpt2(seed=1), "long": gpt2(context=32), "nan": spoilt(gpt2()),
        "preference": scorer(), "two": scorer(outputs=2), "pickled": scorer(), "custom": gpt2(),
        "resized": gpt2(), "no tokenizer": gpt2(),
        "bert": transformers.BertForSequenceClassification(transformers.BertConfig(**small, num_labels=1)),
        "mamba": MambaForCausalLM(MambaConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1)),
        "roberta": transformers.RobertaForCausalLM(transformers.RobertaConfig(
            **small, is_decoder=True, pad_token_id=4)),
    }.items():
        save_pair(folder / name, model, letters())
    save_pair(folder / "narrow", gpt2(), letters("abcdefgh"))
    save_pair(folder / "judge", judge, judge_tokenizer)
    save_pair(folder / "odd judge", judge, random_judge(chat_template="{{ messages[7].content + 1 }}")[1])
    save_pair(folder / "nan judge", spoilt(judge), judge_tokenizer)
    for file in (folder / "no tokenizer").glob("*token*"):
        file.unlink()
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    for name, change in (("custom", {"model_type": "own", "auto_map": own}), ("resized", {"vocab_size": 6})):
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, **change}))
    (folder / "custom" / "own.py").write_text("raise SystemExit('code of a model folder was run')")
    weights = folder / "pickled" / "model.safetensors"
    torch.save(load_file(weights), folder / "pickled" / "pytorch_model.bin")
    weights.unlink()
    (folder / "not a run").mkdir()
    (folder / "not a run" / "config.json").write_text("{}")
    for name, text in {
        "p.txt": "ab\nc\n", "two.txt": "ab\ncd\n", "empty.txt": "", "blank.txt": "ab\n \nc",
        "other.txt": "\u0436", "long.txt": "ab\n" + "a" * 14, "eos.txt": "ab\nc<eos>a\n",
        "p.csv": "prompt\nab\n", "broken.jsonl": '{"prompt": "a"}\n{"prompt": 3}\n',
        "surrogate.jsonl": '{"prompt": "\\ud800"}\n',
        "said.jsonl": '{"messages": [{"role": "assistant", "content": "b"}]}',
        "truth.py": "def gold(prompts, responses):\n    return [-12.34] * len(responses)\n",
        "list.json": "[]", "cut.txt": '[\n "a",\n', "nul.txt": "a\0b",
        "role.jsonl": '{"messages": [{"role": "<eos>", "content": "b"}]}',
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def run_main(capsys, *argv):
    """The command line -> its exit code, what it printed, and what it said of errors."""
    capsys.readouterr()
    code = rlaif.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def assert_no_line_wraps(out, err):
    """In a terminal of 80 columns; a bar is written over with carriage returns."""
    too_long = [line for line in re.split(r"[\n\r]", out + err) if len(line) > 80]
    assert not too_long, f"it wraps: {too_long}"


@pytest.fixture
def in_bench(bench, monkeypatch):
    """The bench as working directory, a terminal of 80 columns, and no pictures, which would take most of the
    time of so short a run."""
    monkeypatch.chdir(bench)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("LINES", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    return bench


TOY_FLAGS = ["--template", "{prompt}", "--max_new_tokens", 3, "--iterations", 2, "--batch_size", 4,
             "--minibatch_size", 4, "--ppo_epochs", 1, "--eval_samples", 1, "--device", "cpu"]
BENCH_FLAGS = ["--policy", "policy", "--preference", "preference", "--prompts", "p.txt", *TOY_FLAGS]
BAD_FLAGS = {  # flags -> words of which each must be in the sentence
    ("--beta", "nan"): "beta", ("--beta", 0, "--beta_control", "batch"): "beta_control",
    ("--template", "{prompt} {"): "template", ("--prompts", "nowhere.txt"): "prompts nowhere.txt",
    ("--prompts", "empty.txt"): "empty.txt 1", ("--prompts", "blank.txt"): "blank.txt 2",
    ("--prompts", "other.txt"): "other.txt 1 tokenizer", ("--prompts", "broken.jsonl"): "broken.jsonl 2",
    ("--prompts", "surrogate.jsonl"): "surrogate.jsonl 1", ("--prompts", "p.csv"): "p.csv",
    ("--prompts", "list.json"): "list.json 1", ("--prompts", "cut.txt"): "cut.txt 1",
    ("--prompts", "nul.txt"): "nul.txt", ("--prompts", "role.jsonl"): "role.jsonl 1 role",
    ("--prompts", "said.jsonl"): "said.jsonl 1 user", ("--prompts", "eos.txt"): "eos.txt 2 special",
    ("--eval_prompts", "long.txt"): "eval_prompts long.txt 2 policy context",
    ("--policy", "policy/nowhere"): "policy folder", ("--policy", "resized"): "policy resized fill",
    ("--policy", "custom"): "policy custom", ("--policy", "no tokenizer"): "policy tokenizer",
    ("--policy", "narrow"): "policy 8 4", ("--policy", "nan"): "policy GPT2",
    ("--policy", "mamba"): "policy Mamba", ("--policy", "roberta"): "policy Roberta padding",
    ("--reference", "policy", "--policy", "long"): "reference context",
    ("--preference", "policy"): "preference policy fill score", ("--preference", "two"): "preference 2 one",
    ("--preference", "bert", "--dense_reward", "True"): "left right",
    ("--preference", "pickled"): "preference pickled", ("--judge", "nan judge"): "judge finite",
    ("--judge", "odd judge"): "element 7", ("--judge", "policy"): "judge A B",
    ("--gold", "math:pi"): "gold math:pi", ("--device", "meta"): "meta",
    ("--resume", "not a run"): "resume not a run/config.json", ("--out", "p.txt"): "out p.txt",
    ("--no_such_flag", 1): "no_such_flag",
}


@pytest.mark.parametrize("flag", BAD_FLAGS, ids=lambda flag: " ".join(map(str, flag)))
def test_bad_input_ends_with_one_clear_sentence_and_exit_code_two(flag, in_bench, capsys):
    before = sorted(in_bench.rglob("*"))
    code, out, err = run_main(capsys, *BENCH_FLAGS, *flag)
    message = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and len(message) == 1 and message[0].startswith("rlaif: ") and not out, err
    assert all(word in message[0] for word in BAD_FLAGS[flag].split()), message[0]
    assert sorted(in_bench.rglob("*")) == before, "nothing may be written before all is known to be good"


@pytest.mark.parametrize("flags", [["--beta", "high"], ["--kl_level", "word"]])
def test_a_flag_that_argparse_does_not_take_ends_with_its_own_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        rlaif.main(flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("usage: ") and flags[0] in said
    assert len(said.splitlines()) < 10, "its whole usage would hide what is wrong"


@pytest.mark.filterwarnings("ignore")
def test_the_whole_pipeline_from_a_judge(in_bench, tmp_path, capsys):
    out = tmp_path / "run"
    code, said, err = run_main(capsys, *BENCH_FLAGS, "--judge", "judge", "--constitution", "two.txt",
                               "--template", "a{prompt}\\nb", "--pairs", 40, "--preference_epochs", 1,
                               "--beta", 0.5, "--dtype", "bfloat16", "--out", out)
    assert code == 0, err
    assert f"python rlaif.py --resume {out}\n" in said and "matplotlib" in said
    assert "both orders" in said and "ln 2" in said
    assert sorted(os.listdir(out)) == ["before.json", "checkpoint.pt", "config.json", "labels.pt",
                                       "metrics.jsonl", "policy", "preference", "samples.md"]
    assert_no_line_wraps(said.replace(str(out), ""), err)
    for name, side in (("preference", "right"), ("policy", "left")):
        assert AutoTokenizer.from_pretrained(out / name).padding_side == side, f"{name}: the wrong side"
    model = AutoModelForSequenceClassification.from_pretrained(out / "preference", dtype=torch.float32)
    run = rlaif.prepare(rlaif.Config(resume=str(out)))
    assert run.score.template == run.config.template == "a{prompt}\nb", "as a shell passes it"
    rows = run.score.tokenize(run.prompts, ["c", "b"], [True, False])
    assert rows == [[0, 0, 1, 1, 2, EOS], [0, 2, 1, 1]], "line ends are no letters here; the template is read"
    labels = torch.load(out / "labels.pt")
    assert all(row[0] == 0 and 1 in row for row in labels["rows_a"] + labels["rows_b"]), "and in the fit"
    assert all_equal(weights_of(run.score.model), weights_of(model)), "another model scores, or a rounded one"
    code, again, err = run_main(capsys, "--resume", out)
    assert code == 0, err
    kl = re.compile(r"^kl +(\S+) +(\S+)$", re.MULTILINE)
    before, after = map(float, kl.search(said).groups())
    assert before == 0 and after != 0, "before is before any training, after is the trained policy"
    assert kl.search(again).groups() == kl.search(said).groups(), "a run that is over reports the same again"


@pytest.mark.filterwarnings("ignore")
def test_what_is_printed_fits_a_terminal_and_what_is_measured_is_bounded(
        in_bench, tmp_path, capsys, monkeypatch):
    """Nothing is cut from the bar; a terminal that has no emoji gets something in its place."""
    prompt = "\U0001F600" + 30 * "abc"
    (tmp_path / "long.txt").write_text("\n".join([prompt, "c"] * 100), encoding="utf-8")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stdout)
    pairs = (save_pair(tmp_path / kind.__name__, kind(context=256), letters()) for kind in (gpt2, scorer))
    code, _, err = run_main(
        capsys, *BENCH_FLAGS, "--policy", next(pairs), "--preference", next(pairs), "--gold", "truth:gold",
        "--eval_prompts", tmp_path / "long.txt", "--eval_samples", 2, "--batch_size", 128, "--minibatch_size",
        128, "--out", tmp_path / "run")
    assert code == 0, err
    stdout.flush()
    out = stdout.buffer.getvalue().decode("cp1252")
    assert_no_line_wraps(out.replace(str(tmp_path), ""), err)
    bar = [line for line in re.split(r"[\n\r]", err) if line.startswith("PPO")][-1].strip()
    assert re.search(r"score=-?[\d.]+, gold=-12.34, kl=-?[\d.]+$", bar), "a number is cut"
    assert len(bar) <= 78, "there must be room for 75/75"
    assert {*re.findall(r"measuring \d+ replies", err)} == {"measuring 256 replies"}, "before and after"
    _, replies = json.loads((tmp_path / "run" / "before.json").read_text())
    assert [row["prompt"] for row in replies] == [prompt, "c"] * 128
    samples = (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")
    assert samples.count(f"User: {prompt}\n  before score") == 100 == samples.count("User: c\n"), (
        "each held-out prompt once, with a reply of before and one of after; the file has the whole")


# Models that readers bring

CHARACTERS = string.ascii_letters + string.digits + " .,:()<>[]|?!_/\n"
CHAT = ("{{ bos_token }}{% for m in messages %}[OPEN]{{ m.role }}\n{{ m.content }}[CLOSE]{% endfor %}"
        "{% if add_generation_prompt %}[OPEN]assistant\n{% endif %}")


def chat_tokenizer(open="<|im_start|>", close="<|im_end|>", template=CHAT):
    """One token for each character; a turn stands between `open` and `close`, and a BOS, which the template
    writes, is added to every other text too."""
    special = ["<s>", open, close]
    template = template and template.replace("[OPEN]", open).replace("[CLOSE]", close)
    tokenizer = letters([*CHARACTERS, *special], bos_token="<s>", additional_special_tokens=special[1:],
                        chat_template=template)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.eos_token = close
    return tokenizer


def chat_llama(tokenizer, kind=LlamaForCausalLM, seed=0, **settings):
    settings = {"max_position_embeddings": 512, "eos_token_id": tokenizer.eos_token_id, **settings}
    return modern(LlamaConfig, kind, seed, vocab_size=len(tokenizer), **settings)


def read_by(model, tokenizer):
    """A list of the texts that the model reads from now on."""
    texts = []

    def read(module, args, given):
        masks = given["attention_mask"].bool()
        if given.get("past_key_values") is None or not given["past_key_values"].get_seq_length():
            texts.extend(tokenizer.decode(ids[mask]) for ids, mask in zip(given["input_ids"], masks))
    model.base_model.register_forward_pre_hook(read, with_kwargs=True)
    return texts


TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
         {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]


@pytest.mark.filterwarnings("ignore")
def test_each_model_reads_a_conversation_in_its_own_template_with_one_bos(tmp_path):
    """A system turn and two user turns, as policy, judge, preference model, score and gold get them."""
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": TURNS}) + '\n{"prompt": "hi"}\n')
    own, other, third = (chat_tokenizer(), chat_tokenizer("<p>", "</p>"), chat_tokenizer("<j>", "</j>"))
    policy, judge = chat_llama(own, bos_token_id=None), chat_llama(third)
    score = rlaif.PreferenceModel(chat_llama(other, transformers.LlamaForSequenceClassification, 1,
                                             num_labels=1), other)
    config = toy_config(tmp_path, prompts=str(tmp_path / "chat.jsonl"), template=None, pairs=2, batch_size=2,
                        preference_epochs=1)
    seen = []
    run = rlaif.prepare(config, score, lambda *args: seen.append(args) or [0.0] * len(args[0]), policy, own)
    by_policy, by_judge, by_score = read_by(policy, own), read_by(judge, third), read_by(score.model, other)
    r = rlaif.roll_out(run, [TURNS, "hi"])

    def chat(turns, open, close):
        return "<s>" + "".join(f"{open}{turn['role']}\n{turn['content']}{close}" for turn in turns)
    asked = chat(TURNS, "<|im_start|>", "<|im_end|>") + "<|im_start|>assistant\n"
    assert by_policy[:2] == [asked, "<s><|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"]
    assert seen == [([TURNS, "hi"], r.responses)], "score and gold get the prompt as it was read"
    rows = score.tokenize([TURNS, "hi"], ["ok", "ok"], [True, False])
    closed = chat([*TURNS, {"role": "assistant", "content": "ok"}], "<p>", "</p>")
    assert other.decode(rows[0]) == closed, "the template closes a reply, and nothing comes after it"
    assert other.decode(rows[1]) == "<s><p>user\nhi</p><p>assistant\nok"
    expected = [other.decode(row) for row in score.tokenize(r.prompts, r.responses, r.ended.tolist())]
    assert sorted(by_score) == sorted(expected)
    _, data = rlaif.preference_from_judge(config, policy, own, judge, third, ["be kind."], [TURNS, "hi"])
    lines = "System: be kind\nUser: hi\nAssistant: yes\nUser: why"
    i = data["prompts"].index(TURNS)
    a, b = data["responses_a"][i].strip(), data["responses_b"][i].strip()
    question = {"role": "user", "content": f"be kind.\n{lines}\n(A) {a}\n(B) {b}\nThe better response is:"}
    assert chat([question], "<j>", "</j>") + "<j>assistant\n" in by_judge
    assert own.decode(data["rows_a"][i]).startswith(asked + data["responses_a"][i])
    # A template of one's own, or a model without one: the turns before the last one stand as lines before it.
    plain = chat_tokenizer(template=None)
    for tokenizer, template in ((own, "<s>User: {prompt}\nAssistant:"), (plain, None)):
        (row,) = rlaif.encode(tokenizer, [TURNS], template, ["ok"], [True])
        text = f"{lines}\nAssistant:ok<|im_end|>"
        expected = text.replace("User: why", "<s>User: why") if template else text
        assert tokenizer.decode(row) == "<s>" + expected
        (row,) = rlaif.encode(tokenizer, ["hi"], template)
        assert tokenizer.decode(row) == "<s>User: hi\nAssistant:", "one BOS, never two"
    thinks = chat_tokenizer(template=CHAT + "{% if enable_thinking is not defined %}!{% endif %}")
    both = rlaif.encode(thinks, ["hi"] * 2, None, ["ok"] * 2, [True, False])
    assert not any("!" in thinks.decode(row) for row in both), "a template is asked for no thoughts"
    without = chat_tokenizer(template=CHAT.replace("{{ bos_token }}", ""))
    assert rlaif.encode(without, ["hi"])[0][0] != without.bos_token_id, "the template says whether"


@pytest.mark.parametrize("file,line,eos_is_pad", [
    ("p.jsonl", {"prompt": "hi<|im_end|>"}, False), ("p.jsonl", {"prompt": "hi<|im_end|>"}, True),
    ("p.jsonl", {"messages": [{"role": "user", "content": "hi<|im_end|>"}, *TURNS[2:]]}, False),
    ("p.jsonl", {"prompt": "hi</p>"}, False), ("two.txt", "be </p>kind.", False)])
def test_what_spells_a_special_token_is_refused_by_its_line(tmp_path, file, line, eos_is_pad):
    own, other = chat_tokenizer(), chat_tokenizer("<p>", "</p>")
    own.pad_token = own.eos_token if eos_is_pad else own.pad_token
    (tmp_path / "p.jsonl").write_text('{"prompt": "hi"}\n')
    (tmp_path / "two.txt").write_text("be kind.\n")
    with open(tmp_path / file, "a") as lines:
        lines.write(line if file == "two.txt" else json.dumps(line))
    score = None if file == "two.txt" else rlaif.PreferenceModel(
        chat_llama(other, transformers.LlamaForSequenceClassification, num_labels=1), other)
    config = toy_config(tmp_path, prompts=str(tmp_path / "p.jsonl"), template=None, pairs=4,
                        judge=save_pair(tmp_path / "judge", chat_llama(other), other),
                        constitution=str(tmp_path / "two.txt"), out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=rf"{file}, line 2.*(</p>|<\|im_end\|>)"):
        rlaif.prepare(config, score, None, chat_llama(own), own)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("role", ["policy", "preference", "preference without EOS", "judge"])
def test_a_context_is_refused_at_once_or_has_room_for_the_longest_prompt_and_any_reply(tmp_path, role):
    """The longest has 7 tokens, its template 10 and its reply 3; the other models have plenty of room."""
    name, longest, template, principle = role.split()[0], "abcabca", "aaaaa{prompt}bbbbb", 5 * "be kind"
    (tmp_path / "p.txt").write_text("\n".join(["ab", "c", longest] * 11))
    (tmp_path / "two.txt").write_text("ab\n" + principle)
    question = rlaif.JUDGE_QUESTION.format(principle=principle, turns=f"User: {longest}", a="", b="")
    needed = {"policy": 20, "preference": 20, "judge": len(letters(ALPHABET)(question).input_ids) + 6}
    own = letters()
    own.eos_token = None if "without" in role else own.eos_token
    for room in range(-1, 9):
        contexts = {**dict.fromkeys(needed, 400), name: needed[name] + room}
        judge = gpt2(len(ALPHABET) + 1, context=contexts["judge"])
        config = toy_config(tmp_path, prompts=str(tmp_path / "p.txt"), template=template, pairs=64,
                            judge=save_pair(tmp_path / "judge", judge, letters(ALPHABET)), batch_size=30,
                            constitution=str(tmp_path / "two.txt"), preference_epochs=1, learning_rate=0.0,
                            out=str(tmp_path / "run"))
        score = rlaif.PreferenceModel(scorer(context=contexts["preference"]), own, template)
        try:
            run = rlaif.prepare(config, None if name == "judge" else score, None,
                                gpt2(context=contexts["policy"]), letters())
            break
        except ValueError as error:
            assert re.search(rf"p.txt, line 3: .*{name}.*context", str(error)), error
            assert not (tmp_path / "run").exists(), "found out late"
    assert room == 0 or room > 0 and name != "policy", "taken too early, or refused where it suffices"
    if name == "judge":
        rlaif.judge_pairs(judge, letters(ALPHABET), [principle], [longest] * 2, ["ccc", "ab"], ["aaa", "b"])
    if name == "preference":
        run.score([longest] * 2, ["ccc", "ab"], [False, True])
    assert (rlaif.roll_out(run, [longest] * 96).mask.sum(dim=1) == 3).any()


def test_a_position_table_that_is_shorter_than_the_config_says_is_found_before_the_run(tmp_path):
    policy = gpt2(context=16)
    policy.config.n_positions = 64
    (tmp_path / "long.txt").write_text("ab\n" + 20 * "a")
    with pytest.raises(ValueError, match="policy.*cannot be used"):
        toy_run(tmp_path, policy=policy, prompts=str(tmp_path / "long.txt"), out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_chat_template_that_opens_a_thought_is_no_judges(tmp_path):
    def judged(end):
        tokenizer = chat_tokenizer(template=CHAT.replace("assistant\n", "assistant\n" + end))
        return rlaif.ask_judge(chat_llama(tokenizer), tokenizer, ["ab"])
    for end in ("<think>\n", "<|reasoning|>", "[THINK]"):
        with pytest.raises(ValueError, match="judge.*thought"):
            judged(end)
    for end in ("", "<think>\n\n</think>\n\n", "I think "):
        assert judged(end).shape == (1, 2)
    for here, there in (("m.content", "m.content[0].text"), ("in messages", "in messages[1:]")):
        with pytest.raises(ValueError, match="leaves out"):  # for content in parts; without a system turn
            rlaif.encode(chat_tokenizer(template=CHAT.replace(here, there)), [TURNS])
    broken = chat_tokenizer(template="{{ 1 / 0 }}")
    judge = save_pair(tmp_path / "judge", chat_llama(broken), broken)
    with pytest.raises(ValueError, match="line 1: for the judge: "):
        rlaif.prepare(toy_config(tmp_path, judge=judge), None, None, gpt2(), letters())


@pytest.mark.parametrize("same,first,hold,near_chance", [
    (0.6, 0.3, 0.5, False), (1.0, 0.7, 1.0, False), (0.59, 0.5, 0.9, True), (0.9, 0.29, 0.9, True),
    (0.9, 0.71, 0.9, True), (0.9, 0.5, 0.49, True)])
def test_a_judge_whose_first_labels_are_near_chance_is_warned_of(monkeypatch, recwarn, same, first, hold,
                                                                 near_chance):
    def judged(*args, worth, **more):
        worth.update(same=same, first=first, hold=hold)
        return torch.linspace(0, 1, len(args[3]))
    monkeypatch.setattr(rlaif, "judge_pairs", judged)
    report = {"loss": 0.6885 if near_chance else 0.6878, "train_loss": 0.6, "entropy": 0.6, "accuracy": 1.0}
    monkeypatch.setattr(rlaif, "fit_preference", lambda *args, **more: report)  # ln 2 - 0.005 is 0.6881
    w = uneven_world()
    rlaif.preference_from_judge(w.config, w.policy, w.tokenizer, None, None, ["be kind"], w.prompts)
    said = "".join(str(warning.message) for warning in recwarn)
    assert ("judge is near chance" in said) == ("nothing of the held-out pairs" in said) == near_chance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("error", [
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), MemoryError(),
    RuntimeError("inline_container.cc: file write failed\nat 0x7"), OSError(28, "No space left on device"),
    KeyboardInterrupt()])
def test_errors_of_the_machine_are_one_sentence_too(in_bench, tmp_path, capsys, monkeypatch, error):
    def fail(*args):
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        code, _, err = run_main(capsys, *BENCH_FLAGS, "--out", tmp_path / "run")
    last = err.strip().splitlines()[-1]
    assert last.startswith("rlaif: ") and last.count("rlaif") == 1, err
    assert ("micro_batch_size" in last) == ("memory" in repr(error).lower()), "say what takes less"
    assert (code, last) == (130, "rlaif: stopped") if isinstance(error, KeyboardInterrupt) else code == 2
    assert run_main(capsys, "--resume", tmp_path / "run")[0] == 0


def test_an_adapter_learns_with_a_shared_value_and_a_given_score_and_else_is_refused(tmp_path, bench):
    """A stand-in for a model of peft: all but a small addition is frozen, and the addition can be off."""
    policy = gpt2().requires_grad_(False)
    policy.transformer.ln_f.bias.requires_grad_(True)
    policy.disable_adapter, frozen = contextlib.nullcontext, weights_of(policy.transformer.h)
    for refused in ({"value": "separate"}, {"value": "preference"}, {"judge": str(bench / "judge")}):
        score = None if "judge" in refused else rlaif.PreferenceModel(scorer(), letters(), "{prompt}")
        config = toy_config(tmp_path, out=str(tmp_path / "run"), pairs=4, **refused)
        with pytest.raises(ValueError, match="adapter.*value shared"):
            rlaif.prepare(config, score, None, policy, letters())
    assert not (tmp_path / "run").exists(), "refused before anything is written"
    run = toy_run(tmp_path, policy=policy, missing_eos_score=math.inf, iterations=2)
    first, second = (rlaif.update(run, rlaif.roll_out(run)) for _ in range(2))
    assert first["kl"] == 0 and second["kl"] != 0, "the reference is the policy as it was, and stays so"
    assert [x for x in policy.parameters() if x.requires_grad] == [policy.transformer.ln_f.bias]
    assert all_equal(frozen, weights_of(policy.transformer.h)), "what was frozen has moved"


# Resuming


CUTS = {  # where a run is cut: the call of a function that does not happen, and what is there by then
    "while judging": ("judge_pairs", 2, "config.json labels.pt"),
    "in the fit": ("preference_loss", 2, "config.json labels.pt"),
    "before the first checkpoint": ("record", 2, "config.json labels.pt metrics.jsonl preference"),
    "between two checkpoints": ("record", 4, "checkpoint.pt config.json labels.pt metrics.jsonl preference"),
    "at the end": ("never", 1, "checkpoint.pt config.json labels.pt metrics.jsonl policy preference"),
    "without a judge": ("record", 4, "checkpoint.pt config.json metrics.jsonl"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cut", CUTS)
def test_a_run_goes_on_as_if_it_had_not_been_cut(in_bench, tmp_path, monkeypatch, device, cut):
    """From files alone, and its last iteration is no multiple of save_every. The same bytes in metrics.jsonl
    and the same bits in the weights; labels are not asked for again."""
    settings = {"policy": str(in_bench / "policy"), "reference": str(in_bench / "other"), "iterations": 5,
                "save_every": 2, "ppo_epochs": 1, "learning_rate": 3e-3, "missing_eos_score": math.inf,
                "eval_samples": 1, "device": device}
    if cut == "without a judge":
        settings |= {"preference": str(in_bench / "preference"), "value": "separate", "value_head": "random",
                     "beta_control": "batch", "kl_target": 0.1}
    else:
        settings |= {"judge": str(in_bench / "judge"), "value": "preference", "pairs": 40,
                     "preference_epochs": 2}
    (function, call, there), calls, runs = CUTS[cut], [], [tmp_path / "whole", tmp_path / "cut"]

    def killed(*args, right=getattr(rlaif, CUTS[cut][0], None), **more):
        calls.append(function)
        if len(calls) == call:
            raise KeyboardInterrupt
        return right(*args, **more)
    list(rlaif.train(toy_config(tmp_path, **settings, out=str(runs[0]))))
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(rlaif, function, killed, raising=False)
        list(rlaif.train(toy_config(tmp_path, **settings, out=str(runs[1]))))
    assert sorted(os.listdir(runs[1])) == there.split()
    if cut == "while judging":
        assert len(torch.load(runs[1] / "labels.pt")["prob_a"]) == 32, "the first chunk of labels is kept"
    elif function != "never":
        monkeypatch.setattr(rlaif, "judge_pairs", lambda *args, **more: pytest.fail("labels are asked again"))
    (runs[1] / "policy.new").mkdir(exist_ok=True)  # left behind by a crash, as is half a line
    with open(runs[1] / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 9, "sco')
    assert rlaif.main(["--resume", str(runs[1])]) == 0
    metrics = [(folder / "metrics.jsonl").read_bytes() for folder in runs]
    assert metrics[0] == metrics[1] and len(metrics[0].splitlines()) == 5, "metrics.jsonl is another"
    ends = [weights_of(AutoModelForCausalLM.from_pretrained(folder / "policy")) for folder in runs]
    assert all_equal(*ends), "the policy is another"
    assert (runs[1] / "before.json").exists() == ("checkpoint.pt" not in there), "not before any training"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("after", [3, 1])
def test_a_run_of_a_notebook_goes_on_from_its_checkpoint_in_a_copy_of_its_folder(tmp_path, after):
    """Also where the policy has taken steps since, and where there is no checkpoint yet. Its reference is the
    policy that it first was, and once it is over there is nothing more to do."""
    def loop(name, policy, **resume):
        config = rlaif.Config(**resume) if resume else toy_config(
            tmp_path, iterations=4, save_every=2, ppo_epochs=1, out=str(tmp_path / name))
        return rlaif.train(config, score=count_a, policy=policy, tokenizer=letters())
    whole, policy = list(loop("whole", gpt2())), gpt2()
    cut = loop("cut", policy)
    assert [next(cut) for _ in range(after)] == whole[:after]
    assert not all_equal(weights_of(policy), weights_of(gpt2())), "the example should take steps"
    before = {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    copied = shutil.copytree(tmp_path / "cut", tmp_path / "copy")
    run = rlaif.prepare(rlaif.Config(resume=str(copied)), count_a, None, copy.deepcopy(policy), letters())
    assert all_equal(weights_of(run.reference), weights_of(gpt2()))
    assert list(loop("copy", policy, resume=str(copied))) == whole[after // 2 * 2:]
    assert before == {path: path.read_bytes() for path in before}, "the first folder is left alone"
    again = gpt2(seed=9)  # any weights: the checkpoint's go in; and any name of the folder will do
    assert list(loop("copy", again, resume=f"{tmp_path}/cut/../copy/")) == []
    assert all_equal(weights_of(again), weights_of(policy))


@pytest.mark.parametrize("missing", ["score", "gold", "policy", "tokenizer"])
def test_what_a_run_was_given_in_python_it_must_be_given_again(tmp_path, bench, missing):
    given = {"score": count_a, "gold": count_a, "policy": gpt2(), "tokenizer": letters()}
    settings = {name: str(bench / name) for name in ("policy", "preference")}
    rlaif.prepare(toy_config(tmp_path, out=str(tmp_path / "run"), **settings), **given)
    rlaif.prepare(rlaif.Config(resume=str(tmp_path / "run")), **given)
    del given[missing]
    with pytest.raises(ValueError, match=f"resume: .*{missing}.*(Config|train)") as error:
        rlaif.prepare(rlaif.Config(resume=str(tmp_path / "run")), **given)
    asked = str(error.value).split(":")[1]
    assert not [name for name in given if re.search(rf"\b{name}\b", asked)], "what was passed is asked for"
    if missing == "tokenizer":
        with pytest.raises(ValueError, match="^tokenizer: "):
            rlaif.prepare(toy_config(tmp_path), **given)


def test_a_write_that_fails_leaves_the_old_folder_whole(tmp_path):
    folder = tmp_path / "folder"
    for text in ("old", "half of the n", "new"):
        def write(new):
            new.mkdir(exist_ok=True)
            (new / "inside").write_text(text)
            if text[:4] == "half":
                raise OSError("no space left on device")
        with pytest.raises(OSError) if text[:4] == "half" else contextlib.nullcontext():
            rlaif.write_whole(folder, write)
        assert (folder / "inside").read_text() == ("old" if text[:4] == "half" else text)
    assert sorted(tmp_path.iterdir()) == [folder]


def test_a_folder_that_holds_anything_is_never_written_over(tmp_path):
    (tmp_path / "mine").mkdir()
    toy_run(tmp_path, out=str(tmp_path / "mine"))  # an empty one will do
    (tmp_path / "mine" / "config.json").rename(tmp_path / "mine" / "thesis.tex")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="out: .*mine.*--resume"):
        toy_run(tmp_path, out=str(tmp_path / "mine"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}


def test_resuming_with_other_settings_names_what_changed(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    default = rlaif.Config()
    settings = {"policy": str(bench / "policy"), "preference": str(bench / "preference"), "device": "cpu"}
    config = toy_config(tmp_path, beta=default.beta + 0.5, lam=0.5, save_every=1, out="run", **settings)
    run = rlaif.prepare(config)
    changed = {"beta": 7.5, "iterations": 9, "learning_rate": 0.5, "batch_size": 16, "seed": 3}
    with pytest.raises(ValueError, match=rf"beta \(was {run.config.beta}, now 7.5\)") as error:
        rlaif.prepare(rlaif.Config(resume="run", save_every=3, micro_batch_size=7, **changed))
    assert [name for name in vars(config) if f"{name} (was" in str(error.value)] == [
        name for name in vars(config) if name in changed]
    again = rlaif.prepare(rlaif.Config(
        resume="run", beta=run.config.beta, save_every=3, micro_batch_size=7)).config
    assert (again.save_every, again.micro_batch_size) == (3, 7), "these may change"
    code, _, err = run_main(capsys, "--resume", "run", "--beta", default.beta)
    assert code == 2 and f"beta (was {run.config.beta}, now {default.beta})" in err, "given by hand it counts"
    code, _, err = run_main(capsys, "--resume", "./run", "--out", "elsewhere")
    assert code == 2 and "out (was" in err and not os.path.exists("elsewhere"), "it goes on in its own folder"
    seen, folder = [], str(tmp_path / "run")
    monkeypatch.setattr(rlaif, "run_and_report", seen.append)
    run_main(capsys, "--resume", folder)
    run_main(capsys, "--resume", folder, "--device", "auto", "--save_every", default.save_every)
    assert rlaif.prepare(seen[0]).config == dataclasses.replace(run.config, out=folder, resume=folder)
    given = rlaif.prepare(seen[1]).config
    assert (given.device, given.save_every) == ("auto", default.save_every), "a default given by hand is lost"
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match="resume: .*checkpoint.pt"):
        rlaif.prepare(rlaif.Config(resume="run"))


@given(st.binary(max_size=60), st.sampled_from([".txt", ".jsonl", ".json"]))
def test_any_bytes_as_a_prompts_file_give_prompts_or_a_value_error_that_names_it(tmp_path, data, ending):
    path = tmp_path / f"prompts{ending}"
    path.write_bytes(data)
    try:
        prompts = rlaif.read_prompts(str(path), "prompts", letters())
    except ValueError as error:
        assert f"prompts {path}" in str(error)
    else:
        assert prompts and all(isinstance(prompt, list) or prompt.strip() for prompt in prompts)


def test_a_prompts_file_may_come_from_anywhere(tmp_path):
    objects = [{"prompt": "a\nb"}, {"messages": TURNS, "x": 1}]
    for name, data, expected in (
            ("p", "\ufeffa b\r\nc\r\n\r\n", ["a b", "c"]), ("p.txt", " a \nb", [" a ", "b"]),
            ("p.jsonl", "\n".join(map(json.dumps, objects)), ["a\nb", TURNS]),
            ("p.JSONL", '"a"\n"b"', ["a", "b"]), ("p", f" {json.dumps(objects[0])}", ["a\nb"]),
            ("p.json", json.dumps(["a", "b\nc"], indent=2), ["a", "b\nc"]),
            ("p.txt", json.dumps(["a", "b"], indent=2), ["a", "b"]),
            ("p.json", json.dumps(objects, indent=2), ["a\nb", TURNS])):
        (tmp_path / name).write_bytes(data.encode())
        assert rlaif.read_prompts(str(tmp_path / name), "prompts", letters()) == expected


@given(st.sampled_from([field.name for field in dataclasses.fields(rlaif.Config)]),
       st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)))
def test_any_value_of_any_setting_is_accepted_or_a_value_error_that_names_it(name, value):
    try:
        rlaif.check_config(dataclasses.replace(rlaif.Config(), **{name: value}))
    except ValueError as error:
        assert name in str(error)


def test_every_tenth_prompt_is_held_out_unless_held_out_prompts_are_named(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(["a", "b", "c"] * 7))
    with pytest.warns(UserWarning, match="knows nothing of other prompts"):
        rlaif.load_feedback(rlaif.Config(prompts="p.txt"), "cpu", None, gpt2(), letters())
    (tmp_path / "e.txt").write_text("cc\n")
    run = toy_run(tmp_path, prompts=str(tmp_path / "p.txt"))
    assert run.gold is None and run.config.gold is None, "the tiny world's truth is for its own prompts"
    assert len(run.prompts) == 19 and run.held_out == ["a", "b"]
    run = toy_run(tmp_path, prompts=str(tmp_path / "p.txt"), eval_prompts=str(tmp_path / "e.txt"))
    assert len(run.prompts) == 21 and run.held_out == ["cc"]
    run = toy_run(tmp_path)
    assert run.prompts == run.held_out == ["ab", "c"], "of two prompts none can be spared"


def test_each_model_is_held_in_its_own_type(bench, tmp_path, recwarn):
    """What is trained in float32, or small steps are lost and that is said; the reference as the policy, and
    not rounded to its type; the preference model in dtype."""
    for dtype in ("float32", "bfloat16"):
        run = rlaif.prepare(toy_config(
            tmp_path, policy=str(bench / "policy"), preference=str(bench / "preference"),
            reference=str(bench / "other"), missing_eos_score=math.inf, micro_batch_size=5, dtype=dtype))
        assert run.score.chunk == 20, "what it reads at once grows with micro_batch_size"
        assert run.score.template == run.config.template, "it reads another template"
        assert run.score.model.dtype == getattr(torch, dtype)
        assert run.policy.dtype == run.reference.dtype == torch.float32
    head = toy_run(tmp_path, policy=gpt2().double()).value.head.weight
    assert head.dtype == torch.float64 and not head.any(), "value_head zero"
    adapted = gpt2().bfloat16().requires_grad_(False)
    adapted.own = torch.nn.Parameter(torch.zeros(1))
    assert toy_run(tmp_path, policy=adapted).value.head.weight.dtype == torch.float32
    assert not [w for w in recwarn if "lose small steps" in str(w.message)]
    folder = save_pair(tmp_path / "policy", modern(LlamaConfig, LlamaForCausalLM).bfloat16(), letters())
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="lose small steps"):
        run = toy_run(tmp_path, policy=policy, reference=folder)
    rollout = rlaif.roll_out(run)
    assert (rollout.kl[rollout.mask] == 0).all(), "is it rounded where the policy is not, in its angles?"


def test_a_tokenizer_of_whole_words_need_not_know_those_of_the_template(tmp_path):
    words = {"<unk>": 0, "ab": 1, "c": 2, "<eos>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    run = toy_run(tmp_path, tokenizer=tokenizer, template=None, missing_eos_score=math.inf)
    assert len(rlaif.roll_out(run, ["ab", "c"]).responses) == 2


def test_a_copy_of_the_file_alone_says_that_its_default_models_are_not_beside_it(
        tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    file = shutil.copy(HERE / "rlaif.py", tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [file])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(file, run_name="__main__")
    missing = tmp_path / "there" / "tiny_models" / "policy"
    assert capsys.readouterr().err.strip() == f"rlaif: policy: there is no folder {missing}"
    assert [path.name for path in tmp_path.iterdir()] == ["there"], "nothing is written"


def test_the_settings_come_from_the_flags_and_the_paths_from_beside_the_file(tmp_path, monkeypatch, capsys):
    """Wherever it is called from; a file of flags beside the script sets nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rlaif.args").write_text("--beta 7.5")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "rlaif.py")])
    seen = []
    monkeypatch.setattr(rlaif, "run_and_report", seen.append)
    assert rlaif.main([]) == 0
    config = rlaif.check_config(seen[0])
    for path in (config.policy, config.preference, config.prompts, config.eval_prompts):
        assert os.path.isabs(path) and os.path.exists(path)
    assert config.gold == "tiny_models.world:gold_scores" and config.beta == rlaif.Config().beta
    assert config.out == "runs/seed-0"
    assert rlaif.main(["--template", r"{prompt}\nA:"]) == 0 and seen[1].template == "{prompt}\nA:"
    with pytest.raises(SystemExit, match="^0$"):
        rlaif.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(rlaif.Config):
        assert f"--{field.name}" in said and field.metadata["help"].split(":")[0] in said, field.name


def test_a_run_that_is_killed_has_said_how_to_go_on_and_goes_on_so(in_bench, tmp_path, capsys, monkeypatch):
    """By kill -9, which nothing can catch: its truth does that when it is asked for the sixth time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "killer.py").write_text(inspect.cleandoc("""
        import os

        def gold(prompts, responses):
            with open("calls", "a") as file:
                file.write(".")
            return [0.5] * len(responses) if os.path.getsize("calls") != 6 else os.kill(os.getpid(), 9)"""))
    for name in ("policy", "preference", "p.txt"):
        os.symlink(in_bench / name, name)
    out, file = pathlib.Path("my runs/it's one"), str(HERE / "rlaif.py")
    command = [sys.executable, file, *map(str, BENCH_FLAGS), "--iterations", "7", "--save_every", "3",
               "--gold", "killer:gold", "--out", str(out)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL and "Traceback" not in killed.stderr, killed.stderr
    words = shlex.split(killed.stdout[killed.stdout.index("python "):].splitlines()[0])
    assert words == ["python", file, "--resume", str(out)], "it cannot be pasted into a shell"
    lines, before = (out / "metrics.jsonl").read_text().splitlines(), (out / "before.json").read_bytes()
    code, _, err = run_main(capsys, *words[2:])
    assert code == 0 and (out / "before.json").read_bytes() == before, err
    metrics = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and metrics[:3] == lines[:3], "each iteration is written when it is over"
    assert [json.loads(line)["iteration"] for line in metrics] == list(range(1, 8))


def test_learning_curves_are_drawn_and_where_matplotlib_is_missing_that_is_said(monkeypatch):
    history = [{"iteration": i, "score": 0.1 * i, "kl": 0.2 * i, "entropy": 1.0, "beta": 0.3} for i in (1, 2)]
    with monkeypatch.context() as patch, pytest.raises(ImportError, match="matplotlib"):
        patch.setitem(sys.modules, "matplotlib.figure", None)
        rlaif.draw_history(history)
    pytest.importorskip("matplotlib")
    lines = {line.get_label(): line for axis in rlaif.draw_history(history).axes for line in axis.get_lines()}
    assert set(lines) == {"score", "kl", "entropy"}, "a truth that is not there is not drawn"
    close(lines["kl"].get_xydata(), [[1, 0.2], [2, 0.4]], "a curve shows other numbers")


# The tiny world, and notebooks ------------------------------------------------------------------------------


def test_the_shipped_policy_gets_better_by_the_score_and_by_the_truth():
    run = rlaif.prepare(rlaif.Config(device="cpu", iterations=4, eval_samples=4), gold=world.gold_scores)
    assert run.prompts == world.PROMPTS and run.held_out == world.HELDOUT_PROMPTS
    before, replies = rlaif.evaluate(run)
    assert abs(before["score"]) < 0.4 and before["eos_fraction"] > 0.98, before
    assert statistics.fmean(world.is_fluent(row["response"]) for row in replies) > 0.95
    assert abs(before["kl"]) < 1e-6, "the policy is its own reference, yet there is a KL"
    assert all(world.gold_score(row["prompt"], row["response"]) == row["gold"] for row in replies)
    for metrics in rlaif.iterate(run):
        assert abs(metrics["ratio"] - 1) < 0.1 and 0 < metrics["distinct"] <= 1
    after, _ = rlaif.evaluate(run)
    for name in ("score", "gold"):
        assert after[name] > before[name] + 0.25, f"{before} -> {after}"
    judge, own = rlaif.load(AutoModelForCausalLM, str(HERE / "tiny_models/judge"), "judge", "cpu")
    prompts, others = zip(*((row["prompt"], row["response"]) for row in replies))
    best = [*map(world.best_reply, prompts)]
    labels = rlaif.judge_pairs(judge, own, rlaif.CONSTITUTION, prompts, best, others)
    # 0.69 is found; a judge that guesses, or always takes the first, says 0.5.
    assert labels.mean() > 0.6, "the shipped judge does not prefer the best replies"
    for tokenizer in (run.tokenizer, own, run.score.tokenizer):
        ids = tokenizer("Any t\u00e9xt,\n \U0001F600!").input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "Any t\u00e9xt,\n \U0001F600!"


SOURCE = (HERE / "rlaif.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("file,cells", [(None, True), ("launcher.py", False), (str(HERE / "rlaif.py"), True)])
def test_pasted_into_cells_all_is_defined_and_nothing_starts(file, cells, tmp_path, monkeypatch, capsys):
    """Whole or cell by cell; some kernels, as VS Code's, set __file__ to what they show."""
    monkeypatch.setattr(sys, "argv", ["/opt/ipykernel_launcher.py", "-f", "connection.json"])
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.chdir(HERE)
    kernel = vars(main)
    kernel.update({"__file__": file} if file else {})
    for number, cell in enumerate(re.split(r"^(?=# %%)", SOURCE, flags=re.MULTILINE) if cells else [SOURCE]):
        exec(compile(cell, f"<cell {number}>", "exec"), kernel)
    assert capsys.readouterr() == ("", "")
    assert {name for name in vars(rlaif) if name[:2] != "__"} <= {*kernel}, "some are not defined"
    config, default = kernel["Config"], rlaif.Config()
    assert config() == config(**dataclasses.asdict(default)), "the default paths are others"
    config = config(**dataclasses.asdict(toy_config(tmp_path, iterations=1, ppo_epochs=1)))
    (metrics,) = kernel["train"](config, score=count_a, policy=gpt2(), tokenizer=letters())
    assert metrics["iteration"] == 1


def test_readmes_steps_of_rloo_and_grpo_learn_without_a_critic(tmp_path):
    """Their code as it stands there: a group's advantages sum to 0, and the KL in the loss pulls back."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    names = {name: getattr(rlaif, name) for name in ("roll_out", "update", "whiten", "kl_estimate")}
    for block in re.findall(r"```python\n(def \w+_step.*?)```", readme, re.DOTALL):
        exec(block, names)
    for step, beta in ((names["rloo_step"], 0.2), (names["grpo_step"], 0.0)):
        run = toy_run(tmp_path, value_coef=0.0, missing_eos_score=math.inf, ppo_epochs=1, beta=beta)
        before = weights_of(run.policy)
        assert step(run, ["ab", "c", "ab"])["grad_norm"] > 0 and not all_equal(before, weights_of(run.policy))
        assert run.rollout.prompts == [prompt for prompt in ("ab", "c", "ab") for _ in range(4)]
    close(run.rollout.whitened[:, 0].view(3, 4).sum(dim=1), torch.zeros(3), "not 0 in a group", atol=1e-5)
    again, pulled = copy.deepcopy(run), copy.deepcopy(run)
    step(again, ["ab"], beta=0.0), step(pulled, ["ab"], beta=50.0)
    assert not all_equal(weights_of(again.policy), weights_of(pulled.policy)), "no KL in the loss"


def test_every_section_is_a_cell_and_they_stand_in_order():
    markers = re.findall(r"^# %% (.*)$", SOURCE, re.MULTILINE)
    assert SOURCE.startswith(f"# %% {markers[0]}\n"), "the first stands on line 1"
    numbered = [marker.split(".")[0] for marker in markers if marker[0].isdigit()]
    assert numbered == [*map(str, range(12))], "sections 0 to 11, each once and in order"


def test_each_public_function_needs_nothing_but_torch_when_it_is_copied_alone():
    for function in (preference_loss, generate, token_logprobs, kl_estimate, update_beta, masked_mean,
                     shape_rewards, dense_scores, gae, whiten, policy_loss, value_loss):
        code = [function.__code__]
        for part in code:  # grows by the functions and comprehensions within
            code += [inner for inner in part.co_consts if isinstance(inner, types.CodeType)]
        needed = {i.argval for part in code for i in dis.get_instructions(part) if i.opname == "LOAD_GLOBAL"}
        assert needed - {*dir(builtins)} <= {"torch", "logsigmoid"} and function.__doc__, function.__name__
