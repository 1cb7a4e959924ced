"""A step over many ranks: predicted for cards up to 64, and measured over gloo on this machine.

    python -m benchmarks.scaling [--preset NAME] [--card h200|h100|a100|4090] [--seconds S]
                                 [--gpus-per-node 8] [--adapters 1] [--json] [key=value …]
    python -m benchmarks.scaling --measure 1 2 4 6 [--model tiny]

Predicted, for LoRA and for full fine-tuning: every rank has one micro-batch of
`train.per_device_train_batch_size` documents of `data.max_length` tokens, so that the batch grows
with the ranks. What a rank computes takes `--seconds`, a step that was measured on such a card or
that `benchmarks.traffic` predicts for it, else the plan's operations at the plan's share of the
card's bf16 peak. Whether the model is shared, whether layers are recomputed, and what is sent are
the plan's too (`train.plan.sharing`). All that is assumed is printed.

Measured: the steps of a run of a tiny model under torchrun, LoRA over replicas and full fine-tuning
of shared weights, the same batches over any number of gloo ranks of one thread each; records go
into benchmarks/results/scaling.jsonl. With more ranks than cores it shows that they work, no more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import fixtures, harness
from files.errors import UserError
from models.config import DecoderConfig
from train.config.load import load_config
from train.config.schema import RunConfig
from train.inputs.known import NO_DATA, Unknown
from train.plan.cards import CARDS
from train.plan.decide import Machine
from train.plan.document import plan_document
from train.plan.ledger import SHARE_OF_PEAK, find_decoder_config, flops_per_token, widths
from train.plan.sharing import Message, messages_of_a_step
from train.plan.sizes import ModelSizes, model_sizes
from train.process.command import run_command

RANKS = (1, 2, 4, 6, 8, 16, 32, 64)
METHODS = {"lora": "adamw", "full": "adafactor"}


@dataclass(frozen=True)
class Link:
    """What ranks send over: bytes a second in one direction, of a card or of a network adapter."""

    name: str
    bandwidth: float
    latency: float  # seconds until a message's first byte is there: assumed
    source: str


LINKS = {
    "nvlink4": Link("NVLink 4", 450e9, 3e-6, "NVIDIA H100/H200 SXM data sheet: 900 GB/s both ways"),
    "nvlink3": Link("NVLink 3", 300e9, 3e-6, "NVIDIA A100 SXM data sheet: 600 GB/s both ways"),
    "pcie5": Link("PCIe 5.0 x16", 64e9, 5e-6, "NVIDIA H100 data sheet: 128 GB/s both ways"),
    "pcie4": Link("PCIe 4.0 x16", 32e9, 5e-6, "NVIDIA A100 data sheet: 64 GB/s both ways"),
    "400": Link("400 Gb/s", 50e9, 10e-6, "NVIDIA ConnectX-7 data sheet: 400 Gb/s a port"),
    "200": Link("200 Gb/s", 25e9, 10e-6, "NVIDIA ConnectX-6 data sheet: 200 Gb/s a port"),
}
# What the cards of a node are joined by: as sold, and where they have PCIe alone.
INSIDE = {
    "h200": ("nvlink4", "pcie5"),
    "h100": ("nvlink4", "pcie5"),
    "a100": ("nvlink3", "pcie4"),
    "4090": ("pcie4",),
}


@dataclass(frozen=True)
class Assumptions:
    """What a prediction takes for granted."""

    gpus_per_node: int = 8
    adapters: int = 1  # network adapters of a node
    attained: float = 0.8  # share of a link's bandwidth that a collective attains
    overlap: float = 0.8  # share of the compute behind which gathers and scatters can hide
    spread: float = 0.02  # standard deviation of a rank's compute time, as a share of it

    def text(self) -> str:
        """Return them in words."""
        return (
            f"Assumed: nodes of {self.gpus_per_node} GPUs and {self.adapters} network adapter(s); "
            f"a ring over all ranks, at {self.attained:.0%} of its slowest link's bandwidth, and "
            "that link's latency for each doubling of the ranks; gathers and scatters hide behind "
            f"{self.overlap:.0%} of the compute, an all-reduce behind nothing; ranks' compute "
            f"spreads by {self.spread:.0%}, and all wait for the slowest of N: "
            "1 + spread x sqrt(2 ln N)."
        )


def predict(
    messages: Sequence[Message],
    compute: float,
    ranks: int,
    inside: Link,
    network: Link,
    assumed: Assumptions,
) -> dict[str, float]:
    """Predict a step's seconds, those of them in which ranks wait for messages, and the efficiency.

    The efficiency is what a rank gets done in a second, beside one that computes alone.
    """
    bandwidth, latency = inside.bandwidth, inside.latency
    if ranks > assumed.gpus_per_node:
        bandwidth = min(bandwidth, network.bandwidth * assumed.adapters)
        latency = network.latency
    behind = exposed = 0.0
    for message in messages:
        sent = message.sent(ranks) / (bandwidth * assumed.attained)
        seconds = message.times * (sent + latency * math.ceil(math.log2(ranks)))
        if message.kind == "all-reduce":
            exposed += seconds
        else:
            behind += seconds
    waiting = exposed + max(0.0, behind - assumed.overlap * compute)
    slowest = compute * (1 + assumed.spread * math.sqrt(2 * math.log(ranks)))
    seconds = slowest + waiting
    return {"seconds": seconds, "waiting": waiting, "efficiency": compute / seconds}


def simulate(
    config: RunConfig,
    decoder: DecoderConfig,
    card: str,
    seconds: float | None = None,
    assumed: Assumptions = Assumptions(),
) -> list[dict[str, Any]]:
    """Predict a run's step on each number of ranks, over each pair of links, as the plan has it.

    Args:
        config: What is asked; its precision is decided.
        decoder: The architecture.
        card: Name of the card.
        seconds: What a rank computes in a step; None: what the plan's work takes.
        assumed: What is taken for granted.
    """
    train, machine = config.train, Machine("cuda", CARDS[card].memory)
    sizes = model_sizes(decoder, train.method, config.lora)
    rows = []
    for ranks in RANKS:
        examples = ranks * train.per_device_train_batch_size
        asked = dataclasses.replace(
            config, train=dataclasses.replace(train, effective_batch_size=examples)
        )
        plan = plan_document(asked, NO_DATA, decoder, machine, ranks)
        sharding, policy = plan["sharding"], plan["gradient_checkpointing"]
        compute = seconds or compute_seconds(config, sizes, card, policy)
        messages = []
        if sharding:
            of_a_number = widths(asked, train.precision)
            messages = messages_of_a_step(asked, decoder, sizes, sharding, 1, of_a_number)
        for inside in INSIDE[card]:
            for network in ("400", "200"):
                links = LINKS[inside], LINKS[network]
                found = predict(messages, compute, ranks, *links, assumed)
                row = {
                    "predicted": True,
                    "method": train.method,
                    "ranks": ranks,
                    "inside": inside,
                    "network": network,
                    **{name: plan[name] for name in ("fits", "sharding", "communication_bytes")},
                    "recomputes": policy,
                    "compute_seconds": compute,
                    "tokens_per_second": examples * config.data.max_length / found["seconds"],
                }
                rows.append(row | found)
    return rows


def compute_seconds(config: RunConfig, sizes: ModelSizes, card: str, policy: str) -> float:
    """Predict what a card computes in a rank's part of a step."""
    tokens = config.train.per_device_train_batch_size * config.data.max_length
    work = tokens * flops_per_token(config, sizes, policy)
    return work / (SHARE_OF_PEAK * CARDS[card].peak_flops)


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the predictions of one method as a table: tokens/s, and the efficiency."""
    last = rows[-1]
    again = last["recomputes"]
    recomputing = f", recomputing {again}" if again != "none" else ""
    lines = [
        f"{last['method']}: PREDICTED tokens/s and efficiency ({last['sharding']}; one of 64 "
        f"computes {last['compute_seconds']:.3f} s a step{recomputing}, and sends "
        f"{last['communication_bytes'] / 1e9:.2f} GB)",
        f"{'inside a node, between nodes':28}" + "".join(f"{n:>15}" for n in RANKS),
    ]
    for pair in dict.fromkeys((row["inside"], row["network"]) for row in rows):
        cells = [
            f"{row['tokens_per_second']:,.0f} {row['efficiency']:4.0%}"
            if row["fits"]
            else "no room"
            for row in rows
            if (row["inside"], row["network"]) == pair
        ]
        names = ", ".join(LINKS[name].name for name in pair)
        lines.append(f"{names:28}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


# --- measured ------------------------------------------------------------------------------------

WARM_UP, TIMED, EXAMPLES = 2, 6, 24


def measure(model: str, method: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Train a model over gloo ranks; return the tokens/s of its steps, and their losses."""
    run = folder / f"{method}-{ranks}"
    settings = {
        "model.path": folder,
        "data.train": folder / "rows.jsonl",
        "data.max_length": fixtures.MAX_LENGTH,
        "train.output_dir": run,
        "train.method": method,
        "train.device": "cpu",
        "train.precision": "fp32",
        "train.effective_batch_size": EXAMPLES,
        "train.per_device_train_batch_size": fixtures.BATCH,
        "train.max_steps": WARM_UP + TIMED,
        "optimizer.name": METHODS[method],
        "lora.r": fixtures.RANK,
        "checkpoint.steps": "none",
        "log.tensorboard": "false",
    }
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} -m train.run"
    keys = [f"{key}={value}" for key, value in settings.items()]
    done = subprocess.run(
        [sys.executable, *torchrun.split(), *keys],
        cwd=harness.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "LATHE_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode != 0:
        raise harness.Fault(f"{method} over {ranks} ranks: {done.stdout}\n{done.stderr}")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    return {
        "predicted": False,
        "model": model,
        "method": method,
        "ranks": ranks,
        "seconds": median(row["seconds"] for row in rows[WARM_UP:]),
        "tokens_per_second": median(row["tokens"] / row["seconds"] for row in rows[WARM_UP:]),
        "loss": [row["loss"] for row in rows],
    }


def measure_all(model: str, numbers: Sequence[int]) -> int:
    """Measure each method over each number of ranks, print the figures and keep them."""
    with tempfile.TemporaryDirectory(prefix="lathe-scaling-") as name:
        folder = Path(name)
        fixtures.write_base(fixtures.MODELS[model], folder)
        fixtures.write_rows(folder, 0, (WARM_UP + TIMED) * EXAMPLES // fixtures.EXAMPLES_IN_STEP)
        for method in METHODS:
            alone: list[float] = []
            for ranks in numbers:
                cores, load = os.cpu_count(), os.getloadavg()[0]
                found = measure(model, method, ranks, folder)
                alone = alone or found["loss"]
                apart = max(abs(a / b - 1) for a, b in zip(found["loss"], alone, strict=True))
                if apart > 1e-4:
                    raise harness.Fault(f"{method} over {ranks} ranks: losses {apart:.1e} apart")
                harness.append(
                    "scaling", {**found, "cores": cores, "load": load, "loss_within": apart}
                )
                print(
                    f"{model}, {method}, {ranks} gloo rank(s): {found['tokens_per_second']:,.0f} "
                    f"tokens/s measured ({cores} cores, load {load:.1f} before)",
                    flush=True,
                )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="starcoder2-7b", help="as in train.run")
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--seconds", type=float, help="of a rank's compute in a step")
    for field in dataclasses.fields(Assumptions):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    parser.add_argument("--json", action="store_true", help="one object instead of the tables")
    parser.add_argument("--measure", type=int, nargs="+", metavar="N", help="ranks, here and now")
    parser.add_argument("--model", choices=fixtures.MODELS, default="tiny", help="to measure")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as in train.run")
    asked = parser.parse_args(argv)
    if asked.measure:
        return measure_all(asked.model, asked.measure)
    return run_command(lambda: _predict_all(asked))


def _predict_all(asked: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(Assumptions)]
    assumed = Assumptions(**{name: getattr(asked, name) for name in names})
    rows, tables = [], []
    for method in METHODS:
        given = dict(setting.split("=", 1) for setting in asked.settings)
        wanted = {"train.precision": "bf16", "optimizer.name": METHODS[method], **given}
        config = load_config(asked.preset, overrides={**wanted, "train.method": method})
        decoder = find_decoder_config(config)
        if isinstance(decoder, Unknown):
            raise UserError(f"the model's sizes are not known: {decoder.because}")
        found = simulate(config, decoder, asked.card, asked.seconds, assumed)
        rows += found
        tables.append(text(found))
    if asked.json:
        print(json.dumps({"assumptions": dataclasses.asdict(assumed), "rows": rows}))
        return 0
    origin = (
        "given" if asked.seconds else f"the plan's work at {SHARE_OF_PEAK:.0%} of its bf16 peak"
    )
    head = f"{asked.preset} on {CARDS[asked.card].name}; a rank's compute is {origin}."
    speeds = (
        f"{x.name}: {x.bandwidth / 1e9:.0f} GB/s each way ({x.source})" for x in LINKS.values()
    )
    print("\n\n".join([f"{head} {assumed.text()}", *tables, "\n".join(speeds)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
