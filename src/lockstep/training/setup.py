"""What a run is built from, in order: vocabulary, data, model, optimizer, evaluation."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lockstep.config import ConfigContainer, Origin
from lockstep.config.sharding import sharding_strategy, shards_weights
from lockstep.data.build import Datasets, build_datasets
from lockstep.data.gpt_dataset import Dataset
from lockstep.data.sft.dataset import SFTDataset
from lockstep.data.tokenizers import Tokenizer, build_tokenizer, padded_vocab_size
from lockstep.errors import UserError
from lockstep.models import GPTModel
from lockstep.models.decoder import Span
from lockstep.models.flops import flops_per_sequence
from lockstep.models.init import Fingerprint, fill, initial_weights
from lockstep.parallel import Mesh, parallelize
from lockstep.parallel.apply import part_of
from lockstep.parallel.dropout import LayoutDropoutStreams
from lockstep.parallel.fsdp import WeightSharding, keeper
from lockstep.peft.apply import add_adapters, draw_from, initial_adapters
from lockstep.training.attention import choose_attention, use_attention
from lockstep.training.batches import build_batch_schedule, eval_batch_size, num_samples, train_iterations
from lockstep.training.compiling import choose_compilation, compile_blocks
from lockstep.training.console import dataset_size_lines, parameters_line, say
from lockstep.training.context import ContextPasses
from lockstep.training.evaluate import Evaluator, Split
from lockstep.training.exits import ExitRule
from lockstep.training.feed import Feed, sample_order
from lockstep.training.float8 import use_float8
from lockstep.training.float8_gather import float8_storage, scale_setter
from lockstep.training.gradient_sync import GradientSync, choose_gradient_sync, memory_of
from lockstep.training.graphs import GraphedPasses, choose_graphs
from lockstep.training.loop import Trainer
from lockstep.training.optimizer import Optimizer
from lockstep.training.passes import Passes, WholePasses
from lockstep.training.pipeline import PipelinePasses
from lockstep.training.precision import params_dtype
from lockstep.training.schedule import build_schedules
from lockstep.training.step import TrainStep
from lockstep.training.switch import Switch


@dataclass(frozen=True)
class Parts:
    """Everything that was built: ``trainer`` is None without training, ``evaluator`` without evaluation.

    ``base`` names the frozen weights that adapters are trained for, None without adapters; ``compilation``, ``graphs``
    and ``gradient_sync`` say what is compiled and captured, and when gradients are added up over processes.

    ``initial_weights`` is the fingerprint of the whole model, taken on the process that keeps the record.
    """

    tokenizer: Tokenizer
    datasets: Datasets
    model: GPTModel
    initial_weights: dict[str, dict[str, Any]]
    train_iters: int
    flops_per_sample: float
    trainer: Trainer | None
    evaluator: Evaluator | None
    compilation: str
    graphs: str
    gradient_sync: str
    base: dict[str, Any] | None = None


Alter = Callable[[str, torch.Tensor], torch.Tensor]
"""Returns what a parameter starts from instead of its initial value: by its name, whole, in the model's dtype."""


def build(
    config: ConfigContainer, device: torch.device, mesh: Mesh, exit_rule: ExitRule, alter: Alter | None = None
) -> Parts:
    """Build all parts of a run; sets ``model.vocab_size`` in ``config`` where it was unset.

    ``alter`` changes initial weights, the same way in every layout.

    Raises:
        UserError: the configuration or the data cannot do what is asked.
    """
    batches = build_batch_schedule(config, mesh.dp.size)
    train_iters = train_iterations(config, batches)
    sizes = num_samples(config, batches, train_iters)
    if not config.validation.skip_train:
        build_schedules(config)  # A schedule that cannot work is said before the long part of the set-up.
    tokenizer = build_tokenizer(config.tokenizer)
    set_vocab_size(config, tokenizer.vocab_size)
    datasets = _build_datasets(config, tokenizer, sizes)
    say("> building the model ...")
    model, spans, prints = build_parallel_model(config, mesh, device, params_dtype(config), alter)
    say(parameters_line(sum(p.numel() for p in model.parameters())))
    flops = flops_per_sequence(config.model)
    iterations = min(train_iters, config.train.exit_interval or train_iters)
    operations = flops * batches.samples_after(iterations) / mesh.world.size
    compilation = choose_compilation(config, device, operations)
    if compilation.on:
        compile_blocks(model)
    sync = choose_gradient_sync(config, model, mesh, memory_of(device))
    passes = build_passes(config, model, spans, mesh, device, sync)
    graphs = choose_graphs(config, device, mesh, flops * batches.micro_batch_size)
    trainer = None
    if not config.validation.skip_train and train_iters > 0:
        trainer = build_trainer(config, model, passes, datasets, mesh, graphs)
    evaluator = build_evaluator(config, passes, datasets, device, mesh, exit_rule)
    chosen = str(compilation), str(graphs), str(sync)
    return Parts(tokenizer, datasets, model, prints, train_iters, flops, trainer, evaluator, *chosen)


