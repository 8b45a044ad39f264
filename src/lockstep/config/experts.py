"""Which layers of a model have experts, and what is wrong with the settings of its experts."""

import ast
from collections.abc import Callable, Iterator

from lockstep.config.container import ConfigContainer
from lockstep.config.model import ModelConfig
from lockstep.config.sharding import shards_weights

_LOSS_NAMES = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}
_Z_LOSS = "z_loss"
SCALING = "sinkhorn"


def expert_layers(config: ModelConfig) -> list[bool]:
    """Tell for each layer whether it has experts; `moe_layer_freq` names them.

    Raises:
        ValueError: the pattern cannot be read or does not fit the number of layers; says what is wrong.
    """
    layers, given = config.num_layers or 0, config.moe_layer_freq
    if config.num_moe_experts is None:
        return [False] * layers
    if isinstance(given, str):
        given = layer_pattern(given)
    if isinstance(given, int):
        if given < 1:
            raise ValueError("give 1 or more, or a pattern such as [0]+[1]*23")
        return [number % given == 0 for number in range(layers)]
    if any(entry not in (0, 1) for entry in given):
        raise ValueError("a pattern holds 1 for a layer with experts and 0 for one without")
    if len(given) != layers:
        raise ValueError(f"the pattern is for {len(given)} layers, the model has {layers}; change one of them")
    return [entry == 1 for entry in given]


def has_whole_experts(config: ModelConfig) -> bool:
    """Tell whether tensor-parallel processes share out whole experts and tokens instead of splitting each expert."""
    tensor_parallel = config.tensor_model_parallel_size > 1 and config.num_moe_experts is not None
    return tensor_parallel and config.expert_tensor_parallel_size == 1


