"""A cluster, a namespace in it, and what runs its Pods."""

from tests.cluster.fixtures import *  # noqa: F403
