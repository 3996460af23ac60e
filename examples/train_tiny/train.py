"""Train the model from scratch, with as many data-parallel processes as asked for."""

import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from .batch import Batch, collate
from .evaluate import accuracy, rows_of
from .export import load_exported
from .guide import Seen, guidance
from .model import TinyConfig, TinyLlama
from .optim import Muon
from .world import BINDINGS, Shape, World


@dataclass(frozen=True, slots=True)
class Level:
    """One step of the curriculum: prompt shape and questions per prompt."""

    shape: Shape
    questions: int


LEVELS = (
    Level(Shape((1, 1), (1, 1), (2, 3), 0.5, 0.0, 0.0), 4),
    Level(Shape((2, 2), (1, 1), (1, 2), 0.9, 0.0, 0.0, 0.65), 6),
    Level(Shape((2, 3), (1, 2), (1, 3), 0.4, 0.8, 0.0, 0.65), 8),
    Level(Shape((2, 4), (1, 2), (2, 4), 0.2, 0.8, 0.1, 0.5), 16),
    Level(Shape((3, 5), (1, 3), (2, 4), 0.2, 0.8, 0.2, 0.5), 24),
    Level(Shape((4, 6), one_kind=0.4), 32),
    Level(Shape((4, 8), one_kind=0.35), 40),
    Level(Shape((4, 10), one_kind=0.35), 40),
    Level(Shape((4, 16), one_kind=0.35), 40),
)
FINAL = (  # the last part of the run: up to eight documents, every sixth batch up to sixteen
    *(Level(Shape((4, 8), one_kind=0.35, hop=0.1), 40),) * 5,
    Level(Shape((8, 16), one_kind=0.35, hop=0.1), 40),
)
CHECKS = {
    "4 documents": (Shape((4, 4)), False),
    "8 documents": (Shape((8, 8)), False),
    "8 documents, isolated": (Shape((8, 8)), True),
    "8 documents of one kind": (Shape((8, 8), one_kind=1.0), False),
}


@dataclass(frozen=True, slots=True)
class Options:
    folder: Path
    minutes: float = 55.0  # the schedule follows the clock, or
    steps: int = 0  # where this is set, the steps
    seed: int = 0
    tokens: int = 2700  # per step and process; 0.4 of it in the first three levels
    matrix_rate: float = 0.01  # Muon's learning rate
    other_rate: float = 0.003  # AdamW's, for embedding and norms
    warmup: int = 30  # steps
    final: float = 0.545  # share of the run before FINAL: from here the rate falls to zero
    guide: float = 0.5  # weight of the attention guidance
    guide_full: float = 0.25  # share of the run with full guidance
    guide_end: float = 0.5  # share of the run after which there is none
    isolated: float = 0.25  # share of batches with isolated chunks
    language: float = 0.05  # weight of next-token loss on the text itself
    advance: float = 0.8  # accuracy that moves the curriculum on
    patience: int = 20  # steps between two moves, at least
    report_minutes: float = 5.0
    link: float = 0.7  # share of town and company values that name another document
    alike: float = 0.0  # share of prompts most of whose names end alike
    start: str = ""  # folder of an exported model to go on from, with `--final 0 --guide 0`
    device: str = "cpu"


