"""What PPO costs here, and what it costs with TRL:  python -m tiny_models.speed  [--only NAME]

    growth    how the time of each phase grows with batch, length, layers and width
    turns     episodes per second beside TRL's, the two in turns in one process
    start     from nothing to the end of the first iteration, and the peak memory, beside TRL's
    quality   how long the default run takes to a good policy, and TRL on the same models
    seeds     how the default run ends on ten fresh seeds
    memory    what each step adds to a process, for a vocabulary of 49,152, and what would fit a GPU

The first three are measured on random models whose responses all have their full length, the last on the
shipped ones. TRL is release 1.12.0, the last with a PPOTrainer (pip install trl==1.12.0); without it, its
part is left out. Everything runs on the CPU, by the clock on the wall, so let nothing else run meanwhile.
"""

import argparse
import contextlib
import copy
import ctypes
import itertools
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from tokenizers import Tokenizer, decoders, models
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config,
                          GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
                          LlamaForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback)
from transformers.utils import logging as transformers_logging

import rlaif
from tiny_models import world

SIZE = {"layers": 2, "width": 128, "batch": 64, "length": 28, "value": "shared"}
GROWTH = {"batch": (16, 64, 256, 512), "length": (8, 28, 64, 128), "layers": (1, 2, 4, 8),
          "width": (64, 128, 256, 512)}
SIDE_BY_SIDE = [{**SIZE, "layers": layers, "value": value}
                for layers in (2, 4) for value in ("shared", "separate")]
PHASES = ("generate", "score", "policy", "reference", "update")
GOLDS = (1.0, 2.0, 2.5)
QUALITY_OF_TRL = ((0.3, 3e-4), (0.15, 1e-5))  # price of KL and Adam's epsilon: the rest as below


# The work


def random_model(kind, layers, width):
    """A GPT-2 with fresh weights over 256 tokens, each a character of its own, and its tokenizer. There is no
    EOS, so every response has its full length."""
    tokenizer = Tokenizer(models.BPE({chr(0x4E00 + i): i for i in range(256)}, []))
    tokenizer.decoder = decoders.Fuse()
    config = GPT2Config(vocab_size=256, n_positions=256, n_embd=width, n_layer=layers, n_head=4,
                        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, num_labels=1, pad_token_id=0,
                        activation_function="gelu_pytorch_tanh", bos_token_id=None, eos_token_id=None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=chr(0x4E00))
    return kind(config).eval(), tokenizer


