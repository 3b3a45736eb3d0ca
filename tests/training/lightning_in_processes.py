"""Takes one step of each of some losses with Lightning, in two processes, and all rows' in one without it.

Run as `lightning_in_processes.py FOLDER`; Lightning starts the second process as this script again. Every process
writes down the value of each loss and the gradients that its optimizer was given, beside those of the joint batch.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tileloss import losses

WORDS, WIDTH, COLUMNS = 50, 6, 3
PARTS = [5, 3]  # rows of each process
MAKERS: dict[str, Callable[[nn.Module, bool | str], nn.Module]] = {
    "in-batch": lambda model, gather: losses.MultipleNegativesRankingLoss(model, gather_across_devices=gather),
    "both ways, in a ring": lambda model, gather: losses.MultipleNegativesRankingLoss(
        model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction",
        gather_across_devices=gather and "ring",
    ),
    "of prefixes": lambda model, gather: losses.MatryoshkaLoss(
        model, losses.MultipleNegativesRankingLoss(model, gather_across_devices=gather), [WIDTH, 3]
    ),
}  # fmt: skip


class Encoder(nn.Module):
    """The mean of token vectors, through a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(WORDS, WIDTH, dtype=torch.double)
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.double)

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "sentence_embedding": self.layer(self.tokens(features["input_ids"]).mean(dim=1)).tanh()}


def batch() -> Tensor:  # (COLUMNS, rows, tokens) of all processes
    return torch.randint(WORDS, (COLUMNS, sum(PARTS), 4), generator=torch.Generator().manual_seed(1))


def features(columns: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids} for ids in columns]


class Embedder(lightning.LightningModule):
    """As on the page about training, but that every batch has a loss of its own and no step changes the model."""

    def __init__(self) -> None:
        super().__init__()
        model = Encoder()
        self.losses = nn.ModuleDict({name: make(model, True) for name, make in MAKERS.items()})
        self.found: dict[str, list[Tensor]] = {}
        self.refused = ""

    def train_dataloader(self) -> Iterable[Any]:
        part = batch().split(PARTS, dim=1)[self.trainer.global_rank]
        return DataLoader([(name, features(part)) for name in self.losses], batch_size=None)

    def training_step(self, batch: tuple[str, list[dict[str, Tensor]]], index: int) -> Tensor:
        name, columns = batch
        if index == 0:
            self.refused = refusal(losses.CachedMultipleNegativesRankingLoss(self.losses[name].model), columns)
        value: Tensor = self.losses[name](columns, None)
        self.found[name] = [value.detach()]
        return value

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        *_, last = self.found.values()
        last += [parameter.grad.clone() for parameter in self.parameters() if parameter.grad is not None]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def refusal(loss: nn.Module, columns: list[dict[str, Tensor]]) -> str:
    """What the loss says where it cannot run."""
    try:
        loss(columns, None)
    except ValueError as error:
        return str(error)
    return ""


def joint(make: Callable[[nn.Module, bool | str], nn.Module]) -> list[Tensor]:
    """The value and the gradients of all rows, in one process."""
    model = Encoder()
    value = make(model, False)(features(batch()), None)
    return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]


def main(folder: Path) -> None:
    embedder = Embedder()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(embedder)
    expected = {name: joint(make) for name, make in MAKERS.items()}
    torch.save((trainer.world_size, embedder.found, expected, embedder.refused), folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
