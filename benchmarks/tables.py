"""Write the tables of figures in README.md and docs/, and the names of pictures, from the newest results.

    python benchmarks/tables.py            # rewrite all of them
    python benchmarks/tables.py --check    # change nothing; exit with 1 if one is not what the results say

No figure is typed: a table stands between two comments, `<!-- NAME -->` and `<!-- /NAME -->`, and is replaced whole.
Times and memory come from `tileloss bench --preset targets`, benchmarks/many_devices.py and gradient_cache.py, errors
from benchmarks/numerics.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = "../benchmarks/results"  # seen from docs/
MIB = 2**20
USUAL_WIDTH = 384
ROUNDING = 2**-23  # of one float32 number: below it, which of two is nearer to float64 is luck
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


def newest(kind: str, made_by: str) -> Path:
    """The file of the last run of that kind that was kept."""
    files = sorted(RESULTS.glob(f"{kind}-2*.json"))
    if not files:
        raise SystemExit(f"benchmarks/results holds no {kind}-*.json: run `{made_by}` first")
    return files[-1]


def read(path: Path) -> dict[str, Any]:
    """What a file of results holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def seconds(case: dict[str, Any], who: str) -> float:
    """The median time of forward and backward."""
    return case["results"][who]["forward_backward"]["quartiles"][1]


def number(value: float) -> str:
    """Three digits, thousands set apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def paragraph(text: str) -> str:
    """The text in lines, none of which ends within a word."""
    return textwrap.fill(text, 119, break_on_hyphens=False)


def origin(results: dict[str, Any]) -> str:
    """When, where and with what the results came about."""
    machine, versions = results["machine"], results["versions"]
    text = (
        f"Measured on {results['date'][:10]} by `{results['command']}`: {machine['cores']} cores of "
        f"{machine['cpu']}, Python {versions['python']}, torch {versions['torch']}, sentence-transformers "
        f"{versions['sentence-transformers']}."
    )
    return paragraph(text)


def targets(results: dict[str, Any], *, small: bool) -> list[dict[str, Any]]:
    """The cases of the targets, in their order: those of small batches, which need not be faster, or the others."""
    cases = {(case["workload"], case["batch"]): case for case in results["cases"]}
    promised = [record["target"] for record in results["targets"]]
    return [cases[t["workload"], t["batch"]] for t in promised if (t["speed_up"] == 1.0) == small]


def work(case: dict[str, Any], titles: dict[str, str]) -> str:
    """What was done, at which size."""
    width = "" if case["width"] == USUAL_WIDTH else f", D = {case['width']}"
    return f"B = {case['batch']:,}, {titles[case['workload']]}{width}"


def mebibytes(case: dict[str, Any], who: str) -> str:
    """The peak of its memory."""
    return f"{number(case['results'][who]['peak_bytes'] / MIB)} MiB"


def figures_table(results: dict[str, Any], titles: dict[str, str]) -> Iterator[str]:
    """README's table: a line for each target of a large batch, in their order, and a sentence on the small ones."""
    yield "| work | sentence-transformers | tileloss | speed-up | of the floor | memory, theirs | memory, ours |"
    yield "|---|---|---|---|---|---|---|"
    for case in targets(results, small=False):
        theirs, ours = (seconds(case, who) for who in (THEIRS, OURS))
        times = [f"{number(1e3 * theirs)} ms", f"{number(1e3 * ours)} ms", f"{number(theirs / ours)} x"]
        has_floor = "forward_backward" in case["results"][FLOOR]
        floor = f"{number(ours / seconds(case, FLOOR))} x" if has_floor else ""
        held = [mebibytes(case, who) for who in (THEIRS, OURS)]
        yield f"| {' | '.join([work(case, titles), *times, floor, *held])} |"
    small = targets(results, small=True)
    rows = sorted(case["batch"] for case in small)
    ratios = sorted(seconds(case, OURS) / seconds(case, THEIRS) for case in small)
    yield ""
    yield paragraph(
        f"In batches of {rows[0]} to {rows[-1]} rows, where nothing but not to be slower is promised, {len(small)} "
        f"pieces of work took {number(ratios[0])} to {number(ratios[-1])} times as long as theirs, in the middle "
        f"{number(statistics.median(ratios))} times."
    )
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


