"""Make the three tiny models from nothing:  python -m tiny_models.build

    policy       a causal language model that has read the whole mix of replies, the rude and harmful ones too
    judge        a causal language model that reads a principle, a prompt and two replies, and answers A or B
    preference   a sequence classifier with one output, fitted to the judge's labels on the policy's pairs

All three are ordinary GPT-2s that share one byte-level tokenizer: every word of the world is one token, and
any other text still comes through, byte by byte.
"""

import argparse
import pathlib
import random

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)

import rlaif
from tiny_models import world

FOLDER = pathlib.Path(__file__).parent
TEMPLATE = rlaif.PLAIN
POLICY_AND_JUDGE_STEPS = [1500, 2000]


def make_tokenizer():
    """A byte-level BPE of at most 512 tokens; with `ignore_merges` each word of the world is one of them."""
    text = "\n".join(
        [TEMPLATE.format(prompt=prompt) for prompt in world.PROMPTS + world.HELDOUT_PROMPTS]
        + [f" {sentence}" for sentence in world.SENTENCES]
        + [judge_question(principle, "", "", "") + " A B" for principle in world.PRINCIPLES]
    )
    split, alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()
    words = sorted({word for word, _ in split.pre_tokenize_str(text)} - set(alphabet))
    pieces = ["<pad>", "<eos>", *sorted(alphabet), *words]
    assert len(pieces) <= 512, f"{len(pieces)} tokens"
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True), AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   clean_up_tokenization_spaces=False)


def make_gpt2(tokenizer, layers, width=128):
    """A GPT-2 with fresh weights, no dropout, and GPT-2's own activation as one kernel instead of eight."""
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=width, n_layer=layers, n_head=4, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, activation_function="gelu_pytorch_tanh", bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def fit(model, trained, losses, steps, learning_rate, name):
    """Take `steps` steps down an iterator of losses, with all parameters of the module `trained`: warm-up,
    then cosine decay."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=learning_rate, weight_decay=0.01,
                                  betas=(0.9, 0.98), fused=True)
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
    """A reply that the grammar would not write: the judge is to have seen what a policy may come up with."""
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
    """A question for the judge with its answer: (principle, prompt, reply a, reply b, probability of A)."""
    while True:
        principle, prompt = rng.choice(list(world.PRINCIPLES)), rng.choice(prompts)
        a, b = (odd_reply(prompt, rng) if rng.random() < 0.2 else world.sample_reply(prompt, rng)
                for _ in "ab")
        label = perfect_label(principle, prompt, a, b)
        if label != 0.5 or rng.random() < ties:
            return principle, prompt, a, b, label


def perfect_label(principle, prompt, a, b):
    """The probability with which a perfect judge prefers reply a. Each principle asks about one part of the
    gold score; a difference of one point makes the answer 88 % sure, of two 98 %."""
    part = world.PRINCIPLES[principle]
    difference = world.gold_parts(prompt, a)[part] - world.gold_parts(prompt, b)[part]
    return 1 / (1 + 2.718281828 ** (-2 * difference))


def judge_question(principle, prompt, a, b):
    return rlaif.JUDGE_QUESTION.format(principle=principle, turns=rlaif.as_lines(prompt), a=a, b=b)


def judge_losses(model, probe, tokenizer, rng, batch=64):
    """Yield the judge's loss on fresh comparisons, for ever: the cross-entropy between its answer, A or B,
    and the truth.

    On top of a plain answer the judge is shown what to look at, which saves thousands of steps: `probe`,
    linear and thrown away afterwards, reads off the hidden state at the end of each reply the parts of its
    gold score and the topic of its advice, and at the end of the prompt the topic that was asked about."""
    answers = [tokenizer(f" {answer}").input_ids[0] for answer in "AB"]
    topics = list(world.TOPICS)
    while True:
        rows = [comparison(world.PROMPTS, rng) for _ in range(batch)]
        texts = [judge_question(*row[:4]) for row in rows]
        ends = [text[:at] for text in texts for at in (text.index("\n(A)"), text.index("\n(B)"),
                                                       text.rindex("\n"), len(text))]
        ends = torch.tensor([len(ids) for ids in tokenizer(ends).input_ids])
        ends = ends.view(batch, 4) - 1  # of prompt, a, b, question
        ids, mask = rlaif.pad(tokenizer(texts).input_ids, "right", model)
        hidden = model.transformer(ids, attention_mask=mask).last_hidden_state
        hidden = hidden[torch.arange(batch)[:, None], ends]  # (batch, 4, D)
        truth = torch.zeros(batch, len(tokenizer))
        truth[:, answers[0]] = torch.tensor([label for *_, label in rows])
        truth[:, answers[1]] = 1 - truth[:, answers[0]]
        parts = [[list(world.gold_parts(p, reply).values()) for reply in (a, b)] for _, p, a, b, _ in rows]
        asked = [[topics.index(world.topic_of(p)), *(topic_advised(reply, topics) for reply in (a, b))]
                 for _, p, a, b, _ in rows]
        read_parts, read_topic = probe(hidden[:, :3]).split([4, len(topics)], dim=2)
        yield (cross_entropy(model.lm_head(hidden[:, 3]), truth)
               + (read_parts[:, 1:] - torch.tensor(parts)).square().mean()
               + 0.5 * cross_entropy(read_topic.flatten(0, 1), torch.tensor(asked).flatten()))


def topic_advised(reply, topics):
    """The index of the topic of a reply's advice; -100, which a loss ignores, where there is not just one."""
    found = [topics.index(world.ADVICE[s]) for s in world.sentences_of(reply) if s in world.ADVICE]
    return found[0] if len(found) == 1 else -100


