"""The recipe's `selection`: at which checkpoint arms are compared, and what that was decided on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convexlm.recipe import Recipe

WAYS = ("last", "validation", "test")


def check_selection(value: Any, recipe: Recipe, wrong: Any) -> dict[str, Any]:
    """A recipe's `selection`, resolved: `on`, and unless that is `last`, `metric` and `search`.

    Args:
        value: what the recipe says: nothing, a way, or a mapping with `on`, `metric`, `search`.
        recipe: the recipe, checked but for this.
        wrong: makes an error of a text.

    Raises:
        UserError: another way, metric or search than the recipe has, nothing to choose from, or validation sets that
            nothing would read.
    """
    from convexlm.decoding.search import Search

    given = {"on": value or "last"} if value is None or isinstance(value, str) else value
    if isinstance(given, dict):  # YAML 1.1 reads a bare `on` as true
        given = {"on" if key is True else key: entry for key, entry in given.items()}
    if not isinstance(given, dict) or given.get("on") not in WAYS:
        raise wrong(f"`selection` is {', '.join(WAYS)}, or {{on: ..., metric: ..., search: ...}}, not {value!r}")
    if unknown := [key for key in given if key not in ("on", "metric", "search")]:
        raise wrong(f"unknown key in `selection`: `{unknown[0]}`; known: on, metric, search")
    on = given["on"]
    if on == "validation" and not recipe.validation_sets:
        raise wrong("`selection: validation` needs `validation_sets`, entries as in `test_sets`")
    if on != "validation" and recipe.validation_sets:
        raise wrong(f"`validation_sets` are not read with `selection: {on}`; write `selection: validation`")
    if on == "last":
        if len(given) > 1:
            raise wrong("`selection`: `metric` and `search` say nothing where the last checkpoint is taken")
        return {"on": "last"}
    if recipe.decode["checkpoints"] == "last":
        raise wrong(f"`selection: {on}` chooses among `decode.checkpoints`: give `all` or a list of steps")
    searches = [Search.from_mapping(options).name for options in recipe.decode["searches"]]
    metric, search = given.get("metric", recipe.metrics[0]), given.get("search", searches[0])
    if metric not in recipe.metrics:
        raise wrong(f"`selection.metric` is {metric!r}; `score.metrics` has: {', '.join(recipe.metrics)}")
    if search not in searches:
        raise wrong(f"`selection.search` is {search!r}; `decode.searches` has: {', '.join(searches)}")
    return {"on": on, "metric": metric, "search": search}
