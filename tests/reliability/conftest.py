"""What the reliability tests share: rows for runs of a few steps, and how many runs to kill."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import DROPOUTS, small_model

from models.weights import save_model


@pytest.fixture(scope="session")
def one_layer(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like `model_folder`'s with one layer: hundreds of runs are done on it."""
    folder = tmp_path_factory.mktemp("one-layer")
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    model = small_model("starcoder2", vocab_size=257, num_hidden_layers=1, **DROPOUTS)
    save_model(model, folder, config=model.config)
    return folder


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train.jsonl (11 rows), valid.jsonl (3) and test.jsonl (2)."""
    folder = tmp_path_factory.mktemp("few-rows")
    draw = random.Random(1)
    for name, count in (("train", 11), ("valid", 3), ("test", 2)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(count):
                text = "".join(draw.choices("abcdefghijklm", k=draw.randint(6, 30)))
                file.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tokenised rows out of the user's cache, and let a forked child tokenise alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATHE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield
