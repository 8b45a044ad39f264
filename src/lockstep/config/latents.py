"""Multi-latent attention: what is wrong with its settings."""

from collections.abc import Callable, Iterator

from lockstep.config.container import ConfigContainer

_OF_LATENTS = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
)
_SIZES = _OF_LATENTS[:5]
_OF_PLAIN_ATTENTION = ("rotary_interleaved", "rotary_percent", "seq_len_interpolation_factor", "rope_scaling")


def latent_problems(c: ConfigContainer, name: Callable[[str], str]) -> Iterator[str]:
    """Yield one sentence with its remedy for everything wrong with the latents; `name` spells a field by its path."""
    m, fields = c.model, c.model.fields()
    attention = name("model.multi_latent_attention")
    if not m.multi_latent_attention:
        for field in _OF_LATENTS:
            if getattr(m, field) != fields[field].default:
                yield f"{name(f'model.{field}')} has no effect without {attention}; give that or drop this"
        if m.rope_type == "yarn":
            yield f"{name('model.rope_type')} = yarn needs {attention}; other models have no YaRN yet"
        return
    for field in _SIZES:
        size = getattr(m, field)
        if size is not None and size < 1:
            yield f"{name(f'model.{field}')} = {size}: give 1 or more"
    if m.qk_pos_emb_head_dim % 2:
        yield (
            f"{name('model.qk_pos_emb_head_dim')} = {m.qk_pos_emb_head_dim} is not even, so its channels cannot be "
            "rotated in pairs; change it"
        )
    if m.rotary_scaling_factor < 1:
        yield f"{name('model.rotary_scaling_factor')} = {m.rotary_scaling_factor}: give 1 or more"
    for field in ("mscale", "mscale_all_dim"):
        if getattr(m, field) < 0:
            yield f"{name(f'model.{field}')} = {getattr(m, field)}: give 0 or more"
    if m.num_query_groups != m.num_attention_heads:
        yield (
            f"{name('model.num_query_groups')} = {m.num_query_groups}: with {attention} every head has its own keys; "
            f"give {m.num_attention_heads}, or drop it"
        )
    for field in _OF_PLAIN_ATTENTION:
        if getattr(m, field) != fields[field].default:
            yield f"{name(f'model.{field}')} has no effect on {attention}; drop it"
