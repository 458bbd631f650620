"""One experiment for each claim about RLAIF with PPO:  python -m tiny_models.experiments  [--only NAME]

Every experiment is a handful of arms, every arm a training run on the shipped models for each of three seeds (0, the
default, among them), measured by the gold score on held-out prompts, which nothing is trained on. Results are kept as they come in
runs/experiments.jsonl, one line a run, so that an interrupted command goes on where it stopped; arms that several
experiments share are run once. The tables in README.md and the pictures in figures/ are made from those lines.
"""

import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from tokenizers import Tokenizer, decoders, models
from torch.profiler import profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

import rlaif
from tiny_models import world

FOLDER = pathlib.Path(__file__).parent
RESULTS = pathlib.Path("runs/experiments.jsonl")
SEEDS = (0, 1, 2)
SHORT = {"iterations": 30}  # the learning rate falls to 0 over these, as it does over the default 80


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def run(job):
    """Train one arm with one seed -> a dict: the job, the history of metrics, and what was measured at the end.

    A job holds `settings` (fields of Config), `seed` and `how`, a dict of what no setting can say:
    scale    multiply the preference score            labels   fit a preference model to labels made in another way
    direct   the judge itself gives the score         stale    watch the preference model age; "refit": renew it halfway
    exact    the enumerable model of the tests        yardstick  best-of-n, and the estimators of the KL
    """
    torch.set_num_threads(1)
    start, how = time.perf_counter(), job["how"]
    config = rlaif.check_config(rlaif.Config(seed=job["seed"], device="cpu", eval_samples=32, **job["settings"]))
    if "exact" in how:
        return {**job, **exact(how["exact"], job["seed"]), "seconds": time.perf_counter() - start}
    policy, tokenizer = rlaif.load(AutoModelForCausalLM, config.policy, "policy", "cpu")
    reference = copy.deepcopy(policy)
    preference = score = rlaif.load_preference(config, "cpu")
    torch.manual_seed(config.seed)
    measured, history = {}, []
    if "yardstick" in how:
        return {**job, **yardstick(config, policy, reference, tokenizer, preference), "seconds": time.perf_counter() - start}
    if "scale" in how:
        head = preference.model.score.weight
        head.data *= how["scale"]
    if "labels" in how:
        score = preference_from_labels(how["labels"], config, policy, tokenizer)
    if "direct" in how:
        score = judge_as_reward(config, reference, tokenizer)
    prepared = rlaif.prepare(config, score, None, policy, tokenizer)
    for metrics in rlaif.ppo(prepared):
        history.append({name: round(value, 5) for name, value in metrics.items()})
        if "stale" in how and metrics["iteration"] % 10 == 0:
            agreement = agreement_with_gold(preference, config, policy, tokenizer)
            if how["stale"] == "refit" and metrics["iteration"] == config.iterations // 2:
                judge, _ = rlaif.load(AutoModelForCausalLM, "tiny_models/judge", "judge", "cpu")
                fresh, _ = rlaif.preference_from_judge(config, policy, tokenizer, judge, tokenizer, rlaif.CONSTITUTION, world.PROMPTS)
                preference.model = fresh.model  # `train` holds the same PreferenceModel
                measured["agreement after refit"] = agreement_with_gold(preference, config, policy, tokenizer)
            measured[f"agreement {metrics['iteration']}"] = agreement
    if "labels" in how or "direct" in how:  # whatever was trained on, the shipped preference model measures
        prepared.score = rlaif.scorer(preference, "score", prepared)
    measured |= rlaif.evaluate(prepared)[0]
    _, rows = rlaif.evaluate(prepared, world.PROMPTS)
    by_prompt = [statistics.mean(row[4] for row in rows if row[0] == prompt) for prompt in world.PROMPTS]
    measured["kl spread over prompts"] = statistics.pstdev(by_prompt)
    measured["kl of the training prompts"] = statistics.mean(by_prompt)
    measured["parameters"] = sum(parameter.numel() for parameter in prepared.parameters)
    return {**job, "history": history, "measured": measured, "seconds": time.perf_counter() - start}


