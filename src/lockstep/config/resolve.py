"""From what was given to what will run: references, settings of a checkpoint, derived values, validation."""

from lockstep.config.container import ConfigContainer
from lockstep.config.derive import derive, interpolate
from lockstep.config.validate import problems
from lockstep.errors import ConfigError


def resolve(config: ConfigContainer, world_size: int = 1) -> ConfigContainer:
    """Return a copy with every reference replaced and every derivable value set; ``config`` stays as it is.

    Raises:
        ConfigError: the tree cannot run; lists every problem with its remedy.
    """
    resolved = config.copy()
    interpolate(resolved)
    if resolved.checkpoint.use_checkpoint_args:
        # Imported here only: the tree itself needs no trainer.
        from lockstep.training.checkpoint_args import take_settings

        take_settings(resolved)
    if resolved.checkpoint.pretrained_checkpoint is not None:
        from lockstep.training.checkpoint_args import lacks_tokenizer, take_tokenizer

        if lacks_tokenizer(resolved):
            take_tokenizer(resolved)
    derive(resolved, world_size)
    found = problems(resolved, world_size)
    if found:
        raise ConfigError(found)
    return resolved
