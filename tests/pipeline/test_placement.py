"""Where a run takes place is the machine's to say: device, processes, threads and loaders follow from what it has."""

import os
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf

import octaves
from data.images.config import ImagesConfig
from pipeline.config import CONFIG_FOLDER, Config, ConfigError, TrainerConfig, load_config, to_plain
from pipeline.cores import environment_beside, share_of_cores, usable_cores, use_threads
from pipeline.errors import RunError
from pipeline.placement import device_for, image_loaders, placement, processes_here, token_loaders
from tests.reliability import commands


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of so many CPUs, with files of cgroups and hardware threads, and what it lets this process know."""
    for name in ("OMP_NUM_THREADS", "OCTAVES_THREADS", "OCTAVES_CORES", "SLURM_STEP_NUM_TASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr("pipeline.cores.CPUS", tmp_path / "cpu")
    monkeypatch.setattr("pipeline.cores.CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("pipeline.cores.OWN_CGROUPS", tmp_path / "own")

    def made(cpus, own="", files=None):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
        (tmp_path / "own").write_text(own)
        for name, text in (files or {}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return made


@pytest.fixture
def threads(monkeypatch):
    """Numbers of threads that torch is told, in turn."""
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


def there(monkeypatch, gpus=0, apple=False):
    """A machine with so many CUDA GPUs, or with Apple's."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)


V2, V1 = "0::/job/step\n", "3:memory:/job\n2:cpu,cpuacct:/job/step\n"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("", {}, 8),
        (V2, {}, 8),
        (V2, {"cgroup/job/step/cpu.max": "max 100000\n"}, 8),
        (V2, {"cgroup/job/step/cpu.max": "50000 100000\n"}, 1),
        (V2, {"cgroup/job/step/cpu.max": "350000 100000\n"}, 3),
        (V2, {"cgroup/job/step/cpu.max": "1600000 100000\n"}, 8),
        # the limit of a group above holds too
        (V2, {"cgroup/job/step/cpu.max": "600000 100000\n", "cgroup/job/cpu.max": "200000 100000\n"}, 2),
        # what a container sees as its root
        ("0::/\n", {"cgroup/cpu.max": "400000 100000\n"}, 4),
        (
            V1,
            {f"cgroup/cpu,cpuacct/job/step/cpu.cfs_{key}_us": us for key, us in (("quota", "-1"), ("period", "9"))},
            8,
        ),
        (
            V1,
            {f"cgroup/cpu/job/step/cpu.cfs_{key}_us": us for key, us in (("quota", "50000"), ("period", "100000"))},
            1,
        ),
        (V1, {f"cgroup/cpu/cpu.cfs_{key}_us": us for key, us in (("quota", "250000"), ("period", "50000"))}, 5),
        # both versions mounted, as systemd does
        (V1 + V2, {"cgroup/unified/job/cpu.max": "300000 100000\n"}, 3),
        ("4:memory:/job\n", {"cgroup/memory/job/cpu.max": "100000 100000\n"}, 8),
    ],
)
def test_usable_cores_are_those_of_affinity_and_quota(machine, own, files, cores):
    machine(8, own, files)
    assert usable_cores() == cores


