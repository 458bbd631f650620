"""Proves README's "Write it yourself": for each function named there, `pytest -k NAME` passes as it is, and
fails when its body is empty and when it holds a classic mistake."""

import inspect
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pytest  # noqa: E402  (loaded once: each try runs in a fork)

import rlaif  # noqa: E402
import test_rlaif  # noqa: E402, F401  (for what it imports)

MISTAKES = {  # the function: what stands in it, and what a beginner writes
    "token_logprobs": ("logits if temperature == 1 else logits / temperature", "logits"),
    "kl_estimate": ("torch.expm1(-d) + d", "torch.expm1(d) - d"),
    "whiten": ("torch.where(mask, x, 0.0).sum() / mask.sum()", "torch.where(mask, x, 0.0).mean()"),
    "shape_rewards": ("0.0) - penalty", "0.0) + penalty"),
    "dense_scores": ("torch.zeros_like(prefix_scores[:, :1])", "prefix_scores[:, :1]"),
    "gae": ("torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)",
            "torch.where(mask, rewards, 0.0), values"),
    "policy_loss": ("torch.maximum", "torch.minimum"),
    "value_loss": ("/ mask.sum() / 2", "/ mask.sum()"),
    "preference_loss": ("difference = scores_a - scores_b", "difference = scores_b - scores_a"),
    "judge_pairs": ("(prob_a.mean(dim=1) + 1 - prob_b.mean(dim=1)) / 2",
                    "(prob_a.mean(dim=1) + prob_b.mean(dim=1)) / 2"),
    "generate": ("(logits.float() / temperature).softmax", "logits.float().softmax"),
    "update_beta": ("beta * (1 + min", "beta * (1 - min"),
}


def run_tests(name, source):
    """Run `pytest -k name` with that function made of `source`, in a fork -> exit code, what it printed."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        exec(compile(source, name, "exec"), vars(rlaif))
        del sys.modules["test_rlaif"]  # it has the right function by name
        code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", "-k", name, f"{ROOT}/test_rlaif.py"])
        sys.stdout.flush()
        os._exit(int(code))
    os.close(writer)
    with os.fdopen(reader) as printed:
        text = printed.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def main():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"`(\w+)`", readme.split("## Write it yourself")[1].split("\n## ")[0])
    assert names == list(MISTAKES), "README names other functions"
    for name, (right, wrong) in MISTAKES.items():
        source = inspect.getsource(getattr(rlaif, name))
        assert source.count(right) == 1, f"{name} no longer holds {right!r}"
        empty = source[:source.index('"""')] + "raise NotImplementedError\n"
        bodies = {"as it is": source, "empty": empty, "mistaken": source.replace(right, wrong)}
        for label, body in bodies.items():
            code, text = run_tests(name, body)
            print(f"{name:16} {label:9} {text.strip().splitlines()[-1]}", flush=True)
            assert code == (label != "as it is"), text
    print("every function that README names can be written again")


if __name__ == "__main__":
    main()
