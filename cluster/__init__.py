"""Runs workflows on Ray: each worker is a ComfyUI in a process of Ray.

Importing this imports neither ray nor torch nor ComfyUI. The code goes to the workers by value
(`by_value`), so the pack may be anywhere on each machine, or missing: functions that run there use
names that their module imported at its top, and import nothing of this pack themselves.
"""
import sys


def by_value(cloudpickle):
    """Makes Ray (`ray.cloudpickle`) send this package's code along with what uses it."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
