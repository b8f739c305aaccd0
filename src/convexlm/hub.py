"""What several trainings of one recipe may not do on the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convexlm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def refuse_shared_repository(trainings: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """See that no two trainings are pushed to one repository, where the later would replace the earlier.

    Without `hub_model_id` each goes to a repository named after its own folder.

    Args:
        trainings: names of runs, and the options of `convexlm train` for each.

    Raises:
        UserError: two share `hub_model_id` and `push_to_hub`.
    """
    owners: dict[str, str] = {}
    for name, options in trainings:
        repository = options.get("hub_model_id")
        if not options.get("push_to_hub") or not repository:
            continue
        other = owners.setdefault(str(repository).lower(), name)  # the hub tells no two names apart by case
        if other != name:
            raise UserError(
                f"`hub_model_id: {repository}`: `{other}` and `{name}` would be pushed to the same repository; leave "
                "it out, and each run has one of its own name, or run one arm and one seed"
            )
