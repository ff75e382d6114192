"""What `muybridge plan` says of runs, checked against figures that can be worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from muybridge.models.flops import count_parameters
from muybridge.scripts import cli, plan_measured
from muybridge.scripts.plan import read_settings
from muybridge.scripts.plan_report import number
from muybridge.scripts.plan_search import SPARE, Search
from muybridge.scripts.plan_verdict import verdict_of
from muybridge.train.exit_codes import ExitCode
from muybridge.train.gpus import GIB
from muybridge.train.memory import parameter_counts

# A 14B model as simple as can be, which one node of 80 GB GPUs does not hold.
WITHOUT_SHARING = ["+experiment=wan_14b_480p", "parallel.sequence=1", "activations.policy=block"]


@pytest.fixture(autouse=True)
def no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has been measured, these are about what is said without."""
    monkeypatch.setattr(plan_measured, "_FOLDER", tmp_path / "no results")
    monkeypatch.setenv("COLUMNS", "120")


def planned(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The figures of a plan that succeeds."""
    path = tmp_path / "plan.json"
    assert cli.main(["plan", *arguments, f"json={path}"]) == 0
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of a plan that cannot be."""
    assert cli.main(["plan", *arguments]) == ExitCode.config
    return capsys.readouterr().err


# Asked for on one node, these do not fit; on the nodes that they are meant for, they do.
@pytest.mark.parametrize(
    ("experiment", "nodes"),
    [("wan_14b_480p", 8), ("wan_14b_full", 4), ("wan2_2_a14b_two_experts", 4), ("wan_i2v", 4)],
)
def test_each_14b_experiment_has_a_plan_that_fits_80_gb_and_one_that_does_not(
    experiment: str, nodes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = planned(tmp_path, f"+experiment={experiment}", f"nodes={nodes}")
    assert facts["asked"]["fits"]
    assert facts["asked"]["peak_bytes"] <= facts["gpu"]["memory_bytes"] < 80e9 * 1.1
    assert facts["does_not_fit"]["peak_bytes"] > facts["gpu"]["memory_bytes"]
    assert "lacks" in facts["does_not_fit"]["reason"]
    said = capsys.readouterr().out
    assert "It fits" in said
    assert "does not fit" in said
    assert f"Next: muybridge submit +experiment={experiment} slurm.nodes={nodes}" in said


def test_what_does_not_fit_is_said_with_its_reason_and_what_each_change_gains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = planned(tmp_path, *WITHOUT_SHARING, "nodes=1")
    asked = facts["asked"]
    assert not asked["fits"]
    largest = sorted(asked["buckets"][0]["memory_bytes"].items(), key=lambda part: -part[1])[:2]
    assert all(name in facts["does_not_fit"]["reason"] for name, _ in largest)
    changes = {" ".join(change["settings"]): change for change in facts["changes"]}
    assert changes["parallel.sequence=8"]["fits"]
    assert changes["nodes=2"]["peak_bytes"] < asked["peak_bytes"]
    assert changes["data.access=latents data.latents=latents"]["step_seconds"] < asked["step_seconds"]
    assert all(change["peak_bytes"] < asked["peak_bytes"] for change in facts["changes"])
    best = facts["fastest_on_these_gpus"]
    assert best["fits"]
    assert best["step_seconds"] < asked["step_seconds"]
    said = capsys.readouterr().out
    assert "What was asked for lacks" in said
    assert "Next: muybridge plan +experiment=wan_14b_480p nodes=1" in said


def test_what_is_proposed_fits_when_it_is_asked_for(tmp_path: Path) -> None:
    facts = planned(tmp_path, *WITHOUT_SHARING, "nodes=1")
    for name in ("fastest_on_these_gpus", "smallest_that_fits"):
        arguments = {"nodes": "1", **dict(change.split("=") for change in facts[name]["changes"])}
        again = planned(tmp_path, *WITHOUT_SHARING, *(f"{key}={value}" for key, value in arguments.items()))
        assert again["asked"]["fits"]
        assert again["asked"]["peak_bytes"] == facts[name]["peak_bytes"]


def test_all_faults_of_the_run_and_of_its_place_come_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(
        capsys,
        "+experiment=wan_14b_480p",
        "nodes=0",
        "gpu=h10",
        "gpus_per_nod=8",
        "optimizer.lr=-1",
        "restart_minutes=-1",
    )
    assert "the configuration has 5 faults" in said
    for fault in (
        "nodes=0 must be at least 1",
        "did you mean h100",
        "restart_minutes=-1.0 must be 0 or more",
        "optimizer.lr=-1.0 must be positive",
        "gpus_per_nod is not a setting of a plan, did you mean gpus_per_node?",
    ):
        assert fault in said


def test_what_no_cluster_can_run_names_the_nearest_that_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    run = "+experiment=wan_14b_480p"
    said = refused(capsys, run, "nodes=1", "parallel.sequence=3")
    assert "parallel.sequence=3 must divide the number of processes, 8 (nearest: parallel.sequence=2, or 9" in said
    said = refused(capsys, run, "nodes=8", "parallel.sequence=64")
    assert "parallel.sequence=64 must be at most model.num_attention_heads=40" in said
    assert "(nearest: parallel.sequence=32)" in said
    said = refused(capsys, *WITHOUT_SHARING, "nodes=3")
    assert "global_batch=64 must be a multiple of 24" in said
    assert "nearest: global_batch=48, or global_batch=72, or nodes=2)" in said
    said = refused(capsys, *WITHOUT_SHARING, "nodes=32")  # ranks that would have nothing to do
    assert "nearest: global_batch=256, or parallel.sequence=4, or nodes=8)" in said
    said = refused(capsys, run, "nodes=3", "parallel.sequence=4", "global_batch=8")
    assert "micro_batch=1 x 6 groups of 4 processes" in said
    assert "or nodes=2)" in said
    said = refused(capsys, *WITHOUT_SHARING, "gpus_per_node=8", "global_batch=12")
    assert "or parallel.sequence=2, or gpus_per_node=6)" in said
    assert read_settings([*WITHOUT_SHARING, "global_batch=12", "parallel.sequence=2"])
    assert read_settings([*WITHOUT_SHARING, "global_batch=12", "gpus_per_node=6"])


def test_the_figures_of_a_step_agree_with_each_other(tmp_path: Path) -> None:
    facts = planned(tmp_path, "+experiment=wan_1_3b_480p", "price_per_gpu_hour=2", "nodes=1")
    asked = facts["asked"]
    (bucket,) = asked["buckets"]
    assert facts["parameters"] == 1418996800
    assert bucket["peak_bytes"] == pytest.approx(sum(bucket["memory_bytes"].values()), abs=8)
    assert bucket["step_seconds"] == pytest.approx(sum(bucket["seconds"].values()))
    rate = 64 * bucket["model_flops_of_a_clip"] / bucket["step_seconds"] / 8
    assert bucket["mfu"] == pytest.approx(rate / 989.4e12)
    assert bucket["executed_flops_of_a_clip"] > bucket["model_flops_of_a_clip"]  # blocks are computed again
    assert asked["price"] == pytest.approx(2 * asked["gpu_hours"])
    assert asked["samples"] == 20000 * 64
    assert asked["wall_seconds"] > 20000 * asked["step_seconds"]


def test_a_plan_is_a_table_a_file_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plans" / "small"
    buckets = "data.buckets=[{frames: 81, height: 480, width: 832}, {frames: 1, height: 480, width: 832}]"
    assert cli.main(["plan", "+experiment=wan_1_3b_480p", buckets, "data.image_share=0.2", f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert f"Wrote {out / 'plan.json'} and {out / 'plan.png'}" in said.replace("\n", " ")
    assert [one["clip"] for one in json.loads((out / "plan.json").read_text())["asked"]["buckets"]] == [
        "81x480x832",
        "1x480x832",
    ]
    with Image.open(out / "plan.png") as picture:
        assert picture.width == 1540
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert "1x480x832" in said


def test_a_lora_trains_little_and_fits_a_small_gpu(tmp_path: Path) -> None:
    cached = ["data.access=latents", "data.latents=cache"]
    facts = planned(tmp_path, "+experiment=wan_1_3b_lora", "gpus_per_node=1", "gpu=rtx_4090", *cached)
    assert facts["asked"]["fits"]
    assert facts["trained_parameters"] < 0.05 * facts["parameters"]
    assert facts["asked"]["states_bytes"]["optimizer"] == 12 * facts["trained_parameters"]


def test_sparse_attention_is_planned_by_the_tiles_it_computes(tmp_path: Path) -> None:
    settings = [*WITHOUT_SHARING, "nodes=8"]
    full, sparse = (
        planned(tmp_path, *settings, f"model.self_attention.pattern={name}")["asked"]["buckets"][0]
        for name in ("full", "radial")
    )
    assert sparse["model_flops_of_a_clip"] < 0.85 * full["model_flops_of_a_clip"]
    assert sparse["step_seconds"] < full["step_seconds"]


def test_of_an_autoencoder_only_what_is_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = planned(
        tmp_path, "+experiment=quickstart_vae", "nodes=1", "gpus_per_node=2", "out=" + str(tmp_path / "out")
    )
    assert facts["asked"]["step_seconds"] is None
    assert facts["asked"]["checkpoint_bytes"] == 16 * facts["trained_parameters"]
    said = capsys.readouterr().out
    assert "are not modelled" in said
    assert "at least at the peak" in said


def test_auto_is_planned_as_what_it_becomes(tmp_path: Path) -> None:
    found = {}
    for gpu in ("h200", "h100", "l40s"):
        facts = planned(tmp_path, "+experiment=wan_1_3b_480p", "activations.policy=auto", f"gpu={gpu}")
        assert facts["asked"]["fits"]
        found[gpu] = facts["asked"]["activations.policy"]
    assert found == {"h200": "none", "h100": "selective", "l40s": "block"}


def test_the_optimizer_on_the_host_takes_its_memory_and_its_time(tmp_path: Path) -> None:
    settings = [*WITHOUT_SHARING, "nodes=1"]
    before, after = (
        planned(tmp_path, *settings, f"deepspeed.offload_optimizer={switch}")["asked"] for switch in ("false", "true")
    )
    names = ("optimizer", "EMA")
    assert before["peak_bytes"] - after["peak_bytes"] >= sum(before["states_bytes"][name] for name in names)
    assert not set(names) & set(after["buckets"][0]["memory_bytes"])
    on_host = sum(after["states_bytes"][name] for name in names)
    assert after["host_bytes_of_a_node"] - before["host_bytes_of_a_node"] == 8 * on_host
    times = [facts["buckets"][0]["seconds"]["optimizer"] for facts in (before, after)]
    assert times[1] > 10 * times[0]


def test_muon_has_a_state_less_and_more_to_compute(tmp_path: Path) -> None:
    settings = [*WITHOUT_SHARING, "nodes=8"]
    adamw, muon = (planned(tmp_path, *settings, f"optimizer.kind={kind}")["asked"] for kind in ("adamw", "muon"))
    assert muon["states_bytes"]["optimizer"] < 0.7 * adamw["states_bytes"]["optimizer"]
    assert muon["checkpoint_bytes"] < 0.8 * adamw["checkpoint_bytes"]
    assert muon["buckets"][0]["seconds"]["optimizer"] > adamw["buckets"][0]["seconds"]["optimizer"]


def test_predictions_are_compared_with_measured_steps_and_not_changed_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["+experiment=wan_1_3b_480p"]
    without = planned(tmp_path, *settings)
    assert without["measured"] == []
    assert "no GPU result of this model to compare with" in capsys.readouterr().out
    _, config = read_settings(settings)
    step = {
        "ok": True,
        "device": "NVIDIA H200",
        "parameters": count_parameters(config.model),
        "clip": "81x480x832",
        "micro_batch": 1,
        "activations": "none",
        "zero": 1,
        "precision": "bf16",
        "seconds_per_step": 2.0,
        "peak_memory_gib": 100.0,
    }
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(plan_measured, "_FOLDER", results)
    suite = {
        "1.3B, fused": step,
        "1.3B, reference": step,
        "of another model": {**step, "parameters": 5},
        "that failed": {"ok": False},
        "on another GPU": {**step, "device": "Tesla T4"},
    }
    (results / "h200.json").write_text(json.dumps({"gpu": "NVIDIA H200", "steps": suite}))
    bench = {"480p, ours": {**step, "transformer": "ours"}, "480p, theirs": {**step, "transformer": "diffusers, cudnn"}}
    (results / "steps-h200.json").write_text(json.dumps({"environment": {}, "results": bench, "goals": []}))
    (results / "damaged.json").write_text("{")
    (results / "list.json").write_text("[1]")
    facts = planned(tmp_path, *settings)
    assert facts["asked"] == without["asked"]
    assert [(one["file"], one["name"]) for one in facts["measured"]] == [
        ("h200.json", "1.3B, fused"),
        ("steps-h200.json", "480p, ours"),
    ]
    first = facts["measured"][0]
    assert first["predicted_seconds"] == pytest.approx(1.535, rel=0.05)  # see tests/train/test_costs.py
    assert first["time_error"] == pytest.approx(first["predicted_seconds"] / 2 - 1)
    assert first["memory_error"] == pytest.approx(first["predicted_peak_gib"] / 100 - 1)
    assert f"{first['time_error']:+.1%}" in capsys.readouterr().out


def test_nothing_is_smaller_than_the_smallest_that_fits() -> None:
    place, config = read_settings([*WITHOUT_SHARING, "nodes=8"])
    search = Search(config, parameter_counts(config), place.conditions())
    smallest = search.smallest_that_fits(place.cluster())
    assert smallest is not None
    for cluster in search.clusters(place.cluster()):
        if cluster.world < smallest.cluster.world:
            best = search.least_memory(cluster)
            assert best is None or best.peak > (1 - SPARE) * 79.1 * GIB


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--help"]) == 0
    said = capsys.readouterr().out
    for name in ("nodes", "gpus_per_node", "gpu", "network_gb_per_second", "price_per_gpu_hour", "storage_gb_per_second",
                 "gpu_hours_per_failure", "restart_minutes", "json=FILE", "out=FOLDER", "h200", "rtx_4090"):  # fmt: skip
        assert name in said


def test_a_place_that_cannot_be_written_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "out=" in refused(capsys, "+experiment=wan_1_3b_480p", f"out={tmp_path / 'file' / 'below'}")


@pytest.mark.parametrize(
    "settings",
    [
        ["nodes=8", "fp8.recipe=tensorwise"],
        ["nodes=1", "fp8.recipe=tensorwise", "deepspeed=zero2", "activations.policy=selective"],
        ["nodes=1", "optimizer.kind=muon", "activations.policy=block"],
    ],
)
def test_what_a_plan_proposes_can_be_trained(settings: list[str]) -> None:
    run = ["+experiment=wan_14b_480p", "global_batch=64", *settings]
    place, config = read_settings(run)
    verdict = verdict_of(Search(config, parameter_counts(config), place.conditions()), place.cluster())
    proposed = [verdict.changes_to(costs) for costs in (verdict.fastest, verdict.smallest, verdict.too_large) if costs]
    proposed += [texts for texts, _ in verdict.changes]
    assert proposed
    for changes in proposed:
        read_settings([*run, *changes])  # a ValueError says what training refuses
    for costs in (verdict.fastest, verdict.smallest):
        assert costs is None or costs.peak <= (1 - SPARE) * costs.cluster.gpu.memory_bytes
        assert costs is None or costs.cluster.gpus_per_node == 8


def test_what_is_slow_is_said_with_what_is_faster(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["+experiment=wan_14b_480p", "activations.policy=block"]
    assert cli.main(["plan", *run, "nodes=8", "parallel.sequence=16"]) == 0
    said = capsys.readouterr().out
    assert "parallel.sequence=16 crosses nodes of 8 GPUs" in said
    assert "times as fast on the same GPUs." in said
    assert "Next: muybridge submit +experiment=wan_14b_480p activations.policy=block parallel.sequence=16 slurm" in said
    (faster,) = [line for line in said.splitlines() if line.startswith("Or, the fastest here: muybridge submit")]
    assert "parallel.sequence=16" not in faster
    assert faster.endswith("slurm.nodes=8")


def test_a_misspelt_setting_of_the_plan_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    assert "node is not a setting of a plan, did you mean nodes?" in refused(
        capsys, "+experiment=wan_14b_480p", "node=2"
    )
    assert "did you mean steps?" in refused(capsys, "+experiment=wan_14b_480p", "stps=2")


def test_numbers_are_written_out() -> None:
    figures = (0.0, 0.0123, 0.5, 12.34, 99.96, 809.6, 6290.0, 21432.4)
    assert [number(value) for value in figures] == ["0", "0.0123", "0.5", "12.3", "100", "810", "6,290", "21,432"]
