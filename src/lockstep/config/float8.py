"""What float8 products need of the rest of the tree."""

from collections.abc import Callable, Iterator

from lockstep.config.container import ConfigContainer

_SCALED_ELSEWHERE = {
    "delayed": "scales by the maxima of earlier steps",
    "blockwise": "scales blocks of an operand",
    "mxfp8": "scales blocks of 32 elements, which NVIDIA GPUs before Blackwell cannot",
    "custom": "is code of the user",
}
_MULTIPLE = 16  # of which the products take sizes


def float8_problems(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    """Yield what is wrong with asking for float8 products; ``name`` names a field."""
    precision, model, asked = c.mixed_precision, c.model, name("mixed_precision.fp8")
    if precision.fp8 is None:
        if precision.first_last_layers_bf16:
            yield f"{name('mixed_precision.first_last_layers_bf16')} has no effect without {asked}; drop it"
        if precision.fp8_param_gather:
            yield f"{name('mixed_precision.fp8_param_gather')} has no effect without {asked}; drop it"
        return
    recipe = precision.fp8_recipe
    if recipe in _SCALED_ELSEWHERE:
        why = _SCALED_ELSEWHERE[recipe]
        yield f"{name('mixed_precision.fp8_recipe')} = {recipe} {why}, and is not supported; use tensorwise or rowwise"
    elif recipe == "rowwise" and precision.fp8 != "e4m3":
        yield (
            f"{name('mixed_precision.fp8_recipe')} = rowwise has gradients in e4m3 too, and {asked} = {precision.fp8} "
            "has them in e5m2; use e4m3"
        )
    elif recipe == "rowwise" and precision.fp8_param_gather:
        yield (
            f"{name('mixed_precision.fp8_param_gather')} does not work with {name('mixed_precision.fp8_recipe')} = "
            "rowwise: the two products of a weight scale it along different rows; drop one"
        )
    if not precision.bf16:
        yield f"{asked} = {precision.fp8} needs mixed_precision.bf16 (--bf16); add that"
    for path, present in (("model.num_moe_experts", model.num_moe_experts), ("peft.scheme", c.peft.scheme)):
        if present is not None:
            yield f"{asked} does not work with {name(path)} = {present}; drop one"
    yield from _sizes(c, name)


def _sizes(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    precision, model = c.mixed_precision, c.model
    if precision.first_last_layers_bf16:
        kept = (precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16)
        layers = model.num_layers or 0
        if min(kept) < 0 or sum(kept) >= layers:
            yield (
                f"{name('mixed_precision.num_layers_at_start_in_bf16')} = {kept[0]} and "
                f"{name('mixed_precision.num_layers_at_end_in_bf16')} = {kept[1]} leave none of {layers} layers in "
                "float8; lower them"
            )
    tokens = (model.seq_length or 0) * (c.train.micro_batch_size or 0)
    tokens //= model.context_parallel_size
    if tokens % _MULTIPLE:
        yield (
            f"float8 products take multiples of {_MULTIPLE} tokens, and a process has {tokens} of a micro-batch; "
            f"change {name('model.seq_length')} or {name('train.micro_batch_size')}"
        )
