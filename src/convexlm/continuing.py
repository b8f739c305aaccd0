"""Going on from a checkpoint with what is given now: options of optimizer and schedule take effect.

torch keeps learning rate, weight decay and the like in the optimizer's state, so loading it would bring back the old
ones. Here those that differ are set again after loading. Where none differs nothing is touched.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

from convexlm.checkpoints import best_checkpoint, best_step, planned_steps
from convexlm.errors import UserError, first_line
from convexlm.progress import note
from convexlm.trainer import ConvexTrainer
from convexlm.training_marker import changed_optimizer, other_evaluation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SETTINGS = ("weight_decay", "betas", "eps", "momentum")
_NAMES = {"betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_epsilon",)}
# Their rate follows what was measured, so it cannot be told from the step.
_MEASURED = ("reduce_lr_on_plateau", "greedy")
# State of torch's own optimizers that has the shape of its parameter.
_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_inf", "square_avg", "sum")


def refuse_what_cannot_change(
    checkpoint: Path, marker: Mapping[str, Any], *, deepspeed: bool, metric: str | None = None
) -> None:
    """See that options of optimizer, schedule and evaluation which differ from a checkpoint's can take effect.

    Args:
        checkpoint: the checkpoint to go on from.
        marker: what the checkpoints of this training have in their `convexlm.json`.
        deepspeed: whether DeepSpeed is to load the optimizer.
        metric: `metric_for_best_model`.

    Raises:
        UserError: another optimizer; any change under DeepSpeed; another rate where it follows what was measured; or
            other data to evaluate on, where evaluations are compared.
    """
    if metric is not None and (others := other_evaluation(checkpoint, marker)) is not None:
        raise UserError(
            f"{checkpoint}: the data to evaluate on were {others[0]}, not {others[1]}, and --metric_for_best_model "
            "would compare the one with the other: give those that it had, or leave --metric_for_best_model out"
        )
    changed = changed_optimizer(checkpoint, marker)
    kind = {marker["optimizer"]["lr_scheduler_type"], *changed.get("lr_scheduler_type", ())}
    for key, values in changed.items():
        then, now = ("unset" if value is None else value for value in values)
        what = f"{checkpoint}: --{key} was {then}, not {now}"
        if key in ("optim", "optim_args", "optim_target_modules"):
            raise UserError(f"{what}; another optimizer cannot take up its state: give the one it was trained with")
        if deepspeed and key != "max_grad_norm":  # which it reads anew
            raise UserError(f"{what}; under DeepSpeed optimizer and schedule go on as they were: give what they had")
        if kind & set(_MEASURED) and key in ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"):
            raise UserError(
                f"{what}; the rate of {' and '.join(sorted(kind & set(_MEASURED)))} follows what was measured, and "
                "goes on as it was: give what it had"
            )


class ContinuingTrainer(ConvexTrainer):
    """`ConvexTrainer` for `convexlm train`, which goes on with the options that it is given."""

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer, which would log, save and evaluate as often, and compare what, as it did before.

        The best checkpoint is looked for beside the last, for the folder may have moved.
        """
        with _without_warnings_of_changes():
            counted = super()._init_training_state(*args, **kwargs)
        if self._resumed_from is None:
            return counted
        state, metric, greater = self.state, self.args.metric_for_best_model, self.args.greater_is_better
        state.compute_steps(self.args, state.max_steps)
        state.best_model_checkpoint = best_checkpoint(Path(self._resumed_from), metric, greater)
        if metric is not None:
            step, key = best_step(state.log_history, metric, greater), f"eval_{metric.removeprefix('eval_')}"
            measured = (line[key] for line in state.log_history if line["step"] == step and key in line)
            state.best_metric = next(measured, None)
        return counted

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As in the Trainer; weights of another shape are the user's to mend."""
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except (ValueError, RuntimeError) as error:
            known = ("size mismatch", "Can't find a")
            if not any(word in str(error) for word in known):
                raise
            line = next((one for one in str(error).split("\n") if known[0] in one), first_line(error))
            raise _misfit(resume_from_checkpoint, "weights", line.strip()) from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in the Trainer, then what was given otherwise than before is set."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = getattr(
            self.optimizer, "optimizer", self.optimizer
        )  # accelerate's wrapper is none of torch's
        given = [{key: group[key] for key in _SETTINGS if key in group} for group in optimizer.param_groups]
        rates = list(getattr(self.lr_scheduler, "base_lrs", ()))
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "loaded state dict" not in str(error):
                raise
            raise _misfit(checkpoint, "moments of the optimizer", first_line(error)) from None
        _check_shapes(optimizer, checkpoint)
        changes = changed_optimizer(Path(checkpoint), self.checkpoint_marker or {})
        said = [*_set_rates(optimizer, self.lr_scheduler, rates), *_set_settings(optimizer, given)]
        others = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "bf16", "fp16")
        said += [f"{key} {changes[key][0]} -> {changes[key][1]}" for key in others if key in changes]
        before, now = planned_steps(Path(checkpoint)), self.state.max_steps
        if self.args.k_warmup and before is not None and before != now:
            said.append(f"k_warmup {self.args.k_warmup:g} of {before} -> of {now} steps")
        if said and self.args.process_index == 0:
            step = Path(checkpoint).name.rsplit("-", 1)[-1]
            note(f"  {', '.join(said)} from step {step}")


