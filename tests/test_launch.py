"""The scripts of launch/, as far as they run without a cluster."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dreamer_jax.training.preemption import INTERRUPTED_CODE

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
GCLOUD = """#!/bin/bash
# Stands in for gcloud: notes its arguments, takes states and exit codes from queues.
echo "$*" >> calls
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
    *describe*) next states ;;
    *dreamer_jax.train\\ *) exit "$(next codes)" ;;
esac
"""


def tpu_vm(*arguments, folder, **extra):
    variables = {"TPU_REPOSITORY": "https://example.org/dreamer.git", "TPU_POLL_SECONDS": "0"}
    path = f"{folder}:{os.environ['PATH']}"
    return subprocess.run(
        [str(LAUNCH / "tpu_vm.sh"), *arguments],
        cwd=folder,
        env=os.environ | variables | {"PATH": path} | extra,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    found = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_a_dry_run_on_a_tpu_shows_every_command(tmp_path):
    given = ["--config", "configs/tiny.py", "--log.sample-prompt", "1 + 1 = ?"]
    shown = tpu_vm("--dry-run", "train", *given, folder=tmp_path, TPU_NFS="10.0.0.2:/share")
    assert shown.returncode == 0, shown.stderr
    lines = [line for line in shown.stdout.splitlines() if line.startswith("gcloud")]
    create, setup, clear, train = lines
    assert "queued-resources create dreamer" in create
    assert "--spot" in create
    assert "mount -t nfs 10.0.0.2:/share /shared" in setup
    assert "git clone https://example.org/dreamer.git" in setup
    assert "pkill -TERM" in clear
    assert "--worker all" in train
    unquoted = subprocess.run(
        ["bash", "-c", f"printf '%s' {train.split('--command ')[1]}"], capture_output=True, text=True
    )
    assert r"-m dreamer_jax.train --config configs/tiny.py --log.sample-prompt 1\ +\ 1\ =\ \?" in unquoted.stdout
    assert "queued-resources delete dreamer" in tpu_vm("--dry-run", "delete", folder=tmp_path).stdout


def fake_gcloud(folder, states, codes):
    (folder / "gcloud").write_text(GCLOUD)
    (folder / "gcloud").chmod(0o755)
    (folder / "states").write_text("\n".join(states) + "\n")
    (folder / "codes").write_text("\n".join(codes) + "\n")


def test_a_run_on_a_tpu_goes_on_after_preemption(tmp_path):
    states = ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "ACTIVE"]
    fake_gcloud(tmp_path, states, ["255", "0"])
    ended = tpu_vm("train", "--config", "configs/tiny.py", folder=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "dreamer was taken away" in ended.stdout
    calls = (tmp_path / "calls").read_text()
    assert [calls.count(f"queued-resources {verb}") for verb in ("create", "delete")] == [2, 1]
    assert calls.count("-m dreamer_jax.train --config") == 2


def test_a_run_on_a_tpu_that_always_fails_ends(tmp_path):
    fake_gcloud(tmp_path, ["ACTIVE"] * 9, ["1"] * 9)
    ended = tpu_vm("train", "--config", "configs/tiny.py", folder=tmp_path, TPU_RETRIES="1")
    assert ended.returncode == 1
    assert (tmp_path / "calls").read_text().count("-m dreamer_jax.train --config") == 2


def test_the_jobset_restarts_all_pods_of_an_interrupted_run():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert "kueue.x-k8s.io/queue-name" in jobset["metadata"]["labels"]
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    [rule] = policy["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    machines = job["parallelism"]
    assert job["completions"] == machines
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    sides = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = machines * container["resources"]["limits"]["google.com/tpu"]
    for side in sides:
        chips //= side
    assert chips == 1
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [
        {"containerName": container["name"], "operator": "In", "values": [int(environment[INTERRUPTED_CODE])]}
    ]


def test_skypilot_names_the_processes_to_each_other():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    for name in ("DREAMER_COORDINATOR", "DREAMER_PROCESSES", "DREAMER_PROCESS"):
        assert f"{name}=" in task["run"]
    assert "/shared" in task["volumes"]


def serve_vllm(*arguments, gpu=False, folder):
    """Run the script with a Python that has vLLM, or says so, and shows how it would be started."""
    (folder / "python").write_text(
        f"""#!/bin/bash
case "$*" in *find_spec*) exit 0 ;; *is_available*) exit {int(not gpu)} ;; esac
echo "$*"; echo "cache ${{VLLM_CPU_KVCACHE_SPACE:-none}}"
"""
    )
    (folder / "python").chmod(0o755)
    variables = {"DREAMER_PYTHON": str(folder / "python"), "PATH": os.environ["PATH"]}
    command = [str(LAUNCH / "serve_vllm.sh"), *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def test_vllm_serves_an_export_with_flags_for_the_hardware(tmp_path):
    export = tmp_path / "tiny-hf"
    export.mkdir()
    for name in ("config.json", "modeling_dreamer.py"):
        (export / name).touch()
    on_cpu = serve_vllm(export, 8001, "--max-num-seqs", 4, folder=tmp_path)
    assert on_cpu.returncode == 0, on_cpu.stderr
    assert f"--model {export} --model-impl transformers --trust-remote-code" in on_cpu.stdout
    assert "--served-model-name tiny-hf --host 127.0.0.1 --port 8001" in on_cpu.stdout
    assert on_cpu.stdout.endswith("--dtype float32 --block-size 32 --max-num-seqs 4\ncache 1\n")
    on_gpu = serve_vllm(export, folder=tmp_path, gpu=True)
    assert on_gpu.stdout.endswith("--port 8000 --dtype bfloat16\ncache none\n")


def test_vllm_is_not_started_with_what_it_cannot_serve(tmp_path):
    refused = serve_vllm(tmp_path, folder=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"'{tmp_path}' is no export (config.json is missing)" in refused.stderr
    for name in ("config.json", "modeling_dreamer.py"):
        (tmp_path / name).touch()
    assert "'--dtype' is no port" in serve_vllm(tmp_path, "--dtype", folder=tmp_path).stderr
