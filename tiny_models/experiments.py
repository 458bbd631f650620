"""One experiment for each claim about RLAIF with PPO:  python -m tiny_models.experiments  [--only NAME]

Every experiment is a handful of arms, every arm a training run on the shipped models for each of three seeds
(0, the default, among them), measured by the gold score on held-out prompts, which nothing is trained on.
Results are kept as they come in runs/experiments.jsonl, one line a run, so that an interrupted command goes
on where it stopped; arms that several experiments share are run once. The tables in README.md and the
pictures in figures/ are made from those lines.
"""

import argparse
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
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rlaif
from tiny_models import world
from tiny_models.exact import exact_run

FOLDER = pathlib.Path(__file__).parent
RESULTS = pathlib.Path("runs/experiments.jsonl")
SEEDS = (0, 1, 2)
SHORT = {"iterations": 30}  # the learning rate falls to 0 over these, as it does over the default's


# One run


def run(job):
    """Train one arm with one seed -> a dict: the job, the history of metrics, and what the end measured.

    A job holds `settings` (fields of Config), `seed` and `how`, a dict of what no setting can say:
    scale    multiply the preference score      labels     fit a preference model to labels made otherwise
    direct   the judge itself gives the score   stale      watch the preference model age; "refit": renew it
    exact    PPO in the enumerable world        yardstick  best-of-n, and the estimators of the KL
    """
    torch.set_num_threads(1)
    start, how = time.perf_counter(), job["how"]
    if "exact" in how:
        measured = exact(how["exact"], job["seed"])
        return {**job, "measured": measured, "seconds": time.perf_counter() - start}
    config = rlaif.Config(seed=job["seed"], device="cpu", eval_samples=32, **job["settings"])
    policy, tokenizer = rlaif.load(AutoModelForCausalLM, config.policy, "policy", "cpu")
    shipped = rlaif.load(AutoModelForSequenceClassification, config.preference, "preference", "cpu")
    preference = score = rlaif.PreferenceModel(*shipped, config.template)
    torch.manual_seed(config.seed)
    if "scale" in how:
        preference.model.score.weight.data *= how["scale"]
    if "labels" in how:
        score = preference_from_labels(how["labels"], config, policy, tokenizer)
    if "direct" in how:
        score = judge_as_reward(config, policy, tokenizer)
    prepared = rlaif.prepare(config, score, None, policy, tokenizer)
    if "yardstick" in how:
        return {**job, **yardstick(prepared), "seconds": time.perf_counter() - start}
    measured, history = {}, []
    for i in range(1, config.iterations + 1):
        metrics = rlaif.update(prepared, rlaif.roll_out(prepared))
        history.append({name: round(value, 5) for name, value in metrics.items()})
        if "stale" in how and i % 10 == 0:
            measured[f"agreement {i}"] = agreement_with_gold(prepared)
        if how.get("stale") == "refit" and i == config.iterations // 2:
            judge, _ = load_judge()
            fresh, _ = rlaif.preference_from_judge(config, policy, tokenizer, judge, tokenizer,
                                                   rlaif.CONSTITUTION, world.PROMPTS)
            prepared.score = fresh
            measured["agreement after refit"] = agreement_with_gold(prepared)
    if "labels" in how or "direct" in how:  # whatever was trained on, the shipped preference model measures
        prepared.score = preference
    measured |= rlaif.evaluate(prepared)[0]
    _, rows = rlaif.evaluate(prepared, world.PROMPTS)
    by_prompt = [statistics.mean(row["kl"] for row in rows if row["prompt"] == prompt)
                 for prompt in world.PROMPTS]
    measured["kl spread over prompts"] = statistics.pstdev(by_prompt)
    measured["kl of the training prompts"] = statistics.mean(by_prompt)
    measured["parameters"] = sum(p.numel() for p in prepared.optimizer.param_groups[0]["params"])
    return {**job, "history": history, "measured": measured, "seconds": time.perf_counter() - start}


def load_judge():
    return rlaif.load(AutoModelForCausalLM, str(FOLDER / "judge"), "judge", "cpu")


