"""The options of `convexlm train` that say what to train on."""

from __future__ import annotations

from dataclasses import dataclass, field

from convexlm.dataset_names import parse_dataset, spell_dataset


@dataclass
class DataOptions:
    """What to train on, and what a new model or another tokenizer comes from."""

    dataset: str = field(
        metadata={
            "help": "File (.json, .jsonl, plain or .gz), folder or hub name of the training data; NAME:CONFIG[SPLIT] "
            "for one of several.",
            "aliases": ["--dataset_name"],
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Config (subset) of --dataset."})
    dataset_train_split: str | None = field(default=None, metadata={"help": "Split of --dataset; default: train."})
    eval_dataset: str | None = field(default=None, metadata={"help": "The same for data to evaluate the loss on."})
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split of --eval_dataset or, without that, of --dataset to evaluate the loss on."},
    )
    template: str = field(
        default="alpaca", metadata={"help": "Prompt template: a name, or a text such as 'Translate: {input}'."}
    )
    add_bos: bool | None = field(
        default=None,
        metadata={"help": "Begin with the BOS token; if unset, where the tokenizer has one that is not its EOS."},
    )
    max_records: int | None = field(default=None, metadata={"help": "Train on the first N records only."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenize the training data while training, for data larger than memory: JSON Lines, a "
            "folder of shards, or a hub name. Needs --max_steps.",
            "aliases": ["--dataset_streaming"],
        },
    )
    shuffle_buffer: int = field(
        default=0,
        metadata={
            "help": "With --streaming: hold so many records and draw from them at random; 0: in the data's order."
        },
    )
    dataset_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where tokenized data are kept; by default in the cache folder of the datasets library."},
    )
    plugins: list[str] | None = field(
        default=None, metadata={"help": "Modules or .py files to import first, which register objectives or formats."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Config (a JSON file, folder or hub name) of a new model to train from scratch."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer (folder, tokenizer.model or hub name), if not the model's own."}
    )

    def __post_init__(self) -> None:
        """Put config and splits into the names."""
        if self.dataset_test_split:
            option = "--dataset_test_split"
            of_dataset = self.eval_dataset is None
            name = parse_dataset(self.dataset).name if of_dataset else str(self.eval_dataset)
            config = (self.dataset_config or parse_dataset(self.dataset).config) if of_dataset else None
            self.eval_dataset = spell_dataset(name, config, self.dataset_test_split, ("--dataset_config", option))
        options = ("--dataset_config", "--dataset_train_split")
        self.dataset = spell_dataset(self.dataset, self.dataset_config, self.dataset_train_split, options)
        self.dataset_config = self.dataset_train_split = self.dataset_test_split = None