def small_table(results: dict[str, Any], titles: dict[str, str]) -> Iterator[str]:
    """A line for each target of a small batch."""
    yield "| work | sentence-transformers | tileloss | times as long |"
    yield "|---|---|---|---|"
    for case in targets(results, small=True):
        theirs, ours = (seconds(case, who) for who in (THEIRS, OURS))
        times = [f"{1e3 * theirs:.2f} ms", f"{1e3 * ours:.2f} ms", f"{ours / theirs:.2f}"]
        yield f"| {' | '.join([work(case, titles), *times])} |"
    yield ""
    yield origin(results)


def memory_table(results: dict[str, Any], titles: dict[str, str]) -> Iterator[str]:
    """A line for each target of a large batch, with the memory alone."""
    yield "| work | sentence-transformers | tileloss | share |"
    yield "|---|---|---|---|"
    for case in targets(results, small=False):
        held = {who: case["results"][who]["peak_bytes"] for who in (THEIRS, OURS)}
        shown = [*(mebibytes(case, who) for who in held), number(held[OURS] / held[THEIRS])]
        yield f"| {' | '.join([work(case, titles), *shown])} |"
    yield ""
    yield origin(results)


def spread(ratios: Sequence[float]) -> str:
    """The least and the greatest, or the one number that both are."""
    return " to ".join(dict.fromkeys(f"{ratio:.1f}" for ratio in (min(ratios), max(ratios))))


def errors_tables(results: dict[str, Any], workloads: dict[str, Any]) -> Iterator[str]:
    """For each dtype a line for each workload: how far loss and gradients are from float64, in the median batch."""
    for dtype in dict.fromkeys(case["dtype"] for case in results["cases"]):
        yield f"### {dtype}"
        yield ""
        yield "| loss | work | loss, theirs | loss, ours | gradients, theirs | gradients, ours |"
        yield "|---|---|---|---|---|---|"
        worse: dict[str, list[float]] = {}
        for case in (case for case in results["cases"] if case["dtype"] == dtype):
            workload = workloads[case["workload"]]
            name = "MatryoshkaLoss" if workload.prefixes else workload.loss
            cells = [f"[{name}](losses.md#{name.lower()})", workload.title]
            for what in ("loss", "gradients"):
                theirs, ours = (
                    statistics.median(batch[who][what] for batch in case["batches"]) for who in (THEIRS, OURS)
                )
                cells += [f"{theirs:.1e}", f"{ours:.1e}"]
                if ours > max(1.5 * theirs, ROUNDING):
                    worse.setdefault(f"the {what} of {name}", []).append(ours / theirs)
            yield f"| {' | '.join(cells)} |"
        yield ""
        named = [f"{name} ({spread(ratios)} times)" for name, ratios in worse.items()]
        yield paragraph(
            "Farther off than theirs by more than half, where that is more than the rounding of one float32 number: "
            f"{', '.join(named) or 'nothing'}."
        )
        yield ""
    products = results["products"]
    yield paragraph(
        f"One product of float32 matrices of width {results['other_triplets']['width']} is off by "
        f"{products['torch.mm']:.1e} here by `torch.mm`, and by {products[OURS]:.1e} by what multiplies the blocks, "
        "which [design.md](design.md#products-on-a-cpu) tells of."
    )
    yield ""
    many = results["other_triplets"]
    yield paragraph(
        f"Of {many['batches']} batches of {many['batch']} rows in {many['dtype']}, semi-hard mining found another "
        f"triplet than in float64 in {many[THEIRS]} with sentence-transformers and in {many[OURS]} with tileloss."
    )
    yield ""
    yield origin(results)


def pictures(files: list[Path], titles: dict[str, str]) -> Iterator[str]:
    """The plots of runs over the batch size, each run with its origin."""
    for file in files:
        for name, title in titles.items():
            if file.with_name(f"{file.stem}-{name}.png").exists():
                yield f"![Time and memory against the batch size: {title}]({PICTURES}/{file.stem}-{name}.png)"
                yield ""
        yield origin(read(file))
        yield ""


def demo(file: Path) -> Iterator[str]:
    """The plot of a whole training, and what was trained."""
    run = read(file)
    before, after = (run[when]["recall@10"] for when in ("before", "after"))
    yield f"![Recall on held-out functions against the training step]({PICTURES}/{file.stem}-recall.png)"
    yield ""
    told = (
        f"`make demo` on {run['date'][:10]}, torch {run['versions']['torch']}: {run['steps']} steps of "
        f"{run['pairs_per_step']:,} pairs in {run['train_seconds']:.0f} s; recall@10 among {run['held_out_pairs']:,} "
        f"held-out functions rose from {before:.3f} to {after:.3f}. The learning rate and the number of epochs were "
        "chosen on the same functions: a demonstration, no benchmark."
    )
    yield paragraph(told)


