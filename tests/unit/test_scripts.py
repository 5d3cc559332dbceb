"""The shell scripts: what they say of a machine that lacks something, and of wrong arguments."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def bash(script: str, path: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": path or os.environ["PATH"]} | variables
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )


def programs(directory: Path, **texts: str) -> None:
    """Write programs of these names, - for _, that the shell runs."""
    for name, text in texts.items():
        path = directory / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)


def tools(directory: Path, names: list[str]) -> str:
    """Return a PATH that holds these programs alone."""
    directory.mkdir()
    for name in names:
        found = sys.executable if name == "python3" else shutil.which(name)
        assert found is not None, name
        (directory / name).symlink_to(found)
    return str(directory)


NEEDED = ["dirname", "basename", "python3", "git", "g++"]


def test_a_machine_that_has_everything_passes(tmp_path: Path) -> None:
    done = bash("source launch/common.sh; check_prerequisites", tools(tmp_path / "bin", NEEDED))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("missing", "install"),
    [("python3", "python3 python3-venv python3-dev"), ("git", "git"), ("g++", "g++")],
)
def test_a_missing_program_is_named_with_the_command_that_installs_it(
    tmp_path: Path, missing: str, install: str
) -> None:
    path = tools(tmp_path / "bin", [name for name in NEEDED if name != missing])
    done = bash("source launch/common.sh; check_prerequisites", path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "missing" in done.stderr
    assert done.stderr.strip().endswith(f"apt-get install -y {install}")


@pytest.mark.parametrize(
    ("test", "install"),
    [("import ensurepip, venv", "python3-venv"), ("Python.h", "python3-dev"), ("sys.version_info", "PYTHON")],
)
def test_a_missing_part_of_python_is_named(tmp_path: Path, test: str, install: str) -> None:
    """A Python that fails where the script asks it for this part."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *"{test}"*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    done = bash("source launch/common.sh; check_prerequisites", PYTHON=str(fake))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert install in done.stderr


@pytest.mark.parametrize(
    ("listed", "variables", "count"),
    [
        ("GPU 0: a\\nGPU 1: b", {}, "2"),
        ("", {}, "0"),
        ("GPU 0: a\\nGPU 1: b", {"DS_ACCELERATOR": "cpu"}, "0"),
        ("GPU 0: a\\nGPU 1: b", {"CUDA_VISIBLE_DEVICES": "1"}, "1"),
        ("GPU 0: a\\nGPU 1: b", {"CUDA_VISIBLE_DEVICES": ""}, "0"),
        ("GPU 0: a\\nGPU 1: b", {"CUDA_VISIBLE_DEVICES": "-1"}, "0"),
        ("GPU 0: a\\nGPU 1: b", {"CUDA_VISIBLE_DEVICES": "1,-1,0"}, "1"),
        ("", {"CUDA_VISIBLE_DEVICES": "0"}, "0"),
    ],
)
def test_gpus_are_counted(tmp_path: Path, listed: str, variables: dict[str, str], count: str) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\nprintf "{listed}"\n{"" if listed else "exit 9"}\n')
    smi.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    unset = "unset CUDA_VISIBLE_DEVICES DS_ACCELERATOR; " if not variables else "unset DS_ACCELERATOR; "
    exports = "".join(f"export {name}={value}; " for name, value in variables.items())
    done = bash(f"source launch/common.sh; {unset}{exports}count_gpus", path)
    assert (done.stdout.strip(), done.stderr) == (count, "")


def on_three_gpus(tmp_path: Path, variables: str) -> subprocess.CompletedProcess[str]:
    """Start two ranks where nvidia-smi tells of three GPUs and the deepspeed CLI prints its arguments."""
    programs(
        tmp_path,
        nvidia_smi='printf "GPU 0: a\\nGPU 1: b\\nGPU 2: c\\n"',
        deepspeed='echo "threads $OMP_NUM_THREADS" "$@" "[$CUDA_VISIBLE_DEVICES]"',
        nproc="echo 16",
    )
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = f"unset DS_ACCELERATOR CUDA_VISIBLE_DEVICES OMP_NUM_THREADS; {variables}launch/local.sh -n 2 run.yaml"
    return bash(script, path, VENV=str(tmp_path / "venv"))


