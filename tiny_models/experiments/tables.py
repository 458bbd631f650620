"""The tables and the pictures, of arms whose runs are done."""

import math
import pathlib
import statistics

from tiny_models.experiments.protocol import AT_KL, compare, interpolate

FIGURES = pathlib.Path(__file__).parent / "figures"  # --quick draws elsewhere


def frontier_table(arms, **columns):
    """A Markdown table: a row for each arm and price, mean ± std over its runs; and a sentence that says how
    much more gold than the first arm's the others have at the same KL, where that can be compared."""
    columns = {"KL": "kl", "gold": "gold", "score": "score", "fluent": "fluency", **columns}
    rows = []
    for label, arm in arms.items():
        for beta in arm.betas:
            values = [arm.at_beta(beta, name).values() for name in columns.values()]
            if values[0]:
                rows.append([label, f"{beta:g}", str(len(values[0])), *map(mean_and_std, values)])
    first, *others = [(label, arm.at_kl()) for label, arm in arms.items()]
    gold = {label: compare("", found, first[1]) for label, found in others}
    more = [f"{label} {verdict.numbers()}" for label, verdict in gold.items() if len(verdict.differences) > 1]
    text = markdown(["arm", "β", "runs", *columns], rows)
    return text + (f"\n\nGold at {AT_KL} nats, less that of {first[0]}: {'; '.join(more)}." if more else "")


def mean_and_std(values, digits=2):
    """'mean ± std' of the runs' numbers."""
    values = list(values)
    digits = digits if abs(statistics.mean(values)) < 1000 else 0
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{spread}"


def markdown(head, rows):
    """A Markdown table from its first line and its rows, lists of str."""
    if not rows:
        return "Not run yet."
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def curves_of(arms, name="gold"):
    """What `draw` takes: of each arm the curves of a number that was measured -> {label: {i: points}}."""
    return {label: arm.curves(name) for label, arm in arms.items()}


def draw(name, curves, xlabel="root of the KL to the reference, √nats", ylabel="gold", best=None, at_kl=True):
    """FIGURES/NAME.png: of each label's curves, {label: {i: points}}, the mean over runs, and the band from
    the lowest to the highest where all of them are; every point a dot; best of n of the reference dashed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis, ends = figure.subplots(), []
    if best and best.results:
        points = [result["best"] for result in best.results.values()]
        x, y = ([statistics.mean(p[k][j] for p in points) for k in range(len(points[0]))] for j in (0, 1))
        axis.plot(x, y, "k--", lw=1)
        ends.append((y[-1], "best of n", "k"))
    for number, (label, runs) in enumerate(curves.items()):
        runs, color = [points for points in runs.values() if points], f"C{number}"
        if not runs:
            continue
        axis.plot(*zip(*sum(runs, [])), ".", color=color, alpha=0.4)
        low, high = max(p[0][0] for p in runs), min(p[-1][0] for p in runs)
        grid = [low + (high - low) * k / 60 for k in range(61)] if high > low else []
        heights = [[interpolate(points, min(max(x, low), high)) for points in runs] for x in grid]
        ends.append((statistics.mean(points[-1][1] for points in runs), label, color))
        if grid:
            axis.plot(grid, [statistics.mean(h) for h in heights], color=color)
            axis.fill_between(grid, [min(h) for h in heights], [max(h) for h in heights], color=color,
                              alpha=0.15, lw=0)
    if not ends:
        return
    if at_kl:
        axis.axvline(math.sqrt(AT_KL), color="gray", lw=0.8, ls=":")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    bottom, top = axis.get_ylim()
    at = -1.0
    for y, label, color in sorted(ends):  # beside the plot, as high as they end, none upon another
        at = max(at + 0.06, (y - bottom) / (top - bottom))
        axis.text(1.02, at, label, color=color, va="center", transform=axis.transAxes)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=100)
