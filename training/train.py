"""Train Sixfold's embedded model: a small Llama that reads English and finds needles.

Curriculum and learning rate follow the share of the time budget that is spent, so that a run
ends finished on a machine of any speed.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaForCausalLM

from training.data import HELD_OUT, Corpus, Mixture, RowMaker, read_books
from training.measure import needle_accuracy, perplexity
from training.model import MAX_LENGTH, export_model, make_config, make_model, weighted_loss
from training.tokenizer import save_tokenizer, train_tokenizer

VOCAB_SIZE = 1024
MATRIX_LR = 2.4e-3
EMBEDDING_LR = 3e-3
GENTLE_UNTIL = 0.3
WARMUP_STEPS = 20
DECAY_FROM = 0.4
LOG_EVERY = 10
CHECK_EVERY_SECONDS = 180.0


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum, up to a share of the time budget."""

    until: float
    length: int
    rows: int
    mixture: Mixture


STAGES = (
    # Induction first: without the repeats no retrieval forms from needles alone.
    Stage(0.05, 128, 32, Mixture(0.9, 0.0, 24, small_alphabets=0.1, single_pattern=1.0)),
    Stage(0.30, 256, 16, Mixture(0.25, 0.50, 48, small_alphabets=0.4, single_pattern=0.7)),
    Stage(0.50, 512, 8, Mixture(0.15, 0.55, 96, small_alphabets=0.5, single_pattern=0.5)),
    Stage(0.72, 1024, 4, Mixture(0.10, 0.55, 300, small_alphabets=0.5, single_pattern=0.5)),
    Stage(1.01, 2048, 2, Mixture(0.05, 0.55, 600, small_alphabets=0.5, single_pattern=0.5)),
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of .md/.txt books")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run's files")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=85.0, help="time budget")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="most threads")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser.parse_args()


def stage_at(progress: float) -> Stage:
    """Return the stage a share of the budget falls in."""
    return next(stage for stage in STAGES if progress < stage.until)


def lr_scale(progress: float, step: int) -> float:
    """Warm up over the first steps, hold, then fall linearly to zero.

    The rate is half as high at first: the full rate destroys the initial induction circuit
    before training has made it its own.
    """
    falling = min(1.0, (1.0 - progress) / (1.0 - DECAY_FROM))
    gentle = 0.5 if progress < GENTLE_UNTIL else 1.0
    return max(0.0, gentle * min((step + 1) / WARMUP_STEPS, falling))


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Use Muon for the layers' matrices and AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices, lr=MATRIX_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        others, lr=EMBEDDING_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    return [muon, adamw]


def load_tokenizer(books: dict[str, str], out: Path) -> Tokenizer:
    """Read the run's tokenizer, or learn it from the books."""
    path = out / "tokenizer.json"
    if not path.exists():
        save_tokenizer(train_tokenizer(books.values(), VOCAB_SIZE), out, MAX_LENGTH)
    return Tokenizer.from_file(str(path))


class Run:
    """Everything a training run keeps, and can put down and take up again."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.budget = arguments.minutes * 60.0
        books = read_books(arguments.corpus)
        self.held_out = books.pop(HELD_OUT, next(iter(books.values()))[:400_000])
        self.tokenizer = load_tokenizer(books, self.out)
        self.rng = Random(arguments.seed)
        corpus = Corpus(list(books.values()), self.tokenizer)
        self.rows = RowMaker(corpus, self.tokenizer, self.rng)
        torch.manual_seed(arguments.seed)
        self.model = make_model(make_config(self.tokenizer.get_vocab_size()))
        torch.set_num_threads(arguments.threads)
        self.optimizers = make_optimizers(self.model)
        self.step = self.tokens = 0
        self.spent = 0.0
        if arguments.resume:
            self.restore()

    @property
    def progress(self) -> float:
        """The share of the time budget that is spent."""
        return min(1.0, float(self.spent / self.budget))

    def log(self, **fields: object) -> None:
        """Append one JSON line to the run's log."""
        record = {"step": self.step, "tokens": self.tokens, "seconds": round(self.spent), **fields}
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def save(self) -> None:
        """Write a checkpoint, whole or not at all, so that a crash costs minutes only."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.getstate(),
            "counters": (self.step, self.tokens, self.spent),
        }
        torch.save(state, self.out / "checkpoint.tmp")
        (self.out / "checkpoint.tmp").replace(self.out / "checkpoint.pt")

    def restore(self) -> None:
        """Go on from the last checkpoint."""
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.setstate(state["rng"])
        self.step, self.tokens, self.spent = state["counters"]

    def train_step(self) -> tuple[float, int]:
        """Take one optimiser step; return its loss and its row length."""
        stage = stage_at(self.progress)
        ids, weights = self.rows.batch(stage.rows, stage.length, stage.mixture)
        loss = weighted_loss(self.model, torch.from_numpy(ids), torch.from_numpy(weights))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = lr_scale(self.progress, self.step)
        for optimizer, peak in zip(self.optimizers, (MATRIX_LR, EMBEDDING_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += stage.rows * stage.length
        return loss.item(), stage.length

    def check(self) -> None:
        """Checkpoint, export, and log what the model can do by now."""
        self.save()
        length = stage_at(min(self.progress, 1.0)).length
        model = export(self.model, self.tokenizer, self.out / "export")
        found = needle_accuracy(model, self.tokenizer, self.held_out, length, 8, Random(0))
        self.log(
            needles=found,
            length=length,
            held_out=perplexity(model, self.tokenizer, self.held_out[:40_000], min(length, 1024)),
        )

    def train(self) -> None:
        """Train until the budget is spent."""
        checked, losses = self.spent, []
        while self.spent < self.budget:
            started = time.perf_counter()
            loss, length = self.train_step()
            losses.append(loss)
            if self.step % LOG_EVERY == 0:
                self.log(loss=round(float(np.mean(losses)), 4), length=length)
                losses = []
            if self.spent - checked > CHECK_EVERY_SECONDS:
                checked = self.spent
                self.check()
            self.spent += time.perf_counter() - started
        self.check()


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> LlamaForCausalLM:
    """Write the files of the package's folder and read them back as users will."""
    save_tokenizer(tokenizer, folder, MAX_LENGTH)
    export_model(model, folder, MAX_LENGTH)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    model.eval()
    return model


def main() -> None:
    """Run the command line."""
    arguments = parse_arguments()
    Run(arguments).train()


if __name__ == "__main__":
    main()
