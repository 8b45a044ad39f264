"""From what was given to what will run: references, derived values, validation."""

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
    derive(resolved, world_size)
    found = problems(resolved, world_size)
    if found:
        raise ConfigError(found)
    return resolved
