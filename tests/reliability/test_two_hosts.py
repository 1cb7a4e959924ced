"""Two hosts, two network namespaces joined by a cable: one run, the same as in one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import arguments
from trials import MAX_SECONDS, begin_or_resume, settings

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def administer(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Return (namespace, network interface, address) of two hosts that reach each other."""
    if os.name != "posix" or os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    tag = uuid.uuid4().hex[:6]
    found = [(f"l{n}{tag}", f"v{n}{tag}", address) for n, address in enumerate(ADDRESSES)]
    (first, one, _), (second, other, _) = found
    try:
        if not administer("netns", "add", first) or not administer("netns", "add", second):
            pytest.skip("this system makes no network namespaces")
        assert administer("link", "add", one, "type", "veth", "peer", "name", other)
        for namespace, interface, address in found:
            assert administer("link", "set", interface, "netns", namespace)
            assert administer("-n", namespace, "addr", "add", f"{address}/24", "dev", interface)
            assert administer("-n", namespace, "link", "set", interface, "up")
            assert administer("-n", namespace, "link", "set", "lo", "up")
        yield found
    finally:
        for namespace, _, _ in found:
            administer("netns", "del", namespace)


@pytest.mark.slow
def test_a_run_over_two_hosts_is_the_run_of_one_process(
    hosts: list[tuple[str, str, str]], one_layer: Path, few_rows: Path, tmp_path: Path
) -> None:
    values = settings(
        one_layer, few_rows, **{"train.max_steps": 4, "train.effective_batch_size": 5}
    )
    folder = tmp_path / "over-two" / "run"
    typed = arguments({**values, "train.output_dir": folder})
    running = []
    for number, (namespace, interface, address) in enumerate(hosts):
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={ADDRESSES[0]}:29501", "--rdzv-id=two-hosts"]
        command += [f"--rdzv-conf=is_host={str(number == 0).lower()}", f"--local-addr={address}"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
        with open(tmp_path / f"host-{number}.txt", "wb") as log:
            running.append(
                subprocess.Popen(
                    [*command, "-m", "train.run", *typed], env=environment, stdout=log, stderr=log
                )
            )
    codes = [process.wait(timeout=MAX_SECONDS) for process in running]
    assert codes == [0, 0], (tmp_path / "host-0.txt").read_text()
    assert begin_or_resume({**values, "train.output_dir": str(tmp_path / "alone" / "run")}) == 0

    def losses(run: Path) -> list[float]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    alone = losses(tmp_path / "alone" / "run")
    assert losses(folder) == pytest.approx(alone, rel=1e-5)
    assert json.loads((folder / "plan.json").read_text())["world_size"] == 2