def layer_pattern(text: str) -> int | list[int]:
    """Read a number, or a sum and product of lists of numbers such as `([1]*3+[0])*2`.

    Raises:
        ValueError: the text is neither.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        raise ValueError("give a number or a pattern such as [0]+[1]*23") from None
    return value


def _value(node: ast.expr) -> int | list[int]:
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= 1 << 16:
        return node.value
    if isinstance(node, ast.List):
        numbers = [_value(entry) for entry in node.elts]
        return [number for number in numbers if isinstance(number, int)]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) != isinstance(right, list):
            entries, times = (left, right) if isinstance(left, list) else (right, left)
            if isinstance(entries, list) and isinstance(times, int) and len(entries) * times <= 1 << 16:
                return entries * times
    raise ValueError("not a pattern of layers")


def balancing_losses(config: ModelConfig) -> dict[str, float]:
    """Return the coefficient of each auxiliary loss in use, by its kind, those above 0 only."""
    if config.num_moe_experts is None:
        return {}
    pairs = zip(config.moe_router_load_balancing_type, config.moe_aux_loss_coeff, strict=True)
    return {kind: coefficient for kind, coefficient in pairs if kind in _LOSS_NAMES and coefficient > 0}


def evens_by_scaling(config: ModelConfig) -> bool:
    """Tell whether routers choose experts with even loads by scaling the scores instead of adding a loss."""
    return config.moe_router_load_balancing_type == [SCALING]


def auxiliary_names(config: ModelConfig) -> tuple[str, ...]:
    """Return the names under which Megatron-LM logs the losses that the routers add, in its order."""
    if config.num_moe_experts is None:
        return ()
    used = balancing_losses(config)
    names = [name for kind, name in _LOSS_NAMES.items() if kind in used]
    return (*names, _Z_LOSS) if config.moe_z_loss_coeff else tuple(names)


_OF_EXPERTS = (
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_shared_expert_intermediate_size",
    "moe_router_num_groups",
    "moe_router_group_topk",
)


def expert_problems(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    """Yield one sentence with its remedy for everything wrong with the experts; `name` spells a field by its path."""
    m = c.model
    experts = name("model.num_moe_experts")
    if m.num_moe_experts is None:
        for path in ("model.expert_model_parallel_size", "model.expert_tensor_parallel_size"):
            if c.get(path) not in (1, None):
                yield f"{name(path)} = {c.get(path)} has no effect without {experts}; give that or drop this"
        for field in m.fields().values():
            of_experts = field.name.startswith("moe_") and not field.spec.refused and not field.spec.holds
            if of_experts and getattr(m, field.name) != field.default:
                yield f"{name(field.path)} has no effect without {experts}; give that or drop this"
        return
    sizes = {path: getattr(m, path) for path in ("num_moe_experts", *_OF_EXPERTS)}
    wrong = [path for path, value in sizes.items() if value is not None and value < 1]
    for path in wrong:
        yield f"{name(f'model.{path}')} = {sizes[path]}: give 1 or more"
    try:
        if not any(expert_layers(m)) and m.num_layers:
            yield f"{name('model.moe_layer_freq')} = {m.moe_layer_freq} gives no layer experts; drop {experts}"
    except ValueError as error:
        yield f"{name('model.moe_layer_freq')} = {m.moe_layer_freq}: {error}"
    if not wrong:
        yield from _routing(c, name)
    yield from _losses(c, name)
    yield from _capacity(c, name)
    yield from _layout(c, name)


def _routing(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    m, topk = c.model, name("model.moe_router_topk")
    experts = m.num_moe_experts or 1
    if m.moe_router_topk > experts:
        yield f"{topk} = {m.moe_router_topk} is above {name('model.num_moe_experts')} = {experts}; lower it"
    groups, chosen = m.moe_router_num_groups, m.moe_router_group_topk
    if (groups is None) != (chosen is None):
        yield f"{name('model.moe_router_num_groups')} and {name('model.moe_router_group_topk')} need each other"
    elif groups is not None and chosen is not None:
        label = name("model.moe_router_num_groups")
        if experts % groups:
            yield f"{label} = {groups} does not divide the {experts} experts; change one of them"
        elif chosen > groups:
            yield f"{name('model.moe_router_group_topk')} = {chosen} is above {label} = {groups}; lower it"
        elif m.moe_router_topk % chosen or not 1 <= m.moe_router_topk // chosen <= experts // groups:
            yield (
                f"{topk} = {m.moe_router_topk} cannot be shared out over {chosen} groups of {experts // groups} "
                f"experts; use a multiple of {chosen} up to {chosen * (experts // groups)}"
            )
    if m.moe_router_enable_expert_bias and m.moe_router_score_function == "softmax":
        yield f"{name('model.moe_router_enable_expert_bias')} needs --moe-router-score-function sigmoid or sqrtsoftplus"
    plain = m.moe_router_score_function == "softmax" and not m.moe_router_pre_softmax
    if m.moe_router_topk == 1 and plain and not evens_by_scaling(m):
        yield f"{topk} = 1 gives every token the weight 1 and the router no gradient; add --moe-router-pre-softmax"
    if m.moe_apply_probs_on_input and m.moe_router_topk != 1:
        yield f"{name('model.moe_apply_probs_on_input')} needs {topk} = 1"


def _losses(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    m = c.model
    kinds, coefficients = name("model.moe_router_load_balancing_type"), name("model.moe_aux_loss_coeff")
    if evens_by_scaling(m):
        yield from _scaling(c, name)
        return
    if len(m.moe_router_load_balancing_type) != len(m.moe_aux_loss_coeff):
        yield (
            f"{coefficients} has {len(m.moe_aux_loss_coeff)} values for {len(m.moe_router_load_balancing_type)} of "
            f"{kinds}; give one each"
        )
    if len(set(m.moe_router_load_balancing_type)) < len(m.moe_router_load_balancing_type):
        yield f"{kinds} names a loss twice; name it once"
    for kind, coefficient in zip(m.moe_router_load_balancing_type, m.moe_aux_loss_coeff, strict=False):
        if kind == "global_aux_loss":
            yield (
                f"{kinds} = global_aux_loss is not supported: it weighs each micro-batch by those before it, so that "
                "gradients would depend on the layout; use aux_loss or seq_aux_loss"
            )
        elif kind == SCALING:
            yield f"{kinds} = {SCALING} stands alone; drop the other kinds"
        elif kind not in (*_LOSS_NAMES, "none"):
            yield f"{kinds} = {kind} is not supported; use aux_loss, seq_aux_loss, {SCALING} or none"
        if coefficient < 0 or (kind == "none" and coefficient):
            yield f"{coefficients} = {coefficient} for {kind}: give {'0' if kind == 'none' else '0 or more'}"
    if m.moe_z_loss_coeff is not None and m.moe_z_loss_coeff < 0:
        yield f"{name('model.moe_z_loss_coeff')} = {m.moe_z_loss_coeff}: give 0 or more"


_UNUSED_BY_SCALING = (
    "moe_router_pre_softmax",
    "moe_router_num_groups",
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
)


def _scaling(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    m, kind = c.model, f"{name('model.moe_router_load_balancing_type')} = {SCALING}"
    if m.moe_aux_loss_coeff != [0.0]:
        yield f"{kind} adds no loss; set {name('model.moe_aux_loss_coeff')} to 0"
    if m.moe_router_score_function != "softmax":
        yield f"{kind} has scores of its own; drop {name('model.moe_router_score_function')}"
    for field in _UNUSED_BY_SCALING:
        if getattr(m, field):
            yield f"{name(f'model.{field}')} has no effect with {kind}; drop it"


def _capacity(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    m, factor = c.model, name("model.moe_expert_capacity_factor")
    if m.moe_expert_capacity_factor == 0:
        yield f"{factor} = 0 drops every token; give more, or leave it unset to drop none"
    if m.moe_pad_expert_input_to_capacity and m.moe_expert_capacity_factor is None:
        yield f"{name('model.moe_pad_expert_input_to_capacity')} needs {factor}"
    if m.moe_pad_expert_input_to_capacity and m.moe_router_enable_expert_bias:
        yield (
            f"{name('model.moe_pad_expert_input_to_capacity')} gives every expert as many tokens, from which "
            f"{name('model.moe_router_enable_expert_bias')} could learn nothing; drop one"
        )


def _layout(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    m = c.model
    if m.moe_shared_expert_gate and m.moe_shared_expert_intermediate_size is None:
        yield f"{name('model.moe_shared_expert_gate')} needs {name('model.moe_shared_expert_intermediate_size')}"
    if m.add_bias_linear and m.moe_shared_expert_intermediate_size is not None:
        yield f"{name('model.moe_shared_expert_intermediate_size')} needs --disable-bias-linear"
    tp, label = m.tensor_model_parallel_size, name("model.tensor_model_parallel_size")
    if tp > 1 and m.add_bias_linear:
        yield f"{label} = {tp} with experts needs --disable-bias-linear"
    whole = has_whole_experts(m)
    split = (*(() if whole else ("moe_ffn_hidden_size",)), "moe_shared_expert_intermediate_size")
    for path in split:
        width = getattr(m, path)
        if width and tp > 0 and width % tp:
            yield f"{name(f'model.{path}')} = {width} is not divisible by {label} = {tp}; change one of them"
    etp = m.expert_tensor_parallel_size
    if etp not in (None, tp, 1):
        yield (
            f"{name('model.expert_tensor_parallel_size')} = {etp} is not supported beside {label} = {tp}: experts are "
            f"split as the other layers are, or not at all; use {tp} or 1"
        )
    if whole and not m.sequence_parallel:
        yield (
            f"{name('model.expert_tensor_parallel_size')} = 1 beside {label} = {tp} needs --sequence-parallel: each "
            "process hands its part of the sequence to the experts"
        )


def sharing_problems(c: ConfigContainer, replicas: int, name: Callable[[str], str]) -> Iterator[str]:
    """Yield what keeps ``replicas`` processes that have the same weights otherwise from sharing out the experts.

    Where experts are whole on tensor-parallel processes these share them out too.
    """
    m, label = c.model, name("model.expert_model_parallel_size")
    size, whole = m.expert_model_parallel_size, has_whole_experts(m)
    if size < 1:
        yield f"{label} = {size}: give 1 or more"
        return
    if m.num_moe_experts is None or (size == 1 and not whole):
        return
    label = f"{label} = {size}"
    if m.num_moe_experts % size:
        yield f"{label} does not divide the {m.num_moe_experts} experts; use a divisor of them"
    if whole:
        label += f" beside {name('model.expert_tensor_parallel_size')} = 1"
        sharers = replicas * m.tensor_model_parallel_size
        if sharers % size:
            yield f"{label} does not divide the {sharers} tensor- and data-parallel processes; use a divisor"
    elif replicas % size:
        yield f"{label} does not divide the {replicas} data-parallel processes; use a divisor, or start more"
    if shards_weights(c) and (whole or c.peft.scheme is not None):
        beside = "adapters and " if c.peft.scheme is not None else ""
        yield f"{label} with {beside}sharded weights is not supported; use --use-distributed-optimizer instead of them"
    if c.ddp.num_distributed_optimizer_instances > 1:
        yield f"{label} with {name('ddp.num_distributed_optimizer_instances')} is not supported; drop one"
