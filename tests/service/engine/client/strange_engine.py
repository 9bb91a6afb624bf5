"""A process that speaks the engine's protocol in one of several wrong ways.

python strange_engine.py <behaviour> --socket PATH --parent PID

Needs no torch, so it starts at once.
"""

from __future__ import annotations

import signal
import socket
import struct
import sys
import time
from typing import Any

import msgpack

INFO = {
    "model_name": "strange",
    "model_id": "0" * 64,
    "vocab_size": 10,
    "max_model_len": 100,
    "device": "cpu",
    "dtype": "float32",
    "default_basis_id": "0" * 64,
    "pid": 1,
}


class Peer:
    def __init__(self, path: str) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        self.listener = listener
        self.stream = listener.accept()[0]

    def send(self, kind: str, **fields: Any) -> None:
        body = msgpack.packb({"type": kind, **fields})
        self.stream.sendall(struct.pack(">I", len(body)) + body)

    def receive(self) -> dict[str, Any]:
        (length,) = struct.unpack(">I", self.stream.recv(4, socket.MSG_WAITALL))
        return msgpack.unpackb(self.stream.recv(length, socket.MSG_WAITALL))


def garbage(peer: Peer) -> None:
    peer.send("ready", info=INFO)
    peer.receive()
    peer.stream.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    time.sleep(60)


def dies_at_start(peer: Peer) -> None:
    peer.send(
        "failed", error={"class": "UnsupportedModel", "code": "x", "message": "no such model", "param": None}
    )
    sys.exit(3)


def stuck_in_a_step(peer: Peer) -> None:
    peer.send("ready", info=INFO)
    for second in range(600):
        peer.send("stats", stats={}, stalled_s=second / 10)
        time.sleep(0.1)


def silent(peer: Peer) -> None:
    peer.send("ready", info=INFO)
    time.sleep(60)


def deaf_to_sigterm(peer: Peer) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    peer.send("ready", info=INFO)
    peer.send("stats", stats={"steps_total": 1}, stalled_s=0.0)
    time.sleep(60)


def hangs_up(peer: Peer) -> None:
    """Cut every connection after the first request on it, and continue with the next connection."""
    while True:
        peer.send("ready", info=INFO)
        peer.receive()
        peer.stream.close()
        peer.stream = peer.listener.accept()[0]


def answers(peer: Peer) -> None:
    """Refuse prompts that start with 0, never end those that start with 1, and answer others in three
    frames."""
    peer.send("ready", info=INFO)
    while True:
        message = peer.receive()
        if message["type"] == "unload":
            peer.send("done", id=message["id"], error=None)
        if message["type"] == "cancel":
            peer.send("stats", stats={"preemptions_total": 1}, stalled_s=0.0)
        if message["type"] != "submit":
            continue
        request_id, first = message["request"]["request_id"], message["request"]["token_ids"][0]
        if first == 0:
            error = {"class": "InvalidInput", "code": "bad_token", "message": "no zeros", "param": "prompt"}
            peer.send("refused", request_id=request_id, error=error)
            continue
        for token in range(3):
            finish = "stop" if token == 2 and first != 1 else None
            row = [request_id, [token], [[token, -1.0, []]], None, finish, None, 0, 1, None]
            peer.send("outputs", outputs=[row])


if __name__ == "__main__":
    behaviour, place = sys.argv[1], sys.argv[sys.argv.index("--socket") + 1]
    globals()[behaviour](Peer(place))
