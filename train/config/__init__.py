"""What a user may ask for, and where it is read: `load_config` gathers and checks it."""

from train.config.load import load_config
from train.config.schema import RunConfig

__all__ = ["RunConfig", "load_config"]
