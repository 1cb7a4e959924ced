"""Whether the ranks of a run do the same run: settings, rows and base model, compared at the start.

Each node reads files of its own, and each rank has a command line or a program of its own. Ranks
that differ would add up gradients of different models, or wait for each other until a timeout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from files.atomic import sha256_file
from files.errors import UserError, counted
from files.hub import ModelSource
from models.config import DecoderConfig
from models.weights import weights_files
from train.config.schema import RunConfig
from train.config.toml import flat, typed
from train.inputs.dataset import Data
from train.process.world import World

# Where things lie may be another place on each node, and what lies there is compared.
_PLACES = {
    *("data.train", "data.valid", "data.test", "data.chat_template", "lora.init_from"),
    *("model.path", "train.output_dir", "train.run_name"),
}
_SAMPLE_BYTES = 2**16


def agree_on_run(config: RunConfig, data: Data, decoder: DecoderConfig, world: World) -> None:
    """Refuse ranks whose settings, tokenised rows, architecture or starting adapter differ.

    Raises:
        UserError: This rank differs from rank 0; what differs is named, with both values.
    """
    if world.size == 1:
        return
    facts = {key: typed(value) for key, value in flat(config).items() if key not in _PLACES}
    for name in ("train", "valid", "test"):
        rows = getattr(data, name)
        holds = (
            f"{counted(len(rows), 'example')} ({str(data.fingerprints[name])[:12]})"
            if rows is not None
            else "nothing"
        )
        facts[f"what data.{name} holds"] = holds
    facts["the model's config.json"] = _digest(json.dumps(decoder.raw, sort_keys=True))
    if config.lora.init_from is not None:
        folder = Path(config.lora.init_from).expanduser()
        hashes = [sha256_file(path) for path in sorted(folder.glob("*.safetensors"))]
        facts["the adapter of lora.init_from"] = _digest(str(hashes))
    _agree("run", facts, world)


def agree_on_weights(config: RunConfig, source: ModelSource, world: World) -> None:
    """Refuse ranks whose files of weights differ in size, or in a sample of their bytes.

    Raises:
        UserError: This rank's differ from rank 0's.
    """
    if world.size == 1 or config.model.random_init:
        return
    files = weights_files(source.folder)
    _agree("base", {f"the model's {path.name}": _sampled(path) for path in files}, world)


def _agree(what: str, facts: Mapping[str, str], world: World) -> None:
    theirs = json.loads(world.told(f"facts/{what}", lambda: json.dumps(facts)))
    for name in {**theirs, **facts}:
        own, first = facts.get(name, "none"), theirs.get(name, "none")
        if own != first:
            raise UserError(
                f"rank {world.rank} of {world.size} would do another run than rank 0: {name} is "
                f"{own} on rank {world.rank} and {first} on rank 0; give every rank the same "
                "settings, rows and model"
            )
    world.met(f"facts/{what}/alike")


def _sampled(path: Path) -> str:
    """Return a hash of a file's size and of its start, middle and end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        parts = [str(size).encode()]
        for start in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
            file.seek(start)
            parts.append(file.read(_SAMPLE_BYTES))
    return _digest(*parts)


def _digest(*parts: str | bytes) -> str:
    total = sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()[:12]