def agreement_with_gold(preference, config, policy, tokenizer, n=1024):
    """How often a preference model agrees with the gold score on pairs of the policy's own replies whose gold differs."""
    with torch.random.fork_rng():
        prompts = [world.PROMPTS[i] for i in rlaif.balanced_draw(len(world.PROMPTS), n)]
        (a, ended_a), (b, ended_b) = (rlaif.respond(policy, tokenizer, prompts, config)[4:] for _ in "ab")
    gold = torch.tensor(world.gold_scores(prompts, a)) - torch.tensor(world.gold_scores(prompts, b))
    proxy = torch.tensor(preference(prompts, a, ended_a)) - torch.tensor(preference(prompts, b, ended_b))
    differs = gold != 0
    return ((proxy > 0) == (gold > 0))[differs].float().mean().item() if differs.any() else math.nan


def preference_from_labels(kind, config, policy, tokenizer, n=4096):
    """A preference model fitted to labels made in another way: both orders, one order, hard, or by a judge that likes length."""
    judge, _ = rlaif.load(AutoModelForCausalLM, "tiny_models/judge", "judge", "cpu")
    prompts = [world.PROMPTS[i] for i in rlaif.balanced_draw(len(world.PROMPTS), n)]
    samples = [(texts, ended.tolist()) for texts, ended in (rlaif.respond(policy, tokenizer, prompts, config)[4:] for _ in "ab")]
    prob_a = rlaif.judge_pairs(judge, tokenizer, rlaif.CONSTITUTION, prompts, samples[0][0], samples[1][0], both_orders=kind != "one order")
    if kind == "hard":
        prob_a = (prob_a > 0.5).float()
    if kind == "likes length":
        longer = torch.tensor([len(a.split()) - len(b.split()) for a, b in zip(samples[0][0], samples[1][0])])
        prob_a = torch.sigmoid(torch.logit(prob_a, eps=1e-4) + 0.5 * longer)
    preference = rlaif.new_preference_model(policy, tokenizer, config.template)
    rlaif.fit_preference(preference, prompts, *samples, prob_a)
    return preference


def judge_as_reward(config, reference, tokenizer):
    """score = the judge's probability, both orders averaged, that a reply beats a reply of pi_ref to the same prompt."""
    judge, _ = rlaif.load(AutoModelForCausalLM, "tiny_models/judge", "judge", "cpu")
    rivals = {prompt: rlaif.respond(reference, tokenizer, [prompt] * 32, config)[4] for prompt in world.PROMPTS}

    def score(prompts, responses):
        against = [rivals[prompt][int(torch.randint(32, ()))] for prompt in prompts]
        return rlaif.judge_pairs(judge, tokenizer, rlaif.CONSTITUTION, prompts, responses, against).tolist()
    return score


def yardstick(config, policy, reference, tokenizer, preference, n=64):
    """Best-of-n of the reference policy by the preference score, and the KL estimators on a policy trained for 30 iterations."""
    prompts = [prompt for prompt in world.HELDOUT_PROMPTS for _ in range(512)]
    _, _, _, _, texts, ended = rlaif.respond(reference, tokenizer, prompts, config)
    scores = torch.tensor(preference(prompts, texts, ended)).view(-1, n)
    gold = torch.tensor(world.gold_scores(prompts, texts)).view(-1, n)
    best = []
    for k in (1, 2, 4, 16, 64):
        pick = scores.view(-1, k).argmax(1, keepdim=True)
        best.append({"n": k, "kl": math.log(k) - (k - 1) / k, "score": scores.view(-1, k).gather(1, pick).mean().item(),
                     "gold": gold.view(-1, k).gather(1, pick).mean().item()})
    for _ in rlaif.train(config, score=preference, policy=policy, tokenizer=tokenizer):
        pass
    with torch.no_grad():
        ids, attention, tokens, mask, _, _ = rlaif.respond(policy, tokenizer, prompts[::4], config)
        logits, ref_logits = (rlaif.response_logits(model, ids, attention, tokens, mask)[0] for model in (policy, reference))
        p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        exact = (p.exp() * (p - q)).sum(-1)[mask]
        estimates = {kind: rlaif.kl_estimate(rlaif.token_logprobs(logits, tokens), rlaif.token_logprobs(ref_logits, tokens), kind)[mask]
                     for kind in ("k1", "k2", "k3")}
    estimators = {kind: {"bias": ((k.mean() - exact.mean()) / exact.mean()).item(), "spread": (k - exact).std().item() / exact.mean().item()}
                  for kind, k in estimates.items()}
    return {"best": best, "estimators": {"exact": exact.mean().item(), **estimators}}


