"""Make the three tiny models from nothing:  python -m tiny_models.build

    policy       a causal language model that has read the whole mix of replies, rude and harmful ones included
    judge        a causal language model that reads a principle, a prompt and two replies, and answers A or B
    preference   a one-output sequence classifier, fitted to the judge's labels on pairs that the policy sampled

All three are ordinary GPT-2s that share one byte-level tokenizer: every word of the world is one token, and any other
text still comes through, byte by byte.
"""

import argparse
import dataclasses
import pathlib
import random

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import rlaif
from tiny_models import world

FOLDER = pathlib.Path(__file__).parent
TEMPLATE = rlaif.Config().template
POLICY_AND_JUDGE_STEPS = [1500, 2000]


def make_tokenizer():
    """A byte-level BPE of at most 512 tokens. `ignore_merges` makes each word of the world one token without merges."""
    text = "\n".join(
        [TEMPLATE.format(prompt=prompt) for prompt in world.PROMPTS + world.HELDOUT_PROMPTS]
        + [f" {sentence}" for sentence in world.SENTENCES]
        + [rlaif.JUDGE_QUESTION.format(principle=principle, prompt="", a="", b="") + " A B" for principle in world.PRINCIPLES]
    )
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = sorted({word for word, _ in split.pre_tokenize_str(text)} - set(pre_tokenizers.ByteLevel.alphabet()))
    pieces = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    assert len(pieces) <= 512, f"{len(pieces)} tokens"
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   clean_up_tokenization_spaces=False)