def _set_rates(optimizer: Any, scheduler: Any, given: list[Any]) -> Iterator[str]:
    """Have every group's rate be what the schedule gives now for its step; what was changed, in words."""
    if not isinstance(scheduler, LambdaLR):
        return
    before = scheduler.base_lrs
    if [float(rate) for rate in before] != [float(rate) for rate in given]:
        yield f"learning_rate {float(before[0]):g} -> {float(given[0]):g}"
        scheduler.base_lrs = given
        for group, rate in zip(optimizer.param_groups, given, strict=True):
            group["initial_lr"] = rate
    # Where nothing has changed this is the loaded number to its last bit, for it was computed so.
    rates = [
        rate * at(scheduler.last_epoch) for rate, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    groups = optimizer.param_groups
    if [float(rate) for rate in rates] == [float(group["lr"]) for group in groups]:
        return
    if before is scheduler.base_lrs:
        yield f"rate of the next step {float(groups[0]['lr']):g} -> {float(rates[0]):g} by the schedule"
    for group, rate in zip(groups, rates, strict=True):
        if hasattr(group["lr"], "fill_"):  # a tensor, which compiled steps keep
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = rate
    scheduler._last_lr = [group["lr"] for group in groups]


def _set_settings(optimizer: Any, given: list[dict[str, Any]]) -> Iterator[str]:
    """Have every group's settings be those given; what was changed, in words."""
    told: dict[str, str] = {}
    for group, settings in zip(optimizer.param_groups, given, strict=True):
        for key, value in settings.items():
            before = group[key]
            if _numbers(before) == _numbers(value):
                continue
            group[key] = value
            names = _NAMES.get(key, (key,))
            for name, then, now in zip(names, _numbers(before), _numbers(value), strict=False):
                if then != now:
                    told.setdefault(name, f"{name} {then:g} -> {now:g}")
    yield from told.values()


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(float(one) for one in value) if isinstance(value, (tuple, list)) else (float(value),)


def _check_shapes(optimizer: Any, checkpoint: str) -> None:
    """See that moments have the shape of their parameters: fused steps do not look, and write beyond them."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if name in _SHAPED and tuple(value.shape) != tuple(parameter.shape):
                    what = f"{name} of {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}"
                    raise _misfit(checkpoint, "moments of the optimizer", what)


def _misfit(checkpoint: str, what: str, reason: str) -> UserError:
    return UserError(
        f"{checkpoint}: its {what} do not fit the model ({reason}); --resume goes on with the model and adapter "
        "that a training was begun with: give those, or choose another --output_dir"
    )


@contextlib.contextmanager
def _without_warnings_of_changes() -> Iterator[None]:
    """Leave out what the Trainer says of a best checkpoint that was moved with its folder, and of other `save_steps`.

    The one is found again here, and the others take effect.
    """

    def other(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in ("The best checkpoint", "do not match the ones in"))

    loggers = [logging.getLogger(f"transformers.{name}") for name in ("trainer", "trainer_utils")]
    for logger in loggers:
        logger.addFilter(other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(other)
