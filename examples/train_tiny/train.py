"""Train the model from scratch, with as many data-parallel processes as asked for.

A killed run continues from its last checkpoint, a few minutes old, when it is started again.
"""

import json
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from .batch import Batch, collate
from .evaluate import accuracy, rows_of
from .guide import Seen, guidance
from .model import TinyConfig, TinyLlama
from .optim import Muon
from .world import BINDINGS, Shape, World


@dataclass(frozen=True, slots=True)
class Level:
    """One step of the curriculum: prompt shape, questions per prompt, share of a step's tokens."""

    shape: Shape
    questions: int
    share: float = 1.0


LEVELS = (
    Level(Shape((1, 1), (1, 1), (2, 3), 0.5, 0.0, 0.0), 4, 0.4),
    Level(Shape((2, 2), (1, 1), (1, 2), 0.9, 0.0, 0.0, 0.65), 6, 0.4),
    Level(Shape((2, 3), (1, 2), (1, 3), 0.4, 0.8, 0.0, 0.65), 8, 0.4),
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
    steps: int = 4000
    seed: int = 0
    tokens: int = 5400  # per step, all processes together; of it, a level's share
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
    save_minutes: float = 5.0
    link: float = 0.7  # share of town and company values that name another document
    alike: float = 0.4  # share of prompts of four and more documents most of whose names end alike
    device: str = "cpu"
    precision: str = "bfloat16"  # or float32


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
        self.model = TinyLlama(config, getattr(torch, options.precision)).to(self.device)
        named = list(self.model.named_parameters())
        self.matrices = [p for n, p in named if p.ndim == 2 and not n.startswith("embed")]
        self.others = [p for n, p in named if p.ndim != 2 or n.startswith("embed")]
        self.restart()
        self.world = World("train")
        self.level, self.moved, self.step, self.tokens = 0, 0, 0, 0
        self.final_step = -1  # the first step of FINAL
        self.running: dict[str, float] = {}  # moving average of accuracy per kind
        self.loss, self.guide_loss = 0.0, 0.0
        self.seconds = 0.0  # spent on this run before it was started last
        self.resume()
        self.started = time.monotonic() - self.seconds

    def restart(self) -> None:
        """Fresh optimisers: at the start, and where the final part begins."""
        self.muon = Muon(self.matrices, self.model.precision)
        self.adam = torch.optim.AdamW(self.others, betas=(0.9, 0.98), weight_decay=0.0)

    def run(self) -> None:
        """Train to the last step; process 0 reports, checks and saves."""
        reported = saved = time.monotonic()
        while self.step < self.options.steps:
            self.train_step()
            now = time.monotonic()
            if self.rank == 0 and now - reported > 20:
                reported = now
                self.report()
            if self.rank == 0 and now - saved > self.options.save_minutes * 60:
                saved = now
                self.save()
                self.check()
        if self.rank == 0:
            self.save()
            self.report()
            self.check()

    def agree(self, value: float) -> float:
        """Process 0's value, in every process."""
        if self.processes == 1:
            return value
        shared = torch.tensor([value])
        dist.broadcast(shared, 0)
        return float(shared)

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self.step / self.options.steps

    def train_step(self) -> None:
        options, progress = self.options, self.progress
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
        """This process's share of about `tokens` tokens of prompts of the current level.

        What is drawn depends on seed, step and process alone, so that a run can go on.
        """
        options = self.options
        shared = random.Random(f"{options.seed} {self.step}")
        rng = random.Random(f"{options.seed} {self.step} {self.rank}")
        torch.manual_seed(rng.getrandbits(63))
        level = shared.choice(FINAL) if self.final_step >= 0 else LEVELS[self.level]
        count = shared.randint(*level.shape.documents)
        isolated = shared.random() < options.isolated
        alike = options.alike if count >= 4 else 0.0
        shape = replace(level.shape, documents=(count, count), link=options.link, alike=alike)
        tokens = options.tokens / self.processes * level.share
        prompts = [self.world.prompt(rng, shape, level.questions)]
        length = sum(len(c) for c in prompts[0].chunks) / 4.4 + 18 * len(prompts[0].questions) + 12
        for _ in range(max(1, min(96, round(tokens / length))) - 1):
            prompts.append(self.world.prompt(rng, shape, level.questions))
        return collate(self.tokenizer, prompts, isolated).to(self.device)

    def losses(self, batch: Batch, guide: float) -> Tensor:
        """Answers, a little of the text itself, and the guidance while it lasts."""
        seen: Seen | None = [] if guide > 0 else None
        with self.model.autocast():
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

    def report(self) -> None:
        minutes = (time.monotonic() - self.started) / 60
        kinds = " ".join(f"{k}={v:.2f}" for k, v in sorted(self.running.items()))
        print(
            f"{minutes:6.2f} min {self.progress:.3f} step {self.step} level {self.level + 1} "
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
        """Save a checkpoint in two files; the second one names the first."""
        folder, options = self.options.folder, asdict(self.options) | {"folder": ""}
        folder.mkdir(parents=True, exist_ok=True)
        counts = {name: getattr(self, name) for name in _COUNTS}
        counts["seconds"] = time.monotonic() - self.started
        weights = folder / f"step{self.step}.safetensors"
        save_file({k: v.detach().cpu().clone() for k, v in self.tensors().items()}, weights)
        part = folder / "run.part"
        part.write_text(json.dumps({"options": options, "weights": weights.name, **counts}))
        part.replace(folder / "run.json")
        for old in folder.glob("step*.safetensors"):
            if old != weights:
                old.unlink()

    def resume(self) -> None:
        """Load the last checkpoint in this folder. Raises ValueError for other options."""
        saved = self.options.folder / "run.json"
        if not saved.exists():
            return
        state = json.loads(saved.read_text())
        if state["options"] != asdict(self.options) | {"folder": ""}:
            raise ValueError(f"{saved} is of a run with other options: give another --folder")
        for name in _COUNTS:
            setattr(self, name, state[name])
        loaded = load_file(self.options.folder / state["weights"])
        with torch.no_grad():
            for parameter in self.others:  # AdamW makes its state with the first step
                self.adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            for name, tensor in self.tensors().items():
                tensor.copy_(loaded[name])

    def tensors(self) -> dict[str, Tensor]:
        """Weights and the optimisers' state, by name."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for shape, momentum in self.muon.momenta.items():
            found["muon." + "x".join(map(str, shape))] = momentum
        for number, parameter in enumerate(self.others):
            for name, tensor in self.adam.state[parameter].items():
                found[f"adam.{number}.{name}"] = tensor
        return found


#: Attributes of a Trainer, besides tensors and options, that `save` writes.
_COUNTS = (
    "step",
    "level",
    "moved",
    "tokens",
    "final_step",
    "running",
    "loss",
    "guide_loss",
    "seconds",
)
