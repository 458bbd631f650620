"""README's picture of a healthy run and of one that cheats:  python -m tiny_models.healthy_and_sick

The default run, and the same without a price on drift, three seeds each (some 25 seconds a run on one core).
Fluency, the share of replies that the grammar of the tiny world can write, is read from each iteration's own
replies. The numbers are kept in runs/healthy_and_sick.json; the picture needs matplotlib.
"""

import json
import pathlib

import rlaif
from tiny_models import world

RUNS = {"a price on drift: gold rises with the score": {},
        "none (--beta 0): gold falls, and the replies stop being sentences": {"beta": 0.0, "iterations": 110}}
KEPT = pathlib.Path("runs/healthy_and_sick.json")
PICTURE = pathlib.Path(__file__).parent / "healthy_and_sick.png"
SHOWN = {"gold": ("gold, the truth", "tab:green"), "score": ("score", "tab:blue"),
         "fluent": ("share of fluent replies", "tab:orange")}


def history_of(settings):
    """The metrics of every iteration of one run, with `fluent`, the share of its replies that are fluent."""
    run, history = rlaif.prepare(rlaif.Config(**settings)), []
    for metrics in rlaif.iterate(run):
        fluent = [world.is_fluent(response) for response in run.rollout.responses]
        history.append({**metrics, "fluent": sum(fluent) / len(fluent)})
    return history


def draw(histories):
    """A column a kind of run: gold, score and fluency above, the KL below; the first seed is drawn thick."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(3, 2),
                           width_ratios=[max(len(h) for h in runs) for runs in histories.values()])
    for column, (title, runs) in enumerate(histories.items()):
        above, below = axes[:, column]
        for seed, history in enumerate(runs):
            width, alpha = (2, 1) if seed == 0 else (0.8, 0.5)
            iterations = [m["iteration"] for m in history]
            for name, (_, color) in SHOWN.items():
                above.plot(iterations, [m[name] for m in history], color=color, lw=width, alpha=alpha)
            below.plot(iterations, [max(m["kl"], 0.1) for m in history], color="black", lw=width, alpha=alpha)
        above.set_title(title)
        below.set(xlabel="iteration", yscale="log", ylim=(0.1, 100))
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for name, (label, color) in SHOWN.items():
        last = list(histories.values())[0][0][-1]
        axes[0, 0].annotate(label, (len(list(histories.values())[0][0]), last[name]), xytext=(0, 8),
                            textcoords="offset points", color=color, ha="right")
    axes[0, 0].set(ylabel="points; share", ylim=(-0.5, 3.5))
    axes[1, 0].set(ylabel="KL to the reference,\nnats a reply", yticks=(0.1, 1, 4, 10, 30, 100),
                   yticklabels=("0.1", "1", "4", "10", "30", "100"))
    return figure


def main():
    histories = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    KEPT.parent.mkdir(exist_ok=True)
    for title, settings in RUNS.items():
        runs = histories.setdefault(title, [])
        for seed in range(len(runs), 3):
            runs.append(history_of({**settings, "seed": seed}))
            KEPT.write_text(json.dumps(histories), encoding="utf-8")
    for title, runs in histories.items():
        print(title)
        for seed, history in enumerate(runs):
            last = [sum(m[name] for m in history[-5:]) / 5 for name in ("score", "gold", "fluent", "kl")]
            print("  seed {}, the last five iterations: score {:.2f}, gold {:.2f}, fluent {:.2f}, KL {:.1f}"
                  .format(seed, *last))
    try:
        draw(histories).savefig(PICTURE, dpi=80)
    except ImportError:
        print("the picture needs matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
