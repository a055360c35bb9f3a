"""Two machines, played by two launchers on this one: their files are those of two processes on one machine."""

import os
import subprocess
import sys

import pytest

from data.files import file_sha256
from stages.weights import read_weights
from tests.waiting import PATIENCE, free_port

COMMANDS = ("train-tokenizer", "cache-tokens", "train-prior")


def environment():
    # what a launcher would set must not come from around the tests
    outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "OCTAVES_FIRST_PROCESS")
    return {**{key: value for key, value in os.environ.items() if key not in outer}, "OMP_NUM_THREADS": "1"}


def on_two_nodes(folder, *arguments):
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    logs = [folder / f"node{rank}.log" for rank in (0, 1)]
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={rank}", "-m", "pipeline", *arguments, "trainer.num_nodes=2"],
            env=environment(),
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [node.wait(PATIENCE) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert codes == [0, 0], "".join(log.read_text() for log in logs)


@pytest.mark.slow
def test_two_nodes_under_torchrun_equal_two_processes(tmp_path, tiny):
    for command in COMMANDS:
        on_two_nodes(tmp_path, command, str(tiny), f"run={tmp_path}/nodes")
        one = [sys.executable, "-m", "pipeline", command, str(tiny), f"run={tmp_path}/one", "trainer.devices=2"]
        done = subprocess.run(one, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    for part in ("tokenizer/tokenizer", "prior/prior"):
        metadata, tensors = read_weights(tmp_path / "nodes" / f"{part}.safetensors")
        wanted_metadata, wanted = read_weights(tmp_path / "one" / f"{part}.safetensors")
        assert metadata["world_size"] == 2 and metadata == wanted_metadata
        assert all(tensors[name].equal(wanted[name]) for name in wanted) and tensors.keys() == wanted.keys()
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one/tokens").rglob("*.tar"))
    assert files
    for file in (*files, "tokens/manifest.json"):
        assert file_sha256(tmp_path / "nodes" / file) == file_sha256(tmp_path / "one" / file)
