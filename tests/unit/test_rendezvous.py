"""How a rank comes to rank 0's store, and what it says when there is none."""

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from bigtrain.distributed.rendezvous import on_one_host, rendezvous
from bigtrain.errors import BigtrainError
from bigtrain.launching.spawn import free_port


@pytest.fixture
def rank(monkeypatch):
    """A function that makes this process a rank of two; returns the port of the store."""

    def become(number, port=None, **variables):
        port = port or free_port()
        there = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        for name, value in ({"BIGTRAIN_JOIN_SECONDS": 1.5} | there).items():
            monkeypatch.setenv(name, str(value))
        return port

    return become


class Silent:
    """Listens, accepts, and says `answer` and nothing else."""

    def __init__(self, answer=b""):
        self.listener, self.answer, self.accepted = socket.create_server(("127.0.0.1", 0)), answer, []
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            connection.sendall(self.answer)
            self.accepted.append(connection)

    def close(self):
        self.listener.close()
        for connection in self.accepted:
            connection.close()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 64])
def test_a_listener_that_is_no_store_does_not_hold_a_rank(rank, answer):
    listener = Silent(answer)
    rank(1, listener.port)
    begun = time.monotonic()
    with pytest.raises(BigtrainError) as told:
        rendezvous(1, 2, {}, lambda _: [])
    assert time.monotonic() - begun < 15
    assert f"127.0.0.1:{listener.port}" in str(told.value)
    assert "MASTER_PORT" in str(told.value)
    assert listener.accepted
    listener.close()


def listening(port):
    """The addresses, in hex as /proc/net has them, at which somebody listens on a port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if address.endswith(f":{port:04X}") and state == "0A":
                found.add(address.partition(":")[0])
    return found


@pytest.mark.parametrize(
    ("variables", "alone"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, True),
        ({"MASTER_ADDR": "localhost"}, True),
        ({"MASTER_ADDR": "127.0.1.1"}, True),  # a host's own name on Debian
        ({"MASTER_ADDR": "node0.example", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"MASTER_ADDR": "node0.example", "LOCAL_WORLD_SIZE": "1"}, False),
        ({"MASTER_ADDR": "node0.example"}, False),
    ],
)
def test_rank_0_of_one_host_listens_there_alone(rank, monkeypatch, variables, alone):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    port = rank(0, **variables)

    def come():
        with suppress(BigtrainError):  # rank 1 does not come
            rendezvous(0, 2, {}, lambda _: [])

    waiting = threading.Thread(target=come)
    waiting.start()
    while not (found := listening(port)):
        assert waiting.is_alive()
        time.sleep(0.01)
    assert (found == {"0100007F"}) is alone
    assert on_one_host() is alone
    waiting.join()


def test_a_port_that_another_program_has_is_named(rank):
    listener = Silent()
    rank(0, listener.port)
    with pytest.raises(
        BigtrainError, match=rf"cannot use port {listener.port} \(MASTER_PORT\): Address already in use"
    ):
        rendezvous(0, 2, {}, lambda _: [])
    listener.close()


def test_a_process_that_meets_twice_at_one_port_serves_it_once(rank):
    port = rank(0, WORLD_SIZE=1, BIGTRAIN_JOIN_SECONDS=30)
    stores = [rendezvous(0, 1, {}, lambda _: [])[0] for _ in range(2)]
    stores[0].set("a", "1")
    assert stores[1].check(["a"]) is False  # each meeting has its own part of it
    assert listening(port) == {"0100007F"}