def exact(beta, seed):
    """PPO on the enumerable model of the tests -> its reward and KL beside the optimum's, means over the two prompts."""
    from test_rlaif import exact_run
    with tempfile.TemporaryDirectory() as folder:
        start, end, best = exact_run(pathlib.Path(folder), beta, seed)
    return {"measured": {"reward": end[0], "kl": end[1], "best reward": best[0], "best kl": best[1], "start": start[0],
                         "gap closed": (end[0] - beta * end[1] - start[0]) / (best[0] - beta * best[1] - start[0])}}


# ---------------------------------------------------------------------------------------------------------------------
# The arms: name of the experiment -> {label: (settings, how)}
# ---------------------------------------------------------------------------------------------------------------------

BETAS = (0.0, 0.1, 0.3, 0.5, 1.0, 3.0)
EXACT_BETAS = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0)
DEFAULT = rlaif.Config()


def short(**settings):
    """Settings of a short run, less those that are the default anyway, so that equal arms are recognised as such."""
    return {**SHORT, **{name: value for name, value in settings.items() if value != getattr(DEFAULT, name)}}


ARMS = {
    "beta": {f"beta {beta:g}": ({} if beta == DEFAULT.beta else {"beta": beta}, {}) for beta in BETAS}
            | {"best of n": (SHORT, {"yardstick": True})},
    "whitening": {f"score x {scale:g}, {label}": (short(**settings), {} if scale == 1 else {"scale": scale})
                  for label, settings in (("both whitened", {}), ("scores raw", {"whiten_scores": False}),
                                          ("advantages raw", {"whiten_advantages": False}))
                  for scale in (0.1, 1, 10)},
    "kl_level": {level: (short(kl_level=level), {}) for level in ("token", "sequence", "batch")},
    "beta_control": {control: (short(beta_control=control, **({} if control == "fixed" else {"kl_target": 2.0})), {})
                     for control in ("fixed", "batch", "prompt")},
    "value": {f"{value}, {head} head": (short(value=value, value_head=head), {})
              for value in ("shared", "separate", "preference") for head in ("zero", "random")},
    "estimator": {kind: (short(kl_estimator=kind), {}) for kind in ("k1", "k2", "k3")} | {"bias and spread": (SHORT, {"yardstick": True})},
    "dense": {"terminal": (SHORT, {}), "dense": (short(dense_reward=True), {})},
    "labels": {label: (SHORT, {"labels": label}) for label in ("both orders, soft", "one order", "hard", "likes length")},
    "stale": {label: ({"beta": 0.1, "pairs": 8192}, {"stale": label}) for label in ("never renewed", "refit")},
    "direct": {"preference model": (SHORT, {}), "judge itself": (SHORT, {"direct": True})},
    "gae": {f"lambda {lam:g}": (short(lam=lam), {}) for lam in (0.0, 0.5, 0.95, 1.0)},
    # without stop_kl, so that nothing but the clip holds an update back
    "clip": {f"clip {clip:g}, {epochs} epochs": (short(clip=clip, ppo_epochs=epochs, stop_kl=math.inf), {})
             for clip, epochs in ((0.05, 4), (0.1, 4), (0.2, 4), (math.inf, 4), (0.1, 1), (0.1, 2), (0.1, 8), (math.inf, 8))}
            | {"REINFORCE with a baseline": (short(clip=math.inf, ppo_epochs=1, minibatch_size=128, lam=1.0, stop_kl=math.inf), {})},
    "epsilon": {f"epsilon {epsilon:g}, learning rate {rate:g}": (short(adam_epsilon=epsilon, learning_rate=rate), {})
                for epsilon, rate in ((1e-5, 3e-4), (1e-4, 5e-4), (3e-4, 1e-3), (1e-3, 2e-3))},
    "exact": {f"beta {beta:g}": ({}, {"exact": beta}) for beta in EXACT_BETAS},
}


