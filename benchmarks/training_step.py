"""Measure whole training steps with sentence-transformers' loss and with ours: where one gains, and where not.

A step is the encoder forward, the loss, backward and AdamW. On a GPU the encoder's forward, and it alone, is under
bfloat16 autocast, as `bf16=True` of a trainer has it. Encoders have random weights and texts random tokens, so that
nothing is downloaded; both sides train the same model. A batch larger than a mini-batch goes through the cached losses
of both, mini-batch by mini-batch. The loss alone is measured too, on float32 embeddings of the same shape, which is
what the encoders hand over. Run as

    python -P benchmarks/training_step.py --out benchmarks/results/training_step.json

Without a GPU give it sizes that a CPU can do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tileloss import losses
from tileloss.bench.measure import accelerator_peak, cpu_peak, describe, time_in_turns
from tileloss.bench.report import signed

OURS, THEIRS = "tileloss", "sentence-transformers"
WORDS = 30_522
SHAPES = {"minilm": (6, 384, 12, 1536), "bert-base": (12, 768, 12, 3072)}  # layers, width, heads, feed-forward width
STATIC_WIDTH = 1024
# the most telling first, because time on a GPU is short
CASES = [
    ("static", 32_768), ("minilm", 4096), ("bert-base", 1024), ("minilm", 16_384), ("bert-base", 4096),
    ("minilm", 1024), ("bert-base", 16_384),
]  # fmt: skip
# of the table: where a figure of both sides stands in a record, and in which unit it is shown
COLUMNS = {
    "step, ms: theirs": ("seconds", 1e3),
    "loss, ms: theirs": ("loss_seconds", 1e3),
    "MB: theirs": ("peak_bytes", 1e-6),
}
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """What all cases share: the device, the tokens of a text, the rows embedded at a time, and repetitions."""

    device: str
    length: int
    mini_batch: int
    rounds: int


class MeanOfWords(nn.Module):
    """A static encoder: the mean of the vectors of a text's words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, STATIC_WIDTH, mode="mean")

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features | {"sentence_embedding": self.words(features["input_ids"])}


class MeanOfTokens(nn.Module):
    """A transformer with random weights, and the mean over its tokens."""

    def __init__(self, layers: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.encoder = BertModel(
            BertConfig(
                vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=inner, attn_implementation="sdpa",
            ),
            add_pooling_layer=False,
        )  # fmt: skip

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"]
        tokens = self.encoder(input_ids=features["input_ids"], attention_mask=mask).last_hidden_state
        total = (tokens * mask[:, :, None]).sum(dim=1, dtype=torch.float32)
        return features | {"sentence_embedding": total / mask.sum(dim=1, keepdim=True)}


def encoder(name: str, device: str) -> nn.Sequential:
    """The encoder of that name, the same at every call."""
    torch.manual_seed(0)
    model = nn.Sequential(MeanOfWords() if name == "static" else MeanOfTokens(*SHAPES[name])).to(device)
    if device != "cpu":
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)  # a cached loss calls it in backward too
    return model