def train_here(iterations, layers, width, batch, length, value):
    """Train a random model on prompts of 12 tokens -> the Run, and the seconds of each iteration."""
    torch.manual_seed(0)
    policy, tokenizer = random_model(GPT2LMHeadModel, layers, width)
    scorer, _ = random_model(GPT2ForSequenceClassification, layers, width)
    with tempfile.TemporaryDirectory() as folder:
        prompts = ["".join(map(chr, row)) for row in torch.randint(0x4E01, 0x4F00, (256, 12)).tolist()]
        pathlib.Path(folder, "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
        config = rlaif.Config(
            prompts=f"{folder}/prompts.txt", template="{prompt}", iterations=iterations, batch_size=batch,
            minibatch_size=16, ppo_epochs=4, max_new_tokens=length, value=value, device="cpu",
            learning_rate=1e-6)
        score = rlaif.PreferenceModel(scorer, tokenizer, config.template)
        run = rlaif.prepare(config, score, None, policy, tokenizer)
    clock = [time.perf_counter()]
    for _ in range(iterations):
        rlaif.update(run, rlaif.roll_out(run))
        clock.append(time.perf_counter())
    return run, [end - start for start, end in itertools.pairwise(clock)]


def time_phases(run):
    """The seconds of each phase of one more iteration, called by itself on its batch -> {phase: seconds}.
    Rewards and advantages, which come between the passes through the models, are left out."""
    r, clock = rlaif.roll_out(run), [time.perf_counter()]
    rlaif.respond(run.policy, run.tokenizer, r.prompts, run.config)
    clock.append(time.perf_counter())
    rlaif.score_responses(run, run.score, "score")
    clock.append(time.perf_counter())
    inputs = r.input_ids, r.attention_mask, r.tokens, r.mask
    for model, value in ((run.policy, run.value), (run.reference, None)):
        with torch.no_grad():
            logits, _ = rlaif.response_logits(model, *inputs, value)
            rlaif.token_logprobs(logits, r.tokens, run.config.temperature)
        clock.append(time.perf_counter())
    rlaif.update(run, r)
    clock.append(time.perf_counter())
    return {phase: end - start for phase, (start, end) in zip(PHASES, itertools.pairwise(clock), strict=True)}


class Clock(TrainerCallback):
    """Reads the time when TRL begins to train and after each iteration, less the seconds in `paused`."""

    def __init__(self):
        self.times, self.paused = [], 0.0

    def on_train_begin(self, *args, **kwargs):
        self.times.append(time.perf_counter() - self.paused)

    on_step_end = on_train_begin


def train_with_trl(clock, tokenizer, policy, reference, scorer, critic, prompts, iterations, batch,
                   minibatch, epochs, length, **settings):
    """Train with TRL's PPOTrainer, on prompts given as lists of token ids, at least a batch of them."""
    from datasets import Dataset  # here, so that the processes without TRL neither wait nor pay for it
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    transformers_logging.set_verbosity_error()
    data = Dataset.from_dict({"input_ids": prompts})
    with (tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere,
          contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere)):
        config = PPOConfig(
            folder, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=batch, num_mini_batches=batch // minibatch,
            num_ppo_epochs=epochs, total_episodes=batch * iterations, response_length=length,
            temperature=1.0, num_sample_generations=0, use_cpu=True, bf16=False, report_to="none",
            disable_tqdm=True, save_strategy="no", logging_strategy="no", **settings)
        PPOTrainer(config, processing_class=tokenizer, model=policy, ref_model=reference,
                   reward_model=scorer, value_model=critic, train_dataset=data, eval_dataset=data,
                   callbacks=[clock]).train()


def train_random_with_trl(iterations, layers, width, batch, length, value):
    """The work of `train_here` -> seconds of each iteration after the first. Whatever `value` says, TRL has a
    value model of its own."""
    torch.manual_seed(0)
    (policy, tokenizer), (reference, _), (scorer, _), (critic, _) = (
        random_model(kind, layers, width) for kind in (GPT2LMHeadModel, GPT2ForSequenceClassification)
        for _ in range(2))
    tokenizer.add_special_tokens({"eos_token": "<eos>"})  # TRL wants one; no model here can write its id, 256
    clock, prompts = Clock(), torch.randint(1, 256, (1024, 12)).tolist()
    train_with_trl(clock, tokenizer, policy, reference, scorer, critic, prompts, iterations, batch,
                   minibatch=16, epochs=4, length=length, learning_rate=1e-6)
    return [end - start for start, end in zip(clock.times[1:], clock.times[2:])]


def in_own_process(function, *args, **kwargs):
    """Call a function in a fresh Python -> what it returns, the seconds from nothing until it returns, and
    the peak memory of the process in MB, as Linux counts it."""
    started = time.time()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        result, ended, memory = process.submit(measured, function, *args, **kwargs).result()
    return result, ended - started, memory


def measured(function, *args, **kwargs):
    transformers_logging.disable_progress_bar()
    result, ended = function(*args, **kwargs), time.time()
    status = pathlib.Path("/proc/self/status").read_text()  # getrusage would count the parent's memory too
    return result, ended, int(status.split("VmHWM:")[1].split()[0]) / 1024


# The tables


