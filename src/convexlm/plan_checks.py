"""What a dry run refuses as the start of a training would: all that can be told without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError
from convexlm.fsdp import optimizer_not_sharded
from convexlm.output_folder import refuse_checkpoints
from convexlm.plan_memory import check_with_model
from convexlm.training_checks import check_saved_generation_config, check_settings
from convexlm.training_model import check_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from convexlm.plan_data import Sample
    from convexlm.plan_memory import Planned


def check_start(
    values: Mapping[str, Any],
    made: tuple[Any, Any, Any],
    planned: Planned,
    sample: Sample | None,
    *,
    sharding: str,
    resume: bool,
) -> None:
    """Go through the checks of `training.train_model`, in its order.

    Args:
        values: option names and values of `convexlm train`.
        made: the option objects of them.
        planned: the model, and where it will be trained.
        sample: of the data.
        sharding: how the model is divided.
        resume: it goes on from a checkpoint in the output folder, if one is there.

    Raises:
        UserError: training would raise it.
    """
    options, model_options, config = made
    if reason := optimizer_not_sharded(config, under_fsdp=sharding.lower().startswith("fsdp")):
        raise UserError(reason)
    check_settings(config, options, device_type=planned.device, here=not planned.assumed)
    if values.get("output_dir"):
        refuse_checkpoints(Path(values["output_dir"]), resume)
    check_model(model_options, options, planned.device)
    if not model_options.use_peft and model_options.model_name_or_path:
        check_saved_generation_config(Path(model_options.model_name_or_path))
    check_with_model(planned, model_options, sample, options, config)
