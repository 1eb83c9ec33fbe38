"""The trainer of all tasks: trains epoch by epoch and records each epoch, so that a run resumes exactly."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from experiments.contracts.base import ContractError, dotted
from experiments.contracts.task import Samples
from experiments.run.checkpoint import Checkpoint, Row
from experiments.run.components import Components
from experiments.run.folders import load_metrics
from experiments.run.interruption import Interrupted, StopRequest
from experiments.run.tracking import Tracker
from foldopt.errors import FoldoptError, InputError

log = logging.getLogger("foldopt.run")
ZERO_GRADIENT = 1e-12
NO_GRADIENT = (
    "no sample had a gradient: the decisions do not move with the predictions (as at vertices of a linear program), "
    "so nothing is learned. Smooth the problem, or train on predictions or a surrogate: backend=two_stage or spo_plus."
)


class DivergenceError(FoldoptError, ArithmeticError):
    """Training produced NaN or inf; the message says where, and what to try."""


class Stopwatch:
    """Measures seconds by name; waits for the GPU at every reading."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._last = device, 0.0
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        """Begin to measure."""
        self._synchronize()
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last reading to `name`."""
        self._synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Trainer:
    """Trains the model of a run on its task through its backend.

    The order of the training samples depends on (seed, epoch) alone. Validation and test samples are evaluated before
    training, as epoch 0, and after every epoch: in eval mode, and by the task's exact solver for every backend.
    """

    def __init__(self, cfg: DictConfig, parts: Components, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.task, self.model, self.backend = parts.task, parts.model, parts.backend
        self.optimizer = parts.optimizer
        self.schedule = (
            torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, cfg.train.epochs)
            if cfg.train.schedule == "cosine"
            else torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        )

    @property
    def state(self) -> dict[str, Any]:
        """The parts whose state a checkpoint keeps, by name."""
        backend = {} if self.backend.lacks("state_dict") else {"backend": self.backend}
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, **backend}

    def fit(self, checkpoint: Checkpoint, tracker: Tracker, console: Console, stop: StopRequest) -> float:
        """Train from the last checkpoint to the last epoch; return the seconds spent, including those before a stop.

        Raises Interrupted after a signal, DivergenceError if loss or predictions are no longer finite.
        """
        done, before, begun = checkpoint.restore(self.device)
        if done >= 0:
            more = f" and {begun['batches']} batches" if begun else ""
            log.info("resumed after epoch %d of %d%s", done, self.cfg.train.epochs, more)
            tracker.catch_up(load_metrics(checkpoint.path.parent))
        begin = time.perf_counter()
        with self._progress(console) as progress:
            bar = progress.add_task("", total=self.cfg.train.epochs, completed=max(done, 0))
            for epoch in range(done + 1, self.cfg.train.epochs + 1):
                try:
                    rows = self._epoch(epoch, stop, begun)
                except Interrupted as stopped:
                    checkpoint.save(epoch - 1, before + time.perf_counter() - begin, [], stopped.begun)
                    log.info("interrupted with exit code %d", stopped.exit_code)
                    raise
                begun = None
                checkpoint.save(epoch, before + time.perf_counter() - begin, rows)
                tracker.log(rows)
                line = self._line(epoch, rows)
                log.info(line)
                progress.update(bar, completed=epoch, description=self._brief(rows))
                if progress.disable:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
        return before + time.perf_counter() - begin

    def _progress(self, console: Console) -> Progress:
        columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn()
        return Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (self.cfg.progress and console.is_terminal),
        )

    def _epoch(self, epoch: int, stop: StopRequest, begun: dict[str, Any] | None) -> list[Row]:
        """Train and evaluate; predictions that the problem refuses after training began are a divergence."""
        try:
            rows = [self._train(epoch, stop, begun)] if epoch else []
            return rows + [self._evaluate(epoch, split) for split in ("val", "test")]
        except InputError as error:
            if epoch == 0:
                raise
            raise DivergenceError(
                f"training diverged in epoch {epoch}: {error} Metrics and checkpoint of epoch {epoch - 1} are kept."
            ) from error

    def on_prediction(self, epoch: int) -> bool:
        """Whether this epoch trains on the prediction loss: the backend's choice, or the warm start."""
        return self.backend.trains_on == "prediction" or epoch <= self.cfg.train.mse_epochs

    def _train(self, epoch: int, stop: StopRequest, begun: dict[str, Any] | None) -> Row:
        """Train one epoch; if it was `begun` before a stop, do the remaining batches."""
        self.model.train()
        watch = Stopwatch(self.device)
        begin = time.perf_counter()
        totals = {"zero": 0, "failures": 0, "products": 0, "samples": 0, "largest_error": 0.0}
        sums: Counter[str] = Counter()
        first = 0
        if begun:
            first, totals, sums = begun["batches"], begun["totals"], Counter(begun["sums"])
            watch.seconds = begun["seconds"]
            begin -= begun["seconds_epoch"]
        for number, batch in enumerate(islice(self._batches(epoch), first, None), first):
            if stop.signal is not None:
                spent = {"seconds": watch.seconds, "seconds_epoch": time.perf_counter() - begin}
                begun = {"batches": number, "totals": totals, "sums": dict(sums), **spent}
                raise Interrupted(stop.exit_code, begun)
            values, zero = self._step(epoch, batch, watch)
            size = len(batch["inputs"])
            sums.update({name: value * size for name, value in values.items()})
            totals["largest_error"] = max(totals["largest_error"], values.get("gradient_error", 0.0))
            totals["zero"] += zero
            totals["failures"] += self.backend.take_failures()
            totals["products"] += self.backend.products
            totals["samples"] += size
        self.schedule.step()
        if totals["failures"]:
            log.warning("epoch %d: the solver failed on %d of %d samples", epoch, totals["failures"], totals["samples"])
        seconds = time.perf_counter() - begin
        means = {name: value / totals["samples"] for name, value in sums.items()}
        return {
            "epoch": epoch,
            "split": "train",
            **means,
            **({"gradient_error_max": totals["largest_error"]} if "gradient_error" in means else {}),
            "seconds_network": watch.seconds["network"],
            "seconds_solve": watch.seconds.get("solve", 0.0),
            "seconds_backward": watch.seconds.get("backward", 0.0),
            "seconds_epoch": seconds,
            "samples": totals["samples"],
            "zero_gradient_fraction": totals["zero"] / totals["samples"],
            "solver_failures": totals["failures"],
            "adjoint_products": totals["products"] / totals["samples"],
            **self._diagnosed(batch),
        }

    @torch.no_grad()
    def _diagnosed(self, batch: Samples) -> Row:
        """Return the task's diagnostics of the last batch of an epoch."""
        self.model.eval()
        outputs = self.model(self.task.prepare(batch["inputs"], None))
        return self._declared(self.task.diagnose(outputs, batch), "diagnose")

    def _declared(self, values: dict[str, float], member: str) -> dict[str, float]:
        """Return the values; ContractError if one has a column that the task does not declare."""
        unknown = sorted(set(values) - {"loss", *self.task.columns})
        if unknown:
            raise ContractError(
                f"{dotted(type(self.task))}.{member} returns {unknown}, which its columns {self.task.columns} do not "
                "declare; add them there."
            )
        return values

    def _batches(self, epoch: int) -> Iterator[Samples]:
        samples = self.task.splits["train"]
        n, size = len(samples["inputs"]), self.cfg.train.batch_size
        generator = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + epoch)
        order = torch.randperm(n, generator=generator)
        for chosen in order.split(size):
            if len(chosen) == 1 < min(n, size):
                continue  # a batch of one sample has no batch statistics
            index = chosen.to(self.device)
            batch = {name: values[index] for name, values in samples.items()}
            yield batch | {"inputs": self.task.prepare(batch["inputs"], generator)}

    def _step(self, epoch: int, batch: Samples, watch: Stopwatch) -> tuple[dict[str, float], int]:
        """Take one optimizer step; return the metrics of the batch, and how many samples had a zero gradient.

        The graph is cut at the predicted parameters, so that layer and network are timed separately.
        """
        watch.start()
        outputs = self.model(batch["inputs"])
        self._refuse_nan(outputs, "predictions", epoch)
        leaf = outputs.detach().requires_grad_()
        watch.lap("network")
        if self.on_prediction(epoch):
            loss = self.task.prediction_losses(leaf, batch).mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
        elif self.backend.trains_on == "surrogate":
            watch.lap("network")
            losses = self.backend.losses(self.task.parameters(leaf, batch), self.task.truth(batch))
            loss = self.cfg.train.loss_scale * losses.mean()
            watch.lap("solve")
            (gradient,) = torch.autograd.grad(loss, leaf)
            watch.lap("backward")
        else:
            decisions = self.backend(self.task.parameters(leaf, batch))
            watch.lap("solve")
            loss = self.cfg.train.loss_scale * self._decision_loss(decisions, batch)
            (gradient,) = torch.autograd.grad(loss, leaf) if loss.requires_grad else (torch.zeros_like(leaf),)
            watch.lap("backward")
        self._refuse_nan(loss, "the loss", epoch)
        self._refuse_nan(gradient, "the gradient of the loss", epoch)
        self.optimizer.zero_grad(set_to_none=True)
        outputs.backward(gradient)
        self.optimizer.step()
        rows = 1 if self.task.shared else len(gradient)
        sizes = gradient.detach().reshape(rows, -1).norm(dim=1)
        zero = int((sizes <= ZERO_GRADIENT * sizes.amax()).sum()) * len(batch["inputs"]) // rows
        watch.lap("network")
        return {"loss": float(loss.detach()), **self._measured(epoch, outputs.detach(), batch, gradient)}, zero

    @torch.no_grad()
    def _measured(self, epoch: int, outputs: Tensor, batch: Samples, gradient: Tensor) -> dict[str, float]:
        """Return the task's `running` metrics, and the relative error of the gradient if the exact one is known."""
        found = self.task.metrics(outputs, batch) if self.task.running else {}
        values = {name: found[name] for name in self.task.running}
        if not self.task.lacks("exact_gradient") and not self.on_prediction(epoch):
            exact = self.cfg.train.loss_scale * self.task.exact_gradient(outputs, batch)
            size = exact.norm()
            values["gradient_error"] = float((gradient - exact).norm() / torch.where(size > 0, size, 1))
        return values

    def _decision_loss(self, decisions: Tensor, batch: Samples) -> Tensor:
        """Return the mean loss over the samples that the backend solved; the decisions of the others are NaN."""
        sound = decisions.detach().flatten(1).isfinite().all(1)
        filled = torch.where(sound.view(-1, *[1] * (decisions.dim() - 1)), decisions, 0.0)
        losses = self.task.decision_losses(filled, batch)
        return torch.where(sound, losses, 0.0).sum() / sound.sum().clamp(min=1)

    def _refuse_nan(self, values: Tensor, what: str, epoch: int) -> None:
        if not values.detach().isfinite().all():
            raise DivergenceError(
                f"training diverged: {what} hold NaN or inf in epoch {epoch}. Lower train.lr={self.cfg.train.lr} or "
                f"change train.loss_scale={self.cfg.train.loss_scale}; metrics until epoch {epoch - 1} are kept."
            )

    @torch.no_grad()
    def _evaluate(self, epoch: int, split: str) -> Row:
        self.model.eval()
        samples = self.task.splits[split]
        parts = samples["inputs"].split(250)[: 1 if self.task.shared else None]
        outputs = torch.cat([self.model(self.task.prepare(part, None)) for part in parts])
        self._refuse_nan(outputs, "predictions", epoch)
        metrics = self._declared(self.task.metrics(outputs, samples), "metrics")
        if self.task.objective not in metrics:
            raise ContractError(
                f"{dotted(type(self.task))}.metrics returns {sorted(metrics)} without the objective "
                f"{self.task.objective!r}; return it, or declare another objective."
            )
        if self.backend.trains_on == "prediction":
            loss = float(self.task.prediction_losses(outputs, samples).mean())
        else:
            sign = -1 if self.task.maximize else 1
            loss = self.cfg.train.loss_scale * metrics.get("loss", sign * metrics[self.task.objective])
        return {"epoch": epoch, "split": split, **metrics, "loss": loss, "samples": len(samples["inputs"])}

    def _shown(self, row: Row) -> str:
        names = self.task.shown or (self.task.objective,)
        values = [f"{name.replace('_percent', ' %')} {row[name]:.4g}" for name in names if name in row]
        return ", ".join(f"{row['split']} {value}" for value in values)

    def _brief(self, rows: list[Row]) -> str:
        """Return the validation metrics, which fit beside a progress bar."""
        return self._shown(next(row for row in rows if row["split"] == "val"))

    def _line(self, epoch: int, rows: list[Row]) -> str:
        """Return the line that the console shows after an epoch."""
        values = [f"train loss {rows[0]['loss']:.4g}"] if epoch else []
        values += filter(None, map(self._shown, rows))
        seconds = f"{rows[0]['seconds_epoch']:.1f} s" if epoch else "before training"
        line = f"epoch {epoch}/{self.cfg.train.epochs}: {', '.join(values)} ({seconds})"
        return f"{line}; {NO_GRADIENT}" if rows[0].get("zero_gradient_fraction") == 1 else line
