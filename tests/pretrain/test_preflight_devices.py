"""What each device of a node is asked: right sums, and speeds that are computed as they should be."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pretrain.preflight import devices, files, health
from pretrain.preflight.workers import Workers
from tests.distributed import forking


def test_a_product_that_is_wrong_is_counted(monkeypatch):
    monkeypatch.setattr(devices, "WINDOW_S", {"cpu": 0.01})
    found = devices.compute(0, "cpu")
    assert found["wrong"] == 0 and found["rows"] == devices.WIDTH["cpu"] and found["tflops"] > 0
    product = torch.mm

    def wrong(a, b, out=None):
        result = product(a, b, out=out) if out is not None else product(a, b)
        result[3, 5] += 1
        result[7, 0] -= 2
        return result

    monkeypatch.setattr(torch, "mm", wrong)
    assert devices.compute(0, "cpu")["wrong"] == 2


def _ask(size: int, folder: str, change, answers) -> None:
    """In a process that has done nothing else, as a node's: its workers are forked."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    change()
    workers = Workers(size)
    told = workers.ask("all_reduce", 30, lambda index: (index, "cpu", {"file": f"{folder}/store"}, index, size, 20.0))
    workers.end()
    answers.send([(answer.value, answer.failure) for answer in told.values()])


def _answers(folder, size: int, change) -> list[tuple[float | None, str]]:
    context = forking()
    ours, theirs = context.Pipe()
    process = context.Process(target=_ask, args=(size, str(folder), change, theirs))
    process.start()
    try:
        assert ours.poll(60), "no answer"
        return ours.recv()
    finally:
        process.kill()
        process.join()


def _a_millisecond_each() -> None:
    devices._repeated = lambda values, window_s, device: 1e-3


@pytest.mark.parametrize(("size", "factor"), [(2, 1.0), (4, 1.5)])
def test_bus_bandwidth_counts_what_each_device_sends(tmp_path, size, factor):
    expected = factor * devices.BYTES["cpu"] / 1e-3 / 1e9
    assert [value for value, _ in _answers(tmp_path, size, _a_millisecond_each)] == pytest.approx([expected] * size)


def _held_up_now_and_then() -> None:
    """An all-reduce takes 1 ms, and of 108 ms the process runs for 8: the first one begins just before it is stopped."""
    clock = SimpleNamespace(ran=7.0)

    def all_reduces(values, times, device):
        clock.ran += times

    devices._all_reduces = all_reduces
    devices.time = SimpleNamespace(perf_counter=lambda: 1e-3 * (clock.ran + 100 * (clock.ran // 8)))


def test_a_first_repetition_that_is_held_up_does_not_settle_the_others(tmp_path):
    """The few that would do at its pace fit between two stops."""
    share = [devices.BYTES["cpu"] / 1e9 / value * 1e3 for value, _ in _answers(tmp_path, 2, _held_up_now_and_then)]
    assert share == pytest.approx([108 / 8] * 2, rel=0.2), "milliseconds of one, with the stops"


def _one_too_many() -> None:
    reduce = dist.all_reduce

    def wrong(values, *args, **kwargs):
        reduce(values, *args, **kwargs)
        values.view(-1)[0] += 1

    dist.all_reduce = wrong


def test_sums_that_are_wrong_are_no_bandwidth(tmp_path):
    text = f"1 of {devices.BYTES['cpu'] // 4} sums are wrong"
    assert _answers(tmp_path, 2, _one_too_many) == [(None, text)] * 2


class Nvml:
    """NVIDIA's library, as far as it is asked. `rows`: corrected, uncorrected, pending, failed."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, NVML_TEMPERATURE_GPU = 1, 0, 0
    nvmlClocksThrottleReasonHwSlowdown, nvmlClocksThrottleReasonHwThermalSlowdown = 8, 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128

    def __init__(self, rows=(0, 0, 0, 0), clocks=0, errors=0):
        self.nvmlDeviceGetRemappedRows = lambda handle: rows
        self.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: clocks
        self.nvmlDeviceGetTotalEccErrors = lambda handle, kind, counter: errors
        self.nvmlDeviceGetTemperature = lambda handle, sensor: 60
        self.nvmlDeviceGetComputeRunningProcesses = lambda handle: [SimpleNamespace(usedGpuMemory=3), SimpleNamespace(usedGpuMemory=None)]

    def nvmlDeviceGetRetiredPagesPendingStatus(self, handle):
        raise self.NVMLError


@pytest.mark.parametrize(
    ("nvml", "told"),
    [
        (Nvml(), []),
        (Nvml(rows=(5, 0, 0, 0)), []),
        (Nvml(rows=(0, 1, 1, 0)), ["GPU 0 has broken memory that waits to be remapped: drain the node and reset the GPU"]),
        (Nvml(rows=(0, 1, 0, 1)), ["GPU 0 has broken memory that could not be remapped: have it replaced"]),
        (Nvml(errors=2), ["GPU 0 has 2 uncorrected memory errors: drain the node and reset the GPU"]),
        *((Nvml(clocks=bit), ["GPU 0 is slowed down by its hardware at 60 degrees: see to its cooling and power"]) for bit in (8, 64, 128)),
        # Idle, and a limit of power that its owner has set.
        (Nvml(clocks=1 | 4), []),
    ],
)
def test_what_the_driver_says(nvml, told):
    assert health.problems(0, health._read(nvml, None)) == told
    assert health._foreign_bytes(nvml, None) == 3


def test_what_a_killed_look_has_left_behind_is_removed(tmp_path):
    name = f"{files.PROBE_NAME}.{os.uname().nodename}"
    old, new, others = tmp_path / f"{name}.old", tmp_path / f"{name}.new", tmp_path / f"{files.PROBE_NAME}.elsewhere.old"
    for path in (old, new, others):
        path.touch()
    for path in (old, others):
        os.utime(path, (time.time() - 7200,) * 2)
    files.probe_disk(tmp_path, 0)
    assert sorted(tmp_path.iterdir()) == sorted([new, others])