def step_of(loss: nn.Module, rows: int, setting: Setting) -> Step:
    """A training step on one batch of pairs of random texts."""
    generator = torch.Generator().manual_seed(0)
    shape = rows, setting.length
    texts = [torch.randint(WORDS, shape, generator=generator).to(setting.device) for _ in range(2)]
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-5, fused=setting.device != "cpu")

    def step() -> None:
        optimizer.zero_grad()
        loss([{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in texts], None).backward()
        optimizer.step()

    return step


def loss_alone(loss: Any, rows: int, width: int, device: str) -> Step:
    """The loss and its gradients on given float32 embeddings."""
    generator = torch.Generator(device).manual_seed(0)
    columns = [torch.randn(rows, width, device=device, generator=generator).requires_grad_() for _ in range(2)]

    def step() -> None:
        for column in columns:
            column.grad = None
        loss.compute_loss_from_embeddings(columns, None).backward()

    return step


def measure(name: str, rows: int, setting: Setting) -> dict[str, Any]:
    """Seconds and peak bytes of a step of both sides, and seconds of the loss alone; who cannot run says why."""
    from sentence_transformers.sentence_transformer import losses as stock

    cached = name != "static" and rows > setting.mini_batch
    kind = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    options = {"mini_batch_size": setting.mini_batch} if cached else {}
    record: dict[str, Any] = {"encoder": name, "batch": rows, "loss": kind, "peak_bytes": {}, "missing": {}}
    steps, alone = {}, {}
    for side, library in ((OURS, losses), (THEIRS, stock)):
        try:
            loss = getattr(library, kind)(encoder(name, setting.device), **options)
            step = step_of(loss, rows, setting)
            step()  # whatever happens once
            peak = cpu_peak if setting.device == "cpu" else accelerator_peak
            record["peak_bytes"][side] = peak(step)
            steps[side] = step
        except Exception as error:  # for want of memory, say: then the other one is measured alone
            record["missing"][side] = describe(error)
        try:
            width = STATIC_WIDTH if name == "static" else SHAPES[name][1]
            alone[side] = loss_alone(library.MultipleNegativesRankingLoss(nn.Identity()), rows, width, setting.device)
            alone[side]()
        except Exception as error:
            alone.pop(side, None)
            record["missing"][f"{side}, loss alone"] = describe(error)
    for key, what in (("seconds", steps), ("loss_seconds", alone)):
        record[key] = {side: statistics.median(taken) for side, taken in time_in_turns(what, setting.rounds).items()}
    return record | {
        "speedup": _ratio(record["seconds"], THEIRS, OURS),
        "loss_speedup": _ratio(record["loss_seconds"], THEIRS, OURS),
        "memory": _ratio(record["peak_bytes"], OURS, THEIRS),
    }


def _ratio(figures: dict[str, float], above: str, below: str) -> float | None:
    return figures[above] / figures[below] if above in figures and below in figures else None


def table(records: Sequence[dict[str, Any]]) -> str:
    """One line a case."""
    heads = [f"{'encoder':<10} {'batch':>6}", *(f"{what:>17} {'ours':>8}" for what in COLUMNS), f"{'speed-up':>9}"]
    lines = [" ".join(heads)]
    for record in records:
        line = f"{record['encoder']:<10} {record['batch']:>6}"
        for key, unit in COLUMNS.values():
            theirs, ours = (record.get(key, {}).get(side) for side in (THEIRS, OURS))
            line += f" {_in(theirs, unit):>17} {_in(ours, unit):>8}"
        lines.append(f"{line} {_in(record.get('speedup'), 1.0):>9}  {record['missing'] or ''}".rstrip())
    return "\n".join(lines)


def _in(figure: float | None, unit: float) -> str:
    return "-" if figure is None else f"{figure * unit:.4g}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the figures, written after every case")
    parser.add_argument("--encoder", nargs="+", choices=(*SHAPES, "static"), help="default: all")
    parser.add_argument("--batch", type=int, nargs="+", help="pairs; default: 1,024 to 16,384, and 32,768 if static")
    parser.add_argument("--mini_batch", type=int, default=1024, help="rows embedded at a time; default: %(default)s")
    parser.add_argument("--length", type=int, default=32, help="tokens of a text; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="least timed steps of each side; default: %(default)s")
    parser.add_argument("--time_limit", type=float, default=4.0, help="minutes; no case begins later")
    options = parser.parse_args(argv)
    end = time.monotonic() + 60 * options.time_limit
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(device, options.length, options.mini_batch, options.rounds)
    names = options.encoder or list(dict.fromkeys(name for name, _ in CASES))
    cases = [(name, rows) for name in names for rows in options.batch] if options.batch else CASES
    records: list[dict[str, Any]] = []
    figures = signed({"setting": asdict(setting), "cases": records})
    for name, rows in (case for case in cases if case[0] in names):
        if time.monotonic() > end:
            records.append({"encoder": name, "batch": rows, "missing": {"all": "left out: the time limit has passed"}})
        else:
            records.append(measure(name, rows, setting))
            if device != "cpu":
                torch.accelerator.empty_cache()
        if options.out is not None:
            options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