def agreement_with_gold(prepared, n=1024):
    """How often a run's preference model agrees with the gold score on pairs of the policy's own replies
    whose gold differs."""
    with torch.random.fork_rng():
        prompts = [world.PROMPTS[i] for i in rlaif.balanced_draw(len(world.PROMPTS), n)]
        a, b = (rlaif.respond(prepared.policy, prepared.tokenizer, prompts, prepared.config) for _ in "ab")
    gold_a, gold_b = (torch.tensor(world.gold_scores(prompts, r.responses)) for r in (a, b))
    a, b = (torch.tensor(prepared.score(prompts, r.responses, r.ended.tolist())) for r in (a, b))
    differs = gold_a != gold_b
    return ((a > b) == (gold_a > gold_b))[differs].float().mean().item()  # NaN if none differs


def preference_from_labels(kind, config, policy, tokenizer, n=4096):
    """A preference model fitted to labels made in another way: both orders, one order, hard, or by a judge
    that likes length."""
    prompts = [world.PROMPTS[i] for i in rlaif.balanced_draw(len(world.PROMPTS), n)]
    a, b = (rlaif.respond(policy, tokenizer, prompts, config) for _ in "ab")
    prob_a = rlaif.judge_pairs(*load_judge(), rlaif.CONSTITUTION, prompts, a.responses, b.responses,
                               both_orders=kind != "one order")
    if kind == "hard":
        prob_a = (prob_a > 0.5).float()
    if kind == "likes length":
        longer = [len(x.split()) - len(y.split()) for x, y in zip(a.responses, b.responses)]
        prob_a = torch.sigmoid(torch.logit(prob_a, eps=1e-4) + 0.5 * torch.tensor(longer))
    preference = rlaif.new_preference_model(policy, tokenizer, config.template)
    rows_a, rows_b = (preference.tokenize(prompts, r.responses, r.ended) for r in (a, b))
    rlaif.fit_preference(preference, rows_a, rows_b, prob_a)
    return preference


def judge_as_reward(config, policy, tokenizer):
    """score = the judge's probability, averaged over both orders and all principles, that a reply beats one
    of pi_ref's to the same prompt."""
    judge = load_judge()
    rivals = {prompt: rlaif.respond(policy, tokenizer, [prompt] * 32, config).responses
              for prompt in world.PROMPTS}

    def score(prompts, responses):
        against = [rivals[prompt][int(torch.randint(32, ()))] for prompt in prompts]
        return rlaif.judge_pairs(*judge, rlaif.CONSTITUTION, prompts, responses, against).tolist()
    return score


def yardstick(prepared, n=64):
    """Best-of-n of the reference by the preference score; and, once the policy is trained, the estimators of
    the KL beside the exact one of each token."""
    config, policy, tokenizer = prepared.config, prepared.policy, prepared.tokenizer
    prompts = [prompt for prompt in world.HELDOUT_PROMPTS for _ in range(512)]
    r = rlaif.respond(prepared.reference, tokenizer, prompts, config)
    scores = torch.tensor(prepared.score(prompts, r.responses, r.ended.tolist())).view(-1, n)
    gold = torch.tensor(world.gold_scores(prompts, r.responses)).view(-1, n)
    best = []
    for k in (1, 2, 4, 16, 64):
        pick = scores.view(-1, k).argmax(1, keepdim=True)
        best.append({"n": k, "kl": math.log(k) - (k - 1) / k,
                     "score": scores.view(-1, k).gather(1, pick).mean().item(),
                     "gold": gold.view(-1, k).gather(1, pick).mean().item()})
    for _ in range(config.iterations):
        rlaif.update(prepared, rlaif.roll_out(prepared))
    with torch.no_grad():
        r = rlaif.respond(policy, tokenizer, prompts[::4], config)
        logits, ref_logits = (
            rlaif.response_logits(model, r.input_ids, r.attention_mask, r.tokens, r.mask)[0]
            for model in (policy, prepared.reference))
        p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
        exact_kl = (p.exp() * (p - q)).sum(-1)[r.mask]
        mean = exact_kl.mean().item()
        estimators = {"exact": mean}
        logprobs = [rlaif.token_logprobs(x, r.tokens) for x in (logits, ref_logits)]
        for kind in ("k1", "k2", "k3"):
            off = rlaif.kl_estimate(*logprobs, kind)[r.mask] - exact_kl
            estimators[kind] = {"bias": off.mean().item() / mean, "spread": off.std().item() / mean}
    return {"best": best, "estimators": estimators}