@pytest.mark.parametrize("given", [None, "cpu", "cuda"])
def test_other_machines_find_out_their_devices_unless_told(tmp_path: Path, given: str | None) -> None:
    """A machine without a GPU, as this one, may start ranks on others that have some."""
    programs(tmp_path, pdsh="", nvidia_smi="exit 9", deepspeed='cat "$DS_ENV_FILE"', python="")
    (tmp_path / "bin").symlink_to(tmp_path)
    (tmp_path / "hosts").write_text("a slots=1\n")
    told = "" if given is None else f"export DS_ACCELERATOR={given}; "
    script = f"unset DS_ACCELERATOR; {told}export LD_LIBRARY_PATH=/a; launch/multinode.sh -H {tmp_path}/hosts run.yaml"
    lines = bash(script, VENV=str(tmp_path)).stdout.splitlines()
    assert [line for line in lines if line.startswith("DS_ACCELERATOR")] == [f"DS_ACCELERATOR={given}"] * bool(given)
    assert "LD_LIBRARY_PATH=/a" in lines
    assert bash(f"{script} pruning.components=[attention]", VENV=str(tmp_path)).returncode == 0
    for override in ("pruning.include=[query|key]", "train.output=a&b", "model.freeze=a\\.b", "wandb.name=$HOME"):
        refused = bash(f"{script} '{override}'", VENV=str(tmp_path))
        assert f"{override} has characters of the shell" in refused.stderr
        assert (refused.returncode, refused.stdout) == (2, "")
    (tmp_path / "two words").mkdir()
    elsewhere = script.replace("launch/multinode.sh", f"cd '{tmp_path}/two words'; {REPOSITORY}/launch/multinode.sh")
    refused = bash(elsewhere, VENV=str(tmp_path))
    assert re.search(r"this folder, .*/two words, has a space.*; allowed with -H: one without", refused.stderr)
    assert (refused.returncode, refused.stdout) == (2, "")
    (tmp_path / "two words").rename(tmp_path / "R&D")
    assert bash(elsewhere.replace("two words", "R&D"), VENV=str(tmp_path)).returncode == 2


def test_other_machines_are_told_no_keys_in_command_lines(tmp_path: Path) -> None:
    programs(tmp_path, pdsh="", deepspeed='cat "$DS_ENV_FILE"', python="")
    (tmp_path / "bin").symlink_to(tmp_path)
    (tmp_path / "hosts").write_text("a slots=1\n")
    keys = {"WANDB_API_KEY": "a", "HF_TOKEN": "b", "HF_TOKEN_2": "c", "https_proxy": "http://me:wo=rd@proxy:1"}
    keys |= {"HF_ENDPOINT": "https://me:word@mirror"}
    others = {
        "HF_TOKEN_PATH": "/a",
        "http_proxy": "http://proxy:1",
        "WANDB_MODE": "offline",
        "NCCL_IB_PKEY": "1",
        "TOKENIZERS_PARALLELISM": "1",
    }
    script = "f() { unset https_proxy; no_proxy=x; }; export -f f; launch/multinode.sh -H $HOSTS run.yaml"
    done = bash(script, VENV=str(tmp_path), HOSTS=f"{tmp_path}/hosts", WANDB_NOTES="two\nlines", **keys, **others)
    told = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert told.items() >= others.items()
    assert not told.keys() & {*keys, "no_proxy", "WANDB_NOTES"}
    for name in keys:
        assert f"{name} is not handed to the other machines" in done.stderr


@pytest.mark.parametrize("cores", [None, "8"])
def test_srun_is_asked_for_cores_only_where_the_job_was(tmp_path: Path, cores: str | None) -> None:
    programs(tmp_path, srun='echo "cores [$SRUN_CPUS_PER_TASK], threads $OMP_NUM_THREADS" >&2')
    job = "export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_NAME=a SLURM_JOB_ID=1 SLURM_JOB_NODELIST=b; unset OMP_NUM_THREADS; "
    asked = "" if cores is None else f"export SLURM_CPUS_PER_TASK={cores}; "
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = bash(f"{job}{asked}bash slurm/train.sbatch run.yaml", path, VENV=sys.prefix, DISTPRUNE_LOGS=str(tmp_path))
    assert f"cores [{cores or ''}], threads {cores or 1}\n" in done.stderr


