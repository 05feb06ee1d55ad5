"""Where everything lies on a machine. The units name the same paths."""

USER = "steelyard"
ETC = "/etc/steelyard"
OPT = "/opt/steelyard"
STATE = "/var/lib/steelyard"
CACHE = "/var/cache/steelyard"
RUN = "/run/steelyard"  # made by systemd for the unit: Ray's sockets, whose paths must be short
MODELS = f"{ETC}/models"
ENVIRONMENT = f"{ETC}/steelyard.env"
RELEASES = f"{OPT}/releases"  # source trees, by the hash of their content
RUNTIMES = f"{OPT}/runtimes"  # Python environments, by the hash of their lock file
CURRENT = f"{OPT}/current"  # -> releases/<hash>
VENV = f"{OPT}/venv"  # -> runtimes/<hash>, or the one that was there already
COMMAND = "/usr/local/bin/steelyard"
UNITS = "/etc/systemd/system"
UVM = "steelyard-uvm.service"  # beside either role's unit, which starts it
RUNNING = f"{ETC}/running"  # digest of what the running unit was started with
APPLIED = f"{ETC}/applied"  # digest of the catalog that was applied last
SECRETS = ("cluster-secret", "ray-token")  # in STATE, the same on every machine

FOLDERS = (
    (ETC, "root", "0755"),
    (OPT, "root", "0755"),
    (RELEASES, "root", "0755"),
    (STATE, USER, "0700"),
    (CACHE, USER, "0700"),
)
EVERYTHING = (OPT, ETC, STATE, CACHE, RUN, COMMAND)
