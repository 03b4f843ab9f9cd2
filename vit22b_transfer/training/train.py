"""Fine-tuning: one loop, from checked inputs to the last checkpoint."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import identity, reading, writing
from vit22b_transfer.checkpoints.best import KeepBest
from vit22b_transfer.host import disk_errors, locks, whole_files
from vit22b_transfer.partitioning import processes
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training import (
    compiling,
    finite,
    inputs,
    instrument_picture,
    optimizers,
    resuming,
    run_settings,
    steps,
)
from vit22b_transfer.training.eval_loss import EvaluationStopped, counted
from vit22b_transfer.training.instruments import Instruments
from vit22b_transfer.training.logs import RunLog, StepTimer
from vit22b_transfer.training.measures import Measures, TaskScores
from vit22b_transfer.training.qk_clip import QKClip
from vit22b_transfer.training.spike_guard import SpikeGuard
from vit22b_transfer.training.spike_watch import SpikeWatch
from vit22b_transfer.training.state import (
    abstract_state,
    abstract_variables,
    describe,
    fresh_state,
    to_checkpoint_tree,
)
from vit22b_transfer.training.stop_signals import StopSignals


@dataclasses.dataclass(frozen=True)
class InitialCheckpoint:
    """Parameters to start from: see `restoring.restore_initial`."""

    path: str
    rules: Sequence[tuple[str, str | None]] = ()
    cast: bool = False
    image_size: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Periods:
    """Every how many steps to log, evaluate and save; the last step does all three."""

    log: int = 50
    evaluate: int = 500
    checkpoint: int = 500

    def __post_init__(self):
        for name, period in dataclasses.asdict(self).items():
            if period < 1:
                raise UserError(f"period {name}={period} must be at least 1 step.")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended. `interrupted`: by a signal; before a step `checkpoint` is "".

    `counters`: what this session was given, and what was lost of it, as in
    `data.batches.BatchCounters`.
    """

    step: int
    interrupted: bool
    checkpoint: str
    metrics: Mapping[str, float]
    counters: Mapping[str, int]