def test_a_job_whose_ranks_could_not_start_is_queued_again(tmp_path: Path) -> None:
    """Of a node that is down there is no rank's log."""
    programs(tmp_path, srun="exit 1", scontrol='echo "$@"')
    job = "export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_NAME=a SLURM_JOB_ID=7 SLURM_JOB_NODELIST=b DISTPRUNE_RESTART_WAIT=0; "
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = bash(f"{job}bash slurm/train.sbatch run.yaml", path, VENV=sys.prefix, DISTPRUNE_LOGS=str(tmp_path))
    assert "requeue 7" in done.stdout, done.stderr
    assert done.returncode == 1
    often = "export SLURM_RESTART_COUNT=30 DISTPRUNE_MAX_RESTARTS=2; "  # which counts time limits too
    starts = [
        bash(f"{job}{often}bash slurm/train.sbatch run.yaml", path, VENV=sys.prefix, DISTPRUNE_LOGS=str(tmp_path))
        for _ in range(2)
    ]
    assert ["requeue 7" in each.stdout for each in starts] == [True, False]
    assert "started again after 2 failures, which is the limit" in starts[1].stderr


@pytest.mark.parametrize(("said", "starts"), [("outside of training", 2), ("", 4)])
def test_a_job_that_does_not_come_to_train_is_not_queued_again_for_ever(tmp_path: Path, said: str, starts: int) -> None:
    """Its time may be too short for what comes before the first step, in every start."""
    programs(tmp_path, srun=f'printf "{said}" >$DISTPRUNE_REQUEUE; exit 75', scontrol='echo "$@"')
    job = "export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_NAME=a SLURM_JOB_ID=7 SLURM_JOB_NODELIST=b DISTPRUNE_MAX_RESTARTS=2; "
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = [
        bash(f"{job}bash slurm/train.sbatch run.yaml", path, VENV=sys.prefix, DISTPRUNE_LOGS=str(tmp_path))
        for _ in range(4)
    ]
    assert sum("requeue 7" in each.stdout for each in done) == starts
    assert ("which is the limit" in done[-1].stderr) == (starts < 4)


@pytest.mark.parametrize(
    ("srun", "status", "queued"),
    [
        ("echo 2 >$DISTPRUNE_ENDED; exit 2", 2, False),  # a mistake of the user's
        ("echo 75 >$DISTPRUNE_ENDED; exit 143", 75, False),  # scancel
        (": >$DISTPRUNE_ENDED; exit 2", 2, False),  # where the disk is full
        ("echo 75 >$DISTPRUNE_ENDED; touch $DISTPRUNE_REQUEUE; exit 75", 75, True),  # ahead of its time limit
        ("exit 137", 137, True),  # ranks that died without a word
        ("", 0, False),
    ],
)
def test_a_job_is_queued_again_where_that_helps(tmp_path: Path, srun: str, status: int, queued: bool) -> None:
    programs(
        tmp_path,
        srun=f'echo "meet at $MASTER_ADDR:$MASTER_PORT" "$@"\n{srun}',
        scontrol='case "$1" in show) echo node3; echo node4;; *) echo "$@";; esac',
    )
    logs = tmp_path / "95%"  # of which SLURM would make something else
    (logs / "a-10007.ranks").mkdir(parents=True)
    for left in ("ended", "requeue"):
        (logs / "a-10007.ranks" / left).write_text("0\n")  # of the start before
    job = "export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_NAME=a SLURM_JOB_ID=10007 SLURM_JOB_NODELIST=b; "
    job += "unset MASTER_ADDR MASTER_PORT; export DISTPRUNE_RESTART_WAIT=0; "
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = bash(f"{job}bash slurm/train.sbatch run.yaml", path, VENV=sys.prefix, DISTPRUNE_LOGS=str(logs))
    assert f"meet at node3:20007 --kill-on-bad-exit=1 --output={tmp_path}/95%%/a-10007.ranks/" in done.stdout, (
        done.stderr
    )
    assert ("requeue 10007\n" in done.stdout) == queued
    assert done.returncode == status