def exact(beta, seed):
    """PPO in the enumerable world -> its reward and KL beside the optimum's, means over the two prompts."""
    with tempfile.TemporaryDirectory() as folder:
        found = exact_run(pathlib.Path(folder), beta, seed)
    return {"reward": found.end.reward, "kl": found.end.kl, "best reward": found.best.reward,
            "best kl": found.best.kl, "gap closed": found.gap_closed}


# The arms: name of the experiment -> {label: (settings, how)}

BETAS = (0.0, 0.1, 0.3, 0.5, 1.0, 3.0)
EXACT_BETAS = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0)
CLIPS = [(0.05, 4), (0.1, 4), (0.2, 4), (math.inf, 4), (0.1, 1), (0.1, 2), (0.1, 8), (math.inf, 8)]
DEFAULT = rlaif.Config()


def short(**settings):
    """Settings of a short run, less those that are the default anyway, so that equal arms are run once."""
    changed = {name: value for name, value in settings.items() if value != getattr(DEFAULT, name)}
    return {**SHORT, **changed}


ARMS = {
    "beta": {f"beta {beta:g}": ({} if beta == DEFAULT.beta else {"beta": beta}, {}) for beta in BETAS}
            | {"best of n": (SHORT, {"yardstick": True})},
    "whitening": {f"score x {scale:g}, {label}": (short(**settings), {} if scale == 1 else {"scale": scale})
                  for label, settings in (("both whitened", {}), ("scores raw", {"whiten_scores": False}),
                                          ("advantages raw", {"whiten_advantages": False}))
                  for scale in (0.1, 1, 10)},
    "kl_level": {level: (short(kl_level=level), {}) for level in ("token", "sequence", "batch")},
    "beta_control": {"fixed": (SHORT, {}), "batch": (short(beta_control="batch", kl_target=2.0), {})},
    "value": {f"{value}, {head} head": (short(value=value, value_head=head), {})
              for value in ("shared", "separate", "preference") for head in ("zero", "random")},
    "estimator": {kind: (short(kl_estimator=kind), {}) for kind in ("k1", "k2", "k3")}
                 | {"bias and spread": (SHORT, {"yardstick": True})},
    "dense": {"terminal": (SHORT, {}), "dense": (short(dense_reward=True), {})},
    "labels": {label: (SHORT, {"labels": label})
               for label in ("both orders, soft", "one order", "hard", "likes length")},
    "stale": {label: ({"beta": 0.1, "iterations": 80}, {"stale": label})
              for label in ("never renewed", "refit")},
    "direct": {"preference model": (SHORT, {}), "judge itself": (SHORT, {"direct": True})},
    "gae": {f"lambda {lam:g}": (short(lam=lam), {}) for lam in (0.0, 0.5, 0.95, 1.0)},
    # without stop_kl, so that nothing but the clip holds an update back
    "clip": {f"clip {clip:g}, {epochs} epochs": (short(clip=clip, ppo_epochs=epochs, stop_kl=math.inf), {})
             for clip, epochs in CLIPS}
            | {"REINFORCE with a baseline": (short(clip=math.inf, ppo_epochs=1, minibatch_size=128, lam=1.0,
                                                   stop_kl=math.inf), {})},
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


# Tables


def runs_of(done, name, label):
    """The results of one arm, over the seeds that are done."""
    settings, how = ARMS[name][label]
    found = [done.get(key({"settings": settings, "how": how, "seed": seed})) for seed in SEEDS]
    return [result for result in found if result]


def arms_of(done, name):
    """The arms of an experiment that were measured at their end, unlike yardsticks -> {label: results}."""
    arms = {label: runs_of(done, name, label) for label in ARMS[name]}
    return {label: results for label, results in arms.items() if results and "measured" in results[0]}


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
        found = [m["iteration"] for m in result["history"] if m["gold"] >= gold]
        return batch * (found[0] if found else len(result["history"]))
    return count


GOLD, PROXY, KL, FLUENT = measured("gold"), measured("score"), measured("kl"), measured("fluency")
USUAL = {"gold": GOLD, "KL": KL, "fluent": FLUENT}
PEAK = {"peak gold": over_training("gold", max)}
SOON = {"episodes to gold 2": episodes_to(2)}
EXPLAINED = over_training("explained_variance", statistics.mean)
EXPLAINED_LATE = over_training("explained_variance", lambda x: statistics.mean(x[len(x) // 2:]))
SECONDS = over_training("episodes_per_second", lambda x: DEFAULT.batch_size / statistics.median(x))
COLUMNS = {  # name of the experiment -> {column: function of one result}
    "beta": {"gold": GOLD, **PEAK, "proxy": PROXY, "KL": KL, "fluent": FLUENT,
             "EOS": measured("eos_fraction")},
    "whitening": USUAL,
    "kl_level": {"gold": GOLD, "KL": KL, "highest KL of a batch": over_training("kl", max), "fluent": FLUENT},
    "beta_control": {"gold": GOLD, "KL of the training prompts": measured("kl of the training prompts"),
                     "spread over prompts": measured("kl spread over prompts"),
                     "last beta": over_training("beta", lambda x: x[-1])},
    "value": {"gold": GOLD, "KL": KL, "explained variance, 2nd half": EXPLAINED_LATE,
              "seconds per iteration": SECONDS,
              "parameters, millions": lambda result: result["measured"]["parameters"] / 1e6},
    "estimator": USUAL,
    "dense": {"gold": GOLD, "KL": KL, **SOON, "explained variance": EXPLAINED,
              "seconds per iteration": SECONDS},
    "labels": {"gold": GOLD, "proxy (shipped)": PROXY, "KL": KL, "length": measured("length"),
               "fluent": FLUENT},
    "stale": {"gold": GOLD, **PEAK, "KL": KL, "fluent": FLUENT,
              **{f"agreement at {i}": measured(f"agreement {i}") for i in (10, 40, 80)},
              "after the refit": measured("agreement after refit")},
    "direct": {**USUAL, "seconds per iteration": SECONDS},
    "gae": {"gold": GOLD, "KL": KL, **SOON, "explained variance": EXPLAINED},
    "clip": {"gold": GOLD, "KL": KL, **SOON,
             "mean approximate KL, old to new, 10⁻³ nats a token":
                 over_training("approx_kl", lambda x: 1000 * statistics.mean(x)),
             "largest of it": over_training("approx_kl", lambda x: 1000 * max(x))},
    "exact": {"reward": measured("reward"), "best reward": measured("best reward"), "KL": KL,
              "best KL": measured("best kl"), "gap closed": measured("gap closed")},
}


def markdown(head, rows):
    """A Markdown table from its first line and its rows, lists of str."""
    head, *rows = (f"| {' | '.join(row)} |" for row in [head, *rows])
    return "\n".join([head, "|---" * head.count(" | ") + "|---|", *rows])


def table(done, name):
    """One experiment as Markdown tables: a row an arm, mean ± std over the seeds."""
    rows = [[label, *(mean_and_spread(map(column, results)) for column in COLUMNS[name].values())]
            for label, results in arms_of(done, name).items()]
    text = markdown([name, *COLUMNS[name]], rows)
    if name == "beta" and (results := runs_of(done, name, "best of n")):
        rows = [[f"{row['n']}", f"{row['kl']:.2f}", *(mean_and_spread(r["best"][i][column] for r in results)
                                                      for column in ("score", "gold"))]
                for i, row in enumerate(results[0]["best"])]
        text += "\n\n" + markdown(["best of n of the reference", "KL at most", "proxy", "gold"], rows)
    if name == "estimator" and (results := runs_of(done, name, "bias and spread")):
        found = [r["estimators"] for r in results]
        rows = [[kind, *(mean_and_spread(x[kind][column] for x in found) for column in ("bias", "spread"))]
                for kind in ("k1", "k2", "k3")]
        kl = mean_and_spread(x["exact"] for x in found)
        title = f"estimator, against the exact KL of a token ({kl} nats)"
        text += "\n\n" + markdown([title, "bias / exact", "spread / exact"], rows)
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


# Pictures

RIGHT = {  # name of the experiment -> the column that its bars show; of the others, the KL
    "beta": "proxy", "beta_control": "spread over prompts", "value": "explained variance, 2nd half",
    "labels": "length", "stale": "agreement at 80"}


def curve(results, column):
    """The mean over the seeds of one column of the history -> a list, one number an iteration."""
    histories = zip(*(result["history"] for result in results))
    return [statistics.mean(metrics[column] for metrics in of_seeds) for of_seeds in histories]


def draw(done, name):
    """Draw one experiment into figures/NAME.png: gold over training and over the root of the KL, and the arms
    at their end."""
    from matplotlib.figure import Figure
    arms = arms_of(done, name)
    if not arms:
        return
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    if name == "exact":
        draw_exact(figure.subplots(), [r["measured"] for results in arms.values() for r in results])
    else:
        left, middle, right = figure.subplots(1, 3)
        for label, results in arms.items():
            gold, kl = curve(results, "gold"), curve(results, "kl")
            left.plot(range(1, len(gold) + 1), gold, label=label)
            middle.plot([math.sqrt(max(x, 0)) for x in kl], gold, ".-", lw=0.5, ms=3, label=label)
        if name == "beta" and (results := runs_of(done, name, "best of n")):
            points = zip(*(r["best"] for r in results))  # of each n, those of the seeds
            points = [(math.sqrt(p[0]["kl"]), statistics.mean(x["gold"] for x in p)) for p in points]
            middle.plot(*zip(*points), "k--", label="best of n")
        column = RIGHT.get(name, "KL")
        values = [[x for x in map(COLUMNS[name][column], results) if x is not None]
                  for results in arms.values()]
        right.bar(range(len(arms)), [statistics.mean(x) if x else 0 for x in values],
                  yerr=[statistics.pstdev(x) if x else 0 for x in values],
                  color=[f"C{i % 10}" for i in range(len(arms))])
        right.set_xticks(range(len(arms)), list(arms), rotation=40, ha="right", fontsize=7)
        left.set(xlabel="iteration", ylabel="gold")
        middle.set(xlabel="square root of the KL to the reference", ylabel="gold")
        right.set(title=column)
        left.legend(fontsize=7)
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    (FOLDER / "figures").mkdir(exist_ok=True)
    figure.savefig(FOLDER / "figures" / f"{name}.png", dpi=75)


def draw_exact(axis, found):
    """The end points of PPO for every beta and seed, beside the optimum of each."""
    axis.plot([x["best kl"] for x in found], [x["best reward"] for x in found], "k+", ms=11, label="optimum")
    axis.plot([x["kl"] for x in found], [x["reward"] for x in found], "o", ms=5, alpha=0.7, label="PPO")
    axis.set(xlabel="KL to the reference, nats", ylabel="reward",
             title="end points for every beta and seed, beside the exact optimum of each")
    axis.legend()


def main():
    """Run what is not done yet, then print and write the tables and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ARMS), help="run one experiment")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one core")
    args = parser.parse_args()
    names = [args.only] if args.only else list(ARMS)
    done = load_results()
    todo = [job for name, job in jobs_of(names).items() if name not in done]
    RESULTS.parent.mkdir(exist_ok=True)
    if todo:
        os.environ["TQDM_DISABLE"] = "1"  # of the workers' own bars
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=fresh) as pool, open(RESULTS, "a") as file:
            futures = as_completed([pool.submit(run, job) for job in todo])
            for future in tqdm(futures, total=len(todo), desc="runs", unit="run", disable=False):
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
