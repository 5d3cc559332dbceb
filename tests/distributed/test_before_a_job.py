"""What is done on a login node, and what is checked on the nodes, before a job is paid for."""

import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file
from transformers import AutoModel

from distprune import dist
from distprune.commands import doctor
from distprune.config import Config
from distprune.pruning.scores import Magnitude
from tests.distributed.engines import write_model
from tests.distributed.processes import BIN, start
from tests.distributed.runs import TAUGHT, run_command
from tests.world import Worlds

CHECKS = ["versions", "classes", "devices", "network", "shared disk", "free disk", "locks", "compiler", "hub", "wandb"]


@pytest.mark.slow
def test_prepare_leaves_nothing_to_fetch_or_compile(world: Worlds, task: Path, tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    done = start([BIN / "distprune", "prepare", task / "run.yaml", *TAUGHT], **cache)
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines[:4]] == ["model", "teacher", "data", "code"]
    assert "96 training and 61 validation examples" in done.stdout
    assert list((tmp_path / "cache").glob("distprune-native-*/*.so"))
    other = write_model(tmp_path / "other", intermediate_size=12)
    turned = write_model(tmp_path / "turned", id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    headless = write_model(tmp_path / "headless")
    AutoModel.from_pretrained(headless).save_pretrained(headless)
    for overrides, part in (
        ("pruning.weights_of=./nowhere", "model path './nowhere' is not a directory"),
        (f"pruning.weights_of={other}", "has shape"),
        (f"teacher.path={other} distillation.hidden=1", "the student has hidden states of 16 and the teacher"),
        (f"model.path={turned} task.labels=[no,yes]", "labels are in the order"),
        (f"teacher.path={headless}", "lacks weights of a BertForSequenceClassification"),
        ("pruning.structure=7:9", "which 7:9 cannot express"),
        ("pruning.include=[nothing]", "'nothing' matches no parameter"),
        ("train.epochs=1e39", "optimizer steps; allowed: up to 99,999,999"),
        ("train.batch_size=1000", "there are only 96 training examples"),
    ):
        ((status, said),) = world(1).run(run_command, "prepare", task / "run.yaml", *TAUGHT, *overrides.split())
        assert (status, part in said) == (2, True), said


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_doctor_says_a_line_for_each_check(world: Worlds, size: int, tmp_path: Path) -> None:
    (status, said), *_ = world(size).run(run_command, "doctor", f"train.output={tmp_path}/runs/mine")
    lines = [line for line in said.splitlines() if re.match(r"ok  |FAIL", line)]
    assert [re.split(r"[ :]+", line, maxsplit=1)[1].split(":")[0] for line in lines] == CHECKS
    bad = [line for line in lines if line.startswith("FAIL") and "free disk" not in line]
    assert not bad
    assert f"devices: {size} ranks on 1 nodes (" in said
    assert ("network: there is one rank alone" in said) == (size == 1)
    assert status == (2 if "FAIL" in said else 0)
    assert not list((tmp_path / "runs").iterdir()), "nothing is left over"


@pytest.mark.slow
def test_doctor_says_what_to_do(tmp_path: Path) -> None:
    options = [f"train.output={tmp_path}/runs/mine", "wandb.mode=online"]
    done = start(
        [BIN / "distprune", "doctor", *options], WANDB_BASE_URL="http://no.such.host.invalid", HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 2
    assert (
        "FAIL  wandb: rank 0 (1 of 1): http://no.such.host.invalid is not reached; set wandb.mode=offline"
        in done.stdout
    )
    assert re.search(r"distprune: error: \d of 10 checks failed: .*wandb; see the lines above", done.stderr)


class Mine(Magnitude):
    """A score of another package."""


def found_with_own_folder(folder: Path) -> Any:
    """Look for a shared disk where each rank has a folder of its own. Collective."""
    return doctor._shared(folder / str(dist.detect().rank))


def found_with_other_versions() -> Any:
    """Compare versions where rank 1 has another one of each package. Collective."""
    with patch.object(doctor, "version", lambda name: f"{name}-{dist.detect().rank}"):
        return doctor._versions()


def found_with_a_score_of_its_own(score: str) -> Any:
    """Look for a score whose module is another one on rank 1. Collective."""
    config = Config()
    config.pruning.score = score
    with patch.object(doctor, "hashes_of_modules", lambda *_: [f"of rank {dist.detect().rank}"]):
        return doctor._classes(config)


def test_a_class_that_is_not_there_or_another_one_on_another_node_is_seen(world: Worlds) -> None:
    for found in world(2).run(found_with_a_score_of_its_own, "nowhere:Score"):
        assert not found.good
        assert "pruning.score 'nowhere:Score' cannot be imported" in found.text
    first, second = world(2).run(found_with_a_score_of_its_own, f"{__name__}:Mine")
    assert first == (True, f"text_classification, {__name__}:Mine", "")
    assert "are not those of rank 0" in second.text


def test_a_disk_that_is_not_shared_and_another_version_are_seen(world: Worlds, tmp_path: Path) -> None:
    first, second = world(2).run(found_with_own_folder, tmp_path)
    assert first.good
    assert not second.good
    assert "is another one on all nodes" in second.text
    first, second = world(2).run(found_with_other_versions)
    assert first.good
    assert not second.good
    assert "torch torch-1 and not torch-0" in second.text


def test_a_folder_that_cannot_be_locked_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file has none: " in doctor._locks(tmp_path / "file").text


def test_a_disk_must_hold_what_a_run_of_the_model_writes(tmp_path: Path) -> None:
    config = Config()
    config.model.path = str(write_model(tmp_path / "model"))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    weights = sum(each.numel() for each in tensors.values())
    assert doctor._needed_gib(config) * 2**30 == weights * (12 * 4 + 4)
    config.checkpoint.keep, config.train.select = 5, "best"
    assert doctor._needed_gib(config) * 2**30 == weights * (12 * 7 + 3 * 4)
    with patch("shutil.disk_usage", return_value=SimpleNamespace(free=weights)):
        found = doctor._free(tmp_path, config)
    assert not found.good
    assert found.advice.startswith("free 0 GiB: a checkpoint takes 12 bytes a weight")


@pytest.mark.parametrize(("hub", "path", "needed"), [(None, ".", False), ("glue", ".", True), (None, "a/model", True)])
def test_a_job_of_local_files_needs_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: str | None, path: str, needed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor, "_reaches", lambda host: False)
    config = Config()
    config.model.path, config.teacher.path, config.task.hub = path, str(tmp_path), hub
    assert doctor._hub(config).good == (not needed)


class Refusing(BaseHTTPRequestHandler):
    """A server that answers, if only with an error."""

    def do_GET(self) -> None:
        self.send_error(401)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_of_ones_own_is_reached_at_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.wandb.mode = "online"
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        assert doctor._wandb(config).good
        server.shutdown()
    assert not doctor._wandb(config).good


@pytest.mark.parametrize(("cores", "good"), [(1, False), (8, True)])
def test_a_rank_on_a_gpu_with_one_core_is_told(monkeypatch: pytest.MonkeyPatch, cores: int, good: bool) -> None:
    card = SimpleNamespace(name="a card", total_memory=80 << 30)
    monkeypatch.setattr(dist, "on_gpu", lambda: True)
    monkeypatch.setattr(dist, "gather", lambda items: items)
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda process: set(range(cores)))
    found = doctor._devices()
    assert found.good == good
    assert ("1 core, " in found.text) == (not good)