def set_vocab_size(config: ConfigContainer, tokens: int) -> None:
    """Set ``model.vocab_size`` to the padded vocabulary of the tokenizer, or check the one that was given.

    Raises:
        UserError: the model's vocabulary is smaller than the tokenizer's.
    """
    given = config.model.vocab_size
    if given is None:
        divisor, pad = config.model.make_vocab_size_divisible_by, config.tokenizer.pad_vocab_size
        size = padded_vocab_size(tokens, divisor, pad=pad)
        rule = f"tokenizer vocabulary of {tokens}" + (f", padded to a multiple of {divisor}" if pad else "")
        config.set("model.vocab_size", size, Origin("derived", rule))
        say(f" > padded vocab (size: {tokens}) with {size - tokens} dummy tokens (new size: {size})")
    elif given < tokens:
        raise UserError(
            f"model.vocab_size = {given} is below the tokenizer's vocabulary of {tokens}; "
            "raise it, or leave it unset to take the tokenizer's"
        )


def _build_datasets(config: ConfigContainer, tokenizer: Tokenizer, sizes: tuple[int, int, int]) -> Datasets:
    say("> building train, validation, and test datasets ...")
    for line in dataset_size_lines(*sizes):
        say(line)
    assert config.model.seq_length is not None, "a resolved tree has a sample length"
    assert config.dataset.random_seed is not None, "a resolved tree has a data seed"
    datasets = build_datasets(
        config.dataset,
        seq_length=config.model.seq_length,
        seed=config.dataset.random_seed,
        tokenizer=tokenizer,
        num_samples=sizes,
    )
    for dataset in (datasets.train, datasets.valid, datasets.test):
        if isinstance(dataset, SFTDataset):
            say(f" > {dataset.summary()}")
    return datasets


def build_parallel_model(
    config: ConfigContainer,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    alter: Alter | None = None,
    fingerprint: bool = True,
) -> tuple[GPTModel, list[Span], dict[str, dict[str, Any]]]:
    """Return this process's part of the model with its initial weights, its stages, and the whole model's fingerprint.

    The fingerprint is empty on processes that keep no record, and where none is wanted.
    """
    model = GPTModel(config.model, dtype=dtype, device=torch.device("meta"))
    sharding = _weight_sharding(config, mesh, dtype, device)
    add_adapters(model, config.peft)
    spans = parallelize(model, mesh, sharding)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("peft.target_modules leaves a pipeline stage without adapters; name linears of every stage")
    use_attention(model, choose_attention(config, device))
    use_float8(model, config, device)
    prints = Fingerprint()
    weights: Iterator[tuple[str, torch.Tensor]] = itertools.chain(
        initial_weights(config.model, config.rng.seed, dtype, device),
        initial_adapters(config.model, config.peft, config.rng.seed, dtype, device),
    )
    if alter is not None:
        weights = ((name, alter(name, value)) for name, value in weights)
    part = partial(part_of, config=config.model, mesh=mesh)
    if sharding is not None:
        model.to_empty(device=device)
    keep = {} if sharding is None else {"keep": keeper(model, mesh)}
    fingerprint = fingerprint and mesh.leads
    fill(model, prints.added(weights) if fingerprint else weights, part, **keep)
    return model, spans, prints.result() if fingerprint else {}


def _weight_sharding(
    config: ConfigContainer, mesh: Mesh, dtype: torch.dtype, device: torch.device
) -> WeightSharding | None:
    """Return how the weights are sharded over the processes that have the same ones; None where they are not."""
    if mesh.shards.size == 1 or not shards_weights(config):
        return None
    low = config.ddp.grad_reduce_in_fp32 is False
    reduce_dtype = dtype if low or dtype == torch.float64 else torch.float32
    sharding = WeightSharding(reduce_dtype, sharding_strategy(config) == "optim_grads", device.type)
    if not config.mixed_precision.fp8_param_gather:
        return sharding
    return replace(sharding, kept=float8_storage(config, mesh.shards))


