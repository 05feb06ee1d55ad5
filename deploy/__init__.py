"""Bare metal: from an inventory of machines to a serving cluster, over ssh with pyinfra. `deploy.py` is the summary."""
