"""Several processes are one run: the same figures, and none outlives the failure of another."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from dreamer_jax import convert, distributed, gathering
from dreamer_jax.config import DistributedConfig
from dreamer_jax.distributed import DistributedError, Group, explicit_place
from dreamer_jax.gathering import host_and_port
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training import loop
from dreamer_jax.training.checkpoint import Checkpoints, load_model
from dreamer_jax.training.rows import held_rows, place_rows
from dreamer_jax.training.run_folder import RunFolderError, claimed
from dreamer_jax.training.step import abstract_state
from tests.training.peers import Peer, free_port, group, seconds_until
from tests.training.worker import FAULT_STEP, HANG_SECONDS, LAST, config_of, copied, once

# One worker of pytest makes the runs that all tests here look at.
pytestmark = pytest.mark.xdist_group("processes")

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    code: int
    output: str
    at: float
    """When the output ended."""
    struck: float | None
    """When the fault was announced."""


def environment(devices, **extra):
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)} | extra


def launch(folder, *jobs, processes, devices):
    """The workers, and a function that waits for them."""
    port = free_port()
    ended: dict[int, Ended] = {}

    def run(index):
        place = {"COORDINATOR": f"localhost:{port}", "PROCESSES": str(processes), "PROCESS": str(index)}
        command = [sys.executable, "-u", "-m", "tests.training.worker", str(folder), *jobs]
        variables = environment(devices, **{f"DREAMER_{name}": value for name, value in place.items()})
        lines, struck = [], None
        with subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            guard = threading.Timer(240, process.kill)
            guard.start()
            for line in process.stdout:
                lines.append(line)
                struck = time.monotonic() if line == "now\n" else struck
            guard.cancel()
        ended[index] = Ended(process.returncode, "".join(lines), time.monotonic(), struck)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(processes)]
    for thread in threads:
        thread.start()

    def wait():
        for thread in threads:
            thread.join()
        return [ended[i] for i in range(processes)]

    return wait


def cut_copy(folder, source, name):
    """A run as it was after step 4, under another name."""
    old, new = (config_of(folder, n).run_dir for n in (source, name))
    shutil.copytree(old, new)
    shutil.rmtree(new / "checkpoints" / "6")


def records(folder, name):
    lines = (config_of(folder, name).run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("speed/")} for line in lines]


def assert_same_records(ours, theirs):
    assert len(ours) == len(theirs) == 7
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            exact = "entropy" not in key and key.startswith(("router/", "steps/", "step"))
            np.testing.assert_allclose(a[key], b[key], rtol=0 if exact else 2e-6, err_msg=f"{key} of step {a['step']}")


def final_arrays(folder, name):
    config = config_of(folder, name)
    _, like = abstract_state(config, make_mesh(config.mesh))
    with Checkpoints(config.run_dir) as checkpoints:
        assert checkpoints.latest == 6
        return jax.device_get(checkpoints.restore(like, 6))


@pytest.fixture(scope="module")
def train_alone():
    """Trains in this process, on four devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "init_state", copied(loop.init_state))
        patch.setattr(loop, "make_train_step", once(loop.make_train_step))
        patch.setattr(loop, "make_evaluation", once(loop.make_evaluation))
        patch.setattr(loop.sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:4]))
        yield loop.train


