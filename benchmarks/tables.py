"""Write the tables of figures in README.md and docs/losses.md from the results of `tileloss bench --preset targets`.

    python benchmarks/tables.py            # rewrite both tables from the newest results
    python benchmarks/tables.py --check    # change nothing; exit with 1 if a table is not what the results say

No figure is typed: a table stands between two comments, `<!-- NAME -->` and `<!-- /NAME -->`, and is replaced whole.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
SMALL, USUAL_WIDTH = 64, 384
OURS, THEIRS, FLOOR = "tileloss", "sentence-transformers", "matmul floor"


class Loss(NamedTuple):
    """What the page says of a loss.

    Attributes:
        name: of the class.
        primitive: the functions of `tileloss.functional` that it is made of.
        never_held: what sentence-transformers' form holds, or must hold, and ours does not.
        workload: the benchmark's name of the work whose figure is shown; None where the loss cannot be measured apart
            from a model.
    """

    name: str
    primitive: str
    never_held: str
    workload: str | None = None


LOSSES = (
    Loss("MultipleNegativesRankingLoss", "contrastive_loss", "batch x documents", "default"),
    Loss("MultipleNegativesSymmetricRankingLoss", "contrastive_loss", "batch x documents", "symmetric"),
    Loss("CachedMultipleNegativesRankingLoss", "contrastive_loss", "that, and more than a mini-batch's graph"),
    Loss(
        "CachedMultipleNegativesSymmetricRankingLoss", "contrastive_loss", "that, and more than a mini-batch's graph"
    ),
    Loss("GISTEmbedLoss", "contrastive_loss", "batch x documents x width", "gist"),
    Loss("CachedGISTEmbedLoss", "contrastive_loss", "mini-batch x documents x width"),
    Loss("ContrastiveTensionLossInBatchNegatives", "contrastive_loss", "batch x batch", "tension_in_batch"),
    Loss("BatchAllTripletLoss", "triplet_loss", "pairs of one class x batch", "batch_all"),
    Loss("BatchHardTripletLoss", "triplet_loss", "batch x batch", "batch_hard"),
    Loss("BatchHardSoftMarginTripletLoss", "triplet_loss", "batch x batch"),
    Loss("BatchSemiHardTripletLoss", "triplet_loss", "batch x batch", "semi_hard"),
    Loss("MegaBatchMarginLoss", "hardest_negatives", "batch x batch", "mega_batch"),
    Loss("CoSENTLoss", "ranking_loss, paired_similarity", "copies of the embeddings", "cosent"),
    Loss("AnglELoss", "ranking_loss, paired_similarity", "copies of the embeddings", "angle"),
    Loss("CosineSimilarityLoss", "paired_similarity", "copies of the embeddings", "cosine_similarity"),
    Loss("ContrastiveLoss", "paired_distance", "copies of the embeddings", "contrastive"),
    Loss("OnlineContrastiveLoss", "paired_distance", "copies of the embeddings", "online_contrastive"),
    Loss("TripletLoss", "paired_distance", "copies of the embeddings", "triplet"),
    Loss("ContrastiveTensionLoss", "paired_similarity", "copies of the embeddings", "tension"),
    Loss("MarginMSELoss", "paired_similarity", "copies of the embeddings", "margin_mse"),
    Loss("DistillKLDivLoss", "paired_similarity", "copies of the embeddings", "distill_kl_div"),
    Loss("MSELoss", "paired_distance", "differences of the embeddings", "mse"),
    Loss("EmbedDistillLoss", "paired_distance", "copies of the embeddings", "embed_distill"),
    Loss("SoftmaxLoss", "pair_logits", "the concatenated features", "softmax"),
    Loss("DenoisingAutoEncoderLoss", "", "(vocabulary cross-entropy by PyTorch)"),
    Loss("GlobalOrthogonalRegularizationLoss", "dispersion", "batch x batch", "orthogonal"),
    Loss("MatryoshkaLoss", "matryoshka_contrastive_loss", "batch x documents, for every dimension", "matryoshka"),
    Loss("AdaptiveLayerLoss", "", "(what the loss inside does not hold)"),
    Loss("Matryoshka2dLoss", "", "(what the losses inside do not hold)"),
)

# which code runs each primitive; the GEMMs, sorts and scans of all of them are torch's
BACKENDS = {
    "contrastive_loss": "Triton, torch",
    "triplet_loss": "Triton, torch",
    "hardest_negatives": "Triton, torch",
    "paired_similarity": "Triton, torch",
    "paired_distance": "Triton, torch",
    "matryoshka_contrastive_loss": "Triton, torch",
    "ranking_loss": "torch",
    "pair_logits": "torch",
    "dispersion": "torch, unit rows in Triton",
}


def newest_results() -> Path:
    """The file of the last run that was kept."""
    files = sorted((ROOT / "benchmarks" / "results").glob("targets-cpu-2*.json"))
    if not files:
        raise SystemExit("benchmarks/results holds no targets-cpu-*.json: run `tileloss bench --preset targets` first")
    return files[-1]


def seconds(case: dict[str, Any], who: str) -> float:
    """The median time of forward and backward."""
    return case["results"][who]["forward_backward"]["quartiles"][1]


def number(value: float) -> str:
    """Three digits, thousands set apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def origin(results: dict[str, Any]) -> str:
    """When, where and with what the results came about."""
    machine, versions = results["machine"], results["versions"]
    text = (
        f"Measured on {results['date'][:10]} by `{results['command']}`: {machine['cores']} cores of "
        f"{machine['cpu']}, Python {versions['python']}, torch {versions['torch']}, sentence-transformers "
        f"{versions['sentence-transformers']}."
    )
    return textwrap.fill(text, 119)