def test_what_a_site_needs_may_use_variables_that_are_not_set_and_gets_no_arguments(tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text('export LD_LIBRARY_PATH=/lib:$NOT_SET\necho "arguments [$*]"\n')
    script = 'set -euo pipefail; set -- run.yaml; source launch/common.sh; echo "$LD_LIBRARY_PATH $1 $NOT_SET"'
    done = bash(script, DISTPRUNE_SITE=str(tmp_path / "site.sh"))
    assert done.stdout == "arguments []\n"
    assert "NOT_SET: unbound variable" in done.stderr, "the script itself is as strict as before"


@pytest.mark.parametrize(("variables", "devices"), [("", "0,1"), ("export CUDA_VISIBLE_DEVICES=2,3,5; ", "2,3")])
def test_ranks_run_on_the_gpus_that_were_given(tmp_path: Path, variables: str, devices: str) -> None:
    done = on_three_gpus(tmp_path, variables)
    assert f"--include localhost:{devices} " in done.stdout, done.stderr
    assert done.stdout.strip().endswith("train run.yaml []")
    assert "threads 8 " in done.stdout, "a share of the cores"


def test_gpus_by_names_that_deepspeed_does_not_know_are_refused(tmp_path: Path) -> None:
    done = on_three_gpus(tmp_path, "export CUDA_VISIBLE_DEVICES=GPU-8a56,GPU-77c1; ")
    assert done.returncode == 2
    assert "CUDA_VISIBLE_DEVICES is GPU-8a56,GPU-77c1; allowed: numbers" in done.stderr


def test_an_environment_that_is_active_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VENV", raising=False)
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch")
    script = f"source {tmp_path}/launch/common.sh; activate; echo done"
    without = bash(script, path="/usr/bin:/bin")
    assert (without.returncode, without.stdout) == (2, "")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    assert bash(script, path=f"{tmp_path}:/usr/bin:/bin").stdout == "done\n"


def test_a_job_whose_gpus_are_not_seen_does_not_train_on_the_cpu() -> None:
    variables = {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = bash("source launch/common.sh; activate; echo $DS_ACCELERATOR", **variables, DS_ACCELERATOR="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "SLURM gave this job 2 GPUs a node, and nvidia-smi and CUDA_VISIBLE_DEVICES show none on" in done.stderr
    asked = bash("source launch/common.sh; activate; echo $DS_ACCELERATOR", **variables, DS_ACCELERATOR="cpu")
    assert asked.stdout == "cpu\n"


def test_an_environment_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = bash("launch/local.sh run.yaml", VENV=str(tmp_path / "none"))
    assert done.returncode == 2
    assert "none, which has no bin/python; allowed: an environment's folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [("", "no CONFIG given"), ("-x run.yaml", "unknown option -x"), ("-n 0 run.yaml", "-n is 0"), ("-n two a", "two")],
)
def test_wrong_arguments_are_one_sentence(arguments: str, part: str) -> None:
    done = bash(f"launch/local.sh {arguments}", VENV=sys.prefix)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert part in done.stderr


@pytest.mark.parametrize(
    ("script", "program"),
    [
        ("launch/local.sh run.yaml", "exec image.sif deepspeed .*--module distprune train run.yaml"),
        (
            "launch/multinode.sh -t head:1 -n 2 -r 0 -p 1 run.yaml",
            "exec image.sif torchrun .*-m distprune train run.yaml",
        ),
        ("launch/multinode.sh -H hosts run.yaml", "allowed with -H: none"),
    ],
)
def test_everything_runs_in_the_container_of_the_site(tmp_path: Path, script: str, program: str) -> None:
    """A container program that prints what it is to run, and no environment outside it."""
    (tmp_path / "site.sh").write_text('DISTPRUNE_CONTAINER="container exec image.sif"\n')
    (tmp_path / "container").write_text('#!/bin/sh\ncase "$*" in *socket*) echo 29500;; *) echo "$*";; esac\n')
    (tmp_path / "container").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = bash(script, path, VENV=str(tmp_path / "none"), DISTPRUNE_SITE=str(tmp_path / "site.sh"))
    assert re.search(program, done.stdout + done.stderr), done.stderr