@pytest.fixture(scope="module")
def folder(tmp_path_factory, train_alone):
    """Runs of one process of four devices, and of two of two, which go on with its run and an interrupted one, too."""
    folder = tmp_path_factory.mktemp("data")
    train_alone(config_of(folder, "single"))
    cut_copy(folder, "single", "one_to_two")
    jobs = ("double", "one_to_two", "stopped:terminate", "stopped")
    first, second = launch(folder, *jobs, processes=2, devices=2)()
    assert first.code == second.code == 0, first.output + second.output
    (folder / "first").write_text(first.output)
    (folder / "second").write_text(second.output)
    return folder


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Runs in which a process fails, each in its own way, at the same time."""
    folder = tmp_path_factory.mktemp("failures")
    from dreamer_jax.data.builder import prepare

    prepare(config_of(folder, "any"))
    waits = {fault: launch(folder, f"{fault}:{fault}", processes=2, devices=1) for fault in LAST}
    return {fault: wait() for fault, wait in waits.items()}


def test_two_processes_train_like_one(folder):
    assert_same_records(records(folder, "double"), records(folder, "single"))
    one, two = (load_model(config_of(folder, name).run_dir).model for name in ("single", "double"))
    for name, array in convert.named_arrays(one).items():
        tolerance = 0 if "bias" in name else 1e-5
        np.testing.assert_allclose(convert.named_arrays(two)[name], array, atol=tolerance, err_msg=name)


def test_a_run_goes_on_with_more_processes_or_fewer(folder, train_alone):
    assert_same_records(records(folder, "one_to_two"), records(folder, "single"))
    cut_copy(folder, "double", "two_to_one")
    train_alone(config_of(folder, "two_to_one"))
    assert_same_records(records(folder, "two_to_one"), records(folder, "single"))


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder):
    first, second = ((folder / name).read_text() for name in ("first", "second"))
    [(at, by)] = re.findall(r"stopped ended at step (\d) by (.*\S)", first.split("resuming from step")[-2])[-1:]
    assert FAULT_STEP <= int(at) < 6
    assert by == "a signal to another process"
    assert f"stopped ended at step {at} by SIGTERM" in second
    assert f"resuming from step {at} of" in first
    assert records(folder, "stopped") == records(folder, "double")
    jax.tree.map(np.testing.assert_array_equal, final_arrays(folder, "stopped"), final_arrays(folder, "double"))


@pytest.mark.parametrize("said", ["tok/s", "loss", "resuming from step", "data: ", "documents"])
def test_one_process_speaks_for_all(folder, said):
    """The other is not silent: its libraries warn on a slow machine."""
    first, second = ((folder / name).read_text() for name in ("first", "second"))
    assert said in first
    assert said not in second


def announce(what, seconds):
    """Show a measured time with pytest -s."""
    print(f"\n{what}: all processes ended after {seconds:.1f} s")


def test_a_killed_process_ends_the_others(failures):
    survivor, killed = failures["kill"]
    assert killed.code == -9
    assert survivor.code not in (0, None)
    # JAX's own message gives the bare number, and its abort may come before ours is out.
    named = r"process 1 \(.*\) died or is stopped: no heartbeat for 10 s|heartbeats\):\n1\n"
    assert re.search(named, survivor.output), survivor.output
    announce("a killed process", survivor.at - killed.at)
    assert survivor.at - killed.at < 25


def test_the_end_of_process_0_ends_the_others(failures):
    killed, survivor = failures["behead"]
    assert killed.code == -9
    assert survivor.code not in (0, None)
    assert re.search(r"process 0 \(.*\) died: it no longer answers|leader task was preempted/died", survivor.output)
    announce("process 0 killed", survivor.at - killed.at)
    assert survivor.at - killed.at < 15


def test_an_error_in_one_process_ends_the_others(failures):
    other, failed = failures["fail"]
    assert (other.code, failed.code) == (1, 1)
    assert "ValueError: the disk is on fire" in failed.output
    assert "Traceback" in failed.output
    assert re.search(r"process 1 \(.*\) stopped: ValueError: the disk is on fire", other.output), other.output
    announce("an error", max(other.at, failed.at) - failed.struck)
    assert other.at - failed.struck < 15


def test_a_hang_shows_where_every_process_is(failures):
    other, hung = failures["hang"]
    assert (other.code, hung.code) == (1, 1)
    announce("a hang", max(other.at, hung.at) - hung.struck)
    for ended in (other, hung):
        assert re.search(rf"process \d \(.*\): no step finished for {HANG_SECONDS} s, in step \d", ended.output)
        assert re.search(r"process \d \(.*\) ends; it was in step \d", ended.output)
        assert "Thread 0x" in ended.output
        assert ended.at - hung.struck < HANG_SECONDS + 15
    assert "in strike" in hung.output


def test_processes_whose_output_breaks_end_within_seconds():
    proxies = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "grpc")}  # nobody listens there
    cut, stuck = group("print", "print", **proxies), group("fail", "print")
    place = {"DREAMER_COORDINATOR": f"localhost:{free_port()}", "DREAMER_PROCESSES": "2"}
    closed, full = 'exec "$@" 1>&- 2>&-', 'exec "$@" >/dev/full 2>&1'
    broken = [Peer("fail", shell=closed, DREAMER_PROCESS="0", **place)]
    broken += [Peer("print", shell=full, DREAMER_PROCESS="1", **place)]
    for peer in cut + stuck + broken:
        peer.noted("started")
        peer.noted("joined")
    for peer in cut:
        peer.process.stdout.close()
    seconds, ends = seconds_until(cut)
    assert [code for code, _ in ends] == [1, 1]
    announce("output that breaks", seconds)
    assert seconds < 15
    for peers in (broken, stuck):
        if peers is stuck:  # whose second process waits for a reader of its output
            peers[1].process.wait(15)
        _, ends = seconds_until(peers)
        assert [code for code, _ in ends] == [1, 1]
    assert "ValueError: the disk is on fire" in ends[0][1]


@pytest.mark.parametrize("victim", [0, 1])
def test_those_that_wait_for_others_notice_at_once_if_one_of_them_dies(victim):
    killed, told = group("wait", "wait", count=3), group("wait", "wait", count=3)
    for peer in killed + told:
        peer.noted("started")
    time.sleep(1.5)
    killed[victim].signal(signal.SIGKILL)
    told[victim].signal(signal.SIGTERM)
    seconds, ends = seconds_until(killed)
    announce("a process killed while joining", seconds)
    assert seconds < 10
    assert [code for code, _ in ends] == ([-9, 1] if victim == 0 else [1, -9])
    assert re.search(rf"error: process {victim} \(.*\) died before the run began", ends[1 - victim][1])
    _, ends = seconds_until(told)
    assert [code for code, _ in ends] == [75, 75]
    assert re.search(rf"process {victim} \(.*\): SIGTERM before the first step", ends[1 - victim][1])


def test_who_is_missing_is_said_and_who_is_too_much():
    peers = group("wait", None, "wait", "wait", None, count=5, DREAMER_START_SECONDS="6")
    for peer in peers:
        peer.noted("started")
    place = {"DREAMER_COORDINATOR": peers[0].variables["DREAMER_COORDINATOR"], "DREAMER_START_SECONDS": "2"}
    strangers = [
        Peer("wait", DREAMER_PROCESSES="4", DREAMER_PROCESS="1", **place),
        Peer("wait", DREAMER_PROCESSES="5", DREAMER_PROCESS="2", **place),
        Peer("wait", DREAMER_PROCESSES="2", DREAMER_PROCESS="1", **place | {"DREAMER_COORDINATOR": "localhost:9"}),
    ]
    _, [other, double, lost] = seconds_until(strangers)
    _, [host, *guests] = seconds_until(peers)
    message = r"did not come together within 6 s: processes 1, 4 of 5 did not come .* here: process 0 .*, process 2 "
    for code, output in (host, *guests):
        assert code == 1
        assert re.search(message, output), output
    assert re.search(r"not let process 1 in: it knows of 4 processes, and process 0 \(.*\) of 5", other[1]), other[1]
    assert re.search(r"not let process 2 in: process 2 \(.*\) is there already", double[1]), double[1]
    assert "process 0 could not be reached at localhost:9 within 2 s" in lost[1]


def test_two_runs_cannot_begin_at_the_same_address(monkeypatch):
    monkeypatch.setattr(gathering, "BUSY_SECONDS", 0.1)
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DistributedError, match=f"cannot listen on port {port} .*another run may be there"):
            gathering.Host(f"localhost:{port}", 0, 2, "process 0", lambda code, words: None)


def test_a_stopped_process_0_is_named():
    stopped, other = group("native", "native")
    for peer in (stopped, other):
        peer.noted("started")
        peer.noted("joined")
    stopped.signal(signal.SIGSTOP)
    seconds, [(code, output)] = seconds_until([other])
    announce("process 0 stopped", seconds)
    assert code not in (0, None)
    assert re.search(r"process 0 \(.*\) died or is stopped: it no longer answers", output), output
    assert seconds < 20
    stopped.signal(signal.SIGKILL)
    stopped.ended()


def test_the_environment_places_a_process_or_says_what_is_wrong():
    good = {"DREAMER_COORDINATOR": "host:1234", "DREAMER_PROCESSES": "2", "DREAMER_PROCESS": "1"}
    assert explicit_place({}) is None
    assert explicit_place(good | {"DREAMER_PROCESSES": "1", "DREAMER_PROCESS": "0"}) is None
    assert explicit_place(good)["process_id"] == 1
    assert explicit_place(good | {"DREAMER_COORDINATOR": "[::1]:8476"})["coordinator_address"] == "[::1]:8476"
    assert host_and_port("[::1]:8476") == ("::1", 8476)
    for wrong, message in [
        ({"DREAMER_PROCESS": ""}, r"DREAMER_COORDINATOR, DREAMER_PROCESSES without DREAMER_PROCESS: set all three"),
        *(
            ({"DREAMER_COORDINATOR": address}, rf"DREAMER_COORDINATOR = '{re.escape(address)}': give host:port")
            for address in (
                "host",
                ":80",
                "host:0",
                "host:99999",
                "host:x",
                "host:",
                "::1:80",
                "http://host:80",
                "a b:80",
            )
        ),
        ({"DREAMER_PROCESSES": "two"}, r"DREAMER_PROCESSES = 'two': give a whole number"),
        ({"DREAMER_PROCESSES": "0"}, r"DREAMER_PROCESSES = '0': give a whole number from 1"),
        ({"DREAMER_PROCESSES": "²"}, r"DREAMER_PROCESSES = '²': give a whole number"),
        ({"DREAMER_PROCESS": "-1"}, r"DREAMER_PROCESS = '-1': give a whole number from 0"),
        ({"DREAMER_PROCESS": "2"}, r"DREAMER_PROCESS = 2 with DREAMER_PROCESSES = 2: give 0 to 1"),
    ]:
        with pytest.raises(DistributedError, match=message):
            explicit_place(good | wrong)


def test_no_proxy_stands_before_the_coordinator(monkeypatch):
    monkeypatch.setenv("no_grpc_proxy", "")
    monkeypatch.setenv("no_proxy", "intranet,localhost")
    distributed._pass_proxies_by("10.0.0.1")
    assert os.environ[distributed.NO_PROXY[0]] == "intranet,localhost,10.0.0.1,127.0.0.1,::1"


@pytest.mark.parametrize(("tasks", "found"), [("1", None), ("4", "n1:61447")])
def test_a_cluster_is_joined_if_it_has_several_processes(monkeypatch, tasks, found):
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "n[1-2]", "NTASKS": tasks, "PROCID": "3", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = distributed.detected_place()
    assert place == (found and {"coordinator_address": found, "num_processes": 4, "process_id": 3})


def test_a_slurm_task_that_has_a_node_to_itself_takes_all_of_its_gpus():
    alone = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"}
    assert distributed.slurm_devices(alone) == {"local_device_ids": [0, 1, 2, 3]}
    for other in ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, {"SLURM_GPUS_ON_NODE": ""}, {"JAX_LOCAL_DEVICE_IDS": "0"}):
        assert distributed.slurm_devices(alone | other) == {}


def test_a_folder_is_one_runs_at_a_time_and_the_same_for_all(tmp_path, monkeypatch):
    with (
        claimed(tmp_path, Group()),
        pytest.raises(RunFolderError, match=r"in use by another run \(pid \d+ on .*--name"),
        claimed(tmp_path, Group()),
    ):
        pass
    monkeypatch.setattr("dreamer_jax.distributed.VISIBLE_SECONDS", 0.1)
    elsewhere = Group(DistributedConfig(), index=1, count=2)
    monkeypatch.setattr(elsewhere, "told", lambda topic: "pid 1 on another")
    with pytest.raises(RunFolderError, match="not the folder that process 0"), claimed(tmp_path, elsewhere):
        pass


def test_rows_lie_on_the_devices_that_ask_for_them():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4])[[2, 0, 3, 1]], ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert held_rows(place, 8) == tuple(range(8))
    rows = np.arange(16).reshape(8, 2)
    np.testing.assert_array_equal(place_rows(place, 8, range(8), {"tokens": rows})["tokens"], rows)


def test_the_launcher_marks_lines_and_ends_with_the_failure(tmp_path):
    command = [sys.executable, "launch/local.py", "--processes", "2", "--", "--config", str(tmp_path / "absent.py")]
    ended = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    for index in range(2):
        assert f"[{index}] error: config file '{tmp_path / 'absent.py'}' does not exist" in ended.stdout


def children(process):
    """The processes that a launcher has started; waits for two."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(pids := [int(pid) for pid in path.read_text().split()]) < 2:
        time.sleep(0.01)
    return pids


def lives(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def launcher(tmp_path):
    """A run of two processes, which takes long to begin."""
    config = tmp_path / "toy.py"
    config.write_text("import time\n\ndef get_config():\n    time.sleep(1000)\n")
    command = [sys.executable, "launch/local.py", "--processes", "2", "--", "--config", str(config)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed process")
def test_a_killed_launcher_takes_its_processes_along(launcher):
    workers = children(launcher)
    launcher.kill()
    deadline = time.monotonic() + 15
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, workers))


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the children of a process")
def test_the_launcher_ends_the_others_when_a_process_is_killed(launcher):
    os.kill(children(launcher)[1], signal.SIGKILL)
    began = time.monotonic()
    output, _ = launcher.communicate(timeout=60)
    announce("a process killed before it could join", time.monotonic() - began)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "process 1 was killed by SIGKILL" in output


@pytest.mark.parametrize("number", ["0", "-1", "2.5", "two"])
def test_the_launcher_needs_a_whole_number_of_processes(number):
    command = [sys.executable, "launch/local.py", f"--processes={number}", "--", "--config", "toy.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert f"'{number}': give a whole number from 1" in ended.stderr
