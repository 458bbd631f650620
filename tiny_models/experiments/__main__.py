"""One experiment for each claim about RLAIF with PPO:  python -m tiny_models.experiments  [--only NAME]

How a claim is tested stands in protocol.py, and one function for each claim, to be read alone, in
ppo_claims.py, feedback_claims.py and alarms.py; what else the same runs say, in second_look.py, and all arms
in one picture, in forest.py. How a run is made: runs.py and measurements.py; on which feedback: feedback.py.

Every run is a line of results.jsonl, written as it comes, so that a command that was stopped goes on where it
was; runs that several experiments share are made once. Labels, preference models and policies are kept in
runs/experiments. The tables in README.md and the pictures in figures/ are made from results.jsonl.
"""

import argparse
import pathlib
from dataclasses import replace

from tiny_models.experiments import tables
from tiny_models.experiments.alarms import alarms
from tiny_models.experiments.feedback import KEPT
from tiny_models.experiments.feedback_claims import (blind, careless, dense, direct, flattery, flaws, hard,
                                                     labels, length, position, principles, renewal, stale)
from tiny_models.experiments.ppo_claims import (best_of_n, beta, clip, critic, estimator, exact, gae,
                                                kl_level, loss, reference, stop, value, whitening)
from tiny_models.experiments.protocol import CURVE, RESULTS, load_results, make_runs
from tiny_models.experiments.second_look import second_look

README = pathlib.Path(__file__).parent / "README.md"
EXPERIMENTS = {claim.__name__: claim for claim in (
    beta, stop, best_of_n, alarms, reference, kl_level, estimator, loss, exact, whitening, value, critic, gae,
    clip, labels, direct, dense, principles, stale, renewal, flaws, position, length, flattery, careless,
    blind, hard)}


def plan(names, quick):
    """Begin experiments -> {name: (generator, its arms)}, and all runs that they need, each once: key -> job,
    those of the comparisons that decide first."""
    begun, jobs = {}, {}
    for name in names:
        generator = EXPERIMENTS[name]()
        arms = next(generator)
        if quick:
            arms = {label: replace(arm, settings={**arm.settings, "iterations": 8}, first=-1, runs=1,
                                   betas=arm.betas[len(arm.betas) // 2:][:1]) for label, arm in arms.items()}
        begun[name] = generator, arms
    everything = [arm for _, arms in begun.values() for arm in arms.values()]
    for arm in sorted(everything, key=lambda arm: -arm.runs):
        jobs |= {job.key: job for job in arm.jobs()}
    return begun, jobs


def conclude(generator, arms, done):
    """Give an experiment its arms back, with all results that are there -> Verdict, tables."""
    for arm in (*arms.values(), CURVE):
        arm.read(done)
    try:
        generator.send(arms)
    except StopIteration as end:
        return end.value


def write_between(text, name, new):
    """Put `new` between two markers of README.md's text; what is written around them stays."""
    head, rest = text.split(f"<!-- {name} -->\n", 1)
    return f"{head}<!-- {name} -->\n{new}\n<!-- end {name} -->{rest.split(f'<!-- end {name} -->', 1)[1]}"


def main():
    """Make what runs are missing, then print and write verdicts and tables, and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(EXPERIMENTS), help="one experiment")
    parser.add_argument("--quick", action="store_true",
                        help="one run of eight iterations at one price of every arm, on the shipped "
                             "preference model; it proves nothing, and writes nothing")
    parser.add_argument("--report", action="store_true", help="make no run: report on those that are done")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one core")
    args = parser.parse_args()
    begun, jobs = plan([args.only] if args.only else EXPERIMENTS, args.quick)
    done = {} if args.quick else load_results()
    KEPT.mkdir(parents=True, exist_ok=True)
    if args.quick:
        tables.FIGURES = KEPT
        make_runs(jobs, done, args.workers)
    elif not args.report:
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write("" if RESULTS.read_text(encoding="utf-8").endswith("\n") else "\n")
            make_runs(jobs, done, args.workers, file)
    print(f"{len(jobs.keys() & done.keys())} of {len(jobs)} runs are done")
    report(begun, done, args.only, args.quick)


def report(begun, done, only, quick):
    """Print what each experiment says, and write it into README.md, unless it was a --quick one."""
    readme, rows, verdicts = README.read_text(encoding="utf-8"), [], {}
    for name, (generator, arms) in begun.items():
        verdict, text = conclude(generator, arms, done)
        claim, link = EXPERIMENTS[name].__doc__.splitlines()[0], name if text else "flaws"  # all in its table
        if not quick and not verdict.differences:
            readme = write_between(readme, name, "Not run yet.") if text else readme
            continue
        verdicts[name] = verdict
        rows.append([f"[`{name}`](#{link}) {claim}", f"**{verdict}**",
                     f"{verdict.compared}: {verdict.numbers()}"])
        print(f"\n{claim}\n{verdict}: {verdict.compared}: {verdict.numbers()}\n\n{text}")
        readme = write_between(readme, name, text) if text else readme
    if quick:
        print("\nOne run of eight iterations an arm: this shows that everything runs, and proves nothing.")
        return
    if len(verdicts) == len(EXPERIMENTS):
        text = second_look(verdicts, {name: arms for name, (_, arms) in begun.items()})
        print(f"\nA second look at the same runs\n\n{text}")
        readme = write_between(readme, "second look", text)
    if not only:
        readme = write_between(readme, "verdicts", tables.markdown(
            ["claim", "verdict", "the difference that decides, with its 95 % interval"], rows))
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
