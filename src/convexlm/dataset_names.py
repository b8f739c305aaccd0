"""How a dataset is named: a file, a folder or a name on the hub, and where there are several, config and split.

    tatsu-lab/alpaca                              the split `train`
    HuggingFaceH4/ultrachat_200k[train_sft]       another split
    openai/gsm8k:main                             a config (a subset)
    wmt/wmt19:de-en[train[:50000]]                both; the split is what `datasets.load_dataset` takes

What lies on the disk under such a name as a whole is taken as it stands.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from convexlm.errors import UserError

_SPELLED = re.compile(r"(?P<name>[^\[\]]+?)(?::(?P<config>[^:/\[\]]+))?(?:\[(?P<split>.+)\])?", re.DOTALL)


class DatasetName(NamedTuple):
    """A dataset's name in its parts.

    Attributes:
        name: path or hub name.
        config: as `datasets` calls it; None where none was named.
        split: likewise.
    """

    name: str
    config: str | None
    split: str | None


def parse_dataset(dataset: str | Path) -> DatasetName:
    """The parts of a name as a user writes it."""
    text = str(dataset)
    try:
        whole = Path(text).exists()
    except (OSError, ValueError):  # a name too long for the system, a NUL in it
        whole = True
    found = None if whole else _SPELLED.fullmatch(text)
    return DatasetName(found["name"], found["config"], found["split"]) if found else DatasetName(text, None, None)


def dataset_path(dataset: str | Path) -> Path:
    """Where a dataset lies, if it does on this machine; the config and split that are named left out."""
    return Path(parse_dataset(dataset).name)


def spell_dataset(dataset: str, config: str | None, split: str | None, options: tuple[str, str]) -> str:
    """One name of a name, a config and a split that were given apart.

    Args:
        dataset: as `parse_dataset` takes it.
        config: None for none.
        split: likewise.
        options: what the two are called, for messages.

    Raises:
        UserError: the name has another config or split already, or is a file, which has neither.
    """
    name, own_config, own_split = parse_dataset(dataset)
    for option, given, own in zip(options, (config, split), (own_config, own_split), strict=True):
        if given and own and given != own:
            raise UserError(f"{option} {given}: the dataset's name, {dataset}, says `{own}`")
    config, split = config or own_config, split or own_split
    spelled = name + (f":{config}" if config else "") + (f"[{split}]" if split else "")
    if (config or split) and parse_dataset(spelled) != DatasetName(name, config, split):
        raise UserError(f"{', '.join(options)}: {spelled} is no name of a dataset")
    return spelled
