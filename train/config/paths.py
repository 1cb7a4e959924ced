"""Paths of a configuration that hold from any folder."""

from __future__ import annotations

import dataclasses
import glob
import os
from typing import Any

from data.locate import has_wildcards
from train.config.schema import RunConfig


def with_whole_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with absolute paths: a run may be resumed from anywhere."""

    def whole(path: str | None) -> str | None:
        if path is None or not os.path.exists(os.path.expanduser(path)):
            return path
        return os.path.abspath(os.path.expanduser(path))

    def data(spec: Any) -> Any:
        if isinstance(spec, tuple):
            return tuple(data(part) for part in spec)
        if spec is not None and has_wildcards(spec):
            # The names of folders above are no wildcards, whatever letters they have.
            return os.path.join(glob.escape(os.getcwd()), os.path.expanduser(spec))
        return whole(spec)

    template = config.data.chat_template
    # It may be a name, which may be that of a folder here, too.
    is_file = template is not None and os.path.isfile(os.path.expanduser(template))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=whole(config.model.path)),
        lora=dataclasses.replace(config.lora, init_from=whole(config.lora.init_from)),
        data=dataclasses.replace(
            config.data,
            chat_template=whole(template) if is_file else template,
            train=data(config.data.train),
            valid=data(config.data.valid),
            test=data(config.data.test),
        ),
    )