def make_gpt2(tokenizer, layers, width=128):
    """A GPT-2 with fresh weights, no dropout, and GPT-2's own activation as one kernel instead of eight."""
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=width, n_layer=layers, n_head=4, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, activation_function="gelu_pytorch_tanh", bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def fit(model, trained, losses, steps, learning_rate, name):
    """Take `steps` steps down an iterator of losses, with all parameters of the module `trained`: warm-up, then cosine decay."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    progress, average = tqdm(range(steps), desc=name), None
    for _ in progress:
        loss = next(losses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.4f}")
    model.eval()


def policy_losses(model, tokenizer, rng, batch=128):
    """Yield the cross-entropy per token of fresh replies (EOS included, prompt excluded), for ever."""
    while True:
        rows = []
        for prompt in rng.choices(world.PROMPTS, k=batch):
            question = tokenizer(TEMPLATE.format(prompt=prompt)).input_ids
            reply = tokenizer(" " + world.sample_reply(prompt, rng)).input_ids + [tokenizer.eos_token_id]
            rows.append((question + reply, [-100] * len(question) + reply))
        ids, labels = (torch.nn.utils.rnn.pad_sequence([torch.tensor(row[i]) for row in rows], True, fill)
                       for i, fill in ((0, tokenizer.pad_token_id), (1, -100)))
        logits = model(ids, attention_mask=ids != tokenizer.pad_token_id).logits[:, :-1]
        yield cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def odd_reply(prompt, rng):
    """A reply that the grammar would not write, so that the judge has seen what a policy may come up with."""
    words = world.sample_reply(prompt, rng).split()
    kind = rng.randrange(4)
    if kind == 0:  # any sentences, in any order
        words = " ".join(rng.choices(sorted(world.SENTENCES), k=rng.randint(1, 4))).split()
    elif kind == 1:  # a sentence again and again
        sentences = world.sentences_of(" ".join(words))
        words = " ".join(sentences + [rng.choice(sentences)] * rng.randint(1, 3)).split()
    elif kind == 2:  # a word again and again
        at = rng.randrange(len(words))
        words[at:at + 1] = [words[at]] * rng.randint(3, 12)
    else:  # words out of order
        rng.shuffle(words)
    return " ".join(words[:24])


def comparison(prompts, rng, ties=0.25):
    """A question for the judge with its answer: (principle, prompt, reply a, reply b, probability of A).

    The truth is one part of the gold score; a difference of one point makes the answer 88 % sure, of two 98 %."""
    while True:
        principle, prompt = rng.choice(list(world.PRINCIPLES)), rng.choice(prompts)
        replies = [odd_reply(prompt, rng) if rng.random() < 0.2 else world.sample_reply(prompt, rng) for _ in "ab"]
        part = world.PRINCIPLES[principle]
        difference = world.gold_parts(prompt, replies[0])[part] - world.gold_parts(prompt, replies[1])[part]
        if difference or rng.random() < ties:
            return principle, prompt, *replies, perfect_label(difference)


def perfect_label(difference):
    """The probability with which a perfect judge prefers the first reply, given the difference in points."""
    return 1 / (1 + 2.718281828 ** (-2 * difference))


def judge_losses(model, probe, tokenizer, rng, batch=64):
    """Yield the judge's loss on fresh comparisons, for ever: the cross-entropy between its answer, A or B, and the truth.

    On top of a plain answer the judge is shown what to look at, which saves thousands of steps: `probe`, linear and thrown
    away afterwards, reads off the hidden state at the end of each reply the parts of its gold score and the topic of its
    advice, and at the end of the prompt the topic that was asked about."""
    answers = [tokenizer(f" {answer}").input_ids[0] for answer in "AB"]
    topics = list(world.TOPICS)
    while True:
        rows = [comparison(world.PROMPTS, rng) for _ in range(batch)]
        texts = [rlaif.JUDGE_QUESTION.format(principle=q, prompt=p, a=a, b=b) for q, p, a, b, _ in rows]
        ends = [text[:at] for text in texts for at in (text.index("\n(A)"), text.index("\n(B)"), text.rindex("\n"), len(text))]
        ends = torch.tensor([len(ids) for ids in tokenizer(ends).input_ids]).view(batch, 4) - 1  # of prompt, a, b, question
        ids, mask = rlaif.pad(tokenizer(texts).input_ids, "right", "cpu")
        hidden = model.transformer(ids, attention_mask=mask).last_hidden_state[torch.arange(batch)[:, None], ends]  # (batch, 4, D)
        truth = torch.zeros(batch, len(tokenizer))
        truth[:, answers[0]] = torch.tensor([row[-1] for row in rows])
        truth[:, answers[1]] = 1 - truth[:, answers[0]]
        parts = torch.tensor([[list(world.gold_parts(p, reply).values()) for reply in (a, b)] for _, p, a, b, _ in rows])
        advice = [[[topics.index(world.ADVICE[s]) for s in world.sentences_of(reply) if s in world.ADVICE] for reply in (a, b)]
                  for _, _, a, b, _ in rows]
        asked = [[topics.index(world.topic_of(p))] + [found[0] if len(found) == 1 else -100 for found in pair]
                 for (_, p, *_), pair in zip(rows, advice)]
        read_parts, read_topic = probe(hidden[:, :3]).split([4, len(topics)], dim=2)
        yield (cross_entropy(model.lm_head(hidden[:, 3]), truth) + (read_parts[:, 1:] - parts).square().mean()
               + 0.5 * cross_entropy(read_topic.flatten(0, 1), torch.tensor(asked).flatten()))


def perfect_judge_pairs(constitution, prompts, responses_a, responses_b):
    """What `rlaif.judge_pairs` would give if the judge always knew the truth: soft labels (N,), one principle each."""
    drawn = torch.randint(len(constitution), (len(prompts),)).tolist()
    parts = [world.PRINCIPLES[constitution[i]] for i in drawn]
    return torch.tensor([perfect_label(world.gold_parts(prompt, a)[part] - world.gold_parts(prompt, b)[part])
                         for prompt, a, b, part in zip(prompts, responses_a, responses_b, parts)])


@torch.no_grad()
def measure_judge(judge, tokenizer, n=2000):
    """Ask the judge about n fresh comparisons on held-out prompts whose truth differs, in both orders; print the table."""
    rng = random.Random(10)
    rows = [comparison(world.HELDOUT_PROMPTS, rng, ties=0) for _ in range(n)]
    truth = torch.tensor([row[-1] for row in rows]) > 0.5
    first, second = (rlaif.ask_judge(judge, tokenizer, [rlaif.JUDGE_QUESTION.format(principle=q, prompt=p, a=x, b=y)
                                                        for q, p, x, y in rows_in_order])
                     for rows_in_order in ([(q, p, a, b) for q, p, a, b, _ in rows], [(q, p, b, a) for q, p, a, b, _ in rows]))
    one_order, both_orders = (first > 0.5) == truth, ((first + 1 - second) / 2 > 0.5) == truth
    print("\n| judge, held-out prompts | one order | both orders | comparisons |\n|---|---|---|---|")
    for principle in [*world.PRINCIPLES, "all"]:
        chosen = torch.tensor([principle in ("all", row[0]) for row in rows])
        print(f"| {principle} | {one_order[chosen].float().mean():.1%} | {both_orders[chosen].float().mean():.1%} | {chosen.sum()} |")
    kept = ((first > 0.5) == (second > 0.5)).float().mean()
    print(f"\nThe judge answers with the same position after the order is swapped in {kept:.1%} of comparisons.")


def measure_preference(preference, ceiling, policy, tokenizer, config, n=4096):
    """Print how often a preference model, and its ceiling, agree with the gold score on fresh pairs of the policy's replies
    to held-out prompts, where the gold differs; and the mean and std of its scores on those replies."""
    prompts = [world.HELDOUT_PROMPTS[i] for i in rlaif.balanced_draw(len(world.HELDOUT_PROMPTS), n)]
    sides = []
    for _ in "ab":
        _, _, _, _, responses, ended = rlaif.respond(policy, tokenizer, prompts, config)
        sides.append((responses, ended.tolist(), torch.tensor(world.gold_scores(prompts, responses))))
    (a, ended_a, gold_a), (b, ended_b, gold_b) = sides
    differs = gold_a != gold_b
    agreement = []
    for model in (preference, ceiling):
        scores_a, scores_b = torch.tensor(model(prompts, a, ended_a)), torch.tensor(model(prompts, b, ended_b))
        agreement.append(((scores_a > scores_b) == (gold_a > gold_b))[differs].float().mean().item())
        if model is preference:
            both = torch.cat([scores_a, scores_b])
    print(f"\n| preference model, held-out pairs | agreement with gold |\n|---|---|\n| fitted to the judge's labels | {agreement[0]:.1%} |\n"
          f"| fitted to a perfect judge's labels on the same pairs | {agreement[1]:.1%} |\n\n"
          f"That is {agreement[0] / agreement[1]:.1%} of the ceiling, on {differs.sum()} pairs whose gold differs. Scores of the policy's "
          f"replies: mean {both.mean():.3f}, std {both.std():.3f}.")


def main():
    """Train the three models, or, with --check, only measure the shipped ones (the ceiling is fitted in any case)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure the models that are there and train only the ceiling")
    parser.add_argument("--preference", action="store_true", help="make only the preference model, from the policy and judge that are there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=POLICY_AND_JUDGE_STEPS, metavar=("POLICY", "JUDGE"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    config = rlaif.Config()
    tokenizer, judge_rng, policy_rng = make_tokenizer(), random.Random(args.seed), random.Random(args.seed + 1)
    if not (args.check or args.preference):
        (FOLDER / "prompts.txt").write_text("\n".join(world.PROMPTS) + "\n", encoding="utf-8")
        (FOLDER / "heldout_prompts.txt").write_text("\n".join(world.HELDOUT_PROMPTS) + "\n", encoding="utf-8")
        policy = make_gpt2(tokenizer, layers=2)
        fit(policy, policy, policy_losses(policy, tokenizer, policy_rng), args.steps[0], 3e-3, "policy")
        save(policy, tokenizer, "policy")
        judge = make_gpt2(tokenizer, layers=4)
        probe = torch.nn.Linear(judge.config.n_embd, 4 + len(world.TOPICS))
        fit(judge, torch.nn.ModuleList([judge, probe]), judge_losses(judge, probe, tokenizer, judge_rng), args.steps[1], 1.5e-3, "judge")
        save(judge, tokenizer, "judge")
    policy, tokenizer = rlaif.load(GPT2LMHeadModel, str(FOLDER / "policy"), "policy", "cpu")
    judge, _ = rlaif.load(GPT2LMHeadModel, str(FOLDER / "judge"), "judge", "cpu")
    measure_judge(judge, tokenizer)
    constitution = list(world.PRINCIPLES)
    torch.manual_seed(args.seed)
    preference, report = rlaif.preference_from_judge(config, policy, tokenizer, judge, tokenizer, constitution, world.PROMPTS)
    if not args.check:
        save(preference.model, tokenizer, "preference")
    (a, _), (b, _) = report["samples"]
    ceiling = rlaif.new_preference_model(policy, tokenizer, config.template)
    rlaif.fit_preference(ceiling, report["prompts"], *report["samples"], perfect_judge_pairs(constitution, report["prompts"], a, b),
                         config.preference_epochs, learning_rate=config.preference_learning_rate)
    preference = rlaif.load_preference(dataclasses.replace(config, preference=str(FOLDER / "preference")), "cpu")
    measure_preference(preference, ceiling, policy, tokenizer, config)
    print(f"Its training loss ends at {report['train_loss']:.4f} nats, {report['loss']:.4f} on held-out pairs; the entropy of the soft "
          f"labels, the floor, is {report['floor']:.4f}. It agrees with the judge on {report['accuracy']:.1%} of held-out pairs.")


def save(model, tokenizer, name):
    """Write an ordinary Hugging Face folder: config, safetensors weights, tokenizer."""
    model.save_pretrained(FOLDER / name)
    tokenizer.save_pretrained(FOLDER / name)


if __name__ == "__main__":
    main()