def build_passes(
    config: ConfigContainer,
    model: GPTModel,
    spans: Sequence[Span],
    mesh: Mesh,
    device: torch.device,
    sync: GradientSync | None = None,
) -> Passes:
    """Build what runs the model over micro-batches: in a pipeline where there is one, on a part of every sequence.

    Gradients are added up when ``sync`` says, or else when the tree does.
    """
    sync = sync or choose_gradient_sync(config, model, mesh, memory_of(device))
    assert config.model.num_attention_heads is not None, "a resolved tree has heads"
    dropout = LayoutDropoutStreams(config.rng.seed, device, mesh, config.model.num_attention_heads)
    draw_from(model, dropout)
    prepare = scale_setter(model, mesh.shards)
    passes: Passes = WholePasses(model, dropout, mesh.replicas, sync.once_a_step, prepare)
    if mesh.pp.size > 1:
        passes = PipelinePasses(model, spans, mesh, dropout, sync.once_a_step, prepare)
    return ContextPasses(passes, mesh.cp) if mesh.cp.size > 1 else passes


def build_trainer(
    config: ConfigContainer, model: nn.Module, passes: Passes, datasets: Datasets, mesh: Mesh, graphs: Switch
) -> Trainer:
    """Build what the iterations need: data feed, optimizer, schedules, step."""
    batches = build_batch_schedule(config, mesh.dp.size)
    rate, decay = build_schedules(config)
    optimizer = Optimizer(model, config, mesh)
    passes = graphed(passes, optimizer, graphs, mesh)
    return Trainer(
        feed=_feed(config, datasets.train, "train", batches.micro_batch_size, mesh),
        step=TrainStep(passes, optimizer, per_token=config.model.calculate_per_token_loss, dp=mesh.dp),
        batches=batches,
        learning_rate=rate,
        weight_decay=decay,
        params_norm=optimizer.params_norm if config.logger.log_params_norm else None,
        dp=mesh.dp,
    )


def graphed(passes: Passes, optimizer: Optimizer, graphs: Switch, mesh: Mesh) -> Passes:
    """Return passes that run micro-batches as graphs where that was chosen."""
    if not graphs.on:
        return passes
    assert isinstance(passes, WholePasses), "graphs are chosen for whole models and sequences only"
    result = GraphedPasses(passes, optimizer.weights)
    mesh.closing.callback(result.release)  # A communicator that a graph has collectives of does not end.
    return result


def build_evaluator(
    config: ConfigContainer,
    passes: Passes,
    datasets: Datasets,
    device: torch.device,
    mesh: Mesh,
    exit_rule: ExitRule,
) -> Evaluator | None:
    """Build the evaluation of the validation and test splits; None where ``validation.eval_iters`` is 0.

    A test split without weight is left out, as in Megatron-LM, and validation where fine-tuning asks for none.
    """
    if config.validation.eval_iters == 0:
        return None
    size, micro_size = eval_batch_size(config)
    feeds: dict[Split, Feed] = {}
    if config.dataset.do_validation:
        feeds["valid"] = _feed(config, datasets.valid, "validation", micro_size, mesh)
    if datasets.test is not None:
        feeds["test"] = _feed(config, datasets.test, "test", micro_size, mesh)
    if not feeds:
        return None
    return Evaluator(
        passes,
        feeds,
        eval_iters=config.validation.eval_iters,
        size=size,
        micro_size=micro_size,
        device=device,
        out_of_time=exit_rule.out_of_time,
        dp=mesh.dp,
    )


def _feed(config: ConfigContainer, dataset: Dataset | None, split: str, micro_batch_size: int, mesh: Mesh) -> Feed:
    if dataset is None:
        remedy = "" if split == "train" else ", or set validation.eval_iters=0"
        if config.dataset.sft:
            hold_out = "" if split == "train" else " (dataset.hf_validation_proportion holds some out)"
            remedy = f"{hold_out}{remedy}{'' if split == 'train' else ' or dataset.do_validation=false'}"
            raise UserError(f"the {split} split has no data for fine-tuning; give it some{remedy}")
        raise UserError(f"the {split} split has no data (dataset.split = {config.dataset.split}); give it some{remedy}")
    order = partial(sample_order, config.dataset.dataloader_type, len(dataset), micro_batch_size, mesh.dp)
    return Feed(dataset, order, split, mesh.dp.size, _length(config, dataset))


_LENGTH_MULTIPLE = 16


def _length(config: ConfigContainer, dataset: Dataset) -> Callable[[int, int], int] | None:
    """Return what says to how many tokens a global batch is cut; None where samples keep their length.

    It is a multiple of 16, as in Megatron Bridge, and of what the layout divides it by.
    """
    if config.dataset.pad_to_max_length or not isinstance(dataset, SFTDataset):
        return None
    m, longest = config.model, dataset.longest
    multiple = math.lcm(_LENGTH_MULTIPLE, 2 * m.context_parallel_size * m.tensor_model_parallel_size)
    most = m.seq_length
    assert most is not None, "a resolved tree has a sample length"
    return lambda start, stop: min(most, -(-longest(start, stop) // multiple) * multiple)