def row(*cells):
    """Print one line of a Markdown table, at once."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*cells):
    print()
    row(*cells)
    print("|---" * len(cells) + "|")


def growth():
    """Milliseconds of each phase, and of the rate of a large matrix product the share that updates reach."""
    head("layers", "width", "batch", "length", *(f"{phase}, ms" for phase in PHASES), "episodes per second",
         "a matrix product, GFLOP/s", "updates reach")
    square = torch.randn(1024, 1024)
    timer = Timer("x @ x", globals={"x": square}, num_threads=torch.get_num_threads())
    for size in [{**SIZE, name: value} for name, values in GROWTH.items() for value in values]:
        run, _ = train_here(1, **size)  # it warms up
        times = [time_phases(run) for _ in range(3)]
        seconds = {phase: statistics.median(taken[phase] for taken in times) for phase in PHASES}
        rollout = rlaif.roll_out(run)
        with FlopCounterMode(display=False) as counter:
            rlaif.update(run, rollout)
        product = 2 * len(square) ** 3 / timer.blocked_autorange().median
        reached = counter.get_total_flops() / seconds["update"]
        row(*(size[name] for name in ("layers", "width", "batch", "length")),
            *(f"{1000 * seconds[phase]:.0f}" for phase in PHASES),
            f"{size['batch'] / sum(seconds.values()):.0f}", f"{product / 1e9:.0f}",
            f"{reached / product:.0%}")


def turns():
    """Episodes per second, five times five iterations of each; the first iteration of a turn warms up."""
    head("layers", "value", "episodes per second", "TRL 1.12.0", "ratio of medians", "of each turn")
    for size in SIDE_BY_SIDE:
        here, there = [], []
        for _ in range(5):
            here.append(train_here(6, **size)[1][1:])
            there.append(train_random_with_trl(6, **size))
        ratios = sorted(statistics.median(b) / statistics.median(a) for a, b in zip(here, there))
        here, there = (size["batch"] / statistics.median(sum(seconds, [])) for seconds in (here, there))
        row(size["layers"], size["value"], f"{here:.0f}", f"{there:.0f}", f"{here / there:.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in ratios))


def start():
    """Time to the end of the first iteration, and peak memory, each in a process of its own."""
    head("layers", "value", "to the end of the first iteration, s", "TRL", "peak memory, MB", "TRL")
    for size in SIDE_BY_SIDE:
        _, seconds, memory = in_own_process(one_iteration_here, size)
        _, trl_seconds, trl_memory = in_own_process(train_random_with_trl, 1, **size)
        row(size["layers"], size["value"], f"{seconds:.1f}", f"{trl_seconds:.1f}", f"{memory:.0f}",
            f"{trl_memory:.0f}")


def one_iteration_here(size):
    train_here(1, **size)  # what it returns is too large to send


def quality():
    """Seconds of training until the mean gold of a batch first reaches a mark, and the peak memory of all of
    it. Evaluation does not count, nor does TRL's gold; ours does, a few milliseconds in all."""
    head("shipped models", *(f"gold {gold:g}, s" for gold in GOLDS), "at the end", "peak memory, MB")
    commands = {"the default run": (quality_here,)}
    if trl_is_here():
        commands |= {f"TRL 1.12.0, kl_coef {beta}, adam_epsilon {epsilon}": (quality_of_trl, beta, epsilon)
                     for beta, epsilon in QUALITY_OF_TRL}
    for name, command in commands.items():
        points, _, memory = in_own_process(*command)
        reached = [[seconds for seconds, gold in points if gold >= mark] for mark in GOLDS]
        seconds, gold = points[-1]
        row(name, *(f"{found[0]:.1f}" if found else "never" for found in reached),
            f"{gold:.2f} after {seconds:.1f} s", f"{memory:.0f}")


def quality_here():
    """Measure, train and measure again, as the command does, without files and pictures -> of each iteration
    the seconds of training until its end, and the gold of its batch."""
    run = rlaif.prepare(rlaif.Config(device="cpu"))
    rlaif.evaluate(run)
    began, points = time.perf_counter(), []
    for _ in range(run.config.iterations):
        metrics = rlaif.update(run, rlaif.roll_out(run))
        points.append((time.perf_counter() - began, metrics["gold"]))
    rlaif.evaluate(run)
    return points