def devices_table(results: dict[str, Any]) -> Iterator[str]:
    """Gathering and the ring over several processes."""
    times, peaks = results["seconds_in_2_processes"], results["peak_bytes_in_4_processes"]
    names = {"query_to_doc": "queries to documents", "symmetric": "both directions, each its softmax"}
    yield "| loss | sentence-transformers | gather | ring | memory, gather | memory, ring |"
    yield "|---|---|---|---|---|---|"
    for name, title in names.items():
        spent = [f"{times[name][way]:.2f} s" for way in (THEIRS, "gather", "ring")]
        held = [f"{peaks[name][way] / MIB:.1f} MiB" for way in ("gather", "ring")]
        yield f"| {' | '.join([title, *spent, *held])} |"
    yield ""
    yield paragraph(
        f"Each process holds {results['rows_per_process']:,} rows of {results['width']}; times are of two processes, "
        "the peak of memory beyond the inputs is of four. Processes of one thread on gloo."
    )
    yield ""
    yield origin(results)


def cache_table(results: dict[str, Any]) -> Iterator[str]:
    """The gradient cache, by mini-batch."""
    yield "| rows embedded at a time | step, theirs | step, ours | memory between, theirs | memory between, ours |"
    yield "|---|---|---|---|---|"
    for case in results["cases"]:
        spent = [f"{case['seconds'][who]:.2f} s" for who in (THEIRS, OURS)]
        held = [f"{case['peak_bytes'][who] / MIB:.1f} MiB" for who in (THEIRS, OURS)]
        yield f"| {' | '.join([format(case['mini_batch'], ','), *spent, *held])} |"
    yield ""
    yield paragraph(
        f"CachedMultipleNegativesRankingLoss on {results['rows']:,} pairs, embeddings of {results['width']} by a "
        'table of word vectors. "Between" is the stage between the two embeddings of the batch, which computes the '
        "loss and the embeddings' gradients; these and copies of the embeddings are most of what is left there."
    )
    yield ""
    yield origin(results)


def documents() -> Iterator[tuple[Path, str, Iterator[str]]]:
    """Every place that is written: the file, the name of the place, its lines."""
    from tileloss.bench.workloads import WORKLOADS

    titles = {name: workload.title for name, workload in WORKLOADS.items()}
    trained = newest("demo-cpu", "make demo")
    yield ROOT / "docs" / "index.md", "demo", demo(trained)
    yield ROOT / "docs" / "figures.md", "demo", demo(trained)
    yield ROOT / "docs" / "numerics.md", "errors", errors_tables(read(RESULTS / "numerics.json"), WORKLOADS)
    yield ROOT / "docs" / "many-devices.md", "devices", devices_table(read(RESULTS / "many_devices.json"))
    yield ROOT / "docs" / "large-batches.md", "cache", cache_table(read(RESULTS / "gradient_cache.json"))
    measured = newest("targets-cpu", "tileloss bench --preset targets")
    swept = newest("sweep-cpu", "tileloss bench")
    results = read(measured)
    yield ROOT / "README.md", "figures", figures_table(results, titles)
    yield ROOT / "docs" / "losses.md", "table", losses_table(results)
    yield ROOT / "docs" / "large-batches.md", "memory", memory_table(results, titles)
    yield ROOT / "docs" / "figures.md", "figures", figures_table(results, titles)
    yield ROOT / "docs" / "figures.md", "small", small_table(results, titles)
    yield ROOT / "docs" / "figures.md", "pictures", pictures([measured, swept], titles)


def replaced(text: str, name: str, lines: Iterator[str]) -> str:
    """The text with the table of that name put in place of the old one."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + "\n" + "\n".join(lines).strip() + "\n\n" + end + after


def main() -> int:
    """Rewrite or check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the tables of figures from the newest results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    options = parser.parse_args()
    stale = []
    for path, name, lines in documents():
        text = path.read_text(encoding="utf-8")
        new = replaced(text, name, lines)
        if new != text:
            stale.append(path.name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'out of date' if options.check else 'rewritten'}: {', '.join(dict.fromkeys(stale))}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
