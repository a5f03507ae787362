"""For the processes that a test starts, by PYTHONPATH: Kaggle is at a port of this machine, and nothing else exists."""

import os
import socket
import time

LOOPBACK = ("127.0.0.1", "localhost", "::1", "", None)


def confined(call, host_of):
    def checked(*values, **options):
        host = host_of(values)
        host = host.decode() if isinstance(host, bytes) else host
        if host not in LOOPBACK and not str(host).startswith("/"):  # a path is a socket of this machine
            raise AssertionError(f"a test tried to reach {host}")
        return call(*values, **options)

    return checked


def block_network(replace=setattr):
    """Sockets reach the own machine only."""
    replace(socket, "getaddrinfo", confined(socket.getaddrinfo, lambda values: values[0]))
    for name in ("connect", "connect_ex"):
        call = getattr(socket.socket, name)
        replace(socket.socket, name, confined(call, lambda values: values[1][0]))


if port := os.environ.get("FAKE_KAGGLE_PORT"):
    block_network()
    from kagglesdk import kaggle_env  # has no side effects, unlike kaggle

    for environment in kaggle_env._env_to_endpoint:
        kaggle_env._env_to_endpoint[environment] = f"http://127.0.0.1:{port}"
    if os.environ.get("FAKE_NO_SLEEP"):  # pauses between tries
        time.sleep = lambda seconds: None
