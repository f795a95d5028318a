"""The ClientApp: carries envelopes between the coordinator and the site's daemon.

It is shipped by the coordinator and therefore trusted with nothing: it holds no key, sees no
record, and the daemon takes its word for nothing. It imports no torch, so that the fresh process
which Flower starts for every message is a light one.
"""

from __future__ import annotations

import os
import time

import grpc
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.relay.local import LocalDaemonError, local_socket
from common.envelope import error_record, from_record, to_record
from common.messages import Envelope

METHOD = "/fedward.Site/Call"
_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def socket_of(context: Context) -> str:
    """Path of the daemon's socket: `fedward-socket` of the node's configuration, else the
    environment's FEDWARD_SOCKET, else the local simulation's, which is started when absent."""
    configured = context.node_config.get("fedward-socket") or os.environ.get("FEDWARD_SOCKET")
    return str(configured) if configured else str(local_socket())


def call(socket: str, request: bytes, *, seconds: float) -> bytes:
    """One request to the daemon. Raises `grpc.RpcError` when it does not answer in time."""
    with grpc.insecure_channel(f"unix:{socket}", options=_UNLIMITED) as channel:
        return channel.unary_unary(METHOD)(request, timeout=seconds)


def forward(message: Message, context: Context) -> Message:
    """The daemon's answer to `message`, or a code; nothing of an exception leaves."""
    try:
        left = message.metadata.created_at + message.metadata.ttl - time.time()
        packed = call(socket_of(context), from_record(message.content).pack(), seconds=left)
        content = to_record(Envelope.unpack(packed))
    except grpc.RpcError as error:
        late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        content = error_record("daemon-late" if late else "daemon-unreachable")
    except LocalDaemonError as error:
        print(error, flush=True)  # stays on this machine, in the log of a local simulation
        content = error_record("daemon-not-started")
    except Exception:
        content = error_record("relay-failed")
    return Message(content, reply_to=message)


app = ClientApp()
app.query()(forward)
app.train()(forward)
app.evaluate()(forward)
