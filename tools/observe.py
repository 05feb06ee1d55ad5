"""`make observe`: a Prometheus, and a Grafana where it is installed, for the stack that runs from this state folder.

Both listen on 127.0.0.1 only, keep their data in `STATE_DIR/observe`, and end with this process, however it ends.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml

from serving.cli import cluster
from serving.errors import OperatorError, PortTaken
from serving.settings import Settings, load_settings

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "observability"
GRAFANA_HOMES = ("/usr/share/grafana", "/opt/grafana")  # of its packages: its pages lie there
READY_S = 60.0
STOP_S = 10.0
RETENTION = "7d"
LISTEN = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """One child and how to see that it serves."""

    name: str
    argv: list[str]
    url: str
    health: str
    env: dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(prog="observe", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus")
    parser.add_argument("--grafana-port", type=int, default=3000)
    parser.add_argument("--interval", default="5s", help="between scrapes and evaluations")
    args = parser.parse_args()
    try:
        return run(load_settings(), args.port, args.grafana_port, args.interval)
    except OperatorError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def run(settings: Settings, port: int, grafana_port: int, interval: str) -> int:
    """Starts both and stays until told to stop, or until one ends by itself (exit code 1)."""
    if not re.fullmatch(r"[1-9][0-9]*(ms|s|m)", interval):
        raise OperatorError(f"--interval {interval} is no duration", "Write it as 500ms, 5s or 1m")
    folder = settings.state_dir / "observe"
    servers = [_prometheus(settings, folder, port, interval)]
    grafana = _grafana(folder, grafana_port, f"http://{LISTEN}:{port}")
    if grafana is not None:
        servers.append(grafana)
    stop = threading.Event()
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, lambda *_: stop.set())
    children: list[tuple[Server, subprocess.Popen[bytes]]] = []
    try:
        for server in servers:
            _free(server)
            children.append((server, _started(server, folder)))
            _wait_until_it_answers(*children[-1], folder, stop)
        for server in servers:
            print(f"{server.name}  {server.url}")
        if grafana is None:
            print("Grafana is not installed; its dashboards are in deploy/observability/dashboards")
        print("Ctrl-C stops everything", flush=True)
        while not stop.wait(0.5):
            for server, child in children:
                if child.poll() is not None:
                    raise OperatorError(f"{server.name} ended: {_last_line(server, folder)}", "See the log")
        return 0
    finally:
        for _, child in children:
            child.terminate()
        for _, child in children:
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _prometheus(settings: Settings, folder: Path, port: int, interval: str) -> Server:
    binary = shutil.which("prometheus")
    if binary is None:
        raise OperatorError("there is no prometheus on the PATH", "apt-get install prometheus, or put its binary there")
    running = cluster.read_cluster_file(settings)
    if running is None:
        raise OperatorError(f"no stack runs from {settings.state_dir}", "Start one with `make serve`")
    host, at = running.host or settings.host, running.port or settings.port
    host = {"0.0.0.0": LISTEN, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    if not settings.api_key_file.exists():
        raise OperatorError(f"there is no key {settings.api_key_file}", "Put one with the scope `metrics` there")
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    for name in ("recording.yml", "alerts.yml"):
        shutil.copy(FOLDER / name, folder / name)
    config = folder / "prometheus.yml"
    config.write_text(configuration(f"http://{host}:{at}", settings.api_key_file, interval))
    argv = [
        binary,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--storage.tsdb.retention.time={RETENTION}",
        f"--web.listen-address={LISTEN}:{port}",
    ]
    url = f"http://{LISTEN}:{port}"
    return Server("Prometheus", argv, url, f"{url}/-/ready", {})


def configuration(gateway: str, key: Path, interval: str) -> str:
    """The shipped prometheus.yml, for this gateway and key."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": interval, "evaluation_interval": interval, "scrape_timeout": interval}
    (job,) = config["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    discovery |= {"url": f"{gateway}/metrics/targets", "refresh_interval": interval}
    for part in (job, discovery):
        part["authorization"]["credentials_file"] = str(key)
    return yaml.safe_dump(config, sort_keys=False)


def _grafana(folder: Path, port: int, prometheus: str) -> Server | None:
    """None where it is not installed. Whoever comes may look; to change something one needs the password."""
    home = next((h for h in GRAFANA_HOMES if Path(h, "conf", "defaults.ini").exists()), None)
    binary = shutil.which("grafana") or (home and shutil.which("grafana", path=f"{home}/bin"))
    if home is None or not binary:
        return None
    provisioning = folder / "grafana" / "provisioning"
    for part in ("datasources", "dashboards"):
        (provisioning / part).mkdir(parents=True, exist_ok=True)
    source = {"name": "Prometheus", "type": "prometheus", "url": prometheus, "access": "proxy", "isDefault": True}
    provider = {
        "name": "steelyard",
        "folder": "Steelyard",
        "type": "file",
        "options": {"path": str(FOLDER / "dashboards")},
    }
    (provisioning / "datasources" / "prometheus.yml").write_text(
        yaml.safe_dump({"apiVersion": 1, "datasources": [source]})
    )
    (provisioning / "dashboards" / "steelyard.yml").write_text(
        yaml.safe_dump({"apiVersion": 1, "providers": [provider]})
    )
    env = {
        "GF_SERVER_HTTP_ADDR": LISTEN,
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_PATHS_DATA": str(folder / "grafana" / "data"),
        "GF_PATHS_LOGS": str(folder / "grafana" / "logs"),
        "GF_PATHS_PLUGINS": str(folder / "grafana" / "plugins"),
        "GF_PATHS_PROVISIONING": str(provisioning),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_SECURITY_ADMIN_PASSWORD": secrets.token_urlsafe(16),
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    }
    url = f"http://{LISTEN}:{port}"
    return Server("Grafana", [binary, "server", f"--homepath={home}"], url, f"{url}/api/health", env)


def _free(server: Server) -> None:
    """Something else that answers there would look like ours."""
    try:
        urllib.request.urlopen(server.url, timeout=2).close()
    except urllib.error.HTTPError:
        pass
    except OSError:
        return
    raise PortTaken(f"something answers at {server.url} already", "Choose with --port or --grafana-port")


def _started(server: Server, folder: Path) -> subprocess.Popen[bytes]:
    with open(_log(server, folder), "wb") as log:
        return subprocess.Popen(
            server.argv,
            env=os.environ | server.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops them in order
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _wait_until_it_answers(server: Server, child: subprocess.Popen[bytes], folder: Path, stop: threading.Event) -> None:
    deadline = time.monotonic() + READY_S
    while not stop.is_set():
        try:
            urllib.request.urlopen(server.health, timeout=2).close()
            return
        except OSError:
            pass
        if child.poll() is not None or time.monotonic() > deadline:
            raise OperatorError(f"{server.name} does not start: {_last_line(server, folder)}", "See the log")
        stop.wait(0.1)


def _log(server: Server, folder: Path) -> Path:
    return folder / f"{server.name.lower()}.log"


def _last_line(server: Server, folder: Path) -> str:
    log = _log(server, folder)
    lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    return f"{lines[-1][-300:]} ({log})"


if __name__ == "__main__":
    sys.exit(main())