def quality_of_trl(kl_coef, adam_epsilon, iterations=80):
    """The same with TRL. Its value model starts from the preference model, and its settings stand here, so
    that a default of ours that changes leaves them as they are."""
    config = rlaif.Config()
    policy, tokenizer = rlaif.load(AutoModelForCausalLM, config.policy, "policy", "cpu")
    scorer, _ = rlaif.load(AutoModelForSequenceClassification, config.preference, "preference", "cpu")
    reference, critic = copy.deepcopy(policy), copy.deepcopy(scorer)
    tokenizer.padding_side = "left"
    clock, golds = Clock(), []
    before, after = rlaif.PLAIN.split("{prompt}")

    def read_gold(model, args, inputs):
        began = time.perf_counter()
        texts = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        pairs = [text.removeprefix(before).split(after, 1) for text in texts]
        golds.append(statistics.mean(world.gold_scores(*zip(*pairs))))
        clock.paused += time.perf_counter() - began
    scorer.base_model.register_forward_pre_hook(read_gold, with_kwargs=True)
    prompts = tokenizer([rlaif.PLAIN.format(prompt=prompt) for prompt in world.PROMPTS]).input_ids
    train_with_trl(clock, tokenizer, policy, reference, scorer, critic, 8 * prompts, iterations, batch=128,
                   minibatch=32, epochs=2, length=28, stop_token="eos", missing_eos_penalty=1.0,
                   cliprange=0.1, learning_rate=1e-3, kl_coef=kl_coef, adam_epsilon=adam_epsilon)
    return [(end - clock.times[0], gold) for end, gold in zip(clock.times[1:], golds, strict=True)]


def seeds():
    """How the default run ends, on seeds that chose no default."""
    head("seed", "gold", "score", "KL, nats", "fluent", "EOS", "entropy", "length")
    for seed in range(300, 310):
        run = rlaif.prepare(rlaif.Config(seed=seed, device="cpu"))
        for _ in rlaif.iterate(run):
            pass
        ends, replies = rlaif.evaluate(run)
        fluent = statistics.mean(world.is_fluent(reply["response"]) for reply in replies)
        row(seed, f"{ends['gold']:.3f}", f"{ends['score']:.3f}", f"{ends['kl']:.2f}", f"{fluent:.1%}",
            f"{ends['eos_fraction']:.1%}", f"{ends['entropy']:.3f}", f"{ends['length']:.1f}")


VOCABULARY, LENGTH, AT_ONCE = 49152, 32, 4  # of the models whose memory is measured; rows in one pass
STEPS = ("generate", "steps 5 to 8", "evaluate", "update", "fit", "judge")


def memory():
    """What each step adds to a process at batches of 8 and 64, in passes of 4 rows; then, by arithmetic from
    it, what fits a GPU."""
    # Or the allocator keeps large blocks that were freed, in some processes and not in others: up to 50 MB.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    head("megabytes that a step adds, the median of three", *STEPS)
    for batch in (8, 64):
        added = {step: statistics.median(in_own_process(added_memory, step, batch)[0] for _ in range(3))
                 for step in STEPS}
        row(f"batch {batch}", *(f"{megabytes:.0f}" for megabytes in added.values()))
    pass_bytes = added["steps 5 to 8"] * 1e6 / (AT_ONCE * LENGTH * VOCABULARY)
    print(f"\nsteps 5 to 8: {pass_bytes:.1f} bytes for each logit of one pass of {AT_ONCE} rows")
    if trl_is_here():
        there = in_own_process(trl_memory_per_logit)[0]
        print(f"TRL's batch_generation: {there:.1f} bytes for each logit of the whole batch")
    head("GB, replies of 256 tokens, vocabulary 152k, float32", "weights, Adam and reference",
         "logits, 64 replies at once", f"logits, {AT_ONCE} at once", "with an adapter, reference shared",
         "fits 24 GB", "fits 80 GB")
    logits = {rows: pass_bytes * rows * 256 * 152e3 / 1e9 for rows in (64, AT_ONCE)}
    for billions in (0.5, 1.5, 7.0):
        full = billions * (4 + 4 + 8 + 4)  # weights, gradient, Adam's two moments, the reference's weights
        adapter = billions * 4 * 1.04  # one base; an adapter of a hundredth, its gradient and its moments
        ways = {"all at once": full + logits[64], "micro-batches": full + logits[AT_ONCE],
                "an adapter": adapter + logits[AT_ONCE]}
        fits = [", ".join(way for way, size in ways.items() if size < limit) or "none" for limit in (24, 80)]
        row(f"{billions:g} billion weights", f"{full:.0f}", f"{logits[64]:.0f}", f"{logits[AT_ONCE]:.1f}",
            f"{adapter:.0f}", *fits)


