"""The schema of a run's file. Free of torch, so that a wrong key is answered before anything heavy is imported.

Every field carries its unit in the description and one mark:

- `mathematics`: decides what is trained; a run cannot be resumed with another value;
- `execution`: decides how; free to change on a resume, the numbers stay the same;
- `reporting`: decides what is shown or kept.

Paths are written with `~` and `$NAME`, as bigtrain.config.texts says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from bigtrain.config.core import Section, choice, execution, mathematics, reporting
from bigtrain.config.origin import Origin
from bigtrain.config.texts import DURATION, REGION, RUN_NAME, STAGE_NAME, PathText

if TYPE_CHECKING:
    from bigtrain.optim import Optimizer
    from bigtrain.tasks import Task
    from bigtrain.training.schedules import Schedule
else:
    Optimizer = choice("bigtrain.optim:Optimizer", default="adamw")
    Schedule = choice("bigtrain.training.schedules:Schedule", default="cosine")
    Task = choice("bigtrain.tasks:Task")

Engine = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]
Share = Annotated[float, Field(ge=0, le=1)]


class ModelConfig(Section):
    from_config: dict[str, Any] | None = mathematics(
        "A transformers configuration with its `model_type`, for a causal language model with random weights. "
        "`vocab_size` and special token ids are taken from the tokenizer where absent.",
        None,
    )
    from_pretrained: PathText | None = mathematics(
        "A pretrained causal language model: a folder, a Hub id, or a .gguf file (its weights are made dense).", None
    )
    from_run: PathText | None = mathematics(
        "Another run's stage, RUN_DIR/STAGE, or one checkpoint of it, RUN_DIR/STAGE/checkpoints/step-N: the weights of "
        "its newest checkpoint (fixed when the run begins), its architecture and its tokenizer. That run stays as it "
        "is, and may be at work.",
        None,
    )


class TrainTokenizerConfig(Section):
    vocab_size: int = mathematics("Entries of the vocabulary, special tokens included.", ge=300)
    sample_bytes: int = mathematics(
        "How much text of the first stage's training documents the merges are learned from, in bytes.",
        8_000_000,
        ge=1,
    )


class TokenizerConfig(Section):
    train: TrainTokenizerConfig | None = mathematics("Train a byte-level BPE on the first stage's documents.", None)
    from_pretrained: PathText | None = mathematics("A folder, a Hub id or a .gguf file of a tokenizer.", None)
    add_tokens: list[str] = mathematics(
        "Special tokens to add; a pretrained model's embedding grows by as many rows where it has to.", []
    )


class ParallelConfig(Section):
    engine: Engine = execution(
        "ddp and fsdp: PyTorch, parameters replicated or sharded (FSDP2). zero1, zero2, zero3: DeepSpeed; optimizer "
        "state, then gradients, then parameters sharded.",
        "ddp",
    )
    processes: int | Literal["auto"] = execution(
        "Processes that a plain `bigtrain run` starts on this machine; auto: one per GPU, else 2. "
        "Another launcher decides itself.",
        "auto",
    )
    device: Literal["auto", "cpu", "cuda"] = execution(
        "Where the processes compute; auto: cuda if there is any.", "auto"
    )
    replicate: int = execution(
        "With fsdp: number of replicas of the sharded model (HSDP). The processes of one replica share it.",
        1,
        ge=1,
    )
    micro_batch_size: int = execution("Sequences that a process runs through the model at once.", 8, ge=1)
    compile: bool = execution(
        "Compile layers and loss with torch.compile: a minute or more at the start, faster steps. Not with zero3.",
        False,
    )
    activation_checkpointing: Literal["none", "full"] = execution(
        "full: keep only the input of each layer for the backward pass and compute the rest again; "
        "about a third more compute, much less memory.",
        "none",
    )


class StageParallelConfig(Section):
    engine: Engine | None = execution("As in `parallel`, for this stage alone; null: as there.", None)
    replicate: int | None = execution("As in `parallel`, for this stage alone; null: as there.", None, ge=1)
    micro_batch_size: int | None = execution("As in `parallel`, for this stage alone; null: as there.", None, ge=1)
    compile: bool | None = execution("As in `parallel`, for this stage alone; null: as there.", None)
    activation_checkpointing: Literal["none", "full"] | None = execution(
        "As in `parallel`, for this stage alone; null: as there.", None
    )


class SourceConfig(Section):
    source: PathText = execution(
        "Where documents come from; a run goes on wherever the same content lies. A file, a glob, a folder (every file "
        "below it) or any URL of fsspec, like s3://bucket/*.parquet: .json, .jsonl (.jsonlines, .ndjson, .jl), .csv, "
        ".tsv, .parquet, .arrow and .feather files hold rows, any other file is one document; .gz, .bz2, .xz and .zst "
        "are decompressed; a file that several links lead to counts once. Or a folder of datasets' `save_to_disk`; a "
        "dataset of the Hub, owner/name with its `split`; module:name of a function that yields rows, of a module that "
        "is installed, on PYTHONPATH or, looked for there last, in the working folder; `stdlib` (the source of "
        "Python's standard library) or `stdlib-functions` (its functions as prompt and completion)."
    )
    config: str | None = mathematics("Configuration (subset) of a Hub dataset; null: its only or default one.", None)
    split: str | None = mathematics(
        "Split of a Hub dataset or of a saved one, or rows of it counted from 0: `train`, `train[:1000]`, "
        "`train[1000:2000]`. All other sources are one split, `train`. null: all rows.",
        None,
    )
    revision: str | None = mathematics("Branch, tag or commit of a Hub dataset; null: main.", None)
    field: str | None = mathematics(
        'Of JSON files that are one object, like {"data": [...]}: the name of the list that holds the rows; null: the '
        "file is a list of rows, or rows one after another.",
        None,
    )
    columns: dict[str, str] = mathematics("Our column name -> the source's, where they differ.", {})
    on_error: Literal["error", "skip"] = mathematics(
        "What a row does that cannot be used (broken, not UTF-8, without its columns, too long). error: it ends the "
        "run, with file and line; skip: it is left out and counted. A file that cannot be read is always an error.",
        "error",
    )
    max_characters: int = mathematics("Longest document, in characters; a longer one cannot be used.", 10_000_000, ge=1)
    weight: float | None = mathematics(
        "Share of the sequences that come from this source, relative to the other weights. Without weights the sources "
        "are taken as one.",
        None,
        gt=0,
    )


class Repetition(Section):
    """Limits above which a document is dropped; the defaults are Gopher's (Rae et al. 2021, table A1). In texts without
    spaces two characters count as a word."""

    duplicate_lines: Share | None = mathematics("Lines that stood there before, as a part of all; null: any.", 0.30)
    duplicate_line_characters: Share | None = mathematics("The same as a part of the characters; null: any.", 0.20)
    duplicate_paragraphs: Share | None = mathematics("Paragraphs that stood there before; null: any.", 0.30)
    duplicate_paragraph_characters: Share | None = mathematics("The same in characters; null: any.", 0.20)
    top_ngrams: list[Share] | None = mathematics(
        "Part of the characters in the most frequent run of 2, 3 and 4 words; null: any.",
        [0.20, 0.18, 0.16],
        min_length=3,
        max_length=3,
    )
    duplicate_ngrams: list[Share] | None = mathematics(
        "Part of the characters in runs of 5, 6, 7, 8, 9 and 10 words that stood there before; null: any.",
        [0.15, 0.14, 0.13, 0.12, 0.11, 0.10],
        min_length=6,
        max_length=6,
    )
    min_words: int = mathematics(
        "Words from which on a document is held to the limits; for shorter ones they rise, up to 1 for no words.",
        50,
        ge=1,
    )


class Boilerplate(Section):
    documents: float = mathematics(
        "Lines that stand in more than this part of a source's documents are cut from them.", 0.1, gt=0, le=1
    )
    words: int = mathematics(
        "Shorter lines stay, in words; a character of Chinese or Japanese is one.",
        5,
        ge=1,
    )


class NearDuplicates(Section):
    threshold: float = mathematics(
        "Estimated Jaccard similarity of the sets of runs of words from which on two documents are alike.",
        0.8,
        ge=0.1,
        le=1,
    )
    permutations: int = mathematics(
        "Numbers of a document's MinHash signature; the similarity's standard error is at most 0.5 / their root.",
        128,
        ge=16,
        le=4096,
    )
    words: int = mathematics("Words of a run; a character of Chinese or Japanese is one.", 5, ge=1)


class Leakage(Section):
    words: int = mathematics("Words of the runs that training and held-out documents are compared by.", 13, ge=1)
    overlap: float = mathematics(
        "A training document is dropped if this part of its runs stands in held-out documents, or this part of the "
        "runs of one of them stands in it. Runs that many training documents share do not count.",
        0.5,
        gt=0,
        le=1,
    )
    min_runs: int = mathematics(
        "Held-out documents with fewer runs that are not shared by many do not count, but for copies of them.", 20, ge=1
    )


class CleanConfig(Section):
    repair: bool = mathematics("Undo mojibake, control characters and the like (ftfy).", False)
    normalize: Literal["NFC", "NFKC"] | None = mathematics("Unicode form of the texts; null: as they are.", None)
    redact: list[Literal["email", "phone", "card", "ip", "secret"]] = mathematics(
        "Kinds of personal data to replace by <EMAIL>, <PHONE>, <CARD>, <IP>, <SECRET> (keys and tokens).", []
    )
    phone_region: str | None = mathematics(
        "Country (ISO 3166, like US) whose phone numbers are known without a country code; null: none.",
        None,
        pattern=REGION,
    )
    boilerplate: Boilerplate | None = mathematics(
        "Cut lines that many documents of a source share: headers, footers, licences. With task pretrain. null: none.",
        None,
    )
    min_characters: int | None = mathematics("Shorter documents are dropped; null: none.", None, ge=1)
    max_characters: int | None = mathematics("Longer documents are dropped; null: none.", None, ge=1)
    repetition: Repetition | None = mathematics("Drop documents that repeat themselves; null: none.", None)
    exact_duplicates: bool = mathematics(
        "Drop documents that equal an earlier one of any source, but for white space.", False
    )
    near_duplicates: NearDuplicates | None = mathematics(
        "Drop documents that are like an earlier one of any source; null: none.", None
    )
    leakage: Leakage | None = mathematics("Drop training documents that held-out ones give away; null: none.", None)


class EvaluateConfig(Section):
    every: int | None = mathematics(
        "Steps between evaluations; null: only before the first and after the last.", None, ge=1
    )
    data: list[SourceConfig] | None = mathematics(
        "Held-out documents, instead of the stage's `held_out`.", None, min_length=1
    )
    sequences: int | None = mathematics(
        "Sequences of an evaluation: the first held-out ones, source after source; null: all.", None, ge=1
    )


class CheckpointConfig(Section):
    every: int | None = reporting("Steps between checkpoints; one is always saved at the end.", None, ge=1)
    keep: int = reporting("How many of the newest checkpoints of a stage stay on disk.", 2, ge=1)
    keep_every: int | None = reporting(
        "Of the older ones, those whose step is a multiple of this stay too; null: none.", None, ge=1
    )
    keep_weights_only: bool = reporting(
        "Whether those that stay by keep_every lose the optimizer's state, two thirds of their size: they can be "
        "evaluated, exported and trained from, but not resumed.",
        False,
    )
    asynchronous: bool = execution(
        "Write behind the steps, from a copy of the state in host memory; false: training waits for the disk, and the "
        "copy is given back.",
        True,
    )


class StageConfig(Section):
    name: str = mathematics("Names the stage's folder.", pattern=STAGE_NAME)
    task: Task = mathematics("What is learned: pretrain, sft, classify, or package.module:Class of your own.")
    from_stage: str | None = mathematics(
        "The earlier stage whose weights this one starts from; optimizer and step start anew.",
        None,
        alias="from",
    )
    data: list[SourceConfig] = mathematics("Sources of documents.", min_length=1)
    held_out: float = mathematics(
        "Part of the documents, chosen by a hash of their key, that is not trained on and that `evaluate` uses.",
        0.0,
        ge=0,
        lt=1,
    )
    clean: CleanConfig | None = mathematics(
        "What is done to the training documents before they are tokenized; held-out ones stay as they are. "
        "null: nothing.",
        None,
    )
    sequence_length: int = mathematics("Tokens of a sequence, or of a row at most.", ge=2)
    cross_document_attention: bool = mathematics(
        "Whether a document may read those before it in its sequence. false: positions begin anew with each document, "
        "and architectures for which that is not shown to keep them apart are refused.",
        False,
    )
    global_batch_size: int = mathematics("Sequences of a step, over all processes.", ge=1)
    steps: int | None = mathematics("Length of the stage in optimizer steps.", None, ge=1)
    tokens: int | None = mathematics("Length in tokens; rounded up to whole steps.", None, ge=1)
    epochs: float | None = mathematics("Length in passes over the data; the last step may be smaller.", None, gt=0)
    epochs_of: PathText | None = mathematics(
        "The `source` of `data` that `epochs` counts, where sources have weights; the others give their shares "
        "meanwhile. null: all data, which has no weights then.",
        None,
    )
    freeze: list[str] = mathematics(
        "Parameters that do not train: names, or patterns of a shell (`*`, `?`, `[0-3]`), like model.embed_tokens or "
        "model.layers.[0-3]; a module's name stands for all below it. A tied weight has several names, and any of them "
        "freezes it. They cost no optimizer state, and in bf16 and fp16 no fp32 weights.",
        [],
    )
    optimizer: Optimizer = mathematics("How weights are updated.")
    schedule: Schedule = mathematics("The learning rate as a function of the step.", {}, validate_default=True)
    evaluate: EvaluateConfig | None = mathematics("Loss on documents that are not trained on; null: none.", None)
    checkpoint: CheckpointConfig = reporting("When the state is saved.", CheckpointConfig())
    parallel: StageParallelConfig = execution(
        "What this stage does differently from `parallel`.", StageParallelConfig()
    )
    export: bool = reporting("Write OUTPUT/NAME/STAGE/export, a Hugging Face folder, at the run's end.", True)
    prompts: list[str] = reporting("Prompts that the exported model answers at the run's end, to be read.", [])

    @property
    def sources(self) -> list[SourceConfig]:
        """All that the stage reads."""
        return [*self.data, *((self.evaluate.data if self.evaluate else None) or [])]

    @property
    def num_steps(self) -> int | None:
        """Of the whole stage; None where they depend on its data, or its length is not given as it must be."""
        lengths = [self.steps, self.tokens, self.epochs]
        if self.epochs is not None or sum(length is not None for length in lengths) != 1:
            return None
        return self.sequences(0) // self.global_batch_size

    def sequences(self, samples: int) -> int:
        """That the whole stage trains on, where one epoch has `samples`."""
        if self.steps is not None:
            return self.steps * self.global_batch_size
        if self.tokens is not None:
            steps = -(-self.tokens // (self.global_batch_size * self.sequence_length))
            return steps * self.global_batch_size
        assert self.epochs is not None
        return max(1, round(self.epochs * samples))


class ProfileConfig(Section):
    steps: list[int] = reporting(
        "[first, last] step of a stage of which a trace (and on a GPU a memory snapshot) is written.",
        min_length=2,
        max_length=2,
    )


class RunConfig(Section):
    name: str = reporting("The run lives in OUTPUT/NAME.", pattern=RUN_NAME)
    output: PathText = reporting("Folder of runs and of the token stores that they share.", "runs")
    seed: int = mathematics("Of initial weights, sample order and dropout.", 0, ge=0, lt=2**31)
    model: ModelConfig = mathematics("What is trained.")
    tokenizer: TokenizerConfig | None = mathematics(
        "Text to tokens; null: that of `model.from_pretrained` or `model.from_run`.", None
    )
    precision: Literal["fp32", "bf16", "fp16"] = mathematics(
        "Of parameters in forward and backward; masters, moments, accumulation and loss are always fp32. "
        "fp16 needs a GPU.",
        "bf16",
    )
    attention: Literal["sdpa", "flash", "flex", "eager"] = execution(
        "Attention implementation of transformers. sdpa: PyTorch's own; flash: the package flash-attn, which needs no "
        "mask; flex: PyTorch's flex_attention. flash and flex need a GPU.",
        "sdpa",
    )
    deterministic: bool = execution(
        "On GPUs: only kernels that give the same bits every time, some of them slower, so that a run which is killed "
        "and started again on as many processes ends in the same weights to the last bit. On a CPU it does so anyway.",
        False,
    )
    parallel: ParallelConfig = execution("How it is executed, never what is trained.", ParallelConfig())
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = reporting(
        "Experiment trackers that get the metrics as well; they must be installed.", []
    )
    time_limit: str | None = reporting(
        "Like 11h30m, counted from the start of the ranks: the run saves and leaves in time, with exit code 75; "
        "started again it goes on. null: none.",
        None,
        pattern=DURATION,
    )
    profile: ProfileConfig | None = reporting("Steps to look at with the profiler; null: none.", None)
    stages: list[StageConfig] = mathematics("Trained one after the other.", min_length=1)

    @property
    def stores(self) -> Path:
        """The folder of what is made of documents; runs with the same `output` share it."""
        return Path(self.output) / "stores"

    @property
    def time_limit_seconds(self) -> float | None:
        if self.time_limit is None:
            return None
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        return float(sum(int(n) * units[unit] for n, unit in re.findall(r"(\d+)([dhms])", self.time_limit)))

    @property
    def needs_document_mask(self) -> bool:
        """Whether some stage relies on the architecture to keep the documents of a sequence apart."""
        return any(s.task.layout != "rows" and not s.cross_document_attention for s in self.stages)

    @property
    def adds_tokens(self) -> bool:
        """Whether the tokenizer grows, and with it a pretrained model's embedding."""
        return self.tokenizer is not None and bool(self.tokenizer.add_tokens)

    @property
    def given_tokenizer(self) -> str | None:
        """The folder or Hub id of the tokenizer; None if it is trained on the run's own documents."""
        if self.tokenizer is not None:
            return self.tokenizer.from_pretrained
        from_run = self.model.from_run
        return self.model.from_pretrained if from_run is None else str(Origin.of(from_run).tokenizer)

    def parallel_of(self, stage: StageConfig) -> ParallelConfig:
        """How a stage is executed: `parallel` with what the stage says differently."""
        return self.parallel.model_copy(update=stage.parallel.model_dump(exclude_none=True))