def key(job):
    return json.dumps([job["settings"], job["how"], job["seed"]], sort_keys=True)


def jobs_of(names):
    """Every run that the named experiments need, each once, the arms in the order of the experiments."""
    jobs = {}
    for name in names:
        for settings, how in ARMS[name].values():
            for seed in SEEDS:
                job = {"settings": settings, "how": how, "seed": seed}
                jobs.setdefault(key(job), job)
    return jobs


def load_results():
    """The runs that are done: key -> result. A line cut short by an interruption is left out."""
    done = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else []:
        try:
            result = json.loads(line)
        except ValueError:
            continue
        done[key(result)] = result
    return done


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def runs_of(done, name, label):
    """The results of one arm, over the seeds that are done."""
    settings, how = ARMS[name][label]
    found = [done.get(key({"settings": settings, "how": how, "seed": seed})) for seed in SEEDS]
    return [result for result in found if result]


def mean_and_spread(values):
    """'mean ± std' of a few numbers, over the seeds."""
    values = [value for value in values if value is not None and not math.isnan(value)]
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f} ± {statistics.pstdev(values):.2f}"


def measured(column):
    return lambda result: result["measured"].get(column)


def over_training(column, summary):
    return lambda result: summary([metrics[column] for metrics in result["history"]])


def episodes_to(gold):
    """Episodes until the gold score of a batch first reaches `gold`; all of the run's if it never does."""
    def count(result):
        batch = {**vars(DEFAULT), **result["settings"]}["batch_size"]
        return next((metrics["iteration"] * batch for metrics in result["history"] if metrics["gold"] >= gold), len(result["history"]) * batch)
    return count


