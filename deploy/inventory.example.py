"""Machines and what they serve. Copy it, correct it, then `make deploy INVENTORY=your.py`. `head` is all that must be there.

Relative paths start at this file's folder.
"""

# The head holds the control store and the keys, answers like any other machine, and runs engines when it has GPUs.
head = {"host": "gpu-00.example.net", "address": "10.20.0.10"}

# A machine is its ssh name, or a dict. `address` is its IP address in the cluster's network; a `host` that is one needs none.
# `labels` are what `placement.labels` of a model file asks for.
workers = [
    {"host": "gpu-01.example.net", "address": "10.20.0.11", "labels": {"region": "eu"}},
    {"host": "gpu-02.example.net", "address": "10.20.0.12", "labels": {"region": "eu"}},
    "10.20.0.13",
]

# user: root, or one with sudo without a password. host_keys: "accept-new" trusts a machine's key at first sight.
# Without `key`, the agent's keys and those in ~/.ssh are tried.
ssh = {"user": "root", "port": 22, "host_keys": "strict"}

# By default each machine's own python3.11 makes the environment from the lock file and its configured package index.
# wheelhouse: a folder here, made by `make wheelhouse`, for racks without an index.
# venv: an environment that is on every machine already, e.g. of your image.
runtime = {"python": "python3.11"}

serve = {
    "models": "models",  # the catalog: a folder here
    "profile": "gpu",  # cpu, gpu or sim
    "listen": "node",  # gateways listen on each machine's `address`; 0.0.0.0 for all
    "port": 8000,
    "gateways": 2,  # on each machine
    "ray_port": 6379,
    "drain_s": 45,  # a stopping machine's requests in progress get so long
    "environment": {"NCCL_SOCKET_IFNAME": "bond0"},  # for engines; no secrets
    # "redis": "10.20.0.5:6379", "redis_password": "redis-password",  # instead of the head's disk
    # "otlp_endpoint": "http://10.20.0.6:4318", "otlp_headers": "otlp-headers", "trace_ratio": 0.1,  # traces
    # "cluster_name": "rack-7",  # in that Redis; by default a digest of the cluster secret keeps clusters apart
}