def perfect_judge_pairs(constitution, prompts, responses_a, responses_b):
    """What `rlaif.judge_pairs` would give if the judge always knew the truth: soft labels (N,), each the mean
    over all principles."""
    return torch.tensor([[perfect_label(principle, *row) for principle in constitution]
                         for row in zip(prompts, responses_a, responses_b)]).mean(dim=1)


@torch.no_grad()
def measure_judge(judge, tokenizer, n=2000):
    """Ask the judge, in both orders, about n fresh comparisons on held-out prompts whose truth differs; print
    how often it is right."""
    rng = random.Random(10)
    rows = [comparison(world.HELDOUT_PROMPTS, rng, ties=0) for _ in range(n)]
    truth = torch.tensor([label for *_, label in rows]) > 0.5
    first, second = (rlaif.ask_judge(judge, tokenizer, questions).softmax(dim=1)[:, 0] for questions in (
        [judge_question(q, p, a, b) for q, p, a, b, _ in rows],
        [judge_question(q, p, b, a) for q, p, a, b, _ in rows]))
    one_order, both_orders = (first > 0.5) == truth, ((first + 1 - second) / 2 > 0.5) == truth
    print("\n| judge, held-out prompts | one order | both orders | comparisons |\n|---|---|---|---|")
    for principle in [*world.PRINCIPLES, "all"]:
        chosen = torch.tensor([principle in ("all", row[0]) for row in rows])
        print(f"| {principle} | {one_order[chosen].float().mean():.1%} | "
              f"{both_orders[chosen].float().mean():.1%} | {chosen.sum()} |")
    kept = ((first > 0.5) == (second > 0.5)).float().mean()
    print(f"\nThe judge answers with the same position after the order is swapped in {kept:.1%} of them.")


def loss_account(answers, loss):
    """Split the loss of a preference model on N pairs, exactly -> doubt, disagreement, misfit, in nats.

    `answers` (K, N) are the judge's under each of K principles, and the model was fitted to their mean.
    doubt          the entropy of an answer, averaged over principles and pairs
    disagreement   the entropy of the mean answer, less that: what the principles differ in
    misfit         the loss, less the entropy of the mean answer: the mean KL from label to model
    """
    doubt, entropy = (torch.distributions.Bernoulli(p).entropy().mean().item()
                      for p in (answers, answers.mean(dim=0)))
    return doubt, entropy - doubt, loss - entropy