GOLD, PROXY, KL, FLUENT = measured("gold"), measured("score"), measured("kl"), measured("fluency")
PEAK = over_training("gold", max)
SECONDS = over_training("episodes_per_second", lambda x: DEFAULT.batch_size / statistics.median(x))
COLUMNS = {  # name of the experiment -> {column: function of one result}
    "beta": {"gold": GOLD, "peak gold": PEAK, "proxy": PROXY, "KL": KL, "fluent": FLUENT, "EOS": measured("eos_fraction")},
    "whitening": {"gold": GOLD, "KL": KL, "fluent": FLUENT},
    "kl_level": {"gold": GOLD, "KL": KL, "highest KL of a batch": over_training("kl", max), "fluent": FLUENT},
    "beta_control": {"gold": GOLD, "KL of the training prompts": measured("kl of the training prompts"),
                     "spread over prompts": measured("kl spread over prompts"), "last beta": over_training("beta", lambda x: x[-1])},
    "value": {"gold": GOLD, "KL": KL, "explained variance, 2nd half": over_training("explained_variance", lambda x: statistics.mean(x[len(x) // 2:])),
              "seconds per iteration": SECONDS,
              "parameters, millions": lambda result: result["measured"]["parameters"] / 1e6},
    "estimator": {"gold": GOLD, "KL": KL, "fluent": FLUENT},
    "dense": {"gold": GOLD, "KL": KL, "episodes to gold 2": episodes_to(2), "explained variance": over_training("explained_variance", statistics.mean),
              "seconds per iteration": SECONDS},
    "labels": {"gold": GOLD, "proxy (shipped)": PROXY, "KL": KL, "length": measured("length"), "fluent": FLUENT},
    "stale": {"gold": GOLD, "peak gold": PEAK, "KL": KL, "fluent": FLUENT,
              **{f"agreement at {i}": measured(f"agreement {i}") for i in (10, 40, 80)}, "after the refit": measured("agreement after refit")},
    "direct": {"gold": GOLD, "KL": KL, "fluent": FLUENT, "seconds per iteration": SECONDS},
    "gae": {"gold": GOLD, "KL": KL, "episodes to gold 2": episodes_to(2), "explained variance": over_training("explained_variance", statistics.mean)},
    "clip": {"gold": GOLD, "KL": KL, "episodes to gold 2": episodes_to(2),
             "mean approximate KL, old to new, 10⁻³ nats a token": over_training("approx_kl", lambda x: 1000 * statistics.mean(x)),
             "largest of it": over_training("approx_kl", lambda x: 1000 * max(x))},
    "epsilon": {"gold": GOLD, "KL": KL, "fluent": FLUENT, "EOS": measured("eos_fraction")},
    "exact": {"reward": measured("reward"), "best reward": measured("best reward"), "KL": KL, "best KL": measured("best kl"), "gap closed": measured("gap closed")},
}


def table(done, name):
    """One experiment as a Markdown table: a row an arm, mean ± std over the seeds."""
    lines = [f"| {name} | {' | '.join(COLUMNS[name])} |", "|---" * (len(COLUMNS[name]) + 1) + "|"]
    for label in ARMS[name]:
        results = runs_of(done, name, label)
        if results and "measured" in results[0]:
            lines.append(f"| {label} | " + " | ".join(mean_and_spread(map(column, results)) for column in COLUMNS[name].values()) + " |")
    text = "\n".join(lines)
    if name == "beta" and (results := runs_of(done, name, "best of n")):
        text += "\n\n| best of n of the reference | KL at most | proxy | gold |\n|---|---|---|---|"
        for i, row in enumerate(results[0]["best"]):
            text += (f"\n| {row['n']} | {row['kl']:.2f} | {mean_and_spread(r['best'][i]['score'] for r in results)} | "
                     f"{mean_and_spread(r['best'][i]['gold'] for r in results)} |")
    if name == "estimator" and (results := runs_of(done, name, "bias and spread")):
        exact_kl = mean_and_spread(r["estimators"]["exact"] for r in results)
        text += f"\n\n| estimator, against the exact KL of a token ({exact_kl} nats) | bias / exact | spread / exact |\n|---|---|---|"
        for kind in ("k1", "k2", "k3"):
            text += (f"\n| {kind} | {mean_and_spread(r['estimators'][kind]['bias'] for r in results)} | "
                     f"{mean_and_spread(r['estimators'][kind]['spread'] for r in results)} |")
    return text


def write_tables(done, names):
    """Put each experiment's table between its two markers in README.md; what is written around them stays."""
    readme = FOLDER / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name in names:
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if start in text and end in text:
            head, rest = text.split(start, 1)
            text = head + start + table(done, name) + "\n" + end + rest.split(end, 1)[1]
    readme.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def curve(results, column):
    """The mean over the seeds of one column of the history -> a list, one number an iteration."""
    return [statistics.mean(values) for values in zip(*([metrics[column] for metrics in result["history"]] for result in results))]


def draw(done, name):
    """Draw one experiment into figures/NAME.png: gold over training and over the root of the KL, and the arms at their end."""
    from matplotlib.figure import Figure
    arms = {label: results for label in ARMS[name] if (results := runs_of(done, name, label)) and "measured" in results[0]}
    if not arms:
        return
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    if name == "exact":
        axis = figure.subplots()
        for label, (of_best, of_end) in {"optimum": ("best", ""), "PPO": ("", "")}.items():
            points = [(r["measured"]["best kl" if of_best else "kl"], r["measured"]["best reward" if of_best else "reward"])
                      for results in arms.values() for r in results]
            axis.plot(*zip(*sorted(points)), "o" if label == "PPO" else "k+", ms=5 if label == "PPO" else 11, label=label, alpha=0.7)
        axis.set(xlabel="KL to the reference, nats", ylabel="reward", title="end points for every beta and seed, beside the exact optimum of each")
        axis.legend()
    else:
        left, middle, right = figure.subplots(1, 3)
        for label, results in arms.items():
            gold, kl = curve(results, "gold"), curve(results, "kl")
            left.plot(range(1, len(gold) + 1), gold, label=label)
            middle.plot([math.sqrt(max(x, 0)) for x in kl], gold, ".-", lw=0.5, ms=3, label=label)
        if name == "beta" and (results := runs_of(done, name, "best of n")):
            rows = results[0]["best"]
            middle.plot([math.sqrt(row["kl"]) for row in rows], [statistics.mean(r["best"][i]["gold"] for r in results) for i in range(len(rows))],
                        "k--", label="best of n")
        column = {"beta_control": "spread over prompts", "value": "explained variance, 2nd half", "stale": "agreement at 80", "labels": "length",
                  "beta": "proxy"}.get(name, "KL")
        values = [[x for x in map(COLUMNS[name][column], results) if x is not None] for results in arms.values()]
        right.bar(range(len(arms)), list(map(statistics.mean, values)), yerr=list(map(statistics.pstdev, values)), color=[f"C{i % 10}" for i in range(len(arms))])
        right.set_xticks(range(len(arms)), list(arms), rotation=40, ha="right", fontsize=7)
        left.set(xlabel="iteration", ylabel="gold")
        middle.set(xlabel="square root of the KL to the reference", ylabel="gold")
        right.set(title=column)
        left.legend(fontsize=7)
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    (FOLDER / "figures").mkdir(exist_ok=True)
    figure.savefig(FOLDER / "figures" / f"{name}.png", dpi=75)


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------

SIZE = {"layers": 2, "width": 128, "batch": 64, "length": 28, "value": "shared"}
SPEEDS = [{**SIZE, name: value} for name, values in {
    "batch": (16, 64, 256, 512), "length": (8, 28, 64, 128), "layers": (1, 2, 4, 8), "width": (64, 128, 256, 512)}.items() for value in values]
SIDE_BY_SIDE = [{**SIZE, "layers": layers, "value": value} for layers in (2, 4) for value in ("shared", "separate")]


def random_model(kind, layers, width):
    """A GPT-2 with fresh weights over 256 tokens, each a character of its own, and its tokenizer. There is no EOS, so that every
    response has its full length."""
    tokenizer = Tokenizer(models.BPE({chr(0x4E00 + i): i for i in range(256)}, []))
    tokenizer.decoder = decoders.Fuse()
    config = GPT2Config(vocab_size=256, n_positions=256, n_embd=width, n_layer=layers, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                        activation_function="gelu_pytorch_tanh", bos_token_id=None, eos_token_id=None, pad_token_id=0, num_labels=1)
    return kind(config).eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=chr(0x4E00))


def speed_here(iterations, layers, width, batch, length, value):
    """Train a random model on prompts of 12 tokens -> what `rlaif.prepare` made, and the metrics of each iteration."""
    torch.manual_seed(0)
    policy, tokenizer = random_model(GPT2LMHeadModel, layers, width)
    scorer, _ = random_model(GPT2ForSequenceClassification, layers, width)
    with tempfile.TemporaryDirectory() as folder:
        prompts = ["".join(map(chr, row)) for row in torch.randint(0x4E01, 0x4F00, (256, 12)).tolist()]
        pathlib.Path(folder, "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
        config = rlaif.Config(prompts=f"{folder}/prompts.txt", template="{prompt}", iterations=iterations, batch_size=batch, minibatch_size=16, ppo_epochs=4,
                              max_new_tokens=length, value=value, device="cpu", learning_rate=1e-6)
        run = rlaif.prepare(config, rlaif.PreferenceModel(scorer, tokenizer, "{prompt}"), None, policy, tokenizer)
    return run, list(rlaif.ppo(run))


def floor(run, history):
    """Print, for each phase of an iteration, the least it could take: its floating-point operations at the rate of a large
    matrix product, and its weights (with gradients and Adam's moments in the update) moved at the rate of a large copy."""
    config = run.config
    square, long = torch.randn(1024, 1024), torch.randn(2**26)
    per_flop = Timer("x @ x", globals={"x": square}, num_threads=2).blocked_autorange().median / (2 * 1024**3)
    per_byte = Timer("x.clone()", globals={"x": long}, num_threads=2).blocked_autorange().median / (8 * 2**26)
    prompts = run.prompts[:config.batch_size]
    *inputs, texts, ended = rlaif.respond(run.policy, run.tokenizer, prompts, config)

    def both():
        with torch.no_grad():
            rlaif.response_logits(run.policy, *inputs, run.value)
            rlaif.response_logits(run.reference, *inputs)
    flops = {}
    for phase, work in {"generate": lambda: rlaif.respond(run.policy, run.tokenizer, prompts, config),
                        "score": lambda: run.score(prompts, texts, ended, 0), "reference": both}.items():
        with FlopCounterMode(display=False) as counter:
            work()
        flops[phase] = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        rlaif.response_logits(run.policy, *inputs, run.value)
    flops["update"] = 3 * config.ppo_epochs * counter.get_total_flops()  # a training pass: three forward ones
    weights = 4 * sum(p.numel() for p in run.parameters)
    steps = config.ppo_epochs * config.batch_size // config.minibatch_size
    moved = {"generate": config.max_new_tokens * weights, "score": weights, "reference": 2 * weights, "update": 10 * steps * weights}
    for phase in rlaif.PHASES:
        measured = statistics.median(metrics[f"seconds_{phase}"] for metrics in history[1:])
        print(f"| {run.policy.config.n_layer} | {config.value} | {phase} | {flops[phase] / 1e9:.1f} | {1e3 * flops[phase] * per_flop:.0f} | "
              f"{moved[phase] / 1e6:.0f} | {1e3 * moved[phase] * per_byte:.0f} | {1e3 * measured:.0f} |", flush=True)


KERNELS = {"matrix products": ("aten::mm", "aten::addmm"), "attention": ("scaled_dot_product",), "GELU": ("gelu",),
           "layer norm": ("native_layer_norm",), "Adam": ("_fused_adam",)}


def kernels(run):
    """Print where a minibatch's milliseconds go in the update: what the profiler counts on its few large kernels, and all the rest,
    hundreds of small ones and what lies between them, the profiler's own half millisecond or so included."""
    config, totals = run.config, []
    for epochs in (4, 12):  # the second less the first leaves updates alone
        run.config = dataclasses.replace(config, ppo_epochs=epochs, iterations=run.iteration + 3)
        with profile() as profiler:
            seconds = [metrics["seconds_update"] for metrics in rlaif.ppo(run)]
        events = profiler.key_averages()
        totals.append([sum(event.self_cpu_time_total for event in events if any(name in event.key for name in names)) / 1e3
                       for names in KERNELS.values()] + [1e3 * sum(seconds)])
    *large, whole = [(more - less) / (3 * 8 * config.batch_size // config.minibatch_size) for less, more in zip(*totals)]
    print(f"| {run.policy.config.n_layer} | {config.value} | " + " | ".join(f"{x:.1f}" for x in [*large, whole - sum(large), whole]) + " |", flush=True)


def speed_of_trl(iterations, layers, width, batch, length):
    """Seconds of each iteration of TRL 1.12.0's PPOTrainer on the same work: same models, prompts, epochs and minibatches."""
    import datasets
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    torch.manual_seed(0)
    (policy, tokenizer), (reference, _) = (random_model(GPT2LMHeadModel, layers, width) for _ in range(2))
    (scorer, _), (value, _) = (random_model(GPT2ForSequenceClassification, layers, width) for _ in range(2))
    tokenizer.add_special_tokens({"eos_token": "<eos>"})  # TRL wants one; its id, 256, is one that no model here can write
    clock = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=1, num_mini_batches=batch // 16, num_ppo_epochs=4,
                           total_episodes=batch * iterations, response_length=length, local_rollout_forward_batch_size=batch, learning_rate=1e-6,
                           num_sample_generations=0, report_to="none", use_cpu=True, bf16=False, save_strategy="no", logging_strategy="no")
        prompts = datasets.Dataset.from_dict({"input_ids": torch.randint(1, 256, (1024, 12)).tolist()})
        PPOTrainer(config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=scorer, value_model=value,
                   train_dataset=prompts, eval_dataset=prompts.select(range(batch)), callbacks=[Clock()]).train()
    return [end - start for start, end in zip(clock, clock[1:])]


def one_iteration(started, trl, value, **size):
    """Run one iteration -> seconds since `started`, by time.time(), and the process's peak memory in MB, as Linux counts it."""
    torch.set_num_threads(2)
    speed_of_trl(1, **size) if trl else speed_here(1, value=value, **size)
    status = pathlib.Path("/proc/self/status").read_text()  # getrusage would count the parent's memory too
    return time.time() - started, int(status.split("VmHWM:")[1].split()[0]) / 1024


def first_iterations():
    """Print the time to the end of the first iteration and the peak memory, here and with TRL, each in a process of its own."""
    print("\n| layers | value | from start to the end of the first iteration, s | TRL | peak memory, MB | TRL |\n|---|---|---|---|---|---|")
    for size in SIDE_BY_SIDE:
        found = []
        for trl in (False, True):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                found.append(process.submit(one_iteration, time.time(), trl, **size).result())
        (seconds, memory), (trl_seconds, trl_memory) = found
        print(f"| {size['layers']} | {size['value']} | {seconds:.1f} | {trl_seconds:.1f} | {memory:.0f} | {trl_memory:.0f} |", flush=True)


def speed():
    """Print episodes per second as the work grows, and, where TRL 1.12.0 is installed, beside it: in turns in this process, then
    each in a process of its own."""
    torch.set_num_threads(2)
    print("\n| layers | width | batch | length | episodes per second | where the time went |\n|---|---|---|---|---|---|")
    for size in SPEEDS:
        run, history = speed_here(4, **size)
        rate = statistics.median(metrics["episodes_per_second"] for metrics in history[1:])
        print(f"| {size['layers']} | {size['width']} | {size['batch']} | {size['length']} | {rate:.0f} "
              f"| {rlaif.where_the_time_went(run, history).split(': ')[1]} |", flush=True)
    print("\n| layers | value | phase | GFLOP | at the rate of a matrix product, ms | MB | at the rate of a copy, ms | measured, ms |\n"
          "|---|---|---|---|---|---|---|---|")
    for size in SIDE_BY_SIDE:
        floor(*speed_here(6, **size))
    print(f"\n| layers | value | {' | '.join(KERNELS)} | all the rest | a minibatch, ms |\n|---|---|" + "---|" * (len(KERNELS) + 2))
    for size in SIDE_BY_SIDE:
        kernels(speed_here(2, **size)[0])
    try:
        import trl
    except ImportError:
        return print("\nno comparison: it needs trl==1.12.0")
    print(f"\n| layers | value | episodes per second | TRL {trl.__version__} | ratio of medians | of each turn |\n|---|---|---|---|---|---|")
    for size in SIDE_BY_SIDE:
        here, there = [], []
        for _ in range(5):  # in turns; the first iteration of each warms up
            here.append([size["batch"] / metrics["episodes_per_second"] for metrics in speed_here(6, **size)[1][1:]])
            there.append(speed_of_trl(6, **{name: size[name] for name in ("layers", "width", "batch", "length")}))
        turns = sorted(statistics.median(b) / statistics.median(a) for a, b in zip(here, there))
        here, there = (size["batch"] / statistics.median(sum(seconds, [])) for seconds in (here, there))
        print(f"| {size['layers']} | {size['value']} | {here:.0f} | {there:.0f} | {here / there:.2f} | {', '.join(f'{x:.2f}' for x in turns)} |", flush=True)
    first_iterations()


def main():
    """Run what is not done yet, then print and write the tables and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ARMS), help="run one experiment")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--speed", action="store_true", help="measure how the cost grows, on random models; no experiment is run")
    args = parser.parse_args()
    if args.speed:
        return speed()
    names = [args.only] if args.only else list(ARMS)
    done = load_results()
    todo = [job for name, job in jobs_of(names).items() if name not in done]
    RESULTS.parent.mkdir(exist_ok=True)
    if todo:
        os.environ["TQDM_DISABLE"] = "1"  # of the workers' own bars
        with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool, open(RESULTS, "a") as file:
            futures = [pool.submit(run, job) for job in todo]
            for future in tqdm(as_completed(futures), total=len(todo), desc="runs", unit="run", disable=False):
                result = future.result()
                done[key(result)] = result
                file.write(json.dumps(result) + "\n")
                file.flush()
    for name in names:
        print(f"\n{table(done, name)}")
    write_tables(done, names)
    try:
        for name in names:
            draw(done, name)
    except ImportError:
        print("\nno pictures: they need matplotlib")


if __name__ == "__main__":
    main()