def wide_model(kind, **settings):
    """A Llama of two narrow layers and a wide vocabulary, and a tokenizer of single letters."""
    letters = Tokenizer(models.BPE({chr(97 + i): i for i in range(26)}, []))
    letters.decoder = decoders.Fuse()
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=512, bos_token_id=None,
                         eos_token_id=None, pad_token_id=None, **settings)
    return kind(config).eval(), PreTrainedTokenizerFast(tokenizer_object=letters)


def peak_added(step):
    """Megabytes by which the resident memory of this process, at its highest, passes what it was before."""
    def field(name):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1000
    ctypes.CDLL(None).malloc_trim(0)  # what is freed but still held would hide the next step
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest is counted from here (Linux)
    before = field("VmRSS")
    step()
    return field("VmHWM") - before


def added_memory(step, batch):
    """What one step of a run with `batch` replies adds, in megabytes, at its first call in this process."""
    torch.manual_seed(0)
    policy, tokenizer = wide_model(LlamaForCausalLM)
    scorer, _ = wide_model(LlamaForSequenceClassification, num_labels=1)
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "prompts.txt").write_text("abcd\nefg\nhi\n")
        config = rlaif.Config(prompts=f"{folder}/prompts.txt", template="{prompt}", max_new_tokens=LENGTH,
                              batch_size=batch, minibatch_size=AT_ONCE, micro_batch_size=AT_ONCE,
                              device="cpu", iterations=2, eval_samples=batch)
        score = rlaif.PreferenceModel(scorer, tokenizer, "{prompt}", 4 * AT_ONCE)
        run = rlaif.prepare(config, score, policy=policy, tokenizer=tokenizer)
    prompts = (run.prompts * batch)[:batch]
    with torch.no_grad():
        written = rlaif.respond(policy, tokenizer, prompts, config)
    if step == "generate":
        with torch.no_grad():
            return peak_added(lambda: rlaif.respond(policy, tokenizer, prompts, config))
    if step == "fit":
        rows = score.tokenize(prompts, written.responses, [True] * batch)
        labels = torch.rand(batch)
        return peak_added(lambda: rlaif.fit_preference(score, rows, rows[::-1], labels, 1,
                                                       micro_batch_size=AT_ONCE))
    if step == "judge":
        questions = ["which of two" + 20 * "abc"] * batch
        text = Tokenizer(models.BPE({chr(i): i for i in range(32, 127)}, []))
        asked = PreTrainedTokenizerFast(tokenizer_object=text)
        return peak_added(lambda: rlaif.ask_judge(policy, asked, questions, 4 * AT_ONCE))
    rlaif.respond = lambda *args: copy.copy(written)  # what follows is measured without it
    if step == "update":
        rollout = rlaif.roll_out(run, prompts)
        return peak_added(lambda: rlaif.update(run, rollout))
    if step == "evaluate":
        return peak_added(lambda: rlaif.evaluate(run, run.prompts[:1]))
    return peak_added(lambda: rlaif.roll_out(run, prompts))


def trl_memory_per_logit(batch=32):
    """Bytes that TRL's batch_generation adds for each of batch * LENGTH * VOCABULARY logits."""
    from transformers import GenerationConfig
    from trl.experimental.ppo.ppo_trainer import batch_generation
    policy, _ = wide_model(LlamaForCausalLM)
    queries = torch.zeros(batch, 4, dtype=torch.long)
    how = GenerationConfig(max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=True, top_k=0, top_p=1.0)
    with torch.no_grad():
        added = peak_added(lambda: batch_generation(policy, queries, batch, 0, how))
    return added * 1e6 / (batch * LENGTH * VOCABULARY)


def main():
    """Print the tables, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"growth": growth, "turns": turns, "start": start, "quality": quality, "seeds": seeds,
              "memory": memory}
    parser.add_argument("--only", choices=list(tables), help="print one table")
    only = parser.parse_args().only
    if not trl_is_here():
        print("no comparison: it needs trl==1.12.0")
        del tables["turns"], tables["start"]
    for name, table in tables.items():
        if only in (None, name):
            table()


def trl_is_here():
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # or it warns that this part of it may change
    try:
        import trl.experimental.ppo
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    main()