def figures_table(results: dict[str, Any], titles: dict[str, str]) -> Iterator[str]:
    """README's table: a line for each target of a large batch, in their order, and a sentence on the small ones."""
    yield "| work | sentence-transformers | tileloss | speed-up | of the floor | memory, theirs | memory, ours |"
    yield "|---|---|---|---|---|---|---|"
    cases = {(case["workload"], case["batch"]): case for case in results["cases"]}
    targets = [cases[record["target"]["workload"], record["target"]["batch"]] for record in results["targets"]]
    for case in targets:
        if case["batch"] <= SMALL:
            continue
        theirs, ours = (seconds(case, who) for who in (THEIRS, OURS))
        width = "" if case["width"] == USUAL_WIDTH else f", D = {case['width']}"
        times = [f"{number(1e3 * theirs)} ms", f"{number(1e3 * ours)} ms", f"{number(theirs / ours)} x"]
        has_floor = "forward_backward" in case["results"][FLOOR]
        floor = f"{number(ours / seconds(case, FLOOR))} x" if has_floor else ""
        held = [f"{number(case['results'][who]['peak_bytes'] / MIB)} MiB" for who in (THEIRS, OURS)]
        yield f"| B = {case['batch']:,}, {titles[case['workload']]}{width} | {' | '.join([*times, floor, *held])} |"
    small = sorted(seconds(case, OURS) / seconds(case, THEIRS) for case in targets if case["batch"] <= SMALL)
    least, most = number(small[0]), number(small[-1])
    yield ""
    yield f"In batches of 32 or 64 rows, {len(small)} losses took {least} to {most} times as long as theirs."
    yield ""
    yield origin(results)


def losses_table(results: dict[str, Any]) -> Iterator[str]:
    """The page's table: a line for each loss, with the figure of its largest target."""
    yield "| loss | primitive | never held | run by | measured at | time | memory |"
    yield "|---|---|---|---|---|---|---|"
    for loss in LOSSES:
        cases = [case for case in results["cases"] if case["workload"] == loss.workload]
        figures = ["", "", ""]
        if cases:
            case = max(cases, key=lambda case: case["batch"])
            speed_up = seconds(case, THEIRS) / seconds(case, OURS)
            memory = case["results"][OURS]["peak_bytes"] / case["results"][THEIRS]["peak_bytes"]
            figures = [f"B = {case['batch']:,}, D = {case['width']}", f"{1 / speed_up:.2g}", f"{memory:.2g}"]
        functions = ", ".join(f"`{name}`" for name in loss.primitive.split(", ") if name)
        backends = BACKENDS.get(loss.primitive.partition(", ")[0], "")
        name = f"[{loss.name}](#{loss.name.lower()})"
        yield f"| {' | '.join([name, functions, loss.never_held, backends, *figures])} |"
    yield ""
    yield origin(results)


def replaced(text: str, name: str, lines: Iterator[str]) -> str:
    """The text with the table of that name put in place of the old one."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + "\n" + "\n".join(lines) + "\n\n" + end + after


def main() -> int:
    """Rewrite or check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the tables of figures from the newest results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    options = parser.parse_args()
    from tileloss.bench.workloads import WORKLOADS

    results = json.loads(newest_results().read_text(encoding="utf-8"))
    titles = {name: workload.title for name, workload in WORKLOADS.items()}
    stale = []
    for path, name, lines in (
        (ROOT / "README.md", "figures", figures_table(results, titles)),
        (ROOT / "docs" / "losses.md", "table", losses_table(results)),
    ):
        text = path.read_text(encoding="utf-8")
        new = replaced(text, name, lines)
        if new != text:
            stale.append(path.name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'out of date' if options.check else 'rewritten'}: {', '.join(stale)}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