def print_loss_account(judge, tokenizer, constitution, report):
    """The account of the loss on the held-out pairs of a fit that `rlaif.preference_from_judge` reports."""
    held = slice(-(len(report["prompts"]) // 10), None)
    pairs = [report[name][held] for name in ("prompts", "responses_a", "responses_b")]
    answers = torch.stack([rlaif.judge_pairs(judge, tokenizer, [principle], *pairs)
                           for principle in constitution])
    doubt, disagreement, misfit = loss_account(answers, report["loss"])
    print(f"\n| loss on {answers.shape[1]} held-out pairs | nats |\n|---|---|\n"
          f"| the judge's own doubt | {doubt:.4f} |\n"
          f"| disagreement of the principles | {disagreement:.4f} |\n"
          f"| misfit of the model | {misfit:.4f} |\n| sum, the loss | {report['loss']:.4f} |\n\n"
          f"Were one principle drawn for a pair, the labels' entropy would be {doubt:.4f}, and the loss of "
          f"the same model the same: {disagreement:.4f} of what then looks like misfit is disagreement.")


def measure_preference(preference, ceiling, policy, tokenizer, config, n=4096):
    """Print how often a preference model, and its ceiling, agree with the gold score on fresh pairs of the
    policy's replies to held-out prompts, where the gold differs; and the mean and std of its scores."""
    prompts = [world.HELDOUT_PROMPTS[i] for i in rlaif.balanced_draw(len(world.HELDOUT_PROMPTS), n)]
    sides = [rlaif.respond(policy, tokenizer, prompts, config) for _ in "ab"]

    def scores(judge, side):
        return torch.tensor(judge(prompts, side.responses, side.ended.tolist()))
    gold_a, gold_b = (torch.tensor(world.gold_scores(prompts, side.responses)) for side in sides)
    differs, agreement = gold_a != gold_b, []
    for model in (preference, ceiling):
        a, b = (scores(model, side) for side in sides)
        agreement.append(((a > b) == (gold_a > gold_b))[differs].float().mean().item())
    own = torch.cat([scores(preference, side) for side in sides])
    print("\n| preference model, held-out pairs | agreement with gold |\n|---|---|\n"
          f"| fitted to the judge's labels | {agreement[0]:.1%} |\n"
          f"| fitted to a perfect judge's labels on the same pairs | {agreement[1]:.1%} |\n\n"
          f"That is {agreement[0] / agreement[1]:.1%} of the ceiling, on {differs.sum()} pairs whose gold "
          f"differs. Scores of the policy's replies: mean {own.mean():.3f}, std {own.std():.3f}.")


def main():
    """Train the three models, or only the preference model, or, with --check, measure the shipped ones."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true",
                        help="write nothing: measure the models that are there; the preference model is "
                             "fitted once more, for its loss, and so is its ceiling")
    parser.add_argument("--preference", action="store_true",
                        help="make only the preference model, from the policy and judge that are there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=POLICY_AND_JUDGE_STEPS,
                        metavar=("POLICY", "JUDGE"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    if not (args.check or args.preference):
        make_policy_and_judge(args.seed, *args.steps)
    policy, tokenizer = rlaif.load(GPT2LMHeadModel, str(FOLDER / "policy"), "policy", "cpu")
    judge, _ = rlaif.load(GPT2LMHeadModel, str(FOLDER / "judge"), "judge", "cpu")
    measure_judge(judge, tokenizer)

    config, constitution = rlaif.Config(), list(world.PRINCIPLES)
    torch.manual_seed(args.seed)
    preference, report = rlaif.preference_from_judge(config, policy, tokenizer, judge, tokenizer,
                                                     constitution, world.PROMPTS)
    if not args.check:
        save(preference.model, tokenizer, "preference")
    labels = perfect_judge_pairs(constitution, report["prompts"], report["responses_a"],
                                 report["responses_b"])
    ceiling = rlaif.new_preference_model(policy, tokenizer, config.template)
    rlaif.fit_preference(ceiling, report["rows_a"], report["rows_b"], labels, config.preference_epochs,
                         learning_rate=config.preference_learning_rate)
    shipped = rlaif.load(AutoModelForSequenceClassification, str(FOLDER / "preference"), "preference", "cpu")
    preference = rlaif.PreferenceModel(*shipped, config.template)
    measure_preference(preference, ceiling, policy, tokenizer, config)
    print(f"Its training loss ends at {report['train_loss']:.4f} nats, {report['loss']:.4f} on held-out "
          f"pairs; the entropy of the labels, below which no loss can fall, since each pair was asked about "
          f"under every principle, is {report['entropy']:.4f}. It agrees with the judge on "
          f"{report['accuracy']:.1%} of those held-out pairs of which the judge is sure.")
    print_loss_account(judge, tokenizer, constitution, report)


def make_policy_and_judge(seed, policy_steps, judge_steps):
    """Write the prompts, train policy and judge, and save both."""
    for name, prompts in (("prompts", world.PROMPTS), ("heldout_prompts", world.HELDOUT_PROMPTS)):
        (FOLDER / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    tokenizer, judge_rng, policy_rng = make_tokenizer(), random.Random(seed), random.Random(seed + 1)
    policy = make_gpt2(tokenizer, layers=2)
    fit(policy, policy, policy_losses(policy, tokenizer, policy_rng), policy_steps, 3e-3, "policy")
    save(policy, tokenizer, "policy")
    judge = make_gpt2(tokenizer, layers=4)
    probe = torch.nn.Linear(judge.config.n_embd, 4 + len(world.TOPICS))
    losses = judge_losses(judge, probe, tokenizer, judge_rng)
    fit(judge, torch.nn.ModuleList([judge, probe]), losses, judge_steps, 1.5e-3, "judge")
    save(judge, tokenizer, "judge")


def save(model, tokenizer, name):
    """Write an ordinary Hugging Face folder: config, safetensors weights, tokenizer."""
    model.save_pretrained(FOLDER / name)
    tokenizer.save_pretrained(FOLDER / name)


if __name__ == "__main__":
    main()