def fine_tune(
    model: Any,
    *,
    model_dir: str,
    data: Any,
    total_steps: int,
    partitioning: Partitioning,
    eval_data: Any = None,
    initial: InitialCheckpoint | None = None,
    num_microbatches: int = 1,
    periods: Periods | None = None,
    keep: int | None = 1,
    seed: int = 0,
    best: KeepBest | None = None,
    scores: TaskScores | None = None,
    instruments: Instruments | None = None,
    guard: SpikeGuard | None = None,
    qk_clip: QKClip | None = None,
    allow_changes: Sequence[str] = (),
    run_files: Mapping[str, bytes] | None = None,
) -> TrainResult:
    """Trains `model` up to `total_steps`, in `model_dir`; resumes what is there.

    A run that was killed and is started again ends bit for bit where it would have
    ended. `data` and `eval_data` are `TrainData` and `EvalData`, or anything with their
    `batches`. SIGTERM, SIGINT and SIGHUP finish the step, save and return; an
    evaluation is stopped after a batch, and done again as a whole when the run is
    started again. `keep` newest checkpoints are kept (None: all), and those that are
    the best by `best`. `scores` generates answers every so many steps, for the tasks'
    own metrics; neither changes what is learned. `instruments` tell of the network
    every so many steps; with `guard` steps that are spikes do not count; `qk_clip`
    scales heads back whose logits grew too large.

    allow_changes: names in `run_settings.EXACT` that may differ from those of the run
      that is resumed. All changes are told, one line each.
    run_files: name -> content of files that say what the run is; they are written into
      model_dir when it begins, in place of those that are there.

    Raises:
      UserError: for inputs that do not fit together, before anything is written over;
        if another run writes into model_dir, or the one that is resumed was told
        something else and `allow_changes` does not name it.
      NotFiniteError: if the loss, the gradients or what is to be saved stop being
        finite; the last checkpoint is from before.
    """
    # 1. Check the inputs.
    periods = periods or Periods()
    model_dir = whole_files.writable_directory(model_dir, "model_dir")
    inputs.check_run(model, total_steps, num_microbatches)
    run_settings.check_names(allow_changes)
    if instruments is not None:
        instruments.check(periods.log)
    identity.show_vocabulary(model)

    with (
        disk_errors.said(model_dir, lambda: finite.last_good(model_dir)),
        contextlib.ExitStack() as stack,
    ):
        # 2. Keep others out; open the log and the checkpoints.
        is_writer = jax.process_index() == 0
        if is_writer:
            stack.enter_context(locks.held(model_dir))
        processes.wait_for_all("model_dir locked")
        start_step, to_measure = reading.latest_step(model_dir) or 0, ()
        if start_step > total_steps:
            raise UserError(
                f"{model_dir} is already at step {start_step}, beyond total_steps="
                f"{total_steps}. Choose more steps or another model_dir."
            )
        log = RunLog(model_dir, total_steps=total_steps, is_writer=is_writer)
        stack.callback(log.close)
        writer = writing.CheckpointWriter(model_dir, keep, best)
        stack.callback(writer.close)
        numbers = {"seed": seed, "num_microbatches": num_microbatches}
        numbers |= {"total_steps": total_steps, "keep": keep}
        settings = run_settings.of_run(
            model,
            data=data,
            eval_data=eval_data,
            initial=initial,
            partitioning=partitioning,
            periods=periods,
            numbers=numbers,
            instruments=instruments,
            guard=guard,
            qk_clip=qk_clip,
        )
        if start_step:
            path = reading.checkpoint_path(model_dir, start_step)
            with resuming.explained(model_dir, start_step):
                for line in run_settings.changes(path, settings, allow_changes):
                    log.message(line)
        if is_writer:
            for name, content in (run_files or {}).items():
                with whole_files.replacing(os.path.join(model_dir, name), "wb") as file:
                    file.write(content)

        # 3. Batches: the stream goes on at the step to be taken.
        signals = stack.enter_context(StopSignals())
        batches = data.batches(model, partitioning, seed=seed, start_step=start_step)
        stack.callback(batches.close)
        inputs.check_splits(eval_data)
        batch = next(batches)
        rows = inputs.check_batch(batch, partitioning, num_microbatches)

        # 4. Abstract state with its shardings: nothing is allocated yet.
        params = abstract_variables(model, partitioning, batch)
        optimizer = optimizers.freeze(model.optimizer_def, params, model.frozen)
        abstract = abstract_state(params, optimizer, partitioning)
        log.message(describe(params, model.frozen, partitioning))
        for line in optimizers.describe(model.optimizer_def, params, model.frozen):
            log.message(line)
        if qk_clip is not None:
            log.message(qk_clip.describe(params, model.frozen))
        measures = Measures(
            model,
            partitioning,
            eval_data=eval_data,
            evaluate_every=periods.evaluate,
            scores=scores,
            total_steps=total_steps,
        )
        if best is not None:
            measures.check_best(best, periods.checkpoint, params, batch)

        # 5. Restore, or initialise.
        init_rng, step_rng = _keys(seed, partitioning)
        update = steps.make_update(
            model,
            optimizer,
            partitioning,
            num_microbatches=num_microbatches,
            qk_clip=qk_clip,
        )
        window = compiling.empty_window(update, abstract, batch, step_rng, partitioning)
        watch = SpikeWatch(guard, writer, log, periods.log)
        window = watch.beside(window, partitioning)
        state: Any
        if start_step:
            with resuming.explained(model_dir, start_step):
                state, window = resuming.resume(path, model, abstract, window)
                to_measure = measures.known(resuming.to_measure(path))
                watch.begin(start_step, path)
            log.message(f"resumed from {path}")
        else:
            params = resuming.initial_params(
                model, initial, init_rng, batch, params, partitioning, log
            )
            state = fresh_state(params, optimizer, abstract)
        del params  # the step reuses their memory

        # 6. Compile the step.
        began = time.perf_counter()
        train_step = compiling.compile_steps(
            model,
            optimizer,
            (abstract, window, batch, step_rng, partitioning),
            num_microbatches=num_microbatches,
            window_steps=periods.log,
            instruments=instruments,
            guard=guard,
            qk_clip=qk_clip,
        )
        log.message(f"compiled the step in {time.perf_counter() - began:.1f} s")

        # A model that is trained on cached features has no tower to save.
        origin = reading.tower_record(getattr(data, "cache", None))

        def save():
            fetched = jax.device_get(window)
            watch.tell(fetched, step)
            finite.check_window(watch.metrics(fetched), step, writer)
            finite.check_state(state, step, writer)
            record = resuming.record(
                model,
                watch.saved(fetched),
                settings=settings,
                to_measure=to_measure,
                measured=measured,
            )
            record |= watch.record(fetched, step)
            writer.save(step, to_checkpoint_tree(state), record | origin)
            watch.hold()
            if instruments is not None and is_writer:
                instrument_picture.draw(model_dir)

        def measure(due):
            """(logged values of this step, what is left to do as a signal came)."""
            try:
                values = measures.measure(due, state.params, log, signals.asked)
            except EvaluationStopped:
                log.message(f"step {step}/{total_steps}  the evaluation was stopped")
                return {}, due
            log.scalars(step, values)
            log.message(f"step {step}/{total_steps}  {_line(values)}")
            return values, ()

        # 7. The loop: batch, step, log, evaluate, save.
        stack.enter_context(partitioning.activate())
        log.start(start_step, to_evaluate=bool(to_measure))
        writer.sweep()
        step = saved_step = start_step
        metrics, stopping = {}, signals.asked()
        if (due := to_measure) and not stopping:
            metrics, to_measure = measure(due)
            stopping = bool(to_measure)
            if not stopping and is_writer:
                resuming.mark_as_measured(path, metrics)
                writer.remove_old()
        in_flight = compiling.StepsInFlight()
        timer = StepTimer(step)
        while step < total_steps and not stopping:
            if step > start_step:
                batch = next(batches)
            with jax.transfer_guard_device_to_host("disallow"):
                state, window = train_step(step + 1, state, window, batch, step_rng)
            step += 1
            watch.took(step, batches)
            in_flight.add(window)
            writer.check()
            log.advance(step)
            is_last = step == total_steps

            if step % periods.log == 0 or is_last:
                fetched = jax.device_get(window)
                watch.tell(fetched, step)
                of_window = watch.metrics(fetched)
                finite.check_window(of_window, step, writer)
                metrics = _computed(of_window) | watch.values(fetched)
                told, of_heads = train_step.told()
                speed = timer.steps_per_second(step)
                timing = {"timing/examples_per_second": rows * speed}
                log.scalars(step, metrics | told | timing, of_heads)
                eta = (total_steps - step) / speed
                log.report(step, metrics.get("train/loss"), rows * speed, eta)
                if watch.goes_back(fetched):
                    number = state.step
                    del state  # there may be no memory for two
                    state, window = watch.go_back(step, number, model, abstract, window)
                    timer.restart(step)

            measured, due = {}, measures.due(step)
            if due:
                measured, to_measure = measure(due)
                metrics = metrics | measured
                timer.restart(step)

            if step % periods.checkpoint == 0 or is_last:
                save()
                saved_step = step
                timer.restart(step)
            if best is not None and not to_measure:
                measures.check_measured(best, due)
            stopping = bool(to_measure) or signals.asked()

        # 8. The last checkpoint, where a signal came.
        if step > saved_step:
            save()
        writer.wait()
        path = reading.checkpoint_path(model_dir, step) if step else ""
        counters = batches.counters.counts()
        log.message(f"this session read {_counted(counters)}")
        interrupted = step < total_steps or bool(to_measure)
        ending = "stopped" if interrupted else "done"
        log.message(f"{ending}: {path or 'no checkpoint yet'}, {log.summary()}")
        if best is not None and is_writer:
            log.message(best.told(model_dir))
    return TrainResult(step, interrupted, path, metrics, counters)


def _keys(seed, partitioning):
    # Made on the mesh: device_put cannot reach the devices of other processes.
    def split():
        return tuple(jax.random.split(jax.random.key(seed)))

    return jax.jit(split, out_shardings=partitioning.replicated)()


def _computed(window):
    values = counted(window)
    return {f"train/{name}": float(metric.compute()) for name, metric in values.items()}


def _counted(counters):
    return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counters.items())


def _line(values):
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
