"""The doctor's findings on machines that no laboratory has: each test changes one thing of a healthy one."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serving.cli import doctor
from serving.cli.doctor import FAIL, GIB, OK, WARN, Finding, Machine, Wanted
from tests.stack import ROOT

FILE = ROOT / "serving" / "cli" / "doctor.py"
GPU_QUERY = f"nvidia-smi --query-gpu={','.join(doctor._GPU_FIELDS)} --format=csv,noheader,nounits"
ROWS_QUERY = (
    "nvidia-smi --query-remapped-rows=gpu_uuid,remapped_rows.pending,remapped_rows.failure --format=csv,noheader"
)
FABRIC_QUERY = "nvidia-smi --query-gpu=index,fabric.state,fabric.status --format=csv,noheader"
XIDS = "journalctl -k -b -q --no-pager -o short-iso -n 200 --grep NVRM: Xid"
H100 = "{i}, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 4, Disabled, Enabled, Enabled, 0, Default"
TCP = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


class Told(Machine):
    """A machine that is what it is told to be."""

    def __init__(self) -> None:
        self.files = {
            "/etc/os-release": 'PRETTY_NAME="Ubuntu 24.04"\n',
            "/proc/self/mounts": "/dev/nvme0n1p1 / ext4 rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n",
            "/proc/sys/fs/nr_open": "1073741816\n",
            "/proc/sys/kernel/pid_max": "4194304\n",
            "/proc/swaps": "Filename Type Size Used Priority\n",
            "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
            "/proc/net/tcp": TCP,
        }
        self.paths = {"/", "/run/systemd/system", "/var/lib", "/var/cache", "/opt", "/dev/shm"}
        self.lists: dict[str, list[str]] = {}
        self.links: dict[str, str] = {}
        self.programs = {"systemctl", "cc"}
        self.answers: dict[str, tuple[int, str]] = {
            "timedatectl show -p NTPSynchronized --value": (0, "yes"),
            "python3.11": (0, json.dumps({"version": [3, 11, 9], "venv": True, "header": True})),
        }
        self.space = {"/": (500 * GIB, 900 * GIB), "/dev/shm": (60 * GIB, 64 * GIB)}
        self.kernel = ("Linux", "6.8.0-60-generic", "x86_64")
        self.libc = "glibc 2.39"
        self.names = {"gpu-01": ["10.0.0.11"]}
        self.own = {"10.0.0.11"}
        self.open: set[tuple[str, int]] = set()
        self.clock, self.date = 1000.0, None

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def exists(self, path: str) -> bool:
        return path in self.paths or path in self.files

    def listing(self, path: str) -> list[str]:
        return self.lists.get(path, [])

    def link(self, path: str) -> str:
        return self.links.get(path, "")

    def run(self, *argv: str) -> tuple[int, str] | None:
        return self.answers.get(" ".join(argv)) or self.answers.get(argv[0])

    def which(self, program: str) -> str | None:
        return f"/usr/bin/{program}" if program in self.programs else None

    def uname(self) -> tuple[str, str, str]:
        return self.kernel

    def glibc(self) -> str:
        return self.libc

    def disk(self, path: str) -> tuple[int, int] | None:
        return self.space[max((p for p in self.space if path.startswith(p)), key=len)]

    def device(self, path: str) -> str:
        return "8:1"

    def hostname(self) -> str:
        return "gpu-01"

    def resolve(self, name: str) -> list[str]:
        return self.names.get(name, [])

    def can_bind(self, address: str) -> bool:
        return address in self.own

    def reaches(self, host: str, port: int) -> bool:
        return (host, port) in self.open

    def http_date(self, url: str) -> float | None:
        return self.date

    def time(self) -> float:
        return self.clock


def eight_gpus() -> Told:
    m = Told()
    slots = [f"0000:{i:02x}:00.0" for i in range(8)]
    m.lists |= {"/sys/bus/pci/devices": slots, "/dev": ["nvidia-nvswitch0", "nvidia0"]}
    for slot in slots:
        m.files |= {
            f"/sys/bus/pci/devices/{slot}/vendor": "0x10de\n",
            f"/sys/bus/pci/devices/{slot}/class": "0x030200\n",
        }
    m.paths |= {"/dev/nvidia-uvm"}
    m.answers |= {
        GPU_QUERY: (0, "\n".join(H100.format(i=i) for i in range(8))),
        ROWS_QUERY: (0, "\n".join(f"GPU-{i}, No, No" for i in range(8))),
        FABRIC_QUERY: (0, "\n".join(f"{i}, Completed, Success" for i in range(8))),
        "nvidia-smi topo -m": (0, topology()),
    }
    return m


def topology(*missing: tuple[int, int], by: str = "PHB") -> str:
    lines = ["\t" + "\t".join(f"\x1b[4mGPU{i}\x1b[0m" for i in range(8)) + "\tCPU Affinity"]
    for a in range(8):
        row = [" X " if a == b else by if (min(a, b), max(a, b)) in missing else "NV18" for b in range(8)]
        lines.append(f"GPU{a}\t" + "\t".join(row) + "\t0-47")
    return "\n".join(lines)


def worker(**given: object) -> Wanted:
    return Wanted(role="worker", address="10.0.0.11", **given)  # type: ignore[arg-type]


def of(check: str, found: list[Finding]) -> Finding:
    return next(f for f in found if f.check == check)


def odd(found: list[Finding]) -> list[Finding]:
    return [f for f in found if f.level != OK]


def test_a_healthy_cpu_machine_has_no_odd_finding_and_one_line_about_gpus():
    found = doctor.examine(worker(now=999.5), Told())
    assert odd(found) == []
    assert [f.what for f in found if f.check == "gpu"] == ["no GPU: CPU profile"]


def test_a_healthy_eight_gpu_machine_has_no_odd_finding():
    found = doctor.examine(worker(now=999.5), eight_gpus())
    assert odd(found) == []
    assert of("gpu", found).what == "8x NVIDIA H100 80GB HBM3 80 GiB"
    assert of("nvlink", found).what == "every pair of 8 GPUs has NV18"
    assert of("fabric", found).what == "NVSwitch fabric is up"


@pytest.mark.parametrize(
    ("driver", "level"), [("580.65.06", OK), ("581.15", OK), ("575.57.08", FAIL), ("580.60.01", FAIL), ("535.1", FAIL)]
)
def test_driver_floor_is_the_first_one_of_the_locked_cuda(driver, level):
    m = eight_gpus()
    m.answers[GPU_QUERY] = (0, H100.format(i=0).replace("580.95.05", driver))
    assert of("driver", doctor.check_gpus(worker(), m)).level == level


def test_the_driver_floor_follows_the_locked_torch():
    lock = (ROOT / "requirements" / "gpu.lock").read_text()
    assert re.search(r"^torch==2\.13\.", lock, re.MULTILINE), "another torch: look its CUDA up, and DRIVER with it"
    assert re.search(r"^cuda-toolkit==13\.0\.", lock, re.MULTILINE), "another CUDA: its release notes tell the driver"


def test_cards_without_a_driver_fail_with_the_driver_to_install():
    m = eight_gpus()
    del m.answers[GPU_QUERY]
    finding = of("gpu", doctor.check_gpus(worker(), m))
    assert finding.level == FAIL and "8 NVIDIA card(s)" in finding.what and "580.65.6" in finding.fix


def test_profile_gpu_without_a_card_fails_on_a_worker_and_warns_on_a_head():
    assert of("gpu", doctor.check_gpus(worker(profile="gpu"), Told())).level == FAIL
    assert of("gpu", doctor.check_gpus(Wanted(role="head", profile="gpu"), Told())).level == WARN


def test_a_card_that_does_not_answer_fails():
    m = eight_gpus()
    m.answers[GPU_QUERY] = (0, "\n".join(H100.format(i=i) for i in range(7)))
    assert "1 more on the PCI bus" in of("gpu", doctor.check_gpus(worker(), m)).what


@pytest.mark.parametrize(
    ("change", "check", "level"),
    [
        (("Disabled, Enabled, Enabled", "Enabled, Enabled, Enabled"), "mig", FAIL),
        (("Disabled, Enabled, Enabled", "Disabled, Disabled, Enabled"), "persistence", WARN),
        (("Enabled, Enabled, 0", "Enabled, Disabled, 0"), "ecc", WARN),
        ((", 0, Default", ", 3, Default"), "ecc", FAIL),
        (("Default", "Exclusive_Process"), "compute-mode", FAIL),
        (("81559, 4,", "81559, 70000,"), "memory", WARN),
    ],
)
def test_gpu_modes(change, check, level):
    m = eight_gpus()
    m.answers[GPU_QUERY] = (0, "\n".join(H100.format(i=i).replace(*change) for i in range(8)))
    finding = of(check, doctor.check_gpus(worker(), m))
    assert finding.level == level and finding.fix


def test_remapped_rows_and_xids_are_told():
    m = eight_gpus()
    m.answers[ROWS_QUERY] = (0, "GPU-0, No, No\nGPU-1, Yes, No\nGPU-2, No, Yes")
    m.answers[XIDS] = (0, "t kernel: NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.")
    found = doctor.check_gpus(worker(), m)
    assert [(f.level, f.what) for f in found if f.check == "rows"] == [
        (FAIL, "row remapping failed: GPU 2"),
        (WARN, "row remapping waits for a reset: GPU 1"),
    ]
    assert "Xid 79 (1x)" in of("xid", found).what


def test_a_missing_nvlink_names_the_pair():
    m = eight_gpus()
    m.answers["nvidia-smi topo -m"] = (0, topology((2, 5)))
    finding = of("nvlink", doctor.check_gpus(worker(), m))
    assert finding.level == FAIL and "GPU2-GPU5 (PHB)" in finding.what


def test_gpus_without_nvlink_warn_only():
    m = eight_gpus()
    m.answers["nvidia-smi topo -m"] = (0, topology(*((a, b) for a in range(8) for b in range(a + 1, 8))))
    assert of("nvlink", doctor.check_gpus(worker(), m)).level == WARN


def test_nvswitches_without_a_fabric_fail():
    m = eight_gpus()
    m.answers[FABRIC_QUERY] = (0, "0, In Progress, N/A\n1, Completed, Success")
    assert "GPU 0" in of("fabric", doctor.check_gpus(worker(), m)).what
    del m.answers[FABRIC_QUERY]
    assert of("fabric", doctor.check_gpus(worker(), m)).level == FAIL


def test_cuda_needs_its_memory_device_before_the_unit_starts():
    m = eight_gpus()
    m.paths.remove("/dev/nvidia-uvm")
    assert of("uvm", doctor.check_gpus(worker(), m)).level == FAIL
    m.paths.add("/usr/bin/nvidia-modprobe")
    assert of("uvm", doctor.check_gpus(worker(), m)).level == OK


@pytest.mark.parametrize(
    ("kernel", "level"),
    [
        (("Linux", "5.15.0", "x86_64"), OK),
        (("Linux", "4.15.0", "x86_64"), FAIL),
        (("Linux", "6.1.0", "aarch64"), FAIL),
        (("Darwin", "23.0", "arm64"), FAIL),
    ],
)
def test_os(kernel, level):
    m = Told()
    m.kernel = kernel
    assert doctor.check_os(worker(), m)[0].level == level


@pytest.mark.parametrize(("libc", "level"), [("glibc 2.28", OK), ("glibc 2.17", FAIL), ("", FAIL)])
def test_glibc(libc, level):
    m = Told()
    m.libc = libc
    assert doctor.check_glibc(worker(), m)[0].level == level


def test_no_systemd_fails_unless_the_node_is_no_unit():
    m = Told()
    m.paths.remove("/run/systemd/system")
    assert doctor.check_systemd(worker(), m)[0].level == FAIL
    assert doctor.check_systemd(worker(systemd=False), m) == []


@pytest.mark.parametrize(
    "facts",
    [
        None,
        {"version": [3, 12, 1], "venv": True, "header": True},
        {"version": [3, 11, 9], "venv": False, "header": True},
    ],
)
def test_an_unfit_python_names_the_package(facts):
    m = Told()
    m.answers["python3.11"] = (0, json.dumps(facts)) if facts else (127, "not found")
    finding = doctor.check_python(worker(), m)[0]
    assert finding.level == FAIL and "python3.11-venv" in finding.fix


def test_gpu_machines_need_a_compiler():
    m = eight_gpus()
    m.programs.remove("cc")
    assert "no C compiler" in of("compiler", doctor.check_python(worker(), m)).what


def test_nothing_of_gpus_fails_a_head_that_has_none():
    m, head = Told(), Wanted(role="head", profile="gpu")
    m.programs.discard("cc")
    m.answers["python3.11"] = (0, json.dumps({"version": [3, 11, 9], "venv": True, "header": False}))
    assert not [f for f in doctor.check_python(head, m) + doctor.check_gpus(head, m) if f.level == FAIL]
    assert "Python.h" in of("compiler", doctor.check_python(worker(profile="gpu"), m)).what


@pytest.mark.parametrize(
    ("facts", "level"),
    [
        ({"version": [3, 11, 9], "ray": "2.60.0", "vllm": "0.32.0", "base": "/usr"}, OK),
        ({"version": [3, 11, 9], "ray": "2.59.0", "vllm": "0.32.0", "base": "/usr"}, FAIL),
        ({"version": [3, 11, 9], "ray": "2.60.0", "vllm": "", "base": "/usr"}, FAIL),
        ({"version": [3, 11, 9], "ray": "2.60.0", "vllm": "0.32.0", "base": "/root/.pyenv/versions/3.11"}, FAIL),
    ],
)
def test_a_ready_environment_must_fit_the_lock_file(facts, level):
    m = Told()
    m.answers["/srv/venv/bin/python"] = (0, json.dumps(facts))
    assert doctor.check_python(worker(venv="/srv/venv", ray="2.60.0"), m)[0].level == level


def test_an_address_of_another_machine_fails():
    found = doctor.check_address(worker()._replace(address="10.0.0.99"), Told())
    assert of("address", found).level == FAIL


def test_a_head_that_does_not_answer_fails():
    m = Told()
    assert doctor.check_head(worker(head="10.0.0.10:6379"), m)[0].level == FAIL
    m.open.add(("10.0.0.10", 6379))
    assert doctor.check_head(worker(head="10.0.0.10:6379"), m)[0].level == OK


@pytest.mark.parametrize(("now", "level"), [(999.0, OK), (990.0, WARN), (1100.0, FAIL)])
def test_clock_is_compared_with_the_asking_machine(now, level):
    assert doctor.check_clock(worker(now=now), Told())[0].level == level


def test_clock_is_compared_with_the_heads_date_else_the_time_service_is_believed():
    m = Told()
    m.date = 940.0
    assert "+60 s against the head's HTTP Date" in doctor.check_clock(worker(head="10.0.0.10:6379"), m)[0].what
    m.date = None
    assert doctor.check_clock(worker(head="10.0.0.10:6379"), m)[0].what == "synchronised, by timedatectl"
    m.answers["timedatectl show -p NTPSynchronized --value"] = (0, "no")
    assert doctor.check_clock(worker(), m)[0].level == WARN


@pytest.mark.parametrize(("environ", "level"), [("STEELYARD_STATE_DIR=/x", OK), ("PATH=/bin", FAIL)])
def test_a_taken_port_is_fine_only_when_we_hold_it(environ, level):
    m = Told()
    m.files["/proc/net/tcp"] = (
        TCP + "   0: 0B00000A:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0  0 777 1\n"
    )
    m.lists |= {"/proc": ["42", "self"], "/proc/42/fd": ["3"]}
    m.links["/proc/42/fd/3"] = "socket:[777]"
    m.files |= {
        "/proc/42/comm": "nginx\n",
        "/proc/42/environ": environ,
        "/proc/42/cgroup": "0::/system.slice/x.service",
    }
    finding = doctor.check_ports(worker(), m)[0]
    assert finding.level == level
    assert level == OK or "pid 42 (nginx)" in finding.what


def test_the_heads_control_store_port_is_looked_at_on_the_head_only():
    assert [f.what for f in doctor.check_ports(worker(), Told())] == ["8000 (gateway) is free"]
    assert len(doctor.check_ports(Wanted(role="head"), Told())) == 2


@pytest.mark.parametrize(
    ("mounts", "free", "check", "level"),
    [
        ("/dev/sda1 / ext4 rw 0 0", 500, "state", OK),
        ("/dev/sda1 / ext4 rw 0 0", 0.5, "state", FAIL),
        ("/dev/sda1 / ext4 rw 0 0", 6, "state", WARN),
        ("nas:/x /var/lib nfs4 rw 0 0", 500, "state", FAIL),
        ("x /var/cache tmpfs rw 0 0", 500, "cache", WARN),
        ("x /var/cache ext4 rw,noexec 0 0", 500, "cache", FAIL),
        ("x /opt ext4 ro 0 0", 500, "runtime", FAIL),
        ("/dev/sda1 / ext4 rw 0 0", 3, "runtime", FAIL),
    ],
)
def test_disks(mounts, free, check, level):
    m = Told()
    m.files["/proc/self/mounts"] = mounts
    m.space["/"] = (int(free * GIB), 900 * GIB)
    finding = next(f for f in doctor.check_disks(worker(), m) if check in f.what)
    assert finding.level == level


def test_spinning_disks_are_told_for_the_cache_and_virtual_ones_are_not():
    m = Told()
    m.files["/sys/dev/block/8:1/../queue/rotational"] = "1\n"
    m.links["/sys/dev/block/8:1"] = "../../devices/pci0000:00/ata1/host0/block/sda/sda1"
    assert next(f for f in doctor.check_disks(worker(), m) if "cache" in f.what).level == WARN
    m.links["/sys/dev/block/8:1"] = "../../devices/virtio/block/vda/vda1"
    assert odd(doctor.check_disks(worker(), m)) == []


def test_shared_memory_swap_and_huge_pages():
    m = eight_gpus()
    m.space["/dev/shm"] = (GIB, GIB)
    m.files["/proc/swaps"] += "/swap.img file 8388604 0 -2\n"
    m.files["/sys/kernel/mm/transparent_hugepage/enabled"] = "[always] madvise never"
    assert [(f.check, f.level) for f in doctor.check_memory(worker(), m)] == [
        ("shm", WARN),
        ("swap", WARN),
        ("thp", WARN),
    ]
    m.space["/dev/shm"] = (GIB // 16, GIB // 16)
    assert of("shm", doctor.check_memory(worker(), m)).level == FAIL


def test_limits_that_the_kernel_would_refuse_the_unit():
    m = Told()
    m.files["/proc/sys/fs/nr_open"] = "65536"
    assert of("nofile", doctor.check_limits(worker(), m)).level == FAIL
    assert str(doctor.OPEN_FILES) in (ROOT / "deploy" / "systemd" / "steelyard-head.service").read_text()


def test_a_check_that_breaks_hides_no_other(monkeypatch):
    def broken(w: Wanted, m: Machine) -> list[Finding]:
        raise KeyError("odd machine")

    broken.__name__ = "check_broken"
    monkeypatch.setattr(doctor, "CHECKS", [broken, doctor.check_os])
    assert [(f.check, f.level) for f in doctor.examine(worker(), Told())] == [("broken", WARN), ("os", OK)]


def test_exit_code_and_json(capsys):
    m = Told()
    assert doctor.main(["--json", "--role", "worker"], m) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    m.libc = ""
    assert doctor.main(["--role", "worker"], m) == 1
    told = capsys.readouterr().out
    assert "fail  glibc" in told and "fix: the wheels need glibc 2.28" in told


def test_a_head_without_a_port_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--head", "10.0.0.1"], Told())
    assert ended.value.code == 2


def test_the_file_runs_alone_from_stdin_with_an_old_python():
    """Python 3.9's grammar, the standard library only: hosts have nothing of ours."""
    tree = ast.parse(FILE.read_text(), feature_version=(3, 9))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names | {"__future__"}
    command = [sys.executable, "-I", "-", "--json", "--no-systemd"]
    done = subprocess.run(command, input=FILE.read_text(), capture_output=True, text=True, cwd="/", timeout=120)
    assert {f["check"] for f in json.loads(done.stdout)["findings"]} >= {
        "os",
        "glibc",
        "python",
        "gpu",
        "clock",
        "disk",
    }


def test_steelyard_doctor_is_the_same_file(tmp_path: Path):
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "STEELYARD_STATE_DIR": str(tmp_path)}
    argv = [sys.executable, "-m", "serving.cli.main", "doctor", "--json", "--no-systemd", "--python", sys.executable]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120)
    assert any(str(tmp_path) in f["what"] for f in json.loads(done.stdout)["findings"])