def test_hardware_threads_of_a_core_count_once(machine):
    pairs = {f"cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)}
    machine(8, files=pairs)
    assert usable_cores() == 4
    machine(2, files=pairs)
    assert usable_cores() == 2


def test_processes_share_the_cores(machine):
    machine(8)
    assert [share_of_cores(processes) for processes in (1, 2, 3, 16)] == [8, 4, 2, 1]


def test_tasks_of_slurm_have_cores_of_their_own(machine, monkeypatch):
    machine(8)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert share_of_cores(2) == 4  # one task, whose processes the command starts itself
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert share_of_cores(2) == 6


def test_threads_follow_the_share_unless_the_user_says_how_many(machine, threads, monkeypatch):
    machine(2)
    use_threads()
    use_threads(2)
    assert threads == [2, 1] and os.environ["OMP_NUM_THREADS"] == "1"
    # a rank finds what the first process set, and comes to the same number
    use_threads()
    use_threads(2)
    assert threads == [2, 1, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    use_threads(2)
    assert len(threads) == 4 and os.environ["OMP_NUM_THREADS"] == "7"


def test_a_quota_of_half_a_core_is_one_thread(machine, threads):
    machine(8, "0::/\n", {"cgroup/cpu.max": "50000 100000"})
    use_threads(2)
    assert threads == [1]


def test_commands_side_by_side_share_the_cores(machine, monkeypatch):
    machine(8)
    assert "OCTAVES_CORES" not in environment_beside(1)
    monkeypatch.setattr(os, "environ", environment_beside(3))
    assert usable_cores() == 2


def note(folder, around, call, *args):
    """Add the threads of now to this rank's file."""
    with (folder / f"rank{os.environ['LOCAL_RANK']}.txt").open("a") as file:
        file.write(f"{torch.get_num_threads()}\n")
    return around(*args)


def on_two_cpus(folder):
    """A setup: two CPUs, torch's own threads, and their number noted before Lightning has a word in it and after."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    for name in ("OMP_NUM_THREADS", "OCTAVES_THREADS"):
        os.environ.pop(name, None)
    torch.set_num_threads(2)
    for where in ("pipeline.train:fit_statistics", "stages.tokenizer.module:TokenizerModule.validation_step"):
        commands.wrap(where, partial(note, folder))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_two_ranks_on_two_cores_have_a_thread_each(tmp_path, tiny):
    """From the beginning: each of them measures the images before they meet."""
    keys = ["tokenizer_training.max_steps=1", "tokenizer_training.adversarial_weight=0", f"run={tmp_path}/run"]
    ended = commands.two(tmp_path, "train-tokenizer", tiny, *keys, setups=(partial(on_two_cpus, tmp_path),) * 2)
    assert [rank.code for rank in ended] == [0, 0], [rank.said for rank in ended]
    for rank in (0, 1):
        first, *later = (tmp_path / f"rank{rank}.txt").read_text().split()
        assert first == "1" and later and set(later) == {"1"}


@pytest.mark.parametrize(
    ("gpus", "apple", "wanted", "kind"),
    [
        (0, False, "auto", "cpu"),
        (2, False, "auto", "cuda"),
        (0, True, "auto", "mps"),
        (1, True, "auto", "cuda"),
        (1, True, "cpu", "cpu"),
        (1, False, "gpu", "cuda"),
        (1, True, "mps", "mps"),
    ],
)
def test_every_command_takes_the_same_device(monkeypatch, gpus, apple, wanted, kind):
    there(monkeypatch, gpus, apple)
    assert device_for(wanted).type == kind
    assert placement(TrainerConfig(accelerator=wanted))["accelerator"] == kind
    if wanted == "auto":
        assert octaves._device(None).type == kind


@pytest.mark.parametrize(
    ("machine_has", "trainer", "line"),
    [
        (
            {"apple": True},
            {"accelerator": "gpu"},
            "trainer.accelerator=gpu, but there is no CUDA GPU here; use auto or",
        ),
        (
            {"gpus": 1},
            {"accelerator": "mps"},
            "trainer.accelerator=mps, but there is no Apple GPU here; use auto or cpu",
        ),
        ({"apple": True}, {"devices": 2}, "trainer.devices=2, but this machine has 1 GPU; set trainer.devices=1, or"),
        ({"gpus": 2}, {"devices": 3}, "trainer.devices=3, but this machine has 2 GPUs; set trainer.devices=2, or"),
        (
            {"apple": True},
            {"num_nodes": 2},
            "trainer.num_nodes=2 on mps: torch cannot communicate between Apple GPUs",
        ),
    ],
)
def test_what_is_not_there_is_one_line(monkeypatch, machine_has, trainer, line):
    there(monkeypatch, **machine_has)
    with pytest.raises(RunError) as caught:
        placement(TrainerConfig(**trainer))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_all_gpus_are_as_many_as_there_are(monkeypatch):
    for gpus, apple, processes in ((4, False, 4), (0, True, 1), (0, False, 1)):
        there(monkeypatch, gpus, apple)
        assert processes_here(TrainerConfig(devices=-1)) == processes
    there(monkeypatch)
    assert processes_here(TrainerConfig(devices=3)) == 3
    there(monkeypatch, gpus=1)
    monkeypatch.setenv("LOCAL_RANK", "2")  # a launcher that shows each of its processes one GPU
    assert processes_here(TrainerConfig(devices=8)) == 8


@pytest.mark.parametrize(
    ("cores", "gpus", "devices", "loaders"),
    [(1, 0, 1, 0), (2, 0, 1, 0), (4, 0, 1, 1), (64, 0, 1, 8), (8, 0, 2, 1), (1, 1, 1, 0), (2, 1, 1, 1), (6, 1, 1, 5)]
    + [(64, 8, -1, 7), (256, 8, -1, 8), (16, 2, 2, 7)],
)
def test_loaders_follow_from_the_cores_that_are_left(machine, monkeypatch, cores, gpus, devices, loaders):
    machine(cores)
    there(monkeypatch, gpus)
    for kind in ("folder", "webdataset", "photos"):
        config = Config(images=ImagesConfig(kind=kind), trainer=TrainerConfig(devices=devices))
        assert image_loaders(config) == loaders and token_loaders(config) == 0


@pytest.mark.parametrize("kind", ["demo", "fashion"])
def test_images_in_memory_need_no_loaders_unless_the_user_wants_some(machine, kind):
    machine(64)
    assert image_loaders(Config(images=ImagesConfig(kind=kind))) == 0
    for number in (0, 3):
        config = Config(images=ImagesConfig(kind=kind), trainer=TrainerConfig(num_workers=number))
        assert image_loaders(config) == token_loaders(config) == number


def test_numbers_and_auto_are_all_that_loaders_can_be():
    for value, kept in (("auto", "auto"), ("0", 0), ("4", 4)):
        assert to_plain(load_config("demo", [f"trainer.num_workers={value}"]))["trainer"]["num_workers"] == kept
    for value, said in (("-1", "-1"), ("many", "many"), ("1.5", "1.5"), ("true", "True")):
        with pytest.raises(ConfigError) as caught:
            load_config("demo", [f"trainer.num_workers={value}"])
        assert "num_workers" in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


def test_no_shipped_experiment_for_any_machine_says_where_it_runs():
    said = {path.stem: OmegaConf.load(path).get("trainer") for path in CONFIG_FOLDER.glob("*.yaml")}
    assert all(trainer is None or trainer.accelerator == "gpu" for trainer in said.values()), said
