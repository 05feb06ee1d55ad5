"""GPU telemetry on scripted nodes: the values, who holds what, where the time went, and what is absent when it must be."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from serving.cli import cluster
from serving.engine import command
from serving.engine.command import EngineSpec
from serving.errors import OperatorError
from serving.fleet import gpu_exporter
from serving.fleet.endpoint import Endpoint, State
from serving.settings import load_settings
from serving.telemetry import gpu as telemetry
from serving.telemetry.gpu import FIGURES, GpuTelemetry, Holder
from serving.telemetry.nvml import driver
from serving.telemetry.nvml_scripted import GIB, NODES, Event, Figures, Process, Script, ScriptedNvml, load, read

EVERY_S = 2.0
Series = tuple[str, dict[str, str], float]


class Node:
    """A scripted node under its exporter, with a clock set by hand."""

    def __init__(self, expected: int = 0, **script: Any) -> None:
        self.now = 1000.0
        self.nvml = ScriptedNvml(Script(**{"gpus": 2, **script}), lambda: self.now)
        self.gpus = GpuTelemetry(self.nvml, lambda: self.now, expected)
        self.gpus.round()
        self._read_at, self._read = 0.0, list[Series]()

    def run(self, seconds: float, *holders: Holder, fresh: bool = True) -> Node:
        for _ in range(round(seconds / EVERY_S)):
            self.gpus.hold(holders, fresh=fresh)
            self.now += EVERY_S
            self.gpus.round()
        return self

    def series(self) -> list[Series]:
        if self._read_at != self.now:
            families = text_string_to_metric_families(self.gpus.text())
            self._read = [(s.name, s.labels, s.value) for f in families for s in f.samples]
            self._read_at = self.now
        return self._read

    def all(self, name: str, /, **labels: str) -> list[float]:
        return [v for n, own, v in self.series() if n == name and labels.items() <= own.items()]

    def one(self, name: str, /, **labels: str) -> float:
        found = self.all(name, **labels)
        assert len(found) == 1, (name, labels, found)
        return found[0]

    def seconds(self, model: str) -> dict[str, float]:
        return {
            own["state"]: round(v, 6)
            for n, own, v in self.series()
            if n == "steelyard_gpu_seconds_total" and own["model"] == model
        }


def of(model: str, *gpus: str, replica: str = "", **state: Any) -> Holder:
    return Holder(replica or f"{model}@v#1", model, "v", gpus, **state)


# -- values --------------------------------------------------------------------------------------------------------------


def test_every_figure_of_a_serving_gpu_is_what_the_script_says() -> None:
    figures = Figures(
        sm=0.42, occupancy=0.2, tensor=0.31, dram=0.63, kernel=1.0, memory_used_gib=100, power_w=500, temperature_c=61,
        memory_temperature_c=70, sm_clock_mhz=1980, pcie_tx_mib_s=2, pcie_rx_mib_s=3, nvlink_tx_mib_s=4,
        nvlink_rx_mib_s=5, throttle=("power_cap",), processes=(Process(42, 99),), ecc_corrected=7, ecc_uncorrected=1,
        remapped_correctable=2, remapped_uncorrectable=3, remap_pending=True, remap_failed=True, pcie_replays=6,
        nvlink_replays=8, recovery_action=1,
    )  # fmt: skip
    node = Node(gpus=1, figures=figures, memory_gib=140, reserved_gib=1, power_limit_w=700).run(12)
    mib = 1024 * 1024
    for name, labels, value in [
        ("up", {}, 1),
        ("info", {"driver": "580.95.05", "name": "NVIDIA H200"}, 1),
        ("sm_active_ratio", {}, 0.42),
        ("sm_occupancy_ratio", {}, 0.2),
        ("tensor_active_ratio", {}, 0.31),
        ("dram_active_ratio", {}, 0.63),
        ("kernel_active_ratio", {}, 1),
        ("memory_used_bytes", {}, 100 * GIB),
        ("memory_total_bytes", {}, 140 * GIB),
        ("memory_reserved_bytes", {}, GIB),
        ("process_memory_bytes", {"pid": "42"}, 99 * GIB),
        ("power_watts", {}, 500),
        ("power_limit_watts", {}, 700),
        ("energy_joules_total", {}, 500 * 10),  # read every ten seconds
        ("temperature_celsius", {"sensor": "gpu"}, 61),
        ("temperature_celsius", {"sensor": "memory"}, 70),
        ("clock_hertz", {"clock": "sm"}, 1980e6),
        ("clock_max_hertz", {"clock": "memory"}, 3201e6),
        ("throttled", {"reason": "power_cap"}, 1),
        ("throttled", {"reason": "hw_thermal"}, 0),
        ("throttled_seconds_total", {"reason": "power_cap"}, 10),
        ("pcie_bytes_per_second", {"direction": "tx"}, 2 * mib),
        ("pcie_bytes_per_second", {"direction": "rx"}, 3 * mib),
        ("nvlink_bytes_per_second", {"direction": "tx"}, 4 * mib),
        ("nvlink_bytes_per_second", {"direction": "rx"}, 5 * mib),
        ("pcie_errors_total", {"kind": "replay"}, 6),
        ("nvlink_errors_total", {"kind": "replay"}, 8),
        ("ecc_errors_total", {"severity": "corrected", "scope": "volatile"}, 7),
        ("ecc_errors_total", {"severity": "uncorrected", "scope": "aggregate"}, 1),
        ("remapped_rows", {"kind": "correctable"}, 2),
        ("remapped_rows", {"kind": "uncorrectable"}, 3),
        ("row_remap_pending", {}, 1),
        ("row_remap_failed", {}, 1),
        ("recovery_action", {}, 1),
        ("last_xid", {}, 0),
    ]:
        assert node.one(f"steelyard_gpu_{name}", index="0", **labels) == pytest.approx(value), name
    shown = {n for n, _, _ in node.series()}
    assert set(FIGURES) - shown == {"steelyard_gpu_xid_errors_total"}  # nothing went wrong


def test_gpm_figures_are_means_between_two_rounds() -> None:
    node = Node(figures=Figures(sm=(0.0, 1.0, 40)))
    assert node.all("steelyard_gpu_sm_active_ratio") == []  # one sample measures nothing
    node.run(20)
    assert node.one("steelyard_gpu_sm_active_ratio", index="0") == pytest.approx(0.994, abs=0.001)  # at 19 of 20 s
    node.run(20)
    assert node.one("steelyard_gpu_sm_active_ratio", index="0") == pytest.approx(0.006, abs=0.001)


def test_without_gpm_only_that_a_kernel_ran_is_known_and_pcie_is_read_the_old_way(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, telemetry.__name__):
        node = Node(gpus=4, gpm=False, figures=Figures(kernel=1.0, pcie_tx_mib_s=2, nvlink_replays=8)).run(30)
    assert node.all("steelyard_gpu_nvlink_errors_total", kind="replay") == [8] * 4
    assert node.all("steelyard_gpu_kernel_active_ratio") == [1.0] * 4
    assert node.one("steelyard_gpu_pcie_bytes_per_second", index="0", direction="tx") == 2 * 1024 * 1024
    shown = {n for n, _, _ in node.series()}
    assert not [n for n in shown if n.endswith(("sm_active_ratio", "tensor_active_ratio", "dram_active_ratio"))]
    assert [r.message for r in caplog.records if "GPM" in r.message] == [
        "NVIDIA H200 has no GPM figures: all that is known of its activity is that a kernel ran"
    ]


def test_a_user_who_may_not_read_gpm_gets_the_old_figures() -> None:
    node = Node(figures=Figures(kernel=0.9, pcie_rx_mib_s=1), unsupported=("nvmlGpmSampleGet",)).run(30)
    assert node.all("steelyard_gpu_sm_active_ratio") == []
    assert node.all("steelyard_gpu_kernel_active_ratio") == [0.9, 0.9]
    assert len(node.all("steelyard_gpu_pcie_bytes_per_second", direction="rx")) == 2


def test_what_a_product_lacks_has_no_series_and_is_not_asked_for_again() -> None:
    lacking = ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetFieldValues", "nvmlDeviceGetMemoryInfo")
    node = Node(unsupported=lacking).run(60)
    shown = {n for n, _, _ in node.series()}
    assert not shown & {"steelyard_gpu_energy_joules_total", "steelyard_gpu_ecc_errors_total"}
    assert node.all("steelyard_gpu_memory_used_bytes") == []
    assert node.all("steelyard_gpu_up") == [1.0, 1.0]
    assert [node.nvml.calls[f] for f in lacking] == [2, 4, 2]  # once per GPU, of its links too


def test_every_figure_stands_in_the_page_of_metrics() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    names = {*FIGURES, "steelyard_gpu_driver_up", "steelyard_gpu_seconds_total"}
    assert not [n for n in names if n not in page and f"`{n.removeprefix('steelyard_gpu')}" not in page]


# -- joins ---------------------------------------------------------------------------------------------------------------


def test_each_series_names_who_holds_its_gpu() -> None:
    node = Node(gpus=8).run(4, of("a", "0", "1"), of("b", "GPU-00000002"), of("c", "7", "9"))
    held = {own["index"]: own["replica"] for n, own, _ in node.series() if n == "steelyard_gpu_sm_active_ratio"}
    assert held == {"0": "a@v#1", "1": "a@v#1", "2": "b@v#1", "7": "c@v#1", "3": "", "4": "", "5": "", "6": ""}
    of_0 = {n: own.get("model") for n, own, _ in node.series() if own.get("index") == "0"}
    assert of_0 == {n: None if n.endswith("_total") else "a" for n in of_0}


def test_a_counter_goes_on_when_its_gpu_changes_hands() -> None:
    node = Node(gpus=1, events=(Event(at=9, gpu=0, xid=94, figures={"ecc_uncorrected": 2}),))
    counted: list[list[dict[str, str]]] = []
    for holders in ((of("a", "0"),), (), (of("a", "0", replica="a@v#2"),)):
        node.run(12, *holders)
        counted.append(
            [own for n, own, _ in node.series() if n.endswith(("ecc_errors_total", "throttled_seconds_total"))]
        )
    assert counted[0] == counted[1] == counted[2] != []
    assert node.one("steelyard_gpu_xid_errors_total", xid="94") == 1
    assert node.one("steelyard_gpu_ecc_errors_total", severity="uncorrected", scope="volatile") == 2


def test_an_engine_counts_gpus_as_ray_and_nvml_do() -> None:
    spec = EngineSpec(model="m", version="v", kind="vllm", weights="/w", served_names=["m"])
    made = command.build(
        spec, host="h", port=1, secret="s", mark="m", parent_pid=1, environ={"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    )
    assert made.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_several_holders_of_one_gpu_are_all_named_and_share_its_time() -> None:
    node = Node(gpus=1).run(10, of("a", "0"), of("b", "0", replica="b@v#2"))
    [labels] = [own for n, own, _ in node.series() if n == "steelyard_gpu_up"]
    assert (labels["model"], labels["version"], labels["replica"]) == ("a,b", "v", "a@v#1,b@v#2")
    assert node.seconds("a") == node.seconds("b") == {"reserved": 5, "idle": 5}
    assert node.gpus.busy() == {}  # whose work it is cannot be told


def test_mig_instances_are_held_one_by_one_and_count_as_their_share() -> None:
    node = Node(gpus=2, mig=((7, 1), (3, 2)), figures=Figures(sm=0.5, kernel=1.0))
    node.run(14, of("a", "1", running=1), of("b", "MIG-00000001-0007", starting=True))
    held = {(own["index"], own["mig"]): own["model"] for n, own, _ in node.series() if n == "steelyard_gpu_up"}
    assert held == {
        **{("0", ""): "", ("0", "7"): "", ("0", "3"): "a"},
        **{("1", ""): "", ("1", "7"): "b", ("1", "3"): ""},
    }
    assert node.all("steelyard_gpu_sm_active_ratio", mig="") == []
    assert node.one("steelyard_gpu_kernel_active_ratio", model="a") == 1.0
    assert len(node.all("steelyard_gpu_power_watts")) == 2  # of the whole GPUs alone
    assert node.seconds("a") == {"reserved": 4, "busy": 4}
    assert node.seconds("b") == {"reserved": 2, "loading": 2}
    assert node.seconds("") == {"free": 6}


# -- where the time goes -----------------------------------------------------------------------------------------------


def test_gpu_seconds_go_to_loading_then_idle_then_busy_and_to_nobody_when_free() -> None:
    node = Node(gpus=4, figures=Figures(sm=0.5))
    node.run(10, of("a", "0", "1", starting=True))
    node.run(20, of("a", "0", "1"))
    node.run(30, of("a", "0", "1", running=5))
    assert node.seconds("a") == {"reserved": 120, "loading": 20, "idle": 40, "busy": 60}
    assert node.seconds("") == {"free": 120}
    node.run(10)
    assert node.seconds("a")["reserved"] == 120
    assert node.seconds("") == {"free": 160}


HELD = st.builds(
    lambda model, gpus, starting, running: of(model, *gpus, starting=starting, running=running),
    *(st.sampled_from("ab"), st.lists(st.sampled_from("0123"), unique=True), st.booleans(), st.integers(0, 2)),
)


@given(st.lists(st.tuples(st.lists(HELD, max_size=3), st.booleans()), max_size=6), st.booleans())
@settings(max_examples=15, deadline=None)
def test_no_second_of_a_gpu_is_lost_or_counted_twice(steps: list[tuple[list[Holder], bool]], lost: bool) -> None:
    faults = (Event(at=4, gpu=2, lost=True), Event(at=9, gpu=0, lost=True)) if lost else ()
    node = Node(gpus=3, figures=Figures(sm=(0.0, 0.1, 8)), events=faults)
    for holders, fresh in steps:
        node.run(EVERY_S, *holders, fresh=fresh)
    total = node.seconds("").get("free", 0.0)
    for model in "ab":
        spent = node.seconds(model)
        total += spent.get("reserved", 0.0)
        assert spent.pop("reserved", 0.0) == pytest.approx(sum(spent.values()), abs=1e-5)
    assert total == pytest.approx(3 * EVERY_S * len(steps), abs=1e-5)


def test_an_engine_that_has_requests_while_its_gpu_rests_is_not_busy() -> None:
    node = Node(gpus=1, figures=Figures(sm=0.0, kernel=1.0)).run(10, of("a", "0", running=9))
    assert node.seconds("a") == {"reserved": 10, "idle": 10}


def test_without_gpm_the_engine_says_whether_it_is_busy() -> None:
    node = Node(gpus=1, gpm=False, figures=Figures(kernel=1.0)).run(10, of("a", "0", running=1)).run(10, of("a", "0"))
    assert node.seconds("a") == {"reserved": 20, "busy": 10, "idle": 10}


def test_when_nobody_says_what_runs_the_gpu_does() -> None:
    node = Node(gpus=2, figures=Figures(sm=0.5), events=(Event(at=0, gpu=1, figures={"sm": 0.0}),)).run(2)
    node.run(10, of("a", "0"), of("b", "1", running=4), fresh=False)
    assert (node.seconds("a"), node.seconds("b")) == ({"reserved": 10, "busy": 10}, {"reserved": 10, "idle": 10})


def test_the_policy_hears_how_much_each_replicas_gpus_worked() -> None:
    node = Node(gpus=3, figures=Figures(sm=0.5), events=(Event(at=0, gpu=1, figures={"sm": 0.1}),))
    assert node.gpus.busy() == {}
    assert node.run(4, of("a", "0", "1"), of("b", "1"), of("c", "2")).gpus.busy() == {"a@v#1": 0.5, "c@v#1": 0.5}
    assert node.run(4, of("a", "0", "1")).gpus.busy() == {"a@v#1": 0.3}
    assert Node(gpus=1, gpm=False, figures=Figures(kernel=0.4)).run(4, of("a", "0")).gpus.busy() == {"a@v#1": 0.4}


# -- faults --------------------------------------------------------------------------------------------------------------


def test_a_lost_gpu_is_down_is_still_paid_for_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    faults = (Event(at=10, gpu=1, xid=79, lost=True), Event(at=50, gpu=1, lost=False))
    node = Node(gpus=3, figures=Figures(sm=0.5), events=faults)
    holders = of("a", "1", running=1), of("b", "2", running=1)
    node.run(8, *holders)
    node.run(4, *holders)
    assert (node.one("steelyard_gpu_up", index="1"), node.one("steelyard_gpu_up", index="2")) == (0, 1)
    assert node.one("steelyard_gpu_xid_errors_total", index="1", xid="79") == 1
    assert node.one("steelyard_gpu_last_xid", index="1") == 79
    assert node.all("steelyard_gpu_power_watts", index="1") == []
    assert "has fallen off the bus" in caplog.text and caplog.text.count("does not answer any more") == 1
    node.run(30, *holders)  # the driver counts two GPUs now, and 2 is 2 all the same
    assert node.one("steelyard_gpu_up", index="1", model="a") == 0
    assert node.one("steelyard_gpu_sm_active_ratio", index="2", model="b") == 0.5
    assert len(node.all("steelyard_gpu_up")) == 3
    assert node.seconds("a") == {"reserved": 42, "busy": 8, "idle": 34}
    node.run(60, *holders)
    assert node.one("steelyard_gpu_sm_active_ratio", index="1", model="a") == 0.5
    assert node.one("steelyard_gpu_last_xid", index="1") == 79
    assert caplog.text.count("does not answer any more") == 1


@pytest.mark.parametrize("counted", [True, False], ids=["refused", "left out"])
def test_a_gpu_that_was_lost_before_the_exporter_began_keeps_its_place(
    counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if counted:  # the driver has it in its count and refuses it by index
        monkeypatch.setattr(ScriptedNvml, "nvmlDeviceGetCount", lambda nvml: len(nvml._gpus))
        monkeypatch.setattr(ScriptedNvml, "nvmlDeviceGetHandleByIndex", lambda nvml, i: nvml._gpus[i].handle)
    faults = (Event(at=0, gpu=1, lost=True), Event(at=50, gpu=1, lost=False))
    node = Node(expected=0 if counted else 4, gpus=4, figures=Figures(sm=0.5), events=faults)
    node.run(10, of("a", "2"), of("b", "1"))
    assert {own["index"]: v for n, own, v in node.series() if n == "steelyard_gpu_up"} == {
        **{"0": 1, "2": 1, "3": 1},
        "1": 0,
    }
    assert node.one("steelyard_gpu_sm_active_ratio", model="a", index="2") == 0.5
    assert node.gpus.resolve(["3"])[0].startswith("GPU-00000003") and node.gpus.resolve(["1"]) == []
    node.run(200, of("a", "2"), of("b", "1"))
    assert node.all("steelyard_gpu_up") == [1] * 4
    assert node.one("steelyard_gpu_sm_active_ratio", model="b", index="1") == 0.5


def test_a_mig_instance_keeps_its_number_when_a_gpu_was_away() -> None:
    faults = (Event(at=10, gpu=0, lost=True), Event(at=50, gpu=0, lost=False))
    node = Node(expected=4, gpus=2, mig=((7, 1), (3, 2)), events=faults)
    before = node.gpus.resolve(["0", "1", "2", "3"])
    node.run(40)
    assert node.gpus.resolve(["0", "1", "2", "3"]) == before
    node.run(200)
    assert node.gpus.resolve(["0", "1", "2", "3"]) == before
    assert len(set(before)) == 4 and node.all("steelyard_gpu_up") == [1] * 6


def test_a_driver_that_restarts_is_found_again(caplog: pytest.LogCaptureFixture) -> None:
    node = Node(events=(Event(at=5, driver=False), Event(at=40, driver=True)))
    with caplog.at_level(logging.INFO, telemetry.__name__):
        node.run(20, of("a", "0"))
        assert node.one("steelyard_gpu_driver_up") == 0 and node.all("steelyard_gpu_up") == [0, 0]
        assert node.one("steelyard_gpu_up", model="a") == 0
        node.run(100, of("a", "0"))
    assert node.one("steelyard_gpu_driver_up") == 1 and node.all("steelyard_gpu_up") == [1, 1]
    assert caplog.text.count("does not answer") == caplog.text.count("is back") == 1
    assert node.seconds("a")["reserved"] == 120


def test_a_call_that_hangs_leaves_no_value_standing() -> None:
    node = Node().run(10, of("a", "0"))
    node.now += telemetry.STALE_S + 1  # no round came back
    assert node.all("steelyard_gpu_up") == [0, 0]
    assert not node.all("steelyard_gpu_sm_active_ratio") and not node.gpus.busy()
    node.run(2, of("a", "0"))
    assert node.all("steelyard_gpu_up") == [1, 1]


def test_a_machine_without_a_driver_has_no_gpu_series_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    node = Node(events=(Event(at=0, driver=False),)).run(100)
    assert {n for n, _, _ in node.series() if n.startswith("steelyard_gpu")} == {"steelyard_gpu_driver_up"}
    assert node.one("steelyard_gpu_driver_up") == 0
    assert len(caplog.records) == 1
    real = GpuTelemetry(driver())  # this machine's own, whatever it has
    real.round()
    real.text()


def test_samples_of_the_driver_are_given_back() -> None:
    node = Node(gpus=2, events=(Event(at=100, driver=False), Event(at=120, driver=True))).run(300)
    assert node.nvml.calls["nvmlGpmSampleAlloc"] - node.nvml.calls["nvmlGpmSampleFree"] == 4  # two for each GPU


# -- who may see it ------------------------------------------------------------------------------------------------------


async def test_the_exporter_answers_whoever_has_the_cluster_secret_and_nobody_else() -> None:
    node = Node().run(4, of("a", "0"))
    url, runner = await gpu_exporter.listen("127.0.0.1", "secret", node.gpus.text)
    try:
        async with aiohttp.ClientSession() as http:
            for headers in ({}, {"x-steelyard-secret": "wrong"}):
                async with http.get(url, headers=headers) as refused:
                    assert refused.status == 401 and "steelyard_gpu" not in await refused.text()
            async with http.get(url, headers={"x-steelyard-secret": "secret"}) as page:
                assert page.status == 200 and 'model="a"' in await page.text()
            async with http.post(url, headers={"x-steelyard-secret": "secret"}) as refused:
                assert refused.status == 405
    finally:
        await runner.cleanup()


def test_a_replica_loads_until_it_is_ready() -> None:
    e = Endpoint(id="m@v#1", model="m", version="v", url="", state=State.STARTING, slots=1, gpus=("3",), in_flight=2)
    assert gpu_exporter.holder(e) == Holder("m@v#1", "m", "v", ("3",), starting=True, running=2)
    assert not gpu_exporter.holder(msgspec.structs.replace(e, state=State.READY)).starting


# -- the script ----------------------------------------------------------------------------------------------------------


def test_a_script_is_a_file_or_a_known_node(tmp_path: Path) -> None:
    assert read("h200x8").units == 8 and read("h200x8-mig").units == 40 and not read("a100x8").gpm
    file = tmp_path / "node.yaml"
    file.write_text("gpus: 1\nfigures: {sm: [0, 1, 60]}\nevents: [{at: 3, figures: {power_w: 700}}]\n")
    assert load(str(file)) is not None and read(str(file)).figures.sm == (0, 1, 60)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus: many", "gpus"),
        ("gpu: 8", "gpu"),
        ("events: [{at: 1, figures: {sn: 1}}]", "sn"),
        ("events: [{at: 1, gpu: 8}]", "GPU 8"),
        ("a: [", "node.yaml"),
        (None, "No such file"),
    ],
)
def test_a_bad_script_is_refused_with_its_name(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "node.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(OperatorError, match=said) as refused:
        read(str(file))
    assert str(file) in str(refused.value)


def test_scripted_gpus_are_for_simulated_engines_alone() -> None:
    assert cluster.gpus(load_settings(), "gpu") is None and cluster.gpus(load_settings(), "sim") == 0
    scripted = load_settings(nvml_script="h200x8")
    assert cluster.gpus(scripted, "sim") == 8
    for profile in ("cpu", "gpu"):
        with pytest.raises(OperatorError, match="profile sim"):
            cluster.gpus(scripted, profile)


def test_the_driver_has_every_function_that_the_script_plays() -> None:
    played = {n for n in vars(ScriptedNvml) if n.startswith("nvml")}
    assert len(played) > 25 and all(callable(getattr(driver(), n)) for n in played)


def test_a_round_of_eight_gpus_costs_little() -> None:
    """Our own part of it: less than 1 % of a core, with room for a slow machine and the driver's part."""
    node = Node(gpus=8, figures=NODES["h200x8"].figures).run(20)
    began = time.process_time()
    node.run(100, *(of("m", str(i), replica=f"m#{i}") for i in range(8)))
    assert (time.process_time() - began) / 50 < 0.01 * EVERY_S