class Trainer:
    """The state of one process of a run. All processes hold the same weights at every step."""

    def __init__(
        self,
        options: Options,
        tokenizer: Tokenizer,
        config: TinyConfig,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.rank, self.processes = rank, processes
        self.device = torch.device(options.device)
        torch.manual_seed(options.seed)
        self.model = TinyLlama(config).to(self.device)
        if options.start:
            self.model.load_state_dict(load_exported(Path(options.start)).state_dict())
        named = list(self.model.named_parameters())
        self.matrices = [p for n, p in named if p.ndim == 2 and not n.startswith("embed")]
        self.others = [p for n, p in named if p.ndim != 2 or n.startswith("embed")]
        self.restart()
        torch.manual_seed(options.seed * 1000 + 1 + rank)
        self.rng = random.Random(options.seed * 1000 + 1 + rank)
        self.shared_rng = random.Random(options.seed * 1000 + 999)
        self.world = World("train")
        self.level = len(LEVELS) - 1 if options.start else 0
        self.moved, self.step, self.tokens = 0, 0, 0
        self.final_step = -1  # the first step of FINAL
        self.running: dict[str, float] = {}  # moving average of accuracy per kind
        self.loss, self.guide_loss = 0.0, 0.0
        self.started = time.monotonic()

    def restart(self) -> None:
        """Fresh optimisers: at the start, and where the final part begins."""
        self.muon = Muon(self.matrices)
        self.adam = torch.optim.AdamW(self.others, betas=(0.9, 0.98), weight_decay=0.0)

    def run(self) -> None:
        """Train to the end of the budget; process 0 reports, checks and saves."""
        reported = checked = time.monotonic()
        while (progress := self.progress()) < 1:
            self.train_step(progress)
            now = time.monotonic()
            if self.rank == 0 and now - reported > 20:
                reported = now
                self.report(progress)
            if self.rank == 0 and now - checked > self.options.report_minutes * 60:
                checked = now
                self.save()
                self.check()
        if self.rank == 0:
            self.save()
            self.report(1.0)
            self.check()

    def agree(self, value: float) -> float:
        """Process 0's value, in every process."""
        if self.processes == 1:
            return value
        shared = torch.tensor([value])
        dist.broadcast(shared, 0)
        return float(shared)

    def progress(self) -> float:
        """Share of the run that is over."""
        if self.options.steps:
            return self.step / self.options.steps
        return self.agree((time.monotonic() - self.started) / 60 / self.options.minutes)

    def train_step(self, progress: float) -> None:
        options = self.options
        fade = (options.guide_end - progress) / (options.guide_end - options.guide_full)
        guide = options.guide * min(1.0, max(0.0, fade))
        if progress >= options.final and self.final_step < 0:
            self.final_step = self.step
            self.restart()
        fall = (1 - progress) / (1 - options.final) if self.final_step >= 0 else 1.0
        since = self.step - max(0, self.final_step)
        rate = min(1.0, (since + 1) / options.warmup) * max(0.01, fall)
        batch = self.batch()
        self.losses(batch, guide).backward()  # type: ignore[no-untyped-call]
        self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.muon.step(options.matrix_rate * rate)
        for group in self.adam.param_groups:
            group["lr"] = options.other_rate * rate
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += batch.ids.numel() * self.processes
        self.advance()

    def batch(self) -> Batch:
        """About `tokens` tokens of prompts of the current level, equally big in every process."""
        final = self.final_step >= 0
        level = self.shared_rng.choice(FINAL) if final else LEVELS[self.level]
        count = self.shared_rng.randint(*level.shape.documents)
        isolated = self.shared_rng.random() < self.options.isolated
        shape = replace(level.shape, documents=(count, count), link=self.options.link)
        shape = replace(shape, alike=self.options.alike)
        tokens = self.options.tokens * (0.4 if self.level < 3 else 1.0)
        prompts = [self.world.prompt(self.rng, shape, level.questions)]
        length = sum(len(c) for c in prompts[0].chunks) / 4.4 + 18 * len(prompts[0].questions) + 12
        for _ in range(max(1, min(96, round(tokens / length))) - 1):
            prompts.append(self.world.prompt(self.rng, shape, level.questions))
        return collate(self.tokenizer, prompts, isolated).to(self.device)

    def losses(self, batch: Batch, guide: float) -> Tensor:
        """Answers, a little of the text itself, and the guidance while it lasts."""
        seen: Seen | None = [] if guide > 0 else None
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.model(batch.ids, rows_of(self.model, batch), seen)
            labelled = batch.targets >= 0
            logits = self.model.logits(hidden[:, batch.context :][labelled]).float()
            targets = batch.targets[labelled]
            loss = F.cross_entropy(logits, targets)
            following = batch.ids[:, 1 : batch.context]
            chosen = (batch.chunk[:, 1:] > 0) & (torch.rand(following.shape).to(self.device) < 0.3)
            text = self.model.logits(hidden[:, : batch.context - 1][chosen]).float()
            total = loss + self.options.language * F.cross_entropy(text, following[chosen])
        self.observe(
            logits.argmax(-1) == targets, targets, batch.kinds[labelled], float(loss.detach())
        )
        if seen is not None:
            extra = guidance(batch, seen)
            self.guide_loss = float(extra.detach())
            total = total + guide * extra
        return total

    def observe(self, right: Tensor, targets: Tensor, kinds: Tensor, loss: float) -> None:
        """Moving averages of the loss and of the answer tokens' accuracy per kind."""
        for i, binding in enumerate(BINDINGS):
            chosen = (kinds == i) & (targets > 2)
            if bool(chosen.any()):
                now = float(right[chosen].float().mean())
                self.running[binding] = 0.93 * self.running.get(binding, now) + 0.07 * now
        self.loss = loss if self.step == 0 else 0.95 * self.loss + 0.05 * loss

    def advance(self) -> None:
        """Move to the next level when every kind seen is good enough."""
        worst = self.agree(min(self.running.get(b, 1.0) for b in ("direct", "local", "split")))
        rested = self.step - self.moved >= self.options.patience
        if rested and worst > self.options.advance and self.level < len(LEVELS) - 1:
            self.level, self.moved = self.level + 1, self.step

    def average_gradients(self) -> None:
        if self.processes == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.processes
        parts = torch.split(flat, [g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def report(self, progress: float) -> None:
        minutes = (time.monotonic() - self.started) / 60
        kinds = " ".join(f"{k}={v:.2f}" for k, v in sorted(self.running.items()))
        print(
            f"{minutes:6.2f} min {progress:.3f} step {self.step} level {self.level + 1} "
            f"{self.tokens / 1e6:.2f}M tokens, {self.tokens / minutes / 60:.0f}/s "
            f"loss {self.loss:.3f} guide {self.guide_loss:.2f} {kinds}",
            flush=True,
        )

    def check(self) -> None:
        """Print held-out accuracy."""
        self.model.eval()
        for name, (shape, isolated) in CHECKS.items():
            result = accuracy(self.model, self.tokenizer, shape, 16, isolated)
            print(f"   held-out {name}: {result}", flush=True)
        self.model.train()

    def save(self) -> None:
        self.options.folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        part = self.options.folder / "checkpoint.part"
        save_file(weights, part)
        part.replace(self.options.folder / "checkpoint.safetensors")
